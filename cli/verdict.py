"""The result of a measurement for a person: first in words, then the figures with their intervals and controls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console

    from ..metrics.mixing.interval import Estimate
    from ..metrics.mixing.report import Analysis, Verdict
    from ..metrics.mixing.slices import Recording

__all__ = ["show_verdict"]

WIDTH = 100
_STYLE = {"penalty": "bold yellow", "none": "bold green", "gain": "bold green", "inconclusive": "bold red"}


def show_verdict(
    console: Console, recording: Recording, analysis: Analysis, verdict: Verdict, files: Mapping[str, str | None],
) -> None:
    """The whole report, on *console*."""
    width = min(console.width, WIDTH)

    def say(text: str, style: str = "", indent: int = 0) -> None:
        console.print(Padding(Text(text, style=style), (0, 0, 0, indent)), width=width)

    say(verdict.headline, _STYLE[verdict.kind])
    for sentence in verdict.sentences:
        say(sentence)
    for doubt in verdict.doubts:
        say(f"Speaks against it: {doubt}.", "red")
    if analysis.cost is not None:
        console.print()
        console.print(_figures(analysis))
    if analysis.blocks is not None:
        console.print()
        console.print(_lengths(analysis))
    for note in verdict.notes:
        console.print()
        say(f"Note: {note}")
    console.print()
    say(_how(recording, analysis), "dim")
    for what, where in (("Every slice", files["data"]), ("Plot", files["plot"]), ("Result kept", files["result"])):
        if where:
            say(f"{what}: {where}", "dim")


def _figures(analysis: Analysis) -> Table:
    table = Table(title="µs of CPU time, 95 % intervals", title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    table.add_column("Estimate", justify="right")
    table.add_column("From", justify="right")
    table.add_column("To", justify="right")
    table.add_column("By")
    order, blocks = analysis.order, analysis.blocks

    def row(name: str, estimate: Estimate | None, by: str, *, null: bool = False) -> None:
        if estimate is None:
            return
        low, high = (value / 1e3 for value in estimate.bounds())
        wrong = null and not low <= 0 <= high
        table.add_row(name, f"{estimate.value / 1e3:.2f}", f"{low:.2f}", f"{high:.2f}", by,
                      style="yellow" if wrong else None)

    if order is not None:
        row("A crossing costs, beyond a switch", order.cost, "random order")
        for mode, estimate in order.by_victim.items():
            row(f"  paid by {mode} VMs", estimate, "random order")
    if blocks is not None:
        row("A crossing costs, beyond a switch", blocks.cost, "blocks")
        row("A switch within a mode", blocks.switching, "blocks")
    if order is not None:
        for (now, before), estimate in (order.transitions or {}).items():
            row(f"  lost by {now} after {before}", estimate, "random order")
        row("Null: which predecessor of a mode", order.null, "random order, 0 is right", null=True)
    if blocks is not None:
        row("Null: A/A", blocks.control, "blocks, 0 is right", null=True)
    row("The two estimators differ by", analysis.difference, "0 is right", null=True)
    return table


def _lengths(analysis: Analysis) -> Table:
    assert analysis.blocks is not None
    table = Table(title="Loss of guest work by slice length, %, 95 % intervals", title_justify="left", box=None,
                  pad_edge=False)
    for name in ("Slice", "Switches/s", "By crossing", "Hardware VMs", "Software VMs", "By switching", "A/A",
                 "Replicates"):
        table.add_column(name, justify="right")

    def shown(estimate: Estimate) -> str:
        return f"{100 * estimate.value:.2f} ± {100 * estimate.half_width():.2f}"

    for point in analysis.blocks.points:
        table.add_row(f"{point.slice_ns / 1e6:g} ms", f"{point.switches_s:.0f}", shown(point.loss),
                      shown(point.loss_by_victim["hardware"]), shown(point.loss_by_victim["software"]),
                      shown(point.switching), shown(point.control), str(point.replicates))
    return table


def _how(recording: Recording, analysis: Analysis) -> str:
    about: Mapping[str, Any] = recording.about
    order, blocks = analysis.order, analysis.blocks
    used = f"{order.slices} of {order.offered} slices of random order" if order else "no slices of random order"
    return (f"{about.get('guests', '')} on host CPU {about.get('cpu', '?')}, {about.get('dispatch', '?')} dispatch, "
            f"{about.get('seconds', 0):.0f} s; {used} and {blocks.replicates if blocks else 0} replicates of blocks "
            "used. "
            f"{about.get('cpu_model', '')}, {about.get('technology', '?')}, Linux {about.get('kernel', '?')}.")
