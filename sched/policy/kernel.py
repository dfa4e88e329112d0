"""The kernel baseline: weights become nice levels, and the kernel does the rest.

Theory.  The kernel's fair class gives a thread of nice level n a weight of about 1024 / 1.25**n
(`sched_prio_to_weight`, kernel/sched/core.c); ours of 100 is nice 0. There are only forty levels,
each 25 % from the next, so a weight is met to within a factor of sqrt(1.25): up to 12 % wrong,
and more beyond 15 and 8668, where the levels end. Caps and reservations have no counterpart.

It is a baseline for comparison and what to choose where the kernel's placement (caches, energy,
idle states) matters more than exact shares. cgroup weights would be exact, but a cgroup for each
VM needs a delegated cpu controller, and takes SCHED_IDLE its meaning between VMs (sched/linux.py).
"""

from __future__ import annotations

from math import log
from typing import Final

from ..model import WEIGHT_DEFAULT

__all__ = ["NICE_MAX", "NICE_MIN", "nice_of", "weight_of"]

NICE_MIN: Final = -20
NICE_MAX: Final = 19
# kernel/sched/core.c, sched_prio_to_weight: nice -20 to 19.
_KERNEL_WEIGHT: Final = (
    88761, 71755, 56483, 46273, 36291, 29154, 23254, 18705, 14949, 11916,
    9548, 7620, 6100, 4904, 3906, 3121, 2501, 1991, 1586, 1277,
    1024, 820, 655, 526, 423, 335, 272, 215, 172, 137,
    110, 87, 70, 56, 45, 36, 29, 23, 18, 15,
)
_NICE_0: Final = 1024


def weight_of(nice: int) -> float:
    """What a nice level is in our weights."""
    return _KERNEL_WEIGHT[nice - NICE_MIN] * WEIGHT_DEFAULT / _NICE_0


def nice_of(weight: int) -> int:
    """The nice level whose weight is nearest, by ratio; of two equally near the one nearer to 0."""
    if weight <= 0:
        raise ValueError(f"a weight must be positive, got {weight}")
    return min(range(NICE_MIN, NICE_MAX + 1),
               key=lambda nice: (abs(log(weight_of(nice) / weight)), abs(nice)))
