"""What would have been fair: the judge of every policy, who knows afterwards what each VM asked for.

Theory.  A VM that sleeps takes what it wants, up to its share; what it left is to be divided among
those that always want more. So, interval by interval, entitlements are computed once more in
hindsight (policy/entitlement.py), with what each sleeper received as its ceiling and what all
host CPUs gave to VMs or left idle as the capacity. That is owed to the others, whoever scheduled them:
a policy is not judged by its own books.

A sleeper is judged by its waits alone: that it received little may be all that it wanted.

Units: ns; shares in host CPUs. Where it is poor: within an interval (a second) it sees totals only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..model import VmDemand
from ..policy import jain
from ..policy.entitlement import entitle

__all__ = ["Judge"]

_LEAST = 1e-9          # as a cap, 0 would mean none


class Judge:
    """demands: of all VMs, one vCPU each; hungry: whether each never sleeps."""

    def __init__(self, demands: Sequence[VmDemand], hungry: Sequence[bool], cpus: int) -> None:
        self._demands = demands
        self._hungry = [number for number, always in enumerate(hungry) if always]
        self._sleepers = [number for number, always in enumerate(hungry) if not always]
        self._cpus = cpus
        self._seen = [0] * len(demands)
        self._taken = 0
        self._at = 0
        self.due_ns = [0.0] * len(demands)         # owed in hindsight, so far
        self.lag_most_ns = 0.0

    def look(self, now: int, received: Sequence[int], taken: int) -> None:
        """received: by each VM, ever; taken: by decisions, of all host CPUs, ever."""
        passed = now - self._at
        if passed <= 0:
            return
        got = [new - old for new, old in zip(received, self._seen, strict=True)]
        # Each host CPU counts as much as it could give to VMs.
        unit = passed - (taken - self._taken) / self._cpus
        demands = list(self._demands)
        for number in self._hungry:
            demand = demands[number]
            scale = passed / unit
            demands[number] = replace(demand, cap=demand.cap * scale, reservation=demand.reservation * scale)
        for number in self._sleepers:
            demands[number] = replace(demands[number], cap=max(got[number] / unit, _LEAST), reservation=0.0)
        shares = entitle(demands, range(self._cpus))
        for number, share in enumerate(shares.values()):
            self.due_ns[number] += share * unit
        for number in self._hungry:
            self.lag_most_ns = max(self.lag_most_ns, abs(self.due_ns[number] - received[number]))
        self._at, self._seen, self._taken = now, list(received), taken

    def errors_ns(self) -> list[float]:
        """received - due of each VM that never sleeps."""
        return [self._seen[number] - self.due_ns[number] for number in self._hungry]

    def fairness(self) -> float | None:
        """Jain's index of received over due; None with fewer than two VMs that never sleep."""
        ratios = [self._seen[n] / self.due_ns[n] for n in self._hungry if self.due_ns[n] > 0.0]
        return jain(ratios) if len(ratios) > 1 else None
