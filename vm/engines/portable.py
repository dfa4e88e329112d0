"""A vCPU's state on its way: in one form for every engine, as plain data, and whether it can be carried at all.

Theory.  Engines keep the same architecture with different leftovers: Unicorn remembers DPL 3 for CS in real mode, a
TSS that is not busy, G without its limit; VT-x refuses to enter a guest with any of these (SDM volume 3, 26.3.1.2),
and an unusable segment has no attributes at all.  `canonical` writes each state the one way that every engine accepts
and that means the same to the guest.  A state is compared, saved and given to an engine in this form.

`why_not` says, before anything is changed, why an engine cannot go on from a state.

`to_plain` and `from_plain` are its form in a file. What comes back from a file is hostile: every field is there, of its
type and within its width, or `BadState` names it.

Pure: knows no engine.
"""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from typing import Any, Final

from .base import MSRS, RFLAGS, RIP, CpuState, DescriptorTable, Event, Fpu, Segment, WholeState

__all__ = ["BadState", "canonical", "from_plain", "to_plain", "why_not"]

SEGMENTS: Final = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")
_PE, _ET, _PG = 1, 0x10, 1 << 31
_LMA, _VM = 1 << 10, 1 << 17
_EFER_KNOWN: Final = 0xD01                 # SCE, LME, LMA, NXE
_CR4_KNOWN: Final = 0x7FF                  # VME to OSXMMEXCPT: all that Unicorn has
_FLAGS: Final = 0x3F_7FD7                  # the bits of RFLAGS that exist
_LOW: Final = 0xFFFF_FFFF
_BREAKPOINTS: Final = 0xFF                 # DR7: any enabled
_CODE, _DATA, _BUSY, _LDT = 11, 3, 2, 2


class BadState(ValueError):
    """Plain data that is no state; the text names the field."""


# -- one form ------------------------------------------------------------------------------------


def canonical(state: CpuState) -> CpuState:
    """The same state, written the way that every engine accepts."""
    gpr = list(state.gpr)
    gpr[RFLAGS] = gpr[RFLAGS] & _FLAGS | 2
    long_code = bool(state.efer & _LMA and state.cs.l and state.cs.present)
    if not long_code:
        gpr[RIP] &= _LOW
    if not state.cr0 & _PE:
        fix = _real
    elif gpr[RFLAGS] & _VM:
        fix = _virtual
    else:
        fix = _protected
    segments = {name: fix(name, getattr(state, name)) for name in ("cs", "ds", "es", "fs", "gs", "ss")}
    return replace(
        state, gpr=gpr, cr0=state.cr0 | _ET, tr=_task(state.tr), ldt=_local(state.ldt),
        gdt=DescriptorTable(state.gdt.base, state.gdt.limit & 0xFFFF),
        idt=DescriptorTable(state.idt.base, state.idt.limit & 0xFFFF), **segments)


def _granular(segment: Segment) -> Segment:
    """G as the limit needs it."""
    if segment.limit > 0xF_FFFF:
        return replace(segment, g=True, limit=segment.limit | 0xFFF)
    return replace(segment, g=segment.g and segment.limit & 0xFFF == 0xFFF)


def _unusable(name: str, segment: Segment) -> Segment:
    """Only FS and GS keep a base (64-bit code uses it), and SS the ring."""
    base = segment.base if name in ("fs", "gs") else 0
    return Segment(selector=segment.selector, base=base, limit=0, type=0, present=False, s=False,
                   dpl=segment.dpl if name == "ss" else 0)


def _real(name: str, segment: Segment) -> Segment:
    # There is nothing unusable in real mode; limits and widths stay what protected mode left (unreal mode).
    kind = _CODE if name == "cs" else segment.type | 1 if segment.present and segment.s else _DATA
    limit = segment.limit if segment.present else 0xFFFF
    return _granular(replace(segment, base=segment.base & _LOW, limit=limit, type=kind, present=True, dpl=0, s=True,
                             l=False))


def _virtual(_name: str, segment: Segment) -> Segment:
    return Segment(selector=segment.selector, base=segment.selector << 4, limit=0xFFFF, type=_DATA, dpl=3)


def _protected(name: str, segment: Segment) -> Segment:
    if not segment.present:
        return _unusable(name, segment)
    base = segment.base if name in ("fs", "gs") else segment.base & _LOW
    return _granular(replace(segment, base=base, type=segment.type | 1, s=True, db=segment.db and not segment.l))


def _task(segment: Segment) -> Segment:
    # Busy: its descriptor in memory is, Unicorn's copy is not. There always is one, since none can be unloaded.
    if not segment.present:
        return Segment(selector=segment.selector, type=_CODE, s=False)
    return _granular(replace(segment, type=segment.type | _BUSY, s=False, dpl=0, db=False, l=False, avl=False))


def _local(segment: Segment) -> Segment:
    if not segment.present:
        return _unusable("ldt", segment)
    return _granular(replace(segment, type=_LDT, s=False, dpl=0, db=False, l=False, avl=False))


# -- whether it can be carried -----------------------------------------------------------------


def why_not(whole: WholeState, engine: str, technology: str = "") -> str | None:
    """Why *engine* ("kvm" on *technology*, "software") cannot go on from this state; None: it can."""
    return _not_software(whole) if engine == "software" else _not_kvm(whole, technology)


def _not_software(whole: WholeState) -> str | None:
    state = whole.registers
    if whole.debug[5] & _BREAKPOINTS:
        return "the guest has set hardware breakpoints (DR7), which the software engine does not have"
    if state.cr4 & ~_CR4_KNOWN:
        return f"the guest has set bits in CR4 that the software engine does not know ({state.cr4 & ~_CR4_KNOWN:#x})"
    if state.efer & ~_EFER_KNOWN:
        return f"the guest has set bits in EFER that the software engine does not know ({state.efer & ~_EFER_KNOWN:#x})"
    return None


def _not_kvm(whole: WholeState, technology: str) -> str | None:
    state = whole.registers
    if technology == "pvm" and state.cr0 & _PG and not state.efer & _LMA:
        return ("the guest uses 32-bit paging, which this host's KVM (PVM) cannot run; 16-bit code, 32-bit code"
                " without paging and 64-bit code can be moved")
    if technology == "pvm" and state.gpr[RFLAGS] & _VM:
        return "the guest is in virtual-8086 mode, which this host's KVM (PVM) does not have"
    if state.cr0 & _PG and not state.cr0 & _PE:
        return "the guest has switched on paging without protection, which no processor does"
    for name, value in (("RIP", state.gpr[RIP]), ("FS base", state.fs.base), ("GS base", state.gs.base),
                        ("GDT base", state.gdt.base), ("IDT base", state.idt.base)):
        if (value + (1 << 47)) & (1 << 64) - 1 >= 1 << 48:
            return f"its {name} is {value:#x}, an address that no processor takes"
    return None


# -- plain data --------------------------------------------------------------------------------


def to_plain(whole: WholeState) -> dict[str, Any]:
    """JSON's types only."""
    return asdict(whole)


def from_plain(data: Any) -> WholeState:
    """What `to_plain` was given. Raises BadState."""
    fields_of = _object(data, WholeState, "cpu")
    event = fields_of["event"]
    tsc = fields_of["tsc"]
    return WholeState(
        registers=_registers(fields_of["registers"]), fpu=_fpu(fields_of["fpu"]),
        msrs=_msrs(fields_of["msrs"]), debug=_words(fields_of["debug"], 6, 64, "debug"),
        tsc=None if tsc is None else _word(tsc, 64, "tsc"), event=None if event is None else _event(event),
        shadow=_flag(fields_of["shadow"], "shadow"), halted=_flag(fields_of["halted"], "halted"))


def _object(data: Any, kind: type, where: str) -> dict[str, Any]:
    names = [field.name for field in fields(kind)]
    if not isinstance(data, dict) or sorted(data) != sorted(names):
        raise BadState(f"{where} has not the fields that it must have")
    return data


def _word(value: Any, bits: int, where: str) -> int:
    if type(value) is not int or not 0 <= value < 1 << bits:
        raise BadState(f"{where} is no {bits}-bit number")
    return value


def _words(values: Any, count: int, bits: int, where: str) -> list[int]:
    if not isinstance(values, list) or len(values) != count:
        raise BadState(f"{where} is no list of {count} numbers")
    return [_word(value, bits, where) for value in values]


def _flag(value: Any, where: str) -> bool:
    if type(value) is not bool:
        raise BadState(f"{where} is neither true nor false")
    return value


_SEGMENT_BITS: Final = {"selector": 16, "base": 64, "limit": 32, "type": 4, "dpl": 2}


def _segment(data: Any, where: str) -> Segment:
    given: dict[str, Any] = {}
    for name, value in _object(data, Segment, where).items():
        bits = _SEGMENT_BITS.get(name)
        given[name] = _flag(value, f"{where}.{name}") if bits is None else _word(value, bits, f"{where}.{name}")
    return Segment(**given)


def _table(data: Any, where: str) -> DescriptorTable:
    given = _object(data, DescriptorTable, where)
    return DescriptorTable(_word(given["base"], 64, where), _word(given["limit"], 16, where))


def _registers(data: Any) -> CpuState:
    given = _object(data, CpuState, "registers")
    segments = {name: _segment(given[name], name) for name in SEGMENTS}
    cr0, cr2, cr3, cr4, efer = (_word(given[name], 64, name) for name in ("cr0", "cr2", "cr3", "cr4", "efer"))
    return CpuState(
        gpr=_words(given["gpr"], 18, 64, "gpr"), gdt=_table(given["gdt"], "gdt"), idt=_table(given["idt"], "idt"),
        cr0=cr0, cr2=cr2, cr3=cr3, cr4=cr4, efer=efer, **segments)


_FPU_BITS: Final = {"control": 16, "status": 16, "tags": 8, "opcode": 16, "instruction": 64, "operand": 64, "mxcsr": 32}


def _fpu(data: Any) -> Fpu:
    given = _object(data, Fpu, "fpu")
    words = {name: _word(given[name], bits, name) for name, bits in _FPU_BITS.items()}
    return Fpu(**words, st=_words(given["st"], 8, 80, "st"), xmm=_words(given["xmm"], 16, 128, "xmm"))


def _msrs(data: Any) -> dict[str, int]:
    if not isinstance(data, dict) or data.keys() != MSRS.keys():
        raise BadState("msrs are not those that there are")
    return {name: _word(data[name], 64, name) for name in MSRS}


def _event(data: Any) -> Event:
    given = _object(data, Event, "event")
    kind, error = given["kind"], given["error"]
    if kind not in ("interrupt", "exception"):
        raise BadState("event is neither an interrupt nor an exception")
    vector = _word(given["vector"], 8, "event")
    if kind == "exception" and vector > 31:
        raise BadState("event is an exception that there is not")
    return Event(kind, vector, None if error is None else _word(error, 32, "event"))

