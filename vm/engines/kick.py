"""Kicks that cannot be lost: a signal handler in machine code that sets bytes to 1.

Theory.  A vCPU runs in the only thread of its process, inside one long C call (KVM_RUN or
`uc_emu_start`).  Python's own handlers run *after* such a call returns, so they cannot make it
return, and a flag that Python tests before the call leaves a window in which a signal is
lost.  Here the handler is a few bytes of x86-64 that store 1 to every registered address,
at the very moment of the signal, wherever the thread is:

- the software engine's stop byte, tested by its native block hook before every block;
- `kvm_run.immediate_exit`, which makes the next KVM_RUN return EINTR at once (and the signal
  itself interrupts the one that is running: the handler is installed without SA_RESTART).

Whoever sees the byte clears it.  The handler (rdi holds the signal's number, unused):

    48 B8 <imm64>     mov  rax, table        ; SLOTS addresses, unused ones point to a spare byte
    B9 <imm32>        mov  ecx, SLOTS
    48 8B 10          next: mov rdx, [rax]
    C6 02 01          mov  byte [rdx], 1
    48 83 C0 08       add  rax, 8
    FF C9             dec  ecx
    75 F2             jnz  next
    C3                ret                    ; to the kernel's sigreturn, which restores registers

Invariants.  The code page is never writable and executable at once.  A slot is changed by one
aligned 8-byte store, so the handler sees the old or the new address.  Only SIGUSR1, SIGALRM and
SIGPROF are taken; Python's handling of all other signals is untouched.  Handlers survive
fork (the pages are private copies) and are per process: `install` is for the worker, not for a
library's import.

Where it is poor: x86-64 Linux with glibc only; `SLOTS` bytes at most.
"""

from __future__ import annotations

import ctypes
import mmap
import signal
import struct
from typing import Final

from .base import EngineError

__all__ = ["SIGNALS", "SLOTS", "Byte", "executable", "install", "register", "unregister", "used"]

SLOTS: Final = 64
SIGNALS: Final = (signal.SIGUSR1, signal.SIGALRM, signal.SIGPROF)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_PROT_READ, _PROT_EXEC = 1, 4


class _SigAction(ctypes.Structure):
    """glibc's struct sigaction on x86-64: 152 bytes."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ulong * 16),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


_libc.sigaction.argtypes = [ctypes.c_int, ctypes.POINTER(_SigAction), ctypes.POINTER(_SigAction)]


def executable(code: bytes) -> tuple[mmap.mmap, int]:
    """Put machine code into a page of its own, read-only and executable. Keep the mapping."""
    page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    page[: len(code)] = code
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    if _libc.mprotect(address, mmap.PAGESIZE, _PROT_READ | _PROT_EXEC) != 0:
        raise EngineError(
            "this host forbids executable memory (mprotect PROT_EXEC failed, errno "
            f"{ctypes.get_errno()}): micro-VMs cannot be kicked here; allow it in the service's"
            " MemoryDenyWriteExecute= or SELinux policy"
        )
    return page, address


class _Table:
    """The handler and its slots. Made once a process, at the first registration."""

    def __init__(self) -> None:
        self.data = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self.data))
        self.spare = base + SLOTS * 8
        self.slots = (ctypes.c_uint64 * SLOTS).from_address(base)
        for index in range(SLOTS):
            self.slots[index] = self.spare
        self.code, self.handler = executable(
            b"\x48\xB8" + struct.pack("<Q", base) + b"\xB9" + struct.pack("<I", SLOTS)
            + bytes.fromhex("488B10 C60201 4883C008 FFC9 75F2 C3"))


_table: _Table | None = None


def _the_table() -> _Table:
    global _table
    if _table is None:
        _table = _Table()
    return _table


def register(address: int) -> None:
    """From now on a kick stores 1 to the byte at *address*, which must stay mapped."""
    table = _the_table()
    for index in range(SLOTS):
        if table.slots[index] == table.spare:
            table.slots[index] = address
            return
    raise EngineError(f"more than {SLOTS} kick bytes in one process: close vCPUs that are done")


def unregister(address: int) -> None:
    """Must come before the memory at *address* goes away. Unknown addresses are ignored."""
    table = _the_table()
    for index in range(SLOTS):
        if table.slots[index] == address:
            table.slots[index] = table.spare


def used() -> int:
    """Slots taken now: 0 when every vCPU of the process has been closed."""
    table = _the_table()
    return sum(address != table.spare for address in table.slots)


def install(signals: tuple[signal.Signals, ...] = SIGNALS) -> None:
    """Take these signals for kicks, in this process, for good. Idempotent."""
    action = _SigAction(handler=_the_table().handler, flags=0)
    for number in signals:
        if _libc.sigaction(number, ctypes.byref(action), None) != 0:
            raise EngineError(f"sigaction({number.name}) failed: errno {ctypes.get_errno()}")


class Byte:
    """One kick byte in memory of its own, for who polls it from Python."""

    def __init__(self) -> None:
        self._cell = ctypes.c_ubyte(0)
        register(ctypes.addressof(self._cell))

    def set(self) -> None:
        self._cell.value = 1

    def take(self) -> bool:
        """Whether it was set; clears it."""
        if not self._cell.value:
            return False
        self._cell.value = 0
        return True

    def close(self) -> None:
        unregister(ctypes.addressof(self._cell))
