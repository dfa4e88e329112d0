"""The built-in guests: small programs for demonstrations, tests and measurements.

Theory.  A built-in guest is a flat image (`vm/engines/entry.py` has the start state) whose
assembly source lies beside the bytes; a test re-assembles every one.  The workloads enter
ring 3 of long mode first, because there every kind of hardware virtualization, PVM too, runs
code natively: the same image from the same state on both engines, so that a comparison
of modes compares nothing else.  They count progress in a u64 in guest memory, read from outside
without an exit.

Parameters are u64 words that the host writes before the start (`pokes`); 0 means the default.
Units are in the names or kinds: `size` is bytes.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

__all__ = ["BUILTIN", "PROGRESS_ADDRESS", "Guest", "Parameter", "image", "memory_needed", "pokes"]

KIB: Final = 1024
MIB: Final = 1024 * 1024
LOAD: Final = 0x10000
PROGRESS_ADDRESS: Final = 0x20000
PARAMETER_ADDRESS: Final = 0x20018
WORKING_SET_ADDRESS: Final = 2 * MIB


@dataclass(frozen=True, slots=True)
class Parameter:
    """One number a guest takes. `kind` says how a person writes it: `256K` or a plain integer."""

    address: int
    default: int
    kind: Literal["size", "int"]
    minimum: int
    maximum: int
    power_of_two: bool = False
    description: str = ""

    def problem(self, value: int) -> str | None:
        """What is wrong with *value*, in words that follow "must be"; None when it is fine."""
        if not self.minimum <= value <= self.maximum:
            return f"from {self.minimum} to {self.maximum}"
        if self.power_of_two and value & (value - 1):
            return "a power of two"
        return None


@dataclass(frozen=True, slots=True)
class Guest:
    name: str
    description: str
    bits: Literal[16, 32, 64]
    load: int = LOAD
    entry: int = LOAD
    progress: int | None = None            # guest-physical address of the u64, None: it counts nothing
    params: Mapping[str, Parameter] = field(default_factory=dict)
    min_memory: int = MIB                  # bytes, with default parameters


_WORKING_SET: Final = Parameter(
    PARAMETER_ADDRESS, 256 * KIB, "size", 4 * KIB, 1024 * MIB, power_of_two=True,
    description="bytes that the loads range over")
_BATCH: Final = Parameter(
    PARAMETER_ADDRESS, 1000, "int", 1, 1_000_000_000,
    description="ALU rounds between two port writes")

BUILTIN: Final[Mapping[str, Guest]] = {guest.name: guest for guest in (
    Guest("hello", "prints a line on the serial port and ends", 16),
    Guest("alu", "computes; a count is 100 rounds of 4 ALU operations", 64,
          progress=PROGRESS_ADDRESS),
    Guest("randmem", "loads at random; a count is 8 dependent loads", 64,
          progress=PROGRESS_ADDRESS, params={"working_set": _WORKING_SET}, min_memory=4 * MIB),
    Guest("portio", "computes, then writes to port 0x80; a count is one write", 64,
          progress=PROGRESS_ADDRESS, params={"batch": _BATCH}),
    Guest("rings", "goes from ring 3 to ring 0 and back; a count is one round trip", 64,
          progress=PROGRESS_ADDRESS),
)}


def image(name: str) -> bytes:
    """The assembled bytes of a built-in guest. Raises KeyError for an unknown name."""
    guest = BUILTIN[name]
    return importlib.resources.files(__name__).joinpath(f"{guest.name}.bin").read_bytes()


def pokes(name: str, values: Mapping[str, int]) -> list[tuple[int, int]]:
    """(address, u64) to write before the start: *values*, and defaults for what they leave out.

    Raises KeyError for an unknown parameter, ValueError for a value outside its limits.
    """
    guest = BUILTIN[name]
    unknown = values.keys() - guest.params.keys()
    if unknown:
        raise KeyError(f"{name} has no parameter {sorted(unknown)[0]!r}")
    words: list[tuple[int, int]] = []
    for key, parameter in guest.params.items():
        value = values.get(key, parameter.default)
        problem = parameter.problem(value)
        if problem is not None:
            raise ValueError(f"{key} of {name} is {value}; it must be {problem}")
        words.append((parameter.address, value))
    return words


def memory_needed(name: str, values: Mapping[str, int]) -> int:
    """Bytes of memory the guest needs with these parameters."""
    guest = BUILTIN[name]
    if "working_set" in guest.params:
        working_set = values.get("working_set", guest.params["working_set"].default)
        return max(guest.min_memory, WORKING_SET_ADDRESS + working_set)
    return guest.min_memory
