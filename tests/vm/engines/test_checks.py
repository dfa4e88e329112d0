"""The checks at each access (checks.asm) against a model of them, and in modes that test_conformance.py leaves out."""

from __future__ import annotations

import copy
import shutil
import signal
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mixvisor.vm.engines.base import (
    RAX,
    RBP,
    RBX,
    RCX,
    RDI,
    RDX,
    RIP,
    RSI,
    RSP,
    DescriptorTable,
    ExitReason,
    Segment,
)
from mixvisor.vm.engines.entry import flat_state
from mixvisor.vm.engines.software import checks
from mixvisor.vm.engines.software.operands import DS, ES, SS, Access, decoded, kinds
from mixvisor.vm.engines.software.state import descriptor_flags
from mixvisor.vm.engines.software.stores import assembled

from .test_conformance import CODE, HANDLERS, IDT, Case, built

BIG, PRESENT, CODE_TYPE, DOWN, RW = 1 << 22, 1 << 15, 1 << 11, 1 << 10, 1 << 9


@pytest.mark.skipif(shutil.which("nasm") is None, reason="nasm is not installed")
@pytest.mark.parametrize("name", ["checks", "blocks"])
def test_the_machine_code_is_what_the_source_assembles_to(tmp_path, name):
    out = tmp_path / "assembled"
    subprocess.run(["nasm", "-f", "bin", "-o", out, Path(checks.__file__).with_name(f"{name}.asm")], check=True)
    assert out.read_bytes() == assembled(name)


def test_nothing_is_written_over_where_the_state_is_laid_out_otherwise():
    assert not checks.Checks(lambda name: pytest.fail(name), (35408, 176, 192, 424)).on
    assert checks.Checks(lambda name: 0, (0, 0, 0, 0)).classify == 0


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("escape", ["", "0f"])
def test_python_is_asked_for_every_opcode_that_accesses_memory(bits, escape):
    found = kinds()
    memory, implicit, aligned, anyway, group = 4, 5, 6, 7, 10
    for opcode in range(256):
        if not escape and opcode in (0x0F, 0x26, 0x2E, 0x36, 0x3E, *range(0x64, 0x68), 0xF0, 0xF2, 0xF3):
            continue
        kind = found[opcode + (256 if escape else 0)]
        for prefix in ("", "66", "f3", "f2"):
            for register in range(8):
                # [bx] or [edi], the latter with a SIB byte's worth of what is behind, and a register
                code = bytes.fromhex(prefix + escape) + bytes([opcode])
                for modrm in (0x07 | register << 3, 0xC0 | register << 3):
                    told = decoded((code + bytes([modrm])).ljust(15, b"\1"), bits)
                    what = code.hex(), modrm, told
                    if told.loads or told.returns:
                        assert kind in (anyway, group), what
                    if any(access.aligned for access in told.accesses):
                        assert kind in (aligned, anyway), what
                    if told.accesses and modrm < 0xC0:
                        assert kind in (memory, implicit, aligned, anyway, group), what
                    elif told.accesses:
                        assert kind in (implicit, anyway, group), what


def due(access: Access, registers: list[int], segment: Segment) -> int | None:
    """The vector of the fault that an access must raise in protected mode, None where it may be done."""
    flags = descriptor_flags(segment)
    mask = (0xFFFF_FFFF if segment.db else 0xFFFF) if not access.width else 0xFFFF if access.width == 2 else 0xFFFF_FFFF
    if access.counted and not registers[1] & mask:
        return None
    offset = access.displacement
    if access.base >= 0:
        offset += registers[access.base]
    if access.scaled >= 0:
        offset += registers[access.scaled] << access.shift
    if access.plus_al:
        offset += registers[0] & 0xFF
    if access.bits is not None:
        register, size = access.bits
        number = int.from_bytes(registers[register].to_bytes(4, "little")[:size], "little", signed=True)
        offset += (number >> (5 if size == 4 else 4)) * size
    offset &= mask
    last = offset + access.size - 1
    fault = 12 if access.segment == SS else 13
    readable = not flags & CODE_TYPE or flags & RW
    writable = not flags & CODE_TYPE and flags & RW
    if not flags & PRESENT or not (writable if access.write else readable):
        return fault
    if flags & (CODE_TYPE | DOWN) == DOWN:
        inside = offset > segment.limit and last <= (0xFFFF_FFFF if segment.db else 0xFFFF)
    else:
        inside = last <= segment.limit or segment.limit == 0xFFFF_FFFF
    if inside and access.aligned and segment.base + offset & 15:
        return 13
    return None if inside else fault


# Of 32-bit code; with registers 0 to 7 as they are made below.
INSTRUCTIONS = (
    "8b03", "8903", "8a4b10", "884bff", "668b4300", "6601044b", "8b84cb00010000", "c7430801000000", "830301", "0fab03",
    "660fa303", "0fba2b03", "f603ff", "8f03", "ff33", "50", "58", "60", "61", "9c", "c9", "678b07", "67884101",
    "a1f00f0000", "a2ff0f0000", "f3a4", "f3ab", "ad", "ae", "a6", "d7", "d903", "dd1b", "d933", "0fb003", "0fc70b",
    "8b0424", "8b4500", "36a0ff0f0000", "268b03", "3e8b4500", "f32eac", "660f6f4301", "f30f6f03", "660f1143f8",
    "0fc303", "87442404", "f0ff03")


@st.composite
def segments(draw, *, stack=False):
    kind = draw(st.sampled_from((3, 7) if stack else (1, 3, 3, 3, 5, 7, 9, 11)))
    limit = draw(st.sampled_from((0, 0xFE, 0xFFF, 0x1000, 0x1003, 0xFFFE, 0xFFFF, 0xFFFF_FFFF)))
    return Segment(selector=0x10, base=draw(st.sampled_from((0x60000, 0x60001))), limit=limit, type=kind,
                   db=draw(st.booleans()), present=stack or draw(st.integers(0, 9)) > 0)


ORDER = (RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI)              # the encoding's, in base.GPR
VALUES = (0, 1, 4, 0xFC, 0xFF, 0x100, 0xFFC, 0xFFE, 0x1000, 0xFFFF, 0x1_0000, 0xFFFF_FFF8, 0xFFFF_FFFF)


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(code=st.sampled_from(INSTRUCTIONS), ds=segments(), ss=segments(stack=True), es=segments(),
       registers=st.lists(st.sampled_from(VALUES), min_size=8, max_size=8))
def test_the_machine_code_checks_as_the_model_does(one_machine, code, ds, ss, es, registers):
    machine, fresh = one_machine
    length = len(code) // 2
    if code[:2] == "f3" and "0f" not in code:
        registers = [registers[0], registers[1] & 1, *registers[2:]]          # REP: the model does once at most
    machine.poke(CODE, bytes.fromhex(code) + b"\xF4")
    state = copy.deepcopy(fresh)
    state.ds, state.ss, state.es = ds, ss, es
    for index, value in zip(ORDER, registers, strict=True):
        state.gpr[index] = value
    machine.cpu.set_state(state)
    at = {ES: es, SS: ss, DS: ds}
    vectors = (due(access, registers, at.get(access.segment, state.cs))
               for access in decoded(bytes.fromhex(code).ljust(15, b"\x90"), 32).accesses)
    expected = next((vector for vector in vectors if vector is not None), None)
    result = machine.cpu.run()
    mask = 0xFFFF_FFFF if ss.db else 0xFFFF
    room = all(due(Access(SS, 4, True, displacement=(registers[4] - at) & mask), registers, ss) is None
               for at in (4, 8, 12, 16))
    if expected is not None and not room:
        assert result.reason is ExitReason.TRIPLE_FAULT
        return
    assert result.reason is ExitReason.HALTED, result
    assert machine.cpu.get_gpr()[RIP] - 1 == (CODE + length if expected is None else HANDLERS + expected)


@pytest.fixture
def one_machine(make):
    machine = built(make, "software", Case("", "", "", 0, 0, None))
    state = machine.cpu.get_state()
    state.cr4 |= 0x600                                        # SSE
    signal.setitimer(signal.ITIMER_REAL, 120)
    return machine, state


@pytest.mark.parametrize(("code", "vector"), [
    ("0f28 04 25 08900000", 13),             # movaps xmm0, [9008h]
    ("0f10 04 25 08900000 cd50", 0x50),      # movups
    ("0f28 05 08000000", 13),                # movaps xmm0, [rip + 8]: CODE is aligned, and the instruction 7 bytes
    ("0f28 05 09000000 cd50", 0x50),
    ("f0 8904 25 00900000", 6),              # lock mov [9000h], eax
    ("f0 48 0fc7 0c 25 08900000", 13),       # lock cmpxchg16b
])
def test_64_bit_code_is_checked_for_alignment_and_lock(make, code, vector):
    machine = make("software", 4 << 20)
    machine.poke(HANDLERS, b"\xF4" * 256)
    machine.poke(IDT, b"".join(struct.pack("<HHBBHQ", HANDLERS + each, 8, 0, 0xEE, 0, 0) for each in range(256)))
    machine.poke(CODE, bytes.fromhex(code))
    state = flat_state(machine.memory, 64, CODE)
    state.idt = DescriptorTable(IDT, 256 * 16 - 1)
    state.cr4 |= 0x600
    machine.cpu.set_state(state)
    assert machine.cpu.run().reason is ExitReason.HALTED
    assert machine.cpu.get_gpr()[RIP] - 1 - HANDLERS == vector


def test_32_bit_code_ends_with_its_segment(make):
    # Three NOPs and no more: #GP(0) at the fourth.
    machine = built(make, "software", Case("", "", "90909090 f4", 0, 13, None))
    state = machine.cpu.get_state()
    state.cs.limit = CODE + 2
    machine.cpu.set_state(state)
    assert machine.cpu.run().reason is ExitReason.HALTED
    gpr = machine.cpu.get_gpr()
    assert gpr[RIP] - 1 - HANDLERS == 13
    assert struct.unpack_from("<2I", machine.memory, gpr[RSP]) == (0, CODE + 3)


@pytest.mark.parametrize("engine", ["software", "unchecked"])
@pytest.mark.parametrize("prefixes", ["f0", "f066", "66f0", "2ef0", "f064", "f32ef0"])
def test_the_bytes_are_those_that_the_library_reads(make, engine, prefixes):
    # call 300000h; then the page is mapped elsewhere without INVLPG, and its other code is gone to by the old mapping:
    # DEADLY_LOCK, where the tables tell of NOPs.
    code = "e8fbff2e00 c705001c100007002000 e9fcff2e00"
    machine = built(make, engine, Case("", "", code, 0, 6, None), paged=True)
    machine.poke(0x300000, b"\xC3")
    machine.poke(0x300010, bytes.fromhex(prefixes + "0fbbe8"))
    machine.poke(0x200010, b"\x90" * 15 + b"\xF4")
    assert machine.cpu.run().reason is ExitReason.HALTED
    assert machine.cpu.get_gpr()[RIP] - 1 - HANDLERS == 6


def test_pop_has_one_code(make):
    machine = built(make, "software", Case("", "", "8fc8 cd50", 0, 6, None))
    assert machine.cpu.run().reason is ExitReason.HALTED
    assert machine.cpu.get_gpr()[RIP] - 1 - HANDLERS == 6


SMALL, FLAT = 0x0040_9206_0000_0FFF, 0x00CF_9200_0000_FFFF


@pytest.mark.parametrize("bits", [16, 32])
def test_a_segment_is_checked_from_the_instruction_behind_its_load_on(make, bits):
    # mov ax, 40h; mov ds, ax; mov al, [bx]; mov al, [1000h], in one go; the second is beyond the limit.
    code = "b84000 8ed8 8a07 a00010" if bits == 16 else "66b84000 8ed8 8a03 a000100000"
    machine = built(make, "software", Case("", "", code, 0, 13, None, gdt={8: SMALL}))
    state = machine.cpu.get_state()
    state.cs.db = bits == 32
    machine.cpu.set_state(state)
    assert machine.cpu.run().reason is ExitReason.HALTED
    gpr = machine.cpu.get_gpr()
    assert gpr[RIP] - 1 - HANDLERS == 13
    assert struct.unpack_from("<I", machine.memory, gpr[RSP] + 4)[0] == CODE + (7 if bits == 16 else 8)


def test_segments_that_change_all_the_time_are_checked_each_time(make):
    # l: mov ds, ax; inc dword [ebx]; xchg eax, edx; dec ecx; jnz l, with selectors of 4 GiB and of 4 KiB by turns; at
    # last mov eax, [2000h] by the larger, then by the smaller
    code = "8ed8 ff03 92 49 75f8  8ed8 8b3500200000  8eda 8b3500200000"
    machine = built(make, "software", Case("", "", code, 0, 13, None, gdt={8: SMALL, 9: FLAT}))
    state = machine.cpu.get_state()
    state.gpr[RAX], state.gpr[RDX], state.gpr[RCX], state.gpr[RBX] = 0x48, 0x40, 2000, 0x900
    machine.cpu.set_state(state)
    assert machine.cpu.run().reason is ExitReason.HALTED
    gpr = machine.cpu.get_gpr()
    assert gpr[RIP] - 1 - HANDLERS == 13
    assert struct.unpack_from("<I", machine.memory, gpr[RSP] + 4)[0] == CODE + 18
    assert [struct.unpack_from("<I", machine.memory, at)[0] for at in (0x900, 0x60900)] == [1000, 1000]
