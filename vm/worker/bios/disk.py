"""INT 13h: the boot disk, by cylinder/head/sector and (hard disks) by linear block address.

Every address and count comes from the guest and is checked: a sector that does not exist is
"sector not found" (04h), memory that does not exist a "DMA boundary" error (09h), a write is
"write protected" (03h).  The status of the last call is kept for AH=01h.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

from ..devices.disk import SECTOR_BYTES, DiskImage
from ..memory import GuestMemory
from .registers import Call

__all__ = ["DiskService"]

BAD_COMMAND: Final = 0x01
WRITE_PROTECTED: Final = 0x03
NOT_FOUND: Final = 0x04
BAD_ADDRESS: Final = 0x09
NOT_READY: Final = 0x80
MAX_SECTORS: Final = 128


class DiskService:
    def __init__(
        self, memory: GuestMemory, disk: DiskImage, count: Callable[[str, int], None],
    ) -> None:
        self._memory, self._disk, self._count = memory, disk, count
        self._geometry = disk.geometry
        self._last = 0
        self._services: dict[int, Callable[[Call], None]] = {
            0x00: lambda call: self._done(call, 0), 0x01: self._status,
            0x02: self._read, 0x03: self._write, 0x04: self._verify, 0x05: self._write,
            0x08: self._parameters, 0x0C: lambda call: self._done(call, 0),
            0x0D: lambda call: self._done(call, 0), 0x10: lambda call: self._done(call, 0),
            0x11: lambda call: self._done(call, 0), 0x15: self._type, 0x16: self._change_line,
            0x41: self._extensions, 0x42: self._extended_read, 0x43: self._write,
            0x44: self._extended_verify, 0x47: lambda call: self._done(call, 0),
            0x48: self._extended_parameters,
        }

    def call(self, call: Call) -> None:
        if call.ah == 0x15 and call.dl != self._geometry.drive:
            call.ax = call.al                  # type 0: no such drive; not an error
            call.carry = False
            return
        service = self._services.get(call.ah)
        hard_only = call.ah >= 0x41
        if service is None or (hard_only and self._geometry.floppy_type):
            self._done(call, BAD_COMMAND)
        elif call.dl != self._geometry.drive and call.ah not in (0x00, 0x01):
            self._done(call, NOT_READY if call.dl < 0x80 else BAD_COMMAND)
        else:
            service(call)

    def _done(self, call: Call, status: int) -> None:
        self._last = status
        if status:
            call.fail(status)
        else:
            call.succeed()

    def _status(self, call: Call) -> None:
        call.ah = self._last
        call.carry = self._last != 0

    def _first_sector(self, call: Call) -> int | None:
        cylinder = call.ch | (call.cl & 0xC0) << 2
        return self._geometry.sector(cylinder, call.dh, call.cl & 0x3F)

    def _load(self, first: int, count: int, address: int) -> int:
        """Read into memory; a status."""
        if not 1 <= count <= MAX_SECTORS:
            return BAD_COMMAND
        data = self._disk.read(first, count)
        if data is None:
            return NOT_FOUND
        if not 0 <= address <= self._memory.size - len(data):
            return BAD_ADDRESS
        self._memory.write(address, data)
        self._count("disk_read_bytes", len(data))
        return 0

    def _read(self, call: Call) -> None:
        first = self._first_sector(call)
        status = (NOT_FOUND if first is None
                  else self._load(first, call.al, call.address("es", call.bx)))
        self._done(call, status)
        if status:
            call.al = 0

    def _write(self, call: Call) -> None:
        if call.ah < 0x40:
            call.al = 0                        # sectors written
        self._done(call, WRITE_PROTECTED)

    def _verify(self, call: Call) -> None:
        first = self._first_sector(call)
        there = first is not None and call.al >= 1 and first + call.al <= self._disk.sectors
        self._done(call, 0 if there else NOT_FOUND)

    def _parameters(self, call: Call) -> None:
        geometry = self._geometry
        last = geometry.cylinders - 1
        call.cx = (last & 0xFF) << 8 | (last >> 8 & 3) << 6 | geometry.sectors
        call.dx = (geometry.heads - 1) << 8 | 1
        if geometry.floppy_type:
            call.bx = geometry.floppy_type     # ES:DI is loaded by the ROM's entry
        call.ax = 0
        self._done(call, 0)

    def _type(self, call: Call) -> None:
        if self._geometry.floppy_type:
            call.ah = 1                        # a floppy drive without change line
        else:
            sectors = min(self._disk.sectors, 0xFFFFFFFF)
            call.ah = 3
            call.cx, call.dx = sectors >> 16, sectors & 0xFFFF
        call.carry = False
        self._last = 0

    def _change_line(self, call: Call) -> None:
        self._done(call, 0)                    # the disk is never changed

    def _extensions(self, call: Call) -> None:
        if call.bx != 0x55AA:
            self._done(call, BAD_COMMAND)
            return
        call.bx = 0xAA55
        call.ax = 0x2100                       # EDD 1.1
        call.cx = 0x0001                       # packets
        call.carry = False
        self._last = 0

    def _packet(self, call: Call) -> tuple[int, int, int] | None:
        """(first sector, count, linear address) of a disk address packet."""
        raw = self._memory.read(call.address("ds", call.si), 16)
        size, _zero, count, offset, segment, first = struct.unpack("<BBHHHQ", raw)
        return None if size < 16 else (first, count, (segment << 4) + offset)

    def _extended_read(self, call: Call) -> None:
        packet = self._packet(call)
        status = BAD_COMMAND if packet is None else self._load(packet[0], packet[1], packet[2])
        if status:
            self._memory.write(call.address("ds", call.si + 2), b"\0\0")   # sectors transferred
        self._done(call, status)

    def _extended_verify(self, call: Call) -> None:
        packet = self._packet(call)
        there = packet is not None and packet[0] + packet[1] <= self._disk.sectors
        self._done(call, 0 if there else NOT_FOUND)

    def _extended_parameters(self, call: Call) -> None:
        address = call.address("ds", call.si)
        if self._memory.u16(address) < 26:
            self._done(call, BAD_COMMAND)
            return
        geometry = self._geometry
        self._memory.write(address, struct.pack(
            "<HHIIIQH", 26, 0x0002, geometry.cylinders, geometry.heads, geometry.sectors,
            self._disk.sectors, SECTOR_BYTES))
        self._done(call, 0)
