"""The accounts of the vCPUs: what each was entitled to, what it received, what it is owed.

Entitlement.  A VM is entitled to its share *of what the VMs got together*: CPU time that the
host's other work took is nobody's debt. So entitled and received add up to the same, and lag
has no drift. It accrues only while the VM competes, and up to the end of the last slice of its host CPU: what the
slice that runs now gives, nobody knows yet. VMs that lend their time to a measurement
(loan.py) are entitled to theirs together; among them each to what the script gave it.

Lag.  A placement cannot give everybody what it is due in each of its periods, so on several host CPUs a vCPU may be
owed, or ahead by, two periods besides what its run queue lets it come to; that is fed back (planner.py), less what
its run queue owes it (`local_lag_ns`): that is a matter of whose turn it is, and no matter of its place. One that
sleeps is owed no more than on one CPU, and a debt wears off in its sleep, as in its run queue.

Readings come from the shared table, where dispatchers leave totals; nothing here is lost when a
dispatcher is replaced or the policy changes. Where it is poor: figures are as old as the last
account (a tenth of a second, or the last plan).
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from typing import Final

from .accounts import VcpuFigures, fairness
from .model import LATENCIES
from .policy.fair import CLASSES
from .shared import NOBODY
from .table import Table, Vcpu

__all__ = ["Ledger"]

WINDOW: Final = 20                 # accounts that the fairness index looks back over: 2 s
HALF_NS: Final = 300_000_000       # after so long a reading of what host CPUs give counts half
PERIODS: Final = 2                 # of the placement: what one may be owed for having been on a crowded host CPU
AWHILE_NS: Final = 1_000_000       # of sleep since the last account: less is how exactly it is known
READINGS: Final = 3                # of the table at most, until one was not disturbed
READ: Final = ("owned_generation", "charged_ns", "first_run_ns", "awake", "awake_since_ns", "awake_ns", "have_cpu",
               "lag_ns")
TICK_NS: Final = 5_000_000         # how old the kernel's figure for a running thread may be


class Ledger:
    """slice_ns, batch_ns: a lag is clamped to what the policy lets it come to, in both directions: a slice, the credit
    of its latency class, where modes are batched twice what a mode may be owed (policy/batch.py), and over several
    host CPUs what the placement may. What is clamped off is forgotten, so a narrower clamp would forgive that.
    """

    def __init__(self, table: Table, slice_ns: int, batch_ns: int = 0) -> None:
        self._table = table
        self.slice_ns = slice_ns
        self.batch_ns = batch_ns
        self._accounted_ns = 0
        self._wanted_ns = self._given_ns = 0.0     # of late: entitlements, and what was received of them
        self._unspent_ns = 0.0           # received by VMs and not yet accrued to anybody, or (< 0) the other way
        self._window: deque[dict[int, tuple[int, float]]] = deque(maxlen=WINDOW)

    def account(self, now: int, period_ns: int = 0) -> None:
        """Bill what was received, accrue what was due. Idempotent.

        *period_ns*: of the placement, 0 where there is none of ours.
        """
        table = self._table
        until_of, (owned, charged, first_run, awake_word, awake_since, awake_sum, haves, lags) = self._read()
        due: list[tuple[Vcpu, float, int]] = []
        slept: list[int] = []
        elapsed, self._accounted_ns = now - self._accounted_ns, now
        for vcpu in table:
            slot = vcpu.slot
            if owned[slot] != vcpu.generation:
                continue
            run = charged[slot] - first_run[slot]
            until = max(vcpu.seen_until, min(now, until_of.get(haves[slot], now)))
            went_by, vcpu.seen_until = until - (vcpu.seen_until or until), until
            vcpu.local_lag_ns = lags[slot]
            awake = awake_sum[slot]
            if awake_word[slot]:
                awake += max(0, until - awake_since[slot])
            # Read in the midst of a change the sum may step back for once: not below what was.
            passed = max(0, awake - vcpu.seen_awake)
            vcpu.seen_awake += passed
            received = max(0, run - vcpu.seen_run)
            vcpu.seen_run += received
            due.append((vcpu, vcpu.share * passed, received))
            slept.append(went_by - passed)
        due = _among_lenders(due)
        wanted = sum(entitled for _vcpu, entitled, _received in due)
        slice_ns = float(self.slice_ns)
        limits = {name: slice_ns * (1.0 + one.credit) + 2.0 * self.batch_ns
                  for name, one in zip(LATENCIES, CLASSES, strict=True)}
        # What one CPU withholds is everybody's loss, and bills come CPU by CPU: so the part of entitlements that is
        # received is that of the last while, and what it leaves over or lacks is carried.
        given = sum(received for _vcpu, _entitled, received in due)
        kept = 0.5 ** (elapsed / HALF_NS)
        self._wanted_ns = self._wanted_ns * kept + wanted
        self._given_ns = self._given_ns * kept + given
        scale = 0.0
        if self._wanted_ns:
            scale = max(0.0, min(1.0, (self._given_ns + self._unspent_ns) / self._wanted_ns))
        most = 4 * slice_ns * len(until_of)
        self._unspent_ns = max(-most, min(self._unspent_ns + given - wanted * scale, most))
        spread = PERIODS * period_ns if len(until_of) > 1 else 0
        for (vcpu, entitled, received), asleep in zip(due, slept, strict=True):
            vcpu.entitled_ns += entitled * scale
            limit = limits[vcpu.latency]
            vcpu.drift_ns += entitled * scale - received
            lag = vcpu.lag_ns + entitled * scale - received
            # Asleep it is no longer owed what its place made it miss, and a debt wears off.
            if asleep > 0 and lag < 0.0:
                lag = min(0.0, lag + vcpu.nominal * asleep)
            vcpu.lag_ns = max(-limit - spread, min(limit + (0.0 if asleep > AWHILE_NS else spread), lag))

    def _read(self) -> tuple[dict[int, int], list[list[int]]]:
        """Up to when what was received is known, by host CPU, and the columns READ: of one moment, in that no slice
        ended in the midst of it.
        """
        table = self._table
        assert table.shared is not None
        for _ in range(READINGS - 1):
            until_of, columns = table.shared.billed(), [table.column(name) for name in READ]
            if table.shared.billed() == until_of:
                return until_of, columns
        return table.shared.billed(), [table.column(name) for name in READ]

    def remember(self) -> None:
        """One more point of the window that `fairness` looks back over."""
        self._window.append(
            {v.generation: (v.seen_run, v.entitled_ns) for v in self._table})

    def fairness(self) -> float | None:
        """Jain's index of received over entitled in the last two seconds."""
        if len(self._window) < 2:
            return None
        old, new = self._window[0], self._window[-1]
        both = [key for key in new if key in old]
        return fairness([new[key][0] - old[key][0] for key in both],
                        [round(new[key][1] - old[key][1]) for key in both])

    def read_proc(self, vcpu: Vcpu) -> None:
        """What only /proc tells: waiting time, and how much other threads of the VM ran."""
        thread = vcpu.thread
        try:
            run, wait, _count = map(int, os.pread(vcpu.stat_fd, 96, 0).split())
            several = os.stat(f"/proc/{thread.pid}/task").st_nlink > 3
        except (OSError, ValueError):
            return               # it has ended; the last figures stand
        vcpu.wait_ns = wait
        if several and thread.pid == thread.tid and not thread.siblings:
            # A running thread's figure may be old, which must not look like emulator time.
            emulator = self._table.word(vcpu, "charged_ns") - run - TICK_NS
            vcpu.emulator_ns = max(vcpu.emulator_ns, emulator)

    def figures(self, vcpu: Vcpu) -> VcpuFigures:
        table = self._table
        owned = table.is_owned(vcpu)
        have = table.word(vcpu, "have_cpu")
        read: Callable[[str], int] = lambda name: table.word(vcpu, name) if owned else 0  # noqa: E731
        return VcpuFigures(
            vm=vcpu.vm, index=vcpu.thread.index, cpu=have if have != NOBODY else None,
            # As of the last account, as the entitlement beside it.
            run_ns=vcpu.seen_run,
            wait_ns=vcpu.wait_ns, entitled_ns=round(vcpu.entitled_ns), entitled_share=vcpu.share,
            lag_ns=round(vcpu.lag_ns), leak_ns=read("leak_ns"), emulator_ns=vcpu.emulator_ns,
            capped_ns=read("capped_ns"),
            slices=read("slices"), migrations=read("migrations"), awake=bool(read("awake")),
            paused=vcpu.paused)


def _among_lenders(due: list[tuple[Vcpu, float, int]]) -> list[tuple[Vcpu, float, int]]:
    """What lenders are due together, divided as they received it."""
    lent = [(entitled, received) for vcpu, entitled, received in due if vcpu.lent]
    together = sum(received for _entitled, received in lent)
    if not together:
        return due
    each = sum(entitled for entitled, _received in lent) / together
    return [(vcpu, received * each if vcpu.lent else entitled, received) for vcpu, entitled, received in due]
