"""`policy` and `set`: how CPUs are shared, shown and changed while everything runs.

A value is what the configuration file would have behind the same key, but for the quotes.
"""

from __future__ import annotations

from typing import Any, Final

import click

from .common import connect, output_option, print_json, print_table

__all__ = ["policy", "set_"]

VALUES: Final = {"weight": int, "cap": int, "reservation": int, "latency": str, "cpus": str, "policy": str,
                 "mode_loss_max": float}         # any other key is a whole number


def _change(assignments: tuple[str, ...]) -> dict[str, Any]:
    """`("weight=300", "cpus=all")` as the keys and values of a change. Raises UsageError."""
    change: dict[str, Any] = {}
    for assignment in assignments:
        key, sign, text = (part.strip() for part in assignment.partition("="))
        if not sign or not key or not text:
            raise click.UsageError(f"{assignment!r} is no KEY=VALUE, such as weight=300")
        if key in change:
            raise click.UsageError(f"{key} is given twice")
        try:
            change[key] = VALUES.get(key, int)(text)
        except ValueError:
            change[key] = text               # the service says what would be allowed
        if (key, text) == ("cpus", "all"):
            change[key] = None
    return change


def _show(title: str, values: dict[str, Any], output: str) -> None:
    if output == "json":
        print_json(values)
        return
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from ..config.model import format_cpus

    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column(title)
    table.add_column("In force", justify="right")
    for key, value in values.items():
        if key == "cpus":
            value = "all" if value is None else format_cpus(value)
        table.add_row(key, str(value))
    print_table(table)


@click.command()
@click.argument("name", required=False)
@click.argument("assignments", metavar="[KEY=VALUE]...", nargs=-1)
@output_option
def policy(name: str | None, assignments: tuple[str, ...], output: str) -> None:
    """Show the scheduling policy, or change it while VMs run.

    NAME is fair, batch, partition or kernel; KEY any key of [scheduler], which docs/configuration.md
    explains. The file is not changed: it holds again when the service is started anew.

    \b
    mixvisor policy                              what is in force
    mixvisor policy batch                        another policy
    mixvisor policy batch mode_batch_us=40000    and one of its settings
    mixvisor policy slice_us=10000               only a setting
    """
    if name is not None and "=" in name:
        name, assignments = None, (name, *assignments)
    change = _change(assignments)
    if name is not None:
        if "policy" in change:
            raise click.UsageError("policy is given twice")
        change = {"policy": name, **change}
    with connect() as client:
        values = client.policy(change)
    _show("Scheduler", values, output)


@click.command("set")
@click.argument("name")
@click.argument("assignments", metavar="[KEY=VALUE]...", nargs=-1)
@output_option
def set_(name: str, assignments: tuple[str, ...], output: str) -> None:
    """Show or change how much CPU a VM gets, while it runs or before it starts.

    KEY is weight (1 to 10000), cap or reservation (percent of one host CPU; 0: none), latency (low,
    normal, high) or cpus (such as 0-3,6; all: all that VMs may use). All are changed, or none where
    one of them cannot be had.
    The file is not changed: it holds again when the service is started anew.

    \b
    mixvisor set dos                        what is in force
    mixvisor set dos weight=300 cap=50      at most half a CPU, three times a share of 100
    """
    change = _change(assignments)
    with connect() as client:
        values = client.set_parameters(name, change)
    _show(name, values, output)
