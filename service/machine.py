"""One VM from definition to end: its life, its commands, and how it looks to the rest (its snapshot).

The life is the table of vm/lifecycle.py; this module moves along it while the world moves.
One task per running VM (`_lives`) owns the worker process: it starts it, hands its thread to the
scheduler, waits for the end, takes the thread back *before* the process is killed or reaped (a
killed real-time thread behind others never gets the CPU to die), and decides about a restart.
Commands only say what is wanted (`_Life`) and wait until it is so: a command that is given up or
comes at a bad moment leaves nothing half done.

Invariant.  Whatever happens to a worker, and whatever defect we meet, ends this VM in a phase
with a reason; no exception leaves `_lives`.
"""

from __future__ import annotations

import base64
import errno
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import structlog
import trio

from ..config.model import VmConfig
from ..metrics.snapshot import ModeAlternative, VcpuSnapshot, VmSnapshot
from ..sched.accounts import VcpuFigures
from ..sched.shared import EVENTS
from ..sched.supervisor import AdmissionRefused, Scheduler, VcpuThread
from ..vm.engines.base import EXIT_KINDS
from ..vm.lifecycle import ENDED, IllegalMove, Phase, Signal, decide_restart, move
from ..vm.modes import Mode, ModeDecision, moved
from ..vm.worker.devices.disk import DAMAGED
from ..vm.worker.protocol import Ending, WorkerSpec
from .backend import Conflict, ServiceError, Unusable
from .children import Zygote
from .images import open_images
from .incarnation import Incarnation
from .link import WorkerLink, harmless_screen
from .moving import Moves, ask_for_mode, check_move, write_saved
from .reports import SHAPES, checked, for_the_log
from .rivals import Rivals
from .savefile import SavedFile
from .statedir import SerialLog
from .totals import Totals, VcpuTotals, totals_of
from .warnings import Board

__all__ = ["Machine", "MachineContext"]

log = structlog.get_logger("mixvisor")

STOP_SECONDS: Final = 3.0        # a guest that has not ended by then is killed
BURY_SECONDS: Final = 5.0        # from SIGKILL to the end of the process
SERIAL_SECONDS: Final = 0.5
DISK_SECONDS: Final = 0.5
OPERATIONS: Final = frozenset({"screen", "keys", "serial", "serial-input", "registers", "calls", "why", *SHAPES})


@dataclass(slots=True, kw_only=True)
class MachineContext:
    """What a VM needs of the service around it."""

    zygote: Zygote
    scheduler: Scheduler
    board: Board
    nursery: trio.Nursery
    changed: Callable[[], None]      # a VM moved along its life
    rivals: Rivals | None = None     # who may hold back a hardware VM; None: nobody looks
    technology: str = ""             # of the host: what its KVM cannot go on from


class _Life:
    """From one `start` to its end, automatic restarts included: what is wanted, and how far it is.

    `saved`: what its first incarnation goes on from; owned.
    """

    def __init__(self, saved: SavedFile | None = None) -> None:
        self.saved = saved
        self.from_file = saved is not None
        self.stop = trio.Event()               # its end is wanted, and no restart
        self.kill = trio.Event()               # the same, at once
        self.settled = trio.Event()            # the guest has run, or never will
        self.over = trio.Event()
        self.refusal: ServiceError | None = None     # why it never ran, once settled


class Machine:
    def __init__(
        self, config: VmConfig, decision: ModeDecision, spec: WorkerSpec, cpus: frozenset[int],
        context: MachineContext, serial_log: SerialLog | None,
    ) -> None:
        self.config = config
        self.decision = decision
        self.spec = spec
        self.cpus = cpus
        self.phase = Phase.DEFINED
        self.reason = ""
        self.restarts = 0
        self.started_unix_s: float | None = None
        self._context = context
        self._log = serial_log
        self._logged = 0                       # offset in the serial stream of the live incarnation
        self._live_one: Incarnation | None = None
        self._past = Totals()                  # of the incarnations that have ended
        self._incarnations = 0                 # how many those are
        self._legacy: dict[str, dict[str, Any]] = {}   # what the last guest left: screen, serial
        self._ending: tuple[Ending, float] | None = None    # of the last guest, and when (seconds since 1970)
        self._life: _Life | None = None
        self._switching = trio.Lock()          # one pause, resume, change of mode or save at a time
        self._planned: ModeDecision | None = None      # of a guest that was moved: what its next start goes by
        self.moves = Moves()

    @property
    def unfinished(self) -> bool:
        """It lives, or will start again by itself."""
        return self._life is not None and not self._life.over.is_set()

    @property
    def name(self) -> str:
        return self.config.name

    # -- phases ---------------------------------------------------------------------------

    def _move(self, sign: Signal, reason: str = "") -> None:
        self.phase = move(self.name, self.phase, sign)
        self.reason = reason
        self._context.changed()
        log.info(f"{self.name} is {self.phase.value}", code=f"vm-{self.phase.value}", vm=self.name,
                 **({"reason": reason} if reason else {}))

    # -- commands -------------------------------------------------------------------------

    def _command(self, sign: Signal) -> None:
        try:
            self._move(sign)
        except IllegalMove as error:
            raise Conflict(str(error)) from error

    async def start(self, saved: SavedFile | None = None) -> None:
        """Start it, from *saved* where that is given (it is closed then), and return when the guest runs.

        Raises Conflict, ServiceError.
        """
        before = self._life
        try:
            self._command(Signal.START)
        except Conflict:
            if saved is not None:
                saved.close()
            raise
        if before is not None:
            before.stop.set()                  # it waits for its automatic restart: the operator is faster
        life = self._life = _Life(saved)
        self._context.nursery.start_soon(self._lives, life)
        await life.settled.wait()
        if life.refusal is not None:
            raise life.refusal

    async def stop(self) -> None:
        """End the guest in good order, by force after `STOP_SECONDS`."""
        await self._end(Signal.STOP)

    async def kill(self) -> None:
        """End the worker process at once."""
        await self._end(Signal.KILL)

    async def _end(self, sign: Signal) -> None:
        life = self._life
        if life is not None and self.phase in ENDED and not life.stop.is_set():
            # It waits for its automatic restart, which is now off.
            self.reason = f"asked to {sign.value} before its restart"
            life.stop.set()
            await life.over.wait()
            return
        self._command(sign)
        assert life is not None
        life.stop.set()
        if sign is Signal.KILL:
            life.kill.set()
        await life.over.wait()

    async def set_parameters(self, config: VmConfig, cpus: frozenset[int]) -> None:
        """Weight, cap, reservation, latency class and host CPUs as *config* and *cpus* say, from now on and at every
        later start. Raises Conflict where they cannot be had, and changes nothing then.
        """
        scheduler = self._context.scheduler
        if scheduler.schedules(self.name):
            try:
                await scheduler.set_parameters(
                    self.name, weight=config.weight, cap=config.cap / 100,
                    reservation=config.reservation / 100, latency=config.latency, cpus=cpus)
            except AdmissionRefused as error:
                raise Conflict(f"{self.name} stays as it is: {error}") from error
        self.config, self.cpus = config, cpus

    async def pause(self) -> None:
        async with self._switching:
            await self._pause()

    async def _pause(self) -> None:
        one, link = self._in(Phase.RUNNING, "pause")
        try:
            await link.ask("pause")
            await self._context.scheduler.pause(self.name)
            self._switched(one, Signal.PAUSE)
        except BaseException:
            await self._undo(one, Phase.RUNNING, "resume")
            raise

    async def resume(self) -> None:
        async with self._switching:
            await self._resume()

    async def _resume(self) -> None:
        one, link = self._in(Phase.PAUSED, "resume")
        try:
            await self._context.scheduler.resume(self.name)
            await link.ask("resume")
            self._switched(one, Signal.RESUME)
        except BaseException:
            await self._undo(one, Phase.PAUSED, "pause")
            raise

    def _alive(self, what: str) -> tuple[Incarnation, WorkerLink]:
        one = self._live_one
        if self.phase not in (Phase.RUNNING, Phase.PAUSED) or one is None or one.link is None:
            raise Conflict(f"{self.name} is {self.phase.value}; {what} needs a running or paused VM")
        return one, one.link

    # -- another mode, a file -------------------------------------------------------------

    async def set_mode(self, mode: Mode) -> dict[str, Any]:
        """The guest goes on in another mode, until it ends. Raises Conflict, and has changed nothing then."""
        async with self._switching:
            one, link = self._alive("a change of mode")
            planned = self._planned or self.decision
            rivals = self._context.rivals if mode == "hardware" else None
            stop_ns = 0
            changed = self.decision.mode != mode
            if changed:
                check_move(self.name, planned, self.decision.mode, mode)
                if rivals is not None:
                    await rivals.admit(self.name)
                # Once the worker is asked, what came of it must be known.
                with trio.CancelScope(shield=True):
                    stop_ns = await ask_for_mode(link, self.name, self.decision.mode, mode, self._context.technology)
                    if self._live_one is not one:
                        raise Conflict(f"{self.name} ended meanwhile; it is {self.phase.value}")
                    self._planned, self.decision = planned, moved(planned, mode)
                    self.moves.note(mode, stop_ns)
                    await self._context.scheduler.set_mode(self.name, mode)
                self._context.changed()
                if rivals is not None:
                    rivals.works()
                log.info(f"{self.name} was moved to {mode} mode", code="vm-moved", vm=self.name, mode=mode,
                         stop_ms=stop_ns / 1e6)
            return {"mode": mode, "changed": changed, "stop_seconds": stop_ns / 1e9}

    async def save(self, path: Path, *, leave_running: bool) -> dict[str, Any]:
        """Into a file; then the VM ends, or goes on as it was. Raises ServiceError; then it goes on as it was."""
        async with self._switching:
            one, _link = self._alive("saving")
            resume = self.phase is Phase.RUNNING
            if resume:
                await self._pause()
            stood = time.monotonic()
            saved = False
            try:
                size = await write_saved(path, one, self.decision.mode)
                saved = True
            finally:
                if resume and (leave_running or not saved):
                    with trio.CancelScope(shield=True):
                        await self._resume()
            seconds = time.monotonic() - stood
            self.moves.saves += 1
            log.info(f"{self.name} is saved to {path}", code="vm-saved", vm=self.name, file=str(path), bytes=size,
                     seconds=round(seconds, 3))
        if not leave_running:
            with trio.CancelScope(shield=True):
                await self.stop()
            self.reason = f"saved to {path}"
        return {"file": str(path), "bytes": size, "seconds": seconds, "running": leave_running and resume}

    def _in(self, phase: Phase, command: str) -> tuple[Incarnation, WorkerLink]:
        one = self._live_one
        if self.phase is not phase or one is None or one.link is None:
            raise Conflict(f"{self.name} is {self.phase.value}; to {command} it, it must be {phase.value}")
        return one, one.link

    def _switched(self, one: Incarnation, sign: Signal) -> None:
        if self._live_one is not one:
            raise Conflict(f"{self.name} ended before it could {sign.value}; it is {self.phase.value}")
        self._command(sign)

    async def _undo(self, one: Incarnation, phase: Phase, op: Literal["pause", "resume"]) -> None:
        """A switch half done is taken back: worker and scheduler stay what `phase` says."""
        if self._live_one is not one or self.phase is not phase or one.link is None:
            return
        # The worker obeys in order: this comes after what it may still find in its socket.
        await one.link.tell(op)
        scheduler = self._context.scheduler
        with trio.CancelScope(shield=True):
            await (scheduler.pause if op == "pause" else scheduler.resume)(self.name)

    async def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        if op not in OPERATIONS:
            raise Unusable(f"there is no operation {op!r}")
        if op == "why":
            return await self._why()
        one = self._live_one
        if one is None and op in self._legacy:
            # A guest that has ended is read like one that runs: why it ended is often on its screen.
            answer = self._legacy[op]
        elif one is None or one.link is None or self.phase not in (Phase.RUNNING, Phase.PAUSED):
            raise Conflict(f"{self.name} is {self.phase.value}; '{op}' needs a running VM")
        else:
            answer = await one.link.ask(op, **arguments)
        if op in SHAPES:
            return checked(op, answer)
        return harmless_screen(answer) if op == "screen" else answer

    async def _why(self) -> dict[str, Any]:
        """How the last guest ended, or where the present one stands."""
        answer: dict[str, Any] = {"name": self.name, "state": self.phase.value, "reason": self.reason,
                                  "restarts": self.restarts, "code": None, "exit_code": None, "since_unix_s": None,
                                  "instruction": None, "registers": None, "report": None}
        if self.phase in (Phase.RUNNING, Phase.PAUSED):
            report = await self.ask("where")
            return {**answer, "report": report, "instruction": report["instruction"],
                    "registers": report["registers"]}
        if self._ending is not None and self.phase in ENDED:
            ending, when_unix_s = self._ending
            answer |= {"code": ending.code, "exit_code": ending.exit_code, "since_unix_s": when_unix_s,
                       "reason": self.reason or ending.reason, "instruction": ending.instruction,
                       "registers": ending.registers, "report": ending.report}
        return answer

    # -- the life -------------------------------------------------------------------------

    async def _lives(self, life: _Life) -> None:
        attempts = 0
        try:
            while True:
                began = trio.current_time()
                await self._one_life(life)
                if life.from_file and self.phase is Phase.FAILED:
                    return                     # who wanted that guest back does not want a fresh one instead
                life.from_file = False
                again = decide_restart(
                    self.config.restart, self.phase, asked=life.stop.is_set(), attempts=attempts,
                    ran_s=trio.current_time() - began)
                if again is None:
                    return
                attempts = again.attempts
                self.reason = f"{self.reason}; starts again in {again.delay_s:g} s".lstrip("; ")
                log.warning(f"{self.name} will start again in {again.delay_s:g} s", code="vm-restart",
                            vm=self.name)
                with trio.move_on_after(again.delay_s):
                    await life.stop.wait()
                if life.stop.is_set():
                    return
                self.restarts += 1
                self._move(Signal.START)
        finally:
            if life.saved is not None:
                life.saved.close()             # nobody came so far
            life.stop.set()                    # it does not come back by itself
            life.over.set()

    async def _one_life(self, life: _Life) -> None:
        """From `starting` to an end, whatever happens: one VM never ends the service."""
        ending = Ending("stopped", "ended with the service", "asked")
        try:
            ending = await self._incarnate(life)
        except (ServiceError, OSError) as error:
            ending = Ending("failed", str(error), "start")
        except Exception as error:
            # The edge of a VM: a defect of ours ends the VM that met it, and is told in full.
            log.error(f"{self.name} met a defect of Mixvisor", code="vm-defect", vm=self.name, exc_info=error)
            ending = Ending("crashed", f"a defect of Mixvisor ended it: {error!r}", "defect")
        finally:
            self._tell_end(life, ending)

    async def _incarnate(self, life: _Life) -> Ending:
        if self._planned is not None:
            self.decision, self._planned = self._planned, None
        rivals = self._context.rivals if self.decision.mode == "hardware" else None
        if rivals is not None:
            await rivals.admit(self.name)
        images = (await trio.to_thread.run_sync(open_images, self.config) if self.config.drives
                  else open_images(self.config))
        spec = replace(self.spec, technology=self._context.technology)
        one = Incarnation(spec, images, self.config.progress)
        try:
            if life.saved is not None:
                saved, life.saved = life.saved, None
                try:
                    await trio.to_thread.run_sync(one.go_on_from, saved)
                finally:
                    saved.close()
                self.moves.restores += 1
            await one.launch(self._context.zygote)
            self._live_one, self._logged = one, 0
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._introduce, one, life)
                nursery.start_soon(self._obey, one, life)
                if self._log is not None:
                    nursery.start_soon(self._keep_log, one)
                if images.disks:
                    nursery.start_soon(self._watch_disks, one)
                await one.watch()
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await self._bury(one)
        return one.ending or Ending("crashed", f"its worker process did not end within {BURY_SECONDS} s "
                                    "of being killed: the kernel holds it", "worker-stuck")

    async def _introduce(self, one: Incarnation, life: _Life) -> None:
        """Wait for the guest to run, then let the scheduler have its threads."""
        assert one.child is not None
        progress = self.config.progress
        try:
            await one.wait_started()
            counter = one.memory_fd if progress is not None else one.count_instructions(self.decision.mode)
            several = len(one.threads) > 1
            for index, thread in enumerate(one.threads):
                if life.stop.is_set() or one.ended.is_set():
                    return
                # The counter is the VM's, and told once. Where there are several vCPUs a halted one sleeps in the
                # kernel, which the status page does not know.
                await self._context.scheduler.admit(VcpuThread(
                    vm=self.name, index=index, pid=one.child.pid, tid=thread, pidfd=one.child.pidfd,
                    mode=self.decision.mode, weight=self.config.weight, cap=self.config.cap / 100,
                    reservation=self.config.reservation / 100, latency=self.config.latency, cpus=self.cpus,
                    siblings=len(one.threads) - 1, status_fd=None if several else one.status_fd,
                    progress_fd=counter if index == 0 else None,
                    progress_offset=EVENTS if progress is None else progress))
        except (ServiceError, OSError, ValueError) as error:
            if one.ending is None:
                one.ending = Ending("failed", str(error), "start")
            one.ended.set()
            return
        if self.phase is Phase.STARTING:
            self.started_unix_s = time.time()
            self._move(Signal.STARTED)
            if self.decision.mode == "hardware" and self._context.rivals is not None:
                self._context.rivals.works()
            life.settled.set()

    async def _obey(self, one: Incarnation, life: _Life) -> None:
        """Once its end is wanted: ask for it, then use force."""
        await life.stop.wait()
        # Given back to the kernel first: a VM that is owed nothing would answer late.
        await self._context.scheduler.release(self.name)
        with trio.move_on_after(STOP_SECONDS) as limit:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._ask_to_stop, one)
                await life.kill.wait()
                nursery.cancel_scope.cancel()
        if one.ending is None:
            text = f"did not stop within {STOP_SECONDS:g} s and was killed" if limit.cancelled_caught else "killed"
            one.ending = Ending("stopped", text, "asked")
        one.ended.set()

    async def _ask_to_stop(self, one: Incarnation) -> None:
        assert one.link is not None
        try:
            await one.link.ask("stop", seconds=STOP_SECONDS)
        except ServiceError as error:
            log.debug("stop was not answered", vm=self.name, error=str(error))

    async def _bury(self, one: Incarnation) -> None:
        """Whatever state the worker is in: afterwards there is none, and its counters are kept."""
        scheduler = self._context.scheduler
        try:
            try:
                await scheduler.release(self.name)
            finally:
                # Also where the scheduler ended under us, as it may when the service is cancelled.
                if one.child is not None:
                    one.child.signal(signal.SIGKILL)  # most often it has ended already
            if one.child is not None:
                with trio.move_on_after(BURY_SECONDS):
                    await one.conclude()
                self._past = self._past.plus(totals_of(one, scheduler.figures_of(self.name)))
                self._incarnations += 1
            if one.legacy:
                self._legacy = one.legacy
                await self._log_serial(one.legacy.get("serial", {}))
        finally:
            self._live_one = None
            scheduler.forget(self.name)
            one.close()

    def _tell_end(self, life: _Life, ending: Ending) -> None:
        reason = ending.reason
        report = None
        if ending.report is not None:
            try:
                report = checked("where", ending.report)
            except ServiceError as error:
                log.debug("the report of a guest's end was no report", vm=self.name, error=str(error))
        self._ending = replace(ending, report=report), time.time()
        if ending.fate == "failed":
            self._move(Signal.START_FAILED, reason)
            log.error(f"{self.name} did not start: {reason}", code="vm-start-failed", vm=self.name)
            if ending.code == "host-busy" and self._context.rivals is not None:
                self._context.rivals.refused(self.name, reason)
        elif life.kill.is_set():
            self._move(Signal.ENDED_STOPPED, "killed")
        elif life.stop.is_set() or ending.fate == "stopped":
            self._move(Signal.ENDED_STOPPED, reason)
        else:
            self._move(Signal.ENDED_CRASHED, reason)
            log.error(f"{self.name} crashed: {reason}", code=f"guest-{ending.code}", vm=self.name,
                      instruction=ending.instruction, registers=ending.registers, **for_the_log(report))
        if not life.settled.is_set():
            if ending.fate == "failed":
                life.refusal = ServiceError(f"{self.name} did not start: {reason}")
            elif life.stop.is_set():
                life.refusal = Conflict(f"{self.name} was ended before it ran: {self.reason}")
            life.settled.set()

    # -- serial log -----------------------------------------------------------------------

    async def _keep_log(self, one: Incarnation) -> None:
        """Copy what the guest writes into its log, a bounded part at a time."""
        assert one.link is not None
        while True:
            await trio.sleep(SERIAL_SECONDS)
            if self.phase is not Phase.RUNNING or one.status.get("serial_bytes") == self._logged:
                continue
            try:
                answer = await one.link.ask("serial", offset=self._logged)
            except ServiceError as error:
                log.debug("serial output was not to be had", vm=self.name, error=str(error))
                continue
            await self._log_serial(answer)

    async def _log_serial(self, answer: dict[str, Any]) -> None:
        """Append an answer of the operation `serial` to the log, less what is there already."""
        if self._log is None:
            return
        to = self._log
        try:
            data = base64.b64decode(answer["data"], validate=True)
            offset = int(answer["offset"])
        except (KeyError, ValueError, TypeError, OverflowError) as error:
            log.debug("serial output was no serial output", vm=self.name, error=str(error))
            return
        end = offset + len(data)
        data = data[max(0, self._logged - offset):]
        self._logged = max(self._logged, end)
        if not data:
            return
        complaint = await trio.to_thread.run_sync(to.append, data)
        code = f"log-lost:{self.name}"
        if complaint:
            self._context.board.put(code, "warning", complaint, "free some space on that disk", (self.name,))
        elif not to.failing:
            self._context.board.clear(code)

    # -- disks ----------------------------------------------------------------------------

    async def _watch_disks(self, one: Incarnation) -> None:
        """Tell the operator when the host cannot do what the guest's disks need."""
        code, told = f"disk-failed:{self.name}", 0
        self._context.board.clear(code)
        while True:
            await trio.sleep(DISK_SECONDS)
            failed = {drive: one.status.get(f"{drive}_errors") for drive in one.images.paths}
            if sum(failed.values()) == told:
                continue
            told = sum(failed.values())
            places = ", ".join(f"{drive} ({one.images.paths[drive]})" for drive, count in failed.items() if count)
            number = one.status.get("disk_error")
            why = ("a sector is not what its checksum says" if number == DAMAGED & 0xFFFF_FFFF
                   else os.strerror(number & 0xFFFF))
            full = number in (errno.ENOSPC, errno.EDQUOT)
            self._context.board.put(
                code, "warning",
                f"a disk of {self.name} cannot be read or written, and the guest was told so: {places}: {why}",
                "free some space on that disk" if full else "look at that file and the disk that it is on",
                (self.name,))

    # -- counters -------------------------------------------------------------------------

    def status_word(self, name: str) -> int:
        """A word of the live worker's status page. Raises Conflict when there is none."""
        if self._live_one is None:
            raise Conflict(f"{self.name} is {self.phase.value}")
        return self._live_one.status.get(name)

    def snapshot(self, figures: Sequence[VcpuFigures] | None = None) -> VmSnapshot:
        """The VM now; `figures` are the scheduler's, where the caller has them at hand."""
        one = self._live_one
        if figures is None:
            figures = self._context.scheduler.figures_of(self.name)
        total = self._past
        if one is not None:
            now = totals_of(one, figures)
            total = now if self._incarnations == 0 else self._past.plus(now)
        config, decision = self.config, self.decision
        places = {of.index: of.cpu for of in figures}
        return VmSnapshot(
            id=self.name, name=self.name, state=self.phase.value, state_reason=self.reason,
            engine=decision.engine, mode=decision.mode, mode_rule=decision.rule, mode_reason=decision.reason,
            os=config.os, bits=config.bits, weight=config.weight, cap_pct=config.cap,
            reservation_pct=config.reservation, latency=config.latency, cpus=tuple(sorted(self.cpus)),
            memory_bytes=config.memory, resident_bytes=one.resident_bytes() if one else 0,
            pid=one.child.pid if one and one.child else None,
            started_unix_s=self.started_unix_s if one else None, restarts=self.restarts,
            vcpus=tuple(VcpuSnapshot(
                index=index, cpu=places.get(index), run_ns=vcpu.run_ns, wait_ns=vcpu.wait_ns,
                capped_ns=vcpu.capped_ns, halted_ns=vcpu.halted_ns, migrations=vcpu.migrations,
                slices=vcpu.slices)
                for index, vcpu in enumerate(total.vcpus or [VcpuTotals() for _ in range(config.vcpus)])),
            entitled_ns=total.entitled_ns, entitled_share=sum(of.entitled_share for of in figures),
            lag_ns=sum(of.lag_ns for of in figures), leak_ns=total.leak_ns, emulator_ns=total.emulator_ns,
            progress=total.progress if config.progress is not None else None,
            exits=dict(zip(EXIT_KINDS, total.exits, strict=True)), exit_handling_ns=total.exit_handling_ns,
            serial_bytes=total.serial_bytes, serial_dropped_bytes=total.serial_dropped_bytes,
            bios_calls=total.bios_calls, interrupts=total.interrupts, timer_ticks_lost=total.timer_ticks_lost,
            disks=total.disks, console=config.console_kind, mode_notes=decision.notes,
            mode_alternatives=tuple(ModeAlternative(mode=other.mode, rule=other.rule, why=other.why,
                                                    possible=other.possible) for other in decision.alternatives),
            mode_changes=dict(self.moves.changes), saves=self.moves.saves, restores=self.moves.restores)
