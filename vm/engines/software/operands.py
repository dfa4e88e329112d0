"""What an instruction accesses in memory, from its bytes alone: 16, 32 and 64-bit code.

Theory.  The maps of opcodes (SDM volume 2, appendix A) as tables of what stands behind a ModRM byte: how many bytes,
and whether they are read or written; and, by hand, what needs no ModRM byte: the stack, strings, absolute addresses.
A decoder of its own, because it runs for nearly every instruction that is translated in real mode: capstone takes ten
times as long, and tells sizes and directions of some wrongly; tests/vm/engines/test_operands.py compares the two.

Invariants.  Pure and total: any bytes give an answer. What no processor has gives no access: the library refuses it.

Poor: ENTER tells what it pushes first only; VEX and what came later are not there, nor are they in the library.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Final, NamedTuple

__all__ = ["CS", "DS", "ES", "FS", "GS", "SS", "Access", "Decoded", "decoded", "kinds"]

# As in struct CPUX86State: the order of the caches; the general registers have that of the encoding.
ES, CS, SS, DS, FS, GS = range(6)
_AX, _CX, _BX, _SP, _BP, _SI, _DI = 0, 1, 3, 4, 5, 6, 7


class Access(NamedTuple):
    """Of *size* bytes at base + (scaled << shift) + displacement (numbers of registers, -1: none) in a segment."""

    segment: int
    size: int
    write: bool
    base: int = -1
    scaled: int = -1
    shift: int = 0
    displacement: int = 0
    width: int = 4                   # bytes of the address; 0: as the stack's
    counted: bool = False            # REP: none where CX is 0 (as wide as the address)
    bits: tuple[int, int] | None = None      # BT and its kin: the register with the signed bit number, its bytes
    plus_al: bool = False            # XLAT
    relative: bool = False           # to the next instruction
    aligned: bool = False            # to 16 bytes


@dataclass(frozen=True, slots=True)
class Decoded:
    accesses: tuple[Access, ...] = ()        # in the order of the manual
    length: int = 0                  # 0: no instruction, as far as is known here
    invalid: bool = False            # #UD: LOCK where there must be none; 8F with another than /0
    loads: bool = False              # a segment register
    returns: bool = False            # IRET


class _Operand(NamedTuple):
    """Behind a ModRM byte."""

    size: int                        # bytes, or one of the sizes below
    write: bool
    lock: bool = False               # takes LOCK
    aligned: bool = False
    bits: bool = False               # a bit string: ModRM's register is the number of a bit
    pushes: bool = False             # CALL, PUSH
    pops: bool = False
    loads: bool = False


# Sizes: of the operand; of what the stack takes; a far pointer; 4, 8 with REX.W; two operands; 8, 16 with REX.W;
# FNSTENV; FNSAVE; GDTR.
_V, _SLOT, _FAR, _Y, _PAIR, _TWICE_Y, _ENVIRONMENT, _FPU_STATE, _TABLE = range(-1, -10, -1)
_Row = tuple[_Operand | None, ...]       # of eight, by ModRM's register field


def _read(size: int) -> _Operand:
    return _Operand(size, False)


def _write(size: int) -> _Operand:
    return _Operand(size, True)


def _changed(size: int) -> _Operand:
    return _Operand(size, True, lock=True)


def _all(operand: _Operand | None) -> _Row:
    return (operand,) * 8


def _row(**operands: _Operand) -> _Row:
    """`_0=...` to `_7=...`."""
    return tuple(operands.get(f"_{register}") for register in range(8))


def _one_byte() -> dict[int, _Row]:
    rows: dict[int, _Row] = {}
    for first in range(0, 0x40, 8):
        result = _read if first == 0x38 else _changed                        # CMP
        rows |= {first: _all(result(1)), first + 1: _all(result(_V)), first + 2: _all(_read(1)),
                 first + 3: _all(_read(_V))}
    for opcode, size in ((0x80, 1), (0x81, _V), (0x82, 1), (0x83, _V)):
        rows[opcode] = (*_all(_changed(size))[:7], _read(size))
    for opcode, size in ((0xC0, 1), (0xC1, _V), (0xD0, 1), (0xD1, _V), (0xD2, 1), (0xD3, _V)):
        rows[opcode] = _all(_write(size))
    for opcode, size in ((0xF6, 1), (0xF7, _V)):
        rows[opcode] = (*_all(_read(size))[:2], *_all(_changed(size))[:2], *_all(_read(size))[:4])
    rows |= {
        0x62: _all(_read(_PAIR)), 0x63: _all(_write(2)), 0x69: _all(_read(_V)), 0x6B: _all(_read(_V)),
        0x84: _all(_read(1)), 0x85: _all(_read(_V)), 0x86: _all(_changed(1)), 0x87: _all(_changed(_V)),
        0x88: _all(_write(1)), 0x89: _all(_write(_V)), 0x8A: _all(_read(1)), 0x8B: _all(_read(_V)),
        0x8C: _all(_write(2)), 0x8D: _all(None), 0x8E: _all(_Operand(2, False, loads=True)),
        0x8F: _row(_0=_Operand(_SLOT, True, pops=True)),
        0xC4: _all(_Operand(_FAR, False, loads=True)), 0xC5: _all(_Operand(_FAR, False, loads=True)),
        0xC6: _row(_0=_write(1)), 0xC7: _row(_0=_write(_V)),
        0xD8: _all(_read(4)), 0xDA: _all(_read(4)), 0xDC: _all(_read(8)), 0xDE: _all(_read(2)),
        0xD9: _row(_0=_read(4), _2=_write(4), _3=_write(4), _4=_read(_ENVIRONMENT), _5=_read(2),
                   _6=_write(_ENVIRONMENT), _7=_write(2)),
        0xDB: _row(_0=_read(4), _1=_write(4), _2=_write(4), _3=_write(4), _5=_read(10), _7=_write(10)),
        0xDD: _row(_0=_read(8), _1=_write(8), _2=_write(8), _3=_write(8), _4=_read(_FPU_STATE), _6=_write(_FPU_STATE),
                   _7=_write(2)),
        0xDF: _row(_0=_read(2), _1=_write(2), _2=_write(2), _3=_write(2), _4=_read(10), _5=_read(8), _6=_write(10),
                   _7=_write(8)),
        0xFE: _row(_0=_changed(1), _1=_changed(1)),
        0xFF: _row(_0=_changed(_V), _1=_changed(_V), _2=_Operand(_SLOT, False, pushes=True),
                   _3=_Operand(_FAR, False, pushes=True, loads=True), _4=_read(_SLOT),
                   _5=_Operand(_FAR, False, loads=True), _6=_Operand(_SLOT, False, pushes=True)),
    }
    return rows


def _two_bytes() -> dict[int, _Row]:
    rows: dict[int, _Row] = {
        0x00: (*_all(_write(2))[:2], *_all(_read(2))[:4], None, None),
        0x01: _row(_0=_write(_TABLE), _1=_write(_TABLE), _2=_read(_TABLE), _3=_read(_TABLE), _4=_write(2), _6=_read(2)),
        0x02: _all(_read(2)), 0x03: _all(_read(2)), 0x0D: _all(None),
        0xA3: _all(_Operand(_V, False, bits=True)), 0xAF: _all(_read(_V)),
        0xAE: _row(_0=_Operand(512, True, aligned=True), _1=_Operand(512, False, aligned=True), _2=_read(4),
                   _3=_write(4)),
        0xB0: _all(_changed(1)), 0xB1: _all(_changed(_V)), 0xB6: _all(_read(1)), 0xB7: _all(_read(2)),
        0xB8: _all(_read(_V)), 0xBA: (*_all(None)[:4], _read(_V), *_all(_changed(_V))[:3]), 0xBC: _all(_read(_V)),
        0xBD: _all(_read(_V)), 0xBE: _all(_read(1)), 0xBF: _all(_read(2)), 0xC0: _all(_changed(1)),
        0xC1: _all(_changed(_V)), 0xC3: _all(_write(_Y)), 0xC7: _row(_1=_changed(_TWICE_Y))}
    rows |= {opcode: _all(None) for opcode in range(0x18, 0x20)}             # NOP, prefetches
    rows |= {opcode: _all(_read(_V)) for opcode in range(0x40, 0x50)}        # CMOVcc
    rows |= {opcode: _all(_write(1)) for opcode in range(0x90, 0xA0)}        # SETcc
    rows |= {opcode: _all(_write(_V)) for opcode in (0xA4, 0xA5, 0xAC, 0xAD)}
    rows |= {opcode: _all(_Operand(_V, True, lock=True, bits=True)) for opcode in (0xAB, 0xB3, 0xBB)}
    rows |= {opcode: _all(_Operand(_FAR, False, loads=True)) for opcode in (0xB2, 0xB4, 0xB5)}
    return rows


_Forms = tuple[_Operand | None, _Operand | None, _Operand | None, _Operand | None]       # plain, 66, F3, F2


def _vectors() -> dict[int, _Forms]:
    """MMX and SSE, by opcode; those behind 0F 38 from 100h on, behind 0F 3A from 200h on."""
    xmm, to_xmm = _Operand(16, False, aligned=True), _Operand(16, True, aligned=True)
    loose, to_loose = _read(16), _write(16)
    r1, r2, r4, r8, ry = (_read(size) for size in (1, 2, 4, 8, _Y))
    w1, w2, w4, w8, wy = (_write(size) for size in (1, 2, 4, 8, _Y))
    packed: _Forms = (xmm, xmm, r4, r8)
    integer: _Forms = (r8, xmm, None, None)
    only: _Forms = (None, xmm, None, None)
    forms: dict[int, _Forms] = {
        0x10: (loose, loose, r4, r8), 0x11: (to_loose, to_loose, w4, w8), 0x12: (r8, r8, xmm, r8),
        0x13: (w8, w8, None, None), 0x14: (xmm, xmm, None, None), 0x15: (xmm, xmm, None, None),
        0x16: (r8, r8, xmm, None),
        0x17: (w8, w8, None, None), 0x28: (xmm, xmm, None, None), 0x29: (to_xmm, to_xmm, None, None),
        0x2A: (r8, r8, ry, ry), 0x2B: (to_xmm, to_xmm, None, None), 0x2C: (r8, xmm, r4, r8), 0x2D: (r8, xmm, r4, r8),
        0x2E: (r4, r8, None, None), 0x2F: (r4, r8, None, None), 0x52: (xmm, None, r4, None),
        0x53: (xmm, None, r4, None),
        0x5A: (r8, xmm, r4, r8), 0x5B: (xmm, xmm, xmm, None), 0x6C: only, 0x6D: only, 0x6E: (ry, ry, None, None),
        0x6F: (r8, xmm, loose, None), 0x70: (r8, xmm, xmm, xmm), 0x7C: (None, xmm, None, xmm),
        0x7D: (None, xmm, None, xmm),
        0x7E: (wy, wy, r8, None), 0x7F: (w8, to_xmm, to_loose, None), 0xC2: packed, 0xC4: (r2, r2, None, None),
        0xC6: (xmm, xmm, None, None), 0xD0: (None, xmm, None, xmm), 0xD6: (None, w8, None, None),
        0xE6: (None, xmm, r8, xmm), 0xE7: (w8, to_xmm, None, None), 0xF0: (None, None, None, loose)}
    forms |= dict.fromkeys((0x51, 0x58, 0x59, 0x5C, 0x5D, 0x5E, 0x5F), packed)
    forms |= dict.fromkeys((0x54, 0x55, 0x56, 0x57), (xmm, xmm, None, None))
    forms |= dict.fromkeys((0x60, 0x61, 0x62), (r4, xmm, None, None))
    forms |= dict.fromkeys((*range(0x63, 0x6C), 0x74, 0x75, 0x76, *range(0xD1, 0xD6), *range(0xD8, 0xE6),
                            *range(0xE8, 0xF0), *range(0xF1, 0xF7), *range(0xF8, 0xFF)), integer)
    forms |= dict.fromkeys((*range(0x100, 0x10C), 0x11C, 0x11D, 0x11E, 0x20F), integer)
    forms |= dict.fromkeys((0x110, 0x114, 0x115, 0x117, 0x128, 0x129, 0x12A, 0x12B, *range(0x137, 0x142),
                            *range(0x1DB, 0x1E0), 0x208, 0x209, 0x20C, 0x20D, 0x20E, 0x240, 0x241, 0x242, 0x244, 0x2DF),
                           only)
    for opcode, operand in zip((*range(0x120, 0x126), *range(0x130, 0x136), 0x20A, 0x20B, 0x214, 0x215, 0x216, 0x217,
                                0x220, 0x221, 0x222, *range(0x260, 0x264)),
                               (r8, r4, r2, r8, r4, r8, r8, r4, r2, r8, r4, r8, r4, r8, w1, w2, wy, w4, r1, r4, ry,
                                *(loose,) * 4), strict=True):
        forms[opcode] = (None, operand, None, None)
    forms[0x1F0], forms[0x1F1] = (_read(_V), _read(_V), None, r1), (_write(_V), _write(_V), None, _read(_V))
    return forms


_ONE: Final = _one_byte()
_TWO: Final = _two_bytes()
_VECTORS: Final = _vectors()
_SEGMENT_PREFIXES: Final = {0x26: ES, 0x2E: CS, 0x36: SS, 0x3E: DS, 0x64: FS, 0x65: GS}
_OTHER_PREFIXES: Final = frozenset((0x66, 0x67, 0xF0, 0xF2, 0xF3))
_PUSHES: Final = frozenset((0x06, 0x0E, 0x16, 0x1E, *range(0x50, 0x58), 0x68, 0x6A, 0x9C, 0xC8, 0xE8))
_LOADS: Final = frozenset((0x07, 0x17, 0x1F, 0x9A, 0xCA, 0xCB, 0xCF, 0xEA))            # a segment, without ModRM
_LOADS_OF_TWO: Final = frozenset((0x07, 0x35, 0xA1, 0xA9))
_MASKMOV: Final = 0xF7                                                       # behind 0F
_POPS: Final = frozenset((0x07, 0x17, 0x1F, *range(0x58, 0x60), 0x9D, 0xC2, 0xC3))
_NOT_IN_64: Final = frozenset((0x06, 0x07, 0x0E, 0x16, 0x17, 0x1E, 0x1F, 0x60, 0x61, 0x62, 0x82, 0x9A, 0xC4, 0xC5,
                               0xEA))
# Bytes behind the opcode (and ModRM), or: as wide as the operand, at most 4; MOV's, at most 8; as the address; a far
# pointer.
_OPERAND, _MOVED, _ADDRESS, _POINTER = -1, -2, -3, -4
_IMMEDIATES: Final = {
    **dict.fromkeys((0x6A, 0x6B, *range(0x70, 0x80), 0x80, 0x82, 0x83, 0xA8, *range(0xB0, 0xB8), 0xC0, 0xC1, 0xC6, 0xCD,
                     0xD4, 0xD5, *range(0xE0, 0xE8), 0xEB, *range(0x04, 0x40, 8)), 1),
    **dict.fromkeys((0x68, 0x69, 0x81, 0xA9, 0xC7, 0xE8, 0xE9, *range(0x05, 0x40, 8)), _OPERAND),
    **dict.fromkeys(range(0xB8, 0xC0), _MOVED), **dict.fromkeys(range(0xA0, 0xA4), _ADDRESS),
    0x9A: _POINTER, 0xEA: _POINTER, 0xC2: 2, 0xCA: 2, 0xC8: 3}
_IMMEDIATES_OF_TWO: Final = {
    **dict.fromkeys((0x70, 0x71, 0x72, 0x73, 0xA4, 0xAC, 0xBA, 0xC2, 0xC4, 0xC5, 0xC6), 1),
    **dict.fromkeys(range(0x80, 0x90), _OPERAND)}
_WITHOUT_MODRM: Final = frozenset((                                          # behind 0F
    *range(0x05, 0x0D), 0x0E, *range(0x30, 0x38), 0x77, *range(0x80, 0x90), *range(0xA0, 0xA3), *range(0xA8, 0xAB),
    *range(0xC8, 0xD0)))
# Whether DS:SI is read; whether ES:DI is written or read (None: neither). INS, OUTS, MOVS, CMPS, STOS, LODS, SCAS.
_STRINGS: Final[dict[int, tuple[bool, bool | None]]] = {opcode + wide: told for opcode, told in (
    (0x6C, (False, True)), (0x6E, (True, None)), (0xA4, (True, True)), (0xA6, (True, False)), (0xAA, (False, True)),
    (0xAC, (True, None)), (0xAE, (False, False))) for wide in (0, 1)}
# How many are pushed or popped. PUSHA, POPA, far CALL, RET (twice), IRET.
_FRAMES: Final = {0x60: (8, True), 0x61: (8, False), 0x9A: (2, True), 0xCA: (2, False), 0xCB: (2, False),
                  0xCF: (3, False)}
_BASES_OF_16: Final = ((_BX, _SI), (_BX, _DI), (_BP, _SI), (_BP, _DI), (_SI, -1), (_DI, -1), (_BP, -1), (_BX, -1))


# What the first bytes tell, for checks.asm: an access by a ModRM byte, without one, one of SSE; more than that.
_PREFIX, _REX, _ESCAPE, _MEMORY, _IMPLICIT, _SSE, _ANYWAY, _LOCK, _OVERRIDE, _GROUP = range(1, 11)


def kinds() -> bytes:
    """By opcode, and by the one behind 0F, of which sort an instruction may be. 512 bytes."""
    one, two = bytearray(256), bytearray(256)
    for kinds_of, rows in ((one, _ONE), (two, _TWO)):
        for opcode, row in rows.items():
            operands = [operand for operand in row if operand is not None]
            kinds_of[opcode] = (
                _ANYWAY if any(each.loads for each in operands) else _IMPLICIT if any(
                    each.pushes or each.pops for each in operands) else _SSE if any(
                    each.aligned for each in operands) else _MEMORY if operands else 0)
    for opcode, forms in _VECTORS.items():
        if opcode < 0x100:
            two[opcode] = _SSE if any(form is not None and form.aligned for form in forms) else _MEMORY
    for opcode in (*_PUSHES, *_POPS, *_STRINGS, *range(0xA0, 0xA4), *_FRAMES, 0xC9, 0xD7):
        one[opcode] = _IMPLICIT
    for opcode in (0xA0, 0xA8, _MASKMOV):
        two[opcode] = _IMPLICIT
    # What may be invalid; loads of segments.
    for opcode in (0x8F, *_LOADS):
        one[opcode] = _ANYWAY
    for opcode in (*_LOADS_OF_TWO, 0x38, 0x3A):
        two[opcode] = _ANYWAY
    one[0x0F], one[0xF0], one[0xFF] = _ESCAPE, _LOCK, _GROUP
    one[0x2E] = one[0x64] = one[0x65] = _OVERRIDE             # none to write to, or not what the flags speak of
    one[0x40:0x50] = bytes([_REX] * 16)
    for opcode in (0x26, 0x36, 0x3E, 0x66, 0x67, 0xF2, 0xF3):
        one[opcode] = _PREFIX
    return bytes(one + two)


@functools.lru_cache(maxsize=8192)
def decoded(code: bytes, bits: int) -> Decoded:
    """The instruction at the start of *code*, which may end in the middle of it."""
    try:
        return _Reader(code, bits).instruction()
    except IndexError:
        return Decoded()


class _Reader:
    """One instruction. IndexError where the bytes end before it."""

    def __init__(self, code: bytes, bits: int) -> None:
        self._code, self._bits = code, bits
        at, segment, repeated, locked, size, address, rex = 0, -1, 0, False, False, False, 0
        while True:
            byte = code[at]
            if byte in _SEGMENT_PREFIXES:
                # In 64-bit code only the last two mean anything.
                if bits != 64 or byte >= 0x64:
                    segment = _SEGMENT_PREFIXES[byte]
                rex = 0
            elif byte in _OTHER_PREFIXES:
                size, address, locked = size or byte == 0x66, address or byte == 0x67, locked or byte == 0xF0
                if byte >= 0xF2:
                    repeated = byte
                rex = 0
            elif bits == 64 and byte & 0xF0 == 0x40:
                rex = byte
            else:
                break
            at += 1
        self._at, self._segment, self._repeated, self._locked, self._rex = at, segment, repeated, locked, rex
        self._prefixed = size
        self._size = 8 if rex & 8 else 2 if (bits == 16) != size else 4
        self._width = {16: 4 if address else 2, 32: 2 if address else 4}.get(bits, 4 if address else 8)
        # What a push or a pop takes.
        self._slot = self._size if bits != 64 else 2 if size else 8

    def instruction(self) -> Decoded:
        opcode = self._code[self._at]
        self._at += 1
        if opcode == 0x0F:
            return self._behind_0f()
        if self._bits == 64 and opcode in _NOT_IN_64:
            return Decoded()
        row = _ONE.get(opcode)
        if row is not None:
            return self._with_modrm(row, opcode, _IMMEDIATES.get(opcode, 0))
        accesses, loads = self._without_modrm(opcode)
        return self._told(accesses, _IMMEDIATES.get(opcode, 0), loads=loads, returns=opcode == 0xCF)

    def _behind_0f(self) -> Decoded:
        opcode = self._code[self._at]
        self._at += 1
        if opcode in (0x38, 0x3A):
            opcode = (0x100 if opcode == 0x38 else 0x200) + self._code[self._at]
            self._at += 1
        forms = _VECTORS.get(opcode)
        immediate = 1 if opcode >= 0x200 else _IMMEDIATES_OF_TWO.get(opcode, 0)
        if forms is not None:
            which = {0: 1 if self._prefixed else 0, 0xF3: 2, 0xF2: 3}[self._repeated]
            return self._with_modrm(_all(forms[which]), 0x0F00 | opcode, immediate)
        row = _TWO.get(opcode)
        if row is not None:
            return self._with_modrm(row, 0x0F00 | opcode, immediate)
        accesses: tuple[Access, ...] = ()
        if opcode in (0xA0, 0xA8):
            accesses = (self._pushed(self._slot),)
        elif opcode in (0xA1, 0xA9):
            accesses = (self._popped(self._slot),)
        elif opcode == _MASKMOV and self._code[self._at] >= 0xC0 and not self._repeated:            # MASKMOVQ
            accesses = (self._string(_DI, DS, 16 if self._prefixed else 8, write=True, counted=False),)
        if 0x20 <= opcode < 0x24:
            self._at += 1                                                    # registers, whatever ModRM says
        elif opcode not in _WITHOUT_MODRM:
            self._pass_modrm()
        return self._told(accesses, immediate, loads=opcode in _LOADS_OF_TWO)

    def _with_modrm(self, row: _Row, opcode: int, immediate: int) -> Decoded:
        modrm = self._code[self._at]
        register = modrm >> 3 & 7
        operand = row[register]
        if opcode in (0xF6, 0xF7) and register < 2:                          # TEST
            immediate = 1 if opcode == 0xF6 else _OPERAND
        elif opcode == 0x8F and register:
            return Decoded(length=self._at + 1, invalid=True)                # POP to the library
        if opcode == 0x63 and self._bits == 64:                              # MOVSXD
            operand = _read(4)
        if modrm >= 0xC0:
            self._at += 1
            # Of what has no operand in memory CALL and PUSH of a register touch the stack, MOV loads a segment.
            if opcode == 0xFF and register in (2, 6):
                return self._told((self._pushed(self._slot),), immediate)
            if opcode == 0x8F and register == 0:
                return self._told((self._popped(self._slot),), immediate)
            return self._told((), immediate, loads=opcode == 0x8E)
        where = self._operand()
        if operand is None:
            return self._told((), immediate)
        size = self._bytes_of(operand.size)
        access = where._replace(size=size, write=operand.write, aligned=operand.aligned)
        if operand.bits:
            access = access._replace(bits=(register | (self._rex & 4) << 1, size))
        accesses: tuple[Access, ...] = (access,)
        if operand.pushes:
            accesses = (access, *self._several(2 if operand.loads else 1, write=True))       # read first
        elif operand.pops:                                                   # written last, by the new stack pointer
            if access.base == _SP:
                access = access._replace(displacement=access.displacement + self._slot)
            accesses = (self._popped(self._slot), access)
        return self._told(accesses, immediate, lock=operand.lock, loads=operand.loads)

    def _told(self, accesses: tuple[Access, ...], immediate: int, *, lock: bool = False,
              loads: bool = False, returns: bool = False) -> Decoded:
        length = self._at + (immediate if immediate >= 0 else {
            _OPERAND: min(self._size, 4), _MOVED: self._size, _ADDRESS: self._width,
            _POINTER: self._size + 2}[immediate])
        if self._locked and not lock:
            return Decoded(length=length, invalid=True)
        return Decoded(accesses, length, loads=loads, returns=returns)

    def _without_modrm(self, opcode: int) -> tuple[tuple[Access, ...], bool]:
        if opcode in _PUSHES:
            return (self._pushed(self._slot),), False
        if opcode in _POPS:
            return (self._popped(self._slot),), opcode in _LOADS
        size = 1 if not opcode & 1 else self._size
        if 0xA0 <= opcode < 0xA4:
            displacement = int.from_bytes(self._code[self._at:self._at + self._width], "little")
            return (Access(self._data_segment(), size, opcode >= 0xA2, displacement=displacement,
                           width=self._width),), False
        if opcode in _STRINGS:
            reads_si, di = _STRINGS[opcode]
            size = min(size, 4) if opcode < 0x70 else size
            told = (self._string(_SI, self._data_segment(), size, write=False),) if reads_si else ()
            return (told if di is None else (*told, self._string(_DI, ES, size, write=di))), False
        if opcode in _FRAMES:
            count, write = _FRAMES[opcode]
            return self._several(count, write=write), opcode in _LOADS
        if opcode == 0xC9:
            return (Access(SS, self._slot, False, base=_BP, width=0),), False
        if opcode == 0xD7:
            return (Access(self._data_segment(), 1, False, base=_BX, plus_al=True, width=self._width),), False
        return (), opcode in _LOADS

    def _bytes_of(self, size: int) -> int:
        if size > 0:
            return size
        wide, y = self._size != 2, 8 if self._rex & 8 else 4
        return {_V: self._size, _SLOT: self._slot, _FAR: self._size + 2, _Y: y, _PAIR: self._size * 2, _TWICE_Y: 2 * y,
                _ENVIRONMENT: 28 if wide else 14, _FPU_STATE: 108 if wide else 94,
                _TABLE: 10 if self._bits == 64 else 6}[size]

    def _pushed(self, size: int) -> Access:
        return Access(SS, size, True, base=_SP, displacement=-size, width=0)

    def _popped(self, size: int) -> Access:
        return Access(SS, size, False, base=_SP, width=0)

    def _several(self, count: int, *, write: bool) -> tuple[Access, ...]:
        """On the stack, one by one: of 16 bits it goes on at its other end."""
        size = self._size
        places = (-size * (each + 1) if write else size * each for each in range(count))
        return tuple(Access(SS, size, write, base=_SP, displacement=place, width=0) for place in places)

    def _string(self, register: int, segment: int, size: int, *, write: bool, counted: bool = True) -> Access:
        return Access(segment, size, write, base=register, width=self._width, counted=counted and self._repeated != 0)

    def _data_segment(self) -> int:
        return DS if self._segment < 0 else self._segment

    def _pass_modrm(self) -> None:
        if self._code[self._at] >= 0xC0:
            self._at += 1
        else:
            self._operand()

    def _operand(self) -> Access:
        """What a ModRM byte that means memory says, behind which the reader stands then."""
        code, at = self._code, self._at
        modrm = code[at]
        mode, low = modrm >> 6, modrm & 7
        at += 1
        shift, relative = 0, False
        if self._width == 2:
            base, index = _BASES_OF_16[low]
            length = mode
            if mode == 0 and low == 6:
                base, length = -1, 2
        else:
            base, index = low | (self._rex & 1) << 3, -1
            length = (0, 1, 4)[mode]
            if low == 4:
                sib = code[at]
                at += 1
                shift, index, base = sib >> 6, sib >> 3 & 7 | (self._rex & 2) << 2, sib & 7 | (self._rex & 1) << 3
                if index == 4:
                    index = -1
                if base & 7 == 5 and mode == 0:
                    base, length = -1, 4
            elif low == 5 and mode == 0:
                base, length, relative = -1, 4, self._bits == 64
        code[at + length - 1]
        displacement = int.from_bytes(code[at:at + length], "little", signed=True)
        self._at = at + length
        segment = self._segment
        if segment < 0:
            segment = SS if base in (_SP, _BP) and self._bits != 64 else DS
        return Access(segment, 1, False, base, index, shift, displacement, self._width, relative=relative)
