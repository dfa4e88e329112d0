"""The randomised-order estimator: what a crossing costs, by regression over single slices.

Theory.  Where the order of VMs is drawn at random, the mode of the predecessor is a coin that nothing else has
touched: whatever disturbs the host disturbs slices after either mode alike. For a slice of one VM,

    rate = r (1 - lost / run),   lost = switch + cross [predecessor of the other mode] + refill(reuse distance)

with the steady rate r of that VM at that time. Each VM is fitted by itself, with its level in every `LEVEL_NS`
absorbed, so a drift of the host or a change of its clock speed costs nothing. `cross` of a hardware VM is (h|s -
h|h), of a software VM (s|h - s|s), read "current | previous"; the *cost of a crossing* is their mean, the interaction
[(h|s - h|h) + (s|h - s|s)] / 2. The mean matters: what leaving a VM costs is charged to its successor, so the two alone
can shift against each other.

Noise of a shared host is heavy-tailed (an interrupt, a neighbour), so residuals are clipped (Huber's
M-estimator, by pseudo-values), and errors are clustered by block: neighbouring slices need not be independent.

The built-in *null*: among slices after the other mode, the two predecessors of that mode are contrasted. They
differ in nothing that a mode could explain, so this must be zero within its bounds.

Sources: Huber, Robust Statistics, 1981, 7.8 (pseudo-values) and 6.3; Cameron and Miller, JHR 50, 2015 (clusters).
Units: ns of CPU time a switch. Where it is poor: needs some dozen blocks, or the clusters say little; the null needs
two alike VMs in a mode; the steady rate is that of a VM that went on where the order has such slices, else
that after a switch, which makes every cost a few percent larger.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from .interval import Estimate
from .slices import Bools, Floats, Ints, Mode, Recording, Slices, clean, reuse_distance

__all__ = ["OrderEstimate", "estimate_order"]

DISTANCES: Final = (3, 4, 5, 6)      # each has its own refill; the last stands for all beyond
CLIP: Final = 1.5                    # of the residuals' scale
ROUNDS: Final = 30
LEAST_SPREAD: Final = 0.02           # standard deviation within blocks of a column of zeros and ones
LEVEL_NS: Final = 40_000_000         # shorter costs freedoms, longer lets the host's moods in (each a tenth of width)
FEWEST_BLOCKS: Final = 8
FEWEST_SLICES: Final = 40            # of one VM
_NORMAL_MAD: Final = 1.4826
_SWITCH, _CROSS, _NULL = 0, 1, 2     # columns of the design


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderEstimate:
    """Costs are ns of CPU time."""

    cost: Estimate                           # of a crossing, mean over both modes
    by_victim: Mapping[Mode, Estimate]       # `cross` of the VMs of this mode
    null: Estimate | None                    # must include zero
    transitions: Mapping[tuple[Mode, Mode], Estimate] | None     # lost by (current, previous)
    run_ns: float                            # mean of the slices that were used
    slices: int
    offered: int                             # slices of random order, clean or not
    blocks: int


@dataclass(frozen=True, slots=True)
class _Groups:
    """What slices have in common: errors within a block, a level within a part of it."""

    block: Ints
    blocks: int
    level: Ints


@dataclass(slots=True)
class _Fit:
    """One VM: coefficients, and for each what every block adds to its error."""

    costs: Floats                            # by column, NaN where the data do not tell
    influence: Floats                        # blocks x columns


def estimate_order(recording: Recording) -> OrderEstimate | None:
    """From the blocks of the kind `random`; None where there are too few to say anything."""
    kinds = {block.number for block in recording.blocks if block.kind == "random"}
    offered = np.isin(recording.slices.block, list(kinds))
    used = offered & clean(recording.slices)
    distance = reuse_distance(recording.slices)[used]
    slices = recording.slices.take(used)
    _, first, block = np.unique(slices.block, return_index=True, return_inverse=True)
    blocks = int(block.max()) + 1 if len(block) else 0
    if blocks < FEWEST_BLOCKS:
        return None
    since = (slices.start_ns - slices.start_ns[first][block]) // LEVEL_NS
    _, level = np.unique(np.stack([block, since]), axis=1, return_inverse=True)
    group = _Groups(block.astype(np.int64), blocks, level.ravel().astype(np.int64))
    hardware = recording.modes()
    fits: dict[Mode, list[_Fit]] = {"hardware": [], "software": []}
    for vm, described in enumerate(recording.vms):
        mine = slices.vm == vm
        if np.count_nonzero(mine) < FEWEST_SLICES:
            return None
        fits[described.mode].append(_fit(slices, mine, vm, hardware, distance, group))
    if not all(fits.values()):
        return None

    def mean(parts: Sequence[tuple[Mode, float, Sequence[int]]]) -> Estimate:
        """The sum over modes of weight times the mean over its VMs of the sum of columns."""
        value, influence = 0.0, np.zeros(blocks)
        for mode, weight, columns in parts:
            for fit in fits[mode]:
                share = weight / len(fits[mode])
                for column in columns:
                    value += share * fit.costs[column]
                    influence += share * fit.influence[:, column]
        error = np.sqrt(np.sum(influence ** 2) * blocks / (blocks - 1))
        return Estimate(float(value), float(error), blocks - 1, len(slices))

    cost = mean([("hardware", 0.5, [_CROSS]), ("software", 0.5, [_CROSS])])
    null = mean([("hardware", 0.5, [_NULL]), ("software", 0.5, [_NULL])])
    if np.isnan(cost.value):
        return None
    same = {mode: mean([(mode, 1.0, [_SWITCH])]) for mode in fits}
    other: dict[Mode, Mode] = {"hardware": "software", "software": "hardware"}
    transitions: dict[tuple[Mode, Mode], Estimate] | None = None
    if not any(np.isnan(one.value) for one in same.values()):
        transitions = {}
        for mode in fits:
            transitions[mode, mode] = same[mode]
            transitions[mode, other[mode]] = mean([(mode, 1.0, [_SWITCH, _CROSS])])
    return OrderEstimate(
        cost=cost, by_victim={mode: mean([(mode, 1.0, [_CROSS])]) for mode in fits},
        null=None if np.isnan(null.value) else null, transitions=transitions,
        run_ns=float(slices.run_ns.mean()), slices=len(slices), offered=int(np.count_nonzero(offered)), blocks=blocks)


def _fit(
    slices: Slices, mine: Bools, vm: int, hardware: Bools, distance: Ints, groups: _Groups,
) -> _Fit:
    previous, run = slices.previous[mine], slices.run_ns[mine].astype(float)
    block, blocks = groups.block[mine], groups.blocks
    group, levels = groups.level[mine], int(groups.level.max()) + 1
    known = previous >= 0
    switched = known & (previous != vm)
    cross = switched & (hardware[previous] != hardware[vm])
    columns = [switched.astype(float), cross.astype(float), _which_predecessor(previous, cross)]
    reached = np.minimum(distance[mine], DISTANCES[-1])
    columns += [(switched & (reached == far)).astype(float) for far in DISTANCES]
    rate = slices.progress[mine] / run
    y = rate / np.median(rate)
    which = np.stack(columns, axis=1)
    # Without slices that went on, or that came after the same mode, a column never changes: it tells nothing.
    told = _demean(which, group, levels).std(axis=0) > LEAST_SPREAD
    design = -which / run[:, None]
    x = _demean(design, group, levels)[:, told]
    beta = np.zeros(x.shape[1])
    if x.shape[1]:
        beta, psi, slope = _huber(x, y, group, levels)
        bread = np.linalg.pinv(x.T @ x) / max(slope, 0.05)
        scores = np.stack([np.bincount(block, x[:, k] * psi, blocks) for k in range(x.shape[1])], axis=1)
        influence = scores @ bread
    else:
        influence = np.zeros((blocks, 0))
    # The level of a slice with no cost at all: what the rates are relative to.
    level = float(np.mean(y - design[:, told] @ beta))
    costs = np.full(design.shape[1], np.nan)
    costs[told] = beta / level
    spread = np.zeros((blocks, design.shape[1]))
    spread[:, told] = influence / level
    return _Fit(costs, spread)


def _which_predecessor(previous: Ints, cross: Bools) -> Floats:
    """+1/2 after the first half of the other mode's VMs, -1/2 after the rest, 0 elsewhere."""
    contrast = np.zeros(len(previous))
    others = np.unique(previous[cross])
    if len(others) > 1:
        first = np.isin(previous, others[:len(others) // 2])
        contrast[cross] = np.where(first[cross], 0.5, -0.5)
    return contrast


def _demean(values: Floats, group: Ints, groups: int) -> Floats:
    count = np.maximum(np.bincount(group, minlength=groups), 1)
    if values.ndim == 1:
        return values - (np.bincount(group, values, groups) / count)[group]
    return np.stack([_demean(values[:, k], group, groups) for k in range(values.shape[1])], axis=1)


def _huber(x: Floats, y: Floats, group: Ints, groups: int) -> tuple[Floats, Floats, float]:
    """(coefficients, clipped residuals, share of residuals that are not clipped), levels of groups absorbed."""
    solve = np.linalg.pinv(x)
    pseudo, scale = y, 0.0
    beta = np.zeros(x.shape[1])
    psi = residual = y
    for turn in range(ROUNDS):
        centred = _demean(pseudo, group, groups)
        new = solve @ centred
        level = pseudo - centred                 # each group's mean, at each slice
        fitted = level + x @ new
        residual = y - fitted
        if turn < 3:
            scale = _NORMAL_MAD * float(np.median(np.abs(residual - np.median(residual))))
        psi = np.clip(residual, -CLIP * scale, CLIP * scale)
        pseudo = fitted + psi
        moved = np.max(np.abs(x.std(axis=0) * (new - beta)))
        beta = new
        if turn >= 3 and moved < 1e-7:
            break
    return beta, psi, float(np.mean(np.abs(residual) <= CLIP * scale)) if scale else 1.0
