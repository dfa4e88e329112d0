"""Stores at full speed: SLOW_STORES of quirks.py.

Theory.  QEMU notices self-modifying code by a flag in the entries of its TLB: a store to a page that holds
translated code goes the slow way (NOTDIRTY), any other is a few host instructions.  Unicorn sets the flag for *every*
page and never takes it away: each store costs 40 ns instead of 2, and a program that writes memory runs at a twentieth
of QEMU's speed.  The library's own functions for the right way are all there, only their callers are not.  So two
places of it are patched in memory, once a process:

tlb_set_page_with_attrs   sets the flag only where the page may hold code: a byte a page, `marks`, says so
tlb_protect_code          is called whenever a page gets its first translated block, and does nothing: now it marks the
                          page and sets the flag in every entry for it (`tlb_reset_dirty`)

A page that has held code stays marked: stores there are as slow as before, and never wrong.

Invariants.  A page without a mark holds no translated code of any instance over that memory: marks belong to the
memory, by its host address, and outlive instances.  Memory that is not the newest instance's, and ROMs, count as
marked.
Code is patched only where its bytes are exactly those expected; otherwise nothing is done and stores stay slow.
A page is never writable and executable at once, and nothing runs in it meanwhile: a process of ours has one thread
when its first instance is made.

Poor: x86-64, the wheels of one version.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.resources
import mmap
import struct
from collections.abc import Callable
from typing import Final

from .. import kick

__all__ = ["Stores", "assembled", "write_code"]

_PAGE: Final = mmap.PAGESIZE
_READ, _WRITE, _EXECUTE = 1, 2, 4
# or r9, NOTDIRTY; cmp byte [section + readonly], 0; je on; with what stands around them checked by `_place`.
_SET_FLAG: Final = bytes.fromhex("4981C900040000 807E3000 0F84")
_SET_FLAG_BYTES: Final = 17                              # with the target of je
_SEARCHED: Final = 2080                                  # bytes of tlb_set_page_with_attrs
# mov rdi, rsi; mov edx, 1; mov esi, 0x1000; jmp ...
_PROTECT: Final = bytes.fromhex("4889F7 BA01000000 BE00100000 E9")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Stores:
    """`symbol` gives an exported function's address. One a process; `memory_of` before an instance runs."""

    def __init__(self, symbol: Callable[[str], int], handle_to_cpu: int) -> None:
        self._data = mmap.mmap(-1, _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._words = (ctypes.c_uint64 * 3).from_buffer(self._data)              # base, size, marks
        self._marks: dict[tuple[int, int], mmap.mmap] = {}
        self._pages: list[mmap.mmap] = []
        self.fast = self._patch(symbol, handle_to_cpu)

    def memory_of(self, base: int, size: int) -> None:
        """The memory of a new instance, at this host address."""
        marks = self._marks.get((base, size))
        if marks is None:
            # What lay there before may be another size's, whose pages are marked elsewhere: none is taken for clean.
            overlapping = any(start < base + size and base < start + length for start, length in self._marks)
            marks = self._marks[base, size] = mmap.mmap(-1, max(_PAGE, size // _PAGE))
            if overlapping:
                marks[:] = b"\1" * len(marks)
        self._words[0], self._words[1], self._words[2] = base, size, _address(marks)

    def _patch(self, symbol: Callable[[str], int], handle_to_cpu: int) -> bool:
        flag, protect = symbol("tlb_set_page_with_attrs_x86_64"), symbol("tlb_protect_code_x86_64")
        place = ctypes.string_at(flag, _SEARCHED).find(_SET_FLAG)
        if place < 0 or ctypes.string_at(protect, len(_PROTECT)) != _PROTECT:
            return False
        at = flag + place
        target = at + _SET_FLAG_BYTES + struct.unpack("<i", ctypes.string_at(at + len(_SET_FLAG), 4))[0]
        data = struct.pack("<Q", ctypes.addressof(self._words))
        decide = self._make(
            bytes.fromhex("807E3000 752F")                       # cmp byte [rsi+0x30], 0; jne read_only
            + b"\x48\xB8" + data                                 # mov rax, data
            + bytes.fromhex("488B4C2420 482B08 483B4808 730E"    # rcx = host page - base; not below size: slow
                            "48C1E90C 488B4010"                  # shr rcx, 12; rax = marks
                            "803C0800 740D"                      # cmp byte [rax+rcx], 0; je on
                            "4981C900040000 EB04"                # slow: or r9, NOTDIRTY; jmp on
                            "4983C940")                          # read_only: or r9, DISCARD_WRITE
            + b"\x48\xB8" + struct.pack("<Q", target) + bytes.fromhex("FFE0"))                # on: jmp target
        mark = self._make(
            bytes.fromhex("53 4889FB 4889F2 31F6")               # push rbx; rbx = uc; rdx = address; block: none
            + b"\x48\xB8" + struct.pack("<Q", symbol("qemu_map_ram_ptr_x86_64")) + bytes.fromhex("FFD0 4889C6")
            + b"\x48\xB9" + data                                 # rcx = data; rax = rsi = host page
            + bytes.fromhex("4889C2 482B11 483B5108 730C"        # rdx = host page - base; not below size: skip
                            "48C1EA0C 488B4910 C6041101")        # marks[rdx >> 12] = 1
            + b"\x48\x8B\xBB" + struct.pack("<i", handle_to_cpu)  # skip: rdi = uc's cpu
            + bytes.fromhex("BA00100000 4881E600F0FFFF")         # edx = 0x1000; rsi: its page
            + b"\x48\xB8" + struct.pack("<Q", symbol("tlb_reset_dirty_x86_64")) + bytes.fromhex("5B FFE0"))
        return self._jump(at, decide, _SET_FLAG_BYTES) and self._jump(protect, mark, len(_PROTECT))

    def _make(self, code: bytes) -> int:
        page, address = kick.executable(code)
        self._pages.append(page)
        return address

    @staticmethod
    def _jump(at: int, to: int, room: int) -> bool:
        """Overwrite *room* bytes of code with a jump: mov rax, to; jmp rax; int3 ..."""
        return write_code(at, (b"\x48\xB8" + struct.pack("<Q", to) + b"\xFF\xE0").ljust(room, b"\xCC"))


def write_code(at: int, code: bytes, *, executable: bool = True) -> bool:
    """Overwrite code (or constants) of the library that does not run now. False where the host forbids it."""
    first = at & -_PAGE
    length = (at + len(code) + _PAGE - 1 & -_PAGE) - first
    if _libc.mprotect(first, length, _READ | _WRITE) != 0:
        return False
    ctypes.memmove(at, code, len(code))
    return _libc.mprotect(first, length, _READ | (_EXECUTE if executable else 0)) == 0


def _address(page: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(page))


@functools.cache
def assembled(name: str) -> bytes:
    """Machine code of ours, read once a process: behind its sandbox a worker reads no files."""
    return importlib.resources.files(__package__ or "").joinpath(f"{name}.bin").read_bytes()
