"""The supervisor's half of scheduling: who lives where, at what rate; and who watches whom.

Theory.  Slow decisions are made here, on trio, off the VMs' CPUs: admission, entitlements
(policy/entitlement.py), placement (policy/placement.py). They are published in the shared table
(shared.py, with the protocol by which a vCPU changes hands) and followed by one dispatcher
process a host CPU, which never waits for us. What the dispatchers log becomes accounts here.

Failure is part of the plan: every helper process is watched by its pidfd. A dispatcher that
ends has its threads given back and is replaced; the table tells the next one where to go on
billing. A guard that ends (or fired, because *we* were stuck) is replaced, and precise dispatch
gives way to gentle, since nobody may have watched for a moment. Each is counted and warned of.

Entitlement.  A VM is entitled to its share *of what the VMs got together*: CPU time that the
host's other work took is nobody's debt. So entitled and received add up to the same, and lag
has no drift. It accrues only while the VM competes.

Invariants.
- `want_cpu` changes only while `have_cpu == want_cpu` (shared.py).
- `release` returns only when no dispatcher touches the thread and it is SCHED_OTHER, unpinned
  and going: a real-time thread queued behind others could be killed and never die.
- When `run` ends, every thread is given back and every process it started has ended.
Where it is poor: a vCPU that wakes keeps its nominal rate until the next balance (30 ms).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol

import trio

from . import linux
from .accounts import CpuAccount, CpuFigures, SchedulerStatistics, VcpuFigures, fairness
from .model import Slot, VcpuLoad, VmDemand
from .policy.entitlement import admit, entitle
from .policy.placement import place
from .selftest import Verdict, try_kind
from .shared import (
    ACTIVE,
    CPU_FIELDS,
    MODES,
    NOBODY,
    ONE_CPU,
    PAUSED,
    SLOT_FIELDS,
    RingReader,
    Shared,
)

__all__ = [
    "AdmissionRefused", "DispatchRefused", "Process", "Scheduler", "Spawn", "VcpuThread", "Warn",
]

HEARTBEAT_S: Final = 0.1
BALANCE_S: Final = 0.03
BALANCE_MAX_S: Final = 0.5
BALANCE_PART: Final = 30           # of our time at most 1/30 goes into planning
ACCOUNT_S: Final = 0.1
SLOW_S: Final = 1.0                # what is read from /proc
WINDOW: Final = 20                 # accounts that the fairness index looks back over: 2 s
SHARES_KEPT: Final = 8
GUARD_TIMEOUT_NS: Final = 1_000_000_000
POLL_S: Final = 0.001              # while an answer of a dispatcher is awaited
ANSWER_S: Final = 0.6              # a dispatcher that has not answered by then is replaced
LEAVE_S: Final = 0.25              # at the end, the same
GUARD_UP_S: Final = 5.0
RESTART_PAUSE_S: Final = 0.02
LOWEST_RATE: Final = 1e-6


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


class AdmissionRefused(ValueError):
    """The VM cannot be scheduled; the text says why and what to do."""


class DispatchRefused(RuntimeError):
    """The dispatch kind that was asked for cannot be had; the text says why and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VcpuThread:
    """A vCPU to schedule. Descriptors stay the caller's until `release` has returned."""

    vm: str
    index: int
    pid: int
    tid: int
    pidfd: int
    mode: str                        # software, hardware
    weight: int
    cap: float = 0.0                 # of the VM, in host CPUs, 0 = none
    reservation: float = 0.0
    cpus: frozenset[int]
    status_fd: int | None = None     # vm/worker/status.py
    progress_fd: int | None = None
    progress_offset: int = 0         # of a 64-bit counter


@dataclass(slots=True, eq=False)
class _Vcpu:
    thread: VcpuThread
    slot: Slot
    generation: int
    base: int
    cap: float
    weight: int
    reservation: float
    paused: bool = False
    leaving: bool = False
    share: float = 0.0               # entitled, in host CPUs
    entitled_ns: float = 0.0
    lag_ns: float = 0.0
    seen_run: int = 0
    seen_awake: int = 0
    wait_ns: int = 0
    emulator_ns: int = 0
    stat_fd: int = -1


@dataclass(slots=True)
class _Cpu:
    index: int
    cpu: int
    account: CpuAccount
    reader: RingReader
    process: Process | None = None
    link: trio.socket.SocketType | None = None
    generation: int = 0              # of the dispatcher: its parcels have to be sent anew
    sent: set[tuple[int, int]] = field(default_factory=set)


class Scheduler:
    """Shares host CPUs among vCPU threads. `await nursery.start(scheduler.run)` first.

    cpus: host CPUs that VMs may use. dispatch: auto or one of linux.KINDS. spawn: makes
    processes (service/children.py). warn: told what an operator should know.
    """

    def __init__(
        self, *, cpus: Sequence[int], spawn: Spawn, dispatch: str = "auto",
        slice_ns: int = 5_000_000, ratelimit_ns: int = 500_000,
        migrate_resist_ns: int = 500_000, warn: Warn | None = None,
        guard_timeout_ns: int = GUARD_TIMEOUT_NS,
    ) -> None:
        if not cpus:
            raise ValueError("a scheduler needs at least one host CPU")
        if dispatch != "auto" and dispatch not in linux.KINDS:
            raise ValueError(f"unknown dispatch kind {dispatch!r}: auto, {', '.join(linux.KINDS)}")
        self._cpus = tuple(sorted(set(cpus)))
        self._home = tuple(sorted({*range(os.cpu_count() or 1), *self._cpus}))
        self._asked = dispatch
        self._slice_ns = slice_ns
        self._ratelimit_ns = min(ratelimit_ns, slice_ns)
        self._resist_ns = migrate_resist_ns
        self._spawn = spawn
        self._warn = warn or (lambda code, severity, message, advice: None)
        self._guard_timeout_ns = guard_timeout_ns
        self._kind = "plain"
        self._reason = "not started yet"
        self._guard: Process | None = None
        self._guard_state = "absent"
        self._errors: Counter[str] = Counter()
        self._shared: Shared | None = None
        self._hosts: dict[int, _Cpu] = {}
        self._vcpus: dict[tuple[str, int], _Vcpu] = {}
        self._past: dict[str, VcpuFigures] = {}
        self._free: list[int] = []
        self._generation = 0
        self._period_s = BALANCE_S
        self._shares: dict[tuple[VmDemand, ...], dict[str, float]] = {}
        self._dirty = False              # demands changed: plan anew
        self._awake_seen: tuple[tuple[int, bool], ...] = ()
        self._unspent_ns = 0.0           # received by VMs, and not yet accrued to anybody
        self._window: deque[dict[int, tuple[int, float]]] = deque(maxlen=WINDOW)
        self._closing = False
        self._final: SchedulerStatistics | None = None     # after `run` has ended

    # -- life --------------------------------------------------------------------------------

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Schedule until cancelled. Started once the dispatchers run. Raises DispatchRefused."""
        shared = self._shared = Shared.create(self._cpus)
        try:
            shared.set("supervisor_pid", os.getpid())
            shared.set("slice_ns", self._slice_ns)
            shared.set("ratelimit_ns", self._ratelimit_ns)
            shared.set("guard_timeout_ns", self._guard_timeout_ns)
            self._free = list(range(shared.slots - 1, -1, -1))
            for index, cpu in enumerate(self._cpus):
                self._hosts[cpu] = _Cpu(index, cpu, CpuAccount(cpu), RingReader(shared, index))
            self._beat()
            self._kind, self._reason = await self._choose()
            async with trio.open_nursery() as nursery:
                try:
                    nursery.start_soon(self._heartbeat)
                    # Where the kernel alone schedules too: it ends the VMs of a dead supervisor.
                    await self._start_guard()
                    nursery.start_soon(self._watch_guard)
                    for host in self._hosts.values():
                        await self._start_dispatcher(host)
                        nursery.start_soon(self._watch_dispatcher, host)
                    nursery.start_soon(self._balance)
                    nursery.start_soon(self._account_forever)
                    task_status.started()
                    await trio.sleep_forever()
                finally:
                    self._closing = True
                    nursery.cancel_scope.cancel()
        finally:
            self._closing = True
            with trio.CancelScope(shield=True):
                await self._close(shared)

    async def _close(self, shared: Shared) -> None:
        self._account(time.monotonic_ns())
        for host in self._hosts.values():
            shared.words[shared.cpu(host.index) + CPU_FIELDS["leave"]] = 1
        shared.bump()
        with trio.move_on_after(LEAVE_S):
            for host in self._hosts.values():
                if host.process is not None:
                    await host.process.wait()
        for host in self._hosts.values():
            if host.process is not None:
                host.process.signal(signal.SIGKILL)
                await _bury(host.process)
                host.process = None
            if host.link is not None:
                host.link.close()
                host.link = None
        # Dispatchers gave back what they had; this is for those that could not.
        for vcpu in list(self._vcpus.values()):
            self._forget_thread(vcpu)
        if self._guard is not None:
            self._guard.signal(signal.SIGKILL)
            await _bury(self._guard)
            self._guard = None
        self._guard_state = "absent"
        self._final = self.statistics()
        self._shared = None
        fd = shared.fd
        shared.close()
        os.close(fd)

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
                verdict = await try_kind(kind, self._cpus[0], (first.pid, second.pid), self._home)
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

    # -- processes ---------------------------------------------------------------------------

    def _beat(self) -> None:
        assert self._shared is not None
        self._shared.set("heartbeat_ns", time.monotonic_ns())

    async def _heartbeat(self) -> None:
        while True:
            self._beat()
            await trio.sleep(HEARTBEAT_S)

    async def _start_guard(self) -> None:
        shared = self._shared
        assert shared is not None
        rest = sorted(set(self._home) - set(self._cpus)) or list(self._home)
        pidfd = os.pidfd_open(os.getpid())
        try:
            shared.set("guard_ready", 0)
            self._beat()
            self._guard = await self._spawn(
                "guard", {"home_cpus": self._home, "guard_cpus": rest}, [shared.fd, pidfd])
        finally:
            os.close(pidfd)
        with trio.move_on_after(GUARD_UP_S):
            await _until(lambda: bool(shared.get("guard_ready")))
        self._guard_state = "watching" if shared.get("guard_ready") else "absent"

    async def _watch_guard(self) -> None:
        shared = self._shared
        assert shared is not None
        while True:
            guard = self._guard
            assert guard is not None
            await guard.wait()
            if self._closing:
                return
            fired = shared.get("fired_ns") != 0
            self._guard_state = "fired" if fired else "absent"
            self._errors["guard_fired" if fired else "guard_lost"] += 1
            if self._kind == "precise":
                self._kind = "gentle"
                self._reason = (
                    "fell back from precise: the supervisor was stuck and the guard gave the VMs'"
                    " threads back" if fired else
                    "fell back from precise: the guard process ended, nobody watched for a moment")
                for host in self._hosts.values():
                    shared.words[shared.cpu(host.index) + CPU_FIELDS["leave"]] = 1
            self._warn(
                "guard-fired" if fired else "guard-lost", "warning",
                "the scheduler's guard " + (
                    "found the supervisor stuck and gave every VM thread back to the kernel"
                    if fired else "process ended unexpectedly") + f"; dispatch is now {self._kind}",
                "look for what stopped the supervisor, and restart it for precise dispatch")
            self._guard = None           # as with a dispatcher: closed is closed
            await _bury(guard)
            shared.set("fired_ns", 0)
            shared.set("halt", 0)
            shared.bump()
            await trio.sleep(RESTART_PAUSE_S)
            await self._start_guard()

    async def _start_dispatcher(self, host: _Cpu) -> None:
        shared = self._shared
        assert shared is not None
        shared.words[shared.cpu(host.index) + CPU_FIELDS["leave"]] = 0
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                host.process = await self._spawn(
                    "dispatcher",
                    {"kind": self._kind, "cpu": host.cpu, "index": host.index,
                     "home_cpus": self._home},
                    [shared.fd, theirs.fileno()])
        except BaseException:
            ours.close()
            raise
        host.link = trio.socket.from_stdlib_socket(ours)
        host.sent.clear()
        for vcpu in self._vcpus.values():
            if self._word(vcpu, "want_cpu") == host.cpu:
                await self._send_parcel(host, vcpu)
        shared.bump()

    async def _watch_dispatcher(self, host: _Cpu) -> None:
        """Whenever it ends, take over what it had and start another."""
        shared = self._shared
        assert shared is not None
        while True:
            process = host.process
            assert process is not None
            await process.wait()
            if self._closing:
                return
            for vcpu in self._vcpus.values():
                if self._word(vcpu, "have_cpu") == host.cpu:
                    linux.give_back(vcpu.thread.pid, vcpu.thread.tid, self._home)
                    self._settle_awake(vcpu)
                    self._set(vcpu, "have_cpu", NOBODY)
            asked = shared.cpu_get(host.index, "leave") or shared.get("halt")
            if not asked:
                self._errors["dispatcher"] += 1
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
            if self._closing:
                return
            await self._start_dispatcher(host)

    async def _send_parcel(self, host: _Cpu, vcpu: _Vcpu) -> None:
        """The vCPU's pages, ahead of the vCPU. A dispatcher that ends meanwhile is replaced."""
        thread = vcpu.thread
        fds = [fd for fd in (thread.status_fd, thread.progress_fd) if fd is not None]
        message = {
            "slot": vcpu.slot, "generation": vcpu.generation,
            "status": thread.status_fd is not None,
            "progress": thread.progress_offset if thread.progress_fd is not None else None}
        if host.link is None or not fds:
            return
        packed = b"".join(fd.to_bytes(4, "little") for fd in fds)
        try:
            await host.link.sendmsg(
                [json.dumps(message).encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, packed)])
        except OSError:
            # It ended: its watcher starts another and sends anew.
            self._errors["parcel"] += 1

    # -- the table ---------------------------------------------------------------------------

    def _word(self, vcpu: _Vcpu, name: str) -> int:
        assert self._shared is not None
        return self._shared.words[vcpu.base + SLOT_FIELDS[name]]

    def _set(self, vcpu: _Vcpu, name: str, value: int) -> None:
        assert self._shared is not None
        self._shared.words[vcpu.base + SLOT_FIELDS[name]] = value

    def _settle_awake(self, vcpu: _Vcpu) -> None:
        """Close the awake time of a vCPU whose dispatcher has died."""
        if self._word(vcpu, "awake"):
            since = self._word(vcpu, "awake_since_ns")
            total = self._word(vcpu, "awake_ns") + time.monotonic_ns() - since
            self._set(vcpu, "awake", 0)
            self._set(vcpu, "awake_ns", total)

    # -- what the service asks for -----------------------------------------------------------

    async def admit(self, thread: VcpuThread) -> None:
        """Schedule a vCPU from now on. Raises AdmissionRefused."""
        shared = self._shared
        key = (thread.vm, thread.index)
        if shared is None or self._closing:
            raise AdmissionRefused(f"VM {thread.vm!r}: the scheduler is not running")
        if key in self._vcpus:
            raise AdmissionRefused(f"vCPU {thread.index} of VM {thread.vm!r} is scheduled already")
        if thread.mode not in MODES:
            raise AdmissionRefused(f"VM {thread.vm!r} has the unknown mode {thread.mode!r}")
        if not self._free:
            raise AdmissionRefused(
                f"VM {thread.vm!r}: all {shared.slots} places of the scheduler's table are taken")
        others = [d for d in self._demands(everyone=True) if d.vm != thread.vm]
        refusal = admit([*others, VmDemand(
            vm=thread.vm, weight=thread.weight, vcpus=thread.index + 1, cpus=thread.cpus,
            cap=thread.cap, reservation=thread.reservation)], self._cpus)
        if refusal is not None:
            raise AdmissionRefused(refusal)
        try:
            started = linux.start_ticks(thread.pid)
            stat_fd = os.open(f"/proc/{thread.pid}/task/{thread.tid}/schedstat",
                              os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise AdmissionRefused(f"VM {thread.vm!r}: its process has ended") from error
        self._generation += 1
        slot = Slot(self._free.pop())
        base = shared.slot(slot)
        vcpu = _Vcpu(thread, slot, self._generation, base, thread.cap, thread.weight,
                     thread.reservation, stat_fd=stat_fd)
        for name, value in (
            ("pid", thread.pid), ("tid", thread.tid), ("start_ticks", started or 0),
            ("mode", MODES.index(thread.mode)), ("want_cpu", NOBODY), ("have_cpu", NOBODY),
            ("rate", 1), ("cap", round(thread.cap * ONE_CPU)),
            ("flags", ACTIVE), ("generation", self._generation),
        ):
            self._set(vcpu, name, value)
        shared.set("used_slots", max(shared.get("used_slots"), slot + 1))
        self._past.pop(thread.vm, None)
        self._vcpus[key] = vcpu
        await self._plan()

    async def release(self, vm: str) -> None:
        """Let go of a VM: on return its threads are SCHED_OTHER, unpinned and going.

        A VM that is not scheduled is no error. Its figures stay until `forget`.
        """
        mine = [vcpu for vcpu in self._vcpus.values() if vcpu.thread.vm == vm]
        for vcpu in mine:
            vcpu.leaving = True
        with trio.CancelScope(shield=True):
            for vcpu in mine:
                await self._take_away(vcpu)
            now = time.monotonic_ns()
            for vcpu in mine:
                key = (vm, vcpu.thread.index)
                if self._vcpus.get(key) is not vcpu:
                    continue                       # another release was faster
                self._account(now)
                self._read_proc(vcpu)
                self._past[vm] = self._figures_of(vcpu)
                self._forget_thread(vcpu)
            if mine and not self._closing:
                await self._plan()

    async def _take_away(self, vcpu: _Vcpu) -> None:
        """Until nobody has it. A dispatcher that does not answer is replaced."""
        for _attempt in range(3):
            with trio.move_on_after(ANSWER_S):
                await _until(lambda: self._is_forgotten(vcpu)
                             or self._word(vcpu, "have_cpu") == self._word(vcpu, "want_cpu"))
                if self._is_forgotten(vcpu):
                    return
                if self._word(vcpu, "want_cpu") != NOBODY:
                    self._set(vcpu, "want_cpu", NOBODY)
                    if self._shared is not None:
                        self._shared.bump()
                await _until(
                    lambda: self._is_forgotten(vcpu) or self._word(vcpu, "have_cpu") == NOBODY)
                return
            if self._is_forgotten(vcpu):
                return
            for host in self._hosts.values():
                if host.process is not None and host.cpu in (
                        self._word(vcpu, "have_cpu"), self._word(vcpu, "want_cpu")):
                    self._errors["dispatcher_stuck"] += 1
                    host.process.signal(signal.SIGKILL)

    def _is_forgotten(self, vcpu: _Vcpu) -> bool:
        """Given back meanwhile: by another release, or because scheduling ended under us."""
        return (self._shared is None
                or self._vcpus.get((vcpu.thread.vm, vcpu.thread.index)) is not vcpu)

    def _forget_thread(self, vcpu: _Vcpu) -> None:
        """Out of the table, its thread given back."""
        linux.give_back(vcpu.thread.pid, vcpu.thread.tid, self._home)
        for name, value in (("flags", 0), ("generation", 0), ("pid", 0), ("tid", 0),
                            ("want_cpu", NOBODY), ("have_cpu", NOBODY)):
            self._set(vcpu, name, value)
        if vcpu.stat_fd >= 0:
            os.close(vcpu.stat_fd)
            vcpu.stat_fd = -1
        self._free.append(vcpu.slot)
        self._vcpus.pop((vcpu.thread.vm, vcpu.thread.index), None)

    def forget(self, vm: str) -> None:
        """Drop the figures of a released VM."""
        self._past.pop(vm, None)

    async def pause(self, vm: str) -> None:
        """It competes no more, until `resume`; its thread is SCHED_OTHER and going."""
        await self._set_paused(vm, True)

    async def resume(self, vm: str) -> None:
        await self._set_paused(vm, False)

    async def _set_paused(self, vm: str, paused: bool) -> None:
        for vcpu in self._vcpus.values():
            if vcpu.thread.vm == vm and vcpu.paused != paused:
                vcpu.paused = paused
                self._set(vcpu, "flags", ACTIVE | (PAUSED if paused else 0))
        if self._shared is not None:
            self._shared.bump()
        await self._plan()

    async def set_parameters(
        self, vm: str, *, weight: int | None = None, cap: float | None = None,
        reservation: float | None = None,
    ) -> None:
        """Change a scheduled VM's parameters. Raises AdmissionRefused, and changes nothing then."""
        mine = [vcpu for vcpu in self._vcpus.values() if vcpu.thread.vm == vm]
        if not mine:
            raise AdmissionRefused(f"VM {vm!r} is not scheduled")
        before = [(v.weight, v.cap, v.reservation) for v in mine]
        for vcpu in mine:
            vcpu.weight = vcpu.weight if weight is None else weight
            vcpu.cap = vcpu.cap if cap is None else cap
            vcpu.reservation = vcpu.reservation if reservation is None else reservation
        refusal = admit(self._demands(everyone=True), self._cpus)
        if refusal is not None:
            for vcpu, (old_weight, old_cap, old_reservation) in zip(mine, before, strict=True):
                vcpu.weight, vcpu.cap, vcpu.reservation = old_weight, old_cap, old_reservation
            raise AdmissionRefused(refusal)
        await self._plan()

    async def set_slice(self, slice_ns: int) -> None:
        """Change the length of a slice while running."""
        self._slice_ns = slice_ns
        self._ratelimit_ns = min(self._ratelimit_ns, slice_ns)
        if self._shared is not None:
            self._shared.set("ratelimit_ns", self._ratelimit_ns)
            self._shared.set("slice_ns", slice_ns)
            self._shared.bump()

    # -- planning ----------------------------------------------------------------------------

    def _competing(self, vcpu: _Vcpu) -> bool:
        """Awake and not paused. One that nobody has yet counts as awake."""
        if vcpu.paused or vcpu.leaving:
            return False
        owned = self._word(vcpu, "owned_generation") == vcpu.generation
        if owned and self._word(vcpu, "gone"):
            return False
        if not owned or self._word(vcpu, "have_cpu") == NOBODY:
            return True
        return bool(self._word(vcpu, "awake"))

    def _demands(self, *, everyone: bool) -> list[VmDemand]:
        by_vm: dict[str, list[_Vcpu]] = {}
        for vcpu in self._vcpus.values():
            if not vcpu.leaving:
                by_vm.setdefault(vcpu.thread.vm, []).append(vcpu)
        return [
            VmDemand(
                vm=vm, weight=vcpus[0].weight, cpus=vcpus[0].thread.cpus, cap=vcpus[0].cap,
                reservation=vcpus[0].reservation,
                vcpus=len(vcpus) if everyone else sum(map(self._competing, vcpus)))
            for vm, vcpus in by_vm.items()]

    def _entitled(self, demands: list[VmDemand]) -> dict[str, float]:
        """`entitle`, remembered: the same demands come again and again."""
        key = tuple(demands)
        if key not in self._shares:
            if len(self._shares) >= SHARES_KEPT:
                self._shares.clear()
            self._shares[key] = entitle(demands, self._cpus)
        return self._shares[key]

    async def _balance(self) -> None:
        while True:
            # With very many vCPUs a plan takes milliseconds: then it is made less often.
            await trio.sleep(self._period_s)
            awake = tuple((v.generation, self._competing(v)) for v in self._vcpus.values())
            if self._dirty or awake != self._awake_seen or len(self._cpus) > 1:
                began = time.thread_time()
                await self._plan()
                took = time.thread_time() - began
                self._period_s = max(BALANCE_S, min(BALANCE_MAX_S, took * BALANCE_PART))

    async def _plan(self) -> None:
        """Entitlements and placement of now, published; parcels go ahead of their vCPUs."""
        shared = self._shared
        if shared is None or self._closing:
            return
        self._account(time.monotonic_ns())
        self._dirty = False
        vcpus = [vcpu for vcpu in self._vcpus.values() if not vcpu.leaving]
        competing = {vcpu.slot: self._competing(vcpu) for vcpu in vcpus}
        self._awake_seen = tuple(
            (v.generation, self._competing(v)) for v in self._vcpus.values())
        count = Counter(v.thread.vm for v in vcpus if competing[v.slot])
        shares = self._entitled(self._demands(everyone=False))
        nominal = self._entitled(self._demands(everyone=True))
        loads: list[VcpuLoad] = []
        for vcpu in vcpus:
            vm = vcpu.thread.vm
            vcpu.share = shares[vm] / count[vm] if competing[vcpu.slot] else 0.0
            want = self._word(vcpu, "want_cpu")
            if competing[vcpu.slot] or want == NOBODY:
                loads.append(VcpuLoad(
                    slot=vcpu.slot, entitled=vcpu.share or nominal[vm],
                    # Placement turns lag into a higher rate for one period. On a single CPU the
                    # run queue keeps the lag itself, and we plan only when something changes.
                    lag_ns=round(vcpu.lag_ns) if len(self._cpus) > 1 else 0,
                    cpus=vcpu.thread.cpus, last_cpu=want if want != NOBODY else None,
                    mode=vcpu.thread.mode))
        placement = place(
            loads, self._cpus, round(self._period_s * 1e9), migrate_resist_ns=self._resist_ns)
        changed = False
        moves: list[tuple[_Vcpu, int]] = []
        for vcpu in vcpus:
            cap = round(vcpu.cap * ONE_CPU) if vcpu.cap < len(self._cpus) else 0
            rate = placement.rate.get(vcpu.slot) or nominal[vcpu.thread.vm]
            for name, value in (("rate", round(max(rate, LOWEST_RATE) * ONE_CPU)), ("cap", cap)):
                if self._word(vcpu, name) != value:
                    self._set(vcpu, name, value)
                    changed = True
            want = self._word(vcpu, "want_cpu")
            to = placement.cpu.get(vcpu.slot, want)
            if to != want:
                if self._word(vcpu, "have_cpu") == want:
                    moves.append((vcpu, to))
                else:
                    self._dirty = True
        for vcpu, to in moves:
            await self._send_parcel(self._hosts[to], vcpu)
            if (not vcpu.leaving and self._vcpus.get((vcpu.thread.vm, vcpu.thread.index)) is vcpu
                    and self._word(vcpu, "have_cpu") == self._word(vcpu, "want_cpu")):
                self._set(vcpu, "want_cpu", to)
                changed = True
        if changed or moves:
            shared.bump()

    # -- accounts ----------------------------------------------------------------------------

    async def _account_forever(self) -> None:
        slow = 0.0
        while True:
            await trio.sleep(ACCOUNT_S)
            self._account(time.monotonic_ns())
            self._window.append(
                {v.generation: (v.seen_run, v.entitled_ns) for v in self._vcpus.values()})
            slow += ACCOUNT_S
            if slow >= SLOW_S:
                slow = 0.0
                for vcpu in self._vcpus.values():
                    self._read_proc(vcpu)

    def _account(self, now: int) -> None:
        """Fold the rings, bill what was received, accrue what was due. Idempotent."""
        for host in self._hosts.values():
            host.account.fold(host.reader.read())
        due: list[tuple[_Vcpu, float, int]] = []
        for vcpu in self._vcpus.values():
            if self._word(vcpu, "owned_generation") != vcpu.generation:
                continue
            run = self._word(vcpu, "charged_ns") - self._word(vcpu, "first_run_ns")
            awake = self._word(vcpu, "awake_ns")
            if self._word(vcpu, "awake"):
                awake += max(0, now - self._word(vcpu, "awake_since_ns"))
            # Read in the midst of a change the sum may step back for once: not below what was.
            passed = max(0, awake - vcpu.seen_awake)
            vcpu.seen_awake += passed
            received = max(0, run - vcpu.seen_run)
            vcpu.seen_run += received
            due.append((vcpu, vcpu.share * passed, received))
        wanted = sum(entitled for _vcpu, entitled, _received in due)
        limit = float(self._slice_ns)
        # Bills arrive slice by slice, time passes evenly: what one look has too much of, the
        # next one lacks, so some slices' worth is carried.
        granted = self._unspent_ns + sum(received for _vcpu, _entitled, received in due)
        scale = min(1.0, granted / wanted) if wanted else 0.0
        self._unspent_ns = min(granted - wanted * scale, 4 * limit * len(self._cpus))
        for vcpu, entitled, received in due:
            vcpu.entitled_ns += entitled * scale
            lag = vcpu.lag_ns + entitled * scale - received
            vcpu.lag_ns = max(-limit, min(limit, lag))

    def _read_proc(self, vcpu: _Vcpu) -> None:
        """What only /proc tells: waiting time, and how much other threads of the VM ran."""
        thread = vcpu.thread
        try:
            run, wait, _count = map(int, os.pread(vcpu.stat_fd, 96, 0).split())
            several = os.stat(f"/proc/{thread.pid}/task").st_nlink > 3
        except (OSError, ValueError):
            return               # it has ended; the last figures stand
        vcpu.wait_ns = wait
        if several and thread.pid == thread.tid:
            # A running thread's figure may be a tick old, which must not look like emulator time.
            emulator = self._word(vcpu, "charged_ns") - run - 5_000_000
            vcpu.emulator_ns = max(vcpu.emulator_ns, emulator)

    def _figures_of(self, vcpu: _Vcpu) -> VcpuFigures:
        owned = self._word(vcpu, "owned_generation") == vcpu.generation
        have = self._word(vcpu, "have_cpu")
        read: Callable[[str], int] = lambda name: self._word(vcpu, name) if owned else 0  # noqa: E731
        return VcpuFigures(
            vm=vcpu.thread.vm, index=vcpu.thread.index, cpu=have if have != NOBODY else None,
            # As of the last account, as the entitlement beside it.
            run_ns=vcpu.seen_run,
            wait_ns=vcpu.wait_ns, entitled_ns=round(vcpu.entitled_ns), entitled_share=vcpu.share,
            lag_ns=round(vcpu.lag_ns), leak_ns=read("leak_ns"), emulator_ns=vcpu.emulator_ns,
            slices=read("slices"), migrations=read("migrations"), awake=bool(read("awake")),
            paused=vcpu.paused)

    def figures(self, vm: str) -> VcpuFigures | None:
        """The first vCPU of a VM; after its release the last state; None: unknown here."""
        vcpu = self._vcpus.get((vm, 0))
        if vcpu is not None and self._shared is not None:
            return self._figures_of(vcpu)
        return self._past.get(vm)

    def _fairness(self) -> float | None:
        """Jain's index of received over entitled in the last two seconds."""
        if len(self._window) < 2:
            return None
        old, new = self._window[0], self._window[-1]
        both = [key for key in new if key in old]
        return fairness([new[key][0] - old[key][0] for key in both],
                        [round(new[key][1] - old[key][1]) for key in both])

    def _cpu_figures(self, shared: Shared, host: _Cpu) -> CpuFigures:
        return host.account.figures(
            dispatcher_cpu_ns=shared.cpu_get(host.index, "cpu_ns"),
            lost_records=host.reader.lost,
            runnable=shared.cpu_words(host.index, "runnable", len(MODES)))

    def statistics(self) -> SchedulerStatistics:
        """Everything about scheduling, as of now (at most a tenth of a second old). No I/O."""
        shared = self._shared
        if shared is None:
            return self._final or SchedulerStatistics(
                dispatch=self._kind, dispatch_reason=self._reason, fairness=None, errors={},
                guard="absent", cpus=(), vcpus=())
        errors: Mapping[str, int] = {
            **self._errors,
            "refused_calls": sum(
                shared.cpu_get(host.index, "refusals") for host in self._hosts.values())}
        return SchedulerStatistics(
            dispatch=self._kind, dispatch_reason=self._reason, fairness=self._fairness(),
            errors={stage: count for stage, count in errors.items() if count},
            guard=self._guard_state,
            cpus=tuple(self._cpu_figures(shared, host) for host in self._hosts.values()),
            vcpus=tuple(self._figures_of(vcpu) for vcpu in self._vcpus.values()))


async def _until(condition: Callable[[], bool]) -> None:
    """Poll: a word of shared memory wakes nobody."""
    while not condition():  # noqa: ASYNC110 - the writer is another process
        await trio.sleep(POLL_S)


async def _bury(process: Process) -> None:
    """Reap an ended or dying process, however long the kernel takes to let it go."""
    with trio.CancelScope(shield=True, deadline=trio.current_time() + 2):
        await process.reap()
    process.close()
