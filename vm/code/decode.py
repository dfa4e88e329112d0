"""What instruction a guest stands at, as text: for reports of where a guest is and how it ended.

Theory.  CS:RIP plus the mode (16, 32 or 64 bits, from CR0, EFER and CS) gives a linear
address; the guest's page tables, walked here in pure Python, give bytes; capstone gives text.
x86 cannot be decoded backwards with certainty, but its instruction stream falls into step within a few
instructions: the way by which most starts shortly before RIP arrive at it exactly is (nearly always)
the code that ran.

Invariants.  Total: any memory and any state gives a text, never an exception; guest memory is
hostile input.  Poor: capstone decodes what it knows; unknown bytes are shown as `db ...`.
"""

from __future__ import annotations

import functools
import mmap
from dataclasses import dataclass

import capstone

from ..engines.base import RIP, CpuState
from ..engines.paging import paging_mode, read_linear

__all__ = [
    "Line", "bits_of", "describe", "disassemble", "disassemble_around", "instruction_at", "linear_of", "listing",
    "memory_operand", "mode_name", "place", "read_code",
]

LONGEST = 15           # bytes of an x86 instruction
_BEFORE = 32           # bytes looked at before RIP
_PROTECTED, _LMA, _VM86 = 1, 1 << 10, 1 << 17


@dataclass(frozen=True, slots=True)
class Line:
    """One instruction: its linear address, bytes and text."""

    address: int
    code: bytes
    text: str


def bits_of(state: CpuState) -> int:
    """16, 32 or 64: how the instruction at CS:RIP is decoded."""
    if state.efer & _LMA and state.cs.l:
        return 64
    return 32 if state.cs.db and state.cr0 & _PROTECTED else 16


def ring_of(state: CpuState) -> int:
    """The privilege ring: 0 in real mode, 3 in virtual-8086 mode, else that of the stack segment."""
    if not state.cr0 & _PROTECTED:
        return 0
    if state.gpr[17] & _VM86 and not state.efer & _LMA:
        return 3
    return state.ss.dpl & 3


def mode_name(state: CpuState) -> str:
    """The processor's mode in words, e.g. `64-bit long mode, ring 3`."""
    if not state.cr0 & _PROTECTED:
        return "real mode"
    if state.gpr[17] & _VM86 and not state.efer & _LMA:
        return "virtual-8086 mode"
    bits = bits_of(state)
    if state.efer & _LMA:
        kind = "64-bit long mode" if bits == 64 else f"{bits}-bit compatibility mode"
    else:
        kind = f"{bits}-bit protected mode"
    return f"{kind}, ring {ring_of(state)}"


@functools.cache
def _decoder(bits: int) -> capstone.Cs:
    modes = {16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}
    return capstone.Cs(capstone.CS_ARCH_X86, modes[bits])


def linear_of(state: CpuState, rip: int | None = None) -> int:
    """Linear address of CS:RIP, or of CS:*rip*."""
    rip = state.gpr[RIP] if rip is None else rip
    if bits_of(state) == 64:
        return rip & 0xFFFF_FFFF_FFFF_FFFF
    return (state.cs.base + rip) & 0xFFFF_FFFF


def place(state: CpuState) -> str:
    """Where execution stands: `f000:fff0` in real mode, else the linear address in hex."""
    if not state.cr0 & _PROTECTED:
        return f"{state.cs.selector:04x}:{state.gpr[RIP] & 0xFFFF:04x}"
    return f"{linear_of(state):#x}"


def read_code(memory: mmap.mmap, state: CpuState, linear: int, length: int) -> bytes:
    """Up to *length* bytes of code through the guest's page tables."""
    return read_linear(memory, paging_mode(state), linear, length)


def instruction_at(code: bytes, address: int, bits: int) -> tuple[str, str, int] | None:
    """(mnemonic, operands, size) of the first instruction of *code*; None where there is none."""
    for _, size, name, operands in _decoder(bits).disasm_lite(code[:LONGEST], address, 1):
        return name, operands, size
    return None


def memory_operand(code: bytes, bits: int) -> tuple[str, str, str, int, int, int, int] | None:
    """Of the first instruction: segment, base and index register ("" or without width: `bx`), scale, displacement, bits
    of the address, bytes of the instruction. None where it has no operand in memory.
    """
    decoder = capstone.Cs(_decoder(bits).arch, _decoder(bits).mode)
    decoder.detail = True
    for found in decoder.disasm(code[:LONGEST], 0, 1):
        for operand in found.operands:
            if operand.type == capstone.x86.X86_OP_MEM:
                place = operand.mem
                base, index = ((found.reg_name(number) or "").removeprefix("e").removeprefix("r")
                               for number in (place.base, place.index))
                default = "ss" if base in ("bp", "sp") else "ds"
                return (found.reg_name(place.segment) or default, base, index, place.scale, place.disp,
                        found.addr_size * 8, found.size)
    return None


def _text(code: bytes, address: int, bits: int) -> tuple[str, int]:
    found = instruction_at(code, address, bits)
    if found is not None:
        name, operands, size = found
        return f"{name} {operands}".strip(), size
    return "db " + ", ".join(f"0x{byte:02x}" for byte in code[:4]), 1


def describe(memory: mmap.mmap, state: CpuState) -> str:
    """Text of the instruction at CS:RIP, or where execution is when there is none."""
    linear = linear_of(state)
    code = read_code(memory, state, linear, LONGEST)
    if not code:
        return f"outside memory at {linear:#x}"
    return _text(code, state.gpr[RIP], bits_of(state))[0]


def disassemble(code: bytes, linear: int, bits: int, count: int, ip: int | None = None) -> list[Line]:
    """The first *count* instructions of *code*. `ip`: the offset that branch targets are shown from."""
    lines: list[Line] = []
    offset = 0
    ip = linear if ip is None else ip
    while len(lines) < count and offset < len(code):
        text, size = _text(code[offset:], ip + offset, bits)
        lines.append(Line(linear + offset, code[offset:offset + size], text))
        offset += size
    return lines


def _before(memory: mmap.mmap, state: CpuState, count: int) -> list[Line]:
    """Likely the *count* instructions that stand before CS:RIP."""
    linear, bits, ip = linear_of(state), bits_of(state), state.gpr[RIP]
    for back in (_BEFORE, linear & 4095):                       # the page before may not be mapped
        back = min(back, ip if bits != 64 else back, linear)
        code = read_code(memory, state, linear - back, back)
        if len(code) == back:
            break
    else:
        return []
    first = linear - back
    sizes = [_size(code[start:], bits) for start in range(back)]
    # How many starts arrive at the instruction by way of each place.
    votes = [0] * (back + 1)
    for start in range(back):
        way, here = [], start
        while here < back and sizes[here]:
            way.append(here)
            here += sizes[here]
        if here == back:
            for place in way:
                votes[place] += 1
    lines: list[Line] = []
    here = back
    while len(lines) < count:
        ways = [start for start in range(max(0, here - LONGEST), here) if votes[start] and start + sizes[start] == here]
        if not ways:
            break
        start = max(ways, key=lambda start: votes[start])
        text, _ = _text(code[start:here], ip - back + start, bits)
        lines.append(Line(first + start, code[start:here], text))
        here = start
    return lines[::-1]


def _size(code: bytes, bits: int) -> int:
    """Of the first instruction; 0 where there is none. Zeros are padding, though they decode."""
    found = None if code.startswith(b"\0\0") else instruction_at(code, 0, bits)
    return 0 if found is None else found[2]


def listing(memory: mmap.mmap, state: CpuState, before: int = 4, after: int = 5) -> list[Line]:
    """The instructions around CS:RIP, in order; that at CS:RIP is the one whose address is `linear_of`."""
    linear, bits = linear_of(state), bits_of(state)
    code = read_code(memory, state, linear, LONGEST * (after + 1))
    return [*_before(memory, state, before), *disassemble(code, linear, bits, after + 1, state.gpr[RIP])]


def disassemble_around(memory: mmap.mmap, state: CpuState, count: int = 5) -> list[str]:
    """The instruction at CS:RIP and the *count* - 1 after it, each `address: bytes  text`."""
    return [f"{line.address:#x}: {line.code.hex(' '):<24} {line.text}"
            for line in listing(memory, state, 0, count - 1)]
