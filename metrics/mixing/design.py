"""The experiment: which VM runs when, under which conditions, in which order of conditions.

Theory.  Two VMs of each mode share one CPU. Conditions, each a block of equal slices:

| condition | order of VMs | what it holds |
|---|---|---|
| `random` | drawn at random, one may follow itself | every transition, at every reuse distance |
| `mixed` | h1 s1 h1 s1 .. then h2 s2 h2 s2 .. | every switch crosses modes; reuse distance 2 |
| `batched` | h1 h2 h1 h2 .. then s1 s2 s1 s2 .. | no switch crosses; reuse distance 2 as well |
| `mixed-swapped`, `batched-swapped` | the same with other partners, or begun with the other | A/A controls: as above |
| `solo` | h1 h1 .., s1 s1 .., h2 h2 .., s2 s2 .. | no switch: the steady rate |

`mixed` against `batched` differs in nothing but whose mode the predecessor had: same VMs, same number of switches,
same reuse distance. (h1 s1 h2 s2 against h1 h2 | s1 s2 would compare cache distances, up to twenty times the effect.)

A *replicate* runs its conditions in a random order and then in the mirrored order (ABBA), so that whatever drifts
evenly cancels. A *round* is such a replicate at one slice length, with a block of random order at the reference
length after each of its blocks. Randomness is passed in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import numpy as np

from .slices import Block, Kind

__all__ = ["BLOCK_NS", "CONDITIONS", "LEAST_SLICE_NS", "SEQUENCES", "Roles", "Run", "random_order", "rounds", "runs"]

BLOCK_NS: Final = 120_000_000
LEAST_SLICES: Final = 60             # of a block: else too few are left once those around breaths are out
LEAST_SLICE_NS: Final = 250_000
CONDITIONS: Final[tuple[Kind, ...]] = ("mixed", "mixed-swapped", "batched", "batched-swapped", "solo")


@dataclass(frozen=True, slots=True)
class Roles:
    """Two VMs of each mode, by index."""

    hardware: tuple[int, int]
    software: tuple[int, int]


def _pairs(*cycles: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    return cycles


SEQUENCES: Final[Mapping[Kind, Callable[[Roles], tuple[tuple[int, ...], ...]]]] = MappingProxyType({
    "mixed": lambda r: _pairs((r.hardware[0], r.software[0]), (r.hardware[1], r.software[1])),
    "mixed-swapped": lambda r: _pairs((r.hardware[0], r.software[1]), (r.hardware[1], r.software[0])),
    "batched": lambda r: _pairs(r.hardware, r.software),
    "batched-swapped": lambda r: _pairs(r.hardware[::-1], r.software[::-1]),
    "solo": lambda r: _pairs((r.hardware[0],), (r.software[0],), (r.hardware[1],), (r.software[1],)),
})


@dataclass(frozen=True, slots=True)
class Run:
    """A part of a block: these VMs in turn, so many times over."""

    cycle: tuple[int, ...]
    times: int


def random_order(rng: np.random.Generator, roles: Roles, length: int) -> list[int]:
    """Each next VM drawn evenly from all, whoever came before."""
    vms = np.array([*roles.hardware, *roles.software])
    return vms[rng.integers(0, len(vms), length)].tolist()


def runs(block: Block, roles: Roles, rng: np.random.Generator) -> list[Run]:
    """What a block asks of the dispatcher."""
    length = max(LEAST_SLICES, round(BLOCK_NS / block.slice_ns))
    if block.kind == "random":
        return [Run(tuple(random_order(rng, roles, length)), 1)]
    cycles = SEQUENCES[block.kind](roles)
    return [Run(cycle, max(1, round(length / len(cycles) / len(cycle)))) for cycle in cycles]


def rounds(slices_ns: Sequence[int], reference_ns: int, rng: np.random.Generator) -> Iterator[list[Block]]:
    """Round after round, for ever; each is a replicate at one slice length and blocks of random order.

    Slice lengths take turns, in an order drawn anew each time, so that every beginning is as balanced as can be.
    """
    number = replicate = 0
    while True:
        for which in rng.permutation(len(slices_ns)):
            replicate += 1
            order = [CONDITIONS[at] for at in rng.permutation(len(CONDITIONS))]
            blocks: list[Block] = []
            for kind in (*order, *reversed(order)):
                number += 2
                blocks += [Block(number - 1, kind, replicate, slices_ns[which]),
                           Block(number, "random", replicate, reference_ns)]
            yield blocks
