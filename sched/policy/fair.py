"""The fair picker: which of one host CPU's vCPUs runs the next slice.

Theory. EEVDF (Stoica and Abdel-Wahab, 1995) with real charges. Every vCPU has a weight w (its
rate) and a virtual time v, which grows by ran/w. The queue's virtual time is the weighted mean
of those that compete, V = Σw·v / Σw, so that whatever one receives, all are entitled to in
proportion to their rates. lag = w·(V − v) is what a vCPU is owed (negative: ahead), and the
lags of the competitors sum to zero at every moment. A vCPU is *eligible* while it is not ahead;
among the eligible the earliest virtual deadline v + slice/w runs. Without caps and changes of
rate this bounds |lag| by one slice (and whatever the timer overran it by).

What follows from that form:
- Nothing is taken from slice counts: only `charge` moves v, so leaks to demoted threads, short
  slices and a thief who yields just before the tick are all billed at what they really took.
- A vCPU that sleeps takes its lag out of the competition and the others' V absorbs it, so
  their lags still sum to zero; on waking it brings it back, clamped to one slice. Sleeping
  neither earns nor forgives more than that.
- A cap is a token bucket, filled by elapsed time, emptied by charges, below zero where a slice
  overran it: the debt is carried, hence no drift. Out of tokens, a vCPU is *parked*: it goes on
  being owed, up to one slice, and what it is owed beyond goes to the others. A parked vCPU can
  hold all the positive lag; then an ineligible one runs rather than leaving the CPU idle.

Numbers. Weights are integers (rate·2**30), so that their sum is exact in any order. Virtual
times are floats relative to a base that is moved back to V every 2**40 ns of service; at that
magnitude one rounding is below 0.001 ns of service, unbiased, and each rebase restores Σlag = 0.

Where it is good: shares exact over every interval, a bounded wait of about slice/rate, O(1)
charges, one plain pass over the awake vCPUs per pick (cheapest below some hundreds).
Where it is poor: one CPU only (placement.py makes it fair over many); a pick is O(n); a waking
vCPU of small rate waits for its deadline, there is no latency class; a vCPU that blocks without
`sleep` being told would be picked for ever, so the caller must notice that it does not run.

Units: `_ns` are nanoseconds of this host CPU; rates and caps are shares of it, although only
the proportions of the rates matter. Nothing here reads a clock.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from ..model import Slot

__all__ = ["RATELIMIT_NS", "SLICE_NS", "Entry", "Runqueue"]

SLICE_NS: Final = 5_000_000
RATELIMIT_NS: Final = 500_000
BURST_SLICES: Final = 2          # bucket depth: a slice, and the slice a fair queue may owe
MIN_SLICE_NS: Final = 100_000    # under this the switch costs more than it gives
_UNIT: Final = 1 << 30           # integer weight of rate 1.0
_REBASE_NS: Final = float(1 << 40)


class Entry:
    """A vCPU on a run queue; for the policies of this package only."""

    __slots__ = (
        "awake", "cap", "deadline", "lag", "mode", "parked", "served", "slot", "tokens", "v", "weight",
    )

    def __init__(self, slot: Slot, weight: int, mode: int) -> None:
        self.slot = slot
        self.weight = weight
        self.mode = mode
        self.served = 0          # when it last had the CPU, or began to want it
        self.v = 0.0
        self.deadline = 0.0
        self.lag = 0.0           # only while asleep: the lag it went to sleep with
        self.awake = False
        self.cap = 0.0
        self.tokens = 0.0
        self.parked = False


class Runqueue:
    """The vCPUs of one host CPU and the choice among them: a state machine without a clock.

    The caller's order for each slice: `advance` by the time that passed, `charge` every vCPU
    with what it ran, tell `sleep` and `wake`, then `pick`, and run the answer for `slice_ns`.

    *slice_ns*: how long an undisturbed slice lasts. *ratelimit_ns*: how long a picked vCPU
    is left alone before another may take its place, and the least budget that unparks.
    """

    def __init__(self, slice_ns: int = SLICE_NS, ratelimit_ns: int = RATELIMIT_NS) -> None:
        if slice_ns <= 0:
            raise ValueError(f"slice_ns must be positive, got {slice_ns}")
        if not 0 <= ratelimit_ns <= slice_ns:
            raise ValueError(
                f"ratelimit_ns must be between 0 and slice_ns = {slice_ns}, got {ratelimit_ns}"
            )
        self._slice_ns = slice_ns
        self._ratelimit_ns = ratelimit_ns
        self._burst = float(BURST_SLICES * slice_ns)
        self._refilled = float(min(max(ratelimit_ns, 1), slice_ns))
        self._entries: dict[Slot, Entry] = {}
        self._awake: list[Entry] = []       # by slot, so that no order of calls shows in ties
        self._capped: list[Entry] = []
        self._virtual = 0.0                  # V
        self._weight = 0                     # Σw of the awake
        self._current: Slot | None = None
        self._clock_ns = 0                   # what `advance` added up to
        self._picked_at_ns = 0               # when `_current` was picked

    # -- who is here -------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Slot]:
        return iter(self._entries)

    def __contains__(self, slot: object) -> bool:
        return slot in self._entries

    def add(self, slot: Slot, rate: float, lag_ns: int = 0, mode: int = 0) -> None:
        """A vCPU comes to live here, awake, owed *lag_ns* (clamped to one slice).

        *mode* is a small number for its virtualization mode; this policy does not look at it.
        On an empty queue the lag is dropped: nobody is there to owe it.
        Raises ValueError if it is here already or the rate is not positive.
        """
        if slot in self._entries:
            raise ValueError(f"slot {slot} is on this run queue already: remove it first")
        entry = Entry(slot, _weight(rate), mode)
        self._entries[slot] = entry
        self._join(entry, lag_ns)

    def remove(self, slot: Slot) -> int:
        """The vCPU leaves; returns the lag that goes with it, for `add` elsewhere."""
        entry = self._entry(slot)
        if entry.awake:
            self._leave(entry)
        del self._entries[slot]
        if entry.cap:
            self._capped.remove(entry)
        if self._current == slot:
            self._current = None
        return round(entry.lag)

    def set_rate(self, slot: Slot, rate: float) -> None:
        """From now on it accrues at *rate*; what it is owed already stays the same."""
        entry = self._entry(slot)
        weight = _weight(rate)
        if weight == entry.weight:
            return
        if entry.awake:
            # v moves so that w·(V − v) stays; then Σw·v / Σw stays V too.
            lag = entry.weight * (self._virtual - entry.v)
            self._weight += weight - entry.weight
            entry.weight = weight
            self._set_v(entry, self._virtual - lag / weight)
        else:
            entry.weight = weight

    def set_slice(self, slice_ns: int, ratelimit_ns: int | None = None) -> None:
        """Change the length of a slice (and the minimum run); accounts are untouched."""
        ratelimit = min(self._ratelimit_ns, slice_ns) if ratelimit_ns is None else ratelimit_ns
        if slice_ns <= 0 or not 0 <= ratelimit <= slice_ns:
            raise ValueError(
                f"need 0 <= ratelimit_ns <= slice_ns and 0 < slice_ns,"
                f" got {ratelimit} and {slice_ns}"
            )
        self._slice_ns, self._ratelimit_ns = slice_ns, ratelimit
        self._burst = float(BURST_SLICES * slice_ns)
        self._refilled = float(min(max(ratelimit, 1), slice_ns))
        for entry in self._awake:
            self._set_v(entry, entry.v)

    def take_over(self, other: Runqueue) -> None:
        """Go on with the vCPUs of *other*, which is no longer used: their lags, caps and budgets stay
        exactly as they are, only what is decided about them is this queue's from now on.
        """
        self._entries, self._awake, self._capped = other._entries, other._awake, other._capped
        self._virtual, self._weight = other._virtual, other._weight
        self._current, self._picked_at_ns = other._current, other._picked_at_ns
        self._clock_ns = other._clock_ns
        for entry in self._awake:
            self._set_v(entry, entry.v)

    # -- time --------------------------------------------------------------------------------

    def advance(self, elapsed_ns: int) -> None:
        """*elapsed_ns* passed on this host CPU, by the clock, whoever had it.

        Fills the buckets of caps and ages the minimum run. Entitlement needs no clock: it
        accrues to the awake as the CPU is given to them, by `charge`.
        """
        if elapsed_ns < 0:
            raise ValueError(f"elapsed_ns must be >= 0, got {elapsed_ns}")
        self._clock_ns += elapsed_ns
        for entry in self._capped:
            tokens = entry.tokens + elapsed_ns * entry.cap
            entry.tokens = tokens if tokens < self._burst else self._burst
            if not entry.parked:
                continue
            if entry.awake:
                self._forfeit(entry)
            if tokens >= self._refilled:
                entry.parked = False

    def charge(self, slot: Slot, ran_ns: int) -> None:
        """Bill *ran_ns* of real CPU time (schedstat) to a vCPU, picked or not, awake or not."""
        if ran_ns <= 0:
            if ran_ns == 0:
                return
            raise ValueError(f"ran_ns must be >= 0, got {ran_ns} for slot {slot}")
        entry = self._entry(slot)
        if entry.awake:
            delta = ran_ns / entry.weight
            entry.v += delta
            entry.deadline += delta
            self._virtual += ran_ns / self._weight
            if self._virtual * self._weight > _REBASE_NS:
                self._rebase()
        else:
            # What a sleeper still ran is nobody's entitlement: it only costs itself.
            entry.lag -= ran_ns
        if entry.cap:
            entry.tokens -= ran_ns
            if entry.tokens <= 0.0:
                entry.parked = True

    def sleep(self, slot: Slot) -> None:
        """It has nothing to run; it stops accruing and keeps its lag. Idempotent."""
        entry = self._entry(slot)
        if entry.awake:
            self._leave(entry)

    def wake(self, slot: Slot) -> None:
        """It is runnable again, with its lag clamped to one slice. Idempotent."""
        entry = self._entry(slot)
        if not entry.awake:
            self._join(entry, entry.lag)

    # -- caps --------------------------------------------------------------------------------

    def set_cap(self, slot: Slot, share: float, budget_ns: int | None = None) -> None:
        """Hold a vCPU to *share* of this CPU (0 = no cap); over any window W it then gets at
        most share·W plus two slices of burst plus the slice that overran.

        *budget_ns*: the bucket's content brought from another CPU (`budget_ns`), negative for
        debt; without it a new bucket starts empty, so moving about earns nothing, and an
        existing one keeps its content.
        """
        if share < 0.0:
            raise ValueError(f"a cap must be >= 0 (0 = none), got {share} for slot {slot}")
        entry = self._entry(slot)
        had = entry.cap
        entry.cap = share
        if share == 0.0:
            if had:
                self._capped.remove(entry)
            entry.tokens, entry.parked = 0.0, False
            return
        if not had:
            self._capped.append(entry)
            entry.tokens, entry.parked = 0.0, True
        if budget_ns is not None:
            entry.tokens = min(float(budget_ns), self._burst)
            entry.parked = entry.tokens < self._refilled

    def budget_ns(self, slot: Slot) -> int:
        """What is left in a capped vCPU's bucket (negative: debt); 0 without a cap."""
        return int(self._entry(slot).tokens // 1.0)

    def is_parked(self, slot: Slot) -> bool:
        """Out of budget: not picked until its bucket has the minimum run again."""
        return self._entry(slot).parked

    def is_awake(self, slot: Slot) -> bool:
        return self._entry(slot).awake

    def unpark_in_ns(self) -> int | None:
        """How long until the first parked, awake vCPU may run again; None if there is none.

        An idle CPU whose `pick` answered None should look again then.
        """
        waits = [
            (self._refilled - e.tokens) / e.cap for e in self._capped if e.parked and e.awake
        ]
        return max(1, int(min(waits)) + 1) if waits else None

    # -- the decision ------------------------------------------------------------------------

    def pick(self, current: Slot | None = None) -> Slot | None:
        """Who runs next; None when nobody here is awake and within its budget.

        *current*, the vCPU now on the CPU, is kept on ties and until `ratelimit_ns` passed.
        """
        now = None if current is None else self._entries.get(current)
        if now is not None:
            if not now.awake or now.parked:
                now = None
            elif current == self._current and self._clock_ns - self._picked_at_ns < self._ratelimit_ns:
                return current
        if not self._weight:
            return None
        same = 1.0 / self._weight        # one nanosecond of service: less is rounding
        eligible = self._virtual + same
        best: Entry | None = None
        earliest = float("inf")
        for entry in self._awake:
            if entry.deadline < earliest and entry.v <= eligible and not entry.parked:
                best = entry
                earliest = entry.deadline
        if best is None:
            return self._started(self._least_ahead(now))
        if now is not None and now.v <= eligible and now.deadline <= earliest + same:
            best = now
        return self._started(best)

    def lag_ns(self, slot: Slot) -> int:
        """What it is owed (> 0) or ahead (< 0) on this CPU."""
        entry = self._entry(slot)
        if not entry.awake:
            return round(entry.lag)
        return round(entry.weight * (self._virtual - entry.v))

    def slice_ns(self, slot: Slot) -> int:
        """How long to run it before picking again: a slice, or what its cap leaves of it."""
        entry = self._entry(slot)
        if not entry.cap:
            return self._slice_ns
        floor = min(max(self._ratelimit_ns, MIN_SLICE_NS), self._slice_ns)
        return min(self._slice_ns, max(int(entry.tokens), floor))

    # -- inside ------------------------------------------------------------------------------

    def _entry(self, slot: Slot) -> Entry:
        try:
            return self._entries[slot]
        except KeyError:
            raise ValueError(f"slot {slot} is not on this run queue: add it first") from None

    def _started(self, entry: Entry | None) -> Slot | None:
        slot = None if entry is None else entry.slot
        if slot != self._current:
            self._current = slot
            self._picked_at_ns = self._clock_ns
        return slot

    def _least_ahead(self, now: Entry | None) -> Entry | None:
        """Nobody is eligible, parked vCPUs hold what is owed: uncapped first, by deadline."""
        best: Entry | None = None
        for entry in self._awake:
            if not entry.parked and (
                best is None
                or (entry.cap > 0.0, entry.deadline) < (best.cap > 0.0, best.deadline)
            ):
                best = entry
        if now is not None and best is not None and now.deadline <= best.deadline:
            return now if now.cap == 0.0 or best.cap > 0.0 else best
        return best

    def _set_v(self, entry: Entry, v: float) -> None:
        entry.v = v
        entry.deadline = v + self._slice_ns / entry.weight

    def _join(self, entry: Entry, lag: float) -> None:
        limit = float(self._slice_ns)
        lag = max(-limit, min(limit, float(lag)))
        if self._weight:
            self._virtual -= lag / self._weight
            self._set_v(entry, self._virtual - lag / entry.weight)
        else:
            self._set_v(entry, self._virtual)
        self._weight += entry.weight
        entry.awake = True
        entry.served = self._clock_ns
        self._awake.append(entry)
        self._awake.sort(key=_slot_of)

    def _leave(self, entry: Entry) -> None:
        entry.lag = entry.weight * (self._virtual - entry.v)
        entry.awake = False
        self._awake.remove(entry)
        self._weight -= entry.weight
        if self._weight:
            self._virtual += entry.lag / self._weight

    def _forfeit(self, entry: Entry) -> None:
        """A parked vCPU cannot use more than a slice of what it is owed: the rest is shared."""
        excess = entry.weight * (self._virtual - entry.v) - self._slice_ns
        if excess > 0.0:
            self._set_v(entry, entry.v + excess / entry.weight)
            self._virtual += excess / self._weight

    def _rebase(self) -> None:
        mean = sum(e.weight * (e.v - self._virtual) for e in self._awake) / self._weight
        base = self._virtual + mean
        for entry in self._awake:
            self._set_v(entry, entry.v - base)
        self._virtual = 0.0


def _slot_of(entry: Entry) -> Slot:
    return entry.slot


def _weight(rate: float) -> int:
    if not rate > 0.0:
        raise ValueError(f"a rate must be positive, got {rate}")
    return max(1, round(rate * _UNIT))
