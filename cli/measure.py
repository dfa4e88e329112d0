"""`measure`: what mixing software and hardware VMs costs on this host.

Theory.  Either four built-in guests of a small service of its own, on one host CPU, or VMs of the running service that
consent (`measure = true` in their tables); the measurement is the same (measuring.py), by the control socket. What
is shown comes from the raw slices alone, so `--from` shows the same again from the file that was kept.

Data go to stdout, progress to stderr: a bar on a terminal, a line every few seconds elsewhere.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from .common import connect, control_socket, default_directory, notice, output_option

if TYPE_CHECKING:
    from ..config.model import Config
    from ..metrics.mixing.report import Analysis
    from ..metrics.mixing.slices import Recording, Vm
    from ..metrics.snapshot import Snapshot
    from ..service.client import Client
    from ..vm.host import HostFacts
    from .measuring import Ended, View

__all__ = ["measure"]

SLICES_US: Final = (500, 1000, 2000)
REFERENCE_US: Final = 1000
SECONDS: Final = 60.0
SECONDS_WITH_PRECISION: Final = 600.0
SECONDS_MAX: Final = 3_600.0
WANTED: Final = 0.002
LINE_SECONDS: Final = 3.0
GUESTS: Final = ("randmem", "alu", "rings", "portio")


class Percent(click.ParamType):
    """`0.2%` or `0.2 %`: a part of guest work, as a fraction."""

    name = "percent"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*%\s*", str(value))
        if not match or not 0.0 < float(match[1]) <= 10.0:
            self.fail(f"{value!r} is not a percentage above 0 and up to 10, such as 0.2%", param, ctx)
        return float(match[1]) / 100


class Size(click.ParamType):
    """`256K`: bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from ..config.model import parse_size
        try:
            return parse_size(value)
        except ValueError as error:
            self.fail(f"{value!r} is not {error}", param, ctx)


class Slices(click.ParamType):
    """`0.5,1,2`: milliseconds."""

    name = "ms,ms.."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            found = tuple(sorted({round(float(part) * 1e6) for part in str(value).split(",")}))
        except ValueError:
            found = ()
        if not found or not all(250_000 <= ns <= 20_000_000 for ns in found):
            self.fail(f"{value!r} is not a list of slice lengths from 0.25 to 20 ms, such as 0.5,1,2", param, ctx)
        return found


@click.command()
@click.option("--vms", default=None, metavar="A,B,C,D",
              help="Measure with these VMs of the running service, two of each mode; their tables must say "
                   "measure = true. Default: built-in guests in a service of their own.")
@click.option("--from", "source", type=click.Path(path_type=Path, dir_okay=False), default=None, metavar="DATA",
              help="Measure nothing: analyse the slices that an earlier measurement kept.")
@click.option("--seconds", type=click.FloatRange(min=5, max=SECONDS_MAX), default=None, metavar="N",
              help="Measure for at most so long [default: 60; 600 with --precision].")
@click.option("--precision", type=Percent(), default=None, metavar="P%",
              help="End as soon as the 95 % interval of the loss at 1 ms slices is no wider than ± P percent of guest "
                   "work, such as 0.2%.")
@click.option("--slices", "slices_ns", type=Slices(), default=None, metavar="MS,MS..",
              help="Slice lengths of the blocks in milliseconds [default: 0.5,1,2].")
@click.option("--cpu", type=click.IntRange(min=0), default=None, metavar="N",
              help="Host CPU of the built-in guests [default: the highest-numbered].")
@click.option("--guest", type=click.Choice(GUESTS), default=GUESTS[0], show_default=True,
              help="What the built-in guests do.")
@click.option("--working-set", type=Size(), default="64K", show_default=True, metavar="SIZE",
              help="Memory that each randmem guest works in. Where the VMs' sets do not fit the L2 cache, the caches' "
                   "cost is measured, which is not one of modes.")
@click.option("--dispatch", type=click.Choice(["auto", "precise", "gentle"]), default="auto", show_default=True,
              help="How slices are enforced with the built-in guests; gentle needs fewer rights and measures worse.")
@click.option("--placebo", type=click.Choice(["software", "hardware"]), default=None,
              help="All four guests in this one mode, two of them called the other: the right answer is no cost.")
@click.option("--out", type=click.Path(path_type=Path), default=None, metavar="PREFIX",
              help="Write PREFIX.csv.gz (every slice) and PREFIX.svg (the plot) [default: mixing-DATE-TIME in the "
                   "current directory; with --from no plot].")
@click.option("--save/--no-save", default=True, show_default=True,
              help="Keep the result where the service finds it, for its warnings and metrics.")
@click.option("--seed", type=click.IntRange(min=0), default=None, metavar="N",
              help="Of the order that is drawn [default: another one each time].")
@output_option
@click.pass_context
def measure(ctx: click.Context, vms: str | None, source: Path | None, output: str, **given: Any) -> None:
    """Measure what mixing software and hardware VMs on one CPU costs here.

    Two VMs of each mode share a host CPU, and a script decides who runs when: in random order, and in blocks that
    differ in nothing but whether switches cross modes. The figure comes with its interval and its controls. Ctrl-C ends
    it early and tells the result so far.
    """
    from ..metrics.mixing import ExtraMissing, need_extra
    from ..service.backend import ServiceError

    try:
        need_extra()
    except ExtraMissing as error:
        raise ServiceError(str(error)) from error
    _refuse_contradictions(ctx, vms, source)
    wish = Wish(ctx, **given)
    # Before a minute of measuring, not after it.
    folder = wish.out.absolute().parent if wish.out else Path.cwd()
    if (source is None or wish.out) and not os.access(folder, os.W_OK | os.X_OK):
        raise click.BadParameter(f"nothing can be written in {folder}", param_hint="--out")
    # SciPy takes a second to load, on a busy host several: not while anything is borrowed.
    from ..metrics.mixing import report, session
    del report, session
    if source is not None:
        _tell(_read(source), wish, output, data=source)
        return
    ended = _of_the_service(vms, wish) if vms is not None else _of_built_in_guests(wish)
    if ended.why == "interrupted":
        notice(f"Interrupted after {ended.seconds:.0f} s; this is the result so far.")
    elif ended.why not in ("time", "precision"):
        notice(f"Ended early, after {ended.seconds:.0f} s: {ended.why}. This is the result so far.")
    _tell(ended.recording, wish, output, data=None)


class Wish:
    """The options that say how to measure."""

    def __init__(
        self, ctx: click.Context, *, seconds: float | None, precision: float | None, slices_ns: tuple[int, ...] | None,
        cpu: int | None, guest: str, working_set: int, dispatch: str, placebo: str | None, out: Path | None, save: bool,
        seed: int | None,
    ) -> None:
        self.ctx = ctx
        self.precision = precision
        self.wanted = precision or WANTED
        self.seconds = seconds or (SECONDS if precision is None else SECONDS_WITH_PRECISION)
        self.slices_ns = slices_ns or tuple(us * 1000 for us in SLICES_US)
        self.cpu = cpu
        self.guest = guest
        self.working_set = working_set
        self.dispatch = dispatch
        self.placebo = placebo
        self.out = out
        self.save = save
        self.seed = int.from_bytes(os.urandom(4), "little") if seed is None else seed


def _refuse_contradictions(ctx: click.Context, vms: str | None, source: Path | None) -> None:
    def given(*names: str) -> list[str]:
        return [f"--{name.replace('_', '-')}" for name in names
                if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE]

    if source is not None:
        wrong = given("vms", "seconds", "slices_ns", "cpu", "guest", "working_set", "dispatch", "placebo", "seed")
        if wrong:
            raise click.UsageError(f"--from measures nothing, so {', '.join(wrong)} say nothing beside it", ctx)
    elif vms is not None:
        wrong = given("cpu", "guest", "working_set", "dispatch", "placebo")
        if wrong:
            raise click.UsageError(f"{', '.join(wrong)} are about built-in guests; with --vms leave them out", ctx)


# -- with VMs of the running service ------------------------------------------------------------

def _of_the_service(names: str, wish: Wish) -> Ended:
    from ..service.backend import Unusable
    from ..vm.host import HostFacts

    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if len(wanted) != 4:
        raise click.UsageError(f"--vms takes four VMs, two of each mode; found {len(wanted)}", wish.ctx)
    stop = threading.Event()
    with connect() as client, _stopped_by_ctrl_c(stop):
        _look_before(client.snapshot(), wanted)
        lent = client.lend(wanted)
        unknown = [vm["name"] for vm in lent["vms"] if not vm["counts"]]
        if unknown:
            client.give_back(lent["loan"])
            raise Unusable(f"nobody can know how much work is done by {', '.join(unknown)}: no progress counter (key "
                           f"progress of a [[vm]] table) is named, and {lent['uncounted']}")
        return _campaign(client, lent, wish, HostFacts.read(), stop)


def _look_before(snapshot: Snapshot, wanted: Sequence[str]) -> None:
    """What can be refused before anything is borrowed. Raises ServiceError."""
    from ..metrics.mixing.session import WrongVms, roles_of
    from ..metrics.mixing.slices import Vm
    from ..service.backend import Conflict, NotFound, Unusable

    known = {vm.name: vm for vm in snapshot.vms}
    missing = [name for name in wanted if name not in known]
    if missing:
        raise NotFound(f"there is no VM {', '.join(missing)}; there are: {', '.join(known) or 'none'}")
    idle = [name for name in wanted if known[name].state != "running"]
    if idle:
        raise Conflict(f"{', '.join(idle)} do not run")
    try:
        roles_of([Vm(name, known[name].mode) for name in wanted])
    except WrongVms as error:
        raise Unusable(str(error)) from error


@contextlib.contextmanager
def _stopped_by_ctrl_c(stop: threading.Event) -> Iterator[None]:
    """The first asks for the result so far, a second is the usual KeyboardInterrupt."""
    def asked(_number: int, _frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    old = signal.signal(signal.SIGINT, asked)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, old)


# -- with built-in guests -----------------------------------------------------------------------

def _of_built_in_guests(wish: Wish) -> Ended:
    import trio

    from ..service.app import Service
    from ..service.client import Client
    from ..vm.host import HostFacts
    from .logs import logging_to
    from .serve import live, unwrapped

    facts = HostFacts.read()
    config = _config(wish, facts)
    _keep_off(config)
    stop = threading.Event()
    ended: list[Ended] = []
    errors = io.StringIO()

    async def run() -> None:
        with tempfile.TemporaryDirectory(prefix="mixvisor-measure-") as directory:
            socket = Path(directory) / "control.sock"
            service = Service(config, state_dir=Path(directory), socket=socket, facts=facts)

            def campaign() -> Ended:
                with Client(socket) as client:
                    return _campaign(client, client.lend([vm.name for vm in config.vms]), wish, facts, stop)

            async def meanwhile() -> None:
                ended.append(await trio.to_thread.run_sync(campaign))

            await live(service, meanwhile, stop.set)

    with unwrapped():
        try:
            with logging_to("text", least="error", stream=errors):
                trio.run(run)
        finally:
            if errors.getvalue():
                notice(errors.getvalue().rstrip())
    if not ended:
        wish.ctx.exit(130)           # interrupted before it began
    return ended[0]


def _config(wish: Wish, facts: HostFacts) -> Config:
    from ..config.model import GUESTS as INFO
    from ..config.model import Config
    from ..service.backend import ServiceError

    cpu = max(facts.cpus) if wish.cpu is None else wish.cpu
    if cpu not in facts.cpus:
        raise click.BadParameter(
            f"host CPU {cpu} cannot be used; there are {', '.join(map(str, facts.cpus))}", param_hint="--cpu")
    if not facts.modes.kvm_usable and wish.placebo != "software":
        raise ServiceError(f"hardware VMs cannot run here, so there is nothing to mix: {facts.kvm.why}. "
                           f"{facts.kvm.remedy}".rstrip())
    parameters: dict[str, int] = {}
    if wish.guest == "randmem":
        if not 4096 <= wish.working_set <= 1 << 30 or wish.working_set & (wish.working_set - 1):
            raise click.BadParameter("a power of two from 4K to 1G", param_hint="--working-set")
        parameters["working_set"] = wish.working_set
    modes = [wish.placebo] * 4 if wish.placebo else ["hardware", "hardware", "software", "software"]
    return Config.model_validate({
        "host": {"cpus": (cpu,), "dispatch": wish.dispatch}, "scheduler": {"slice_us": REFERENCE_US},
        "metrics": {"listen": "none"},
        "vm": [{"name": name, "mode": mode, "measure": True, "memory": INFO[wish.guest].memory_bytes(parameters),
                "boot": {"guest": wish.guest, **parameters}}
               for name, mode in zip(("hard-1", "hard-2", "soft-1", "soft-2"), modes, strict=True)]})


def _keep_off(config: Config) -> None:
    """Two services on one host CPU would measure each other. Raises ServiceError."""
    from ..service.backend import Conflict, ServiceError
    from ..service.client import Client

    try:
        with Client(control_socket()) as client:
            snapshot = client.snapshot()
    except ServiceError:
        return                       # none there, or none that we may ask
    assert config.host.cpus is not None
    here = [vm.name for vm in snapshot.vms
            if vm.state == "running" and any(vcpu.cpu in config.host.cpus for vcpu in vm.vcpus)]
    if here:
        raise Conflict(
            f"a Mixvisor service runs {', '.join(here[:4])} on host CPU {config.host.cpus[0]}, and each would disturb"
            " the other: measure with VMs of that service (--vms), on another CPU (--cpu), or stop it first")


# -- both ---------------------------------------------------------------------------------------

def _campaign(client: Client, lent: Mapping[str, Any], wish: Wish, facts: HostFacts, stop: threading.Event) -> Ended:
    import numpy as np

    from ..metrics.mixing.session import Session
    from ..metrics.mixing.slices import Vm
    from .measuring import Campaign, l2_bytes, load_average

    vms: list[Vm] = [Vm(vm["name"], vm["mode"]) for vm in lent["vms"]]
    if wish.placebo:
        vms = [Vm(vm.name, "hardware" if at < 2 else "software") for at, vm in enumerate(vms)]
    if lent["dispatch"] != "precise":
        notice(f"Slices are not exact here ({lent['dispatch']} dispatch: {lent['dispatch_reason']}). Many will be of "
               "no use, and the result is worse for it.")
    session = Session(vms, wish.slices_ns, REFERENCE_US * 1000, np.random.default_rng(wish.seed))
    sizes = {vm["working_set_bytes"] for vm in lent["vms"]}
    load = load_average()

    def about(seconds: float, why: str) -> dict[str, Any]:
        return {
            **lent["host"], "measured_unix_s": round(time.time(), 3), "seconds": round(seconds, 3), "ended": why,
            "cpu": lent["cpu"], "dispatch_reason": lent["dispatch_reason"], "guests": _guests(lent["vms"]),
            "working_set_bytes": None if None in sizes else max(sizes), "l2_bytes": l2_bytes(lent["cpu"]),
            "placebo": wish.placebo, "seed": wish.seed, "load_average": [load, load_average()], "host": facts.to_json()}

    view = _view(wish)
    with view:
        return Campaign(
            client, lent, session, lengths=len(wish.slices_ns), seconds=wish.seconds, precision=wish.precision,
            wanted=wish.wanted, view=view, stop=stop).run(about)


def _guests(vms: Sequence[Mapping[str, Any]]) -> str:
    from ..config.model import format_size

    kinds = {f"{vm['guest']} {format_size(vm['working_set_bytes'])}" if vm["working_set_bytes"] else str(vm["guest"])
             for vm in vms}
    return f"{len(vms)} guests, {' and '.join(sorted(kinds))}"


def _read(source: Path) -> Recording:
    from ..metrics.mixing.slices import DataError, read
    from ..service.backend import ServiceError

    try:
        return read(source)
    except DataError as error:
        raise ServiceError(str(error)) from error


def _view(wish: Wish) -> Any:
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    return _Bar(console, wish) if console.is_terminal else _Lines(wish)


def _closing(analysis: Analysis | None, wish: Wish) -> str:
    """How far the interval has closed, in words."""
    if analysis is None or analysis.cost is None or analysis.precision is None:
        return "too few slices yet"
    goal = f" (until ± {100 * wish.precision:g} %)" if wish.precision else ""
    return (f"{analysis.cost.value / 1e3:+.1f} ± {analysis.cost.half_width() / 1e3:.1f} µs a crossing, "
            f"± {100 * analysis.precision:.2f} %{goal}")


class _Bar:
    """On a terminal."""

    def __init__(self, console: Any, wish: Wish) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        self._wish = wish
        self._progress = Progress(
            TextColumn("Measuring"), BarColumn(bar_width=24), TextColumn("{task.description}"), console=console,
            transient=True)
        self._task = self._progress.add_task("", total=wish.seconds)

    def __enter__(self) -> View:
        self._progress.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._progress.stop()

    def show(self, elapsed_s: float, slices: int, analysis: Analysis | None) -> None:
        done = elapsed_s
        if self._wish.precision and analysis is not None and analysis.precision:
            # Widths shrink with the root of time.
            done = max(done, self._wish.seconds * min(1.0, (self._wish.precision / analysis.precision) ** 2))
        self._progress.update(
            self._task, completed=done,
            description=f"{elapsed_s:3.0f} s of {self._wish.seconds:g}  {_closing(analysis, self._wish)}")


class _Lines:
    """Elsewhere: a line every few seconds."""

    def __init__(self, wish: Wish) -> None:
        self._wish = wish
        self._next_s = LINE_SECONDS

    def __enter__(self) -> View:
        return self

    def __exit__(self, *_error: object) -> None:
        pass

    def show(self, elapsed_s: float, slices: int, analysis: Analysis | None) -> None:
        if elapsed_s >= self._next_s:
            self._next_s = elapsed_s + LINE_SECONDS
            notice(f"{elapsed_s:.0f} s, {slices} slices: {_closing(analysis, self._wish)}")


# -- the result ---------------------------------------------------------------------------------

def _tell(recording: Recording, wish: Wish, output: str, *, data: Path | None) -> None:
    from ..metrics.mixing.plot import svg
    from ..metrics.mixing.report import analyse, judge, to_json, to_result
    from ..metrics.mixing.slices import write
    from .common import print_json, stdout_console
    from .verdict import show_verdict

    analysis = analyse(recording, wish.wanted)
    verdict = judge(analysis)
    prefix = wish.out or (Path(time.strftime("mixing-%Y%m%d-%H%M%S")) if data is None else None)
    files: dict[str, str | None] = {"data": str(data) if data else None, "plot": None, "result": None}
    if prefix is not None:
        try:
            if data is None:
                path = prefix.with_name(prefix.name + ".csv.gz")
                write(recording, path)
                files["data"] = str(path)
            if analysis.cost is not None:
                path = prefix.with_name(prefix.name + ".svg")
                path.write_text(svg(analysis, verdict, title=_title(recording)), encoding="utf-8")
                files["plot"] = str(path)
        except OSError as error:
            notice(f"{prefix}: what was measured cannot be kept: {error.strerror}")
    if wish.save and data is None and not recording.about.get("placebo"):
        files["result"] = _save(to_result(analysis, verdict))
    if output == "json":
        print_json({**to_json(analysis, verdict), "files": files})
    else:
        show_verdict(stdout_console(), recording, analysis, verdict, files)


def _title(recording: Recording) -> str:
    about = recording.about
    return (f"What mixing costs: {about.get('cpu_model', 'unknown CPU')}, {about.get('technology', 'unknown')}; "
            f"{about.get('guests', 'unknown guests')}")


def _save(result: Any) -> str | None:
    """Where the service finds it; a running one is told. None, with a notice, where it is not kept."""
    from ..metrics.mixing.result import RESULT_FILE, ResultError, read_result, write_result
    from ..service.backend import ServiceError
    from ..service.client import Client, Unreachable

    def older_is_better(older: Any) -> bool:
        return older is not None and older.usable and not result.usable and older.is_of(result.host)

    try:
        with Client(control_socket()) as client:
            known = client.mixing()
            if older_is_better(type(result).from_json(known) if known else None):
                notice("The service keeps what was measured before: this result says less.")
                return None
            client.keep_mixing(result.to_json())
            return f"service on {control_socket()}"
    except Unreachable:
        path = default_directory() / RESULT_FILE
    except (ServiceError, ResultError) as error:
        notice(f"The running service does not know of it: {error}")
        return None
    try:
        with contextlib.suppress(FileNotFoundError, ResultError):
            if older_is_better(read_result(path)):
                notice(f"{path} keeps what was measured before: this result says less.")
                return None
        path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        write_result(result, path)
    except OSError as error:
        notice(f"{path} cannot be written ({error.strerror}): the service will not know of it.")
        return None
    return str(path)
