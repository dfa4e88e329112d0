"""From slice records to figures: what each host CPU did, and how fair it was.

Pure: records and readings in, immutable values out. Counters only grow; they are what
metrics/snapshot.py's `CpuSnapshot` is made from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from .policy import jain
from .shared import (
    DECISION_BOUNDS_NS,
    LATENESS_BOUNDS_NS,
    MODES,
    NOBODY,
    RECORD_IDLE,
    RESIDENCIES,
    RUN_LENGTH_BOUNDS_NS,
    SliceRecord,
    bucket,
)

__all__ = ["CpuAccount", "CpuFigures", "HistogramFigures", "SchedulerStatistics", "VcpuFigures",
           "fairness"]

FROZEN_NS = 10_000_000          # a wake-up later than this was no jitter: the kernel froze us


@dataclass(frozen=True, slots=True)
class HistogramFigures:
    bounds_ns: tuple[int, ...]
    counts: tuple[int, ...]     # one more than bounds, not cumulative
    sum_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuFigures:
    """One host CPU, in the fields of metrics' CpuSnapshot."""

    cpu: int
    residency_ns: Mapping[str, int]
    switches: Mapping[tuple[str, str], int]     # between VMs: from mode, to mode
    run_length: Mapping[str, HistogramFigures]
    vm_switches: int
    slices: int
    lateness: HistogramFigures
    decision: Mapping[str, HistogramFigures]    # by the policy that decided
    overrun: HistogramFigures
    dispatcher_cpu_ns: int
    frozen_ns: int
    breath_ns: int
    lost_records: int
    runnable: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class VcpuFigures:
    """One VM's vCPU. After its release the last state, until it is forgotten."""

    vm: str
    index: int
    cpu: int | None
    run_ns: int                 # since its admission
    wait_ns: int                # runnable, but not running
    entitled_ns: int            # its entitlement integrated over the time it competed
    entitled_share: float       # now, in host CPUs
    lag_ns: int                 # entitled - received, clamped (ledger.py)
    leak_ns: int
    capped_ns: int              # wanted the CPU, and its cap was used up
    emulator_ns: int            # of run_ns: in threads that are not the vCPU
    slices: int
    migrations: int
    awake: bool
    paused: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerStatistics:
    policy: str                 # the one in force
    dispatch: str
    dispatch_reason: str
    fairness: float | None      # Jain's index over the last window, None: nothing competed
    errors: Mapping[str, int]
    guard: str                  # watching, fired, absent
    cpus: tuple[CpuFigures, ...]
    vcpus: tuple[VcpuFigures, ...]


class _Histogram:
    def __init__(self, bounds: tuple[int, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0

    def add(self, value: int) -> None:
        self._counts[bucket(self._bounds, value)] += 1
        self._sum += value

    def figures(self) -> HistogramFigures:
        return HistogramFigures(self._bounds, tuple(self._counts), self._sum)


@dataclass(slots=True)
class CpuAccount:
    """Folds the slice records of one host CPU."""

    cpu: int
    slices: int = 0
    vm_switches: int = 0
    frozen_ns: int = 0
    breath_ns: int = 0
    residency_ns: list[int] = field(default_factory=lambda: [0] * len(RESIDENCIES))
    switches: list[int] = field(default_factory=lambda: [0] * len(MODES) ** 2)
    _lateness: _Histogram = field(default_factory=lambda: _Histogram(LATENESS_BOUNDS_NS))
    _overrun: _Histogram = field(default_factory=lambda: _Histogram(LATENESS_BOUNDS_NS))
    _decision: dict[str, _Histogram] = field(default_factory=dict[str, _Histogram])    # by policy
    _run_length: list[_Histogram] = field(
        default_factory=lambda: [_Histogram(RUN_LENGTH_BOUNDS_NS) for _ in MODES])
    _last: int = 0              # generation of the vCPU of the last slice that had one
    _mode: int = NOBODY         # mode that the CPU is in
    _in_mode_ns: int = 0

    def fold(self, records: Iterable[SliceRecord], policy: str) -> None:
        """*policy*: the one that decided these slices."""
        decision = self._decision.setdefault(policy, _Histogram(DECISION_BOUNDS_NS))
        for record in records:
            decision.add(record.decision_ns)
            self._fold(record)

    def _fold(self, record: SliceRecord) -> None:
        late = record.late_ns
        self._lateness.add(late)
        for lateness in (late, record.edge_late_ns):
            if lateness > FROZEN_NS:
                self.frozen_ns += lateness
        self.breath_ns += record.breath_ns
        others = (record.others_software_ns, record.others_hardware_ns)
        for mode, ran in enumerate(others):
            self.residency_ns[mode] += ran
        rest = record.end_ns - record.start_ns - record.run_ns - sum(others)
        if rest > 0:
            where = "idle" if record.flags & RECORD_IDLE else "other"
            self.residency_ns[RESIDENCIES.index(where)] += rest
        if record.slot == NOBODY:
            return
        self.slices += 1
        self._overrun.add(late)
        self.residency_ns[record.mode] += record.run_ns
        if not record.run_ns:
            return          # picked, but it slept: the CPU did not change hands
        if self._last not in (0, record.generation):
            self.vm_switches += 1
            self.switches[self._mode * len(MODES) + record.mode] += 1
            if record.mode != self._mode:
                self._run_length[self._mode].add(self._in_mode_ns)
                self._in_mode_ns = 0
        self._last, self._mode = record.generation, record.mode
        self._in_mode_ns += record.run_ns

    def figures(
        self, *, dispatcher_cpu_ns: int, lost_records: int, runnable: Sequence[int],
    ) -> CpuFigures:
        return CpuFigures(
            cpu=self.cpu,
            residency_ns=dict(zip(RESIDENCIES, self.residency_ns, strict=True)),
            switches={(old, new): self.switches[i * len(MODES) + j]
                      for i, old in enumerate(MODES) for j, new in enumerate(MODES)},
            run_length={mode: histogram.figures()
                        for mode, histogram in zip(MODES, self._run_length, strict=True)},
            vm_switches=self.vm_switches, slices=self.slices,
            lateness=self._lateness.figures(),
            decision={policy: histogram.figures() for policy, histogram in self._decision.items()},
            overrun=self._overrun.figures(), dispatcher_cpu_ns=dispatcher_cpu_ns,
            frozen_ns=self.frozen_ns, breath_ns=self.breath_ns, lost_records=lost_records,
            runnable=dict(zip(MODES, runnable, strict=True)))


def fairness(received: Sequence[int], entitled: Sequence[int]) -> float | None:
    """Jain's index of received over entitled. None: nothing to compare.

    Those who were entitled to nothing take no part; one alone competes with nobody.
    """
    ratios = [r / e for r, e in zip(received, entitled, strict=True) if e > 0]
    return jain(ratios) if len(ratios) > 1 and any(ratios) else None
