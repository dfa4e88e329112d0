"""Which instruction caused each exit: counts by reason, instruction and address.

Theory.  An exit costs microseconds, decoding tens of them, and a guest leaves from few places: so
each place is decoded when it is first seen and afterwards found by (address, reason) in a dictionary.
What an engine must tell is where the vCPU stands; port I/O may be reported with the instruction
pointer at or behind the instruction (vm/engines/base.py; KVM does both), so the instruction is looked for
on both sides: it must be of the kind that the reason needs, and use the port. Where both sides do (`out dx, al`
twice in a row), the side is believed on which this reason was found last.

Kicks and interrupts from devices are nobody's instruction and are not counted here.

Each vCPU has a ledger of its own, so nothing is counted twice or lost between threads; `together` adds them up.

Invariants.  Bounded: `SITES_MAX` places, beyond which an exit is counted under its reason alone;
`LAST` newest exits.  Total over any guest state and memory.  Every call of `note` is counted once.
Poor: a place whose code changes keeps the text it was first seen with; in memory-mapped access Unicorn
gives only the block, and so does this.
"""

from __future__ import annotations

import contextlib
import mmap
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, Final

from ..engines.base import EXIT_KINDS, RDX, RIP, CpuState, ExitKind
from . import decode

__all__ = ["LAST", "SITES_MAX", "Ledger", "Site", "cause", "together"]

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
_MEMORY: Final = frozenset((ExitKind.MMIO_READ, ExitKind.MMIO_WRITE))


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
    """`where()`: linear address of CS:RIP, cheap. `state()`: the whole state, asked once a place.

    blocks: in memory-mapped access the engine gives an earlier place of the same block, which is told as such.
    lock: held while a place is decoded, where several threads decode.
    """

    def __init__(self, memory: mmap.mmap, where: Callable[[], int], state: Callable[[], CpuState], *,
                 blocks: bool = False, lock: AbstractContextManager[Any] | None = None) -> None:
        self._memory = memory
        self._lock = lock or contextlib.nullcontext()
        self._last: deque[Site] = deque(maxlen=LAST)
        self.attach(where, state, blocks=blocks)
        self._known = 0
        self._places: dict[tuple[int, int], Site] = {}                  # by those of the instruction
        self._rest: dict[int, Site] = {}

    def attach(self, where: Callable[[], int], state: Callable[[], CpuState], *, blocks: bool) -> None:
        """Another engine goes on: which side of an instruction it stands on is learnt anew, places are kept.

        `note` is another one from then on.
        """
        self._where, self._state, self._blocks = where, state, blocks
        # For each reason, at and behind: by address as the engine gives it.
        self._sites: tuple[dict[int, Site], ...] = tuple({} for _ in range(2 * len(EXIT_KINDS)))
        self._side: dict[int, bool] = {}            # by reason: whether the engine stands behind the instruction
        self.note = self._noting()

    def _noting(self) -> Callable[..., None]:
        """`note`, as a closure: it is called at every exit, and half of a method's time goes into looking things up."""
        all_sites, where, new, remember, lock = self._sites, self._where, self._new, self._last.append, self._lock

        def note(kind: int, behind: bool = False, port: int | None = None) -> None:
            """An exit of this kind happened here, at a port access to *port*.

            behind: the instruction pointer is known to be behind the instruction.
            """
            sites = all_sites[kind + kind + behind]
            here = where()
            try:
                site = sites[here]
            except KeyError:
                with lock:
                    site = new(sites, here, kind, behind, port)
            site.count += 1
            remember(site)

        return note

    def _new(self, sites: dict[int, Site], where: int, kind: int, behind: bool, port: int | None) -> Site:
        if self._known < SITES_MAX:
            self._known += 1
            state = self._state()
            linear = decode.linear_of(state)
            if self._blocks and kind in _MEMORY:
                address, mnemonic, text = linear, "", "(in the block that is here)"
            else:
                prefers = behind or self._side.get(kind, False)
                address, mnemonic, text = cause(self._memory, state, ExitKind(kind), behind=prefers, port=port)
                if mnemonic:
                    self._side[kind] = address != linear
            site = self._places.get((kind, address))
            if site is None:
                site = self._places[kind, address] = Site(kind, address, mnemonic, text, decode.mode_name(state))
            sites[where] = site
            return site
        site = self._rest.get(kind)
        if site is None:
            site = self._rest[kind] = Site(kind, 0, "", f"(beyond the first {SITES_MAX} places)", "")
        return site

    def sites(self) -> tuple[Site, ...]:
        """All places so far, as they came. Whole also while another thread counts on."""
        return (*self._places.values(), *self._rest.values())

    def last(self) -> list[Site]:
        """The newest exits, the newest last; `count` is the place's, not the exit's."""
        return list(self._last)


def together(ledgers: Iterable[Ledger]) -> list[Site]:
    """The places of several vCPUs as one list, the most exits first. Others may count on meanwhile."""
    merged: dict[tuple[int, int], Site] = {}
    for ledger in ledgers:
        for site in ledger.sites():
            one = merged.get((site.kind, site.address))
            if one is None:
                one = merged[site.kind, site.address] = Site(
                    site.kind, site.address, site.mnemonic, site.text, site.mode)
            one.count += site.count
    return sorted(merged.values(), key=lambda site: -site.count)


def cause(memory: mmap.mmap, state: CpuState, kind: ExitKind, *, behind: bool,
          port: int | None = None) -> tuple[int, str, str]:
    """(linear address, mnemonic, text) of the instruction that caused an exit at this state.

    behind: look behind the instruction pointer first. The mnemonic is "" where no instruction fits.
    """
    sides = (_before, _at) if behind else (_at, _before)
    for side in sides:
        found = side(memory, state, kind, port)
        if found is not None:
            address, name, operands = found
            return address, _plain(name), f"{name} {operands}".strip()
    return decode.linear_of(state), "", decode.describe(memory, state)


def _fits(kind: ExitKind, name: str, operands: str, state: CpuState, port: int | None) -> bool:
    needs = _NEEDS.get(kind)
    if needs is not None and _plain(name) not in needs:
        return False
    if port is None:
        return True
    number = next((part for part in operands.split(", ") if part[:1].isdigit()), None)
    return (state.gpr[RDX] & 0xFFFF if number is None else int(number, 0)) == port


def _at(memory: mmap.mmap, state: CpuState, kind: ExitKind, port: int | None) -> tuple[int, str, str] | None:
    linear = decode.linear_of(state)
    code = decode.read_code(memory, state, linear, decode.LONGEST)
    found = decode.instruction_at(code, state.gpr[RIP], decode.bits_of(state)) if code else None
    # A fault is any instruction's, INT n is told to be behind.
    if found is None or (kind is not ExitKind.INTERRUPT and not _fits(kind, found[0], found[1], state, port)):
        return None
    return linear, found[0], found[1]


def _before(memory: mmap.mmap, state: CpuState, kind: ExitKind, port: int | None) -> tuple[int, str, str] | None:
    if kind not in _NEEDS:
        return None
    linear, bits = decode.linear_of(state), decode.bits_of(state)
    for size in range(_BEHIND_MAX, 0, -1):
        code = decode.read_code(memory, state, linear - size, size) if linear >= size else b""
        found = decode.instruction_at(code, state.gpr[RIP] - size, bits) if len(code) == size else None
        if found is not None and found[2] == size and _fits(kind, found[0], found[1], state, port):
            return linear - size, found[0], found[1]
    return None


def _plain(mnemonic: str) -> str:
    """Without `rep` and `lock`."""
    return mnemonic.rpartition(" ")[2]
