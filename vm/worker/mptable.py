"""The table by which a guest finds its processors: MultiProcessor Specification 1.4 (Intel, order 242016).

Theory.  A floating pointer, looked for in the BIOS' last KiB of conventional memory, names a table of entries: a
processor each (its APIC id is its index; the first starts the others), the ISA bus, and how the first local APIC gets
what the 8259s ask (LINT0) and an NMI (LINT1).  There is no I/O APIC: interrupts of devices come by the 8259s, in
virtual wire mode.  Written only where there are several vCPUs.

Map: the BIOS' data area begins at 9FC00h with its size; the pointer is at 9FC10h, the table behind it.
"""

from __future__ import annotations

import struct
from typing import Final

from .memory import CONVENTIONAL_END, GuestMemory

__all__ = ["POINTER", "install"]

POINTER: Final = CONVENTIONAL_END + 0x10
_TABLE: Final = POINTER + 0x10
_LOCAL_APIC: Final = 0xFEE0_0000
_VERSION: Final = 0x14                 # of the local APIC
_ENABLED, _FIRST = 1, 2
_FEATURES: Final = 1 << 9 | 1          # an APIC and an FPU
_SIGNATURE: Final = 0x600              # family 6
_EXTERNAL, _NMI = 3, 1


def install(memory: GuestMemory, vcpus: int) -> None:
    """Raises ValueError where memory ends below the table."""
    table = _table(vcpus)
    if memory.size < CONVENTIONAL_END + 0x400:
        raise ValueError(f"a VM with several vCPUs needs at least {CONVENTIONAL_END + 0x400 >> 10}K of memory")
    memory.poke_u8(CONVENTIONAL_END, 1)                        # the BIOS' data area is 1 KiB
    memory.poke(POINTER, _summed(struct.pack("<4sIBBB5x", b"_MP_", _TABLE, 1, 4, 0), 10))
    memory.poke(_TABLE, table)


def _table(vcpus: int) -> bytes:
    entries = [
        struct.pack("<BBBBIIQ", 0, index, _VERSION, _ENABLED | (_FIRST if index == 0 else 0), _SIGNATURE, _FEATURES, 0)
        for index in range(vcpus)]
    entries.append(struct.pack("<BB6s", 1, 0, b"ISA   "))
    entries += [struct.pack("<BBHBBBB", 4, kind, 0, 0, 0, target, line)
                for kind, target, line in ((_EXTERNAL, 0, 0), (_NMI, 0xFF, 1))]
    body = b"".join(entries)
    header = struct.pack("<4sHBB8s12sIHHIHBx", b"PCMP", 44 + len(body), 4, 0, b"MIXVISOR", b"micro-VM    ", 0, 0,
                         len(entries), _LOCAL_APIC, 0, 0)
    return _summed(header + body, 7)


def _summed(data: bytes, at: int) -> bytes:
    """With the byte at *at* such that all of them sum to zero."""
    return data[:at] + bytes([-sum(data) & 0xFF]) + data[at + 1:]
