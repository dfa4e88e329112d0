"""Privileged instructions that Unicorn carries out without the checks of a processor.

Theory.  QEMU's translator lets MOV to CR0 and CR4, LMSW and CLTS set whatever they are given, and answers RDMSR of a
register that does not exist with 0.  But it also knows AMD's nested virtualization: under SVM an *intercepted*
instruction leaves the guest before it does anything.  So the engine runs its guest as if it were nested (hidden flag
GUEST), with intercepts on exactly these instructions (`quirks.Unicorn.intercept`): they come out as exits, all
other code is translated as ever and pays nothing.  Here the manual's checks are made (SDM volume 2, MOV CR, WRMSR;
volume 3, 2.5 and 4.1.2), and what passes is carried out by QEMU's own functions.

The general protection fault of an access to a model-specific register that is not there needs no decoding: those
that exist are excepted in the intercept's bitmap, and do not come here at all; WRMSR of EFER does.

Invariant: an intercepted instruction has either done all of its work, with the instruction pointer behind it, or
nothing, and `carry_out` said so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ...code import decode
from .quirks import ENV_ORDER, PREFIXES, Native, Unicorn
from .state import LMA, PAGING, PROTECTED, SEGMENTS, Registers

__all__ = ["MSRS_PRESENT", "Privileged"]

_EFER: Final = 0xC000_0080
_EFER_BITS: Final = 0xD01                  # SCE, LME, LMA, NXE
_LME: Final = 1 << 8
_CR4_BITS: Final = 0x7FF                   # VME to OSXMMEXCPT: all that Unicorn has
_PAE: Final = 1 << 5
_NOT_WRITE_THROUGH, _CACHE_DISABLE, _EXTENSION_TYPE, _TASK_SWITCHED = 1 << 29, 1 << 30, 1 << 4, 1 << 3
_CR0_BITS: Final = 0xE005_003F             # PG CD NW AM WP NE ET TS EM MP PE: the others are written as 0
_LOW: Final = 0xFFFF_FFFF
_SHADOW: Final = 1 << 3                    # hidden flag: behind STI or MOV SS
_ORDER: Final = {name.lower()[1:]: index for index, name in enumerate(ENV_ORDER)}    # "ax": 0, ...
_TRAP, _SINGLE_STEP = 1 << 8, 1 << 14      # TF, and DR6.BS

# What exists: read and written by QEMU's own code. The memory types and machine-check registers are kept, as every KVM
# does, for BIOSes that write them without asking CPUID.
MSRS_PRESENT: Final = frozenset((
    0x10, 0x17, 0x1B, 0x3A, 0x3B, 0x8B, 0xFE, 0x174, 0x175, 0x176, 0x179, 0x17A, 0x17B, 0x1A0, *range(0x200, 0x210),
    0x250, 0x258, 0x259, *range(0x268, 0x270), 0x277, 0x2FF,
    _EFER, *range(0xC000_0081, 0xC000_0085), *range(0xC000_0100, 0xC000_0104)))


class Privileged:
    """`code()`: the bytes at CS:RIP. `read(linear)`: two bytes of the guest's, fewer where there are none."""

    def __init__(self, unicorn: Unicorn, registers: Registers, code: Callable[[], bytes],
                 read: Callable[[int], bytes]) -> None:
        self._unicorn, self._registers, self._code, self._read = unicorn, registers, code, read

    def carry_out(self, vector: int) -> int | None:
        """An intercepted instruction stands at RIP: do it. The vector that is due then: 13, at the instruction, where
        it may not be done; 1, behind it, where the guest steps through itself; else None.
        """
        length = self._system_register(vector) if vector == Native.MSR else self._control_register()
        if length is None:
            return 13
        words = self._unicorn.words
        words[16] += length
        hidden = self._unicorn.hidden
        hidden.value &= ~_SHADOW
        if words[17] & _TRAP:
            self._registers.set_debug_status(_SINGLE_STEP)
            return 1
        return None

    def _system_register(self, _vector: int) -> int | None:
        """RDMSR and WRMSR of what is not there, and EFER: only its WRMSR comes here."""
        words, registers = self._unicorn.words, self._registers
        if words[1] & _LOW != _EFER:
            return None
        value = (words[2] & _LOW) << 32 | words[0] & _LOW
        if value & ~_EFER_BITS or ((value ^ registers.efer()) & _LME and registers.control(0) & PAGING):
            return None
        length, _ = self._opcode()
        self._unicorn.write_msr(_EFER, value)
        return length + 2

    def _opcode(self) -> tuple[int, bytes]:
        """(bytes of prefixes, what follows them)."""
        code, at = self._code(), 0
        wide = self._registers.in_64_bit_code()
        while at < len(code) and (code[at] in PREFIXES or (wide and code[at] & 0xF0 == 0x40)):
            at += 1
        return at, code[at:]

    def _operand(self, prefixes: int, modrm: int) -> int:
        """The general register that ModR/M names, REX included."""
        index = modrm & 7
        if prefixes and self._registers.in_64_bit_code():
            rex = self._code()[prefixes - 1]
            index |= (rex & 1) << 3 if rex & 0xF0 == 0x40 else 0
        value = self._unicorn.words[index]
        return value if self._registers.in_64_bit_code() else value & _LOW

    def _control_register(self) -> int | None:
        prefixes, code = self._opcode()
        registers = self._registers
        if code[:2] == b"\x0F\x06":                                        # CLTS
            self._unicorn.set_cr0(registers.control(0) & ~_TASK_SWITCHED)
            return prefixes + 2
        if code[:2] == b"\x0F\x22" and len(code) > 2:                       # MOV CRn, r
            value = self._operand(prefixes, code[2])
            done = self._set_cr4(value) if code[2] >> 3 & 7 == 4 else self._set_cr0(value)
            return prefixes + 3 if done else None
        if code[:2] == b"\x0F\x01" and len(code) > 2:                       # LMSW: PE can be set, not cleared
            if code[2] >= 0xC0:
                value, length = self._operand(prefixes, code[2]), prefixes + 3
            else:
                value, length = self._memory_operand()
            return length if self._set_cr0(registers.control(0) & ~0xE | value & 0xF) else None
        return None

    def _memory_operand(self) -> tuple[int, int]:
        """The word that LMSW reads, and the instruction's length. Total; ones where nothing can be read."""
        found = decode.memory_operand(self._code(), decode.bits_of(self._registers.get_state()))
        if found is None:
            return 0, 0
        segment, base, index, scale, offset, width, length = found
        words = self._unicorn.words
        address = offset + sum(words[_ORDER[name]] * times for name, times in ((base, 1), (index, scale)) if name)
        linear = (self._registers.base(segment) + (address & (1 << width) - 1)) & _LOW
        return int.from_bytes(self._read(linear).ljust(2, b"\xFF"), "little"), length

    def _set_cr0(self, value: int) -> bool:
        registers = self._registers
        paging, efer = value & PAGING, registers.efer()
        if value > _LOW or (paging and not value & PROTECTED):
            return False
        if value & _NOT_WRITE_THROUGH and not value & _CACHE_DISABLE:
            return False
        if paging and efer & _LME and not registers.control(4) & _PAE:
            return False
        if not paging and efer & LMA and registers.raw_segment(SEGMENTS["cs"])[3] & 1 << 21:
            return False
        self._unicorn.set_cr0(value & _CR0_BITS | _EXTENSION_TYPE)
        return True

    def _set_cr4(self, value: int) -> bool:
        if value & ~_CR4_BITS or (self._registers.efer() & LMA and not value & _PAE):
            return False
        self._unicorn.set_cr4(value)
        return True
