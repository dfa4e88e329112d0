"""Dispatch of BIOS calls, their counts and their trace. See the package's docstring."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import ClassVar, Final

from ...engines.base import RIP, RSP, Cpu
from ..clock import Clock
from ..devices.cmos import Cmos
from ..devices.disk import Disk
from ..devices.keyboard import Keyboard
from ..devices.serial import Serial
from ..devices.vga import Vga
from ..memory import GuestMemory
from ..saved import BYTE, COUNT, Field, Kind, Maybe, Part, Row, Table
from . import rom
from .disk import DiskService
from .keyboard import KeyboardService
from .registers import Call, Wait
from .rom import BIOS_PORT
from .system import System, day_ticks
from .video import Video

__all__ = ["BIOS_PORT", "TRACE_LIMIT", "Bios"]

TRACE_LIMIT: Final = 1 << 14
_STUBS_END: Final = 256 * rom.STUB_BYTES
_CARRY, _ZERO = 0x01, 0x40
_OUT_BYTES: Final = 2                            # of the stub's `out BIOS_PORT, al`
_HARDWARE: Final = frozenset((0x09,))          # reached by an interrupt, not by a program's call
_RESUMED_LIMIT: Final = 16                       # waits that interrupts may have put off at once
_PLACE: Final[Kind] = Row((BYTE, BYTE, COUNT))
_ACTIVITY: Final = frozenset((0x10, 0x13, 0x14, 0x17))   # who calls these between polls is not idle


class Bios:
    """The services of one machine. `attach` gives it the vCPU before the first call.

    `poll` lets devices raise what is due, `poll_if_due` only looks at the clock when nothing is.
    """

    SAVED: ClassVar[Field] = {
        "wait": Maybe(Part(Wait)), "_place": _PLACE, "_put_off": Table(_PLACE, Part(Wait), _RESUMED_LIMIT),
        "keyboard": Part(),
    }
    # Calls and their trace are statistics of this process. Video and the system's services keep nothing of their own.
    WIRING: ClassVar[frozenset[str]] = frozenset({
        "_memory", "_count", "_poll_if_due", "_cpu", "calls", "trace", "video", "system", "_services"})

    def __init__(
        self, memory: GuestMemory, clock: Clock, *, vga: Vga, keyboard: Keyboard, serial: Serial,
        cmos: Cmos, disks: Sequence[Disk], end: Callable[[str, str, int | None], None],
        count: Callable[[str, int], None], poll: Callable[[], None],
        poll_if_due: Callable[[], None],
    ) -> None:
        self._memory, self._count, self._poll_if_due = memory, count, poll_if_due
        self._cpu: Cpu | None = None
        self.wait: Wait | None = None
        self._place = (0, 0, 0)                      # of the call that waits: vector, AH, stack address
        self._put_off: dict[tuple[int, int, int], Wait] = {}
        self.calls: Counter[tuple[int, int]] = Counter()
        self.trace: list[tuple[int, int]] = []       # the first TRACE_LIMIT, repeats collapsed
        now = cmos.now()
        rom.install(memory, disks={disk.drive: disk.geometry for disk in disks},
                    ticks=day_ticks(now.hour * 3600 + now.minute * 60 + now.second))
        self.video = Video(memory, vga, lambda: count("screen_version", 1))
        self.keyboard = KeyboardService(memory, keyboard, clock, poll)
        self.system = System(memory, clock, cmos, serial, end)
        self._services: dict[int, Callable[[Call], None]] = {
            **self.system.services,
            0x09: self.keyboard.interrupt,
            0x10: self.video.call,
            0x13: DiskService(memory, disks, count).call,
            0x16: self.keyboard.call,
        }
        self.video.reset()

    def attach(self, cpu: Cpu) -> None:
        self._cpu = cpu

    def finish_wait(self) -> None:
        """Complete a call after its wait, if one waits: the vCPU may run again."""
        wait, self.wait = self.wait, None
        if wait is not None and wait.takes_key:
            assert self._cpu is not None
            gpr = self._cpu.get_gpr()
            self.keyboard.deliver(gpr)
            self._cpu.set_gpr(gpr)

    def call(self) -> None:
        """The guest wrote to BIOS_PORT. Ignored when that was not one of the ROM's stubs."""
        cpu = self._cpu
        assert cpu is not None
        gpr = cpu.get_gpr()
        offset = gpr[RIP] & 0xFFFF
        if offset >= _STUBS_END or cpu.segment_base("cs") != rom.BIOS_SEGMENT << 4:
            return
        vector = offset // rom.STUB_BYTES
        call = Call(vector, gpr, cpu.segment_base)
        place = (vector, call.ah, call.address("ss", gpr[RSP]))
        put_off = self._put_off.pop(place, None) if self._put_off else None
        if put_off is not None:                        # the same call again, behind an interrupt
            self.wait, self._place = put_off, place
            cpu.stop()
            return
        if vector not in _HARDWARE:
            self._note((vector, call.ah))
        self._poll_if_due()
        if vector in _ACTIVITY:
            self.keyboard.empty_polls = 0
        service = self._services.get(vector)
        if service is not None:
            service(call)
        if call.carry is not None or call.zero is not None:
            self._return_flags(call)
        if call.changed:
            cpu.set_gpr(gpr)
        if call.wait is not None:
            self.wait, self._place = call.wait, place
            cpu.stop()

    def _note(self, key: tuple[int, int]) -> None:
        self._count("bios_calls", 1)
        self.calls[key] += 1
        if len(self.trace) < TRACE_LIMIT and (not self.trace or self.trace[-1] != key):
            self.trace.append(key)

    def interrupt_wait(self) -> None:
        """An interrupt comes while a call waits; the vCPU is stopped behind the stub's `out`.

        A nap is over. Another wait is put off: the vCPU is set back to the `out`, so that
        the interrupt returns there and the same call comes again.
        """
        wait, self.wait = self.wait, None
        if wait is None:
            return
        if wait.nap:
            return
        assert self._cpu is not None
        if len(self._put_off) >= _RESUMED_LIMIT:       # a guest that never came back: the oldest is forgotten
            del self._put_off[next(iter(self._put_off))]
        self._put_off[self._place] = wait
        gpr = self._cpu.get_gpr()
        gpr[RIP] = gpr[RIP] - _OUT_BYTES & 0xFFFF
        self._cpu.set_gpr(gpr)

    def _return_flags(self, call: Call) -> None:
        """Into the flags that `int` pushed: IP, CS, flags from the top of the stack."""
        address = call.address("ss", call.gpr[RSP] + 4)
        flags = self._memory.u16(address)
        if call.carry is not None:
            flags = flags | _CARRY if call.carry else flags & ~_CARRY
        if call.zero is not None:
            flags = flags | _ZERO if call.zero else flags & ~_ZERO
        self._memory.poke_u16(address, flags)
