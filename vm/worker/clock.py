"""Where a worker's devices get the time from, so that tests can give it to them.

Two times.  *Monotonic* nanoseconds drive everything that counts (timer, token bucket, waits);
*wall* nanoseconds since the Unix epoch answer a guest that asks for the date. The guest's wall
clock is UTC: a sandboxed worker reads no time-zone file.  Guest time is host time: it goes on
while the VM is paused or waits for a CPU, as a PC's battery clock would.
"""

from __future__ import annotations

import time
from typing import Final, Protocol

__all__ = ["PIT_HZ", "TICKS_PER_DAY", "Clock", "HostClock"]

PIT_HZ: Final = 1_193_182                 # 14.31818 MHz / 12, the PC's timer input
TICKS_PER_DAY: Final = 0x1800B0           # BIOS convention: 65536 PIT periods a tick


class Clock(Protocol):
    def monotonic_ns(self) -> int: ...
    def wall_ns(self) -> int: ...


class HostClock:
    """CLOCK_MONOTONIC and CLOCK_REALTIME; both need no system call that a sandbox could refuse."""

    def monotonic_ns(self) -> int:
        return time.monotonic_ns()

    def wall_ns(self) -> int:
        return time.time_ns()
