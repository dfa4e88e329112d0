"""What a crossing of modes costs, estimated while VMs run, from the slices that were to be run anyway.

Theory.  Where VMs of both modes take turns on a host CPU, the run queue leaves the order of slices to chance within
what fairness leaves open (sched/policy/fair.py), so the mode of a slice's predecessor is a coin that nothing else has
touched. For a slice of one VM the *deficit* is how much longer it ran than its progress was worth,

    run - progress / rate = level + switch + cross [predecessor of the other mode] + refill(reuse distance)

with a level of its own for each VM in each block of slices (so drift costs nothing), and dummies for what else differs
between slices: whether the VM went on, how many slices ago it had run (caches forget). The first slice of a VM after a
breath is left out, as in slices.py: it pays for having been stopped, and how much depends on who ran before (on the
development machine a hardware VM lost 49 us more after a software VM there, and 3 us everywhere else). The VMs of a
mode are pooled, each weighted by the precision of its slices. `cross` of hardware victims is (h|s - h|h), of software
victims (s|h - s|s), read "current | previous"; the *cost of a crossing* is their mean, for the work of leaving a VM is
charged to its successor and the two alone can shift against each other.

It is the estimator of order.py made incremental: a block is folded into sums as soon as it is full (deviations clipped
at `CLIP` scales around the fit of the moment: Huber's pseudo-values), the sums of the last `KEEP` blocks are kept, and
the regression is solved from them when asked. Errors are clustered by block. The built-in *null* contrasts two halves
of the VMs of the other mode as predecessors: it must include zero.

A column that the data do not tell (no VM went on; one VM of a mode only, so that every switch crosses; a fixed order)
is left out, and what depends on it is unknown. The verdicts are those of report.py, and a figure that does not pass its
checks is *inconclusive*.

Invariants.  Bounded memory: `KEEP` blocks, a block has a bounded number of slices and VMs. No NumPy: a slice costs some
us, and none of them on a host CPU of the VMs (service/measuring.py). Pure: time comes with the slices.

Units: ns of CPU time inside, us in a MixingResult. Where it is poor: guests that keep no progress counter are not
seen; a guest whose speed changes by more than a few percent from slice to slice needs hours; slices that others cut
into (gentle dispatch) are left out; with so many VMs on a CPU that each runs once between two breaths, all are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from statistics import NormalDist
from typing import Final, Literal

__all__ = ["CONFIDENCE", "FIELDS", "MODES", "Figure", "Online", "OnlineEstimate", "SliceRow", "student_t"]

Mode = Literal["software", "hardware"]
MODES: Final[tuple[Mode, Mode]] = ("software", "hardware")     # a mode is known by its index
CONFIDENCE: Final = 0.95
CHECKED_AT: Final = 0.99
# A slice as the dispatcher's ring has it (sched.shared.SliceRecord), field by field.
FIELDS: Final = (
    "start_ns", "end_ns", "planned_end_ns", "slot", "generation", "previous_slot", "mode", "run_ns",
    "others_software_ns", "others_hardware_ns", "progress_before", "progress_after", "edge_late_ns", "breath_ns",
    "decision_ns", "flags")
SliceRow = Sequence[int]
SCRIPTED: Final = 1 << 8           # of `flags`, and all above: the order was not the policy's (sched.shared)

BLOCK_SLICES: Final = 200          # of one host CPU; more where there are many VMs
SLICES_A_VM: Final = 10
BLOCK_MOST: Final = 4000
KEEP: Final = 400                  # blocks
KEEP_NS: Final = 3600 * 10**9      # no block is used for longer
GAP_NS: Final = 10**9              # a block does not go on beyond it: the VMs would be compared with another time's
BURN_IN: Final = 8                 # blocks folded together, so that the first ones are clipped around a fit too
BURN_IN_ROUNDS: Final = 8
FEWEST_BLOCKS: Final = 12          # with crossings of a mode, to say anything of it
FEWEST_ROWS: Final = 4             # of a VM in a block
NEARLY: Final = 0.15               # a slice may be this much shorter or longer than usual
SHORTEST, LONGEST = 0.7, 1.3       # of what was planned
OTHERS: Final = 100                # its run time over what other VMs may have had of it
CLIP: Final = 2.5                  # scales
SMOOTH: Final = 0.2                # of the scale, from block to block
LEAST_SCALE_NS: Final = 100.0
LEAST_VARIANCE: Final = 0.0004     # of a column beyond what the columns before it explain
_MAD: Final = 1.4826

# Columns, in the order in which they explain: what is left for a later one is its own.
_SWITCH, _NEAR, _FAR, _FARTHEST, _CROSS, _NULL = range(6)
_WIDTH: Final = 6
_PAIRS: Final = tuple((i, j) for i in range(_WIDTH) for j in range(i, _WIDTH))


def _columns_of(code: int) -> tuple[float, ...]:
    x = [0.0] * _WIDTH
    if code:
        kind, far = divmod(code - 1, 4)          # kind: 0 of the same mode, 1 and 2 the halves of the other
        x[_SWITCH] = 1.0
        if far:
            x[far] = 1.0
        if kind:
            x[_CROSS] = 1.0
            x[_NULL] = 1.5 - kind
    return tuple(x)


# What a slice can be: went on, or switched to after (kind) at (distance).
_CODES: Final = 13
_X: Final = tuple(_columns_of(code) for code in range(_CODES))
_XX: Final = tuple(tuple((at, x[i] * x[j]) for at, (i, j) in enumerate(_PAIRS) if x[i] * x[j]) for x in _X)


@dataclass(frozen=True, slots=True)
class Figure:
    """An estimate in ns with its standard error and the degrees of freedom of that."""

    value: float
    error: float
    df: int

    def half_width(self, confidence: float = CONFIDENCE) -> float:
        return student_t(self.df, confidence) * self.error

    def bounds(self, confidence: float = CONFIDENCE) -> tuple[float, float]:
        half = self.half_width(confidence)
        return self.value - half, self.value + half

    def includes(self, value: float, confidence: float = CONFIDENCE) -> bool:
        return abs(self.value - value) <= self.half_width(confidence)


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineEstimate:
    """What the kept blocks tell. Costs are ns of CPU time a crossing or a switch."""

    cost: Figure | None                      # mean over both modes; None: one of them is not told
    by_victim: Mapping[Mode, Figure]
    null: Figure | None                      # mean over both modes, where both tell
    nulls: Mapping[Mode, Figure]             # each by itself: two that differ could cancel in the mean
    switching: Figure | None                 # of a switch within a mode
    refill: Figure | None                    # more for one that was away for six slices than for two
    crossing_rate: Mapping[Mode, float]      # crossings into a mode a second of its CPU time, where modes meet
    slices: int                              # that were used
    offered: int                             # of VMs on host CPUs where both modes ran
    blocks: int
    seconds: float                           # from the first to the last of them
    slice_ns: int
    measured_vms: Mapping[Mode, int]         # that made progress which can be read


@dataclass(slots=True)
class _Sums:
    """The slices of one mode in one block."""

    xx: list[float] = field(default_factory=lambda: [0.0] * len(_PAIRS))
    xy: list[float] = field(default_factory=lambda: [0.0] * _WIDTH)
    weight: float = 0.0
    rows: int = 0
    clipped: int = 0
    run_ns: int = 0


@dataclass(slots=True)
class _Block:
    """Slices of one host CPU in a row: raw while it fills, then folded."""

    start_ns: int
    end_ns: int = 0
    offered: int = 0
    # VM -> [code, run, progress, code, run, progress ...]
    raw: dict[int, list[int]] = field(default_factory=dict[int, list[int]])
    crossings: list[int] = field(default_factory=lambda: [0, 0])          # by the victim's mode
    run_ns: list[int] = field(default_factory=lambda: [0, 0])
    sums: tuple[_Sums, _Sums] | None = None


@dataclass(slots=True)
class _Vm:
    mode: int
    half: int
    seen_ns: int
    scale_ns: float = 0.0


class _Track:
    """One host CPU: what the next slice comes after."""

    __slots__ = ("block", "breath_at", "end_ns", "index", "last", "last_mode", "seen")

    def __init__(self) -> None:
        self.block: _Block | None = None
        self.end_ns = 0
        self.last = 0                        # VM of the slice before; 0: not known
        self.last_mode = 0
        self.index = 0
        self.breath_at = 0                   # the last slice with a breath in it
        self.seen: dict[int, int] = {}       # VM -> its last slice


class Online:
    """`feed` it every slice of every host CPU; ask it for an `estimate` now and then. Not thread-safe.

    A VM is known by its generation and its mode (2 generation + mode): one that changes its mode is another one.
    """

    def __init__(self) -> None:
        self._tracks: dict[int, _Track] = {}
        self._vms: dict[int, _Vm] = {}
        self._halves = [0, 0]
        self._slice_ns = 0
        self._raw: list[_Block] = []                 # of the burn-in
        self._kept: deque[_Block] = deque(maxlen=KEEP)
        self._fit: tuple[list[float], list[float]] = ([0.0] * _CODES, [0.0] * _CODES)   # effect by mode and code
        self._fitted = False                         # the burn-in is over
        self._due = 0                                # blocks since the last fit
        self.crossings: dict[int, int] = {}          # VM -> crossings into it since they were taken

    def reset(self, slice_ns: int) -> None:
        """Begin anew: slices are of another length, or everything is different."""
        crossings = self.crossings
        self.__init__()
        self._slice_ns, self.crossings = slice_ns, crossings

    def take_crossings(self) -> dict[tuple[int, Mode], int]:
        """Crossings into each VM (by generation and mode) since this was asked last."""
        taken, self.crossings = self.crossings, {}
        return {(vm >> 1, MODES[vm & 1]): count for vm, count in taken.items()}

    @property
    def slice_ns(self) -> int:
        return self._slice_ns

    # -- slices in ---------------------------------------------------------------------------

    def feed(self, cpu: int, records: Iterable[SliceRow]) -> None:
        """Slices of one host CPU, in the order of time (FIELDS)."""
        track = self._tracks.get(cpu)
        if track is None:
            track = self._tracks[cpu] = _Track()
        block, seen, vms, crossed = track.block, track.seen, self._vms, self.crossings
        usual = self._slice_ns
        least, most = usual * (1 - NEARLY), usual * (1 + NEARLY)
        for (start, end, planned_end, slot, vm, _previous, mode, run, soft, hard, before, after, _edge, breath,
             _decision, flags) in records:
            if start != track.end_ns:
                track.last = 0               # slices are missing: who ran before is not known
                seen.clear()
                if start - track.end_ns > GAP_NS:
                    block = track.block = None
            track.end_ns = end
            if slot < 0 or flags >= SCRIPTED:
                track.last = 0
                seen.clear()
                continue
            if run <= 0:
                continue                     # it slept: the CPU did not change hands
            if block is None:
                block = track.block = _Block(start)
            index = track.index = track.index + 1
            vm += vm + mode
            was, last = seen.get(vm, 0), track.last
            seen[vm] = index
            block.offered += 1
            block.run_ns[mode] += run
            if breath:
                track.breath_at = index
            if last:
                crosses = mode != track.last_mode
                if crosses:
                    block.crossings[mode] += 1
                    crossed[vm] = crossed.get(vm, 0) + 1
                planned, gained = planned_end - start, after - before
                if (was and was >= track.breath_at and not breath and gained > 0 and least <= planned <= most
                        and SHORTEST * planned <= run <= LONGEST * planned and (soft + hard) * OTHERS <= run):
                    if last == vm:
                        code = 0
                    else:
                        far = index - was
                        code = 1 if far <= 2 else 2 if far == 3 else 3 if far <= 5 else 4
                        if crosses:
                            other = vms.get(last)
                            code += 8 if other is not None and other.half else 4
                    rows = block.raw.get(vm)
                    if rows is None:
                        rows = block.raw[vm] = []
                        self._know(vm, mode, end)
                    rows += (code, run, gained)
            track.last, track.last_mode = vm, mode
            if block.offered >= BLOCK_SLICES and (
                    block.offered >= BLOCK_MOST or block.offered >= SLICES_A_VM * len(seen)):
                block.end_ns = end
                self._close(block)
                block = track.block = None
                if len(seen) > BLOCK_SLICES:
                    seen.clear()             # of VMs that came and went

    def _know(self, number: int, mode: int, now: int) -> None:
        vm = self._vms.get(number)
        if vm is None:
            self._vms[number] = _Vm(mode, self._halves[mode] & 1, now)
            self._halves[mode] += 1
            if len(self._vms) > 4 * BLOCK_MOST:
                del self._vms[next(iter(self._vms))]
        else:
            vm.seen_ns = now

    def _close(self, block: _Block) -> None:
        """A block is full."""
        if not (block.crossings[0] and block.crossings[1]):
            block.raw.clear()                # one mode alone: nothing to learn, but its time counts
        if block.raw and not self._fitted:
            self._raw.append(block)
            if len(self._raw) >= BURN_IN:
                self._burn_in()
            return
        self._fold(block)
        self._kept.append(block)
        self._due += 1
        if self._fitted and self._due >= BURN_IN:
            self._refit(self._kept)

    def _burn_in(self) -> None:
        """The first blocks, again and again until they are clipped around their own fit."""
        for _ in range(BURN_IN_ROUNDS):
            for block in self._raw:
                self._fold(block, keep_raw=True)
            self._refit(self._raw)
        for block in self._raw:
            block.raw.clear()
        self._kept.extend(self._raw)
        self._raw, self._fitted = [], True

    def _fold(self, block: _Block, *, keep_raw: bool = False) -> None:
        """From slices to sums."""
        sums = _Sums(), _Sums()
        for number, raw in block.raw.items():
            vm = self._vms.get(number)
            if vm is not None and len(raw) >= 3 * FEWEST_ROWS:
                self._fold_vm(vm, raw, sums[vm.mode])
        block.sums = sums
        if not keep_raw:
            block.raw.clear()

    def _fold_vm(self, vm: _Vm, raw: list[int], into: _Sums) -> None:
        codes, runs, gains = raw[::3], raw[1::3], raw[2::3]
        count = len(codes)
        effect = self._fit[vm.mode]
        # What a unit of progress takes when nothing is lost.
        ns_a_unit = sorted([(run - effect[code]) / gained
                            for code, run, gained in zip(codes, runs, gains, strict=True)])[count // 2]
        deviations = [run - gained * ns_a_unit - effect[code]
                      for code, run, gained in zip(codes, runs, gains, strict=True)]
        centre = sorted(deviations)[count // 2]
        scale = _MAD * sorted([abs(one - centre) for one in deviations])[count // 2]
        vm.scale_ns += (scale - vm.scale_ns) * SMOOTH if vm.scale_ns else scale
        scale = max(vm.scale_ns, LEAST_SCALE_NS)
        limit, low = CLIP * scale, centre - CLIP * scale
        high = centre + limit
        number, total = [0] * _CODES, [0.0] * _CODES
        clipped = 0
        for code, deviation in zip(codes, deviations, strict=True):
            if deviation < low:
                deviation, clipped = low, clipped + 1
            elif deviation > high:
                deviation, clipped = high, clipped + 1
            number[code] += 1
            total[code] += deviation - centre
        weight = 1e6 / (scale * scale)
        xx, xy = into.xx, into.xy
        mean_x, mean_y = [0.0] * _WIDTH, 0.0
        for code, n in enumerate(number):
            if n:
                y = total[code] + n * effect[code]
                mean_y += y
                for at, value in _XX[code]:
                    xx[at] += weight * n * value
                for at, value in enumerate(_X[code]):
                    if value:
                        mean_x[at] += n * value
                        xy[at] += weight * y * value
        for at, (i, j) in enumerate(_PAIRS):
            xx[at] -= weight * mean_x[i] * mean_x[j] / count
        for at in range(_WIDTH):
            xy[at] -= weight * mean_x[at] * mean_y / count
        into.weight += weight * count
        into.rows += count
        into.clipped += clipped
        into.run_ns += sum(runs)

    # -- estimates out -----------------------------------------------------------------------

    def _refit(self, blocks: Iterable[_Block]) -> None:
        """What clipping is centred on from now on."""
        self._due = 0
        fits = [_Regression(list(blocks), mode) for mode in (0, 1)]
        self._fit = fits[0].effects(), fits[1].effects()

    def estimate(self, now_ns: int) -> OnlineEstimate:
        """What the blocks of the last `KEEP_NS` tell by now."""
        while self._kept and self._kept[0].end_ns < now_ns - KEEP_NS:
            self._kept.popleft()
        for number in [n for n, vm in self._vms.items() if vm.seen_ns < now_ns - KEEP_NS]:
            del self._vms[number]
        blocks = list(self._kept)
        fits = [_Regression(blocks, mode) for mode in (0, 1)]
        cross = [fit.figure(_CROSS) for fit in fits]
        victims: dict[Mode, Figure] = {
            name: one for name, one in zip(MODES, cross, strict=True) if one is not None}
        run = [sum(block.run_ns[mode] for block in blocks) for mode in (0, 1)]
        crossings = [sum(block.crossings[mode] for block in blocks) for mode in (0, 1)]
        live = chain(blocks, self._raw, [t.block for t in self._tracks.values() if t.block is not None])
        ends = [(block.start_ns, block.end_ns or block.start_ns) for block in live]
        return OnlineEstimate(
            cost=_both(fits, _CROSS), by_victim=victims, null=_any(fits, _NULL),
            nulls={name: one for name, one in zip(MODES, (fit.figure(_NULL) for fit in fits), strict=True)
                   if one is not None},
            switching=_any(fits, _SWITCH),
            refill=_any(fits, _FARTHEST),
            crossing_rate={name: 1e9 * crossings[mode] / run[mode] for mode, name in enumerate(MODES) if run[mode]},
            slices=sum(fit.rows for fit in fits), offered=sum(block.offered for block in blocks), blocks=len(blocks),
            seconds=(max(e for _, e in ends) - min(s for s, _ in ends)) / 1e9 if ends else 0.0,
            slice_ns=self._slice_ns,
            measured_vms={name: sum(vm.mode == mode for vm in self._vms.values()) for mode, name in enumerate(MODES)})


class _Regression:
    """One mode's slices of some blocks: weighted least squares, errors clustered by block."""

    def __init__(self, blocks: Iterable[_Block], mode: int) -> None:
        self._sums = [block.sums[mode] if block.sums is not None and block.sums[mode].rows else None
                      for block in blocks]
        present = [one for one in self._sums if one is not None]
        self.rows = sum(one.rows for one in present)
        self.told = [False] * _WIDTH
        self._beta = [0.0] * _WIDTH
        self._inverse = [[0.0] * _WIDTH for _ in range(_WIDTH)]
        self._slope = 1.0
        self._scores: list[list[float] | None] | None = None
        weight = sum(one.weight for one in present)
        if not present or not weight:
            return
        matrix = [[0.0] * (_WIDTH + 1) for _ in range(_WIDTH + 1)]
        for at, (i, j) in enumerate(_PAIRS):
            matrix[i][j] = matrix[j][i] = sum(one.xx[at] for one in present)
        for at in range(_WIDTH):
            matrix[at][_WIDTH] = matrix[_WIDTH][at] = sum(one.xy[at] for one in present)
        for at in range(_WIDTH):
            if matrix[at][at] > LEAST_VARIANCE * weight:
                _sweep(matrix, at)
                self.told[at] = True
        kept = [at for at in range(_WIDTH) if self.told[at]]
        for i in kept:
            self._beta[i] = matrix[i][_WIDTH]
            for j in kept:
                self._inverse[i][j] = matrix[i][j]
        # Of a step towards the truth, what is not clipped away.
        self._slope = max(0.05, 1 - sum(one.clipped for one in present) / self.rows)

    def effects(self) -> list[float]:
        """What each kind of slice loses, by code."""
        return [sum(b * x for b, x in zip(self._beta, columns, strict=True)) for columns in _X]

    def figure(self, column: int) -> Figure | None:
        """None: not told, or by too few blocks."""
        influence = self.influence(column)
        return None if influence is None else _figure(self._beta[column], influence)

    def influence(self, column: int) -> list[float] | None:
        """What each block adds to the coefficient's error; None where it is not told."""
        if not self.told[column]:
            return None
        if self._scores is None:
            self._scores = [None if one is None else self._score(one) for one in self._sums]
        a, b, c, d, e, f = (value / self._slope for value in self._inverse[column])
        return [0.0 if score is None else a * score[0] + b * score[1] + c * score[2] + d * score[3] + e * score[4]
                + f * score[5] for score in self._scores]

    def _score(self, one: _Sums) -> list[float]:
        """What a block's slices want the coefficients to be moved by."""
        score, beta = list(one.xy), self._beta
        for value, (i, j) in zip(one.xx, _PAIRS, strict=True):
            score[i] -= value * beta[j]
            if i != j:
                score[j] -= value * beta[i]
        return score

    @property
    def beta(self) -> list[float]:
        return self._beta


def _sweep(matrix: list[list[float]], at: int) -> None:
    """Goodnight's sweep: after it the column is explained, and its row is of the inverse."""
    pivot = matrix[at][at]
    row = [value / pivot for value in matrix[at]]
    for i, other in enumerate(matrix):
        if i != at:
            factor = other[at]
            if factor:
                for j, value in enumerate(row):
                    other[j] -= factor * value
                other[at] = -factor / pivot
    matrix[at] = row
    matrix[at][at] = 1 / pivot


def _figure(value: float, influence: list[float]) -> Figure | None:
    clusters = sum(1 for one in influence if one)
    if clusters < FEWEST_BLOCKS:
        return None
    error = (sum(one * one for one in influence) * clusters / (clusters - 1)) ** 0.5
    return Figure(value, error, clusters - 1)


def _both(fits: Sequence[_Regression], column: int) -> Figure | None:
    """The mean over both modes."""
    parts = [fit.influence(column) for fit in fits]
    first, second = parts
    if first is None or second is None:
        return None
    return _figure(sum(fit.beta[column] for fit in fits) / 2,
                   [(a + b) / 2 for a, b in zip(first, second, strict=True)])


def _any(fits: Sequence[_Regression], column: int) -> Figure | None:
    """The mean over both modes, or that of the one that tells."""
    both = _both(fits, column)
    if both is not None:
        return both
    told = [one for one in (fit.figure(column) for fit in fits) if one is not None]
    return told[0] if len(told) == 1 else None


def student_t(df: int, confidence: float) -> float:
    """The two-sided quantile of Student's t, by Cornish and Fisher's expansion (within 0.2 % from 10 degrees on)."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    z2 = z * z
    return z * (1 + (z2 + 1) / (4 * df) + ((5 * z2 + 16) * z2 + 3) / (96 * df**2)
                + (((3 * z2 + 19) * z2 + 17) * z2 - 15) / (384 * df**3))
