"""What instruction a guest stands at, as text: for reports of how a guest ended.

Theory.  CS:RIP plus the mode (16, 32 or 64 bits, from CR0, EFER and CS) gives a linear
address; the guest's page tables, walked here in pure Python, give bytes; capstone gives text.

Invariants.  Total: any memory and any state gives a text, never an exception; guest memory is
hostile input.  Poor: capstone decodes what it knows; unknown bytes are shown as `db ...`.
"""

from __future__ import annotations

import functools
import mmap

import capstone

from ..engines.base import RIP, CpuState
from ..engines.paging import paging_mode, read_linear

__all__ = ["bits_of", "describe", "disassemble_around", "mode_name", "place"]

_LONGEST = 15          # bytes of an x86 instruction
_PROTECTED, _LMA, _VM86 = 1, 1 << 10, 1 << 17


def bits_of(state: CpuState) -> int:
    """16, 32 or 64: how the instruction at CS:RIP is decoded."""
    if state.efer & _LMA and state.cs.l:
        return 64
    return 32 if state.cs.db and state.cr0 & _PROTECTED else 16


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
    return f"{kind}, ring {state.ss.dpl}"


@functools.cache
def _decoder(bits: int) -> capstone.Cs:
    modes = {16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}
    return capstone.Cs(capstone.CS_ARCH_X86, modes[bits])


def _linear(state: CpuState) -> int:
    if bits_of(state) == 64:
        return state.gpr[RIP]
    return (state.cs.base + state.gpr[RIP]) & 0xFFFF_FFFF


def place(state: CpuState) -> str:
    """Where execution stands: `f000:fff0` in real mode, else the linear address in hex."""
    if not state.cr0 & _PROTECTED:
        return f"{state.cs.selector:04x}:{state.gpr[RIP] & 0xFFFF:04x}"
    return f"{_linear(state):#x}"


def _text(code: bytes, address: int, bits: int) -> tuple[str, int]:
    for _, size, name, operands in _decoder(bits).disasm_lite(code[:_LONGEST], address, 1):
        return f"{name} {operands}".strip(), size
    return "db " + ", ".join(f"0x{byte:02x}" for byte in code[:4]), 1


def describe(memory: mmap.mmap, state: CpuState) -> str:
    """Text of the instruction at CS:RIP, or where execution is when there is none."""
    linear = _linear(state)
    code = read_linear(memory, paging_mode(state), linear, _LONGEST)
    if not code:
        return f"outside memory at {linear:#x}"
    return _text(code, state.gpr[RIP], bits_of(state))[0]


def disassemble_around(memory: mmap.mmap, state: CpuState, count: int = 5) -> list[str]:
    """The instruction at CS:RIP and the *count* - 1 after it, each `address: bytes  text`.

    Forward only: x86 cannot be decoded backwards with certainty.
    """
    linear, bits = _linear(state), bits_of(state)
    code = read_linear(memory, paging_mode(state), linear, _LONGEST * count)
    lines: list[str] = []
    offset = 0
    while len(lines) < count and offset < len(code):
        text, size = _text(code[offset:], state.gpr[RIP] + offset, bits)
        shown = code[offset:offset + size].hex(" ")
        lines.append(f"{linear + offset:#x}: {shown:<24} {text}")
        offset += size
    return lines
