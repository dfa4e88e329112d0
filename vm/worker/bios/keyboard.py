"""INT 09h and 16h: keys, from the keyboard controller through the guest's own buffer in the data area.

Theory.  The buffer is the ring of 15 keys at 40:1Eh with head and tail at 40:1Ah and 40:1Ch, as
on a PC: programs that peek or flush there work.  The handler of INT 09h (handlers.asm) puts keys into it;
a guest that hooks that vector sees every code first.  While the buffer is full and the vector the
BIOS' own, the keyboard is held, so that typed text waits for room; behind another handler a full buffer drops keys, as
on a PC.  Head and tail are a guest's to overwrite, so they are checked at each use.

Waiting costs nothing.  AH=00h without a key puts the vCPU to sleep.  A guest that *polls* (AH=01h
in a loop, as DOS does at its prompt) would burn its whole share doing nothing: after
`IDLE_POLLS` empty polls with no output or disk call in between, each
further one sleeps for 5 ms, after `DEEP_POLLS` for 25 ms, or until a key comes, which ends
the sleep at once.  A program that polls once a frame is slowed to 200 frames a second, and to 40
when nobody has touched a key for seconds; what counts polls to tell the time goes wrong.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import ClassVar, Final

from ...engines.base import RAX
from ..clock import Clock
from ..devices.keyboard import ALT, CTRL, SHIFT, Keyboard
from ..memory import GuestMemory
from ..saved import COUNT, Field
from . import rom
from .registers import Call, Wait

__all__ = ["DEEP_NAP_NS", "DEEP_POLLS", "IDLE_NAP_NS", "IDLE_POLLS", "KeyboardService"]

IDLE_POLLS: Final = 100
IDLE_NAP_NS: Final = 5_000_000
DEEP_POLLS: Final = 300
DEEP_NAP_NS: Final = 25_000_000
_SEGMENT: Final = 0x400
_SHIFT_BITS: Final = {SHIFT: 2, CTRL: 4, ALT: 8}


class KeyboardService:
    """`poll_devices` lets the keyboard go on when there is room for a key again.
    """

    SAVED: ClassVar[Field] = {"empty_polls": COUNT}
    WIRING: ClassVar[frozenset[str]] = frozenset({"_poll_devices", "_memory", "_keyboard", "_clock", "_own_vector"})

    def __init__(
        self, memory: GuestMemory, keyboard: Keyboard, clock: Clock,
        poll_devices: Callable[[], None],
    ) -> None:
        self._poll_devices = poll_devices
        self._memory, self._keyboard, self._clock = memory, keyboard, clock
        self.empty_polls = 0
        self._own_vector = struct.pack("<HH", rom.entries()[0x09], rom.BIOS_SEGMENT)
        keyboard.hold = self._full

    def _full(self) -> bool:
        head, tail = self._ring()
        return self._after(tail) == head and self._memory.read(0x09 * 4, 4) == self._own_vector

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

    def put(self, scan: int, ascii_code: int) -> bool:
        """Into the guest's buffer; False when it is full."""
        head, tail = self._ring()
        after = self._after(tail)
        if after == head:
            return False
        self._memory.poke_u16(_SEGMENT + tail, scan << 8 | ascii_code)
        self._memory.poke_u16(rom.BDA_KEY_TAIL, after)
        return True

    def interrupt(self, call: Call) -> None:
        """INT 09h: AL is the code from port 60h, perhaps changed by an intercept (INT 15h/4Fh)."""
        bit = _SHIFT_BITS.get(call.al & 0x7F)
        if bit is not None:
            held = self._memory.u8(rom.BDA_SHIFTS)
            self._memory.poke_u8(rom.BDA_SHIFTS, held & ~bit if call.al & 0x80 else held | bit)
        key = self._keyboard.key
        if key is not None:
            self.put(*key)

    def peek(self) -> int | None:
        head, tail = self._ring()
        return None if head == tail else self._memory.u16(_SEGMENT + head)

    def take(self) -> int | None:
        key = self.peek()
        if key is not None:
            self._memory.poke_u16(rom.BDA_KEY_HEAD, self._after(self._ring()[0]))
        return key

    def call(self, call: Call) -> None:
        self._serve(call)
        if self._keyboard:                     # room may have come
            self._poll_devices()

    def _serve(self, call: Call) -> None:
        service = call.ah
        if service in (0x00, 0x10):
            self._read(call)
        elif service in (0x01, 0x11):
            self._poll(call)
        elif service == 0x02:
            call.al = self._memory.u8(rom.BDA_SHIFTS)
        elif service == 0x09:
            call.al = 0x20                     # capabilities: the enhanced services, 10h to 12h
        elif service == 0x12:
            call.ax = self._memory.u8(rom.BDA_SHIFTS)
        elif service == 0x05:
            # 0 stored, 1 buffer full
            call.al = 0 if self.put(call.ch, call.cl) else 1

    def _read(self, call: Call) -> None:
        key = self.take()
        self.empty_polls = 0
        if key is not None:
            call.ax = key
            return
        call.wait = Wait(for_key=True, takes_key=True)

    def deliver(self, gpr: list[int]) -> None:
        """The answer of a call that waited for a key."""
        key = self.take()
        if self._keyboard:
            self._poll_devices()
        gpr[RAX] = gpr[RAX] & ~0xFFFF | (key or 0)

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
            call.wait = Wait(for_key=True, until_ns=until, nap=True)
