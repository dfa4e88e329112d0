"""An interrupt through a task gate, and IRET from there: to another task and back (SDM volume 3, 8.3 and 6.12.2).

Theory.  A gate of type 5 names a task state segment. What the processor holds is written into the one that TR names,
and taken from the other: registers, flags, segments, LDT and page directory. TR, the link back and the flag NT say
where IRET returns to. Jumps and calls to a task are the library's.

Invariants.  Up to the *commit* nothing is changed, and a fault is the interrupted instruction's; from there on the new
task runs, and a fault is its own (`Fault.behind`).

Poor: the debug trap of a task (T) is not raised.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from .state import PAGING, SEGMENTS, VM86

if TYPE_CHECKING:
    from .delivery import Delivery

__all__ = ["BAD_TSS", "NOT_PRESENT", "PROTECTION", "STACK", "Fault", "base_limit", "switch"]

BAD_TSS, NOT_PRESENT, STACK, PROTECTION = 10, 11, 12, 13
_NT, _TS = 1 << 14, 1 << 3
_ES, _CS, _SS, _DS, _FS, _GS = range(6)                # of SEGMENTS, and of both forms of a TSS
_TR, _LDT, _GDT = SEGMENTS["tr"], SEGMENTS["ldt"], SEGMENTS["gdt"]
_AVAILABLE: Final = {1: False, 9: True}                # types of a TSS: 32-bit?
_IN_USE: Final = {3: False, 11: True}
_BUSY: Final = 2                                       # of the type
_PRESENT, _CODE, _CONFORMING, _RW, _S = 1 << 15, 1 << 11, 1 << 10, 1 << 9, 1 << 12
_SIZES: Final = {True: 0x68, False: 0x2C}
_VIRTUAL_8086: Final = 0xF300                          # rights of its segments


class Fault(Exception):
    """On the way to a handler. behind: the task has been switched, so this is not the interrupted instruction's."""

    def __init__(self, vector: int, error: int = 0, *, linear: int | None = None, behind: bool = False) -> None:
        super().__init__(f"fault {vector} error {error:#x}")
        self.vector = vector
        self.error = error
        self.linear = linear
        self.behind = behind


def switch(delivery: Delivery, selector: int, external: int, pointer: int, flags: int, error: int | None = None, *,
           back: bool = False) -> None:
    """To the task of *selector*, or *back* to it. Raises Fault.

    pointer, flags: of the old task, to be saved. error: goes on the new one's stack.
    """
    registers, words = delivery.registers, delivery.words
    code = selector & ~3 | external
    refused = BAD_TSS if back else PROTECTION
    if selector & 4 or not selector & ~3:
        raise Fault(refused, code)
    low, high = delivery.descriptor(selector, refused, external)
    wide = (_IN_USE if back else _AVAILABLE).get(high >> 8 & 0x1F)
    if wide is None:
        raise Fault(refused, code)
    if not high & _PRESENT:
        raise Fault(NOT_PRESENT, code)
    base, limit = base_limit(low, high)
    if limit < _SIZES[wide] - 1:
        raise Fault(BAD_TSS, code)
    old_selector, old_base, _, old_flags = registers.raw_segment(_TR)
    old_wide = bool(old_flags >> 8 & 8)
    state = _saved(delivery, pointer, flags & ~_NT if back else flags, wide=old_wide)
    old = delivery.pieces(old_base + (0x20 if old_wide else 0x0E), len(state), write=True, user=False)
    new = delivery.read(base, _SIZES[wide])
    # The one that is not in use any more, or is from now on.
    changed = old_selector if back else selector
    rights = registers.raw_segment(_GDT)[1] + (changed & ~7) + 5
    in_use = bytes([delivery.read(rights, 1)[0] & ~_BUSY if back else high >> 8 & 0xFF | _BUSY])
    writes = [(old, state), (delivery.pieces(rights, 1, write=True, user=False), in_use)]
    if not back:
        writes.append((delivery.pieces(base, 2, write=True, user=False), struct.pack("<H", old_selector)))

    # The commit.
    for pieces, data in writes:
        delivery.write(pieces, data)
    directory, pointer, eflags, general, segments, ldt = _taken(new, wide=wide)
    registers.set_raw_segment(_TR, selector, base, limit, high & ~(_BUSY << 8))         # BUSY_TSS
    registers.set_control(0, registers.control(0) | _TS)
    registers.clear_local_breakpoints()
    if wide and registers.control(0) & PAGING:
        registers.set_control(3, directory)
        registers.forget_translations()
        delivery.new_directory()
    words[:8] = general
    words[16] = pointer
    delivery.set_flags(eflags if back else eflags | _NT)
    ring = 3 if eflags & VM86 else segments[_CS] & 3
    for index, each in enumerate(segments):
        if eflags & VM86:
            registers.set_raw_segment(index, each, each << 4, 0xFFFF, _VIRTUAL_8086)
        else:                                                                  # until they are loaded
            registers.set_raw_segment(index, each, 0, 0, ring << 13 if index == _SS else 0)
    registers.set_raw_segment(_LDT, ldt, 0, 0, 0)
    registers.sync()
    try:
        _load_ldt(delivery, ldt, external)
        if not eflags & VM86:
            _load_segments(delivery, segments, ring, external)
        registers.sync()
        if pointer > registers.raw_segment(_CS)[2]:
            raise Fault(PROTECTION, external)
        if error is not None:
            delivery.push(error, 4 if wide else 2, external)
    except Fault as fault:
        registers.sync()
        raise Fault(fault.vector, fault.error, linear=fault.linear, behind=True) from fault


def _saved(delivery: Delivery, pointer: int, flags: int, *, wide: bool) -> bytes:
    """From the instruction pointer to the last segment, as a TSS has them."""
    words, mask = delivery.words, 0xFFFF_FFFF if wide else 0xFFFF
    values = [pointer, flags, *words[:8]]
    selectors = [delivery.registers.raw_segment(index)[0] & 0xFFFF for index in range(6 if wide else 4)]
    form = "<10I6I" if wide else "<10H4H"
    return struct.pack(form, *(value & mask for value in values), *selectors)


def _taken(new: bytes, *, wide: bool) -> tuple[int, int, int, list[int], list[int], int]:
    """Page directory, instruction pointer, flags, eight general registers, six selectors, LDT."""
    if wide:
        directory, pointer, flags, *rest = struct.unpack_from("<I2I8I6I", new, 0x1C)
        ldt, = struct.unpack_from("<H", new, 0x60)
        return directory, pointer, flags, list(rest[:8]), [each & 0xFFFF for each in rest[8:]], ldt
    pointer, flags, *rest = struct.unpack_from("<2H8H4HH", new, 0x0E)
    return 0, pointer, flags, [0xFFFF_0000 | each for each in rest[:8]], [*rest[8:12], 0, 0], rest[12]


def _load_ldt(delivery: Delivery, selector: int, external: int) -> None:
    if not selector & ~3:
        return
    code = selector & ~3 | external
    if selector & 4:
        raise Fault(BAD_TSS, code)
    low, high = delivery.descriptor(selector, BAD_TSS, external)
    if high >> 8 & 0x1F != 2 or not high & _PRESENT:
        raise Fault(BAD_TSS, code)
    delivery.registers.set_raw_segment(_LDT, selector, *base_limit(low, high), high)


def _load_segments(delivery: Delivery, selectors: list[int], ring: int, external: int) -> None:
    """In the manual's order: CS, SS, the others."""
    for index in (_CS, _SS, _DS, _ES, _FS, _GS):
        selector = selectors[index]
        code = selector & ~3 | external
        if not selector & ~3:
            if index in (_CS, _SS):
                raise Fault(BAD_TSS, code)
            delivery.registers.set_raw_segment(index, selector, 0, 0, 0)
            continue
        low, high = delivery.descriptor(selector, BAD_TSS, external)
        if not high & _S or not _fits(index, selector & 3, high, ring):
            raise Fault(BAD_TSS, code)
        if not high & _PRESENT:
            raise Fault(STACK if index == _SS else NOT_PRESENT, code)
        rights = (high | 1 << 8) & ~(3 << 13) | ring << 13 if index == _CS else high | 1 << 8
        delivery.registers.set_raw_segment(index, selector, *base_limit(low, high), rights)


def _fits(index: int, rpl: int, high: int, ring: int) -> bool:
    """Whether a descriptor of code or data may be in this segment register, in this ring."""
    dpl = high >> 13 & 3
    if index == _CS:
        return bool(high & _CODE) and (dpl <= rpl if high & _CONFORMING else dpl == rpl)
    if index == _SS:
        return not high & _CODE and bool(high & _RW) and dpl == ring and rpl == ring
    if high & _CODE and not high & _RW:
        return False
    return bool(high & _CODE and high & _CONFORMING) or (dpl >= ring and dpl >= rpl)


def base_limit(low: int, high: int) -> tuple[int, int]:
    """Of both words of a descriptor."""
    base = low >> 16 | (high & 0xFF) << 16 | high & 0xFF00_0000
    limit = low & 0xFFFF | high & 0x000F_0000
    return base, limit << 12 | 0xFFF if high & 1 << 23 else limit
