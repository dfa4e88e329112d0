"""The small ports of the board: reset, debug, exit and echo ports, and an empty PCI bus.

The ports that end a VM are 92h and 64h (reset; the latter in devices/keyboard.py) and F4h (isa-debug-exit:
the byte written is the exit code).  E0h to E3h give back what was written to them, which is
how a guest (or a test of an engine) sees that port I/O of every width works.  PCI configuration
(mechanism 1): the address register at CF8h is there, and every device it names reads ones: absent.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import ClassVar, Final

from ..saved import BYTE, Field, Raw
from . import PortClaim, nothing, ones

__all__ = ["DEBUG_PORT", "ECHO_PORT", "EXIT_PORT", "PCI_ADDRESS_PORT", "Board"]

ECHO_PORT: Final = 0xE0
DEBUG_PORT: Final = 0xE9
BIOS_DEBUG_PORT: Final = 0x402           # where SeaBIOS and other BIOSes for QEMU and Bochs tell what they do
EXIT_PORT: Final = 0xF4
PCI_ADDRESS_PORT: Final = 0xCF8
POST_CODES_KEPT: Final = 64


class Board:
    """`put` takes debug output, `end(code, reason, exit_code)` ends the VM."""

    SAVED: ClassVar[Field] = {"_a20": BYTE, "_remembered": Raw(8)}
    WIRING: ClassVar[frozenset[str]] = frozenset({"_put", "_end", "post_codes"})     # codes are for reports

    def __init__(
        self, put: Callable[[int], None], end: Callable[[str, str, int | None], None],
    ) -> None:
        self._put, self._end = put, end
        self._a20 = 2                              # always open; the bit is remembered
        self._remembered = bytearray(8)            # echo, then the PCI address
        self.post_codes: deque[int] = deque(maxlen=POST_CODES_KEPT)      # each once where it is repeated

    def ports(self) -> Iterable[PortClaim]:
        yield 0x92, lambda: self._a20, self._system_control
        for port in (DEBUG_PORT, BIOS_DEBUG_PORT):
            yield port, lambda: DEBUG_PORT, self._put      # reading answers E9h, as in Bochs and QEMU
        yield EXIT_PORT, ones, self._exit
        yield 0x80, lambda: 0, nothing             # POST codes (see `post`), and the classic I/O delay
        for first, at in ((ECHO_PORT, 0), (PCI_ADDRESS_PORT, 4)):
            for index in range(4):
                yield (first + index, lambda slot=at + index: self._remembered[slot],
                       lambda value, slot=at + index: self._remember(slot, value))

    def post(self, code: int) -> None:
        """A POST code was written; the machine says to which port."""
        if not self.post_codes or self.post_codes[-1] != code:
            self.post_codes.append(code)

    def _remember(self, slot: int, value: int) -> None:
        self._remembered[slot] = value

    def _system_control(self, value: int) -> None:
        self._a20 = value & 2
        if value & 1:
            self._end("reset", "the guest reset itself by port 92h", None)

    def _exit(self, value: int) -> None:
        self._end("exit-port", f"the guest ended itself with exit code {value}", value)
