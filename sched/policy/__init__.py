"""Scheduling policies: pure decisions, the same in production, in tests and in the simulator.

Two levels (ARCHITECTURE.md): `entitle` and `place` are the slow one, for all host CPUs at once;
a policy's run queue is the fast one, for one host CPU. POLICIES names what a configuration can
ask for; whoever needs the parts of a policy asks it for them, and nobody else looks at names.

| policy | before placement | run queue | dispatch |
|---|---|---|---|
| fair | | Runqueue | ours |
| batch | | BatchRunqueue | ours |
| partition | Partition | BatchRunqueue, for where modes must meet | ours |
| kernel | | | the kernel's, by nice levels |

`ScriptedRunqueue` (scripted.py) is no policy: it stands in for one where an order is lent to a measurement.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from .batch import BATCH_NS, WAIT_MAX_NS, BatchRunqueue
from .entitlement import admit, entitle
from .fair import Runqueue, seed_of
from .partition import Partition, Split, Tenant, cores_of
from .placement import place
from .scripted import ScriptedRunqueue

__all__ = [
    "POLICIES",
    "BatchRunqueue",
    "Batching",
    "Order",
    "Partition",
    "Policy",
    "Runqueue",
    "ScriptedRunqueue",
    "Split",
    "Tenant",
    "admit",
    "cores_of",
    "entitle",
    "jain",
    "place",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batching:
    """How reluctantly modes change on a host CPU (policy/batch.py)."""

    batch_ns: int = BATCH_NS
    wait_max_ns: int = WAIT_MAX_NS
    budget_ns: int = 0

    @property
    def most_ns(self) -> int:
        """The most that B can come to: as given or for the budget, and never above half of W."""
        return min(max(self.batch_ns, self.budget_ns // 4), self.wait_max_ns // 2)

    @staticmethod
    def budget(loss_max: float, crossing_ns: int) -> int:
        """`budget_ns` of a loss of at most *loss_max* (a part, 0 = no such limit) at that cost."""
        return round(crossing_ns / loss_max) if loss_max > 0.0 else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """How far the order of slices is left to chance where modes meet (policy/fair.py)."""

    jitter_ns: int = 0             # 0: not at all
    seed: int = 1                  # same seed, same order

    @staticmethod
    def jitter(random_order: int, slice_ns: int) -> int:
        """`jitter_ns` of so many percent of a slice."""
        return random_order * slice_ns // 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """A policy's parts."""

    name: str
    about: str
    dispatches: bool = True        # False: the kernel picks and places, weights are nice levels
    batches: bool = False          # its run queues know modes
    partitions: bool = False       # host CPUs are given to modes

    def runqueue(
        self, slice_ns: int, ratelimit_ns: int, batching: Batching | None = None, order: Order | None = None,
        cpu: int = 0,
    ) -> Runqueue:
        """A host CPU's run queue under this policy."""
        order = order or Order()
        seed = seed_of(order.seed, cpu)
        if not self.batches:
            return Runqueue(slice_ns, ratelimit_ns, jitter_ns=order.jitter_ns, seed=seed)
        b = batching or Batching()
        return BatchRunqueue(
            slice_ns, ratelimit_ns, batch_ns=b.batch_ns, wait_max_ns=b.wait_max_ns,
            budget_ns=b.budget_ns, jitter_ns=order.jitter_ns, seed=seed)


POLICIES: Final[Mapping[str, Policy]] = MappingProxyType({policy.name: policy for policy in (
    Policy(name="fair", about="CPU time in proportion to weight, over all host CPUs"),
    Policy(name="batch", batches=True,
           about="fair over long times; a host CPU changes between modes as rarely as allowed"),
    Policy(name="partition", batches=True, partitions=True,
           about="host CPUs are given to modes by demand, so that modes meet on none"),
    Policy(name="kernel", dispatches=False,
           about="weights as nice levels, the kernel does the rest: a baseline to compare with"),
)})


def jain(values: Iterable[float]) -> float:
    """Jain's fairness index of *values* (received / entitled): 1 all equal, 1/n one has all.

    No values, or none above zero, is equality: 1. Source: Jain, Chiu and Hawe, DEC-TR-301, 1984.
    """
    items = list(values)
    squares = sum(value * value for value in items)
    return sum(items) ** 2 / (len(items) * squares) if squares > 0.0 else 1.0
