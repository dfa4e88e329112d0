"""`simulate FILE`: policies compared on the VMs of a scenario, without a host; nothing is started."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, overload

import click

from .common import notice, output_option, print_json, print_table, stdout_console

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..config.scenario import Scenario
    from ..sched.simulate import PolicyResult, Quantiles, Simulation

__all__ = ["simulate"]


@click.command()
@click.argument("file", type=click.Path(path_type=Path), required=False)
@click.option("--policy", "policies", multiple=True, metavar="NAME",
              help="Simulate this policy; may be given several times. Default: what the file says.")
@click.option("--seconds", type=click.FloatRange(min=0.01, max=86_400), default=None, metavar="N",
              help="Simulated time, instead of what the file says.")
@click.option("--seed", type=click.IntRange(min=0), default=None, metavar="N",
              help="Seed, instead of what the file says.")
@click.option("--timeline", type=click.Path(path_type=Path, dir_okay=False), default=None, metavar="FILE",
              help="Write who ran where and when, to be opened with ui.perfetto.dev; with several policies the "
                   "policy's name is put before the ending.")
@click.option("--timeline-seconds", type=click.FloatRange(min=0.001, max=3600), default=2.0, show_default=True,
              metavar="N", help="How much of the beginning the timeline shows.")
@click.option("--record", type=click.Path(path_type=Path, dir_okay=False), default=None, metavar="FILE",
              help="Write what each run queue is told and answers, for --replay; with several policies as --timeline.")
@click.option("--replay", type=click.Path(path_type=Path, dir_okay=False), default=None, metavar="FILE",
              help="Instead: tell run queues again what --record wrote, and compare every answer. Exit code 1 if one "
                   "differs.")
@output_option
def simulate(
    file: Path | None, policies: tuple[str, ...], seconds: float | None, seed: int | None, timeline: Path | None,
    timeline_seconds: float, record: Path | None, replay: Path | None, output: str,
) -> None:
    """Compare scheduling policies on a scenario (TOML): the service's own scheduler on a simulated host.

    Share error, lag, waits, switches between modes and what they are predicted to cost, for each
    policy; the same seed gives the same figures again. docs/simulator.md has examples.
    """
    if (file is None) == (replay is None):
        raise click.UsageError("name either a scenario FILE or --replay FILE")
    if replay is not None:
        _replay(replay, output)
        return
    assert file is not None
    scenario = _loaded(file, policies, seed)
    seconds = seconds or float(scenario.simulation.seconds)
    results: list[PolicyResult] = []
    took: list[float] = []
    several = len(scenario.policies) > 1
    for policy in scenario.policies:
        began = time.perf_counter()
        with _writing(_named(record, policy, several)) as inputs:
            simulation = _made(scenario, policy, round(timeline_seconds * 1e9) if timeline else 0, inputs)
            try:
                with _progress(policy, seconds) as so_far:
                    results.append(simulation.run(seconds, so_far).result())
            finally:
                simulation.close()
        if timeline is not None:
            _write_timeline(simulation, _named(timeline, policy, several))
        took.append(time.perf_counter() - began)
    if output == "json":
        from ..service.wire import SCHEMA
        print_json({"schema": SCHEMA, "scenario": str(file), "seed": scenario.simulation.seed,
                    "policies": [asdict(result) for result in results]})
        return
    print_table(_view(scenario, results, stdout_console().width))
    notice(f"simulated in {sum(took):.1f} s")


def _loaded(file: Path, policies: tuple[str, ...], seed: int | None) -> Scenario:
    """The scenario with what the command line says instead. Raises ServiceError."""
    from ..config.load import ConfigError
    from ..config.scenario import load_scenario
    from ..sched.policy import POLICIES
    from ..service.backend import ServiceError, Unusable

    for policy in policies:
        if policy not in POLICIES:
            raise Unusable(f"there is no policy {policy!r}; there are: {', '.join(POLICIES)}")
    try:
        scenario = load_scenario(file)
    except ConfigError as error:
        count = len(error.problems)
        raise ServiceError(f"{file} cannot be used, {count} problem{'s'[:count != 1]}:\n"
                           + "\n".join(f"  {problem}" for problem in error.problems)) from error
    changed = {**({"policies": policies} if policies else {}), **({} if seed is None else {"seed": seed})}
    return scenario.model_copy(update={"simulation": scenario.simulation.model_copy(update=changed)})


def _made(
    scenario: Scenario, policy: str, timeline_ns: int, inputs: Callable[[str], object] | None,
) -> Simulation:
    from ..sched.simulate import ScenarioRefused, Simulation
    from ..service.backend import ServiceError
    try:
        return Simulation(scenario, policy, timeline_ns=timeline_ns, inputs=inputs)
    except ScenarioRefused as error:
        raise ServiceError(str(error)) from error


@contextmanager
def _progress(policy: str, seconds: float) -> Iterator[Callable[[float], None]]:
    """A bar on stderr for a person who waits; nothing for a pipe."""
    from rich.console import Console
    from rich.progress import Progress
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _done: None
        return
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(policy, total=seconds)
        yield lambda done: progress.update(task, completed=done)


@overload
def _named(path: Path, policy: str, several: bool) -> Path: ...
@overload
def _named(path: None, policy: str, several: bool) -> None: ...
def _named(path: Path | None, policy: str, several: bool) -> Path | None:
    return path.with_name(f"{path.stem}-{policy}{path.suffix}") if several and path is not None else path


@contextmanager
def _writing(path: Path | None) -> Iterator[Callable[[str], object] | None]:
    """What writes lines to the file. Raises ServiceError."""
    from ..service.backend import ServiceError
    if path is None:
        yield None
        return
    try:
        with path.open("w", encoding="utf-8") as out:
            yield out.write
    except OSError as error:
        raise ServiceError(f"{path} cannot be written: {error.strerror}") from error


def _write_timeline(simulation: Simulation, path: Path) -> None:
    from ..metrics.trace import TraceSlice, write_trace
    from ..sched.shared import MODES
    slices = (TraceSlice(span.cpu, span.start_ns, span.end_ns, span.thread.name, MODES[span.thread.mode],
                         {"weight": round(span.thread.weight, 2)}) for span in simulation.spans)
    with _writing(path) as write:
        assert write is not None
        count = write_trace(write, slices, title=f"Mixvisor simulation, policy {simulation.policy}")
    notice(f"{path}: {count} slices; open it with https://ui.perfetto.dev")


# -- tables ------------------------------------------------------------------------------------

NONE = "–"


def _view(scenario: Scenario, results: Sequence[PolicyResult], width: int) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    first = results[0]
    vms = f"{first.vms} VM{'s'[:first.vms != 1]}"
    cpus = f"{first.cpus} host CPU{'s'[:first.cpus != 1]}"
    title = f"{first.seconds:g} s of {vms} on {cpus} · slices of {scenario.scheduler.slice_us / 1000:g} ms"
    head = ["Policy", "Share error", "Lag", "Jain", "Wait p50", "Wait p99", "Wake p99",
            "Mode switches/s", "Lost to mixing"]
    rows = [[r.policy, _pct(r.share_error_most, 2), _ms(r.lag_most_ns),
             NONE if r.fairness is None else f"{r.fairness:.5f}", _wait(r.wait, r.wait.p50_ns),
             _wait(r.wait, r.wait.p99_ns), _wait(r.wake, r.wake.p99_ns), _count(r.mode_switches_per_s),
             _pct(r.lost_mixed, 3)] for r in results]
    more = ["Policy", "VM switches/s", "Migrations/s", "Lost to switching", "Deciding", "To VMs", "Idle"]
    more_rows = [[r.policy, _count(r.vm_switches_per_s), _count(r.migrations_per_s), _pct(r.lost_switching, 2),
                  _pct(r.dispatching, 2), _pct(r.delivered, 2), _pct(r.idle, 2)] for r in results]
    groups = ["VMs", "Mode", "Behaviour", "Weight", "Policy", "Due", "Received", "Error", "Wait p99", "Wake p99"]
    group_rows = [[f"{g.name} × {g.count}" if g.count > 1 else g.name, _mode(g.mode), g.behaviour, str(g.weight),
                   result.policy, _pct(g.due, 2) if g.error_most is not None else NONE, _pct(g.received, 2),
                   _pct(g.error_most, 2), _wait(g.wait, g.wait.p99_ns), _wait(g.wake, g.wake.p99_ns)]
                  for index in range(len(first.groups)) for result in results for g in (result.groups[index],)]
    note = ("Share error, lag and Jain's index are of the VMs that never sleep: received against what is due to them "
            "in hindsight, in percent of one host CPU. Waits are from wanting the CPU to having it; wake: after a "
            "sleep. Losses are predicted, of the CPU time that VMs got.")
    return Group(Text(title, style="bold"), Text(""), _table(head, rows, 1), Text(""), _table(more, more_rows, 1),
                 Text(""), _table(groups, group_rows, 3), Text(""), Text(note, style="dim"))


def _table(head: Sequence[str], rows: Sequence[Sequence[RenderableType]], left: int) -> RenderableType:
    from rich import box
    from rich.table import Table
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    for index, name in enumerate(head):
        table.add_column(name, justify="left" if index < left or name == "Policy" else "right", no_wrap=True,
                         overflow="ellipsis")
    for row in rows:
        table.add_row(*row)
    return table


def _mode(mode: str) -> RenderableType:
    from rich.text import Text

    from .tables import MODE_STYLE
    return Text(mode, style=MODE_STYLE[mode])


def _pct(part: float | None, digits: int) -> str:
    return NONE if part is None else f"{100 * part:.{digits}f} %"


def _count(value: float) -> str:
    from .tables import count
    return count(value)


def _wait(waits: Quantiles, value_ns: int) -> str:
    return _ms(value_ns) if waits.count else NONE


def _ms(value_ns: int | None) -> str:
    if value_ns is None:
        return NONE
    return f"{value_ns / 1e6:.2f} ms" if value_ns < 10_000_000 else f"{value_ns / 1e6:.0f} ms"


def _replay(path: Path, output: str) -> None:
    from ..sched.simulate import ReplayError, replay
    from ..service.backend import ServiceError
    try:
        with path.open(encoding="utf-8") as lines:
            found = replay(lines)
    except (ReplayError, UnicodeDecodeError) as error:
        raise ServiceError(f"{path}: {error}") from error
    except OSError as error:
        raise ServiceError(f"{path} cannot be read: {error.strerror}") from error
    if output == "json":
        from ..service.wire import SCHEMA
        print_json({"schema": SCHEMA, "recording": str(path), **asdict(found)})
    else:
        same = "all answers as recorded" if not found.differing else f"{found.differing} answers differ"
        cpus = f"{found.cpus} host CPU{'s'[:found.cpus != 1]}"
        click.echo(f"{found.decisions} decisions of {found.policy} on {cpus}, {found.calls} calls: {same}")
        for one in found.first:
            click.echo(f"  line {one.line}, CPU {one.cpu}: {one.call} answered {one.answered}, recorded {one.recorded}")
    click.get_current_context().exit(1 if found.differing else 0)
