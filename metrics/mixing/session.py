"""A measurement while it runs: the design becomes a script, and the slices that come back become a recording.

Theory.  Blocks (design.py) are written one after another as entries (VM, length), each block behind a *rest*, where
VMs that are not measured get what they are owed. Entries are numbered as they are handed out, and a slice record
carries the number of its entry (sched/loan.py), so which block a slice belongs to is known and not guessed, however
many records were lost. The script is drawn without end; whoever plays it stops when the interval is narrow enough or
the time is over, and every beginning is nearly balanced.

Units: ns. Pure: randomness and slices are passed in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np

from .design import Roles, rounds, runs
from .slices import Block, Ints, Recording, Slices, Vm

__all__ = ["REST", "SLICE_COLUMNS", "Session", "WrongVms", "roles_of"]

REST: Final = -1
# What is needed of a slice, in this order; names as sched/loan.py has them.
SLICE_COLUMNS: Final = (
    "entry", "vm", "previous", "start_ns", "end_ns", "planned_ns", "run_ns", "others_ns", "breath_ns", "progress")


class WrongVms(ValueError):
    """Not two VMs of each mode; the text says what there is."""


def roles_of(vms: Sequence[Vm]) -> Roles:
    """Raises WrongVms."""
    hardware = [at for at, vm in enumerate(vms) if vm.mode == "hardware"]
    software = [at for at, vm in enumerate(vms) if vm.mode == "software"]
    if len(hardware) != 2 or len(software) != 2:
        raise WrongVms(
            "two hardware and two software VMs are needed, so that switches between modes can be compared with switches"
            f" within one; found {len(hardware)} hardware ({', '.join(vms[at].name for at in hardware) or 'none'}) and"
            f" {len(software)} software ({', '.join(vms[at].name for at in software) or 'none'})")
    return Roles((hardware[0], hardware[1]), (software[0], software[1]))


class Session:
    """vms: two of each mode. slices_ns: lengths of the blocks of conditions; reference_ns: of random order."""

    def __init__(
        self, vms: Sequence[Vm], slices_ns: Sequence[int], reference_ns: int, rng: np.random.Generator,
    ) -> None:
        self.vms = tuple(vms)
        self.reference_ns = reference_ns
        self._roles = roles_of(vms)
        self._rng = rng
        self._blocks: list[Block] = []
        self._starts: list[int] = []           # number of each block's first entry
        self._drawn = 0                        # entries, ever
        self._pending: list[tuple[int, int]] = []
        self._source = self._script(slices_ns)
        self._parts: list[Ints] = []

    # -- the script --------------------------------------------------------------------------

    def _script(self, slices_ns: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
        for blocks in rounds(slices_ns, self.reference_ns, self._rng):
            for block in blocks:
                self._blocks.append(block)
                self._starts.append(self._drawn)
                entries = [(vm, block.slice_ns) for run in runs(block, self._roles, self._rng)
                           for vm in run.cycle * run.times]
                yield [(REST, 0), *entries]

    def next_entries(self, count: int) -> list[tuple[int, int]]:
        """The next *count* entries; the same again until `sent` has said how many were taken."""
        while len(self._pending) < count:
            entries = next(self._source)
            self._drawn += len(entries)
            self._pending += entries
        return self._pending[:count]

    def sent(self, count: int) -> None:
        del self._pending[:count]

    # -- the slices --------------------------------------------------------------------------

    def add(self, rows: Sequence[Sequence[int]]) -> None:
        """Slices with SLICE_COLUMNS, oldest first."""
        if rows:
            self._parts.append(np.asarray(rows, dtype=np.int64).reshape(len(rows), len(SLICE_COLUMNS)))

    def recording(self, about: Mapping[str, Any]) -> Recording:
        """All of it so far."""
        table = np.concatenate(self._parts) if self._parts else np.zeros((0, len(SLICE_COLUMNS)), dtype=np.int64)
        entry = table[:, 0]
        which = np.searchsorted(np.asarray(self._starts), entry, side="right") - 1
        numbers = np.array([block.number for block in self._blocks] or [0], dtype=np.int64)
        table[:, 0] = np.where(entry >= 0, numbers[np.maximum(which, 0)], 0)
        seen = set(np.unique(table[:, 0]).tolist())
        return Recording(
            vms=self.vms, blocks=tuple(block for block in self._blocks if block.number in seen),
            slices=Slices.from_rows(table), about={**about, "reference_slice_ns": self.reference_ns})
