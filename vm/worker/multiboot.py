"""Booting a Multiboot 1 kernel: its parts, its modules and what it is told go into guest memory.

Theory.  The loader is this process: no BIOS runs.  The kernel's parts go where its file says
(vm/code/multiboot.py), the modules behind it on pages of their own, and one *block* holds everything
that the kernel is told.  The kernel is entered in 32-bit protected mode with flat segments, paging
and interrupts off, EAX = 2BADB002h, EBX = the address of the information.

The block lies below the end of conventional memory, or where the kernel itself takes that place behind
everything else; never in 4000h to 13000h, where test suites load real-mode code and start other processors:

    + 0      multiboot_info (116 bytes): memory, command line, modules, memory map, loader name, text screen
    + 80h    a GDT: 08h code, 10h data, both from 0 to 4 GiB
    + C0h    memory map, then the list of modules, then all strings
    end      a stack of 1 KiB: the specification promises none, kernels push all the same

The words of a BIOS' data area that say how much conventional memory there is are there, too: kernels place their
real-mode code by them (Xen does).

Command lines begin with the name of the file, as those of GRUB and QEMU do: kernels take the first word
for their own name.

Invariants.  Everything is checked before the first byte is written, so a `BootError` leaves memory
alone.  Files are read by `os.pread`, never mapped: whoever truncates one cannot end the worker.

Poor: no BIOS calls; no drive table, ROM table, APM or ELF symbols; the screen is always text of 80 by 25.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ..code import multiboot
from ..engines.base import RAX, RBX, CpuState
from ..engines.entry import GDT_BYTES, protected_state
from .memory import CONVENTIONAL_END, memory_map

__all__ = ["BootError", "Module", "boot"]

BOOTED: Final = 0x2BAD_B002
LOADER: Final = b"Mixvisor"
HOLE: Final = range(CONVENTIONAL_END, 0x10_0000)       # data of a BIOS, video memory, ROM
AVOIDED: Final = range(0x4000, 0x1_3000)
# flags, lower and upper memory, boot device, command line, modules; map; loader name; screen
_INFO: Final = struct.Struct("<7I 16x II 12x I 20x QIIIBB6x")
_GDT, _TABLES, _STACK = 0x80, 0xC0, 1024
_MEMORY, _COMMAND_LINE, _MODULES, _MAP, _NAME, _SCREEN = (1 << bit for bit in (0, 2, 3, 6, 9, 12))
_TEXT: Final = 0xB_8000
_TEXT_END: Final = 0xC_0000
_CHUNK: Final = 1 << 20
_BDA_EXTENDED, _BDA_MEMORY = 0x40E, 0x413      # segment of the extended data area, KiB of conventional memory


class BootError(Exception):
    """The kernel cannot be booted; one sentence that says what to change. `kind`: image or memory."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Module:
    fd: int
    text: str                         # its command line, the name first


def boot(memory: mmap.mmap, image: int, text: str, modules: Sequence[Module]) -> CpuState:
    """Load the kernel in the file descriptor *image*; the state to start in. Raises BootError.

    text: the kernel's command line, its name first.
    """
    size = os.fstat(image).st_size
    try:
        kernel = multiboot.parse(lambda offset, length: os.pread(image, length, offset), size)
    except multiboot.MultibootError as error:
        raise BootError("image", f"the kernel cannot be booted: {error}") from error
    required = multiboot.requirement(kernel.flags)
    if required is not None:
        raise BootError("image", f"the kernel cannot be booted: {required}")
    for part in kernel.parts:
        _check_part(part, len(memory))
    taken = [range(part.address, part.end) for part in kernel.parts]
    placed = _place_modules(modules, taken, len(memory))
    taken += placed
    at, block = _block(memory, text, modules, placed, taken)
    low = min(len(memory), CONVENTIONAL_END)
    memory[_BDA_EXTENDED:_BDA_EXTENDED + 2] = (low >> 4).to_bytes(2, "little")
    memory[_BDA_MEMORY:_BDA_MEMORY + 2] = (low >> 10).to_bytes(2, "little")
    for part in kernel.parts:
        _load(memory, image, part.offset, part.file_bytes, part.address)
    for module, place in zip(modules, placed, strict=True):
        _load(memory, module.fd, 0, len(place), place.start)
    memory[at:at + len(block)] = block
    state = protected_state(memory, kernel.entry, gdt=at + _GDT, stack=at + len(block) + _STACK)
    state.gpr[RAX], state.gpr[RBX] = BOOTED, at
    return state


def _check_part(part: multiboot.Part, size: int) -> None:
    where = f"the kernel is loaded at {part.address:#x} to {part.end - 1:#x}"
    if part.end > size:
        raise BootError("memory", f"{where}, beyond the VM's {size >> 10} KiB of memory: give it at least "
                                  f"{-(-part.end >> 20)}M")
    if part.address < HOLE.stop and part.end > HOLE.start:
        raise BootError("image", f"{where}, where a PC has BIOS data, video memory and ROM (0x9fc00 to 0xfffff): link "
                                 "it elsewhere, usually at 1 MiB")


def _place_modules(modules: Sequence[Module], taken: list[range], size: int) -> list[range]:
    """Pages for each module, behind the kernel."""
    at = max([HOLE.stop, *(place.stop for place in taken)])
    places: list[range] = []
    for module in modules:
        at = _aligned(at, mmap.PAGESIZE)
        length = os.fstat(module.fd).st_size
        if at + length > size:
            raise BootError("memory", f"the module {module.text.split(' ')[0]} of {length} bytes does not fit into "
                                      f"memory at {at:#x}: give the VM at least {-(-(at + length) >> 20)}M")
        places.append(range(at, at + length))
        at += length
    return places


def _block(
    memory: mmap.mmap, text: str, modules: Sequence[Module], placed: Sequence[range], taken: Sequence[range],
) -> tuple[int, bytes]:
    """Where the block goes, and its bytes (without the stack)."""
    size = len(memory)
    ranges = memory_map(size)
    lines = [text.encode(), LOADER, *(module.text.encode() for module in modules)]
    map_bytes = b"".join(struct.pack("<IQQI", 20, *entry) for entry in ranges)
    modules_at = _TABLES + _aligned(len(map_bytes), 16)
    strings_at = modules_at + 16 * len(modules)
    length = strings_at + sum(len(line) + 1 for line in lines)
    length = _aligned(length, 16)
    at = _place(length + _STACK, taken, size)
    addresses: list[int] = []
    strings = b""
    for line in lines:
        addresses.append(at + strings_at + len(strings))
        strings += line + b"\0"
    listed = b"".join(struct.pack("<4I", place.start, place.stop, address, 0)
                      for place, address in zip(placed, addresses[2:], strict=True))
    flags = _MEMORY | _COMMAND_LINE | _MODULES | _MAP | _NAME | (_SCREEN if size >= _TEXT_END else 0)
    info = _INFO.pack(
        flags, min(size, CONVENTIONAL_END) >> 10, max(0, size - HOLE.stop) >> 10, 0, addresses[0], len(modules),
        at + modules_at if modules else 0, len(map_bytes), at + _TABLES, addresses[1],
        *((_TEXT, 160, 80, 25, 16, 2) if flags & _SCREEN else (0,) * 6))
    assert len(info) <= _GDT
    assert _GDT + GDT_BYTES <= _TABLES
    return at, (info.ljust(_TABLES, b"\0") + map_bytes.ljust(modules_at - _TABLES, b"\0") + listed + strings
                ).ljust(length, b"\0")


def _place(length: int, taken: Sequence[range], size: int) -> int:
    """The highest free place below the BIOS', else the lowest behind everything. Raises BootError."""
    obstacles = [*taken, AVOIDED]
    at = (min(size, CONVENTIONAL_END) - length) & ~0xF
    while at >= 0x500:                        # below: the vectors and data of a BIOS
        blocking = [place for place in obstacles if place.start < at + length and at < place.stop]
        if not blocking:
            return at
        at = (min(place.start for place in blocking) - length) & ~0xF
    at = _aligned(max([HOLE.stop, *(place.stop for place in taken)]), mmap.PAGESIZE)
    if at + length > size:
        raise BootError("memory", f"nothing is free for the {length} bytes that the kernel is told (command line, "
                                  f"modules, memory map): give the VM at least {-(-(at + length) >> 20)}M")
    return at


def _load(memory: mmap.mmap, fd: int, offset: int, length: int, address: int) -> None:
    done = 0
    while done < length:
        data = os.pread(fd, min(_CHUNK, length - done), offset + done)
        if not data:
            raise BootError("image", "the file became shorter while it was loaded")
        memory[address + done:address + done + len(data)] = data
        done += len(data)


def _aligned(value: int, to: int) -> int:
    return -(-value // to) * to
