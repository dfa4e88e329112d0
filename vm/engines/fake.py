"""A `Cpu` without an engine: a small real-mode interpreter for tests of the machine around it.

Theory.  Tests of devices, BIOS and process loop need a guest that does port I/O, interrupts and
HLT, deterministically, without /dev/kvm or Unicorn.  A few dozen opcodes of the 8086 are enough, with
those that the BIOS' own handlers are made of (vm/worker/bios/handlers.asm).  The contract suite that
runs over the real engines runs over this one too, so that what a test sees here is what the engines do.

Invariants.  Deterministic: the same memory, state and bus give the same run.  An opcode that is not
known raises #UD through the guest's vector table, as on a processor.  Kicks use the same native
handler as the engines (`kick.py`).

Poor: 16-bit only; of the flags only CF, ZF and IF are kept; memory-mapped access is not watched; about 1 million
instructions a second.
Known: mov r,imm; mov ax/al to and from [moffs]; mov sreg,r; mov r,r; inc, dec, push, pop r16; inc
word and dword [m]; mov and cmp dword [m],imm; cmp r8,imm; push imm, segment registers and flags; jmp, jc, jnc, jz,
jnz, call, ret, jmp far, loop; int, iret; in, out; clc, stc, cli, sti, hlt, nop.
"""

from __future__ import annotations

import copy
import mmap
from typing import Final

from . import kick
from .base import (
    RFLAGS,
    RIP,
    RSP,
    Bus,
    CpuState,
    EngineError,
    Exit,
    ExitKind,
    ExitReason,
    Segment,
    Watch,
    WholeState,
    nobody,
)

__all__ = ["FakeCpu", "create"]

_CF, _ZF, _TF, _IF = 0x01, 0x40, 0x100, 0x200
_ORDER: Final = (0, 2, 3, 1, 6, 7, 4, 5)      # x86 encoding (ax cx dx bx sp bp si di) -> base.GPR
_SEGMENTS: Final = ("es", "cs", "ss", "ds", "fs", "gs")


class _InvalidOpcode(Exception):
    pass


class _Outside(Exception):
    pass


def create(memory: mmap.mmap, bus: Bus, exits: memoryview, rom: mmap.mmap | None = None) -> FakeCpu:
    return FakeCpu(memory, bus, exits)


class FakeCpu:
    stops_at = "instruction"

    def __init__(self, memory: mmap.mmap, bus: Bus, exits: memoryview) -> None:
        self._memory = memory
        self._bus = bus
        self._exits = exits
        self._state = CpuState()
        self.watch: Watch = nobody
        self._stopping = False
        self._inside = False
        self._closed = False
        self._wanted = False                   # an interrupt
        self._shadow = False                   # behind STI or MOV SS: one instruction without interrupts
        self._halted = False                   # HLT is done and not reported
        self._rest = WholeState()              # what it keeps and does not use: FPU, MSRs, debug registers
        self._kicked = kick.Byte()

    # -- running -----------------------------------------------------------------------------

    def run(self) -> Exit:
        while True:
            if self._stopping:
                self._stopping = False
                return Exit(ExitReason.STOPPED)
            if self._kicked.take():
                self._exits[ExitKind.KICK] += 1
                return Exit(ExitReason.KICKED)
            event, self._rest.event = self._rest.event, None
            if event is not None:
                self._halted = False
                self._interrupt(event.vector)
            elif self._wanted and not self._shadow and self._flags & _IF:
                self._halted = False
                self._interrupt(self._bus.acknowledge())
            self._shadow = False
            start = self._state.gpr[RIP]
            try:
                if self._halted or self._step():
                    self._halted = False
                    if self._wanted and self._flags & _IF:
                        continue
                    self._exits[ExitKind.HALT] += 1
                    self.watch(ExitKind.HALT, behind=True)
                    return Exit(ExitReason.HALTED, interrupts_on=bool(self._flags & _IF))
            except _InvalidOpcode:
                self._state.gpr[RIP] = start
                self.watch(ExitKind.INTERRUPT)
                if not self._interrupt(6):
                    self._exits[ExitKind.SHUTDOWN] += 1
                    return Exit(ExitReason.TRIPLE_FAULT,
                                "the guest faulted while its fault handlers failed")
            except _Outside:
                self._exits[ExitKind.OTHER] += 1
                return Exit(ExitReason.GUEST_ERROR, "the guest left its memory: no code is there")

    @property
    def _flags(self) -> int:
        return self._state.gpr[RFLAGS]

    def _fetch(self, size: int) -> int:
        gpr = self._state.gpr
        at = self._state.cs.base + (gpr[RIP] & 0xFFFF)
        if at + size > len(self._memory):
            raise _Outside
        gpr[RIP] = (gpr[RIP] + size) & 0xFFFF
        return int.from_bytes(self._memory[at:at + size], "little")

    def _load(self, address: int, size: int) -> int:
        if address + size <= len(self._memory):
            return int.from_bytes(self._memory[address:address + size], "little")
        self._exits[ExitKind.MMIO_READ] += 1
        return self._bus.mmio_read(address, size) & ((1 << size * 8) - 1)

    def _store(self, address: int, size: int, value: int) -> None:
        if address + size <= len(self._memory):
            self._memory[address:address + size] = value.to_bytes(size, "little")
            return
        self._exits[ExitKind.MMIO_WRITE] += 1
        self._bus.mmio_write(address, size, value)

    def _get(self, register: int, size: int) -> int:
        gpr = self._state.gpr
        if size == 1 and register >= 4:
            return gpr[_ORDER[register - 4]] >> 8 & 0xFF
        return gpr[_ORDER[register]] & ((1 << size * 8) - 1)

    def _set(self, register: int, size: int, value: int) -> None:
        gpr = self._state.gpr
        shift = 8 if size == 1 and register >= 4 else 0
        index = _ORDER[register - 4 if shift else register]
        mask = ((1 << size * 8) - 1) << shift
        gpr[index] = gpr[index] & ~mask | value << shift & mask

    def _push(self, value: int) -> None:
        pointer = self._state.gpr[RSP] - 2 & 0xFFFF
        self._state.gpr[RSP] = pointer
        self._store(self._state.ss.base + pointer, 2, value & 0xFFFF)

    def _pop(self) -> int:
        pointer = self._state.gpr[RSP] & 0xFFFF
        self._state.gpr[RSP] = pointer + 2 & 0xFFFF
        return self._load(self._state.ss.base + pointer, 2)

    def _load_segment(self, name: str, selector: int) -> None:
        segment: Segment = getattr(self._state, name)
        segment.selector, segment.base = selector, selector << 4

    def _interrupt(self, vector: int) -> bool:
        table = self._state.idt
        if vector * 4 + 3 > table.limit:
            return False
        self._exits[ExitKind.INTERRUPT] += 1
        gpr = self._state.gpr
        for value in (self._flags, self._state.cs.selector, gpr[RIP]):
            self._push(value)
        gpr[RFLAGS] &= ~(_IF | _TF)
        target = self._load(table.base + vector * 4, 4)
        gpr[RIP] = target & 0xFFFF
        self._load_segment("cs", target >> 16)
        return True

    def _compare(self, one: int, other: int) -> None:
        flags = self._state.gpr[RFLAGS] & ~(_CF | _ZF)
        self._state.gpr[RFLAGS] = flags | (_CF if one < other else 0) | (_ZF if one == other else 0)

    def _holds(self, condition: int) -> bool:
        """Of a conditional jump: 2 carry, 3 none, 4 zero, 5 not."""
        return bool(self._flags & (_CF if condition < 4 else _ZF)) != bool(condition & 1)

    def _dword(self) -> None:
        """Behind an operand size prefix: inc, mov and cmp of dword [m]."""
        code = self._fetch(1)
        mode = self._fetch(1)
        if (code, mode) not in ((0xFF, 0x06), (0xC7, 0x06), (0x81, 0x3E)):
            raise _InvalidOpcode
        address = self._state.ds.base + self._fetch(2)
        if code == 0xFF:
            value = self._load(address, 4) + 1 & 0xFFFF_FFFF
            self._store(address, 4, value)
            self._state.gpr[RFLAGS] = self._flags & ~_ZF | (0 if value else _ZF)
        elif code == 0xC7:
            self._store(address, 4, self._fetch(4))
        else:
            self._compare(self._load(address, 4), self._fetch(4))

    def _stack(self, code: int) -> bool:
        """Pushes and pops of what is no general register; False for another opcode."""
        gpr = self._state.gpr
        if code in (0x06, 0x0E, 0x16, 0x1E):
            self._push(getattr(self._state, _SEGMENTS[code >> 3]).selector)
        elif code in (0x07, 0x17, 0x1F):
            self._load_segment(_SEGMENTS[code >> 3], self._pop())
            self._shadow = code == 0x17
        elif code == 0x68:
            self._push(self._fetch(2))
        elif code == 0x6A:
            self._push((self._fetch(1) ^ 0x80) - 0x80)
        elif code == 0x9C:
            self._push(self._flags)
        elif code == 0xE8:
            distance = self._fetch(2)
            self._push(gpr[RIP])
            gpr[RIP] = gpr[RIP] + distance & 0xFFFF
        elif code == 0xC3:
            gpr[RIP] = self._pop()
        else:
            return False
        return True

    def _jump(self, distance: int) -> None:
        self._state.gpr[RIP] = self._state.gpr[RIP] + (distance ^ 0x80) - 0x80 & 0xFFFF

    def _count(self, value: int) -> int:
        value &= 0xFFFF
        gpr = self._state.gpr
        gpr[RFLAGS] = gpr[RFLAGS] & ~_ZF | (0 if value else _ZF)
        return value

    def _step(self) -> bool:
        """One instruction; True for HLT."""
        gpr = self._state.gpr
        code = self._fetch(1)
        low = code & 7
        if code == 0xF4:
            return True
        if 0xB0 <= code <= 0xB7:
            self._set(low, 1, self._fetch(1))
        elif 0xB8 <= code <= 0xBF:
            self._set(low, 2, self._fetch(2))
        elif 0x40 <= code <= 0x47:
            self._set(low, 2, self._count(self._get(low, 2) + 1))
        elif 0x48 <= code <= 0x4F:
            self._set(low, 2, self._count(self._get(low, 2) - 1))
        elif 0x50 <= code <= 0x57:
            self._push(self._get(low, 2))
        elif 0x58 <= code <= 0x5F:
            self._set(low, 2, self._pop())
        elif 0xE4 <= code <= 0xE7 or 0xEC <= code <= 0xEF:
            self._port(code)
        elif code in (0xA0, 0xA1):
            size = (code & 1) + 1
            self._set(0, size, self._load(self._state.ds.base + self._fetch(2), size))
        elif code in (0xA2, 0xA3):
            size = (code & 1) + 1
            self._store(self._state.ds.base + self._fetch(2), size, self._get(0, size))
        elif code == 0xFF and self._fetch(1) == 0x06:
            address = self._state.ds.base + self._fetch(2)
            self._store(address, 2, self._count(self._load(address, 2) + 1))
        elif code in (0x89, 0x8E):
            mode = self._fetch(1)
            if mode < 0xC0 or (code == 0x8E and (mode >> 3 & 7) > 5):
                raise _InvalidOpcode
            if code == 0x89:
                self._set(mode & 7, 2, self._get(mode >> 3 & 7, 2))
            else:
                self._load_segment(_SEGMENTS[mode >> 3 & 7], self._get(mode & 7, 2))
                self._shadow = mode >> 3 & 7 == 2
        elif code == 0xEB:
            self._jump(self._fetch(1))
        elif code == 0xE9:
            distance = self._fetch(2)
            gpr[RIP] = gpr[RIP] + distance & 0xFFFF
        elif 0x72 <= code <= 0x75:
            distance = self._fetch(1)
            if self._holds(code & 7):
                self._jump(distance)
        elif code == 0x0F:
            condition = self._fetch(1)
            distance = self._fetch(2)
            if not 0x82 <= condition <= 0x85:
                raise _InvalidOpcode
            if self._holds(condition & 7):
                gpr[RIP] = gpr[RIP] + distance & 0xFFFF
        elif code == 0x66:
            self._dword()
        elif code == 0x3C:
            self._compare(self._get(0, 1), self._fetch(1))
        elif code == 0x80:
            mode = self._fetch(1)
            if mode < 0xF8:
                raise _InvalidOpcode
            self._compare(self._get(mode & 7, 1), self._fetch(1))
        elif code == 0xC6 and self._fetch(1) == 0x06:
            address = self._state.ds.base + self._fetch(2)
            self._store(address, 1, self._fetch(1))
        elif code == 0xE2:
            distance = self._fetch(1)
            self._set(1, 2, self._get(1, 2) - 1 & 0xFFFF)
            if self._get(1, 2):
                self._jump(distance)
        elif code == 0xEA:
            offset, selector = self._fetch(2), self._fetch(2)
            gpr[RIP] = offset
            self._load_segment("cs", selector)
        elif code == 0xCD:
            vector = self._fetch(1)
            self.watch(ExitKind.INTERRUPT, behind=True)
            if not self._interrupt(vector):
                raise _InvalidOpcode
        elif code == 0xCF:
            gpr[RIP] = self._pop()
            self._load_segment("cs", self._pop())
            gpr[RFLAGS] = self._pop() | 2
        elif code in (0xF8, 0xF9):
            gpr[RFLAGS] = gpr[RFLAGS] & ~_CF | code & 1
        elif code == 0xFA:
            gpr[RFLAGS] &= ~_IF
        elif code == 0xFB:
            self._shadow = not gpr[RFLAGS] & _IF
            gpr[RFLAGS] |= _IF
        elif code != 0x90 and not self._stack(code):
            raise _InvalidOpcode
        return False

    def _port(self, code: int) -> None:
        size = (code & 1) + 1
        port = self._state.gpr[3] & 0xFFFF if code >= 0xEC else self._fetch(1)
        self._inside = True
        try:
            if code & 2:
                self._exits[ExitKind.IO_OUT] += 1
                self.watch(ExitKind.IO_OUT, port=port)
                self._bus.port_out(port, size, self._get(0, size))
            else:
                self._exits[ExitKind.IO_IN] += 1
                self.watch(ExitKind.IO_IN, port=port)
                self._set(0, size, self._bus.port_in(port, size))
        finally:
            self._inside = False

    # -- the rest of the contract ------------------------------------------------------------

    def where(self) -> int:
        return self._state.cs.base + self._state.gpr[RIP]

    def stop(self) -> None:
        self._stopping = True

    def kick(self) -> None:
        self._kicked.set()

    @property
    def sleeps(self) -> bool:
        return False

    def request_interrupt(self, wanted: bool) -> None:
        self._wanted = wanted

    def get_gpr(self) -> list[int]:
        return list(self._state.gpr)

    def set_gpr(self, values: list[int]) -> None:
        rip = self._state.gpr[RIP]
        self._state.gpr[:] = values
        if self._inside:
            self._state.gpr[RIP] = rip
        self._state.gpr[RFLAGS] |= 2

    def segment_base(self, name: str) -> int:
        return getattr(self._state, name).base

    def get_state(self) -> CpuState:
        return copy.deepcopy(self._state)

    def set_state(self, state: CpuState) -> None:
        if state.cr0 & 1:
            raise EngineError("the fake engine knows real mode only")
        self._state = copy.deepcopy(state)
        self._shadow = self._halted = False
        self._rest.event = None

    def get_whole(self) -> WholeState:
        whole = copy.deepcopy(self._rest)
        whole.registers, whole.shadow, whole.halted = self.get_state(), self._shadow, self._halted
        return whole

    def set_whole(self, whole: WholeState) -> None:
        self.set_state(whole.registers)
        self._rest = copy.deepcopy(whole)
        self._shadow, self._halted = whole.shadow, whole.halted

    def memory_changed(self, address: int, length: int) -> None:
        """Nothing is cached."""

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._kicked.close()
