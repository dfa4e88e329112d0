"""What the registers hold, as far as straight-line code says: known bits along one path.

Theory.  A boot sector says where it goes by constants: it copies itself to a segment it loads by
immediate, jumps far through a pointer beside it, sets one bit of CR0.  So each register is a pair
(mask of known bits, their values), and the handful of instructions that boot code computes with are
interpreted on it.  Whatever else writes a register makes it unknown.

Invariants.  Never wrong about a path that is executed straight from its start with the given
initial state and memory; total for any text of capstone's.  Poor: memory that the code itself wrote
is not followed (only what the image holds), and at a call all but the frame pointer and the segments
is forgotten.  So what comes of it is a guess about real executions, and is used to find more code,
never to leave any out.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

__all__ = ["Registers"]

_ALL: Final = (1 << 64) - 1
_SEGMENTS: Final = ("cs", "ds", "es", "ss", "fs", "gs")


def _register_table() -> dict[str, tuple[str, int, int]]:
    """Name -> (whole register, shift, mask)."""
    table: dict[str, tuple[str, int, int]] = {}
    for letter in "abcd":
        whole = f"r{letter}x"
        table |= {f"{letter}l": (whole, 0, 0xFF), f"{letter}h": (whole, 8, 0xFF), f"{letter}x": (whole, 0, 0xFFFF),
                  f"e{letter}x": (whole, 0, 0xFFFF_FFFF), whole: (whole, 0, _ALL)}
    for name in ("si", "di", "bp", "sp"):
        whole = f"r{name}"
        table |= {f"{name}l": (whole, 0, 0xFF), name: (whole, 0, 0xFFFF), f"e{name}": (whole, 0, 0xFFFF_FFFF),
                  whole: (whole, 0, _ALL)}
    for number in range(8, 16):
        whole = f"r{number}"
        table |= {f"{whole}b": (whole, 0, 0xFF), f"{whole}w": (whole, 0, 0xFFFF),
                  f"{whole}d": (whole, 0, 0xFFFF_FFFF), whole: (whole, 0, _ALL)}
    table |= {name: (name, 0, 0xFFFF) for name in _SEGMENTS}
    table |= {f"cr{number}": (f"cr{number}", 0, _ALL) for number in (0, 2, 3, 4, 8)}
    table["rip"] = ("rip", 0, _ALL)
    return table


_TABLE: Final = _register_table()
_MEMORY: Final = re.compile(r"^(?:(\w+) ptr )?(?:([c-gs]s):)?\[([^\]]+)\]$")
_WIDTHS: Final = {"byte": 1, "word": 2, "dword": 4, "qword": 8}
_READS_ONLY: Final = frozenset(("cmp", "test", "bt", "out", "push", "cli", "sti", "cld", "std", "nop", "lgdt", "lidt",
                                "lldt", "ltr", "lmsw", "hlt", "clc", "stc", "invlpg", "wrmsr"))
_ARITHMETIC: Final[dict[str, Callable[[int, int], int]]] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "shl": lambda a, b: a << (b & 63),
    "shr": lambda a, b: a >> (b & 63),
}
# Instructions that write registers they do not name.
_IMPLICIT: Final = {
    "mul": ("rax", "rdx"), "div": ("rax", "rdx"), "idiv": ("rax", "rdx"), "cwd": ("rdx",), "cdq": ("rdx",),
    "cbw": ("rax",), "cwde": ("rax",), "cpuid": ("rax", "rbx", "rcx", "rdx"), "rdtsc": ("rax", "rdx"),
    "lodsb": ("rax", "rsi"), "lodsw": ("rax", "rsi"), "lodsd": ("rax", "rsi"), "stosb": ("rdi",),
    "stosw": ("rdi",), "stosd": ("rdi",), "movsb": ("rsi", "rdi"), "movsw": ("rsi", "rdi"),
    "movsd": ("rsi", "rdi"), "scasb": ("rdi",), "cmpsb": ("rsi", "rdi"), "aam": ("rax",), "aad": ("rax",),
    "lahf": ("rax",), "popaw": tuple(f"r{n}" for n in ("ax", "bx", "cx", "dx", "si", "di", "bp")),
    "popal": tuple(f"r{n}" for n in ("ax", "bx", "cx", "dx", "si", "di", "bp")),
    "int": ("rax", "rbx", "rcx", "rdx"), "xlatb": ("rax",), "imul": ("rax", "rdx"),
}
_REP: Final = ("rcx",)
STACK_DEPTH: Final = 16


class Registers:
    """Known bits of every register at one point of a path. `read(linear, size)` gives image bytes."""

    __slots__ = ("_known", "_stack", "gdt")

    def __init__(self) -> None:
        self._known: dict[str, tuple[int, int]] = {"efer": (_ALL, 0)}
        self._stack: list[tuple[int, int]] = []
        self.gdt: tuple[int, int] | None = None         # (linear base, limit)

    def copy(self) -> Registers:
        other = Registers.__new__(Registers)
        other._known, other._stack, other.gdt = dict(self._known), list(self._stack), self.gdt
        return other

    def after_call(self) -> Registers:
        """What a callee leaves as it was, by habit: segments, frame pointer, control registers."""
        other = Registers()
        keep = (*_SEGMENTS, "rbp", "cr0", "cr3", "cr4", "efer")
        other._known = {name: self._known[name] for name in keep if name in self._known}
        other.gdt = self.gdt
        return other

    # -- values ------------------------------------------------------------------------------

    def bits(self, name: str) -> tuple[int, int]:
        """(mask of known bits, their values) of a register by any of its names."""
        whole, shift, mask = _TABLE.get(name, (name, 0, _ALL))
        known, value = self._known.get(whole, (0, 0))
        return known >> shift & mask, value >> shift & mask

    def value(self, name: str) -> int | None:
        """The whole value of a register, when all of it is known."""
        known, value = self.bits(name)
        return value if known == _TABLE.get(name, (name, 0, _ALL))[2] else None

    def set(self, name: str, value: int, known: int = _ALL) -> None:
        whole, shift, mask = _TABLE.get(name, (name, 0, _ALL))
        old_known, old_value = self._known.get(whole, (0, 0))
        if mask == 0xFFFF_FFFF:
            old_known, old_value = old_known | ~mask & _ALL, old_value & mask      # a 32-bit write clears the rest
        keep = ~(mask << shift) & _ALL
        known &= mask
        self._known[whole] = (old_known & keep | known << shift, old_value & keep | (value & known) << shift)

    def forget(self, name: str) -> None:
        self.set(name, 0, 0)

    def address(self, operand: str, *, protected: bool) -> int | None:
        """Linear address of a memory operand; None where its parts are not known."""
        match = _MEMORY.match(operand)
        if match is None:
            return None
        parts = match[3].replace(" - ", " + -").split(" + ")
        offset = 0
        for part in parts:
            name, _, scale = part.partition("*")
            if name in _TABLE:
                value = self.value(name)
                if value is None:
                    return None
                offset += value * (int(scale) if scale else 1)
            else:
                try:
                    offset += int(part, 0)
                except ValueError:
                    return None              # rip-relative and the like
        if protected:
            return offset & 0xFFFF_FFFF
        by_stack = any(part in ("bp", "sp", "ebp", "esp") for part in parts)
        selector = self.value(match[2] or ("ss" if by_stack else "ds"))
        return None if selector is None else (selector << 4) + (offset & 0xFFFF)

    def pops(self, count: int) -> list[int] | None:
        """The newest *count* pushed values, newest first, when all are known. Nothing is popped."""
        newest = self._stack[:-count - 1:-1]
        if len(newest) < count or any(known & 0xFFFF_FFFF != 0xFFFF_FFFF for known, _ in newest):
            return None
        return [value for _, value in newest]

    # -- instructions ------------------------------------------------------------------------

    def step(self, mnemonic: str, operands: str, read: Callable[[int, int], bytes], *, protected: bool) -> None:
        """The effect of one instruction that does not jump."""
        repeated, _, name = mnemonic.rpartition(" ")
        for register in _IMPLICIT.get(name, ()):
            self.forget(register)
        if repeated.startswith("rep"):
            for register in _REP:
                self.forget(register)
        if not operands or name in _READS_ONLY:
            if name == "push":
                self._push(operands)
            elif name == "wrmsr" and self.value("ecx") == 0xC000_0080:
                self._known["efer"] = self.bits("eax")
            elif name == "lmsw":
                known, value = self.bits(operands)
                self.set("cr0", value, known & 0xF)
            elif name == "clts":
                self.set("cr0", 0, 8)
            return
        target, _, source = operands.partition(", ")
        if name == "xchg":
            self.forget(source)
        if target not in _TABLE:
            return
        if name == "pop":
            known, value = self._stack.pop() if self._stack else (0, 0)
            self.set(target, value, known)
        elif name in ("mov", "movzx"):
            self.set(target, *self._source(source, target, read, protected=protected))
        elif name in ("xor", "sub") and target == source:
            self.set(target, 0)
        elif name in ("or", "and", "xor"):
            self._logic(name, target, source)
        elif name == "lea":
            # An offset, not an address: the segment's base is not in it.
            offset = self.address(re.sub(r"^\w+ ptr |[c-gs]s:", "", source), protected=True)
            self.forget(target) if offset is None else self.set(target, offset)
        elif name in ("inc", "dec"):
            self._step_by_one(target, 1 if name == "inc" else -1)
        elif name in _ARITHMETIC:
            value, (known, by) = self.value(target), self._immediate(source)
            known_all = value is not None and known == _ALL
            self.set(target, _ARITHMETIC[name](value, by)) if known_all and value is not None else self.forget(target)
        elif name == "imul" or name not in ("jmp", "call"):
            self.forget(target)

    def _push(self, operand: str) -> None:
        known, value = self._immediate(operand)
        if not known and operand in _TABLE:
            known, value = self.bits(operand)
            if known == _TABLE[operand][2]:
                known = _ALL
        self._stack.append((known, value))
        del self._stack[:-STACK_DEPTH]

    def _immediate(self, text: str) -> tuple[int, int]:
        try:
            return _ALL, int(text, 0) & _ALL
        except ValueError:
            if text in _TABLE:
                value = self.value(text)
                return (0, 0) if value is None else (_ALL, value)
            return 0, 0

    def _source(self, text: str, target: str, read: Callable[[int, int], bytes], *,
                protected: bool) -> tuple[int, int]:
        """(value, known) of the right-hand side of a move."""
        if text in _TABLE:
            known, value = self.bits(text)
            return value, known
        known, value = self._immediate(text)
        if known:
            return value, known
        match = _MEMORY.match(text)
        at = self.address(text, protected=protected)
        if match is None or at is None:
            return 0, 0
        width = _WIDTHS.get(match[1] or "", 0)
        data = read(at, width) if width else b""
        if not width or len(data) < width:
            return 0, 0
        return int.from_bytes(data, "little"), _ALL

    def _logic(self, name: str, target: str, source: str) -> None:
        known, value = self.bits(target)
        by_known, by = self._immediate(source)
        if not by_known:
            self.forget(target)
        elif name == "or":
            self.set(target, value | by, known | by)
        elif name == "and":
            self.set(target, value & by, known | ~by)
        else:
            self.set(target, value ^ by, known)

    def _step_by_one(self, target: str, by: int) -> None:
        known, value = self.bits(target)
        if known == _TABLE[target][2]:
            self.set(target, value + by)
        else:
            self.set(target, value ^ 1, known & 1)          # the lowest bit flips whatever the rest is
