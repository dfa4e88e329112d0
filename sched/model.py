"""The scheduler's words: plain values that policies receive and return.

Units: `_ns` are nanoseconds of one host CPU; a *share* or *rate* is in host CPUs
(1.0 = one whole host CPU). A vCPU is named by its *slot*, its index in the shared table
(sched/shared.py); a slot is reused only after every dispatcher has let go of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NewType

__all__ = [
    "CAP_NONE", "LATENCIES", "LATENCY_DEFAULT", "WEIGHT_DEFAULT", "WEIGHT_MAX", "WEIGHT_MIN", "Ns", "Placement", "Slot",
    "VcpuLoad", "VmDemand",
]

Ns = NewType("Ns", int)
Slot = NewType("Slot", int)

WEIGHT_MIN: Final = 1
WEIGHT_DEFAULT: Final = 100      # cgroup v2's default
WEIGHT_MAX: Final = 10_000
CAP_NONE: Final = 0.0
# How soon a VM wants the CPU once it wants it; stored as its index.
LATENCIES: Final = ("normal", "low", "high")        # a zero is the default
LATENCY_DEFAULT: Final = LATENCIES[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class VmDemand:
    """What one VM asks for, as the entitlement computation sees it."""

    vm: str
    weight: int
    vcpus: int                     # how many of its vCPUs are runnable now
    cpus: frozenset[int]           # hard affinity, never empty
    cap: float = CAP_NONE          # in host CPUs, 0 = none
    reservation: float = 0.0       # in host CPUs


@dataclass(frozen=True, slots=True, kw_only=True)
class VcpuLoad:
    """One runnable vCPU, as the placement sees it."""

    slot: Slot
    entitled: float                # share of this vCPU, in host CPUs, 0..1
    lag_ns: int                    # owed (> 0) or ahead (< 0) over all CPUs, clamped
    cpus: frozenset[int]
    last_cpu: int | None           # where it ran last
    drift_ns: int = 0              # how its lag has changed since it came there
    mode: str = "software"


@dataclass(frozen=True, slots=True)
class Placement:
    """Which host CPU each vCPU lives on until the next placement, and at what rate."""

    cpu: Mapping[Slot, int]
    rate: Mapping[Slot, float]     # local share of that CPU; the rates on a CPU sum to at most 1
