"""Other hypervisors, watched while the service runs; hardware VMs held back while one is a danger.

Theory.  Looking (vm/hosts/rivals.py) is done in a thread every `LOOK_SECONDS` and before a hardware
VM starts, never by anything that schedules. What was found is judged (vm/conflicts.py) and put on the board; what is
found no longer is cleared. A danger refuses hardware VMs unless `[host] conflicts = "warn"`; it never
ends one that runs, and it changes no VM's mode, since it may be over in a minute.

That somebody holds VT-x or AMD-V can also show by KVM's own refusal, or in the kernel's log. Both
stand until a hardware VM starts: that alone proves it over.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

import structlog
import trio

from ..vm.conflicts import Conflict, Evidence, danger, judge
from ..vm.hosts.files import NewMessages, cpus_refused
from ..vm.hosts.rivals import look_for_rivals
from ..vm.modes import Technology
from .backend import Conflict as Refused
from .warnings import Board

__all__ = ["Rivals"]

log = structlog.get_logger("mixvisor")

LOOK_SECONDS: Final = 10.0
FRESH_SECONDS: Final = 1.0           # a hundred VMs that start together are one look
HELD: Final = "virtualization-held"


class Rivals:
    """look: what finds the evidence (default: this host's /proc, without this process' own VMs);
    called in a thread. refuse: whether a danger refuses hardware VMs.
    """

    def __init__(
        self, board: Board, technology: Technology, *, refuse: bool, look: Callable[[], Evidence] | None = None,
    ) -> None:
        self._board = board
        self._refuse = refuse
        self._messages: NewMessages | None = None      # while `watch` runs
        self._look = look or partial(look_for_rivals, Path("/"), technology, own=os.getpid(), log="")
        self._lock = trio.Lock()
        self._seen_at = -FRESH_SECONDS
        self._found: tuple[Conflict, ...] = ()
        self._up: set[str] = set()
        self._refused_by_kvm = ""
        self._complaints: frozenset[int] = frozenset()

    async def watch(self) -> None:
        self._messages = NewMessages(Path("/"))
        try:
            while True:
                await self.look()
                await trio.sleep(LOOK_SECONDS)
        finally:
            self._messages.close()
            self._messages = None

    async def look(self) -> tuple[Conflict, ...]:
        """What is there now, at most `FRESH_SECONDS` old; the board says the same."""
        async with self._lock:
            if trio.current_time() - self._seen_at >= FRESH_SECONDS:
                evidence = await trio.to_thread.run_sync(self._look, abandon_on_cancel=True)
                if self._messages is not None:
                    self._complaints |= cpus_refused(self._messages.read())
                self._found = judge(replace(
                    evidence, refused_cpus=tuple(sorted({*evidence.refused_cpus, *self._complaints}))))
                self._seen_at = trio.current_time()
                self._show()
            return self._found

    async def admit(self, vm: str) -> None:
        """A hardware VM is about to start. Raises Conflict (of the API) while a danger is there."""
        conflict = danger(await self.look())
        if conflict is None:
            return
        if self._refuse:
            raise Refused(f"{conflict.message} {conflict.advice}")
        log.warning(f"{vm} starts although {conflict.message}", code=conflict.code, vm=vm)

    def refused(self, vm: str, reason: str) -> None:
        """KVM itself would not make this VM: somebody else holds VT-x or AMD-V."""
        self._refused_by_kvm = f"{vm}: {reason}"
        self._seen_at = -FRESH_SECONDS                 # who it is may show now
        self._show()

    def works(self) -> None:
        """A hardware VM has started: whatever held VT-x or AMD-V holds it no more."""
        if self._refused_by_kvm or self._complaints:
            self._refused_by_kvm, self._complaints = "", frozenset()
            self._found = tuple(conflict for conflict in self._found if conflict.code != HELD)
            self._show()

    def _show(self) -> None:
        found = {conflict.code: conflict for conflict in self._found}
        if self._refused_by_kvm and HELD not in found:
            found[HELD] = Conflict(
                HELD, "warning", False, f"KVM refused a hardware VM ({self._refused_by_kvm}).",
                "Find and stop the other hypervisor, then start the VM again.")
        for code in self._up - found.keys():
            self._board.clear(code)
        for code, conflict in found.items():
            self._board.put(code, conflict.severity, conflict.message, conflict.advice)
        self._up = set(found)
