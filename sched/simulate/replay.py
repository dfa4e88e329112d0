"""Recorded inputs of run queues (sched/inputs.py), fed to the same policy again.

Theory.  A run queue answers from what it was told alone. So the same calls must get the same answers,
bit for bit: every pick, every length of a slice, every lag. Where one differs, the policy is not
the one that recorded, or it looked at something that it must not look at.

Invariant.  Believes nothing of a file: only the calls of `CALLS` are made, with numbers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, cast

from ..inputs import CALLS, FORMAT
from ..policy import POLICIES, Batching, Order, Policy, Runqueue
from ..policy.state import restore

__all__ = ["Difference", "ReplayError", "Replayed", "replay"]

SHOWN: Final = 10
CPUS_MAX: Final = 1 << 16
BEGIN: Final = "begin"
END: Final = "end"


class ReplayError(ValueError):
    """The text is no recording of inputs; says which line and why."""


@dataclass(frozen=True, slots=True)
class Difference:
    line: int
    cpu: int
    call: str
    recorded: object
    answered: object


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    policy: str
    cpus: int
    calls: int
    decisions: int                        # picks among them
    differing: int                        # answers that were not the recorded ones
    first: tuple[Difference, ...]         # of those


def replay(lines: Iterable[str]) -> Replayed:
    """Make every call again. Raises ReplayError."""
    source = iter(lines)
    policy, settings = _head(next(source, ""))
    queues: dict[int, Runqueue | None] = {}
    calls = decisions = differing = 0
    first: list[Difference] = []
    for number, line in enumerate(source, 2):
        cpu, call, arguments, recorded = _call(number, line)
        if call == BEGIN:
            queues[cpu] = _begun(number, cpu, arguments)
            continue
        if call == END:
            queues[cpu] = None
            continue
        if cpu not in queues:
            queues[cpu] = policy.runqueue(*settings, cpu)
        queue = queues[cpu]
        if queue is None:
            raise ReplayError(f"line {number}: {call} after the end of CPU {cpu}'s part")
        try:
            answered = getattr(queue, call)(*arguments)
        except (ValueError, TypeError, OverflowError, ZeroDivisionError) as error:
            raise ReplayError(f"line {number}: {call} cannot be made: {error}") from error
        calls += 1
        decisions += call == "pick"
        if answered != recorded:
            differing += 1
            if len(first) < SHOWN:
                first.append(Difference(number, cpu, call, recorded, answered))
    return Replayed(policy=policy.name, cpus=len(queues), calls=calls, decisions=decisions, differing=differing,
                    first=tuple(first))


def _head(line: str) -> tuple[Policy, tuple[int, int, Batching, Order]]:
    head = _parsed(1, line)
    if not isinstance(head, dict) or head.get("mixvisor_inputs") != FORMAT:
        raise ReplayError(f"line 1 is not the head of recorded inputs of format {FORMAT}")
    return _manner(1, *(head.get(name) for name in ("policy", "slice_ns", "ratelimit_ns", "batching", "order")))


def _manner(
    number: int, policy: object, slice_ns: Any, ratelimit_ns: Any, batching: object, order: object,
) -> tuple[Policy, tuple[int, int, Batching, Order]]:
    if not isinstance(policy, str) or policy not in POLICIES:
        raise ReplayError(f"line {number}: unknown policy {policy!r}; there are: {', '.join(POLICIES)}")
    if not isinstance(batching, dict) or not isinstance(order, dict):
        raise ReplayError(f"line {number}: batching and order must be objects")
    try:
        settings = (slice_ns, ratelimit_ns, Batching(**cast("dict[str, int]", batching)),
                    Order(**cast("dict[str, int]", order)))
        POLICIES[policy].runqueue(*settings)
    except (TypeError, ValueError) as error:
        raise ReplayError(f"line {number}: its settings cannot be used: {error}") from error
    return POLICIES[policy], settings


def _begun(number: int, cpu: int, arguments: list[Any]) -> Runqueue:
    """The run queue that a line `begin` describes."""
    policy, settings = _manner(number, *arguments[:-1])
    queue = policy.runqueue(*settings, cpu)
    try:
        restore(queue, arguments[-1])
    except (ValueError, AttributeError) as error:
        raise ReplayError(f"line {number}: its state cannot be used: {error}") from error
    return queue


def _call(number: int, line: str) -> tuple[int, str, list[Any], Any]:
    row = _parsed(number, line)
    if not isinstance(row, list) or len(row) != 4 or type(row[0]) is not int or not 0 <= row[0] < CPUS_MAX:
        raise ReplayError(f"line {number} is no call: expected [cpu, call, arguments, answer]")
    cpu, call, arguments, recorded = row
    if (call == BEGIN and isinstance(arguments, list) and len(arguments) == 6) or call == END:
        return cpu, call, arguments, recorded
    if not isinstance(call, str) or call not in CALLS:
        raise ReplayError(f"line {number}: a run queue has no call {call!r}")
    if not isinstance(arguments, list) or len(arguments) != len(CALLS[call]) or not all(
            value is None or (isinstance(value, int | float) and not isinstance(value, bool)) for value in arguments):
        raise ReplayError(f"line {number}: {call} takes {len(CALLS[call])} numbers")
    return cpu, call, arguments, recorded


def _parsed(number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        raise ReplayError(f"line {number} is not JSON") from None
