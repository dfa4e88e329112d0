"""Partition: host CPUs are given to modes by demand, so that modes meet on no core.

Theory.  A step before entitlement and placement: it says which host CPUs a mode may use, and the
rest is policy/entitlement.py and policy/placement.py on narrower affinities. What is given away
is a whole core with all its SMT siblings, since siblings share what mixing costs. The cores stand
in a row, those behind one last-level cache side by side; software has the first of them and hardware
the others, so one number says it all, at most one cache serves both, and a change moves one core
at the border.

Demand is what the modes' competing VMs are entitled to without a partition, smoothed over
SMOOTH_NS; a mode's part of the CPUs follows its part of the demand. Hysteresis: the border moves
only if the wish is more than half a core and HYSTERESIS of one off, so demand that rests on a
border does not move VMs to and fro. A mode that has VMs, awake or not, keeps a core (whoever wakes
has somewhere to go), and as many as its reservations need if both can have that.

Affinity is the operator's and comes first: a core that one mode's VM can do without and the other
mode's cannot changes sides; where a VM still has none of its own mode's cores it keeps all the
CPUs that it may use, and modes meet there. So they do on a host with one core. The answer names
who meets, and the run queues are those of policy/batch.py, which are fair's where nobody meets.

Invariants: no VM is left without a CPU, nor given one outside its affinity; `meeting` empty means
that no core serves two modes; same input and history, same answer, in any order of the VMs.

Where it is good: many CPUs, steady demand: no crossing costs anything. Where it is poor: it is
not work-conserving over the border (a mode's idle CPU stays idle), and weights hold within a mode
only, across modes up to half a core; on few cores that is much.

Units: host CPUs; `_ns`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import exp
from typing import Final

__all__ = ["Partition", "Split", "Tenant", "cores_of"]

SMOOTH_NS: Final = 2_000_000_000
HYSTERESIS: Final = 0.25           # of a core


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """One VM as the partition sees it."""

    vm: str
    mode: str
    cpus: frozenset[int]           # hard affinity
    demand: float                  # entitled now, were there no partition; 0: it does not compete
    reservation: float = 0.0


@dataclass(frozen=True, slots=True)
class Split:
    """Which host CPUs each mode has, and the VMs that must meet another mode all the same."""

    cpus: Mapping[str, frozenset[int]]
    meeting: tuple[str, ...] = ()

    def confine(self, vm: str, mode: str, cpus: frozenset[int]) -> frozenset[int]:
        """The CPUs of *cpus* that this VM may use under the partition."""
        return cpus if vm in self.meeting else cpus & self.cpus.get(mode, cpus) or cpus


def cores_of(
    cpus: Iterable[int], siblings: Mapping[int, frozenset[int]], caches: Mapping[int, frozenset[int]] | None = None,
) -> tuple[frozenset[int], ...]:
    """*cpus* by core, in the row that the border divides: by last-level cache, lowest first.

    A CPU without known siblings is a core of its own, and one without a known cache comes by its number.
    """
    left = frozenset(cpus)
    behind = caches or {}
    cores: list[frozenset[int]] = []
    while left:
        lowest = min(left)
        core = siblings.get(lowest, frozenset[int]()) & left
        cores.append(core | {lowest})
        left -= cores[-1]
    return tuple(sorted(cores, key=lambda core: (min(behind.get(min(core), core)), min(core))))


class Partition:
    """The border and what it remembers. *modes*: the first has the first cores of the row."""

    def __init__(
        self, cores: Sequence[frozenset[int]], modes: tuple[str, str] = ("software", "hardware"),
    ) -> None:
        if not cores:
            raise ValueError("a partition needs at least one core")
        self._cores = tuple(cores)
        self._modes = modes
        self._sizes = [len(core) for core in cores]
        self._demand: dict[str, float] = {}
        self._border: int | None = None        # how many cores the first mode has

    def update(self, tenants: Sequence[Tenant], elapsed_ns: int) -> Split:
        """The partition for *tenants* now, *elapsed_ns* after the last call."""
        if elapsed_ns < 0:
            raise ValueError(f"elapsed_ns must be >= 0, got {elapsed_ns}")
        first, second = self._modes
        present = [mode for mode in self._modes if any(t.mode == mode for t in tenants)]
        self._smooth(tenants, elapsed_ns)
        everything = frozenset[int]().union(*self._cores)
        if len(present) < 2:
            self._border = None
            return Split(dict.fromkeys(present, everything))
        if len(self._cores) < 2:
            return Split(dict.fromkeys(present, everything), tuple(sorted(t.vm for t in tenants)))
        self._border = self._place_border(tenants)
        side = {
            core: first if at < self._border else second for at, core in enumerate(self._cores)}
        meeting = self._respect_affinity(tenants, side)
        return Split(
            {mode: frozenset[int]().union(*(core for core, m in side.items() if m == mode))
             for mode in present},
            tuple(sorted(meeting)))

    def _smooth(self, tenants: Sequence[Tenant], elapsed_ns: int) -> None:
        keep = exp(-elapsed_ns / SMOOTH_NS)
        for mode in self._modes:
            # In a fixed order: float sums depend on it.
            now = sum(sorted(t.demand for t in tenants if t.mode == mode))
            old = self._demand.get(mode)
            self._demand[mode] = now if old is None else old * keep + now * (1.0 - keep)

    def _place_border(self, tenants: Sequence[Tenant]) -> int:
        first, second = self._modes
        total = float(sum(self._sizes))
        demand = sum(self._demand.values())
        wish = total * (self._demand[first] / demand if demand > 0.0 else 0.5)
        sums = [0.0]
        for size in self._sizes:
            sums.append(sums[-1] + size)
        needs = {mode: sum(sorted(t.reservation for t in tenants if t.mode == mode))
                 for mode in self._modes}
        last = len(self._cores) - 1
        low = next(n for n in range(1, len(sums)) if sums[n] >= min(needs[first], total) - 1e-9)
        high = max(n for n in range(len(sums)) if total - sums[n] >= min(needs[second], total) - 1e-9)
        low, high = min(low, last), max(min(high, last), 1)
        if low > high:
            # Whole cores cannot keep both modes' reservations: demand decides between them.
            low, high = high, low
        best = min(range(low, high + 1), key=lambda n: (abs(sums[n] - wish), n))
        old = self._border
        if old is None or not low <= old <= high:
            return best
        step = self._sizes[old if wish > sums[old] else old - 1]
        return best if abs(sums[old] - wish) > step * (0.5 + HYSTERESIS) else old

    def _respect_affinity(
        self, tenants: Sequence[Tenant], side: dict[frozenset[int], str]
    ) -> set[str]:
        """Let cores change sides for VMs that reach none of their mode; who is left, meets."""
        meeting: set[str] = set()

        def served(tenant: Tenant) -> bool:
            return any(mode == tenant.mode and core & tenant.cpus for core, mode in side.items())

        for tenant in sorted(tenants, key=lambda t: (len(t.cpus), t.vm)):
            if served(tenant):
                continue
            others = [t for t in tenants if t.mode != tenant.mode and served(t)]
            for core in self._cores:
                if core & tenant.cpus:
                    was, side[core] = side[core], tenant.mode
                    if all(map(served, others)):
                        break
                    side[core] = was
            else:
                meeting.add(tenant.vm)
        return meeting
