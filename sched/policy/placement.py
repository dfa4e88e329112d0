"""Placement: on which host CPU each vCPU lives for the next period, and at what local rate.

Theory. A run queue is fair on its own CPU only; weights hold over *all* CPUs because vCPUs move
between them. Each vCPU should receive target = e·T + lag in the coming period of T, where lag
is what it is owed over all CPUs so far. If vCPUs can be packed so that no CPU's targets exceed
T, the period ends with nobody owed anything. Usually they can be packed only nearly (three
equal vCPUs on two CPUs): who is short this period has a larger target in the next and is placed
better then. The error is fed back and not forgotten, so it stays bounded by about a period and
the long-run share is exact.

How. Start from where everybody is. (1) If that meets the entitlements, only a lasting imbalance
(a CPU owing its vCPUs a quarter of a period) is worth a move. (2) If not, look for a static packing
that does (best fit, decreasing, with bounded backtracking): once found there is nothing more to
move. (3) Take the most overloaded CPU and make the move or exchange that relieves it most, or
where affinity bars that a chain of moves, as long as it gains `migrate_resist_ns`. (4) Fill
idle CPUs from shared ones. (5) Host CPUs do not give VMs the same (the service itself runs on some
of them). Where (3) cannot make that good, because a vCPU needs about a whole CPU, two CPUs exchange
what they run once the one's has fallen behind the other's, since both came there. A
vCPU keeps off CPUs that others, with fewer to choose from, need in full (flow.py): what it took
there they could never get back.
Invariants: every vCPU with an allowed CPU is placed on one; rates on a used CPU sum to 1; no
CPU idles while a vCPU allowed there shares another; a placement that meets the entitlements is
kept while the lags are; same input, same answer, in any order of the loads.

Where it is poor: knows no caches or nodes beyond "stay"; a local search, so with many vCPUs of
odd sizes it moves one or two in most periods; under narrow affinities a vCPU entitled to a whole
CPU has no way to catch up, and was seen to end a minute two or three periods short (0.1 %); a
vCPU far ahead keeps an eighth of its entitlement rather than being stopped, which is kinder to
latency and slower to level out.

Units: `_ns` of one host CPU; rates and entitlements in host CPUs.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import islice
from typing import Final

from ..model import Placement, Slot, VcpuLoad
from .flow import merge, usable

__all__ = ["place"]

_SLACK: Final = 0.001          # host CPUs by which a packing may exceed one: fed back by lag
_SEARCH: Final = 2_000         # CPUs that the static packing looks at after its first way down
_TARGETS: Final = 8            # CPUs considered for a vCPU on an overloaded one, least loaded first
_LASTING: Final = 0.25         # of a period: a host CPU that owes less than that is left alone, where all fits
_LATE: Final = 0.25            # of a period: who is owed more is served before the others
_TRICKLE: Final = 0.125        # least part of its entitlement that a vCPU far ahead still gets
_UNEVEN: Final = 0.25          # of a period: so far apart, vCPUs of two CPUs change places
_HEAVY: Final = 0.5            # host CPUs: of such there is one on a CPU, and no more lag fits into a period
_CROWD: Final = 8              # vCPUs that change places at most: with more, smaller steps do
_STALL: Final = 0.001          # the same beside a late vCPU: next to nothing, rates stay positive


def place(
    loads: Sequence[VcpuLoad], cpus: Sequence[int], period_ns: int, *, migrate_resist_ns: int
) -> Placement:
    """Decide the next period of *period_ns* for the runnable vCPUs *loads* on *cpus*.

    A vCPU none of whose CPUs is among *cpus* is left out of the answer: it cannot run.
    Raises ValueError for a duplicate slot or a period that is not positive.
    """
    if period_ns <= 0:
        raise ValueError(f"period_ns must be positive, got {period_ns}")
    here = frozenset(cpus)
    allowed: dict[frozenset[int], frozenset[int]] = {}       # few affinities, many vCPUs
    for load in loads:
        if load.cpus not in allowed:
            both = load.cpus & here
            allowed[load.cpus] = here if both == here else both
    items = sorted(
        (_Item(load, allowed[load.cpus], period_ns) for load in loads if allowed[load.cpus]),
        key=lambda item: (-item.target, item.slot),
    )
    if len({item.slot for item in items}) != len(items):
        raise ValueError("two loads carry the same slot: a vCPU lives on one CPU at a time")
    if any(item.any is not here for item in items):
        _leave_what_others_need(items, sorted(here))
    plan = _Plan(sorted(here), items, period_ns)
    patience = float(max(1, migrate_resist_ns))
    if plan.settled() or plan.pack():
        patience = max(patience, period_ns * _LASTING)
    plan.relieve(patience)
    plan.fill_idle()
    plan.take_turns()
    return plan.answer()


class _Item:
    """One vCPU while its place is being sought."""

    __slots__ = ("allowed", "any", "cpu", "drift", "entitled", "home", "lag", "late", "slot", "target")

    def __init__(self, load: VcpuLoad, allowed: frozenset[int], period_ns: int) -> None:
        self.slot = load.slot
        self.any = self.allowed = allowed
        self.entitled = min(1.0, max(load.entitled, 1e-6))
        fair = self.entitled * period_ns
        self.target = min(float(period_ns), max(fair + load.lag_ns, fair * _STALL))
        self.lag, self.drift = load.lag_ns, load.drift_ns
        self.late = load.lag_ns > _LATE * period_ns
        self.home = load.last_cpu if load.last_cpu in self.any else None
        self.cpu = -1

    def keep_to(self, cpus: frozenset[int]) -> None:
        self.allowed = cpus
        if self.home not in cpus:
            self.home = None


def _leave_what_others_need(items: Sequence[_Item], cpus: Sequence[int]) -> None:
    """Keep each vCPU to those of its CPUs that it may use without taking from a tight set."""
    bit_of = {cpu: 1 << at for at, cpu in enumerate(cpus)}
    reach_of = {allowed: sum(bit_of[cpu] for cpu in allowed) for allowed in {i.any for i in items}}
    ways = usable(merge((reach_of[item.any], item.entitled) for item in items))
    kept = {
        allowed: frozenset(cpu for cpu in allowed if ways[reach] & bit_of[cpu])
        for allowed, reach in reach_of.items()
    }
    for item in items:
        item.keep_to(kept[item.any])


class _Plan:
    """Who is where, and each CPU's load: the sum of its targets."""

    def __init__(self, cpus: Sequence[int], items: Sequence[_Item], period_ns: int) -> None:
        self.period = float(period_ns)
        self.items = items
        self.narrow = any(len(item.allowed) < len(cpus) for item in items)
        self.on: dict[int, list[_Item]] = {cpu: [] for cpu in cpus}
        self.load: dict[int, float] = dict.fromkeys(cpus, 0.0)
        homeless: list[_Item] = []
        for item in items:
            if item.home is None:
                homeless.append(item)
            else:
                self._put(item, item.home)
        homeless.sort(key=lambda item: len(item.allowed))     # stable: then largest first
        for item in homeless:
            self._put(item, min(item.allowed, key=lambda cpu: (self.load[cpu], cpu)))

    def settled(self) -> bool:
        """Does this placement meet the entitlements for ever, if nothing changes?"""
        return all(
            sum(item.entitled for item in group) <= 1.0 + _SLACK for group in self.on.values()
        )

    def pack(self) -> bool:
        """Look for a static packing of the entitlements; move there if there is one."""
        order = sorted(
            self.items, key=lambda i: (len(i.allowed) > 1, -i.entitled, len(i.allowed), i.slot)
        )
        room = dict.fromkeys(self.on, 1.0 + _SLACK)
        free = sum(room.values()) - sum(item.entitled for item in order)
        if free < 0.0:
            return False

        def fits(item: _Item) -> list[int]:
            """Tightest last."""
            return [cpu for _room, cpu in sorted(
                ((room[cpu], cpu) for cpu in item.allowed if room[cpu] >= item.entitled), reverse=True)]

        chosen: list[int] = []
        choices: list[list[int]] = []
        homely: list[bool] = []              # of the choices: only home has been considered
        budget = _SEARCH + len(self.on) * len(order)
        while len(chosen) < len(order):
            item = order[len(chosen)]
            if len(choices) == len(chosen):
                # Home first, then the tightest fit, which is looked for only where home will not do.
                at_home = item.home is not None and room[item.home] >= item.entitled
                choices.append([item.home] if at_home and item.home is not None else fits(item))
                budget -= 1 if at_home else len(item.allowed)
                homely.append(at_home)
            elif homely[-1] and not choices[-1]:
                homely[-1] = False
                choices[-1] = [cpu for cpu in fits(item) if cpu != item.home]
                budget -= len(item.allowed)
            budget -= 1
            if budget < 0:
                return False
            if choices[-1]:
                cpu = choices[-1].pop()
                room[cpu] -= item.entitled
                chosen.append(cpu)
                continue
            choices.pop()
            homely.pop()
            if not chosen:
                return False
            room[chosen.pop()] += order[len(chosen)].entitled
        for item, cpu in zip(order, chosen, strict=True):
            self._move(item, cpu)
        return True

    def fill_idle(self) -> None:
        """No CPU idles while a vCPU that may run there shares another, or would after a shift."""
        for idle in [cpu for cpu, group in self.on.items() if not group]:
            came: dict[int, tuple[_Item, int]] = {}      # CPU -> who leaves it, to where
            queue = [idle]
            seen = {idle}
            for to in queue:
                donors = [
                    item for item in self.items
                    if to in item.any and item.cpu not in seen
                ]
                for item in donors:
                    if item.cpu not in seen:
                        seen.add(item.cpu)
                        came[item.cpu] = (item, to)
                        queue.append(item.cpu)
                shared = [c for c in queue if c in came and len(self.on[c]) > 1]
                if shared:
                    cpu = max(shared, key=lambda c: (self.load[c], -c))
                    while cpu != idle:
                        item, to = came[cpu]
                        self._move(item, to)
                        cpu = to
                    break

    def take_turns(self) -> None:
        """Let what runs on a host CPU that gives less change places with what runs on one that gives more.

        That the one fell behind since it came where it is, and the other got ahead, is all that tells: which CPU
        gives more is not known here. After an exchange both begin anew, so it takes as long again to the next.
        """
        if not all(self.on.values()):
            return                           # there is room: nobody has to share what is uneven
        enough = _UNEVEN * self.period
        heads = {cpu: max(group, key=lambda i: (i.entitled, i.slot)) for cpu, group in self.on.items()
                 if all(item.home == cpu for item in group)}
        owed = sorted(heads, key=lambda cpu: (-heads[cpu].lag, cpu))
        for poor, rich in zip(owed[:len(owed) // 2], reversed(owed), strict=False):
            one, two = heads[poor], heads[rich]
            if max(one.entitled, two.entitled) <= _HEAVY:
                continue
            alike = abs(one.entitled - two.entitled) <= _SLACK
            away, back = ([one], [two]) if alike else (self.on[poor][:], self.on[rich][:])
            behind, ahead = sum(i.drift for i in away), sum(i.drift for i in back)
            if (sum(i.lag for i in away) - sum(i.lag for i in back) > enough
                    and behind > 0.0 > ahead and behind - ahead > enough
                    and len(away) + len(back) <= _CROWD
                    and all(rich in item.allowed for item in away) and all(poor in item.allowed for item in back)):
                for item in away:
                    self._move(item, rich)
                for item in back:
                    self._move(item, poor)

    def relieve(self, patience: float) -> None:
        """Bring the most overloaded CPU down, as long as a step gains at least *patience*."""
        stuck: set[int] = set()
        for _ in range(2 * len(self.items)):
            over = [
                cpu for cpu, load in self.load.items()
                if cpu not in stuck and load - self.period > patience and len(self.on[cpu]) > 1
            ]
            if not over:
                return
            worst = max(over, key=lambda cpu: (self.load[cpu], -cpu))
            steps = self._best_step(worst, patience) or self._chain(worst, patience)
            if not steps:
                stuck.add(worst)
            for item, cpu in steps:
                self._move(item, cpu)

    def _best_step(self, worst: int, patience: float) -> list[tuple[_Item, int]]:
        """The move, or exchange, off *worst* that lowers the higher of the two loads most.

        A move must gain *patience*, an exchange twice that, for it moves two.
        """
        high = self.load[worst]
        best: list[tuple[_Item, int]] = []
        most = 0.0
        sorted_on: dict[int, tuple[list[float], list[_Item]]] = {}
        lighter = sorted(
            (load, cpu) for cpu, load in self.load.items() if load < high - patience
        )
        for item in self.on[worst]:
            for low, cpu in islice(
                (pair for pair in lighter if pair[1] in item.allowed), _TARGETS
            ):
                gap = high - low
                gain = min(item.target, gap - item.target, high - self.period) - patience
                if gain >= 0.0 and (not best or gain > most):
                    best, most = [(item, cpu)], gain
                wanted = item.target - gap / 2        # the exchange that levels the two
                if wanted <= 0.0:
                    continue
                if cpu not in sorted_on:
                    group = sorted(self.on[cpu], key=lambda i: (i.target, i.slot))
                    sorted_on[cpu] = ([i.target for i in group], group)
                sizes, group = sorted_on[cpu]
                at = bisect_left(sizes, wanted)
                for other in group[max(0, at - 2):at + 2]:
                    if worst not in other.allowed:
                        continue
                    less = item.target - other.target
                    gain = min(less, gap - less, high - self.period) - 2 * patience
                    if gain >= 0.0 and (not best or gain > most):
                        best, most = [(item, cpu), (other, worst)], gain
        return best

    def _chain(self, worst: int, patience: float) -> list[tuple[_Item, int]]:
        """Where affinity bars the direct way: the shortest chain of moves that relieves *worst*.

        Each CPU on the way takes one vCPU and gives one on, and ends below *worst* as it was.
        """
        goal = self.load[worst] - patience
        if not self.narrow or min(self.load.values()) > goal:
            return []
        came: dict[int, tuple[_Item, int]] = {}       # CPU -> who comes, from where
        arriving = {worst: 0.0}
        queue = [worst]
        for cpu in queue:
            load = self.load[cpu] + arriving[cpu]
            if cpu != worst and load <= goal:
                steps: list[tuple[_Item, int]] = []
                while cpu != worst:
                    item, source = came[cpu]
                    steps.append((item, cpu))
                    cpu = source
                return steps
            # The smallest that is enough: it burdens the next CPU least.
            for item in sorted(self.on[cpu], key=lambda i: (i.target, i.slot)):
                if load - item.target <= goal:
                    for to in sorted(item.allowed.difference(arriving)):
                        arriving[to] = item.target
                        came[to] = (item, cpu)
                        queue.append(to)
        return []

    def answer(self) -> Placement:
        rates: dict[Slot, float] = {}
        for group in self.on.values():
            rates.update(self._divide(group))
        return Placement(cpu={item.slot: item.cpu for item in self.items}, rate=rates)

    def _divide(self, group: list[_Item]) -> dict[Slot, float]:
        """One CPU among its vCPUs: late ones in full first, the others by their targets."""
        late = sum(item.target for item in group if item.late)
        least = _STALL if late else _TRICKLE
        share = {
            item.slot: max(item.target, item.entitled * self.period * least) for item in group
        }
        total = sum(share.values())
        if late and total > self.period:
            rest = total - late
            # What the late leave, but never nothing: a rate must be positive.
            left = max(self.period - late, rest * _STALL)
            for item in group:
                if not item.late:
                    share[item.slot] *= left / rest
            total = sum(share.values())
        return {slot: wanted / total for slot, wanted in share.items()}

    def _put(self, item: _Item, cpu: int) -> None:
        item.cpu = cpu
        self.on[cpu].append(item)
        self.load[cpu] += item.target

    def _move(self, item: _Item, cpu: int) -> None:
        if item.cpu == cpu:
            return
        group = self.on[item.cpu]
        group.remove(item)
        # Summed anew: repeated subtraction would leave a residue on an emptied CPU.
        self.load[item.cpu] = sum(other.target for other in group)
        self._put(item, cpu)
