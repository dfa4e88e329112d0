"""The built-in guests: their bytes, their parameters, and that they do what they say on an engine."""

from __future__ import annotations

import mmap
import os
import pathlib
import shutil
import signal
import struct
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixvisor.vm import guests
from mixvisor.vm.engines import create, kick
from mixvisor.vm.engines.base import ExitKind, ExitReason
from mixvisor.vm.engines.entry import flat_state

SOURCES = pathlib.Path(guests.__file__).parent
WORKLOADS = [name for name, guest in guests.BUILTIN.items() if guest.progress is not None]
ENGINES = [
    pytest.param("kvm", marks=[pytest.mark.kvm, pytest.mark.skipif(
        not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="/dev/kvm cannot be used")]),
    "software",
]


class Bus:
    def __init__(self):
        self.serial = bytearray()
        self.post = bytearray()
        self.exit_code = None
        self.cpu = None

    def port_in(self, port, size):
        return 0x20 if port == 0x3FD else 0xFFFF_FFFF

    def port_out(self, port, size, value):
        if port == 0x3F8:
            self.serial.append(value)
        elif port == 0x80:
            self.post.append(value)
        elif port == 0xF4:
            self.exit_code = value
            self.cpu.stop()

    def mmio_read(self, address, size):
        return (1 << 64) - 1

    def mmio_write(self, address, size, value):
        pass


class Running:
    def __init__(self, engine, name, values=None, memory=None):
        guest = guests.BUILTIN[name]
        values = values or {}
        self.memory = mmap.mmap(-1, memory or guests.memory_needed(name, values))
        code = guests.image(name)
        self.memory[guest.load:guest.load + len(code)] = code
        for address, value in guests.pokes(name, values):
            struct.pack_into("<Q", self.memory, address, value)
        self.bus = Bus()
        self.exits = memoryview(bytearray(8 * len(ExitKind))).cast("Q")
        self.cpu = self.bus.cpu = create(engine, self.memory, self.bus, self.exits)
        self.cpu.set_state(flat_state(self.memory, guest.bits, guest.entry))

    def progress(self, offset=0):
        return struct.unpack_from("<Q", self.memory, guests.PROGRESS_ADDRESS + offset)[0]

    def run_until(self, wanted):
        """Run in short pieces until the progress counter has reached *wanted*."""
        for _ in range(2000):
            signal.setitimer(signal.ITIMER_REAL, 0.005)
            result = self.cpu.run()
            assert result.reason is ExitReason.KICKED, result
            if self.progress() >= wanted:
                return
        pytest.fail(f"progress stands at {self.progress()}, {wanted} was expected")


@pytest.fixture(autouse=True)
def kicks():
    kick.install()
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number in kick.SIGNALS:
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.skipif(shutil.which("nasm") is None, reason="nasm is not installed")
@pytest.mark.parametrize("name", guests.BUILTIN)
def test_the_bytes_are_what_the_source_assembles_to(name, tmp_path):
    out = tmp_path / "image.bin"
    subprocess.run(["nasm", "-f", "bin", "-o", out, f"{name}.asm"], cwd=SOURCES, check=True,
                   timeout=30)
    assert out.read_bytes() == guests.image(name)


@pytest.mark.parametrize("name", guests.BUILTIN)
def test_an_image_ends_below_its_counter(name):
    guest = guests.BUILTIN[name]
    assert guest.load + len(guests.image(name)) <= guests.PROGRESS_ADDRESS


@pytest.mark.parametrize("engine", ENGINES)
def test_hello_prints_its_line_and_ends_with_code_0(engine):
    running = Running(engine, "hello")
    assert running.cpu.run().reason is ExitReason.STOPPED
    assert running.bus.serial == b"Hello from a virtual machine of Mixvisor.\r\n"
    assert running.bus.exit_code == 0
    running.cpu.close()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", WORKLOADS)
def test_a_workload_makes_progress_in_ring_3_of_long_mode(engine, name):
    running = Running(engine, name)
    running.run_until(50)
    state = running.cpu.get_state()
    assert state.efer & 1 << 10
    if name != "rings":
        assert (state.cs.selector & 3, state.ss.dpl) == (3, 3)
    running.cpu.close()


@pytest.mark.parametrize("engine", ENGINES)
def test_rings_really_enters_ring_0_once_a_count(engine):
    running = Running(engine, "rings")
    running.run_until(100)
    assert running.progress(8) - running.progress() in (0, 1)
    running.cpu.close()


@pytest.mark.parametrize("engine", ENGINES)
def test_portio_writes_once_a_count(engine):
    running = Running(engine, "portio", {"batch": 10})
    running.run_until(20)
    assert len(running.bus.post) - running.progress() in (0, 1)
    assert set(running.bus.post) == {ord(".")}
    assert running.exits[ExitKind.IO_OUT] == len(running.bus.post)
    running.cpu.close()


@pytest.mark.parametrize("engine", ENGINES)
def test_randmem_leaves_its_working_set_alone(engine):
    running = Running(engine, "randmem", {"working_set": 1 << 20})
    running.run_until(1000)
    assert running.memory[guests.WORKING_SET_ADDRESS:] == bytes(1 << 20) + bytes(
        len(running.memory) - guests.WORKING_SET_ADDRESS - (1 << 20))
    assert running.exits[ExitKind.MMIO_READ] == 0
    running.cpu.close()


def test_parameters_left_out_have_their_defaults():
    assert guests.pokes("randmem", {}) == [(0x20018, 256 * 1024)]
    assert guests.pokes("portio", {"batch": 7}) == [(0x20018, 7)]
    assert guests.pokes("alu", {}) == []


@given(value=st.integers(-10, 1 << 40))
def test_a_working_set_is_taken_exactly_when_it_is_a_power_of_two_in_range(value):
    good = 4096 <= value <= 1 << 30 and value.bit_count() == 1
    if good:
        assert guests.pokes("randmem", {"working_set": value})[0][1] == value
    else:
        with pytest.raises(ValueError, match="working_set of randmem"):
            guests.pokes("randmem", {"working_set": value})


def test_an_unknown_parameter_is_refused():
    with pytest.raises(KeyError, match="no parameter 'size'"):
        guests.pokes("randmem", {"size": 1})


def test_memory_grows_with_the_working_set():
    assert guests.memory_needed("randmem", {}) == 4 << 20
    assert guests.memory_needed("randmem", {"working_set": 16 << 20}) == 18 << 20
    assert guests.memory_needed("alu", {}) == 1 << 20
