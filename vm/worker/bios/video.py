"""INT 10h: the text screen in guest memory at B8000h.

Theory.  The screen's truth is guest memory (characters and attributes) plus the CRT
controller's cursor; a guest may go around the BIOS for either.  The BIOS keeps the cursor of
each of eight pages in the data area, as programs expect to find it there.

Text modes 0 to 3 and 7 exist, and 7 is shown like 3; asking for a graphics mode leaves the text
mode on and reports it (AH=0Fh), which is what a text-only display card would do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ..devices.vga import Vga
from ..memory import GuestMemory
from . import rom
from .registers import Call

__all__ = ["COLUMNS", "ROWS", "TEXT", "Video"]

TEXT: Final = 0xB8000
COLUMNS: Final = 80
ROWS: Final = 25
PAGES: Final = 8
_BLANK = 0x07                                  # attribute: light grey on black


class Video:
    """`changed()` is called whenever the screen may look different."""

    def __init__(self, memory: GuestMemory, vga: Vga, changed: Callable[[], None]) -> None:
        self._memory, self._vga, self._changed = memory, vga, changed
        self._services: dict[int, Callable[[Call], None]] = {
            0x00: self._set_mode, 0x01: self._set_shape, 0x02: self._set_cursor,
            0x03: self._get_cursor, 0x05: self._select_page,
            0x06: lambda call: self._scroll(call, up=True),
            0x07: lambda call: self._scroll(call, up=False),
            0x08: self._read_cell, 0x09: self._write_cells, 0x0A: self._write_cells,
            0x0E: self._teletype, 0x0F: self._get_mode, 0x11: self._font,
            0x12: self._alternate, 0x13: self._write_string, 0x1A: self._display,
        }

    def call(self, call: Call) -> None:
        service = self._services.get(call.ah)
        if service is not None:
            service(call)

    def reset(self, mode: int = 3, *, clear: bool = True) -> None:
        """Enter a text mode: blank screen, page 0, cursor at the top left."""
        memory = self._memory
        columns = 40 if mode in (0, 1) else COLUMNS
        page_bytes = 2048 if columns == 40 else 4096
        memory.poke_u8(rom.BDA_MODE, mode)
        memory.poke_u16(rom.BDA_COLUMNS, columns)
        memory.poke_u16(rom.BDA_PAGE_BYTES, page_bytes)
        memory.poke_u16(rom.BDA_PAGE_START, 0)
        memory.poke_u8(rom.BDA_PAGE, 0)
        memory.poke_u16(rom.BDA_CURSOR_SHAPE, 0x0607)
        memory.poke(rom.BDA_CURSOR, bytes(2 * PAGES))
        self._vga.crtc[0x0A], self._vga.crtc[0x0B] = 0x06, 0x07
        self._vga.cursor = self._vga.start = 0
        if clear:
            memory.poke(TEXT, bytes((0x20, _BLANK)) * (PAGES * 4096 // 2))
        self._changed()

    # Geometry as the data area says, made harmless: a guest may have written anything there.

    def _columns(self) -> int:
        return 40 if self._memory.u16(rom.BDA_COLUMNS) == 40 else COLUMNS

    def _page_bytes(self) -> int:
        return 2048 if self._columns() == 40 else 4096

    def _active(self) -> int:
        return self._memory.u8(rom.BDA_PAGE) % PAGES

    def _cell(self, page: int, column: int, row: int) -> int:
        columns = self._columns()
        return TEXT + page % PAGES * self._page_bytes() + 2 * (row * columns + column)

    def cursor(self, page: int) -> tuple[int, int]:
        """(column, row) of a page's cursor, within the screen."""
        where = self._memory.u16(rom.BDA_CURSOR + 2 * (page % PAGES))
        return min(where & 0xFF, self._columns() - 1), min(where >> 8, ROWS - 1)

    def move_cursor(self, page: int, column: int, row: int) -> None:
        page %= PAGES
        self._memory.poke_u16(rom.BDA_CURSOR + 2 * page, row << 8 | column & 0xFF)
        if page == self._active():
            self._vga.cursor = (page * self._page_bytes() // 2 + row * self._columns() + column)

    def _set_mode(self, call: Call) -> None:
        mode = call.al & 0x7F
        if mode in (0, 1, 2, 3, 7):
            self.reset(mode, clear=not call.al & 0x80)
        call.al = 0x30 if mode <= 7 else 0x20

    def _set_shape(self, call: Call) -> None:
        self._memory.poke_u16(rom.BDA_CURSOR_SHAPE, call.cx)
        self._vga.crtc[0x0A], self._vga.crtc[0x0B] = call.ch, call.cl

    def _set_cursor(self, call: Call) -> None:
        self.move_cursor(call.bh, call.dl, call.dh)
        self._changed()

    def _get_cursor(self, call: Call) -> None:
        call.dx = self._memory.u16(rom.BDA_CURSOR + 2 * (call.bh % PAGES))
        call.cx = self._memory.u16(rom.BDA_CURSOR_SHAPE)

    def _select_page(self, call: Call) -> None:
        page = call.al % PAGES
        start = page * self._page_bytes()
        self._memory.poke_u8(rom.BDA_PAGE, page)
        self._memory.poke_u16(rom.BDA_PAGE_START, start)
        self._vga.start = start // 2
        self.move_cursor(page, *self.cursor(page))
        self._changed()

    def _scroll(self, call: Call, *, up: bool) -> None:
        self.scroll(self._active(), call.al, call.bh, (call.cl, call.ch), (call.dl, call.dh), up=up)

    def scroll(
        self, page: int, lines: int, attribute: int,
        top_left: tuple[int, int], bottom_right: tuple[int, int], *, up: bool,
    ) -> None:
        """Move a window's rows; 0 lines, or all, blank it. Corners are (column, row)."""
        left, top = top_left
        right, bottom = min(bottom_right[0], self._columns() - 1), min(bottom_right[1], ROWS - 1)
        if left > right or top > bottom:
            return
        width, height = right - left + 1, bottom - top + 1
        blank = bytes((0x20, attribute)) * width
        rows = [self._memory.read(self._cell(page, left, row), 2 * width)
                for row in range(top, bottom + 1)]
        lines = lines if 0 < lines < height else height
        rows = rows[lines:] + [blank] * lines if up else [blank] * lines + rows[:height - lines]
        for index, cells in enumerate(rows):
            self._memory.poke(self._cell(page, left, top + index), cells)
        self._changed()

    def _read_cell(self, call: Call) -> None:
        call.ax = self._memory.u16(self._cell(call.bh, *self.cursor(call.bh)))

    def _write_cells(self, call: Call) -> None:
        """AH=09h: character and attribute; AH=0Ah: character only. CX times, cursor unmoved."""
        page = call.bh % PAGES
        first = self._cell(page, *self.cursor(page))
        room = (self._cell(page, 0, 0) + self._page_bytes() - first) // 2
        count = min(call.cx, room)
        if call.ah == 0x09:
            self._memory.poke(first, bytes((call.al, call.bl)) * count)
        else:
            for index in range(count):
                self._memory.poke_u8(first + 2 * index, call.al)
        self._changed()

    def _teletype(self, call: Call) -> None:
        # Onto the active page: programs leave anything in BH.
        self.type_character(self._active(), call.al)

    def type_character(self, page: int, character: int, attribute: int | None = None) -> None:
        """Print as a terminal does: BEL, BS, LF, CR, wrap and scroll."""
        column, row = self.cursor(page)
        if character == 0x07:
            return
        if character == 0x08:
            column = max(0, column - 1)
        elif character == 0x0A:
            row += 1
        elif character == 0x0D:
            column = 0
        else:
            cell = self._cell(page, column, row)
            self._memory.poke_u8(cell, character)
            if attribute is not None:
                self._memory.poke_u8(cell + 1, attribute)
            column += 1
            if column >= self._columns():
                column, row = 0, row + 1
        if row >= ROWS:
            row = ROWS - 1
            # The new line takes the colour of the place where the cursor was, as IBM's does.
            colour = self._memory.u8(self._cell(page, *self.cursor(page)) + 1)
            self.scroll(page, 1, colour, (0, 0), (self._columns() - 1, ROWS - 1), up=True)
        self.move_cursor(page, column, row)
        self._changed()

    def _get_mode(self, call: Call) -> None:
        call.ax = self._columns() << 8 | self._memory.u8(rom.BDA_MODE)
        call.bx = self._active() << 8 | call.bl

    def _font(self, call: Call) -> None:
        if call.al == 0x30:                    # font information: sizes only, there is no font
            call.cx = 16
            call.dx = call.dx & 0xFF00 | ROWS - 1

    def _alternate(self, call: Call) -> None:
        if call.bl == 0x10:                    # EGA information: colour, 256 KiB, no switches
            call.bx = 0x0003
            call.cx = 0x0009
        elif 0x30 <= call.bl <= 0x36:          # scan lines, palette, summing, cursor, refresh: nothing changes
            call.al = 0x12

    def _write_string(self, call: Call) -> None:
        """AL bit 0: the cursor moves along; bit 1: attributes lie between the characters."""
        if call.al > 3:
            return
        page = call.bh % PAGES
        before = self.cursor(page)
        step = 2 if call.al & 2 else 1
        # A screenful of two pages is all that anyone can see of a string.
        count = min(call.cx, 2 * COLUMNS * ROWS)
        data = self._memory.read(call.address("es", call.bp), count * step)
        self.move_cursor(page, call.dl, call.dh)
        for index in range(0, count * step, step):
            attribute = data[index + 1] if step == 2 else call.bl
            self.type_character(page, data[index], attribute)
        if not call.al & 1:
            self.move_cursor(page, *before)
        self._changed()

    def _display(self, call: Call) -> None:
        if call.al == 0:                       # display combination: VGA with colour monitor
            call.al = 0x1A
            call.bx = 0x0008
