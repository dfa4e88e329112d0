"""A loan: for a while a host CPU's order of vCPUs is a script's and not its policy's, for a measurement.

Theory.  To find what the *order* of VMs costs, the order must be chosen, and by nobody who looks at what it does. The
VMs that lend are brought together on one host CPU and kept there (planner.py); the dispatcher of that CPU plays the
script that is written here (shared.py, policy/scripted.py), and its slice records, each with the number of the entry
that it came from, are handed on. What a lender receives more or less than its weight meanwhile is between the lenders
(ledger.py); VMs beside them keep their shares.

Invariants.
- One loan at a time. Whatever ends it (who asked for it, a lender that ends or is paused, a change of policy or of a
  lender's parameters, the scheduler's own end) gives everything back at once: order, places, accounts.
- A script that is not written further is played to its end, and then the policy picks: a borrower that dies holds
  nothing up.

Units: ns. Where it is poor: lenders have one vCPU, no cap and no reservation, for a script would break those.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Final, NamedTuple

import trio

from .crew import Crew
from .planner import Planner
from .policy.scripted import REST
from .shared import ACTIVE, LENT, NOBODY, RECORD_ENTRY_SHIFT, ScriptWriter, SliceRecord
from .table import Table, Vcpu

__all__ = ["REST", "Lender", "Loan", "LoanRefused", "LoanedSlice"]

GATHER_S: Final = 2.0                  # until the lenders are on their CPU
KEEP: Final = 65_536                   # slices that nobody has taken yet
LENGTHS_NS: Final = (100_000, 100_000_000)


class LoanRefused(ValueError):
    """The VMs cannot lend their time; the text says why and what to do."""


class LoanedSlice(NamedTuple):
    """A slice of the lent host CPU. VMs are indices in `Loan.vms`, -1 = none or another."""

    entry: int             # of the script, as `Loan.write` counts them; -1 = the policy's pick
    vm: int
    previous: int
    start_ns: int
    end_ns: int
    planned_ns: int
    run_ns: int
    others_ns: int
    breath_ns: int
    progress: int          # of the guest's counter; 0 where it has none


class Loan:
    """What the borrower has: a script to write, slices to take."""

    def __init__(self, table: Table, vcpus: Sequence[Vcpu], cpu: int, index: int) -> None:
        assert table.shared is not None
        self.vms = tuple(vcpu.vm for vcpu in vcpus)
        self.modes = tuple(vcpu.thread.mode for vcpu in vcpus)
        self.counts = tuple(vcpu.thread.progress_fd is not None for vcpu in vcpus)    # has a progress counter
        self.cpu = cpu
        self.ended: str | None = None          # why, once it has
        self._table = table
        self._index = index
        self._slots = [int(vcpu.slot) for vcpu in vcpus]
        self._of_generation = {vcpu.generation: at for at, vcpu in enumerate(vcpus)}
        self._of_slot = {slot: at for at, slot in enumerate(self._slots)}
        self._writer = ScriptWriter(table.shared)
        self._taken: deque[LoanedSlice] = deque(maxlen=KEEP)

    @property
    def played(self) -> int:
        """Entries of the script that have been played."""
        shared = self._table.shared
        if shared is None:
            return 0
        return max(0, shared.cpu_get(self._index, "script_at") - self._writer.first)

    def write(self, entries: Sequence[tuple[int, int]]) -> int:
        """Append (index of a VM or REST, length in ns) as far as there is room; returns how many.

        Raises ValueError for an entry that is none.
        """
        low, high = LENGTHS_NS
        for vm, length_ns in entries:
            if vm != REST and not (0 <= vm < len(self._slots) and low <= length_ns <= high):
                raise ValueError(
                    f"an entry is a VM from 0 to {len(self._slots) - 1} and a length from {low} to {high} ns,"
                    f" or {REST} and any length; found {vm} and {length_ns}")
        shared = self._table.shared
        if self.ended is not None or shared is None:
            return 0
        return self._writer.write([(NOBODY if vm == REST else self._slots[vm], length) for vm, length in entries],
                                  shared.cpu_get(self._index, "script_at"))

    def note(self, records: Iterable[SliceRecord]) -> None:
        """The newest slices of its host CPU."""
        first = self._writer.first
        for r in records:
            self._taken.append(LoanedSlice(
                entry=(r.flags >> RECORD_ENTRY_SHIFT) - 1 - first if r.flags >> RECORD_ENTRY_SHIFT else -1,
                vm=self._of_generation.get(r.generation, -1), previous=self._of_slot.get(r.previous_slot, -1),
                start_ns=r.start_ns, end_ns=r.end_ns, planned_ns=r.planned_end_ns - r.start_ns, run_ns=r.run_ns,
                others_ns=r.others_software_ns + r.others_hardware_ns, breath_ns=r.breath_ns,
                progress=max(0, r.progress_after - r.progress_before)))

    def take(self) -> list[LoanedSlice]:
        """The slices since the last call, oldest first."""
        taken = list(self._taken)
        self._taken.clear()
        return taken


class Lender:
    """Makes the loan and takes it back."""

    def __init__(self, table: Table, planner: Planner, crew: Crew, plan: Callable[[], Awaitable[None]]) -> None:
        self._table = table
        self._planner = planner
        self._crew = crew
        self._plan = plan
        self.loan: Loan | None = None

    def lends(self, vm: str) -> bool:
        return self.loan is not None and vm in self.loan.vms

    async def lend(self, vms: Sequence[str]) -> Loan:
        """Raises LoanRefused, and nothing has changed then."""
        vcpus, cpu = self._check(vms)
        table = self._table
        loan = self.loan = Loan(table, vcpus, cpu, self._crew.hosts[cpu].index)
        self._planner.lent = dict.fromkeys(vms, cpu)
        try:
            with trio.move_on_after(GATHER_S):
                while loan.ended is None and not all(table.word(v, "have_cpu") == cpu for v in vcpus if table.holds(v)):
                    await self._plan()
                    await trio.sleep(0.005)
            if loan.ended is None and not all(table.holds(v) and table.word(v, "have_cpu") == cpu for v in vcpus):
                self.end(f"the VMs did not come together on host CPU {cpu} within {GATHER_S:g} s")
        except BaseException:
            self.end("given up")
            raise
        if loan.ended is not None or table.shared is None:
            raise LoanRefused(loan.ended or "the scheduler has ended")
        for vcpu in vcpus:
            vcpu.lent = True
            table.set(vcpu, "flags", ACTIVE | LENT)
        table.shared.set("script_cpu", cpu)
        table.bump()
        return loan

    def _check(self, vms: Sequence[str]) -> tuple[list[Vcpu], int]:
        if self.loan is not None:
            raise LoanRefused(f"{', '.join(self.loan.vms)} are being measured already; try again when that is over")
        if self._table.shared is None or self._crew.closing:
            raise LoanRefused("the scheduler is not running")
        if self._crew.kind == "plain":
            raise LoanRefused("the kernel alone schedules the VMs, so their order is not ours to lend: "
                              + self._crew.reason)
        if len(set(vms)) != len(vms):
            raise LoanRefused("a VM is named twice")
        vcpus: list[Vcpu] = []
        for vm in vms:
            mine = [v for v in self._table.of(vm) if not v.leaving]
            if not mine or mine[0].paused:
                raise LoanRefused(f"VM {vm!r} does not run")
            if len(mine) > 1:
                raise LoanRefused(f"VM {vm!r} has {len(mine)} vCPUs: only VMs with one can be measured")
            if mine[0].cap or mine[0].reservation:
                raise LoanRefused(f"VM {vm!r} has a cap or a reservation, which a script would not keep;"
                                  " take it away for the measurement (mixvisor set)")
            vcpus.append(mine[0])
        shared_cpus = self._crew.present.intersection(*(v.cpus for v in vcpus))
        if not shared_cpus:
            raise LoanRefused(f"there is no host CPU that all of {', '.join(vms)} may use")
        here = [self._table.word(v, "want_cpu") for v in vcpus]
        return vcpus, min(shared_cpus, key=lambda cpu: (-here.count(cpu), cpu))

    def end(self, reason: str) -> None:
        """Everything goes back; no loan is no error."""
        loan, self.loan = self.loan, None
        if loan is None:
            return
        loan.ended = reason
        self._planner.lent = {}
        self._planner.dirty = True
        shared = self._table.shared
        if shared is not None:
            shared.set("script_cpu", NOBODY)
        for vcpu in self._table:
            if vcpu.lent:
                vcpu.lent = False
                if shared is not None:
                    self._table.set(vcpu, "flags", self._table.word(vcpu, "flags") & ~LENT)
        self._table.bump()
