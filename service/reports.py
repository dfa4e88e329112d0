"""What a worker tells of its guest's inside, checked before anybody is shown it.

Theory.  A report travels from a process that runs hostile code to a person's terminal and to programs
that index into it. So each report has a shape, and an answer either has exactly that shape, every text
made printable and every number and list bounded, or it is refused as a whole.

A shape is: `str` (one printable line), `int` (0 to 2^64), `[shape]` (a list), a tuple of shapes (a list of
just these), a dict of names to shapes (an object with at least these; others are dropped), or `Counts`
(an object of short texts to numbers).
"""

from __future__ import annotations

from typing import Any, Final

from .backend import ServiceError
from .link import harmless

__all__ = ["SHAPES", "checked", "for_the_log"]

TEXT_MAX: Final = 240
LIST_MAX: Final = 1024


class Counts:
    """Shape of an object with free names and numbers for values."""


_LINE: Final = (int, str, str)                   # address, bytes in hex, text
SHAPES: Final[dict[str, Any]] = {
    "where": {"mode": str, "place": str, "address": int, "instruction": str, "registers": Counts,
              "code": [_LINE], "exits": [(str, int, str)], "post": [int]},
    "exits": {"total": int, "places": int, "sites": [
        {"reason": str, "address": int, "mnemonic": str, "instruction": str, "mode": str, "count": int}]},
    "profile": {},
    "profile-end": {
        "samples": int, "places": int, "rings": (int, int, int, int), "modes": Counts, "vcpus": [int],
        "hot": [{"address": int, "count": int, "ring": int, "mode": str, "instruction": str}],
        "code": [{"count": int, "ring": int, "mode": str, "lines": [(int, str, str, int)]}],
        "wall_ns": int, "cpu_ns": int, "host_ns": int, "sleeping_ns": int, "granularity": str},
}


def checked(op: str, answer: Any) -> Any:
    """The answer of an operation, fit to be shown. Raises ServiceError."""
    try:
        return _fit(answer, SHAPES[op])
    except (KeyError, TypeError, ValueError) as error:
        raise ServiceError(f"the worker's answer to '{op}' has not the shape of one") from error


def _fit(value: Any, shape: Any) -> Any:
    if shape is str:
        if not isinstance(value, str):
            raise TypeError
        return harmless(value)[:TEXT_MAX]
    if shape is int:
        if type(value) is not int or not 0 <= value < 1 << 64:
            raise ValueError
        return value
    if shape is Counts:
        if not isinstance(value, dict) or len(value) > LIST_MAX:
            raise TypeError
        return {harmless(name)[:TEXT_MAX]: _fit(count, int) for name, count in value.items()}
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            raise TypeError
        return {name: _fit(value[name], part) for name, part in shape.items()}
    if not isinstance(value, list) or len(value) > LIST_MAX:
        raise TypeError
    if isinstance(shape, tuple):
        return [_fit(item, part) for item, part in zip(value, shape, strict=True)]
    return [_fit(item, shape[0]) for item in value]


def for_the_log(report: dict[str, Any] | None) -> dict[str, Any]:
    """A death report for the log: the mode, the code around as text, the last exits."""
    if report is None:
        return {}
    here = report["address"]
    return {"mode": report["mode"], "place": report["place"],
            "listing": [f"{'>' if address == here else ' '} {address:#x}: {data}  {text}"
                        for address, data, text in report["code"]],
            "last_exits": [f"{reason} {address:#x} {text}" for reason, address, text in report["exits"]]}
