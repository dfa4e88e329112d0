"""What an instruction accesses, and what of it is to be checked at run time (UNBOUNDED of quirks.py).

Theory.  What an instruction accesses follows from its bytes alone (operands.py). What of that has to be looked at each
time follows from the hidden flags for which it is translated: in flat segments next to nothing, in real mode no single
byte. The rest is what checks.asm compares with the segment caches; what does not pass faults at the instruction, before
it has done anything.

Checked (SDM volume 3, 5.3, 5.4.1, 5.5 and 6.15; volume 2, LOCK):
- the instruction itself: the limit of CS
- every operand in memory, both sides of string instructions, and what PUSH, POP, CALL, RET, IRET, ENTER, LEAVE and
  their kin do to the stack: null segments, limits up and down, writes to code and read-only data, reads of code that
  can only be executed. #GP(0), through SS #SS(0)
- LOCK before an instruction that takes none, and 8F /1 to /7: #UD
- 16 bytes of SSE that are not aligned: #GP(0); with CR0.AM and EFLAGS.AC in ring 3 whatever is not aligned: #AC(0)
In 64-bit code, where there are no limits, the last two. Far jumps and what they load is the library's, interrupts
`delivery.py`'s.

Invariants.  Pure. Nothing is kept for an address, so code may change.

Poor: a far call in protected mode, which may change the stack, is not asked for its stack's limit.
"""

from __future__ import annotations

from typing import Final

from .checks import CODE_NOT_FLAT, CODE_NOT_LOW, NOT_FLAT, NOT_LOW, Word
from .operands import CS, FS, GS, Access, Decoded, decoded

__all__ = ["CS64", "refusals", "words"]

# Hidden flags, for which code is translated.
_RING, CS32, SS32, _PE, CS64, _VM, _AC = 3, 1 << 4, 1 << 5, 1 << 7, 1 << 15, 1 << 17, 1 << 18

# As in checks.asm.
_WORD_ADDRESS, _LONG_ADDRESS, _BIT_TEST, _PLUS_AL, _COUNTED, _TO_16, _TO_SIZE = (1 << n for n in range(9, 16))
_WRITE, _PROTECTED, _LOW, _NO_BASE, _RETURNS, _MARK, _RAISE, _OURS = (1 << n for n in range(24, 32))
_FIRST_CACHE, _NONE, _FETCH = 23, 0xFF, 1 << 63
_INVALID_OPCODE: Final = 6


def words(code: bytes, flags: int, pointer: int) -> list[Word]:
    """The checks in front of the instruction at the start of *code*, in order.

    flags: the hidden ones (with AC, VM) for which it is translated. pointer: its offset in CS; in 64-bit code its
    address.
    """
    found = decoded(code, 64 if flags & CS64 else 32 if flags & CS32 else 16)
    checks: list[Word] = []
    length = max(found.length, 1)
    if not flags & CS64 and flags & CODE_NOT_FLAT and (
            flags & (CODE_NOT_LOW | CS32) or pointer + length > 0x1_0000):
        word, more = _word(Access(CS, length, False, displacement=pointer), flags & ~(_PE | _AC), 0)
        checks.append((word, more | _FETCH))
    if found.invalid:
        return [*checks, _refusal(found)]
    protected = flags & (_PE | _VM) == _PE
    if found.returns and protected and not flags & CS64:
        checks.append((_OURS | _RETURNS, 0))         # before the stack, which may be empty
    for access in found.accesses:
        if access.width == 0 and protected and access.write and found.loads:
            continue                                 # a far call may go to another stack
        if _wanted(access, flags, protected):
            checks.append(_word(access, flags, pointer + found.length))
    if found.loads:
        checks.append((_OURS | _MARK, 0))
    return checks


def refusals(code: bytes, flags: int) -> list[Word]:
    """Of these no more than that an instruction is invalid, which the library may abort at (DEADLY_LOCK)."""
    found = decoded(code, 64 if flags & CS64 else 32 if flags & CS32 else 16)
    return [_refusal(found)] if found.invalid else []


def _refusal(found: Decoded) -> Word:
    return _OURS | _RAISE | _INVALID_OPCODE | max(found.length, 1) << 16, 0


def _wanted(access: Access, flags: int, protected: bool) -> bool:
    """Whether there is anything to look at when the code runs."""
    if access.aligned or (flags & _AC and flags & _RING == 3 and access.size in (2, 4, 8)):
        return True
    if flags & CS64:
        return False
    not_flat, not_low = (CODE_NOT_FLAT, CODE_NOT_LOW) if access.segment == CS else (NOT_FLAT, NOT_LOW)
    if access.segment in (FS, GS) or flags & not_low or (protected and access.write and access.segment == CS):
        return True
    if not flags & not_flat:
        return False
    if access.width != 2 and (access.width or flags & SS32):
        return True
    if access.bits is None and access.base < 0 and access.scaled < 0:
        return (access.displacement & 0xFFFF) + access.size > 0x1_0000
    return access.size > 1


def _word(access: Access, flags: int, following: int) -> Word:
    width = access.width or (8 if flags & CS64 else 4 if flags & SS32 else 2)
    word = _OURS | access.size - 1 | (_FIRST_CACHE + 3 * access.segment) << 16
    if flags & CS64:
        word |= _LONG_ADDRESS | (0 if access.segment in (FS, GS) else _NO_BASE)
    elif width == 2:
        word |= _WORD_ADDRESS
    if flags & (_PE | _VM) == _PE:
        word |= _PROTECTED
    if flags & _AC and flags & _RING == 3 and access.size in (2, 4, 8):
        word |= _TO_SIZE
    not_low = CODE_NOT_LOW if access.segment == CS else NOT_LOW
    if (width == 2 and access.segment not in (FS, GS) and not flags & not_low and not word & _TO_SIZE
            and access.scaled < 0 and access.bits is None
            and not (access.plus_al or access.aligned or (access.write and access.segment == CS))):
        word |= _LOW
    for wanted, bit in ((access.write, _WRITE), (access.counted, _COUNTED), (access.plus_al, _PLUS_AL),
                        (access.aligned, _TO_16), (access.bits is not None, _BIT_TEST)):
        if wanted:
            word |= bit
    displacement = access.displacement + (following if access.relative else 0)
    more = (displacement & 0xFFFF_FFFF | (access.base & _NONE) << 32 | (access.scaled & _NONE) << 40
            | access.shift << 48)
    if access.bits is not None:
        register, size = access.bits
        more |= (register | (16 if size != 2 else 0)) << 56
    return word, more
