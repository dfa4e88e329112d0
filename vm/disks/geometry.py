"""What an image looks like to a guest: floppy or hard disk, with how many cylinders, heads and sectors.

Theory.  Up to 2.88 MB an image is a floppy of the smallest standard format that holds it (the file may say
otherwise); sectors of the format behind the end of a short image (a 512-byte boot sector is a disk, too) read as
zeros.  Above, it is a hard disk.  Which heads and sectors a hard disk was partitioned with can be read off
its partition table: a partition ends, by every tool's custom, at the last head and sector of a cylinder.  A geometry
that does not agree with the partitions' block addresses is not believed; then there are 63 sectors a track and as
many heads as keep the cylinders at 1024 or below.

Pure: receives the size and the first sector.  Source of the custom and its check: the DOS partition table as
QEMU's `hd_geometry_guess` and Linux' fdisk read it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from ...config.model import FLOPPY_MAX_BYTES

__all__ = ["DRIVES", "FLOPPIES", "SECTOR_BYTES", "Geometry", "geometry_of", "is_floppy", "sectors_of"]

SECTOR_BYTES: Final = 512
CYLINDERS_MAX: Final = 1024                 # ten bits in INT 13h and in a partition table
DRIVES: Final = {"fda": 0x00, "fdb": 0x01, "hda": 0x80, "hdb": 0x81}     # name: the BIOS' number

_TABLE, _ENTRY_BYTES, _SIGNATURE = 0x1BE, 16, b"\x55\xAA"


@dataclass(frozen=True, slots=True)
class Geometry:
    cylinders: int
    heads: int
    sectors: int            # a track
    floppy_type: int        # CMOS and INT 13h/08h type; 0: hard disk

    @property
    def total(self) -> int:
        return self.cylinders * self.heads * self.sectors

    def sector(self, cylinder: int, head: int, sector: int) -> int | None:
        """Linear number of a sector (counted from 1 within its track); None if there is none."""
        if cylinder >= self.cylinders or head >= self.heads or not 1 <= sector <= self.sectors:
            return None
        return (cylinder * self.heads + head) * self.sectors + sector - 1


FLOPPIES: Final = (
    Geometry(40, 1, 8, 1), Geometry(40, 1, 9, 1), Geometry(40, 2, 8, 1), Geometry(40, 2, 9, 1),
    Geometry(80, 2, 9, 3), Geometry(80, 2, 15, 2), Geometry(80, 2, 18, 4), Geometry(80, 2, 36, 5),
)


def is_floppy(size_bytes: int) -> bool:
    """What an image is taken for where nobody says."""
    return size_bytes <= FLOPPY_MAX_BYTES


def sectors_of(size_bytes: int, geometry: Geometry) -> int:
    """How many sectors there are: a short floppy has all of its format, a hard disk may have more than its geometry."""
    return geometry.total if geometry.floppy_type else -(-size_bytes // SECTOR_BYTES)


def geometry_of(size_bytes: int, first: bytes = b"", *, floppy: bool | None = None) -> Geometry:
    """What a disk of this many bytes with this first sector looks like to a guest.

    Raises ValueError for a floppy that is larger than every format.
    """
    sectors = -(-size_bytes // SECTOR_BYTES)
    if is_floppy(size_bytes) if floppy is None else floppy:
        for format_ in FLOPPIES:
            if sectors <= format_.total:
                return format_
        raise ValueError(f"{size_bytes} bytes are more than a floppy holds ({FLOPPY_MAX_BYTES})")
    heads, track = _partitioned(first, sectors) or (
        next((h for h in (16, 32, 64, 128) if sectors <= CYLINDERS_MAX * h * 63), 255), 63)
    return Geometry(min(CYLINDERS_MAX, -(-sectors // (heads * track))), heads, track, 0)


def _partitioned(first: bytes, sectors: int) -> tuple[int, int] | None:
    """(heads, sectors a track) that the partition table was made with."""
    if first[510:512] != _SIGNATURE:
        return None
    guesses: set[tuple[int, int]] = set()
    for begin, end, start, count in _partitions(first):
        if start == 0 or start + count > sectors:
            return None                         # no partition table, or of another disk
        heads, track = end[1] + 1, end[2]
        if track == 0 or heads > 255 or (end[0] < CYLINDERS_MAX - 1 and
                          (end[0] * heads + end[1]) * track + end[2] != start + count):
            return None
        if begin[0] < CYLINDERS_MAX - 1 and (begin[0] * heads + begin[1]) * track + begin[2] - 1 != start:
            return None
        guesses.add((heads, track))
    return guesses.pop() if len(guesses) == 1 else None


def _partitions(first: bytes) -> Iterator[tuple[tuple[int, int, int], tuple[int, int, int], int, int]]:
    """(first CHS, last CHS, first block, blocks) of each entry in use; CHS as (cylinder, head, sector)."""
    for at in range(_TABLE, _TABLE + 4 * _ENTRY_BYTES, _ENTRY_BYTES):
        entry = first[at:at + _ENTRY_BYTES]
        if entry[4]:
            start, count = int.from_bytes(entry[8:12], "little"), int.from_bytes(entry[12:16], "little")
            yield _chs(entry[1:4]), _chs(entry[5:8]), start, count


def _chs(raw: bytes) -> tuple[int, int, int]:
    return raw[2] | (raw[1] & 0xC0) << 2, raw[0], raw[1] & 0x3F
