"""A keyboard and its 8042 controller: ports 60h and 64h, interrupt line 1.

Theory.  A key comes as the pair that INT 16h would give, (scan code, ASCII); `strokes` turns it into what
a keyboard sends for it: make and break codes of set 1, between those of the modifier that is held for it.
The bytes queue up; the controller shows one at a time in its output buffer, with the "full" bit of port
64h and the interrupt line up.  The next one comes BYTE_NS after that was read, as over a keyboard's
slow wire, and not before the guest has told the end of the interrupt (a VM that has no CPU for a while is
slower than any wire): until then a second read gets the same byte, on which programs rely that
read port 60h in their own handler and go on to the BIOS'.  So a guest may wait for interrupts, poll, or leave it all
to the BIOS (bios/rom.py has the handler of INT 09h).
Answers go first.  Those of the controller do not interrupt: whoever gives it a command polls for them.  Those of the
keyboard do, as a key's bytes: its drivers wait for the acknowledgement by interrupt.

While `hold()` is true nothing more is shown: whoever types faster than a BIOS takes keys loses none.

A byte carries the key that it completes, so that the BIOS need not guess the layout back (`key`, of the
byte that was read last).

The keyboard speaks scan code set 2 and the controller translates (command byte, bit 6): to a guest it is set 1.  A
guest that switches translation off gets set 2 unless it asks for set 1.

Controller commands: self tests answer well, A20 is always open (the bit is remembered), FEh resets the machine, and
there is no second port: its commands get no answer and its bit of the command byte says disabled.
Source: IBM PC/AT and PS/2 Technical References, keyboard and keyboard controller.
Where it is poor: no mouse, no set 3; keys are pressed and released at once, nothing repeats; keys of the navigation
block have the codes of the numeric pad's, without the prefix E0h.
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
_INTERRUPT, _DISABLED, _NO_MOUSE, _TRANSLATED = 0x01, 0x10, 0x20, 0x40    # bits of the command byte
_ACKNOWLEDGE, _ECHO, _RESEND, _PASSED = 0xFA, 0xEE, 0xFE, 0xAA
_ID: Final = (0xAB, 0x83)
_TRANSLATION: Final = {0x83: 0x41, 0x01: 0x43, 0x02: 0x41, 0x03: 0x3F}    # of what is an answer and no key
# Set 2's make codes of set 1's 01h to 58h.
_SET_2: Final = bytes.fromhex(
    "76 16 1e 26 25 2e 36 3d 3e 46 45 4e 55 66 0d 15 1d 24 2d 2c 35 3c 43 44 4d 54 5b 5a 14 1c 1b 23 2b 34 33 3b 42 4b"
    "4c 52 0e 12 5d 1a 22 21 2a 32 31 3a 41 49 4a 59 7c 11 29 58 05 06 04 0c 03 0b 83 0a 01 09 77 7e 6c 75 7d 7b 6b 73"
    "74 79 69 72 7a 70 71 84 60 61 78 07")

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
_CODES_EACH: Final = 7                             # with a modifier, in set 2: two makes, two breaks of two, its end


class Keyboard:
    """`line(bool)` is the interrupt line, `in_service()` whether a guest is handling its interrupt.

    `changed()` says that `next_ns` moved, `end` ends the VM.
    """

    SAVED: ClassVar[Field] = {
        "_bytes": Many(Row((BYTE, _KEY)), _CODES_EACH * QUEUE_KEYS), "_keys": Number(QUEUE_KEYS),
        "_answers": Many(Row((BYTE, FLAG)), _ANSWERS),
        "_scanning": FLAG, "_set": Number(3, low=1), "_expects": BYTE, "_output_port": BYTE,
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
        self._answers: deque[tuple[int, bool]] = deque(maxlen=_ANSWERS)     # and whether it is the keyboard's
        self._scanning, self._set = True, 2        # keys are reported, in this scan code set
        self._expects = 0                          # the keyboard's command that waits for its parameter
        self._output_port = 0xDF                   # of the controller: A20 open, not in reset
        self._full = False
        self._last = 0                             # the output buffer
        self._from_answer = False
        self._not_before_ns = 0                    # the next byte of the keyboard
        self._command = 0                          # waiting for its data byte
        self._was_command = False
        self._mode = 0x65                          # no mouse, translated, system flag, interrupt on
        self._shown: tuple[int, int] | None = None   # the key that the byte in the buffer completes
        self.key: tuple[int, int] | None = None    # the key that the byte last read completes

    def ports(self) -> Iterable[PortClaim]:
        yield 0x60, self.read, self._write_data
        yield 0x64, self._read_status, self._write_command

    def press(self, scan: int, ascii_code: int) -> bool:
        """Queue a key; False when the queue is full."""
        if self._keys >= QUEUE_KEYS:
            return False
        if not self._scanning:
            return True                            # a keyboard that was switched off: nobody hears it
        modifier, make = strokes(scan & 0xFF, ascii_code & 0xFF)
        key = (scan & 0xFF, ascii_code & 0xFF)
        codes = [code for code in (modifier, make) if code]
        codes += [code | _BREAK for code in (make, modifier) if code]
        completes = codes.index(make) if make else len(codes) - 1
        for index, code in enumerate(codes):
            *before, last = self._as_sent(code)
            self._bytes.extend((byte, None) for byte in before)
            self._bytes.append((last, key if index == completes else None))
        self._bytes.append((0, None))              # the key's end, never shown
        self._keys += 1
        self._load()
        self._changed()
        return True

    def _as_sent(self, code: int) -> tuple[int, ...]:
        """A code of set 1 as it comes out of the controller now."""
        make = code & 0x7F
        if self._mode & _TRANSLATED or self._set == 1 or not 1 <= make <= len(_SET_2):
            return (code,)
        return (0xF0, _SET_2[make - 1]) if code & _BREAK else (_SET_2[make - 1],)

    def __len__(self) -> int:
        return self._keys

    def _load(self) -> None:
        """Show the next byte if the buffer is free."""
        if self._full:
            return
        if self._answers:
            self._last, of_keyboard = self._answers.popleft()
            self._full, self._from_answer, self._shown = True, not of_keyboard, None
            if of_keyboard and self._mode & _INTERRUPT:
                self._line(True)
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

    def _answer(self, *values: int, of_keyboard: bool = False) -> None:
        self._answers.extend((value, of_keyboard) for value in values)
        self._load()
        self._changed()

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
        elif value in (0xAB, 0xE0):                    # interface test; test inputs
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
            self._answer(self._output_port)
        elif value in (0xDD, 0xDF):                    # A20 by one command, as some boards have it
            self._output_port = value
        elif value in (0x60, 0xD1, 0xD2, 0xD3, 0xD4):
            self._command = value

    def _write_data(self, value: int) -> None:
        command, self._command, self._was_command = self._command, 0, False
        if command == 0x60:
            self._mode = value | _NO_MOUSE
            self._line(self._full and not self._from_answer and bool(value & _INTERRUPT))
            self._load()
            self._changed()
        elif command == 0xD1:
            self._output_port = value
            if not value & 1:
                self._end("reset", "the guest reset itself by the keyboard controller", None)
        elif command == 0xD2:
            self._answer(value, of_keyboard=True)      # as if the keyboard had sent it
        elif command == 0:
            self._mode &= ~_DISABLED                   # speaking to the keyboard opens its line
            self._to_keyboard(value)

    def _to_keyboard(self, value: int) -> None:
        """A byte that goes on to the keyboard: a command, or the parameter of the one before."""
        expects, self._expects = self._expects, 0
        translated = self._mode & _TRANSLATED
        if expects and value < 0x80:
            if expects == 0xF0 and value == 0:
                self._reply(_ACKNOWLEDGE, _TRANSLATION[self._set] if translated else self._set)
                return
            if expects == 0xF0 and value <= 2:
                self._set = value
            self._reply(_RESEND if expects == 0xF0 and value > 2 else _ACKNOWLEDGE)
        elif value == 0xFF:                            # reset: acknowledge, test passed
            self._forget()
            self._scanning, self._set = True, 2
            self._reply(_ACKNOWLEDGE, _PASSED)
        elif value == 0xF2:
            self._reply(_ACKNOWLEDGE, _ID[0], _TRANSLATION[_ID[1]] if translated else _ID[1])
        elif value == _ECHO:
            self._reply(_ECHO)
        elif value == _RESEND:
            self._reply(self._last)
        elif value < 0xED:
            self._reply(_RESEND)                       # it knows no such command
        else:
            if value in (0xF4, 0xF5, 0xF6):            # on; defaults, off; defaults
                self._forget()
                self._scanning = value != 0xF5
            self._expects = value if value in (0xED, 0xF0, 0xF3) else 0        # lights, set, rate
            self._reply(_ACKNOWLEDGE)

    def _reply(self, *values: int) -> None:
        self._answer(*values, of_keyboard=True)

    def _forget(self) -> None:
        """Keys that were not sent yet."""
        self._bytes.clear()
        self._keys = 0
