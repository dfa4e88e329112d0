"""Which instruction caused each exit: counts by reason, instruction and address.

Theory.  An exit costs microseconds, decoding tens of them, and a guest leaves from few places: so
each place is decoded when it is first seen and afterwards found by (address, reason) in a dictionary.
What an engine must tell is where the vCPU stands; port I/O may be reported with the instruction
pointer before or behind the instruction (vm/engines/base.py), HLT and INT n are behind, so the
instruction is looked for on both sides and must be of the kind that the reason needs.

Kicks and interrupts from devices are nobody's instruction and are not counted here.

Invariants.  Bounded: `SITES_MAX` places, beyond which an exit is counted under its reason alone;
`LAST` newest exits.  Total over any guest state and memory.  Every call of `note` is counted once.
Poor: a place whose code changes keeps the text it was first seen with; an engine that gives only the
start of a block (Unicorn in memory-mapped access) is believed, and such places are marked.
"""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from ..engines.base import EXIT_KINDS, RIP, CpuState, ExitKind
from . import decode

__all__ = ["LAST", "SITES_MAX", "Ledger", "Site", "cause"]

SITES_MAX: Final = 4096
LAST: Final = 16
_BEHIND_MAX: Final = 4                 # prefixes and all: more is another instruction's tail

# What instruction a reason needs; a reason that is not here is any instruction's (a fault, a memory access).
_NEEDS: Final = {
    ExitKind.IO_IN: frozenset(("in", "insb", "insw", "insd")),
    ExitKind.IO_OUT: frozenset(("out", "outsb", "outsw", "outsd")),
    ExitKind.HALT: frozenset(("hlt",)),
    ExitKind.INTERRUPT: frozenset(("int", "int3", "int1", "into", "syscall", "sysenter")),
}


class Site:
    """One place that exits come from."""

    __slots__ = ("address", "count", "kind", "mnemonic", "mode", "text")

    def __init__(self, kind: int, address: int, mnemonic: str, text: str, mode: str) -> None:
        self.kind = kind
        self.address = address          # linear, of the instruction
        self.mnemonic = mnemonic        # "" where the bytes are no instruction, or the place is not told apart
        self.text = text
        self.mode = mode
        self.count = 0

    def to_json(self) -> dict[str, Any]:
        return {"reason": EXIT_KINDS[self.kind], "address": self.address, "mnemonic": self.mnemonic,
                "instruction": self.text, "mode": self.mode, "count": self.count}


class Ledger:
    """`where()`: linear address of CS:RIP, cheap. `state()`: the whole state, asked once a place."""

    def __init__(self, memory: mmap.mmap, where: Callable[[], int], state: Callable[[], CpuState]) -> None:
        self._memory = memory
        self._where = where
        self._state = state
        self._sites: dict[int, Site] = {}
        self._rest: dict[int, Site] = {}
        self._last: deque[Site] = deque(maxlen=LAST)

    def note(self, kind: int, *, behind: bool = False) -> None:
        """An exit of this kind happened here. `behind`: the instruction pointer is known to be behind it."""
        # One integer as key: quicker than a tuple. Kinds are fewer than 16.
        key = self._where() << 5 | kind << 1 | behind
        site = self._sites.get(key)
        if site is None:
            site = self._new(key, kind, behind)
        site.count += 1
        self._last.append(site)

    def _new(self, key: int, kind: int, behind: bool) -> Site:
        if len(self._sites) < SITES_MAX:
            state = self._state()
            address, mnemonic, text = cause(self._memory, state, ExitKind(kind), behind=behind)
            site = self._sites[key] = Site(kind, address, mnemonic, text, decode.mode_name(state))
            return site
        site = self._rest.get(kind)
        if site is None:
            site = self._rest[kind] = Site(kind, 0, "", f"(beyond the first {SITES_MAX} places)", "")
        return site

    def sites(self, limit: int) -> list[Site]:
        """The places with the most exits first, at most *limit*."""
        return sorted((*self._sites.values(), *self._rest.values()), key=lambda site: -site.count)[:limit]

    @property
    def places(self) -> int:
        return len(self._sites) + len(self._rest)

    def total(self) -> int:
        return sum(site.count for site in (*self._sites.values(), *self._rest.values()))

    def last(self) -> list[Site]:
        """The newest exits, the newest last; `count` is the place's, not the exit's."""
        return list(self._last)


def cause(memory: mmap.mmap, state: CpuState, kind: ExitKind, *, behind: bool) -> tuple[int, str, str]:
    """(linear address, mnemonic, text) of the instruction that caused an exit at this state."""
    needs = _NEEDS.get(kind)
    linear, bits = decode.linear_of(state), decode.bits_of(state)
    code = decode.read_code(memory, state, linear, decode.LONGEST)
    here = decode.instruction_at(code, state.gpr[RIP], bits) if code else None
    if not behind and here is not None and (needs is None or _plain(here[0]) in needs or kind is ExitKind.INTERRUPT):
        return linear, _plain(here[0]), f"{here[0]} {here[1]}".strip()
    if needs is not None:
        for size in range(_BEHIND_MAX, 0, -1):
            before = decode.read_code(memory, state, linear - size, size) if linear >= size else b""
            found = decode.instruction_at(before, state.gpr[RIP] - size, bits) if len(before) == size else None
            if found is not None and found[2] == size and _plain(found[0]) in needs:
                return linear - size, _plain(found[0]), f"{found[0]} {found[1]}".strip()
    return linear, "" if here is None else _plain(here[0]), decode.describe(memory, state)


def _plain(mnemonic: str) -> str:
    """Without `rep` and `lock`."""
    return mnemonic.rpartition(" ")[2]
