"""Made-up recordings with a planted cost: what the estimators must find again.

Every slice's progress is r * (run - lost) * noise, with r the VM's steady rate, drifting from block to block, and
`lost` what was planted for its predecessor and its reuse distance. Noise is normal with heavy tails downwards, as on a
shared host; breaths and slices of which others took a part are strewn in, since real recordings have them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mixvisor.metrics.mixing.design import SEQUENCES, Roles, random_order
from mixvisor.metrics.mixing.slices import Block, Recording, Slices, Vm

VMS = (Vm("h1", "hardware"), Vm("h2", "hardware"), Vm("s1", "software"), Vm("s2", "software"))
HARDWARE = np.array([True, True, False, False])
ROLES = Roles((0, 1), (2, 3))
RATE = np.array([10.0, 10.1, 1.4, 1.41])       # progress a µs


def record(
    seed: int, blocks: Sequence[Block], *, cross_us: float | tuple[float, float] = 0.0, switch_us: float = 30.0,
    refill_us: float = 3.0, noise: float = 0.015, tails: float = 0.03, drift: float = 0.004, block_s: float = 0.24,
    favour_us: float = 0.0, slope: float = 0.0,
) -> Recording:
    """*cross_us*: planted cost of a crossing, or (of hardware, of software victims). *refill_us*: by reuse distance.

    *favour_us*: less is lost after h1 and s1 than after h2 and s2, which the null must notice. *slope*: relative loss
    of rate in mixed conditions that no switch explains.
    """
    rng = np.random.default_rng(seed)
    hw_us, sw_us = cross_us if isinstance(cross_us, tuple) else (cross_us, cross_us)
    parts: list[np.ndarray] = []
    now, before, level = 1_000_000_000, -1, np.zeros(4)
    last = np.full(4, -10**9)
    count = 0
    for block in blocks:
        level = level + rng.normal(0, drift, 4) + rng.normal(0, drift)
        length = max(4, round(block_s * 1e9 / block.slice_ns))
        vm = np.array(sequence(rng, block, length))
        n = len(vm)
        previous = np.concatenate([[before], vm[:-1]])
        distance = np.empty(n)
        for i, one in enumerate(vm):
            distance[i] = count + i - last[one]
            last[one] = count + i
        count += n
        before = vm[-1]
        run = block.slice_ns + rng.normal(0, 8_000, n) + rng.exponential(15_000, n)
        switched = previous != vm
        crossed = switched & (HARDWARE[previous] != HARDWARE[vm])
        lost = np.where(switched, switch_us, 0.0) + np.where(crossed, np.where(HARDWARE[vm], hw_us, sw_us), 0.0)
        lost += np.where(switched, refill_us * np.minimum(distance - 2, 4), 0.0)
        lost += np.where(crossed & np.isin(previous, (0, 2)), -favour_us, 0.0)
        bad = rng.random(n) < tails
        factor = 1 + rng.normal(0, noise * 1e3 / block.slice_ns ** 0.5, n) - np.where(bad, rng.exponential(0.05, n), 0)
        rate = RATE[vm] * np.exp(level[vm]) * (1 - (slope if block.kind.startswith("mixed") else 0.0))
        progress = rate * (run / 1e3 - lost) * np.clip(factor, 0.3, None)
        start = now + np.concatenate([[0], np.cumsum(run[:-1] + 40_000)])
        end = np.concatenate([start[1:], [start[-1] + run[-1] + 40_000]])
        now = end[-1]
        breath = np.where(rng.random(n) < 0.005, 1_000_000, 0)
        others = np.where(rng.random(n) < 0.001, 200_000, 0)
        parts.append(np.stack([np.full(n, block.number), vm, previous, start, end, np.full(n, block.slice_ns),
                               run - others, others, breath, progress]).astype(np.int64).T)
    return Recording(vms=VMS, blocks=tuple(blocks), slices=Slices.from_rows(np.concatenate(parts)), about={})


def sequence(rng: np.random.Generator, block: Block, length: int) -> list[int]:
    if block.kind == "random":
        return random_order(rng, ROLES, length)
    cycles = SEQUENCES[block.kind](ROLES)
    each = length // len(cycles)
    return [cycle[i % len(cycle)] for cycle in cycles for i in range(each)]


def random_blocks(count: int, slice_ns: int = 1_000_000) -> list[Block]:
    return [Block(number, "random", number, slice_ns) for number in range(1, count + 1)]
