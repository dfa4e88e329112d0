"""Interrupts and exceptions, delivered by the host as a processor would.

Theory.  Unicorn stops at an interrupt and says its vector; from there on the manual's algorithm
(Intel SDM volume 3, 6.12 and 6.14; AMD64 volume 2, 8.7 and 8.9) is followed: find the gate
in the guest's table, check it, find the new stack (the TSS when the ring changes), write the
frame, load CS, SS and the instruction pointer.  Real mode, 16 and 32-bit gates with the change from
virtual-8086 mode, and 64-bit gates with interrupt stacks.

A fault on the way is itself delivered: two contributory ones, or anything after a page fault,
become a double fault, and a fault in that a triple fault (SDM volume 3, table 6-5).  A task gate
switches tasks (`tasks.py`).

Invariants.  Nothing is changed before every check and every address translation has succeeded, so
a fault on the way leaves the state of the interrupted instruction.  All of guest memory is
hostile: every read and write is bounded.

Poor: frames written over code that was translated before do not refresh it.
"""

from __future__ import annotations

import ctypes
import enum
import mmap
import struct
from collections.abc import Callable
from typing import Final

from ..paging import PageFault, PagingMode, read_linear, translate
from .quirks import Native
from .state import LMA, PAGING, PROTECTED, SEGMENTS, VM86, Registers
from .tasks import BAD_TSS, NOT_PRESENT, PROTECTION, STACK, Fault, base_limit, switch

__all__ = ["Cause", "Delivery", "Refused", "TripleFault"]

_DOUBLE_FAULT, _PAGE = 8, 14
_CONTRIBUTORY: Final = frozenset((0, BAD_TSS, NOT_PRESENT, STACK, PROTECTION))
_FAULTS: Final = frozenset((0, 5, 6, 7, 10, 11, 12, 13, 14, 16, 17, 19))      # the others are traps and aborts
_IF, _TF, _NT, _RF, _AC = 1 << 9, 1 << 8, 1 << 14, 1 << 16, 1 << 18
_CS, _SS, _DS, _ES, _FS, _GS = (SEGMENTS[name] for name in ("cs", "ss", "ds", "es", "fs", "gs"))
_DATA_SELECTORS: Final = (_GS, _FS, _DS, _ES)
_CR2: Final = 2
_BITMAP_POINTER: Final = 0x66        # in a 32 or 64-bit TSS
_CODE, _DOWN, _BIG = 1 << 11, 1 << 10, 1 << 22       # of a segment's flags
_WIDTH_FORMATS: Final = {2: "<H", 4: "<I", 8: "<Q"}


class Cause(enum.Enum):
    """What an interrupt comes from: it decides how the gate is checked, and what a further fault makes of it."""

    EXCEPTION = "exception"
    INSTRUCTION = "instruction"          # INT n, INT3, INTO: the gate's DPL is checked
    EXTERNAL = "external"                # a device: the vector may be any exception's, and is none


class TripleFault(Exception):
    """A fault while the double fault was delivered: a PC resets."""


class Refused(Exception):
    """A port that the guest's ring may not use: what is due at the instruction instead."""

    def __init__(self, vector: int, error: int | None) -> None:
        super().__init__(f"fault {vector}")
        self.vector, self.error = vector, error


class Delivery:
    """Delivers into one vCPU. `changed` is told of host writes over guest memory."""

    def __init__(self, memory: mmap.mmap, registers: Registers,
                 flags: Callable[[], int], set_flags: Callable[[int], None],
                 words: ctypes.Array[ctypes.c_uint64]) -> None:
        self._memory = memory
        self.registers = registers
        self._flags = flags
        self.set_flags = set_flags
        self.words = words
        self._mode_key: tuple[int, ...] = ()
        self._mode_made = PagingMode(paging=False, pae=False, long=False, large=False, protect=False, root=0)
        self._mode = self._paging()
        self._walked: dict[tuple[int, bool, bool], int] = {}       # page walks of this delivery

    # -- entry -------------------------------------------------------------------------------

    def deliver(self, vector: int, error: int | None, cause: Cause) -> None:
        """Deliver *vector*. Raises TripleFault."""
        if vector >= Native.SYSCALL:
            self._system_call(vector)
            return
        instruction = cause is Cause.INSTRUCTION
        first: int | None = vector if cause is Cause.EXCEPTION else None
        while True:
            try:
                # A fault saves RF, so that a breakpoint at its instruction does not come again (SDM volume 3, 17.3.1).
                self._through_gate(vector, error, instruction, _RF if first in _FAULTS else 0)
                return
            except Fault as fault:
                if fault.linear is not None:
                    self.registers.set_control(_CR2, fault.linear)
                if first == _DOUBLE_FAULT:
                    raise TripleFault from fault
                if instruction and not fault.behind:
                    # Such a fault is INT's own: it stands at the instruction, not behind it.
                    self.words[16] -= self._length_of_int(vector)
                instruction = False
                second = fault.vector
                cause = Cause.EXCEPTION
                if (first == _PAGE and (second == _PAGE or second in _CONTRIBUTORY)) or (
                        first in _CONTRIBUTORY and second in _CONTRIBUTORY):
                    first, vector, error = _DOUBLE_FAULT, _DOUBLE_FAULT, 0
                else:
                    first, vector, error = second, second, fault.error

    def return_from_task(self, following: int) -> None:
        """IRET at the instruction pointer, with NT set; *following* is the next instruction. Raises TripleFault."""
        registers = self.registers
        self.new_directory()
        try:
            _, base, _, _ = registers.raw_segment(SEGMENTS["tr"])
            selector = int.from_bytes(self.read(base, 2), "little")
            switch(self, selector, 0, following, self._flags(), back=True)
        except Fault as fault:
            if fault.linear is not None:
                registers.set_control(_CR2, fault.linear)
            self.deliver(fault.vector, fault.error, Cause.EXCEPTION)

    def _length_of_int(self, vector: int) -> int:
        """Bytes of the INT n (CD n), INT3, INT1 or INTO that stands before the instruction pointer."""
        mode = self._paging()
        base = 0 if mode.long else self.registers.raw_segment(_CS)[1]
        code = read_linear(self._memory, mode, base + self.words[16] - 2, 2)
        return 2 if code == bytes((0xCD, vector)) else 1

    # -- memory ------------------------------------------------------------------------------

    def _paging(self) -> PagingMode:
        registers = self.registers
        key = registers.control(0), registers.control(3), registers.control(4), registers.efer()
        if key != self._mode_key:
            cr0, root, cr4, efer = key
            self._mode_key, self._mode_made = key, PagingMode(
                paging=bool(cr0 & PAGING), pae=bool(cr4 & 1 << 5), long=bool(efer & LMA),
                large=bool(cr4 & 1 << 4), protect=bool(cr0 & 1 << 16), root=root)
        return self._mode_made

    def pieces(self, linear: int, length: int, *, write: bool,
                user: bool) -> list[tuple[int, int]]:
        mode = self._mode
        if not mode.long:
            linear &= 0xFFFF_FFFF
        pieces: list[tuple[int, int]] = []
        done = 0
        while done < length:
            here = linear + done
            offset = here & 4095
            size = min(length - done, 4096 - offset)
            key = (here - offset, write, user)
            frame = self._walked.get(key)
            if frame is None:
                try:
                    frame = translate(self._memory, mode, here, write=write, user=user, mark=True) - offset
                except PageFault as fault:
                    raise Fault(_PAGE, fault.error, linear=here) from fault
                self._walked[key] = frame
            pieces.append((frame + offset, size))
            done += size
        return pieces

    def read(self, linear: int, length: int) -> bytes:
        out = bytearray()
        for physical, size in self.pieces(linear, length, write=False, user=False):
            piece = self._memory[physical:physical + size] if physical < len(self._memory) else b""
            out += piece + b"\xFF" * (size - len(piece))         # no memory there: reads ones
        return bytes(out)

    def write(self, pieces: list[tuple[int, int]], data: bytes) -> None:
        done = 0
        for physical, size in pieces:
            end = min(physical + size, len(self._memory))
            if physical < end:                                   # writes beyond memory are ignored
                self._memory[physical:end] = data[done:done + end - physical]
            done += size

    # -- ports -------------------------------------------------------------------------------

    def check_port(self, port: int, size: int) -> None:
        """The bitmap in the TSS (SDM volume 1, 19.5.2). Raises Refused with what is due instead."""
        selector, base, limit, flags = self.registers.raw_segment(SEGMENTS["tr"])
        self._mode = self._paging()
        self._walked.clear()
        try:
            if not flags & 1 << 15 or not flags >> 8 & 8 or not selector & ~3 or limit < _BITMAP_POINTER + 1:
                raise Fault(PROTECTION)
            at = int.from_bytes(self.read(base + _BITMAP_POINTER, 2), "little") + port // 8
            if at + 1 > limit:
                raise Fault(PROTECTION)
            bits = int.from_bytes(self.read(base + at, 2), "little")
            if bits >> port % 8 & (1 << size) - 1:
                raise Fault(PROTECTION)
        except Fault as fault:
            if fault.linear is not None:
                self.registers.set_control(_CR2, fault.linear)
            raise Refused(fault.vector, fault.error) from None

    # -- gates -------------------------------------------------------------------------------

    def _through_gate(self, vector: int, error: int | None, instruction: bool, resume: int) -> None:
        registers = self.registers
        if not registers.control(0) & PROTECTED:
            self._real(vector)
            return
        self.new_directory()
        if registers.efer() & LMA:
            self._long(vector, error, instruction, resume)
        else:
            self._protected(vector, error, instruction, resume)

    def _real(self, vector: int) -> None:
        """Kept short: every BIOS call of a guest comes through here."""
        registers, words, memory = self.registers, self.words, self._memory
        _, table, limit, _ = registers.raw_segment(SEGMENTS["idt"])
        if vector * 4 + 3 > limit:
            raise Fault(PROTECTION)
        at = table + vector * 4
        target, selector = struct.unpack("<HH", memory[at:at + 4].ljust(4, b"\xFF"))
        flags = self._flags()
        cs, ss = registers.raw_segment(_CS), registers.raw_segment(_SS)
        stack, pointer = ss[1], words[4]
        low = pointer & 0xFFFF
        # Of a whole 64 KiB only the last byte is no place for a word.
        if (low & 1 or ss[2] != 0xFFFF) and not all(_within(ss, (low - at) & 0xFFFF, 2) for at in (2, 4, 6)):
            raise Fault(STACK)
        for value in (flags, cs[0], words[16]):
            low = (low - 2) & 0xFFFF
            if stack + low + 2 <= len(memory):              # writes beyond memory are ignored
                struct.pack_into("<H", memory, stack + low, value & 0xFFFF)
        words[4] = (pointer & ~0xFFFF) | low
        self.set_flags(flags & ~(_IF | _TF | _AC | _RF))
        registers.set_raw_segment(_CS, selector, selector << 4, *cs[2:])
        words[16] = target
        if flags & _TF:
            registers.sync()                                # the only hidden flag that changed

    def _gate(self, vector: int, size: int, instruction: bool) -> tuple[bytes, int]:
        external = 0 if instruction else 1
        _, table, limit, _ = self.registers.raw_segment(SEGMENTS["idt"])
        code = vector * 8 | 2 | external
        if vector * size + size - 1 > limit:
            raise Fault(PROTECTION, code)
        return self.read(table + vector * size, size), code

    def _code_descriptor(self, selector: int, external: int) -> tuple[int, int]:
        """Both words of the code descriptor that a gate names, checked."""
        if not selector & ~3:
            raise Fault(PROTECTION, external)
        low, high = self.descriptor(selector, PROTECTION, external)
        if not high & 1 << 12 or not high & 1 << 11 or (high >> 13 & 3) > self.registers.cpl():
            raise Fault(PROTECTION, selector & ~3 | external)
        if not high & 1 << 15:
            raise Fault(NOT_PRESENT, selector & ~3 | external)
        return low, high

    def descriptor(self, selector: int, fault: int, external: int) -> tuple[int, int]:
        table = "ldt" if selector & 4 else "gdt"
        _, base, limit, _ = self.registers.raw_segment(SEGMENTS[table])
        if (selector & ~7) + 7 > limit:
            raise Fault(fault, selector & ~3 | external)
        low, high = struct.unpack("<II", self.read(base + (selector & ~7), 8))
        return low, high

    def _protected(self, vector: int, error: int | None, instruction: bool, resume: int) -> None:
        registers, words = self.registers, self.words
        external = 0 if instruction else 1
        gate, code = self._gate(vector, 8, instruction)
        low, selector, kind = struct.unpack_from("<HHxB", gate)
        high, = struct.unpack_from("<H", gate, 6)
        form = kind & 0x1F
        if form not in (5, 6, 7, 14, 15):
            raise Fault(PROTECTION, code)
        if instruction and (kind >> 5 & 3) < registers.cpl():
            raise Fault(PROTECTION, code)
        if not kind & 0x80:
            raise Fault(NOT_PRESENT, code)
        if form == 5:
            switch(self, selector, external, words[16], self._flags() | resume, error)
            return
        width = 4 if form & 8 else 2
        target = low | (high << 16 if width == 4 else 0)
        cs_low, cs_high = self._code_descriptor(selector, external)
        ring = registers.cpl() if cs_high & 1 << 10 else cs_high >> 13 & 3
        flags, virtual = self._flags(), bool(self._flags() & VM86)
        if virtual and ring != 0:
            raise Fault(PROTECTION, selector & ~3 | external)
        old_ss, old_cs = registers.raw_segment(_SS), registers.raw_segment(_CS)
        frame: list[int] = []
        stack_code = external
        if ring < registers.cpl():
            pointer, ss_selector = self._ring_stack(ring, external)
            ss = self._stack_segment(ss_selector, ring, external)
            stack_code |= ss_selector & ~3
            if virtual:
                frame += [registers.raw_segment(index)[0] for index in _DATA_SELECTORS]
            frame += [old_ss[0], words[4]]
        else:
            pointer, ss = words[4], old_ss
        frame += [flags | resume, old_cs[0], words[16]]
        if error is not None:
            frame.append(error)
        mask = 0xFFFF_FFFF if ss[3] & 1 << 22 else 0xFFFF
        mask_value = (1 << width * 8) - 1
        data = b"".join(
            struct.pack(_WIDTH_FORMATS[width], value & mask_value) for value in reversed(frame))
        new = (pointer & ~mask & 0xFFFF_FFFF) | ((pointer - len(data)) & mask)
        if not all(_within(ss, (new + at) & mask, width) for at in range(0, len(data), width)):
            raise Fault(STACK, stack_code)
        if target > base_limit(cs_low, cs_high)[1]:
            raise Fault(PROTECTION, external)
        # A stack that is empty, or nearly so, goes on at its other end.
        before_end = min(len(data), mask + 1 - (new & mask))
        pieces = self.pieces(ss[1] + (new & mask), before_end, write=True, user=ring == 3)
        if before_end < len(data):
            pieces += self.pieces(ss[1], len(data) - before_end, write=True, user=ring == 3)
        self.write(pieces, data)
        words[4] = new
        if ring < registers.cpl():
            registers.set_raw_segment(_SS, *ss)
            if virtual:
                for index in _DATA_SELECTORS:
                    registers.set_raw_segment(index, 0, 0, 0, 0)
        self._enter(selector & ~3 | ring, cs_low, cs_high, target,
                    flags & ~(_TF | _NT | _RF | VM86 | (0 if form & 1 else _IF)))

    def push(self, value: int, width: int, external: int) -> None:
        """One value on the stack as it is. Raises Fault."""
        ss, pointer = self.registers.raw_segment(_SS), self.words[4]
        mask = 0xFFFF_FFFF if ss[3] & _BIG else 0xFFFF
        at = (pointer - width) & mask
        if not _within(ss, at, width):
            raise Fault(STACK, external)
        self.write(self.pieces(ss[1] + at, width, write=True, user=self.registers.cpl() == 3),
                   struct.pack(_WIDTH_FORMATS[width], value & (1 << width * 8) - 1))
        self.words[4] = pointer & ~mask & 0xFFFF_FFFF | at

    def new_directory(self) -> None:
        """Look at the tables anew: CR3 may have changed."""
        self._mode = self._paging()
        self._walked.clear()

    def _ring_stack(self, ring: int, external: int) -> tuple[int, int]:
        """(stack pointer, stack selector) for *ring* from the TSS, 16 or 32-bit."""
        selector, base, limit, flags = self.registers.raw_segment(SEGMENTS["tr"])
        wide = bool(flags >> 8 & 8)
        at, size = (4 + ring * 8, 8) if wide else (2 + ring * 4, 4)
        if not flags & 1 << 15 or at + size - 1 > limit:
            raise Fault(BAD_TSS, selector & ~3 | external)
        pointer, stack = struct.unpack("<IH2x" if wide else "<HH", self.read(base + at, size))
        return pointer, stack

    def _stack_segment(self, selector: int, ring: int, external: int) -> tuple[int, int, int, int]:
        if not selector & ~3 or selector & 3 != ring:
            raise Fault(BAD_TSS, selector & ~3 | external)
        low, high = self.descriptor(selector, BAD_TSS, external)
        writable = high & 1 << 12 and not high & 1 << 11 and high & 1 << 9
        if (high >> 13 & 3) != ring or not writable:
            raise Fault(BAD_TSS, selector & ~3 | external)
        if not high & 1 << 15:
            raise Fault(STACK, selector & ~3 | external)
        return selector, *base_limit(low, high), high

    def _long(self, vector: int, error: int | None, instruction: bool, resume: int) -> None:
        registers, words = self.registers, self.words
        external = 0 if instruction else 1
        gate, code = self._gate(vector, 16, instruction)
        low, selector, stack_table, kind, middle, high = struct.unpack_from("<HHBBHI", gate)
        form = kind & 0x1F
        if form not in (14, 15):
            raise Fault(PROTECTION, code)
        if instruction and (kind >> 5 & 3) < registers.cpl():
            raise Fault(PROTECTION, code)
        if not kind & 0x80:
            raise Fault(NOT_PRESENT, code)
        cs_low, cs_high = self._code_descriptor(selector, external)
        if not cs_high & 1 << 21 or cs_high & 1 << 22:
            raise Fault(PROTECTION, selector & ~3 | external)
        ring = registers.cpl() if cs_high & 1 << 10 else cs_high >> 13 & 3
        old_ss, old_cs = registers.raw_segment(_SS), registers.raw_segment(_CS)
        if stack_table & 7:
            pointer = self._tss64(0x24 + ((stack_table & 7) - 1) * 8)
        elif ring < registers.cpl():
            pointer = self._tss64(4 + ring * 8)
        else:
            pointer = words[4]
        flags = self._flags()
        frame = [old_ss[0], words[4], flags | resume, old_cs[0], words[16]]
        if error is not None:
            frame.append(error)
        data = struct.pack(f"<{len(frame)}Q", *reversed(frame))
        new = ((pointer & ~15) - len(data)) & 0xFFFF_FFFF_FFFF_FFFF
        if (new >> 47) not in (0, 0x1FFFF):
            raise Fault(STACK, 0)
        self.write(self.pieces(new, len(data), write=True, user=ring == 3), data)
        words[4] = new
        if ring < registers.cpl():
            registers.set_raw_segment(_SS, ring, 0, 0, ring << 13)     # a null selector
        self._enter(selector & ~3 | ring, cs_low, cs_high, low | middle << 16 | high << 32,
                    flags & ~(_TF | _NT | _RF | (0 if form & 1 else _IF)))

    def _tss64(self, offset: int) -> int:
        selector, base, limit, flags = self.registers.raw_segment(SEGMENTS["tr"])
        if not flags & 1 << 15 or offset + 7 > limit:
            raise Fault(BAD_TSS, selector & ~3)
        return struct.unpack("<Q", self.read(base + offset, 8))[0]

    def _enter(self, selector: int, low: int, high: int, target: int, flags: int) -> None:
        registers = self.registers
        ring = selector & 3
        cs_flags = (high | 1 << 8) & ~(3 << 13) | ring << 13
        registers.set_raw_segment(_CS, selector, *base_limit(low, high), cs_flags)
        self.set_flags(flags)
        self.words[16] = target
        registers.sync()

    # -- system calls ------------------------------------------------------------------------

    def _system_call(self, vector: int) -> None:
        """SYSCALL (AMD64 volume 3) and SYSENTER (SDM volume 2); RIP is behind the instruction."""
        registers, words = self.registers, self.words
        flags = self._flags()
        if vector == Native.SYSCALL:
            if not registers.efer() & 1:
                words[16] -= 2
                self.deliver(6, None, Cause.EXCEPTION)
                return
            star = registers.msr("star")
            selector = star >> 32 & 0xFFFC
            wide = bool(registers.efer() & LMA)
            words[1] = words[16]                                       # rcx
            if wide:
                words[11] = flags & ~_RF
                target, keep = registers.msr("lstar"), ~registers.msr("fmask")
            else:
                target, keep = star & 0xFFFF_FFFF, ~(VM86 | _IF | _RF)
        else:
            selector = registers.msr("sysenter_cs") & 0xFFFC
            if not selector or not registers.control(0) & PROTECTED:
                words[16] -= 2
                self.deliver(PROTECTION, 0, Cause.EXCEPTION)
                return
            wide = bool(registers.efer() & LMA)
            words[4] = registers.msr("sysenter_esp")
            target, keep = registers.msr("sysenter_eip"), ~(VM86 | _IF | _RF)
        code = 0x9B00 | 1 << 23 | (1 << 21 if wide else 1 << 22)
        registers.set_raw_segment(_CS, selector, 0, 0xFFFF_FFFF, code)
        registers.set_raw_segment(_SS, selector + 8, 0, 0xFFFF_FFFF, 0x9300 | 1 << 23 | 1 << 22)
        self.set_flags(flags & keep & ~_RF)
        words[16] = target
        registers.sync()


def _within(segment: tuple[int, int, int, int], offset: int, size: int) -> bool:
    """Whether these bytes are inside a data segment's limit."""
    _, _, limit, flags = segment
    last = offset + size - 1
    if flags & (_CODE | _DOWN) == _DOWN:
        return offset > limit and last <= (0xFFFF_FFFF if flags & _BIG else 0xFFFF)
    return last <= limit or limit == 0xFFFF_FFFF
