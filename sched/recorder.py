"""The flight recorder: the last slices of every host CPU, kept for when something went wrong.

Theory.  What the supervisor reads from the dispatchers' rings (shared.py) it also keeps here, packed
as it was in the ring, in a bounded queue for each host CPU: always on, so that the moments before
a failure are there afterwards. It costs a copy of 128 bytes a slice. A `Recording` is an immutable
copy of it; as a file it is JSON lines, the first of them a head that says what the rest are.

Invariants.  Bounded in slices and in names, whatever the VMs do. Reading a recording believes
nothing: a file that is none is a `RecordingError`, with the line.

Units: `_ns`, CLOCK_MONOTONIC. Where it is poor: a slice is what a dispatcher saw of it, so within one
the order of VMs (a sleeper that ran in between) is not known; the time that the ring covers can be
shorter than asked for (`KEEP` slices over all host CPUs).
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

from .shared import MODES, RECORD, SliceRecord

__all__ = ["FlightRecorder", "PackedRecording", "Recording", "RecordingError", "read_recording"]

KEEP: Final = 32_768               # slices, of all host CPUs; 128 bytes each and some for Python
KEEP_LEAST: Final = 2_048          # of one host CPU
NAMES: Final = 8_192
FORMAT: Final = 1
_FIELDS: Final = SliceRecord._fields


class RecordingError(ValueError):
    """The text is no recording; says which line and why."""


@dataclass(frozen=True, slots=True)
class Recording:
    """Slices by host CPU, oldest first. `vms`: the names behind `generation`s."""

    taken_ns: int
    reason: str                                # why it was made: asked for, or what went wrong
    vms: Mapping[int, str]
    slices: Mapping[int, Sequence[SliceRecord]]

    def lines(self) -> Iterator[str]:
        """As text, a line at a time."""
        yield json.dumps({
            "mixvisor_recording": FORMAT, "taken_ns": self.taken_ns, "reason": self.reason, "modes": MODES,
            "vms": {str(generation): name for generation, name in self.vms.items()}, "fields": ["cpu", *_FIELDS]})
        for cpu, records in self.slices.items():
            for record in records:
                yield json.dumps([cpu, *record], separators=(",", ":"))


@dataclass(frozen=True, slots=True)
class PackedRecording:
    """A copy of the recorder, not unpacked yet: that takes a while and may be done in any thread."""

    taken_ns: int
    reason: str
    since_ns: int
    vms: Mapping[int, str]
    packed: Mapping[int, Sequence[bytes]]

    def unpack(self) -> Recording:
        slices: dict[int, list[SliceRecord]] = {}
        used: set[int] = set()
        for cpu, packed in self.packed.items():
            records = [SliceRecord._make(RECORD.unpack(one)) for one in packed]
            slices[cpu] = [record for record in records if record.end_ns > self.since_ns]
            used.update(record.generation for record in slices[cpu])
        return Recording(self.taken_ns, self.reason,
                         {number: name for number, name in self.vms.items() if number in used}, slices)


class FlightRecorder:
    """cpus: the host CPUs whose slices will be noted."""

    def __init__(self, cpus: Sequence[int], keep: int = KEEP) -> None:
        each = max(min(keep, KEEP_LEAST), keep // len(cpus))
        self._packed: dict[int, deque[bytes]] = {cpu: deque(maxlen=each) for cpu in cpus}
        self._names: dict[int, str] = {}

    def name(self, generation: int, vm: str) -> None:
        """From now on slices of this generation are the VM's."""
        self._names[generation] = vm
        if len(self._names) > NAMES:
            del self._names[next(iter(self._names))]

    def note(self, cpu: int, records: Iterable[SliceRecord]) -> None:
        self._packed[cpu].extend([RECORD.pack(*record) for record in records])

    def copy(self, now: int, reason: str, seconds: float | None = None) -> PackedRecording:
        """What is kept, or what of it ended in the last `seconds`."""
        since = 0 if seconds is None else now - round(seconds * 1e9)
        return PackedRecording(now, reason, since, dict(self._names),
                               {cpu: list(packed) for cpu, packed in self._packed.items()})


def read_recording(lines: Iterable[str]) -> Recording:
    """The recording that `Recording.lines` wrote. Raises RecordingError."""
    source = iter(lines)
    head = _parsed(1, next(source, ""))
    if not isinstance(head, dict) or head.get("mixvisor_recording") != FORMAT:
        raise RecordingError(f"line 1 is not the head of a Mixvisor recording of format {FORMAT}")
    if head.get("fields") != ["cpu", *_FIELDS]:
        raise RecordingError("line 1: its slices have other fields; it was made by another version")
    vms = head.get("vms")
    if not isinstance(vms, dict) or not all(
            number.isascii() and number.isdigit() and isinstance(name, str) for number, name in vms.items()):
        raise RecordingError("line 1: vms must map numbers to names")
    slices: dict[int, list[SliceRecord]] = {}
    for number, line in enumerate(source, 2):
        row = _parsed(number, line)
        if not isinstance(row, list) or len(row) != len(_FIELDS) + 1 or not all(type(value) is int for value in row):
            raise RecordingError(f"line {number} is no slice: expected {len(_FIELDS) + 1} whole numbers")
        record = SliceRecord._make(cast("list[int]", row[1:]))
        if not 0 <= row[0] < 1 << 16 or record.end_ns < record.start_ns or not -1 <= record.mode < len(MODES):
            raise RecordingError(f"line {number} is no slice: host CPU, times or mode are impossible")
        slices.setdefault(row[0], []).append(record)
    taken, reason = head.get("taken_ns"), head.get("reason")
    return Recording(taken if isinstance(taken, int) else 0, str(reason),
                     {int(number): name for number, name in cast("dict[str, str]", vms).items()}, slices)


def _parsed(number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        raise RecordingError(f"line {number} is not JSON") from None
