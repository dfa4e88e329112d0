"""The status page: what a worker publishes about itself without being asked.

One shared 4 KiB memfd a VM. The worker is its only writer; the supervisor and the dispatcher
map it read-only. A worker runs hostile guests, so readers treat every value as a claim: it may
be absurd, never dangerous (nothing is indexed, allocated or scheduled by it alone; CPU time
comes from the kernel). Each field is an aligned 64-bit little-endian word, written by one store.
"""

from __future__ import annotations

import enum
import mmap
from typing import Final

from ..disks.geometry import DRIVES
from ..engines.base import ExitKind

__all__ = ["DISK_COUNTERS", "EXITS_OFFSET", "FIELDS", "STATUS_SIZE", "VCPUS_MAX", "Phase", "StatusPage"]

STATUS_SIZE: Final = 4096
MAGIC: Final = 0x3153_5849_4D56_5831  # layout 1


class Phase(enum.IntEnum):
    STARTING = 0
    RUNNING = 1      # in guest context, or handling an exit
    SLEEPING = 2     # the guest waits (HLT, a BIOS call for a key): needs no CPU
    PAUSED = 3
    ENDED = 4


DISK_COUNTERS: Final = ("read_bytes", "written_bytes", "reads", "writes", "errors")     # of each drive

FIELDS: Final = {
    name: index for index, name in enumerate((
        "magic", "phase", "started_ns",        # CLOCK_MONOTONIC of the first guest instruction
        "exit_handling_ns",                    # host time in exits (wall clock of the vCPU thread)
        "serial_bytes", "serial_dropped_bytes",
        "bios_calls", "disk_read_bytes", "disk_written_bytes",
        "screen_version",                      # moves when the text screen may have changed
        "sleeping_ns",                         # total time in SLEEPING
        "interrupts",                          # external ones that the guest took
        "timer_ticks_lost",                    # given up: the VM was too far behind (devices/timer.py)
        *(f"{drive}_{what}" for drive in DRIVES for what in DISK_COUNTERS),
        "disk_error",                          # of the last operation that the host refused: errno (disk.DAMAGED)
    ))
}
EXITS_OFFSET: Final = 512
EXITS_BYTES: Final = 128                 # of each vCPU: its counters, and room
VCPUS_MAX: Final = 16
assert EXITS_OFFSET + VCPUS_MAX * EXITS_BYTES <= STATUS_SIZE


class StatusPage:
    """A view of a status page: `page.get("phase")`, `page.set("phase", Phase.RUNNING)`."""

    def __init__(self, fd: int, *, writable: bool) -> None:
        prot = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self._map = mmap.mmap(fd, STATUS_SIZE, prot=prot)
        self.words = memoryview(self._map).cast("Q")
        self.exits = self.exits_of(0)
        if writable:
            self.words[FIELDS["magic"]] = MAGIC

    def exits_of(self, vcpu: int) -> memoryview:
        """The exit counters of a vCPU, by ExitKind. Release it before `close`."""
        first = (EXITS_OFFSET + EXITS_BYTES * vcpu) // 8
        return self.words[first:first + len(ExitKind)]

    def exits_of_all(self, vcpus: int) -> list[int]:
        """Their sums over the first *vcpus* vCPUs, by ExitKind."""
        first, step = EXITS_OFFSET // 8, EXITS_BYTES // 8
        words = self.words[first:first + step * min(vcpus, VCPUS_MAX)].tolist()
        return [sum(words[kind::step]) for kind in range(len(ExitKind))]

    def get(self, name: str) -> int:
        return self.words[FIELDS[name]]

    def set(self, name: str, value: int) -> None:
        self.words[FIELDS[name]] = value

    def add(self, name: str, value: int) -> None:
        self.words[FIELDS[name]] += value

    def close(self) -> None:
        self.exits.release()
        self.words.release()
        self._map.close()
