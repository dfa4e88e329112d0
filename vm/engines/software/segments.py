"""What a processor checks at each access and QEMU does not (UNBOUNDED of quirks.py), for a VM that asks for it.

Theory.  QEMU's translator adds a segment's base and looks at nothing else. A hook in front of every instruction can:
what an instruction accesses, through which segment and how wide, follows from its bytes alone, is decoded once for all
of the same bytes, and is compared with the segment caches each time. What does not pass faults at the instruction,
before it has done anything.

Checked (SDM volume 3, 5.3, 5.4.1, 5.5 and 6.15; volume 2, LOCK), in real, protected and virtual-8086 mode:
- every operand in memory, both sides of string instructions, and what PUSH, POP, CALL, RET, ENTER, LEAVE and their kin
  do to the stack: null segments, limits up and down, writes to code and read-only data, reads of execute-only code.
  #GP(0), through SS #SS(0)
- LOCK before an instruction that takes none: #UD
- 16 bytes of SSE that are not aligned: #GP(0); with CR0.AM and EFLAGS.AC in ring 3 whatever is not aligned: #AC(0)
Far transfers, interrupts and fetches are the library's and `delivery.py`'s. Long mode has no limits; nothing is checked
there.

Invariants.  Pure but for the callables that it is given. Nothing is kept for an address, so code may change.

Poor: a call into Python at every instruction, about a hundredth of full speed; bounds of the x87 and SSE areas are
those that capstone names.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import capstone
from capstone import x86

from .quirks import PREFIXES

__all__ = ["CS", "Access", "Decoded", "decoded", "due"]

# As in struct CPUX86State: the order of the caches, and of the general registers (which is that of the encoding).
ES, CS, SS, DS, FS, GS = range(6)
_SEGMENTS: Final = {x86.X86_REG_ES: ES, x86.X86_REG_CS: CS, x86.X86_REG_SS: SS, x86.X86_REG_DS: DS,
                    x86.X86_REG_FS: FS, x86.X86_REG_GS: GS}
_GENERAL: Final = ("ax", "cx", "dx", "bx", "sp", "bp", "si", "di")
_SP, _BP, _CX, _AX = 4, 5, 1, 0
_LOW_BYTE: Final = 8                     # of a register (XLAT)
_STACK, _PROTECTION, _ALIGNMENT = 12, 13, 17
_PRESENT, _S, _CODE, _RW, _DOWN, _BIG = 1 << 15, 1 << 12, 1 << 11, 1 << 9, 1 << 10, 1 << 22
_NO_ACCESS: Final = frozenset(("lea", "nop", "prefetch", "prefetchw", "prefetcht0", "prefetcht1", "prefetcht2",
                               "prefetchnta", "invlpg", "clflush"))
_UNALIGNED: Final = frozenset(("movups", "movupd", "movdqu", "lddqu", "cmpxchg16b", "bound"))
_LOCKABLE: Final = frozenset(("add", "adc", "and", "btc", "btr", "bts", "cmpxchg", "cmpxchg8b", "dec", "inc", "neg",
                              "not", "or", "sbb", "sub", "xor", "xadd", "xchg"))
_BIT_TESTS: Final = frozenset(("bt", "bts", "btr", "btc"))
_READ_ONLY: Final = frozenset(("cmp", "test", "bt", "push", "call", "jmp", "bound", "lgdt", "lidt", "lldt", "ltr",
                               "lmsw", "verr", "verw", "cmpsb", "cmpsw", "cmpsd", "scasb", "scasw", "scasd", "lodsb",
                               "lodsw", "lodsd", "outsb", "outsw", "outsd", "mul", "div", "idiv", "fld", "fild",
                               "fbld", "fldcw", "fldenv", "frstor", "fxrstor", "ldmxcsr", "fcom", "fcomp", "ficom",
                               "ficomp", "fadd", "fsub", "fsubr", "fmul", "fdiv", "fdivr", "fiadd", "fisub", "fisubr",
                               "fimul", "fidiv", "fidivr", "xlatb"))
_SIZES: Final = {"lgdt": 6, "lidt": 6, "sgdt": 6, "sidt": 6, "lds": 0, "les": 0, "lfs": 0, "lgs": 0, "lss": 0}
_FRAME: Final = {"pushaw": 16, "pushal": 32, "popaw": 16, "popal": 32, "pushf": 2, "pushfd": 4, "popf": 2, "popfd": 4}


@dataclass(frozen=True, slots=True)
class Access:
    """Of *size* bytes at base + index * scale + displacement (indices of general registers, -1: none) in a segment."""

    segment: int
    size: int
    write: bool
    base: int = -1
    index: int = -1
    scale: int = 1
    displacement: int = 0
    mask: int = 0xFFFF_FFFF          # of the sum; 0: as wide as the stack
    counted: bool = False            # REP: none where CX is 0 (as wide as `mask`)
    bits: tuple[int, int] | None = None      # BT and its kin: the register with the signed bit number, its bytes
    aligned: bool = False            # to 16 bytes


@dataclass(frozen=True, slots=True)
class Decoded:
    accesses: tuple[Access, ...] = ()
    invalid: bool = False            # LOCK where there must be none


@functools.cache
def _decoder(bits: int) -> capstone.Cs:
    decoder = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_32 if bits == 32 else capstone.CS_MODE_16)
    decoder.detail = True
    return decoder


@functools.lru_cache(maxsize=8192)
def decoded(code: bytes, bits: int) -> Decoded:
    """What the instruction at the start of *code* accesses in 16 or 32-bit code, in the order of the manual."""
    found = next(_decoder(bits).disasm(code, 0, 1), None)
    at = next((at for at, byte in enumerate(code) if byte not in PREFIXES), len(code))
    locked = 0xF0 in code[:at]
    if found is None:
        return Decoded(invalid=locked)
    name = found.mnemonic.rpartition(" ")[2]
    if locked and not (name in _LOCKABLE and any(
            each.type == x86.X86_OP_MEM for each in (found.operands if name == "xchg" else found.operands[:1]))):
        return Decoded(invalid=True)
    prefixes = bytes(found.prefix)
    wide = (bits == 32) != (prefixes[2] == 0x66)
    counted = prefixes[0] in (0xF2, 0xF3) and name[:4] in ("movs", "cmps", "stos", "lods", "scas", "insb", "insw",
                                                          "insd", "outs")
    mask = 0xFFFF_FFFF if found.addr_size == 4 else 0xFFFF
    told: list[Access] = []
    stack = _stack(found, name, 4 if wide else 2)
    if name not in _NO_ACCESS:
        told += (_operand(found, name, operand, mask, counted, 4 if wide else 2)
                 for operand in found.operands if operand.type == x86.X86_OP_MEM)
    if name == "xlatb":
        segment = next((_SEGMENTS[register] for register in _SEGMENTS if prefixes[1] == _override(register)), DS)
        told = [Access(segment, 1, False, base=3, index=_AX | _LOW_BYTE, mask=mask)]
    # What is pushed is read first; what is popped is written last.
    return Decoded((*told, *stack) if name in ("push", "call", "jmp") else (*stack, *told))


def _override(register: int) -> int:
    return {x86.X86_REG_ES: 0x26, x86.X86_REG_CS: 0x2E, x86.X86_REG_SS: 0x36, x86.X86_REG_DS: 0x3E,
            x86.X86_REG_FS: 0x64, x86.X86_REG_GS: 0x65}[register]


def _operand(found: capstone.CsInsn, name: str, operand: x86.X86Op, mask: int, counted: bool, width: int) -> Access:
    memory = operand.mem
    base, index = _register(found, memory.base), _register(found, memory.index)
    segment = _SEGMENTS.get(memory.segment)
    if segment is None:
        segment = SS if base in (_SP, _BP) else DS
    size = operand.size
    if name in _SIZES:
        size = _SIZES[name] or width + 2
    bits = None
    if name in _BIT_TESTS and found.operands[1].type == x86.X86_OP_REG:
        bits = (_register(found, found.operands[1].reg), size)
    write = bool(operand.access & capstone.CS_AC_WRITE) and name not in _READ_ONLY
    aligned = (size == 16 and name not in _UNALIGNED) or name in ("fxsave", "fxrstor")
    return Access(segment, size, write, base, index, memory.scale, memory.disp, mask, counted, bits, aligned)


def _register(found: capstone.CsInsn, register: int) -> int:
    name = found.reg_name(register) if register else None
    return _GENERAL.index(name[-2:]) if name is not None and name[-2:] in _GENERAL else -1


def _stack(found: capstone.CsInsn, name: str, width: int) -> tuple[Access, ...]:
    if name in _FRAME:
        size = _FRAME[name]
        return (_pushed(size) if name.startswith("push") else Access(SS, size, False, base=_SP, mask=0),)
    if name == "push" or (name == "call" and found.opcode[0] in (0xE8, 0xFF)):
        return (_pushed(width),)
    if name == "pop" or (name == "ret" and found.opcode[0] in (0xC2, 0xC3)):
        return (Access(SS, width, False, base=_SP, mask=0),)
    if name == "leave":
        return (Access(SS, width, False, base=_BP, mask=0),)
    if name == "enter":
        return (_pushed(width),)
    return ()


def _pushed(size: int) -> Access:
    return Access(SS, size, True, base=_SP, displacement=-size, mask=0)


def due(access: Access, registers: Callable[[int], int], segment: Callable[[int], tuple[int, int, int, int]],
        *, protected: bool, alignment: bool = False) -> int | None:
    """The vector of the fault that an access must raise, None where it may be done.

    registers: 32 bits each; segment: (selector, base, limit, flags) of a cache. protected: neither real nor
    virtual-8086 mode. alignment: #AC is on, in ring 3.
    """
    _selector, base, limit, flags = segment(access.segment)
    down = bool(flags & _DOWN and not flags & _CODE)
    flat = limit == 0xFFFF_FFFF and not down and flags & (_PRESENT | _CODE | _RW) == _PRESENT | _RW
    if flat and not access.aligned and not alignment:
        return None
    mask = access.mask
    if not mask:
        mask = 0xFFFF_FFFF if segment(SS)[3] & _BIG else 0xFFFF
    if access.counted and not registers(_CX) & mask:
        return None
    offset = _offset(access, registers, mask)
    fault = _STACK if access.segment == SS else _PROTECTION
    if protected and not _allowed(access, flags):
        return fault
    last = offset + access.size - 1
    if down:
        if offset <= limit or last > (0xFFFF_FFFF if flags & _BIG else 0xFFFF):
            return fault
    elif last > limit and limit != 0xFFFF_FFFF:
        return fault
    linear = base + offset
    if access.aligned and linear & 15:
        return _PROTECTION
    if alignment and access.size in (2, 4, 8) and linear & access.size - 1:
        return _ALIGNMENT
    return None


def _allowed(access: Access, flags: int) -> bool:
    """By presence and type."""
    if not flags & _PRESENT:
        return False
    if flags & _CODE:
        return not access.write and bool(flags & _RW)
    return not access.write or bool(flags & _RW)


def _offset(access: Access, registers: Callable[[int], int], mask: int) -> int:
    offset = access.displacement
    if access.base >= 0:
        offset += registers(access.base)
    if access.index >= 0:
        index = registers(access.index & 7)
        offset += (index & 0xFF if access.index & _LOW_BYTE else index) * access.scale
    if access.bits is not None:
        register, size = access.bits
        number = registers(register) & (1 << size * 8) - 1
        number -= (number >> size * 8 - 1) << size * 8                       # signed
        offset += (number >> (5 if size == 4 else 4)) * size
    return offset & mask
