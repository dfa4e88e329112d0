"""What the commands that look into a guest share: how code, registers and exits are written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, Final

__all__ = ["code_lines", "exit_lines", "register_lines"]

_CODE_BYTES: Final = 20                # hex digits shown of an instruction; most have fewer
_GENERAL: Final = (("rax", "rbx", "rcx", "rdx"), ("rsi", "rdi", "rbp", "rsp"), ("r8", "r9", "r10", "r11"),
                   ("r12", "r13", "r14", "r15"), ("rip", "rflags"), ("cs", "ds", "es", "fs", "gs", "ss"),
                   ("cr0", "cr2", "cr3", "cr4", "efer"))
_NARROW: Final = frozenset(("cs", "ds", "es", "fs", "gs", "ss"))


def code_lines(code: Iterable[Sequence[Any]], here: int) -> list[str]:
    """A listing of [address, bytes in hex, text], with a mark at *here*."""
    return [f"{'→' if address == here else ' '} {address:#10x}  {_spaced(data):<{_CODE_BYTES * 3 // 2}} {text}"
            for address, data, text in code]


def _spaced(data: str) -> str:
    shown = data if len(data) <= _CODE_BYTES else data[:_CODE_BYTES - 2] + ".."
    return " ".join(shown[at:at + 2] for at in range(0, len(shown), 2))


def register_lines(registers: Mapping[str, int]) -> list[str]:
    """A row for each kind of register; 64-bit halves that are all zero everywhere are left out."""
    general = [registers.get(name, 0) for row in _GENERAL[:5] for name in row]
    digits = 16 if any(value >> 32 for value in general) else 8
    rows = [row for row in _GENERAL if digits == 16 or not row[0].startswith(("r8", "r12"))]
    return ["  ".join(f"{name:<3} {registers[name]:0{4 if name in _NARROW else digits}x}"
                      for name in row if name in registers) for row in rows]


def exit_lines(exits: Iterable[Sequence[Any]]) -> list[str]:
    """[reason, address, text] in order; the same one several times in a row is one line."""
    lines = []
    for (reason, address, text), same in groupby(exits, key=tuple):
        times = sum(1 for _ in same)
        lines.append(f"  {reason:<10} {address:#10x}  {text}" + (f"   ({times} times)" if times > 1 else ""))
    return lines
