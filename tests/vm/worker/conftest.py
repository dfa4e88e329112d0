"""Fakes for the machine model, and real workers over real sockets.

`FakeClock` stands still until told; `FakeCpu` has registers and remembers what the machine asked
of it; `bios` is a machine with both and calls services by their registers.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import pytest

from mixvisor.vm.engines import kick
from mixvisor.vm.engines.base import RAX, RBP, RBX, RCX, RDI, RDX, RIP, RSI, RSP, CpuState
from mixvisor.vm.host import HostFacts
from mixvisor.vm.worker import process
from mixvisor.vm.worker.devices.disk import Disk
from mixvisor.vm.worker.machine import Machine
from mixvisor.vm.worker.memory import GuestMemory
from mixvisor.vm.worker.protocol import MAX_PACKET, WorkerSpec
from mixvisor.vm.worker.status import STATUS_SIZE, Phase, StatusPage

TECHNOLOGY = HostFacts.read().technology
ENGINES = ("software", pytest.param("kvm", marks=pytest.mark.kvm))
PATIENCE_S = 60          # a loaded machine is slow; nothing here waits that long when it is well


@pytest.fixture
def file() -> Iterator[Callable[..., int]]:
    """`file(data)` makes a descriptor of a file with these bytes."""
    made: list[int] = []

    def make(data: bytes = b"") -> int:
        made.append(os.memfd_create("file"))
        os.write(made[-1], data)
        return made[-1]

    yield make
    for fd in made:
        os.close(fd)


@pytest.fixture
def ended():
    return []


class FakeClock:
    """2026-03-01 12:34:56 UTC, one second after the host's boot."""

    def __init__(self) -> None:
        self.now_ns = 1_000_000_000
        self.wall = 1_772_368_496 * 1_000_000_000

    def monotonic_ns(self) -> int:
        return self.now_ns

    def wall_ns(self) -> int:
        return self.wall

    def advance(self, seconds: float) -> None:
        step = round(seconds * 1_000_000_000)
        self.now_ns += step
        self.wall += step


class FakeCpu:
    """Registers and segments that stand still; what a `Bus` may ask of a vCPU."""

    def __init__(self) -> None:
        self.state = CpuState()
        self.stopped = 0
        self.wanted = False
        self.changed: list[tuple[int, int]] = []

    def stop(self) -> None:
        self.stopped += 1

    def request_interrupt(self, wanted: bool) -> None:
        self.wanted = wanted

    def get_gpr(self) -> list[int]:
        return list(self.state.gpr)

    def set_gpr(self, values: list[int]) -> None:
        self.state.gpr = list(values)

    def segment_base(self, name: str) -> int:
        return getattr(self.state, name).base

    def memory_changed(self, address: int, length: int) -> None:
        self.changed.append((address, length))


class BiosBench:
    """`call(0x10, ax=0x0E41)` does what the ROM's stub does and returns the registers after it."""

    STACK = 0x7000
    INDEX: Final = {"ax": RAX, "bx": RBX, "cx": RCX, "dx": RDX, "si": RSI, "di": RDI, "bp": RBP}

    def __init__(self, image: bytes, memory_bytes: int = 2 << 20, *others: Disk, **disk: Any) -> None:
        self.fd = os.memfd_create("image")
        os.write(self.fd, image)
        self.clock = FakeClock()
        self.memory = GuestMemory(bytearray(memory_bytes))
        self.counts: Counter[str] = Counter()
        self.machine = Machine(self.memory, self.clock, self._count, [Disk(self.fd, **disk), *others])
        self.cpu = FakeCpu()
        self.machine.attach(self.cpu)  # type: ignore[arg-type]

    def _count(self, name: str, n: int) -> None:
        self.counts[name] += n

    def call(self, vector: int, *, es: int = 0, ds: int = 0, **words: int) -> dict[str, int]:
        """Registers after the call, with `carry` and `zero` from the flags that iret will load."""
        gpr = [0xDEAD_BEEF_0000_0000] * 8 + [0] * 8 + [vector * 8, 0x202]
        for name, value in words.items():
            gpr[self.INDEX[name]] = gpr[self.INDEX[name]] & ~0xFFFF_FFFF | value
        gpr[RSP] = self.STACK
        self.cpu.state.gpr = gpr
        self.cpu.state.cs.base = 0xF0000
        self.cpu.state.es.base, self.cpu.state.ds.base = es << 4, ds << 4
        self.memory.poke(self.STACK, struct.pack("<HHH", 0x1234, 0x0050, 0x0202))
        self.machine.port_out(0xB0, 1, words.get("ax", 0) & 0xFF)
        return self.registers()

    def serve_interrupts(self) -> None:
        """What the ROM's handlers of the keyboard and the timer do, until nothing asks any more."""
        machine = self.machine
        for _ in range(4096):
            machine.poll()
            if not machine.interrupts.asking:
                if machine.keyboard.next_ns() is None:
                    return
                self.clock.advance(0.001)
                continue
            vector = machine.acknowledge()
            if vector == 0x09:
                self.call(0x09, ax=0x4F00 | machine.port_in(0x60, 1))
            else:
                assert vector == 0x08
                self.memory.poke_u32(0x46C, self.memory.u32(0x46C) + 1)
            machine.port_out(0x20, 1, 0x20)
        raise AssertionError("interrupts without end")

    def press(self, *keys: tuple[int, int]) -> None:
        assert self.machine.press(keys) == len(keys)
        self.serve_interrupts()

    def registers(self) -> dict[str, int]:
        gpr = self.cpu.state.gpr
        flags = self.memory.u16(self.STACK + 4)
        assert gpr[RIP] % 8 == 0, "a service moved the instruction pointer"
        return {
            **{name: gpr[index] & 0xFFFF for name, index in self.INDEX.items()},
            "eax": gpr[RAX] & 0xFFFF_FFFF, "ebx": gpr[RBX] & 0xFFFF_FFFF,
            "carry": flags & 1, "zero": flags >> 6 & 1,
        }

    def type(self, text: str) -> None:
        for character in text:
            self.call(0x10, ax=0x0E00 | ord(character))

    def row(self, number: int) -> str:
        screen = self.machine.screen()
        assert screen is not None
        return screen.rows[number].rstrip()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def bench() -> Iterator[Callable[..., BiosBench]]:
    """Makes `BiosBench`es and frees their images."""
    made: list[BiosBench] = []

    def make(image: bytes = b"\xEB\xFE" + bytes(1474560 - 2), memory_bytes: int = 2 << 20, *others: Disk, **disk: Any):
        made.append(BiosBench(image, memory_bytes, *others, **disk))
        return made[-1]

    yield make
    for one in made:
        os.close(one.fd)


class RunningWorker:
    """A forked worker and the supervisor's end of its socket. It dies with the test, always."""

    def __init__(self, spec: WorkerSpec, image: bytes | None, module_files: Sequence[bytes] = (),
                 saved: tuple[bytes, bytes] | None = None) -> None:
        self.memory_fd = os.memfd_create("memory")
        os.ftruncate(self.memory_fd, spec.memory_bytes)
        state_fds: list[int] = []
        if saved is not None:
            os.pwrite(self.memory_fd, saved[0], 0)
            state_fds = [os.memfd_create("state")]
            os.pwrite(state_fds[0], saved[1], 0)
        status_fd = os.memfd_create("status")
        os.ftruncate(status_fd, STATUS_SIZE)
        image_fd = -1
        if image is not None:
            image_fd = os.memfd_create("image")
            os.write(image_fd, image)
        module_fds = [os.memfd_create("module") for _ in module_files]
        for fd, data in zip(module_fds, module_files, strict=True):
            os.write(fd, data)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # As the zygote has it: a kick that comes before the worker's own handler is not its death.
        ignored = [(number, signal.signal(number, signal.SIG_IGN)) for number in kick.SIGNALS]
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                signal.alarm(2 * PATIENCE_S)     # until the worker takes SIGALRM for itself
                fds = [theirs.fileno(), self.memory_fd, status_fd, image_fd, *module_fds, *state_fds]
                code = process.spawned(json.loads(json.dumps(spec.to_json())), fds)
            finally:
                os._exit(code)
        for number, handler in ignored:
            signal.signal(number, handler)
        theirs.close()
        self.link = ours
        self.link.settimeout(PATIENCE_S)
        self.status = StatusPage(status_fd, writable=False)
        self.memory = mmap.mmap(self.memory_fd, spec.memory_bytes)
        for fd in (status_fd, image_fd, *module_fds, *state_fds):
            if fd >= 0:
                os.close(fd)
        self._next = 0
        self.events: list[dict[str, Any]] = []
        self.exit_code: int | None = None

    def _receive(self) -> dict[str, Any]:
        packet = b""
        for _ in range(2):                   # a reset is told once, before what was said last
            with contextlib.suppress(ConnectionResetError):
                packet = self.link.recv(MAX_PACKET)
                break
        if not packet:
            raise AssertionError(f"the worker is gone without a word, exit code {self.wait()}")
        return json.loads(packet)

    def kick(self) -> None:
        os.kill(self.pid, signal.SIGUSR1)

    def ask(self, op: str, *, descriptor: int | None = None, **arguments: Any) -> dict[str, Any]:
        self._next += 1
        packet = json.dumps({"id": self._next, "op": op, **arguments}).encode()
        socket.send_fds(self.link, [packet], [] if descriptor is None else [descriptor])
        self.kick()
        while True:
            packet = self._receive()
            if packet.get("id") == self._next:
                return packet
            self.events.append(packet)
            assert packet.get("event") not in ("ended", "failed"), packet

    def move(self, engine: str) -> dict[str, Any]:
        """Go on in the other engine, /dev/kvm handed over where it is that."""
        device = os.open("/dev/kvm", os.O_RDWR) if engine == "kvm" else None
        try:
            return self.ask("mode", engine=engine, technology=TECHNOLOGY, descriptor=device)
        finally:
            if device is not None:
                os.close(device)

    def saved(self) -> bytes:
        """What a paused worker says of its vCPU and devices."""
        fd = os.memfd_create("state")
        try:
            answer = self.ask("state", descriptor=fd)
            assert answer.get("ok"), answer
            data = os.pread(fd, 1 << 21, 0)
            assert len(data) == answer["bytes"]
            return data
        finally:
            os.close(fd)

    def event(self, name: str) -> dict[str, Any]:
        """Wait for an event."""
        while True:
            for packet in self.events:
                if packet.get("event") == name:
                    return packet
            packet = self._receive()
            self.events.append(packet)
            if packet["event"] != name:
                assert packet["event"] not in ("ended", "failed"), packet

    def until(self, condition: Callable[[], Any]) -> Any:
        """Poll a condition; its value once it is true."""
        deadline = time.monotonic() + PATIENCE_S
        while not (value := condition()):
            assert time.monotonic() < deadline, "the condition did not come about"
            time.sleep(0.01)
        return value

    def until_phase(self, phase: Phase) -> None:
        self.until(lambda: self.status.get("phase") == phase)

    def press(self, text: str) -> None:
        scans = {"\r": 0x1C, " ": 0x39, **dict(zip("qwertyuiop", range(0x10, 0x1A), strict=True)),
                 **dict(zip("asdfghjkl", range(0x1E, 0x27), strict=True)),
                 **dict(zip("zxcvbnm", range(0x2C, 0x33), strict=True))}
        answer = self.ask("keys", scancodes=[[scans[c], ord(c)] for c in text])
        assert answer["accepted"] == len(text)

    def wait(self) -> int:
        """The exit code; -N for signal N."""
        if self.exit_code is None:
            deadline = time.monotonic() + PATIENCE_S
            while True:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self.exit_code = os.waitstatus_to_exitcode(status)
                    break
                assert time.monotonic() < deadline, "the worker did not leave"
                time.sleep(0.005)
        return self.exit_code

    def end(self) -> None:
        if self.exit_code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        self.link.close()
        self.status.close()
        self.memory.close()
        os.close(self.memory_fd)


@pytest.fixture
def start() -> Iterator[Callable[..., RunningWorker]]:
    """`start(engine, image, boot="flat", bits=16, ...)` makes a worker; all end with the test."""
    made: list[RunningWorker] = []

    def make(engine: str, image: bytes | None = None, *, module_files: Sequence[bytes] = (),
             saved: tuple[bytes, bytes] | None = None, **fields: Any) -> RunningWorker:
        """`saved`: memory and state to go on from."""
        fields = {"name": "guest", "memory_bytes": 2 << 20, "boot": "flat", **fields}
        spec = WorkerSpec(engine=engine, restored=saved is not None, technology=TECHNOLOGY, **fields)  # type: ignore
        made.append(RunningWorker(spec, image, module_files, saved))
        return made[-1]

    yield make
    for worker in made:
        worker.end()


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return request.param
