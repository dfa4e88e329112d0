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

Another engine may take over at any such moment (`_mode`): it gets the vCPU's whole state over the same memory and under
the same machine, and the guest goes on where it was.  A saved VM is built like any other but over a memory that is
filled already; its state is read behind the sandbox, because a file is as hostile as a guest.

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
import json
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

from .. import engines, guests
from ..code import decode
from ..engines import entry, kick, portable
from ..engines.base import (
    RAX,
    RDX,
    RFLAGS,
    RIP,
    RSP,
    Cpu,
    CpuState,
    EngineError,
    Exit,
    ExitKind,
    ExitReason,
    HostLimit,
)
from . import mptable, multiboot, sandbox
from .clock import Clock, HostClock
from .control import Control
from .devices.disk import Disk
from .devices.fwcfg import FirmwareConfig
from .eyes import Eyes, flatten
from .machine import Machine
from .memory import GuestMemory
from .processors import Ended, Processors
from .protocol import Ending, WorkerSpec
from .status import VCPUS_MAX, Phase, StatusPage

__all__ = [
    "BOOT_SECTOR", "CALLS_LIMIT", "SERIAL_CHUNK_BYTES", "TRACE_CHUNK", "StartFailed", "Worker", "main", "spawned",
    "warm",
]

BOOT_SECTOR: Final = 0x7C00
SERIAL_CHUNK_BYTES: Final = 48 * 1024
TRACE_CHUNK: Final = 4096
CALLS_LIMIT: Final = 2048                         # a hostile guest makes 65536 kinds of call; a packet is bounded
CLOSE_NS: Final = 100_000_000                     # an engine that was left is closed then, at the latest
ALARM_MIN_S: Final = 50e-6                        # a guest may ask for a tick each microsecond; nobody gets it
INTERRUPT_FLAG: Final = 0x200
BIOS_MEMORY_BYTES: Final = 1 << 20
WARM_MEMORY_BYTES: Final = 1 << 20
STATE_MAX_BYTES: Final = 1 << 20                  # of vCPU and devices as JSON; some 20 KiB are usual
ROM_MAX_BYTES: Final = 256 << 10                  # what the engines have room for
ROM_COPY_BYTES: Final = 128 << 10                 # of a ROM's end, seen below 1 MiB too

# ExitReason -> (code, is it the guest's own doing)
_CRASHES: Final = {
    ExitReason.TRIPLE_FAULT: "triple-fault",
    ExitReason.HOST_LIMIT: "host-limit",
    ExitReason.GUEST_ERROR: "guest-error",
    ExitReason.UNSUPPORTED: "unsupported",
}


class StartFailed(Exception):
    """The VM could not be built; the text says what to change."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class Worker:
    """One VM from descriptors to its ending. `build`, then `live`; `close` frees everything."""

    def __init__(
        self, spec: WorkerSpec, control: Control, memory: mmap.mmap, status: StatusPage,
        image_fds: Sequence[int], clock: Clock | None = None,
    ) -> None:
        self._spec, self._control, self._raw, self._status = spec, control, memory, status
        self._image_fds = image_fds
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
        self._screen_version = 0
        self.processors: Processors | None = None
        self._lock: AbstractContextManager[Any] = contextlib.nullcontext()     # of the machine, where others use it
        self._requests: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "pause": self._pause, "resume": self._resume, "stop": self._stop,
            "screen": self._screen, "keys": self._keys, "serial": self._serial,
            "serial-input": self._serial_input, "registers": lambda _request: self._registers(),
            "calls": self._calls, "mode": self._mode, "state": self._state,
        }
        disks = self._load()
        self._rom = self._load_rom() if spec.boot == "rom" else None
        self._engine = spec.engine
        fw_cfg = FirmwareConfig(spec.memory_bytes, spec.vcpus) if spec.boot == "multiboot" else None
        self.machine = Machine(self._memory, self._clock, self._count, disks, self._alarm, post_ports=spec.post_ports,
                               fw_cfg=fw_cfg)
        try:
            self.cpu, *self._others = self._make_cpus(self._rom)
        except HostLimit as error:
            raise StartFailed("host-busy" if error.busy else "host-limit", str(error)) from error
        except EngineError as error:
            raise StartFailed("engine", str(error)) from error
        self.machine.attach(self.cpu)
        self.eyes = Eyes(memory, self.cpu, status, self.machine.post_codes)
        self._requests |= self.eyes.requests
        if spec.restored:
            self._memory.raw = memory
            return
        self.cpu.set_state(self._first_state())
        if self._others:
            try:
                mptable.install(self._memory, spec.vcpus)
            except ValueError as error:
                raise StartFailed("memory", str(error)) from error

    # Building.

    def _make_cpus(self, rom: mmap.mmap | None) -> Sequence[Cpu]:
        spec, status = self._spec, self._status
        if spec.vcpus == 1:
            return [engines.create(spec.engine, self._raw, self.machine, status.exits, rom)]
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
        self.processors.start(self._others, held=self._paused)
        return self.processors.threads

    def _count(self, name: str, value: int) -> None:
        self._status.add(name, value)
        if name.endswith("_errors"):
            drive = name.removesuffix("_errors")
            self._status.set("disk_error", next(
                disk.error for disk in self.machine.disks if disk.name == drive) & 0xFFFF_FFFF)

    def _disks(self) -> list[Disk]:
        spec, fds = self._spec, list(self._image_fds)
        if spec.builtin is not None:
            fds = [os.memfd_create("mixvisor-disk", os.MFD_CLOEXEC)]
            os.write(fds[0], _builtin(spec.builtin))
        disks: list[Disk] = []
        for one in spec.disks or [None]:
            name = one.name if one else None
            try:
                disks.append(Disk(fds.pop(0), name=name, writable=one is not None and one.writable == "yes",
                                  overlay_fd=fds.pop(0) if one and one.writable == "overlay" else None))
            except (OSError, ValueError) as error:
                raise StartFailed("image", f"the disk {name or 'to boot from'} cannot be used: {error}") from error
        return disks

    def _load(self) -> list[Disk]:
        """Put the image where it belongs; the disks, when the VM boots from one."""
        spec = self._spec
        if spec.boot == "disk":
            if self._memory.size < BIOS_MEMORY_BYTES:
                raise StartFailed("memory", f"a VM that boots from a disk needs at least 1 MiB of "
                                            f"memory, it has {self._memory.size} bytes")
            disks = self._disks()
            boot_sector = disks[0].read(0, 1)
            if not isinstance(boot_sector, bytes):
                raise StartFailed("image", "the boot sector of the disk to boot from cannot be read")
            self._memory.poke(BOOT_SECTOR, boot_sector)
        elif spec.boot in ("rom", "multiboot"):
            disks = []                            # `_load_rom`, `_boot_kernel`
        else:
            disks = []
            if spec.builtin is not None:
                image = _builtin(spec.builtin)
            else:
                size = os.fstat(self._image_fds[0]).st_size
                if spec.load + size > self._memory.size:
                    raise StartFailed("memory", f"the image of {size} bytes does not fit into"
                                                f" memory at {spec.load:#x}")
                image = os.pread(self._image_fds[0], size, 0)
            if self._memory.poke(spec.load, image) != len(image) or not image:
                raise StartFailed("memory", f"the image of {len(image)} bytes does not fit into"
                                            f" memory at {spec.load:#x}")
        for address, value in spec.pokes:
            if self._memory.poke(address, value.to_bytes(8, "little")) != 8:
                raise StartFailed("memory", f"the poke at {address:#x} lies outside memory")
        return disks

    def _load_rom(self) -> mmap.mmap:
        """The ROM that ends at 4 GiB; its end is copied to below 1 MiB."""
        if self._memory.size < BIOS_MEMORY_BYTES:
            raise StartFailed("memory", "a VM with a ROM needs at least 1 MiB of memory, it has"
                                        f" {self._memory.size} bytes")
        size = os.fstat(self._image_fds[0]).st_size
        if not 0 < size <= ROM_MAX_BYTES or size % mmap.PAGESIZE:
            raise StartFailed("image", f"the ROM has {size} bytes: it must be whole pages of {mmap.PAGESIZE} bytes, at"
                                       f" most {ROM_MAX_BYTES}")
        rom = mmap.mmap(-1, size)
        rom[:] = os.pread(self._image_fds[0], size, 0).ljust(size, b"\xFF")
        low = rom[-min(size, ROM_COPY_BYTES):]
        self._memory.poke(BIOS_MEMORY_BYTES - len(low), low)
        return rom

    def _first_state(self) -> CpuState:
        if self._spec.boot == "rom":
            return entry.reset_state()
        if self._spec.boot == "multiboot":
            return self._boot_kernel()
        if not self.machine.disks:
            return entry.flat_state(self._raw, self._spec.bits, self._spec.entry)
        state = CpuState()
        state.gpr[RIP] = state.gpr[RSP] = BOOT_SECTOR
        state.gpr[RDX] = self.machine.disks[0].drive
        state.gpr[RAX] = 0xAA55
        state.gpr[RFLAGS] = 0x202                 # a BIOS enters with interrupts on
        return state

    def _boot_kernel(self) -> CpuState:
        spec = self._spec
        image, *files = self._image_fds
        modules = [multiboot.Module(fd, text) for fd, text in zip(files, spec.modules, strict=True)]
        try:
            state = multiboot.boot(self._raw, image, spec.command_line, modules)
        except multiboot.BootError as error:
            raise StartFailed(error.kind, str(error)) from error
        for fd in self._image_fds:
            os.close(fd)
        return state

    # Saved, restored, moved to another engine.

    def _mode(self, request: dict[str, Any]) -> dict[str, Any]:
        """Go on in another engine. Until the new one has all of the state, nothing of the old one is touched."""
        begun = time.perf_counter_ns()
        self._close_former()
        engine = str(request["engine"])
        if engine not in engines.ENGINES:
            raise ValueError(f"no engine {engine!r}")
        if engine == self._engine:
            return {"engine": engine, "changed": False, "stop_ns": 0}
        try:
            whole = self.cpu.get_whole()
            why = portable.why_not(whole, engine, str(request.get("technology", "")))
            if why is not None:
                return {"refused": why}
            device = self._control.descriptor() if engine == "kvm" else None
            new = engines.create(engine, self._raw, self.machine, self._status.exits, self._rom, device)
        except EngineError as error:
            return {"refused": str(error)}
        try:
            new.set_whole(whole)
        except EngineError as error:
            new.close()
            return {"refused": str(error)}
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
        """The vCPU and the devices into a file. Memory is the supervisor's to copy: nobody writes to it now."""
        if not self._paused:
            raise ValueError("only a paused VM can be saved")
        fd = self._control.descriptor()
        try:
            cpu = portable.to_plain(self.cpu.get_whole())
            data = json.dumps({"cpu": cpu, "machine": self.machine.capture(), "halted": self._halted}).encode()
            if len(data) > STATE_MAX_BYTES:
                raise EngineError(f"its state would have {len(data)} bytes")     # no device grows like that
            done = 0
            while done < len(data):
                done += os.write(fd, data[done:])
        except EngineError as error:
            return {"refused": str(error)}
        finally:
            os.close(fd)
        return {"bytes": len(data)}

    def restore(self, fd: int) -> None:
        """Go on from what `state` wrote. Raises StartFailed."""
        try:
            data = os.pread(fd, STATE_MAX_BYTES + 1, 0)
            os.close(fd)
            if len(data) > STATE_MAX_BYTES:
                raise portable.BadState("it is too long")
            state = json.loads(data)
            if not isinstance(state, dict) or state.keys() != {"cpu", "machine", "halted"}:
                raise portable.BadState("it has not the parts that it must have")
            whole = portable.from_plain(state["cpu"])
            why = portable.why_not(whole, self._engine, self._spec.technology)
            if why is not None:
                raise StartFailed("state", f"it cannot go on in this mode: {why}")
            self.cpu.set_whole(whole)
            self._halted = state["halted"] is True
            self.machine.restore(state["machine"])
        except (ValueError, RecursionError) as error:
            raise StartFailed("state", f"what was saved is no state of such a VM: {error}") from error
        except EngineError as error:
            raise StartFailed("state", f"the saved state cannot be gone on from: {error}") from error

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


def _builtin(name: str) -> bytes:
    if name not in guests.BUILTIN:
        raise StartFailed("image", f"there is no built-in guest {name!r}: there are"
                                   f" {', '.join(guests.BUILTIN)}")
    return guests.image(name)


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
