"""Linear to physical through the guest's own page tables, in pure Python.

Theory.  The three layouts of the manual (AMD64 volume 2, chapter 5): 32-bit two-level with
4 MiB pages, PAE three-level and long mode four-level with 2 MiB pages, long mode with 1 GiB pages.
Used to show the instruction a guest died at, and by the software engine to push interrupt frames.

Invariants.  Nothing is written, unless `mark` asks for accessed and dirty bits.  Every read is
checked against the size of memory: tables may lie anywhere, the guest is hostile.  Physical
addresses may lie outside memory: the caller checks the result against what it wants to touch.
Poor: five-level paging, reserved bits, SMEP and SMAP and protection keys are not looked at.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from typing import Final

from .base import CpuState

__all__ = ["PageFault", "PagingMode", "paging_mode", "read_linear", "translate"]

_PG: Final = 1 << 31
_PAE: Final = 1 << 5
_PSE: Final = 1 << 4
_LMA: Final = 1 << 10
_PRESENT, _WRITE, _USER, _ACCESSED, _DIRTY, _LARGE = 1, 2, 4, 0x20, 0x40, 0x80
_QUAD, _LONG = struct.Struct("<Q").unpack_from, struct.Struct("<I").unpack_from
_FRAME: Final = 0x000F_FFFF_FFFF_F000


@dataclass(frozen=True, slots=True)
class PagingMode:
    """What of the control registers decides about translation."""

    paging: bool
    pae: bool
    long: bool
    large: bool            # 4 MiB pages (CR4.PSE)
    protect: bool          # CR0.WP: ring 0 honours read-only pages
    root: int


class PageFault(Exception):
    """No translation. `error` is the error code a processor would push."""

    def __init__(self, linear: int, error: int) -> None:
        super().__init__(f"linear address {linear:#x} is not mapped (error code {error:#x})")
        self.linear = linear
        self.error = error


def paging_mode(state: CpuState) -> PagingMode:
    return PagingMode(
        paging=bool(state.cr0 & _PG), pae=bool(state.cr4 & _PAE), long=bool(state.efer & _LMA),
        large=bool(state.cr4 & _PSE), protect=bool(state.cr0 & 1 << 16), root=state.cr3)


def translate(memory: mmap.mmap, mode: PagingMode, linear: int, *, write: bool = False,
              user: bool = False, mark: bool = False) -> int:
    """The physical address of *linear*; raises PageFault. `mark`: set the tables' accessed and dirty bits."""
    if not mode.paging:
        return linear & 0xFFFF_FFFF
    if mode.long:
        if (linear >> 47) not in (0, 0x1FFFF):
            raise PageFault(linear, 0)           # not canonical: a #GP on a processor
        shifts, table, width = (39, 30, 21, 12), mode.root & _FRAME, 8
    elif mode.pae:
        linear &= 0xFFFF_FFFF
        shifts, table, width = (30, 21, 12), mode.root & 0xFFFF_FFE0, 8
    else:
        linear &= 0xFFFF_FFFF
        shifts, table, width = (22, 12), mode.root & 0xFFFF_F000, 4
    need = (_WRITE if write else 0) | (_USER if user else 0)
    code = (2 if write else 0) | (4 if user else 0)
    rights = _WRITE | _USER
    pae_top = mode.pae and not mode.long          # PAE's top level: 4 entries without rights
    size = len(memory)
    unpack = _QUAD if width == 8 else _LONG
    seen: list[tuple[int, int]] = []              # (address, value that the entry should have)
    for shift in shifts:
        top = pae_top and shift == 30
        at = table + (linear >> shift & (3 if top else 4096 // width - 1)) * width
        if at + width > size:
            raise PageFault(linear, code)
        entry, = unpack(memory, at)
        if not entry & _PRESENT:
            raise PageFault(linear, code)
        if not top:
            rights &= entry
            if mark and not entry & _ACCESSED:
                seen.append((at, entry | _ACCESSED))
        last = shift == 12
        if not last and entry & _LARGE and shift in (30, 22, 21):
            last = mode.large if shift == 22 else shift == 21 or mode.long
        if last:
            lacking = need & ~rights
            if lacking & _USER or (lacking & _WRITE and (user or mode.protect)):
                raise PageFault(linear, code | 1)
            if mark and write and not entry & _DIRTY:
                seen.append((at, entry | _ACCESSED | _DIRTY))
            for at, entry in seen:
                struct.pack_into("<Q" if width == 8 else "<I", memory, at, entry)
            offset = linear & ((1 << shift) - 1)
            frame = entry & (_FRAME if width == 8 else 0xFFFF_F000)
            return (frame & ~((1 << shift) - 1)) | offset
        table = entry & (_FRAME if width == 8 else 0xFFFF_F000)
    raise AssertionError("the last level always ends the walk")


def read_linear(memory: mmap.mmap, mode: PagingMode, linear: int, length: int) -> bytes:
    """Up to *length* bytes at *linear*; fewer where the mapping or the memory ends."""
    out = bytearray()
    while len(out) < length:
        here = linear + len(out)
        try:
            physical = translate(memory, mode, here)
        except PageFault:
            break
        size = min(length - len(out), 4096 - (here & 4095))
        piece = memory[physical:physical + size] if physical < len(memory) else b""
        out += piece
        if len(piece) < size:
            break
    return bytes(out)
