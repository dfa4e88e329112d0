"""Reports of a worker are shown only in the shape they must have; everything in them is harmless."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixvisor.service.backend import ServiceError
from mixvisor.service.reports import SHAPES, checked

WHERE = {"mode": "real mode", "place": "0000:7c00", "address": 0x7C00, "instruction": "hlt",
         "registers": {"rax": 1}, "code": [[0x7C00, "f4", "hlt"]], "exits": [["halt", 0x7C00, "hlt"]],
         "post": [1, 0xFF]}
PROFILE = {"samples": 1, "places": 1, "rings": [1, 0, 0, 0], "vcpus": [1], "modes": {"real mode": 1}, "hot": [],
           "code": [], "wall_ns": 1, "cpu_ns": 1, "host_ns": 0, "sleeping_ns": 0, "granularity": "block"}


def test_a_report_passes_and_what_does_not_belong_is_dropped():
    assert checked("where", {**WHERE, "more": [1]}) == WHERE
    assert checked("profile-end", PROFILE) == PROFILE
    assert checked("profile", {"anything": 1}) == {}


def test_texts_are_made_printable_and_bounded():
    assert checked("where", {**WHERE, "mode": "a\x1b[2J\nb" + "x" * 5000})["mode"].startswith("a [2J b")
    assert len(checked("where", {**WHERE, "mode": "x" * 5000})["mode"]) < 300
    assert checked("profile-end", {**PROFILE, "modes": {"\x1b]0;": 3}})["modes"] == {"]0;": 3}


@pytest.mark.parametrize(("op", "wrong"), [
    ("where", None), ("where", []), ("where", {}),
    ("where", {**WHERE, "address": -1}), ("where", {**WHERE, "address": 1 << 64}),
    ("where", {**WHERE, "address": True}),
    ("where", {**WHERE, "code": [[1, "f4"]]}), ("where", {**WHERE, "code": {"a": 1}}),
    ("where", {**WHERE, "exits": [["halt", 1, "hlt"]] * 2000}),
    ("exits", {"total": 1, "places": 1, "sites": [{"reason": "halt"}]}),
    ("profile-end", {**PROFILE, "rings": [1, 2, 3]}), ("profile-end", {**PROFILE, "modes": [1]}),
    ("profile-end", {**PROFILE, "cpu_ns": 1.5}),
])
def test_what_is_no_report_is_refused(op, wrong):
    with pytest.raises(ServiceError, match=f"answer to '{op}'"):
        checked(op, wrong)


@given(op=st.sampled_from(list(SHAPES)), answer=st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(list(WHERE)) | st.text(), inner)))
def test_any_answer_is_a_report_or_refused(op, answer):
    try:
        checked(op, answer)
    except ServiceError:
        return
