"""Decoding: the instruction at CS:RIP in the guest's own mode, whatever memory holds."""

from __future__ import annotations

import itertools
import mmap
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixvisor.vm.code import decode
from mixvisor.vm.engines.base import RIP, CpuState, Segment
from mixvisor.vm.engines.entry import flat_state


def memory_with(code: str, at: int = 0x10000) -> mmap.mmap:
    memory = mmap.mmap(-1, 1 << 20)
    data = bytes.fromhex(code)
    memory[at:at + len(data)] = data
    return memory


@pytest.mark.parametrize(("bits", "code", "text", "mode"), [
    (16, "b83412", "mov ax, 0x1234", "real mode"),
    (32, "b878563412", "mov eax, 0x12345678", "32-bit protected mode, ring 0"),
    (64, "480fafc2", "imul rax, rdx", "64-bit long mode, ring 0"),
    (64, "0f0b", "ud2", "64-bit long mode, ring 0"),
])
def test_an_instruction_is_named_in_its_mode(bits, code, text, mode):
    memory = memory_with(code)
    state = flat_state(memory, bits, 0x10000)
    assert decode.describe(memory, state) == text
    assert decode.mode_name(state) == mode
    assert decode.bits_of(state) == bits


def test_the_code_segments_base_counts_in_real_mode():
    memory = memory_with("fa", at=0xF0010)
    state = CpuState(cs=Segment(selector=0xF000, base=0xF0000, type=11))
    state.gpr[RIP] = 0x10
    assert decode.describe(memory, state) == "cli"
    assert decode.place(state) == "f000:0010"


def test_outside_memory_is_said_with_its_address():
    memory = memory_with("")
    state = flat_state(memory, 64, 0x10000)
    state.gpr[RIP] = 0x12_3456_7000
    assert decode.describe(memory, state) == "outside memory at 0x1234567000"
    assert decode.disassemble_around(memory, state) == []


def test_bytes_that_are_no_instruction_are_shown_as_bytes():
    memory = memory_with("06ffff", at=0x10000)
    assert decode.describe(memory, flat_state(memory, 64, 0x10000)).startswith("db 0x06")


def test_the_instructions_that_follow_are_listed_with_their_bytes():
    memory = memory_with("b001 e610 f4")
    lines = decode.disassemble_around(memory, flat_state(memory, 16, 0x10000), 3)
    assert [line.split(maxsplit=1)[0] for line in lines] == ["0x10000:", "0x10002:", "0x10004:"]
    assert [line[-12:].split("  ")[-1].strip() for line in lines][2] == "hlt"


def test_compatibility_and_virtual_8086_mode_have_their_names():
    memory = memory_with("90")
    state = flat_state(memory, 64, 0x10000)
    state.cs.l, state.cs.db, state.ss.dpl = False, True, 3
    assert decode.mode_name(state) == "32-bit compatibility mode, ring 3"
    state = flat_state(memory, 32, 0x10000)
    state.gpr[17] |= 1 << 17
    assert decode.mode_name(state) == "virtual-8086 mode"


@given(seed=st.integers(0, 2**32), rip=st.integers(0, 2**64 - 1), cr3=st.integers(0, 2**64 - 1),
       paging=st.booleans(), long=st.booleans(), pae=st.booleans(), base=st.integers(0, 2**32))
def test_any_state_over_any_memory_gives_a_text(seed, rip, cr3, paging, long, pae, base):
    memory = mmap.mmap(-1, 16384)
    memory[:] = random.Random(seed).randbytes(16384)
    state = CpuState(cr0=1 | paging << 31, cr3=cr3, cr4=pae << 5, efer=long << 10)
    state.cs = Segment(base=base, type=11, l=long, db=not long)
    state.gpr[RIP] = rip
    assert decode.describe(memory, state)
    assert decode.mode_name(state)
    assert len(decode.disassemble_around(memory, state, 3)) <= 3


def test_the_code_before_is_found_where_it_falls_into_step():
    memory = memory_with("b83412 83c001 e610 cc 90 f4")
    state = flat_state(memory, 16, 0x10008)
    lines = decode.listing(memory, state, before=3, after=2)
    assert [line.text for line in lines] == [
        "mov ax, 0x1234", "add ax, 1", "out 0x10, al", "int3", "nop", "hlt"]
    assert lines[3].address == decode.linear_of(state)
    assert b"".join(line.code for line in lines).hex() == "b8341283c001e610cc90f4"


def test_nothing_is_made_up_before_where_no_code_can_arrive():
    memory = mmap.mmap(-1, 1 << 20)
    memory[0x10000 - 32:0x10000] = b"\xFF" * 32
    state = flat_state(memory, 64, 0x10000)
    assert decode.listing(memory, state, before=4, after=0)[-1].address == 0x10000
    state = flat_state(memory, 16, 0)
    assert [line.address for line in decode.listing(memory, state, before=4, after=0)] == [0]


@given(seed=st.integers(0, 2**32), rip=st.integers(0, 2**16), bits=st.sampled_from((16, 32, 64)))
def test_a_listing_holds_the_instruction_itself_and_hangs_together(seed, rip, bits):
    memory = mmap.mmap(-1, 1 << 17)
    memory[:] = random.Random(seed).randbytes(1 << 17)
    state = flat_state(memory, bits, 0x8000)
    state.gpr[RIP] = rip
    lines = decode.listing(memory, state)
    assert decode.linear_of(state) in [line.address for line in lines]
    for one, next_ in itertools.pairwise(lines):
        assert one.address + len(one.code) == next_.address
