"""The devices of a micro-VM: one small module each, none knows the others.

A device is a plain object that claims ports: `ports()` yields `(port, read, write)` where
`read() -> byte` and `write(byte)`; the machine (vm/worker/machine.py) splits wider accesses into
bytes, as an ISA bus does.  Devices ask no clock but the one that they are given, do no I/O and
raise nothing: whatever a guest writes is either understood or remembered or ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

__all__ = ["Device", "PortClaim", "nothing", "ones"]

PortClaim = tuple[int, Callable[[], int], Callable[[int], None]]


class Device(Protocol):
    def ports(self) -> Iterable[PortClaim]: ...


def ones() -> int:
    """What an unconnected port reads."""
    return 0xFF


def nothing(_value: int) -> None:
    """What a write to an unconnected port does."""
