"""Devices' state: nothing is forgotten, what comes back behaves the same, and nonsense is refused."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixvisor.vm.engines.base import RSP
from mixvisor.vm.worker.devices.fwcfg import FirmwareConfig
from mixvisor.vm.worker.machine import Machine
from mixvisor.vm.worker.memory import GuestMemory
from mixvisor.vm.worker.saved import BadState, Moments, capture, install

from .conftest import BiosBench, FakeClock, FakeCpu

SECTOR = b"\xEB\xFE".ljust(512, b"\0")

# What a step of a guest's, or of the world around it, can be.
PORTS = (0x20, 0x21, 0xA0, 0xA1, 0x40, 0x41, 0x42, 0x43, 0x61, 0x60, 0x64, 0x70, 0x71, 0x92, 0xE0, 0xE3, 0xCF8,
         0x3D4, 0x3D5, 0x3C0, 0x378, 0x37A, 0x510, 0x511, *range(0x3F8, 0x400))
ENDING = {(0x64, value) for value in range(0xF0, 0x100)} | {(0x92, value) for value in range(256) if value & 1}
# Mostly what makes devices do something: masks, end of interrupt, counts, modes, commands of the keyboard.
usual = (0x00, 0x11, 0x13, 0x20, 0x34, 0x36, 0x60, 0x0B, 0x46, 0xAE, 0xF2)
values = st.one_of(st.integers(0, 255), st.sampled_from(usual))
steps = st.one_of(
    st.tuples(st.just("out"), st.sampled_from(PORTS), values).filter(lambda step: step[1:] not in ENDING),
    st.tuples(st.just("in"), st.sampled_from([port for port in PORTS if port != 0x61]), st.just(0)),
    st.tuples(st.just("key"), st.integers(1, 0x58), st.integers(0, 127)),
    st.tuples(st.just("typed"), st.integers(0, 255), st.just(0)),
    st.tuples(st.just("printed"), st.integers(0, 255), st.just(0)),
    st.tuples(st.just("later"), st.integers(0, 400_000), st.just(0)),
    st.tuples(st.just("take"), st.just(0), st.just(0)),
)


class World:
    """A machine with a clock of its own, and everything that can be seen of it from outside."""

    def __init__(self, *, disk: bool, now_ns: int = 1_000_000_000) -> None:
        if disk:
            bench = BiosBench(SECTOR, 1 << 20)
            os.close(bench.fd)                 # nothing here reads the disk
            self.clock, self.cpu, self.machine = bench.clock, bench.cpu, bench.machine
        else:
            self.clock, self.cpu = FakeClock(), FakeCpu()
            self.machine = Machine(GuestMemory(bytearray(1 << 20)), self.clock, lambda _name, _n: None,
                                   fw_cfg=FirmwareConfig(1 << 20))
            self.machine.attach(self.cpu)
        self.clock.now_ns = now_ns

    def step(self, step: tuple[str, int, int]) -> object:
        what, first, second = step
        machine = self.machine
        seen: object = None
        if what == "out":
            machine.port_out(first, 1, second)
        elif what == "in":
            seen = machine.port_in(first, 1)
        elif what == "key":
            seen = machine.press([(first, second)])
        elif what == "typed":
            seen = machine.serial.feed(bytes([first]))
        elif what == "printed":
            machine.serial.put(first)
        elif what == "later":
            self.clock.advance(first / 1e6)
            machine.poll()
        elif self.cpu.wanted:
            seen = machine.acknowledge()
        due = machine.next_event_ns
        return seen, self.cpu.wanted, machine.ending is None, due and due - self.clock.now_ns

    def state(self) -> object:
        return json.loads(json.dumps(self.machine.capture()))


@pytest.fixture(params=[False, True], ids=["flat", "disk"])
def disk(request):
    return request.param


def parts(thing, seen):
    """Every object with a declaration, found by what objects really hold."""
    if id(thing) in seen:
        return
    seen[id(thing)] = thing
    if isinstance(thing, (list, tuple)):
        held = list(thing)
    elif isinstance(thing, dict):
        held = list(thing.values())
    elif type(thing).__module__.startswith("mixvisor.vm.worker."):
        held = [getattr(thing, name) for name in attributes(thing)]
    else:
        return
    for item in held:
        parts(item, seen)


def attributes(thing):
    return set(vars(thing)) if hasattr(thing, "__dict__") else set(type(thing).__slots__)


def test_every_attribute_of_every_device_is_said_to_be_state_or_wiring(disk):
    world = World(disk=disk)
    seen = {}
    parts(world.machine, seen)
    found = [thing for thing in seen.values() if hasattr(type(thing), "SAVED")]
    assert {type(thing).__name__ for thing in found} >= {
        "Machine", "Interrupts", "_Chip", "Timer", "_Channel", "Cmos", "Keyboard", "Serial", "TokenBucket", "Vga",
        "Board"}
    for thing in found:
        kind = type(thing)
        assert not set(kind.SAVED) & kind.WIRING, kind
        assert attributes(thing) == set(kind.SAVED) | kind.WIRING, (
            f"{kind.__name__}: say of each attribute whether it is state (SAVED) or not (WIRING)")


# Devices and services that keep nothing: what they hold is wiring or constant, and this list is short.
STATELESS = {"GuestMemory", "Video", "System", "DiskService", "Disk", "OutputRing", "FakeClock"}


def test_every_object_of_a_machine_has_a_declaration_or_keeps_nothing(disk):
    seen = {}
    parts(World(disk=disk).machine, seen)
    undeclared = {type(thing).__name__ for thing in seen.values()
                  if type(thing).__module__.startswith("mixvisor.vm.worker.") and not hasattr(type(thing), "SAVED")}
    assert undeclared <= STATELESS


@settings(max_examples=150, deadline=None)
@given(before=st.lists(steps, max_size=40), after=st.lists(steps, max_size=40), elsewhere=st.integers(1, 1 << 50),
       disk=st.booleans())
def test_a_restored_machine_goes_on_as_the_saved_one_does(before, after, elsewhere, disk):
    saved = World(disk=disk)
    for step in before:
        saved.step(step)
    restored = World(disk=disk, now_ns=elsewhere)
    restored.clock.wall = saved.clock.wall
    restored.machine.memory.raw[:] = saved.machine.memory.raw
    state = saved.state()
    restored.machine.restore(state)
    assert restored.state() == state
    assert restored.cpu.wanted == saved.cpu.wanted
    assert [restored.step(step) for step in after] == [saved.step(step) for step in after]
    assert restored.state() == saved.state()


def test_a_call_that_waits_for_a_key_still_waits_and_gets_it():
    saved, restored = World(disk=True), World(disk=True, now_ns=5)
    for world in (saved, restored):
        gpr = world.cpu.get_gpr()
        gpr[RSP], gpr[16] = 0x1000, 0x16 * 8
        world.cpu.set_gpr(gpr)
        world.cpu.state.cs.base = 0xF0000
    saved.machine.port_out(0xB0, 1, 0)                     # INT 16h, AH = 0: nothing typed yet
    assert saved.machine.wait is not None
    restored.machine.restore(saved.state())
    wait = restored.machine.wait
    assert wait is not None
    assert wait.for_key
    assert not restored.machine.wait_is_over(restored.clock.now_ns)
    bios = restored.machine.bios
    assert bios is not None
    bios.keyboard.put(0x1E, 0x61)
    assert restored.machine.wait_is_over(restored.clock.now_ns)
    restored.machine.finish_wait()
    assert restored.cpu.get_gpr()[0] & 0xFFFF == 0x1E61


def test_a_timed_wait_has_as_long_to_go_as_it_had():
    saved, restored = World(disk=True), World(disk=True, now_ns=77)
    gpr = saved.cpu.get_gpr()
    gpr[RSP], gpr[16], gpr[0], gpr[1], gpr[2], gpr[3] = 0x1000, 0x15 * 8, 0x8600, 0, 0, 0
    gpr[2], gpr[3] = 0x001E, 0x8480                        # 2 s
    saved.cpu.set_gpr(gpr)
    saved.cpu.state.cs.base = 0xF0000
    saved.machine.port_out(0xB0, 1, 0)
    saved.clock.advance(0.5)
    restored.machine.restore(saved.state())
    assert restored.machine.wait is not None
    assert restored.machine.wait.until_ns == 77 + 1_500_000_000


def test_the_date_goes_on_while_a_machine_lies_in_a_file():
    saved, restored = World(disk=False), World(disk=False)
    restored.clock.wall += 3600 * 10**9
    restored.machine.restore(saved.state())
    restored.machine.port_out(0x70, 1, 4)
    hour = restored.machine.port_in(0x71, 1)
    saved.machine.port_out(0x70, 1, 4)
    assert hour == saved.machine.port_in(0x71, 1) + 1


def test_a_machine_of_another_kind_is_refused():
    with pytest.raises(BadState, match="another kind"):
        World(disk=False).machine.restore(World(disk=True).state())
    with pytest.raises(BadState, match="another kind"):
        World(disk=True).machine.restore(World(disk=False).state())


anything = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=6)),
    lambda inner: st.one_of(st.lists(inner, max_size=6), st.dictionaries(st.text(max_size=6), inner, max_size=4)),
    max_leaves=8)


@settings(deadline=None)
@given(data=st.data(), disk=st.booleans())
def test_whatever_a_file_says_is_refused_or_a_machine_that_runs(data, disk):
    world = World(disk=disk)
    state = world.state()
    inside = state
    while True:
        assert isinstance(inside, (dict, list))
        keys = sorted(inside) if isinstance(inside, dict) else range(len(inside))
        if not keys:
            break
        key = data.draw(st.sampled_from(keys))
        if not isinstance(inside[key], (dict, list)) or not inside[key] or data.draw(st.booleans()):
            inside[key] = data.draw(anything)
            break
        inside = inside[key]
    try:
        world.machine.restore(state)
    except BadState:
        return
    world.clock.advance(1)
    world.machine.poll()
    for port in PORTS:
        world.machine.port_in(port, 1)


@given(data=anything)
def test_what_is_no_state_is_refused(data):
    with pytest.raises(BadState):
        World(disk=False).machine.restore(data)


def test_a_refusal_names_the_place():
    world = World(disk=False)
    state = world.machine.capture()
    state["timer"]["channels"][0]["reload"] = 0
    with pytest.raises(BadState, match=r"Machine\.timer: Timer\.channels: _Channel\.reload: a number from 1 to 65536"):
        install(world.machine, state, Moments(0, 0))
    assert capture(world.machine, Moments(0, 0))
