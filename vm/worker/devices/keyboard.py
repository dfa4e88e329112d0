"""The keyboard: a bounded queue of keys and the 8042 controller's ports 60h and 64h.

A key is `(scan code, ASCII)`, pressed and released at once.  Two readers share one queue: the
BIOS moves keys into the guest's own buffer (bios/keyboard.py), and a guest that talks to port 60h
itself takes them from here.  Reading port 60h gives the make code once and its break code
after that, until the next key.

Controller commands: self tests answer well, A20 is always open, FEh resets the machine.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Final

from . import PortClaim

__all__ = ["QUEUE_KEYS", "Keyboard"]

QUEUE_KEYS: Final = 256

_STATUS_OUTPUT_FULL, _STATUS_SYSTEM = 0x01, 0x14


class Keyboard:
    def __init__(self, end: Callable[[str, str, int | None], None]) -> None:
        self._end = end
        self._keys: deque[tuple[int, int]] = deque()
        self._answers: deque[int] = deque(maxlen=16)
        self._fresh = False                        # the make code in _last was not read yet
        self._last = 0
        self._command = 0                          # waiting for its data byte
        self._mode = 0x45

    def ports(self) -> Iterable[PortClaim]:
        yield 0x60, self._read_data, self._write_data
        yield 0x64, self._read_status, self._write_command

    def press(self, scan: int, ascii_code: int) -> bool:
        """Queue a key; False when the queue is full."""
        if len(self._keys) >= QUEUE_KEYS:
            return False
        self._keys.append((scan, ascii_code))
        return True

    def __len__(self) -> int:
        return len(self._keys)

    def take(self) -> tuple[int, int] | None:
        """The next key, for the BIOS; port 60h shows its scan code from now on."""
        if not self._keys:
            return None
        key = self._keys.popleft()
        self._last, self._fresh = key[0] & 0x7F, True
        return key

    def _read_status(self) -> int:
        full = bool(self._answers or self._fresh or self._keys)
        return _STATUS_SYSTEM | (_STATUS_OUTPUT_FULL if full else 0)

    def _read_data(self) -> int:
        if self._answers:
            return self._answers.popleft()
        if not self._fresh:
            self.take()
        if self._fresh:
            self._fresh = False
            make, self._last = self._last, self._last | 0x80
            return make
        return self._last

    def _write_command(self, value: int) -> None:
        self._command = 0
        if value & 0xF1 == 0xF0 and not value & 1:     # pulse output bit 0: the reset line
            self._end("reset", "the guest reset itself by the keyboard controller", None)
        elif value == 0x20:
            self._answers.append(self._mode)
        elif value == 0xAA:
            self._answers.append(0x55)
        elif value in (0xA9, 0xAB):
            self._answers.append(0x00)
        elif value == 0xC0:
            self._answers.append(0x80)
        elif value == 0xD0:
            self._answers.append(0xDF)                 # A20 open, not in reset
        elif value in (0x60, 0xD1, 0xD2, 0xD3, 0xD4):
            self._command = value

    def _write_data(self, value: int) -> None:
        command, self._command = self._command, 0
        if command == 0x60:
            self._mode = value
        elif command == 0xD1:
            if not value & 1:
                self._end("reset", "the guest reset itself by the keyboard controller", None)
        elif command == 0xD2:
            self._answers.append(value)
        elif command == 0 and value == 0xFF:           # reset: acknowledge, test passed
            self._answers.extend((0xFA, 0xAA))
        elif command == 0 and value == 0xF2:
            self._answers.extend((0xFA, 0xAB, 0x83))
        elif command == 0:
            self._answers.append(0xFA)
