"""A disk in a drive: an image behind a descriptor, and where its writes go.

Theory.  Reads are `pread`, writes `pwrite` on descriptors that the supervisor opened and locked: a worker opens no
file. A disk is write-protected unless it is `writable` (writes go into the image) or has an overlay
(vm/disks/overlay.py). Each run of sectors is one `pwrite` of whole sectors, which the kernel copies page by page:
killed in the middle, every sector is old or new.  What was answered is with the kernel; when it reaches the host's
disk is the kernel's to decide.

Sectors inside the geometry but behind the end of a short image read as zeros; sectors outside do not exist.
`Fault` says what a guest is told.  Whatever the operating system refuses (disk full, a bad medium) is remembered as
`error` for the supervisor to warn of, and is a fault to the guest, as on a PC.
"""

from __future__ import annotations

import enum
import os
from typing import Final

from ...disks.geometry import DRIVES, SECTOR_BYTES, geometry_of, sectors_of
from ...disks.overlay import Damaged, Overlay

__all__ = ["DAMAGED", "SECTOR_BYTES", "Disk", "Fault"]

DAMAGED: Final = -1                             # in place of an errno: a sector's checksum does not match


class Fault(enum.Enum):
    """Why a disk did not do it."""

    NOT_FOUND = "not found"                     # no such sector
    PROTECTED = "protected"
    UNREADABLE = "unreadable"
    UNWRITABLE = "unwritable"


class Disk:
    """The descriptors belong to the caller. Raises ValueError for an empty image, or one larger than its drive."""

    def __init__(
        self, fd: int, *, name: str | None = None, writable: bool = False, overlay_fd: int | None = None,
    ) -> None:
        self._fd = fd
        self.size_bytes = os.fstat(fd).st_size
        if self.size_bytes == 0:
            raise ValueError("the disk is empty: give an image with something on it")
        self.geometry = geometry_of(self.size_bytes, os.pread(fd, SECTOR_BYTES, 0),
                                    floppy=None if name is None else name.startswith("fd"))
        self.name = name or ("fda" if self.geometry.floppy_type else "hda")
        self.sectors = sectors_of(self.size_bytes, self.geometry)
        self._overlay = None if overlay_fd is None else Overlay(overlay_fd, self.sectors)
        self.writable = writable or self._overlay is not None
        self.error = 0                          # errno of the last operation that failed, or DAMAGED

    @property
    def drive(self) -> int:
        """The BIOS' number of the drive."""
        return DRIVES[self.name]

    @property
    def end_bytes(self) -> int:
        """No write makes a file longer than this."""
        if not self.writable:
            return 0
        return self._overlay.end if self._overlay is not None else self.sectors * SECTOR_BYTES

    def exists(self, first: int, count: int) -> bool:
        return first >= 0 and count >= 0 and first + count <= self.sectors

    def read(self, first: int, count: int) -> bytes | Fault:
        if not self.exists(first, count):
            return Fault.NOT_FOUND
        try:
            if self._overlay is not None:
                return self._overlay.read(first, count, self._from_image)
            return self._from_image(first, count)
        except Damaged:
            self.error = DAMAGED
        except OSError as error:
            self.error = error.errno or DAMAGED
        return Fault.UNREADABLE

    def write(self, first: int, data: bytes) -> Fault | None:
        """Whole sectors from *first*; None when all of them are written."""
        if not self.exists(first, len(data) // SECTOR_BYTES):
            return Fault.NOT_FOUND
        if not self.writable:
            return Fault.PROTECTED
        try:
            if self._overlay is not None:
                self._overlay.write(first, data)
            else:
                self._into_image(first, data)
        except OSError as error:
            self.error = error.errno or DAMAGED
            return Fault.UNWRITABLE
        return None

    def _from_image(self, first: int, count: int) -> bytes:
        length = count * SECTOR_BYTES
        data = b""
        while len(data) < length:
            piece = os.pread(self._fd, length - len(data), first * SECTOR_BYTES + len(data))
            if not piece:
                break
            data += piece
        return data.ljust(length, b"\0")

    def _into_image(self, first: int, data: bytes) -> None:
        view, offset = memoryview(data), first * SECTOR_BYTES
        while view:
            done = os.pwrite(self._fd, view, offset)
            view, offset = view[done:], offset + done
