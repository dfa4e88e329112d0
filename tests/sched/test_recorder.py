"""The flight recorder: bounded, and what it kept comes back the same."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixvisor.sched.recorder import NAMES, FlightRecorder, RecordingError, read_recording
from mixvisor.sched.shared import SliceRecord

WORD = st.integers(-(2**63), 2**63 - 1)


def record(start: int, generation: int = 1) -> SliceRecord:
    return SliceRecord(start, start + 10, start + 10, 0, generation, -1, 0, 10, 0, 0, 0, 0, 0, 0, 1, 0)


def test_the_oldest_slices_give_way_and_other_cpus_keep_theirs() -> None:
    recorder = FlightRecorder([0, 1], keep=8)
    recorder.note(1, [record(0)])
    for number in range(100):
        recorder.note(0, [record(number * 10)])
    kept = recorder.copy(0, "x").unpack().slices
    assert [one.start_ns for one in kept[0]] == [920, 930, 940, 950, 960, 970, 980, 990]
    assert len(kept[1]) == 1


def test_names_are_bounded_and_only_those_that_occur_are_told() -> None:
    recorder = FlightRecorder([0])
    for generation in range(NAMES + 10):
        recorder.name(generation, f"vm-{generation}")
    recorder.note(0, [record(0, NAMES), record(10, 3)])
    assert recorder.copy(0, "x").unpack().vms == {NAMES: f"vm-{NAMES}"}


def test_only_what_ended_in_the_last_seconds_is_asked_for() -> None:
    recorder = FlightRecorder([0])
    recorder.note(0, [record(number * 1_000_000_000) for number in range(10)])
    assert len(recorder.copy(9_000_000_005, "x", 3.0).unpack().slices[0]) == 4


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(0, 2**60), st.integers(0, 2**60), st.integers(-1, 1),
                          st.lists(WORD, min_size=13, max_size=13)), max_size=5), st.text(max_size=20))
def test_a_recording_survives_its_file(rows: list[tuple[int, int, int, int, list[int]]], name: str) -> None:
    recorder = FlightRecorder(range(101))
    recorder.name(7, name)
    for cpu, start, length, mode, more in rows:
        recorder.note(cpu, [SliceRecord(start, start + length, *more[:4], mode, *more[4:])])
    recording = recorder.copy(1, "guard-fired").unpack()
    again = read_recording(recording.lines())
    assert {cpu: records for cpu, records in recording.slices.items() if records} == again.slices
    assert (again.vms, again.reason, again.taken_ns) == (recording.vms, "guard-fired", 1)


@given(st.text(max_size=200))
def test_no_text_breaks_the_reader(text: str) -> None:
    with pytest.raises(RecordingError, match=r"^line 1"):
        read_recording(text.splitlines())
