"""The supervisor's half of scheduling: admission, and what the service asks for.

Theory.  Slow decisions are made here, on trio, off the VMs' CPUs, each kind in a module of its
own: who may come (below), at what rate and where (planner.py), what each received (ledger.py),
which processes carry it out (crew.py). They are published in the shared table (table.py, and
shared.py with the protocol by which a vCPU changes hands) and followed by one dispatcher process
a host CPU, which never waits for us.

Invariants.
- `release` returns only when no dispatcher touches the thread and it is SCHED_OTHER, unpinned
  and going: a real-time thread queued behind others could be killed and never die.
- When `run` ends, every thread is given back and every process it started has ended.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final, Protocol

import trio

from . import linux
from .accounts import CpuFigures, SchedulerStatistics, VcpuFigures
from .baseline import Baseline
from .crew import Crew, DispatchRefused, Host, Process, Spawn, Warn, until
from .hostcpus import HostCpus, usable_cpus
from .ledger import Ledger
from .loan import Lender, Loan
from .model import VmDemand
from .planner import Planner
from .policy import POLICIES, Batching, Order, Split, admit
from .recorder import FlightRecorder, PackedRecording
from .shared import ACTIVE, MODES, NOBODY, PAUSED, Shared, SliceRecord
from .table import Table, Vcpu, VcpuThread
from .tape import Manner
from .tapedeck import record

__all__ = [
    "AdmissionRefused", "DispatchRefused", "Process", "Scheduler", "SliceObserver", "Spawn", "VcpuThread", "Warn",
]

ACCOUNT_S: Final = 0.1
SLOW_S: Final = 1.0                # what is read from /proc
GUARD_TIMEOUT_NS: Final = 1_000_000_000
ANSWER_S: Final = 0.6              # a dispatcher that has not answered by then is replaced
CHANGE_S: Final = 2.0              # until all dispatchers follow another policy


class SliceObserver(Protocol):
    """Told of every slice; must be quick and must not raise."""

    def named(self, generation: int, vm: str) -> None: ...
    def slices(self, cpu: int, records: Sequence[SliceRecord]) -> None: ...


class AdmissionRefused(ValueError):
    """The VM cannot be scheduled; the text says why and what to do."""


class Scheduler:
    """Shares host CPUs among vCPU threads. `await nursery.start(scheduler.run)` first.

    cpus: host CPUs that VMs may use. dispatch: auto or one of linux.KINDS. spawn: makes
    processes (service/children.py). warn: told what an operator should know; unwarn: the code of
    what is no longer so. usable_cpus: which host CPUs are there now (hostcpus.py). policy: one of policy.POLICIES.
    siblings, caches: who shares a core, and who a last-level cache, with each host CPU.
    """

    def __init__(
        self, *, cpus: Sequence[int], spawn: Spawn, dispatch: str = "auto",
        slice_ns: int = 5_000_000, ratelimit_ns: int = 500_000,
        migrate_resist_ns: int = 500_000, warn: Warn | None = None,
        unwarn: Callable[[str], None] | None = None,
        guard_timeout_ns: int = GUARD_TIMEOUT_NS, policy: str = "fair",
        batching: Batching | None = None, order: Order | None = None,
        observer: SliceObserver | None = None, siblings: Mapping[int, frozenset[int]] | None = None,
        caches: Mapping[int, frozenset[int]] | None = None,
        usable_cpus: Callable[[], frozenset[int]] = usable_cpus,
    ) -> None:
        if not cpus:
            raise ValueError("a scheduler needs at least one host CPU")
        if dispatch != "auto" and dispatch not in linux.KINDS:
            raise ValueError(f"unknown dispatch kind {dispatch!r}: auto, {', '.join(linux.KINDS)}")
        if policy not in POLICIES:
            raise ValueError(f"unknown policy {policy!r}: {', '.join(POLICIES)}")
        self._cpus = tuple(sorted(set(cpus)))
        self._policy = POLICIES[policy]
        self._batching = batching or Batching()
        self._order = order or Order()
        self._warn = warn or (lambda code, severity, message, advice: None)
        self._unwarn = unwarn or (lambda code: None)
        self._recording_inputs = trio.Lock()
        self._changing = trio.Lock()                       # one change of policy at a time
        self._slice_ns = slice_ns
        self._ratelimit_ns = min(ratelimit_ns, slice_ns)
        self._guard_timeout_ns = guard_timeout_ns
        self._table = Table(sorted({*range(os.cpu_count() or 1), *self._cpus}))
        self._crew = Crew(
            self._table, self._cpus, dispatch=dispatch, spawn=spawn, warn=self._warn)
        self._crew.leave_to_kernel(not self._policy.dispatches)
        self._baseline = Baseline(self._table, self._cpus, self._warn, self._unwarn)
        self._ledger = Ledger(self._table, slice_ns, self._batching.most_ns if self._policy.batches else 0)
        self._planner = Planner(
            self._table, self._cpus, self._policy, slice_ns=slice_ns, migrate_resist_ns=migrate_resist_ns,
            siblings=siblings or {}, caches=caches or {}, account=self._account,
            send_parcel=self._crew.send_parcel, interrupt=self._crew.interrupt, split=self._tell_split)
        self._host_cpus = HostCpus(
            self._table, self._crew, self._planner, self._cpus, usable=usable_cpus, refused=self._reservations_refused,
            warn=self._warn, unwarn=self._unwarn)
        self._lender = Lender(self._table, self._planner, self._crew, self._plan)
        self._recorder = FlightRecorder(self._cpus)
        self._observer = observer
        self._past: dict[str, list[VcpuFigures]] = {}      # of each vCPU, after the release
        self._final: SchedulerStatistics | None = None     # after `run` has ended

    @property
    def _shared(self) -> Shared | None:
        return self._table.shared

    @property
    def _closing(self) -> bool:
        return self._crew.closing

    # -- life --------------------------------------------------------------------------------

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Schedule until cancelled. Started once the dispatchers run. Raises DispatchRefused."""
        shared = self._table.open(self._cpus)
        try:
            shared.set("supervisor_pid", os.getpid())
            self._publish(shared)
            shared.set("guard_timeout_ns", self._guard_timeout_ns)
            await self._crew.choose()
            async with trio.open_nursery() as nursery:
                try:
                    await self._crew.muster(nursery)
                    nursery.start_soon(self._planner.balance)
                    nursery.start_soon(self._account_forever)
                    nursery.start_soon(self._host_cpus.watch, self._plan_for_other_cpus)
                    nursery.start_soon(self._replan_vacated)
                    task_status.started()
                    await trio.sleep_forever()
                finally:
                    self._crew.closing = True
                    nursery.cancel_scope.cancel()
        finally:
            self._crew.closing = True
            with trio.CancelScope(shield=True):
                await self._close()

    async def _close(self) -> None:
        self._account()
        self._lender.end("the scheduler ended")
        self._baseline.withdraw()
        await self._crew.dismiss_dispatchers()
        # Dispatchers gave back what they had; this is for those that could not.
        for vcpu in list(self._table):
            self._table.forget(vcpu)
        await self._crew.dismiss_guard()
        self._final = self.statistics()
        self._table.close()

    # -- what the service asks for -----------------------------------------------------------

    async def admit(self, thread: VcpuThread) -> None:
        """Schedule a vCPU from now on. Raises AdmissionRefused."""
        await trio.lowlevel.checkpoint()        # many in a row must let the heartbeat go on
        table, shared = self._table, self._table.shared
        if shared is None or self._closing:
            raise AdmissionRefused(f"VM {thread.vm!r}: the scheduler is not running")
        if table.get(thread.vm, thread.index) is not None:
            raise AdmissionRefused(f"vCPU {thread.index} of VM {thread.vm!r} is scheduled already")
        if thread.mode not in MODES:
            raise AdmissionRefused(f"VM {thread.vm!r} has the unknown mode {thread.mode!r}")
        if table.full:
            raise AdmissionRefused(
                f"VM {thread.vm!r}: all {shared.slots} places of the scheduler's table are taken")
        if thread.siblings and self._crew.kind == "signal":
            raise AdmissionRefused(
                f"VM {thread.vm!r} has {thread.siblings + 1} vCPUs, and dispatch = \"signal\" stops whole processes:"
                " use precise, gentle or plain ([host] dispatch), or give it one vCPU")
        others = [d for d in self._planner.demands(everyone=True, confined=False)
                  if d.vm != thread.vm]
        refusal = admit([*others, VmDemand(
            vm=thread.vm, weight=thread.weight, vcpus=thread.siblings + 1, cpus=thread.cpus,
            cap=thread.cap, reservation=thread.reservation)], self._cpus)
        if refusal is not None:
            raise AdmissionRefused(refusal)
        try:
            generation = table.put(thread).generation
        except (FileNotFoundError, ProcessLookupError) as error:
            raise AdmissionRefused(f"VM {thread.vm!r}: its process has ended") from error
        except OSError as error:
            raise AdmissionRefused(f"VM {thread.vm!r}: its CPU time cannot be read: {error.strerror}") from error
        self._recorder.name(generation, thread.vm)
        if self._observer is not None:
            self._observer.named(generation, thread.vm)
        if thread.index == 0:
            self._past.pop(thread.vm, None)
        await self._plan()

    async def release(self, vm: str) -> None:
        """Let go of a VM: on return its threads are SCHED_OTHER, unpinned and going.

        A VM that is not scheduled is no error. Its figures stay until `forget`.
        """
        mine = self._table.of(vm)
        self._end_loan_of(vm, f"VM {vm!r} ended")
        for vcpu in mine:
            vcpu.leaving = True
        with trio.CancelScope(shield=True):
            for vcpu in mine:
                await self._take_away(vcpu)
            for vcpu in mine:
                if not self._table.holds(vcpu):
                    continue                       # another release was faster
                self._account()
                self._ledger.read_proc(vcpu)
                self._past.setdefault(vm, []).append(self._ledger.figures(vcpu))
                self._table.forget(vcpu)
            if mine:
                await self._plan()

    async def _take_away(self, vcpu: Vcpu) -> None:
        """Until nobody has it. A dispatcher that does not answer is replaced."""
        table = self._table
        for _attempt in range(3):
            with trio.move_on_after(ANSWER_S):
                await until(lambda: not table.holds(vcpu)
                            or table.word(vcpu, "have_cpu") == table.word(vcpu, "want_cpu"))
                if not table.holds(vcpu):
                    return
                if table.word(vcpu, "want_cpu") != NOBODY:
                    table.set(vcpu, "want_cpu", NOBODY)
                    table.bump()
                await until(
                    lambda: not table.holds(vcpu) or table.word(vcpu, "have_cpu") == NOBODY)
                return
            if not table.holds(vcpu):
                return
            self._crew.replace((table.word(vcpu, "have_cpu"), table.word(vcpu, "want_cpu")))

    def forget(self, vm: str) -> None:
        """Drop the figures of a released VM."""
        self._past.pop(vm, None)

    async def pause(self, vm: str) -> None:
        """It competes no more, until `resume`; its thread is SCHED_OTHER and going."""
        await self._set_paused(vm, True)

    async def resume(self, vm: str) -> None:
        await self._set_paused(vm, False)

    async def _set_paused(self, vm: str, paused: bool) -> None:
        self._end_loan_of(vm, f"VM {vm!r} was paused")
        for vcpu in self._table.of(vm):
            if vcpu.paused != paused:
                vcpu.paused = paused
                self._table.set(vcpu, "flags", ACTIVE | (PAUSED if paused else 0))
        self._table.bump()
        await self._plan()

    async def set_mode(self, vm: str, mode: str) -> None:
        """A VM runs in another mode from now on: it is placed, batched and accounted with that mode."""
        self._end_loan_of(vm, f"VM {vm!r} changed its mode")
        with trio.CancelScope(shield=True):
            for vcpu in self._table.of(vm):
                # Out of its dispatcher's hands: that one takes the mode of a vCPU when it gets it.
                await self._take_away(vcpu)
                if not self._table.holds(vcpu):
                    continue                       # released meanwhile
                self._account()                    # what it has run so far was in the old mode
                vcpu.thread = replace(vcpu.thread, mode=mode)
                self._table.set(vcpu, "mode", MODES.index(mode))
            await self._plan()

    def schedules(self, vm: str) -> bool:
        """Whether the VM is admitted, and not on its way out."""
        return any(not vcpu.leaving for vcpu in self._table.of(vm))

    async def set_parameters(
        self, vm: str, *, weight: int | None = None, cap: float | None = None,
        reservation: float | None = None, cpus: frozenset[int] | None = None, latency: str | None = None,
    ) -> None:
        """Change a scheduled VM's parameters. Raises AdmissionRefused, and changes nothing then."""
        mine = self._table.of(vm)
        if not self.schedules(vm) or self._closing:
            raise AdmissionRefused(f"VM {vm!r} is not scheduled")
        was = mine[0]
        weight = was.weight if weight is None else weight
        cap = was.cap if cap is None else cap
        reservation = was.reservation if reservation is None else reservation
        cpus = was.cpus if cpus is None else cpus
        refusal = admit([
            replace(d, weight=weight, cap=cap, reservation=reservation, cpus=cpus)
            if d.vm == vm else d
            for d in self._planner.demands(everyone=True, confined=False)], self._cpus)
        if refusal is not None:
            raise AdmissionRefused(refusal)
        self._end_loan_of(vm, f"the parameters of VM {vm!r} were changed")
        for vcpu in mine:
            vcpu.weight, vcpu.cap, vcpu.reservation, vcpu.cpus = weight, cap, reservation, cpus
            vcpu.latency = latency or vcpu.latency
        await self._plan()

    async def set_policy(
        self, policy: str, *, batching: Batching | None = None, order: Order | None = None,
        slice_ns: int | None = None, ratelimit_ns: int | None = None, migrate_resist_ns: int | None = None,
    ) -> None:
        """Schedule by *policy* from now on, with these settings where given; returns when every
        dispatcher does. VMs run on meanwhile, and every account goes on. Raises ValueError.
        """
        if policy not in POLICIES:
            raise ValueError(f"unknown policy {policy!r}: {', '.join(POLICIES)}")
        async with self._changing:
            if self._shared is not None:
                self._account()              # what the old policy decided counts as its own
            self._end_loan("the policy was changed")
            self._policy = POLICIES[policy]
            self._batching = batching or self._batching
            self._ledger.batch_ns = self._batching.most_ns if self._policy.batches else 0
            self._order = order or self._order
            self._slice_ns = self._ledger.slice_ns = self._planner.slice_ns = slice_ns or self._slice_ns
            self._ratelimit_ns = min(
                self._ratelimit_ns if ratelimit_ns is None else ratelimit_ns, self._slice_ns)
            if migrate_resist_ns is not None:
                self._planner.migrate_resist_ns = migrate_resist_ns
            self._planner.adopt(self._policy)
            shared = self._shared
            if shared is None or self._closing:
                self._crew.leave_to_kernel(not self._policy.dispatches)
                return
            if self._policy.dispatches:
                self._baseline.withdraw()
            self._publish(shared)
            self._crew.leave_to_kernel(not self._policy.dispatches)
            epoch = shared.bump()
            with trio.move_on_after(CHANGE_S):
                await until(lambda: self._closing or self._crew.follow(epoch))
            await self._plan()

    # -- an order that is lent ---------------------------------------------------------------

    async def lend(self, vms: Sequence[str]) -> Loan:
        """Bring these VMs together on one host CPU, whose order is the loan's script from now on.

        Raises LoanRefused.
        """
        return await self._lender.lend(vms)

    def note_loan(self) -> None:
        """Bring the slices of the loan up to now."""
        if self._shared is not None:
            self._account()

    @property
    def lends(self) -> bool:
        """An order is lent at the moment."""
        return self._lender.loan is not None

    def end_loan(self, loan: Loan, reason: str) -> None:
        """Everything goes back; one that has ended is no error."""
        if self._lender.loan is loan:
            self._end_loan(reason)

    def _end_loan_of(self, vm: str, reason: str) -> None:
        if self._lender.lends(vm):
            self._end_loan(reason)

    def _end_loan(self, reason: str) -> None:
        self.note_loan()
        self._lender.end(reason)

    def _publish(self, shared: Shared) -> None:
        """What dispatchers need to know of policy and settings."""
        for name, value in (
            ("slice_ns", self._slice_ns), ("ratelimit_ns", self._ratelimit_ns),
            ("policy", tuple(POLICIES).index(self._policy.name)),
            ("mode_batch_ns", self._batching.batch_ns),
            ("mode_wait_max_ns", self._batching.wait_max_ns),
            ("mode_budget_ns", self._batching.budget_ns),
            ("order_jitter_ns", min(self._order.jitter_ns, self._slice_ns)), ("order_seed", self._order.seed),
        ):
            shared.set(name, value)

    async def _plan(self) -> None:
        if self._shared is not None and not self._closing:
            await self._planner.plan()
            self._follow_kernel()

    def _reservations_refused(self) -> str | None:
        """Why the reservations do not fit the host CPUs that are there; None: they do."""
        return admit(self._planner.demands(everyone=True), sorted(self._host_cpus.present))

    async def _plan_for_other_cpus(self) -> None:
        self._lender.end("host CPUs came or went")
        self._baseline.cpus = self._host_cpus.present
        await self._plan()

    async def _replan_vacated(self) -> None:
        while True:
            await self._crew.plan_wanted.wait()
            self._crew.plan_wanted = trio.Event()
            await self._plan()

    def _follow_kernel(self) -> None:
        if not self._policy.dispatches and not self._closing:
            self._baseline.apply()

    def _tell_split(self, split: Split | None) -> None:
        """What an operator should know of a partition that cannot keep modes apart."""
        if split is None or not split.meeting:
            self._unwarn("modes-meet")
        else:
            self._warn(
                "modes-meet", "info",
                "the policy partition cannot keep the modes apart for "
                f"{', '.join(split.meeting)}: on what they may use there is no core for their mode"
                " alone; where modes meet a CPU changes modes as under batch",
                "let VMs use more cores ([host] cpus, cpus of the VM), or choose another policy")

    # -- accounts ----------------------------------------------------------------------------

    def _account(self) -> None:
        """Fold the rings of the host CPUs, and bring the ledger up to now."""
        for host in self._crew.hosts.values():
            records = host.reader.read()
            host.account.fold(records, self._policy.name)
            self._recorder.note(host.cpu, records)
            if self._observer is not None and records:
                self._observer.slices(host.cpu, records)
            if (loan := self._lender.loan) is not None and loan.cpu == host.cpu:
                loan.note(records)
        self._ledger.account(time.monotonic_ns(), self._planner.period_ns)

    def recording(self, reason: str, seconds: float | None = None) -> PackedRecording:
        """The slices of the last `seconds` (None: all that are kept), the newest included."""
        if self._shared is not None:
            self._account()
        return self._recorder.copy(time.monotonic_ns(), reason, seconds)

    async def record_inputs(self, seconds: float) -> Iterator[str]:
        """What run queues are told and answer for so long (at most a minute), line by line, for
        `mixvisor simulate --replay`. Raises ValueError where nothing can be recorded.
        """
        shared = self._shared
        if shared is None or self._closing:
            raise ValueError("the scheduler is not running")
        if not self._policy.dispatches or self._crew.kind == "plain":
            raise ValueError("the kernel takes the decisions: there are no run queues of ours to record")
        async with self._recording_inputs:
            return await record(self._crew, shared, self._manner, seconds)

    def _manner(self) -> Manner:
        return Manner(policy=self._policy.name, slice_ns=self._slice_ns, ratelimit_ns=self._ratelimit_ns,
                      batching=self._batching, order=self._order)

    async def _account_forever(self) -> None:
        slow = 0.0
        while True:
            await trio.sleep(ACCOUNT_S)
            self._account()
            self._follow_kernel()
            self._ledger.remember()
            slow += ACCOUNT_S
            if slow >= SLOW_S:
                slow = 0.0
                for vcpu in self._table:
                    self._ledger.read_proc(vcpu)

    def ran_by_mode(self) -> dict[int, tuple[int, int]]:
        """CPU time of software and of hardware VMs on each host CPU so far, ns; as of the last account."""
        return {host.cpu: (host.account.residency_ns[0], host.account.residency_ns[1])
                for host in self._crew.hosts.values()}

    def dispatching_ns(self) -> int:
        """CPU time of the dispatchers of all host CPUs so far."""
        shared = self._shared
        return 0 if shared is None else sum(
            shared.cpu_get(host.index, "cpu_ns") for host in self._crew.hosts.values())

    def figures(self, vm: str) -> VcpuFigures | None:
        """The first vCPU of a VM; after its release the last state; None: unknown here."""
        vcpu = self._table.get(vm)
        if vcpu is not None and self._shared is not None:
            return self._ledger.figures(vcpu)
        return next(iter(self._past.get(vm, ())), None)

    def figures_of(self, vm: str) -> Sequence[VcpuFigures]:
        """The vCPUs of a VM in the order of their admission; after its release the last state; none: unknown here."""
        vcpus = self._table.of(vm)
        if vcpus and self._shared is not None:
            return [self._ledger.figures(vcpu) for vcpu in vcpus]
        return self._past.get(vm, ())

    def _cpu_figures(self, shared: Shared, host: Host) -> CpuFigures:
        return host.account.figures(
            dispatcher_cpu_ns=shared.cpu_get(host.index, "cpu_ns"),
            lost_records=host.reader.lost,
            runnable=shared.cpu_words(host.index, "runnable", len(MODES)))

    def statistics(self) -> SchedulerStatistics:
        """Everything about scheduling, as of now (at most a tenth of a second old). No I/O."""
        shared, crew = self._shared, self._crew
        if shared is None:
            return self._final or SchedulerStatistics(
                policy=self._policy.name, dispatch=crew.kind, dispatch_reason=crew.reason, fairness=None, errors={},
                guard="absent", cpus=(), vcpus=())
        errors: Mapping[str, int] = {
            **crew.errors,
            "refused_calls": sum(
                shared.cpu_get(host.index, "refusals") for host in crew.hosts.values())}
        return SchedulerStatistics(
            policy=self._policy.name, dispatch=crew.kind, dispatch_reason=crew.reason, fairness=self._ledger.fairness(),
            errors={stage: count for stage, count in errors.items() if count},
            guard=crew.guard_state,
            cpus=tuple(self._cpu_figures(shared, host) for host in crew.hosts.values()),
            vcpus=tuple(self._ledger.figures(vcpu) for vcpu in self._table))
