"""Guest memory as the machine model sees it: no address can hurt the worker.

Every address that reaches a device or the BIOS comes from hostile code.  Reads outside memory
give ones and writes outside are dropped, as on a PC's bus; nothing raises.  Addresses are
guest-physical, sizes bytes.

`write` tells the engine that code may have changed there; `poke` does not, and is for data that
a guest cannot sensibly execute (screen, BIOS data area, a saved flags word): it is much cheaper.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Final

__all__ = ["CONVENTIONAL_END", "GuestMemory", "memory_map"]

CONVENTIONAL_END: Final = 639 << 10   # the KiB below the video memory is the BIOS', whether there is one or not


def memory_map(size: int) -> list[tuple[int, int, int]]:
    """(start, length, type) of each range of a PC with *size* bytes of memory; type 1 is RAM to be used, 2 is not."""
    ranges = [(0, min(size, CONVENTIONAL_END), 1)]
    if size > CONVENTIONAL_END:
        ranges += [(CONVENTIONAL_END, 0xA_0000 - CONVENTIONAL_END, 2), (0xF_0000, 0x1_0000, 2)]
    if size > 0x10_0000:
        ranges.append((0x10_0000, size - 0x10_0000, 1))
    return ranges


class GuestMemory:
    def __init__(self, raw: mmap.mmap | bytearray) -> None:
        self.raw = raw
        self.size = len(raw)
        self.changed: Callable[[int, int], None] = lambda _address, _length: None

    def read(self, address: int, length: int) -> bytes:
        data = bytes(self.raw[address:address + length]) if 0 <= address < self.size else b""
        return data if len(data) == length else data + b"\xff" * (length - len(data))

    def poke(self, address: int, data: bytes) -> int:
        """Write what fits; returns how many bytes did."""
        if not 0 <= address < self.size:
            return 0
        length = min(len(data), self.size - address)
        self.raw[address:address + length] = data[:length]
        return length

    def write(self, address: int, data: bytes) -> int:
        length = self.poke(address, data)
        if length:
            self.changed(address, length)
        return length

    def u8(self, address: int) -> int:
        return self.raw[address] if 0 <= address < self.size else 0xFF

    def u16(self, address: int) -> int:
        return int.from_bytes(self.read(address, 2), "little")

    def u32(self, address: int) -> int:
        return int.from_bytes(self.read(address, 4), "little")

    def poke_u8(self, address: int, value: int) -> None:
        if 0 <= address < self.size:
            self.raw[address] = value & 0xFF

    def poke_u16(self, address: int, value: int) -> None:
        self.poke(address, (value & 0xFFFF).to_bytes(2, "little"))

    def poke_u32(self, address: int, value: int) -> None:
        self.poke(address, (value & 0xFFFFFFFF).to_bytes(4, "little"))
