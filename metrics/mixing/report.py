"""Both estimators together, and the verdict: in words, and as figures with their bounds.

Theory.  The figure is the randomised order's (order.py): it is several times as precise. The blocks (blocks.py) check
it with another design on other slices of the same run, and show how the loss goes with the number of switches. A
figure is told only while nothing speaks against it: a control that is not zero, two estimators that disagree, or most
slices unusable make the verdict *inconclusive*, whatever the figure. These checks are made at 99 %, so that a sound
measurement is rarely thrown away (three checks: about one in thirty).

| verdict | when nothing speaks against it and |
|---|---|
| `penalty` | the 95 % interval lies above zero |
| `none` | it includes zero and is as narrow as was wanted |
| `gain` | it lies below zero: mixing was quicker |
| `inconclusive` | it includes zero and is wider than that, or there are too few data |

Units: times ns inside, us in words and JSON; losses are fractions of guest work. Where it is poor: the verdict is
about the guests that were measured, on this host, in this minute.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from .blocks import BlockEstimate, estimate_blocks
from .interval import CONFIDENCE, Estimate, combine
from .order import OrderEstimate, estimate_order
from .result import Interval, MeasuredHost, MixingResult, VerdictKind
from .slices import Mode, Recording

__all__ = ["Analysis", "Verdict", "analyse", "judge", "per_cent", "to_json", "to_result"]

CHECKED_AT: Final = 0.99
LEAST_USED: Final = 0.5              # of the slices
USUAL_SLICE_NS: Final = 5_000_000    # what a service uses unless it is told otherwise
WANTED: Final = 0.002                # half-width of the loss at the reference slice length


@dataclass(frozen=True, slots=True, kw_only=True)
class Analysis:
    """What a recording says. `reference_ns`: the slice length that precision is told at."""

    order: OrderEstimate | None
    blocks: BlockEstimate | None
    reference_ns: int
    wanted: float
    about: Mapping[str, Any]

    @property
    def cost(self) -> Estimate | None:
        """Of a crossing, ns."""
        if self.order is not None:
            return self.order.cost
        return self.blocks.cost if self.blocks is not None else None

    @property
    def by_victim(self) -> Mapping[Mode, Estimate]:
        best = self.order or self.blocks
        return best.by_victim if best is not None else {}

    @property
    def precision(self) -> float | None:
        """Half-width of the loss at the reference slice length, as a fraction."""
        return None if self.cost is None else self.cost.half_width() / self.reference_ns

    @property
    def difference(self) -> Estimate | None:
        """Randomised order minus blocks: should include zero."""
        if self.order is None or self.blocks is None:
            return None
        return combine([(1.0, self.order.cost), (-1.0, self.blocks.cost)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    kind: VerdictKind
    headline: str                    # one sentence
    sentences: tuple[str, ...]       # what it means
    doubts: tuple[str, ...]          # why nothing can be concluded
    notes: tuple[str, ...]           # what else a reader should know


def analyse(recording: Recording, wanted: float = WANTED) -> Analysis:
    """Estimate everything that the recording can tell."""
    reference = recording.about.get("reference_slice_ns")
    if not isinstance(reference, int) or reference <= 0:
        random = [block.slice_ns for block in recording.blocks if block.kind == "random"]
        reference = random[0] if random else 1_000_000
    return Analysis(order=estimate_order(recording), blocks=estimate_blocks(recording), reference_ns=reference,
                    wanted=wanted, about=recording.about)


def judge(analysis: Analysis) -> Verdict:
    """What may be said of it."""
    cost = analysis.cost
    doubts = _doubts(analysis)
    notes = _notes(analysis)
    if cost is None:
        return Verdict(kind="inconclusive", headline="Inconclusive: there are too few usable slices to say anything.",
                       sentences=(), doubts=doubts, notes=notes)
    low, high = cost.bounds()
    found = f"{_us(cost.value)} (95 % interval {low / 1e3:.1f} to {high / 1e3:.1f} µs)"
    if doubts:
        return Verdict(kind="inconclusive", headline="Inconclusive: the measurement does not pass its own checks.",
                       sentences=(f"The figure would be {found} a crossing; do not use it.",), doubts=doubts,
                       notes=notes)
    if low > 0:
        loss = cost.value / USUAL_SLICE_NS
        return Verdict(
            kind="penalty",
            headline=f"Mixing software and hardware VMs on one CPU has a {_size(loss)} price here.",
            sentences=(
                f"Each time the CPU goes from a software VM to a hardware VM, or back, {found} of guest work are lost "
                "beyond what a switch between two VMs of one mode costs.",
                f"If every switch crossed, that would be {_loss(cost, USUAL_SLICE_NS)} of the work at slices of 5 ms "
                f"(the usual), {_loss(cost, 1_000_000)} at 1 ms.",
                "Longer slices, fewer crossings (VMs of one mode in turn) or a CPU for each mode make it smaller; "
                "VMs of one mode alone do not pay it."),
            doubts=(), notes=notes)
    if high < 0:
        return Verdict(
            kind="gain", headline="Mixing costs nothing here; crossings were even quicker than other switches.",
            sentences=(f"A switch to a VM of the other mode lost {found} against a switch within a mode.",),
            doubts=(), notes=notes)
    if (analysis.precision or 1.0) <= analysis.wanted:
        return Verdict(
            kind="none", headline="No price of mixing was found here.",
            sentences=(
                f"A switch between modes loses {found} more than one within a mode: zero is in the interval.",
                f"If there is a price it is at most {max(abs(low), abs(high)) / 1e3:.1f} µs a crossing, "
                f"{per_cent(max(abs(low), abs(high)) / USUAL_SLICE_NS)} of the work at slices of 5 ms."),
            doubts=(), notes=notes)
    return Verdict(
        kind="inconclusive",
        headline="Inconclusive: the interval includes zero, and it is still too wide to call that nothing.",
        sentences=(f"A crossing costs {found}; measure longer (--seconds) or on a quieter host.",), doubts=(),
        notes=notes)


def _doubts(analysis: Analysis) -> tuple[str, ...]:
    doubts: list[str] = []
    order, blocks = analysis.order, analysis.blocks
    if order is not None:
        if order.null is not None and not order.null.includes(0.0, CHECKED_AT):
            doubts.append(
                "which VM of the other mode ran before should not matter, but it does: "
                f"{_pm(order.null)} (the VMs of a mode are not alike, or something on the host keeps time with the "
                "slices)")
        if order.slices < LEAST_USED * order.offered:
            doubts.append(f"only {order.slices} of {order.offered} slices of random order could be used: "
                          "other work had the CPU")
    if blocks is not None and not blocks.control.includes(0.0, CHECKED_AT):
        doubts.append(f"the A/A control differs from zero: {_pm(blocks.control)} a switch between conditions that are "
                      "the same")
    difference = analysis.difference
    if difference is not None and not difference.includes(0.0, CHECKED_AT):
        doubts.append(f"the two estimators disagree: randomised order minus blocks is {_pm(difference)}")
    return tuple(doubts)


def _notes(analysis: Analysis) -> tuple[str, ...]:
    notes: list[str] = []
    about, blocks = analysis.about, analysis.blocks
    if about.get("placebo"):
        notes.append("This was a placebo: all four VMs ran in the same mode, so the right answer is nothing.")
    if blocks is None and analysis.order is not None:
        notes.append("The blocks have too few whole replicates to say anything, so nothing checks the figure but its "
                     "own null: measure longer.")
    if blocks is not None and blocks.line is not None and not blocks.line.intercept.includes(0.0, CHECKED_AT):
        notes.append(
            "The loss does not go to zero with the number of switches (intercept "
            f"{per_cent(blocks.line.intercept.value)}): it is not a cost of switches alone, so read the losses at each "
            "slice length.")
    working_set, cache = about.get("working_set_bytes"), about.get("l2_bytes")
    if isinstance(working_set, int) and isinstance(cache, int) and 2 * working_set > cache:
        notes.append(
            f"Two working sets of {working_set >> 10} KiB do not fit the L2 cache ({cache >> 10} KiB): the VMs evict "
            "each other in all conditions, and the figures depend on it.")
    if about.get("dispatch") not in (None, "precise"):
        notes.append(f"Slices were not exact ({about['dispatch']} dispatch): expect wider intervals than with "
                     "real-time priorities.")
    return tuple(notes)


# -- words --------------------------------------------------------------------------------------

def per_cent(fraction: float) -> str:
    """A fraction as a person reads it: 1.62 %, 0.32 %, 0.004 %."""
    value = 100 * fraction
    digits = 1 if abs(value) >= 9.95 else 2 if abs(value) >= 0.095 else 3
    return f"{value:.{digits}f} %"


def _us(ns: float) -> str:
    return f"{ns / 1e3:.1f} µs"


def _pm(estimate: Estimate) -> str:
    return f"{estimate.value / 1e3:+.1f} ± {estimate.half_width() / 1e3:.1f} µs"


def _loss(cost: Estimate, slice_ns: int) -> str:
    return per_cent(cost.value / slice_ns)


def _size(loss: float) -> str:
    """In one word, at the usual slice length."""
    for limit, word in ((0.001, "negligible"), (0.01, "small"), (0.05, "noticeable")):
        if loss < limit:
            return word
    return "large"


# -- for programs -------------------------------------------------------------------------------

def to_json(analysis: Analysis, verdict: Verdict) -> dict[str, Any]:
    """Everything, as plain values. Costs in us, losses as fractions; every interval is 95 %."""
    order, blocks = analysis.order, analysis.blocks
    return {
        "schema": 1, "about": dict(analysis.about), "confidence": CONFIDENCE,
        "verdict": {"kind": verdict.kind, "headline": verdict.headline, "sentences": list(verdict.sentences),
                    "doubts": list(verdict.doubts), "notes": list(verdict.notes)},
        "reference_slice_ns": analysis.reference_ns, "precision": analysis.precision,
        "cost_us": _cost(analysis.cost), "cost_us_by_victim": {m: _cost(e) for m, e in analysis.by_victim.items()},
        "ratio_by_victim": {m: _ratio(e, analysis.reference_ns) for m, e in analysis.by_victim.items()},
        "agreement_us": _cost(analysis.difference),
        "random_order": None if order is None else {
            "cost_us": _cost(order.cost), "null_us": _cost(order.null),
            "cost_us_by_victim": {m: _cost(e) for m, e in order.by_victim.items()},
            "lost_us_by_transition": {f"{now}|{before}": _cost(e)
                                      for (now, before), e in (order.transitions or {}).items()},
            "slices": order.slices, "offered": order.offered, "blocks": order.blocks},
        "blocks": None if blocks is None else {
            "cost_us": _cost(blocks.cost), "control_us": _cost(blocks.control), "switching_us": _cost(blocks.switching),
            "cost_us_by_victim": {m: _cost(e) for m, e in blocks.by_victim.items()},
            "slope_us": _cost(blocks.line.slope) if blocks.line else None,
            "intercept": _plain(blocks.line.intercept, 1.0) if blocks.line else None,
            "replicates": blocks.replicates,
            "points": [{
                "slice_ns": p.slice_ns, "switches_per_s": p.switches_s, "replicates": p.replicates,
                "loss": _plain(p.loss, 1.0), "loss_by_victim": {m: _plain(e, 1.0) for m, e in p.loss_by_victim.items()},
                "control": _plain(p.control, 1.0), "switching": _plain(p.switching, 1.0)} for p in blocks.points]},
    }


def to_result(analysis: Analysis, verdict: Verdict) -> MixingResult:
    """What is kept of it for others. `about` is that of service/loans' clients (cli/measure.py)."""
    about, order, blocks = analysis.about, analysis.order, analysis.blocks
    working_set = about.get("working_set_bytes")
    return MixingResult(
        source="on-demand", measured_unix_s=float(about.get("measured_unix_s", 0.0)),
        seconds=float(about.get("seconds", 0.0)),
        host=MeasuredHost(**{name: str(about.get(name, "unknown")) for name in ("technology", "cpu_model", "kernel")}),
        cpu=int(about.get("cpu", 0)), dispatch=str(about.get("dispatch", "unknown")),
        guests=str(about.get("guests", "unknown")),
        working_set_bytes=working_set if isinstance(working_set, int) else None,
        reference_slice_us=analysis.reference_ns / 1e3, slices=order.slices if order else 0,
        verdict=verdict.kind, headline=verdict.headline, doubts=verdict.doubts, cost_us=_interval(analysis.cost),
        cost_us_by_victim={mode: one for mode, e in analysis.by_victim.items() if (one := _interval(e))},
        null_us=_interval(order.null if order else None), control_us=_interval(blocks.control if blocks else None),
        agreement_us=_interval(analysis.difference), switching_us=_interval(blocks.switching if blocks else None))


def _interval(estimate: Estimate | None) -> Interval | None:
    """In us; None also where there is no finite one."""
    if estimate is None:
        return None
    low, high = estimate.bounds()
    try:
        return Interval(estimate.value / 1e3, low / 1e3, high / 1e3)
    except ValueError:
        return None


def _cost(estimate: Estimate | None) -> dict[str, float] | None:
    return None if estimate is None else _plain(estimate, 1e-3)


def _ratio(cost: Estimate, slice_ns: int) -> dict[str, float]:
    """Work done where every switch crosses, relative to where none does."""
    low, high = cost.bounds()
    return {"value": 1 - cost.value / slice_ns, "low": 1 - high / slice_ns, "high": 1 - low / slice_ns}


def _plain(estimate: Estimate, unit: float) -> dict[str, float]:
    low, high = estimate.bounds()
    return {"value": estimate.value * unit, "low": low * unit, "high": high * unit, "n": estimate.n}
