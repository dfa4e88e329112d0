"""The state in which a `flat` guest starts: 16, 32 or 64 bits, the same on every engine.

Theory.  A flat image is bytes at an address; no firmware prepares the processor for it.  So
this writes the few tables a mode needs into low guest memory and returns the registers:

16 bits   real mode; CS:IP is the entry as (entry & ~0xFFFF) >> 4 : entry & 0xFFFF; DS = ES = CS;
          SS:SP = 0:7000.  Nothing is written.
32 bits   protected mode, ring 0, no paging, segments of 4 GiB from 0; ESP = 0x8000.
64 bits   long mode, ring 0, RSP = 0x8000; identity page tables over all of memory in 2 MiB pages,
          readable, writable and executable in every ring.

Map of what is written (32 bits: the GDT alone):

    0x1000          PML4
    0x2000          PDPT
    0x3000..0x6fff  page directories, one a GiB, as many as memory needs
    0x7000          GDT: 08 code ring 0, 10 data ring 0, 18 32-bit code ring 3, 20 data ring 3,
                    28 64-bit code ring 3, 30 data ring 3, 38 TSS (64 bits only). The order serves
                    SYSEXIT (SYSENTER_CS = 08) and SYSRET (STAR[63:48] = 18).
    0x7100          TSS: RSP0 = 0x8000, and an I/O bitmap that lets ring 3 use ports 0 to 0x3ff
                    (PVM drops IOPL, so the bitmap is the way that works everywhere); TR holds it
    0x7200..0x7fff  the stack, growing down from 0x8000

Interrupts are off, the IDT is empty (limit 0) but in real mode, where it is the usual one.
A guest image is therefore loaded at 0x8000 or above.
"""

from __future__ import annotations

import mmap
import struct
from typing import Final

from .base import RDX, RIP, RSP, CpuState, DescriptorTable, EngineError, Segment

__all__ = ["FLAT_IMAGE_MIN", "GDT_BYTES", "flat_state", "protected_state", "reset_state"]

FLAT_IMAGE_MIN: Final = 0x8000
GIB: Final = 1 << 30
_PML4, _PDPT, _PD, _GDT, _TSS, _STACK = 0x1000, 0x2000, 0x3000, 0x7000, 0x7100, 0x8000
_CODE, _DATA, _TSS_SELECTOR = 0x08, 0x10, 0x38
_TSS_BITMAP: Final = 104                           # offset; behind it a byte per 8 ports
_TSS_SIZE: Final = _TSS_BITMAP + 0x400 // 8 + 1    # the last byte is all ones, as the manual asks
_USER_PAGE, _USER_LARGE_PAGE = 0x07, 0x87          # present, writable, user, (2 MiB)

_GDT_64: Final = (
    0,
    0x00AF_9B00_0000_FFFF,      # 08 64-bit code, ring 0
    0x00CF_9300_0000_FFFF,      # 10 data, ring 0
    0x00CF_FB00_0000_FFFF,      # 18 32-bit code, ring 3
    0x00CF_F300_0000_FFFF,      # 20 data, ring 3
    0x00AF_FB00_0000_FFFF,      # 28 64-bit code, ring 3
    0x00CF_F300_0000_FFFF,      # 30 data, ring 3
    0x0000_8B00_0000_0000 | (_TSS << 16) | (_TSS_SIZE - 1),      # 38 64-bit TSS, busy
    0,
)
_GDT_32: Final = (0, 0x00CF_9B00_0000_FFFF, *_GDT_64[2:5])
GDT_BYTES: Final = 8 * len(_GDT_32)   # of 32-bit protected mode


def flat_state(memory: mmap.mmap, bits: int, entry: int) -> CpuState:
    """Write the tables and return the registers for a guest that starts at *entry* (linear).

    Raises EngineError when the entry or the tables do not fit memory or the mode.
    """
    if not 0 <= entry < len(memory):
        raise EngineError(f"entry {entry:#x} is outside the guest's {len(memory)} bytes of memory")
    if bits == 16:
        return _real(entry)
    if bits not in (32, 64):
        raise EngineError(f"bits = {bits}: a flat guest starts in 16, 32 or 64 bits")
    if len(memory) < FLAT_IMAGE_MIN:
        raise EngineError(f"{bits}-bit flat guests need {FLAT_IMAGE_MIN} bytes of memory at least")
    return protected_state(memory, entry) if bits == 32 else _long(memory, entry)


def reset_state() -> CpuState:
    """A processor after RESET: real mode at F000:FFF0, where CS still has its base at the top of 4 GiB."""
    state = CpuState(cr0=0x6000_0010)
    state.cs = Segment(selector=0xF000, base=0xFFFF_0000, type=11)
    state.gpr[RIP] = 0xFFF0
    state.gpr[RDX] = 0x600                 # family 6: what CPUID says of family and model
    return state


def _real(entry: int) -> CpuState:
    if entry > 0xF_FFFF:
        raise EngineError(f"entry {entry:#x}: a 16-bit guest starts below 0x100000")
    base = entry & ~0xFFFF
    state = CpuState()
    for name, kind in (("cs", 11), ("ds", 3), ("es", 3)):
        setattr(state, name, Segment(selector=base >> 4, base=base, type=kind))
    state.gpr[RIP] = entry & 0xFFFF
    state.gpr[RSP] = 0x7000
    return state


def _flat(selector: int, *, code: bool, long: bool = False) -> Segment:
    return Segment(selector=selector, limit=0xFFFF_FFFF, type=11 if code else 3, db=not long,
                   l=long, g=True)


def _segments(state: CpuState, *, long: bool) -> None:
    state.cs = _flat(_CODE, code=True, long=long)
    for name in ("ds", "es", "fs", "gs", "ss"):
        setattr(state, name, _flat(_DATA, code=False))
    state.idt = DescriptorTable(0, 0)


def _write_gdt(memory: mmap.mmap, state: CpuState, descriptors: tuple[int, ...], at: int = _GDT) -> None:
    table = struct.pack(f"<{len(descriptors)}Q", *descriptors)
    memory[at:at + len(table)] = table
    state.gdt = DescriptorTable(at, len(table) - 1)


def protected_state(memory: mmap.mmap, entry: int, *, gdt: int = _GDT, stack: int = _STACK) -> CpuState:
    """32-bit protected mode with flat segments: `GDT_BYTES` are written at *gdt*."""
    state = CpuState(cr0=0x11)
    _segments(state, long=False)
    _write_gdt(memory, state, _GDT_32, gdt)
    state.gpr[RIP], state.gpr[RSP] = entry, stack
    return state


def _long(memory: mmap.mmap, entry: int) -> CpuState:
    directories = -(-len(memory) // GIB)
    if directories > 4:
        raise EngineError("64-bit flat guests have at most 4 GiB of memory")
    tables = bytearray(_GDT - _PML4)
    struct.pack_into("<Q", tables, 0, _PDPT | _USER_PAGE)
    for number in range(directories):
        struct.pack_into("<Q", tables, _PDPT - _PML4 + number * 8,
                         _PD + number * 0x1000 | _USER_PAGE)
    for number in range(-(-len(memory) // 0x20_0000)):
        struct.pack_into("<Q", tables, _PD - _PML4 + number * 8, number << 21 | _USER_LARGE_PAGE)
    memory[_PML4:_GDT] = bytes(tables)
    bitmap = bytes(_TSS_SIZE - _TSS_BITMAP - 1) + b"\xFF"
    memory[_TSS:_TSS + _TSS_SIZE] = struct.pack("<4xQ90xH", _STACK, _TSS_BITMAP) + bitmap
    # CR0: paging, write protect, numeric errors, extension type, monitor, protection.
    # CR4: PAE, SSE and its exceptions. EFER: system calls, long mode, no-execute.
    state = CpuState(cr0=0x8005_0033, cr3=_PML4, cr4=0x620, efer=0xD01)
    _segments(state, long=True)
    _write_gdt(memory, state, _GDT_64)
    state.tr = Segment(selector=_TSS_SELECTOR, base=_TSS, limit=_TSS_SIZE - 1, type=11, s=False)
    state.gpr[RIP], state.gpr[RSP] = entry, _STACK
    return state
