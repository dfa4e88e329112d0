"""`ps` and `top`: the VMs of the running service, once or live."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import click

from .common import (
    connect,
    output_option,
    print_json,
    print_table,
    screen_width,
    stdout_console,
)

if TYPE_CHECKING:
    from types import FrameType

    from ..metrics.snapshot import Snapshot
    from .rates import VmRate

__all__ = ["ps", "top"]

SORTS: Final = ("name", "received", "entitled", "steal", "progress", "exits", "error")


@click.command()
@output_option
def ps(output: str) -> None:
    """List the VMs: state, mode and why, weight, memory."""
    with connect() as client:
        if output == "json":
            print_json(client.vms())
            return
        from .tables import ps_table
        print_table(ps_table(client.snapshot().vms, width=screen_width()))


@click.command()
@click.option("--sort", type=click.Choice(SORTS), default="name", show_default=True,
              help="What to order by, the most first.")
@click.option("--limit", type=click.IntRange(min=1), default=None, metavar="N",
              help="Show at most N VMs.")
@click.option("--once", is_flag=True, help="Show one interval and end.")
@click.option("--interval", type=click.FloatRange(min=0.1, max=3600), default=1.0,
              show_default=True, metavar="SECONDS", help="Time between two pictures.")
@output_option
def top(sort: str, limit: int | None, once: bool, interval: float, output: str) -> None:
    """Watch the VMs: shares entitled and received, steal, progress, exits; q or Ctrl-C ends.

    All figures are of the last interval; shares and steal (runnable, but not running) are percent
    of one host CPU. With -o json there is one object a line for each interval.
    """
    from rich.live import Live

    from .rates import cpu_rates, vm_rates
    from .tables import top_view

    console = stdout_console()
    live: Live | None = None
    interrupted: list[int] = []
    with connect() as client, contextlib.ExitStack() as terminal:
        old: Snapshot = client.snapshot()
        try:
            if output == "table" and console.is_terminal and not once:
                live = Live(console=console, screen=True, auto_refresh=False)
                live.start()
                if sys.stdin.isatty():
                    terminal.enter_context(_keys_at_once())
                interrupted = terminal.enter_context(_remembering_interrupts())
            while not interrupted:
                if live is None or not sys.stdin.isatty():
                    time.sleep(interval)
                elif _asked_to_end(interval):
                    return
                new = client.snapshot()
                rates = _ordered(vm_rates(old, new), sort)
                shown = rates[:limit] if limit else rates
                if output == "json":
                    click.echo(json.dumps(_as_json(new, shown), ensure_ascii=False))
                else:
                    view = top_view(new, shown, cpu_rates(old, new), width=console.width,
                                    hidden=len(rates) - len(shown))
                    if live is not None:
                        live.update(view, refresh=True)
                    else:
                        console.print(view)
                if once:
                    return
                old = new
        except KeyboardInterrupt:
            # The way to end a live view; not a failure.
            return
        finally:
            if live is not None:
                live.stop()


@contextlib.contextmanager
def _keys_at_once() -> Iterator[None]:
    """Keys come without Enter and are not shown; Ctrl-C stays what it is."""
    import termios
    import tty

    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd, termios.TCSADRAIN)                # what was typed already counts
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


@contextlib.contextmanager
def _remembering_interrupts() -> Iterator[list[int]]:
    """SIGINT raises KeyboardInterrupt as ever, and is noted: one that is raised in a finalizer is lost otherwise."""
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        signal.default_int_handler(number, frame)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield came
    finally:
        signal.signal(signal.SIGINT, before)


def _asked_to_end(seconds: float) -> bool:
    """Wait, but not longer than until q is typed; whatever else is typed is for nobody."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if select.select([sys.stdin], [], [], left)[0]:
            typed = os.read(sys.stdin.fileno(), 64)
            if not typed or b"q" in typed.lower():         # not typed: the terminal is gone
                return True
    return False


def _ordered(rates: list[VmRate], sort: str) -> list[VmRate]:
    if sort == "name":
        return sorted(rates, key=lambda rate: rate.vm.name)
    field = {"steal": "wait"}.get(sort, sort)
    return sorted(rates, key=lambda rate: -abs(getattr(rate, field) or 0.0))


def _as_json(snapshot: Snapshot, rates: list[VmRate]) -> dict[str, object]:
    from ..service.wire import SCHEMA
    return {
        "schema": SCHEMA, "taken_unix_s": snapshot.taken_unix_s,
        "vms": [{
            "name": rate.vm.name, "state": rate.vm.state, "mode": rate.vm.mode,
            "mode_rule": rate.vm.mode_rule, "weight": rate.vm.weight, "seconds": rate.seconds,
            "entitled": rate.entitled, "received": rate.received, "error": rate.error,
            "steal": rate.wait, "progress_per_s": rate.progress, "exits_per_s": rate.exits,
        } for rate in rates],
        "warnings": [warning.code for warning in snapshot.warnings],
        "mixing": None if snapshot.mixing.told is None else {
            "verdict": snapshot.mixing.told.verdict, "headline": snapshot.mixing.told.headline},
    }
