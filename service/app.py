"""The service: everything is put together here, and nowhere else.

One nursery holds the HTTP servers, the scheduler, the VMs and the watchers. The order of starting
is the order in which things can be refused: the mode plan, the state directory, the addresses;
only when all of that is had does the first process start, so a refusal leaves nothing behind.
The order of ending is the reverse: VMs, scheduler, zygote, sockets, lock.

The process itself stays off the host CPUs that VMs use where there are others, so that a burst of
API requests costs a VM nothing.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, Literal, cast

import structlog
import trio

from ..config.model import Config, DiskBoot, FlatBoot, MultibootBoot, RomBoot, VmConfig, vm_cpus
from ..metrics.mixing.result import MeasuredHost, MixingResult
from ..metrics.snapshot import (
    CpuSnapshot,
    Histogram,
    HostSnapshot,
    Mode,
    SchedulerSnapshot,
    ServiceSnapshot,
    Snapshot,
)
from ..sched.accounts import HistogramFigures, SchedulerStatistics, VcpuFigures
from ..sched.recorder import PackedRecording
from ..sched.supervisor import DispatchRefused, Scheduler
from ..vm.guests import BUILTIN, pokes
from ..vm.host import HostFacts
from ..vm.lifecycle import Phase
from ..vm.modes import ModeDecision, ModeRefusal, plan
from ..vm.worker.protocol import WorkerSpec
from .backend import Action, Conflict, NotFound, ServiceError, Unusable
from .children import open_zygote
from .limits import processes_left, raise_open_files, shortage
from .loans import Loans
from .machine import Machine, MachineContext
from .measured import Measured
from .measuring import Measuring
from .mixed import Mixed, measured_cost
from .rivals import Rivals
from .savefile import SUFFIX, SavedFile
from .sharing import PARAMETERS, changed_scheduler, changed_vm, crossing_cost, scheduler_settings
from .statedir import StateDir
from .warnings import Board

__all__ = ["Service", "worker_spec"]

log = structlog.get_logger("mixvisor")

VERSION: Final = version("mixvisor")
GuardState = Literal["watching", "fired", "absent"]
MOVED: Final = 0.2               # of the measured cost: less is no reason to reckon a budget anew
SNAPSHOT_SECONDS: Final = 0.1
RECORD_PAUSE_SECONDS: Final = 10.0     # trouble that comes in swarms is recorded once
TROUBLE: Final = ("guard-fired", "guard-lost", "dispatcher-died")
DRAIN_SECONDS: Final = 1.2       # for all VMs together; who has not ended by then is killed


def worker_spec(vm: VmConfig, decision: ModeDecision, *, sandbox: bool) -> WorkerSpec:
    """What the worker of this VM is told. Raises ServiceError for a guest that is not there."""
    common: dict[str, Any] = {
        "name": vm.name, "engine": decision.engine, "memory_bytes": vm.memory, "vcpus": vm.vcpus,
        "check_accesses": vm.check_accesses, "sandbox": sandbox}
    boot = vm.boot
    if isinstance(boot, DiskBoot):
        return WorkerSpec(**common, boot="disk")
    if isinstance(boot, FlatBoot):
        return WorkerSpec(**common, boot="flat", bits=boot.bits, load=boot.load, entry=boot.start)
    if isinstance(boot, RomBoot):
        return WorkerSpec(**common, boot="rom", post_ports=list(boot.post_ports))
    if isinstance(boot, MultibootBoot):
        return WorkerSpec(**common, boot="multiboot", command_line=boot.command_line, modules=boot.module_lines)
    guest = BUILTIN[boot.guest]
    return WorkerSpec(**common, boot="flat", builtin=guest.name, bits=guest.bits, load=guest.load,
                      entry=guest.entry, pokes=pokes(guest.name, boot.parameters))


def _decide(config: Config, facts: HostFacts) -> dict[str, ModeDecision]:
    """The mode of every VM. Raises Unusable with every refusal: none is half-applied."""
    decisions = plan(config.vms, facts.modes)
    refused = [answer for answer in decisions.values() if isinstance(answer, ModeRefusal)]
    if refused:
        raise Unusable("\n".join(str(refusal) for refusal in refused))
    return {name: answer for name, answer in decisions.items() if isinstance(answer, ModeDecision)}


def _only(group: BaseExceptionGroup[BaseException]) -> ServiceError | None:
    """The one ServiceError that a group holds, when it holds nothing else."""
    found: BaseException = group
    while isinstance(found, BaseExceptionGroup):
        if len(found.exceptions) != 1:
            return None
        found = found.exceptions[0]
    return found if isinstance(found, ServiceError) else None


class Service:
    """A running mixvisor; implements `service.backend.Backend`.

    config: a checked configuration. state_dir: lock and serial logs. socket: where the control
    API listens (None: nowhere). facts: the host, read afresh when None.
    """

    def __init__(
        self, config: Config, *, state_dir: Path, socket: Path | None, facts: HostFacts | None = None,
        sandbox: bool = True,
    ) -> None:
        self.config = config
        self.scheduling = config.scheduler     # [scheduler] as it is in force
        self.facts = facts or HostFacts.read()
        self.board = Board()
        self.ready = False
        self.metrics_address: str | None = None
        self._state_path = state_dir
        self._socket = socket
        self._sandbox = sandbox
        self._started_unix_s = time.time()
        self._machines: dict[str, Machine] = {}
        self._scheduler: Scheduler | None = None
        self._loans: Loans | None = None
        host = MeasuredHost(
            technology=self.facts.technology, cpu_model=self.facts.cpu_model, kernel=self.facts.kernel)
        self._measured = Measured(state_dir, host, self._act_on)
        self._record_from = 0.0            # when trouble is recorded again
        self._shutdown = trio.Event()
        self._sharing = trio.Lock()            # one change of how CPUs are shared at a time
        self._cost_used = crossing_cost(self.scheduling, None)     # what mode_loss_max goes by
        self._cost_moved = trio.Event()
        self._cached: tuple[float, Snapshot] | None = None
        self.vm_cpus = vm_cpus(config, self.facts.cpus)
        self.decisions = _decide(config, self.facts)
        self.mixed = Mixed(self.board, self.facts.modes, config.scheduler.policy, running=self._running,
                           placed=self._placed)
        self.measuring = Measuring(
            host, self.facts.topology, running=self._seen, scheduling=lambda: self.scheduling,
            dispatch=self._dispatch, ran=lambda: self._scheduler.ran_by_mode() if self._scheduler else {},
            dispatching=lambda: self._scheduler.dispatching_ns() if self._scheduler else 0,
            on_demand=lambda: self._measured.result, tell=self._told)
        self._rivals = Rivals(self.board, self.facts.technology, refuse=config.host.conflicts == "refuse")

    # -- the life of the service ----------------------------------------------------------

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until `request_shutdown` or cancellation; then end everything within two seconds.

        Reports started once every autostart VM runs or has failed. Raises ServiceError where the
        service cannot start; nothing is left behind then.
        """
        state = StateDir(self._state_path)
        try:
            self._raise_limits()
            self._measured.recall()
            with self._off_the_vm_cpus():
                async with trio.open_nursery() as servers:
                    await self._serve(servers)
                    await self._run_vms(state, task_status)
                    servers.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            # One plain refusal rather than the nurseries that it passed through.
            refusal = _only(group)
            if refusal is None:
                raise
            raise refusal from None
        finally:
            state.close()

    async def _serve(self, nursery: trio.Nursery) -> None:
        from .api import control_app, metrics_app
        from .http import serve

        if self._socket is not None:
            await nursery.start(lambda task_status: serve(
                control_app(self), unix_socket=self._socket, task_status=task_status))
        listen = self.config.metrics.listen
        if listen != "none":
            self.metrics_address = await nursery.start(lambda task_status: serve(
                metrics_app(self), tcp=listen, task_status=task_status))

    async def _run_vms(self, state: StateDir, task_status: trio.TaskStatus[None]) -> None:
        def scheduler_warns(
            code: str, severity: Literal["info", "warning", "critical"], message: str, advice: str,
        ) -> None:
            self.board.put(code, severity, message, advice)
            now = time.monotonic()
            if code in TROUBLE and now >= self._record_from:
                self._record_from = now + RECORD_PAUSE_SECONDS
                nursery.start_soon(self._keep_recording, state, code)

        async with open_zygote() as zygote, trio.open_nursery() as nursery:
            scheduler = Scheduler(
                cpus=self.vm_cpus, dispatch=self.config.host.dispatch,
                spawn=zygote.spawn, warn=scheduler_warns, unwarn=self.board.clear,
                observer=self.measuring, siblings={cpu.cpu: frozenset(cpu.siblings) for cpu in self.facts.topology},
                caches={cpu.cpu: frozenset(cpu.cache) for cpu in self.facts.topology},
                **scheduler_settings(self.scheduling, self.measuring.told))
            self._cost_used = crossing_cost(self.scheduling, self.measuring.told)
            try:
                await nursery.start(scheduler.run)
            except DispatchRefused as error:
                raise ServiceError(str(error)) from error
            self._scheduler = scheduler
            self._lift_priority()
            self._loans = Loans(
                self.board, scheduler, nursery, lambda name: self.machine(name).config, asdict(self._measured.host))
            nursery.start_soon(self.mixed.watch)
            nursery.start_soon(self.measuring.run)
            nursery.start_soon(self._follow_cost)
            nursery.start_soon(self._rivals.watch)
            async with trio.open_nursery() as lives:
                context = MachineContext(
                    zygote=zygote, scheduler=scheduler, board=self.board, nursery=lives,
                    changed=self._changed, rivals=self._rivals,
                    technology=self.facts.technology)
                self._define(context, state)
                try:
                    async with trio.open_nursery() as starting:
                        starting.start_soon(self._autostart, task_status)
                        await self._shutdown.wait()
                        starting.cancel_scope.cancel()
                finally:
                    self.ready = False
                    with trio.CancelScope(shield=True):
                        await self._drain()
                lives.cancel_scope.cancel()
            nursery.cancel_scope.cancel()

    def _define(self, context: MachineContext, state: StateDir) -> None:
        for vm in self.config.vms:
            decision = self.decisions[vm.name]
            allowed = frozenset(vm.cpus or self.vm_cpus) & frozenset(self.vm_cpus)
            log.info(f"{vm.name} runs in {decision.mode} mode: {decision.reason}", code="vm-mode", vm=vm.name,
                     mode=decision.mode, rule=decision.rule, notes=list(decision.notes),
                     refused=[f"{other.mode}: {other.why} ({other.rule})" for other in decision.alternatives])
            serial_log = state.log_of(vm.name) if vm.console_kind == "serial" else None
            self._machines[vm.name] = Machine(
                vm, decision, worker_spec(vm, decision, sandbox=self._sandbox),
                allowed, context, serial_log)

    async def _autostart(self, task_status: trio.TaskStatus[None]) -> None:
        try:
            async with trio.open_nursery() as nursery:
                for machine in self._machines.values():
                    if machine.config.autostart:
                        nursery.start_soon(self._start_quietly, machine)
            # What is alive now lives long: a full collection that walks all of it each time costs
            # 50 ms, in which nobody gets an answer.
            gc.collect()
            gc.freeze()
            self.ready = True
        finally:
            task_status.started()              # also when it is to end before it was ready

    async def _start_quietly(self, machine: Machine) -> None:
        try:
            await machine.start()
        except ServiceError:
            # Logged where it happened, shown as the VM's state: the other VMs start all the same.
            return

    async def _drain(self) -> None:
        """Stop every VM; who has not ended after DRAIN_SECONDS is killed."""
        async def end(machine: Machine, how: Action) -> None:
            try:
                await getattr(machine, how)()
            except ServiceError:
                # It ended by itself meanwhile.
                return

        def unfinished() -> list[Machine]:
            return [machine for machine in self._machines.values() if machine.unfinished]

        with trio.move_on_after(DRAIN_SECONDS):
            async with trio.open_nursery() as nursery:
                for machine in unfinished():
                    nursery.start_soon(end, machine, "stop")
        async with trio.open_nursery() as nursery:
            for machine in unfinished():
                nursery.start_soon(end, machine, "kill")

    @contextmanager
    def _off_the_vm_cpus(self) -> Iterator[None]:
        before = os.sched_getaffinity(0)
        rest = before - set(self.vm_cpus)
        if rest:
            os.sched_setaffinity(0, rest)
        else:
            self.board.put(
                "no-spare-cpu", "info", "VMs may use every host CPU, so the supervisor shares one with them",
                "leave one out of [host] cpus to keep the supervisor's work away from the VMs")
        nice = os.getpriority(os.PRIO_PROCESS, 0)
        try:
            yield
        finally:
            os.sched_setaffinity(0, before)
            if os.getpriority(os.PRIO_PROCESS, 0) != nice:
                os.setpriority(os.PRIO_PROCESS, 0, nice)

    def _raise_limits(self) -> None:
        """Before the zygote's start: dispatchers hold descriptors of every VM too."""
        vms = self.config.vms
        short = shortage(
            vms=len(vms), vcpus=sum(vm.vcpus for vm in vms), disks=sum(len(vm.drives) for vm in vms),
            cpus=len(self.vm_cpus), open_files=raise_open_files(), processes=processes_left())
        if short is not None:
            self.board.put("limits-low", "warning", *short)

    def _lift_priority(self) -> None:
        """Wake on time on a full host. After the zygote's start: VMs must not inherit it."""
        try:
            os.setpriority(os.PRIO_PROCESS, 0, -11)
        except PermissionError:
            self.board.put(
                "supervisor-priority", "info",
                "the supervisor may not raise its own priority, so on a full host it may wake late",
                "grant CAP_SYS_NICE (systemd: AmbientCapabilities=CAP_SYS_NICE)")

    async def _keep_recording(self, state: StateDir, reason: str) -> None:
        """What the host CPUs did until just now, into the state directory."""
        if self._scheduler is None:
            return
        packed = self._scheduler.recording(reason)
        try:
            path = await trio.to_thread.run_sync(
                lambda: state.keep_recording(reason, packed.unpack().lines()), abandon_on_cancel=True)
        except OSError as error:
            log.warning("the recording of the scheduler's last slices cannot be written",
                        code="recording-failed", reason=reason, error=error.strerror)
            return
        log.info("the scheduler's last slices are kept: mixvisor trace --from FILE shows them",
                 code="recording-kept", reason=reason, file=str(path))

    # -- warnings -------------------------------------------------------------------------

    def _changed(self) -> None:
        """A VM moved along its life: what is true of the running set may have changed."""
        self._cached = None
        self.mixed.changed(len(self._machines))

    # -- what mixing costs ----------------------------------------------------------------

    def _seen(self) -> dict[str, tuple[Mode, bool]]:
        """The VMs that run: their modes, and whether their guests keep a progress counter."""
        return {m.name: (m.decision.mode, m.config.progress is not None or self.measuring.instructions_count)
                for m in self._machines.values() if m.phase is Phase.RUNNING}

    def _dispatch(self) -> str:
        return self._scheduler.statistics().dispatch if self._scheduler else "plain"

    def _told(self, told: MixingResult | None) -> None:
        self.mixed.measured(measured_cost(told))
        self._cost_moved.set()
        self._cached = None

    async def _follow_cost(self) -> None:
        """The budget of changes of mode goes by what was measured, unless the file names a cost."""
        while True:
            await self._cost_moved.wait()
            self._cost_moved = trio.Event()
            cost_us, source = crossing_cost(self.scheduling, self.measuring.told)
            used_us, _source = self._cost_used
            config = self.scheduling
            if (not config.mode_loss_max or self._scheduler is None or source != "measured"
                    or abs(cost_us - used_us) <= MOVED * used_us
                    or self._scheduler.lends):      # a change of policy would end what measures: later
                continue
            async with self._sharing:
                self._cost_used = cost_us, source
                await self._scheduler.set_policy(**scheduler_settings(self.scheduling, self.measuring.told))
            log.info(f"mode_loss_max reckons with {cost_us:.1f} us a crossing, as measured", code="cost-followed",
                     crossing_cost_us=cost_us, before=used_us)

    def _running(self) -> dict[str, ModeDecision]:
        return {m.name: m.decision for m in self._machines.values() if m.phase is Phase.RUNNING}

    def _placed(self, name: str) -> tuple[int, ...]:
        """The host CPUs of a VM's vCPUs now."""
        figures = self._scheduler.figures_of(name) if self._scheduler else ()
        return tuple(sorted({one.cpu for one in figures if one.cpu is not None}))

    # -- Backend --------------------------------------------------------------------------

    def _lender(self) -> Loans:
        if self._loans is None or not self.ready:
            raise ServiceError("the service is starting or ending; try again")
        return self._loans

    async def lend(self, vms: Any) -> dict[str, Any]:
        return await self._lender().lend(vms)

    def exchange(self, loan: str, script: Any) -> dict[str, Any]:
        return self._lender().exchange(loan, script)

    def give_back(self, loan: str) -> dict[str, Any]:
        return self._lender().give_back(loan)

    def mixing(self) -> MixingResult | None:
        return self._measured.result

    def keep_mixing(self, result: MixingResult) -> None:
        self._measured.keep(result)

    def _act_on(self, result: MixingResult) -> None:
        self.measuring.reconsider()

    def request_shutdown(self) -> None:
        self._shutdown.set()

    def machine(self, name: str) -> Machine:
        try:
            return self._machines[name]
        except KeyError:
            known = ", ".join(self._machines) or "none"
            raise NotFound(f"there is no VM named {name!r}; defined: {known}") from None

    async def act(self, name: str, action: Action) -> None:
        machine = self.machine(name)
        if not self.ready:
            raise ServiceError("the service is starting or ending; try again")
        await getattr(machine, action)()

    async def ask(self, name: str, op: str, **arguments: Any) -> dict[str, Any]:
        return await self.machine(name).ask(op, **arguments)

    async def set_policy(self, change: Mapping[str, Any]) -> dict[str, Any]:
        if change:
            async with self._sharing:
                if self._scheduler is None or not self.ready:
                    raise ServiceError("the service is starting or ending; try again")
                new = changed_scheduler(self.scheduling, change)
                await self._scheduler.set_policy(**scheduler_settings(new, self.measuring.told))
                self.scheduling = new
                self._cost_used = crossing_cost(new, self.measuring.told)
            log.info(f"VMs are scheduled by the policy {new.policy}", code="policy-changed", **change)
            self.mixed.schedule(new.policy)
            self._cached = None
        # As in force: a cost that was measured stands in for the default.
        return {**self.scheduling.model_dump(), "crossing_cost_us": round(self._cost_used[0])}

    async def set_mode(self, name: str, mode: Mode) -> dict[str, Any]:
        machine = self._ready_machine(name)
        answer = await machine.set_mode(mode)
        self._cached = None
        return answer

    async def save(self, name: str, file: Path | None, *, leave_running: bool) -> dict[str, Any]:
        machine = self._ready_machine(name)
        if file is None:
            folder = self._state_path / "saved"
            folder.mkdir(mode=0o700, exist_ok=True)
            file = (folder / f"{name}{SUFFIX}").absolute()      # told to somebody in another folder
        return await machine.save(file, leave_running=leave_running)

    async def restore(self, file: Path, name: str | None) -> dict[str, Any]:
        saved = await trio.to_thread.run_sync(SavedFile, file)
        try:
            machine = self._ready_machine(name or saved.header.name)
        except ServiceError:
            saved.close()
            raise
        await machine.start(saved)
        return {"name": machine.name, "file": str(file), "mode": machine.decision.mode}

    def _ready_machine(self, name: str) -> Machine:
        machine = self.machine(name)
        if not self.ready:
            raise ServiceError("the service is starting or ending; try again")
        return machine

    async def set_parameters(self, name: str, change: Mapping[str, Any]) -> dict[str, Any]:
        machine = self.machine(name)
        if change:
            async with self._sharing:
                new = changed_vm(
                    machine.config, change, vm_cpus=self.vm_cpus, limits=self.facts.limits,
                    others=[m.config for m in self._machines.values() if m is not machine])
                await machine.set_parameters(new, frozenset(new.cpus or self.vm_cpus))
            log.info(f"the parameters of {name} have changed", code="vm-changed", vm=name, **change)
            self._cached = None
        return {key: getattr(machine.config, key) for key in PARAMETERS}

    def recording(self, seconds: float | None) -> PackedRecording:
        if self._scheduler is None:
            raise ServiceError("the service is starting; try again")
        return self._scheduler.recording("asked for", seconds)

    async def record_inputs(self, seconds: float) -> Iterator[str]:
        if self._scheduler is None:
            raise ServiceError("the service is starting; try again")
        try:
            return await self._scheduler.record_inputs(seconds)
        except ValueError as error:
            raise Conflict(str(error)) from error

    def snapshot(self) -> Snapshot:
        now = time.monotonic()
        if self._cached is None or now - self._cached[0] >= SNAPSHOT_SECONDS:
            self._cached = (now, self._picture())
        return self._cached[1]

    def _picture(self) -> Snapshot:
        facts = self.facts
        statistics = self._scheduler.statistics() if self._scheduler else None
        figures: dict[str, list[VcpuFigures]] = {}
        for one in statistics.vcpus if statistics else ():
            figures.setdefault(one.vm, []).append(one)
        return Snapshot(
            taken_unix_s=time.time(), monotonic_ns=time.monotonic_ns(),
            service=ServiceSnapshot(
                version=VERSION, pid=os.getpid(), started_unix_s=self._started_unix_s,
                config_path=str(self.config.path) if self.config.path else None, ready=self.ready),
            host=HostSnapshot(
                technology=facts.technology, kvm=facts.kvm.why or "usable", kernel=facts.kernel,
                cpu_model=facts.cpu_model, cpus=facts.online_cpus, vm_cpus=self.vm_cpus,
                memory_bytes=facts.memory_bytes),
            scheduler=SchedulerSnapshot(
                policy=self.scheduling.policy,
                dispatch=statistics.dispatch if statistics else "plain",
                dispatch_reason=statistics.dispatch_reason if statistics else "not started yet",
                slice_ns=self.scheduling.slice_us * 1000,
                fairness=statistics.fairness if statistics else None,
                errors=statistics.errors if statistics else {},
                guard=cast("GuardState", statistics.guard) if statistics else "absent"),
            cpus=self._cpu_snapshots(statistics),
            vms=tuple(machine.snapshot(figures.get(name)) for name, machine in self._machines.items()),
            warnings=self.board.now(),
            mixing=self.measuring.snapshot(self.scheduling, self._machines))

    def _cpu_snapshots(self, statistics: SchedulerStatistics | None) -> tuple[CpuSnapshot, ...]:
        if statistics is None:
            return ()
        where = {cpu.cpu: cpu for cpu in self.facts.topology}
        return tuple(CpuSnapshot(
            cpu=f.cpu, core=where[f.cpu].core, socket=where[f.cpu].socket,
            residency_ns=f.residency_ns, switches=f.switches,
            run_length={mode: _histogram(h) for mode, h in f.run_length.items()},
            vm_switches=f.vm_switches, slices=f.slices, lateness=_histogram(f.lateness),
            decision={policy: _histogram(h) for policy, h in f.decision.items()}, overrun=_histogram(f.overrun),
            dispatcher_cpu_ns=f.dispatcher_cpu_ns, frozen_ns=f.frozen_ns,
            lost_records=f.lost_records, runnable=f.runnable) for f in statistics.cpus)


def _histogram(figures: HistogramFigures) -> Histogram:
    return Histogram(figures.bounds_ns, figures.counts, figures.sum_ns)
