"""The guard: gives every thread back when the supervisor cannot.

Purpose.  A VM thread left at a real-time priority, stopped or pinned would outlive its
supervisor: at worst it keeps a host CPU from everything else for ever. So a small process in a
session of its own, off the VMs' CPUs and above everything of ours in priority, watches the
supervisor in two ways: its pidfd (it died) and its heartbeat in the shared table (it is stuck;
a SIGSTOPped supervisor counts). When one of them fails it

1. sets `halt`, so that dispatchers leave by themselves, and kills them all the same;
2. gives every thread of the table back: SCHED_OTHER, all CPUs, SIGCONT;
3. if the supervisor is *dead*, kills the VMs' processes, so that nothing is left behind; if it
   is only stuck, leaves them running, says so in the table (`fired_ns`) and exits.

A heartbeat found stale is looked at once more after a moment, so that a host that was
suspended as a whole is not taken for a stuck supervisor.

Invariant: no process is signalled by its number alone; the start time in the table must fit.
Where it is poor: what the table does not name (a VM between its start and its admission) it
does not know; such a VM's control socket ends with the supervisor, which ends its worker.
"""

from __future__ import annotations

import os
import select
import signal
import time
from typing import Any, Final

from . import linux
from .shared import SLOT_FIELDS, Shared

__all__ = ["Slots", "fire", "main", "named_slots"]

LOOK_EVERY_S: Final = 0.1
SECOND_LOOK_S: Final = 0.15
DISPATCHER_DIES_WITHIN_MS: Final = 200

Slots = list[tuple[int, int, int]]     # pid, tid, start time


def named_slots(shared: Shared) -> Slots:
    """Every thread that the table names, whoever has it now."""
    found: Slots = []
    for slot in range(shared.get("used_slots")):
        base = shared.slot(slot)
        words = shared.words
        if words[base + SLOT_FIELDS["generation"]] and words[base + SLOT_FIELDS["pid"]] > 0:
            found.append((
                words[base + SLOT_FIELDS["pid"]], words[base + SLOT_FIELDS["tid"]],
                words[base + SLOT_FIELDS["start_ticks"]]))
    return found


def end_dispatchers(shared: Shared) -> None:
    """Kill them and see them dead: a living one could promote again what we gave back."""
    waiting: list[int] = []
    for index in range(shared.cpus):
        pid = shared.cpu_get(index, "pid")
        if pid > 0:
            fd = linux.kill_exactly(pid, shared.cpu_get(index, "start_ticks"))
            if fd is not None:
                waiting.append(fd)
    for fd in waiting:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.poll(DISPATCHER_DIES_WITHIN_MS)
        os.close(fd)


def fire(shared: Shared, home_cpus: tuple[int, ...], *, kill_vms: bool, now_ns: int) -> int:
    """Do all of the above; returns how many threads were given back."""
    shared.set("halt", 1)
    end_dispatchers(shared)
    given = 0
    slots = named_slots(shared)
    for pid, tid, started in slots:
        if linux.start_ticks(pid) == started:
            given += linux.give_back(pid, tid, home_cpus)
    if kill_vms:
        for pid, _tid, started in slots:
            fd = linux.kill_exactly(pid, started, signal.SIGKILL)
            if fd is not None:
                os.close(fd)
    shared.set("given_back", given)
    shared.set("fired_ns", now_ns)
    return given


def main(arguments: dict[str, Any], fds: list[int]) -> int:
    """The process: `arguments` {home_cpus, guard_cpus}, `fds` the table and the supervisor's pidfd.

    Ends with 3 after it fired; else the supervisor, when it leaves in good order, kills it.
    """
    shared = Shared(fds[0])
    supervisor = fds[1]
    home = tuple(arguments["home_cpus"])
    os.setsid()
    os.sched_setaffinity(0, arguments["guard_cpus"])
    linux.become_realtime(linux.GUARD_PRIORITY)
    linux.keep_capabilities(linux.CAP_SYS_NICE, linux.CAP_KILL)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    poll = select.poll()
    poll.register(supervisor, select.POLLIN)
    timeout_ns = shared.get("guard_timeout_ns")
    shared.set("guard_ready", 1)
    while True:
        if poll.poll(LOOK_EVERY_S * 1000):
            fire(shared, home, kill_vms=True, now_ns=time.monotonic_ns())
            return 3
        beat = shared.get("heartbeat_ns")
        if time.monotonic_ns() - beat > timeout_ns:
            if poll.poll(SECOND_LOOK_S * 1000) or shared.get("heartbeat_ns") != beat:
                continue
            fire(shared, home, kill_vms=False, now_ns=time.monotonic_ns())
            return 3


