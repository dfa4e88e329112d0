"""Loans to a measurement: who may borrow a host CPU's order, and that it comes back.

Theory.  `mixvisor measure --vms` runs in a process of its own: it designs the experiment, and needs of the service only
an order to be played and the raw slices of it (sched/loan.py). It asks for a loan, then in turn sends more of
the script and takes slices, and gives the loan back. A borrower that has not called for `PATIENCE_SECONDS` is taken for
dead. What ends a loan earlier (a VM ended, the policy was changed) is told with the next answer.

Invariants.  A VM is lent only where its table in the file says so (`measure = true`). While there is a loan there is
the note `measuring`, and none without. Answers are bounded: what nobody takes is dropped, oldest first.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, cast

import structlog
import trio

from ..config.model import GuestBoot, VmConfig
from ..sched.loan import Loan, LoanedSlice, LoanRefused
from ..sched.supervisor import Scheduler
from ..vm.guests import BUILTIN
from ..vm.hosts.instructions import why_not_counted
from .backend import Conflict, Denied, NotFound, Unusable
from .warnings import Board

__all__ = ["COLUMNS", "Loans"]

log = structlog.get_logger("mixvisor")

PATIENCE_SECONDS: Final = 10.0
VMS_MAX: Final = 16
ENTRIES_MAX: Final = 4096            # of the script, in one request
NOTE: Final = "measuring"
COLUMNS: Final = LoanedSlice._fields


class Loans:
    """machine_of: a VM's table of the file, raises NotFound. host: what a figure depends on, for the borrower."""

    def __init__(
        self, board: Board, scheduler: Scheduler, nursery: trio.Nursery, machine_of: Callable[[str], VmConfig],
        host: Mapping[str, Any],
    ) -> None:
        self._board = board
        self._scheduler = scheduler
        self._nursery = nursery
        self._machine_of = machine_of
        self._host = host
        self._loan: Loan | None = None
        self._id = ""
        self._patience = trio.CancelScope()
        self._kinds: set[str] = set()

    async def lend(self, vms: Any) -> dict[str, Any]:
        """A loan of these VMs' host CPU. Raises ServiceError."""
        if not (isinstance(vms, list) and 0 < len(cast("list[object]", vms)) <= VMS_MAX
                and all(isinstance(vm, str) for vm in cast("list[object]", vms))):
            raise Unusable(f"vms must be an array of 1 to {VMS_MAX} names of VMs")
        names = cast("list[str]", vms)
        configs = [self._machine_of(name) for name in names]
        unwilling = [config.name for config in configs if not config.measure]
        if unwilling:
            raise Denied(f"{', '.join(unwilling)} may not be measured: a measurement decides when its VMs run, so"
                         " their [[vm]] tables must say measure = true")
        try:
            loan = await self._scheduler.lend(names)
        except LoanRefused as error:
            raise Conflict(str(error)) from error
        self._loan, self._id, self._kinds = loan, secrets.token_hex(8), set()
        self._patience = trio.CancelScope(deadline=trio.current_time() + PATIENCE_SECONDS)
        self._nursery.start_soon(self._wait, loan, self._patience)
        self._board.put(
            NOTE, "info",
            f"{', '.join(names)} are being measured: a script decides when they run on host CPU {loan.cpu}",
            "Nothing needs to be done; their weights hold again when it is over.", tuple(names))
        log.info(f"{', '.join(names)} lend their time to a measurement on host CPU {loan.cpu}", code="loan", vms=names,
                 cpu=loan.cpu)
        return {"loan": self._id, "cpu": loan.cpu, "columns": COLUMNS, "host": dict(self._host), "vms": [
            {"name": config.name, "mode": mode, "counts": counts, **_guest(config)}
            for config, mode, counts in zip(configs, loan.modes, loan.counts, strict=True)],
            "uncounted": "" if all(loan.counts) else why_not_counted(), **self._dispatch()}

    def exchange(self, number: str, script: Any) -> dict[str, Any]:
        """More of the script in, slices out. Raises ServiceError."""
        loan = self._known(number)
        if not (isinstance(script, list) and len(cast("list[object]", script)) <= ENTRIES_MAX
                and all(map(_is_entry, cast("list[object]", script)))):
            raise Unusable(f"script must be an array of at most {ENTRIES_MAX} pairs [VM, length in ns]")
        self._patience.deadline = trio.current_time() + PATIENCE_SECONDS
        try:
            written = loan.write([(vm, length) for vm, length in cast("list[tuple[int, int]]", script)])
        except ValueError as error:
            raise Unusable(str(error)) from error
        self._scheduler.note_loan()
        return {"written": written, "played": loan.played, "slices": loan.take(), "ended": loan.ended,
                **self._dispatch()}

    def give_back(self, number: str) -> dict[str, Any]:
        """Everything goes back; the last slices. Raises ServiceError."""
        loan = self._known(number)
        self._scheduler.end_loan(loan, "given back")
        self._patience.cancel()
        slices = loan.take()
        self._loan = None
        return {"slices": slices, "ended": loan.ended, **self._dispatch()}

    def _known(self, number: str) -> Loan:
        if self._loan is None or number != self._id:
            raise NotFound(f"there is no loan {number!r}; one that is not used for {PATIENCE_SECONDS:g} s is over")
        return self._loan

    def _dispatch(self) -> dict[str, Any]:
        """How slices are enforced: the worst of it so far, for a fallback in the middle spoils what follows."""
        statistics = self._scheduler.statistics()
        self._kinds.add(statistics.dispatch)
        exact = self._kinds == {"precise"}
        return {"dispatch": "precise" if exact else next(k for k in ("plain", "signal", "gentle") if k in self._kinds),
                "dispatch_reason": statistics.dispatch_reason}

    async def _wait(self, loan: Loan, patience: trio.CancelScope) -> None:
        """Until it was given back, its borrower is taken for dead, or something else ended it."""
        with patience:
            while loan.ended is None:  # noqa: ASYNC110 - ended by the scheduler, which knows of no tasks
                await trio.sleep(0.1)
            # The borrower may still come for the last slices.
            self._board.clear(NOTE)
            await trio.sleep_forever()
        if loan.ended is None:
            self._scheduler.end_loan(loan, f"the one who measures did not call for {PATIENCE_SECONDS:g} s")
        if self._loan is loan:
            self._loan = None
        if self._loan is None:
            self._board.clear(NOTE)
        log.info(f"the loan of host CPU {loan.cpu} is over: {loan.ended}", code="loan-over", vms=list(loan.vms))


def _guest(config: VmConfig) -> dict[str, Any]:
    """What runs in it, as far as it is known from outside."""
    boot = config.boot
    if not isinstance(boot, GuestBoot):
        return {"guest": boot.kind, "working_set_bytes": None}
    parameters = BUILTIN[boot.guest].params
    working_set = boot.parameters.get("working_set", parameters["working_set"].default) \
        if "working_set" in parameters else 0
    return {"guest": boot.guest, "working_set_bytes": working_set}


def _is_entry(pair: object) -> bool:
    if not isinstance(pair, list):
        return False
    items = cast("Sequence[object]", pair)
    return len(items) == 2 and all(type(value) is int and abs(value) < 1 << 40 for value in items)
