"""INT 13h: disks, by cylinder/head/sector and (hard disks) by linear block address, read and written.

Every address and count comes from the guest and is checked: a sector that does not exist is "sector not found" (04h),
memory that does not exist a "DMA boundary" error (09h), a write to a protected disk "write protected" (03h), what
the host cannot read a checksum error (10h), what it cannot write a "write fault" (CCh).  The status of the last call
is kept in the data area (40:41h floppies, 40:74h hard disks) for AH=01h.

A drive that is not there answers 80h (floppy: nothing comes back) or 01h (hard disk).  Disks are never changed while
the VM runs, so the change line is there and quiet.  A floppy is formatted by filling the tracks that a program asks
for; a hard disk is not formatted by the BIOS (01h), as with every IDE disk.

Source: Ralf Brown's interrupt list; Phoenix' Enhanced Disk Drive specification 1.1.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Final

from ..devices.disk import SECTOR_BYTES, Disk, Fault
from ..memory import GuestMemory
from . import rom
from .registers import Call

__all__ = ["DiskService"]

BAD_COMMAND: Final = 0x01
WRITE_PROTECTED: Final = 0x03
NOT_FOUND: Final = 0x04
BAD_ADDRESS: Final = 0x09
BAD_MEDIA_TYPE: Final = 0x0C
CHECKSUM: Final = 0x10
NOT_READY: Final = 0x80
WRITE_FAULT: Final = 0xCC
MAX_SECTORS: Final = 255
FILLER: Final = b"\xF6" * SECTOR_BYTES
_STATUS: Final = {Fault.NOT_FOUND: NOT_FOUND, Fault.PROTECTED: WRITE_PROTECTED,
                  Fault.UNREADABLE: CHECKSUM, Fault.UNWRITABLE: WRITE_FAULT}


class DiskService:
    """`count(name, n)` is told of bytes and operations, of all disks and of each (`fda_read_bytes`)."""

    def __init__(self, memory: GuestMemory, disks: Sequence[Disk], count: Callable[[str, int], None]) -> None:
        self._memory, self._count = memory, count
        self._disks = {disk.drive: disk for disk in disks}
        self._floppies = sum(1 for drive in self._disks if drive < 0x80)
        done = self._nothing
        # Each is given the disk that DL names.
        self._services: dict[int, Callable[[Call, Disk], None]] = {
            0x02: self._read, 0x03: self._write, 0x04: self._verify, 0x05: self._format, 0x08: self._parameters,
            0x0C: self._seek, 0x15: self._type, 0x16: done, 0x17: self._set_type, 0x18: self._set_media,
        }
        self._hard_services: dict[int, Callable[[Call, Disk], None]] = {
            0x09: done, 0x0D: done, 0x10: done, 0x11: done, 0x14: done, 0x19: done,
            0x41: self._extensions, 0x42: self._extended_read, 0x43: self._extended_write,
            0x44: self._extended_verify, 0x47: self._extended_seek, 0x48: self._extended_parameters, 0x4E: done,
        }

    def call(self, call: Call) -> None:
        if call.ah == 0x00:
            self._done(call, 0)                # reset: of whatever is there
            return
        if call.ah == 0x01:
            last = self._memory.u8(rom.BDA_HARD_STATUS if call.dl >= 0x80 else rom.BDA_FLOPPY_STATUS)
            call.ah = last
            call.carry = last != 0
            return
        disk = self._disks.get(call.dl)
        if disk is None:
            self._absent(call)
            return
        service = self._services.get(call.ah)
        if service is None and not disk.geometry.floppy_type:
            service = self._hard_services.get(call.ah)
        if service is None:
            self._done(call, BAD_COMMAND)
        else:
            service(call, disk)

    def _done(self, call: Call, status: int) -> None:
        self._memory.poke_u8(rom.BDA_HARD_STATUS if call.dl >= 0x80 else rom.BDA_FLOPPY_STATUS, status)
        if status:
            call.fail(status)
        else:
            call.succeed()

    def _nothing(self, call: Call, _disk: Disk) -> None:
        self._done(call, 0)

    def _absent(self, call: Call) -> None:
        """No such drive."""
        if call.ah == 0x15:
            call.ah = 0                        # type 0: not an error
            call.carry = False
        elif call.ah == 0x08 and call.dl < 0x80:
            # As AT BIOSes: no error, type and geometry 0, the number of drives in DL.
            call.bx = call.cx = call.ax = 0
            call.dx = self._floppies
            call.carry = False
        else:
            self._done(call, NOT_READY if call.dl < 0x80 else BAD_COMMAND)

    # By cylinder, head and sector.

    def _first_sector(self, call: Call, disk: Disk) -> int | None:
        cylinder = call.ch | (call.cl & 0xC0) << 2
        return disk.geometry.sector(cylinder, call.dh, call.cl & 0x3F)

    def _load(self, disk: Disk, first: int | None, count: int, address: int) -> int:
        """Read into memory; a status."""
        if not 1 <= count <= MAX_SECTORS:
            return BAD_COMMAND
        if first is None or not disk.exists(first, count):
            return NOT_FOUND
        if not self._reaches(address, count):
            return BAD_ADDRESS
        data = disk.read(first, count)
        if isinstance(data, Fault):
            self._count(f"{disk.name}_errors", 1)
            return _STATUS[data]
        self._memory.write(address, data)
        self._count("disk_read_bytes", len(data))
        self._count(f"{disk.name}_read_bytes", len(data))
        self._count(f"{disk.name}_reads", 1)
        return 0

    def _store(self, disk: Disk, first: int | None, count: int, address: int) -> int:
        """Write from memory; a status."""
        if not 1 <= count <= MAX_SECTORS:
            return BAD_COMMAND
        if not disk.writable:
            return WRITE_PROTECTED
        if not self._reaches(address, count):
            return BAD_ADDRESS
        return self._put(disk, first, self._memory.read(address, count * SECTOR_BYTES))

    def _put(self, disk: Disk, first: int | None, data: bytes) -> int:
        fault = Fault.NOT_FOUND if first is None else disk.write(first, data)
        if fault is None:
            self._count("disk_written_bytes", len(data))
            self._count(f"{disk.name}_written_bytes", len(data))
            self._count(f"{disk.name}_writes", 1)
            return 0
        if fault is Fault.UNWRITABLE:
            self._count(f"{disk.name}_errors", 1)
        return _STATUS[fault]

    def _reaches(self, address: int, count: int) -> bool:
        return 0 <= address <= self._memory.size - count * SECTOR_BYTES

    def _transferred(self, call: Call, status: int) -> None:
        """AL is the number of sectors, none of them after an error."""
        self._done(call, status)
        if status:
            call.al = 0

    def _read(self, call: Call, disk: Disk) -> None:
        self._transferred(call, self._load(
            disk, self._first_sector(call, disk), call.al, call.address("es", call.bx)))

    def _write(self, call: Call, disk: Disk) -> None:
        self._transferred(call, self._store(
            disk, self._first_sector(call, disk), call.al, call.address("es", call.bx)))

    def _verify(self, call: Call, disk: Disk) -> None:
        first = self._first_sector(call, disk)
        there = first is not None and call.al >= 1 and disk.exists(first, call.al)
        self._transferred(call, 0 if there else NOT_FOUND)

    def _format(self, call: Call, disk: Disk) -> None:
        """Floppies: fill the sectors that the address fields at ES:BX name (cylinder, head, sector, size)."""
        if not disk.geometry.floppy_type:
            self._done(call, BAD_COMMAND)
            return
        status = 0 if disk.writable else WRITE_PROTECTED
        fields = self._memory.read(call.address("es", call.bx), 4 * disk.geometry.sectors)
        for at in range(0, len(fields), 4):
            cylinder, head, sector, size = fields[at:at + 4]
            first = disk.geometry.sector(cylinder, head, sector)
            if status == 0:
                wrong = (cylinder, head, size) != (call.ch, call.dh, 2)       # 2: 512 bytes
                status = NOT_FOUND if wrong else self._put(disk, first, FILLER)
        self._done(call, status)

    def _parameters(self, call: Call, disk: Disk) -> None:
        geometry = disk.geometry
        last = geometry.cylinders - 1
        call.cx = (last & 0xFF) << 8 | (last >> 8 & 3) << 6 | geometry.sectors
        if geometry.floppy_type:
            call.bx = geometry.floppy_type     # ES:DI is loaded by the ROM's entry
        same = self._floppies if geometry.floppy_type else len(self._disks) - self._floppies
        self._done(call, 0)
        call.ax = 0
        call.dx = (geometry.heads - 1) << 8 | same

    def _seek(self, call: Call, disk: Disk) -> None:
        there = call.ch | (call.cl & 0xC0) << 2 < disk.geometry.cylinders
        self._done(call, 0 if there else NOT_FOUND)

    def _type(self, call: Call, disk: Disk) -> None:
        if disk.geometry.floppy_type:
            call.ah = 2                        # a floppy drive with a change line
        else:
            sectors = min(disk.sectors, 0xFFFFFFFF)
            call.ah = 3
            call.cx, call.dx = sectors >> 16, sectors & 0xFFFF
        call.carry = False

    def _set_type(self, call: Call, disk: Disk) -> None:
        self._done(call, 0 if disk.geometry.floppy_type and 1 <= call.al <= 4 else BAD_COMMAND)

    def _set_media(self, call: Call, disk: Disk) -> None:
        """Before a format: only what the disk is. ES:DI is loaded by the ROM's entry."""
        geometry = disk.geometry
        asked = call.ch | (call.cl & 0xC0) << 2, call.cl & 0x3F
        self._done(call, BAD_COMMAND if not geometry.floppy_type else
                   0 if asked == (geometry.cylinders - 1, geometry.sectors) else BAD_MEDIA_TYPE)

    # By block address.

    def _extensions(self, call: Call, _disk: Disk) -> None:
        if call.bx != 0x55AA:
            self._done(call, BAD_COMMAND)
            return
        self._done(call, 0)
        call.bx = 0xAA55
        call.ax = 0x2100                       # EDD 1.1
        call.cx = 0x0001                       # packets

    def _packet(self, call: Call) -> tuple[int, int, int] | None:
        """(first sector, count, linear address) of a disk address packet."""
        raw = self._memory.read(call.address("ds", call.si), 16)
        size, _zero, count, offset, segment, first = struct.unpack("<BBHHHQ", raw)
        return None if size < 16 else (first, count, (segment << 4) + offset)

    def _by_packet(self, call: Call, disk: Disk, move: Callable[[Disk, int | None, int, int], int]) -> None:
        packet = self._packet(call)
        status = BAD_COMMAND if packet is None else move(disk, packet[0], packet[1], packet[2])
        if status:
            self._memory.write(call.address("ds", call.si + 2), b"\0\0")   # sectors transferred
        self._done(call, status)

    def _extended_read(self, call: Call, disk: Disk) -> None:
        self._by_packet(call, disk, self._load)

    def _extended_write(self, call: Call, disk: Disk) -> None:
        if call.al > 2:                        # 0, 1: write; 2: write and verify
            self._done(call, BAD_COMMAND)
        else:
            self._by_packet(call, disk, self._store)

    def _extended_verify(self, call: Call, disk: Disk) -> None:
        packet = self._packet(call)
        there = packet is not None and disk.exists(packet[0], packet[1])
        self._done(call, 0 if there else NOT_FOUND)

    def _extended_seek(self, call: Call, disk: Disk) -> None:
        packet = self._packet(call)
        self._done(call, 0 if packet is not None and disk.exists(packet[0], 1) else NOT_FOUND)

    def _extended_parameters(self, call: Call, disk: Disk) -> None:
        address = call.address("ds", call.si)
        if self._memory.u16(address) < 26:
            self._done(call, BAD_COMMAND)
            return
        geometry = disk.geometry
        self._memory.write(address, struct.pack(
            "<HHIIIQH", 26, 0x0002, geometry.cylinders, geometry.heads, geometry.sectors,
            disk.sectors, SECTOR_BYTES))
        self._done(call, 0)
