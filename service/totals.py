"""What is counted of a VM: of one incarnation, and summed over all that it has had.

Theory.  A worker's status page, its progress counter and the scheduler's accounts begin at zero with each incarnation,
while what is shown of a VM must never fall.  So the totals of an incarnation that ends are added to those of the ones
before, once, and what is shown is that sum and the totals of the one that lives.

Invariants.  What a worker counts is its claim: it is added, never used as an index or a size.  The number of vCPUs and
of exit reasons is the specification's, not the worker's.

Units: as the names say; `_ns` are nanoseconds, counters without a unit are numbers of events.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, field, fields
from itertools import zip_longest
from typing import Final

from ..metrics.snapshot import DiskSnapshot
from ..sched.accounts import VcpuFigures
from ..vm.engines.base import EXIT_KINDS
from ..vm.worker.status import DISK_COUNTERS
from .incarnation import Incarnation

__all__ = ["Totals", "VcpuTotals", "totals_of"]


@dataclass(slots=True)
class VcpuTotals:
    """What is counted for each vCPU."""

    run_ns: int = 0
    wait_ns: int = 0
    capped_ns: int = 0
    halted_ns: int = 0
    slices: int = 0
    migrations: int = 0

    def plus(self, other: VcpuTotals) -> VcpuTotals:
        return VcpuTotals(*(getattr(self, name) + getattr(other, name) for name in VCPU_COUNTERS))


@dataclass(slots=True)
class Totals:
    """Counters of one incarnation, or summed over those that have ended."""

    entitled_ns: int = 0
    leak_ns: int = 0
    emulator_ns: int = 0
    exit_handling_ns: int = 0
    serial_bytes: int = 0
    serial_dropped_bytes: int = 0
    bios_calls: int = 0
    interrupts: int = 0
    timer_ticks_lost: int = 0
    progress: int = 0
    exits: list[int] = field(default_factory=lambda: [0] * len(EXIT_KINDS))
    vcpus: list[VcpuTotals] = field(default_factory=list["VcpuTotals"])
    disks: dict[str, DiskSnapshot] = field(default_factory=dict[str, DiskSnapshot])

    def plus(self, other: Totals) -> Totals:
        total = Totals(*(getattr(self, name) + getattr(other, name) for name in COUNTERS))
        total.exits = [a + b for a, b in zip(self.exits, other.exits, strict=True)]
        total.vcpus = [a.plus(b) for a, b in zip_longest(self.vcpus, other.vcpus, fillvalue=VcpuTotals())]
        total.disks = {drive: _sum(self.disks.get(drive), other.disks.get(drive))
                       for drive in self.disks | other.disks}
        return total


# In the order of the fields.
COUNTERS: Final = tuple(f.name for f in fields(Totals) if f.name not in ("exits", "vcpus", "disks"))
VCPU_COUNTERS: Final = tuple(f.name for f in fields(VcpuTotals))


def _sum(one: DiskSnapshot | None, other: DiskSnapshot | None) -> DiskSnapshot:
    pairs = zip(astuple(one or DiskSnapshot()), astuple(other or DiskSnapshot()), strict=True)
    return DiskSnapshot(*(a + b for a, b in pairs))


def totals_of(one: Incarnation, figures: Sequence[VcpuFigures]) -> Totals:
    """What its status page, its progress counter and the scheduler say of an incarnation, dead or alive."""
    page = one.status
    count = one.spec.vcpus
    totals = Totals(
        exit_handling_ns=page.get("exit_handling_ns"),
        serial_bytes=page.get("serial_bytes"), serial_dropped_bytes=page.get("serial_dropped_bytes"),
        bios_calls=page.get("bios_calls"), interrupts=page.get("interrupts"),
        timer_ticks_lost=page.get("timer_ticks_lost"), progress=one.progress() or 0,
        exits=page.exits.tolist() if count == 1 else page.exits_of_all(count),
        vcpus=[VcpuTotals() for _ in range(count)],
        disks={disk.name: DiskSnapshot(*(page.get(f"{disk.name}_{what}") for what in DISK_COUNTERS))
               for disk in one.images.disks})
    totals.vcpus[0].halted_ns = page.get("sleeping_ns")
    for of in figures:
        vcpu = totals.vcpus[of.index]
        vcpu.run_ns, vcpu.wait_ns, vcpu.capped_ns = of.run_ns, of.wait_ns, of.capped_ns
        vcpu.slices, vcpu.migrations = of.slices, of.migrations
        totals.entitled_ns += of.entitled_ns
        totals.leak_ns += of.leak_ns
        totals.emulator_ns += of.emulator_ns
    return totals
