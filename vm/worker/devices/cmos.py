"""The CMOS memory and its real-time clock (ports 70h, 71h), an MC146818 on interrupt line 8.

Theory.  Date and time start as the host's in UTC, in BCD or binary and 24 or 12 hours as register B asks.  A guest may
set them: the difference is kept until its end, at once or, while updates are stopped (SET in B), when they go on.
An update shows as in progress (A, bit 7) for the last 2.2 ms of each second; reads are consistent all the same.
Three things can interrupt, each with an enable bit in
register B and a flag in C: periodic (rate in A), once a second (update ended), and the alarm.  As
with the timer all follows from the clock: `poll` sets the flags that are due, `next_ns` says when one
comes.  The line stays up until the guest reads C, which clears the flags: periodic interrupts that a guest did
not fetch in time are lost, as on a PC.

Units: periods of 1/32768 s times 2^(rate - 1).
Source: Motorola MC146818A data sheet; IBM PC/AT Technical Reference for the bytes behind the clock's.
Where it is poor: an alarm is looked for in the last minute only, however long the VM was away; the divider chain
always runs; the shutdown byte (0Fh) is only remembered, since a reset ends the VM.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Mapping
from typing import ClassVar, Final

from ...disks.geometry import Geometry
from ..clock import Clock
from ..saved import COUNT, MOMENT, SECOND, Field, Number, Raw
from . import PortClaim, ones
from .pic import Interrupts

__all__ = ["LINE", "Cmos", "bcd"]

LINE: Final = 8
_CRYSTAL_HZ: Final = 32_768
_SECOND_NS: Final = 1_000_000_000
_A, _B, _C, _D, _CENTURY = 0x0A, 0x0B, 0x0C, 0x0D, 0x32
_TIME: Final = frozenset((0, 2, 4, 6, 7, 8, 9, _CENTURY))
_BINARY, _HOURS_24 = 0x04, 0x02
_PERIODIC, _ALARM, _UPDATE, _ANY = 0x40, 0x20, 0x10, 0x80     # the same bits in B (enable) and C (flag)
_SET: Final = 0x80                                            # B: updates stopped
_ALARM_WINDOW_S: Final = 60
_UPDATING: Final = 0x80                                       # A: an update is in progress
_UPDATE_NS: Final = 2_228_000                                 # 244 us of warning, 1984 us of update
_YEARS_S: Final = 200 * 366 * 86_400                         # no guest sets a date farther away


class Cmos:
    """`changed()` is called when the guest asks for other interrupts than before."""

    SAVED: ClassVar[Field] = {
        "_index": Number(127), "_since_ns": MOMENT, "_periods": COUNT, "_second": SECOND, "_ram": Raw(128),
        "_offset_s": Number(_YEARS_S, -_YEARS_S)}
    WIRING: ClassVar[frozenset[str]] = frozenset({"_clock", "_interrupts", "_changed"})

    def __init__(self, clock: Clock, memory_bytes: int, disks: Mapping[int, Geometry],
                 interrupts: Interrupts, changed: Callable[[], None]) -> None:
        self._clock, self._interrupts, self._changed = clock, interrupts, changed
        self._index = 0
        self._since_ns = clock.monotonic_ns()      # periods are counted from here
        self._periods = 0
        self._offset_s = 0                         # of the guest's date from the host's
        self._second = clock.wall_ns() // _SECOND_NS
        extended = min(max(0, (memory_bytes >> 10) - 1024), 0xFFFF)
        high = min(max(0, (memory_bytes >> 16) - 256), 0xFFFF)
        self._ram = bytearray(128)
        self._ram[_A], self._ram[_B] = 0x26, _HOURS_24
        self._ram[_D] = 0x80                       # battery good
        floppies = [disks[drive].floppy_type if drive in disks else 0 for drive in (0x00, 0x01)]
        there = sum(1 for kind in floppies if kind)
        self._ram[0x10] = floppies[0] << 4 | floppies[1]
        self._ram[0x14] = 0x20 | (0x01 | there - 1 << 6 if there else 0)
        # Types of the hard disks: 15 stands for a number in the extended bytes, 47 for "the user's own".
        self._ram[0x12] = (0xF0 if 0x80 in disks else 0) | (0x0F if 0x81 in disks else 0)
        self._ram[0x19], self._ram[0x1A] = (47 if drive in disks else 0 for drive in (0x80, 0x81))
        self._ram[0x15:0x17] = (640).to_bytes(2, "little")
        self._ram[0x17:0x19] = self._ram[0x30:0x32] = extended.to_bytes(2, "little")
        self._ram[0x34:0x36] = high.to_bytes(2, "little")
        self._ram[0x2E:0x30] = sum(self._ram[0x10:0x2E]).to_bytes(2, "big")      # the checksum that a setup keeps

    def ports(self) -> Iterable[PortClaim]:
        yield 0x70, ones, self._select
        yield 0x71, self._read, self._write

    def now(self) -> datetime.datetime:
        return _date(self._clock.wall_ns() // _SECOND_NS + self._offset_s)

    def set_now(self, **fields: int) -> bool:
        """Set fields of the date (`year` to `second`); False when there is no such date."""
        before = self.now()
        now = {"year": before.year, "month": before.month, "day": before.day, "hour": before.hour,
               "minute": before.minute, "second": before.second, **fields}
        try:
            wanted = datetime.datetime(**now, tzinfo=datetime.UTC)
        except ValueError:
            return False
        offset = self._offset_s + round((wanted - before).total_seconds())
        if abs(offset) > _YEARS_S:
            return False
        self._offset_s = offset
        self._changed()
        return True

    def set_alarm(self, at: tuple[int, int, int] | None) -> None:
        """The alarm at (hour, minute, second) in the registers' own form, or none: INT 1Ah/06h and 07h."""
        if at is not None:
            self._ram[5], self._ram[3], self._ram[1] = at
        self._control(self._ram[_B] & ~_ALARM | (0 if at is None else _ALARM))

    @property
    def alarm_is_on(self) -> bool:
        return bool(self._ram[_B] & _ALARM)

    # Interrupts.

    def _period_ns(self) -> int:
        """Length of a period; 0 when switched off."""
        rate = self._ram[_A] & 0x0F
        if rate in (1, 2):
            rate += 7                              # the chip's own exception: 256 and 128 Hz
        return (_SECOND_NS << (rate - 1)) // _CRYSTAL_HZ if rate else 0

    def poll(self, now_ns: int) -> None:
        flags = 0
        period = self._period_ns()
        if period:
            periods = (now_ns - self._since_ns) // period
            if periods > self._periods:
                flags |= _PERIODIC
            self._periods = periods
        second = self._clock.wall_ns() // _SECOND_NS
        if second > self._second and not self._ram[_B] & _SET:
            flags |= _UPDATE
            first = max(self._second + 1, second - _ALARM_WINDOW_S + 1)
            if self._ram[_B] & _ALARM and any(self._alarm_at(at) for at in range(first, second + 1)):
                flags |= _ALARM
        self._second = second
        if flags:
            self._ram[_C] |= flags
        if self._ram[_C] & self._ram[_B] & (_PERIODIC | _ALARM | _UPDATE):
            self._ram[_C] |= _ANY
            self._interrupts.set(LINE, True)

    def next_ns(self) -> int | None:
        """When `poll` has something to do again: None when nothing is enabled, or nothing fetched yet."""
        enabled = self._ram[_B]
        if not enabled & (_PERIODIC | _ALARM | _UPDATE) or self._ram[_C] & _ANY:
            return None
        moments: list[int] = []
        period = self._period_ns()
        if enabled & _PERIODIC and period:
            moments.append(self._since_ns + (self._periods + 1) * period)
        if enabled & (_ALARM | _UPDATE) and not enabled & _SET:
            moments.append(self._clock.monotonic_ns() + (self._second + 1) * _SECOND_NS - self._clock.wall_ns())
        return min(moments, default=None)

    def _alarm_at(self, second: int) -> bool:
        now = _date(second + self._offset_s)
        wanted = self._ram[1], self._ram[3], self._ram[5]
        present = self._shown(now.second), self._shown(now.minute), self._hour(now.hour)
        return all(want >= 0xC0 or want == have for want, have in zip(wanted, present, strict=True))

    # Ports.

    def _shown(self, value: int) -> int:
        return value if self._ram[_B] & _BINARY else bcd(value)

    def _hour(self, hour: int) -> int:
        if self._ram[_B] & _HOURS_24:
            return self._shown(hour)
        return self._shown((hour + 11) % 12 + 1) | (0x80 if hour >= 12 else 0)

    def _select(self, value: int) -> None:
        self._index = value & 0x7F                 # bit 7 masks NMI on a PC

    def _read(self) -> int:
        index = self._index
        if index == _C:
            self.poll(self._clock.monotonic_ns())
            flags, self._ram[_C] = self._ram[_C], 0
            self._interrupts.set(LINE, False)
            self._changed()
            return flags
        if index == _A:
            left_ns = _SECOND_NS - self._clock.wall_ns() % _SECOND_NS
            stopped = self._ram[_B] & _SET
            return self._ram[_A] | (_UPDATING if left_ns <= _UPDATE_NS and not stopped else 0)
        if index not in _TIME or self._ram[_B] & _SET:
            return self._ram[index]
        return self._field(index)

    def _field(self, index: int) -> int:
        now = self.now()
        if index == 4:
            return self._hour(now.hour)
        return self._shown({
            0: now.second, 2: now.minute, 6: now.isoweekday() % 7 + 1,
            7: now.day, 8: now.month, 9: now.year % 100, _CENTURY: now.year // 100,
        }[index])

    def _write(self, value: int) -> None:
        index = self._index
        if index in (_C, _D):
            return                                 # read-only
        if index == _B:
            self._control(value)
        elif index == _A:
            now_ns = self._clock.monotonic_ns()
            self.poll(now_ns)
            self._ram[_A] = value & ~_UPDATING
            self._since_ns, self._periods = now_ns, 0
            self._changed()
        elif index in _TIME and not self._ram[_B] & _SET:
            for at in _TIME:                       # the others stay what they are now
                self._ram[at] = self._field(at)
            self._ram[index] = value
            self._take_registers()
        else:
            self._ram[index] = value

    def _take_registers(self) -> None:
        """The date that the clock's registers hold becomes now; a date that does not exist is not taken."""
        binary = self._ram[_B] & _BINARY

        def number(index: int) -> int:
            raw = self._ram[index]
            return raw if binary else (raw >> 4) * 10 + (raw & 0x0F)

        hour = number(4)
        if not self._ram[_B] & _HOURS_24:
            half = self._ram[4] & 0x80
            hour = ((self._ram[4] & 0x7F) if binary else (self._ram[4] >> 4 & 7) * 10 + (self._ram[4] & 0x0F)) % 12
            hour += 12 if half else 0
        self.set_now(year=number(_CENTURY) * 100 + number(9), month=number(8), day=number(7), hour=hour,
                     minute=number(2), second=number(0))

    def _control(self, value: int) -> None:
        """Register B."""
        self.poll(self._clock.monotonic_ns())
        before, self._ram[_B] = self._ram[_B], value
        if value & _SET and not before & _SET:     # updates stop: the registers hold what they showed
            self._ram[_B] = value & ~_SET
            for at in _TIME:
                self._ram[at] = self._field(at)
            self._ram[_B] = value
        elif before & _SET and not value & _SET:
            self._take_registers()
        if not self._ram[_C] & self._ram[_B] & (_PERIODIC | _ALARM | _UPDATE):
            self._ram[_C] &= ~_ANY
            self._interrupts.set(LINE, False)
        self._changed()


def _date(second: int) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(second, tz=datetime.UTC)


def bcd(value: int) -> int:
    """Binary coded decimal of 0 to 99."""
    return value // 10 << 4 | value % 10
