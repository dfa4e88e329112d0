"""What a run queue was told and what it answered, written down so that it can be asked again.

Theory.  A policy's run queue (policy/) is a state machine without a clock: its answers follow from
the calls before them and from nothing else. So the list of calls, from an empty queue on, is all
that is needed to take every decision again, anywhere: `Logged` forwards calls and notes each with
its answer; sched/simulate/replay.py makes them once more and compares. Times, charges, sleeps and
wakes are in it exactly as the dispatcher measured them; slice records (shared.py) are not enough
for this, for they have sums where the queue was charged one by one.

Form (`InputLog`).  JSON lines: a head with policy and settings, then `[cpu, call, arguments, answer]`.
JSON keeps a double exactly. A queue begins empty, or with a line `begin` that has policy, settings and the whole
state of a queue that was running (tape.py); `end` says that no more is known of it.

Where it is poor: some microseconds a call. Where it is off it costs nothing, for then there is no `Logged`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, Final

from .model import LATENCIES, LATENCY_DEFAULT
from .policy import Batching, Order, Runqueue

__all__ = ["CALLS", "FORMAT", "InputLog", "Logged", "Note"]

FORMAT: Final = 3
# Every call that changes a run queue or that a dispatcher acts on, with its parameters and their defaults.
_NEEDED: Final = object()
CALLS: Final[Mapping[str, Mapping[str, object]]] = {
    "add": {"slot": _NEEDED, "rate": _NEEDED, "lag_ns": 0, "mode": 0, "latency": LATENCIES.index(LATENCY_DEFAULT)},
    "remove": {"slot": _NEEDED},
    "owe": {"slot": _NEEDED, "more_ns": _NEEDED},
    "set_rate": {"slot": _NEEDED, "rate": _NEEDED},
    "set_latency": {"slot": _NEEDED, "latency": _NEEDED},
    "set_slice": {"slice_ns": _NEEDED, "ratelimit_ns": None},
    "set_cap": {"slot": _NEEDED, "share": _NEEDED, "budget_ns": None},
    "advance": {"elapsed_ns": _NEEDED},
    "charge": {"slot": _NEEDED, "ran_ns": _NEEDED},
    "sleep": {"slot": _NEEDED},
    "wake": {"slot": _NEEDED},
    "pick": {"current": None},
    "slice_ns": {"slot": _NEEDED},
    "unpark_in_ns": {},
    "is_parked": {"slot": _NEEDED},
    "lag_ns": {"slot": _NEEDED},
    "barred_ns": {"slot": _NEEDED},
    "take_capped_ns": {"slot": _NEEDED},
    "budget_ns": {"slot": _NEEDED},
}

Note = Callable[[str, tuple[Any, ...], Any], None]


class Logged:
    """A run queue that tells `note(call, arguments, answer)` of every call; else it is that queue."""

    def __init__(self, queue: Runqueue, note: Note) -> None:
        self._queue = queue
        for name, parameters in CALLS.items():
            setattr(self, name, _noting(name, parameters, getattr(queue, name), note))

    @property
    def plain(self) -> Runqueue:
        """The queue itself, no longer noted."""
        return self._queue

    def __getattr__(self, name: str) -> Any:
        return getattr(self._queue, name)


def _noting(name: str, parameters: Mapping[str, object], call: Callable[..., Any], note: Note) -> Callable[..., Any]:
    names = tuple(parameters)

    def noting(*arguments: Any, **named: Any) -> Any:
        answer = call(*arguments, **named)
        if len(arguments) < len(names):
            arguments += tuple(named.get(name, parameters[name]) for name in names[len(arguments):])
        note(name, arguments, answer)
        return answer

    return noting


class InputLog:
    """Writes a log; `write` is given a line at a time."""

    def __init__(
        self, write: Callable[[str], object], *, policy: str, slice_ns: int, ratelimit_ns: int, batching: Batching,
        order: Order,
    ) -> None:
        self._write = write
        write(json.dumps({"mixvisor_inputs": FORMAT, "policy": policy, "slice_ns": slice_ns,
                          "ratelimit_ns": ratelimit_ns, "batching": asdict(batching), "order": asdict(order)}) + "\n")

    def follow(self, cpu: int, queue: Runqueue) -> Logged:
        """The run queue of a host CPU, empty as yet, to be used from now on."""
        def note(call: str, arguments: tuple[Any, ...], answer: Any) -> None:
            self._write(json.dumps([cpu, call, arguments, answer], separators=(",", ":")) + "\n")

        return Logged(queue, note)
