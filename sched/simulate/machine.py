"""The simulated host: CPUs, the threads of VMs, and the part of Linux that a dispatcher commands.

Theory.  A discrete-event model in whole nanoseconds. A host CPU runs, of the threads pinned to it
that want to run and are not stopped, the one that Linux would: real-time before SCHED_OTHER
before SCHED_IDLE, by priority, first come first served within one (sched(7): who is preempted
stays at the head, a raised priority goes to the tail, a lowered one to the head). Where several
share SCHED_OTHER it is a run queue of the fair policy, which is EEVDF as the kernel's is, with the
kernel's slice. What the production dispatcher calls is `SimulatedKernel`; what it reads is exact,
as on a real host, because its CPU stands still meanwhile.

Costs.  A VM that takes over a CPU from another VM first loses the work of a switch, and more if
the other was of the other mode; that time is charged to it as run time, as on a real host, and
summed apart. A decision takes the CPU from the VMs for as long as it lasts.

Behaviour.  A thread runs and sleeps in spans: run spans are CPU time (lost work prolongs them),
sleeps are wall time. Each VM draws from a generator of its own, so that under every policy the
same VM asks for the same.

Where it is poor: no caches, no interrupts, no other work on the host; a signal stops at once.
"""

from __future__ import annotations

import heapq
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from operator import attrgetter
from typing import Final, NamedTuple, Protocol

from ...vm.worker.status import FIELDS, Phase
from ..model import Slot
from ..policy.fair import Runqueue
from .figures import Waits

__all__ = ["FOREVER", "Costs", "Cpu", "Machine", "SimulatedKernel", "Span", "Spans", "Thread", "sampled", "scripted"]

FOREVER: Final = 1 << 60
KERNEL_SLICE_NS: Final = 3_000_000         # EEVDF's base slice on a host of several CPUs
_CLASS: Final = {os.SCHED_FIFO: 200, os.SCHED_OTHER: 100, os.SCHED_IDLE: 0}
_OTHER: Final = _CLASS[os.SCHED_OTHER]
_PHASE: Final = FIELDS["phase"]
_PAGE_BYTES: Final = 64                    # as much of a status page as anybody reads

Spans = Iterator[tuple[int, int]]          # (run, sleep) in ns, without end


class Span(NamedTuple):
    """A VM had a CPU from `start_ns` to `end_ns`."""

    cpu: int
    start_ns: int
    end_ns: int
    thread: Thread


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """In ns; pairs are (software, hardware): of the VM that takes over."""

    switch_ns: tuple[int, int] = (15_000, 49_000)
    mixed_ns: tuple[int, int] = (16_000, 16_000)
    dispatcher_ns: int = 60_000
    late_ns: int = 24_000                  # median


def sampled(rng: random.Random, run_ns: int, sleep_ns: int) -> Spans:
    """Exponentially distributed spans with these means, at least 1 µs."""
    draw = rng.expovariate
    while True:
        yield max(1000, int(draw(1 / run_ns))), max(1000, int(draw(1 / sleep_ns)))


def scripted(script: Sequence[tuple[int, int]]) -> Spans:
    return cycle(script)


class Thread:
    """A vCPU's thread. `spans` None: it never sleeps. `first_wake_ns`: asleep until then."""

    __slots__ = (
        "cpu", "first_wake_ns", "left", "lost_mixed_ns", "lost_switch_ns", "mode", "name", "page", "ran", "rank",
        "ready", "ready_since", "seq", "sleep_ns", "slot", "spans", "stopped", "waits", "wakes", "wants", "weight",
        "woke",
    )

    def __init__(
        self, slot: int, name: str, mode: int, *, weight: float = 100, spans: Spans | None = None,
        first_wake_ns: int = 0,
    ) -> None:
        self.slot = slot
        self.name = name
        self.mode = mode
        self.weight = weight
        self.spans = spans
        self.first_wake_ns = first_wake_ns
        self.cpu: Cpu | None = None
        self.page = memoryview(bytearray(_PAGE_BYTES)).cast("Q")
        self.ran = 0                       # CPU time received, ever
        self.left = FOREVER                # CPU time until it sleeps
        self.sleep_ns = 0                  # how long it will
        self.wants = self.ready = first_wake_ns == 0
        self.stopped = False
        self.rank = _OTHER
        self.seq = 0
        self.ready_since = 0
        self.woke = False                  # it waits since it woke
        self.waits = Waits()
        self.wakes = Waits()
        self.lost_switch_ns = self.lost_mixed_ns = 0
        self.next_span()
        self.page[_PHASE] = Phase.RUNNING if self.wants else Phase.SLEEPING

    def next_span(self) -> None:
        if self.spans is not None:
            self.left, self.sleep_ns = next(self.spans)


@dataclass(slots=True, eq=False)
class Cpu:
    """One host CPU. Its dispatcher has it until `since` when that lies ahead."""

    number: int
    threads: list[Thread] = field(default_factory=list)
    ready: list[Thread] = field(default_factory=list)      # those of them that want to run and may
    running: Thread | None = None
    last: Thread | None = None             # the last to run
    since: int = 0                         # up to when all is accounted
    version: int = 0                       # of `running`: an event of an earlier one is stale
    dirty: bool = False                    # a level changed: who runs may too
    fair: Runqueue | None = None           # where the kernel alone schedules
    span_start: int = 0
    idle_ns: int = 0
    dispatcher_ns: int = 0
    mode_ns: list[int] = field(default_factory=lambda: [0, 0])
    vm_switches: int = 0
    mode_switches: int = 0


class Balance(Protocol):
    """What places threads where no dispatcher does (balancer.py)."""

    def wakes(self, thread: Thread) -> None: ...
    def idles(self, cpu: Cpu) -> Thread | None: ...


class Machine:
    """All CPUs, and the queue of what happens next. `now` only ever grows."""

    def __init__(self, cpus: int, costs: Costs, *, kernel_alone: bool = False) -> None:
        """kernel_alone: no dispatcher will come, threads are moved by what sets `balancer`."""
        self.now = 0
        self.costs = costs
        self.cpus = [Cpu(number) for number in range(cpus)]
        self.threads: list[Thread] = []
        self.spans: list[Span] | None = None       # recorded while it is a list
        self.balancer: Balance | None = None
        self._events: list[tuple[int, int, Callable[[int], None], int]] = []
        self._number = 0
        self._seq = 0
        if kernel_alone:
            for cpu in self.cpus:
                # EEVDF's RUN_TO_PARITY: who was chosen keeps the CPU for its slice.
                cpu.fair = Runqueue(KERNEL_SLICE_NS, KERNEL_SLICE_NS)

    # -- time --------------------------------------------------------------------------------

    def post(self, at: int, what: Callable[[int], None], argument: int = 0) -> None:
        """Call `what(argument)` when it is `at`; in the order of posting at one moment."""
        self._number += 1
        heapq.heappush(self._events, (at, self._number, what, argument))

    def run(self, until: int) -> None:
        """Let everything happen that is due before `until`; then it is `until`."""
        events, pop = self._events, heapq.heappop
        while events and events[0][0] < until:
            self.now, _, what, argument = pop(events)
            what(argument)
        self.now = until
        for cpu in self.cpus:
            self.settle(cpu)

    def add(self, thread: Thread) -> None:
        assert thread.slot == len(self.threads), "threads are known by their slots, in order"
        self.threads.append(thread)
        if not thread.wants:
            self.post(thread.first_wake_ns, self._wake, thread.slot)

    # -- who runs ----------------------------------------------------------------------------

    def settle(self, cpu: Cpu) -> None:
        """Account for the time up to now; a thread whose span is over falls asleep."""
        passed = self.now - cpu.since
        if passed <= 0:
            return
        cpu.since = self.now
        thread = cpu.running
        if cpu.fair is not None:
            cpu.fair.advance(passed)
        if thread is None:
            cpu.idle_ns += passed
            return
        thread.ran += passed
        cpu.mode_ns[thread.mode] += passed
        if cpu.fair is not None:
            cpu.fair.charge(Slot(thread.slot), passed)
        thread.left -= passed
        if thread.left <= 0:
            self.post(self.now + thread.sleep_ns, self._wake, thread.slot)
            thread.next_span()
            thread.wants = thread.ready = False
            cpu.ready.remove(thread)
            thread.page[_PHASE] = Phase.SLEEPING
            if cpu.fair is not None:
                cpu.fair.sleep(Slot(thread.slot))
            cpu.dirty = True

    def decided(self, cpu: Cpu, took_ns: int) -> None:
        """The dispatcher had the CPU for so long, and may have changed who runs."""
        cpu.since = max(cpu.since, self.now) + took_ns
        cpu.dispatcher_ns += took_ns
        if cpu.dirty:
            self.choose(cpu)

    def choose(self, cpu: Cpu) -> None:
        """Give the CPU to whoever Linux would; the time up to now is accounted for."""
        cpu.dirty = False
        best: Thread | None = None
        if cpu.fair is not None:
            now = cpu.running
            slot = cpu.fair.pick(Slot(now.slot) if now is not None and now.ready else None)
            if slot is not None:
                best = self.threads[slot]
            elif self.balancer is not None and (best := self.balancer.idles(cpu)) is not None:
                cpu.dirty = False
                cpu.fair.pick(None)
        else:
            highest = -1
            for thread in cpu.ready:
                rank = thread.rank
                if rank > highest or (rank == highest and best is not None and thread.seq < best.seq):
                    best, highest = thread, rank
        old = cpu.running
        if best is old and best is not None:
            if cpu.fair is not None:
                cpu.version += 1
                self._expect(cpu)
            return
        start = max(self.now, cpu.since)
        if old is not None:
            if old.wants:
                old.ready_since, old.woke = self.now, False
            if self.spans is not None and self.now > cpu.span_start:
                self.spans.append(Span(cpu.number, cpu.span_start, self.now, old))
        cpu.running, cpu.span_start = best, start
        cpu.version += 1
        if best is None:
            return
        waited = start - best.ready_since
        best.waits.add(waited)
        if best.woke:
            best.wakes.add(waited)
            best.woke = False
        if cpu.last is not best:
            if cpu.last is not None:
                self._switch(cpu, cpu.last, best)
            cpu.last = best
        if best.left < FOREVER >> 1 or cpu.fair is not None:
            self._expect(cpu)

    def close_spans(self) -> None:
        """End what runs now, and record no more."""
        for cpu in self.cpus:
            if self.spans is not None and cpu.running is not None and self.now > cpu.span_start:
                self.spans.append(Span(cpu.number, cpu.span_start, self.now, cpu.running))

    def _switch(self, cpu: Cpu, old: Thread, new: Thread) -> None:
        cpu.vm_switches += 1
        lost = self.costs.switch_ns[new.mode]
        new.lost_switch_ns += lost
        if old.mode != new.mode:
            cpu.mode_switches += 1
            mixed = self.costs.mixed_ns[new.mode]
            new.lost_mixed_ns += mixed
            lost += mixed
        if new.spans is not None:
            new.left += lost

    def _expect(self, cpu: Cpu) -> None:
        """An event for the moment when what runs now has to be looked at again."""
        thread = cpu.running
        assert thread is not None
        span = thread.left
        if cpu.fair is not None:
            span = min(span, KERNEL_SLICE_NS)
        # Versions count up to far fewer than this.
        self.post(cpu.since + span, self._over, cpu.number + (cpu.version << 16))

    def _over(self, key: int) -> None:
        cpu = self.cpus[key & 0xFFFF]
        if cpu.version != key >> 16:
            return
        self.settle(cpu)
        if cpu.dirty or cpu.fair is not None:
            self.choose(cpu)
        elif cpu.running is not None:
            self._expect(cpu)              # the dispatcher had some of the time

    def _wake(self, slot: int) -> None:
        thread = self.threads[slot]
        thread.wants = True
        self._set_ready(thread)
        thread.page[_PHASE] = Phase.RUNNING
        thread.ready_since, thread.woke = self.now, True
        self._seq += 1
        thread.seq = self._seq
        if self.balancer is not None:
            self.balancer.wakes(thread)
        cpu = thread.cpu
        if cpu is not None:
            self.settle(cpu)
            if cpu.fair is not None:
                cpu.fair.wake(Slot(slot))
            self.choose(cpu)

    # -- what the dispatcher commands --------------------------------------------------------

    def set_rank(self, thread: Thread, rank: int) -> None:
        self._seq += 1
        # sched(7): lowered goes to the head of its new list, raised to the tail.
        thread.seq = -self._seq if rank < thread.rank else self._seq
        thread.rank = rank
        if thread.cpu is not None:
            thread.cpu.dirty = True

    def _set_ready(self, thread: Thread) -> None:
        ready = thread.wants and not thread.stopped
        if ready != thread.ready:
            thread.ready = ready
            if thread.cpu is not None:
                (thread.cpu.ready.append if ready else thread.cpu.ready.remove)(thread)

    def set_stopped(self, thread: Thread, stopped: bool) -> None:
        thread.stopped = stopped
        self._set_ready(thread)
        if thread.cpu is not None:
            thread.cpu.dirty = True

    def move(self, thread: Thread, number: int) -> None:
        old, new = thread.cpu, self.cpus[number]
        if old is new:
            return
        slot = Slot(thread.slot)
        lag = 0
        if old is not None:
            self.settle(old)
            if old.fair is not None:
                lag = old.fair.remove(slot)
            old.threads.remove(thread)
            if thread.ready:
                old.ready.remove(thread)
            self.choose(old)
        thread.cpu = new
        new.threads.append(thread)
        if thread.ready:
            new.ready.append(thread)
        if new.fair is not None:
            new.fair.add(slot, thread.weight / 100, lag)
            if not thread.wants:
                new.fair.sleep(slot)
        new.dirty = True


_ran = attrgetter("ran")


class _Clock:
    __slots__ = ("read",)

    def __init__(self, thread: Thread) -> None:
        self.read: Callable[[], int] = partial(_ran, thread)

    def close(self) -> None:
        """Nothing is held."""


class SimulatedKernel:
    """sched/linux.py's Kernel over a machine; pid and tid are slots."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._threads = machine.threads

    def run_clock(self, pid: int, tid: int, *, alone: bool = True) -> _Clock:
        return _Clock(self._threads[tid])

    def set_class(self, tid: int, policy: int, parameters: os.sched_param) -> None:
        rank = _CLASS[policy & ~os.SCHED_RESET_ON_FORK] + parameters.sched_priority
        self._machine.set_rank(self._threads[tid], rank)

    def set_priority(self, tid: int, parameters: os.sched_param) -> None:
        thread = self._threads[tid]
        self._machine.set_rank(thread, thread.rank // 100 * 100 + parameters.sched_priority)

    def waits(self, pid: int, tid: int) -> bool:
        return not self._threads[tid].wants

    def pin(self, tid: int, cpus: Iterable[int]) -> None:
        allowed = tuple(cpus)
        if len(allowed) == 1:              # else it is given back, and stays where it is
            self._machine.move(self._threads[tid], allowed[0])

    def stop(self, pid: int) -> None:
        self._machine.set_stopped(self._threads[pid], True)

    def go_on(self, pid: int) -> None:
        self._machine.set_stopped(self._threads[pid], False)
