"""One immutable picture of the whole service: what metrics, the API, `ps` and `top` are made from.

The service builds a `Snapshot` from time to time (on request, at most every 100 ms); everything
that shows something to a person or to Prometheus reads only this. So one stuck VM cannot stall
a scrape, and two readers of one picture agree. Times are integer nanoseconds; counters
only grow while the service lives (a VM that is restarted keeps its counters).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from .mixing.result import Interval, MixingResult

__all__ = [
    "DECISION_BOUNDS_NS", "LATENESS_BOUNDS_NS", "MODES", "RUN_LENGTH_BOUNDS_NS", "SCOPES", "STATES",
    "STOP_BOUNDS_NS", "CpuSnapshot",
    "DiskSnapshot", "Histogram", "HostSnapshot", "MixingSnapshot", "Mode", "ModeAlternative", "SchedulerSnapshot",
    "ServiceSnapshot", "Snapshot", "VcpuSnapshot", "VmSnapshot", "WarningSnapshot",
]

Mode = Literal["software", "hardware"]
MODES: Final = ("software", "hardware")
# Where both modes can be at once, the nearest first.
SCOPES: Final = ("cpu", "core", "socket", "host")
# vm/lifecycle.py's phases, in the order of a life.
STATES: Final = ("defined", "starting", "running", "paused", "stopping", "stopped", "crashed", "failed")

# Upper bounds of the histogram buckets, in ns; one more bucket catches the rest.
DECISION_BOUNDS_NS: Final = tuple(
    int(us * 1000) for us in (1, 2, 5, 10, 20, 30, 40, 60, 100, 200, 500, 1000, 10_000, 100_000))
LATENESS_BOUNDS_NS: Final = tuple(
    int(us * 1000) for us in (10, 20, 50, 100, 200, 300, 500, 1000, 2000, 5000, 10_000, 100_000))
RUN_LENGTH_BOUNDS_NS: Final = tuple(
    int(ms * 1_000_000) for ms in (0.5, 1, 2, 5, 10, 20, 50, 100, 1000))
STOP_BOUNDS_NS: Final = tuple(
    int(ms * 1_000_000) for ms in (0.5, 1, 2, 3, 5, 10, 20, 50, 100, 1000))


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts a bucket (len(bounds) + 1, not cumulative) and the sum of all values, in ns."""

    bounds_ns: tuple[int, ...]
    counts: tuple[int, ...]
    sum_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VcpuSnapshot:
    index: int
    cpu: int | None              # host CPU it is placed on
    run_ns: int                  # schedstat field 1
    wait_ns: int                 # schedstat field 2: runnable, but not running (steal)
    halted_ns: int               # the guest slept
    capped_ns: int               # it wanted the CPU, and its cap was used up
    migrations: int
    slices: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModeAlternative:
    """A mode that the VM did not get."""

    mode: Mode
    rule: str                    # stable code of the rule that refused it
    why: str
    possible: bool               # it would run so, if the file said so


@dataclass(frozen=True, slots=True)
class DiskSnapshot:
    """What a guest did with the disk in one drive, over all its starts."""

    read_bytes: int = 0
    written_bytes: int = 0
    reads: int = 0
    writes: int = 0
    errors: int = 0              # the host could not do it


@dataclass(frozen=True, slots=True, kw_only=True)
class VmSnapshot:
    id: str                      # stable identity: the label `vm` (the name, unique in a configuration)
    name: str
    state: str                   # one of STATES
    state_reason: str            # why it is in that state, one sentence ("" while all is well)
    engine: str                  # kvm, software
    mode: Mode
    mode_rule: str               # stable code of the rule that decided, e.g. "explicit", "64-bit", "avoid-mixing"
    mode_reason: str             # that rule as a sentence
    os: str
    bits: int
    weight: int
    cap_pct: int                 # percent of one host CPU, 0 = none
    reservation_pct: int
    latency: str                 # class: low, normal, high
    cpus: tuple[int, ...]        # host CPUs it may use
    memory_bytes: int
    resident_bytes: int
    pid: int | None
    started_unix_s: float | None
    restarts: int
    vcpus: tuple[VcpuSnapshot, ...]
    entitled_ns: int             # integral of the entitlement over time
    entitled_share: float        # entitlement now, in host CPUs
    lag_ns: int                  # entitled - received, clamped as the policy clamps it; > 0: owed
    leak_ns: int                 # received while demoted
    emulator_ns: int             # of run_ns: in threads of the VM that are not vCPUs
    progress: int | None         # the guest's own counter, None where it has none
    exits: Mapping[str, int]     # by reason (EXIT_KINDS)
    exit_handling_ns: int
    serial_bytes: int
    serial_dropped_bytes: int
    bios_calls: int
    interrupts: int              # of devices, taken by the guest
    timer_ticks_lost: int        # given up: the VM was too far behind
    console: str                 # text, serial, none
    disks: Mapping[str, DiskSnapshot] = field(default_factory=dict[str, "DiskSnapshot"])   # by drive: fda, hda
    mode_notes: tuple[str, ...] = ()                # what the mode goes against, sentences
    mode_alternatives: tuple[ModeAlternative, ...] = ()
    # How long the running guest stood still in each of its changes of mode, by target mode.
    mode_changes: Mapping[str, Histogram] = field(default_factory=dict[str, "Histogram"])
    saves: int = 0                                  # to files
    restores: int = 0                               # from files


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuSnapshot:
    """One host CPU that VMs may use."""

    cpu: int
    core: int
    socket: int
    residency_ns: Mapping[str, int]             # hardware, software, idle, other
    switches: Mapping[tuple[str, str], int]     # (from_mode, to_mode) of consecutive slices
    run_length: Mapping[str, Histogram]         # by mode: how long the CPU stayed in it
    vm_switches: int                            # switches between VMs, of any mode
    slices: int
    lateness: Histogram                         # timer: woken after the time asked for
    decision: Mapping[str, Histogram]           # CPU time of a decision, by the policy that decided
    overrun: Histogram                          # slice longer than decided
    dispatcher_cpu_ns: int                      # CPU time of the dispatcher process
    frozen_ns: int                              # lateness over 10 ms, summed: throttling shows here
    lost_records: int                           # slice records the supervisor was too slow to read
    runnable: Mapping[str, int]                 # runnable vCPUs placed here, by mode


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerSnapshot:
    policy: str
    dispatch: str                # precise, gentle, signal, plain
    dispatch_reason: str         # why this kind, in plain words
    slice_ns: int
    fairness: float | None       # Jain's index of received/entitled over the last window, None: nothing competed
    errors: Mapping[str, int]    # by stage
    guard: Literal["watching", "fired", "absent"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WarningSnapshot:
    code: str                    # stable, e.g. "mixed-modes"
    severity: Literal["info", "warning", "critical"]
    message: str                 # what is so
    advice: str                  # what to do
    since_unix_s: float
    vms: tuple[str, ...] = ()
    weight: str = ""             # of the mixed-modes warnings: light (host), medium (core), heavy (cpu)
    link: str = ""               # where the documentation explains the code


@dataclass(frozen=True, slots=True, kw_only=True)
class HostSnapshot:
    technology: Literal["vt-x", "amd-v", "pvm", "none"]
    kvm: str                     # "usable", or why not
    kernel: str
    cpu_model: str
    cpus: tuple[int, ...]        # online host CPUs
    vm_cpus: tuple[int, ...]     # the ones that VMs may use
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceSnapshot:
    version: str
    pid: int
    started_unix_s: float
    config_path: str | None
    ready: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class MixingSnapshot:
    """What mixing costs here, as far as it is known."""

    online: bool = False                     # it is measured while VMs run
    told: MixingResult | None = None         # the figure that warnings, gauges and budgets go by
    latest: MixingResult | None = None       # what is known online by now
    on_demand: MixingResult | None = None    # what `mixvisor measure` found
    caveats: tuple[str, ...] = ()            # of `latest`
    # Of a mode's CPU time on host CPUs where modes meet: the part that is lost to crossings.
    penalty: Mapping[Mode, Interval] = field(default_factory=dict[Mode, Interval])
    crossing_rate: Mapping[Mode, float] = field(default_factory=dict[Mode, float])    # a second of that time
    measurements: Mapping[str, int] = field(default_factory=dict[str, int])           # by verdict
    concluded_unix_s: float | None = None    # when something was last concluded
    lost_ns: Mapping[str, int] = field(default_factory=dict[str, int])                # by VM
    overlap_ns: Mapping[str, int] = field(default_factory=dict[str, int])             # by SCOPES
    crossing_cost_us: float = 0.0            # what mode_loss_max reckons with
    crossing_cost_source: str = "default"    # configured, measured, default
    estimator_cpu_ns: int = 0                # CPU time that measuring has taken


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    taken_unix_s: float
    monotonic_ns: int
    service: ServiceSnapshot
    host: HostSnapshot
    scheduler: SchedulerSnapshot
    cpus: tuple[CpuSnapshot, ...]
    vms: tuple[VmSnapshot, ...]
    warnings: tuple[WarningSnapshot, ...] = field(default=())
    mixing: MixingSnapshot = field(default_factory=MixingSnapshot)
