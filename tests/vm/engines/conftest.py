"""One machine for all engines: memory, a bus that writes down what it sees, a vCPU.

Every test has a deadline that is not a duration it waits for: after 20 s the vCPU is
kicked, so that a guest that should have stopped gives a failure and not a hanging run.
"""

from __future__ import annotations

import functools
import json
import mmap
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from mixvisor.vm.engines import ENGINES, fake, kick, portable
from mixvisor.vm.engines.base import RIP, RSP, Cpu, CpuState, Exit, ExitKind

MEMORY = 1 << 20
ORIGIN = 0x7C00
DEADLINE_SECONDS = 20

CREATE = {**ENGINES, "fake": fake.create, "unchecked": functools.partial(ENGINES["software"], checked=False)}


def _kvm_missing() -> str | None:
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR))
    except OSError as error:
        return f"/dev/kvm cannot be used: {error.strerror}"
    return None


KVM_MISSING = _kvm_missing()
KVM = pytest.param("kvm", marks=[
    pytest.mark.kvm, pytest.mark.skipif(KVM_MISSING is not None, reason=str(KVM_MISSING))])


@dataclass
class RecordingBus:
    """Answers reads with `reads` (or all ones), keeps (what, where, size, value)."""

    log: list[tuple[object, ...]] = field(default_factory=list)
    reads: dict[int, int] = field(default_factory=dict)
    on_out: Callable[[int, int, int], None] | None = None
    on_in: Callable[[int, int], None] | None = None
    on_acknowledge: Callable[[], int] = lambda: 0

    def port_in(self, port: int, size: int) -> int:
        self.log.append(("in", port, size))
        if self.on_in:
            self.on_in(port, size)
        return self.reads.get(port, -1)

    def port_out(self, port: int, size: int, value: int) -> None:
        self.log.append(("out", port, size, value))
        if self.on_out:
            self.on_out(port, size, value)

    def mmio_read(self, address: int, size: int) -> int:
        self.log.append(("read", address, size))
        return (1 << 64) - 1

    def mmio_write(self, address: int, size: int, value: int) -> None:
        self.log.append(("write", address, size, value))

    def acknowledge(self) -> int:
        self.log.append(("acknowledge",))
        return self.on_acknowledge()


class Machine:
    def __init__(self, engine: str, size: int = MEMORY) -> None:
        self.engine = engine
        self.memory = mmap.mmap(-1, size)
        self.bus = RecordingBus()
        self.exits = memoryview(bytearray(8 * len(ExitKind))).cast("Q")
        self.cpu: Cpu = CREATE[engine](self.memory, self.bus, self.exits)

    def poke(self, address: int, data: bytes) -> None:
        self.memory[address:address + len(data)] = data
        self.cpu.memory_changed(address, len(data))

    def load(self, code: str, *, at: int = ORIGIN) -> None:
        """Machine code in hex, and a real-mode state that starts there."""
        self.poke(at, bytes.fromhex(code))
        state = CpuState()
        state.gpr[RIP], state.gpr[RSP] = at, 0x7000
        self.cpu.set_state(state)

    def run(self, code: str) -> Exit:
        self.load(code)
        return self.cpu.run()

    def move(self, engine: str) -> None:
        """Go on in another engine, by way of a file's plain data."""
        plain = json.dumps(portable.to_plain(self.cpu.get_whole()))
        old, self.engine = self.cpu, engine
        self.cpu = CREATE[engine](self.memory, self.bus, self.exits)
        try:
            self.cpu.set_whole(portable.from_plain(json.loads(plain)))
        finally:
            old.close()

    def interrupt(self, vector: int, handler: str, *, at: int = 0x600) -> None:
        """Ask for *vector* once, with a handler (hex) at 0:*at* in the real-mode table."""
        self.poke(vector * 4, at.to_bytes(2, "little") + bytes(2))
        self.poke(at, bytes.fromhex(handler))

        def acknowledge() -> int:
            self.cpu.request_interrupt(False)
            return vector

        self.bus.on_acknowledge = acknowledge
        self.cpu.request_interrupt(True)

    def count(self, kind: ExitKind) -> int:
        return self.exits[kind]


@pytest.fixture
def deadline() -> Iterator[None]:
    previous = signal.getsignal(signal.SIGALRM)
    kick.install()
    signal.setitimer(signal.ITIMER_REAL, DEADLINE_SECONDS)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number in kick.SIGNALS:
        signal.signal(number, previous if number == signal.SIGALRM else signal.SIG_DFL)


@pytest.fixture(params=[KVM, "software", "unchecked", "fake"])
def engine(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[KVM, "software"])
def real_engine(request: pytest.FixtureRequest) -> str:
    """The engines that run more than real mode."""
    return request.param


@pytest.fixture
def make(deadline: None) -> Iterator[Callable[..., Machine]]:
    machines: list[Machine] = []

    def build(engine: str, size: int = MEMORY) -> Machine:
        machines.append(Machine(engine, size))
        return machines[-1]

    yield build
    for machine in machines:
        machine.cpu.close()


@pytest.fixture
def machine(engine: str, make: Callable[..., Machine]) -> Machine:
    return make(engine)


@pytest.fixture
def real_machine(real_engine: str, make: Callable[..., Machine]) -> Machine:
    return make(real_engine, 4 << 20)
