"""What the scheduler does to threads: thin adapters over the kernel's calls.

Theory.  To schedule a vCPU is to move its thread between a few *levels*; what a level is in
terms of the kernel is the *dispatch kind*:

| level | precise | precise, breathing | gentle | signal | meaning |
|---|---|---|---|---|---|
| RUN | FIFO 2 | OTHER | OTHER | SIGCONT | picked for this slice |
| WAIT | FIFO 1 | SIGSTOP | IDLE | SIGSTOP | awake, another one is picked |
| DOZE | FIFO 3 | FIFO 3 | OTHER | SIGCONT | asleep and owed time: runs at once when it wakes |
| HELD | SIGSTOP | SIGSTOP | SIGSTOP | SIGSTOP | its cap is used up |
| FREE | OTHER | OTHER | OTHER | SIGCONT | not competing (paused) |

In the kind `plain` every level is the kernel's own scheduling.

Facts of the kernel this rests on (reference/measurement.md):
- While only FIFO threads run on a CPU the kernel freezes all of them for 50 ms every second.
  Breathing (a tenth of the time outside FIFO) never lets it come to that.
- The fair class keeps what a thread was owed when it left it, and lets a SCHED_IDLE thread that
  is owed a microsecond run until the next tick (4 ms). So SCHED_IDLE is exact over
  seconds and wrong over milliseconds: in a breath, those that wait are taken off the run queue.
  They keep FIFO 1 for it, so that they get the few microseconds that stopping takes at once.
- SCHED_IDLE against SCHED_OTHER means something only inside one scheduling group.
- A killed FIFO thread queued behind other FIFO threads never gets to die: before a kill it must
  be SCHED_OTHER and unpinned (`give_back`).
- SCHED_IDLE back to SCHED_OTHER needs CAP_SYS_NICE or RLIMIT_NICE >= 20.
- A change of priority inside FIFO (sched_setparam) costs about half of a change of class.

FIFO comes with SCHED_RESET_ON_FORK, so that what a VM's process forks is never real-time.
Where it is poor: a stopped VM is stopped as a whole process, so it answers no control request
until its budget returns, the breath is over or it is picked.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import errno
import functools
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, NamedTuple, Protocol

__all__ = [
    "CAP_KILL", "CAP_SYS_NICE", "DISPATCHER_PRIORITY", "GUARD_PRIORITY", "KINDS", "EventCounter", "Kernel",
    "Level", "RunClock", "State", "become_realtime", "explain_refusal", "give_back",
    "keep_capabilities", "kill_exactly", "set_timer_slack", "start_ticks", "states_of",
]

KINDS: Final = ("precise", "gentle", "signal", "plain")
DISPATCHER_PRIORITY: Final = 10
GUARD_PRIORITY: Final = 20
CAP_KILL: Final = 5
CAP_SYS_NICE: Final = 23


class Level(enum.IntEnum):
    FREE = 0
    RUN = 1
    WAIT = 2
    DOZE = 3
    HELD = 4


class State(NamedTuple):
    """What a level means to the kernel. Compared by identity: every table has its own."""

    policy: int | None            # None: left alone
    priority: int
    parameters: os.sched_param
    stopped: bool


def _state(policy: int | None, priority: int = 0, *, stopped: bool = False) -> State:
    if policy is not None and policy == os.SCHED_FIFO:
        policy |= os.SCHED_RESET_ON_FORK
    return State(policy, priority, os.sched_param(priority), stopped)


_FIFO: Final = os.SCHED_FIFO
_FREE: Final = _state(os.SCHED_OTHER)
_OTHER: Final = _state(os.SCHED_OTHER)
_HELD: Final = _state(os.SCHED_OTHER, stopped=True)
_DOZE: Final = _state(_FIFO, 3)
_GOES: Final = _state(None)
_STOPS: Final = _state(None, stopped=True)
_STATES: Final = {
    # FREE, RUN, WAIT, DOZE, HELD.
    "precise": (_FREE, _state(_FIFO, 2), _state(_FIFO, 1), _DOZE, _HELD),
    "breath": (_FREE, _OTHER, _state(_FIFO, 1, stopped=True), _DOZE, _HELD),
    "gentle": (_FREE, _OTHER, _state(os.SCHED_IDLE), _OTHER, _HELD),
    "signal": (_GOES, _GOES, _STOPS, _GOES, _STOPS),
    "plain": (_GOES, _GOES, _GOES, _GOES, _GOES),
}


def states_of(kind: str, *, breathing: bool = False) -> tuple[State, ...]:
    """The state of each level (indexed by Level); only `precise` breathes."""
    return _STATES["breath" if breathing and kind == "precise" else kind]


class Kernel:
    """The calls that a dispatcher makes; tests put a fake in its place.

    Every method may raise ProcessLookupError (the thread has ended) or
    PermissionError. Process and thread ids are safe to use here: the supervisor reaps no worker
    that a dispatcher still has.
    """

    def run_clock(self, pid: int, tid: int, *, alone: bool = True) -> RunClock:
        """Total CPU time of a vCPU, exact for one that is not running now.

        Where the vCPU is the only one of its process, and its first thread, it is the process's CPU
        clock: everything that the VM received, in all its threads, for half the price of /proc.
        FileNotFoundError and ProcessLookupError mean an ended thread.
        """
        if pid == tid and alone:
            return _ProcessClock(pid)
        return _ThreadClock(pid, tid)

    # (thread, policy, parameters) and (thread, parameters): plain aliases, called most of all.
    set_class = staticmethod(os.sched_setscheduler)
    set_priority = staticmethod(os.sched_setparam)

    def waits(self, pid: int, tid: int) -> bool:
        """Whether the thread sleeps in the kernel (state S or D): it wants no CPU."""
        text = Path(f"/proc/{pid}/task/{tid}/stat").read_text()
        return text[text.rindex(")") + 2] in "SD"

    def pin(self, tid: int, cpus: Iterable[int]) -> None:
        os.sched_setaffinity(tid, cpus)

    def stop(self, pid: int) -> None:
        os.kill(pid, signal.SIGSTOP)

    def go_on(self, pid: int) -> None:
        os.kill(pid, signal.SIGCONT)


class EventCounter:
    """A count that a descriptor of perf_event_open(2) gives, where a mapped word would be: `counter[0]`."""

    def __init__(self, fd: int) -> None:
        """The descriptor is the counter's from now on."""
        self.fd = fd

    def __getitem__(self, _index: int) -> int:
        data = os.read(self.fd, 8)
        return int.from_bytes(data, sys.byteorder)        # nothing, where others hold the unit: 0

    def release(self) -> None:
        os.close(self.fd)


class RunClock(Protocol):
    read: Callable[[], int]      # ns; OSError once the thread has ended and been reaped
    native: tuple[int, int]      # the same for C (steady.c): 1 and a clock's id, or 2 and a descriptor

    def close(self) -> None: ...


class _ProcessClock:
    """clock_gettime's clock of another process; equals the sum of its threads' schedstat."""

    def __init__(self, pid: int) -> None:
        # CPUCLOCK_SCHED in the kernel's posix-timers.h; the negated pid says which process.
        number = (~pid << 3) | 2
        self.read = functools.partial(time.clock_gettime_ns, number)
        self.native: tuple[int, int] = (1, number)

    def close(self) -> None:
        """Nothing is held."""


class _ThreadClock:
    """Field 1 of a thread's schedstat, on a descriptor that is kept."""

    def __init__(self, pid: int, tid: int) -> None:
        self._fd = os.open(f"/proc/{pid}/task/{tid}/schedstat", os.O_RDONLY | os.O_CLOEXEC)
        self.native: tuple[int, int] = (2, self._fd)

    def read(self) -> int:
        return int(os.pread(self._fd, 96, 0).split(None, 1)[0])

    def close(self) -> None:
        os.close(self._fd)


def give_back(pid: int, tid: int, cpus: Iterable[int]) -> bool:
    """The thread to the kernel's own care: SCHED_OTHER, these CPUs, not stopped.

    Tries every step whatever the ones before said; False where one failed for another reason
    than that the thread has ended. An ordinary user may not be allowed to leave SCHED_IDLE.
    """
    good = True
    for step in (
        lambda: os.sched_setscheduler(tid, os.SCHED_OTHER, os.sched_param(0)),
        lambda: os.sched_setaffinity(tid, cpus),
        lambda: os.kill(pid, signal.SIGCONT),
    ):
        try:
            step()
        except ProcessLookupError:
            return good
        except OSError:
            good = False
    return good


def start_ticks(pid: int) -> int | None:
    """When the process started (field 22 of /proc/pid/stat); with the pid it names a process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is a name in parentheses that may itself hold spaces and parentheses.
    return int(text[text.rindex(")") + 2:].split()[19])


def kill_exactly(pid: int, started: int, number: signal.Signals = signal.SIGKILL) -> int | None:
    """Signal this very process, never a stranger with its pid.

    Returns a pidfd (the caller's to close) to wait on, None where it has ended long ago.
    """
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    # The descriptor holds the process that has the pid *now*; if that one is ours, so is the fd.
    if start_ticks(pid) != started:
        os.close(fd)
        return None
    try:
        signal.pidfd_send_signal(fd, number)
    except ProcessLookupError:
        pass
    except OSError:
        os.close(fd)
        raise
    return fd


# ---- this process itself ----

_libc = ctypes.CDLL(None, use_errno=True)


def become_realtime(priority: int) -> str | None:
    """Take FIFO at this priority, or else the best nice value; the reason where it is not FIFO."""
    try:
        os.sched_setscheduler(
            0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(priority))
    except OSError as error:
        for nice in (-20, -10, -5):
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, 0, nice)
                break
        return explain_refusal("precise", error)
    return None


class _CapHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _CapData(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32),
                ("inheritable", ctypes.c_uint32))


def set_timer_slack(ns: int) -> None:
    """How much later than asked for this thread's sleeps may end."""
    _libc.prctl(29, ns, 0, 0, 0)                    # PR_SET_TIMERSLACK


def keep_capabilities(*wanted: int) -> None:
    """Drop every capability but these (all below 32); those not held stay not held."""
    header = _CapHeader(0x20080522, 0)              # _LINUX_CAPABILITY_VERSION_3
    data = (_CapData * 2)()
    if _libc.capget(ctypes.byref(header), data) != 0:
        raise OSError(ctypes.get_errno(), "capget failed")
    mask = sum(1 << capability for capability in wanted)
    data[0].permitted &= mask
    data[0].effective = data[0].permitted
    data[0].inheritable = 0
    data[1] = _CapData()
    if _libc.capset(ctypes.byref(header), data) != 0:
        raise OSError(ctypes.get_errno(), "capset failed")
    _libc.prctl(38, 1, 0, 0, 0)                     # PR_SET_NO_NEW_PRIVS


# ---- why not, and what to do ----

def _has_cap_sys_nice() -> bool:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> CAP_SYS_NICE & 1)
    return False


def _rt_runtime_file() -> Path | None:
    """cpu.rt_runtime_us of our cgroup where the kernel schedules real-time by groups (v1)."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _number, controllers, path = line.split(":", 2)
        if "cpu" in controllers.split(","):
            for mount in ("cpu", "cpu,cpuacct"):
                file = Path(f"/sys/fs/cgroup/{mount}{path}/cpu.rt_runtime_us")
                if file.exists():
                    return file
    return None


def explain_refusal(kind: str, error: OSError) -> str:
    """One sentence: what the kernel refused, why as far as can be seen, how to grant it."""
    if error.errno != errno.EPERM:
        return f"the kernel refused it: {error.strerror}"
    if kind == "precise":
        if not _has_cap_sys_nice():
            limit, _ = resource.getrlimit(resource.RLIMIT_RTPRIO)
            return (
                "real-time priorities are not permitted here (no CAP_SYS_NICE, and RLIMIT_RTPRIO"
                f" is {limit}): start the service as root, with AmbientCapabilities=CAP_SYS_NICE"
                " in its systemd unit, or with LimitRTPRIO=20")
        group = _rt_runtime_file()
        if group is not None and int(group.read_text()) == 0:
            return (
                "this kernel gives real-time by cpu cgroups (RT_GROUP_SCHED) and ours has none:"
                f" write 950000 to {group}, or run outside that cgroup")
        return "real-time priorities are refused although CAP_SYS_NICE is held (a seccomp filter?)"
    if kind == "gentle":
        limit, _ = resource.getrlimit(resource.RLIMIT_NICE)
        return (
            "leaving SCHED_IDLE is not permitted here (no CAP_SYS_NICE, and RLIMIT_NICE is"
            f" {limit}): start the service as root, with AmbientCapabilities=CAP_SYS_NICE in its"
            " systemd unit, or with LimitNICE=40")
    return f"the kernel refused it: {error.strerror}"
