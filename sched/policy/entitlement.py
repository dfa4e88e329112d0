"""Entitlements: what share of the host CPUs each VM should have in the long run.

Theory. Weighted max-min fairness: shares grow in proportion to weights, e_i = λ·w_i, held from
below by the reservation and from above by u_i = min(cap, runnable vCPUs, allowed CPUs), until
the CPUs are used up. A weight that asks for more than its VM can use is thereby readjusted
(surplus-fair scheduling, Chandra et al., 2000), and the surplus goes to the others.

With affinity the shares must also fit the bipartite graph VM -> CPU (Hall: no set of VMs may
get more than the CPUs that it can reach). The sets of VMs and |CPUs reached| are a polymatroid,
on which the decomposition algorithm of Fujishige (1980) is exact: solve as if there was no
affinity; if a flow shows that to fit, it is the answer; else the minimum cut names a set of VMs
that asks for more than its CPUs: that set fills its CPUs, the other VMs have the remaining
CPUs, and each part is solved alone. A VM whose e_i <= vCPUs and whose flow fits can in fact be
scheduled with each vCPU on one CPU at a time (open shop with preemption, Gonzalez and Sahni).

Invariants: Σe = min(CPUs, Σu) without affinity, and the most that a flow allows with it; within
caps and reservations; monotone in weight; the same for weights in other units and VMs in any
other order (but for rounding, below 1e-9 of a CPU).

Cost: O(n log n) when nobody's affinity is restricted; with affinity one small maximum flow over
the distinct affinity sets for each split.

Units: host CPUs (1.0 = one whole CPU). Where it is poor: it sees runnable vCPUs as always
hungry; one that uses less than its share is handled below, by sleeping and waking.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ..model import VmDemand
from .flow import EPS, merge, route

__all__ = ["admit", "entitle"]


@dataclass(frozen=True, slots=True)
class _Want:
    """One VM's bounds on its share, and the CPUs it may use as bits of an int."""

    vm: str
    weight: float
    floor: float
    ceiling: float
    reach: int


def entitle(demands: Sequence[VmDemand], cpus: Sequence[int]) -> dict[str, float]:
    """Each VM's fair share in host CPUs, in the order of *demands*.

    *cpus*: the host CPUs that VMs may use. A VM without a runnable vCPU or without an allowed
    CPU gets 0. Reservations that do not fit (`admit` refuses those; a CPU may vanish later)
    are met as far as they fit, in proportion. Raises ValueError on a duplicate name.
    """
    wants = _wants(demands, cpus)
    everywhere = (1 << len(set(cpus))) - 1
    shares = dict.fromkeys((want.vm for want in wants), 0.0)
    if len(shares) != len(wants):
        raise ValueError("two demands carry the same VM name: names must be unique")
    hungry = [want for want in wants if want.ceiling > 0.0]
    if any(want.floor > 0.0 for want in hungry) and not _fits(hungry):
        met = dict(_fill([
            replace(want, weight=want.floor, floor=0.0, ceiling=want.floor)
            for want in hungry if want.floor > 0.0
        ], everywhere))
        hungry = [replace(want, floor=met.get(want.vm, 0.0)) for want in hungry]
    shares.update(_fill(hungry, everywhere))
    return shares


def admit(demands: Sequence[VmDemand], cpus: Sequence[int]) -> str | None:
    """None when all reservations can be kept at once, else one sentence saying why not.

    Call it with the VMs' configured vCPUs, before the newcomer is started.
    """
    wants = _wants(demands, cpus)
    for demand, want in zip(demands, wants, strict=True):
        if not want.reach:
            return (
                f"VM {demand.vm!r} may only use host CPUs {_listed(demand.cpus)}, and none of"
                f" them is among the scheduler's {_listed(cpus)}: change its cpus."
            )
        if demand.reservation > want.ceiling + EPS:
            return (
                f"VM {demand.vm!r} reserves {_percent(demand.reservation)} and can use at most"
                f" {_percent(want.ceiling)} (its cap, its {demand.vcpus} vCPUs and its"
                f" {want.reach.bit_count()} host CPUs): lower the reservation."
            )
    crowded, reach = _crowded([(want.reach, want.floor) for want in wants])
    if not reach:
        return None
    members = [w for w in wants if w.reach in crowded and w.floor > 0.0]
    names = ", ".join(repr(want.vm) for want in members)
    total = sum(want.floor for want in members)
    where = [cpu for bit, cpu in enumerate(sorted(set(cpus))) if reach >> bit & 1]
    return (
        f"The VMs {names} together reserve {_percent(total)}, and the host CPUs that they may"
        f" use ({_listed(where)}) have {_percent(len(where))}: lower a reservation or allow"
        f" more host CPUs."
    )


def _wants(demands: Sequence[VmDemand], cpus: Sequence[int]) -> list[_Want]:
    bit_of = {cpu: 1 << bit for bit, cpu in enumerate(sorted(set(cpus)))}
    wants: list[_Want] = []
    reaches: dict[frozenset[int], int] = {}            # few affinities, many VMs
    for demand in demands:
        reach = reaches.get(demand.cpus)
        if reach is None:
            reach = reaches[demand.cpus] = sum(bit_of.get(cpu, 0) for cpu in demand.cpus)
        ceiling = float(min(demand.vcpus, reach.bit_count()))
        if demand.cap > 0.0:
            ceiling = min(ceiling, demand.cap)
        floor = min(max(demand.reservation, 0.0), ceiling)
        wants.append(_Want(demand.vm, float(demand.weight), floor, ceiling, reach))
    return wants


def _fill(wants: Sequence[_Want], free: int) -> list[tuple[str, float]]:
    """Max-min shares of *wants* on the CPUs *free*: solve freely, split where that is too much."""
    shares: list[tuple[str, float]] = []
    parts: list[tuple[Sequence[_Want], int]] = [(wants, free)]
    while parts:
        wants, free = parts.pop()
        if not wants:
            continue
        total = float(free.bit_count())
        restricted = any(want.reach & free != free for want in wants)
        if restricted:
            total = route(merge((w.reach & free, w.ceiling) for w in wants)).total
        level = _level(wants, total)
        crowded: set[int] = set()
        taken = 0
        if restricted:
            crowded, taken = _crowded(
                [(w.reach & free, e) for w, e in zip(wants, level, strict=True)]
            )
        inside = [want for want in wants if want.reach & free in crowded]
        if len(inside) in (0, len(wants)):
            # Feasible, or over its CPUs only by rounding.
            shares.extend((w.vm, e) for w, e in zip(wants, level, strict=True))
            continue
        parts.append((inside, taken))
        parts.append(([w for w in wants if w.reach & free not in crowded], free & ~taken))
    return shares


def _level(wants: Sequence[_Want], total: float) -> list[float]:
    """e_i = min(ceiling, max(floor, λ·weight)) with Σe = min(total, Σceiling): λ found exactly.

    Σe is piecewise linear in λ: each VM joins with slope w at floor/w, leaves at ceiling/w.
    """
    events: list[tuple[float, float]] = []
    have = 0.0
    for want in wants:
        have += want.floor
        if want.ceiling > want.floor:
            events.append((want.floor / want.weight, want.weight))
            events.append((want.ceiling / want.weight, -want.weight))
    events.sort()
    level = slope = 0.0
    for at, change in events:
        if slope > 0.0 and have + slope * (at - level) >= total:
            level += max(0.0, total - have) / slope
            break
        have += slope * (at - level)
        level, slope = at, slope + change
    return [min(w.ceiling, max(w.floor, level * w.weight)) for w in wants]


def _fits(wants: Sequence[_Want]) -> bool:
    return not _crowded([(want.reach, want.floor) for want in wants])[1]


def _crowded(supplies: Sequence[tuple[int, float]]) -> tuple[set[int], int]:
    """The affinity sets that ask for more than the CPUs they reach, and those CPUs."""
    flow = route(merge(supplies))
    return set(flow.crowded), flow.taken


def _percent(share: float) -> str:
    return f"{share * 100:.4g} %"


def _listed(cpus: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(cpus))) or "none"
