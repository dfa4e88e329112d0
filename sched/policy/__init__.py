"""Scheduling policies: pure decisions, the same in production, in tests and in the simulator.

Two levels (ARCHITECTURE.md): `entitle` and `place` are the slow one, for all host CPUs at once;
a policy's run queue is the fast one, for one host CPU. POLICIES names the run queues that a
configuration can ask for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final

from .entitlement import admit, entitle
from .fair import Runqueue
from .placement import place

__all__ = ["POLICIES", "Runqueue", "admit", "entitle", "jain", "place"]

POLICIES: Final[Mapping[str, type[Runqueue]]] = MappingProxyType({"fair": Runqueue})


def jain(values: Iterable[float]) -> float:
    """Jain's fairness index of *values* (received / entitled): 1 all equal, 1/n one has all.

    No values, or none above zero, is equality: 1. Source: Jain, Chiu and Hawe, DEC-TR-301, 1984.
    """
    items = list(values)
    squares = sum(value * value for value in items)
    return sum(items) ** 2 / (len(items) * squares) if squares > 0.0 else 1.0
