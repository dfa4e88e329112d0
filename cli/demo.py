"""`demo`: software and hardware VMs share one host CPU before your eyes.

Theory.  The demo is the real service with the configuration config/examples/demo.toml, a
temporary state directory and one host CPU. What is shown is made from its snapshots alone: the
live table from the last `WINDOW_SECONDS`, the closing table from the whole run.

The terminal is written to from a thread: one that is held (Ctrl-S) or slow must not keep the
supervisor from its heartbeat.
"""

from __future__ import annotations

import io
import socket as sockets
import tempfile
from collections import deque
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from .common import (
    control_socket,
    named_socket,
    notice,
    output_option,
    print_json,
    stdout_console,
)

if TYPE_CHECKING:
    from ..config.model import Config
    from ..metrics.snapshot import Snapshot
    from ..service.app import Service
    from ..vm.host import HostFacts

__all__ = ["demo"]

SAMPLE_SECONDS: Final = 0.25
WINDOW_SECONDS: Final = 2.0
LINE_SECONDS: Final = 1.0
CLOSE_SECONDS: Final = 0.3      # a terminal that is held does not keep the VMs alive


@click.command()
@click.option("--seconds", type=click.FloatRange(min=0, min_open=True), default=None, metavar="N",
              help="End by itself after N seconds (else with Ctrl-C).")
@click.option("--cpu", type=click.IntRange(min=0), default=None, metavar="N",
              help="The host CPU to share [default: the highest-numbered].")
@click.option("--listen", default=None, metavar="HOST:PORT",
              help="Where the metrics are, instead of 127.0.0.1:9736; \"none\" for nowhere.")
@output_option
def demo(seconds: float | None, cpu: int | None, listen: str | None, output: str) -> None:
    """Watch two software and two hardware VMs share one host CPU, weights 1:1:2:4.

    Ends with a table of the whole run; exit code 1 if a VM did not live to see it.
    """
    import trio

    from ..service.app import Service
    from ..vm.host import HostFacts
    from .logs import logging_to
    from .serve import live, unwrapped

    facts = HostFacts.read()
    config = _config(facts, cpu, listen)
    console = stdout_console()
    on_terminal = output == "table" and console.is_terminal
    view = _Terminal(console, seconds) if on_terminal else _Lines(quiet=output == "json")
    errors = io.StringIO()

    async def show() -> None:
        with tempfile.TemporaryDirectory(prefix="mixvisor-demo-") as directory:
            service = Service(config, state_dir=Path(directory), facts=facts,
                              socket=_free_socket(Path(directory)))
            watcher = _Watcher(service, view, seconds)
            await live(service, watcher.watch, watcher.stop)
        _close(watcher, console, output)

    # On a terminal the live table has the screen; what went wrong is shown after it.
    with unwrapped():
        try:
            with logging_to("text", least="error" if on_terminal else "warning",
                            stream=errors if on_terminal else None):
                trio.run(show)
        finally:
            if errors.getvalue():
                notice(errors.getvalue().rstrip())


def _config(facts: HostFacts, cpu: int | None, listen: str | None) -> Config:
    from .files import load_file
    from .serve import with_listen

    with as_file(files("mixvisor.config.examples") / "demo.toml") as path:
        config = load_file(path, facts)
    chosen = max(facts.cpus) if cpu is None else cpu
    if chosen not in facts.cpus:
        raise click.BadParameter(
            f"host CPU {chosen} cannot be used; there are {', '.join(map(str, facts.cpus))}",
            param_hint="--cpu")
    host = config.host.model_copy(update={"cpus": (chosen,)})
    config = config.model_copy(update={"host": host})
    if not facts.modes.kvm_usable:
        notice(f"Hardware VMs cannot run here: {facts.kvm.why}. All VMs of this demo are software. "
               f"{facts.kvm.remedy}".rstrip())
        vms = tuple(vm.model_copy(update={"mode": "auto", "engine": "auto", "fallback": True})
                    for vm in config.vms)
        config = config.model_copy(update={"vms": vms})
    if listen is None and config.metrics.address and _taken(config.metrics.address):
        notice(f"Another program uses {config.metrics.listen}: the metrics are on another port.")
        listen = "127.0.0.1:0"
    return with_listen(config, listen)


def _taken(address: tuple[str, int]) -> bool:
    family = sockets.AF_INET6 if ":" in address[0] else sockets.AF_INET
    with sockets.socket(family) as probe:
        probe.setsockopt(sockets.SOL_SOCKET, sockets.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError:
            return True
    return False


def _free_socket(directory: Path) -> Path:
    """The usual socket, so that `mixvisor top` finds the demo; another where a service has it."""
    from ..service.backend import ServiceError
    from ..service.client import Client, Unreachable

    usual = control_socket()
    if named_socket() is None:
        try:
            Client(usual).close()
        except Unreachable:
            return usual
        except ServiceError:
            # Somebody else's: not ours to replace.
            return directory / "control.sock"
        notice(f"A Mixvisor service is running on {usual}; this demo keeps beside it.")
        return directory / "control.sock"
    return usual


class _Watcher:
    """Takes pictures until the time is up or `stop` is called, and gives them to a view."""

    def __init__(self, service: Service, view: _Terminal | _Lines, seconds: float | None) -> None:
        import trio
        self.first: Snapshot | None = None
        self.last: Snapshot | None = None
        self._service = service
        self._view = view
        self._seconds = seconds
        self._watching = trio.CancelScope()

    def stop(self) -> None:
        """Also while a drawing is stuck in a terminal that is held."""
        self._watching.cancel()

    async def watch(self) -> None:
        import trio
        self.first = self.last = self._service.snapshot()
        recent = deque([self.first], maxlen=round(WINDOW_SECONDS / SAMPLE_SECONDS) + 1)
        where = self._service.metrics_address
        if self._seconds is not None:
            self._watching.deadline = trio.current_time() + self._seconds
        try:
            with self._watching:
                while True:
                    await trio.sleep(SAMPLE_SECONDS)
                    self.last = self._service.snapshot()
                    recent.append(self.last)
                    await trio.to_thread.run_sync(
                        self._view.show, self.first, recent[0], self.last, where,
                        abandon_on_cancel=True)
        finally:
            with trio.move_on_after(CLOSE_SECONDS, shield=True):
                await trio.to_thread.run_sync(self._view.close, abandon_on_cancel=True)
        self.last = self._service.snapshot()


class _Terminal:
    """A table that is drawn again in place."""

    def __init__(self, console: Any, seconds: float | None) -> None:
        from rich.live import Live
        self._console = console
        self._seconds = seconds
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def show(self, first: Snapshot, old: Snapshot, new: Snapshot, metrics: str | None) -> None:
        from .rates import cpu_rates, vm_rates
        from .tables import live_view

        if not self._live.is_started:
            self._live.start()
        elapsed = (new.monotonic_ns - first.monotonic_ns) / 1e9
        end = f"of {self._seconds:g} s" if self._seconds else "· Ctrl-C ends"
        cpus = ",".join(map(str, new.host.vm_cpus))
        footer = "From another terminal: mixvisor top"
        if metrics:
            footer += f" · metrics: http://{metrics}/metrics"
        self._live.update(live_view(
            new, vm_rates(old, new), cpu_rates(old, new), width=self._console.width,
            title=f"Mixvisor demo · {len(new.vms)} VMs share host CPU {cpus} · {elapsed:.0f} s {end}",
            footer=footer), refresh=True)

    def close(self) -> None:
        if self._live.is_started:
            self._live.stop()


class _Lines:
    """A line a second, for a pipe or a log."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._next_ns = 0

    def show(self, first: Snapshot, old: Snapshot, new: Snapshot, _metrics: str | None) -> None:
        from .rates import vm_rates
        from .tables import plain_line

        if self._quiet or new.monotonic_ns < self._next_ns:
            return
        self._next_ns = new.monotonic_ns + int(LINE_SECONDS * 1e9)
        click.echo(plain_line(vm_rates(old, new), (new.monotonic_ns - first.monotonic_ns) / 1e9))

    def close(self) -> None:
        pass


def _close(watcher: _Watcher, console: Any, output: str) -> None:
    """The closing table, or its JSON."""
    from .rates import verdict, vm_rates
    from .tables import closing_view

    if watcher.first is None or watcher.last is None:
        return      # ended before the VMs ran: there is nothing to show
    rates = vm_rates(watcher.first, watcher.last)
    judged = verdict(rates)
    if output == "json":
        print_json({
            "schema": 1, "seconds": rates[0].seconds if rates else 0.0,
            "vms": [{
                "name": rate.vm.name, "state": rate.vm.state, "mode": rate.vm.mode,
                "mode_rule": rate.vm.mode_rule, "mode_reason": rate.vm.mode_reason,
                "weight": rate.vm.weight, "entitled": rate.entitled, "received": rate.received,
                "error": rate.error, "progress": rate.progress_total, "exits": rate.exits_total,
                "slices": rate.slices_total,
            } for rate in rates],
            "warnings": [warning.code for warning in watcher.last.warnings],
            "verdict": {"good": judged.good, "text": judged.text},
        })
    else:
        console.print(closing_view(watcher.last, rates, judged, width=console.width))
    if any(rate.vm.state in ("crashed", "failed") for rate in rates):
        click.get_current_context().exit(1)
