"""The BIOS' bytes: stubs, tables, interrupt vectors, data area.

Layout of segment F000 (linear F0000h):

| offset | what |
|---|---|
| n * 8 | stub of vector n: `out BIOS_PORT, al` / `iret` |
| 0800h | handlers.bin: interrupt handlers, and the entries of services that need code of their own |
| E401h | parameter tables of two hard disks (vectors 41h, 46h) |
| E6F5h | configuration table (INT 15h/C0h) |
| EFC7h | diskette parameter table (vector 1Eh), at IBM's address |
| FFEFh | the drive it boots from; FFF0h reset entry, date at FFF5h, model FCh (AT) at FFFEh |

Segment registers can only be loaded by the guest itself, and interrupts are the guest's own code:
hence handlers.asm, whose bytes lie beside it (a test assembles them anew).
Source of addresses and layouts: IBM PC/AT Technical Reference, Ralf Brown's interrupt list.
"""

from __future__ import annotations

import functools
import importlib.resources
import struct
from collections.abc import Mapping
from typing import Final

from ...disks.geometry import Geometry
from ..memory import GuestMemory

__all__ = [
    "BDA", "BDA_COLUMNS", "BDA_CURSOR", "BDA_CURSOR_SHAPE", "BDA_EQUIPMENT", "BDA_FLOPPY_STATUS",
    "BDA_HARD_STATUS", "BDA_KEY_HEAD",
    "BDA_KEY_TAIL", "BDA_MEMORY_KIB", "BDA_MIDNIGHT", "BDA_MODE", "BDA_PAGE", "BDA_PAGE_BYTES",
    "BDA_PAGE_START", "BDA_SHIFTS", "BDA_TICKS", "BIOS_PORT", "BIOS_SEGMENT", "CONVENTIONAL_KIB", "STUB_BYTES",
    "entries", "install",
]

BIOS_PORT: Final = 0xB0
BIOS_SEGMENT: Final = 0xF000
STUB_BYTES: Final = 8
CONVENTIONAL_KIB: Final = 639                  # the last KiB is the extended BIOS data area's

BDA: Final = 0x400
BDA_EQUIPMENT: Final = 0x410
BDA_MEMORY_KIB: Final = 0x413
BDA_SHIFTS: Final = 0x417                      # shift (1, 2), Ctrl (4), Alt (8) held
BDA_KEY_HEAD: Final = 0x41A
BDA_KEY_TAIL: Final = 0x41C
BDA_KEYS: Final = 0x1E                         # offsets within the BDA's segment 40h
BDA_KEYS_END: Final = 0x3E
BDA_FLOPPY_STATUS: Final = 0x441               # of the last INT 13h call
BDA_HARD_STATUS: Final = 0x474
BDA_MODE: Final = 0x449
BDA_COLUMNS: Final = 0x44A
BDA_PAGE_BYTES: Final = 0x44C
BDA_PAGE_START: Final = 0x44E
BDA_CURSOR: Final = 0x450                      # 8 pages, (column, row)
BDA_CURSOR_SHAPE: Final = 0x460
BDA_PAGE: Final = 0x462
BDA_TICKS: Final = 0x46C
BDA_MIDNIGHT: Final = 0x470

_HANDLERS: Final = 0x0800
_CONFIGURATION, _DISKETTE = 0xE6F5, 0xEFC7
_HARD_DISK: Final = {0x80: (0x41, 0xE401), 0x81: (0x46, 0xE411)}      # drive: vector, offset
_DISKETTE_TRACK: Final = 4                                            # sectors a track, in its table
# The entries of handlers.asm, in the order of its table, and the vectors that lead to each.
_ENTRIES: Final[tuple[tuple[str, tuple[int, ...]], ...]] = (
    ("timer", (0x08,)), ("keyboard", (0x09,)), ("disk", (0x13, 0x40)), ("system", (0x15,)), ("keys", (0x16,)),
    ("nothing", (0x1C,)), ("end_first", (0x0A, 0x0B, 0x0C, 0x0D, 0x0E, 0x77)),
    ("end_second", (0x72, 0x73, 0x74, 0x75, 0x76)), ("clock", (0x70,)), ("redirected", (0x71,)),
    ("bootstrap", (0x19,)), ("reset", ()),
)


def _stub() -> bytes:
    return bytes((0xE6, BIOS_PORT, 0xCF)).ljust(STUB_BYTES, b"\x90")


@functools.cache
def _handlers() -> bytes:
    return importlib.resources.files(__name__.rpartition(".")[0]).joinpath("handlers.bin").read_bytes()


def _offset(name: str) -> int:
    """Where an entry of handlers.asm lies in segment F000."""
    return struct.unpack_from("<H", _handlers(), 2 * [entry for entry, _vectors in _ENTRIES].index(name))[0]


def entries() -> dict[int, int]:
    """Offset in segment F000 of each vector's entry where that is not its plain stub."""
    offsets = struct.unpack_from(f"<{len(_ENTRIES)}H", _handlers())
    found = {vector: offset for (_, vectors), offset in zip(_ENTRIES, offsets, strict=True)
             for vector in vectors}
    return {**found, 0x0F: found[0x1C]}            # line 7: the spurious interrupt, which has no end


def _hard_disk(geometry: Geometry) -> bytes:
    """A parameter table: cylinders, heads, no write precompensation, control (more than 8 heads), parking, sectors."""
    return struct.pack("<HBHHBBBBBHBB", geometry.cylinders, geometry.heads & 0xFF, 0, 0xFFFF, 0,
                       8 if geometry.heads > 8 else 0, 0, 0, 0, geometry.cylinders, geometry.sectors, 0)


def _rom(disks: Mapping[int, Geometry]) -> bytes:
    rom = bytearray(b"\xFF" * 0x10000)
    rom[:256 * STUB_BYTES] = _stub() * 256
    for offset, data in (
        (_HANDLERS, _handlers()),
        # Length 8; AT model; second 8259, RTC and keyboard intercept are there.
        (_CONFIGURATION, struct.pack("<HBBBBBBBB", 8, 0xFC, 0x01, 0x00, 0x70, 0, 0, 0, 0)),
        # Step rate and unload, load, motor off, 512-byte sectors, 18 a track, gaps, filler, times.
        (_DISKETTE, bytes.fromhex("AF 02 25 02 12 1B FF 6C F6 0F 08")),
        (0xFFEF, bytes([next(iter(disks), 0)])),       # where it boots from
        (0xFFF0, struct.pack("<BHH", 0xEA, _offset("reset"), BIOS_SEGMENT)),        # jmp far
        (0xFFF5, b"01/01/26"),
        (0xFFFE, b"\xFC\x00"),
    ):
        rom[offset:offset + len(data)] = data
    for drive, (_vector, offset) in _HARD_DISK.items():
        if drive in disks:
            rom[offset:offset + 16] = _hard_disk(disks[drive])
    if 0 in disks:
        rom[_DISKETTE + _DISKETTE_TRACK] = disks[0].sectors
    return bytes(rom)


def install(memory: GuestMemory, *, disks: Mapping[int, Geometry], ticks: int) -> None:
    """Write ROM, vectors and data area. Memory must be at least 1 MiB. `disks` by the drive that they are in."""
    memory.write(BIOS_SEGMENT << 4, _rom(disks))
    vectors = {n: (BIOS_SEGMENT, n * STUB_BYTES) for n in range(256)}
    vectors.update((n, (BIOS_SEGMENT, offset)) for n, offset in entries().items())
    vectors[0x1E] = (BIOS_SEGMENT, _DISKETTE)
    for n in (0x1D, 0x1F, 0x41, 0x46, *range(0x60, 0x68)):
        vectors[n] = (0, 0)                    # tables that we do not have, and the users' own
    vectors.update((vector, (BIOS_SEGMENT, offset)) for drive, (vector, offset) in _HARD_DISK.items() if drive in disks)
    for n, (segment, offset) in vectors.items():
        memory.poke(n * 4, struct.pack("<HH", offset, segment))
    memory.poke(BDA, bytes(0x100))
    memory.poke_u16(BDA, 0x3F8)                # COM1
    memory.poke_u16(BDA + 0x08, 0x378)         # LPT1
    memory.poke_u16(BDA + 0x0E, CONVENTIONAL_KIB << 6)
    floppies = sum(1 for drive in disks if drive < 0x80)
    # 80x25 colour, a serial port, a printer, floppy drives: whether there are any, and how many but one.
    memory.poke_u16(BDA_EQUIPMENT, 0x4220 | (0x01 | floppies - 1 << 6 if floppies else 0))
    memory.poke_u16(BDA_MEMORY_KIB, CONVENTIONAL_KIB)
    for address in (BDA_KEY_HEAD, BDA_KEY_TAIL):
        memory.poke_u16(address, BDA_KEYS)
    memory.poke_u16(BDA + 0x80, BDA_KEYS)
    memory.poke_u16(BDA + 0x82, BDA_KEYS_END)
    memory.poke_u16(BDA + 0x63, 0x3D4)         # CRT controller's port
    memory.poke_u8(BDA + 0x75, len(disks) - floppies)      # hard disks
    memory.poke_u8(BDA + 0x84, 24)             # rows less one
    memory.poke_u16(BDA + 0x85, 16)            # scan lines a character
    memory.poke_u8(BDA + 0x96, 0x10)           # enhanced keyboard
    memory.poke_u32(BDA_TICKS, ticks)
    memory.poke_u8(CONVENTIONAL_KIB << 10, 1)  # the extended data area's size in KiB
