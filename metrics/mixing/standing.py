"""What the online estimate means: the verdict and its doubts, in words and as a `MixingResult`.

Theory.  The same four verdicts as of a measurement on demand (report.py), on the same terms: a figure is told only
while nothing speaks against it. Where nothing can be told at all, the headline says why and what would change it;
nobody should have to guess whether "no figure" means "no cost". Working sets are not known of guests in general, but
what they do to caches is seen: where a VM loses more the longer it was away, a part of every cost is refill of caches,
which depends on the length of slices and not on modes alone.

Pure. Units: as in result.py (us). Where it is poor: it speaks for the guests and the minutes that were seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from .online import CHECKED_AT, MODES, Figure, OnlineEstimate
from .result import Interval, MeasuredHost, MixingResult, Mode, VerdictKind

__all__ = ["LEAST_USED", "WANTED", "Circumstances", "caveats", "to_result"]

EACH_AT: Final = 1 - (1 - CHECKED_AT) / 2      # two nulls are looked at
LEAST_USED: Final = 0.2            # of the slices of VMs that can be seen: fewer, and other work decides
WANTED: Final = 0.002              # half-width as a part of a slice, to call an interval with zero in it nothing
OF_COST: Final = 0.5               # refill beyond this part of the cost is worth a word


@dataclass(frozen=True, slots=True, kw_only=True)
class Circumstances:
    """What is known of the service besides its slices."""

    host: MeasuredHost
    dispatch: str
    policy: str
    random_order: bool
    running: Mapping[Mode, int]              # VMs that run now
    countless: Mapping[Mode, int]            # of those, that keep no progress counter
    together: bool                           # VMs of both modes ran on one host CPU lately
    instructions: str                        # why guest instructions cannot stand in for a counter; "" where they do
    now_unix_s: float


def to_result(estimate: OnlineEstimate, around: Circumstances) -> MixingResult:
    """What can be said by now."""
    doubts = _doubts(estimate)
    kind, headline = _verdict(estimate, around, doubts)
    cost = _interval(estimate.cost)
    return MixingResult(
        source="online", measured_unix_s=around.now_unix_s, seconds=estimate.seconds, host=around.host, cpu=-1,
        dispatch=around.dispatch,
        guests=", ".join(f"{count} {mode}" for mode, count in estimate.measured_vms.items()) + " VMs of this service",
        working_set_bytes=None, reference_slice_us=estimate.slice_ns / 1e3, slices=estimate.slices, verdict=kind,
        headline=headline, doubts=doubts, cost_us=cost,
        cost_us_by_victim={mode: one for mode, e in estimate.by_victim.items() if (one := _interval(e)) is not None},
        null_us=_interval(estimate.null), control_us=None, agreement_us=None,
        switching_us=_interval(estimate.switching))


def caveats(estimate: OnlineEstimate) -> tuple[str, ...]:
    """What a reader of a sound figure should know."""
    notes: list[str] = []
    cost, refill = estimate.cost, estimate.refill
    if refill is not None and cost is not None and refill.bounds(CHECKED_AT)[0] > 0.0 \
            and refill.value > OF_COST * abs(cost.value):
        notes.append(
            f"Working sets: a VM that was away for six slices or more loses {_pm(refill)} more than one that was away "
            "for two, so the VMs evict each other from the caches. That is no cost of modes; it is accounted for, but "
            "the figure holds for these guests at this length of slices.")
    if estimate.null is None and estimate.by_victim:
        notes.append("The built-in null needs two VMs of a mode beside one of the other: it is not told here.")
    for mode in MODES:
        if estimate.by_victim and mode not in estimate.by_victim:
            notes.append(
                f"What {mode} VMs lose is not told apart from an ordinary switch: that takes two {mode} VMs with a "
                "progress counter on one host CPU with a VM of the other mode. The work of leaving a VM is charged "
                "to its successor, so one side alone may be too high or too low.")
    return tuple(notes)


def _verdict(
    estimate: OnlineEstimate, around: Circumstances, doubts: Sequence[str],
) -> tuple[VerdictKind, str]:
    cost = estimate.cost
    if cost is None and not estimate.by_victim:
        return "inconclusive", _why_nothing(estimate, around)
    if doubts:
        return "inconclusive", "Inconclusive: the measurement does not pass its own checks."
    if cost is None:
        mode, one = next(iter(estimate.by_victim.items()))
        return "inconclusive", (f"Inconclusive: only what {mode} VMs lose is told ({_pm(one)} a crossing), and a "
                                "crossing is paid for by both sides.")
    low, high = cost.bounds()
    if low > 0:
        return "penalty", f"A crossing between modes costs {_us(cost.value)} ({_us(low)} to {_us(high)})."
    if high < 0:
        return "gain", "Mixing costs nothing here; crossings were even quicker than other switches."
    if cost.half_width() <= WANTED * estimate.slice_ns:
        return "none", f"No price of mixing was found: at most {_us(max(-low, high))} a crossing."
    return "inconclusive", (f"Inconclusive: zero is in the interval ({_pm(cost)} a crossing), which is still too wide "
                            "to call that nothing.")


def _why_nothing(estimate: OnlineEstimate, around: Circumstances) -> str:
    """Nothing is told: the first reason that stands in the way."""
    missing = [mode for mode in MODES if not around.running.get(mode)]
    if missing:
        return f"Nothing to measure: no {' and no '.join(missing)} VM runs, so modes do not mix."
    if not around.random_order:
        return ("Not measured: the order of slices is fixed (random_order = 0 of [scheduler]), and then nobody can "
                "tell what a predecessor's mode costs.")
    if around.policy == "kernel" or around.dispatch == "plain":
        return "Not measured: the kernel alone schedules, so it is not known who ran before whom."
    seen = [mode for mode in MODES if around.running[mode] > around.countless.get(mode, 0)]
    if not seen:
        return ("Unknown: no VM keeps a progress counter (`progress` of [[vm]]; built-in guests have one)"
                + (f", and {around.instructions}" if around.instructions else "") + ".")
    if not around.together:
        return "Nothing to measure: software and hardware VMs have not shared a host CPU lately."
    if around.dispatch != "precise" and estimate.offered > 1000 and estimate.slices < LEAST_USED * estimate.offered:
        return (f"Inconclusive: under {around.dispatch} dispatch slices are not exact, and too few can be used "
                f"({estimate.slices} of {estimate.offered}).")
    if estimate.blocks >= 60:
        return ("Inconclusive: the VMs' order leaves nothing to compare. It takes two VMs of a mode (with progress "
                "counters) that share a host CPU with one of the other, all wanting the CPU.")
    return f"Inconclusive so far: {estimate.seconds:.0f} s of slices are too few to say anything."


def _doubts(estimate: OnlineEstimate) -> tuple[str, ...]:
    return tuple(
        f"which VM of the other mode ran before should not matter to {mode} VMs, but it does: {_pm(null)} (the VMs of "
        "a mode are not alike, or something keeps time with the slices)"
        for mode, null in estimate.nulls.items() if not null.includes(0.0, EACH_AT))


def _interval(figure: Figure | None) -> Interval | None:
    """In us."""
    if figure is None:
        return None
    low, high = figure.bounds()
    try:
        return Interval(figure.value / 1e3, low / 1e3, high / 1e3)
    except ValueError:
        return None


def _us(ns: float) -> str:
    return f"{ns / 1e3:.1f} µs"


def _pm(figure: Figure) -> str:
    return f"{figure.value / 1e3:+.1f} ± {figure.half_width() / 1e3:.1f} µs"
