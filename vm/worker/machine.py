"""The one machine model of a micro-VM: what is behind its ports, whatever engine runs it.

Theory.  A machine is a `Bus` (vm/engines/base.py): a table from port number to a device's pair
of byte functions, filled once.  Wider accesses are split into bytes at consecutive ports, as an
ISA bus does.  Ports nobody claims read ones and swallow writes; so does memory-mapped I/O, since
there is no such device.  With a boot disk, the BIOS (bios/) is installed too, behind `BIOS_PORT`.

Ending: a device that ends the VM (exit port, reset) sets `ending` and stops the vCPU; the
first reason stands.

Interrupts: devices raise lines of the interrupt controllers, which ask the vCPU (`Cpu.request_interrupt`); the
engine acknowledges when the guest can take one.  Devices that interrupt by themselves (timer, clock, keyboard) are
brought up to date by `poll`; `next_event_ns` says when that is worth doing again, and `alarm` is
told whenever it changes, so that whoever runs the vCPU can leave it then, or wake it.

Time spent here is added to `exit_handling_ns` of the status page at each exit: two clock reads
and one store, some 200 ns, as against 2 us (software) to 66 us (PVM) for the exit itself.

| ports | device |
|---|---|
| 20-21 A0-A1 | interrupt controllers: lines 0 timer, 1 keyboard, 4 serial, 8 clock |
| 40-43 61 | interval timer, speaker gate |
| 60 64 92 | keyboard controller, system control |
| 70-71 | CMOS: time, date, memory size |
| 80 E0-E3 E9 F4 | POST code (other ports too, where the VM says so), echo, debug output, exit |
| 402 | debug output of BIOSes, joins that of E9 |
| B0 | BIOS calls (boot from disk only) |
| 278-27A 378-37A 3BC-3BE | printer ports, whose output joins that of the debug port |
| 3C0-3DF | text display |
| 3F8-3FF | serial port |
| 510-511 | firmware configuration (multiboot kernels only) |
| CF8-CFF | PCI configuration: ones, there is no bus |
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from ..engines.base import Cpu
from .bios import BIOS_PORT, Bios, Wait
from .clock import Clock
from .devices import Device, nothing, ones
from .devices import keyboard as keyboard_device
from .devices import serial as serial_device
from .devices.board import Board
from .devices.cmos import Cmos
from .devices.disk import Disk
from .devices.fwcfg import FirmwareConfig
from .devices.keyboard import Keyboard
from .devices.parallel import Parallel
from .devices.pic import Interrupts
from .devices.serial import Serial
from .devices.timer import Timer
from .devices.vga import Vga
from .memory import GuestMemory
from .saved import Field, Moments, Part, capture, install

__all__ = ["COLUMNS", "ROWS", "Machine", "MachineEnding", "Screen"]

COLUMNS: Final = 80
ROWS: Final = 25
_TEXT: Final = 0xB8000
_ONES: Final = {1: 0xFF, 2: 0xFFFF, 4: 0xFFFF_FFFF, 8: 0xFFFF_FFFF_FFFF_FFFF}


@dataclass(frozen=True, slots=True)
class MachineEnding:
    """A device ended the VM: code and reason as in protocol.Ending."""

    code: str
    reason: str
    exit_code: int | None


@dataclass(frozen=True, slots=True)
class Screen:
    """The text screen: 25 rows of 80 characters, 2000 attribute bytes, cursor (column, row)."""

    rows: tuple[str, ...]
    attributes: bytes
    cursor: tuple[int, int]


class Machine:
    """`count(name, n)` adds to a field of the status page. `disks` bring the BIOS with them; it boots from the first.

    `alarm(ns)` is told when `poll` should be called next (monotonic; None: no device needs it). `fw_cfg`: where
    the VM has one.
    """

    SAVED: ClassVar[Field] = {
        **dict.fromkeys(
            ("serial", "parallel", "interrupts", "timer", "keyboard", "vga", "cmos", "board", "bios",
             "fw_cfg"), Part()),
    }
    WIRING: ClassVar[frozenset[str]] = frozenset({
        "memory", "ending", "_cpu", "_clock", "_count", "_alarm", "next_event_ns", "_seen", "_reads", "_writes",
        "disks", "post_codes"})

    def __init__(
        self, memory: GuestMemory, clock: Clock, count: Callable[[str, int], None],
        disks: Sequence[Disk] = (), alarm: Callable[[int | None], None] = lambda _ns: None,
        post_ports: Iterable[int] = (0x80,), fw_cfg: FirmwareConfig | None = None,
    ) -> None:
        self.memory = memory
        self.ending: MachineEnding | None = None
        self._cpu: Cpu | None = None
        self._clock, self._count, self._alarm = clock, count, alarm
        self.next_event_ns: int | None = None
        self._seen: tuple[bytes, int] | None = None
        self.interrupts = interrupts = Interrupts(self._ask, firmware=bool(disks))
        self.serial = Serial(clock, count, lambda level: interrupts.set(serial_device.LINE, level))
        self.timer = Timer(clock, interrupts, changed=self._schedule,
                           lost=lambda n: count("timer_ticks_lost", n))
        self.keyboard = Keyboard(
            clock, lambda level: interrupts.set(keyboard_device.LINE, level),
            lambda: interrupts.in_service(keyboard_device.LINE), self._schedule, self.end)
        self.vga = Vga(clock)
        self.disks = tuple(disks)
        self.cmos = cmos = Cmos(clock, memory.size, {disk.drive: disk.geometry for disk in disks}, interrupts,
                                self._schedule)
        interrupts.masking, interrupts.programmed = self.poll, self._schedule
        self._reads: dict[int, Callable[[], int]] = {}
        self._writes: dict[int, Callable[[int], None]] = {}
        self.board = Board(self.serial.put, self.end)
        self.fw_cfg = fw_cfg
        self.parallel = Parallel(self.serial.put)
        self._claim(interrupts, self.timer, self.keyboard, self.vga, cmos, self.serial, self.parallel, self.board,
                    *([fw_cfg] if fw_cfg else []))
        for port in post_ports:
            self._reads.setdefault(port, ones)
            self._watch_post(port, self.board)
        self.post_codes = self.board.post_codes
        self.bios: Bios | None = None
        if disks:
            self.bios = Bios(memory, clock, vga=self.vga, keyboard=self.keyboard,
                             serial=self.serial, cmos=cmos, disks=disks, end=self.end, count=count,
                             poll=self.poll, poll_if_due=self._poll_if_due)
            self._reads[BIOS_PORT] = ones
            self._writes[BIOS_PORT] = self._bios_call
        self._schedule()

    def _claim(self, *devices: Device) -> None:
        for device in devices:
            for port, read, write in device.ports():
                self._reads[port] = read
                self._writes[port] = write

    def _watch_post(self, port: int, board: Board) -> None:
        """POST codes are also written to a port that does something: both then happen."""
        write = self._writes.get(port, nothing)

        def both(value: int) -> None:
            board.post(value)
            write(value)

        self._writes[port] = both

    def attach(self, cpu: Cpu) -> None:
        """The vCPU, before it runs: engines are made with the bus, so it comes second."""
        self._cpu = cpu
        self.memory.changed = cpu.memory_changed
        if self.bios is not None:
            self.bios.attach(cpu)
        cpu.request_interrupt(self.interrupts.asking)

    @property
    def wait(self) -> Wait | None:
        return self.bios.wait if self.bios is not None else None

    def end(self, code: str, reason: str, exit_code: int | None = None) -> None:
        """End the VM once the present instruction is complete."""
        if self.ending is None:
            self.ending = MachineEnding(code, reason, exit_code)
        if self._cpu is not None:
            self._cpu.stop()

    # Interrupts.

    def _ask(self, asking: bool) -> None:
        if self._cpu is not None:
            self._cpu.request_interrupt(asking)

    def acknowledge(self) -> int:
        """The vCPU takes an interrupt: its vector."""
        self._count("interrupts", 1)
        vector = self.interrupts.acknowledge()
        self.poll()                                # the next tick that is owed, if one is
        return vector

    def poll(self) -> None:
        """Time has passed: let devices raise what is due."""
        now_ns = self._clock.monotonic_ns()
        self.timer.poll(now_ns)
        self.cmos.poll(now_ns)
        self.keyboard.poll(now_ns)
        self._schedule()

    def _poll_if_due(self) -> None:
        if self.next_event_ns is not None and self._clock.monotonic_ns() >= self.next_event_ns:
            self.poll()

    def _schedule(self) -> None:
        moments = (self.timer.next_ns(), self.cmos.next_ns(), self.keyboard.next_ns())
        first = min((moment for moment in moments if moment is not None), default=None)
        if first != self.next_event_ns:
            self.next_event_ns = first
            self._alarm(first)

    def _bios_call(self, _value: int) -> None:
        assert self.bios is not None
        self.bios.call()

    # The Bus.

    def port_in(self, port: int, size: int) -> int:
        begun = time.perf_counter_ns()
        if size == 1:
            value = self._reads.get(port, ones)() & 0xFF
        else:
            value = 0
            for index in range(size):
                read = self._reads.get(port + index & 0xFFFF, ones)
                value |= (read() & 0xFF) << 8 * index
        self._count("exit_handling_ns", time.perf_counter_ns() - begun)
        return value

    def port_out(self, port: int, size: int, value: int) -> None:
        begun = time.perf_counter_ns()
        for index in range(size):
            self._writes.get(port + index & 0xFFFF, nothing)(value >> 8 * index & 0xFF)
        self._count("exit_handling_ns", time.perf_counter_ns() - begun)

    def mmio_read(self, address: int, size: int) -> int:
        return _ONES[size]

    def mmio_write(self, address: int, size: int, value: int) -> None:
        """Nothing is there."""

    # For the worker.

    def press(self, keys: Iterable[tuple[int, int]]) -> int:
        """Queue keys; returns how many there was room for."""
        accepted = 0
        for scan, ascii_code in keys:
            if not self.keyboard.press(scan, ascii_code):
                break
            accepted += 1
        return accepted

    def wait_is_over(self, now_ns: int) -> bool:
        """Whether the present wait (a BIOS call's) has what it waits for."""
        wait = self.wait
        if wait is None:
            return True
        if wait.for_key and self.bios is not None and self.bios.keyboard.peek() is not None:
            return True
        return wait.until_ns is not None and now_ns >= wait.until_ns

    def finish_wait(self) -> None:
        """Complete the call that waited; the vCPU may run again."""
        if self.bios is not None:
            self.bios.finish_wait()

    def interrupt_wait(self) -> None:
        """Let an interrupt through to a guest that waits in a BIOS call."""
        if self.bios is not None:
            self.bios.interrupt_wait()

    # Saved and restored (vm/worker/saved.py).

    def capture(self) -> dict[str, Any]:
        """The state of every device, as plain data. The vCPU and guest memory are not in it."""
        return capture(self, self._moments())

    def restore(self, state: Any) -> None:
        """Go on from `capture`'s data, in a machine of the same kind. Raises BadState; it is then of no use."""
        install(self, state, self._moments())
        self._ask(self.interrupts.asking)
        self._schedule()

    def _moments(self) -> Moments:
        return Moments(self._clock.monotonic_ns(), self._clock.wall_ns() // 1_000_000_000)

    def screen(self) -> Screen | None:
        """The text screen; None where guest memory ends below it."""
        if self.memory.size < _TEXT + 0x8000:
            return None
        columns = 40 if self.bios is not None and self.memory.u16(0x44A) == 40 else COLUMNS
        first = min(self.vga.start, 0x4000 - columns * ROWS)
        cells = self.memory.read(_TEXT + 2 * first, 2 * columns * ROWS)
        seen = (cells, self.vga.cursor)
        if self._seen is not None and seen != self._seen:
            # A guest that writes to B8000h itself tells nobody: notice it here.
            self._count("screen_version", 1)
        self._seen = seen
        text = cells[::2].decode("latin-1").translate(_GLYPHS)
        blank = " " * (COLUMNS - columns)
        rows = tuple(text[row * columns:(row + 1) * columns] + blank for row in range(ROWS))
        colours = cells[1::2]
        attributes = b"".join(
            colours[row * columns:(row + 1) * columns].ljust(COLUMNS, b"\x07")
            for row in range(ROWS))
        cell = min(max(0, self.vga.cursor - first), columns * ROWS - 1)
        return Screen(rows, attributes, (cell % columns, cell // columns))


# Code page 437 with its glyphs for the control codes, as a display shows them.
_CONTROLS: Final = "\u0020☺☻♥♦♣♠•◘○◙♂♀♪♫☼►◄↕‼¶§▬↨↑↓→←∟↔▲▼"
_GLYPHS: Final = {
    # FFh is a blank of its own in code page 437; a no-break space would not be printable.
    code: (_CONTROLS[code] if code < 32 else "⌂" if code == 127 else " " if code == 255
           else bytes([code]).decode("cp437"))
    for code in range(256)
}
