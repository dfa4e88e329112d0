"""INT 16h: keys, from the keyboard's queue through the guest's own buffer in the data area.

Theory.  The buffer is the ring of 15 keys at 40:1Eh with head and tail at 40:1Ah and 40:1Ch, as
on a PC: programs that peek or flush there work.  Whenever the BIOS is called, keys move from the
host's queue into it.  Head and tail are a guest's to overwrite, so they are checked at each use.

Waiting costs nothing.  AH=00h without a key puts the vCPU to sleep.  A guest that *polls* (AH=01h
in a loop, as DOS does at its prompt) would burn its whole share doing nothing: after
`IDLE_POLLS` empty polls with no output or disk call in between, each
further one sleeps for 5 ms, after `DEEP_POLLS` for 25 ms, or until a key comes, which ends
the sleep at once.  A program that polls once a frame is slowed to 200 frames a second, and to 40
when nobody has touched a key for seconds; what counts polls to tell the time goes wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ...engines.base import RAX
from ..clock import Clock
from ..devices.keyboard import Keyboard
from ..memory import GuestMemory
from . import rom
from .registers import Call, Wait

__all__ = ["DEEP_NAP_NS", "DEEP_POLLS", "IDLE_NAP_NS", "IDLE_POLLS", "KeyboardService"]

IDLE_POLLS: Final = 100
IDLE_NAP_NS: Final = 5_000_000
DEEP_POLLS: Final = 300
DEEP_NAP_NS: Final = 25_000_000
_SEGMENT: Final = 0x400


class KeyboardService:
    """`finish(change)` applies `change` to the stopped vCPU's registers once a key has come."""

    def __init__(
        self, memory: GuestMemory, keyboard: Keyboard, clock: Clock,
        finish: Callable[[Callable[[list[int]], None]], None],
    ) -> None:
        self._memory, self._keyboard, self._clock, self._finish = memory, keyboard, clock, finish
        self.empty_polls = 0

    def _ring(self) -> tuple[int, int]:
        """Head and tail, offsets in segment 40h; a nonsensical pair becomes an empty buffer."""
        head, tail = self._memory.u16(rom.BDA_KEY_HEAD), self._memory.u16(rom.BDA_KEY_TAIL)
        valid = range(rom.BDA_KEYS, rom.BDA_KEYS_END, 2)
        if head in valid and tail in valid:
            return head, tail
        for address in (rom.BDA_KEY_HEAD, rom.BDA_KEY_TAIL):
            self._memory.poke_u16(address, rom.BDA_KEYS)
        return rom.BDA_KEYS, rom.BDA_KEYS

    @staticmethod
    def _after(offset: int) -> int:
        return rom.BDA_KEYS if offset + 2 >= rom.BDA_KEYS_END else offset + 2

    def fill(self) -> None:
        """Move keys from the host's queue into the guest's buffer."""
        head, tail = self._ring()
        while self._after(tail) != head:
            key = self._keyboard.take()
            if key is None:
                return
            scan, ascii_code = key
            self._memory.poke_u16(_SEGMENT + tail, (scan & 0xFF) << 8 | ascii_code & 0xFF)
            tail = self._after(tail)
            self._memory.poke_u16(rom.BDA_KEY_TAIL, tail)

    def peek(self) -> int | None:
        self.fill()
        head, tail = self._ring()
        return None if head == tail else self._memory.u16(_SEGMENT + head)

    def take(self) -> int | None:
        key = self.peek()
        if key is not None:
            self._memory.poke_u16(rom.BDA_KEY_HEAD, self._after(self._ring()[0]))
        return key

    def call(self, call: Call) -> None:
        service = call.ah
        if service in (0x00, 0x10):
            self._read(call)
        elif service in (0x01, 0x11):
            self._poll(call)
        elif service == 0x02:
            call.al = 0                        # no shift key is ever held
        elif service == 0x12:
            call.ax = 0
        elif service == 0x05:
            # 0 stored, 1 buffer full
            call.al = 0 if self._keyboard.press(call.ch, call.cl) else 1

    def _read(self, call: Call) -> None:
        key = self.take()
        self.empty_polls = 0
        if key is not None:
            call.ax = key
            return
        call.wait = Wait(for_key=True, until_ns=None, finish=self._deliver)

    def _deliver(self) -> None:
        key = self.take()

        def put(gpr: list[int]) -> None:
            gpr[RAX] = gpr[RAX] & ~0xFFFF | (key or 0)

        self._finish(put)

    def _poll(self, call: Call) -> None:
        key = self.peek()
        call.zero = key is None
        if key is not None:
            self.empty_polls = 0
            call.ax = key
            return
        self.empty_polls += 1
        if self.empty_polls > IDLE_POLLS:
            nap_ns = DEEP_NAP_NS if self.empty_polls > DEEP_POLLS else IDLE_NAP_NS
            until = self._clock.monotonic_ns() + nap_ns
            # The poll that slept says "no key" even if one came: the next one finds it.
            call.wait = Wait(for_key=True, until_ns=until, finish=lambda: None)
