"""QEMU's firmware configuration device, as far as test suites and small firmware ask it (ports 510h, 511h).

Theory.  A guest writes the number of an item to 510h, 16 bits wide, and reads the item's bytes one after the
other from 511h; behind its end, and for an item that is not there, it reads zeros.  Numbers are
little-endian but for the file directory.  The machine hands over bytes, so the high half of a number comes as a
write to 511h: the data port itself is read-only, as it is in QEMU since version 2.4.
Source: docs/specs/fw_cfg.rst of QEMU; kvm-unit-tests' lib/x86/fwcfg.c for what is asked.

Poor: no DMA interface (the feature word says so), no files: the directory is empty.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from typing import ClassVar, Final

from ..saved import Field, Number
from . import PortClaim

__all__ = ["FirmwareConfig"]

_SIGNATURE, _FEATURES, _UUID, _RAM, _NO_GRAPHIC, _CPUS, _MAX_CPUS, _DIRECTORY = 0, 1, 2, 3, 4, 5, 0xF, 0x19
_PORT: Final = 0x510


class FirmwareConfig:
    """`memory_bytes` and `vcpus` of the machine it describes."""

    SAVED: ClassVar[Field] = {"_chosen": Number(0xFFFF), "_at": Number(16)}
    WIRING: ClassVar[frozenset[str]] = frozenset({"_items"})

    def __init__(self, memory_bytes: int, vcpus: int = 1) -> None:
        self._items: Mapping[int, bytes] = {
            _SIGNATURE: b"QEMU", _FEATURES: struct.pack("<I", 1), _UUID: bytes(16),
            _RAM: struct.pack("<Q", memory_bytes), _NO_GRAPHIC: struct.pack("<H", 0),
            _CPUS: struct.pack("<H", vcpus), _MAX_CPUS: struct.pack("<H", vcpus), _DIRECTORY: bytes(4),
        }
        self._chosen = 0
        self._at = 0

    def ports(self) -> Iterable[PortClaim]:
        yield _PORT, lambda: self._chosen & 0xFF, self._choose_low
        yield _PORT + 1, self._read, self._choose_high

    def _choose_low(self, value: int) -> None:
        self._chosen, self._at = value, 0

    def _choose_high(self, value: int) -> None:
        self._chosen = self._chosen & 0xFF | value << 8

    def _read(self) -> int:
        item = self._items.get(self._chosen, b"")
        value = item[self._at] if self._at < len(item) else 0
        self._at = min(self._at + 1, len(item))
        return value
