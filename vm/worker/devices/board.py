"""The small ports of the board: interrupt controllers, RTC/CMOS, reset, debug and exit ports.

`Interrupts` accepts and remembers what a guest programs into the two 8259s; nothing is ever
requested or in service, because micro-VMs get no interrupts.  `Cmos` answers the date from the
clock (UTC) and the memory size, in BCD or binary as register B asks.  `Board` holds the ports
that end a VM: 92h and 64h (reset; the latter in devices/keyboard.py) and F4h (isa-debug-exit:
the byte written is the exit code).
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable
from typing import Final

from ..clock import Clock
from . import PortClaim, nothing, ones

__all__ = ["DEBUG_PORT", "EXIT_PORT", "Board", "Cmos", "Interrupts", "bcd"]

DEBUG_PORT: Final = 0xE9
EXIT_PORT: Final = 0xF4


class Interrupts:
    """Two 8259 interrupt controllers, as far as a polling guest can tell."""

    def __init__(self) -> None:
        self.masks = [0xB8, 0x8F]                  # what a PC's BIOS leaves
        self.vectors = [0x08, 0x70]
        self._step = [0, 0]                        # next initialisation word expected, 0: none
        self._words = [0, 0]

    def ports(self) -> Iterable[PortClaim]:
        for chip, base in enumerate((0x20, 0xA0)):
            yield base, lambda: 0, lambda value, chip=chip: self._command(chip, value)
            yield (base + 1, lambda chip=chip: self.masks[chip],
                   lambda value, chip=chip: self._data(chip, value))

    def _command(self, chip: int, value: int) -> None:
        if value & 0x10:                           # ICW1: further words follow on the data port
            self._step[chip], self._words[chip] = 2, value
            self.masks[chip] = 0

    def _data(self, chip: int, value: int) -> None:
        step = self._step[chip]
        if step == 0:
            self.masks[chip] = value
        elif step == 2:
            self.vectors[chip] = value & 0xF8
            # ICW3 comes unless single (bit 1 of ICW1), ICW4 if bit 0 asks for it.
            self._step[chip] = 3 if not self._words[chip] & 2 else 4 if self._words[chip] & 1 else 0
        elif step == 3:
            self._step[chip] = 4 if self._words[chip] & 1 else 0
        else:
            self._step[chip] = 0


class Cmos:
    def __init__(self, clock: Clock, memory_bytes: int, floppy_type: int) -> None:
        self._clock = clock
        self._index = 0
        extended = min(max(0, (memory_bytes >> 10) - 1024), 0xFFFF)
        high = min(max(0, (memory_bytes >> 16) - 256), 0xFFFF)
        self._ram = bytearray(128)
        self._ram[0x0A], self._ram[0x0B] = 0x26, 0x02
        self._ram[0x0D] = 0x80                     # battery good
        self._ram[0x10] = floppy_type << 4
        self._ram[0x14] = 0x21 if floppy_type else 0x20
        self._ram[0x15:0x17] = (640).to_bytes(2, "little")
        self._ram[0x17:0x19] = self._ram[0x30:0x32] = extended.to_bytes(2, "little")
        self._ram[0x34:0x36] = high.to_bytes(2, "little")

    def ports(self) -> Iterable[PortClaim]:
        yield 0x70, ones, self._select
        yield 0x71, self._read, self._write

    def now(self) -> datetime.datetime:
        seconds = self._clock.wall_ns() // 1_000_000_000
        return datetime.datetime.fromtimestamp(seconds, tz=datetime.UTC)

    def _select(self, value: int) -> None:
        self._index = value & 0x7F                 # bit 7 masks NMI on a PC

    def _read(self) -> int:
        index = self._index
        if index not in (0, 2, 4, 6, 7, 8, 9, 0x32):
            return self._ram[index]
        now = self.now()
        value = {
            0: now.second, 2: now.minute, 4: now.hour, 6: now.isoweekday() % 7 + 1,
            7: now.day, 8: now.month, 9: now.year % 100, 0x32: now.year // 100,
        }[index]
        return value if self._ram[0x0B] & 4 else bcd(value)

    def _write(self, value: int) -> None:
        # The clock registers cannot be set: guest time is host time.
        if self._index not in (0x0C, 0x0D):
            self._ram[self._index] = value


class Board:
    """`put` takes debug output, `end(code, reason, exit_code)` ends the VM."""

    def __init__(
        self, put: Callable[[int], None], end: Callable[[str, str, int | None], None],
    ) -> None:
        self._put, self._end = put, end
        self._a20 = 2                              # always open; the bit is remembered

    def ports(self) -> Iterable[PortClaim]:
        yield 0x92, lambda: self._a20, self._system_control
        yield DEBUG_PORT, lambda: DEBUG_PORT, self._put    # reading E9h answers E9h, as in Bochs
        yield EXIT_PORT, ones, self._exit
        yield 0x80, lambda: 0, nothing             # POST codes, and the classic I/O delay

    def _system_control(self, value: int) -> None:
        self._a20 = value & 2
        if value & 1:
            self._end("reset", "the guest reset itself by port 92h", None)

    def _exit(self, value: int) -> None:
        self._end("exit-port", f"the guest ended itself with exit code {value}", value)


def bcd(value: int) -> int:
    """Binary coded decimal of 0 to 99."""
    return value // 10 << 4 | value % 10
