"""Affinity as a flow: can these shares be had on these CPUs, and which ways lead there?

Theory. A bipartite network from affinity sets (what each may use) to host CPUs of capacity 1,
solved by shortest augmenting paths (Edmonds and Karp, 1972). The minimum cut names the sets
that together ask for more than the CPUs they reach (Hall). In the residual graph an edge that
carries nothing and lies on no cycle carries nothing in *any* solution: a CPU that such an edge
leads to belongs to others in full, and a vCPU that ran there anyway would take from them what
they can get nowhere else.

Sets of CPUs are ints, one bit a CPU, so one step of a search over a whole set is one `&`.
Cost: a few breadth-first searches over (distinct affinity sets + CPUs).

Units: host CPUs. Where it is poor: floats, exact to about EPS per path.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

__all__ = ["EPS", "Flow", "bits", "merge", "route", "usable"]

EPS: Final = 1e-9              # host CPUs: a billionth of one is rounding
_REAL: Final = 1e-6            # less flow than this proves nothing about an edge


@dataclass(frozen=True, slots=True)
class Flow:
    """A maximum flow and its minimum cut."""

    total: float
    crowded: frozenset[int]    # affinity sets that could not send all, or share with those
    taken: int                 # the CPUs they reach, all full
    sent: Mapping[int, Mapping[int, float]]     # CPU bit -> affinity set -> amount


def merge(supplies: Iterable[tuple[int, float]]) -> dict[int, float]:
    """Sum the supplies of equal affinity sets."""
    merged: dict[int, float] = {}
    for reach, supply in supplies:
        merged[reach] = merged.get(reach, 0.0) + supply
    return merged


def bits(mask: int) -> Iterator[int]:
    """The single bits of *mask*, lowest first."""
    while mask:
        bit = mask & -mask
        yield bit
        mask ^= bit


def route(supply: Mapping[int, float]) -> Flow:
    """Send each affinity set's supply to CPUs of capacity 1, as much as fits."""
    reaches = sorted(supply, key=lambda reach: (reach.bit_count(), reach))
    left = [supply[reach] for reach in reaches]
    room: dict[int, float] = {}
    for reach in reaches:
        for bit in bits(reach):
            room[bit] = 1.0
    open_bits = sum(room)
    users: dict[int, dict[int, float]] = {bit: {} for bit in room}
    for k, reach in enumerate(reaches):        # greedy first: the most restricted choose first
        for bit in bits(reach & open_bits):
            amount = min(left[k], room[bit])
            if amount > EPS:
                users[bit][k] = amount
                left[k] -= amount
                room[bit] -= amount
            if room[bit] <= EPS:
                open_bits &= ~bit
            if left[k] <= EPS:
                break
    while True:
        # Breadth first from every set with supply left; a CPU leads back to the sets using it.
        came_by: dict[int, int] = {}           # CPU bit -> set
        came_from: dict[int, int] = {}         # set -> CPU bit (0: it has supply left)
        queue = [k for k in range(len(reaches)) if left[k] > EPS]
        came_from.update(dict.fromkeys(queue, 0))
        seen = 0
        end = 0
        for k in queue:
            fresh = reaches[k] & ~seen
            if end := fresh & open_bits & -(fresh & open_bits):
                came_by[end] = k
                break
            seen |= fresh
            for bit in bits(fresh):
                came_by[bit] = k
                for other in users[bit]:
                    if other not in came_from:
                        came_from[other] = bit
                        queue.append(other)
        if not end:
            total = len(room) - sum(room.values())
            sent = {
                bit: {reaches[k]: amount for k, amount in by.items()} for bit, by in users.items()
            }
            return Flow(total, frozenset(reaches[k] for k in came_from), seen, sent)
        path: list[tuple[int, int]] = []       # (set, CPU it sends more to)
        bit = end
        while bit:
            path.append((came_by[bit], bit))
            bit = came_from[came_by[bit]]
        amount = min(room[end], left[path[-1][0]])
        for k, _ in path[:-1]:
            amount = min(amount, users[came_from[k]][k])
        for k, bit in path:
            users[bit][k] = users[bit].get(k, 0.0) + amount
            back = came_from[k]
            if not back:
                left[k] -= amount
                continue
            users[back][k] -= amount
            if users[back][k] <= EPS:
                del users[back][k]
        room[end] -= amount
        if room[end] <= EPS:
            open_bits &= ~end


def usable(supply: Mapping[int, float]) -> dict[int, int]:
    """For each affinity set the CPUs that it uses in some maximum flow (never more than it may).

    A set whose supply is not routed in full keeps all its CPUs.
    """
    flow = route(supply)
    used = 0
    roomy = 0
    users: dict[int, list[int]] = {}
    for bit, by in flow.sent.items():
        users[bit] = [reach for reach, amount in by.items() if amount > _REAL]
        used |= bit if users[bit] else 0
        roomy |= bit if sum(by.values()) < 1.0 - _REAL else 0
    ways: dict[int, int] = {
        reach: (reach if reach in flow.crowded else 0) for reach in supply
    }
    for bit in flow.sent:
        # What this CPU can pass on: to whoever uses it, and through spare room to all CPUs.
        seen = bit
        reached: set[int] = set()
        queue = [bit]
        for at in queue:
            onward = used if at & roomy else 0
            for reach in users[at]:
                if reach not in reached:
                    reached.add(reach)
                    onward |= reach
            queue.extend(bits(onward & ~seen))
            seen |= onward
        for reach in supply:
            if reach & bit and reach in reached:
                ways[reach] |= bit
    return {reach: way or reach for reach, way in ways.items()}
