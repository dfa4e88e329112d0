"""The policy `kernel`: what our weights are to the kernel, and nothing else (policy/kernel.py).

Under it every thread is SCHED_OTHER, may run on all CPUs of its affinity, and has the nice level
of its weight. Dispatchers only read the accounts. Each level and affinity is set once, and again
where somebody has given the thread back meanwhile; `withdraw` leaves nothing of it.

A nice level below 0 (a weight over 100) needs CAP_SYS_NICE or RLIMIT_NICE, and so does going
back to 0; where it is refused the thread stays at the level it has, and that is said once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Final

from .crew import Warn
from .policy.kernel import nice_of
from .table import Table, Vcpu

__all__ = ["Baseline"]

REFUSED: Final = "nice-refused"
NOT_HELD: Final = "caps-not-held"


class Baseline:
    """cpus: the host CPUs that VMs may use."""

    def __init__(
        self, table: Table, cpus: Sequence[int], warn: Warn, unwarn: Callable[[str], None],
    ) -> None:
        self._table = table
        self.cpus = frozenset(cpus)           # that are there
        self._warn = warn
        self._unwarn = unwarn

    def apply(self) -> None:
        """Every vCPU as its weight and affinity say now."""
        for vcpu in self._table:
            if vcpu.leaving:
                continue
            wish = nice_of(vcpu.weight), vcpu.cpus & self.cpus or self.cpus
            if vcpu.at_kernel != wish:
                vcpu.at_kernel = wish
                self._set(vcpu, *wish)
        limited = sorted({v.vm for v in self._table if v.cap or v.reservation})
        if limited:
            self._warn(
                NOT_HELD, "info",
                f"the policy kernel knows weights only: caps and reservations of {', '.join(limited)}"
                " do not hold", "choose another policy where they must hold")
        else:
            self._unwarn(NOT_HELD)

    def withdraw(self) -> None:
        """Nice 0 for everybody; dispatchers see to affinity."""
        self._unwarn(REFUSED)
        self._unwarn(NOT_HELD)
        for vcpu in self._table:
            if vcpu.at_kernel is not None:
                self._set(vcpu, 0, self.cpus & vcpu.cpus or self.cpus)
                vcpu.at_kernel = None

    def _set(self, vcpu: Vcpu, nice: int, cpus: frozenset[int]) -> None:
        tid = vcpu.thread.tid
        try:
            os.sched_setaffinity(tid, cpus)
            if os.getpriority(os.PRIO_PROCESS, tid) != nice:
                os.setpriority(os.PRIO_PROCESS, tid, nice)
        except ProcessLookupError:
            return                           # it has ended; whoever waits for it will tell
        except PermissionError:
            self._warn(
                REFUSED, "warning",
                f"the kernel refuses nice {nice} for VM {vcpu.vm!r}: under the policy kernel its"
                f" weight of {vcpu.weight} does not hold",
                "run the service as root, with AmbientCapabilities=CAP_SYS_NICE or LimitNICE=40 in"
                " its systemd unit, or choose weights of at most 100")
