"""Unicorn 2.1.4 made exact: the library, its defects, and the work-around of each.

Theory.  Unicorn is QEMU's x86 translator as a library.  As a processor it has gaps, so this
module reaches past its API in three ways, each checked at start on a scratch instance
(`Unicorn.__init__` refuses with an `EngineError` when a check fails, so an
unknown version stops here and not in a guest):

1. `struct CPUX86State` is read and written in place.  Unicorn's handle holds a pointer to the
   CPU; it is found by planting random general registers and looking for them (`_find_cpu`).
   Offsets of segments, tables, control registers, EFER, MSRs and of the error code and the
   exception in flight are found the same way: plant by the API, look where it went.
2. Hooks are machine code, not Python: `uc_hook_add` takes a plain pointer.
3. `cpu_loop_exit_x86_64`, exported by the library, leaves translated code from inside a hook.

The defects, and what is done (the tests in tests/vm/engines/test_quirks.py show each):

INEXACT_STOP   `uc_emu_stop` from outside leaves a stale RIP at a memory write that ends a block, so
               that a resumed guest writes twice. A native hook stops at the starts of blocks.
LOST_STOP      `uc_emu_stop` before `uc_emu_start` is forgotten. The hook tests a byte that stays.
LATE_STOP      A stop asked for in a port hook comes at the end of the block. The port hook is
               native, calls Python, and leaves by `cpu_loop_exit` when asked to; the engine
               completes the instruction.
NO_IDT         Unicorn never delivers an interrupt: a native hook notes the vector and stops;
               `delivery.py` builds the frame.
STICKY_FAULT   `old_exception` is never cleared, so that the second page fault becomes a double
               fault and later faults come without a hook. It is set to -1 before every start.
STICKY_INT     Nor is `exception_is_int`: an intercepted instruction after an INT n would be taken for one, and the
               instruction pointer set behind that INT. It is set to 0 there, too.
UNTIL_PROBE    The address `until` is translated by the guest's MMU and overwrites CR2. Exit
               addresses are switched on with none given, so that nothing is probed.
RING_LOCK      `uc_reg_write` cannot lower the CPL and may crash on SS with an unmapped GDT.
               Segment caches and hidden flags are written in place.
HALF_REGISTERS In 16 and 32-bit mode the upper halves of registers read 0. The instance is always
               opened in 64-bit mode and put into real mode in place.
STALE_CODE     Host writes over code that already ran are not seen: `forget`.
BUSY_TSS       The cache of TR holds the type *available*, and a call through a gate to an inner ring aborts the
               process on any other, or where TR is not present. `state.py` writes it so and tells it as busy.
UNCHECKED      MOV to CR0 and CR4, LMSW, CLTS, RDMSR and WRMSR are not checked. SVM's intercepts make them exits, and
               `privileged.py` checks them and carries them out.
PORTS_FREE     IN, OUT, INS and OUTS ask neither IOPL nor the TSS's bitmap. The native port hook tells ring 0 from the
               others, for which the engine asks.
NO_INT1        INT1 (F1) is an invalid opcode: told from others by its byte.
NO_RF          RF is not set in the flags that a fault saves, and pages that frames and tables lie in are not marked
               accessed and dirty: `delivery.py` does both.
HUGE_BUFFER    Translated code is kept until 1 GiB of it has been made: a guest that writes new code all the time makes
               its worker as large. The buffer is given 64 MiB; when it is full, all is forgotten and made anew.
SLOW_STORES    Every store goes the way of stores over code, twenty times as slow: `stores.py` patches the library so
               that only stores to pages with code do.
SLOW_BLOCKS    Every block calls two functions before it does anything, every access to memory one behind it, and many
               a block goes back to the main loop at its end: `blocks.py` puts a comparison in the place of the
               calls and lets blocks follow one another.
NO_SYSCALL     SYSCALL and SYSENTER only call a hook: the hook stops, `delivery.py` does the rest.
OWN_CPUID      CPUID tells of QEMU's processor: a hook answers with that of vm/engines/cpuid.py.
FULL_STACK     A new instance has every x87 register in use (QEMU does not look, another engine does), and ST(n) cannot
               be written: the engine begins with FNINIT's state and writes the FPU's fields in place, the control
               words by the API (which also sets the rounding that follows from them).

MIXED_TASKS    A change of task saves the state in the form of the new task's TSS, so that between tasks of 16 and of 32
               bits it is written to the wrong places. IRET to another task is told by a check (`UNBOUNDED`) and done
               by `tasks.py`, as are interrupts; jumps and calls between such tasks are not repaired.
DEADLY_LOCK    LOCK before BTS, BTR or BTC of a register aborts the process. `checks.py` keeps the library from seeing
               an instruction that takes no LOCK, and raises #UD.
UNBOUNDED      The limits and types of segments are checked when they are loaded and in far jumps, not at each access;
               LOCK before an instruction that takes none of the common ones (MOV, for instance) is ignored, POP has
               eight codes for one, and alignment (SSE's, and AC) is not checked. `checks.py` has translated code check
               it all.

Not repaired (the guest sees a difference from a PC): data breakpoints and DR7's general detection never happen; an x87
error without CR0.NE is not told as IRQ 13; the A20 line is always on, as it is on the kvm engine.

Invariant: one instance belongs to one thread; a second thread on it aborts the process.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import mmap
import os
import random
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

from unicorn import unicorn_const, x86_const
from unicorn.unicorn_py3 import unicorn as binding

from .. import kick
from ..base import EngineError
from .blocks import ASKED, Blocks
from .checks import Checks
from .stores import Stores

__all__ = ["Layout", "Native", "Unicorn", "found_layout", "installed_version", "listed"]

VERSION: Final = "2.1.4"
_lib = binding.uclib

# General registers in the order of struct CPUX86State.
ENV_ORDER: Final = (
    "RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI",
    "R8", "R9", "R10", "R11", "R12", "R13", "R14", "R15",
)
SEGMENT_SIZE: Final = 24        # struct SegmentCache: u32 selector, u64 base, u32 limit, u32 flags
_MSRS: Final = {
    "efer": 0xC000_0080, "star": 0xC000_0081, "lstar": 0xC000_0082, "fmask": 0xC000_0084,
    "sysenter_cs": 0x174, "sysenter_esp": 0x175, "sysenter_eip": 0x176, "cstar": 0xC000_0083,
    "kernel_gs_base": 0xC000_0102, "pat": 0x277,
}
XMM_SIZE: Final = 64
CODE_BUFFER_BYTES: Final = 64 << 20
PREFIXES: Final = frozenset((0x66, 0x67, 0xF0, 0xF2, 0xF3, 0x2E, 0x36, 0x3E, 0x26, 0x64, 0x65))
_VMCB: Final = 1 << 52                     # guest-physical, beyond every page table's reach
_VMCB_MSR_MAP: Final = 0x48
_MSR_RANGES: Final = (0, 0xC000_0000, 0xC001_0000)
_INTERCEPT_MSR, _INTERCEPT_CR0_CR4 = 1 << 28, 1 << 0 | 1 << 4
_HIDDEN_GUEST: Final = 1 << 21
_DR7_RESET: Final = 0x400
_ENV_SIZE: Final = 0x1600
CPU_TO_ENV: Final = 35408              # in 2.1.4, for x86-64; checked on every instance


@dataclass(frozen=True, slots=True)
class Layout:
    """Offsets inside struct CPUX86State, in bytes, found at run time."""

    eip: int
    hflags: int
    segments: int              # es cs ss ds fs gs ldt tr gdt idt
    control: int               # cr0 .. cr4
    error_code: int
    exception_is_int: int
    old_exception: int
    msrs: dict[str, int]
    handle_to_cpu: int         # of the pointer to the CPU, in the struct behind the handle
    fpregs: int                # 8 physical registers of 16 bytes; before them stack top, status, control, tags
    mxcsr: int
    xmm: int                   # registers of 64 bytes
    debug: int                 # DR0 to DR7
    tsc_offset: int


def listed() -> list[tuple[str, str]]:
    """The defects named above and what is done: (name, text) in order."""
    found: list[tuple[str, str]] = []
    for line in (__doc__ or "").split("The defects, and")[1].split("Not repaired")[0].splitlines()[1:]:
        name, _, rest = line.partition(" ")
        if name.isupper() and name.replace("_", "").isalnum():
            found.append((name, rest.strip()))
        elif line.startswith(" ") and found:
            found[-1] = found[-1][0], f"{found[-1][1]} {line.strip()}"
    return found


@functools.cache
def _stores(handle_to_cpu: int) -> Stores:
    return Stores(_symbol, handle_to_cpu)


@functools.cache
def _blocks(handle_to_cpu: int) -> Blocks:
    return Blocks(_symbol, handle_to_cpu, CPU_TO_ENV)


@functools.cache
def _checks(layout: tuple[int, int, int, int]) -> Checks:
    return Checks(_symbol, layout)


@functools.cache
def installed_version() -> str:
    # Once: a worker behind its sandbox, where it may want this engine, reads no files.
    return importlib.metadata.version("unicorn")


def _refuse(what: str) -> EngineError:
    return EngineError(
        f"the installed Unicorn ({installed_version()}) cannot be used: {what}. The software engine"
        f" is made for {VERSION}: pip install 'unicorn=={VERSION}'")


def _symbol(name: str) -> int:
    try:
        address = ctypes.cast(getattr(_lib, name), ctypes.c_void_p).value
    except AttributeError as error:
        raise _refuse(f"its library has no {name}") from error
    assert address is not None
    return address


def _check(status: int, what: str) -> None:
    if status != unicorn_const.UC_ERR_OK:
        text = _lib.uc_strerror(status).decode()
        raise EngineError(f"Unicorn failed to {what}: {text}")


class Native:
    """Hooks in machine code and the bytes they share with the engine.

    `asked`: byte 0 stop wanted (set by kicks), byte 1 an interrupt wants in, byte 2 a segment was loaded: what every
    block tests.
    The page: byte 2 leave at this port access, byte 3 a kick; u32 at 4 the vector that was raised, or NONE; byte 8 a
    block hook has stopped.
    """

    NONE: Final = 0xFFFF_FFFF
    INTERCEPTED, CR0, CR4, MSR = 0x100, 0x110, 0x114, 0x17C      # SVM's exit codes from 0x100 on: UNCHECKED
    STOP, WANTED = 0, 1
    LEAVE, KICKED, VECTOR, STOPPED = 2, 3, 4, 8
    TASK_RETURN = 0x1F0                        # an IRET with NT: MIXED_TASKS, by checks.asm
    SYSCALL, SYSENTER = 0x200, 0x201           # vectors that no processor has

    def __init__(self, unicorn: Unicorn) -> None:
        self._unicorn = unicorn
        self.page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.page))
        # Beside the CPU state where blocks test them themselves; else anywhere.
        self.asked_address = unicorn.env + ASKED if unicorn.blocks is not None else self.address + 16
        self.asked = (ctypes.c_ubyte * 2).from_address(self.asked_address)
        self.vector = ctypes.c_uint32.from_address(self.address + self.VECTOR)
        self.vector.value = self.NONE
        self._pages: list[mmap.mmap] = []
        self._stop = _symbol("uc_emu_stop")

    def close(self) -> None:
        """The CPU state goes: a kick that comes too late finds other bytes."""
        self.asked = (ctypes.c_ubyte * 2)()

    def _make(self, code: bytes) -> int:
        page, address = kick.executable(code)
        self._pages.append(page)
        return address

    def _data(self) -> bytes:
        return b"\x48\xB8" + struct.pack("<Q", self.address)          # mov rax, page

    def block(self) -> int:
        """void (uc, address, size, user): stop here when byte 0 is set, or byte 1 and the guest allows it.

        The arguments are not looked at.
        IF is bit 1 of the second byte of EFLAGS, "the instruction after STI or MOV SS" bit 3 of the hidden flags.
        """
        unicorn = self._unicorn
        stop = (
            self._data()                                              # stop: rax = page
            + bytes.fromhex("C6400801")                               # mov byte [rax+8], 1
            + b"\x48\xBF" + struct.pack("<Q", unicorn.handle.value)   # mov rdi, handle
            + b"\x48\xB8" + struct.pack("<Q", self._stop)             # mov rax, uc_emu_stop
            + bytes.fromhex("FFE0"))                                  # jmp rax
        wanted = (
            b"\x48\xB9" + struct.pack("<Q", unicorn.eflags)           # mov rcx, eflags
            + bytes.fromhex("F6410102"                                # test byte [rcx+1], 2
                            "740F")                                   # jz  out
            + b"\x48\xB9" + struct.pack("<Q", unicorn.hflags)         # mov rcx, hflags
            + bytes.fromhex("F60108"                                  # test byte [rcx], 8
                            "7401"                                    # jz  stop
                            "C3"))                                    # out: ret
        asked = b"\x48\xB8" + struct.pack("<Q", self.asked_address)   # mov rax, asked
        loaded = (
            b"\x48\xBF" + struct.pack("<Q", unicorn.env)              # mov rdi, env
            + b"\x48\xB8" + struct.pack("<Q", unicorn.checks.classify)
            + bytes.fromhex("FFD0"                                    # call rax
                            "85C0"                                    # test eax, eax: other blocks than this one
                            "75") + bytes([len(asked) + 7 + 5 + len(wanted)])     # jne stop
            + asked
            + bytes.fromhex("66833800"                                # cmp word [rax], 0
                            "7501"                                    # jne some
                            "C3"))
        return self._make(
            (unicorn.blocks.prologue(unicorn.handle.value) if unicorn.blocks is not None else b"")
            + asked
            + bytes.fromhex("83380074")                               # cmp dword [rax], 0; je ret
            + bytes([4 + 2 + len(loaded) - 1])
            + bytes.fromhex("80780200"                                # cmp byte [rax+2], 0
                            "74") + bytes([len(loaded)])              # je  some
            + loaded
            + bytes.fromhex("803800"                                  # some: cmp byte [rax], 0
                            "75") + bytes([len(wanted)])              # jne stop
            + wanted + stop)

    def interrupt(self) -> int:
        """void (uc, intno, user): note the vector and stop."""
        return self._make(
            self._data()
            + bytes.fromhex("897004")                                 # mov [rax+4], esi
            + b"\x48\xB8" + struct.pack("<Q", self._stop)
            + bytes.fromhex("FFE0"))

    def note(self, vector: int) -> int:
        """bool (uc, user): note a fixed vector, stop, answer "handled"."""
        return self._make(
            self._data()
            + bytes.fromhex("C74004") + struct.pack("<I", vector)     # mov dword [rax+4], vector
            + bytes.fromhex("4883EC08")                               # sub rsp, 8
            + b"\x48\xB8" + struct.pack("<Q", self._stop)
            + bytes.fromhex("FFD0"                                    # call rax
                            "B801000000"                              # mov eax, 1
                            "4883C408"                                # add rsp, 8
                            "C3"))                                    # ret

    def port(self, python: int, guarded: int, hidden: int, cpu: int) -> int:
        """A port hook: call *python*, or *guarded* outside of ring 0; when byte 2 is then set, leave the code.

        *hidden*: address of the hidden flags, whose lowest bits are the ring (0 in real mode, 3 in virtual-8086 mode).

        `cpu_loop_exit` longjmps over the library's own frames only: Python has returned by then.
        RIP is that of the port instruction, which has had no effect on the registers yet.
        """
        return self._make(
            bytes.fromhex("4883EC08")                                 # sub rsp, 8
            + b"\x48\xB8" + struct.pack("<Q", hidden)                 # mov rax, hidden
            + bytes.fromhex("F60003")                                 # test byte [rax], 3
            + b"\x48\xB8" + struct.pack("<Q", python)                 # mov rax, python
            + bytes.fromhex("740A")                                   # jz  call
            + b"\x48\xB8" + struct.pack("<Q", guarded)                # mov rax, guarded
            + bytes.fromhex("FFD0")                                   # call: call rax
            + b"\x48\xB9" + struct.pack("<Q", self.address)           # mov rcx, page
            + bytes.fromhex("80790200"                                # cmp byte [rcx+2], 0
                            "7505"                                    # jne leave
                            "4883C408"                                # add rsp, 8
                            "C3")                                     # ret
            + b"\x48\xBF" + struct.pack("<Q", cpu)                    # leave: mov rdi, cpu
            + b"\x48\xB8" + struct.pack("<Q", _symbol("cpu_loop_exit_x86_64"))
            + bytes.fromhex("FFD0"))                                  # call rax: does not return


class Unicorn:
    """One Unicorn instance over *memory*, with its CPU state open in place."""

    def __init__(self, memory: mmap.mmap) -> None:
        found = installed_version()
        if found != VERSION:
            raise _refuse(f"its version is {found}")
        self.uc = binding.Uc(unicorn_const.UC_ARCH_X86, unicorn_const.UC_MODE_64)
        self.handle: Any = self.uc._uch
        self.uc.ctl_set_tcg_buffer_size(CODE_BUFFER_BYTES)            # HUGE_BUFFER
        base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        _check(_lib.uc_mem_map_ptr(self.handle, 0, len(memory), unicorn_const.UC_PROT_ALL,
                                   ctypes.c_void_p(base)), "map guest memory")
        self.uc.ctl_exits_enabled(True)                               # UNTIL_PROBE
        layout = found_layout()
        self.cpu, self.env = _known_cpu(self.uc, layout.handle_to_cpu)
        self.words = (ctypes.c_uint64 * 18).from_address(self.env)    # 16 general, RIP, EFLAGS
        self.bytes = memoryview((ctypes.c_ubyte * _ENV_SIZE).from_address(self.env)).cast("B")
        self.layout = layout
        _stores(layout.handle_to_cpu).memory_of(base, len(memory))    # SLOW_STORES
        blocks = _blocks(layout.handle_to_cpu)
        self.blocks = blocks if blocks.take(self.handle.value, self.env) else None     # SLOW_BLOCKS
        self.checks = _checks((CPU_TO_ENV, layout.hflags, layout.segments, layout.control))      # UNBOUNDED
        self._keep: list[Any] = []
        self._flags = ctypes.c_uint64()
        self._flags_reference = ctypes.byref(self._flags)
        self.eflags, self.hflags = self.env + 17 * 8, self.env + self.layout.hflags
        self.hidden = ctypes.c_uint32.from_address(self.hflags)
        self._is_int = ctypes.c_int32.from_address(self.env + self.layout.exception_is_int)
        self._old_exception = ctypes.c_int32.from_address(self.env + self.layout.old_exception)

    def hook(self, kind: int, pointer: int, *, instruction: int | None = None) -> None:
        handle = ctypes.c_size_t()
        extra = () if instruction is None else (ctypes.c_int(instruction),)
        status = _lib.uc_hook_add(
            self.handle, ctypes.byref(handle), kind, ctypes.c_void_p(pointer), None,
            ctypes.c_uint64(1), ctypes.c_uint64(0), *extra)
        _check(status, "add a hook")

    def map_rom(self, start: int, rom: mmap.mmap) -> None:
        base = ctypes.addressof(ctypes.c_char.from_buffer(rom))
        _check(_lib.uc_mem_map_ptr(self.handle, start, len(rom), unicorn_const.UC_PROT_ALL,
                                   ctypes.c_void_p(base)), "map the ROM")

    def map_hole(self, start: int, end: int, read: Any, write: Any) -> None:
        """All that is not memory; *read* and *write* are given the offset from *start*."""
        self._keep += [read, write]
        _check(_lib.uc_mmio_map(self.handle, start, end - start, read, None, write, None),
               "map the unmapped")

    def keep(self, thing: Any) -> None:
        """Callbacks live as long as the instance."""
        self._keep.append(thing)

    def start(self) -> int:
        """Run from the current state; a UC_ERR_ number. 0 also for a stop and for HLT."""
        self._old_exception.value = -1                                # STICKY_FAULT
        self._is_int.value = 0                                        # STICKY_INT
        return _lib.uc_emu_start(self.handle, self.words[16], 0, 0, 0)

    def intercept(self, msrs: Iterable[int]) -> None:
        """UNCHECKED: have the unchecked instructions come out as vectors INTERCEPTED + SVM's exit codes.

        *msrs*: what may be read and written without. The map of the others lies beyond what a guest can address.
        """
        page = mmap.mmap(-1, 4 * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        struct.pack_into("<Q", page, _VMCB_MSR_MAP, _VMCB + mmap.PAGESIZE)
        page[mmap.PAGESIZE:] = b"\xFF" * (3 * mmap.PAGESIZE)
        for number in msrs:
            first = next((part for part, start in enumerate(_MSR_RANGES) if start <= number < start + 0x2000), None)
            if first is None:
                continue                                              # always intercepted
            bit = (number - _MSR_RANGES[first]) * 2                    # two bits: read, write
            at = mmap.PAGESIZE + first * 0x800 + bit // 8
            page[at] &= ~((1 if number == _MSRS["efer"] else 3) << bit % 8) & 0xFF
        self._keep.append(page)
        base = ctypes.addressof(ctypes.c_char.from_buffer(page))
        _check(_lib.uc_mem_map_ptr(self.handle, _VMCB, len(page), unicorn_const.UC_PROT_READ, ctypes.c_void_p(base)),
               "map the intercepts")
        set_intercepts(self.bytes, self.layout.old_exception, self.hidden)

    def set_cr0(self, value: int) -> None:
        _lib.cpu_x86_update_cr0_x86_64(ctypes.c_void_p(self.env), ctypes.c_uint32(value))

    def set_cr4(self, value: int) -> None:
        _lib.cpu_x86_update_cr4_x86_64(ctypes.c_void_p(self.env), ctypes.c_uint32(value))

    def write_msr(self, number: int, value: int) -> None:
        self.hidden.value &= ~_HIDDEN_GUEST        # or it would be intercepted itself, where there is nothing to leave
        uc: Any = self.uc
        uc.msr_write(number, value)
        self.hidden.value |= _HIDDEN_GUEST

    def error_text(self, status: int) -> str:
        return _lib.uc_strerror(status).decode()

    def flags(self) -> int:
        """RFLAGS, with the lazily computed arithmetic flags."""
        _lib.uc_reg_read(self.handle, x86_const.UC_X86_REG_RFLAGS, self._flags_reference)
        return self._flags.value | 2

    def set_flags(self, value: int) -> None:
        self._flags.value = value | 2
        _lib.uc_reg_write(self.handle, x86_const.UC_X86_REG_RFLAGS, self._flags_reference)

    def set_control_words(self, x87: int, mxcsr: int) -> None:
        """By the API: the rounding follows from them."""
        for register, value in ((x86_const.UC_X86_REG_FPCW, x87), (x86_const.UC_X86_REG_MXCSR, mxcsr)):
            self._flags.value = value
            _lib.uc_reg_write(self.handle, register, self._flags_reference)

    def error_code(self) -> int:
        return struct.unpack_from("<I", self.bytes, self.layout.error_code)[0]

    def was_instruction(self) -> bool:
        """Whether the vector just noted came from INT n, INT3 or INTO."""
        return struct.unpack_from("<i", self.bytes, self.layout.exception_is_int)[0] != 0

    def flush_translations(self) -> None:
        """Forget cached linear-to-physical translations: paging has changed under the guest."""
        self.uc.ctl(unicorn_const.UC_CTL_TLB_FLUSH, unicorn_const.UC_CTL_IO_WRITE)

    def forget(self, address: int, length: int) -> None:
        """STALE_CODE: drop translated code of these guest-physical bytes."""
        self.uc.ctl_remove_cache(address, address + length)

    def close(self) -> None:
        self.bytes.release()
        del self.uc                     # the binding closes the instance with its last reference


def set_intercepts(env: memoryview, old_exception: int, hidden: ctypes.c_uint32) -> None:
    """Behind `old_exception`: u64 vm_vmcb, tsc_offset, intercept; u16 of CR reads, CR writes, DR reads, DR writes."""
    struct.pack_into("<Q", env, old_exception + 8, _VMCB)
    struct.pack_into("<QHH", env, old_exception + 24, _INTERCEPT_MSR, 0, _INTERCEPT_CR0_CR4)
    hidden.value |= _HIDDEN_GUEST


def _read_self(fd: int, address: int, length: int) -> bytes:
    """This process's memory, without the risk of a SIGSEGV: an unmapped address gives b""."""
    try:
        return os.pread(fd, length, address)
    except OSError:
        return b""                      # not mapped: simply not the place we look for


def _known_cpu(uc: Any, at: int) -> tuple[int, int]:
    """As `_find_cpu`, where the pointer's place is known: needs no file, so it works behind a sandbox, too."""
    handle = uc._uch.value
    cpu = ctypes.c_uint64.from_address(handle + at).value
    env = cpu + CPU_TO_ENV
    planted = _plant_registers(uc)
    if ctypes.string_at(env, len(planted)) != planted:
        raise _refuse("the CPU state is not where that of another instance was")
    _clear_registers(uc)
    return cpu, env


def _plant_registers(uc: Any) -> bytes:
    seed = random.SystemRandom()
    planted = [seed.getrandbits(64) for _ in ENV_ORDER]
    for name, value in zip(ENV_ORDER, planted, strict=True):
        uc.reg_write(getattr(x86_const, f"UC_X86_REG_{name}"), value)
    return struct.pack("<16Q", *planted)


def _clear_registers(uc: Any) -> None:
    for name in ENV_ORDER:
        uc.reg_write(getattr(x86_const, f"UC_X86_REG_{name}"), 0)


def _find_cpu(uc: Any) -> tuple[int, int, int]:
    """Addresses of the CPU object and of its CPUX86State, and where behind the handle the pointer to the CPU is.

    The handle points to a struct that holds a pointer to the CPU; the CPU holds a pointer back
    to the handle, a pointer to its state, and, at a distance fixed in this version, the state
    itself, which starts with the registers.
    """
    pattern = _plant_registers(uc)
    handle = uc._uch.value
    fd = os.open("/proc/self/mem", os.O_RDONLY)
    place = 0
    try:
        for index, (cpu,) in enumerate(struct.iter_unpack("<Q", _read_self(fd, handle, 4096))):
            env = cpu + CPU_TO_ENV
            if cpu < 4096 or env >> 47 or cpu & 7 or _read_self(fd, env, 128) != pattern:
                continue
            body = _read_self(fd, cpu, CPU_TO_ENV)
            words = struct.unpack(f"<{len(body) // 8}Q", body)
            if handle in words and env in words:
                place = index * 8
                break
        else:
            raise _refuse("the CPU state was not found behind its handle")
    finally:
        os.close(fd)
    _clear_registers(uc)
    return cpu, env, place


_found_layout: Layout | None = None


def found_layout() -> Layout:
    """The layout, found once a process on a scratch instance."""
    global _found_layout
    if _found_layout is None:
        _found_layout = _find_layout()
    return _found_layout


def _find_layout() -> Layout:
    uc: Any = binding.Uc(unicorn_const.UC_ARCH_X86, unicorn_const.UC_MODE_64)
    uc.mem_map(0, 0x10000)
    _, env, handle_to_cpu = _find_cpu(uc)

    def snapshot() -> bytes:
        return ctypes.string_at(env, _ENV_SIZE)

    def plant(what: str, width: str, value: int, write: Any) -> int:
        before = snapshot()
        write()
        after = snapshot()
        size = struct.calcsize(width)
        places = [
            at for at in range(0, _ENV_SIZE - size, 4)
            if after[at:at + size] == struct.pack(width, value)
            and before[at:at + size] != after[at:at + size]]
        if len(places) != 1:
            raise _refuse(f"{what} was found at {len(places)} places in the CPU state")
        return places[0]

    reg = x86_const
    mark = 0x5A5A_1234_5000
    eip = plant("RIP", "<Q", mark, lambda: uc.reg_write(reg.UC_X86_REG_RIP, mark))
    fs = plant("FS", "<Q", mark + 1, lambda: uc.reg_write(reg.UC_X86_REG_FS_BASE, mark + 1))
    gs = plant("GS", "<Q", mark + 2, lambda: uc.reg_write(reg.UC_X86_REG_GS_BASE, mark + 2))
    tables = [
        plant(name, "<Q", mark + 3 + n,
              lambda n=n, number=number: uc.reg_write(number, (0, mark + 3 + n, 0x7F, 0)))
        for n, (name, number) in enumerate((
            ("LDTR", reg.UC_X86_REG_LDTR), ("TR", reg.UC_X86_REG_TR),
            ("GDTR", reg.UC_X86_REG_GDTR), ("IDTR", reg.UC_X86_REG_IDTR)))]
    segments = fs - 4 * SEGMENT_SIZE - 8
    expected = [segments + 8 + SEGMENT_SIZE * n for n in range(4, 10)]
    if [fs, gs, *tables] != expected:
        raise _refuse("its segment registers lie elsewhere")
    cr2 = plant("CR2", "<Q", mark + 9, lambda: uc.reg_write(reg.UC_X86_REG_CR2, mark + 9))
    control = cr2 - 16
    cr0, = struct.unpack_from("<Q", snapshot(), control)
    if cr0 != uc.reg_read(reg.UC_X86_REG_CR0) or not cr0 & 1:
        raise _refuse("CR0 lies elsewhere")
    hflags = segments - 8
    if struct.unpack_from("<I", snapshot(), hflags)[0] & 0x80B0 != 0x80B0:
        raise _refuse("the hidden flags lie elsewhere")       # PE, CS32, SS32, CS64 of 64-bit mode
    msrs = {
        name: plant(name, "<Q", value,
                    lambda number=number, value=value: uc.msr_write(number, value))
        for name, number, value in (
            ("efer", _MSRS["efer"], 0xD01), ("star", _MSRS["star"], mark + 20),
            ("lstar", _MSRS["lstar"], mark + 21), ("fmask", _MSRS["fmask"], 0x47700),
            ("sysenter_esp", _MSRS["sysenter_esp"], mark + 22),
            ("sysenter_eip", _MSRS["sysenter_eip"], mark + 23), ("cstar", _MSRS["cstar"], mark + 24),
            ("kernel_gs_base", _MSRS["kernel_gs_base"], mark + 25), ("pat", _MSRS["pat"], 0x0504_0600_0107_0406))}
    msrs["sysenter_cs"] = plant("sysenter_cs", "<I", 0x5A50,
                                lambda: uc.msr_write(_MSRS["sysenter_cs"], 0x5A50))
    exception = _find_exception_fields()
    floating_point = _find_floating_point(uc, env, plant)
    _check_intercepts(uc, env, hflags, exception["old_exception"])
    return Layout(eip=eip, hflags=hflags, segments=segments, control=control, msrs=msrs, handle_to_cpu=handle_to_cpu,
                  **exception, **floating_point)


def _find_floating_point(uc: Any, env: int, plant: Callable[[str, str, int, Any], int]) -> dict[str, int]:
    """The registers of x87 and SSE, by the API; what lies around them is checked by a program (`_check_by_program`)."""
    reg = x86_const
    first, last = (plant(f"x87 register {n}", "<Q", 0xA5A5_0000_1111 + n,
                         lambda n=n: uc.reg_write(reg.UC_X86_REG_FP0 + n, (0xA5A5_0000_1111 + n, 0x4001)))
                   for n in (0, 7))
    xmm, xmm_last = (plant(f"SSE register {n}", "<Q", 0x5A5A_0000_2222 + n,
                           lambda n=n: uc.reg_write(reg.UC_X86_REG_XMM0 + n, 0x5A5A_0000_2222 + n))
                     for n in (0, 15))
    mxcsr = plant("MXCSR", "<I", 0x3F80, lambda: uc.reg_write(reg.UC_X86_REG_MXCSR, 0x3F80))
    if last - first != 7 * 16 or xmm_last - xmm != 15 * XMM_SIZE:
        raise _refuse("its x87 or SSE registers lie elsewhere")
    _check_by_program(uc, env, first)
    return {"fpregs": first, "xmm": xmm, "mxcsr": mxcsr}


def _find_exception_fields() -> dict[str, int]:
    """Where #GP(0x78) leaves its error code and its trace: load a selector beyond the GDT."""
    uc: Any = binding.Uc(unicorn_const.UC_ARCH_X86, unicorn_const.UC_MODE_64)
    uc.mem_map(0, 0x10000)
    uc.mem_write(0x1000, bytes.fromhex("66B87800 8EC0 F4"))    # mov ax, 0x78; mov es, ax; hlt
    _, env, _ = _find_cpu(uc)
    before = ctypes.string_at(env, _ENV_SIZE)
    uc.hook_add(unicorn_const.UC_HOOK_INTR, lambda uc, number, _: uc.emu_stop())
    uc.emu_start(0x1000, 0xF000)
    after = ctypes.string_at(env, _ENV_SIZE)

    def changed(value: int) -> list[int]:
        return [at for at in range(256, _ENV_SIZE - 4, 4)
                if before[at:at + 4] != after[at:at + 4] == struct.pack("<i", value)]

    errors, exceptions = changed(0x78), changed(13)
    if len(errors) != 1 or len(exceptions) != 1:
        raise _refuse("the error code and the exception in flight were not found")
    # int error_code, exception_is_int; u64 exception_next_eip, dr[8]; 4 pointers; int old_exception
    if exceptions[0] - errors[0] != 112:
        raise _refuse("the exception in flight lies elsewhere")
    # ... int old_exception; u64 vm_vmcb, tsc_offset. Checked by what RDTSC then reads.
    places = {"error_code": errors[0], "exception_is_int": errors[0] + 4, "debug": errors[0] + 16,
              "old_exception": exceptions[0], "tsc_offset": exceptions[0] + 16}
    if struct.unpack_from("<Q", after, places["debug"] + 56)[0] != _DR7_RESET:
        raise _refuse("the debug registers lie elsewhere")
    uc.mem_write(0x2000, bytes.fromhex("0F31 90"))              # rdtsc; nop
    far = 1 << 60
    ctypes.c_int64.from_address(env + places["tsc_offset"]).value = far
    uc.emu_start(0x2000, 0x2002)
    if not far <= uc.reg_read(x86_const.UC_X86_REG_RDX) << 32 < far + (far >> 1):
        raise _refuse("the offset of the time-stamp counter lies elsewhere")
    return places


def _check_intercepts(uc: Any, env: int, hflags: int, old_exception: int) -> None:
    """MOV CR4 must come out as SVM's exit where it stands."""
    seen: list[tuple[int, int]] = []

    def note(uc: Any, number: int, _user: Any) -> None:
        seen.append((number, uc.reg_read(x86_const.UC_X86_REG_RIP)))
        uc.emu_stop()

    hook = uc.hook_add(unicorn_const.UC_HOOK_INTR, note)
    uc.mem_write(0x4000, bytes.fromhex("90 0F22E0 90"))          # nop; mov cr4, rax; nop
    set_intercepts(memoryview((ctypes.c_ubyte * _ENV_SIZE).from_address(env)).cast("B"), old_exception,
                   ctypes.c_uint32.from_address(env + hflags))
    uc.emu_start(0x4000, 0x4005)
    uc.hook_del(hook)
    if seen != [(Native.CR4, 0x4001)]:
        raise _refuse("instructions cannot be intercepted")


def _check_by_program(uc: Any, env: int, fpregs: int) -> None:
    """FNINIT, FLD1 must move the stack's top and fill a tag where we take them to be."""
    uc.mem_write(0x3000, bytes.fromhex("DBE3 D9E8 90"))
    uc.emu_start(0x3000, 0x3004)
    top, status, control = struct.unpack_from("<IHH", ctypes.string_at(env + fpregs - 20, 8))
    tags = ctypes.string_at(env + fpregs - 12, 8)
    one, = struct.unpack_from("<Q", ctypes.string_at(env + fpregs + 7 * 16, 8))
    if (top, status & 0x3800, control, one) != (7, 0, 0x37F, 1 << 63) or tags != b"\1" * 7 + b"\0":
        raise _refuse("the x87 registers are not kept as expected")
