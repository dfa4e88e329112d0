"""Where the kernel would put threads, for the policy `kernel`: a rough model of its load balancer.

Theory.  Three things of kernel/sched/fair.c: a thread that wakes goes back to its last CPU if that
idles, else to one that does (select_idle_sibling); a CPU that falls idle takes a waiting thread
from the most loaded (newidle balance); and every BALANCE_NS the most loaded CPU gives threads to
the least loaded as long as that evens the two out and they differ by IMBALANCE (load_balance). Load is
the sum of the weights of those that want to run.

Where it is poor: no caches, no domains, no cost of moving, and the kernel looks at decaying averages;
read what it says of shares as what the kernel may do, not what it will.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from .machine import Cpu, Machine, Thread

__all__ = ["Balancer"]

BALANCE_NS: Final = 8_000_000
IMBALANCE: Final = 1.17            # imbalance_pct of the usual domains


class Balancer:
    """allowed: by slot, the host CPUs that a thread may use."""

    def __init__(self, machine: Machine, allowed: Sequence[frozenset[int]]) -> None:
        self._machine = machine
        self._allowed = allowed
        self.moves = 0
        for thread in machine.threads:
            options = [machine.cpus[number] for number in sorted(allowed[thread.slot])]
            machine.move(thread, min(options, key=_all_of).number)
        machine.post(BALANCE_NS, self._balance)

    def wakes(self, thread: Thread) -> None:
        """Move a thread that wakes, if there is a better place."""
        if thread.cpu is not None and thread.cpu.running is None:
            return
        for number in sorted(self._allowed[thread.slot]):
            if self._machine.cpus[number].running is None:
                self._move(thread, number)
                return

    def idles(self, cpu: Cpu) -> Thread | None:
        """A thread that now waits for `cpu` and waited for another; the caller lets it run."""
        donors = sorted(
            (c for c in self._machine.cpus if c is not cpu and c.running is not None),
            key=lambda c: (-_load(c), c.number))
        for donor in donors:
            for thread in donor.ready:
                if thread is not donor.running and cpu.number in self._allowed[thread.slot]:
                    self._move(thread, cpu.number)
                    return thread
        return None

    def _balance(self, _argument: int) -> None:
        machine = self._machine
        machine.post(machine.now + BALANCE_NS, self._balance)
        cpus = sorted(machine.cpus, key=lambda c: (_load(c), c.number))
        low, high = 0, len(cpus) - 1
        while low < high:
            poor, rich = cpus[low], cpus[high]
            if _load(rich) <= _load(poor) * IMBALANCE:
                return
            for thread in list(rich.ready):
                less = _load(rich) - _load(poor)
                if (thread is not rich.running and thread.weight < less
                        and poor.number in self._allowed[thread.slot]):
                    self._move(thread, poor.number)
            if poor.dirty:
                machine.settle(poor)
                machine.choose(poor)
            low, high = low + 1, high - 1

    def _move(self, thread: Thread, number: int) -> None:
        self._machine.settle(self._machine.cpus[number])
        self._machine.move(thread, number)
        self.moves += 1


def _load(cpu: Cpu) -> float:
    return sum(thread.weight for thread in cpu.ready)


def _all_of(cpu: Cpu) -> tuple[float, int]:
    return sum(thread.weight for thread in cpu.threads), cpu.number
