"""What is in the code that a boot image can reach, and what that means for how it is virtualized.

Theory.  Recursive descent: from the entry, instruction after instruction, into both ways of a branch,
into calls and (where the target can be read from the image or from known registers,
vm/code/constants.py) through far jumps, jump tables and pointers.  Each address is decoded once in
each width.  CR0, EFER and the GDT are followed along the path, so the width changes where the
processor's would.  Each instruction is classified (vm/code/classes.py) under the mode it stands in,
because the same `push ds` that must be patched in protected mode is harmless in real mode, where
software virtualization translates everything anyway.

What it says of software virtualization is the manual's kind (guest ring 0 in ring 1, chapter 10.3 and
after): what *traps* by itself, what does not and must be *patched*, and what must be *translated* as
a whole.  The recommended mode follows vm/modes.py's rules, with the addresses as evidence.

Invariants.  Terminates on any bytes: at most `LIMIT` instructions, each address once a width; every
list in the report is bounded (`SHOWN`), every count is whole.  The image is never executed.
Poor: what is reached by a computed address, by an interrupt or after loading from a disk is not seen (it
is counted where it shows as an indirect jump, or as a jump out of the image); text behind a call that
prints it is recognized only where it looks like text; paging is taken to be identical.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

import capstone

from .classes import LOOKED_AT, PVM_CANNOT, Kind, classify
from .constants import Registers
from .image import Entry, Image

if TYPE_CHECKING:
    from ..modes import Technology

__all__ = ["LIMIT", "SHOWN", "Advice", "Entered", "Finding", "Report", "scan"]

LIMIT: Final = 4_000_000
SHOWN: Final = 8                       # addresses kept of each kind of finding
FOLLOWED: Final = 20_000               # instructions whose effect on constants is followed: boot code, not kernels
PIECES_MAX: Final = 32                 # copies of itself that code makes
TABLE_MAX: Final = 512                 # entries of one jump table
WAITING_MAX: Final = 1_000_000
_CHUNK: Final = 32
_LONGEST: Final = 15
_TEXT_MAX: Final = 256

_DECODER_MODES: Final = {16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}
_CONDITIONAL: Final = frozenset((
    "ja", "jae", "jb", "jbe", "jcxz", "jecxz", "jrcxz", "je", "jg", "jge", "jl", "jle", "jne", "jno", "jnp", "jns",
    "jo", "jp", "js", "loop", "loope", "loopne", "xbegin"))
_ENDS: Final = frozenset((
    "ret", "retf", "retfq", "iret", "iretd", "iretq", "sysret", "sysretq", "sysexit", "sysexitq", "rsm", "ud0", "ud1",
    "ud2"))
_FLOW: Final = frozenset(("jmp", "call", "ljmp", "lcall", "hlt", "int")) | _CONDITIONAL | _ENDS
_WATCHED: Final = frozenset(("lgdt", "lmsw", "wrmsr", "clts"))
_NEVER_RETURNS: Final = frozenset(("0x18", "0x19"))            # BIOS: no system, boot again
_TABLE_JUMP: Final = re.compile(r"^[dq]?word ptr (?:cs:|ds:)?\[\w+(\*[248])? \+ (0x[0-9a-f]+)\]$|"
                                r"^[dq]?word ptr (?:cs:|ds:)?\[\w+(\*[248]) - (0x[0-9a-f]+)\]$")
_REAL, _LONG, _RING_1 = "real mode", "64-bit long mode", ("16-bit protected mode", "32-bit protected mode")
_PE, _PG, _LME = 1, 1 << 31, 1 << 8


@dataclass(slots=True)
class Finding:
    """One family of instructions in one mode."""

    kind: Kind
    family: str
    mode: str
    count: int = 0
    addresses: list[int] = field(default_factory=list)      # linear, the first `SHOWN`


@dataclass(frozen=True, slots=True)
class Entered:
    """A step to another mode, where the code takes it."""

    mode: str
    address: int
    how: str


@dataclass(frozen=True, slots=True)
class Advice:
    """The mode that this image wants, by rule (codes as in vm/modes.py where they are the same)."""

    mode: Literal["software", "hardware"]
    rule: str
    reason: str
    addresses: tuple[int, ...] = ()


@dataclass(slots=True)
class Report:
    format: str
    size: int
    entries: tuple[Entry, ...]
    instructions: int = 0
    code_bytes: int = 0
    modes: Counter[str] = field(default_factory=Counter)          # instructions by mode
    findings: list[Finding] = field(default_factory=list)
    entered: list[Entered] = field(default_factory=list)
    pvm_cannot: list[Finding] = field(default_factory=list)       # what KVM under PVM gives up on
    indirect: tuple[int, list[int]] = (0, [])                     # jumps and calls whose target is not known
    outside: tuple[int, list[int]] = (0, [])                      # targets outside the image
    undecodable: tuple[int, list[int]] = (0, [])
    complete: bool = True                                         # False: LIMIT was reached
    advice: Advice | None = None

    def total(self, *kinds: Kind, ring_1: bool = False) -> int:
        """Instructions of these classes; `ring_1`: only where software virtualization would run them in ring 1."""
        return sum(f.count for f in self.findings if f.kind in kinds and (not ring_1 or f.mode in _RING_1))

    @property
    def traps(self) -> int:
        """In ring 1 these leave the guest by themselves."""
        return self.total(Kind.PRIVILEGED, Kind.IO, ring_1=True)

    @property
    def patches(self) -> int:
        """In ring 1 these go wrong silently: software virtualization must find and patch each."""
        return self.total(Kind.SENSITIVE, ring_1=True)

    @property
    def translated(self) -> int:
        """Instructions of real mode: run one by one or translated, since rings begin with protection."""
        return self.modes[_REAL]


@dataclass(slots=True)
class _Path:
    bits: int
    base: int
    offset: int
    registers: Registers


class _Places:
    """A count and its first addresses."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[int] = []

    def add(self, address: int) -> None:
        self.count += 1
        if len(self.first) < SHOWN and address not in self.first:
            self.first.append(address)

    def told(self) -> tuple[int, list[int]]:
        return self.count, self.first


def scan(image: Image, technology: Technology = "vt-x") -> Report:
    """Everything reachable from the image's entries. `technology`: of the host that is to run it."""
    scanner = _Scanner(image)
    for entry in image.entries:
        scanner.enter(entry)
    return scanner.report(technology)


class _Scanner:
    def __init__(self, image: Image) -> None:
        self._image = Image(image.format, image.size, image.entries, list(image.pieces))
        self._decoders = {bits: capstone.Cs(capstone.CS_ARCH_X86, mode) for bits, mode in _DECODER_MODES.items()}
        self._seen: dict[int, set[int]] = {16: set(), 32: set(), 64: set()}
        self._waiting: list[_Path] = []
        self._findings: dict[tuple[str, str], Finding] = {}
        self._pvm: dict[tuple[str, str], Finding] = {}
        self._entered: dict[tuple[str, int], Entered] = {}
        self._modes: Counter[str] = Counter()
        self._indirect, self._outside, self._undecodable = _Places(), _Places(), _Places()
        self._instructions = self._bytes = self._followed = 0
        self._complete = True

    # -- walking -----------------------------------------------------------------------------

    def enter(self, entry: Entry) -> None:
        registers = Registers()
        if entry.bits == 16:
            for name in ("ds", "es", "ss"):
                # What BIOSes and loaders leave there; only used to find more code.
                registers.set(name, 0 if entry.base == 0 else entry.base >> 4)
            registers.set("cs", entry.base >> 4)
        registers.set("cr0", 0x10 if entry.bits == 16 else 0x11 | (_PG if entry.bits == 64 else 0))
        if entry.bits == 64:
            registers.set("efer", 0x500)
            self._note_mode(_LONG, entry.linear, entry.what)
        self._waiting.append(_Path(entry.bits, entry.base, entry.offset, registers))
        while self._waiting:
            if self._instructions >= LIMIT:
                self._complete = False
                self._waiting.clear()
                return
            self._walk(self._waiting.pop())

    def _walk(self, path: _Path) -> None:
        """Straight on from a path's start until it ends, meets what was seen, or branches away for good."""
        bits, base, offset, registers = path.bits, path.base, path.offset, path.registers
        wrap = 0xFFFF if bits == 16 else 0xFFFF_FFFF if bits == 32 else (1 << 64) - 1
        protected = bool(registers.bits("cr0")[1] & _PE)
        mode = _mode_name(bits, protected=protected)
        seen, decoder, read = self._seen[bits], self._decoders[bits], self._image.read
        previous = ""
        while True:
            linear = base + offset
            if linear in seen:
                return                                # reached another way since it was queued
            if self._instructions >= LIMIT:
                self._complete = False
                return
            code = read(linear, _CHUNK * _LONGEST)
            if not code:
                self._outside.add(linear)
                return
            begun = offset
            for at, size, mnemonic, operands in decoder.disasm_lite(code, offset, _CHUNK):
                linear = base + at
                if linear in seen:
                    return
                seen.add(linear)
                self._instructions += 1
                self._bytes += size
                self._modes[mode] += 1
                offset = at + size & wrap
                name = mnemonic.rpartition(" ")[2] if " " in mnemonic else mnemonic
                if name in LOOKED_AT:
                    self._classify(name, operands, bits, mode, linear)
                if name in _FLOW:
                    if not self._flow(name, operands, path, registers, previous, linear, offset, wrap):
                        return
                    if name in ("call", "lcall"):
                        registers = registers.after_call()
                        text = self._text_behind(base, offset, operands) if name == "call" else 0
                        if text:
                            offset = offset + text & wrap
                            previous = name
                            break
                elif self._followed < FOLLOWED:
                    self._followed += 1
                    if "rip" in operands:
                        registers.set("rip", offset)
                    if " " in mnemonic and name.startswith("movs"):
                        self._copied(name, registers, protected=protected)
                    registers.step(mnemonic, operands, read, protected=protected)
                if name in _WATCHED or (name == "mov" and operands.startswith("cr")):
                    self._control(name, operands, registers, linear, protected=protected)
                    protected = bool(registers.bits("cr0")[1] & _PE)
                    mode = _mode_name(bits, protected=protected)
                if offset < at:                       # wrapped around the segment: go on from there
                    previous = name
                    break
                previous = name
            else:
                if offset == begun:
                    # Nothing decoded: an instruction that does not exist, or that the image's end cuts off.
                    self._undecodable.add(base + offset)
                    return

    def _flow(self, name: str, operands: str, path: _Path, registers: Registers, previous: str, linear: int,
              behind: int, wrap: int) -> bool:
        """Queue where control can go besides straight on; whether it goes straight on too."""
        bits, base = path.bits, path.base
        protected = bool(registers.bits("cr0")[1] & _PE)
        if name == "hlt":
            return previous != "cli"                  # with interrupts off: the end
        if name == "int":
            return protected or operands not in _NEVER_RETURNS
        if name in _CONDITIONAL:
            self._queue(bits, base, int(operands, 0) & wrap, registers)
            return True
        if name in _ENDS:
            if name.startswith(("retf", "iret")):
                self._far_return(bits, registers, linear, protected=protected)
            return False
        if name in ("ljmp", "lcall"):
            self._far(bits, operands, registers, linear, protected=protected)
            return name == "lcall"
        # jmp, call
        if operands[:1].isdigit():
            self._queue(bits, base, int(operands, 0) & wrap,
                        registers.after_call() if name == "call" else registers)
        elif not self._through_pointer(bits, base, operands, registers, linear, behind, protected=protected):
            self._indirect.add(linear)
        return name == "call"

    def _queue(self, bits: int, base: int, offset: int, registers: Registers) -> None:
        if base + offset not in self._seen[bits] and len(self._waiting) < WAITING_MAX:
            self._waiting.append(_Path(bits, base, offset, registers.copy()))

    def _through_pointer(self, bits: int, base: int, operands: str, registers: Registers, linear: int,
                         behind: int, *, protected: bool) -> bool:
        """An indirect near jump whose target the registers or the image tell."""
        value = registers.value(operands)
        if value is not None:
            self._queue(bits, base, value, registers)
            return True
        width = 2 if operands.startswith("word") else 8 if operands.startswith("qword") else 4
        match = _TABLE_JUMP.match(operands)
        if match is not None:
            start = int(match[2] or f"-{match[4]}", 0) % (1 << 64 if bits == 64 else 1 << 32)
            scaled = match[1] or match[3] or (width == 2 and bits == 16)
            return bool(scaled) and self._table(bits, base, base + start if bits == 16 else start, width, registers)
        if "rip" in operands:
            registers.set("rip", behind)
        at = registers.address(operands, protected=protected)
        data = self._image.read(at, width) if at is not None else b""
        target = int.from_bytes(data, "little") if len(data) == width else 0
        if not target or self._image.piece_at(base + target) is None:
            return False
        self._queue(bits, base, target, registers)
        return True

    def _table(self, bits: int, base: int, start: int, width: int, registers: Registers) -> bool:
        """Every entry of a jump table, as long as they point into code of the image."""
        found = False
        data = self._image.read(start, TABLE_MAX * width)
        for at in range(0, len(data) - width + 1, width):
            target = int.from_bytes(data[at:at + width], "little")
            if not target or self._image.piece_at(base + target) is None:
                break
            self._queue(bits, base, target, registers)
            found = True
        return found

    # -- far transfers and modes ---------------------------------------------------------------

    def _far(self, bits: int, operands: str, registers: Registers, linear: int, *, protected: bool) -> None:
        direct = re.match(r"^(0x[0-9a-f]+|\d+)(?::|, )(0x[0-9a-f]+|\d+)$", operands)
        if direct is not None:
            self._far_to(bits, int(direct[1], 0), int(direct[2], 0), registers, linear, protected=protected)
            return
        at = registers.address(re.sub(r"^\w+ ptr ", "", operands), protected=protected)
        width = 4 if bits != 16 else 2
        data = self._image.read(at, width + 2) if at is not None else b""
        if len(data) < width + 2 or not any(data):
            self._indirect.add(linear)
            return
        self._far_to(bits, int.from_bytes(data[width:], "little"), int.from_bytes(data[:width], "little"),
                     registers, linear, protected=protected)

    def _far_return(self, bits: int, registers: Registers, linear: int, *, protected: bool) -> None:
        """RETF and IRET to what was pushed before, the way into another mode or ring."""
        pushed = registers.pops(2)
        if pushed is not None:
            offset, selector = pushed
            self._far_to(bits, selector & 0xFFFF, offset & (0xFFFF if bits == 16 else 0xFFFF_FFFF), registers, linear,
                         protected=protected)

    def _far_to(self, bits: int, selector: int, offset: int, registers: Registers, linear: int, *,
                protected: bool) -> None:
        registers = registers.copy()
        registers.set("cs", selector)
        if not protected:
            base, offset = selector << 4, offset & 0xFFFF
            if self._image.piece_at(base + offset) is None and self._boot_sector_moved(base, offset):
                base = 0
            self._queue(16, base, offset, registers)
            return
        cr0, efer = registers.bits("cr0")[1], registers.bits("efer")[1]
        long = bool(cr0 & _PG and efer & _LME)
        described = self._descriptor(selector, registers)
        if described is not None:
            base, wide, is_64 = described
            width = 64 if long and is_64 else 32 if wide else 16
        else:
            base, width = 0, 64 if long else 32
        if width == 64:
            base = 0
        if width != bits or bits == 16:
            self._note_mode(_mode_name(width, protected=True), linear, "far jump")
        self._queue(width, base, offset, registers)

    def _boot_sector_moved(self, base: int, offset: int) -> bool:
        """Whether this is the boot sector's own code at a segment to which it has copied itself.

        Its offset is the same and nothing else of the image is there.
        """
        return self._image.format == "boot-sector" and self._image.piece_at(offset) is not None and base > 0

    def _descriptor(self, selector: int, registers: Registers) -> tuple[int, bool, bool] | None:
        """(base, 32-bit, 64-bit) of a code segment, when the GDT is in the image."""
        if registers.gdt is None or not selector & ~7 or (selector & ~7) + 7 > registers.gdt[1]:
            return None
        raw = self._image.read(registers.gdt[0] + (selector & ~7), 8)
        if len(raw) < 8 or raw[5] & 0x98 != 0x98:
            return None                               # not a present code segment
        base = int.from_bytes(raw[2:5], "little") | raw[7] << 24
        return base, bool(raw[6] & 0x40), bool(raw[6] & 0x20)

    def _control(self, name: str, operands: str, registers: Registers, linear: int, *, protected: bool) -> None:
        """Notes of the modes that CR0, EFER and LGDT lead to."""
        if name == "lgdt":
            at = registers.address(re.sub(r"^\w+ ptr ", "", operands), protected=protected)
            raw = self._image.read(at, 6) if at is not None else b""
            if len(raw) == 6:
                registers.gdt = int.from_bytes(raw[2:], "little"), int.from_bytes(raw[:2], "little")
        elif name == "wrmsr":
            if registers.bits("efer")[1] & _LME:
                self._note_mode("long mode enabled", linear, "wrmsr EFER.LME")
        elif name == "lmsw" or operands.startswith("cr0"):
            value = registers.bits("cr0")[1]
            how = "lmsw" if name == "lmsw" else "mov cr0"
            if value & _PE and not protected:
                self._note_mode("protected mode", linear, f"{how} with PE")
            elif protected and not value & _PE and registers.bits("cr0")[0] & _PE:
                self._note_mode("real mode again", linear, f"{how} without PE")
            if value & _PG:
                long = registers.bits("efer")[1] & _LME
                self._note_mode("paging, long mode" if long else "paging", linear, f"{how} with PG")

    def _note_mode(self, mode: str, address: int, how: str) -> None:
        if len(self._entered) < 4 * SHOWN:
            self._entered.setdefault((mode, address), Entered(mode, address, how))

    # -- single instructions -------------------------------------------------------------------

    def _classify(self, name: str, operands: str, bits: int, mode: str, linear: int) -> None:
        found = classify(name, operands, bits)
        if found is not None:
            kind, family = found
            self._count(self._findings, kind, family, mode, linear)
        if name in PVM_CANNOT:
            self._count(self._pvm, Kind.ESOTERIC, name, mode, linear)

    @staticmethod
    def _count(table: dict[tuple[str, str], Finding], kind: Kind, family: str, mode: str, linear: int) -> None:
        finding = table.get((family, mode))
        if finding is None:
            finding = table[family, mode] = Finding(kind, family, mode)
        finding.count += 1
        if len(finding.addresses) < SHOWN:
            finding.addresses.append(linear)

    def _text_behind(self, base: int, behind: int, target: str) -> int:
        """Length of a string behind a call, with its zero, when the callee begins by popping its address."""
        if not target[:1].isdigit() or int(target, 0) == behind:
            return 0
        first = self._image.read(base + int(target, 0), 1)
        if not first or not 0x58 <= first[0] <= 0x5F:         # pop r
            return 0
        text, zero, _ = self._image.read(base + behind, _TEXT_MAX).partition(b"\0")
        plain = all(32 <= byte < 127 or byte in (7, 8, 9, 10, 13) for byte in text)
        return len(text) + 1 if zero and text and plain else 0

    def _copied(self, name: str, registers: Registers, *, protected: bool) -> None:
        """REP MOVS with known registers: the bytes are at their new place, too."""
        count = registers.value("cx" if not protected else "ecx")
        index = ("si", "di") if not protected else ("esi", "edi")
        start = registers.address(f"[{index[0]}]", protected=protected)
        to = registers.address(f"es:[{index[1]}]", protected=protected)
        if not count or start is None or to is None or len(self._image.pieces) >= PIECES_MAX:
            return
        data = self._image.read(start, count * {"b": 1, "w": 2, "d": 4}.get(name[-1], 1))
        if data and self._image.piece_at(to) is None:
            self._image.pieces.append((to, data))

    # -- the report --------------------------------------------------------------------------

    def report(self, technology: Technology) -> Report:
        report = Report(
            format=self._image.format, size=self._image.size, entries=self._image.entries,
            instructions=self._instructions, code_bytes=self._bytes, modes=self._modes,
            findings=_ordered(self._findings.values()), entered=list(self._entered.values()),
            pvm_cannot=_ordered(self._pvm.values()), indirect=self._indirect.told(), outside=self._outside.told(),
            undecodable=self._undecodable.told(), complete=self._complete)
        report.advice = _advise(report, technology)
        return report


def _mode_name(bits: int, *, protected: bool) -> str:
    if bits == 64:
        return _LONG
    return f"{bits}-bit protected mode" if protected or bits == 32 else _REAL


def _ordered(findings: Iterable[Finding]) -> list[Finding]:
    order = list(Kind)
    return sorted(findings, key=lambda f: (order.index(f.kind), f.mode, -f.count, f.family))


def _advise(report: Report, technology: Technology) -> Advice:
    """The mode this image should run in on a host of this technology, and the first rule that says so."""
    sixty_four = report.modes[_LONG]
    if sixty_four or any("long" in step.mode for step in report.entered):
        where = tuple(step.address for step in report.entered if "long" in step.mode)[:SHOWN]
        reason = (f"{sixty_four} instructions of 64-bit code are reachable" if sixty_four
                  else "it switches to 64-bit long mode")
        return _bound("64-bit", f"{reason}, and a 64-bit guest needs hardware virtualization", where, technology)
    esoteric = [finding for finding in report.findings if finding.kind is Kind.ESOTERIC]
    if esoteric:
        names = ", ".join(dict.fromkeys(finding.family for finding in esoteric))
        where = tuple(address for finding in esoteric for address in finding.addresses)[:SHOWN]
        return _bound("esoteric", f"it uses esoteric instructions ({names}), which software virtualization "
                      "of the manual's kind does not handle", where, technology)
    if technology == "none":
        return Advice("software", "no-hardware", "nothing in it needs hardware virtualization, and this host has none")
    if technology == "pvm":
        return Advice("software", "default", "nothing in it needs hardware virtualization, and KVM under PVM "
                      "emulates all code but that of 64-bit ring 3, which translation outruns")
    if report.patches:
        where = tuple(address for finding in report.findings
                      if finding.kind is Kind.SENSITIVE and finding.mode in _RING_1
                      for address in finding.addresses)[:SHOWN]
        return Advice("hardware", "patches", f"{report.patches} sensitive instructions in protected mode do not trap: "
                      "software virtualization would have to patch each, hardware runs them as they are", where)
    return Advice("hardware", "default", "both modes can run it; hardware runs it at full speed. Take software where "
                  "the other VMs of the host are software, to keep the modes unmixed")


def _bound(rule: str, reason: str, where: tuple[int, ...], technology: Technology) -> Advice:
    if technology == "none":
        return Advice("software", rule, f"{reason}; but this host has none, so it is left to the software engine, "
                      "which translates every instruction (`fallback = true`)", where)
    return Advice("hardware", rule, reason, where)
