"""What a simulation found: distributions without samples, and figures for each policy.

Theory.  A wait falls into a bucket of its power of two and the next three bits (HDR histograms):
at most 256 buckets for any number of waits, each at most an eighth wide; a quantile is the upper
bound of its bucket, so it errs to the safe side by at most 12.5 %.

Units: `_ns`; shares in host CPUs; ratios from 0 to 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

__all__ = ["Group", "PolicyResult", "Quantiles", "Waits", "merge_waits"]

_FRACTION = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantiles:
    """Of waits, in ns; all 0 where there were none."""

    count: int
    p50_ns: int
    p99_ns: int
    p999_ns: int
    max_ns: int


class Waits:
    """A histogram of times."""

    __slots__ = ("_counts", "_max")

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self._max = 0

    def add(self, wait_ns: int) -> None:
        bits = wait_ns.bit_length()
        key = bits << _FRACTION | (wait_ns >> bits - _FRACTION - 1 & 7) if bits > _FRACTION else wait_ns
        counts = self._counts
        counts[key] = counts[key] + 1 if key in counts else 1
        if wait_ns > self._max:
            self._max = wait_ns

    def join(self, other: Waits) -> None:
        for key, count in other._counts.items():
            self._counts[key] = self._counts.get(key, 0) + count
        self._max = max(self._max, other._max)

    def quantiles(self) -> Quantiles:
        total = sum(self._counts.values())
        ordered = sorted(self._counts.items())

        def at(part: float) -> int:
            seen = 0
            for key, count in ordered:
                seen += count
                if seen >= part * total:
                    return min(_upper(key), self._max)
            return 0

        return Quantiles(count=total, p50_ns=at(0.5), p99_ns=at(0.99), p999_ns=at(0.999), max_ns=self._max)


def _upper(key: int) -> int:
    """The largest value of a bucket."""
    bits = key >> _FRACTION
    if bits <= _FRACTION:
        return key
    return ((8 | key & 7) + 1 << bits - _FRACTION - 1) - 1


def merge_waits(waits: Iterable[Waits]) -> Waits:
    merged = Waits()
    for one in waits:
        merged.join(one)
    return merged


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The VMs of one [[vm]] table together."""

    name: str
    count: int
    mode: str
    weight: int
    behaviour: str
    due: float                        # mean of its VMs, in host CPUs, as the judge sees it
    received: float                   # mean
    received_least: float
    received_most: float
    error_most: float | None          # worst |received - due| of a VM; only of those that never sleep
    wait: Quantiles                   # from wanting the CPU to having it
    wake: Quantiles                   # the same, only after a sleep
    lost_mixed: float                 # of the CPU time received


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyResult:
    """One policy on one scenario. Errors, lag and fairness are of VMs that never sleep (None: there are none)."""

    policy: str
    seconds: float
    cpus: int
    vms: int
    share_error_mean: float | None    # |received - due|, in host CPUs
    share_error_most: float | None
    lag_most_ns: int | None           # worst |due - received| at the end of any second
    fairness: float | None            # Jain's index of received / due
    wait: Quantiles
    wake: Quantiles
    vm_switches_per_s: float          # of all host CPUs together
    mode_switches_per_s: float
    migrations_per_s: float
    decisions: int
    lost_mixed: float                 # predicted loss to mixing, of the CPU time delivered
    lost_switching: float             # to switching as such, mixed or not
    delivered: float                  # to VMs, of the capacity
    idle: float
    dispatching: float                # taken by decisions, of the capacity
    mode_residency: Mapping[str, float]
    groups: tuple[Group, ...]
