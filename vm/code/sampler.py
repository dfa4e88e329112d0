"""Where a guest spends its time: addresses and rings at regular moments of its CPU time.

Theory.  A timer of the process' own CPU time stops the vCPU so and so often a second; each time its
state is one sample. So a share of samples is a share of CPU time, whatever the VM is granted, and a
guest that sleeps has none. What the host does for an exit is spent at the place of that exit, and is
told apart by the accounts (vm/worker/status.py), which count every nanosecond of it.

The code of a place is read when it is first seen, through the page tables of that moment. Neighbouring
places make one stretch of hot code.

Invariants.  Bounded: `PLACES_MAX` places, `SECONDS_MAX` seconds; a sampler that nobody asks for ends
by itself. Total over any guest state.
Poor: the software engine stops at the starts of blocks only, so there a sample counts for the block that
comes next; code that changes is shown as it was first seen.
"""

from __future__ import annotations

import mmap
from collections import Counter
from dataclasses import dataclass
from typing import Any, Final

from ..engines.base import RIP, CpuState
from . import decode

__all__ = ["HZ_MAX", "PLACES_MAX", "SECONDS_MAX", "Sampler"]

HZ_MAX: Final = 1000
SECONDS_MAX: Final = 600
PLACES_MAX: Final = 4096
_WINDOW: Final = 48                    # bytes of code kept of each place
_HOT: Final = 32                       # places told
_STRETCHES: Final = 4                  # of hot code
_LINES: Final = 32                     # of each
_AFTER: Final = 8                      # instructions shown behind the last sample of a stretch
_ENDS: Final = ("j", "ret", "iret", "loop", "hlt", "syscall", "sysret", "sysexit", "ljmp")


@dataclass(slots=True)
class _Place:
    address: int
    ip: int
    bits: int
    ring: int
    mode: str
    code: bytes
    count: int = 0


class Sampler:
    """Samples from one start to one end; `sample` at each stop of a vCPU. Not thread-safe."""

    def __init__(self, memory: mmap.mmap, vcpus: int = 1) -> None:
        self._memory = memory
        self._vcpus = [0] * vcpus
        self._places: dict[tuple[int, int], _Place] = {}
        self.samples = 0
        self._rings = [0, 0, 0, 0]
        self._modes: Counter[str] = Counter()

    def sample(self, state: CpuState, vcpu: int = 0) -> None:
        address, ring = decode.linear_of(state), decode.ring_of(state)
        mode = decode.mode_name(state)
        self.samples += 1
        self._vcpus[vcpu] += 1
        self._rings[ring] += 1
        self._modes[mode] += 1
        place = self._places.get((address, ring))
        if place is None:
            if len(self._places) >= PLACES_MAX:
                return
            place = self._places[address, ring] = _Place(
                address, state.gpr[RIP], decode.bits_of(state), ring, mode,
                decode.read_code(self._memory, state, address, _WINDOW))
        place.count += 1

    def told(self) -> dict[str, Any]:
        """The result: samples by ring, mode and vCPU, hottest places, hottest code."""
        hottest = sorted(self._places.values(), key=lambda place: -place.count)
        return {
            "samples": self.samples, "rings": list(self._rings), "modes": dict(self._modes),
            "vcpus": list(self._vcpus), "places": len(self._places),
            "hot": [{"address": place.address, "count": place.count, "ring": place.ring, "mode": place.mode,
                     "instruction": _first(place)} for place in hottest[:_HOT]],
            "code": [_told(stretch) for stretch in self._stretches()[:_STRETCHES]],
        }

    def _stretches(self) -> list[list[_Place]]:
        """Places whose code hangs together, the hottest stretch first."""
        stretches: list[list[_Place]] = []
        for place in sorted(self._places.values(), key=lambda place: (place.ring, place.bits, place.address)):
            last = stretches[-1][-1] if stretches else None
            near = (last is not None and (last.ring, last.bits) == (place.ring, place.bits)
                    and place.address - last.address <= len(last.code))
            if near:
                stretches[-1].append(place)
            else:
                stretches.append([place])
        return sorted(stretches, key=lambda stretch: -sum(place.count for place in stretch))


def _first(place: _Place) -> str:
    found = decode.instruction_at(place.code, place.ip, place.bits)
    return "" if found is None else f"{found[0]} {found[1]}".strip()


def _told(stretch: list[_Place]) -> dict[str, Any]:
    """A stretch with its samples at each instruction, from its hottest part."""
    hottest = max(stretch, key=lambda place: place.count)
    # A long stretch is cut around its hottest place: a few places before it and what follows.
    at = stretch.index(hottest)
    shown = stretch[max(0, at - _LINES // 4):]
    first = shown[0]
    code = bytearray()
    for place in shown:
        if place.address - first.address > len(code):
            break
        code[place.address - first.address:] = place.code
    counts = {place.address: place.count for place in shown}
    last = max((address for address in counts if address < first.address + len(code)), default=first.address)
    lines: list[list[Any]] = []
    for line in decode.disassemble(bytes(code), first.address, first.bits, _LINES, first.ip):
        lines.append([line.address, line.code.hex(), line.text, counts.get(line.address, 0)])
        behind = line.address >= last
        if behind and (line.text.startswith(_ENDS) or sum(row[0] > last for row in lines) >= _AFTER):
            break
    return {"count": sum(place.count for place in stretch), "ring": first.ring, "mode": first.mode, "lines": lines}
