"""How the cost of mixing is shown to a person: made from snapshots alone, as tables.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from rich.console import Group, RenderableType
from rich.text import Text

from ..metrics.mixing.online import MODES
from ..metrics.mixing.result import Interval, MixingResult
from ..metrics.snapshot import MixingSnapshot, Snapshot
from .tables import MODE_STYLE, NONE, fields_table, plain_table

__all__ = ["mixing_line", "mixing_view"]

SCOPES_IN_WORDS: Final = {"cpu": "on one host CPU", "core": "on one core", "socket": "on one socket",
                          "host": "on this host"}
VERDICT_STYLE: Final = {"penalty": "yellow", "none": "green", "gain": "green", "inconclusive": "dim"}
SOURCES: Final = {"online": "while VMs run", "on-demand": "by mixvisor measure"}


def mixing_line(snapshot: Snapshot) -> str:
    """One line for `top`; "" while the modes do not mix and nothing is known."""
    told = snapshot.mixing.told
    running = {vm.mode for vm in snapshot.vms if vm.state == "running"}
    if len(running) < 2:
        return ""
    if told is None:
        return "cost of mixing: not measured yet" if snapshot.mixing.online else "cost of mixing: not measured"
    parts = [f"cost of mixing: {told.headline.rstrip('.')}"]
    penalty = snapshot.mixing.penalty
    if penalty and told.verdict == "penalty":
        parts.append("lost " + ", ".join(f"{_per_cent(part.value)} of {mode}" for mode, part in penalty.items()))
    return " · ".join(parts)


def mixing_view(snapshot: Snapshot, *, width: int) -> RenderableType:
    """`mixvisor mixing`: the figure to go by, what it was made from, and what it means."""
    mixing = snapshot.mixing
    shown: list[RenderableType] = []
    told = mixing.told
    if told is None:
        shown.append(Text("Nothing is known yet: the first look comes ten seconds after the start." if mixing.online
                          else "Not measured: the order of slices is fixed (random_order = 0 of [scheduler])."))
    else:
        shown += _result(told, mixing)
    latest = mixing.latest
    if latest is not None and latest != told:
        shown += [Text(""), Text.assemble(("Online, by now: ", "bold"), latest.headline)]
    if mixing.on_demand is not None and mixing.on_demand != told:
        shown += [Text(""), Text.assemble(("mixvisor measure found: ", "bold"), mixing.on_demand.headline)]
    for note in mixing.caveats:
        shown += [Text(""), Text(note, style="dim")]
    shown += [Text(""), fields_table(_totals(mixing))]
    advice = [w.advice for w in snapshot.warnings if w.code.startswith("mixed-modes") and told is not None]
    if advice and told is not None and told.verdict == "penalty":
        shown += [Text(""), Text.assemble(("What to do: ", "bold"), advice[0])]
    return Group(*shown)


def _result(told: MixingResult, mixing: MixingSnapshot) -> Iterator[RenderableType]:
    yield Text(told.headline, style=f"bold {VERDICT_STYLE[told.verdict]}")
    where = "" if told.cpu < 0 else f", host CPU {told.cpu}"
    yield Text(f"Measured {SOURCES[told.source]}: {told.seconds:.0f} s, {told.slices} slices of "
               f"{told.reference_slice_us / 1e3:g} ms, {told.dispatch} dispatch{where}; {told.guests}.", style="dim")
    for doubt in told.doubts:
        yield Text(f"Doubt: {doubt}.", style="yellow")
    rows: list[list[Text | str]] = []
    for mode in MODES:
        cost, part = told.cost_us_by_victim.get(mode), mixing.penalty.get(mode)
        rate = mixing.crossing_rate.get(mode)
        if cost is not None or rate is not None:
            rows.append([Text(f"{mode} VMs", style=MODE_STYLE[mode]), _us(cost),
                         NONE if rate is None else f"{rate:.1f}", _part(part)])
    if told.cost_us is not None:
        rows.append([Text("both, mean", style="bold"), _us(told.cost_us), "", ""])
    if told.null_us is not None:
        rows.append(["null", _us(told.null_us), "", "must include zero"])
    if told.switching_us is not None:
        rows.append(["a switch within a mode", _us(told.switching_us), "", "for comparison"])
    if rows:
        yield Text("")
        yield plain_table([("Who pays", "left"), ("A crossing costs (95 %)", "right"),
                           ("Crossings a CPU-second", "right"), ("Lost of its CPU time", "left")], rows)


def _totals(mixing: MixingSnapshot) -> Iterator[tuple[str, str]]:
    overlap = {scope: ns for scope, ns in mixing.overlap_ns.items() if ns}
    yield "Both modes ran", ", ".join(
        f"{ns / 1e9:.0f} s {SCOPES_IN_WORDS.get(scope, scope)}" for scope, ns in overlap.items()) or "not together"
    lost = {vm: ns for vm, ns in mixing.lost_ns.items() if ns}
    if lost:
        yield "Lost so far", ", ".join(f"{vm} {ns / 1e9:.3f} s" for vm, ns in lost.items())
    if mixing.measurements:
        yield "Looks", ", ".join(f"{count} {verdict}" for verdict, count in mixing.measurements.items())
    yield "mode_loss_max uses", (f"{mixing.crossing_cost_us:.1f} µs a crossing, " + {
        "configured": "as the file says", "measured": "as measured",
        "default": "the default: nothing was concluded yet"}[mixing.crossing_cost_source])


def _us(cost: Interval | None) -> str:
    return NONE if cost is None else f"{cost.value:.1f} µs [{cost.low:.1f}, {cost.high:.1f}]"


def _part(part: Interval | None) -> str:
    return NONE if part is None else f"{_per_cent(part.value)} [{_per_cent(part.low)}, {_per_cent(part.high)}]"


def _per_cent(part: float) -> str:
    return f"{100 * part:.3f} %"
