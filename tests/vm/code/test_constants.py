"""Known bits of registers along straight code: right where known, silent where not."""

from __future__ import annotations

import pytest

from mixvisor.vm.code.constants import Registers


def after(*lines: str, protected: bool = False, memory: bytes = b"") -> Registers:
    registers = Registers()
    for line in lines:
        name, _, operands = line.partition(" ")
        if name == "rep":
            name, operands = f"rep {operands.split(' ')[0]}", operands.partition(" ")[2]
        registers.step(name, operands, lambda at, size: memory[at:at + size], protected=protected)
    return registers


@pytest.mark.parametrize(("lines", "register", "value"), [
    (("mov ax, 0x1234",), "ah", 0x12),
    (("mov eax, 0x12345678", "mov al, 0"), "eax", 0x12345600),
    (("mov rax, -1", "mov eax, 5"), "rax", 5),
    (("mov ax, 7", "mov ds, ax"), "ds", 7),
    (("xor cx, cx",), "cx", 0),
    (("mov dx, 5", "xor dl, 3"), "dx", 6),
    (("push 0x10", "pop es"), "es", 0x10),
    (("mov bp, 0x7c00", "lea si, [bp + 0x5a]"), "si", 0x7C5A),
    (("mov ax, 1", "shl ax, 4"), "ax", 16),
    (("mov ax, 1", "lodsb al, byte ptr [si]"), "ax", None),
    (("mov ax, 1", "add ax, bx"), "ax", None),
    (("mov cx, 9", "rep stosb byte ptr es:[di], al"), "cx", None),
    (("mov ax, 1", "cmp ax, 2"), "ax", 1),
    (("mov ax, 1", "in al, 0x60"), "ax", None),
    (("mov ax, 1", "cpuid "), "ax", None),
    (("xor bx, bx", "mov ds, bx", "mov ax, word ptr [2]"), "ax", 0x2211),
])
def test_a_value_is_what_the_code_makes_it(lines, register, value):
    assert after(*lines, memory=b"\0\0\x11\x22").value(register) == value


def test_single_bits_of_a_control_register_are_known_when_the_rest_is_not():
    registers = after("mov eax, cr0", "or al, 1", "mov cr0, eax")
    assert registers.bits("cr0") == (1, 1)
    registers = after("mov eax, cr0", "or al, 1", "dec eax", "mov cr0, eax")
    assert registers.bits("cr0") == (1, 0)
    assert after("mov eax, 1", "lmsw ax").bits("cr0") == (0xF, 1)


def test_efer_is_known_from_its_msr():
    assert after("mov ecx, 0xc0000080", "mov eax, 0x100", "wrmsr ").bits("efer")[1] == 0x100
    assert after("mov ecx, 0x10", "mov eax, 0x100", "wrmsr ").bits("efer")[1] == 0


def test_a_call_leaves_segments_and_frame_pointer_only():
    registers = after("mov bp, 1", "mov ax, 2", "mov ds, ax").after_call()
    assert (registers.value("bp"), registers.value("ds"), registers.value("ax")) == (1, 2, None)


def test_addresses_need_every_part():
    registers = after("mov ax, 0x1000", "mov ds, ax", "mov bx, 4")
    assert registers.address("word ptr [bx + 6]", protected=False) == 0x1000A
    assert registers.address("word ptr [bx + si]", protected=False) is None
    assert registers.address("word ptr [bp]", protected=False) is None
    assert registers.address("dword ptr [ebx*4 + 0x10]", protected=True) is None
    assert registers.address("no operand", protected=True) is None


def test_a_return_needs_both_pushes():
    assert after("push 8", "push 0x1000").pops(2) == [0x1000, 8]
    assert after("push 8", "push ax").pops(2) is None
    assert after("push 8").pops(2) is None
