"""The text display's registers: CRT controller with the cursor, and the retrace bits.

The characters lie in guest memory at B8000h; this device only knows where the cursor is
(registers 0Eh and 0Fh, in character cells from the start of video memory) and lets guests watch
a retrace that follows the clock (70 Hz, with 31.5 kHz lines).  Palette and sequencer registers
are remembered, nothing is drawn from them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from ..clock import Clock
from ..saved import BYTE, Field, Raw
from . import PortClaim

__all__ = ["Vga"]

_FRAME_NS, _RETRACE_NS, _LINE_NS, _BLANK_NS = 14_268_000, 1_400_000, 31_778, 6_000


class Vga:
    SAVED: ClassVar[Field] = {"crtc": Raw(256), "_index": BYTE, "_plain": Raw(0x20)}
    WIRING: ClassVar[frozenset[str]] = frozenset({"_clock"})

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.crtc = bytearray(256)
        self.crtc[0x0A], self.crtc[0x0B] = 0x06, 0x07
        self._index = 0
        self._plain = bytearray(0x20)              # 3C0h to 3DFh, as last written

    def ports(self) -> Iterable[PortClaim]:
        for port in range(0x3C0, 0x3E0):
            slot = port - 0x3C0
            yield (port, lambda slot=slot: self._plain[slot],
                   lambda value, slot=slot: self._remember(slot, value))
        yield 0x3D4, lambda: self._index, self._select
        yield 0x3D5, lambda: self.crtc[self._index], self._write
        yield 0x3DA, self._status, lambda _value: None

    @property
    def cursor(self) -> int:
        """Cell number of the cursor from the start of video memory."""
        return self.crtc[0x0E] << 8 | self.crtc[0x0F]

    @cursor.setter
    def cursor(self, cell: int) -> None:
        self.crtc[0x0E], self.crtc[0x0F] = cell >> 8 & 0xFF, cell & 0xFF

    @property
    def start(self) -> int:
        """First cell shown."""
        return self.crtc[0x0C] << 8 | self.crtc[0x0D]

    @start.setter
    def start(self, cell: int) -> None:
        self.crtc[0x0C], self.crtc[0x0D] = cell >> 8 & 0xFF, cell & 0xFF

    def _select(self, value: int) -> None:
        self._index = value

    def _write(self, value: int) -> None:
        self.crtc[self._index] = value

    def _remember(self, slot: int, value: int) -> None:
        self._plain[slot] = value

    def _status(self) -> int:
        now = self._clock.monotonic_ns()
        vertical = now % _FRAME_NS < _RETRACE_NS
        blank = vertical or now % _LINE_NS < _BLANK_NS
        return vertical << 3 | blank
