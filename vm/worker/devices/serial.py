"""A 16550 serial port, polled, and the bounded memory of what the guest printed.

Theory.  Output goes into a ring of the last 64 KiB with absolute offsets: a reader that comes
late loses the oldest bytes and knows it from the offset, and a guest can never make the worker
grow.  A token bucket (`RATE` bytes a second, `BURST` at once) limits what is taken at all: bytes
above it are dropped and counted, so that a flooding guest does not overwrite in milliseconds
what a person wanted to read.  The guest itself is never slowed: the transmitter is always ready.

The bucket gets `now` passed in and carries the fractions of a byte, so what it grants does not
depend on how often it is asked.

Where it is poor: no interrupts are raised (IER and IIR are readable, nothing is delivered).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import ClassVar, Final

from ..clock import Clock
from ..protocol import SERIAL_RING_BYTES
from ..saved import BYTE, MOMENT, Field, Many, Number, Part
from . import PortClaim

__all__ = ["BURST_BYTES", "COM1", "RATE_BYTES_PER_S", "OutputRing", "Serial", "TokenBucket"]

COM1: Final = 0x3F8
RATE_BYTES_PER_S: Final = 64 << 10         # five times a real port's 115200 baud
BURST_BYTES: Final = 64 << 10
INPUT_BYTES: Final = 4096

_LSR_DATA_READY, _LSR_IDLE = 0x01, 0x60
_MCR_LOOP = 0x10
_TOKEN: Final = 1_000_000_000      # credit is counted in billionths of a byte: rate x nanoseconds


class TokenBucket:
    """At most *burst* at once and *rate* per second in the long run."""

    SAVED: ClassVar[Field] = {"_credit": Number(BURST_BYTES * _TOKEN), "_since_ns": MOMENT}
    WIRING: ClassVar[frozenset[str]] = frozenset({"_rate", "_full"})

    def __init__(self, rate_per_s: int, burst: int, now_ns: int) -> None:
        self._rate, self._full = rate_per_s, burst * _TOKEN
        self._credit, self._since_ns = self._full, now_ns

    def take(self, now_ns: int) -> bool:
        """One token, if there is one."""
        self._credit = min(self._full, self._credit + (now_ns - self._since_ns) * self._rate)
        self._since_ns = now_ns
        if self._credit < _TOKEN:
            return False
        self._credit -= _TOKEN
        return True


class OutputRing:
    """The newest `capacity` bytes of an endless stream, addressed by their offset in it."""

    def __init__(self, capacity: int = SERIAL_RING_BYTES) -> None:
        self._data = bytearray(capacity)
        self._capacity = capacity
        self.end = 0

    def append(self, byte: int) -> None:
        self._data[self.end % self._capacity] = byte
        self.end += 1

    def read(self, offset: int, limit: int) -> tuple[int, bytes]:
        """`(start of the data, data)`: a lost offset moves up, one from the future down."""
        start = min(max(offset, self.end - self._capacity, 0), self.end)
        length = min(limit, self.end - start)
        first = start % self._capacity
        data = bytes(self._data[first:first + length])
        return start, data + bytes(self._data[:length - len(data)])


class Serial:
    """`count(name, n)` is told of `serial_bytes` and `serial_dropped_bytes`."""

    SAVED: ClassVar[Field] = {
        "_bucket": Part(), "_input": Many(BYTE, INPUT_BYTES), "_divisor": Number(0xFFFF),
        **dict.fromkeys(("_ier", "_fcr", "_scratch", "_lcr", "_mcr"), BYTE),
    }
    # What was printed is the operator's, in the log and behind the operation `serial`: a restored VM prints on.
    WIRING: ClassVar[frozenset[str]] = frozenset({"_clock", "_count", "_base", "ring", "dropped"})

    def __init__(self, clock: Clock, count: Callable[[str, int], None], base: int = COM1) -> None:
        self._clock, self._count, self._base = clock, count, base
        self._bucket = TokenBucket(RATE_BYTES_PER_S, BURST_BYTES, clock.monotonic_ns())
        self._input: deque[int] = deque()
        self.ring = OutputRing()
        self.dropped = 0
        self._divisor = 12                     # 9600 baud, what a PC's firmware leaves
        self._ier = self._fcr = self._scratch = 0
        self._lcr, self._mcr = 0x03, 0x08

    def ports(self) -> Iterable[PortClaim]:
        registers = (
            (self._read_data, self._write_data), (self._read_ier, self._write_ier),
            (self._read_iir, self._write_fcr), (lambda: self._lcr, self._write_lcr),
            (lambda: self._mcr, self._write_mcr), (self.line_status, lambda _value: None),
            (self._read_msr, lambda _value: None), (lambda: self._scratch, self._write_scratch),
        )
        for index, (read, write) in enumerate(registers):
            yield self._base + index, read, write

    def put(self, byte: int) -> None:
        """The guest prints one byte (also used by the debug port)."""
        if self._bucket.take(self._clock.monotonic_ns()):
            self.ring.append(byte)
            self._count("serial_bytes", 1)
        else:
            self.dropped += 1
            self._count("serial_dropped_bytes", 1)

    def feed(self, data: bytes) -> int:
        """Input for the guest; returns how many bytes there was room for."""
        accepted = data[:max(0, INPUT_BYTES - len(self._input))]
        self._input.extend(accepted)
        return len(accepted)

    def line_status(self) -> int:
        return _LSR_IDLE | (_LSR_DATA_READY if self._input else 0)

    def take(self) -> int:
        """The next input byte; 0 when there is none."""
        return self._input.popleft() if self._input else 0

    def _read_data(self) -> int:
        return self._divisor & 0xFF if self._lcr & 0x80 else self.take()

    def _write_data(self, value: int) -> None:
        if self._lcr & 0x80:
            self._divisor = self._divisor & 0xFF00 | value
        elif self._mcr & _MCR_LOOP:
            self.feed(bytes([value]))
        else:
            self.put(value)

    def _read_ier(self) -> int:
        return self._divisor >> 8 if self._lcr & 0x80 else self._ier

    def _write_ier(self, value: int) -> None:
        if self._lcr & 0x80:
            self._divisor = self._divisor & 0xFF | value << 8
        else:
            self._ier = value & 0x0F

    def _read_iir(self) -> int:
        return 0x01 | (0xC0 if self._fcr & 1 else 0)   # nothing pending; FIFOs on

    def _write_fcr(self, value: int) -> None:
        self._fcr = value
        if value & 0x02:
            self._input.clear()

    def _write_lcr(self, value: int) -> None:
        self._lcr = value

    def _write_mcr(self, value: int) -> None:
        self._mcr = value & 0x1F

    def _read_msr(self) -> int:
        if not self._mcr & _MCR_LOOP:
            return 0xB0                                # carrier, data set and clear to send
        # Loop back: RTS->CTS, DTR->DSR, OUT1->RI, OUT2->CD; a driver's way to detect a 16550.
        mcr = self._mcr
        return (mcr & 2) << 3 | (mcr & 1) << 5 | (mcr & 4) << 4 | (mcr & 8) << 4

    def _write_scratch(self, value: int) -> None:
        self._scratch = value
