"""The 8254 interval timer (ports 40h to 43h) and the speaker port 61h that gates channel 2.

Theory.  A counter's value is a function of the clock: nothing ticks in the background.  Reads
differ from one to the next, which is what guests take for randomness (`in al, 40h`), and
a latched value stays until it has been read.  Channel 2's gate and output let an operating
system measure a delay through port 61h.

Where it is poor: no interrupt comes from channel 0 (the worker delivers ticks otherwise), and
modes 1, 4 and 5 count like mode 0.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..clock import PIT_HZ, Clock
from . import PortClaim

__all__ = ["Timer"]


class _Channel:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.mode, self.access, self.reload = 3, 3, 0x10000
        self.since_ns = clock.monotonic_ns()
        self.latched: int | None = None
        self.status: int | None = None
        self.high_next = False
        self._low = 0

    def elapsed(self) -> int:
        return (self._clock.monotonic_ns() - self.since_ns) * PIT_HZ // 1_000_000_000

    def value(self) -> int:
        elapsed = self.elapsed()
        if self.mode == 3:                         # square wave: counts down by two
            return (self.reload - elapsed * 2 % self.reload) & 0xFFFF
        if self.mode == 2:
            return (self.reload - elapsed % self.reload) & 0xFFFF
        return (self.reload - elapsed) & 0xFFFF

    def output(self) -> bool:
        elapsed = self.elapsed()
        if self.mode == 3:
            return elapsed * 2 % (2 * self.reload) < self.reload
        if self.mode == 2:
            return elapsed % self.reload != self.reload - 1
        return elapsed >= self.reload

    def read(self) -> int:
        if self.status is not None:
            status, self.status = self.status, None
            return status
        value = self.value() if self.latched is None else self.latched
        if self.access == 3:
            high, self.high_next = self.high_next, not self.high_next
            if high:
                self.latched = None
        else:
            high = self.access == 2
            self.latched = None
        return value >> 8 if high else value & 0xFF

    def write(self, byte: int) -> None:
        if self.access == 3:
            self.high_next = not self.high_next
            if self.high_next:
                self._low = byte
                return
            count = byte << 8 | self._low
        else:
            count = byte << 8 if self.access == 2 else byte
        self.reload = count or 0x10000
        self.since_ns = self._clock.monotonic_ns()

    def control(self, byte: int) -> None:
        self.access = byte >> 4 & 3
        mode = byte >> 1 & 7
        self.mode = mode & 3 if mode > 5 else mode
        self.high_next = False
        self.latched = self.status = None
        # Until a count is written the output follows the new mode from now on.
        self.since_ns = self._clock.monotonic_ns()

    def latch_count(self) -> None:
        if self.latched is None:
            self.latched = self.value()

    def latch_status(self) -> None:
        if self.status is None:
            self.status = self.output() << 7 | self.access << 4 | self.mode << 1


class Timer:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._channels = [_Channel(clock) for _ in range(3)]
        self._gate = 0

    def ports(self) -> Iterable[PortClaim]:
        for index, channel in enumerate(self._channels):
            yield 0x40 + index, channel.read, channel.write
        yield 0x43, lambda: 0xFF, self._command
        yield 0x61, self._read_gate, self._write_gate

    def _command(self, byte: int) -> None:
        select = byte >> 6
        if select == 3:                            # read-back: a bit per channel, inverted latches
            for index, channel in enumerate(self._channels):
                if byte >> (index + 1) & 1:
                    if not byte & 0x20:
                        channel.latch_count()
                    if not byte & 0x10:
                        channel.latch_status()
        elif byte >> 4 & 3 == 0:
            self._channels[select].latch_count()
        else:
            self._channels[select].control(byte)

    def _read_gate(self) -> int:
        # Bit 4 toggles with every memory refresh of a PC, 15 us: old delay loops watch it.
        refresh = self._clock.monotonic_ns() // 15_085 & 1
        return self._gate | refresh << 4 | self._channels[2].output() << 5

    def _write_gate(self, byte: int) -> None:
        if byte & 1 and not self._gate & 1:        # a rising gate starts the count anew
            self._channels[2].since_ns = self._clock.monotonic_ns()
        self._gate = byte & 0x0F
