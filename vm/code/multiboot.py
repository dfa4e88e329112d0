"""A Multiboot 1 kernel as its file describes it: what is loaded where, and where it is entered.

Theory.  A kernel says that it is one by a header of 12 or more bytes within its first 8 KiB: a magic
number, flags, and a checksum that makes the three sum to zero.  The low half of the flags is what it
requires; bit 16 says that the header itself has the addresses (the "a.out kludge", for files of any
kind), without it the file is a 32-bit ELF and its program headers have them.  Source: the
Multiboot Specification, version 0.6.96.

Invariants.  Total over any bytes: `MultibootError` with one sentence, or a `Kernel` whose parts are within
the file and within 4 GiB, do not overlap, and one of which has the entry.  Nothing is read but by
`read(offset, length)`, at most some 40 KB.  What memory there is, is not known here.

Addresses are physical; an ELF entry that is given as a virtual address is translated, as GRUB does.
Poor: no symbols are passed on; 64-bit ELF files are refused, as the specification has it (link with
`-m elf_i386`, or `objcopy -O elf32-i386`).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

__all__ = ["Kernel", "MultibootError", "Part", "find_header", "parse", "requirement"]

MAGIC: Final = 0x1BAD_B002
SEARCH: Final = 8192
ADDRESSES: Final = 1 << 16
PARTS_MAX: Final = 128                # loaded segments; a kernel has a handful
_HEADERS_MAX: Final = 1024            # program headers of any kind
_EM_386, _PT_LOAD = 3, 1
_END: Final = 1 << 32
_HONOURED: Final = 0x7                # page-aligned modules, memory information, video mode

Read = Callable[[int, int], bytes]


class MultibootError(Exception):
    """The file is no kernel that can be booted; one sentence."""


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes of the file in memory, and zeros behind them up to `memory_bytes`."""

    address: int
    virtual: int                      # where it is linked, once the kernel has paging on
    offset: int                       # in the file
    file_bytes: int
    memory_bytes: int

    @property
    def end(self) -> int:
        return self.address + self.memory_bytes


@dataclass(frozen=True, slots=True)
class Kernel:
    flags: int                        # of the header
    entry: int
    parts: tuple[Part, ...]           # by address


def find_header(head: bytes) -> int | None:
    """Offset of a header with a right checksum in the first bytes of a file."""
    at = -4
    head = head[:SEARCH]
    while (at := head.find(struct.pack("<I", MAGIC), at + 4)) != -1:
        if at % 4:
            at = at // 4 * 4              # the next aligned place is still to be looked at
        elif at + 12 <= len(head) and sum(struct.unpack_from("<III", head, at)) & 0xFFFF_FFFF == 0:
            return at
    return None


def requirement(flags: int) -> str | None:
    """What these flags require that no loader of version 1 has; None where everything can be had.

    Modules are always aligned (bit 0), memory is always told (bit 1), the video mode is text whatever is
    preferred (bit 2), which the specification leaves to the loader.
    """
    unknown = flags & 0xFFFF & ~_HONOURED
    if not unknown:
        return None
    bits = ", ".join(str(bit) for bit in range(16) if unknown >> bit & 1)
    return (f"its multiboot header requires features (flag bits {bits}) that Multiboot 1 does not define, so it must"
            " not be booted; bits 0 (aligned modules), 1 (memory map), 2 (video mode) and 16 (addresses) are known")


def parse(read: Read, size: int) -> Kernel:
    """The kernel in a file of *size* bytes. Raises MultibootError."""
    head = read(0, SEARCH)
    at = find_header(head)
    if at is None:
        raise MultibootError("this is no multiboot kernel: the first 8 KiB have no header with a right checksum")
    flags, = struct.unpack_from("<I", head, at + 4)
    if flags & ADDRESSES:
        return _by_header(head, at, flags, size)
    if head[:4] != b"\x7FELF":
        raise MultibootError("its multiboot header gives no addresses (flag 16) and it is no ELF file, so nobody "
                             "knows where it is loaded")
    return _by_elf(read, head, flags, size)


def _by_header(head: bytes, at: int, flags: int, size: int) -> Kernel:
    if at + 32 > len(head):
        raise MultibootError("its multiboot header is cut off")
    header, load, load_end, bss_end, entry = struct.unpack_from("<5I", head, at + 12)
    first = at - (header - load)
    last = first + (load_end - load) if load_end else size
    if not 0 <= first < last <= size:
        raise MultibootError(f"its multiboot header loads bytes {first} to {last} of a file of {size}")
    if bss_end and bss_end < load + last - first:
        raise MultibootError(f"its multiboot header ends its zeroed memory at {bss_end:#x}, before the end of what it "
                             f"loads at {load + last - first:#x}")
    if not load <= entry < load + last - first:
        raise MultibootError(f"its multiboot entry {entry:#x} is outside of what it loads")
    part = Part(load, load, first, last - first, (bss_end or load + last - first) - load)
    if part.end > _END:
        raise MultibootError(f"it loads beyond 4 GiB: to {part.end:#x}")
    return Kernel(flags, entry, (part,))


def _by_elf(read: Read, head: bytes, flags: int, size: int) -> Kernel:
    if len(head) < 52 or head[5] != 1:
        raise MultibootError("it is no little-endian ELF file, or its ELF header is cut off")
    if head[4] != 1:
        raise MultibootError("it is a 64-bit ELF file; Multiboot 1 takes 32-bit ones (link with -m elf_i386, or "
                             "convert it: objcopy -O elf32-i386)")
    machine, = struct.unpack_from("<H", head, 18)
    if machine != _EM_386:
        raise MultibootError(f"this ELF file is for another processor (machine {machine}; 3 is the 386)")
    entry, headers = struct.unpack_from("<II", head, 24)
    each, count = struct.unpack_from("<HH", head, 42)
    if count and each != 32:
        raise MultibootError(f"its program headers have {each} bytes each, in an ELF file of 32 bits they have 32")
    if count > _HEADERS_MAX:
        raise MultibootError(f"it has {count} program headers; more than {_HEADERS_MAX} are not believed")
    table = read(headers, 32 * count)
    if len(table) < 32 * count:
        raise MultibootError("its program headers are cut off")
    parts: list[Part] = []
    for kind, offset, virtual, physical, length, memory, _flags, _align in struct.iter_unpack("<8I", table):
        if kind != _PT_LOAD or not memory:
            continue
        if length > memory:
            raise MultibootError(f"its segment at {physical:#x} has {length} bytes in the file and {memory} in memory")
        if offset + length > size:
            raise MultibootError(f"its segment at {physical:#x} lies outside the file: it is cut off")
        if physical + memory > _END:
            raise MultibootError(f"its segment at {physical:#x} ends beyond 4 GiB, at {physical + memory:#x}")
        parts.append(Part(physical, virtual, offset, length, memory))
        if len(parts) > PARTS_MAX:
            raise MultibootError(f"it has more than {PARTS_MAX} segments to load")
    parts.sort(key=lambda part: part.address)
    for one, other in pairwise(parts):
        if one.end > other.address:
            raise MultibootError(f"its segments overlap: {one.address:#x} to {one.end - 1:#x} and {other.address:#x} "
                                 f"to {other.end - 1:#x}")
    for part in parts:
        if 0 <= entry - part.virtual < part.file_bytes:
            return Kernel(flags, part.address + entry - part.virtual, tuple(parts))
    for part in parts:
        if 0 <= entry - part.address < part.file_bytes:
            return Kernel(flags, entry, tuple(parts))
    raise MultibootError(f"its entry {entry:#x} is in none of its segments")
