"""The batch picker: fair over long times, and modes change on the host CPU as rarely as allowed.

Theory.  Where a switch between modes costs more than one within a mode (mixing), the order of
slices matters and not only their number: cohort scheduling (Larus and Parkes, 2002). The vCPUs
of a host CPU fall into groups by mode. Virtual times and lags are those of policy/fair.py, kept
over all of them; the lag of a *group* is the sum of its members' lags. The CPU stays in a mode,
and picks in it as the fair policy would if there were no others (EEVDF against the group's own
virtual time), until

1. the other group's lag reaches B, or
2. one of the other group has waited for W although it is owed time: it is picked (for W/8, if
   its latency class is low, and within its credit: fair.py), or
3. nobody of this mode can run.

With f one mode's share (1) makes f(1−f)/B changes of mode a second, each mode's turn lasting
2B/(1−f) and 2B/f. B is given, or follows from a budget: a loss of at most ε at an extra cost c
for each change needs B >= f(1−f)·c/ε, for the f of now. The larger of the two holds, but never
more than W·min(f, 1−f): so much the smaller group is entitled to in W, and one that had taken
more could not be owed time again, and served by (2), before W is over.

Invariants, for vCPUs that always want the CPU, and q a slice (with the jitter of a random order,
fair.py: of slices of one mode only, batches stay) and what the timer overran it by:
- lags of the awake sum to zero, service is charged as in fair, no idling beside the runnable;
- |lag of a group| <= B + q, and |lag of a vCPU| <= its share of its group times that, + q;
- no mode waits longer than W + q/f for its next turn, f its share: W longer than fair's own gap;
- at most f(1−f)/B changes a second where B <= W·min(f, 1−f)/2 (else W drives the changes).
The bucket of a cap is deeper than fair's by what it earns in W, so that a capped vCPU gets its
cap; its bound is cap·(window + W) + three slices. Parked vCPUs (fair.py) are no part of their
group: what they are owed they cannot use.

Where it is good: throughput of mixed hosts. Where it is poor: one that works in short bursts
beside a busy other mode waits up to W for its turn, once it has been picked out of its sleep (a
sleeper that is owed time still runs the moment it wakes: the dispatcher lets it); with many vCPUs
for W, (2) drives the changes and the budget is exceeded, for the bound on waiting comes first; a
pick costs two passes over the awake where fair needs one.

Units: `_ns` of this host CPU.
"""

from __future__ import annotations

from typing import Final

from ..model import Slot
from .fair import RATELIMIT_NS, SLICE_NS, Entry, Runqueue

__all__ = ["BATCH_NS", "WAIT_MAX_NS", "BatchRunqueue"]

BATCH_NS: Final = 25_000_000
WAIT_MAX_NS: Final = 200_000_000
_NEVER: Final = float("inf")


class BatchRunqueue(Runqueue):
    """A `Runqueue` that changes modes reluctantly.

    *batch_ns*: B. *wait_max_ns*: W. *budget_ns*: c/ε, what a change of mode costs extra over
    the part of the time that may be lost to it; 0: B alone holds.
    """

    def __init__(
        self, slice_ns: int = SLICE_NS, ratelimit_ns: int = RATELIMIT_NS, *,
        batch_ns: int = BATCH_NS, wait_max_ns: int = WAIT_MAX_NS, budget_ns: int = 0, jitter_ns: int = 0, seed: int = 1,
    ) -> None:
        super().__init__(slice_ns, ratelimit_ns, jitter_ns=jitter_ns, seed=seed)
        if min(batch_ns, wait_max_ns, budget_ns) < 0:
            raise ValueError(
                f"batch_ns, wait_max_ns and budget_ns must be >= 0,"
                f" got {batch_ns}, {wait_max_ns} and {budget_ns}")
        self._batch_ns = batch_ns
        self._wait_max_ns = wait_max_ns
        self._budget_ns = budget_ns
        self._held_back_ns = wait_max_ns
        self._mode = 0                   # the mode that the CPU is in

    @property
    def mode(self) -> int:
        """The mode of the last pick."""
        return self._mode

    def group_lag_ns(self, mode: int) -> int:
        """What the awake vCPUs of a mode are owed together."""
        return round(sum(e.weight * (self._virtual - e.v) for e in self._awake if e.mode == mode))

    def pick(self, current: Slot | None = None) -> Slot | None:
        served = self._entries.get(self._current) if self._current is not None else None
        if served is not None:
            served.served = self._clock_ns
        now = None if current is None else self._entries.get(current)
        if now is not None:
            if not now.awake or now.parked:
                now = None
            elif current == self._current and self._clock_ns - self._picked_at_ns < self._ratelimit_ns:
                return current
        # Of this mode and of the others: weight, lag and the first of those that wait too long.
        here = there = 0
        lag_here = lag_there = 0.0
        overdue: Entry | None = None
        virtual, mode, clock = self._virtual, self._mode, self._clock_ns
        for entry in self._awake:
            if entry.parked:
                continue
            lag = entry.weight * (virtual - entry.v)
            if entry.mode == mode:
                here += entry.weight
                lag_here += lag
                continue
            there += entry.weight
            lag_there += lag
            if (clock - entry.served >= self._wait_max_ns * entry.latency.patience and entry.start <= virtual
                    and (overdue is None or entry.deadline < overdue.deadline)):
                overdue = entry
        if not there and not here:
            return self._started(None)
        if not there:
            return self._started(self._first_of(mode, lag_here / here, here, now))
        # What the parked are owed is owed by all others alike: no reason to change.
        owed = lag_there - (lag_here + lag_there) * there / (here + there)
        if here and overdue is None and owed < self._bound(here, there):
            return self._started(self._first_of(mode, lag_here / here, here, now))
        if overdue is None:
            overdue = self._first_of(1 - mode, lag_there / there, there, now)
        self._mode = overdue.mode
        return self._started(overdue)

    def _bound(self, here: int, there: int) -> float:
        """B: as given, or what keeps the budget, at the two modes' shares of now; see W above."""
        total = float(here + there)
        less = min(here, there) / total
        bound = max(float(self._batch_ns), less * (1.0 - less) * self._budget_ns)
        return min(bound, less * self._wait_max_ns)

    def _first_of(self, mode: int, ahead: float, weight: int, now: Entry | None) -> Entry:
        """EEVDF in one mode: its virtual time is the queue's less its lag over its weight."""
        same = 1.0 / weight              # one nanosecond of service: less is rounding
        eligible = self._virtual - ahead + same
        best: Entry | None = None
        earliest = least = _NEVER
        behind: Entry | None = None      # rounding could leave nobody eligible, not nobody
        for entry in self._awake:
            if entry.mode != mode or entry.parked:
                continue
            if entry.deadline < earliest and entry.start <= eligible:
                best, earliest = entry, entry.deadline
            if entry.v < least:
                behind, least = entry, entry.v
        best = best or behind
        assert best is not None
        if (now is not None and now.mode == mode and now.start <= eligible
                and now.deadline <= best.deadline + same):
            return now
        return best
