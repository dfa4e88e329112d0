"""What happened between two snapshots: shares, rates, and the verdict of a run.

Theory.  A snapshot holds counters that only grow; a person wants shares and rates, which are
differences over time. All of them come from the same two pictures, so they agree with each other.

Units: shares and waits are in host CPUs (1.0 = one whole host CPU), rates are per second.
*Received* is the CPU time of all threads of the VM, as the scheduler bills it. The error is
received minus entitled over the same time: > 0 got too much.
Invariant: nothing here divides by zero; a VM that was not there before has no rates (None).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import Final

from ..metrics.snapshot import CpuSnapshot, Snapshot, VmSnapshot

__all__ = ["CpuRate", "Verdict", "VmRate", "cpu_rates", "received_ns", "verdict", "vm_rates"]

GOOD_ERROR: Final = 0.003        # of a host CPU: what the scheduler promises over ten seconds
TOO_SHORT_SECONDS: Final = 2.0
_LIVE: Final = ("starting", "running", "paused", "stopping")


@dataclass(frozen=True, slots=True)
class VmRate:
    vm: VmSnapshot               # as it is at the end
    seconds: float
    entitled: float | None = None
    received: float | None = None
    wait: float | None = None    # runnable, but not running
    progress: float | None = None
    exits: float | None = None
    progress_total: int | None = None
    exits_total: int | None = None
    slices_total: int | None = None

    @property
    def error(self) -> float | None:
        if self.entitled is None or self.received is None:
            return None
        return self.received - self.entitled


@dataclass(frozen=True, slots=True)
class CpuRate:
    cpu: CpuSnapshot
    mode_switches: float         # a second
    vm_switches: float
    slices: float


@dataclass(frozen=True, slots=True)
class Verdict:
    good: bool
    text: str


def received_ns(vm: VmSnapshot) -> int:
    """CPU time of all of the VM's threads: the vCPU's is charged with the others' (emulator_ns is a part of it)."""
    return sum(vcpu.run_ns for vcpu in vm.vcpus)


def vm_rates(old: Snapshot, new: Snapshot) -> list[VmRate]:
    """One for each VM of `new`, in its order."""
    seconds = (new.monotonic_ns - old.monotonic_ns) / 1e9
    before = {vm.id: vm for vm in old.vms}
    return [_vm_rate(before.get(vm.id), vm, seconds) for vm in new.vms]


def _vm_rate(old: VmSnapshot | None, new: VmSnapshot, seconds: float) -> VmRate:
    if old is None or seconds <= 0:
        return VmRate(new, max(0.0, seconds))
    progress = None
    if new.progress is not None:
        progress = max(0, new.progress - (old.progress or 0))
    exits = sum(new.exits.values()) - sum(old.exits.values())
    return VmRate(
        new, seconds,
        entitled=(new.entitled_ns - old.entitled_ns) / seconds / 1e9,
        received=(received_ns(new) - received_ns(old)) / seconds / 1e9,
        # The kernel books a wait when it is over, perhaps an interval later: no vCPU waits more than always.
        wait=min(float(len(new.vcpus)), (sum(v.wait_ns for v in new.vcpus)
                                         - sum(v.wait_ns for v in old.vcpus)) / seconds / 1e9),
        progress=None if progress is None else progress / seconds,
        exits=exits / seconds, progress_total=progress, exits_total=exits,
        slices_total=sum(v.slices for v in new.vcpus) - sum(v.slices for v in old.vcpus),
    )


def cpu_rates(old: Snapshot, new: Snapshot) -> list[CpuRate]:
    seconds = max(1e-9, (new.monotonic_ns - old.monotonic_ns) / 1e9)
    before = {cpu.cpu: cpu for cpu in old.cpus}
    rates: list[CpuRate] = []
    for cpu in new.cpus:
        past = before.get(cpu.cpu)
        if past is not None:
            rates.append(CpuRate(
                cpu, (_mode_switches(cpu) - _mode_switches(past)) / seconds,
                (cpu.vm_switches - past.vm_switches) / seconds,
                (cpu.slices - past.slices) / seconds))
    return rates


def _mode_switches(cpu: CpuSnapshot) -> int:
    return sum(count for (old, new), count in cpu.switches.items()
               if old != new and {old, new} <= {"software", "hardware"})


def verdict(rates: Sequence[VmRate]) -> Verdict:
    """One sentence over a whole run: whether every VM had what it was entitled to."""
    ended = [rate.vm for rate in rates if rate.vm.state in ("crashed", "failed")]
    if ended:
        vm = ended[0]
        why = f" ({vm.state_reason.rstrip('.')})" if vm.state_reason else ""
        return Verdict(False, f"{vm.name} {vm.state}{why}, so the shares of this run prove nothing.")
    compared = [(rate, rate.error) for rate in rates
                if rate.error is not None and rate.vm.state in _LIVE]
    if not compared:
        return Verdict(False, "No VM ran, so there is nothing to judge.")
    rate, error = max(compared, key=lambda pair: abs(pair[1]))
    seconds = rate.seconds
    if seconds < TOO_SHORT_SECONDS:
        return Verdict(True, f"{seconds:.1f} s is too short to judge shares; the largest error was "
                             f"{100 * abs(error):.2f} % of the CPU ({rate.vm.name}).")
    weights = _ratio([one.vm.weight for one, _error in compared if one.entitled])
    if abs(error) <= GOOD_ERROR:
        return Verdict(True, f"Over {seconds:.1f} s every VM received its entitled share to within "
                             f"{100 * max(abs(error), 0.0001):.2f} % of the CPU (weights {weights}).")
    side = "more" if error > 0 else "less"
    return Verdict(False, f"Over {seconds:.1f} s {rate.vm.name} received {100 * abs(error):.2f} % of a CPU "
                          f"{side} than its entitled share, the largest error (weights {weights}).")


def _ratio(weights: Sequence[int]) -> str:
    divisor = gcd(*weights) or 1     # of nothing: 0
    return ":".join(str(weight // divisor) for weight in weights)
