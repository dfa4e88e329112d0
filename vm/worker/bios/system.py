"""The small services: equipment, memory size, system (15h), serial, printer, time of day.

Time: the tick count lives in the guest's data area (40:6Ch) and is moved on by the guest's own handler of
the timer interrupt (handlers.asm).  The date and time of day are the clock's (devices/cmos.py).

The printer is there and prints to where the serial port does, as its ports do (devices/parallel.py).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

from ...engines.base import RAX, RBX, RCX, RDX
from ..clock import TICKS_PER_DAY, Clock
from ..devices.cmos import Cmos, bcd
from ..devices.serial import Serial
from ..memory import GuestMemory, memory_map
from . import rom
from .registers import Call, Wait

__all__ = ["System", "day_ticks"]

_BAUDS: Final = (110, 150, 300, 600, 1200, 2400, 4800, 9600)
_UNSUPPORTED: Final = 0x86
_SMAP: Final = 0x534D4150


def day_ticks(seconds_of_day: int) -> int:
    """Timer ticks since midnight."""
    return seconds_of_day * TICKS_PER_DAY // 86_400


def _number(decimal: int) -> int:
    """What two BCD digits count."""
    return (decimal >> 4) * 10 + (decimal & 0x0F)


class System:
    def __init__(
        self, memory: GuestMemory, clock: Clock, cmos: Cmos, serial: Serial,
        end: Callable[[str, str, int | None], None],
    ) -> None:
        self._memory, self._clock, self._cmos, self._serial, self._end = (
            memory, clock, cmos, serial, end)
        self.services: dict[int, Callable[[Call], None]] = {
            0x11: self._equipment, 0x12: self._memory_size, 0x14: self._serial_port,
            0x15: self._system, 0x17: self._printer, 0x18: self._no_boot, 0x1A: self._time,
        }

    def _equipment(self, call: Call) -> None:
        call.ax = self._memory.u16(rom.BDA_EQUIPMENT)

    def _memory_size(self, call: Call) -> None:
        call.ax = self._memory.u16(rom.BDA_MEMORY_KIB)

    def _serial_port(self, call: Call) -> None:
        if call.dx != 0:
            call.ah = 0x80                     # timed out: there is no such port
        elif call.ah == 0x00:
            baud = _BAUDS[call.al >> 5]
            self._serial.configure(115_200 // baud, call.al & 0x1F)
            call.ax = self._serial.line_status() << 8 | self._serial.modem_status()
        elif call.ah == 0x01:
            self._serial.put(call.al)
            call.ah = self._serial.line_status()
        elif call.ah == 0x02:
            ready = self._serial.line_status() & 1
            call.ax = self._serial.take() if ready else 0x8000 | call.al
        else:
            call.ax = self._serial.line_status() << 8 | self._serial.modem_status()

    def _printer(self, call: Call) -> None:
        if call.dx != 0 or call.ah > 2:
            call.ah = 0x01                     # timed out: there is no such printer
            return
        if call.ah == 0:
            self._serial.put(call.al)
        call.ah = 0x90                         # not busy, selected

    def _no_boot(self, call: Call) -> None:
        self._end("no-boot", "the boot disk gave up (INT 18h): no operating system on it", None)

    def _extended_kib(self) -> int:
        return max(0, (self._memory.size >> 10) - 1024)

    def _system(self, call: Call) -> None:
        service = call.ah
        if service == 0x4F:                    # keyboard intercept: leave the scan code as it is
            call.carry = True
        elif service == 0x86:
            self._wait(call)
        elif service == 0x87:
            self._move_block(call)
        elif service == 0x88:
            call.ax = min(self._extended_kib(), 0xFC00)
            call.carry = False
        elif service == 0xC0:
            call.succeed()                     # ES:BX is loaded by the ROM's entry
        elif service == 0xC1:
            call.carry = False                 # ES, too
        elif service in (0x90, 0x91):
            call.succeed()                     # a device waits, or is done: nobody else to run
        elif service == 0x24:
            self._a20(call)
        elif call.ax == 0xE820:
            self._memory_map(call)
        elif call.ax == 0xE801:
            low = min(self._extended_kib(), 15 * 1024)
            high = max(0, self._extended_kib() - 15 * 1024) >> 6
            call.ax, call.bx, call.cx, call.dx = low, high, low, high
            call.carry = False
        else:
            call.fail(_UNSUPPORTED)

    def _a20(self, call: Call) -> None:
        if call.al > 3:
            call.fail(_UNSUPPORTED)
            return
        if call.al == 2:
            call.al = 1                        # open, always
        elif call.al == 3:
            call.bx = 3                        # by keyboard controller and port 92h
        call.succeed()

    def _wait(self, call: Call) -> None:
        microseconds = call.cx << 16 | call.dx
        call.succeed()
        if microseconds:
            until = self._clock.monotonic_ns() + microseconds * 1000
            call.wait = Wait(until_ns=until)

    def _move_block(self, call: Call) -> None:
        """AH=87h: copy CX words between two descriptors of the table at ES:SI."""
        table = self._memory.read(call.address("es", call.si), 48)

        def base(entry: int) -> int:
            raw = table[entry * 8:entry * 8 + 8]
            return int.from_bytes(raw[2:5], "little") | raw[7] << 24

        length = call.cx * 2
        source, target = base(2), base(3)
        if length > 0x10000 or max(source, target) + length > self._memory.size:
            call.fail(0x02)
            return
        self._memory.write(target, self._memory.read(source, length))
        call.succeed()

    def _memory_map(self, call: Call) -> None:
        entries = memory_map(self._memory.size)
        index = call.gpr[RBX] & 0xFFFFFFFF
        asked = call.gpr[RDX] & 0xFFFFFFFF
        if asked != _SMAP or index >= len(entries) or call.gpr[RCX] & 0xFFFFFFFF < 20:
            call.fail(_UNSUPPORTED)
            return
        self._memory.write(call.address("es", call.di), struct.pack("<QQI", *entries[index]))
        call.set_dword(RAX, _SMAP)
        call.set_dword(RBX, index + 1 if index + 1 < len(entries) else 0)
        call.set_dword(RCX, 20)
        call.carry = False

    def _time(self, call: Call) -> None:
        service = call.ah
        if service == 0x00:
            ticks = self._memory.u32(rom.BDA_TICKS)
            call.cx, call.dx = ticks >> 16, ticks & 0xFFFF
            call.al = self._memory.u8(rom.BDA_MIDNIGHT)
            self._memory.poke_u8(rom.BDA_MIDNIGHT, 0)
            call.carry = False
        elif service == 0x01:
            self._memory.poke_u32(rom.BDA_TICKS, (call.cx << 16 | call.dx) % TICKS_PER_DAY)
            self._memory.poke_u8(rom.BDA_MIDNIGHT, 0)
            call.carry = False
        elif service == 0x02:
            now = self._cmos.now()
            call.cx = bcd(now.hour) << 8 | bcd(now.minute)
            call.dx = bcd(now.second) << 8
            call.carry = False
        elif service == 0x04:
            now = self._cmos.now()
            call.cx = bcd(now.year // 100) << 8 | bcd(now.year % 100)
            call.dx = bcd(now.month) << 8 | bcd(now.day)
            call.carry = False
        elif service == 0x03:
            call.carry = not self._cmos.set_now(
                hour=_number(call.ch), minute=_number(call.cl), second=_number(call.dh))
        elif service == 0x05:
            call.carry = not self._cmos.set_now(
                year=_number(call.ch) * 100 + _number(call.cl), month=_number(call.dh), day=_number(call.dl))
        elif service == 0x06:
            call.carry = self._cmos.alarm_is_on
            if not call.carry:
                self._cmos.set_alarm((call.ch, call.cl, call.dh))
        elif service == 0x07:
            self._cmos.set_alarm(None)
            call.carry = False
        else:
            call.carry = True
