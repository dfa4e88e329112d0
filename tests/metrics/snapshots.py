"""Handmade snapshots: an invented service whose every counter is a known function of time.

`snapshot_at(t)` is the picture after *t* seconds of a service with two software and two
hardware VMs (weights 1:1:2:4) on host CPU 1, plus one that never ran. All figures are linear in
time, so that what Prometheus answers can be worked out with a pencil.
"""

from __future__ import annotations

from dataclasses import replace

from mixvisor.metrics.mixing.result import Interval, MeasuredHost, MixingResult
from mixvisor.metrics.snapshot import (
    DECISION_BOUNDS_NS,
    LATENESS_BOUNDS_NS,
    RUN_LENGTH_BOUNDS_NS,
    STOP_BOUNDS_NS,
    CpuSnapshot,
    DiskSnapshot,
    Histogram,
    HostSnapshot,
    MixingSnapshot,
    Mode,
    SchedulerSnapshot,
    ServiceSnapshot,
    Snapshot,
    VcpuSnapshot,
    VmSnapshot,
    WarningSnapshot,
)

BORN = 1_700_000_000.0
SLICES_PER_S = 200
WEIGHTS = {"alpha": 1, "bravo": 1, "carol": 2, "delta": 4}
MODES: dict[str, Mode] = {
    "alpha": "software", "bravo": "software", "carol": "hardware", "delta": "hardware"}
SHARES = {name: weight / sum(WEIGHTS.values()) for name, weight in WEIGHTS.items()}
DISPATCHER_SHARE = 0.01          # of the host CPU
WORK_PER_CPU_S = {"software": 1000, "hardware": 50_000}
SWITCHES_PER_S = 40              # from software to hardware, and as often back


def ns(seconds: float) -> int:
    return round(seconds * 1e9)


def spread(bounds_ns: tuple[int, ...], total: int, bucket: int) -> Histogram:
    """*total* values, all in the middle of one bucket."""
    counts = [0] * (len(bounds_ns) + 1)
    counts[bucket] = total
    low = bounds_ns[bucket - 1] if bucket else 0
    return Histogram(bounds_ns, tuple(counts), total * (low + bounds_ns[bucket]) // 2)


def a_vm(name: str, t: float, *, state: str = "running", vcpus: int = 1) -> VmSnapshot:
    mode = MODES.get(name, "software")
    share = SHARES.get(name, 0.0) * (1 - DISPATCHER_SHARE)
    ran = share * t
    return VmSnapshot(
        id=name, name=name.title(), state=state, state_reason="",
        engine="kvm" if mode == "hardware" else "software", mode=mode, mode_rule="explicit",
        mode_reason=f'the file says mode = "{mode}"', os="none", bits=64,
        weight=WEIGHTS.get(name, 100), cap_pct=50 if name == "delta" else 0, reservation_pct=10,
        latency="low" if name == "delta" else "normal",
        cpus=(1,), memory_bytes=4 << 20, resident_bytes=10 << 20,
        pid=1000 if state == "running" else None,
        started_unix_s=BORN if state == "running" else None, restarts=int(t // 2),
        mode_changes={"hardware": spread(STOP_BOUNDS_NS, int(t), 2),
                      "software": spread(STOP_BOUNDS_NS, int(t // 2), 3)},
        vcpus=tuple(
            VcpuSnapshot(
                index=i, cpu=1 if state == "running" else None, run_ns=ns(ran / vcpus),
                wait_ns=ns((1 - share) * t), halted_ns=ns(0.001 * t), capped_ns=ns(0.02 * t) if name == "delta" else 0,
                migrations=int(t),
                slices=int(SLICES_PER_S * share * t / vcpus))
            for i in range(vcpus)),
        entitled_ns=ns(ran), entitled_share=share, lag_ns=ns(0.002) if name == "alpha" else 0,
        leak_ns=ns(0.0001 * t), emulator_ns=ns(0.002 * t),
        progress=int(WORK_PER_CPU_S[mode] * ran) if state == "running" else None,
        exits={"io_out": int(300 * ran), "halt": int(10 * t), "kick": int(200 * ran)},
        exit_handling_ns=ns(0.01 * ran), serial_bytes=int(80 * t), serial_dropped_bytes=int(3 * t),
        bios_calls=int(18 * t), interrupts=int(100 * t), timer_ticks_lost=int(t),
        disks={"fda": DiskSnapshot(int(5120 * t), int(512 * t), int(10 * t), int(t), 0)},
        console="serial")


def a_cpu(t: float, cpu: int = 1) -> CpuSnapshot:
    slices = int(SLICES_PER_S * t)
    busy = 1 - DISPATCHER_SHARE
    switches = int(SWITCHES_PER_S * t)
    return CpuSnapshot(
        cpu=cpu, core=cpu, socket=0,
        residency_ns={"hardware": ns(0.75 * busy * t), "software": ns(0.25 * busy * t),
                      "idle": 0, "other": ns(DISPATCHER_SHARE * t)},
        switches={("software", "hardware"): switches, ("hardware", "software"): switches,
                  ("software", "software"): slices - 2 * switches},
        run_length={"software": spread(RUN_LENGTH_BOUNDS_NS, switches, 3),
                    "hardware": spread(RUN_LENGTH_BOUNDS_NS, switches, 5)},
        vm_switches=slices, slices=slices,
        lateness=spread(LATENESS_BOUNDS_NS, slices, 1),
        decision={"fair": spread(DECISION_BOUNDS_NS, slices, 4)},
        overrun=spread(LATENESS_BOUNDS_NS, slices, 2),
        dispatcher_cpu_ns=ns(DISPATCHER_SHARE * t), frozen_ns=ns(0.0005 * t), lost_records=int(t),
        runnable={"software": 2, "hardware": 2})


def a_warning(code: str = "mixed-modes") -> WarningSnapshot:
    return WarningSnapshot(code=code, severity="warning", message="Modes mix.",
                           advice="Use one mode.", since_unix_s=BORN, vms=("alpha", "delta"))


def a_result(**changed: object) -> MixingResult:
    """A crossing costs 16 us: hardware victims pay 20, software victims 12."""
    told = MixingResult(
        source="online", measured_unix_s=BORN + 50, seconds=60.0,
        host=MeasuredHost(technology="pvm", cpu_model="Invented CPU", kernel="6.12.0"), cpu=-1, dispatch="precise",
        guests="2 software, 2 hardware VMs of this service", working_set_bytes=None, reference_slice_us=5000.0,
        slices=10_000, verdict="penalty", headline="A crossing between modes costs 16.0 µs (15.0 µs to 17.0 µs).",
        doubts=(), cost_us=Interval(16.0, 15.0, 17.0),
        cost_us_by_victim={"software": Interval(12.0, 11.0, 13.0), "hardware": Interval(20.0, 19.0, 21.0)},
        null_us=Interval(0.1, -0.5, 0.7), control_us=None, agreement_us=None, switching_us=Interval(30.0, 29.0, 31.0))
    return replace(told, **changed)  # type: ignore[arg-type]


def a_mixing(t: float) -> MixingSnapshot:
    told = a_result()
    return MixingSnapshot(
        online=True, told=told, latest=told, caveats=("A caveat.",),
        penalty={"software": Interval(0.0012, 0.0011, 0.0013), "hardware": Interval(0.002, 0.0019, 0.0021)},
        crossing_rate={"software": 100.0, "hardware": 100.0}, measurements={"penalty": int(t), "inconclusive": 1},
        concluded_unix_s=BORN + 50, lost_ns={name: ns(0.001 * t) for name in WEIGHTS},
        overlap_ns={"cpu": ns(t), "core": ns(t), "socket": ns(t), "host": ns(t)}, crossing_cost_us=16.0,
        crossing_cost_source="measured", estimator_cpu_ns=ns(0.001 * t))


def snapshot_at(
    t: float,
    *,
    vms: tuple[VmSnapshot, ...] | None = None,
    cpus: tuple[CpuSnapshot, ...] | None = None,
    warnings: tuple[WarningSnapshot, ...] | None = None,
    fairness: float | None = 0.999,
    mixing: MixingSnapshot | None = None,
) -> Snapshot:
    return Snapshot(
        taken_unix_s=BORN + t, monotonic_ns=ns(t),
        service=ServiceSnapshot(version="0.1.0", pid=1, started_unix_s=BORN, config_path=None,
                                ready=True),
        host=HostSnapshot(technology="pvm", kvm="usable", kernel="6.12.0", cpu_model="Invented CPU",
                          cpus=(0, 1), vm_cpus=(1,), memory_bytes=8 << 30),
        scheduler=SchedulerSnapshot(
            policy="fair", dispatch="precise", dispatch_reason="permitted", slice_ns=5_000_000,
            fairness=fairness, errors={"placement": int(t // 4)}, guard="watching"),
        cpus=(a_cpu(t),) if cpus is None else cpus,
        vms=(*(a_vm(name, t) for name in WEIGHTS), a_vm("echo", t, state="defined"))
        if vms is None else vms,
        warnings=(a_warning(),) if warnings is None else warnings,
        mixing=a_mixing(t) if mixing is None else mixing)


def many_vms(count: int, vcpus: int, t: float = 100.0) -> Snapshot:
    """A busy host: *count* running VMs, for measuring."""
    names = [f"vm-{i:03d}" for i in range(count)]
    return snapshot_at(
        t, vms=tuple(a_vm(name, t, vcpus=vcpus) for name in names), cpus=(a_cpu(t, 0), a_cpu(t, 1)))
