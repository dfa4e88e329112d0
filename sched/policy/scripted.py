"""The scripted picker: a host CPU's order is lent to a measurement, and nobody pays for it but the lenders.

Theory.  Some vCPUs *lend* their time: as long as the script (shared.py) has entries, each slice is the vCPU and the
length that the next entry names. Two rules keep that fair:

1. The lenders lend as one. What any of them runs is billed to all of them in proportion to their rates, so among
   themselves nobody is owed anything more or less afterwards than before, however uneven the script is. (The accounts
   that people see, charged from the kernel's own, are untouched by this: they say who ran.)
2. Those beside them are owed time meanwhile, as always. They get it at the script's *rests* (entries without a
   vCPU), and at the latest when together they are owed `OWED_MAX_NS`: then they alone are picked, as the fair policy
   would among them, until they are even. So a vCPU that lends nothing has its share over every quarter of a second
   and notices only a longer wait.

An entry whose vCPU is not here, asleep or out of budget is left out. Where the script has run dry the fair
policy picks.

Where it is poor: wakers beside the lenders wait for the rest; under `batch` the rests are fair, not batched.
Units: `_ns` of this host CPU.
"""

from __future__ import annotations

from typing import Final, Protocol

from ..model import Slot
from .fair import RATELIMIT_NS, SLICE_NS, Runqueue

__all__ = ["OWED_MAX_NS", "REST", "Script", "ScriptedRunqueue"]

REST: Final = -1                       # an entry's slot: the others' turn
OWED_MAX_NS: Final = 250_000_000
SHORTEST_NS: Final = 100_000
SKIP: Final = 64                       # entries left out in one pick


class Script(Protocol):
    def peek(self) -> tuple[int, int, int] | None:
        """(number, slot or REST, length in ns) of the next entry, None: there is none yet."""
        ...

    def advance(self) -> None: ...


class ScriptedRunqueue(Runqueue):
    """A `Runqueue` that plays *script* with the vCPUs that `lend` was told of."""

    def __init__(self, script: Script, slice_ns: int = SLICE_NS, ratelimit_ns: int = RATELIMIT_NS) -> None:
        super().__init__(slice_ns, ratelimit_ns)
        self._script = script
        self._lent: set[Slot] = set()
        self._resting = False
        self.length_ns = slice_ns      # of the slice that was picked last
        self.entry = 0                 # number of its entry + 1; 0: it is not of the script

    def lend(self, slot: Slot, lent: bool) -> None:
        (self._lent.add if lent else self._lent.discard)(slot)

    def remove(self, slot: Slot) -> int:
        self._lent.discard(slot)
        return super().remove(slot)

    def charge(self, slot: Slot, ran_ns: int) -> None:
        lenders = [e for e in self._awake if e.slot in self._lent]
        if ran_ns > 0 and slot in self._lent and self.is_awake(slot):
            total, whole = sum(e.weight for e in lenders), ran_ns
            for one in lenders:
                part = whole * one.weight // total
                ran_ns -= part
                super().charge(one.slot, part)
        super().charge(slot, ran_ns)

    def pick(self, current: Slot | None = None) -> Slot | None:
        self.entry, self.length_ns = 0, self._slice_ns
        owed = self._owed_to_others()
        self._resting = owed > 0.0 if self._resting else owed > OWED_MAX_NS
        for _ in range(SKIP):
            line = None if self._resting else self._script.peek()
            if line is None:
                break
            number, slot, length_ns = line
            self._script.advance()
            if slot == REST:
                self._resting = owed > 0.0
                continue
            entry = self._entries.get(Slot(slot))
            if entry is not None and entry.awake and not entry.parked and entry.slot in self._lent:
                self.entry, self.length_ns = number + 1, max(length_ns, SHORTEST_NS)
                return self._started(entry)
        return self._next_beside() if self._resting else super().pick(current)

    def _next_beside(self) -> Slot | None:
        """A rest is for those beside the lenders alone. What lenders owe each other is frozen while they lend, so if
        one of them could be picked here, one ahead of its share would leave the others owed time for ever.
        """
        return self._started(min(
            (e for e in self._awake if e.slot not in self._lent and not e.parked and e.start <= self._virtual),
            key=lambda e: e.deadline))

    def _owed_to_others(self) -> float:
        virtual, lent = self._virtual, self._lent
        return sum(e.weight * (virtual - e.v) for e in self._awake if e.slot not in lent and not e.parked)
