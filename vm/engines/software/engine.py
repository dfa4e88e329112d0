"""The `software` engine: one vCPU translated by Unicorn.

Theory.  `uc_emu_start` runs translated code until a native hook stops it: the block hook (a kick
or a stop), the interrupt hooks (a vector to deliver, done in `delivery.py`), or the port hook
when the bus asked to stop.  With none of these a normal return means HLT.  Everything
physical beyond memory is one region whose reads and writes go to the bus, up to 2^52.

External interrupts.  While the bus asks for one, the block hook also stops where the guest can take it: at
the start of a block with IF set.  That is as soon as a processor would: STI, POPF and IRET end a block.  A HLT with
an interrupt at hand goes on at once.

Invariants.  A vector noted by a hook is delivered before anything else is looked at, so
every return of `run` is at an instruction boundary.  A port instruction that is left early
is completed here: for OUT the instruction pointer moves on, for IN also the value is stored.
Every defect of Unicorn that shows is named in `quirks.py`.

Poor: one vCPU; a stop asked for in a memory-mapped access or a string
port instruction (INS, OUTS) comes at the end of the block, some instructions late, and the
instruction pointer seen by the bus in a memory-mapped access may be that of the block.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from typing import Any, Final

from unicorn import unicorn_const, x86_const

from ...code import decode
from .. import cpuid, kick
from ..base import Bus, CpuState, EngineError, Event, Exit, ExitKind, ExitReason, Watch, WholeState, nobody
from ..paging import paging_mode, read_linear
from ..tsc import read_tsc
from .checks import Word
from .delivery import Cause, Delivery, Refused, TripleFault
from .privileged import MSRS_PRESENT, Privileged
from .quirks import PREFIXES, SEGMENT_SIZE, Native, Unicorn
from .segments import CS64, refusals, words
from .state import Registers

__all__ = ["SoftwareCpu", "create"]

LENGTH_MAX: Final = 15                 # of an instruction
PHYSICAL_END: Final = 1 << 52
FOUR_GIB: Final = 1 << 32
_WITH_ERROR_CODE: Final = frozenset((8, 10, 11, 12, 13, 14, 17))
_DEBUG, _INVALID_OPCODE, _PROTECTION = 1, 6, 13
_INTERRUPT_FLAG: Final = 0x200
_FETCH_ERRORS: Final = frozenset((
    unicorn_const.UC_ERR_FETCH_UNMAPPED, unicorn_const.UC_ERR_FETCH_PROT))

_OUT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint32,
                        ctypes.c_void_p)
_IN = ctypes.CFUNCTYPE(ctypes.c_uint32, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int,
                       ctypes.c_void_p)
_CPUID = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
_READ = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint,
                         ctypes.c_void_p)
_WRITE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint, ctypes.c_uint64,
                          ctypes.c_void_p)


def create(memory: mmap.mmap, bus: Bus, exits: memoryview, rom: mmap.mmap | None = None, *,
           checked: bool = True) -> SoftwareCpu:
    """A vCPU over *memory*. Raises EngineError when Unicorn is not the version it must be.

    *checked*: limits and types of segments are checked at each access (checks.py).
    """
    return SoftwareCpu(memory, bus, exits, rom, checked=checked)


def _address(callback: Any) -> int:
    address = ctypes.cast(callback, ctypes.c_void_p).value
    assert address is not None
    return address


class SoftwareCpu:
    stops_at = "block"

    def __init__(self, memory: mmap.mmap, bus: Bus, exits: memoryview, rom: mmap.mmap | None = None, *,
                 checked: bool = True) -> None:
        if len(memory) % mmap.PAGESIZE:
            raise EngineError(
                f"memory of {len(memory)} bytes: the software engine takes whole pages")
        self._memory, self._rom = memory, rom          # the mappings must live as long as we do
        self._bus = bus
        self._exits = exits
        self.watch: Watch = nobody
        self._closed = False
        self._stopping = False
        self._event: Event | None = None       # to be delivered before anything else: told by another engine
        self._halted = False                   # HLT ran in the block in which a stop was asked for
        self._inside = False                   # in a bus call: RIP is not ours to change
        self._pending_in: tuple[int, int] | None = None     # (size, value) of an IN left early
        self._error: BaseException | None = None             # raised by the bus, kept for `run`
        self._unicorn = unicorn = Unicorn(memory)
        self._native = native = Native(unicorn)
        self._registers = Registers(unicorn, tight=checked)
        self._checked = checked
        self.where = self._locating()
        self._delivery = Delivery(
            memory, self._registers, unicorn.flags, unicorn.set_flags, unicorn.words)
        self._privileged = Privileged(unicorn, self._registers, self._code_here, lambda linear: read_linear(
            memory, paging_mode(self.get_state()), linear, 2))
        self._refused: Refused | None = None   # by a hook, due at its instruction
        self._length = 0                         # of the port instruction that is left
        out, read_in = _OUT(self._port_out), _IN(self._port_in)
        guarded_out, guarded_in = _OUT(self._guarded_out), _IN(self._guarded_in)
        told = _CPUID(self._cpuid)
        for callback in (out, read_in, guarded_out, guarded_in, told):
            unicorn.keep(callback)
        unicorn.hook(unicorn_const.UC_HOOK_BLOCK, native.block())
        unicorn.hook(unicorn_const.UC_HOOK_INTR, native.interrupt())
        unicorn.hook(unicorn_const.UC_HOOK_INSN_INVALID, native.note(_INVALID_OPCODE))
        for instruction, vector in ((x86_const.UC_X86_INS_SYSCALL, native.SYSCALL),
                                    (x86_const.UC_X86_INS_SYSENTER, native.SYSENTER)):
            unicorn.hook(unicorn_const.UC_HOOK_INSN, native.note(vector), instruction=instruction)
        for instruction, callback, guarded in ((x86_const.UC_X86_INS_OUT, out, guarded_out),
                                               (x86_const.UC_X86_INS_IN, read_in, guarded_in)):
            hook = native.port(_address(callback), _address(guarded), unicorn.hflags, unicorn.cpu)
            unicorn.hook(unicorn_const.UC_HOOK_INSN, hook, instruction=instruction)
        unicorn.hook(unicorn_const.UC_HOOK_INSN, _address(told), instruction=x86_const.UC_X86_INS_CPUID)   # OWN_CPUID
        if unicorn.blocks is not None:                         # UNBOUNDED, which wants SLOW_BLOCKS' hook; DEADLY_LOCK
            unicorn.checks.take(unicorn.cpu, self._checks)
        unicorn.intercept(MSRS_PRESENT)                                    # UNCHECKED
        self._map_holes(rom)
        self._kick_addresses = (native.asked_address + native.STOP, native.address + native.KICKED)
        for address in self._kick_addresses:
            kick.register(address)
        self.set_whole(WholeState(tsc=read_tsc()))

    def _map_holes(self, rom: mmap.mmap | None) -> None:
        """All that is neither memory nor ROM goes to the bus."""
        unicorn, first = self._unicorn, len(self._memory)
        if rom is not None:
            start = FOUR_GIB - len(rom)
            if len(rom) % mmap.PAGESIZE or first > start:
                raise EngineError(f"a ROM of {len(rom)} bytes beside memory of {first} bytes: it is whole pages, and"
                                  " memory ends below it")
            unicorn.map_rom(start, rom)
            unicorn.map_hole(first, start, self._reader(first), self._writer(first))
            first = FOUR_GIB
        unicorn.map_hole(first, PHYSICAL_END, self._reader(first), self._writer(first))

    # -- running -----------------------------------------------------------------------------

    def run(self) -> Exit:
        native, unicorn = self._native, self._unicorn
        page, asked = native.page, native.asked
        if self._event is not None:
            event, self._event = self._event, None
            cause = Cause.EXTERNAL if event.kind == "interrupt" else Cause.EXCEPTION
            ended = self._through_gate(event.vector, event.error, cause)
            if ended is not None:
                return ended
        elif self._halted:
            ended = self._halt()
            if ended is not None:
                return ended
        while True:
            if asked[native.WANTED] and self._registers.interruptible():
                ended = self._interrupt()
                if ended is not None:
                    return ended
            status = unicorn.start()
            stopped = page[native.STOPPED]
            page[native.STOPPED] = 0
            if self._error is not None:
                error, self._error = self._error, None
                page[native.LEAVE] = 0
                native.vector.value = native.NONE
                raise error
            if page[native.LEAVE]:
                page[native.LEAVE] = 0
                if self._refused is None:
                    self._complete_port_instruction()
                    return self._left()
                asked[native.STOP] = 0                # was for us; a kick that came meanwhile is kept, as in _left
                if self._stopping or page[native.KICKED]:
                    asked[native.STOP] = 1
                refused, self._refused = self._refused, None
                ended = self._raise(refused.vector, refused.error)
                if ended is not None:
                    return ended
                continue
            vector = native.vector.value
            if vector != native.NONE:
                native.vector.value = native.NONE
                ended = self._deliver(vector)
                if ended is not None:
                    return ended
                if asked[native.STOP]:
                    # A handler that cannot be fetched faults again before any block starts.
                    return self._left()
            elif status != unicorn_const.UC_ERR_OK:
                return self._failed(status)
            elif stopped:
                if asked[native.STOP]:
                    return self._left()
            elif self._stopping:
                self._halted = True
                return self._left()
            else:
                ended = self._halt()
                if ended is not None:
                    return ended

    def _halt(self) -> Exit | None:
        """HLT is done. None when an interrupt is there already: the guest goes on with it."""
        self._halted = False
        if self._native.asked[Native.WANTED] and self._registers.interruptible():
            return None
        self._exits[ExitKind.HALT] += 1
        self.watch(ExitKind.HALT, behind=True)
        return Exit(ExitReason.HALTED,
                    interrupts_on=bool(self._unicorn.flags() & _INTERRUPT_FLAG))

    def _left(self) -> Exit:
        """STOPPED or KICKED; the order of the stores makes no kick get lost (see kvm/engine.py)."""
        native, page, asked = self._native, self._native.page, self._native.asked
        asked[native.STOP] = 0
        if self._stopping:
            self._stopping = False
            if page[native.KICKED]:
                asked[native.STOP] = 1
            return Exit(ExitReason.STOPPED)
        page[native.KICKED] = 0
        self._exits[ExitKind.KICK] += 1
        return Exit(ExitReason.KICKED)

    def _interrupt(self) -> Exit | None:
        """Take the external interrupt; the guest stands between two instructions."""
        self._exits[ExitKind.INTERRUPT] += 1
        return self._through_gate(self._bus.acknowledge(), None, Cause.EXTERNAL)

    def _deliver(self, vector: int) -> Exit | None:
        """What a native hook has noted: an interrupt, a system call, an intercepted instruction."""
        if vector == Native.TASK_RETURN:                                # MIXED_TASKS
            code = self._code_here()
            following = self._unicorn.words[16] + self._behind_prefixes(code) + 1
            return self._delivered(lambda: self._delivery.return_from_task(following))
        if Native.INTERCEPTED <= vector < Native.SYSCALL:
            self._exits[ExitKind.OTHER] += 1
            self.watch(ExitKind.OTHER)
            due = self._privileged.carry_out(vector)
            return None if due is None else self._raise(due, 0 if due == _PROTECTION else None)
        if vector == _INVALID_OPCODE and (length := self._length_of_int1()):
            self._unicorn.words[16] += length                             # NO_INT1
            return self._raise(_DEBUG, None, behind=True)
        self._exits[ExitKind.INTERRUPT] += 1
        instruction = vector != _INVALID_OPCODE and self._unicorn.was_instruction()
        self.watch(ExitKind.INTERRUPT, behind=instruction or vector >= Native.SYSCALL)
        error = None
        if vector in _WITH_ERROR_CODE and not instruction:
            error = self._unicorn.error_code()
        return self._through_gate(vector, error, Cause.INSTRUCTION if instruction else Cause.EXCEPTION)

    def _raise(self, vector: int, error: int | None, *, behind: bool = False) -> Exit | None:
        """An exception that Unicorn did not see."""
        self._exits[ExitKind.INTERRUPT] += 1
        self.watch(ExitKind.INTERRUPT, behind=behind)
        return self._through_gate(vector, error, Cause.EXCEPTION)

    def _length_of_int1(self) -> int:
        """Of the INT1 at RIP; 0 where there is none."""
        code = self._code_here()
        at = self._behind_prefixes(code)
        return at + 1 if code[at:at + 1] == b"\xF1" else 0

    def _through_gate(self, vector: int, error: int | None, cause: Cause) -> Exit | None:
        return self._delivered(lambda: self._delivery.deliver(vector, error, cause))

    def _delivered(self, what: Callable[[], None]) -> Exit | None:
        try:
            what()
        except TripleFault:
            self._exits[ExitKind.SHUTDOWN] += 1
            return Exit(ExitReason.TRIPLE_FAULT,
                        "the guest faulted while its fault handlers failed")
        return None

    def _failed(self, status: int) -> Exit:
        self._exits[ExitKind.OTHER] += 1
        self.watch(ExitKind.OTHER)
        state = self.get_state()
        where = decode.describe(self._memory, state)
        if status in _FETCH_ERRORS:
            return Exit(ExitReason.GUEST_ERROR,
                        f"the guest left its memory at {decode.place(state)}: no code is there")
        return Exit(ExitReason.GUEST_ERROR,
                    f"the guest could not go on at `{where}` in {decode.mode_name(state)}:"
                    f" {self._unicorn.error_text(status)}")

    def stop(self) -> None:
        self._stopping = True
        self._native.asked[Native.STOP] = 1

    def request_interrupt(self, wanted: bool) -> None:
        self._native.asked[Native.WANTED] = wanted

    def kick(self) -> None:
        self._native.page[Native.KICKED] = 1
        self._native.asked[Native.STOP] = 1

    @property
    def sleeps(self) -> bool:
        return False                             # a halt ends `run`

    # -- what the guest reaches out for --------------------------------------------------------

    def _port_out(self, _uc: int, port: int, size: int, value: int, _user: int) -> None:
        self._exits[ExitKind.IO_OUT] += 1
        self.watch(ExitKind.IO_OUT)
        self._inside = True
        try:
            self._bus.port_out(port, size, value & ((1 << size * 8) - 1))
        except BaseException as error:  # a callback from C must not raise: kept for run()
            self._keep_error(error)
        self._inside = False
        if self._stopping:
            self._leave_if_plain()

    def _guarded_out(self, uc: int, port: int, size: int, value: int, user: int) -> None:
        """PORTS_FREE: outside of ring 0."""
        if self._allowed(port, size):
            self._port_out(uc, port, size, value, user)

    def _guarded_in(self, uc: int, port: int, size: int, user: int) -> int:
        return self._port_in(uc, port, size, user) if self._allowed(port, size) else 0

    def _allowed(self, port: int, size: int) -> bool:
        try:
            if not self._registers.may_use_ports():
                self._delivery.check_port(port, size)
            return True
        except Refused as fault:
            self._refused = fault
            # The instruction begins anew when it is left, and is stopped there.
            self._native.page[Native.LEAVE] = self._native.asked[Native.STOP] = 1
        except BaseException as error:  # as above
            self._keep_error(error)
        return False

    def _checks(self, linear: int, flags: int, first: bytes) -> list[Word]:
        """What is to be checked in front of an instruction that is being translated."""
        try:
            code = first + self._code_at(linear)[len(first):]
            if not self._checked:
                return refusals(code, flags)
            return words(code, flags,
                         linear if flags & CS64 else linear - self._registers.base("cs") & 0xFFFF_FFFF)
        except BaseException as error:  # as above
            self._keep_error(error)
            return []

    def _port_in(self, _uc: int, port: int, size: int, _user: int) -> int:
        self._exits[ExitKind.IO_IN] += 1
        self.watch(ExitKind.IO_IN)
        self._inside = True
        value = 0
        try:
            value = self._bus.port_in(port, size) & ((1 << size * 8) - 1)
        except BaseException as error:  # as above
            self._keep_error(error)
        self._inside = False
        if self._stopping and self._leave_if_plain():
            self._pending_in = (size, value)
        return value

    def _reader(self, first: int) -> Any:
        """For a hole that starts at *first*: Unicorn tells the offset in it."""
        def read(_uc: int, offset: int, size: int, _user: int) -> int:
            self._exits[ExitKind.MMIO_READ] += 1
            self.watch(ExitKind.MMIO_READ)
            try:
                return self._bus.mmio_read(first + offset, size) & ((1 << size * 8) - 1)
            except BaseException as error:  # as above
                self._keep_error(error)
                return 0
        return _READ(read)

    def _writer(self, first: int) -> Any:
        def write(_uc: int, offset: int, size: int, value: int, _user: int) -> None:
            self._exits[ExitKind.MMIO_WRITE] += 1
            self.watch(ExitKind.MMIO_WRITE)
            try:
                self._bus.mmio_write(first + offset, size, value & ((1 << size * 8) - 1))
            except BaseException as error:  # as above
                self._keep_error(error)
        return _WRITE(write)

    def _cpuid(self, _uc: int, _user: int) -> int:
        words = self._unicorn.words
        # In the order of struct CPUX86State: RAX, RCX, RDX, RBX.
        words[0], words[3], words[1], words[2] = cpuid.answer(words[0] & 0xFFFF_FFFF)
        return 1

    def _keep_error(self, error: BaseException) -> None:
        self._error = self._error or error
        self.stop()

    def _code_here(self) -> bytes:
        state = self._registers
        base = 0 if state.in_64_bit_code() else state.base("cs")
        return self._code_at(base + self._unicorn.words[16])

    def _code_at(self, linear: int) -> bytes:
        state = self._registers
        if state.control(0) >> 31:
            return read_linear(self._memory, paging_mode(state.get_state()), linear, LENGTH_MAX)
        code = self._memory[linear:linear + LENGTH_MAX]
        if not code and self._rom is not None and (at := linear - FOUR_GIB + len(self._rom)) >= 0:
            return self._rom[at:at + LENGTH_MAX]
        return code

    def _plain_length(self) -> int | None:
        """Length of the IN or OUT at RIP, None when it is a string instruction."""
        code = self._code_here()
        at = self._behind_prefixes(code)
        if at < len(code):
            if code[at] in (0xE4, 0xE5, 0xE6, 0xE7):
                return at + 2
            if code[at] in (0xEC, 0xED, 0xEE, 0xEF):
                return at + 1
        return None

    def _behind_prefixes(self, code: bytes) -> int:
        at, wide = 0, self._registers.in_64_bit_code()
        while at < len(code) and (code[at] in PREFIXES or (wide and code[at] & 0xF0 == 0x40)):
            at += 1
        return at

    def _leave_if_plain(self) -> bool:
        length = self._plain_length()
        if length is None:
            return False
        self._length = length              # now: a device may have written over the instruction
        self._native.page[Native.LEAVE] = 1
        return True

    def _complete_port_instruction(self) -> None:
        words = self._unicorn.words
        words[16] += self._length
        if self._pending_in is not None:
            size, value = self._pending_in
            self._pending_in = None
            # As on a processor: a 32-bit result clears the upper half in 64-bit mode.
            mask = 0xFFFF_FFFF_FFFF_FFFF if size == 4 else (1 << size * 8) - 1
            words[0] = (words[0] & ~mask) | value

    # -- state -------------------------------------------------------------------------------

    def _locating(self) -> Callable[[], int]:
        """`where`, as a closure over views of two words: it is called at every exit that is watched."""
        unicorn = self._unicorn
        state = unicorn.bytes.cast("Q")
        base = (unicorn.layout.segments + SEGMENT_SIZE + 8) // 8          # in the second segment cache, CS
        pointer = unicorn.layout.eip // 8
        return lambda: state[base] + state[pointer]

    def get_gpr(self) -> list[int]:
        return self._registers.general()

    def set_gpr(self, values: list[int]) -> None:
        self._registers.set_general(values, with_ip=not self._inside)

    def segment_base(self, name: str) -> int:
        return self._registers.base(name)

    def get_state(self) -> CpuState:
        return self._registers.get_state()

    def set_state(self, state: CpuState) -> None:
        self._halted, self._event = False, None
        self._registers.set_state(state)

    def get_whole(self) -> WholeState:
        whole = self._registers.get_whole()
        whole.halted, whole.event = self._halted, self._event
        return whole

    def set_whole(self, whole: WholeState) -> None:
        self._registers.set_whole(whole)
        self._halted, self._event = whole.halted, whole.event

    def memory_changed(self, address: int, length: int) -> None:
        if length > 0:
            self._unicorn.forget(address, min(length, len(self._memory) - address))

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for address in self._kick_addresses:
            kick.unregister(address)
        self._native.close()
        self._unicorn.checks.drop(self._unicorn.cpu)
        self._unicorn.close()
