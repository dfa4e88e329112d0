"""A scenario under one policy: the scheduler of production, on a machine and a clock that are simulated.

Theory.  Nothing of the scheduler is imitated here. Every simulated host CPU has a production
`Dispatcher` (with its run queue, its breathing, its debts of sleepers), the shared table between
them is the real one, and `Planner` and `Ledger` are the supervisor's own. Only what lies below
(machine.py: threads, CPUs, the kernel's calls) and time itself are replaced. So a decision that
is seen here is one that production takes when it is told the same.

Order.  Everything happens in the order of simulated time, and in the order of asking at one
moment; there is no clock, no thread and no dictionary order of strings in it: the same scenario,
policy and seed give the same result on every machine.

Where it is poor: dispatch is precise (or the kernel's own, for the policy `kernel`); VMs neither
start nor end; the time that planning takes is a formula (PLAN_NS), so that results are repeatable.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, Final

from ...config.scenario import Scenario, ScenarioVm
from ..dispatcher import Dispatcher, Parcel, Settings
from ..inputs import InputLog
from ..ledger import Ledger
from ..model import LATENCIES, Slot, VmDemand
from ..planner import BALANCE_MAX_S, BALANCE_PART, BALANCE_S, STEAL_S, Planner
from ..policy import POLICIES, Batching, Order
from ..policy.entitlement import admit
from ..policy.kernel import nice_of, weight_of
from ..shared import ACTIVE, MODES, NOBODY, ONE_CPU, Shared
from ..table import Table, Vcpu, VcpuThread
from .balancer import Balancer
from .figures import Group, PolicyResult, merge_waits
from .judge import Judge
from .machine import Costs, Machine, SimulatedKernel, Span, Spans, Thread, sampled, scripted

__all__ = ["ScenarioRefused", "Simulation"]

RING_RECORDS: Final = 64           # nobody reads them here
ACCOUNT_NS: Final = 100_000_000
STEAL_NS: Final = round(STEAL_S * 1e9)
JUDGE_NS: Final = 1_000_000_000
PLAN_NS: Final = 30_000            # of the supervisor's time, for each vCPU of a plan
LATE_SPREAD: Final = 0.5           # of the logarithm of a lateness: p99 is 3.2 times the median
NEVER: Final = 1 << 62


class ScenarioRefused(ValueError):
    """A VM of the scenario would be refused admission; the text says why."""


class _Table(Table):
    """Slots as the scheduler has them; there are no processes behind them."""

    def __init__(self, slots: int) -> None:
        super().__init__((0,))
        self._slots = slots

    def open(self, cpus: Sequence[int]) -> Shared:
        self.shared = Shared.create(cpus, slots=self._slots, ring_records=RING_RECORDS)
        return self.shared

    def put(self, thread: VcpuThread) -> Vcpu:
        assert self.shared is not None
        slot = len(self)
        vcpu = Vcpu(
            thread, Slot(slot), slot + 1, self.shared.slot(slot), thread.weight, thread.cap,
            thread.reservation, thread.cpus, thread.latency)
        for name, value in (
            ("pid", slot), ("tid", slot), ("mode", MODES.index(thread.mode)), ("want_cpu", NOBODY),
            ("have_cpu", NOBODY), ("rate", 1), ("cap", round(thread.cap * ONE_CPU)), ("flags", ACTIVE),
            ("latency", LATENCIES.index(thread.latency)),
            ("generation", vcpu.generation),
        ):
            self.set(vcpu, name, value)
        self.shared.set("used_slots", slot + 1)
        self._vcpus[thread.vm, thread.index] = vcpu
        self._of.setdefault(thread.vm, []).append(vcpu)
        return vcpu


class _Inbox:
    def __init__(self) -> None:
        self.parcels: list[tuple[int, Parcel]] = []

    def drain(self) -> Iterable[tuple[int, Parcel]]:
        parcels, self.parcels = self.parcels, []
        return parcels


class Simulation:
    """One policy on one scenario. `run` once, then `result`; `close` in the end.

    timeline_ns: how much of the beginning is recorded in `spans`. inputs: given what the run queues
    are told and answer, line by line (sched/inputs.py). Raises ScenarioRefused.
    """

    def __init__(
        self, scenario: Scenario, policy: str, *, timeline_ns: int = 0,
        inputs: Callable[[str], object] | None = None,
    ) -> None:
        self.scenario = scenario
        self.policy = policy
        self._timeline_ns = timeline_ns
        scheduler, costs = scenario.scheduler, scenario.costs
        self._slice_ns = scheduler.slice_us * 1000
        self._late_ns = costs.late_us * 1000
        self._parts = POLICIES[policy]
        self.machine = Machine(scenario.host.cpus, Costs(
            switch_ns=(costs.switch_software_us * 1000, costs.switch_hardware_us * 1000),
            mixed_ns=(costs.mixed_software_us * 1000, costs.mixed_hardware_us * 1000),
            dispatcher_ns=costs.dispatcher_us * 1000, late_ns=self._late_ns),
            kernel_alone=not self._parts.dispatches)
        self._cpus = tuple(range(scenario.host.cpus))
        # One set for all who share it: of a thousand CPUs it is 64 KiB.
        self._allowed = [frozenset(vm.cpus or self._cpus) for vm in scenario.vms]
        self._of_table: list[int] = []             # by slot: the index of its [[vm]] table
        self._rng = [random.Random(f"{scenario.simulation.seed}/cpu/{cpu}") for cpu in self._cpus]
        self.spans: list[Span] = []                # of the timeline, in the order of their ends
        self._seconds = 0.0
        self._so_far: Callable[[float], None] = lambda _seconds: None
        self._decisions = 0
        self._due = [0] * scenario.host.cpus       # when each dispatcher takes its next step
        self._interrupted: set[int] = set()
        vms = [(index, vm, name) for index, vm in enumerate(scenario.vms) for name in vm.names]
        demands = [self._demand(index, vm, name) for index, vm, name in vms]
        refusal = admit(demands, self._cpus)
        if refusal is not None:
            raise ScenarioRefused(refusal)
        self._table = _Table(max(1, len(vms)))
        shared = self._table.open(self._cpus)
        batching = Batching(
            batch_ns=scheduler.mode_batch_us * 1000, wait_max_ns=scheduler.mode_wait_max_us * 1000,
            budget_ns=Batching.budget(scheduler.mode_loss_max / 100, scheduler.crossing_cost_us * 1000))
        order = Order(
            jitter_ns=Order.jitter(scheduler.random_order, self._slice_ns), seed=scheduler.random_seed)
        ratelimit_ns = min(scheduler.ratelimit_us * 1000, self._slice_ns)
        for name, value in (
            ("slice_ns", self._slice_ns), ("ratelimit_ns", ratelimit_ns), ("guard_timeout_ns", NEVER),
            ("policy", tuple(POLICIES).index(policy)), ("mode_batch_ns", batching.batch_ns),
            ("mode_wait_max_ns", batching.wait_max_ns), ("mode_budget_ns", batching.budget_ns),
            ("order_jitter_ns", order.jitter_ns), ("order_seed", order.seed),
        ):
            shared.set(name, value)
        for slot, (index, vm, name) in enumerate(vms):
            self._admit(slot, index, vm, name)
        self._judge = Judge(demands, [thread.spans is None for thread in self.machine.threads], len(self._cpus))
        self._ledger = Ledger(self._table, self._slice_ns, batching.most_ns if self._parts.batches else 0)
        self._planner = Planner(
            self._table, self._cpus, self._parts, slice_ns=self._slice_ns,
            migrate_resist_ns=scheduler.migrate_resist_us * 1000, siblings={}, caches={},
            account=self._account, send_parcel=self._send_parcel, interrupt=self._interrupt, split=lambda _split: None,
            clock=lambda: self.machine.now, offload=False)
        self._inboxes = [_Inbox() for _ in self._cpus]
        kernel = SimulatedKernel(self.machine)
        self._dispatchers = [
            Dispatcher(shared, Settings(kind="precise", cpu=cpu, index=cpu, home_cpus=(*self._cpus, NEVER)),
                       kernel, self._inboxes[cpu], 0)  # type: ignore[arg-type]
            for cpu in (self._cpus if self._parts.dispatches else ())]
        if inputs is not None:
            log = InputLog(inputs, policy=policy, slice_ns=self._slice_ns, ratelimit_ns=ratelimit_ns,
                           batching=batching, order=order)
            for cpu, dispatcher in enumerate(self._dispatchers):
                dispatcher._queue = log.follow(cpu, dispatcher._queue)  # type: ignore[assignment]
        self._balancer: Balancer | None = None

    def close(self) -> None:
        self._table.close()

    # -- who is here -------------------------------------------------------------------------

    def _demand(self, index: int, vm: ScenarioVm, name: str) -> VmDemand:
        return VmDemand(vm=name, weight=vm.weight, vcpus=1, cpus=self._allowed[index],
                        cap=vm.cap / 100, reservation=vm.reservation / 100)

    def _admit(self, slot: int, index: int, vm: ScenarioVm, name: str) -> None:
        spans: Spans | None = None
        first_wake = 0
        if vm.script:
            spans = scripted([(run * 1000, sleep * 1000) for run, sleep in vm.script])
        elif vm.spans_us is not None:
            rng = random.Random(f"{self.scenario.simulation.seed}/vm/{name}")
            run, sleep = vm.spans_us
            first_wake = rng.randrange(1, sleep * 1000)
            spans = sampled(rng, run * 1000, sleep * 1000)
        # Where the kernel alone schedules, a weight is the nearest nice level.
        weight = vm.weight if self._parts.dispatches else weight_of(nice_of(vm.weight))
        self.machine.add(Thread(slot, name, MODES.index(vm.mode), weight=weight, spans=spans,
                                first_wake_ns=first_wake))
        self._of_table.append(index)
        self._table.put(VcpuThread(
            vm=name, index=0, pid=slot, tid=slot, pidfd=-1, mode=vm.mode, weight=vm.weight, cap=vm.cap / 100,
            reservation=vm.reservation / 100, latency=vm.latency, cpus=self._allowed[index]))

    # -- the run -----------------------------------------------------------------------------

    def run(self, seconds: float, so_far: Callable[[float], None] = lambda _seconds: None) -> Simulation:
        """so_far: told each simulated second how many there were."""
        machine, self._so_far = self.machine, so_far
        if self._timeline_ns:
            machine.spans = self.spans
            machine.post(self._timeline_ns, self._end_timeline)
        if self._parts.dispatches:
            self._plan(0)
            for cpu in self._cpus:
                machine.post(0, self._step, cpu)
            machine.post(ACCOUNT_NS, self._look)
            machine.post(STEAL_NS, self._steal)
        else:
            machine.balancer = self._balancer = Balancer(machine, [vcpu.cpus for vcpu in self._table])
            for cpu in machine.cpus:
                machine.choose(cpu)
        machine.post(JUDGE_NS, self._be_judged)
        collects = gc.isenabled()
        gc.disable()               # no cycles are made, and looking for some takes a tenth of the time
        try:
            machine.run(round(seconds * 1e9))
        finally:
            if collects:
                gc.enable()
        self._end_timeline(0)
        for dispatcher in self._dispatchers:
            dispatcher.leave(machine.now)
        self._judge_now()
        self._seconds = seconds
        return self

    def _end_timeline(self, _argument: int) -> None:
        self.machine.close_spans()
        self.machine.spans = None

    def _interrupt(self, cpus: Iterable[int]) -> None:
        for cpu in sorted(cpus):
            self._interrupted.add(cpu)
            self._wake(cpu, self.machine.now)

    def _wake(self, number: int, due: int) -> None:
        """Its dispatcher's next step, in place of any other that was to be the next."""
        late = self._late_ns and round(self._late_ns * self._rng[number].lognormvariate(0.0, LATE_SPREAD))
        self._due[number] = due + late
        self.machine.post(due + late, self._step, number)

    def _step(self, number: int) -> None:
        """A dispatcher wakes."""
        machine = self.machine
        if machine.now != self._due[number]:
            return                           # it was interrupted since that was asked for
        cpu = machine.cpus[number]
        machine.settle(cpu)
        dispatcher = self._dispatchers[number]
        if number in self._interrupted:
            self._interrupted.discard(number)
            dispatcher.interrupt(machine.now)
        due = dispatcher.step(machine.now)
        assert due is not None, "nobody told it to leave"
        cost = self._decision_ns(number)
        dispatcher.note_decision(cost)
        machine.decided(cpu, cost)
        self._decisions += 1
        self._wake(number, max(due, machine.now + cost))

    def _decision_ns(self, _cpu: int) -> int:
        return self.machine.costs.dispatcher_ns

    def _look(self, _argument: int) -> None:
        """What the supervisor does every tenth of a second."""
        self._account()
        self.machine.post(self.machine.now + ACCOUNT_NS, self._look)

    def _account(self) -> None:
        self._ledger.account(self.machine.now, self._planner.period_ns)

    def _be_judged(self, _argument: int) -> None:
        for cpu in self.machine.cpus:
            self.machine.settle(cpu)
            if cpu.dirty:
                self.machine.choose(cpu)
        self._judge_now()
        self._so_far(self.machine.now / 1e9)
        self.machine.post(self.machine.now + JUDGE_NS, self._be_judged)

    def _judge_now(self) -> None:
        machine = self.machine
        self._judge.look(machine.now, [thread.ran for thread in machine.threads],
                         sum(cpu.dispatcher_ns for cpu in machine.cpus))

    def _plan(self, _argument: int) -> None:
        period_s = max(BALANCE_S, min(BALANCE_MAX_S, len(self._table) * PLAN_NS * BALANCE_PART / 1e9))
        self._planner.period_s = period_s
        if self._planner.is_due():
            _finish(self._planner.plan())
        self.machine.post(self.machine.now + round(period_s * 1e9), self._plan)

    def _steal(self, _argument: int) -> None:
        if self._planner.steals:
            _finish(self._planner.steal())
        self.machine.post(self.machine.now + STEAL_NS, self._steal)

    async def _send_parcel(self, cpu: int, vcpu: Vcpu) -> None:
        page = memoryview(self.machine.threads[vcpu.slot].page)
        self._inboxes[cpu].parcels.append((vcpu.slot, Parcel(vcpu.generation, page)))

    # -- what was found ----------------------------------------------------------------------

    def result(self) -> PolicyResult:
        machine, seconds = self.machine, self._seconds
        elapsed, cpus = seconds * 1e9, len(self._cpus)
        vcpus = list(self._table)
        errors = [abs(error) / elapsed for error in self._judge.errors_ns()]
        delivered = sum(thread.ran for thread in machine.threads)
        received = delivered or 1
        capacity = elapsed * cpus
        return PolicyResult(
            policy=self.policy, seconds=seconds, cpus=cpus, vms=len(vcpus),
            share_error_mean=sum(errors) / len(errors) if errors else None,
            share_error_most=max(errors, default=None),
            lag_most_ns=round(self._judge.lag_most_ns) if errors else None,
            fairness=self._judge.fairness(),
            wait=merge_waits(t.waits for t in machine.threads).quantiles(),
            wake=merge_waits(t.wakes for t in machine.threads).quantiles(),
            vm_switches_per_s=sum(cpu.vm_switches for cpu in machine.cpus) / seconds,
            mode_switches_per_s=sum(cpu.mode_switches for cpu in machine.cpus) / seconds,
            migrations_per_s=(self._balancer.moves if self._balancer is not None else sum(
                self._table.word(v, "migrations") for v in vcpus)) / seconds,
            decisions=self._decisions,
            lost_mixed=sum(t.lost_mixed_ns for t in machine.threads) / received,
            lost_switching=sum(t.lost_switch_ns for t in machine.threads) / received,
            delivered=delivered / capacity,
            idle=sum(cpu.idle_ns for cpu in machine.cpus) / capacity,
            dispatching=sum(cpu.dispatcher_ns for cpu in machine.cpus) / capacity,
            mode_residency={mode: sum(cpu.mode_ns[i] for cpu in machine.cpus) / capacity
                            for i, mode in enumerate(MODES)},
            groups=tuple(self._group(index, vm, elapsed) for index, vm in enumerate(self.scenario.vms)))

    def _group(self, index: int, vm: ScenarioVm, elapsed: float) -> Group:
        threads = [thread for thread in self.machine.threads if self._of_table[thread.slot] == index]
        due = [self._judge.due_ns[thread.slot] / elapsed for thread in threads]
        received = [thread.ran / elapsed for thread in threads]
        ran = sum(thread.ran for thread in threads) or 1
        return Group(
            name=vm.name, count=vm.count, mode=vm.mode, weight=vm.weight, behaviour=vm.behaviour,
            due=sum(due) / len(due),
            received=sum(received) / len(received), received_least=min(received), received_most=max(received),
            error_most=max(abs(r - d) for r, d in zip(received, due, strict=True)) if vm.behaviour == "busy" else None,
            wait=merge_waits(t.waits for t in threads).quantiles(),
            wake=merge_waits(t.wakes for t in threads).quantiles(),
            lost_mixed=sum(t.lost_mixed_ns for t in threads) / ran)


def _finish(coroutine: Coroutine[Any, Any, object]) -> None:
    """Run what never waits here: the planner only awaits `_send_parcel`."""
    try:
        coroutine.send(None)
    except StopIteration:
        return
    raise AssertionError("the planner waited for something that is not simulated")
