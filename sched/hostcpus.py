"""Host CPUs come and go: hotplug, a cpuset that is changed under us, an affinity that somebody else sets.

Theory.  A host CPU is *usable* while the kernel has it online and our cpuset has it (`usable_cpus`); that is
read four times a second, for nobody sends word of a cpuset. The kernel never lets a thread stand still for it: when a
CPU goes it moves the threads that were pinned there to any other CPU of their cpuset, and a change of a
cpuset (v1, and v2 before 6.2) makes every thread's affinity the whole of it. So what is pinned has to be
looked at too, and put back: a dispatcher on a foreign CPU would freeze the wrong threads.

What follows from a CPU that goes: its dispatcher leaves, its vCPUs are nobody's, and the next plan places them
on what is left. A VM none of whose CPUs is left is treated as the kernel treats a thread: it runs on any of
the others until its own come back, and a warning says so (`cpus_left`). Reservations that no longer fit
are met in proportion (policy/entitlement.py) and warned of. When it comes back, so does a dispatcher.

Invariants.  Accounts go on: a vCPU keeps what it was charged and is owed. Only CPUs that were usable when we
began come and go; others are never used. If none is left, all are kept as they were: there is nowhere to go.

Clocks.  All of scheduling is on CLOCK_MONOTONIC, which stands still while the host is suspended, as schedstat
does, and does not follow the wall clock. A host that is itself a VM and was stopped sees a jump: no thread ran
in it, so none is charged, and entitlement is of what was received (ledger.py).

Where it is poor: up to a quarter of a second passes before a change is seen; new CPUs need a restart.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import trio

from ..vm.hosts.files import cpu_list, text
from .crew import Crew, Warn
from .planner import Planner
from .shared import NOBODY
from .table import Table

__all__ = ["HostCpus", "cpus_left", "usable_cpus"]

CHECK_S: Final = 0.25
GONE: Final = "host-cpus-gone"
HOMELESS: Final = "affinity-impossible"
UNMET: Final = "reservations-not-met"
TAKEN: Final = "affinity-changed"


def usable_cpus(root: Path = Path("/")) -> frozenset[int]:
    """The host CPUs that are online and in this process's cpuset; empty: it cannot be told."""
    online = frozenset(cpu_list(text(root / "sys/devices/system/cpu/online")))
    groups = text(root / "proc/self/cgroup")
    mounted = root / "sys/fs/cgroup"
    sets: list[str] = []
    for path in re.findall(r"^\d+:(?:[^:\n]*,)?cpuset(?:,[^:\n]*)?:(.*)$", groups, re.MULTILINE):
        folder = mounted / "cpuset" / path.lstrip("/")
        sets.append(text(folder / "cpuset.effective_cpus") or text(folder / "cpuset.cpus"))
    for path in re.findall(r"^0::(.*)$", groups, re.MULTILINE):
        sets.append(text(mounted / path.lstrip("/") / "cpuset.cpus.effective"))
    for listed in sets:
        allowed = frozenset(cpu_list(listed))
        if allowed:
            online = online & allowed if online else allowed
    return online


def cpus_left(wanted: frozenset[int], present: frozenset[int]) -> frozenset[int]:
    """Where a VM may run while only *present* are there: on its own, else on any, as the kernel has it."""
    return wanted & present or present


class HostCpus:
    """Watches the host CPUs *cpus*. usable: which are there now. plan: makes a plan. refused: the sentence that
    says why the reservations do not fit, None while they do.
    """

    def __init__(
        self, table: Table, crew: Crew, planner: Planner, cpus: Iterable[int], *,
        usable: Callable[[], frozenset[int]], refused: Callable[[], str | None],
        warn: Warn, unwarn: Callable[[str], None],
    ) -> None:
        self._table = table
        self._crew = crew
        self._planner = planner
        self._cpus = frozenset(cpus)
        self._usable = usable
        self._refused = refused
        self._warn = warn
        self._unwarn = unwarn
        self._known = usable() & self._cpus       # the others are judged by whether a pin succeeds
        self._mine = os.sched_getaffinity(0)
        self._odd: dict[int, int] = {}            # tid -> CPU that it was not pinned to at the last look
        self.present = self._cpus

    async def watch(self, plan: Callable[[], object]) -> None:
        """For ever. *plan*: an async function."""
        while True:
            await trio.sleep(CHECK_S)
            if self.look():
                await plan()                      # type: ignore[misc]
            self.tell()

    def look(self) -> bool:
        """Follow what changed since the last look; whether a plan is wanted."""
        now = self._usable()
        gone = self._known - now if now else frozenset[int]()
        present = self._cpus - gone - self._unpinnable()
        if not present:
            present = self.present                # nowhere to go
        changed = present != self.present
        if changed:
            self.present = present
            self._crew.follow_cpus(present)
            self._planner.follow_cpus(present)
            for vcpu in self._table:
                vcpu.at_kernel = None
            self._keep_off()
        self._put_back()
        return changed

    def _unpinnable(self) -> frozenset[int]:
        """CPUs whose dispatchers cannot be kept on them: gone, whatever the files say."""
        lost: set[int] = set()
        for host in self._crew.hosts.values():
            if host.process is None or host.absent:
                if host.cpu not in self.present and not _can_pin(host.cpu):
                    lost.add(host.cpu)
                continue
            try:
                if os.sched_getaffinity(host.process.pid) != {host.cpu}:
                    os.sched_setaffinity(host.process.pid, {host.cpu})
            except ProcessLookupError:
                continue
            except OSError:
                lost.add(host.cpu)
        return frozenset(lost)

    def _keep_off(self) -> None:
        """A cpuset that changed has put ourselves onto all of it."""
        wanted = self._mine & (self._usable() or self._mine)
        if wanted and os.sched_getaffinity(0) != wanted:
            with contextlib.suppress(OSError):
                os.sched_setaffinity(0, wanted)

    def _put_back(self) -> None:
        """vCPU threads whose affinity somebody else has changed."""
        if self._crew.floats:
            return
        odd: dict[int, int] = {}
        changed: list[str] = []
        for vcpu in self._table:
            have, tid = self._table.word(vcpu, "have_cpu"), vcpu.thread.tid
            if have == NOBODY or vcpu.leaving:
                continue
            try:
                if os.sched_getaffinity(tid) == {have}:
                    continue
                if self._odd.get(tid) != have:
                    odd[tid] = have               # perhaps its dispatcher is about to pin it
                    continue
                os.sched_setaffinity(tid, {have})
                changed.append(vcpu.vm)
            except OSError:
                continue                          # ended, or the CPU has just gone
        self._odd = odd
        if changed:
            self._crew.errors["affinity"] += len(changed)
            self._warn(
                TAKEN, "info",
                f"somebody else has changed the affinity of {', '.join(sorted(changed))}; it was put back",
                "use `mixvisor set NAME cpus=...` instead of taskset; a cpuset that was changed does it too, once")

    def tell(self) -> None:
        """What an operator should know of the CPUs that are not there."""
        gone = sorted(self._cpus - self.present)
        homeless = sorted({v.vm for v in self._table if not v.leaving and not v.cpus & self.present})
        refused = self._refused() if gone else None
        cpus = ", ".join(map(str, gone))
        for code, holds, severity, message, advice in (
            (GONE, bool(gone), "warning",
             f"host CPU {cpus} of [host] cpus is offline or was taken from this service's cpuset: its VMs share the"
             " others",
             "bring it back (/sys/devices/system/cpu/cpuN/online, cpuset.cpus), or take it out of [host] cpus"),
            (HOMELESS, bool(homeless), "warning",
             f"none of the host CPUs that {', '.join(homeless)} may use is there: it runs on the others meanwhile",
             "bring a CPU of theirs back, or let them use others: mixvisor set NAME cpus=all"),
            (UNMET, refused is not None, "warning",
             f"on the host CPUs that are left not all reservations hold; they are met in proportion. {refused}",
             "bring the CPU back, or lower a reservation: mixvisor set NAME reservation=N"),
        ):
            if holds:
                self._warn(code, severity, message, advice)    # type: ignore[arg-type]
            else:
                self._unwarn(code)


def _can_pin(cpu: int) -> bool:
    """Whether a thread of ours could be put on it now: tried with a call that changes nothing else."""
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, before | {cpu})
        able = cpu in os.sched_getaffinity(0)
        os.sched_setaffinity(0, before)
    except OSError:
        return False
    return able
