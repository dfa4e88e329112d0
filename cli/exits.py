"""`exits`: which instructions make a guest leave for the host, and how often."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from .common import connect, output_option, print_json, print_table

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["exits", "exits_view"]


@click.command()
@click.argument("name")
@click.option("--limit", type=click.IntRange(1, 256), default=20, show_default=True, metavar="N",
              help="Show the N places with the most exits.")
@output_option
def exits(name: str, limit: int, output: str) -> None:
    """Show the exits of a running VM: reason by instruction by address.

    Counted from the VM's last start. What no instruction causes (kicks, interrupts of devices) is told
    apart.
    """
    with connect() as client:
        answer = client.exits(name, limit)
        by_reason = client.vm(name)["vm"]["exits"]
    if output == "json":
        print_json({**answer, "by_reason": by_reason})
        return
    print_table(exits_view(name, answer, by_reason))


def exits_view(name: str, answer: Mapping[str, Any], by_reason: Mapping[str, int]) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    from .tables import count, plain_table

    sites: Sequence[Mapping[str, Any]] = answer["sites"]
    total = answer["total"]
    places = answer["places"]
    lines: list[RenderableType] = [Text(
        f"{name}: {total} exit{'s'[:total != 1]} caused by instructions at {places} place{'s'[:places != 1]}",
        style="bold")]
    if sites:
        columns = [("Reason", "left"), ("Instruction", "left"), ("Exits", "right"), ("Share", "right"),
                   ("Address", "right"), ("Mode", "left"), ("Code", "left")]
        lines += [Text(""), plain_table(columns, [[
            site["reason"], site["mnemonic"] or "–", count(site["count"]),
            f"{100 * site['count'] / max(1, total):.1f} %", f"{site['address']:#x}" if site["mode"] else "–",
            site["mode"] or "–", site["instruction"]]
            for site in sites])]
        if places > len(sites):
            lines.append(Text(f"… and {places - len(sites)} more places (--limit)", style="dim"))
    counted = ", ".join(f"{reason} {count(number)}" for reason, number in by_reason.items() if number)
    lines += [Text(""), Text(f"All exits by reason, earlier lives of the VM included: {counted or 'none'}")]
    return Group(*lines)
