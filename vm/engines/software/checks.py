"""Checks at each access at full speed: UNBOUNDED of quirks.py.

Theory.  QEMU's translator adds a segment's base and looks at nothing else.  Translated code is made anew for each
state of the *hidden flags*, though, so what needs no check in a state need not be paid for in it.  Four flags that QEMU
does not use say how tight the segments are, and so choose the code:

NOT_FLAT         of SS, DS and ES one does not reach over all 4 GiB
NOT_LOW          one does not reach over its first 64 KiB, or is not plain data to read and write
CODE_NOT_FLAT    CS does not reach over all 4 GiB
CODE_NOT_LOW     it does not reach over its first 64 KiB, or cannot be read

The translator's own function for one instruction is preceded by ours (`translate`, machine code). It looks at the first
bytes: where there may be something to check in this state, Python (segments.py) says what, once for each translated
instruction, and a call of `check` with two constants for each access is put in front of the instruction. In flat
segments, as in long mode, that is LOCK, SSE's alignment, FS, GS and what loads a segment. `check` compares with the
segment's cache, and raises the fault as the library's own helpers do, which find the instruction and its flags by the
return address. After what loads a segment, the next block's hook has `classify` set the four flags; where they have
changed, the engine looks the block up anew.

Four places of the library are used, each only where its bytes are exactly those expected: the table of the translator's
functions, `helper_svm_check_intercept_param` (a helper that takes two words and keeps the registers: it tells ours by
bit 31), the loading of segment registers (`gen_movl_seg_T0`, which now always ends the block), and the block hook.
Where they are others nothing is checked.

The machine code is checks.asm, assembled as checks.bin; its constants are those of one version.
"""

from __future__ import annotations

import ctypes
import mmap
import re
import struct
from collections.abc import Callable, Sequence
from typing import Final

from .. import kick
from .operands import kinds
from .stores import assembled, write_code

__all__ = ["CODE_NOT_FLAT", "CODE_NOT_LOW", "NOT_FLAT", "NOT_LOW", "TIGHT", "Checks", "Word", "tightness"]

NOT_FLAT, NOT_LOW, CODE_NOT_FLAT, CODE_NOT_LOW = (1 << n for n in range(28, 32))
TIGHT: Final = NOT_FLAT | NOT_LOW | CODE_NOT_FLAT | CODE_NOT_LOW
_LAYOUT: Final = 35408, 176, 184, 424    # what checks.asm takes for CPU_TO_ENV, HIDDEN, SEGMENTS, CONTROL_0
_ENTRIES: Final = 12 * 8                 # behind the addresses in the header
# push rbx; mov rbx, rdi; call disas_insn; mov edx, [rbx + tf]; test edx, edx; jne; mov rdx, [rbx];
# test byte [rdx + 16], 8; je; mov dword [rbx + is_jmp], 1; mov [rbx + 16], rax; pop rbx; ret
_TRANSLATE: Final = re.compile(rb"\x53\x48\x89\xFB\xE8.{4}" + re.escape(bytes.fromhex(
    "8B9394000000 85D2 7509 488B13 F6421008 7414 C7431801000000 48894310 5B C3")), re.DOTALL)
_TRANSLATE_PLACE: Final = 4              # of eight pointers
# lea rdi, [rip + functions]; call translator_loop
_FUNCTIONS: Final = bytes.fromhex("4C89D1 488D3D")
_FUNCTIONS_AT: Final = 0x23              # in gen_intermediate_code
# The translator's call of the helper: where it finds the contexts.
_EMITS: Final = (bytes.fromhex("488B87F0010000 807F7C00 4C8BA800030000"), bytes.fromhex("498B95F0980000 488B35"))
# mov rcx, [rsp]; jmp cpu_svm_check_intercept_param
_HELPER: Final = bytes.fromhex("488B0C24 E9")
# cmp r13d, SS; je end; mov eax, [rbx + code32]; test eax, eax; je no; cmp r13d, DS; jg no;
# end: mov dword [rbx + is_jmp], 1
_LOADS: Final = bytes.fromhex("4183FD02 740D 8B4354 85C0 7488 4183FD03 7F82 C7431801000000")
_LOADS_JUMP: Final = 4
_SEARCHED: Final = 0x40000               # bytes before gen_intermediate_code

# A segment's flags.
_PRESENT, _CODE, _DOWN, _RW = 1 << 15, 1 << 11, 1 << 10, 1 << 9

_ASK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint32)
_READ, _ASKED = 512, 1024                # in the data: the bytes that were read, the checks
Word = tuple[int, int]                   # of a check: what `check` is called with


def tightness(segments: Sequence[tuple[int, int, int, int]]) -> int:
    """The four flags for (selector, base, limit, flags) of ES, CS, SS and DS. As `classify` in checks.asm."""
    found = 0
    for index, (_, _, limit, flags) in enumerate(segments):
        # Of CS: code that can be read, or data in virtual-8086 mode.
        looked_at = _PRESENT | _RW if index == 1 else _PRESENT | _CODE | _DOWN | _RW
        not_flat, not_low = (CODE_NOT_FLAT, CODE_NOT_LOW) if index == 1 else (NOT_FLAT, NOT_LOW)
        if flags & looked_at != _PRESENT | _RW or limit < 0xFFFF:
            found |= not_flat | not_low
        elif limit != 0xFFFF_FFFF:
            found |= not_flat
    return found


class Checks:
    """`symbol` gives an exported function's address; *layout*: of the CPU object, as in _LAYOUT. One a process."""

    def __init__(self, symbol: Callable[[str], int], layout: tuple[int, int, int, int]) -> None:
        self._instances: dict[int, Callable[[int, int, bytes], Sequence[Word]]] = {}
        self._data = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._data[:512] = kinds()
        data = ctypes.addressof(ctypes.c_char.from_buffer(self._data))
        self._ask = _ASK(self._asked)
        self.classify = 0
        self.on = layout == _LAYOUT and self._patch(symbol, data)

    def take(self, cpu: int, checks_of: Callable[[int, int, bytes], Sequence[Word]]) -> None:
        """Have *checks_of* asked for instructions of this CPU object: linear address, hidden flags, the first bytes.

        The bytes are what the library reads, by way of its TLB: with LOCK, all that tell whether it is invalid.
        """
        self._instances[cpu] = checks_of

    def drop(self, cpu: int) -> None:
        self._instances.pop(cpu, None)

    def _asked(self, cpu: int, linear: int, flags: int, length: int) -> int:
        checks_of = self._instances.get(cpu)
        if checks_of is None:
            return 0
        found = checks_of(linear, flags, self._data[_READ:_READ + length])
        for number, (word, more) in enumerate(found):
            struct.pack_into("<I4xQ", self._data, _ASKED + number * 16, word, more)
        return len(found)

    def _patch(self, symbol: Callable[[str], int], data: int) -> bool:
        generator = symbol("gen_intermediate_code_x86_64")
        helper = symbol("helper_svm_check_intercept_param_x86_64")
        start = generator - _SEARCHED
        code = ctypes.string_at(start, _SEARCHED + 64)
        at = _SEARCHED + _FUNCTIONS_AT
        if not code.startswith(_FUNCTIONS, at) or ctypes.string_at(helper, len(_HELPER)) != _HELPER:
            return False
        at += len(_FUNCTIONS)
        functions = start + at + 4 + struct.unpack_from("<i", code, at)[0]
        place = functions + 8 * _TRANSLATE_PLACE
        following, = struct.unpack("<Q", ctypes.string_at(place, 8))
        loads = [found.start() for found in re.finditer(re.escape(_LOADS), code)]
        if (not start <= following < generator or _TRANSLATE.match(code, following - start) is None
                or len(loads) != 1 or any(code.find(each) < 0 for each in _EMITS)):
            return False
        addresses = (
            ctypes.cast(self._ask, ctypes.c_void_p).value or 0, data + _ASKED, data, following,
            *(symbol(f"{name}_x86_64") for name in ("cpu_ldub_code", "tcg_const_i32", "tcg_const_i64", "tcg_gen_callN",
                                                   "tcg_temp_free_internal")),
            helper, symbol("cpu_svm_check_intercept_param_x86_64"), symbol("raise_exception_err_ra_x86_64"))
        code_bytes = assembled("checks")
        self._page, base = kick.executable(struct.pack("<12Q", *addresses) + code_bytes[_ENTRIES:])
        translate, check, classify = (base + entry for entry in struct.unpack_from("<3H", code_bytes, _ENTRIES))
        self.classify = classify
        jump = b"\x48\xB8" + struct.pack("<Q", check) + b"\xFF\xE0"           # mov rax, check; jmp rax
        return (write_code(start + loads[0] + _LOADS_JUMP, b"\xEB") and write_code(helper, jump)
                and write_code(place, struct.pack("<Q", translate), executable=False))
