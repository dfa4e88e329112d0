"""Every metric family that Mixvisor exports: one table of name, type, labels, meaning and source.

Theory.  A family is a row: how it is called, what it means in words, and a function that
reads its samples out of a `Snapshot`. The collector, the documentation (docs/metrics.md) and
the tests all walk this one table, so a family cannot be exported without being documented.

Conventions.  Prefix `mixvisor_`. Base units (seconds, bytes, ratios from 0 to 1, host CPUs);
this is the only place where nanoseconds become seconds. Amounts are cumulative counters, never
averages. A VM is named by the label `vm` alone; what it is called, what it runs and how stands
on `mixvisor_vm_info`, to be joined with `group_left`. Label sets are bounded: nothing that a
guest says becomes a label.

Invariants.  Counters of a switch between modes exist at 0 from the start, so that the first
switch is visible to `rate()`. A value that is not known has no sample (never a made-up 0). A VM
that leaves the snapshot leaves the exposition.

Pure: reads snapshots, knows no clock and no prometheus-client.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from ..vm.engines.base import EXIT_KINDS
from .mixing.online import CONFIDENCE
from .mixing.result import Interval
from .snapshot import (
    DECISION_BOUNDS_NS,
    LATENESS_BOUNDS_NS,
    MODES,
    RUN_LENGTH_BOUNDS_NS,
    SCOPES,
    STATES,
    STOP_BOUNDS_NS,
    CpuSnapshot,
    DiskSnapshot,
    Histogram,
    Snapshot,
    VcpuSnapshot,
    VmSnapshot,
)

__all__ = [
    "CPU_MODES", "FAMILIES", "GUARD_STATES", "SELF_FAMILIES", "WARNING_MIXED", "Family", "Kind",
    "Row", "merged",
]

Kind = Literal["counter", "gauge", "histogram", "info"]
Row = tuple[tuple[str, ...], float | Histogram]

NS: Final = 1e-9
# What a host CPU can be doing, in the snapshot's words.
CPU_MODES: Final = ("hardware", "software", "idle", "other")
GUARD_STATES: Final = ("watching", "fired", "absent")
# The one warning whose absence is worth a 0: alerts and dashboards ask for it by name.
WARNING_MIXED: Final = "mixed-modes"


@dataclass(frozen=True, slots=True)
class Family:
    """One metric family.

    `name` is the name of its samples: with `_total` for a counter, with `_info` for an info.
    `rows` gives label values in the order of `labels`, and a number or a `Histogram` (ns).
    """

    name: str
    kind: Kind
    labels: tuple[str, ...]
    help: str
    rows: Callable[[Snapshot], Iterable[Row]]


def merged(histograms: Iterable[Histogram], bounds_ns: tuple[int, ...]) -> Histogram:
    """The histogram of all values together; empty where there are none.

    Raises ValueError when the bounds differ: such counts cannot be added.
    """
    counts = [0] * (len(bounds_ns) + 1)
    sum_ns = 0
    for histogram in histograms:
        if histogram.bounds_ns != bounds_ns or len(histogram.counts) != len(counts):
            raise ValueError(
                f"cannot add a histogram of {len(histogram.counts)} counts over bounds "
                f"{histogram.bounds_ns} to one over {bounds_ns}")
        for index, count in enumerate(histogram.counts):
            counts[index] += count
        sum_ns += histogram.sum_ns
    return Histogram(bounds_ns, tuple(counts), sum_ns)


# --- readers: how a kind of thing in the snapshot becomes rows -------------------------------

def _one(read: Callable[[Snapshot], float | None]) -> Callable[[Snapshot], Iterable[Row]]:
    def rows(snapshot: Snapshot) -> Iterator[Row]:
        value = read(snapshot)
        if value is not None:
            yield (), value
    return rows


def _vms(read: Callable[[VmSnapshot], float | None]) -> Callable[[Snapshot], Iterable[Row]]:
    def rows(snapshot: Snapshot) -> Iterator[Row]:
        for vm in snapshot.vms:
            value = read(vm)
            if value is not None:
                yield (vm.id,), value
    return rows


def _vcpus(read: Callable[[VcpuSnapshot], float | None]) -> Callable[[Snapshot], Iterable[Row]]:
    def rows(snapshot: Snapshot) -> Iterator[Row]:
        for vm in snapshot.vms:
            for vcpu in vm.vcpus:
                value = read(vcpu)
                if value is not None:
                    yield (vm.id, str(vcpu.index)), value
    return rows


def _cpus(read: Callable[[CpuSnapshot], float]) -> Callable[[Snapshot], Iterable[Row]]:
    return lambda snapshot: (((str(cpu.cpu),), read(cpu)) for cpu in snapshot.cpus)


def _state_set(current: str, states: Iterable[str], before: tuple[str, ...] = ()) -> Iterator[Row]:
    """One sample a state, 1 at the current one. An unknown state is shown, not lost."""
    for state in dict.fromkeys((*states, current)):
        yield (*before, state), float(state == current)


def _vm_info(snapshot: Snapshot) -> Iterator[Row]:
    for vm in snapshot.vms:
        yield (vm.id, vm.name, vm.engine, vm.mode, vm.mode_rule, vm.mode_reason,
               snapshot.scheduler.policy, vm.os, str(vm.bits)), 1.0


def _vm_state(snapshot: Snapshot) -> Iterator[Row]:
    for vm in snapshot.vms:
        yield from _state_set(vm.state, STATES, (vm.id,))


def _disks(value: Callable[[DiskSnapshot], int]) -> Callable[[Snapshot], Iterator[Row]]:
    def rows(snapshot: Snapshot) -> Iterator[Row]:
        for vm in snapshot.vms:
            for drive, disk in vm.disks.items():
                yield (vm.id, drive), float(value(disk))
    return rows


def _vm_exits(snapshot: Snapshot) -> Iterator[Row]:
    for vm in snapshot.vms:
        for reason in dict.fromkeys((*EXIT_KINDS, *vm.exits)):
            yield (vm.id, reason), float(vm.exits.get(reason, 0))


def _mode_changes(snapshot: Snapshot) -> Iterator[Row]:
    for vm in snapshot.vms:
        for mode, stops in vm.mode_changes.items():
            yield (vm.id, mode), sum(stops.counts)


def _mode_change_stops(snapshot: Snapshot) -> Iterator[Row]:
    for mode in MODES:
        yield (mode,), merged(
            (vm.mode_changes[mode] for vm in snapshot.vms if mode in vm.mode_changes), STOP_BOUNDS_NS)


def _residency(snapshot: Snapshot) -> Iterator[Row]:
    for cpu in snapshot.cpus:
        for mode in dict.fromkeys((*CPU_MODES, *cpu.residency_ns)):
            yield (str(cpu.cpu), mode), cpu.residency_ns.get(mode, 0) * NS


def _mode_switches(snapshot: Snapshot) -> Iterator[Row]:
    always = [(a, b) for a in MODES for b in MODES]
    for cpu in snapshot.cpus:
        for start, end in dict.fromkeys((*always, *cpu.switches)):
            if start != end:       # two slices of one mode in a row are no switch of modes
                yield (str(cpu.cpu), start, end), float(cpu.switches.get((start, end), 0))


def _run_length(snapshot: Snapshot) -> Iterator[Row]:
    modes = dict.fromkeys((*MODES, *(mode for cpu in snapshot.cpus for mode in cpu.run_length)))
    for mode in modes:
        yield (mode,), merged(
            (cpu.run_length[mode] for cpu in snapshot.cpus if mode in cpu.run_length),
            RUN_LENGTH_BOUNDS_NS)


def _decision(snapshot: Snapshot) -> Iterator[Row]:
    for policy in dict.fromkeys((snapshot.scheduler.policy, *(p for cpu in snapshot.cpus for p in cpu.decision))):
        yield (policy,), merged(
            (cpu.decision[policy] for cpu in snapshot.cpus if policy in cpu.decision), DECISION_BOUNDS_NS)


def _over_cpus(read: Callable[[CpuSnapshot], Histogram]) -> Callable[[Snapshot], Iterable[Row]]:
    return lambda snapshot: [((), merged(map(read, snapshot.cpus), LATENESS_BOUNDS_NS))]


def _runnable(snapshot: Snapshot) -> Iterator[Row]:
    for mode in dict.fromkeys((*MODES, *(m for cpu in snapshot.cpus for m in cpu.runnable))):
        yield (mode,), float(sum(cpu.runnable.get(mode, 0) for cpu in snapshot.cpus))


def _counts(values: Mapping[str, int]) -> Iterator[Row]:
    for key, count in values.items():
        yield (key,), float(count)


def _warnings(snapshot: Snapshot) -> Iterator[Row]:
    active: dict[tuple[str, str], int] = {}
    if all(warning.code != WARNING_MIXED for warning in snapshot.warnings):
        active[WARNING_MIXED, "warning"] = 0
    for warning in snapshot.warnings:
        key = (warning.code, warning.severity)
        active[key] = active.get(key, 0) + 1
    for key, count in active.items():
        yield key, float(count)


# --- the cost of mixing ----------------------------------------------------------------------

BOTH: Final = "both"               # the mean over victims of both modes, as it should be read
VERDICTS: Final = ("penalty", "none", "gain", "inconclusive")


def _costs(read: Callable[[Interval], float]) -> Callable[[Snapshot], Iterable[Row]]:
    def rows(snapshot: Snapshot) -> Iterator[Row]:
        told = snapshot.mixing.told
        if told is None or told.doubts:
            return
        for mode, cost in told.cost_us_by_victim.items():
            yield (mode,), read(cost) * 1e-6
        if told.cost_us is not None:
            yield (BOTH,), read(told.cost_us) * 1e-6
    return rows


def _penalties(read: Callable[[Interval], float]) -> Callable[[Snapshot], Iterable[Row]]:
    return lambda snapshot: [((mode, "cpu"), read(part)) for mode, part in snapshot.mixing.penalty.items()]


def _mixing_info(snapshot: Snapshot) -> Iterator[Row]:
    told = snapshot.mixing.told
    if told is not None:
        yield (told.source, told.verdict), 1.0


def _measurements(snapshot: Snapshot) -> Iterator[Row]:
    counts = snapshot.mixing.measurements
    for verdict in dict.fromkeys((*VERDICTS, *counts)):
        yield (verdict,), float(counts.get(verdict, 0))


def _host_cpus(snapshot: Snapshot) -> Iterator[Row]:
    for cpu in snapshot.cpus:
        yield (str(cpu.cpu), str(cpu.core), str(cpu.socket)), 1.0


FAMILIES: Final[tuple[Family, ...]] = (
    # The service and the host.
    Family("mixvisor_build_info", "info", ("version",),
           "Version of Mixvisor; always 1.",
           lambda s: [((s.service.version,), 1.0)]),
    Family("mixvisor_service_start_time_seconds", "gauge", (),
           "When the service started, in seconds since 1970.",
           _one(lambda s: s.service.started_unix_s)),
    Family("mixvisor_service_ready", "gauge", (),
           "1 when the service has started everything that its file says, else 0.",
           _one(lambda s: float(s.service.ready))),
    Family("mixvisor_snapshot_timestamp_seconds", "gauge", (),
           "When the picture that this scrape shows was taken, in seconds since 1970; it stands "
           "still while the collector fails.",
           _one(lambda s: s.taken_unix_s)),
    Family("mixvisor_host_info", "info", ("technology", "kvm", "kernel", "cpu_model"),
           "What the host is: its hardware virtualization (vt-x, amd-v, pvm or none), whether "
           "/dev/kvm is usable or why not, kernel and CPU model; always 1.",
           lambda s: [((s.host.technology, s.host.kvm, s.host.kernel, s.host.cpu_model), 1.0)]),
    Family("mixvisor_host_cpu_info", "info", ("cpu", "core", "socket"),
           "A host CPU that VMs may use, and where it sits; always 1.",
           _host_cpus),
    Family("mixvisor_warnings_active", "gauge", ("code", "severity"),
           "Warnings that hold now, by code; mixed-modes is present with 0 while modes do not mix.",
           _warnings),

    # Each VM: what it is.
    Family("mixvisor_vm_info", "info",
           ("vm", "name", "engine", "mode", "mode_rule", "mode_reason", "policy", "os", "bits"),
           "What a VM is: engine, mode, the rule that chose the mode and that rule as a sentence, "
           "scheduling policy, guest system and its width in bits; always 1. Join it with "
           "group_left.",
           _vm_info),
    Family("mixvisor_vm_state", "gauge", ("vm", "state"),
           "1 for the state that the VM is in, 0 for every other; stopped VMs are shown too.",
           _vm_state),
    Family("mixvisor_vm_start_time_seconds", "gauge", ("vm",),
           "When the VM last started, in seconds since 1970; absent before its first start.",
           _vms(lambda vm: vm.started_unix_s)),
    Family("mixvisor_vm_restarts_total", "counter", ("vm",),
           "How often the VM was started again after its first start.",
           _vms(lambda vm: vm.restarts)),
    Family("mixvisor_vm_mode_changes_total", "counter", ("vm", "to"),
           "How often the running guest was moved to a mode.", _mode_changes),
    Family("mixvisor_vm_mode_change_stop_seconds_total", "counter", ("vm",),
           "Time that the guest stood still while it was moved to another mode, in seconds.",
           _vms(lambda vm: sum(stops.sum_ns for stops in vm.mode_changes.values()) * NS)),
    Family("mixvisor_mode_change_stop_seconds", "histogram", ("to",),
           "How long guests stood still for one change of mode, in seconds, by the mode they went to; all VMs.",
           _mode_change_stops),
    Family("mixvisor_vm_saves_total", "counter", ("vm",),
           "How often the VM was saved to a file.", _vms(lambda vm: vm.saves)),
    Family("mixvisor_vm_restores_total", "counter", ("vm",),
           "How often the VM was started from a file.", _vms(lambda vm: vm.restores)),
    Family("mixvisor_vm_weight", "gauge", ("vm",),
           "Weight of the VM when CPUs are shared; 100 is the default.",
           _vms(lambda vm: vm.weight)),
    Family("mixvisor_vm_cap_cpus", "gauge", ("vm",),
           "Most that the VM may receive, in host CPUs (1 is one whole CPU); absent without a cap.",
           _vms(lambda vm: vm.cap_pct / 100 if vm.cap_pct else None)),
    Family("mixvisor_vm_reservation_cpus", "gauge", ("vm",),
           "What is set aside for the VM, in host CPUs.",
           _vms(lambda vm: vm.reservation_pct / 100)),

    # Each VM: time.
    Family("mixvisor_vm_vcpu_run_seconds_total", "counter", ("vm", "vcpu"),
           "CPU time of the virtual CPU's thread, in seconds: what it received (schedstat).",
           _vcpus(lambda vcpu: vcpu.run_ns * NS)),
    Family("mixvisor_vm_vcpu_runqueue_wait_seconds_total", "counter", ("vm", "vcpu"),
           "Time that the virtual CPU could have run but waited for a host CPU, in seconds: steal.",
           _vcpus(lambda vcpu: vcpu.wait_ns * NS)),
    Family("mixvisor_vm_vcpu_halted_seconds_total", "counter", ("vm", "vcpu"),
           "Time that the guest slept and wanted no CPU, in seconds.",
           _vcpus(lambda vcpu: vcpu.halted_ns * NS)),
    Family("mixvisor_vm_vcpu_capped_seconds_total", "counter", ("vm", "vcpu"),
           "Time that the virtual CPU could have run but its VM's cap was used up, in seconds.",
           _vcpus(lambda vcpu: vcpu.capped_ns * NS)),
    Family("mixvisor_vm_vcpu_migrations_total", "counter", ("vm", "vcpu"),
           "How often the virtual CPU was moved to another host CPU.",
           _vcpus(lambda vcpu: vcpu.migrations)),
    Family("mixvisor_vm_vcpu_host_cpu", "gauge", ("vm", "vcpu"),
           "Number of the host CPU that the virtual CPU is placed on; absent while it has none.",
           _vcpus(lambda vcpu: vcpu.cpu)),
    Family("mixvisor_vm_scheduled_slices_total", "counter", ("vm",),
           "How often the VM was given a time slice.",
           _vms(lambda vm: sum(vcpu.slices for vcpu in vm.vcpus))),
    Family("mixvisor_vm_emulator_cpu_seconds_total", "counter", ("vm",),
           "CPU time of the VM's threads that are not virtual CPUs, in seconds.",
           _vms(lambda vm: vm.emulator_ns * NS)),
    Family("mixvisor_vm_entitled_cpu_seconds_total", "counter", ("vm",),
           "CPU time that the VM was entitled to, in seconds: compare it with what it received.",
           _vms(lambda vm: vm.entitled_ns * NS)),
    Family("mixvisor_vm_entitled_cpus", "gauge", ("vm",),
           "What the VM is entitled to at the moment, in host CPUs.",
           _vms(lambda vm: vm.entitled_share)),

    # Each VM: what it did.
    Family("mixvisor_vm_progress_total", "counter", ("vm",),
           "The guest's own count of units of work done, read from its memory; absent where the "
           "guest keeps none.",
           _vms(lambda vm: vm.progress)),
    Family("mixvisor_vm_exits_total", "counter", ("vm", "reason"),
           "How often the guest was left for the host, by reason.",
           _vm_exits),
    Family("mixvisor_vm_exit_handling_seconds_total", "counter", ("vm",),
           "Time spent in the host on behalf of exits, in seconds.",
           _vms(lambda vm: vm.exit_handling_ns * NS)),
    Family("mixvisor_vm_bios_calls_total", "counter", ("vm",),
           "BIOS services that the guest asked for.",
           _vms(lambda vm: vm.bios_calls)),
    Family("mixvisor_vm_serial_bytes_total", "counter", ("vm",),
           "Bytes that the guest wrote to its serial port.",
           _vms(lambda vm: vm.serial_bytes)),
    Family("mixvisor_vm_serial_dropped_bytes_total", "counter", ("vm",),
           "Serial bytes thrown away because the guest wrote faster than it may.",
           _vms(lambda vm: vm.serial_dropped_bytes)),
    Family("mixvisor_vm_interrupts_total", "counter", ("vm",),
           "Interrupts of devices that the guest took.",
           _vms(lambda vm: vm.interrupts)),
    Family("mixvisor_vm_timer_ticks_lost_total", "counter", ("vm",),
           "Timer ticks given up because the VM was too far behind; its clock lags by as many.",
           _vms(lambda vm: vm.timer_ticks_lost)),
    Family("mixvisor_vm_block_read_bytes_total", "counter", ("vm", "device"),
           "Bytes that the guest read, by drive (fda and fdb: floppies, hda and hdb: hard disks).",
           _disks(lambda disk: disk.read_bytes)),
    Family("mixvisor_vm_block_write_bytes_total", "counter", ("vm", "device"),
           "Bytes that the guest wrote, by drive.",
           _disks(lambda disk: disk.written_bytes)),
    Family("mixvisor_vm_block_read_requests_total", "counter", ("vm", "device"),
           "Reads that the guest asked for and got, by drive.",
           _disks(lambda disk: disk.reads)),
    Family("mixvisor_vm_block_write_requests_total", "counter", ("vm", "device"),
           "Writes that the guest asked for and got, by drive.",
           _disks(lambda disk: disk.writes)),
    Family("mixvisor_vm_block_errors_total", "counter", ("vm", "device"),
           "Reads and writes that the host could not do (a full file system, a bad medium), by drive.",
           _disks(lambda disk: disk.errors)),
    Family("mixvisor_vm_memory_size_bytes", "gauge", ("vm",),
           "Memory that the guest sees, in bytes.",
           _vms(lambda vm: vm.memory_bytes)),
    Family("mixvisor_vm_memory_resident_bytes", "gauge", ("vm",),
           "Host memory that the VM's process holds, in bytes.",
           _vms(lambda vm: vm.resident_bytes)),

    # Each host CPU.
    Family("mixvisor_host_cpu_mode_residency_seconds_total", "counter", ("cpu", "mode"),
           "Time that the host CPU spent on hardware VMs, software VMs, idle or on anything else, "
           "in seconds.",
           _residency),
    Family("mixvisor_host_cpu_mode_switches_total", "counter", ("cpu", "from_mode", "to_mode"),
           "How often the host CPU went from a VM of one mode to a VM of the other.",
           _mode_switches),
    Family("mixvisor_host_cpu_mode_run_length_seconds", "histogram", ("from_mode",),
           "How long a host CPU stayed in one mode before it switched, in seconds; all CPUs.",
           _run_length),
    Family("mixvisor_host_cpu_vm_switches_total", "counter", ("cpu",),
           "How often the host CPU went from one VM to another, of whatever mode.",
           _cpus(lambda cpu: cpu.vm_switches)),
    Family("mixvisor_host_cpu_slices_total", "counter", ("cpu",),
           "Time slices given out on the host CPU.",
           _cpus(lambda cpu: cpu.slices)),

    # What mixing costs.
    Family("mixvisor_mixing_switch_cost_seconds", "gauge", ("victim_mode",),
           "What one crossing between modes costs beyond a switch within a mode, in seconds of CPU time, by mode "
           "of the VM that is switched to, and their mean (both); absent while it is unknown or fails its checks.",
           _costs(lambda cost: cost.value)),
    Family("mixvisor_mixing_switch_cost_lower_bound_seconds", "gauge", ("victim_mode",),
           "Lower bound of mixvisor_mixing_switch_cost_seconds.",
           _costs(lambda cost: cost.low)),
    Family("mixvisor_mixing_switch_cost_upper_bound_seconds", "gauge", ("victim_mode",),
           "Upper bound of mixvisor_mixing_switch_cost_seconds.",
           _costs(lambda cost: cost.high)),
    Family("mixvisor_mixing_penalty_ratio", "gauge", ("victim_mode", "scope"),
           "Part of a mode's CPU time that crossings cost it, on host CPUs where both modes take turns (scope "
           "cpu) and at the rate at which they do; may be below 0.",
           _penalties(lambda part: part.value)),
    Family("mixvisor_mixing_penalty_lower_bound_ratio", "gauge", ("victim_mode", "scope"),
           "Lower bound of mixvisor_mixing_penalty_ratio.",
           _penalties(lambda part: part.low)),
    Family("mixvisor_mixing_penalty_upper_bound_ratio", "gauge", ("victim_mode", "scope"),
           "Upper bound of mixvisor_mixing_penalty_ratio.",
           _penalties(lambda part: part.high)),
    Family("mixvisor_mixing_penalty_confidence_level_ratio", "gauge", (),
           "Confidence of the bounds of cost and penalty.",
           _one(lambda s: CONFIDENCE)),
    Family("mixvisor_mixing_measurement_info", "info", ("source", "verdict"),
           "Where the figures come from (online or on-demand) and what can be concluded from them (penalty, none, "
           "gain or inconclusive); always 1; absent before the first.",
           _mixing_info),
    Family("mixvisor_mixing_penalty_last_measurement_timestamp_seconds", "gauge", (),
           "When something could last be concluded, in seconds since 1970; absent before that.",
           _one(lambda s: s.mixing.concluded_unix_s)),
    Family("mixvisor_mixing_penalty_measurements_total", "counter", ("result",),
           "Looks at the online estimate while modes took turns on a host CPU, by what it said.",
           _measurements),
    Family("mixvisor_mixing_lost_seconds_total", "counter", ("vm",),
           "CPU time that the VM lost to crossings into it, in seconds: an estimate, counted while a penalty is "
           "established.",
           lambda s: [((vm.id,), s.mixing.lost_ns.get(vm.id, 0) * NS) for vm in s.vms]),
    Family("mixvisor_mixing_overlap_seconds_total", "counter", ("scope",),
           "Time in which VMs of both modes ran within the same second, in seconds: on one host CPU (cpu), on "
           "threads of one core (core), on one socket, anywhere on the host.",
           lambda s: [((scope,), s.mixing.overlap_ns.get(scope, 0) * NS) for scope in SCOPES]),
    Family("mixvisor_mixing_estimator_cpu_seconds_total", "counter", (),
           "CPU time that measuring the cost of mixing has taken in the supervisor, in seconds.",
           _one(lambda s: s.mixing.estimator_cpu_ns * NS)),

    # The scheduler.
    Family("mixvisor_scheduler_info", "info", ("policy", "dispatch", "dispatch_reason"),
           "Scheduling policy, how threads are dispatched (precise, gentle, signal or plain) and "
           "why so; always 1.",
           lambda s: [((s.scheduler.policy, s.scheduler.dispatch, s.scheduler.dispatch_reason),
                       1.0)]),
    Family("mixvisor_scheduler_slice_seconds", "gauge", (),
           "Length of a time slice as configured, in seconds.",
           _one(lambda s: s.scheduler.slice_ns * NS)),
    Family("mixvisor_scheduler_fairness_ratio", "gauge", (),
           "Jain's index of received over entitled in the last window: 1 is perfectly fair, 1/n is "
           "one VM taking all; absent while nothing competes.",
           _one(lambda s: s.scheduler.fairness)),
    Family("mixvisor_scheduler_lag_seconds", "gauge", ("vm",),
           "Entitled less received, in seconds: above 0 the VM is owed time, below 0 it is ahead.",
           _vms(lambda vm: vm.lag_ns * NS)),
    Family("mixvisor_scheduler_leak_seconds_total", "counter", ("vm",),
           "CPU time that the VM received while it was not the one dispatched, in seconds.",
           _vms(lambda vm: vm.leak_ns * NS)),
    Family("mixvisor_scheduler_runnable_vcpus", "gauge", ("mode",),
           "Virtual CPUs that could run now, by mode of their VM.",
           _runnable),
    Family("mixvisor_scheduler_decision_duration_seconds", "histogram", ("policy",),
           "CPU time of one scheduling decision with its system calls, in seconds; all host CPUs.",
           _decision),
    Family("mixvisor_scheduler_wakeup_delay_seconds", "histogram", (),
           "How late dispatchers woke after the time they had asked for, in seconds; all host "
           "CPUs.",
           _over_cpus(lambda cpu: cpu.lateness)),
    Family("mixvisor_scheduler_slice_overrun_seconds", "histogram", (),
           "How much longer slices lasted than decided, in seconds; all host CPUs.",
           _over_cpus(lambda cpu: cpu.overrun)),
    Family("mixvisor_scheduler_dispatcher_cpu_seconds_total", "counter", ("cpu",),
           "CPU time of the dispatcher process of the host CPU, in seconds.",
           _cpus(lambda cpu: cpu.dispatcher_cpu_ns * NS)),
    Family("mixvisor_scheduler_frozen_seconds_total", "counter", ("cpu",),
           "Lateness of more than 10 ms, summed, in seconds: the kernel's real-time throttling "
           "shows here.",
           _cpus(lambda cpu: cpu.frozen_ns * NS)),
    Family("mixvisor_scheduler_lost_records_total", "counter", ("cpu",),
           "Slice records that were overwritten before the supervisor read them.",
           _cpus(lambda cpu: cpu.lost_records)),
    Family("mixvisor_scheduler_errors_total", "counter", ("stage",),
           "Errors of the scheduler, by the stage they happened in; a stage appears with its first "
           "error.",
           lambda s: _counts(s.scheduler.errors)),
    Family("mixvisor_scheduler_guard_state", "gauge", ("state",),
           "1 for what the guard process is doing (watching, fired or absent), 0 for the others.",
           lambda s: _state_set(s.scheduler.guard, GUARD_STATES)),
)

# What the collector says about itself: filled by the collector, not from a snapshot.
SELF_FAMILIES: Final[tuple[Family, ...]] = (
    Family("mixvisor_collector_success", "gauge", ("collector",),
           "1 when this scrape shows a fresh picture, 0 when it had to show the last good one.",
           lambda _: ()),
    Family("mixvisor_collector_duration_seconds", "gauge", ("collector",),
           "How long it took to make the picture of this scrape, in seconds.",
           lambda _: ()),
)
