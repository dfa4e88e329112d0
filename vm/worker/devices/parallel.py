"""Printer ports (LPT1 to LPT3 of every address in use): a byte that is written is a byte that is printed.

Theory.  A printer takes the data latch when strobe (control bit 0) rises and says busy meanwhile.  BIOSes and DOS
do it so; small test programs write the data port alone and expect the byte to be out.  Both are served: a
byte goes to `put` when it is strobed, and on a port that has never been strobed when it is written.
The printer is always there, ready and never busy; there is no interrupt and no data comes back.

Invariant: no byte is put twice: the one before the first strobe is out already when that comes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import ClassVar, Final

from ..saved import BYTE, FLAG, Each, Field
from . import PortClaim, nothing

__all__ = ["PRINTER_PORTS", "Parallel"]

PRINTER_PORTS: Final = (0x3BC, 0x378, 0x278)
_READY: Final = 0xDF                     # not busy, no acknowledge, paper, selected, no error
_STROBE: Final = 1
_CONTROL: Final = 0x0C                   # as a BIOS leaves it: initialized, selected


class Parallel:
    """`put` takes what is printed, on whichever port."""

    SAVED: ClassVar[Field] = {"_ports": Each()}
    WIRING: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, put: Callable[[int], None]) -> None:
        self._ports = [_Port(put) for _ in PRINTER_PORTS]

    def ports(self) -> Iterable[PortClaim]:
        for first, port in zip(PRINTER_PORTS, self._ports, strict=True):
            yield first, lambda port=port: port.data, port.write
            yield first + 1, lambda: _READY, nothing
            yield first + 2, lambda port=port: 0xE0 | port.control, port.set_control


class _Port:
    SAVED: ClassVar[Field] = {"data": BYTE, "control": BYTE, "_strobes": FLAG}
    WIRING: ClassVar[frozenset[str]] = frozenset({"_put"})

    def __init__(self, put: Callable[[int], None]) -> None:
        self._put = put
        self.data, self.control = 0, _CONTROL
        self._strobes = False            # this program uses strobe

    def write(self, value: int) -> None:
        self.data = value
        if not self._strobes:
            self._put(value)

    def set_control(self, value: int) -> None:
        if value & _STROBE and not self.control & _STROBE:
            if self._strobes:
                self._put(self.data)
            self._strobes = True         # the byte before the first strobe is out already
        self.control = value & 0x1F
