"""Who had which host CPU when, as a file that opens in Perfetto (ui.perfetto.dev) or chrome://tracing.

Theory.  The Trace Event Format: one JSON object, an array of events, times in µs. A host CPU is a
track. On it lie two rows: the mode that the CPU is in, and below that, nested, each slice by the
name of its VM with what is known of it as arguments. The row of modes is there because Perfetto
colours a slice by its name and by nothing else (google/perfetto#208): so one mode has one colour, on
all tracks. `cname` says the same to chrome://tracing.

Invariants.  Slices of a track neither overlap nor stick out of their mode; times count from the
first slice, so that a double holds them to the nanosecond. Pure: writes to what it is given.

Where it is poor: text, about 150 bytes a slice; Perfetto opens some hundreds of megabytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

__all__ = ["TraceMark", "TraceSlice", "write_trace"]

# Of the few names that chrome://tracing knows: blue and red.
COLOURS: Final = {"software": "rail_response", "hardware": "rail_animation"}
MODE_GAP_NS: Final = 1_000_000     # longer without a VM, and the CPU is in no mode


@dataclass(frozen=True, slots=True)
class TraceSlice:
    """One VM on one host CPU. `mode` "": nothing of a VM (idle)."""

    cpu: int
    start_ns: int
    end_ns: int
    name: str
    mode: str
    args: Mapping[str, int | float | str | bool] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TraceMark:
    """Something that happened at a moment, on no CPU in particular."""

    at_ns: int
    name: str


def write_trace(
    write: Callable[[str], object], slices: Iterable[TraceSlice], *, title: str, marks: Sequence[TraceMark] = (),
) -> int:
    """A whole file, given to `write` in pieces; returns how many slices it has."""
    tracks: dict[int, list[TraceSlice]] = {}
    for one in slices:
        if one.end_ns > one.start_ns:
            tracks.setdefault(one.cpu, []).append(one)
    base = min((track[0].start_ns for track in map(_in_order, tracks.values())), default=0)
    write('{"displayTimeUnit":"ns","otherData":{"title":' + json.dumps(title) + '},"traceEvents":[\n')
    write(_event("M", pid=1, name="process_name", args={"name": "Host CPUs"}))
    count = 0
    for cpu in sorted(tracks):
        # tid 0 is the idle task's, so count from 1.
        who = {"pid": 1, "tid": cpu + 1}
        write(",\n" + _event("M", **who, name="thread_name", args={"name": f"CPU {cpu}"}))
        write(",\n" + _event("M", **who, name="thread_sort_index", args={"sort_index": cpu}))
        for mode, members in _runs(tracks[cpu]):
            if mode:
                write(",\n" + _slice(cpu, members[0].start_ns, members[-1].end_ns, base, mode, mode, {}))
            for one in members:
                count += 1
                write(",\n" + _slice(cpu, one.start_ns, one.end_ns, base, one.name, mode, one.args))
    for mark in marks:
        write(",\n" + _event("i", pid=1, tid=1, name=mark.name, s="g", ts=max(0, mark.at_ns - base) / 1000))
    write("\n]}\n")
    return count


def _in_order(track: list[TraceSlice]) -> list[TraceSlice]:
    track.sort(key=lambda one: one.start_ns)
    # A record begins where the one before ends; if a clock was read twice, the earlier one gives way.
    for at in range(len(track) - 1):
        one, following = track[at], track[at + 1]
        if one.end_ns > following.start_ns:
            track[at] = TraceSlice(one.cpu, one.start_ns, following.start_ns, one.name, one.mode, one.args)
    track[:] = [one for one in track if one.end_ns > one.start_ns]
    return track


def _runs(track: Sequence[TraceSlice]) -> Iterable[tuple[str, list[TraceSlice]]]:
    """Slices of one mode that follow each other closely, together."""
    members: list[TraceSlice] = []
    for one in track:
        if members and (one.mode != members[-1].mode or one.start_ns - members[-1].end_ns > MODE_GAP_NS):
            yield members[-1].mode, members
            members = []
        members.append(one)
    if members:
        yield members[-1].mode, members


def _slice(
    cpu: int, start_ns: int, end_ns: int, base: int, name: str, mode: str,
    args: Mapping[str, int | float | str | bool],
) -> str:
    start, length = start_ns - base, end_ns - start_ns
    colour = f',"cname":"{COLOURS[mode]}"' if mode in COLOURS else ""
    more = f',"args":{json.dumps(args, separators=(",", ":"))}' if args else ""
    return (f'{{"ph":"X","pid":1,"tid":{cpu + 1},"name":{json.dumps(name)},"cat":"{mode or "idle"}",'
            f'"ts":{start // 1000}.{start % 1000:03d},"dur":{length // 1000}.{length % 1000:03d}{colour}{more}}}')


def _event(phase: str, **fields: object) -> str:
    return json.dumps({"ph": phase, **fields}, separators=(",", ":"))
