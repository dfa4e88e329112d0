"""A deterministic bench for policies: production's code on a logical clock.

Some tasks run for ever, some by a script of (run, sleep) spans. Every host CPU has the run
queue of production; a supervisor computes entitlements and placement each period from what the
tasks received. Events are handled in order of (time, number), so one seed is one trace.

Units: ns. Nothing here waits, reads a clock or starts a thread.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle

from mixvisor.sched.model import Ns, Slot, VcpuLoad, VmDemand
from mixvisor.sched.policy import Runqueue, entitle, place

MS = 1_000_000


@dataclass
class Task:
    """One vCPU (a VM of its own): *script* is (run, sleep) spans over and over, empty = busy."""

    weight: int = 100
    cpus: frozenset[int] | None = None
    cap: float = 0.0
    script: Sequence[tuple[int, int]] = ()
    mode: int = 0
    latency: int = 0               # in LATENCIES
    ran: int = 0
    entitled: float = 0.0          # ∫ e dt while awake, ns
    lag: float = 0.0
    awake: bool = True
    cpu: int | None = None
    moves: int = 0
    left: int = 0                  # of the run span, when scripted
    waited_since: int = 0
    longest_wait: int = 0
    services: list[tuple[int, int, int]] = field(default_factory=list)     # start, end, cpu


class Bench:
    def __init__(
        self, tasks: Sequence[Task], cpus: int = 1, *, slice_ns: int = 5 * MS,
        ratelimit_ns: int = 0, period_ns: int = 40 * MS, jitter_ns: int = 0, seed: int = 0,
        queue: Callable[[int, int], Runqueue] = Runqueue,
    ) -> None:
        self.tasks = list(tasks)
        self.cpus = range(cpus)
        self.slice_ns, self.period_ns, self.jitter_ns = slice_ns, period_ns, jitter_ns
        self.random = random.Random(seed)
        self.queues = [queue(slice_ns, ratelimit_ns) for _ in self.cpus]
        self.current: list[Slot | None] = [None] * cpus
        self.since = [0] * cpus
        self.generation = [0] * cpus
        self.idle = [0] * cpus
        self.bad_idle = 0              # idle beside a vCPU that waits in the same queue
        self.now = 0
        self.ticked = 0
        self.worst_lag = 0.0           # over all CPUs, as the supervisor saw it
        self.worst_local_lag = 0
        self.trace: list[tuple[int, int, Slot | None]] = []
        self.scripts = [cycle(task.script) if task.script else None for task in self.tasks]
        self.spans: list[tuple[int, int]] = [(0, 0)] * len(self.tasks)
        self.events: list[tuple[int, int, str, int, int]] = []
        self.number = 0
        for slot, task in enumerate(self.tasks):
            self.next_span(slot)
            task.cpus = task.cpus or frozenset(self.cpus)
        self.tick()

    def post(self, at: int, kind: str, who: int, generation: int = 0) -> None:
        self.number += 1
        heapq.heappush(self.events, (at, self.number, kind, who, generation))

    def next_span(self, slot: int) -> None:
        script = self.scripts[slot]
        if script is not None:
            self.spans[slot] = next(script)
            self.tasks[slot].left = self.spans[slot][0]

    def run(self, duration_ns: int) -> Bench:
        end = self.now + duration_ns
        while self.events[0][0] <= end:
            self.now, _, kind, who, generation = heapq.heappop(self.events)
            if kind == "tick":
                self.tick()
            elif kind == "wake":
                self.wake(who)
            elif generation == self.generation[who]:
                self.settle(who)
                self.decide(who)
        self.now = end
        for cpu in self.cpus:
            self.settle(cpu)
        return self

    def settle(self, cpu: int) -> None:
        """Charge what ran on *cpu* since it was last looked at."""
        start, self.since[cpu] = self.since[cpu], self.now
        elapsed = self.now - start
        queue, slot = self.queues[cpu], self.current[cpu]
        queue.advance(elapsed)
        if slot is None:
            self.idle[cpu] += elapsed
            return
        task = self.tasks[slot]
        queue.charge(slot, elapsed)
        task.ran += elapsed
        if elapsed:
            task.services.append((start, self.now, cpu))
        task.waited_since = self.now
        if task.script:
            task.left -= elapsed
            assert task.left >= 0
            if task.left == 0:
                queue.sleep(slot)
                task.awake = False
                self.current[cpu] = None
                self.post(self.now + self.spans[slot][1], "wake", slot)
                self.next_span(slot)

    def decide(self, cpu: int) -> None:
        queue = self.queues[cpu]
        slot = queue.pick(self.current[cpu])
        self.current[cpu] = slot
        self.generation[cpu] += 1
        self.trace.append((self.now, cpu, slot))
        for other in queue:
            if queue.is_awake(other):
                self.worst_local_lag = max(self.worst_local_lag, abs(queue.lag_ns(other)))
        if slot is None:
            self.bad_idle += any(queue.is_awake(s) and not queue.is_parked(s) for s in queue)
            wait = queue.unpark_in_ns()
            if wait is not None:
                self.post(self.now + wait, "slice", cpu, self.generation[cpu])
            return
        task = self.tasks[slot]
        task.longest_wait = max(task.longest_wait, self.now - task.waited_since)
        span = queue.slice_ns(slot) + self.random.randint(0, self.jitter_ns)
        if task.script:
            span = min(span, task.left)
        self.post(self.now + span, "slice", cpu, self.generation[cpu])

    def wake(self, slot: int) -> None:
        task = self.tasks[slot]
        task.awake = True
        task.waited_since = self.now
        cpu = task.cpu
        assert cpu is not None
        self.settle(cpu)
        self.queues[cpu].wake(Slot(slot))
        self.decide(cpu)

    def tick(self) -> None:
        """The supervisor: account, entitle, place, and carry it out."""
        for cpu in self.cpus:
            self.settle(cpu)
        self.account()
        awake = [slot for slot, task in enumerate(self.tasks) if task.awake]
        shares = entitle([
            VmDemand(vm=str(s), weight=self.tasks[s].weight, vcpus=1, cpus=self.allowed(s),
                     cap=self.tasks[s].cap)
            for s in awake
        ], self.cpus)
        self.shares = {s: shares[str(s)] for s in awake}
        self.placed = place([
            VcpuLoad(slot=Slot(s), entitled=self.shares[s],
                     # As the planner does: on a single CPU the run queue keeps the lag itself.
                     lag_ns=self.owed_elsewhere(s) if len(self.cpus) > 1 else 0,
                     cpus=self.allowed(s), last_cpu=self.tasks[s].cpu)
            for s in awake
        ], self.cpus, Ns(self.period_ns), migrate_resist_ns=MS // 2)
        for slot in awake:
            self.settle_on(slot, self.placed.cpu[Slot(slot)], self.placed.rate[Slot(slot)])
        for cpu in self.cpus:
            self.decide(cpu)
        self.ticked = self.now
        self.charged = [task.ran for task in self.tasks]
        self.post(self.now + self.period_ns, "tick", 0)

    def account(self) -> None:
        if self.now == 0:
            return
        for slot, share in self.shares.items():
            task = self.tasks[slot]
            earned = share * (self.now - self.ticked)
            ran = task.ran - self.charged[slot]
            task.entitled += earned
            task.lag += earned - ran
            if task.script:
                # It slept part of the time: it may not save up what it did not want.
                task.lag = max(-float(self.period_ns), min(task.lag, float(self.slice_ns)))
            self.worst_lag = max(self.worst_lag, task.lag if not task.script else 0.0)

    def allowed(self, slot: int) -> frozenset[int]:
        allowed = self.tasks[slot].cpus
        assert allowed is not None
        return allowed

    def owed_elsewhere(self, slot: int) -> int:
        """The lag over all CPUs but for what the vCPU's run queue makes good by itself."""
        task = self.tasks[slot]
        here = 0 if task.cpu is None else self.queues[task.cpu].lag_ns(Slot(slot))
        limit = 2 * self.period_ns
        return max(-limit, min(limit, round(task.lag) - here))

    def settle_on(self, number: int, cpu: int, rate: float) -> None:
        task, slot = self.tasks[number], Slot(number)
        if task.cpu == cpu:
            self.queues[cpu].set_rate(slot, rate)
            return
        lag = budget = 0
        if task.cpu is not None:
            budget = self.queues[task.cpu].budget_ns(slot)
            lag = self.queues[task.cpu].remove(slot)
            task.moves += 1
            if self.current[task.cpu] == slot:
                self.current[task.cpu] = None
        self.queues[cpu].add(slot, rate, lag, task.mode, task.latency)
        if task.cap:
            self.queues[cpu].set_cap(slot, task.cap, budget)
        task.cpu = cpu
