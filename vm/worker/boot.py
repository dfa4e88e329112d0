"""What a VM starts from: its image put where it belongs, and the state in which its first vCPU begins.

| boot | in memory | the first vCPU |
|---|---|---|
| `disk` | the boot sector at 7C00h; the disks belong to the machine | as a BIOS enters a boot sector |
| `flat` | the image at `load` | at `entry`, in 16, 32 or 64 bits |
| `rom` | nothing but a copy of the ROM's end below 1 MiB; the ROM ends at 4 GiB | as a PC comes out of reset |
| `multiboot` | a kernel's segments, its modules and tables (multiboot.py) | as Multiboot says |

Theory.  Two steps, because the machine comes between them: `load` before it is made, which needs the disks and then
writes what a BIOS leaves in memory; `first_state` after that.  A VM that goes on from a file takes the first step only,
over a memory that nobody looks at afterwards: its disks and its ROM are not in the file.

Invariants.  Nothing that does not fit is cut: it is a `StartFailed` whose text says what to change.

Units: bytes; addresses are physical.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from .. import guests
from ..engines import entry
from ..engines.base import RAX, RDX, RFLAGS, RIP, RSP, CpuState
from . import multiboot
from .devices.disk import Disk
from .memory import GuestMemory
from .protocol import WorkerSpec

__all__ = ["BOOT_SECTOR", "Loaded", "StartFailed", "first_state", "load"]

BOOT_SECTOR: Final = 0x7C00
BIOS_MEMORY_BYTES: Final = 1 << 20
ROM_MAX_BYTES: Final = 256 << 10                  # what the engines have room for
ROM_COPY_BYTES: Final = 128 << 10                 # of a ROM's end, seen below 1 MiB too


class StartFailed(Exception):
    """The VM could not be built; the text says what to change."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code


@dataclass(frozen=True, slots=True)
class Loaded:
    """What of an image is not in memory."""

    disks: list[Disk]
    rom: mmap.mmap | None


def load(spec: WorkerSpec, memory: GuestMemory, image_fds: Sequence[int]) -> Loaded:
    """Put the image where it belongs. Raises StartFailed."""
    disks: list[Disk] = []
    if spec.boot == "disk":
        if memory.size < BIOS_MEMORY_BYTES:
            raise StartFailed("memory", f"a VM that boots from a disk needs at least 1 MiB of "
                                        f"memory, it has {memory.size} bytes")
        disks = _disks(spec, list(image_fds))
        boot_sector = disks[0].read(0, 1)
        if not isinstance(boot_sector, bytes):
            raise StartFailed("image", "the boot sector of the disk to boot from cannot be read")
        memory.poke(BOOT_SECTOR, boot_sector)
    elif spec.boot == "flat":
        _flat(spec, memory, image_fds)
    for address, value in spec.pokes:
        if memory.poke(address, value.to_bytes(8, "little")) != 8:
            raise StartFailed("memory", f"the poke at {address:#x} lies outside memory")
    return Loaded(disks, _rom(memory, image_fds[0]) if spec.boot == "rom" else None)


def first_state(spec: WorkerSpec, memory: mmap.mmap, image_fds: Sequence[int], disks: Sequence[Disk]) -> CpuState:
    """Of the first vCPU, and what it needs in memory. Raises StartFailed."""
    if spec.boot == "rom":
        return entry.reset_state()
    if spec.boot == "multiboot":
        return _kernel(spec, memory, image_fds)
    if spec.boot == "flat":
        return entry.flat_state(memory, spec.bits, spec.entry)
    state = CpuState()
    state.gpr[RIP] = state.gpr[RSP] = BOOT_SECTOR
    state.gpr[RDX] = disks[0].drive
    state.gpr[RAX] = 0xAA55
    state.gpr[RFLAGS] = 0x202                 # a BIOS enters with interrupts on
    return state


def _disks(spec: WorkerSpec, fds: list[int]) -> list[Disk]:
    if spec.builtin is not None:
        fds = [os.memfd_create("mixvisor-disk", os.MFD_CLOEXEC)]
        os.write(fds[0], _builtin(spec.builtin))
    disks: list[Disk] = []
    for one in spec.disks or [None]:
        name = one.name if one else None
        try:
            disks.append(Disk(fds.pop(0), name=name, writable=one is not None and one.writable == "yes",
                              overlay_fd=fds.pop(0) if one and one.writable == "overlay" else None))
        except (OSError, ValueError) as error:
            raise StartFailed("image", f"the disk {name or 'to boot from'} cannot be used: {error}") from error
    return disks


def _flat(spec: WorkerSpec, memory: GuestMemory, image_fds: Sequence[int]) -> None:
    if spec.builtin is not None:
        image = _builtin(spec.builtin)
    else:
        size = os.fstat(image_fds[0]).st_size
        if spec.load + size > memory.size:
            raise StartFailed("memory", f"the image of {size} bytes does not fit into memory at {spec.load:#x}")
        image = os.pread(image_fds[0], size, 0)
    if memory.poke(spec.load, image) != len(image) or not image:
        raise StartFailed("memory", f"the image of {len(image)} bytes does not fit into memory at {spec.load:#x}")


def _rom(memory: GuestMemory, fd: int) -> mmap.mmap:
    """The ROM that ends at 4 GiB; its end is copied to below 1 MiB."""
    if memory.size < BIOS_MEMORY_BYTES:
        raise StartFailed("memory", f"a VM with a ROM needs at least 1 MiB of memory, it has {memory.size} bytes")
    size = os.fstat(fd).st_size
    if not 0 < size <= ROM_MAX_BYTES or size % mmap.PAGESIZE:
        raise StartFailed("image", f"the ROM has {size} bytes: it must be whole pages of {mmap.PAGESIZE} bytes, at"
                                   f" most {ROM_MAX_BYTES}")
    rom = mmap.mmap(-1, size)
    rom[:] = os.pread(fd, size, 0).ljust(size, b"\xFF")
    low = rom[-min(size, ROM_COPY_BYTES):]
    memory.poke(BIOS_MEMORY_BYTES - len(low), low)
    return rom


def _kernel(spec: WorkerSpec, memory: mmap.mmap, image_fds: Sequence[int]) -> CpuState:
    image, *files = image_fds
    modules = [multiboot.Module(fd, text) for fd, text in zip(files, spec.modules, strict=True)]
    try:
        state = multiboot.boot(memory, image, spec.command_line, modules)
    except multiboot.BootError as error:
        raise StartFailed(error.kind, str(error)) from error
    for fd in image_fds:
        os.close(fd)
    return state


def _builtin(name: str) -> bytes:
    if name not in guests.BUILTIN:
        raise StartFailed("image", f"there is no built-in guest {name!r}: there are"
                                   f" {', '.join(guests.BUILTIN)}")
    return guests.image(name)
