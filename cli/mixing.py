"""`mixing`: what mixing modes costs on this host, as far as the running service knows."""

from __future__ import annotations

import click

from .common import connect, output_option, print_json, print_table, screen_width

__all__ = ["mixing"]


@click.command()
@output_option
def mixing(output: str) -> None:
    """Show what mixing software and hardware VMs costs here, measured while they run.

    A crossing is a change of a host CPU from a VM of one mode to one of the other; its cost is what
    it loses beyond a switch between two VMs of one mode. What cannot be told is said, and why.
    Newest figures come every ten seconds; `mixvisor measure` makes a careful measurement of its own.
    """
    with connect() as client:
        snapshot = client.snapshot()
    if output == "json":
        from ..service.wire import SCHEMA, to_json
        print_json({"schema": SCHEMA, "mixing": to_json(snapshot.mixing)})
        return
    from .costs import mixing_view
    print_table(mixing_view(snapshot, width=screen_width()))
