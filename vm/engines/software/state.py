"""Unicorn's processor state as the architecture names it.

Theory.  QEMU keeps segments as caches (selector, base, limit and the descriptor's upper word)
and, beside them, *hidden flags*: the CPL, the widths and the modes, from which translated code is
chosen.  Whoever changes a segment, CR0, CR4 or EFER in place must recompute the hidden flags
(`sync`), exactly as QEMU's own `x86_update_hflags` does.

`get_whole` and `set_whole` are the same for all that a guest can hold in a processor (vm/engines/base.py, WholeState).

Invariant: after `sync`, the hidden flags follow from the architectural state alone.
"""

from __future__ import annotations

import ctypes
import struct
from typing import Final

from ..base import MSRS, CpuState, DescriptorTable, Fpu, Segment, WholeState
from ..portable import canonical
from ..tsc import read_tsc
from .checks import TIGHT, tightness
from .quirks import SEGMENT_SIZE, XMM_SIZE, Unicorn

__all__ = ["SEGMENTS", "Registers", "descriptor_flags", "segment_of"]

# Index of each segment cache in struct CPUX86State.
SEGMENTS: Final = {name: index for index, name in enumerate(
    ("es", "cs", "ss", "ds", "fs", "gs", "ldt", "tr", "gdt", "idt"))}
# base.GPR order -> index in struct CPUX86State
_ORDER: Final = (0, 3, 1, 2, 6, 7, 4, 5, 8, 9, 10, 11, 12, 13, 14, 15, 16)

PROTECTED, PAGING = 1, 1 << 31
LMA, VM86 = 1 << 10, 1 << 17
_IF: Final = 1 << 9
_BUSY, _PRESENT = 2, 1 << 15               # of a task state segment's type; of a descriptor
_HF_CPL, _HF_CS32, _HF_SS32, _HF_ADDSEG, _HF_PE = 3, 1 << 4, 1 << 5, 1 << 6, 1 << 7
_HF_TF, _HF_IOPL, _HF_LMA, _HF_CS64, _HF_VM = 1 << 8, 3 << 12, 1 << 14, 1 << 15, 1 << 17
_HF_OSFXSR = 1 << 22
_HF_INHIBIT = 1 << 3                      # no interrupt before the next instruction is done
_HF_MP_EM_TS = 7 << 9                     # CR0's bits 1, 2, 3 moved up by 8
_COMPUTED = (_HF_CPL | _HF_CS32 | _HF_SS32 | _HF_ADDSEG | _HF_PE | _HF_TF | _HF_IOPL | _HF_LMA
             | _HF_CS64 | _HF_VM | _HF_OSFXSR | _HF_MP_EM_TS | TIGHT)


def descriptor_flags(segment: Segment) -> int:
    """The upper word of a descriptor without base and limit: how QEMU keeps the rights."""
    return (segment.type << 8 | segment.s << 12 | segment.dpl << 13 | segment.present << 15
            | segment.avl << 20 | segment.l << 21 | segment.db << 22 | segment.g << 23)


def segment_of(selector: int, base: int, limit: int, flags: int) -> Segment:
    return Segment(
        selector=selector & 0xFFFF, base=base, limit=limit, type=flags >> 8 & 15,
        s=bool(flags >> 12 & 1), dpl=flags >> 13 & 3, present=bool(flags >> 15 & 1),
        avl=bool(flags >> 20 & 1), l=bool(flags >> 21 & 1), db=bool(flags >> 22 & 1),
        g=bool(flags >> 23 & 1))


class Registers:
    """Reads and writes the state of one instance that is not running."""

    def __init__(self, unicorn: Unicorn, *, tight: bool = True) -> None:
        """*tight*: the hidden flags say how tight the segments are (checks.py)."""
        self._unicorn = unicorn
        self._tight = tight
        self._bytes = unicorn.bytes
        self._words = unicorn.words
        layout = unicorn.layout
        self._segments = layout.segments
        self._control = (ctypes.c_uint64 * 5).from_address(unicorn.env + layout.control)
        self._hidden = ctypes.c_uint32.from_address(unicorn.env + layout.hflags)
        self._debug_status = ctypes.c_uint64.from_address(unicorn.env + layout.debug + 6 * 8)
        self._tsc_offset = ctypes.c_int64.from_address(unicorn.env + layout.tsc_offset)
        self._efer = ctypes.c_uint64.from_address(unicorn.env + layout.msrs["efer"])

    def general(self) -> list[int]:
        words = self._words
        return [*[words[index] for index in _ORDER], self._unicorn.flags()]

    def set_general(self, values: list[int], *, with_ip: bool = True) -> None:
        words = self._words
        for index, value in zip(_ORDER[:16], values, strict=False):
            words[index] = value
        if with_ip:
            words[16] = values[16]
        if values[17] | 2 != self._unicorn.flags():
            self._unicorn.set_flags(values[17])

    def raw_segment(self, index: int) -> tuple[int, int, int, int]:
        """(selector, base, limit, flags) of a cache."""
        return struct.unpack_from("<I4xQII", self._bytes, self._segments + index * SEGMENT_SIZE)

    def set_raw_segment(self, index: int, selector: int, base: int, limit: int, flags: int) -> None:
        struct.pack_into("<I4xQII", self._bytes, self._segments + index * SEGMENT_SIZE,
                         selector, base, limit, flags)

    def base(self, name: str) -> int:
        return self.raw_segment(SEGMENTS[name])[1]

    def control(self, number: int) -> int:
        return self._control[number]

    def set_control(self, number: int, value: int) -> None:
        self._control[number] = value

    def efer(self) -> int:
        return self._efer.value

    def msr(self, name: str) -> int:
        width = "<I" if name == "sysenter_cs" else "<Q"
        return struct.unpack_from(width, self._bytes, self._unicorn.layout.msrs[name])[0]

    def set_debug_status(self, bits: int) -> None:
        """Set these of DR6."""
        self._debug_status.value |= bits

    def clear_local_breakpoints(self) -> None:
        """Of DR7, as a change of task does."""
        struct.pack_into("<B", self._bytes, self._unicorn.layout.debug + 7 * 8,
                         self._bytes[self._unicorn.layout.debug + 7 * 8] & ~0x55 & 0xFF)

    def forget_translations(self) -> None:
        """CR3 has changed."""
        self._unicorn.flush_translations()

    def in_64_bit_code(self) -> bool:
        return bool(self._efer.value & LMA and self.raw_segment(SEGMENTS["cs"])[3] & 1 << 21)

    def may_use_ports(self) -> bool:
        """Whether IOPL, or there being no protection, allows every port."""
        if not self._control[0] & PROTECTED:
            return True
        flags = self._words[17]
        return not flags & VM86 and self.cpl() <= flags >> 12 & 3

    def cpl(self) -> int:
        return self._hidden.value & 3

    def interruptible(self) -> bool:
        """Whether an external interrupt may be taken now: IF is set, STI or a load of SS not just before."""
        return bool(self._words[17] & _IF) and not self._hidden.value & _HF_INHIBIT

    def sync(self) -> None:
        """Recompute the hidden flags. `cpl` follows SS, as QEMU has it."""
        _, ss_base, _, ss = self.raw_segment(SEGMENTS["ss"])
        cs = self.raw_segment(SEGMENTS["cs"])[3]
        cr0, cr4, efer = self.control(0), self.control(4), self.efer()
        eflags = self._words[17]
        protected = bool(cr0 & PROTECTED)
        hidden = self._hidden.value & ~_COMPUTED
        if protected:
            hidden |= _HF_PE | (3 if eflags & VM86 else ss >> 13 & 3)
        hidden |= (cr0 << 8) & _HF_MP_EM_TS
        hidden |= eflags & (_HF_TF | _HF_IOPL | _HF_VM)
        if cr4 & 1 << 9:
            hidden |= _HF_OSFXSR
        if efer & LMA:
            hidden |= _HF_LMA
        if efer & LMA and cs & 1 << 21:
            hidden |= _HF_CS32 | _HF_SS32 | _HF_CS64
        else:
            hidden |= (_HF_CS32 if cs & 1 << 22 else 0) | (_HF_SS32 if ss & 1 << 22 else 0)
            plain = protected and not eflags & VM86 and hidden & _HF_CS32
            if not plain or self.base("ds") | self.base("es") | ss_base:
                hidden |= _HF_ADDSEG
        if self._tight:
            hidden |= tightness([self.raw_segment(index) for index in range(4)])
        self._hidden.value = hidden

    # -- all of it ---------------------------------------------------------------------------

    def get_whole(self) -> WholeState:
        layout = self._unicorn.layout
        return WholeState(
            registers=canonical(self.get_state()), fpu=self._get_fpu(), msrs={name: self.msr(name) for name in MSRS},
            debug=[*struct.unpack_from("<4Q16x2Q", self._bytes, layout.debug)],
            tsc=read_tsc() + self._tsc_offset.value & (1 << 64) - 1,
            shadow=bool(self._hidden.value & _HF_INHIBIT))

    def set_whole(self, whole: WholeState) -> None:
        layout = self._unicorn.layout
        for name, value in whole.msrs.items():
            struct.pack_into("<I" if name == "sysenter_cs" else "<Q", self._bytes, layout.msrs[name],
                             value & 0xFFFF_FFFF if name == "sysenter_cs" else value)
        struct.pack_into("<4Q16x2Q", self._bytes, layout.debug, *whole.debug)
        if whole.tsc is not None:
            # The difference of two 64-bit counters, as a signed number.
            self._tsc_offset.value = ctypes.c_int64(whole.tsc - read_tsc()).value
        self._set_fpu(whole.fpu)
        self.set_state(canonical(whole.registers))
        if whole.shadow:
            self._hidden.value |= _HF_INHIBIT

    # x87's stack: physical registers, of which `top` is ST(0); before them u32 top, u16 status without it, u16 control,
    # 8 bytes of tags (1: empty); behind them u16 opcode, u16 CS, u16 DS, u64 instruction and operand.

    def _get_fpu(self) -> Fpu:
        at = self._unicorn.layout.fpregs
        top, status, control = struct.unpack_from("<IHH", self._bytes, at - 20)
        tags = self._bytes[at - 12:at - 4]
        opcode, instruction, operand = struct.unpack_from("<H6xQQ", self._bytes, at + 128)
        words = [self._number(at + 16 * (top + n & 7), 10) for n in range(8)]
        xmm = self._unicorn.layout.xmm
        return Fpu(
            control=control, status=status & ~0x3800 | top << 11, tags=sum(1 << n for n in range(8) if not tags[n]),
            opcode=opcode, instruction=instruction, operand=operand, st=words,
            xmm=[self._number(xmm + XMM_SIZE * n, 16) for n in range(16)],
            mxcsr=struct.unpack_from("<I", self._bytes, self._unicorn.layout.mxcsr)[0])

    def _number(self, at: int, length: int) -> int:
        return int.from_bytes(self._bytes[at:at + length], "little")

    def _set_fpu(self, fpu: Fpu) -> None:
        at, view = self._unicorn.layout.fpregs, self._bytes
        top = fpu.status >> 11 & 7
        self._unicorn.set_control_words(fpu.control, fpu.mxcsr)
        struct.pack_into("<IH", view, at - 20, top, fpu.status & ~0x3800)
        view[at - 12:at - 4] = bytes(not fpu.tags >> n & 1 for n in range(8))
        struct.pack_into("<H6xQQ", view, at + 128, fpu.opcode, fpu.instruction, fpu.operand)
        for n, value in enumerate(fpu.st):
            place = at + 16 * (top + n & 7)
            view[place:place + 10] = value.to_bytes(10, "little")
        xmm = self._unicorn.layout.xmm
        for n, value in enumerate(fpu.xmm):
            view[xmm + XMM_SIZE * n:xmm + XMM_SIZE * n + 16] = value.to_bytes(16, "little")

    def get_state(self) -> CpuState:
        state = CpuState(gpr=self.general())
        for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt"):
            setattr(state, name, segment_of(*self.raw_segment(SEGMENTS[name])))
        state.tr.type |= _BUSY                                        # BUSY_TSS
        for name in ("gdt", "idt"):
            _, base, limit, _ = self.raw_segment(SEGMENTS[name])
            setattr(state, name, DescriptorTable(base, limit & 0xFFFF))
        state.cr0, state.cr2 = self.control(0), self.control(2)
        state.cr3, state.cr4, state.efer = self.control(3), self.control(4), self.efer()
        return state

    def set_state(self, state: CpuState) -> None:
        for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt"):
            segment: Segment = getattr(state, name)
            flags = descriptor_flags(segment)
            if name == "tr":
                flags = (flags | _PRESENT) & ~(_BUSY << 8)            # BUSY_TSS
            self.set_raw_segment(SEGMENTS[name], segment.selector, segment.base, segment.limit, flags)
        for name in ("gdt", "idt"):
            table: DescriptorTable = getattr(state, name)
            self.set_raw_segment(SEGMENTS[name], 0, table.base, table.limit, 0)
        for number, value in ((0, state.cr0), (2, state.cr2), (3, state.cr3), (4, state.cr4)):
            self.set_control(number, value)
        self._efer.value = state.efer
        self._unicorn.set_flags(state.gpr[17])
        self.set_general(state.gpr)
        self._hidden.value &= ~_HF_INHIBIT
        self.sync()
        self._unicorn.flush_translations()
