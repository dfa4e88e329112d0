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
  their lags still sum to zero; on waking it brings it back, owed at most one slice. Sleep earns
  nothing; a debt wears off in it at the rate at which it was entitled to run instead.
- A cap is a token bucket, filled by elapsed time, emptied by charges, below zero where a slice
  overran it: the debt is carried, hence no drift. Out of tokens, a vCPU is *parked*: it goes on
  being owed, up to one slice, and what it is owed beyond goes to the others. A parked vCPU can
  hold all the positive lag; then an ineligible one runs rather than leaving the CPU idle.

Latency classes. An entry's *credit* is how far ahead of its share, in slices, it still counts as
eligible: `start` = v − credit·slice/w; its *request* is what its deadline is computed from, in
slices: start + request·slice/w. A short request gets the CPU earlier and not more of it;
a credit lets one that sleeps most of the time have a burst at once and pay for it by waiting
later. Both only shift *when*: lags stay bounded (by slice·(1 + credit) below, and above by the
request and what those with a credit are ahead), so over long times a class changes no share.

Random order. Where vCPUs of both modes compete, deadlines are computed from requests of a slice
and up to `jitter_ns` more (times the class's request), drawn anew for whoever is picked (`_draw`).
EEVDF's bounds are those of the requests, so without other classes |lag| stays within a slice below
and a slice + jitter above, and no share changes;
but among vCPUs whose deadlines are so close, who comes after whom is a coin that nothing else has
touched. That is what measuring the cost of mixing needs (metrics/mixing/online.py). With equal
weights every round is a random permutation, and |lag| within a slice as before. Where one mode has
the CPU, requests are slices: nothing is drawn. Same seed and calls, same draws.

Numbers. Weights are integers (rate·2**30), so that their sum is exact in any order. Virtual
times are floats relative to a base that is moved back to V every 2**40 ns of service; at that
magnitude one rounding is below 0.001 ns of service, unbiased, and each rebase restores Σlag = 0.

Where it is good: shares exact over every interval, a bounded wait of about slice/rate, O(1)
charges, one plain pass over the awake vCPUs per pick (cheapest below some hundreds).
Where it is poor: one CPU only (placement.py makes it fair over many); a pick is O(n); a waking
vCPU of small rate waits for its deadline, whatever its class; a vCPU that blocks without
`sleep` being told would be picked for ever, so the caller must notice that it does not run.

Units: `_ns` are nanoseconds of this host CPU; rates and caps are shares of it, although only
the proportions of the rates matter. Nothing here reads a clock.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from ..model import LATENCIES, LATENCY_DEFAULT, Slot

__all__ = ["CLASSES", "RATELIMIT_NS", "SLICE_NS", "Entry", "LatencyClass", "Runqueue", "seed_of"]

SLICE_NS: Final = 5_000_000
RATELIMIT_NS: Final = 500_000
BURST_SLICES: Final = 2          # bucket depth: a slice, and the slice a fair queue may owe
MIN_SLICE_NS: Final = 100_000    # under this the switch costs more than it gives
_UNIT: Final = 1 << 30           # integer weight of rate 1.0
_REBASE_NS: Final = float(1 << 40)
_WORD: Final = (1 << 64) - 1
_GOLDEN: Final = 0x9E37_79B9_7F4A_7C15


class LatencyClass(NamedTuple):
    """What a latency class is to a run queue."""

    request: float           # in slices: what deadlines are computed from
    credit: float            # in slices: how far ahead one still counts as eligible
    patience: float          # part of the longest wait for another mode (batch.py)


# In the order of LATENCIES: a class is known by its index.
CLASSES: Final = tuple({
    "low": LatencyClass(0.125, 2.0, 0.125),
    "normal": LatencyClass(1.0, 0.0, 1.0),
    "high": LatencyClass(4.0, 0.0, 1.0),
}[name] for name in LATENCIES)
_NORMAL: Final = LATENCIES.index(LATENCY_DEFAULT)


class Entry:
    """A vCPU on a run queue; for the policies of this package only."""

    __slots__ = (
        "asleep_at", "awake", "cap", "capped_ns", "deadline", "depth", "lag", "latency", "mode", "parked",
        "request_ns", "served", "slot", "start", "tokens", "v", "weight",
    )

    def __init__(self, slot: Slot, weight: int, mode: int, latency: int) -> None:
        self.slot = slot
        self.weight = weight
        self.mode = mode
        self.latency = CLASSES[latency]
        self.served = 0          # when it last had the CPU, or began to want it
        self.v = 0.0
        self.start = 0.0         # eligible from this virtual time on
        self.request_ns = 0      # what its deadline is computed from, before its class: a slice and the jitter
        self.deadline = 0.0
        self.lag = 0.0           # only while asleep: its lag at `asleep_at`
        self.asleep_at = 0
        self.awake = False
        self.cap = 0.0
        self.depth = 0.0         # what its bucket holds at most
        self.tokens = 0.0
        self.parked = False
        self.capped_ns = 0       # awake and parked, since that was last taken


class Runqueue:
    """The vCPUs of one host CPU and the choice among them: a state machine without a clock.

    The caller's order for each slice: `advance` by the time that passed, `charge` every vCPU
    with what it ran, tell `sleep` and `wake`, then `pick`, and run the answer for `slice_ns`.

    *slice_ns*: how long an undisturbed slice lasts. *ratelimit_ns*: how long a picked vCPU
    is left alone before another may take its place, and the least budget that unparks.
    *jitter_ns*: by how much at most a request is longer than a slice where modes meet; 0: the
    order is fixed. *seed*: of the order, any word but 0 (`seed_of`).
    """

    def __init__(
        self, slice_ns: int = SLICE_NS, ratelimit_ns: int = RATELIMIT_NS, *, jitter_ns: int = 0, seed: int = 1,
    ) -> None:
        if slice_ns <= 0:
            raise ValueError(f"slice_ns must be positive, got {slice_ns}")
        if not 0 <= ratelimit_ns <= slice_ns:
            raise ValueError(
                f"ratelimit_ns must be between 0 and slice_ns = {slice_ns}, got {ratelimit_ns}"
            )
        if not 0 <= jitter_ns <= slice_ns:
            raise ValueError(f"jitter_ns must be between 0 and slice_ns = {slice_ns}, got {jitter_ns}")
        if not 0 < seed <= _WORD:
            raise ValueError(f"a seed must be a 64-bit word and not 0, got {seed}")
        self._slice_ns = slice_ns
        self._ratelimit_ns = ratelimit_ns
        self._held_back_ns = 0               # how long one within its budget may wait for another mode
        self._most_jitter_ns = jitter_ns
        self._jitter_ns = 0                  # that now: 0 while one mode has the CPU
        self._random = seed
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

    def add(self, slot: Slot, rate: float, lag_ns: int = 0, mode: int = 0, latency: int = _NORMAL) -> None:
        """A vCPU comes to live here, awake, owed *lag_ns* (at most one slice; a debt is kept whole).

        *mode* is a small number for its virtualization mode: whether they are all one is all that
        this policy asks. *latency* is the index of its class in LATENCIES.
        On an empty queue the lag is dropped: nobody is there to owe it.
        Raises ValueError if it is here already or the rate is not positive.
        """
        if slot in self._entries:
            raise ValueError(f"slot {slot} is on this run queue already: remove it first")
        entry = Entry(slot, _weight(rate), mode, latency)
        self._entries[slot] = entry
        self._join(entry, lag_ns)

    def remove(self, slot: Slot) -> int:
        """The vCPU leaves; returns the lag that goes with it, for `add` elsewhere."""
        entry = self._entry(slot)
        if entry.awake:
            self._leave(entry)
        else:
            entry.lag = self._worn(entry)
        del self._entries[slot]
        if entry.cap:
            self._capped.remove(entry)
        if self._current == slot:
            self._current = None
        return round(entry.lag)

    def owe(self, slot: Slot, more_ns: int) -> None:
        """It is owed so much more (or less), and the others together as much less, in proportion to weight.

        Linear: told of all of them, in any order, each ends with the lag that is meant where those sum to zero, and
        else all are off it in proportion to weight. A sleeper's lag stays.
        """
        entry = self._entry(slot)
        if entry.awake:
            self._virtual -= more_ns / self._weight
            self._set_v(entry, entry.v - more_ns / entry.weight)

    def set_rate(self, slot: Slot, rate: float) -> None:
        """From now on it accrues at *rate*; what it is owed already stays the same."""
        entry = self._entry(slot)
        weight = _weight(rate)
        if weight == entry.weight:
            return
        if not entry.awake:
            self._wear(entry)                # at the rate that it had
        if entry.awake:
            # v moves so that w·(V − v) stays; then Σw·v / Σw stays V too.
            lag = entry.weight * (self._virtual - entry.v)
            self._weight += weight - entry.weight
            entry.weight = weight
            self._set_v(entry, self._virtual - lag / weight)
        else:
            entry.weight = weight

    def set_latency(self, slot: Slot, latency: int) -> None:
        """From now on it is of this class (an index in LATENCIES); its lag stays."""
        entry = self._entry(slot)
        entry.latency = CLASSES[latency]
        self._set_v(entry, entry.v)

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
        self._most_jitter_ns = min(self._most_jitter_ns, slice_ns)
        self._renew()

    def take_over(self, other: Runqueue) -> None:
        """Go on with the vCPUs of *other*, which is no longer used: their lags, caps and budgets stay
        exactly as they are, only what is decided about them is this queue's from now on.
        """
        self._entries, self._awake, self._capped = other._entries, other._awake, other._capped
        self._virtual, self._weight = other._virtual, other._weight
        self._current, self._picked_at_ns = other._current, other._picked_at_ns
        self._clock_ns = other._clock_ns
        self._renew()

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
            entry.tokens = tokens if tokens < entry.depth else entry.depth
            if not entry.parked:
                continue
            if entry.awake:
                entry.capped_ns += elapsed_ns
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
            entry.start += delta
            entry.deadline += delta
            self._virtual += ran_ns / self._weight
            if self._virtual * self._weight > _REBASE_NS:
                self._rebase()
        else:
            # What a sleeper still ran is nobody's entitlement: it only costs itself.
            self._wear(entry)
            entry.lag -= ran_ns
        if entry.cap:
            entry.tokens -= ran_ns
            if entry.tokens <= 0.0:
                entry.parked = True

    def sleep(self, slot: Slot) -> None:
        """It has nothing to run; it stops accruing, and a debt wears off. Idempotent."""
        entry = self._entry(slot)
        if entry.awake:
            self._leave(entry)

    def wake(self, slot: Slot) -> None:
        """It is runnable again, owed at most one slice. Idempotent."""
        entry = self._entry(slot)
        if not entry.awake:
            self._wear(entry)
            self._join(entry, entry.lag)

    def barred_ns(self, slot: Slot) -> int:
        """How long a sleeper must sleep on before it may take the CPU the moment it wakes; 0: it may.

        One that is further ahead than its credit gets nothing at once, but competes like anybody.
        """
        entry = self._entry(slot)
        if entry.awake:
            return 0
        over = -self._worn(entry) - entry.latency.credit * self._slice_ns
        return int(over / self._share(entry)) + 1 if over > 0.0 else 0

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
        self._set_depth(entry)
        if share == 0.0:
            if had:
                self._capped.remove(entry)
            entry.tokens, entry.parked = 0.0, False
            return
        if not had:
            self._capped.append(entry)
            entry.tokens, entry.parked = 0.0, True
        if budget_ns is not None:
            entry.tokens = min(float(budget_ns), entry.depth)
            entry.parked = entry.tokens < self._refilled

    def budget_ns(self, slot: Slot) -> int:
        """What is left in a capped vCPU's bucket (negative: debt); 0 without a cap."""
        return int(self._entry(slot).tokens // 1.0)

    def take_capped_ns(self, slot: Slot) -> int:
        """How long it wanted the CPU and was parked, since this was last asked."""
        entry = self._entry(slot)
        capped_ns, entry.capped_ns = entry.capped_ns, 0
        return capped_ns

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
            if entry.deadline < earliest and entry.start <= eligible and not entry.parked:
                best = entry
                earliest = entry.deadline
        if best is None:
            return self._started(self._least_ahead(now))
        if now is not None and now.start <= eligible and now.deadline <= earliest + same:
            best = now
        return self._started(best)

    def lag_ns(self, slot: Slot) -> int:
        """What it is owed (> 0) or ahead (< 0) on this CPU."""
        entry = self._entry(slot)
        if not entry.awake:
            return round(self._worn(entry))
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
        if entry is not None:
            self._draw(entry)
        return slot

    def _draw(self, entry: Entry) -> None:
        """The next request of who begins to run: a slice, and where modes meet a random part of the jitter."""
        request_ns = self._slice_ns
        if self._jitter_ns:
            x = self._random                 # xorshift64 (Marsaglia, 2003)
            x ^= x << 13 & _WORD
            x ^= x >> 7
            x ^= x << 17 & _WORD
            self._random = x
            request_ns += (x >> 40) * self._jitter_ns >> 24
        entry.request_ns = request_ns
        entry.deadline = entry.start + entry.latency.request * (request_ns / entry.weight)

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

    def _set_depth(self, entry: Entry) -> None:
        """What it earned while another mode had the CPU must not be lost to it."""
        entry.depth = self._burst + entry.cap * self._held_back_ns

    def _set_v(self, entry: Entry, v: float) -> None:
        entry.v = v
        entry.start = v - entry.latency.credit * (self._slice_ns / entry.weight)
        entry.deadline = entry.start + entry.latency.request * (entry.request_ns / entry.weight)

    def _renew(self) -> None:
        """The settings or the queue are others: everybody begins with a request of a slice."""
        for entry in self._awake:
            entry.request_ns = self._slice_ns
            self._set_v(entry, entry.v)
        for entry in self._capped:
            self._set_depth(entry)
        self._see_modes()

    def _see_modes(self) -> None:
        """Whether those that compete are of one mode."""
        awake = self._awake
        meet = self._most_jitter_ns and any(entry.mode != awake[0].mode for entry in awake)
        self._jitter_ns = self._most_jitter_ns if meet else 0

    def _join(self, entry: Entry, lag: float) -> None:
        # A debt is kept whole: under batch it may be many slices, and a nap would forgive it.
        lag = min(float(self._slice_ns), float(lag))
        entry.request_ns = self._slice_ns
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
        self._see_modes()

    def _leave(self, entry: Entry) -> None:
        entry.lag = entry.weight * (self._virtual - entry.v)
        entry.asleep_at = self._clock_ns
        entry.awake = False
        self._awake.remove(entry)
        self._weight -= entry.weight
        self._see_modes()
        if self._weight:
            self._virtual += entry.lag / self._weight

    def _share(self, entry: Entry) -> float:
        """What a sleeper is entitled to on this CPU: its rate, less where rates are no shares."""
        return entry.weight / max(_UNIT, self._weight + entry.weight)

    def _worn(self, entry: Entry) -> float:
        """A sleeper's lag: a debt, less what it was entitled to in its sleep so far."""
        if entry.lag >= 0.0:
            return entry.lag
        slept = self._clock_ns - entry.asleep_at
        return min(0.0, entry.lag + slept * self._share(entry))

    def _wear(self, entry: Entry) -> None:
        entry.lag = self._worn(entry)
        entry.asleep_at = self._clock_ns

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


def seed_of(seed: int, cpu: int) -> int:
    """The first word of a host CPU's order: CPUs of one configured seed draw different orders."""
    return ((seed << 16) + cpu + 1) * _GOLDEN & _WORD or _GOLDEN


def _slot_of(entry: Entry) -> Slot:
    return entry.slot


def _weight(rate: float) -> int:
    if not rate > 0.0:
        raise ValueError(f"a rate must be positive, got {rate}")
    return max(1, round(rate * _UNIT))
