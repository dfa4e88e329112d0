"""Every engine tells of every exit that an instruction causes, and where it was."""

from __future__ import annotations

import pytest

from mixvisor.vm.code.ledger import Ledger, together
from mixvisor.vm.engines.base import RIP, CpuState, ExitKind, ExitReason
from mixvisor.vm.engines.entry import flat_state

from .conftest import ORIGIN


def watched(machine) -> Ledger:
    cpu = machine.cpu
    ledger = Ledger(machine.memory, cpu.where, cpu.get_state, blocks=cpu.stops_at == "block")
    cpu.watch = ledger.note
    return ledger


def told(ledger, base=ORIGIN):
    return {(site.address - base, site.mnemonic): site.count for site in together([ledger])}


def test_port_io_and_halt_are_attributed_to_their_instructions(make, engine):
    machine = make(engine)
    ledger = watched(machine)
    # mov cx, 3; again: in al, 60h; out 80h, al; mov dx, 80h; out dx, al; loop again; hlt
    machine.run("b90300 e460 e680 ba8000 ee e2f6 f4")
    assert told(ledger) == {(3, "in"): 3, (5, "out"): 3, (10, "out"): 3, (13, "hlt"): 1}
    assert sum(told(ledger).values()) == sum(machine.count(kind) for kind in ExitKind)
    assert [site.mnemonic for site in ledger.last()][-2:] == ["out", "hlt"]


def test_a_string_instruction_is_one_place(make, real_engine):
    machine = make(real_engine)
    ledger = watched(machine)
    machine.run("31f6 b90500 ba8000 f36e f4")                # rep outsb
    assert set(told(ledger)) == {(8, "outsb"), (10, "hlt")}
    assert together([ledger])[0].text == "rep outsb dx, byte ptr [si]"


def test_segments_count_in_the_address(make, engine):
    machine = make(engine)
    ledger = watched(machine)
    machine.poke(0x20010, bytes.fromhex("e680 f4"))
    state = CpuState()
    state.cs.selector, state.cs.base = 0x2000, 0x20000
    state.gpr[RIP] = 0x10
    machine.cpu.set_state(state)
    machine.cpu.run()
    assert told(ledger, 0x20000) == {(0x10, "out"): 1, (0x12, "hlt"): 1}


@pytest.mark.parametrize("bits", [32, 64])
def test_wider_modes_are_told_too(make, real_engine, bits):
    machine = make(real_engine)
    ledger = watched(machine)
    machine.poke(0x10000, bytes.fromhex("66e780 66ef f4"))
    machine.cpu.set_state(flat_state(machine.memory, bits, 0x10000))
    machine.cpu.run()
    assert told(ledger, 0x10000) == {(0, "out"): 1, (3, "out"): 1, (5, "hlt"): 1}


def test_a_software_interrupt_is_its_instructions_on_the_software_engine(make):
    machine = make("software")
    ledger = watched(machine)
    machine.poke(0x21 * 4, b"\x00\x06\x00\x00")
    machine.poke(0x600, b"\xCF")
    machine.run("cd21 cd21 f4")
    assert told(ledger) == {(0, "int"): 1, (2, "int"): 1, (4, "hlt"): 1}


def test_memory_mapped_access_is_an_instructions_or_told_as_a_blocks(make, real_engine):
    machine = make(real_engine)
    ledger = watched(machine)
    machine.poke(0x10000, bytes.fromhex("90 a100001000 f4"))          # mov eax, [100000h]: beyond memory
    machine.cpu.set_state(flat_state(machine.memory, 32, 0x10000))
    machine.cpu.run()
    site = next(site for site in ledger.sites() if site.kind == ExitKind.MMIO_READ)
    if machine.cpu.stops_at == "block":
        assert (site.mnemonic, site.text) == ("", "(in the block that is here)")
    else:
        assert (site.mnemonic, site.address) == ("mov", 0x10001)


@pytest.mark.parametrize(("code", "says"), [("cc", "int3"), ("cd21", "int 0x21"), ("0f0b", "ud2")])
def test_a_triple_fault_stands_at_the_instruction_that_began_it(make, code, says):
    from mixvisor.vm.code.decode import describe

    machine = make("software")
    ledger = watched(machine)
    machine.poke(0x10000, bytes.fromhex(f"90 {code} f4 f4"))
    state = flat_state(machine.memory, 32, 0x10000)                    # an empty IDT
    machine.cpu.set_state(state)
    left = machine.cpu.run()
    assert left.reason is ExitReason.TRIPLE_FAULT
    state = machine.cpu.get_state()
    assert state.gpr[RIP] == 0x10001
    assert describe(machine.memory, state) == says
    assert ledger.last()[-1].text == says
