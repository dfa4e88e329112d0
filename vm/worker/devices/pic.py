"""Two 8259A interrupt controllers, cascaded as in a PC (ports 20h, 21h, A0h, A1h).

Theory.  A device sets its line (`set`); a rising edge becomes a *request* (IRR).  The request of
the highest priority that is neither masked (IMR) nor held down by one *in service* (ISR) makes the
controller ask the processor.  The processor acknowledges between two instructions and gets the vector; from
then on the request is in service until the guest says end-of-interrupt.  The second
controller asks through line 2 of the first.  Rotation, automatic end of interrupt, special mask and
polling are the chip's, since old systems use them all (Intel 8259A data sheet, order 231468).

Invariants.  `ask(bool)` is called whenever the answer to "does the controller ask?" changes, and only
then.  `acknowledge` always has a vector: without a request it is the spurious one (line 7), as on the chip.
`masking` is called before a guest changes a mask, so that who sends edges can account for those sent so far;
`programmed` after a guest has changed anything, an end of interrupt included.

Start state: what a PC's BIOS leaves when `firmware` is true (timer, keyboard and disk lines open, vectors
08h and 70h), else everything masked.

Level-triggered lines are per controller as on the chip (ICW1), or one by one as on later boards (ELCR at ports 4D0h
and 4D1h).

Where it is poor: no buffered mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import ClassVar, Final

from ..saved import BYTE, FLAG, Field, Number, Part
from . import PortClaim

__all__ = ["CASCADE", "Interrupts"]

CASCADE: Final = 2
_SPURIOUS: Final = 7
_FIRMWARE: Final = ((0x08, 0xB8), (0x70, 0x8F))    # vector base and mask of each controller


class _Chip:
    SAVED: ClassVar[Field] = {
        **dict.fromkeys(("vector", "mask", "levels", "request", "service", "elcr", "_first_word"), BYTE),
        **dict.fromkeys(("level_triggered", "auto_end", "rotate_on_end", "special_mask", "nested_specially",
                         "read_service", "polled"), FLAG),
        "lowest": Number(7), "_step": Number(4),
    }
    WIRING: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, vector: int, mask: int) -> None:
        self.vector, self.mask = vector, mask
        self.levels = self.request = self.service = 0
        self.lowest = 7                            # the line of the lowest priority
        self.level_triggered = self.auto_end = self.rotate_on_end = False
        self.special_mask = self.nested_specially = False
        self.read_service = self.polled = False
        self.elcr = 0                              # lines that are level-triggered whatever ICW1 says
        self._step = self._first_word = 0          # initialisation word expected next, 0: none

    def _by_level(self, bit: int) -> bool:
        return self.level_triggered or bool(self.elcr & bit)

    def set(self, line: int, level: bool) -> None:
        bit = 1 << line
        if level:
            if self._by_level(bit) or not self.levels & bit:
                self.request |= bit
            self.levels |= bit
        else:
            self.levels &= ~bit
            if self._by_level(bit):
                self.request &= ~bit

    def best(self, *, master: bool) -> int | None:
        """The line to be served next, None when nothing may interrupt now."""
        wanted = self.request & ~self.mask
        if not wanted:
            return None
        held = self.service & ~(self.mask if self.special_mask else 0)
        if master and self.nested_specially:
            held &= ~(1 << CASCADE)
        for offset in range(1, 9):
            bit = 1 << (self.lowest + offset & 7)
            if held & bit:
                return None
            if wanted & bit:
                return bit.bit_length() - 1
        return None

    def take(self, line: int) -> None:
        """The request of *line* is being served."""
        bit = 1 << line
        if not self._by_level(bit):
            self.request &= ~bit
        if not self.auto_end:
            self.service |= bit
        elif self.rotate_on_end:
            self.lowest = line

    def command(self, value: int) -> None:
        if value & 0x10:                           # ICW1
            self._step, self._first_word = 2, value
            self.request = self.service = self.mask = 0
            self.levels = 0                        # edge detection starts anew
            self.lowest = 7
            self.level_triggered = bool(value & 8)
            self.auto_end = self.rotate_on_end = self.special_mask = False
            self.nested_specially = self.read_service = self.polled = False
        elif value & 0x08:                         # OCW3
            if value & 0x40:
                self.special_mask = bool(value & 0x20)
            self.polled = bool(value & 0x04)
            if value & 0x02:
                self.read_service = bool(value & 0x01)
        else:                                      # OCW2
            self._end(value >> 5, value & 7)

    def _end(self, what: int, line: int) -> None:
        if what in (0, 4):                         # rotate in automatic end of interrupt: off, on
            self.rotate_on_end = what == 4
        elif what in (1, 5):                       # end of the one served last (, rotate)
            for offset in range(1, 9):
                served = self.lowest + offset & 7
                if self.service >> served & 1:
                    self.service &= ~(1 << served)
                    if what == 5:
                        self.lowest = served
                    break
        elif what in (3, 7):                       # end of a named one (, rotate)
            self.service &= ~(1 << line)
            if what == 7:
                self.lowest = line
        elif what == 6:
            self.lowest = line

    def data(self, value: int) -> None:
        if self._step == 0:
            self.mask = value
        elif self._step == 2:
            self.vector = value & 0xF8
            # ICW3 comes unless single (bit 1 of ICW1), ICW4 if bit 0 asks for it.
            self._step = 3 if not self._first_word & 2 else 4 if self._first_word & 1 else 0
        elif self._step == 3:
            self._step = 4 if self._first_word & 1 else 0
        else:
            self.auto_end = bool(value & 0x02)
            self.nested_specially = bool(value & 0x10)
            self._step = 0


class Interrupts:
    """`set(line, level)` with lines 0 to 15; `ask` is told when the controller begins or ceases to ask."""

    SAVED: ClassVar[Field] = {"asking": FLAG, "_master": Part(), "_slave": Part()}
    WIRING: ClassVar[frozenset[str]] = frozenset({"_ask", "masking", "programmed"})

    def __init__(self, ask: Callable[[bool], None], *, firmware: bool) -> None:
        self._ask = ask
        self.asking = False
        self.masking: Callable[[], None] = lambda: None
        self.programmed: Callable[[], None] = lambda: None
        start = _FIRMWARE if firmware else ((0, 0xFF), (0, 0xFF))
        self._master, self._slave = (_Chip(vector, mask) for vector, mask in start)

    def ports(self) -> Iterable[PortClaim]:
        for chip, base in ((self._master, 0x20), (self._slave, 0xA0)):
            yield (base, lambda chip=chip: self._read(chip),
                   lambda value, chip=chip: self._command(chip, value))
            yield (base + 1, lambda chip=chip: self._poll(chip) if chip.polled else chip.mask,
                   lambda value, chip=chip: self._data(chip, value))

        # Timer, keyboard and cascade, clock and coprocessor are edges always.
        for chip, port, fixed in ((self._master, 0x4D0, 0x07), (self._slave, 0x4D1, 0x21)):
            yield port, lambda chip=chip: chip.elcr, lambda value, chip=chip, fixed=fixed: self._elcr(
                chip, value & ~fixed & 0xFF)

    def _elcr(self, chip: _Chip, value: int) -> None:
        chip.elcr = value
        self._update()

    def set(self, line: int, level: bool) -> None:
        chip = self._master if line < 8 else self._slave
        chip.set(line & 7, level)
        self._update()

    def pulse(self, line: int) -> None:
        """One edge."""
        self.set(line, True)
        self.set(line, False)

    def requested(self, line: int) -> bool:
        """Whether an edge of this line still waits to be acknowledged."""
        chip = self._master if line < 8 else self._slave
        return bool(chip.request >> (line & 7) & 1)

    def in_service(self, line: int) -> bool:
        """Whether the guest has taken the line's interrupt and not told its end."""
        chip = self._master if line < 8 else self._slave
        return bool(chip.service >> (line & 7) & 1)

    def masked(self, line: int) -> bool:
        """Whether a guest has closed the line's way to the processor."""
        if line < 8:
            return bool(self._master.mask >> line & 1)
        return bool(self._slave.mask >> (line & 7) & 1 or self._master.mask >> CASCADE & 1)

    def acknowledge(self) -> int:
        """The processor takes the interrupt: its vector."""
        line = self._master.best(master=True)
        chip = self._master
        if line is not None:
            chip.take(line)
            if line == CASCADE:
                chip = self._slave
                line = chip.best(master=False)
                if line is not None:
                    chip.take(line)
        self._update()
        return chip.vector | (_SPURIOUS if line is None else line)

    def _update(self) -> None:
        slave = self._slave.best(master=False) is not None
        # The second controller's output is a level that falls and rises for each of its requests.
        self._master.set(CASCADE, False)
        if slave:
            self._master.set(CASCADE, True)
        else:
            self._master.request &= ~(1 << CASCADE)
        asking = self._master.best(master=True) is not None
        if asking != self.asking:
            self.asking = asking
            self._ask(asking)

    def _read(self, chip: _Chip) -> int:
        if chip.polled:
            return self._poll(chip)
        return chip.service if chip.read_service else chip.request

    def _poll(self, chip: _Chip) -> int:
        """The poll command's answer: the line, acknowledged by this read."""
        chip.polled = False
        line = chip.best(master=chip is self._master)
        if line is None:
            return _SPURIOUS
        chip.take(line)
        self._update()
        return 0x80 | line

    def _command(self, chip: _Chip, value: int) -> None:
        if value & 0x10:
            self.masking()                         # initialisation opens every line
        chip.command(value)
        self._update()
        self.programmed()

    def _data(self, chip: _Chip, value: int) -> None:
        self.masking()
        chip.data(value)
        self._update()
        self.programmed()
