"""Interrupts and exceptions as the software engine delivers them, against the manual.

Every handler is one HLT: that of vector v at HANDLERS + v, so that RIP behind it tells which one ran
and the frame is on the stack as it was pushed.
"""

from __future__ import annotations

import signal
import struct

import pytest

from mixvisor.vm.engines.base import (
    RAX,
    RIP,
    RSP,
    CpuState,
    DescriptorTable,
    ExitReason,
    Segment,
)
from mixvisor.vm.engines.entry import flat_state

CODE, HANDLERS, IDT, TSS, GDT32 = 0x10000, 0xC000, 0xD000, 0xE000, 0xE800
RING3_STACK = 0xB000
STACK = 0x8000


@pytest.fixture
def machine(make):
    machine = make("software", 4 << 20)
    machine.poke(HANDLERS, b"\xF4" * 256)
    return machine


def gate64(machine, vector, *, dpl=0, present=True, ist=0, kind=14, selector=0x08):
    target = HANDLERS + vector
    machine.poke(IDT + vector * 16, struct.pack(
        "<HHBBHQ", target & 0xFFFF, selector, ist, present << 7 | dpl << 5 | kind, target >> 16, 0))


def gate32(machine, vector, *, dpl=0, present=True, kind=14, selector=0x08):
    target = HANDLERS + vector
    machine.poke(IDT + vector * 8, struct.pack(
        "<HHBBH", target & 0xFFFF, selector, 0, present << 7 | dpl << 5 | kind, target >> 16))


def long_mode(machine, code: str, *, ring: int) -> None:
    machine.poke(CODE, bytes.fromhex(code))
    state = flat_state(machine.memory, 64, CODE)
    state.idt = DescriptorTable(IDT, 256 * 16 - 1)
    if ring == 3:
        flat = {"limit": 0xFFFF_FFFF, "dpl": 3, "g": True}
        state.cs = Segment(selector=0x2B, type=11, l=True, **flat)
        for name in ("ds", "es", "fs", "gs", "ss"):
            setattr(state, name, Segment(selector=0x33, db=True, **flat))
        state.gpr[RSP] = RING3_STACK
    machine.cpu.set_state(state)


def protected_mode(machine, code: str, *, ring: int = 0) -> None:
    machine.poke(CODE, bytes.fromhex(code))
    state = flat_state(machine.memory, 32, CODE)
    state.idt = DescriptorTable(IDT, 256 * 8 - 1)
    state.tr = Segment(selector=0x38, base=TSS, limit=103, type=11, s=False)
    machine.poke(TSS + 4, struct.pack("<II", STACK, 0x10))
    if ring == 3:
        flat = {"limit": 0xFFFF_FFFF, "dpl": 3, "g": True, "db": True}
        state.cs = Segment(selector=0x1B, type=11, **flat)
        for name in ("ds", "es", "fs", "gs", "ss"):
            setattr(state, name, Segment(selector=0x23, **flat))
        state.gpr[RSP] = RING3_STACK
    machine.cpu.set_state(state)


def vector_reached(machine) -> int:
    assert machine.cpu.run().reason is ExitReason.HALTED
    return machine.cpu.get_gpr()[RIP] - 1 - HANDLERS


def frame(machine, words: int, width: str = "Q") -> tuple[int, ...]:
    return struct.unpack_from(f"<{words}{width}", machine.memory,
                              machine.cpu.get_gpr()[RSP] & 0xFFFFFFFF)


def test_int_from_ring_3_reaches_ring_0_with_a_full_frame_on_the_stack_of_the_tss(machine):
    gate64(machine, 0x80, dpl=3)
    long_mode(machine, "cd80", ring=3)
    assert vector_reached(machine) == 0x80
    rip, cs, flags, rsp, ss = frame(machine, 5)
    assert (rip, cs, flags, rsp, ss) == (CODE + 2, 0x2B, 2, RING3_STACK, 0x33)
    state = machine.cpu.get_state()
    assert (state.cs.selector, state.cs.dpl, state.ss.selector, state.ss.dpl) == (8, 0, 0, 0)
    assert state.gpr[RSP] == STACK - 40


def test_ring_0_runs_on_its_own_stack_in_long_mode_aligned_to_16(machine):
    gate64(machine, 0x30)
    long_mode(machine, "6a00 cd30", ring=0)
    assert vector_reached(machine) == 0x30
    assert machine.cpu.get_gpr()[RSP] == STACK - 16 - 40
    assert frame(machine, 5)[3] == STACK - 8


def test_an_interrupt_stack_of_the_tss_is_used_when_the_gate_names_one(machine):
    gate64(machine, 0x30, ist=1)
    long_mode(machine, "cd30", ring=0)
    machine.poke(0x7100 + 0x24, struct.pack("<Q", 0x7800))
    assert vector_reached(machine) == 0x30
    assert machine.cpu.get_gpr()[RSP] == 0x7800 - 40


def test_a_privileged_instruction_in_ring_3_is_a_general_protection_fault_at_its_address(machine):
    gate64(machine, 13)
    long_mode(machine, "90 f4", ring=3)
    assert vector_reached(machine) == 13
    assert frame(machine, 4)[:3] == (0, CODE + 1, 0x2B)


def test_a_gate_that_ring_3_may_not_call_is_a_general_protection_fault_naming_it(machine):
    gate64(machine, 0x80, dpl=0)
    gate64(machine, 13)
    long_mode(machine, "cd80", ring=3)
    assert vector_reached(machine) == 13
    assert frame(machine, 1)[0] == 0x80 * 8 + 2


def test_page_faults_tell_address_and_kind_also_the_second_and_the_third_time(machine):
    gate64(machine, 14)
    for attempt in range(3):
        # mov rax, 0x40000000 + attempt * 0x1000; mov [rax], ecx
        address = 0x4000_0000 + attempt * 0x1000
        long_mode(machine, "48b8" + struct.pack("<Q", address).hex() + "8908", ring=3)
        assert vector_reached(machine) == 14
        assert frame(machine, 2) == (0b110, CODE + 10)
        assert machine.cpu.get_state().cr2 == address


def test_a_fault_on_the_way_to_a_fault_is_a_double_fault_with_error_code_0(machine):
    gate64(machine, 13, present=False)
    gate64(machine, 8)
    long_mode(machine, "f4", ring=3)
    assert vector_reached(machine) == 8
    assert frame(machine, 2) == (0, CODE)


def test_a_fault_in_the_double_fault_is_a_triple_fault(machine):
    gate64(machine, 13, present=False)
    gate64(machine, 8, present=False)
    long_mode(machine, "f4", ring=3)
    assert machine.cpu.run().reason is ExitReason.TRIPLE_FAULT


def test_a_software_interrupt_through_an_absent_gate_is_the_fault_not_present(machine):
    gate64(machine, 0x80, dpl=3, present=False)
    gate64(machine, 11)
    long_mode(machine, "cd80", ring=3)
    assert vector_reached(machine) == 11
    assert frame(machine, 1)[0] == 0x80 * 8 + 2


def test_an_interrupt_gate_clears_the_interrupt_flag_and_a_trap_gate_keeps_it(machine):
    for kind, kept in ((14, 0), (15, 0x200)):
        gate64(machine, 0x30, kind=kind)
        long_mode(machine, "fb cd30", ring=0)
        assert vector_reached(machine) == 0x30
        assert machine.cpu.get_gpr()[17] & 0x200 == kept
        assert frame(machine, 3)[2] & 0x200


@pytest.mark.parametrize(("kind", "width", "size"), [(14, "I", 12), (6, "H", 6)])
def test_gates_of_32_and_of_16_bits_push_frames_of_their_width(machine, kind, width, size):
    gate32(machine, 0x30, kind=kind)
    protected_mode(machine, "cd30")
    assert vector_reached(machine) == 0x30
    assert machine.cpu.get_gpr()[RSP] == STACK - size
    assert frame(machine, 3, width) == ((CODE + 2) & (0xFFFF if width == "H" else -1), 8, 2)


def test_int_from_ring_3_of_protected_mode_switches_to_the_stack_of_the_tss(machine):
    gate32(machine, 0x80, dpl=3)
    protected_mode(machine, "cd80", ring=3)
    assert vector_reached(machine) == 0x80
    assert frame(machine, 5, "I") == (CODE + 2, 0x1B, 2, RING3_STACK, 0x23)
    state = machine.cpu.get_state()
    assert (state.ss.selector, state.ss.dpl, state.cs.selector) == (0x10, 0, 8)


def test_a_stack_of_the_tss_that_is_no_stack_is_an_invalid_tss(machine):
    gate32(machine, 0x80, dpl=3)
    gate32(machine, 10)
    protected_mode(machine, "cd80", ring=3)
    machine.poke(TSS + 4, struct.pack("<II", STACK, 0x08))        # a code segment
    # the fault needs a stack too, and there is none: double, then triple
    assert machine.cpu.run().reason is ExitReason.TRIPLE_FAULT


def test_leaving_virtual_8086_mode_saves_and_clears_the_data_segments(machine):
    gate32(machine, 0x21, dpl=3)
    protected_mode(machine, "")
    state = machine.cpu.get_state()
    for name, selector in (("cs", 0x1000), ("ss", 0x0B00), ("ds", 0x111), ("es", 0x222),
                           ("fs", 0x333), ("gs", 0x444)):
        setattr(state, name, Segment(selector=selector, base=selector << 4, dpl=3,
                                     type=11 if name == "cs" else 3))
    state.gpr[RIP], state.gpr[RSP], state.gpr[17] = 0, 0x100, 0x23002     # VM, IOPL 3
    machine.cpu.set_state(state)
    machine.poke(CODE, bytes.fromhex("cd21"))
    assert vector_reached(machine) == 0x21
    assert frame(machine, 9, "I") == (
        2, 0x1000, 0x23002, 0x100, 0x0B00, 0x222, 0x111, 0x333, 0x444)
    after = machine.cpu.get_state()
    assert (after.ds.selector, after.es.selector, after.gpr[17] & 1 << 17) == (0, 0, 0)


def test_syscall_enters_ring_0_at_lstar_and_sysret_comes_back(machine):
    # ring 0: STAR, LSTAR, FMASK by wrmsr; sysretq to ring 3; syscall; hlt at LSTAR
    program = (
        "b9810000c0 31c0 ba08001800 0f30"          # STAR = 0018_0008 << 32
        "b9820000c0 b850c00000 31d2 0f30"          # LSTAR = HANDLERS + 0x50
        "b9840000c0 b800020000 31d2 0f30"          # FMASK = IF
        "b93b000100 41bb02020000 480f07")          # rcx = 0x1003b, r11 = 0x202; sysretq
    code = bytes.fromhex(program.replace(" ", ""))
    program += "90" * (0x3B - len(code)) + "0f05"
    long_mode(machine, program.replace(" ", ""), ring=0)
    assert vector_reached(machine) == 0x50
    gpr, state = machine.cpu.get_gpr(), machine.cpu.get_state()
    assert gpr[2] == CODE + 0x3B + 2               # rcx: behind the syscall
    assert gpr[11] & 0x200
    assert gpr[17] & 0x200 == 0
    assert (state.cs.selector, state.cs.dpl, state.ss.selector) == (8, 0, 0x10)


@pytest.mark.parametrize("limit", [0, 3, 6 * 16 + 14])
def test_a_table_too_short_for_the_vector_is_a_fault_of_its_own(machine, limit):
    long_mode(machine, "0f0b", ring=0)
    state = machine.cpu.get_state()
    state.idt = DescriptorTable(IDT, limit)
    machine.cpu.set_state(state)
    assert machine.cpu.run().reason is ExitReason.TRIPLE_FAULT


def test_a_frame_that_has_no_memory_behind_it_is_dropped_and_the_handler_runs(machine):
    gate64(machine, 0x30)
    long_mode(machine, "cd30", ring=0)
    state: CpuState = machine.cpu.get_state()
    machine.poke(0x3000 + 8 * 8, struct.pack("<Q", 8 << 21 | 0x87))       # beyond memory
    state.gpr[RSP] = (8 << 21) + 0x1000
    machine.cpu.set_state(state)
    assert vector_reached(machine) == 0x30
    assert machine.cpu.get_gpr()[RAX] == 0


def test_a_handler_that_cannot_be_fetched_faults_for_ever_and_is_kicked(machine):
    # The stack comes from the TSS every time, so nothing but a kick ends this.
    gate64(machine, 14, ist=1)
    machine.poke(IDT + 14 * 16 + 8, struct.pack("<Q", 0x40))            # 40_0000_C00E: not mapped
    long_mode(machine, "48a1000000400000 0000".replace(" ", ""), ring=0)
    machine.poke(0x7100 + 0x24, struct.pack("<Q", 0x7800))
    signal.setitimer(signal.ITIMER_REAL, 0.02)
    assert machine.cpu.run().reason is ExitReason.KICKED
    assert machine.cpu.get_gpr()[RIP] == 0x40 << 32 | HANDLERS + 14
