"""A keyboard and its 8042 controller: ports 60h and 64h, interrupt line 1.

Theory.  A key comes as the pair that INT 16h would give, (scan code, ASCII); `strokes` turns it into what
a keyboard sends for it: make and break codes of set 1, between those of the modifier that is held for it.
The bytes queue up; the controller shows one at a time in its output buffer, with the "full" bit of port
64h and the interrupt line up.  The next one comes BYTE_NS after that was read, as over a keyboard's
slow wire, and not before the guest has told the end of the interrupt (a VM that has no CPU for a while is
slower than any wire): until then a second read gets the same byte, on which programs rely that
read port 60h in their own handler and go on to the BIOS'.  So a guest may wait for interrupts, poll, or leave it all
to the BIOS (bios/rom.py has the handler of INT 09h).
Answers of the controller to commands go first and do not interrupt: whoever gives a command polls for them.

While `hold()` is true nothing more is shown: whoever types faster than a BIOS takes keys loses none.

A byte carries the key that it completes, so that the BIOS need not guess the layout back (`key`, of the
byte that was read last).

Controller commands: self tests answer well, A20 is always open, FEh resets the machine.
Where it is poor: no mouse; keys are pressed and released at once, nothing repeats.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import ClassVar, Final

from ..clock import Clock
from ..saved import BYTE, FLAG, MOMENT, Field, Kind, Many, Maybe, Number, Row
from . import PortClaim

__all__ = ["ALT", "BYTE_NS", "CTRL", "LINE", "QUEUE_KEYS", "SHIFT", "Keyboard", "strokes"]

LINE: Final = 1
QUEUE_KEYS: Final = 256
BYTE_NS: Final = 1_000_000
SHIFT, CTRL, ALT = 0x2A, 0x1D, 0x38              # make codes
_BREAK: Final = 0x80

_OUTPUT_FULL, _SYSTEM, _COMMAND, _NOT_LOCKED = 0x01, 0x04, 0x08, 0x10
_INTERRUPT, _DISABLED = 0x01, 0x10               # bits of the command byte

_SHIFTED: Final = frozenset(map(ord, '!@#$%^&*()_+QWERTYUIOP{}ASDFGHJKL:"~|ZXCVBNM<>?'))
_OWN_CONTROL: Final = frozenset((0x01, 0x0E, 0x0F, 0x1C))     # Esc, Backspace, Tab, Enter: ASCII below 20h
# The BIOS' codes for keys with a modifier: first, last, modifier, make code of the first.
_RANGES: Final = (
    (0x54, 0x5D, SHIFT, 0x3B), (0x5E, 0x67, CTRL, 0x3B), (0x68, 0x71, ALT, 0x3B),     # F1 to F10
    (0x78, 0x83, ALT, 0x02),                                                          # 1 to =
    (0x85, 0x86, 0, 0x57), (0x87, 0x88, SHIFT, 0x57), (0x89, 0x8A, CTRL, 0x57), (0x8B, 0x8C, ALT, 0x57),
    (0x97, 0xA3, ALT, 0x47),                                                          # navigation
)
_CTRL_NAVIGATION: Final = {0x73: 0x4B, 0x74: 0x4D, 0x75: 0x4F, 0x76: 0x51, 0x77: 0x47, 0x84: 0x49,
                           0x8D: 0x48, 0x91: 0x50, 0x92: 0x52, 0x93: 0x53}


def strokes(scan: int, ascii_code: int) -> tuple[int, int]:
    """(make code of the modifier or 0, make code of the key or 0) for a key as INT 16h names it."""
    if scan == 0:
        return ALT, 0                            # a character by its number: typed with Alt
    for first, last, modifier, make in _RANGES:
        if first <= scan <= last:
            return modifier, make + scan - first
    if scan in _CTRL_NAVIGATION:
        return CTRL, _CTRL_NAVIGATION[scan]
    if ascii_code in _SHIFTED or (scan, ascii_code) == (0x0F, 0):
        return SHIFT, scan & 0x7F
    if ascii_code == 0:
        return (CTRL if scan == 0x03 else ALT if scan < 0x3B else 0), scan & 0x7F
    return (CTRL if ascii_code < 0x20 and scan not in _OWN_CONTROL else 0), scan & 0x7F


_KEY: Final[Kind] = Maybe(Row((BYTE, BYTE)))
_ANSWERS: Final = 16


class Keyboard:
    """`line(bool)` is the interrupt line, `in_service()` whether a guest is handling its interrupt.

    `changed()` says that `next_ns` moved, `end` ends the VM.
    """

    SAVED: ClassVar[Field] = {
        "_bytes": Many(Row((BYTE, _KEY)), 5 * QUEUE_KEYS), "_keys": Number(QUEUE_KEYS),
        "_answers": Many(BYTE, _ANSWERS),
        "_full": FLAG, "_last": BYTE, "_from_answer": FLAG, "_not_before_ns": MOMENT, "_command": BYTE,
        "_was_command": FLAG, "_mode": BYTE, "_shown": _KEY, "key": _KEY,
    }
    WIRING: ClassVar[frozenset[str]] = frozenset({"_clock", "_line", "_in_service", "_changed", "_end", "hold"})

    def __init__(self, clock: Clock, line: Callable[[bool], None], in_service: Callable[[], bool],
                 changed: Callable[[], None], end: Callable[[str, str, int | None], None]) -> None:
        self._clock, self._line, self._in_service = clock, line, in_service
        self._changed, self._end = changed, end
        self.hold: Callable[[], bool] = lambda: False
        self._bytes: deque[tuple[int, tuple[int, int] | None]] = deque()
        self._keys = 0                             # whose last byte is still in the queue
        self._answers: deque[int] = deque(maxlen=_ANSWERS)
        self._full = False
        self._last = 0                             # the output buffer
        self._from_answer = False
        self._not_before_ns = 0                    # the next byte of the keyboard
        self._command = 0                          # waiting for its data byte
        self._was_command = False
        self._mode = 0x45                          # translated, system flag, interrupt on
        self._shown: tuple[int, int] | None = None   # the key that the byte in the buffer completes
        self.key: tuple[int, int] | None = None    # the key that the byte last read completes

    def ports(self) -> Iterable[PortClaim]:
        yield 0x60, self.read, self._write_data
        yield 0x64, self._read_status, self._write_command

    def press(self, scan: int, ascii_code: int) -> bool:
        """Queue a key; False when the queue is full."""
        if self._keys >= QUEUE_KEYS:
            return False
        modifier, make = strokes(scan & 0xFF, ascii_code & 0xFF)
        key = (scan & 0xFF, ascii_code & 0xFF)
        codes = [code for code in (modifier, make) if code]
        codes += [code | _BREAK for code in (make, modifier) if code]
        completes = codes.index(make) if make else len(codes) - 1
        self._bytes.extend((code, key if index == completes else None) for index, code in enumerate(codes))
        self._bytes.append((0, None))              # the key's end, never shown
        self._keys += 1
        self._load()
        self._changed()
        return True

    def __len__(self) -> int:
        return self._keys

    def _load(self) -> None:
        """Show the next byte if the buffer is free."""
        if self._full:
            return
        if self._answers:
            self._last, self._full, self._from_answer, self._shown = self._answers.popleft(), True, True, None
            return
        if self._clock.monotonic_ns() < self._not_before_ns or not self._may_load():
            return
        while self._bytes:
            code, key = self._bytes.popleft()
            if code:
                self._last, self._full, self._from_answer, self._shown = code, True, False, key
                if self._mode & _INTERRUPT:
                    self._line(True)
                return
            self._keys -= 1

    def _answer(self, *values: int) -> None:
        self._answers.extend(values)
        self._load()

    def poll(self, _now_ns: int) -> None:
        self._load()

    def next_ns(self) -> int | None:
        """When a byte that waits can be shown; None when the guest must do something first."""
        return self._not_before_ns if not self._full and self._may_load() else None

    def _may_load(self) -> bool:
        return bool(self._bytes) and not (self._mode & _DISABLED or self._in_service() or self.hold())

    def _read_status(self) -> int:
        self._load()
        return (_SYSTEM | _NOT_LOCKED | (_OUTPUT_FULL if self._full else 0)
                | (_COMMAND if self._was_command else 0))

    def read(self) -> int:
        """Port 60h: the byte in the buffer, or the last one again."""
        value = self._last
        if self._full:
            self._full, self.key = False, self._shown
            self._line(False)
            if not self._from_answer:
                self._not_before_ns = self._clock.monotonic_ns() + BYTE_NS
            self._load()
            self._changed()
        return value

    def _write_command(self, value: int) -> None:
        self._command, self._was_command = 0, True
        if value & 0xF1 == 0xF0:                       # pulse output bit 0: the reset line
            self._end("reset", "the guest reset itself by the keyboard controller", None)
        elif value == 0x20:
            self._answer(self._mode)
        elif value == 0xAA:
            self._answer(0x55)
        elif value in (0xA9, 0xAB):
            self._answer(0x00)
        elif value == 0xAD:
            self._mode |= _DISABLED
        elif value == 0xAE:
            self._mode &= ~_DISABLED
            self._load()
            self._changed()
        elif value == 0xC0:
            self._answer(0x80)
        elif value == 0xD0:
            self._answer(0xDF)                         # A20 open, not in reset
        elif value in (0x60, 0xD1, 0xD2, 0xD3, 0xD4):
            self._command = value

    def _write_data(self, value: int) -> None:
        command, self._command, self._was_command = self._command, 0, False
        if command == 0x60:
            self._mode = value
            self._line(self._full and not self._from_answer and bool(value & _INTERRUPT))
            self._load()
            self._changed()
        elif command == 0xD1:
            if not value & 1:
                self._end("reset", "the guest reset itself by the keyboard controller", None)
        elif command == 0xD2:
            self._answer(value)
        elif command == 0 and value == 0xFF:           # reset: acknowledge, test passed
            self._bytes.clear()
            self._keys = 0
            self._answer(0xFA, 0xAA)
        elif command == 0 and value == 0xF2:
            self._answer(0xFA, 0xAB, 0x83)
        elif command == 0:
            self._answer(0xFA)
