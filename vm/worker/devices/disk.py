"""A boot disk: an image behind a descriptor, and the geometry that its size implies.

Theory.  Up to 2.88 MB an image is a floppy (drive 00h) of the smallest standard format that holds
it; above, a hard disk (drive 80h) with 63 sectors a track and as many heads as keep the
cylinders at 1024 or below.  Sectors inside the format but behind the end of a short image (a
512-byte boot sector is a disk, too) read as zeros; sectors outside the format do not exist.

Reads are `pread` on the descriptor that the supervisor opened: a worker opens no file. In this
version the disk is read-only: a guest is told so (write protected) and writes nothing.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Final

__all__ = ["FLOPPIES", "SECTOR_BYTES", "DiskImage", "Geometry", "geometry_of"]

SECTOR_BYTES: Final = 512


@dataclass(frozen=True, slots=True)
class Geometry:
    cylinders: int
    heads: int
    sectors: int            # a track
    floppy_type: int        # CMOS and INT 13h/08h type; 0: hard disk

    @property
    def total(self) -> int:
        return self.cylinders * self.heads * self.sectors

    @property
    def drive(self) -> int:
        """The BIOS' number of a drive with this disk."""
        return 0x00 if self.floppy_type else 0x80

    def sector(self, cylinder: int, head: int, sector: int) -> int | None:
        """Linear number of a sector (counted from 1 within its track); None if there is none."""
        if cylinder >= self.cylinders or head >= self.heads or not 1 <= sector <= self.sectors:
            return None
        return (cylinder * self.heads + head) * self.sectors + sector - 1


FLOPPIES: Final = (
    Geometry(40, 1, 8, 1), Geometry(40, 1, 9, 1), Geometry(40, 2, 8, 1), Geometry(40, 2, 9, 1),
    Geometry(80, 2, 9, 3), Geometry(80, 2, 15, 2), Geometry(80, 2, 18, 4), Geometry(80, 2, 36, 5),
)


def geometry_of(size_bytes: int) -> Geometry:
    """What a disk of this many bytes looks like to a guest."""
    sectors = -(-size_bytes // SECTOR_BYTES)
    for floppy in FLOPPIES:
        if sectors <= floppy.total:
            return floppy
    heads = next((h for h in (16, 32, 64, 128) if sectors <= 1024 * h * 63), 255)
    return Geometry(min(1024, -(-sectors // (heads * 63))), heads, 63, 0)


class DiskImage:
    """`fd` belongs to the caller; it is only read. Raises ValueError for an empty image."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.size_bytes = os.fstat(fd).st_size
        if self.size_bytes == 0:
            raise ValueError("the boot disk is empty: give an image with a boot sector")
        self.geometry = geometry_of(self.size_bytes)
        # A hard disk may be larger than 1024 cylinders: the LBA calls reach all of it.
        self.sectors = max(self.geometry.total if self.geometry.floppy_type else 0,
                           -(-self.size_bytes // SECTOR_BYTES))

    def read(self, first: int, count: int) -> bytes | None:
        """Sectors from *first*; None when one of them does not exist or cannot be read."""
        if first < 0 or count < 0 or first + count > self.sectors:
            return None
        length = count * SECTOR_BYTES
        data = b""
        try:
            while len(data) < length:
                piece = os.pread(self._fd, length - len(data), first * SECTOR_BYTES + len(data))
                if not piece:
                    break
                data += piece
        except OSError:
            return None             # a bad medium is the guest's to see, as on a PC
        return data.ljust(length, b"\0")
