"""The text display's registers: CRT controller with the cursor, retrace bits, and what else a VGA card has.

The characters lie in guest memory at B8000h; this device only knows where the cursor is
(CRT registers 0Eh and 0Fh, in character cells from the start of video memory) and lets guests watch
a retrace that follows the clock (70 Hz, with 31.5 kHz lines).

Sequencer, graphics and attribute controller and palette have their indices, their flip-flop and their automatic
increment, start as a BIOS leaves them in mode 3, and give back what was written: programs fade, blink and load by them.
Nothing is drawn from them.  Source: IBM VGA/XGA Technical Reference; mode 3's values are those of IBM's VGA BIOS.
Where it is poor: colour ports only (3D4h; no 3B4h); no interrupt of the retrace.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Final

from ..clock import Clock
from ..saved import BYTE, FLAG, Field, Number, Raw
from . import PortClaim, nothing, ones

__all__ = ["Vga"]

# Mode 3 on a VGA: 80 by 25 characters of 9 by 16 dots.
_CRTC: Final = bytes.fromhex("5f 4f 50 82 55 81 bf 1f 00 4f 06 07 00 00 00 00 9c 8e 8f 28 1f 96 b9 a3 ff")
_SEQUENCER: Final = bytes.fromhex("03 00 03 00 02")
_GRAPHICS: Final = bytes.fromhex("00 00 00 00 00 10 0e 00 ff")
_ATTRIBUTES: Final = bytes.fromhex("00 01 02 03 04 05 14 07 38 39 3a 3b 3c 3d 3e 3f 0c 00 0f 08 00")
_FRAME_NS, _RETRACE_NS, _LINE_NS, _BLANK_NS = 14_268_000, 1_400_000, 31_778, 6_000


class Vga:
    SAVED: ClassVar[Field] = {
        "crtc": Raw(256), "_index": BYTE, "_sequencer": Raw(8), "_graphics": Raw(16), "_attributes": Raw(32),
        "_palette": Raw(768), "_misc": BYTE, "_feature": BYTE, "_mask": BYTE,
        **dict.fromkeys(("_sequencer_index", "_graphics_index", "_attribute_index"), BYTE),
        "_attribute_data": FLAG, "_palette_at": Number(767), "_palette_reads": FLAG,
    }
    WIRING: ClassVar[frozenset[str]] = frozenset({"_clock"})

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.crtc = bytearray(_CRTC.ljust(256, b"\0"))
        self._index = 0
        self._sequencer, self._sequencer_index = bytearray(_SEQUENCER.ljust(8, b"\0")), 0
        self._graphics, self._graphics_index = bytearray(_GRAPHICS.ljust(16, b"\0")), 0
        self._attributes, self._attribute_index = bytearray(_ATTRIBUTES.ljust(32, b"\0")), 0x20
        self._attribute_data = False               # 3C0h takes data next, else an index
        self._palette = bytearray(_palette())
        self._palette_at = 0                       # of 256 times red, green and blue
        self._palette_reads = False                # the state that 3C7h tells
        self._misc, self._feature, self._mask = 0x67, 0, 0xFF

    def ports(self) -> Iterable[PortClaim]:
        for port in range(0x3C0, 0x3E0):
            yield port, ones, nothing
        yield 0x3C0, lambda: self._attribute_index, self._write_attribute
        yield 0x3C1, lambda: self._attributes[self._attribute_index & 0x1F], nothing
        yield 0x3C2, lambda: 0x10, self._write_misc              # read: switch sense
        yield 0x3C4, lambda: self._sequencer_index, self._select_sequencer
        yield 0x3C5, lambda: self._sequencer[self._sequencer_index], self._write_sequencer
        yield 0x3C6, lambda: self._mask, self._write_mask
        yield 0x3C7, lambda: 3 if self._palette_reads else 0, lambda value: self._select_colour(value, reads=True)
        yield 0x3C8, lambda: self._palette_at // 3, lambda value: self._select_colour(value, reads=False)
        yield 0x3C9, self._read_colour, self._write_colour
        yield 0x3CA, lambda: self._feature, nothing
        yield 0x3CC, lambda: self._misc, nothing
        yield 0x3CE, lambda: self._graphics_index, self._select_graphics
        yield 0x3CF, lambda: self._graphics[self._graphics_index], self._write_graphics
        yield 0x3D4, lambda: self._index, self._select
        yield 0x3D5, lambda: self.crtc[self._index], self._write
        yield 0x3DA, self._status, self._write_feature

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

    def _write_attribute(self, value: int) -> None:
        if self._attribute_data:
            self._attributes[self._attribute_index & 0x1F] = value
        else:
            self._attribute_index = value & 0x3F
        self._attribute_data = not self._attribute_data

    def _write_misc(self, value: int) -> None:
        self._misc = value

    def _write_feature(self, value: int) -> None:
        self._feature = value

    def _write_mask(self, value: int) -> None:
        self._mask = value

    def _select_sequencer(self, value: int) -> None:
        self._sequencer_index = value & 7

    def _write_sequencer(self, value: int) -> None:
        self._sequencer[self._sequencer_index] = value

    def _select_graphics(self, value: int) -> None:
        self._graphics_index = value & 15

    def _write_graphics(self, value: int) -> None:
        self._graphics[self._graphics_index] = value

    def _select_colour(self, value: int, *, reads: bool) -> None:
        self._palette_at, self._palette_reads = value * 3, reads

    def _read_colour(self) -> int:
        value = self._palette[self._palette_at]
        self._palette_at = (self._palette_at + 1) % len(self._palette)
        return value

    def _write_colour(self, value: int) -> None:
        self._palette[self._palette_at] = value & 0x3F
        self._palette_at = (self._palette_at + 1) % len(self._palette)

    def _status(self) -> int:
        self._attribute_data = False               # reading this one sets the flip-flop
        now = self._clock.monotonic_ns()
        vertical = now % _FRAME_NS < _RETRACE_NS
        blank = vertical or now % _LINE_NS < _BLANK_NS
        return vertical << 3 | blank


def _palette() -> bytes:
    """The 64 colours of an EGA, two bits each of red, green and blue, as mode 3 has them; black behind."""
    colours = bytearray()
    for colour in range(64):
        for bright, dark in ((2, 5), (1, 4), (0, 3)):
            colours.append((colour >> bright & 1) * 0x2A + (colour >> dark & 1) * 0x15)
    return bytes(colours.ljust(768, b"\0"))
