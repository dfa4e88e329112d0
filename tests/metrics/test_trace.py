"""The trace file: valid JSON, nested slices, modes above VMs."""

from __future__ import annotations

import io
import json
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from mixvisor.metrics.trace import MODE_GAP_NS, TraceMark, TraceSlice, write_trace

SPANS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 10**7), st.integers(0, 3 * 10**6),
                           st.sampled_from(["software", "hardware", ""])), max_size=40)


def events(slices: list[TraceSlice], marks: tuple[TraceMark, ...] = ()) -> list[dict]:
    out = io.StringIO()
    write_trace(out.write, slices, title="a \"title\"", marks=marks)
    return json.loads(out.getvalue())["traceEvents"]


@given(SPANS)
def test_slices_of_a_track_never_overlap_and_lie_within_their_mode(spans: list[tuple[int, int, int, str]]) -> None:
    found = events([TraceSlice(cpu, 10**15 + start, 10**15 + start + length, "vm", mode)
                    for cpu, start, length, mode in spans])
    for cpu in range(3):
        track = [e for e in found if e["ph"] == "X" and e["tid"] == cpu + 1]
        slices = [e for e in track if e["name"] == "vm"]
        modes = [e for e in track if e["name"] != "vm"]
        for row in (slices, modes):
            for one, two in pairwise(row):
                assert round(one["ts"] * 1000) + round(one["dur"] * 1000) <= round(two["ts"] * 1000)
        for one in slices:
            around = [m for m in modes if m["ts"] <= one["ts"]
                      and round((m["ts"] + m["dur"]) * 1000) >= round((one["ts"] + one["dur"]) * 1000)]
            assert [m["name"] for m in around] == ([one["cat"]] if one["cat"] != "idle" else [])


def test_times_count_from_the_first_slice_to_the_nanosecond() -> None:
    base = 1_234_567_890_123_456_789
    found = [e for e in events([TraceSlice(0, base, base + 1001, "a", "software"),
                                TraceSlice(1, base + 2_000_003, base + 3_000_004, "b", "hardware", {"late_us": 1.5})])
             if e["name"] in "ab"]
    assert [(e["ts"], e["dur"]) for e in found] == [(0.0, 1.001), (2000.003, 1000.001)]
    assert found[1]["args"] == {"late_us": 1.5}


def test_a_pause_ends_the_mode() -> None:
    found = events([TraceSlice(0, 0, 10, "a", "software"), TraceSlice(0, 20, 30, "b", "software"),
                    TraceSlice(0, 31 + MODE_GAP_NS, 40 + MODE_GAP_NS, "a", "software")])
    assert [e["dur"] for e in found if e["name"] == "software"] == [0.03, 0.009]


def test_marks_stand_where_they_happened_and_an_empty_trace_is_one() -> None:
    found = events([TraceSlice(4, 1000, 9000, "a", "software")], (TraceMark(5000, "guard-fired"),))
    assert [e["ts"] for e in found if e["ph"] == "i"] == [4.0]
    assert [e["name"] for e in events([])] == ["process_name"]
