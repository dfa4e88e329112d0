"""A 16550A serial port with its interrupts, and the bounded memory of what the guest printed.

Theory.  Output goes into a ring of the last 64 KiB with absolute offsets: a reader that comes
late loses the oldest bytes and knows it from the offset, and a guest can never make the worker
grow.  A token bucket (`RATE` bytes a second, `BURST` at once) limits what is taken at all: bytes
above it are dropped and counted, so that a flooding guest does not overwrite in milliseconds
what a person wanted to read.  The guest itself is never slowed: the transmitter is always ready.

The bucket gets `now` passed in and carries the fractions of a byte, so what it grants does not
depend on how often it is asked.

Input waits on the *wire* (bounded; `feed` says how much it took) and moves on into the receive FIFO as there is
room, so a slow guest loses nothing: as behind a partner that obeys flow control.

Interrupts (line 4) by priority, IIR's low four bits: line status 6 (an overrun, in loop-back only), received data 4
(the trigger level is reached) or Ch (less, and nothing more is on the wire), transmitter empty 2, modem status 0.
"Transmitter empty" is an event: a byte written, or its enable bit set anew; reading IIR as that source takes it
back.  As on a PC the line goes through OUT2, which loop-back opens.

Source: National Semiconductor PC16550D data sheet; what Linux' 8250 driver and DOS' probe.
Where it is poor: line speed, parity and break are remembered and mean nothing; there is no XON/XOFF.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import ClassVar, Final

from ..clock import Clock
from ..protocol import SERIAL_RING_BYTES
from ..saved import BYTE, FLAG, MOMENT, Field, Many, Number, Part
from . import PortClaim

__all__ = ["BURST_BYTES", "COM1", "FIFO_BYTES", "LINE", "RATE_BYTES_PER_S", "OutputRing", "Serial", "TokenBucket"]

COM1: Final = 0x3F8
RATE_BYTES_PER_S: Final = 64 << 10         # five times a real port's 115200 baud
BURST_BYTES: Final = 64 << 10
INPUT_BYTES: Final = 4096

FIFO_BYTES: Final = 16
LINE: Final = 4

_IER_DATA, _IER_EMPTY, _IER_LINE, _IER_MODEM = 0x01, 0x02, 0x04, 0x08
_IIR_MODEM, _IIR_NOTHING, _IIR_EMPTY, _IIR_DATA, _IIR_LINE, _IIR_TIMEOUT = 0x00, 0x01, 0x02, 0x04, 0x06, 0x0C
_FCR_ENABLE, _FCR_CLEAR_RECEIVER = 0x01, 0x02
_TRIGGERS: Final = (1, 4, 8, 14)               # bytes, by the upper two bits of FCR
_LCR_DIVISOR: Final = 0x80
_LSR_DATA_READY, _LSR_OVERRUN, _LSR_IDLE = 0x01, 0x02, 0x60
_MCR_OUT2, _MCR_LOOP = 0x08, 0x10
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
    """`count(name, n)` is told of `serial_bytes` and `serial_dropped_bytes`; `line(level)` is its interrupt."""

    SAVED: ClassVar[Field] = {
        "_bucket": Part(), "_wire": Many(BYTE, INPUT_BYTES), "_fifo": Many(BYTE, FIFO_BYTES),
        "_divisor": Number(0xFFFF), "_overrun": FLAG, "_empty_event": FLAG, "_deltas": Number(0x0F),
        **dict.fromkeys(("_ier", "_fcr", "_scratch", "_lcr", "_mcr"), BYTE),
    }
    # What was printed is the operator's, in the log and behind the operation `serial`: a restored VM prints on.
    WIRING: ClassVar[frozenset[str]] = frozenset({"_clock", "_count", "_line", "_base", "ring", "dropped"})

    def __init__(self, clock: Clock, count: Callable[[str, int], None],
                 line: Callable[[bool], None] = lambda _level: None, base: int = COM1) -> None:
        self._clock, self._count, self._line, self._base = clock, count, line, base
        self._bucket = TokenBucket(RATE_BYTES_PER_S, BURST_BYTES, clock.monotonic_ns())
        self._wire: deque[int] = deque()
        self._fifo: deque[int] = deque()
        self.ring = OutputRing()
        self.dropped = 0
        self._divisor = 12                     # 9600 baud, what a PC's firmware leaves
        self._ier = self._fcr = self._scratch = 0
        self._lcr, self._mcr = 0x03, 0x08
        self._overrun = False
        self._empty_event = False              # the transmitter has become empty, and nobody was told
        self._deltas = 0                       # low four bits of the modem status

    def ports(self) -> Iterable[PortClaim]:
        registers = (
            (self._read_data, self._write_data), (self._read_ier, self._write_ier),
            (self._read_iir, self._write_fcr), (lambda: self._lcr, self._write_lcr),
            (lambda: self._mcr, self._write_mcr), (self._read_lsr, lambda _value: None),
            (self._read_msr, lambda _value: None), (lambda: self._scratch, self._write_scratch),
        )
        for index, (read, write) in enumerate(registers):
            yield self._base + index, read, write

    # The two ends of the wire.

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
        accepted = data[:max(0, INPUT_BYTES - len(self._wire) - len(self._fifo))]
        self._wire.extend(accepted)
        self._receive()
        return len(accepted)

    def _receive(self) -> None:
        """Move on what is on the wire, and say whether something asks for an interrupt now."""
        room = FIFO_BYTES if self._fcr & _FCR_ENABLE else 1
        if not self._mcr & _MCR_LOOP:          # loop-back takes the receiver off the wire
            while self._wire and len(self._fifo) < room:
                self._fifo.append(self._wire.popleft())
        self._signal()

    def _signal(self) -> None:
        self._line(self._pending() is not None and self._mcr & (_MCR_OUT2 | _MCR_LOOP) == _MCR_OUT2)

    def _pending(self) -> int | None:
        """The source of the highest priority that is enabled and has something to say, as in IIR."""
        if self._ier & _IER_LINE and self._overrun:
            return _IIR_LINE
        if self._ier & _IER_DATA and self._fifo:
            trigger = _TRIGGERS[self._fcr >> 6] if self._fcr & _FCR_ENABLE else 1
            return _IIR_DATA if len(self._fifo) >= trigger else _IIR_TIMEOUT
        if self._ier & _IER_EMPTY and self._empty_event:
            return _IIR_EMPTY
        if self._ier & _IER_MODEM and self._deltas:
            return _IIR_MODEM
        return None

    # For the BIOS.

    def line_status(self) -> int:
        """LSR without the effect of reading it."""
        return _LSR_IDLE | (_LSR_DATA_READY if self._fifo else 0) | (_LSR_OVERRUN if self._overrun else 0)

    def modem_status(self) -> int:
        """The upper half of MSR."""
        if not self._mcr & _MCR_LOOP:
            return 0xB0                                # carrier, data set and clear to send
        # Loop back: RTS->CTS, DTR->DSR, OUT1->RI, OUT2->CD; a driver's way to detect a 16550.
        mcr = self._mcr
        return (mcr & 2) << 3 | (mcr & 1) << 5 | (mcr & 4) << 4 | (mcr & 8) << 4

    def take(self) -> int:
        """The next input byte; 0 when there is none."""
        byte = self._fifo.popleft() if self._fifo else 0
        self._signal()                         # the line falls before the next byte comes, so that this is an edge
        self._receive()
        return byte

    def configure(self, divisor: int, lcr: int) -> None:
        """What INT 14h/00h sets."""
        self._divisor, self._lcr = divisor, lcr & 0x1F

    # Registers.

    def _read_data(self) -> int:
        return self._divisor & 0xFF if self._lcr & _LCR_DIVISOR else self.take()

    def _write_data(self, value: int) -> None:
        if self._lcr & _LCR_DIVISOR:
            self._divisor = self._divisor & 0xFF00 | value
            return
        if not self._mcr & _MCR_LOOP:
            self.put(value)
        elif len(self._fifo) < (FIFO_BYTES if self._fcr & _FCR_ENABLE else 1):
            self._fifo.append(value)
        else:
            self._overrun = True
        # The byte is gone at once: empty again. The line falls in between, so that this is an edge.
        self._empty_event = False
        self._signal()
        self._empty_event = True
        self._signal()

    def _read_ier(self) -> int:
        return self._divisor >> 8 if self._lcr & _LCR_DIVISOR else self._ier

    def _write_ier(self, value: int) -> None:
        if self._lcr & _LCR_DIVISOR:
            self._divisor = self._divisor & 0xFF | value << 8
            return
        if value & _IER_EMPTY and not self._ier & _IER_EMPTY:
            self._empty_event = True
        self._ier = value & 0x0F
        self._receive()

    def _read_iir(self) -> int:
        pending = self._pending()
        if pending == _IIR_EMPTY:
            self._empty_event = False
            self._receive()
        fifos = 0xC0 if self._fcr & _FCR_ENABLE else 0
        return fifos | (_IIR_NOTHING if pending is None else pending)

    def _write_fcr(self, value: int) -> None:
        if value & _FCR_CLEAR_RECEIVER or (value ^ self._fcr) & _FCR_ENABLE:
            self._fifo.clear()
        self._fcr = value & 0xC9 if value & _FCR_ENABLE else 0
        self._receive()

    def _write_lcr(self, value: int) -> None:
        self._lcr = value

    def _write_mcr(self, value: int) -> None:
        before = self.modem_status()
        self._mcr = value & 0x1F
        now = self.modem_status()
        changed = before ^ now
        self._deltas |= changed >> 4 & 0x0B            # CTS, DSR, CD in either direction
        self._deltas |= (before & ~now) >> 4 & 0x04    # RI: only its end
        self._receive()

    def _read_lsr(self) -> int:
        status = self.line_status()
        if self._overrun:
            self._overrun = False
            self._receive()
        return status

    def _read_msr(self) -> int:
        status = self.modem_status() | self._deltas
        if self._deltas:
            self._deltas = 0
            self._receive()
        return status

    def _write_scratch(self, value: int) -> None:
        self._scratch = value
