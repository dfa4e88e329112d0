"""The verdict, the file of raw slices and the picture."""

from __future__ import annotations

import gzip
import itertools
import json
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest

from mixvisor.metrics import mixing
from mixvisor.metrics.mixing.design import rounds
from mixvisor.metrics.mixing.plot import svg
from mixvisor.metrics.mixing.report import analyse, judge, per_cent, to_json, to_result
from mixvisor.metrics.mixing.slices import COLUMNS, DataError, read, write

from .synthetic import random_blocks, record


def measured(count=12, seed=1, **planted):
    plan = itertools.islice(rounds((500_000, 1_000_000, 2_000_000), 1_000_000, np.random.default_rng(seed)), count)
    recording = record(seed, [block for one in plan for block in one], **planted)
    return replace(recording, about={"reference_slice_ns": 1_000_000, "dispatch": "precise"})


@pytest.fixture(scope="module")
def costly():
    return measured(cross_us=16.0)


def test_a_planted_cost_is_a_penalty_with_its_figure(costly):
    verdict = judge(analyse(costly))
    assert verdict.kind == "penalty"
    assert "small price" in verdict.headline
    assert not verdict.doubts
    assert any("µs (95 % interval" in sentence for sentence in verdict.sentences)


def test_no_cost_is_none_when_the_interval_is_narrow_enough():
    verdict = judge(analyse(measured(), wanted=0.002))
    assert verdict.kind == "none"


def test_no_cost_is_inconclusive_while_the_interval_is_wider_than_wanted():
    verdict = judge(analyse(measured(), wanted=0.00001))
    assert verdict.kind == "inconclusive"
    assert "too wide" in verdict.headline


def test_a_negative_cost_is_said_as_such():
    assert judge(analyse(measured(cross_us=-16.0))).kind == "gain"


def test_a_broken_null_makes_any_figure_inconclusive():
    verdict = judge(analyse(measured(cross_us=16.0, favour_us=20.0)))
    assert verdict.kind == "inconclusive"
    assert any("should not matter" in doubt for doubt in verdict.doubts)


def test_estimators_that_disagree_make_any_figure_inconclusive(costly):
    analysis = analyse(costly)
    off = replace(analysis.blocks, cost=replace(analysis.blocks.cost, value=60_000.0))
    assert judge(replace(analysis, blocks=off)).kind == "inconclusive"


def test_too_few_data_are_inconclusive():
    verdict = judge(analyse(record(1, random_blocks(2))))
    assert verdict.kind == "inconclusive"
    assert "too few" in verdict.headline


def test_a_working_set_beyond_the_cache_is_noted(costly):
    about = {**costly.about, "working_set_bytes": 2 << 20, "l2_bytes": 2 << 20}
    assert any("L2" in note for note in judge(analyse(replace(costly, about=about))).notes)


def test_json_has_every_figure_with_its_interval(costly):
    analysis = analyse(costly)
    data = json.loads(json.dumps(to_json(analysis, judge(analysis)), allow_nan=False))
    assert data["verdict"]["kind"] == "penalty"
    assert data["cost_us"]["low"] < 16 < data["cost_us"]["high"]
    assert set(data["random_order"]["lost_us_by_transition"]) == {
        "hardware|hardware", "hardware|software", "software|hardware", "software|software"}
    assert [point["slice_ns"] for point in data["blocks"]["points"]] == [500_000, 1_000_000, 2_000_000]
    assert data["ratio_by_victim"]["hardware"]["value"] == pytest.approx(1 - 0.016, abs=0.002)


def test_what_is_kept_has_the_figures_of_the_analysis_and_what_is_unknown_is_said(costly):
    analysis = analyse(costly)
    kept = to_result(analysis, judge(analysis))
    assert kept.usable
    assert kept.cost_us.value == pytest.approx(analysis.cost.value / 1e3)
    assert kept.cost_us.includes(16)
    assert kept.null_us.includes(0)
    assert kept.control_us.includes(0)
    assert kept.host.technology == "unknown"
    nothing = analyse(record(1, random_blocks(2)))
    assert to_result(nothing, judge(nothing)).cost_us is None


def test_a_recording_comes_back_from_its_file_as_it_was(costly, tmp_path):
    path = tmp_path / "data.csv.gz"
    write(costly, path)
    back = read(path)
    assert back.vms == costly.vms
    assert back.blocks == costly.blocks
    assert back.about == costly.about
    for name in COLUMNS:
        assert np.array_equal(getattr(back.slices, name), getattr(costly.slices, name))
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_names_modes_for_other_programs(tmp_path):
    path = tmp_path / "data.csv.gz"
    write(record(1, random_blocks(1)), path)
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    assert lines[0].startswith("# {")
    assert lines[1] == ",".join([*COLUMNS, "mode", "previous_mode"])
    assert lines[3].split(",")[1] in ("h1", "h2", "s1", "s2")
    assert lines[3].split(",")[-1] in ("hardware", "software")


HEADER = ('# {"format": "mixvisor-slices", "version": 1, "vms": [{"name": "h1", "mode": "hardware"}], '
          '"blocks": [{"number": 1, "kind": "random", "replicate": 1, "slice_ns": 1000000}]}\n')
NAMES = ",".join([*COLUMNS, "mode", "previous_mode"]) + "\n"


@pytest.mark.parametrize(("text", "said"), [
    ("", "first line"),
    ("# {nonsense\n", "not a recording"),
    ('# {"format": "other"}\n', "format"),
    (HEADER.replace('"version": 1', '"version": 7'), "version 7"),
    (HEADER.replace('"hardware"', '"magic"'), "'magic' is none of"),
    (HEADER.replace('"random"', '"odd"'), "'odd' is none of"),
    (HEADER, "line 2"),
    (HEADER + "a,b\n", "line 2"),
    (HEADER + NAMES + "1,h1,h1,0,x,0,0,0,0,0,hardware,hardware\n", "line 3"),
    (HEADER + NAMES + "1,zz,h1,0,0,0,0,0,0,0,hardware,hardware\n", "line 3"),
    (HEADER + NAMES + "1,h1\n", "line 3"),
    (HEADER + NAMES + "1,h1,h1,0,99999999999999999999999,0,0,0,0,0,hardware,hardware\n", "not a recording"),
])
def test_a_file_that_is_no_recording_is_refused_with_the_place(tmp_path, text, said):
    path = tmp_path / "data.csv.gz"
    path.write_bytes(gzip.compress(text.encode()))
    with pytest.raises(DataError, match=r"data\.csv\.gz") as caught:
        read(path)
    assert said in str(caught.value)


def test_a_file_that_is_not_packed_or_not_there_is_refused(tmp_path):
    path = tmp_path / "data.csv.gz"
    with pytest.raises(DataError, match="cannot be read"):
        read(path)
    path.write_text("plain")
    with pytest.raises(DataError, match="not a recording of mixvisor measure"):
        read(path)
    path.write_bytes(gzip.compress(HEADER.encode())[:-12])
    with pytest.raises(DataError, match="cannot be read"):
        read(path)


def test_the_picture_is_xml_that_names_host_cost_and_every_point(costly):
    analysis = analyse(costly)
    text = svg(analysis, judge(analysis), title="Made <up>")
    root = ElementTree.fromstring(text)
    words = " ".join(element.text or "" for element in root.iter())
    assert "Made <up>" in words
    assert "µs a crossing" in words
    assert words.count("replicates:") == 3
    assert words.count("randomised order,") == 1
    for element in root.iter():
        for name in ("x", "x1", "x2", "cx"):
            assert 0 <= float(element.get(name, 0)) <= 760
        for name in ("y", "y1", "y2", "cy"):
            assert 0 <= float(element.get(name, 0)) <= 470


def test_nothing_to_draw_is_said():
    analysis = analyse(record(1, random_blocks(2)))
    with pytest.raises(ValueError, match="no estimate"):
        svg(analysis, judge(analysis), title="x")


@pytest.mark.parametrize(("fraction", "words"), [
    (0.0162, "1.62 %"), (0.0032, "0.32 %"), (0.00004, "0.004 %"), (0.25, "25.0 %"), (-0.01, "-1.00 %")])
def test_per_cent_keeps_the_digits_that_matter(fraction, words):
    assert per_cent(fraction) == words


def test_without_numpy_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(mixing.ExtraMissing, match=r"mixvisor\[measure\]"):
        mixing.need_extra()
