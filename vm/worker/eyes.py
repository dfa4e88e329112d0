"""What a worker can tell of its guest's inside: where it stands, why it left, where its time goes.

Theory.  Three watchers: a ledger of exits by instruction (vm/code/ledger.py), one for each vCPU, filled by the
engine at every exit; a sampler (vm/code/sampler.py), filled at every stop while a profile is being taken; and
the listing of the code around CS:RIP, made when somebody asks (of the first vCPU) or when the guest dies (of the one
that did).

The profile's timer counts the process' CPU time (ITIMER_PROF) and raises SIGPROF, one of the kicks: so the
first vCPU stops, and kicks the others. Each thread then asks `stopped`, which takes a sample when one is due by that
thread's own CPU time and its vCPU does not sleep; and the guest goes on. The timer ends by itself when the
time that was asked for is over, whether or not the one who asked is still there.

Invariants.  Nothing here changes the guest. Every answer fits a packet (protocol.MAX_PACKET). Each vCPU's registers
are read by the thread that runs it. Poor: a first vCPU that waits outside of `run` (in a BIOS call) stops nobody.
"""

from __future__ import annotations

import mmap
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

from ..code import decode
from ..code.ledger import Ledger, together
from ..code.sampler import HZ_MAX, SECONDS_MAX, Sampler
from ..engines.base import GPR, Cpu, CpuState
from .status import StatusPage

__all__ = ["SITES_TOLD", "Eyes", "flatten"]

SITES_TOLD: Final = 256                # of the ledger's places in one answer


class Eyes:
    """`stopped` must be called after each `Cpu.run`, by who ran it; `close` before the process does something else.

    others: vCPUs that other threads run, whose exits are watched too. lock: of the machine, where there are any.
    """

    def __init__(self, memory: mmap.mmap, cpu: Cpu, status: StatusPage, post_codes: Iterable[int], *,
                 others: Iterable[Cpu] = (), lock: AbstractContextManager[Any] | None = None) -> None:
        self._memory = memory
        self._status = status
        self._post_codes = post_codes
        self._ledgers: list[Ledger] = []       # one a vCPU
        for one in (cpu, *others):
            ledger = Ledger(memory, one.where, one.get_state, blocks=one.stops_at == "block", lock=lock)
            one.watch = ledger.note
            self._ledgers.append(ledger)
        self.ledger = self._ledgers[0]
        self._cpus = [cpu, *others]
        self._lock = lock if lock is not None else nullcontext()
        self._sampler: Sampler | None = None
        self._sampling = False
        self._until_ns = 0
        self._period_ns = 0                    # of CPU time
        self._due_ns: list[int] = []           # by vCPU, of its thread's CPU time; 0: from its next stop on
        self._begun: dict[str, int] = {}
        self.requests: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "where": lambda _request: self.where(), "exits": self._exits, "profile": self._profile,
            "profile-end": self._profile_end,
        }

    def attach(self, cpu: Cpu) -> None:
        """Another vCPU goes on in place of the one so far."""
        self._cpus[0] = cpu
        self.ledger.attach(cpu.where, cpu.get_state, blocks=cpu.stops_at == "block")
        cpu.watch = self.ledger.note

    # -- where it stands ---------------------------------------------------------------------

    def where(self) -> dict[str, Any]:
        """Mode, place, registers, the code around, the last exits and POST codes: of one moment."""
        state = self._cpus[0].get_state()
        lines = decode.listing(self._memory, state)
        return {
            "mode": decode.mode_name(state), "place": decode.place(state), "address": decode.linear_of(state),
            "instruction": decode.describe(self._memory, state), "registers": flatten(state),
            "code": [[line.address, line.code.hex(), line.text] for line in lines],
            "exits": [[*list(site.to_json().values())[:2], site.text] for site in self.ledger.last()],
            "post": list(self._post_codes),
        }

    # -- exits -------------------------------------------------------------------------------

    def _exits(self, request: dict[str, Any]) -> dict[str, Any]:
        limit = min(SITES_TOLD, max(1, int(request.get("limit", SITES_TOLD))))
        sites = together(self._ledgers)
        return {"total": sum(site.count for site in sites), "places": len(sites),
                "sites": [site.to_json() for site in sites[:limit]]}

    # -- profile -----------------------------------------------------------------------------

    def _profile(self, request: dict[str, Any]) -> dict[str, Any]:
        hz, seconds = int(request["hz"]), float(request["duration_s"])
        if not 1 <= hz <= HZ_MAX or not 0 < seconds <= SECONDS_MAX:
            raise ValueError(f"a profile takes 1 to {HZ_MAX} samples a second for at most {SECONDS_MAX} s")
        if self._sampling:
            raise ValueError("a profile is being taken already; wait until it has ended")
        with self._lock:
            self._sampler = Sampler(self._memory, len(self._cpus))
            self._sampling = True
            self._begun = self._accounts()
            self._until_ns = self._begun["wall_ns"] + int(seconds * 1e9)
            self._period_ns = 1_000_000_000 // hz
            self._due_ns = [0] * len(self._cpus)
            self._due_ns[0] = time.thread_time_ns() + self._least_ns
        signal.setitimer(signal.ITIMER_PROF, 1 / hz, 1 / hz)
        return {}

    @property
    def _least_ns(self) -> int:
        """Between two samples of a vCPU. With n that compute the timer fires n times in a period."""
        return self._period_ns * 3 // 4

    def stopped(self, index: int = 0) -> None:
        """A vCPU has stopped, whatever for: a sample, while a profile is being taken."""
        if not self._sampling:
            return
        with self._lock:
            if self._sampler is None or not self._sampling:
                return                   # it has just ended
            if index == 0:
                if time.monotonic_ns() >= self._until_ns:
                    self._stop()
                    return
                for cpu in self._cpus[1:]:
                    cpu.kick()
            # There are other stops (requests, BIOS calls that wait): a sample is due by CPU time alone.
            now_ns, due_ns = time.thread_time_ns(), self._due_ns[index]
            if now_ns < due_ns:
                return
            self._due_ns[index] = now_ns + self._least_ns
            cpu = self._cpus[index]
            # What the thread of one that sleeps ran went into being asked.
            if due_ns and not cpu.sleeps:
                self._sampler.sample(cpu.get_state(), index)

    def _stop(self) -> None:
        self._sampling = False
        signal.setitimer(signal.ITIMER_PROF, 0.0, 0.0)
        now = self._accounts()
        self._begun = {name: now[name] - value for name, value in self._begun.items()}

    def _accounts(self) -> dict[str, int]:
        status = self._status
        return {"wall_ns": time.monotonic_ns(), "cpu_ns": time.process_time_ns(),
                "host_ns": status.get("exit_handling_ns"), "sleeping_ns": status.get("sleeping_ns")}

    def _profile_end(self, _request: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            sampler = self._sampler
            if sampler is None:
                raise ValueError("no profile has been taken")
            if self._sampling:
                self._stop()
            self._sampler = None
        return {**sampler.told(), **self._begun, "granularity": self._cpus[0].stops_at}

    def close(self) -> None:
        if self._sampling:
            self._stop()


def flatten(state: CpuState) -> dict[str, int]:
    """A CPU state as name -> number, for reports."""
    registers: dict[str, int] = dict(zip(GPR, state.gpr, strict=True))
    for name in ("cs", "ds", "es", "fs", "gs", "ss"):
        registers[name] = getattr(state, name).selector
    for name in ("cr0", "cr2", "cr3", "cr4", "efer"):
        registers[name] = getattr(state, name)
    return registers
