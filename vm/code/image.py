"""A boot image as pieces of memory and the points at which execution starts.

Theory.  Five ways to boot, told apart by what the bytes say:

boot sector   55 AA at 510: the first sector at 0000:7C00, in real mode
multiboot 1   the magic number in the first 8 KiB: ELF segments, or the header's own addresses; entered in
              32-bit protected mode
bzImage       `HdrS` at 0x202: the real-mode setup at 9000:0000, entered at 9020:0000, and the
              compressed kernel at its `code32_start` (1 MiB), entered there in 32-bit mode and, where
              the header says so, 0x200 behind it in 64-bit mode
ROM           ends at 1 MiB (the copy of what ends at 4 GiB); entered at F000:FFF0 in real mode. Known by its size, and
              by the jump that stands there
flat          bytes at an address, in the mode one says

Invariants.  Total over any bytes: an `ImageError` with one sentence, or an image whose pieces are all
within the file.  Nothing is executed, at most `LIMIT` bytes of a file are read.
Poor: compressed kernels stay compressed; ELF relocation is not done; of a disk only the boot sector is
code, since what it loads by INT 13h is known to nobody before it runs.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from . import multiboot

__all__ = ["FORMATS", "LIMIT", "Entry", "Format", "Image", "ImageError", "load", "read_image"]

Format = Literal["boot-sector", "multiboot", "bzimage", "elf", "rom", "flat"]
FORMATS: Final = ("boot-sector", "multiboot", "bzimage", "elf", "rom", "flat")
LIMIT: Final = 64 << 20
BOOT_SECTOR: Final = 0x7C00
SECTOR: Final = 512
_SETUP_SEGMENT: Final = 0x9000
_CODE32: Final = 0x10_0000
_ROM_SIZES: Final = (64 << 10, 128 << 10, 256 << 10)
_ROM_BELOW_1_MIB: Final = 128 << 10
_RESET_BYTES: Final = 16               # from the reset vector to the end
_JUMPS: Final = (0xEA, 0xE9, 0xEB)
_SEGMENTS_MAX: Final = 128             # program headers looked at; a kernel has a handful


class ImageError(Exception):
    """The image cannot be used; one sentence with what to do."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Where execution starts: `base` + `offset` is the linear address."""

    bits: int
    base: int                     # of the code segment: selector * 16 in real mode, else 0
    offset: int
    what: str

    @property
    def linear(self) -> int:
        return self.base + self.offset


@dataclass(slots=True)
class Image:
    format: Format
    size: int                     # of the file, in bytes
    entries: tuple[Entry, ...]
    pieces: list[tuple[int, bytes]] = field(default_factory=list)     # (linear address, bytes)

    def read(self, linear: int, length: int) -> bytes:
        """Up to *length* bytes at *linear*; none where no piece is."""
        for start, data in self.pieces:
            if 0 <= linear - start < len(data):
                return data[linear - start:linear - start + length]
        return b""

    def piece_at(self, linear: int) -> tuple[int, bytes] | None:
        for start, data in self.pieces:
            if 0 <= linear - start < len(data):
                return start, data
        return None


def load(path: Path, **options: int | str | None) -> Image:
    """`read_image` of a file. Raises ImageError, also where the file cannot be read."""
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read(LIMIT)
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {error.strerror}") from error
    try:
        return read_image(data, size=max(size, len(data)), **options)        # type: ignore[arg-type]
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from error


def read_image(
    data: bytes, *, size: int | None = None, format: str | None = None, bits: int | None = None,
    base: int | None = None, entry: int | None = None,
) -> Image:
    """What *data* (the first `LIMIT` bytes of a file of *size*) boots as. Raises ImageError.

    format: one of FORMATS, or None to find out. bits, base, entry: of a flat image (bits 16,
    base 0x10000 as in the configuration file, entry = base); giving one of them means flat.
    """
    if not data:
        raise ImageError("the image is empty")
    size = len(data) if size is None else size
    given = [name for name, value in (("bits", bits), ("base", base), ("entry", entry)) if value is not None]
    kind = format or ("flat" if given else _recognize(data))
    if kind != "flat" and given:
        raise ImageError(f"--{given[0]} is for flat images; this one is read as {kind}, which says it by itself")
    if kind == "flat":
        return _flat(data, size, 16 if bits is None else bits, 0x10000 if base is None else base, entry)
    readers = {"boot-sector": _boot_sector, "multiboot": _multiboot, "bzimage": _bzimage, "elf": _elf, "rom": _rom}
    if kind not in readers:
        raise ImageError(f"there is no image format {kind!r}; there are {', '.join(FORMATS)}")
    return readers[kind](data, size)


def _recognize(data: bytes) -> str:
    if data[0x202:0x206] == b"HdrS":
        return "bzimage"
    if multiboot.find_header(data) is not None:
        return "multiboot"
    if data[:4] == b"\x7FELF":
        return "elf"
    if data[510:512] == b"\x55\xAA":
        return "boot-sector"
    if len(data) in _ROM_SIZES and data[-_RESET_BYTES] in _JUMPS:
        return "rom"
    raise ImageError("this is no boot sector (no 55 AA at byte 510), multiboot kernel, ELF file, bzImage or ROM; "
                     "if it is flat code, say --bits 16, 32 or 64 and --base ADDRESS")


def _flat(data: bytes, size: int, bits: int, base: int, entry: int | None) -> Image:
    entry = base if entry is None else entry
    if bits not in (16, 32, 64):
        raise ImageError(f"--bits {bits}: flat code starts in 16, 32 or 64 bits")
    if size > LIMIT:
        raise ImageError(f"flat images of at most {LIMIT >> 20} MiB can be scanned, this one has {size} bytes")
    if base < 0 or base + len(data) > 1 << (20 if bits == 16 else 32):
        raise ImageError(f"--base {base:#x}: {len(data)} bytes there end beyond what {bits}-bit code can reach")
    if not base <= entry < base + len(data):
        raise ImageError(f"--entry {entry:#x} is not within the image, which is at {base:#x} to "
                         f"{base + len(data) - 1:#x}")
    segment = entry & ~0xFFFF if bits == 16 else 0             # as vm/engines/entry.py starts it
    return Image("flat", size, (Entry(bits, segment, entry - segment, "entry"),), [(base, data)])


def _boot_sector(data: bytes, size: int) -> Image:
    if data[510:512] != b"\x55\xAA":
        raise ImageError("this is no boot sector: there is no 55 AA at byte 510")
    return Image("boot-sector", size, (Entry(16, 0, BOOT_SECTOR, "boot sector"),), [(BOOT_SECTOR, data[:SECTOR])])


def _rom(data: bytes, size: int) -> Image:
    if not _RESET_BYTES <= len(data) == size <= _ROM_SIZES[-1]:
        raise ImageError(f"this is no ROM: it has {size} bytes, and a ROM at most {_ROM_SIZES[-1]}")
    low = data[-_ROM_BELOW_1_MIB:]
    return Image("rom", size, (Entry(16, 0xF_0000, 0xFFF0, "reset vector"),), [(0x10_0000 - len(low), low)])


def _multiboot(data: bytes, size: int) -> Image:
    try:
        kernel = multiboot.parse(lambda offset, length: data[offset:offset + length], size)
    except multiboot.MultibootError as error:
        raise ImageError(str(error)) from error
    if sum(part.file_bytes for part in kernel.parts) > LIMIT:
        raise ImageError(f"its segments load more than {LIMIT >> 20} MiB")
    pieces: list[tuple[int, bytes]] = []
    for part in kernel.parts:
        piece = data[part.offset:part.offset + part.file_bytes]
        # A kernel runs where it is loaded until it has paging on, and where it is linked from then on.
        pieces += [(address, piece) for address in dict.fromkeys((part.address, part.virtual))]
    return Image("multiboot", size, (Entry(32, 0, kernel.entry, "multiboot entry"),), pieces)


def _elf(data: bytes, size: int) -> Image:
    if len(data) < 64 or data[:4] != b"\x7FELF" or data[4] not in (1, 2) or data[5] != 1:
        raise ImageError("this is no little-endian ELF file")
    wide = data[4] == 2
    machine, = struct.unpack_from("<H", data, 18)
    if machine not in (3, 62):
        raise ImageError(f"this ELF file is for another processor (machine {machine}): scans are of x86 code")
    entry, headers = struct.unpack_from("<QQ" if wide else "<II", data, 24)
    entry_size, count = struct.unpack_from("<HH", data, 54 if wide else 42)
    pieces: list[tuple[int, bytes]] = []
    loaded = 0
    for number in range(min(count, _SEGMENTS_MAX)):
        at = headers + number * entry_size
        if at + (56 if wide else 32) > len(data):
            raise ImageError("its program headers are cut off")
        if wide:
            kind, _flags, offset, virtual, physical, length = struct.unpack_from("<IIQQQQ", data, at)
        else:
            kind, offset, virtual, physical, length = struct.unpack_from("<5I", data, at)
        if kind != 1 or not length:
            continue
        piece = data[offset:offset + length]
        if len(piece) < length and size <= len(data):
            raise ImageError(f"its segment at {virtual:#x} lies outside the file: it is cut off")
        loaded += len(piece)
        if loaded > LIMIT:
            raise ImageError(f"its segments load more than {LIMIT >> 20} MiB")
        # A kernel runs where it is loaded until it has paging on, and where it is linked from then on.
        pieces += [(address, piece) for address in dict.fromkeys((physical, virtual))]
    if not any(0 <= entry - start < len(piece) for start, piece in pieces):
        raise ImageError(f"its entry {entry:#x} is in none of its segments")
    bits = 64 if machine == 62 and wide else 32
    return Image("elf", size, (Entry(bits, 0, entry, "ELF entry"),), pieces)


def _bzimage(data: bytes, size: int) -> Image:
    if data[0x202:0x206] != b"HdrS" or len(data) < 0x238:
        raise ImageError("this is no Linux kernel image: there is no HdrS at byte 0x202")
    sectors = data[0x1F1] or 4
    setup = (sectors + 1) * SECTOR
    if setup > len(data):
        raise ImageError(f"its setup has {setup} bytes, the file has {len(data)}: it is cut off")
    version, = struct.unpack_from("<H", data, 0x206)
    base = _SETUP_SEGMENT << 4
    pieces = [(base, data[:setup])]
    entries = [Entry(16, base + 0x200, 0, "setup")]
    kernel = data[setup:]
    if kernel and data[0x211] & 1:                              # loaded high
        code32 = struct.unpack_from("<I", data, 0x214)[0] if version >= 0x200 else _CODE32
        pieces.append((code32, kernel))
        entries.append(Entry(32, 0, code32, "32-bit kernel"))
        if version >= 0x20C and data[0x236] & 1 and len(kernel) > 0x200:
            entries.append(Entry(64, 0, code32 + 0x200, "64-bit kernel"))
    return Image("bzimage", size, tuple(entries), pieces)
