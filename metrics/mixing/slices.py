"""Raw slice records as columns, which of them can be used, and the file that keeps them.

Theory.  A dispatcher logs every slice: who ran, after whom, how much CPU time the kernel says it got, and the guest's
progress counter before and after. The dispatcher runs at a higher priority on the same CPU, so the readings
are taken while the thread is off it: they are exact. Everything that is estimated comes from these columns alone,
never from ratios of running counters.

A slice is *clean* when nothing but the order of VMs can have changed its rate: it ran about as long as planned, no
other VM ran in it, it did not touch a breath, and its VM has run since the last breath (a VM that was stopped in a
breath pays for going on in its next slice). The first slice of a stretch has no known predecessor and is left out
too.

The *reuse distance* of a slice is how many slices ago its VM ran last: 1 = it went on, 2 = one other VM was between.
Caches forget with distance whatever the modes are, so conditions are compared at equal distance only.

File: gzip'd CSV. The first line is `# ` and a JSON object: the format, the host, how it was measured, the VMs, the
blocks. Then a line of column names and a line for each slice, in order of time. Units: ns; progress in the guest's
own counts.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

__all__ = [
    "KINDS", "Block", "DataError", "Kind", "Mode", "Recording", "Slices", "Vm", "clean", "read", "reuse_distance",
    "stretches", "write",
]

Kind = Literal["random", "mixed", "mixed-swapped", "batched", "batched-swapped", "solo"]
Mode = Literal["software", "hardware"]
KINDS: Final[tuple[Kind, ...]] = ("random", "mixed", "mixed-swapped", "batched", "batched-swapped", "solo")
FORMAT: Final = "mixvisor-slices"
VERSION: Final = 1
MAX_BYTES: Final = 2 << 30       # of a file once unpacked
SHORTEST: Final = 0.7            # of the planned length
LONGEST: Final = 1.3
OTHERS: Final = 0.01             # of its run time, that other VMs may have run in a clean slice

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


class DataError(ValueError):
    """The file is not a recording; the text says where and why."""


@dataclass(frozen=True, slots=True)
class Vm:
    name: str
    mode: Mode


@dataclass(frozen=True, slots=True)
class Block:
    """A stretch of slices under one condition."""

    number: int                  # from 1; 0 stands for slices of no block
    kind: Kind
    replicate: int               # blocks of one replicate are compared with each other
    slice_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Slices:
    """One host CPU's slices in order of time; every column has the same length."""

    block: Ints                  # number of its block
    vm: Ints                     # index in the recording's VMs, -1 = none or a stranger
    previous: Ints               # of the slice before
    start_ns: Ints
    end_ns: Ints
    planned_ns: Ints             # how long it was to last
    run_ns: Ints                 # that the picked VM received
    others_ns: Ints              # that other VMs received meanwhile
    breath_ns: Ints
    progress: Ints               # of the guest's counter

    def __len__(self) -> int:
        return len(self.vm)

    @classmethod
    def from_rows(cls, rows: Sequence[Sequence[int]] | Ints) -> Slices:
        """Rows with the fields in the order of this class."""
        table = np.asarray(rows, dtype=np.int64).reshape(len(rows), len(COLUMNS))
        return cls(**{name: table[:, index].copy() for index, name in enumerate(COLUMNS)})

    def take(self, where: Bools) -> Slices:
        return Slices(**{name: getattr(self, name)[where] for name in COLUMNS})


COLUMNS: Final = tuple(field.name for field in fields(Slices))


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """All that an analysis needs. `about`: the host and how it was measured, plain JSON values."""

    vms: tuple[Vm, ...]
    blocks: tuple[Block, ...]
    slices: Slices
    about: Mapping[str, Any]

    def modes(self) -> Bools:
        """True = hardware, by VM."""
        return np.array([vm.mode == "hardware" for vm in self.vms], dtype=bool)


def stretches(slices: Slices) -> Ints:
    """Which uninterrupted stretch of one block each slice is in: a gap (lost records) begins another."""
    if not len(slices):
        return np.zeros(0, dtype=np.int64)
    new = np.ones(len(slices), dtype=bool)
    new[1:] = (slices.block[1:] != slices.block[:-1]) | (slices.start_ns[1:] != slices.end_ns[:-1])
    return np.cumsum(new)


def _since_last(slices: Slices, what: Ints) -> Ints:
    """What *what* grew by since the VM's slice before in the same stretch; -1 where there was none."""
    stretch = stretches(slices)
    grown = np.full(len(slices), -1, dtype=np.int64)
    for vm in np.unique(slices.vm):
        at = np.flatnonzero(slices.vm == vm)
        same = stretch[at[1:]] == stretch[at[:-1]]
        grown[at[1:][same]] = (what[at[1:]] - what[at[:-1]])[same]
    return grown


def reuse_distance(slices: Slices) -> Ints:
    """How many slices ago the VM ran last, in the same stretch; -1 where that is not known."""
    return _since_last(slices, np.arange(len(slices), dtype=np.int64))


def clean(slices: Slices) -> Bools:
    """Which slices can be used (see above). Their reuse distance is at least 1."""
    breaths = np.cumsum(slices.breath_ns > 0)
    planned = np.maximum(slices.planned_ns, 1)
    return (
        (slices.block > 0) & (slices.vm >= 0) & (slices.progress > 0) & (slices.breath_ns == 0)
        & (slices.run_ns >= SHORTEST * planned) & (slices.run_ns <= LONGEST * planned)
        & (slices.others_ns <= OTHERS * slices.run_ns)
        & (_since_last(slices, breaths.astype(np.int64)) == 0))


# -- the file ---------------------------------------------------------------------------------

# For people and other programs; both follow from the VM's name.
_DERIVED: Final = ("mode", "previous_mode")


def write(recording: Recording, path: Path) -> None:
    """Keep a recording. Raises OSError; a file that is there is replaced whole or not at all."""
    header = {"format": FORMAT, "version": VERSION, **recording.about,
              "vms": [asdict(vm) for vm in recording.vms], "blocks": [asdict(block) for block in recording.blocks]}
    names = [vm.name for vm in recording.vms] + [""]       # -1 is the last
    modes = [vm.mode for vm in recording.vms] + [""]
    columns = [getattr(recording.slices, name).tolist() for name in COLUMNS]
    partial = path.with_name(path.name + ".partial")
    try:
        with gzip.open(partial, "wt", newline="", compresslevel=6) as file:
            file.write("# " + json.dumps(header) + "\n")
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow((*COLUMNS, *_DERIVED))
            vm, previous = COLUMNS.index("vm"), COLUMNS.index("previous")
            for row in zip(*columns, strict=True):
                cells: list[object] = list(row)
                cells[vm], cells[previous] = names[row[vm]], names[row[previous]]
                rows.writerow((*cells, modes[row[vm]], modes[row[previous]]))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read(path: Path) -> Recording:
    """A recording that `write` kept. Raises DataError for anything else."""
    try:
        with gzip.open(path, "rb") as packed:
            data = packed.read(MAX_BYTES + 1)
    except gzip.BadGzipFile as error:
        raise DataError(f"{path}: not a recording of mixvisor measure: it is not packed, as those are") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if len(data) > MAX_BYTES:
        raise DataError(f"{path}: longer than {MAX_BYTES >> 30} GiB once unpacked")
    try:
        return _parse(io.StringIO(data.decode()))
    except (KeyError, TypeError, ValueError, OverflowError, csv.Error) as error:
        raise DataError(f"{path}: not a recording of mixvisor measure: {error}") from error


def _parse(text: io.StringIO) -> Recording:
    first = text.readline()
    if not first.startswith("# {"):
        raise DataError("its first line is not the description that it should be")
    header: dict[str, Any] = json.loads(first[2:])
    if header.pop("format", None) != FORMAT:
        raise DataError(f"its format is not {FORMAT!r}")
    if (version := header.pop("version", None)) != VERSION:
        raise DataError(f"it has version {version}, this program reads version {VERSION}")
    vms = tuple(Vm(str(vm["name"]), _one_of(vm["mode"], ("software", "hardware"))) for vm in header.pop("vms"))
    blocks = tuple(Block(int(b["number"]), _one_of(b["kind"], KINDS), int(b["replicate"]), int(b["slice_ns"]))
                   for b in header.pop("blocks"))
    index = {vm.name: number for number, vm in enumerate(vms)} | {"": -1}
    rows = csv.reader(text)
    if next(rows, None) != [*COLUMNS, *_DERIVED]:
        raise DataError("line 2 does not name the columns")
    named = [COLUMNS.index("vm"), COLUMNS.index("previous")]
    table: list[list[int]] = []
    for number, row in enumerate(rows, 3):
        try:
            table.append([index[cell] if at in named else int(cell)
                          for at, cell in zip(range(len(COLUMNS)), row, strict=False)])
            if len(row) != len(COLUMNS) + len(_DERIVED):
                raise ValueError(f"{len(row)} cells")
        except (KeyError, ValueError) as error:
            raise DataError(f"line {number}: {error}") from error
    return Recording(vms=vms, blocks=blocks, slices=Slices.from_rows(table), about=header)


def _one_of(value: Any, allowed: Sequence[Any]) -> Any:
    if value not in allowed:
        raise DataError(f"{value!r} is none of {', '.join(allowed)}")
    return value
