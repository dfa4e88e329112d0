"""The contract of `Cpu`, held by every engine and by the fake.

Programs are real-mode machine code in hex, loaded at 0:7C00.
"""

from __future__ import annotations

import os
import random
import signal
import struct
import threading

import pytest

from mixvisor.vm.engines.base import (
    RAX,
    RBX,
    RCX,
    RIP,
    RSP,
    CpuState,
    DescriptorTable,
    ExitKind,
    ExitReason,
    Segment,
)
from mixvisor.vm.engines.entry import flat_state

HLT = "f4"


def test_out_hands_port_size_and_value_to_the_bus(machine):
    result = machine.run("b83412 e610 e720 ba0003 ee ef" + HLT)
    assert result.reason is ExitReason.HALTED
    assert machine.bus.log == [
        ("out", 0x10, 1, 0x34), ("out", 0x20, 2, 0x1234),
        ("out", 0x300, 1, 0x34), ("out", 0x300, 2, 0x1234)]
    assert machine.count(ExitKind.IO_OUT) == 4


def test_in_changes_only_the_bytes_it_is_as_wide_as(machine):
    machine.bus.reads = {0x10: 0xFFFF_FF56, 0x20: 0xFFFF_ABCD}
    machine.run("b83412 e410 89c3 e520" + HLT)        # mov bx, ax between
    gpr = machine.cpu.get_gpr()
    assert gpr[RBX] == 0x1256
    assert gpr[RAX] == 0xABCD
    assert machine.bus.log == [("in", 0x10, 1), ("in", 0x20, 2)]
    assert machine.count(ExitKind.IO_IN) == 2


def test_doubleword_port_access_carries_32_bits(real_machine):
    real_machine.bus.reads = {0x10: 0xDEAD_BEEF}
    real_machine.run("66e510 66e720" + HLT)
    assert real_machine.bus.log == [("in", 0x10, 4), ("out", 0x20, 4, 0xDEAD_BEEF)]


def test_string_out_calls_the_bus_once_an_element(real_machine):
    real_machine.load("fc be007e b90300 ba0003 f36e" + HLT)
    real_machine.poke(0x7E00, b"abc")
    assert real_machine.cpu.run().reason is ExitReason.HALTED
    assert real_machine.bus.log == [("out", 0x300, 1, byte) for byte in b"abc"]


def test_string_in_stores_what_the_bus_answers(real_machine):
    real_machine.bus.reads = {0x300: 0x41}
    assert real_machine.run("fc bf007e b90300 ba0003 f36c" + HLT).reason is ExitReason.HALTED
    assert real_machine.memory[0x7E00:0x7E03] == b"AAA"


def test_register_changes_in_port_out_survive(machine):
    def change(port, size, value):
        gpr = machine.cpu.get_gpr()
        gpr[RAX], gpr[RBX], gpr[RCX] = 0x1111, 0x2222, 0x3333
        machine.cpu.set_gpr(gpr)

    machine.bus.on_out = change
    assert machine.run("b80500 e610 43" + HLT).reason is ExitReason.HALTED      # inc bx after
    gpr = machine.cpu.get_gpr()
    assert (gpr[RAX], gpr[RBX], gpr[RCX]) == (0x1111, 0x2223, 0x3333)
    assert gpr[RIP] == 0x7C07


def test_the_bus_sees_the_registers_before_the_instruction(machine):
    seen = []
    machine.bus.on_out = lambda port, size, value: seen.append(machine.cpu.get_gpr()[:4])
    machine.run("b80100 bb0200 e610 b80900 e610" + HLT)
    assert [(gpr[RAX], gpr[RBX]) for gpr in seen] == [(1, 2), (9, 2)]


def test_memory_written_in_port_out_is_seen_by_the_next_instruction(machine):
    machine.bus.on_out = lambda *_: machine.poke(0x500, b"\x78\x56")
    machine.run("e610 a10005" + HLT)
    assert machine.cpu.get_gpr()[RAX] == 0x5678


@pytest.mark.parametrize(("code", "interrupts_on"), [("fa", False), ("fb 90", True)])
def test_hlt_stops_behind_itself_and_tells_the_interrupt_flag(machine, code, interrupts_on):
    result = machine.run(code + HLT)
    assert result.reason is ExitReason.HALTED
    assert result.interrupts_on is interrupts_on
    assert machine.cpu.get_gpr()[RIP] == 0x7C00 + len(bytes.fromhex(code + HLT))
    assert machine.count(ExitKind.HALT) == 1


def test_a_halted_guest_goes_on_behind_the_hlt(machine):
    machine.run("b001" + HLT + "b002" + HLT)
    assert machine.cpu.get_gpr()[RAX] == 1
    assert machine.cpu.run().reason is ExitReason.HALTED
    assert machine.cpu.get_gpr()[RAX] == 2


def test_stop_in_port_out_ends_exactly_behind_the_instruction(machine):
    machine.bus.on_out = lambda *_: machine.cpu.stop()
    assert machine.run("b001 e610 40 40 40" + HLT).reason is ExitReason.STOPPED
    gpr = machine.cpu.get_gpr()
    assert (gpr[RAX], gpr[RIP]) == (1, 0x7C04)
    assert machine.cpu.run().reason is ExitReason.HALTED
    assert machine.cpu.get_gpr()[RAX] == 4
    assert len(machine.bus.log) == 1


def test_stop_in_port_in_ends_behind_the_instruction_with_its_result(machine):
    machine.bus.on_in = lambda *_: machine.cpu.stop()
    machine.bus.reads = {0x10: 0x77}
    assert machine.run("b83412 e410 40" + HLT).reason is ExitReason.STOPPED
    gpr = machine.cpu.get_gpr()
    assert (gpr[RAX], gpr[RIP]) == (0x1277, 0x7C05)


def test_registers_changed_together_with_a_stop_survive(machine):
    def change(*_):
        gpr = machine.cpu.get_gpr()
        gpr[RBX] = 0x4321
        machine.cpu.set_gpr(gpr)
        machine.cpu.stop()

    machine.bus.on_out = change
    assert machine.run("e610 43" + HLT).reason is ExitReason.STOPPED
    assert machine.cpu.get_gpr()[RBX] == 0x4321
    assert machine.cpu.get_gpr()[RIP] == 0x7C02


def test_a_stop_right_before_hlt_does_not_lose_the_hlt(machine):
    machine.bus.on_out = lambda *_: machine.cpu.stop()
    assert machine.run("e610" + HLT).reason is ExitReason.STOPPED
    assert machine.cpu.run().reason is ExitReason.HALTED


def test_a_kick_before_run_is_kept(machine):
    machine.load("90" + HLT)
    machine.cpu.kick()
    assert machine.cpu.run().reason is ExitReason.KICKED
    assert machine.cpu.get_gpr()[RIP] == 0x7C00
    assert machine.cpu.run().reason is ExitReason.HALTED
    assert machine.count(ExitKind.KICK) == 1


def test_a_signal_before_run_is_kept(machine):
    machine.load("90" + HLT)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert machine.cpu.run().reason is ExitReason.KICKED
    assert machine.cpu.run().reason is ExitReason.HALTED


def test_a_kick_inside_a_bus_call_comes_behind_the_instruction(machine):
    machine.bus.on_out = lambda *_: machine.cpu.kick()
    machine.load("b001 e610 ebfe")
    assert machine.cpu.run().reason is ExitReason.KICKED
    assert machine.cpu.get_gpr()[RIP] == 0x7C04
    assert len(machine.bus.log) == 1


def test_a_stop_and_a_kick_at_once_are_both_reported(machine):
    def both(*_):
        machine.cpu.stop()
        machine.cpu.kick()

    machine.bus.on_out = both
    machine.load("e610 ebfe")
    assert [machine.cpu.run().reason for _ in range(2)] == [ExitReason.STOPPED, ExitReason.KICKED]


@pytest.mark.spins
def test_spinning_with_interrupts_off_is_kicked_by_a_signal(machine):
    machine.load("fa ebfe")
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    result = machine.cpu.run()
    assert result.reason is ExitReason.KICKED
    assert machine.cpu.get_gpr()[RIP] == 0x7C01


@pytest.mark.spins
def test_spinning_is_kicked_by_a_signal_to_the_process(machine):
    machine.load("fa ebfe")
    helper = threading.Timer(0.01, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    helper.start()
    assert machine.cpu.run().reason is ExitReason.KICKED
    helper.join()


@pytest.mark.spins
def test_every_one_of_many_kicks_is_answered_and_none_tears_an_instruction(machine):
    # l: inc ax; inc word [0x500]; jmp l
    machine.load("40 ff060005 ebf9")
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    offsets = set()
    for _ in range(150):
        assert machine.cpu.run().reason is ExitReason.KICKED
        gpr = machine.cpu.get_gpr()
        counted, = struct.unpack_from("<H", machine.memory, 0x500)
        offset = gpr[RIP] - 0x7C00
        offsets.add(offset)
        assert gpr[RAX] & 0xFFFF == (counted + (offset == 1)) & 0xFFFF
    assert offsets <= {0, 1, 5}


LCG_A, LCG_B, WORD = 6364136223846793005, 1442695040888963407, 1 << 64


def lcg(start: int, steps: int) -> int:
    """The generator *steps* further, in logarithmic time."""
    a, b, step_a, step_b = 1, 0, LCG_A, LCG_B
    while steps:
        if steps & 1:
            a, b = a * step_a % WORD, (b * step_a + step_b) % WORD
        step_b = (step_b * step_a + step_b) % WORD
        step_a = step_a * step_a % WORD
        steps >>= 1
    return (start * a + b) % WORD


def ring_3(machine, entry: int) -> CpuState:
    state = flat_state(machine.memory, 64, entry)
    flat = {"limit": 0xFFFF_FFFF, "dpl": 3, "g": True}
    state.cs = Segment(selector=0x2B, type=11, l=True, **flat)
    for name in ("ds", "es", "fs", "gs", "ss"):
        setattr(state, name, Segment(selector=0x33, db=True, **flat))
    return state


@pytest.mark.spins
def test_progress_is_never_counted_twice_over_many_stops(real_machine):
    # l: imul rax, r10; add rax, r11; inc qword [rdi]; jmp l
    machine = real_machine
    machine.poke(0x10000, bytes.fromhex("490fafc2 4c01d8 48ff07 ebf4"))
    state = ring_3(machine, 0x10000)
    state.gpr[RAX], state.gpr[10], state.gpr[11], state.gpr[5] = 12345, LCG_A, LCG_B, 0x20000
    machine.cpu.set_state(state)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    counted = 0
    for _ in range(300):
        assert machine.cpu.run().reason is ExitReason.KICKED
        counted, = struct.unpack_from("<Q", machine.memory, 0x20000)
        gpr = machine.cpu.get_gpr()
        value = lcg(12345, counted)
        expected = {0: value, 4: value * LCG_A % WORD, 7: (value * LCG_A + LCG_B) % WORD,
                    10: value}
        assert gpr[RAX] == expected[gpr[RIP] - 0x10000]
    assert counted > 1000


def test_interrupts_go_through_the_guests_vector_table_and_back(machine):
    machine.load("bb0100 cd21 43" + HLT)
    machine.poke(0x21 * 4, struct.pack("<HH", 0x0010, 0x0050))        # 0050:0010
    machine.poke(0x510, bytes.fromhex("e611 cf"))                     # out 11, al; iret
    assert machine.cpu.run().reason is ExitReason.HALTED
    assert machine.bus.log == [("out", 0x11, 1, 0)]
    gpr = machine.cpu.get_gpr()
    assert (gpr[RBX], gpr[RIP], gpr[RSP] & 0xFFFF) == (2, 0x7C07, 0x7000)


def test_the_interrupt_frame_holds_the_address_behind_int_and_interrupts_are_off(machine):
    machine.load("fb cd21")
    machine.poke(0x21 * 4, struct.pack("<HH", 0x0510, 0))
    machine.poke(0x510, bytes.fromhex(HLT))
    result = machine.cpu.run()
    assert result.reason is ExitReason.HALTED
    assert result.interrupts_on is False
    ip, cs, flags = struct.unpack_from("<3H", machine.memory, 0x7000 - 6)
    assert (ip, cs, flags & 0x200) == (0x7C03, 0, 0x200)


def test_an_invalid_opcode_goes_to_vector_6_with_its_own_address(machine):
    machine.load("90 0f0b")
    machine.poke(6 * 4, struct.pack("<HH", 0x0510, 0))
    machine.poke(0x510, bytes.fromhex(HLT))
    assert machine.cpu.run().reason is ExitReason.HALTED
    assert struct.unpack_from("<H", machine.memory, 0x7000 - 6)[0] == 0x7C01


def test_a_division_by_zero_goes_to_vector_0(real_machine):
    real_machine.load("31db f7f3")
    real_machine.poke(0, struct.pack("<HH", 0x0510, 0))
    real_machine.poke(0x510, bytes.fromhex(HLT))
    assert real_machine.cpu.run().reason is ExitReason.HALTED
    assert struct.unpack_from("<H", real_machine.memory, 0x7000 - 6)[0] == 0x7C02


@pytest.mark.parametrize("engine", ["software", "fake"])
def test_a_fault_without_any_vector_table_is_a_triple_fault(make, engine):
    # Not on kvm: where KVM emulates real mode it does not look at the limit of the table.
    machine = make(engine)
    machine.load("0f0b")
    state = machine.cpu.get_state()
    state.idt = DescriptorTable(0, 0)
    machine.cpu.set_state(state)
    assert machine.cpu.run().reason is ExitReason.TRIPLE_FAULT
    assert machine.count(ExitKind.SHUTDOWN) == 1


@pytest.mark.parametrize("bits", [32, 64])
def test_a_fault_in_a_flat_guest_without_handlers_is_a_triple_fault(real_machine, bits):
    real_machine.poke(0x10000, bytes.fromhex("0f0b"))
    real_machine.cpu.set_state(flat_state(real_machine.memory, bits, 0x10000))
    assert real_machine.cpu.run().reason is ExitReason.TRIPLE_FAULT


# External interrupts. Handlers lie at 0:0600.

def test_a_requested_interrupt_is_taken_where_the_guest_allows_it(machine):
    machine.load("fa 40 e610 fb ebfe")                          # cli; inc ax; out 10, al; sti; l: jmp l
    machine.interrupt(0x21, "43 e612" + HLT)                    # inc bx; out 12, al; hlt
    assert machine.cpu.run().interrupts_on is False
    assert machine.bus.log == [("out", 0x10, 1, 1), ("acknowledge",), ("out", 0x12, 1, 1)]
    assert struct.unpack_from("<3H", machine.memory, 0x7000 - 6)[:2] == (0x7C05, 0)
    assert machine.cpu.get_gpr()[RBX] == 1
    assert machine.count(ExitKind.INTERRUPT) == 1


def test_the_instruction_behind_sti_runs_first(machine):
    machine.load("fa b80000 fb 40 90 90" + HLT)
    machine.interrupt(0x21, HLT)
    assert machine.cpu.run().reason is ExitReason.HALTED
    ip, _cs, flags = struct.unpack_from("<3H", machine.memory, 0x7000 - 6)
    assert 0x7C06 <= ip <= 0x7C09              # behind inc ax, never before
    assert machine.cpu.get_gpr()[RAX] == 1
    assert flags & 0x200
    assert not machine.cpu.get_gpr()[17] & 0x200


def test_an_interrupt_that_is_there_already_ends_a_hlt_at_once(machine):
    machine.load("fb" + HLT + "43 fa" + HLT)                    # sti; hlt; inc bx; cli; hlt
    machine.interrupt(0x21, "e612 cf")
    assert machine.cpu.run().interrupts_on is False
    assert machine.cpu.get_gpr()[RBX] == 1
    assert struct.unpack_from("<H", machine.memory, 0x7000 - 6)[0] == 0x7C02
    assert machine.count(ExitKind.HALT) == 1


def test_an_interrupt_asked_for_while_halted_returns_behind_the_hlt(machine):
    machine.load("fb 90" + HLT + "43 fa" + HLT)
    assert machine.cpu.run().interrupts_on is True
    machine.interrupt(0x21, "41 cf")                            # inc cx; iret
    assert machine.cpu.run().interrupts_on is False
    gpr = machine.cpu.get_gpr()
    assert (gpr[RBX], gpr[RCX]) == (1, 1)


def test_an_interrupt_asked_for_in_a_bus_call_comes_behind_the_instruction(machine):
    machine.load("fb 90 e610 ebfe")
    machine.bus.on_out = lambda port, size, value: machine.interrupt(0x21, HLT) if port == 0x10 else None
    assert machine.cpu.run().reason is ExitReason.HALTED
    assert struct.unpack_from("<H", machine.memory, 0x7000 - 6)[0] == 0x7C04


def test_a_request_that_is_taken_back_is_not_delivered(machine):
    machine.load("fa e610 fb 90 90" + HLT)
    machine.interrupt(0x21, "e612 cf")
    machine.bus.on_out = lambda *_: machine.cpu.request_interrupt(False)
    assert machine.cpu.run().interrupts_on is True
    assert machine.bus.log == [("out", 0x10, 1, 0)]


def test_interrupts_and_kicks_do_not_lose_each_other(machine):
    # sti; l: inc ax; inc word [0x500]; jmp l, with a tick at every kick: each is served once.
    machine.load("fb 90 40 ff060005 ebf9")
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    for ticks in range(1, 151):
        machine.interrupt(0x21, "ff060205 cf")                  # inc word [0x502]; iret
        while machine.cpu.run().reason is ExitReason.KICKED and machine.memory[0x502] != ticks:
            pass
        gpr = machine.cpu.get_gpr()
        counted, served = struct.unpack_from("<HH", machine.memory, 0x500)
        assert served == ticks
        if gpr[RIP] >= 0x7C00:                                  # not within the handler
            assert gpr[RAX] & 0xFFFF == (counted + (gpr[RIP] == 0x7C03)) & 0xFFFF


def test_a_nested_interrupt_waits_for_the_handler_to_allow_it(machine):
    machine.load("fb ebfe")
    order = []

    def acknowledge():
        order.append(len(order))
        machine.cpu.request_interrupt(len(order) < 2)
        return 0x21

    machine.interrupt(0x21, "e612 e613 cf")
    machine.bus.on_acknowledge = acknowledge
    machine.bus.on_out = lambda *_: machine.cpu.stop() if len(machine.bus.log) == 6 else None
    assert machine.cpu.run().reason is ExitReason.STOPPED
    outs = [entry[1] for entry in machine.bus.log if entry[0] == "out"]
    assert outs == [0x12, 0x13, 0x12, 0x13]


@pytest.mark.parametrize("bits", [32, 64])
def test_an_external_interrupt_goes_through_a_gate_of_protected_and_long_mode(real_machine, bits):
    machine = real_machine
    #   sti; nop; l: jmp l        handler: inc dword [0x20000]; hlt
    machine.poke(0x10000, bytes.fromhex("fb 90 ebfe"))
    machine.poke(0x11000, bytes.fromhex("ff0425 00000200 f4" if bits == 64 else "ff05 00000200 f4"))
    state = flat_state(machine.memory, bits, 0x10000)
    gate = struct.pack("<HHHH", 0x1000, 0x08, 0x8E00, 1) + bytes(8 if bits == 64 else 0)
    machine.poke(0x9000 + 0x40 * len(gate), gate)
    state.idt = DescriptorTable(0x9000, 0x41 * len(gate) - 1)
    machine.cpu.set_state(state)
    machine.bus.on_acknowledge = lambda: machine.cpu.request_interrupt(False) or 0x40
    machine.cpu.request_interrupt(True)
    result = machine.cpu.run()
    assert (result.reason, result.interrupts_on) == (ExitReason.HALTED, False)
    assert machine.memory[0x20000] == 1


def test_an_external_interrupt_takes_ring_3_to_ring_0_and_back(real_machine):
    machine = real_machine
    #   l: inc qword [rdi]; jmp l       handler: inc qword [0x20008]; iretq
    machine.poke(0x10000, bytes.fromhex("48ff07 ebfb"))
    machine.poke(0x11000, bytes.fromhex("48ff0425 08000200 48cf"))
    state = ring_3(machine, 0x10000)
    machine.poke(0x9000 + 0x40 * 16, struct.pack("<HHHHQ", 0x1000, 0x08, 0x8E00, 1, 0))
    state.idt = DescriptorTable(0x9000, 0x41 * 16 - 1)
    state.gpr[5], state.gpr[17] = 0x20000, 0x202
    machine.cpu.set_state(state)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    for ticks in range(1, 51):
        machine.bus.on_acknowledge = lambda: machine.cpu.request_interrupt(False) or 0x40
        machine.cpu.request_interrupt(True)
        while machine.cpu.run().reason is ExitReason.KICKED and machine.memory[0x20008] != ticks:
            pass
        assert machine.memory[0x20008] == ticks
    before = machine.memory[0x20000:0x20008]
    while machine.memory[0x20000:0x20008] == before:
        assert machine.cpu.run().reason is ExitReason.KICKED


def test_memory_that_is_not_there_reads_ones_and_ignores_writes(machine):
    # ds = ffff: offset 20h is 100010h, one MiB and 16 bytes
    before = machine.memory[0x8000:]
    machine.run("b8ffff 8ed8 a12000 a32200" + HLT)
    assert machine.cpu.get_gpr()[RAX] == 0xFFFF
    assert machine.bus.log == [("read", 0x100010, 2), ("write", 0x100012, 2, 0xFFFF)]
    assert machine.memory[0x8000:] == before
    assert (machine.count(ExitKind.MMIO_READ), machine.count(ExitKind.MMIO_WRITE)) == (1, 1)


def test_a_jump_out_of_memory_ends_the_guest_and_not_the_process(machine):
    result = machine.run("ea2000ffff")                 # ffff:0020 is 100010h
    assert result.reason is ExitReason.GUEST_ERROR
    assert "ffff:0020" in result.detail or machine.engine == "fake"


def test_code_that_the_host_replaces_is_run_anew(machine):
    machine.run("b001" + HLT)
    assert machine.cpu.get_gpr()[RAX] == 1
    machine.run("b002" + HLT)
    assert machine.cpu.get_gpr()[RAX] == 2


def test_code_that_the_guest_writes_is_run_anew(machine):
    # The instruction at 7c20 is `inc bx` in the first round; the guest makes it a `dec bx`.
    #   7c00: jmp 7c20      7c10: mov ax, f44b; mov [7c20], ax; jmp 7c20
    #   7c20: inc bx; jmp 7c10      then 7c20: dec bx; hlt
    machine.load("eb1e")
    machine.poke(0x7C10, bytes.fromhex("b84bf4 a3207c eb08"))
    machine.poke(0x7C20, bytes.fromhex("43 ebed"))
    assert machine.cpu.run().reason is ExitReason.HALTED
    gpr = machine.cpu.get_gpr()
    assert (gpr[RBX], gpr[RIP]) == (0, 0x7C22)


def test_state_that_is_set_is_read_back(machine):
    rng = random.Random(7)
    state = CpuState()
    state.gpr = [rng.getrandbits(64) for _ in range(16)] + [0x1234, 0x46]
    if machine.engine == "fake":
        state.gpr[:16] = [value & 0xFFFF for value in state.gpr[:16]]
    for number, name in enumerate(("cs", "ds", "es", "fs", "gs", "ss")):
        selector = 0x1000 + number * 0x111
        setattr(state, name, Segment(selector=selector, base=selector << 4,
                                     type=11 if name == "cs" else 3))
    state.gdt, state.idt = DescriptorTable(0x1234, 0x57), DescriptorTable(0x500, 0x3FF)
    machine.cpu.set_state(state)
    again = machine.cpu.get_state()
    assert again == state
    for name in ("cs", "ds", "es", "fs", "gs", "ss"):
        assert machine.cpu.segment_base(name) == getattr(state, name).base


@pytest.mark.parametrize("bits", [32, 64])
def test_flat_state_that_is_set_is_read_back(real_machine, bits):
    state = flat_state(real_machine.memory, bits, 0x10000)
    real_machine.cpu.set_state(state)
    again = real_machine.cpu.get_state()
    assert again == state


def test_the_same_program_gives_the_same_output_again(machine):
    # four rounds: out 10, al; inc ax; loop
    code = "b90400 e610 40 e2fb" + HLT
    machine.run(code)
    first = list(machine.bus.log)
    machine.bus.log.clear()
    machine.run(code)
    assert machine.bus.log == first == [("out", 0x10, 1, n) for n in range(4)]


@pytest.mark.parametrize("seed", range(6))
def test_random_boot_sectors_end_or_are_kicked_and_never_end_the_process(machine, seed):
    rng = random.Random(seed)
    for _ in range(40):
        machine.load(rng.randbytes(512).hex())
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        result = machine.cpu.run()
        assert isinstance(result.reason, ExitReason)
        assert machine.cpu.get_state().gpr[RIP] >= 0
    assert machine.run("b001" + HLT).reason in (ExitReason.HALTED, ExitReason.KICKED)


def test_an_error_raised_by_the_bus_comes_out_of_run(machine):
    class Broken(Exception):
        pass

    def fail(*_):
        raise Broken

    machine.bus.on_out = fail
    with pytest.raises(Broken):
        machine.run("e610" + HLT)


def test_closing_twice_is_harmless(machine):
    machine.cpu.close()
    machine.cpu.close()


SYSTEM_CODE = [bytes.fromhex(code) for code in (
    "0f0b", "cc", "cd80", "f4", "e6f4", "ee", "ec", "6c", "f36e", "0f22c0", "0f22d8", "0f20c0",
    "0f30", "0f32", "0f0118", "0f0110", "8ed0", "8ed8", "ea0000000030", "cf", "48cf", "0f05",
    "0f07", "0f34", "0f35", "9d", "9c", "fb", "f7f3", "0fa2", "ffe0", "0f00d8", "0f00d0", "ebfe",
    "cb", "62",
)]


@pytest.mark.parametrize("bits", [32, 64])
def test_hostile_protected_and_long_mode_code_never_ends_the_process(real_machine, bits):
    machine, rng = real_machine, random.Random(bits)
    for _ in range(40):
        code = b"".join(
            rng.choice(SYSTEM_CODE) if rng.random() < 0.6 else rng.randbytes(rng.randint(1, 6))
            for _ in range(100))
        machine.poke(0x10000, code)
        machine.poke(0xA000, rng.randbytes(4096))
        state = flat_state(machine.memory, bits, 0x10000)
        state.gpr[:6] = [rng.getrandbits(rng.choice((8, 16, 32, 64))) for _ in range(6)]
        if rng.random() < 0.5:
            state.idt = DescriptorTable(0xA000, 0xFFF)
        machine.cpu.set_state(state)
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        assert isinstance(machine.cpu.run().reason, ExitReason)
    signal.setitimer(signal.ITIMER_REAL, 20)
    reasons = [machine.run("b001" + HLT).reason for _ in range(2)]      # a late kick may come first
    assert ExitReason.HALTED in reasons
