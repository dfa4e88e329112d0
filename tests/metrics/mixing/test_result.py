"""The result that is kept: it comes back as it was, and what is none is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mixvisor.metrics.mixing.result import (
    Interval,
    MeasuredHost,
    MixingResult,
    ResultError,
    read_result,
    write_result,
)

RESULT = MixingResult(
    source="on-demand", measured_unix_s=1.8e9, seconds=60.0,
    host=MeasuredHost(technology="pvm", cpu_model="AMD EPYC", kernel="6.18"), cpu=1, dispatch="precise",
    guests="4 built-in guests", working_set_bytes=262144, reference_slice_us=1000.0, slices=40_000, verdict="penalty",
    headline="Mixing has a price.", doubts=(), cost_us=Interval(16.0, 15.5, 16.5),
    cost_us_by_victim={"hardware": Interval(20.0, 19.0, 21.0), "software": Interval(12.0, 11.0, 13.0)},
    null_us=Interval(0.1, -0.3, 0.5), control_us=None, agreement_us=None, switching_us=Interval(32.0, 31.0, 33.0))


def test_a_result_comes_back_from_its_file_as_it_was(tmp_path):
    path = tmp_path / "mixing.json"
    write_result(RESULT, path)
    assert read_result(path) == RESULT
    assert list(tmp_path.iterdir()) == [path]


def test_ratios_follow_from_the_costs_at_the_reference_slice():
    ratio = RESULT.ratio_by_victim["hardware"]
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((0.98, 0.979, 0.981))


def test_a_result_with_doubts_or_without_a_figure_is_not_usable():
    assert RESULT.usable
    assert not replace(RESULT, doubts=("the null",)).usable
    assert not replace(RESULT, cost_us=None).usable


def test_a_result_of_another_kernel_is_not_of_this_host():
    assert RESULT.is_of(RESULT.host)
    assert not RESULT.is_of(replace(RESULT.host, kernel="6.19"))


def test_no_file_is_told_from_a_bad_one(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_result(tmp_path / "mixing.json")


@pytest.mark.parametrize(("change", "said"), [
    ({"format": 2}, "format 1"),
    ({"verdict": "maybe"}, "verdict"),
    ({"cost_us": {"value": 3.0, "low": 4.0, "high": 5.0}}, "cost_us"),
    ({"cost_us": {"value": float("nan"), "low": 4.0, "high": 5.0}}, "cost_us"),
    ({"cpu": "1"}, "cpu"),
    ({"surprise": 1}, "surprise"),
])
def test_what_is_no_result_is_refused_with_the_field(tmp_path, change, said):
    path = tmp_path / "mixing.json"
    path.write_text(json.dumps({**RESULT.to_json(), **change}))
    with pytest.raises(ResultError, match=said):
        read_result(path)


@pytest.mark.parametrize("text", ["", "[]", "{", "\0" * 8, "[" * 100_000])
def test_a_file_of_anything_is_refused(tmp_path, text):
    path = tmp_path / "mixing.json"
    path.write_text(text)
    with pytest.raises(ResultError, match=r"mixing\.json"):
        read_result(path)
