"""An overlay: one file with the sectors of a disk that have changed, beside an image that stays as it is.

Layout, version 1 (little-endian; logical offsets, the file is sparse and takes the room of what changed):

| offset | what |
|---|---|
| 0 | header, 4096 bytes: what it is, of which image, CRC-32 over the rest of it |
| 4096 | table: an entry of 8 bytes a sector |
| behind it, at whole 4096s | plane 0, then plane 1: room for every sector, twice |

An entry is 0 (the sector is the image's), or bit 63, the plane (bit 32) and the CRC-32 of the sector's 512 bytes.

Theory.  A sector is written to the plane that its entry does *not* name, and then its entry is: one aligned
word, in one page, by one `pwrite`.  Whoever dies in between (the worker by SIGKILL, the disk by being full) leaves
the entry naming the old sector, which nobody has touched.  So at every moment each sector is whole, old or new, and
a write that was answered is there; a write of several sectors can stop between two of them, as on a real disk.
There is nothing to replay and no state but the file.

Against what is not in our order (the host itself going down, with pages written back as the kernel pleased; a cut or
damaged file) each sector has its checksum: it is then a read error for the guest and a warning for the operator, never
silently wrong.

A commit (vm/disks/files.py) marks the header first; until it is through, the overlay can only be committed again.

Invariants.  `Overlay` keeps no state, so two of them over one file would not disagree; that nobody writes
beside us is the lock's business.  Nothing is written outside the layout, so its end bounds the file: sectors * 1032
bytes and some pages.

Where it is poor: a sector rewritten takes its room twice; file systems without sparse files take all of it at once.
"""

from __future__ import annotations

import enum
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final, TypeVar

from .geometry import SECTOR_BYTES

__all__ = ["Damaged", "Header", "Overlay", "OverlayError", "State", "read_header", "write_header"]

MAGIC: Final = b"mixvisor overlay"
VERSION: Final = 1
HEADER_BYTES: Final = 4096
PAGE: Final = 4096
ENTRY_BYTES: Final = 8
PRESENT: Final = 1 << 63
PLANE: Final = 1 << 32
_KNOWN: Final = PRESENT | PLANE | 0xFFFF_FFFF
# magic, version, state, sectors, image's size, its modification time (ns), digest of its contents, length of its path
_FIELDS: Final = struct.Struct("<16sIIQQq32sH")
_PATH_MAX: Final = HEADER_BYTES - 4 - _FIELDS.size
_COPY_SECTORS: Final = 2048

T = TypeVar("T")


class OverlayError(Exception):
    """The file is no overlay, or not of this image, or damaged: the text says which."""


class Damaged(OverlayError):
    """A sector of the overlay is not what its checksum says."""


class State(enum.IntEnum):
    READY = 0
    COMMITTING = 1           # some of its sectors are in the image already


@dataclass(frozen=True, slots=True)
class Header:
    """What an overlay says of itself. `image` is only a hint where the image was."""

    sectors: int             # of the disk, the room that the overlay has
    image_bytes: int
    image_mtime_ns: int
    image_digest: bytes      # vm/disks/files.py: of the contents, 32 bytes
    image: str
    state: State = State.READY

    def committing(self) -> Header:
        return replace(self, state=State.COMMITTING)


def write_header(fd: int, header: Header) -> None:
    """Write it as a whole: one page, by one call. Raises OSError."""
    path = os.fsencode(header.image)[:_PATH_MAX]
    body = _FIELDS.pack(MAGIC, VERSION, header.state, header.sectors, header.image_bytes, header.image_mtime_ns,
                        header.image_digest, len(path)) + path
    body = body.ljust(HEADER_BYTES - 4, b"\0")
    _write_all(fd, body + zlib.crc32(body).to_bytes(4, "little"), 0)


def read_header(fd: int) -> Header:
    """Raises OverlayError where this is no overlay that we can use, and OSError."""
    raw = os.pread(fd, HEADER_BYTES, 0)
    if raw[:16] != MAGIC:
        raise OverlayError("it is not an overlay of mixvisor")
    version = int.from_bytes(raw[16:20], "little")
    if version != VERSION:
        raise OverlayError(f"it is an overlay of version {version}; this mixvisor knows version {VERSION}")
    body = raw[:HEADER_BYTES - 4]
    if len(raw) < HEADER_BYTES or zlib.crc32(body) != int.from_bytes(raw[-4:], "little"):
        raise OverlayError("its header is damaged (its checksum does not match)")
    _magic, _version, state, sectors, size, mtime_ns, digest, length = _FIELDS.unpack_from(body)
    try:
        state = State(state)
    except ValueError as error:
        raise OverlayError(f"its header has an unknown state, {state}") from error
    path = os.fsdecode(body[_FIELDS.size:_FIELDS.size + length])
    return Header(sectors, size, mtime_ns, digest, path, state)


class Overlay:
    """The sectors of a disk of *sectors* that are kept in the file behind `fd`, which belongs to the caller."""

    def __init__(self, fd: int, sectors: int) -> None:
        self.fd, self.sectors = fd, sectors
        table_bytes = _whole_pages(sectors * ENTRY_BYTES)
        plane_bytes = _whole_pages(sectors * SECTOR_BYTES)
        self._table = HEADER_BYTES
        self._planes = self._table + table_bytes, self._table + table_bytes + plane_bytes
        self.end = self._planes[1] + plane_bytes          # no byte of the file lies behind it

    def _entries(self, first: int, count: int) -> tuple[int, ...]:
        raw = _read_all(self.fd, count * ENTRY_BYTES, self._table + first * ENTRY_BYTES)
        return struct.unpack(f"<{count}Q", raw)

    def read(self, first: int, count: int, image: Callable[[int, int], bytes]) -> bytes:
        """Sectors from *first*, those that have not changed from `image(first, count)`. Raises Damaged, OSError."""
        entries = self._entries(first, count)
        if not any(entries):
            return image(first, count)
        parts: list[bytes] = []
        for start, stop, place in _runs([_place(entry) for entry in entries]):
            if place is None:
                parts.append(image(first + start, stop - start))
                continue
            data = _read_all(
                self.fd, (stop - start) * SECTOR_BYTES, self._planes[place] + (first + start) * SECTOR_BYTES)
            for number in range(start, stop):
                at = (number - start) * SECTOR_BYTES
                if zlib.crc32(data[at:at + SECTOR_BYTES]) != entries[number] & 0xFFFF_FFFF:
                    raise Damaged(f"sector {first + number} is damaged (its checksum does not match)")
            parts.append(data)
        return b"".join(parts)

    def write(self, first: int, data: bytes) -> None:
        """Whole sectors from *first*. Raises OSError; then every sector is what it was or what it should be."""
        count = len(data) // SECTOR_BYTES
        assert count * SECTOR_BYTES == len(data)
        assert 0 <= first <= first + count <= self.sectors
        targets = [1 if _place(entry) == 0 else 0 for entry in self._entries(first, count)]
        for start, stop, plane in _runs(targets):
            _write_all(self.fd, data[start * SECTOR_BYTES:stop * SECTOR_BYTES],
                       self._planes[plane] + (first + start) * SECTOR_BYTES)
        entries = [PRESENT | plane * PLANE | zlib.crc32(data[at:at + SECTOR_BYTES])
                   for at, plane in zip(range(0, len(data), SECTOR_BYTES), targets, strict=True)]
        _write_all(self.fd, struct.pack(f"<{count}Q", *entries), self._table + first * ENTRY_BYTES)

    def changed(self) -> Iterator[tuple[int, int]]:
        """(first, count) of each run of sectors that the overlay has. Raises OverlayError for a damaged table."""
        size = os.fstat(self.fd).st_size
        for first in self._table_pieces():
            count = min(_COPY_SECTORS, self.sectors - first)
            entries = self._entries(first, count)
            for number, entry in enumerate(entries):
                place = _place(entry)
                if entry & ~_KNOWN or (place is None and entry):
                    raise OverlayError(f"its table is damaged (at sector {first + number})")
                if place is not None and self._planes[place] + (first + number + 1) * SECTOR_BYTES > size:
                    raise OverlayError(f"it has been cut short: sector {first + number} is not in it any more")
            for start, stop, there in _runs([bool(entry) for entry in entries]):
                if there:
                    yield first + start, stop - start

    def _table_pieces(self) -> Iterator[int]:
        """First sectors of the pieces of the table that are not holes."""
        end, at = self._table + self.sectors * ENTRY_BYTES, self._table
        step = _COPY_SECTORS * ENTRY_BYTES
        while at < end:
            try:
                data = os.lseek(self.fd, at, os.SEEK_DATA)
            except OSError:                               # only a hole up to the end of the file
                return
            at = max(at, self._table + (data - self._table) // step * step)
            if at < end:
                yield (at - self._table) // ENTRY_BYTES
            at += step

    def verify(self) -> int:
        """Read every changed sector; how many there are. Raises OverlayError, OSError."""
        total = 0
        for first, count in self.changed():
            self.read(first, count, lambda _first, count: bytes(count * SECTOR_BYTES))
            total += count
        return total


def _place(entry: int) -> int | None:
    """The plane of a sector, None where it is not in the overlay."""
    return entry >> 32 & 1 if entry & PRESENT else None


def _runs(values: list[T]) -> Iterator[tuple[int, int, T]]:
    """(start, stop, value) of each run of equal values."""
    start = 0
    for stop in range(1, len(values) + 1):
        if stop == len(values) or values[stop] != values[start]:
            yield start, stop, values[start]
            start = stop


def _whole_pages(size: int) -> int:
    return -(-size // PAGE) * PAGE


def _read_all(fd: int, length: int, offset: int) -> bytes:
    """*length* bytes; what lies behind the end of the file reads as zeros, as in a hole."""
    data = os.pread(fd, length, offset)
    while len(data) < length:
        piece = os.pread(fd, length - len(data), offset + len(data))
        if not piece:
            break
        data += piece
    return data.ljust(length, b"\0")


def _write_all(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done
