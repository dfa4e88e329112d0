"""The processes that schedule: a dispatcher for each host CPU, the guard, and who replaces them.

Theory.  Failure is part of the plan: every helper process is watched by its pidfd. A dispatcher
that ends has its threads given back and is replaced; the table tells the next one where to go on
billing. A guard that ends (or fired, because *we* were stuck) is replaced, and precise dispatch
gives way to gentle, since nobody may have watched for a moment. Each is counted and warned of.
The same way leads from one dispatch kind to another: dispatchers are told to leave, and their
successors begin with the new kind.

Invariant. When `dismiss` has returned, every process started here has ended.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol

import trio

from .accounts import CpuAccount
from .dispatcher import INTERRUPT
from .selftest import Verdict, try_kind
from .shared import CPU_FIELDS, NOBODY, RingReader, Shared
from .table import Table, Vcpu

__all__ = ["Crew", "DispatchRefused", "Host", "Process", "Spawn", "Warn", "until"]

HEARTBEAT_S: Final = 0.1
POLL_S: Final = 0.001              # while an answer of a dispatcher is awaited
LEAVE_S: Final = 0.25              # at the end: who has not left by then is killed
GUARD_UP_S: Final = 5.0
RESTART_PAUSE_S: Final = 0.02


class Process(Protocol):
    """A child of the zygote, see service/children.py."""

    @property
    def pid(self) -> int: ...
    def signal(self, number: signal.Signals) -> None: ...
    async def wait(self) -> None: ...
    async def reap(self) -> int | None: ...
    def words(self) -> str: ...
    def close(self) -> None: ...


class Spawn(Protocol):
    async def __call__(
        self, kind: str, arguments: dict[str, Any], fds: Sequence[int] = (),
    ) -> Process: ...


# code, severity, message, advice
Warn = Callable[[str, Literal["info", "warning", "critical"], str, str], None]


class DispatchRefused(RuntimeError):
    """The dispatch kind that was asked for cannot be had; the text says why and what to do."""


@dataclass(slots=True)
class Host:
    """A host CPU that VMs may use, and its dispatcher."""

    index: int
    cpu: int
    account: CpuAccount
    reader: RingReader
    process: Process | None = None
    link: trio.socket.SocketType | None = None
    absent: bool = False             # the host CPU is not there (hostcpus.py)
    back: trio.Event = field(default_factory=trio.Event)


class Crew:
    """Starts, watches, replaces and ends them. cpus: the host CPUs that VMs may use."""

    def __init__(
        self, table: Table, cpus: Sequence[int], *, dispatch: str, spawn: Spawn, warn: Warn,
    ) -> None:
        self._table = table
        self._cpus = tuple(cpus)
        self._asked = dispatch
        self._spawn = spawn
        self._warn = warn
        self._guard: Process | None = None
        self.hosts: dict[int, Host] = {}
        self._kind = "plain"
        self._reason = "not started yet"
        self._to_kernel = False
        self.guard_state = "absent"
        self.errors: Counter[str] = Counter()
        self.closing = False
        self.plan_wanted = trio.Event()          # set once vCPUs are nobody's because their CPU went

    @property
    def _shared(self) -> Shared:
        assert self._table.shared is not None
        return self._table.shared

    @property
    def kind(self) -> str:
        """The dispatch kind in force."""
        return "plain" if self._to_kernel else self._kind

    @property
    def reason(self) -> str:
        """Why that kind, in plain words."""
        if self._to_kernel:
            return "asked for by the policy kernel: the kernel schedules the VMs, by nice levels"
        return self._reason

    # -- all of them -------------------------------------------------------------------------

    async def choose(self) -> None:
        """Find the dispatch kind. Raises DispatchRefused."""
        for index, cpu in enumerate(self._cpus):
            self.hosts[cpu] = Host(index, cpu, CpuAccount(cpu), RingReader(self._shared, index))
        self._beat()
        self._kind, self._reason = await self._choose()

    async def muster(self, nursery: trio.Nursery) -> None:
        """Guard and dispatchers, running and watched."""
        nursery.start_soon(self._heartbeat)
        # Where the kernel alone schedules too: it ends the VMs of a dead supervisor.
        await self._start_guard()
        nursery.start_soon(self._watch_guard)
        for host in self.hosts.values():
            await self._start_dispatcher(host)
            nursery.start_soon(self._watch_dispatcher, host)

    async def dismiss_dispatchers(self) -> None:
        self._tell_to_leave()
        self._shared.bump()
        with trio.move_on_after(LEAVE_S):
            for host in self.hosts.values():
                if host.process is not None:
                    await host.process.wait()
        for host in self.hosts.values():
            if host.process is not None:
                host.process.signal(signal.SIGKILL)
                await _bury(host.process)
                host.process = None
            if host.link is not None:
                host.link.close()
                host.link = None

    async def dismiss_guard(self) -> None:
        if self._guard is not None:
            self._guard.signal(signal.SIGKILL)
            await _bury(self._guard)
            self._guard = None
        self.guard_state = "absent"

    def leave_to_kernel(self, wanted: bool) -> None:
        """Let the kernel alone schedule, or no longer: dispatchers of the other sort take over."""
        if wanted != self._to_kernel:
            self._to_kernel = wanted
            if self._table.shared is not None:
                self._tell_to_leave()

    def follow(self, epoch: int) -> bool:
        """Whether every dispatcher has seen *epoch*, and none is about to be replaced."""
        shared = self._shared
        return all(
            host.process is not None and not shared.cpu_get(host.index, "leave")
            and shared.cpu_get(host.index, "seen_epoch") >= epoch
            for host in self.hosts.values() if not host.absent)

    @property
    def floats(self) -> bool:
        """Affinity is the supervisor's: dispatchers pin nobody."""
        return self._to_kernel

    @property
    def present(self) -> frozenset[int]:
        """The host CPUs that are there."""
        return frozenset(host.cpu for host in self.hosts.values() if not host.absent)

    def follow_cpus(self, present: frozenset[int]) -> None:
        """Only *present* are there: the dispatchers of others leave, those of CPUs that are back start."""
        shared = self._shared
        for host in self.hosts.values():
            absent = host.cpu not in present
            if absent == host.absent:
                continue
            host.absent = absent
            if absent:
                host.back = trio.Event()
                shared.words[shared.cpu(host.index) + CPU_FIELDS["leave"]] = 1
            else:
                host.back.set()
        shared.bump()

    def _vacate(self, host: Host) -> None:
        """Nobody is given to a host CPU that has no dispatcher and gets none."""
        for vcpu in self._table:
            if (self._table.word(vcpu, "want_cpu") == host.cpu
                    and self._table.word(vcpu, "have_cpu") == NOBODY):
                self._table.set(vcpu, "want_cpu", NOBODY)

    def _tell_to_leave(self) -> None:
        shared = self._shared
        for host in self.hosts.values():
            shared.words[shared.cpu(host.index) + CPU_FIELDS["leave"]] = 1

    # -- which kind --------------------------------------------------------------------------

    async def _choose(self) -> tuple[str, str]:
        if self._asked == "plain":
            return "plain", "asked for by the configuration: the kernel schedules the VMs"
        spare = set(range(os.cpu_count() or 1)) - set(self._cpus)
        kinds: Sequence[str] = (self._asked,)
        refused: list[str] = []
        if self._asked == "auto":
            kinds = ("precise", "gentle", "signal")
            if not spare:
                kinds = kinds[1:]
                refused.append("precise: VMs may use every host CPU, and precise dispatch needs"
                               " one left to the rest of the system (see [host] cpus)")
        first = await self._spawn("spinner", {})
        second: Process | None = None
        try:
            second = await self._spawn("spinner", {})
            for kind in kinds:
                verdict = await try_kind(
                    kind, self._cpus[0], (first.pid, second.pid), self._table.home)
                if verdict.works:
                    return kind, self._why(kind, verdict, refused)
                refused.append(f"{kind}: {verdict.sentence}")
        finally:
            with trio.CancelScope(shield=True):
                for process in (first, second):
                    if process is not None:
                        process.signal(signal.SIGKILL)
                        await _bury(process)
        if self._asked != "auto":
            raise DispatchRefused(f"dispatch = {self._asked!r} cannot be had: {refused[-1]}")
        text = "the kernel alone schedules the VMs; weights do not hold. " + "; ".join(refused)
        self._warn("dispatch-plain", "warning", text, "grant what is named in the message")
        return "plain", text

    def _why(self, kind: str, verdict: Verdict, refused: Sequence[str]) -> str:
        if self._asked != "auto":
            return f"asked for by the configuration; {verdict.sentence}"
        if kind == "precise":
            return ("real-time is permitted and a host CPU is left to the rest of the system; "
                    + verdict.sentence)
        if kind == "signal":
            self._warn(
                "dispatch-signal", "warning",
                "VMs are scheduled by stopping and continuing their processes, which is coarse. "
                + "; ".join(refused), "grant what is named in the message")
        return f"{verdict.sentence}. Not {'; not '.join(refused)}"

    # -- the guard ---------------------------------------------------------------------------

    def _beat(self) -> None:
        self._shared.set("heartbeat_ns", time.monotonic_ns())

    async def _heartbeat(self) -> None:
        while True:
            self._beat()
            await trio.sleep(HEARTBEAT_S)

    async def _start_guard(self) -> None:
        shared = self._shared
        home = self._table.home
        rest = sorted(set(home) - set(self._cpus)) or list(home)
        pidfd = os.pidfd_open(os.getpid())
        try:
            shared.set("guard_ready", 0)
            self._beat()
            self._guard = await self._spawn(
                "guard", {"home_cpus": home, "guard_cpus": rest}, [shared.fd, pidfd])
        finally:
            os.close(pidfd)
        with trio.move_on_after(GUARD_UP_S):
            await until(lambda: bool(shared.get("guard_ready")))
        self.guard_state = "watching" if shared.get("guard_ready") else "absent"

    async def _watch_guard(self) -> None:
        shared = self._shared
        while True:
            guard = self._guard
            assert guard is not None
            await guard.wait()
            if self.closing:
                return
            fired = shared.get("fired_ns") != 0
            self.guard_state = "fired" if fired else "absent"
            self.errors["guard_fired" if fired else "guard_lost"] += 1
            if self._kind == "precise":
                self._kind = "gentle"
                self._reason = (
                    "fell back from precise: the supervisor was stuck and the guard gave the VMs'"
                    " threads back" if fired else
                    "fell back from precise: the guard process ended, nobody watched for a moment")
                self._tell_to_leave()
            self._warn(
                "guard-fired" if fired else "guard-lost", "warning",
                "the scheduler's guard " + (
                    "found the supervisor stuck and gave every VM thread back to the kernel"
                    if fired else "process ended unexpectedly") + f"; dispatch is now {self.kind}",
                "look for what stopped the supervisor, and restart it for precise dispatch")
            self._guard = None           # as with a dispatcher: closed is closed
            await _bury(guard)
            shared.set("fired_ns", 0)
            shared.set("halt", 0)
            shared.bump()
            await trio.sleep(RESTART_PAUSE_S)
            await self._start_guard()

    # -- dispatchers -------------------------------------------------------------------------

    async def _start_dispatcher(self, host: Host) -> None:
        shared, table = self._shared, self._table
        shared.words[shared.cpu(host.index) + CPU_FIELDS["leave"]] = 0
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                host.process = await self._spawn(
                    "dispatcher",
                    {"kind": self.kind, "cpu": host.cpu, "index": host.index,
                     "home_cpus": table.home, "floats": self._to_kernel},
                    [shared.fd, theirs.fileno()])
        except BaseException:
            ours.close()
            raise
        host.link = trio.socket.from_stdlib_socket(ours)
        for vcpu in list(table):
            if table.holds(vcpu) and table.word(vcpu, "want_cpu") == host.cpu:
                await self.send_parcel(host.cpu, vcpu)
        shared.bump()

    async def _watch_dispatcher(self, host: Host) -> None:
        """Whenever it ends, take over what it had and start another."""
        shared, table = self._shared, self._table
        while True:
            process = host.process
            assert process is not None
            await process.wait()
            if self.closing:
                return
            for vcpu in table:
                if table.word(vcpu, "have_cpu") == host.cpu:
                    table.take_over(vcpu)
            asked = shared.cpu_get(host.index, "leave") or shared.get("halt")
            if not asked:
                self.errors["dispatcher"] += 1
                self._warn(
                    "dispatcher-died", "warning",
                    f"the dispatcher of host CPU {host.cpu} ended and was replaced: "
                    + (process.words()[-500:] or "it said nothing (killed?)"),
                    "report this if it happens again")
            if host.link is not None:
                host.link.close()
                host.link = None
            # Ours no more: whoever closes down now must not touch a descriptor that was closed.
            host.process = None
            await _bury(process)
            await trio.sleep(RESTART_PAUSE_S)
            while host.absent and not self.closing:
                self._vacate(host)
                self.plan_wanted.set()
                await host.back.wait()
            if self.closing:
                return
            await self._start_dispatcher(host)

    def interrupt(self, cpus: Iterable[int]) -> None:
        """Let the slices of these host CPUs end now."""
        for cpu in cpus:
            process = self.hosts[cpu].process
            if process is not None:
                process.signal(INTERRUPT)

    def replace(self, cpus: Sequence[int]) -> None:
        """These CPUs' dispatchers do not answer: others take their place."""
        for host in self.hosts.values():
            if host.process is not None and host.cpu in cpus:
                self.errors["dispatcher_stuck"] += 1
                host.process.signal(signal.SIGKILL)

    async def send_parcel(self, cpu: int, vcpu: Vcpu) -> None:
        """The vCPU's pages, ahead of the vCPU. A dispatcher that ends meanwhile is replaced."""
        thread = vcpu.thread
        fds = [fd for fd in (thread.status_fd, thread.progress_fd) if fd is not None]
        message = {
            "slot": vcpu.slot, "generation": vcpu.generation,
            "status": thread.status_fd is not None,
            "progress": thread.progress_offset if thread.progress_fd is not None else None}
        if fds:
            await self.send(cpu, message, fds)

    async def send(self, cpu: int, message: dict[str, Any], fds: Sequence[int]) -> None:
        """To the dispatcher of a host CPU, which reads it once the epoch moves."""
        host = self.hosts[cpu]
        if host.link is None:
            return
        packed = b"".join(fd.to_bytes(4, "little") for fd in fds)
        try:
            await host.link.sendmsg(
                [json.dumps(message).encode()],
                [(socket.SOL_SOCKET, socket.SCM_RIGHTS, packed)] if fds else [])
        except OSError:
            # It ended: its watcher starts another and sends anew.
            self.errors["parcel"] += 1


async def until(condition: Callable[[], bool]) -> None:
    """Poll: a word of shared memory wakes nobody."""
    while not condition():  # noqa: ASYNC110 - the writer is another process
        await trio.sleep(POLL_S)


async def _bury(process: Process) -> None:
    """Reap an ended or dying process, however long the kernel takes to let it go."""
    with trio.CancelScope(shield=True, deadline=trio.current_time() + 2):
        await process.reap()
    process.close()
