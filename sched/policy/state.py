"""The whole state of a run queue as plain numbers, and a run queue made from it: the same decisions from there on.

Invariant.  A queue that was restored answers as the one it was taken from would, bit for bit (the numbers are
kept exactly by JSON). What is restored is checked: a state that no queue could have is a ValueError.
"""

# pyright: reportPrivateUsage=false
# A state is what is private to a run queue.
from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Final, cast

from ..model import LATENCIES, Slot
from .batch import BatchRunqueue
from .fair import CLASSES, Entry, Runqueue

__all__ = ["restore", "state_of"]

State = Mapping[str, object]
_WHOLE: Final = ("weight", "mode", "request_ns", "served", "asleep_at", "capped_ns")
_REAL: Final = ("v", "start", "deadline", "lag", "cap", "depth", "tokens")
_QUEUE: Final = ("clock_ns", "picked_at_ns", "random", "most_jitter_ns", "jitter_ns")


def state_of(queue: Runqueue) -> dict[str, object]:
    return {
        "virtual": queue._virtual, "current": queue._current,
        "mode": queue._mode if isinstance(queue, BatchRunqueue) else 0,
        **{name: getattr(queue, "_" + name) for name in _QUEUE},
        "entries": [
            {"slot": entry.slot, "latency": CLASSES.index(entry.latency), "awake": entry.awake, "parked": entry.parked,
             **{name: getattr(entry, name) for name in (*_WHOLE, *_REAL)}}
            for entry in queue._entries.values()]}


def restore(queue: Runqueue, state: State) -> None:
    """Put *state* in the place of what an empty *queue* of the same policy and settings has. Raises ValueError."""
    if len(queue):
        raise ValueError("only an empty run queue can be restored")
    entries = state.get("entries")
    if not isinstance(entries, list):
        raise ValueError("a state needs a list of entries")
    for raw in cast("list[object]", entries):
        if not isinstance(raw, Mapping):
            raise ValueError("an entry is a table")
        entry = _entry(cast("State", raw))
        if entry.slot in queue._entries:
            raise ValueError(f"slot {entry.slot} is there twice")
        queue._entries[entry.slot] = entry
        if entry.cap:
            queue._capped.append(entry)
    queue._awake = sorted((e for e in queue._entries.values() if e.awake), key=lambda e: e.slot)
    queue._weight = sum(entry.weight for entry in queue._awake)
    queue._virtual = _real(state, "virtual")
    for name in _QUEUE:
        setattr(queue, "_" + name, _whole(state, name))
    current = state.get("current")
    queue._current = None if current is None else Slot(_whole(state, "current"))
    if isinstance(queue, BatchRunqueue):
        queue._mode = _whole(state, "mode")


def _entry(raw: State) -> Entry:
    latency = _whole(raw, "latency")
    if not 0 <= latency < len(LATENCIES):
        raise ValueError(f"there is no latency class {latency}")
    entry = Entry(Slot(_whole(raw, "slot")), 1, 0, latency)
    for name in _WHOLE:
        setattr(entry, name, _whole(raw, name))
    for name in _REAL:
        setattr(entry, name, _real(raw, name))
    entry.awake, entry.parked = raw.get("awake") is True, raw.get("parked") is True
    if entry.weight < 1:
        raise ValueError(f"a weight must be positive, got {entry.weight}")
    return entry


def _whole(raw: State, name: str) -> int:
    value = raw.get(name)
    if type(value) is not int or value < 0:
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    return value


def _real(raw: State, name: str) -> float:
    value = raw.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        raise ValueError(f"{name} must be a number, got {value!r}")
    return float(value)
