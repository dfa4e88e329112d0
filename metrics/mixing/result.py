"""A finished measurement of what mixing costs, small enough to keep: what warnings, gauges and budgets read.

Theory.  An analysis (report.py) needs NumPy and the raw slices; what others need of it is a few intervals, the verdict,
and where and how it was measured, so that nobody takes an old kernel's or another machine's figure for this one's.
`MixingResult` is that, an immutable value, whoever measured: on demand (`mixvisor measure`) or online. It needs no
extra. Its file, `RESULT_FILE` in the state directory of a service, is one JSON object with the fields of this module;
it is replaced whole.

Invariants.  Every number is finite and `low <= value <= high`; a file that breaks that is refused with the field. A
result with doubts is *inconclusive*: its figures are for the sceptical to see, `usable` is what may be acted on.

Units: costs in us of CPU time a crossing; ratios are guest work where every switch crosses over guest work where none
does, at slices of `reference_slice_us`. Intervals are at 95 %.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

__all__ = ["RESULT_FILE", "Interval", "MeasuredHost", "MixingResult", "ResultError", "read_result", "write_result"]

RESULT_FILE: Final = "mixing.json"
FORMAT: Final = 1
MAX_BYTES: Final = 1 << 20
_STRICT: Final = ConfigDict(strict=True, extra="forbid")

Source = Literal["on-demand", "online"]
VerdictKind = Literal["penalty", "none", "gain", "inconclusive"]
Mode = Literal["software", "hardware"]


class ResultError(ValueError):
    """Not a result; the text says where and why."""


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and its 95 % interval."""

    __pydantic_config__ = _STRICT

    value: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, (self.value, self.low, self.high))) or not self.low <= self.value <= self.high:
            raise ValueError(f"{self.value} [{self.low}, {self.high}] is no interval")

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2

    def includes(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredHost:
    """What a figure depends on besides the guests: on another of these it says nothing."""

    __pydantic_config__ = _STRICT

    technology: str                  # vt-x, amd-v, pvm
    cpu_model: str
    kernel: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MixingResult:
    __pydantic_config__ = _STRICT

    source: Source
    measured_unix_s: float           # when it ended
    seconds: float                   # how long it took
    host: MeasuredHost
    cpu: int                         # host CPU
    dispatch: str
    guests: str                      # what ran, in words
    working_set_bytes: int | None    # of a VM, where it is known
    reference_slice_us: float
    slices: int                      # that were used
    verdict: VerdictKind
    headline: str                    # one sentence
    doubts: tuple[str, ...]          # why nothing can be concluded
    cost_us: Interval | None         # of a crossing, mean over both modes
    cost_us_by_victim: Mapping[Mode, Interval]
    null_us: Interval | None         # must include zero: predecessors of one mode contrasted
    control_us: Interval | None      # must include zero: A/A
    agreement_us: Interval | None    # must include zero: between two estimators
    switching_us: Interval | None    # of a switch within a mode

    @property
    def usable(self) -> bool:
        """There is a figure and nothing speaks against it (it may still include zero)."""
        return self.cost_us is not None and not self.doubts

    @property
    def ratio_by_victim(self) -> Mapping[Mode, Interval]:
        """Guest work of a victim where every switch crosses, over that where none does."""
        per = self.reference_slice_us
        return {mode: Interval(1 - cost.value / per, 1 - cost.high / per, 1 - cost.low / per)
                for mode, cost in self.cost_us_by_victim.items()}

    def is_of(self, host: MeasuredHost) -> bool:
        return self.host == host

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, data: object) -> MixingResult:
        """Raises ResultError."""
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ResultError(f"not a result of mixvisor measure of format {FORMAT}")
        try:
            return _READER.validate_json(json.dumps({key: value for key, value in data.items() if key != "format"}))
        except ValidationError as error:
            first = error.errors()[0]
            raise ResultError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error


_READER: Final = TypeAdapter(MixingResult)


def read_result(path: Path) -> MixingResult:
    """What `write_result` kept. Raises FileNotFoundError where there is none, ResultError for anything else."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ResultError(f"{path} cannot be read: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise ResultError(f"{path}: longer than {MAX_BYTES} bytes")
    try:
        return MixingResult.from_json(json.loads(data))
    except (ValueError, RecursionError) as error:
        raise ResultError(f"{path}: {error}") from error


def write_result(result: MixingResult, path: Path) -> None:
    """Replaced whole or not at all. Raises OSError."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(result.to_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
