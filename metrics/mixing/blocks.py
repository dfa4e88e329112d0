"""Distance-matched ABBA blocks: mixed against batched, with A/A and solo controls, over several slice lengths.

Theory.  design.py has the conditions. The rate of a VM in a block is a trimmed mean over its clean slices, each
progress / run time, at the one reuse distance that the condition has. Rates are taken relative to the same VM's solo
blocks of the same replicate, so a replicate yields, for each mode of the *victim*,

    loss      = batched - mixed        what crossing adds, as a fraction of the steady rate
    switching = solo - batched         what switching between VMs of one mode costs
    A/A       = [(mixed - mixed-swapped) + (batched - batched-swapped)] / 2, which nothing but chance can move

and the mean over both modes is what is told first, since the work of leaving a VM is charged to its successor.
Replicates are independent; within one, every condition is met twice in mirrored order.

If the loss is a price paid at each switch, it is proportional to the switches in a CPU-second: loss = cost *
switches. `cost` is the slope through the origin. A line with an intercept is fitted beside it: an intercept that is
not zero says that the loss is *not* a cost of switches (caches, most often), and one cost a crossing is then no
summary. Weights are set by the design and not by the data (every replicate's loss is about equally uncertain), so the
few replicates of a short run do not pretend to know their own variance.

Units: losses are fractions; `cost` ns; switches in a second of VM CPU time. Where it is poor: a block lasts an eighth
of a second, and noise of the host at that scale is all in it; a minute gives a few us where the randomised order
(order.py) gives one. It is what a person can check with pencil and paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from .interval import Estimate, combine, trimmed_mean
from .slices import Block, Floats, Kind, Mode, Recording, clean, reuse_distance

__all__ = ["BlockEstimate", "Line", "Point", "estimate_blocks"]

DISTANCE: Final[Mapping[Kind, int]] = {
    "mixed": 2, "mixed-swapped": 2, "batched": 2, "batched-swapped": 2, "solo": 1}
FEWEST_SLICES: Final = 4             # of a VM in a block
TRIM: Final = 0.1
MODES: Final[tuple[Mode, Mode]] = ("hardware", "software")


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """All replicates at one slice length."""

    slice_ns: int
    switches_s: float                # switches a second of VM CPU time
    replicates: int
    loss: Estimate
    loss_by_victim: Mapping[Mode, Estimate]
    control: Estimate                # A/A
    switching: Estimate              # same-mode switching against solo


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A straight line through the points: `value = intercept + slope * switches`. Slope in ns."""

    slope: Estimate
    intercept: Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockEstimate:
    """Costs are ns of CPU time a switch."""

    points: tuple[Point, ...]                # by slice length
    cost: Estimate                           # of a crossing
    by_victim: Mapping[Mode, Estimate]
    control: Estimate                        # A/A, must include zero
    switching: Estimate                      # of a switch between VMs of one mode
    line: Line | None                        # None: one slice length only
    replicates: int


@dataclass(slots=True)
class _Length:
    """What the replicates at one slice length say, one number each."""

    run_ns: list[float] = field(default_factory=list)
    loss: dict[Mode, list[float]] = field(default_factory=lambda: {mode: [] for mode in MODES})
    control: list[float] = field(default_factory=list)
    switching: list[float] = field(default_factory=list)


def estimate_blocks(recording: Recording) -> BlockEstimate | None:
    """From the blocks of conditions; None where no slice length has three whole replicates."""
    lengths: dict[int, _Length] = {}
    for slice_ns, rates, run_ns in _replicates(recording):
        _compare(lengths.setdefault(slice_ns, _Length()), rates, run_ns, recording)
    points = [point for slice_ns in sorted(lengths) if (point := _point(slice_ns, lengths[slice_ns]))]
    if not points:
        return None
    several = len(points) > 1
    return BlockEstimate(
        points=tuple(points),
        cost=_through_origin(points, [p.loss for p in points]),
        by_victim={mode: _through_origin(points, [p.loss_by_victim[mode] for p in points]) for mode in MODES},
        control=_through_origin(points, [p.control for p in points]),
        switching=_through_origin(points, [p.switching for p in points]),
        line=_line(points, [p.loss for p in points]) if several else None,
        replicates=sum(p.replicates for p in points))


def _replicates(recording: Recording) -> list[tuple[int, dict[Kind, list[Floats]], float]]:
    """(slice length, rates by VM of each block of a condition, mean run time) of every whole replicate."""
    slices = recording.slices
    good = clean(slices)
    distance = reuse_distance(slices)
    rate = slices.progress / np.maximum(slices.run_ns, 1)
    order = np.argsort(slices.block, kind="stable")
    edges = np.searchsorted(slices.block[order], [(b.number, b.number + 1) for b in recording.blocks])
    found: dict[tuple[int, int], dict[Kind, list[Floats]]] = {}
    runs: dict[tuple[int, int], list[float]] = {}
    for block, (first, end) in zip(recording.blocks, edges, strict=True):
        if block.kind not in DISTANCE:
            continue
        at = order[first:end]
        at = at[good[at] & (distance[at] == DISTANCE[block.kind])]
        rates = np.array([_trimmed(rate[at[slices.vm[at] == vm]]) for vm in range(len(recording.vms))])
        if np.isnan(rates).any():
            continue
        key = (block.replicate, block.slice_ns)
        found.setdefault(key, {}).setdefault(block.kind, []).append(rates)
        runs.setdefault(key, []).append(float(slices.run_ns[at].mean()))
    return [(key[1], kinds, float(np.mean(runs[key]))) for key, kinds in found.items() if _whole(kinds, recording, key)]


def _whole(kinds: Mapping[Kind, Sequence[Floats]], recording: Recording, key: tuple[int, int]) -> bool:
    """Every condition as often as was planned: half a replicate is not balanced."""
    planned: dict[Kind, int] = {}
    block: Block
    for block in recording.blocks:
        if (block.replicate, block.slice_ns) == key and block.kind in DISTANCE:
            planned[block.kind] = planned.get(block.kind, 0) + 1
    return set(planned) == set(DISTANCE) and all(len(kinds.get(kind, ())) == n for kind, n in planned.items())


def _trimmed(values: Floats) -> float:
    n = len(values)
    if n < FEWEST_SLICES:
        return float("nan")
    cut = int(TRIM * n)
    return float(np.sort(values)[cut:n - cut].mean())


def _compare(into: _Length, rates: Mapping[Kind, Sequence[Floats]], run_ns: float, recording: Recording) -> None:
    solo = np.mean(rates["solo"], axis=0)
    at = {kind: np.mean(blocks, axis=0) / solo for kind, blocks in rates.items()}
    mixed = (at["mixed"] + at["mixed-swapped"]) / 2
    batched = (at["batched"] + at["batched-swapped"]) / 2
    control = ((at["mixed"] - at["mixed-swapped"]) + (at["batched"] - at["batched-swapped"])) / 2
    hardware = recording.modes()
    into.run_ns.append(run_ns)
    into.loss["hardware"].append(float((batched - mixed)[hardware].mean()))
    into.loss["software"].append(float((batched - mixed)[~hardware].mean()))
    into.control.append(_over_modes(control, hardware))
    into.switching.append(_over_modes(1 - batched, hardware))


def _over_modes(by_vm: Floats, hardware: np.ndarray) -> float:
    return float(by_vm[hardware].mean() + by_vm[~hardware].mean()) / 2


def _point(slice_ns: int, length: _Length) -> Point | None:
    both = [(h + s) / 2 for h, s in zip(length.loss["hardware"], length.loss["software"], strict=True)]
    loss, control, switching = trimmed_mean(both), trimmed_mean(length.control), trimmed_mean(length.switching)
    victims = {mode: trimmed_mean(length.loss[mode]) for mode in MODES}
    hardware, software = victims["hardware"], victims["software"]
    if loss is None or control is None or switching is None or hardware is None or software is None:
        return None
    return Point(
        slice_ns=slice_ns, switches_s=1e9 / float(np.mean(length.run_ns)), replicates=len(both), loss=loss,
        loss_by_victim={"hardware": hardware, "software": software}, control=control, switching=switching)


def _weights(points: Sequence[Point]) -> tuple[Floats, Floats]:
    """(switches a ns, replicates) of each point."""
    return np.array([p.switches_s / 1e9 for p in points]), np.array([float(p.replicates) for p in points])


def _through_origin(points: Sequence[Point], values: Sequence[Estimate]) -> Estimate:
    """Least squares of the replicates; the weights know the design alone."""
    x, n = _weights(points)
    weights = n * x / np.sum(n * x * x)
    return combine(list(zip(weights.tolist(), values, strict=True)))


def _line(points: Sequence[Point], values: Sequence[Estimate]) -> Line:
    x, n = _weights(points)
    mean = np.sum(n * x) / n.sum()
    slope = n * (x - mean) / np.sum(n * (x - mean) ** 2)
    intercept = n / n.sum() - mean * slope
    return Line(slope=combine(list(zip(slope.tolist(), values, strict=True))),
                intercept=combine(list(zip(intercept.tolist(), values, strict=True))))
