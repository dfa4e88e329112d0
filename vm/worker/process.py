"""A worker's life: one process, one thread (and one more for each further vCPU), one VM.

    build -> shut the door -> "started" -> run / sleep / pause -> "ended"

Theory.  The first vCPU is this process' main thread, and nearly always its only one (processors.py has the others), so
everything happens between two calls of `Cpu.run`: requests are answered, devices are brought up to date, and a guest
that waits (HLT, a BIOS call for a key) sleeps in poll() on the control socket, where it costs nothing.  The
supervisor kicks (SIGUSR1) after each packet; vm/engines/kick.py makes `run` return for it
wherever it was.  While the guest computes, a one-shot timer (SIGALRM, also a kick) goes off when
the machine has its next event, a tick of the guest's timer for instance; a guest that uses no
interrupts is left alone.

A guest in HLT sleeps until an interrupt asks; one that waits in a BIOS call takes interrupts, too.

Another engine may take over at any such moment (moves.py).  A saved VM is built like any other (boot.py), but over a
memory that is filled already; its state is read behind the sandbox, because a file is as hostile as a guest.

Invariants.
- The phase word of the status page says what the thread does; SLEEPING and PAUSED mean that
  it is in poll().
- However a guest ends, the supervisor gets exactly one `ended` (or `failed`) event with a
  sentence, or the process was killed. No exception of an engine or of ours ends it silently.
- Guest memory is mapped once, shared; nothing of the guest is copied out but what was asked for.
- When the supervisor's end of the socket closes, the worker leaves.
"""

from __future__ import annotations

import base64
import contextlib
import gc
import mmap
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Final

from .. import engines
from ..code import decode
from ..engines import kick
from ..engines.base import RFLAGS, Cpu, CpuState, EngineError, Exit, ExitKind, ExitReason, HostLimit
from . import moves, mptable, sandbox
from .boot import StartFailed, first_state, load
from .clock import Clock, HostClock
from .control import Control
from .devices.fwcfg import FirmwareConfig
from .eyes import Eyes, flatten
from .machine import Machine
from .memory import GuestMemory
from .processors import Ended, Processors
from .protocol import Ending, WorkerSpec
from .status import VCPUS_MAX, Phase, StatusPage

__all__ = ["CALLS_LIMIT", "SERIAL_CHUNK_BYTES", "TRACE_CHUNK", "Worker", "main", "spawned", "warm"]

SERIAL_CHUNK_BYTES: Final = 48 * 1024
TRACE_CHUNK: Final = 4096
CALLS_LIMIT: Final = 2048                         # a hostile guest makes 65536 kinds of call; a packet is bounded
CLOSE_NS: Final = 100_000_000                     # an engine that was left is closed then, at the latest
ALARM_MIN_S: Final = 50e-6                        # a guest may ask for a tick each microsecond; nobody gets it
INTERRUPT_FLAG: Final = 0x200
WARM_MEMORY_BYTES: Final = 1 << 20

# How the ending is called.
_CRASHES: Final = {
    ExitReason.TRIPLE_FAULT: "triple-fault",
    ExitReason.HOST_LIMIT: "host-limit",
    ExitReason.GUEST_ERROR: "guest-error",
    ExitReason.UNSUPPORTED: "unsupported",
}


class Worker:
    """One VM from descriptors to its ending. `build`, then `live`; `close` frees everything."""

    def __init__(
        self, spec: WorkerSpec, control: Control, memory: mmap.mmap, status: StatusPage,
        image_fds: Sequence[int], clock: Clock | None = None,
    ) -> None:
        self._spec, self._control, self._raw, self._status = spec, control, memory, status
        self._clock = clock or HostClock()
        # What a fresh machine writes into memory (ROM, vectors) must not meet a restored one's.
        self._memory = GuestMemory(mmap.mmap(-1, len(memory)) if spec.restored else memory)
        self._paused = spec.started_paused
        self._asked = False                       # to stop
        self._halted = False                      # behind a HLT that nothing has ended yet
        self._alarm_ns: int | None = None         # when the machine wants to be polled
        self._running = False                     # the alarm is armed while the guest runs
        self._former: Cpu | None = None           # the engine before this one, and when it is closed at the latest
        self._close_at_ns: int | None = None      # (of the host's clock)
        self.processors: Processors | None = None
        self._lock: AbstractContextManager[Any] = contextlib.nullcontext()     # of the machine, where others use it
        self._requests: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "pause": self._pause, "resume": self._resume, "stop": self._stop,
            "screen": self._screen, "keys": self._keys, "serial": self._serial,
            "serial-input": self._serial_input, "registers": lambda _request: self._registers(),
            "calls": self._calls, "mode": self._mode, "state": self._state,
        }
        loaded = load(spec, self._memory, image_fds)
        self._rom = loaded.rom
        self._engine = spec.engine
        fw_cfg = FirmwareConfig(spec.memory_bytes, spec.vcpus) if spec.boot == "multiboot" else None
        self.machine = Machine(self._memory, self._clock, self._count, loaded.disks, self._alarm,
                               post_ports=spec.post_ports, fw_cfg=fw_cfg)
        try:
            self.cpu, *self._others = self._make_cpus(self._rom)
        except HostLimit as error:
            raise StartFailed("host-busy" if error.busy else "host-limit", str(error)) from error
        except EngineError as error:
            raise StartFailed("engine", str(error)) from error
        self.machine.attach(self.cpu)
        self.eyes = Eyes(memory, self.cpu, status, self.machine.post_codes, others=self._others,
                         lock=self._lock)
        self._requests |= self.eyes.requests
        if spec.restored:
            self._memory.raw = memory
            return
        self.cpu.set_state(first_state(spec, memory, image_fds, loaded.disks))
        if self._others:
            try:
                mptable.install(self._memory, spec.vcpus)
            except ValueError as error:
                raise StartFailed("memory", str(error)) from error

    # Building.

    def _make_cpus(self, rom: mmap.mmap | None) -> Sequence[Cpu]:
        spec, status = self._spec, self._status
        if spec.vcpus == 1:
            return [engines.create(spec.engine, self._raw, self.machine, status.exits, rom,
                                   checked=spec.check_accesses)]
        if spec.vcpus > VCPUS_MAX:
            raise StartFailed("engine", f"a micro-VM has at most {VCPUS_MAX} vCPUs, not {spec.vcpus}")
        self.processors = Processors(self.machine)
        self._lock = self.processors.lock
        counters = [status.exits_of(index) for index in range(spec.vcpus)]
        return engines.create_several(spec.engine, self._raw, self.processors.buses(spec.vcpus), counters, rom)

    def begin(self) -> list[int]:
        """Once the door is shut: the threads of the other vCPUs. The native ids of all, the main thread's first."""
        if self.processors is None:
            return [os.getpid()]
        self.processors.stopped = self.eyes.stopped
        self.processors.start(self._others, held=self._paused)
        return self.processors.threads

    def _count(self, name: str, value: int) -> None:
        self._status.add(name, value)
        if name.endswith("_errors"):
            drive = name.removesuffix("_errors")
            self._status.set("disk_error", next(
                disk.error for disk in self.machine.disks if disk.name == drive) & 0xFFFF_FFFF)

    # Gone on elsewhere.

    def _mode(self, request: dict[str, Any]) -> dict[str, Any]:
        """Go on in another engine, or in this one where that is refused."""
        begun = time.perf_counter_ns()
        self._close_former()
        engine = str(request["engine"])
        if engine not in engines.ENGINES:
            raise ValueError(f"no engine {engine!r}")
        if engine == self._engine:
            return {"engine": engine, "changed": False, "stop_ns": 0}

        def make() -> Cpu:
            device = self._control.descriptor() if engine == "kvm" else None
            return engines.create(engine, self._raw, self.machine, self._status.exits, self._rom, device,
                                  checked=self._spec.check_accesses)

        gc.disable()           # to collect engines that were left takes milliseconds: not while the guest stands still
        try:
            new = moves.change_engine(self.cpu, engine, str(request.get("technology", "")), make)
        except EngineError as error:
            return {"refused": str(error)}
        finally:
            gc.enable()
        old, self.cpu, self._engine = self.cpu, new, engine
        self.machine.attach(new)
        self.eyes.attach(new)
        new.kick()                                # one that came meanwhile may have met the old engine
        self._former, self._close_at_ns = old, time.monotonic_ns() + CLOSE_NS
        return {"engine": engine, "changed": True, "stop_ns": time.perf_counter_ns() - begun}

    def _close_former(self) -> None:
        """Close the engine that was left, which takes KVM some milliseconds: when the guest sleeps, or soon."""
        former, self._former, self._close_at_ns = self._former, None, None
        if former is not None:
            former.close()

    def _state(self, _request: dict[str, Any]) -> dict[str, Any]:
        """The vCPUs and the devices into a file."""
        if not self._paused:
            raise ValueError("only a paused VM can be saved")
        fd = self._control.descriptor()
        try:
            return {"bytes": moves.write_state(fd, [self.cpu, *self._others], self.machine, halted=self._halted)}
        except EngineError as error:
            return {"refused": str(error)}
        finally:
            os.close(fd)

    def restore(self, fd: int) -> None:
        """Go on from what `state` wrote. Raises StartFailed."""
        self._halted = moves.read_state(
            fd, [self.cpu, *self._others], self.machine, self._engine, self._spec.technology)

    # Life.

    def live(self) -> Ending | None:
        """Run the guest to its end. None: the supervisor is gone, nobody is to be told."""
        try:
            return self._live_to_the_end()
        finally:
            if self.processors is not None:
                self.processors.end()

    def _live_to_the_end(self) -> Ending | None:
        try:
            return self._live()
        except HostLimit as error:
            return self._crash("host-limit", str(error))
        except EngineError as error:
            return self._crash("engine", f"the engine could not go on: {error}")
        except Exception as error:
            # The edge of the process: whatever went wrong becomes a sentence for a person,
            # the traceback goes to standard error, which the supervisor keeps.
            _note_traceback()
            return self._crash("internal", f"the worker failed ({type(error).__name__}: {error})")

    def _live(self) -> Ending | None:
        machine, status = self.machine, self._status
        while True:
            with self._lock:
                self._answer_all()
            if self._control.gone:
                return None
            if self._asked:
                return Ending("stopped", "stopped on request", "asked")
            if self._paused:
                if self.processors is not None:
                    self.processors.hold()
                self._sleep(None, Phase.PAUSED)
                continue
            if self.processors is not None:
                self.processors.go_on()
            with self._lock:
                goes_on = self._may_go_on()
            if not goes_on:
                wait = machine.wait
                self._sleep(wait.until_ns if wait else None, Phase.SLEEPING)
                if self._ended_elsewhere():
                    return self._after(Exit(ExitReason.KICKED))
                continue
            status.set("phase", Phase.RUNNING)
            if self._close_at_ns is not None and time.monotonic_ns() >= self._close_at_ns:
                self._close_former()
            self._arm(on=True)
            if status.get("started_ns") == 0:
                status.set("started_ns", self._clock.monotonic_ns())
            left = self.cpu.run()
            self.eyes.stopped()
            ending = self._after(left)
            if ending is not None:
                return ending

    def _may_go_on(self) -> bool:
        """Devices brought up to date; whether the guest has something to do now."""
        machine = self.machine
        now_ns = self._clock.monotonic_ns()
        if self._alarm_ns is not None and now_ns >= self._alarm_ns:
            machine.poll()
        if not machine.wait_is_over(now_ns):
            if not self._interrupt_can_be_taken():
                return False
            machine.interrupt_wait()
        elif self._halted:
            if not machine.interrupts.asking:
                return False
            self._halted = False
        machine.finish_wait()
        return True

    def _ended_elsewhere(self) -> bool:
        """Another vCPU has ended the VM while the first one slept."""
        return self.processors is not None and (
            self.machine.ending is not None or self.processors.ended is not None)

    def _after(self, left: Exit) -> Ending | None:
        """What a return of `run` means: None to go on."""
        ended = self.machine.ending
        if ended is not None:
            return Ending("stopped", ended.reason, ended.code, exit_code=ended.exit_code)
        if self.processors is not None and self.processors.ended is not None:
            return self._other_ended(self.processors.ended)
        if left.reason in (ExitReason.KICKED, ExitReason.STOPPED):
            return None
        if left.reason is ExitReason.ENDED:
            return Ending("stopped", left.detail, "reset")
        if left.reason is ExitReason.HALTED:
            if not left.interrupts_on:
                last = f" after POST code {self.machine.post_codes[-1]:02X}h" if self.machine.post_codes else ""
                return Ending("stopped", f"the guest halted with interrupts off{last}", "halted",
                              registers=self._registers(), report=self.eyes.where())
            self._halted = True
            return None
        return self._crash(_CRASHES[left.reason], _sentence(left))

    def _other_ended(self, ended: Ended) -> Ending:
        """A vCPU beside the first has ended, and the VM with it."""
        left, cpu = ended.left, self._others[ended.index - 1]
        if isinstance(left, BaseException):
            if not isinstance(left, EngineError):
                traceback.print_exception(left)
            code = "host-limit" if isinstance(left, HostLimit) else (
                "engine" if isinstance(left, EngineError) else "internal")
            return self._crash(code, f"vCPU {ended.index} could not go on ({type(left).__name__}: {left})", cpu)
        if left.reason is ExitReason.ENDED:
            return Ending("stopped", left.detail, "reset")
        return self._crash(_CRASHES[left.reason], f"{_sentence(left)} (vCPU {ended.index})", cpu)

    def _crash(self, code: str, reason: str, cpu: Cpu | None = None) -> Ending:
        ending = Ending("crashed", reason, code)
        try:
            eyes = self.eyes if cpu is None else Eyes(self._raw, cpu, self._status, self.machine.post_codes)
            state = (cpu or self.cpu).get_state()
            instruction = decode.describe(self._raw, state)
            report = eyes.where()
        except Exception as error:
            # A dead engine may not answer any more; the ending must be told all the same.
            return replace(ending, reason=f"{reason} (its registers cannot be read: {error})")
        return replace(ending, instruction=instruction, registers=flatten(state), report=report)

    def _sleep(self, until_ns: int | None, phase: Phase) -> None:
        """Wait for a packet, a time or (not while paused) the machine's next event.

        The clock is the machine's, so tests decide how long.
        """
        self._arm(on=False)
        self._close_former()
        self._status.set("phase", phase)
        begun = self._clock.monotonic_ns()
        if phase is Phase.SLEEPING and self._alarm_ns is not None:
            until_ns = self._alarm_ns if until_ns is None else min(until_ns, self._alarm_ns)
        self._control.wait(None if until_ns is None else (until_ns - begun) / 1e9)
        if phase is Phase.SLEEPING:
            self._status.add("sleeping_ns", self._clock.monotonic_ns() - begun)

    def _interrupt_can_be_taken(self) -> bool:
        return self.machine.interrupts.asking and bool(self.cpu.get_gpr()[RFLAGS] & INTERRUPT_FLAG)

    def _alarm(self, when_ns: int | None) -> None:
        """The machine's next event has moved."""
        self._alarm_ns = when_ns
        if self._running:
            self._set_timer()
        elif self.processors is not None:
            self.processors.wake_main()

    def _arm(self, *, on: bool) -> None:
        """Have the guest interrupted at the machine's next event, or no longer."""
        if on:
            # Set anew each time: it may have gone off early by a guest's clock that is not the host's.
            self._running = True
            if self._alarm_ns is not None or self._close_at_ns is not None:
                self._set_timer()
        elif self._running:
            self._running = False
            signal.setitimer(signal.ITIMER_REAL, 0.0)

    def _set_timer(self) -> None:
        waits_ns: list[int] = []
        if self._alarm_ns is not None:
            waits_ns.append(self._alarm_ns - self._clock.monotonic_ns())
        if self._close_at_ns is not None:
            waits_ns.append(self._close_at_ns - time.monotonic_ns())
        signal.setitimer(signal.ITIMER_REAL, max(ALARM_MIN_S, min(waits_ns) / 1e9) if waits_ns else 0.0)

    def close(self) -> None:
        self._arm(on=False)
        self.eyes.close()
        self._close_former()
        for cpu in reversed([self.cpu, *self._others]):
            cpu.close()

    # Requests.

    def _answer_all(self) -> None:
        for request in self._control.requests():
            answer: dict[str, Any]
            operation = self._requests.get(str(request.get("op")))
            try:
                if operation is None:
                    raise ValueError(f"unknown operation {request.get('op')!r}")
                answer = {"ok": True, **operation(request)}
            except (ValueError, TypeError, KeyError, EngineError) as error:
                answer = {"ok": False, "error": f"{type(error).__name__}: {error}"}
            self._control.send({"id": request["id"], **answer})
            if self._paused and self.processors is not None and not self.processors.held:
                return                   # what is asked of a paused VM is answered when all its vCPUs stand

    def _pause(self, _request: dict[str, Any]) -> dict[str, Any]:
        self._paused = True
        return {}

    def _resume(self, _request: dict[str, Any]) -> dict[str, Any]:
        self._paused = False
        return {}

    def _stop(self, _request: dict[str, Any]) -> dict[str, Any]:
        self._asked = True
        return {}

    def _screen(self, _request: dict[str, Any]) -> dict[str, Any]:
        screen = self.machine.screen()
        if screen is None:
            raise ValueError("this VM has no text screen: its memory ends below B8000h")
        return {
            "rows": list(screen.rows), "cursor": list(screen.cursor),
            "attributes": base64.b64encode(screen.attributes).decode(),
            "version": self._status.get("screen_version"),
        }

    def _keys(self, request: dict[str, Any]) -> dict[str, Any]:
        keys = [(int(scan) & 0xFF, int(code) & 0xFF) for scan, code in request["scancodes"]]
        return {"accepted": self.machine.press(keys)}

    def _serial(self, request: dict[str, Any]) -> dict[str, Any]:
        serial = self.machine.serial
        offset, data = serial.ring.read(int(request["offset"]), SERIAL_CHUNK_BYTES)
        return {"offset": offset, "data": base64.b64encode(data).decode(),
                "dropped_bytes": serial.dropped, "end": serial.ring.end}

    def _serial_input(self, request: dict[str, Any]) -> dict[str, Any]:
        return {"accepted": self.machine.serial.feed(base64.b64decode(request["data"], validate=True))}

    def legacy(self) -> dict[str, Any]:
        """What is still worth reading when the process is gone: the last screen and serial output."""
        newest = self.machine.serial.ring.end - SERIAL_CHUNK_BYTES
        words: dict[str, Any] = {"serial": self._serial({"offset": max(0, newest)})}
        if self.machine.screen() is not None:
            words["screen"] = self._screen({})
        return words

    def _registers(self) -> dict[str, Any]:
        return flatten(self.cpu.get_state())

    def _calls(self, request: dict[str, Any]) -> dict[str, Any]:
        bios = self.machine.bios
        if bios is None:
            return {"calls": [], "trace": []}
        first = max(0, int(request.get("trace_from", len(bios.trace))))
        most = sorted(bios.calls.most_common(CALLS_LIMIT))
        return {"calls": [[number, ah, count] for (number, ah), count in most],
                "trace": [list(key) for key in bios.trace[first:first + TRACE_CHUNK]]}


def _sentence(left: Exit) -> str:
    what = {
        ExitReason.TRIPLE_FAULT: "the guest triple-faulted, where a PC would reset",
        ExitReason.HOST_LIMIT: "a limit of this host, not of the guest",
        ExitReason.GUEST_ERROR: "the guest did what no PC can go on from",
        ExitReason.UNSUPPORTED: "the guest left the engine in a way that is not supported",
    }[left.reason]
    return f"{what}: {left.detail}" if left.detail else what


def main(spec: WorkerSpec, fds: list[int]) -> int:
    """Live as the worker of one VM; returns the process' exit code.

    `fds`: control socket, guest memory, status page, and those of the image or the disks (protocol.py).
    Exit codes: 0 ended and told so, 1 could not start and told so, 2 the supervisor is gone.
    """
    # First of all: a kick that comes before its handler would kill us.
    kick.install()
    control = Control(fds[0])
    try:
        status = StatusPage(fds[2], writable=True)
        status.set("phase", Phase.STARTING)
        memory = mmap.mmap(fds[1], spec.memory_bytes)
        worker = Worker(spec, control, memory, status, fds[3:-1] if spec.restored else fds[3:])
    except StartFailed as error:
        return _failed(control, error.code, str(error))
    except Exception as error:
        # The edge of the process, as in `live`.
        _note_traceback()
        return _failed(control, "start",
                       f"the worker could not start ({type(error).__name__}: {error})")
    # Everything is open, mapped and imported: no need for the outside world any more.
    largest = max((disk.end_bytes for disk in worker.machine.disks), default=0)
    engines.prepare()
    achieved = sandbox.enter(largest) if spec.sandbox else ["not: anything (switched off)"]
    if spec.restored:
        try:
            worker.restore(fds[-1])
        except StartFailed as error:
            return _failed(control, error.code, str(error))
    control.send({"event": "started", "sandbox": achieved, "engine": spec.engine, "threads": worker.begin()})
    ending = worker.live()
    status.set("phase", Phase.ENDED)
    if ending is not None:
        control.send({"event": "ended", **ending.to_json(), **worker.legacy()})
    worker.close()
    return 0 if ending is not None else 2


def _note_traceback() -> None:
    # A full or closed standard error must not hide the ending from the supervisor.
    with contextlib.suppress(OSError, ValueError):
        traceback.print_exc()
        sys.stderr.flush()


def _failed(control: Control, code: str, reason: str) -> int:
    ending = Ending("failed", reason, code)
    control.send({"event": "failed", "error": reason, **ending.to_json()})
    return 1


def warm() -> None:
    """For the zygote, before it forks: do once what each worker would find out anew.

    The software engine looks for the layout of Unicorn's CPU state (some 35 ms) and keeps it.
    """
    nobody = Machine(GuestMemory(bytearray(mmap.PAGESIZE)), HostClock(), lambda _name, _n: None)
    memory = mmap.mmap(-1, WARM_MEMORY_BYTES)
    counters = memoryview(bytearray(8 * len(ExitKind))).cast("Q")
    # An engine that cannot be had is the worker's error to report, with its reason.
    with contextlib.suppress(EngineError):
        cpu = engines.create("software", memory, nobody, counters)
        try:
            cpu.set_state(CpuState())
        finally:
            cpu.close()


def spawned(arguments: dict[str, Any], fds: list[int]) -> int:
    """The zygote's entry: `arguments` is a WorkerSpec in JSON. Closes every other descriptor."""
    before = 3
    for fd in sorted(fd for fd in fds if fd >= 0):
        os.closerange(before, fd)
        before = fd + 1
    os.closerange(before, os.sysconf("SC_OPEN_MAX"))
    return main(WorkerSpec.from_json(arguments), fds)
