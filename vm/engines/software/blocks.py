"""Blocks at full speed: SLOW_BLOCKS of quirks.py.

Theory.  QEMU tests at the start of a block, with a load and a branch, whether it is to stop.  Unicorn calls a function
there (`helper_check_exit_request`) and once more after every access to memory, and the engine's own block hook is
another call.  And a block that ends with anything but a plain jump (LOOP, JECXZ, MOV to a segment register, one that
grew too long) goes back to the main loop instead of to the block that follows.  Three changes make it as it is in QEMU:

after accesses    the library leaves its call out where a byte behind the handle says so (made for ARM's IT blocks)
at the start      the first time that a block runs, the hook writes a test of its own before the block's body, and makes
                  the block begin there (blocks.asm):
                      cmp qword [rbp-16], 0; jne slow
                  rbp is the CPU state; before it lie the library's own "leave" word (`icount_decr`, 4 bytes) and 12
                  bytes of padding, into which the engine puts its three: stop, interrupt wanted, segment loaded
                  (`ASKED`; the last 8 stay zero for checks.asm). None of them set, the hook and the function behind
                  it are not even passed over; else the block starts where the library made it start, and all is done
                  as ever
at the end        the generator of such ends (`do_gen_eob_worker`) always takes the way of an indirect jump, which looks
                  the next block up and stays in translated code; LOOP and JCXZ end with two plain jumps (`gen_jmp_tb`),
                  as Jcc does, which are linked to the blocks that follow

Invariants.  Written is only over bytes that are exactly those expected: of a block in the hook, each time, of the
library once a process.  Where they are others, nothing is done, and blocks are slow and right.  A block is written by
the thread that runs it, and what is written over has already run.  Whatever makes the library itself leave sets
its word, so nobody's stop is passed over.

Poor: x86-64, the wheels of one version, whose TranslationBlock blocks.asm knows.  A block at linear address 0 is slow:
its arguments are loaded otherwise.
"""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Callable
from typing import Final

from .stores import assembled, write_code

__all__ = ["ASKED", "Blocks"]

ASKED: Final = -12                       # where the engine's bytes are, from the CPU state
_LEAVE: Final = -16                      # icount_decr
# mov r8, [rdi + cpu]; mov eax, [r8 + leave]; test eax, eax; jns out; test esi, esi; je ...; out: ret
_CHECK: Final = (bytes.fromhex("4C8B87"), bytes.fromhex("418B80"), bytes.fromhex("85C0 7904 85F6 740A C3"))
# mov rsi, [rdi + uc]; cmp byte [rsi + quiet], 0; je on; ret
_QUIET: Final = (bytes.fromhex("488BB7"), bytes.fromhex("80BE"), bytes.fromhex("00 7408 C3"))
# test r13b, r13b; jne; mov eax, [rbx + tf]; test eax, eax; jne; test r14b, r14b; je exit; mov rdi, rbp; call ...
_END: Final = bytes.fromhex("4584ED 7523 8B8394000000 85C0 0F85B5000000 4584F6 0F849C000000 4889EF E8")
_END_JUMP: Final = 22                    # je exit, 6 bytes
_END_SEARCHED: Final = 0x40000           # bytes before gen_intermediate_code
_NO_OPERATION: Final = bytes.fromhex("660F1F440000")
# push r15; push r14; mov r14d, edx; push r13; push r12; mov r12, rsi; push rbp; cmp byte [rdi + dirty], 0
_JUMP: Final = bytes.fromhex("4157 4156 4189D6 4155 4154 4989F4 55 807F7C00")
_END_TO_JUMP: Final = 0x188              # from _END to gen_jmp_tb
# LOOP: set the instruction pointer to the next instruction; br l2; l1: set it to the target; l2: end of block
_LOOP: Final = re.compile(rb"\xE8(.{4})".join(re.escape(bytes.fromhex(part)) for part in (
    "4C89F6 4C89FF", "4C89EA 4889DF BE03000000 664183450201", "41800C2401 4C89E2 4889DF BE01000000", "4889EE 4C89FF",
    "41804D0001 4C89EA 4889DF BE01000000", "31C9 31D2 31F6 4C89FF", "E9")), re.DOTALL)       # calls between them


class Blocks:
    """`symbol` gives an exported function's address. One a process."""

    def __init__(self, symbol: Callable[[str], int], handle_to_cpu: int, cpu_to_env: int) -> None:
        self._check = symbol("helper_check_exit_request_x86_64")
        self._quiet = self._offset_of_quiet(symbol("check_exit_request_x86_64"))
        known = (_CHECK[0] + struct.pack("<I", handle_to_cpu) + _CHECK[1] + struct.pack("<I", cpu_to_env + _LEAVE)
                 + _CHECK[2])
        self.fast = (self._quiet is not None and ctypes.string_at(self._check, len(known)) == known
                     and self._stay_at_ends(symbol("gen_intermediate_code_x86_64")))

    def take(self, handle: int, env: int) -> bool:
        """Whether a new instance's blocks can be fast: they are from now on, with `prologue` before the block hook."""
        if not self.fast or ctypes.string_at(env + ASKED, -ASKED) != bytes(-ASKED):
            return False
        assert self._quiet is not None
        ctypes.c_ubyte.from_address(handle + self._quiet).value = 1
        return True

    def prologue(self, handle: int) -> bytes:
        """What the block hook begins with: make the block that called it test for itself from its next run on."""
        return assembled("blocks")[:-16] + struct.pack("<2Q", self._check, handle)

    @staticmethod
    def _offset_of_quiet(place: int) -> int | None:
        code = ctypes.string_at(place, 17)
        if (code[:3], code[7:9], code[13:17]) != _QUIET:
            return None
        return struct.unpack_from("<I", code, 9)[0]

    @staticmethod
    def _stay_at_ends(generator: int) -> bool:
        before = generator - _END_SEARCHED
        code = ctypes.string_at(before, _END_SEARCHED)
        ends, loops = [found.start() for found in re.finditer(re.escape(_END), code)], list(_LOOP.finditer(code))
        if len(ends) != 1 or len(loops) != 1 or not code.startswith(_JUMP, ends[0] + _END_TO_JUMP):
            return False
        jump, loop = ends[0] + _END_TO_JUMP, loops[0]

        def call(at: int, to: int) -> bytes:
            return b"\xE8" + struct.pack("<i", to - at - 5)

        op = loop.end(3) + struct.unpack("<i", loop[3])[0]                        # tcg_gen_op1
        # r15: the block in translation, whose cc_op, cc_op_dirty and flags the second jump must find as the first did.
        new = bytes.fromhex("41FF7774 41FF777C 41FFB7A8000000 50 4C89F6 4C89FF 31D2")
        new += call(loop.start() + len(new), jump)                                # gen_jmp_tb(s, next, 0)
        new += bytes.fromhex("58 418F87A8000000 418F477C 418F4774  41800C2401 4C89E2 4889DF BE01000000")
        new += call(loop.start() + len(new), op)                                  # l1:
        new += bytes.fromhex("4889EE 4C89FF BA01000000")
        new += call(loop.start() + len(new), jump)                                # gen_jmp_tb(s, target, 1)
        new += b"\xEB" + bytes([loop.end() - 1 - loop.start() - len(new) - 2])
        return (write_code(before + loop.start(), new)
                and write_code(before + ends[0] + _END_JUMP, _NO_OPERATION))
