"""The 8254 interval timer (ports 40h to 43h) and the speaker port 61h that gates channel 2.

Theory.  A counter's value is a function of the clock: nothing ticks in the background.  Reads
differ from one to the next, which is what guests take for randomness (`in al, 40h`), and
a latched value stays until it has been read.  Channel 2's gate and output let an operating
system measure a delay through port 61h.

Channel 0 interrupts (line 0): each rising edge of its output is a *tick*.  Which ticks have come by
now follows from the clock alone, without drift: tick k of a count of n comes k*n/PIT_HZ after the
count was written.  `poll` brings the controller up to date, `next_ns` says when it is worth polling.

Ticks owed.  A VM that had no CPU, or interrupts off, has missed ticks.  Like the timers of other hypervisors
that keep a guest's clock right, they are made up for: one at a time, each when the one before
has been acknowledged, at most CATCH_UP times as fast as programmed.  What is owed beyond OWED_S seconds'
worth is given up and counted (`lost`).  While a guest has masked the line it wants no ticks: none are owed, but
the one edge that a controller would remember.

Gates: channels 0 and 1 have theirs open for good, as on a PC, so modes 1 and 5, which a rising gate starts, never
start there.  Channel 2's is bit 0 of port 61h: closed it stops the count (modes 0, 2, 3, 4), rising it starts one
(1, 2, 3, 5).

Source: Intel 8254 data sheet (231164).
Where it is poor: a count written in the middle of a period of modes 2 and 3 starts at once, not with the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import ClassVar, Final

from ..clock import PIT_HZ, Clock
from ..saved import BYTE, COUNT, FLAG, MOMENT, Each, Field, Maybe, Number
from . import PortClaim
from .pic import Interrupts

__all__ = ["CATCH_UP", "LINE", "OWED_S", "Timer"]

LINE: Final = 0
CATCH_UP: Final = 8
OWED_S: Final = 2
_SECOND_NS: Final = 1_000_000_000
_PERIODIC: Final = (2, 3)
_ONE_SHOT: Final = (0, 4)
_TRIGGERED: Final = (1, 5)


def _to_bcd(number: int) -> int:
    return int(str(number), 16)


def _from_bcd(raw: int) -> int:
    """What four decimal digits count; digits above nine count as what they are."""
    return sum((raw >> 4 * place & 0xF) * 10**place for place in range(4))


class _Channel:
    SAVED: ClassVar[Field] = {
        "mode": Number(5), "access": Number(3, low=1), "reload": Number(0x10000, low=1), "since_ns": MOMENT,
        "waiting": FLAG, "decimal": FLAG, "stopped_ns": Maybe(MOMENT), "triggered": FLAG,
        "latched": Maybe(Number(0xFFFF)), "status": Maybe(BYTE), "high_next": FLAG,
        "_low": Maybe(BYTE),
    }
    WIRING: ClassVar[frozenset[str]] = frozenset({"_clock"})

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.mode, self.access, self.reload = 3, 3, 0x10000
        self.since_ns = clock.monotonic_ns()
        self.waiting = False                       # a mode without its count: the counter stands
        self.decimal = False                       # counts in BCD
        self.stopped_ns: int | None = None         # when the gate was closed
        self.triggered = False                     # modes 1 and 5: by a rising gate
        self.latched: int | None = None
        self.status: int | None = None
        self.high_next = False                     # of a read
        self._low: int | None = None               # first byte of a written count

    def elapsed(self) -> int:
        now_ns = self._clock.monotonic_ns() if self.stopped_ns is None else self.stopped_ns
        return (now_ns - self.since_ns) * PIT_HZ // _SECOND_NS

    def value(self) -> int:
        """The counting element, as it is read: in BCD where that was asked for."""
        elapsed = self.elapsed()
        if self.mode == 3:                         # square wave: counts down by two
            count = self.reload - elapsed * 2 % self.reload
        elif self.mode == 2:
            count = self.reload - elapsed % self.reload
        elif self.mode in _TRIGGERED and not self.triggered:
            count = self.reload
        else:
            count = self.reload - elapsed
        return _to_bcd(count % 10_000) if self.decimal else count & 0xFFFF

    def output(self) -> bool:
        if self.waiting:
            return self.mode != 0
        elapsed = self.elapsed()
        if self.mode == 3:
            return self.stopped_ns is not None or elapsed * 2 % (2 * self.reload) < self.reload
        if self.mode == 2:
            return self.stopped_ns is not None or elapsed % self.reload != self.reload - 1
        if self.mode == 0:
            return elapsed >= self.reload
        if self.mode == 1:
            return not self.triggered or elapsed >= self.reload
        return (self.mode == 5 and not self.triggered) or elapsed != self.reload      # a strobe of one clock

    def gate(self, level: bool) -> None:
        """The gate input has changed."""
        now_ns = self._clock.monotonic_ns()
        if not level:
            if self.mode not in _TRIGGERED:
                self.stopped_ns = now_ns
            return
        if self.mode in (*_TRIGGERED, *_PERIODIC):
            self.since_ns, self.triggered = now_ns, True
        elif self.stopped_ns is not None:          # goes on where it was
            self.since_ns += now_ns - self.stopped_ns
        self.stopped_ns = None

    def edges(self, now_ns: int) -> int:
        """Rising edges of the output since the count was written."""
        if self.waiting:
            return 0
        elapsed = (now_ns - self.since_ns) * PIT_HZ // _SECOND_NS
        if self.mode in _PERIODIC:
            return elapsed // self.reload
        return int(self.mode in _ONE_SHOT and elapsed >= self.reload)

    def edge_ns(self, number: int) -> int | None:
        """When edge *number* (from 1) comes; None when it never does."""
        if self.waiting or (self.mode not in _PERIODIC and (number > 1 or self.mode not in _ONE_SHOT)):
            return None
        return self.since_ns - -number * self.reload * _SECOND_NS // PIT_HZ

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

    def write(self, byte: int) -> bool:
        """A byte of the count; whether the count is complete and starts."""
        if self.access == 3:
            if self._low is None:
                self._low = byte
                return False
            count, self._low = byte << 8 | self._low, None
        else:
            count = byte << 8 if self.access == 2 else byte
        self.reload = (_from_bcd(count) or 10_000) if self.decimal else count or 0x10000
        if self.mode not in _TRIGGERED:
            self.since_ns = self._clock.monotonic_ns()
            if self.stopped_ns is not None:
                self.stopped_ns = self.since_ns
        self.waiting = False
        return True

    def control(self, byte: int) -> None:
        self.access = byte >> 4 & 3
        mode = byte >> 1 & 7
        self.mode = mode & 3 if mode > 5 else mode
        self.decimal = bool(byte & 1)
        self.triggered = False
        self.high_next = False
        self._low = self.latched = self.status = None
        self.since_ns = self._clock.monotonic_ns()
        if self.stopped_ns is not None:
            self.stopped_ns = self.since_ns
        self.waiting = True

    def latch_count(self) -> None:
        if self.latched is None:
            self.latched = self.value()

    def latch_status(self) -> None:
        if self.status is None:
            self.status = (self.output() << 7 | self.waiting << 6 | self.access << 4 | self.mode << 1
                           | self.decimal)


class Timer:
    """`changed()` is called when the guest programs channel 0, `lost(n)` when ticks are given up."""

    SAVED: ClassVar[Field] = {
        "_channels": Each(), "_gate": Number(15), "_seen": COUNT, "_owed": COUNT, "_not_before_ns": MOMENT}
    WIRING: ClassVar[frozenset[str]] = frozenset({"_clock", "_interrupts", "_changed", "_lost"})

    def __init__(self, clock: Clock, interrupts: Interrupts, *, changed: Callable[[], None],
                 lost: Callable[[int], None]) -> None:
        self._clock, self._interrupts = clock, interrupts
        self._changed, self._lost = changed, lost
        self._channels = [_Channel(clock) for _ in range(3)]
        self._gate = 0
        self._channels[2].gate(False)
        self._seen = 0                             # edges of channel 0 that are accounted for
        self._owed = 0                             # of these, not given to the controller yet
        self._not_before_ns = 0

    def ports(self) -> Iterable[PortClaim]:
        for index, channel in enumerate(self._channels):
            yield 0x40 + index, channel.read, lambda byte, index=index: self._count(index, byte)
        yield 0x43, lambda: 0xFF, self._command
        yield 0x61, self._read_gate, self._write_gate

    # Interrupts.

    def poll(self, now_ns: int) -> None:
        """Account for the ticks up to now and give the controller the next one that is owed."""
        channel, interrupts = self._channels[0], self._interrupts
        edges = channel.edges(now_ns)
        due, self._seen = edges - self._seen, edges
        if interrupts.masked(LINE):
            if due or self._owed:
                self._owed = 0
                interrupts.pulse(LINE)             # remembered once, however many there were
            return
        self._owed += due
        most = max(1, OWED_S * PIT_HZ // channel.reload)
        if self._owed > most:
            self._lost(self._owed - most)
            self._owed = most
        if self._owed and now_ns >= self._not_before_ns and not interrupts.requested(LINE):
            self._owed -= 1
            self._not_before_ns = now_ns + channel.reload * _SECOND_NS // (PIT_HZ * CATCH_UP)
            interrupts.pulse(LINE)

    def next_ns(self) -> int | None:
        """When `poll` has something to do again, None: not before the guest does something."""
        if self._interrupts.masked(LINE) or self._interrupts.requested(LINE):
            return None
        if self._owed:
            return self._not_before_ns
        return self._channels[0].edge_ns(self._seen + 1)

    # Ports.

    def _count(self, index: int, byte: int) -> None:
        if index == 0:
            self.poll(self._clock.monotonic_ns())
        if self._channels[index].write(byte) and index == 0:
            self._start_anew()

    def _start_anew(self) -> None:
        self._seen = self._owed = 0
        self._changed()

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
            if select == 0:
                self._start_anew()

    def _read_gate(self) -> int:
        # Bit 4 toggles with every memory refresh of a PC, 15 us: old delay loops watch it.
        refresh = self._clock.monotonic_ns() // 15_085 & 1
        return self._gate | refresh << 4 | self._channels[2].output() << 5

    def _write_gate(self, byte: int) -> None:
        if (byte ^ self._gate) & 1:
            self._channels[2].gate(bool(byte & 1))
        self._gate = byte & 0x0F
