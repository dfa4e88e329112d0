"""The tables that people see, made from snapshots alone: nothing here asks, waits or prints.

Each function returns a rich renderable that fits the width it is told; columns that matter less
are left out before one that matters is cut. Software is cyan and hardware magenta everywhere.
Shares are percent of one host CPU.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..metrics.snapshot import Snapshot, VmSnapshot, WarningSnapshot
from ..vm.modes import ModeDecision
from .rates import CpuRate, Verdict, VmRate

__all__ = [
    "closing_view", "count", "fields_table", "live_view", "plain_line", "plain_table", "plan_table", "ps_table",
    "top_view",
]

MODE_STYLE: Final = {"software": "cyan", "hardware": "magenta"}
STATE_STYLE: Final = {"running": "green", "paused": "yellow", "crashed": "bold red",
                      "failed": "bold red"}
WIDE: Final = 96
MEDIUM: Final = 76
BAR_CELLS: Final = 16
NONE: Final = "–"
_STEPS: Final = " ▏▎▍▌▋▊▉█"


def count(value: float | None) -> str:
    """A number that a person reads at a glance: 950, 12.3 k, 1.30 G; at most seven characters."""
    if value is None:
        return NONE
    if value < 1000:
        return f"{value:.0f}"
    for unit in ("k", "M", "G", "T", "P"):
        value /= 1000
        if value < 999.5:
            digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
            return f"{value:.{digits}f} {unit}"
    return f"{value:.0f} P"


def size(bytes_: int) -> str:
    for unit, step in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if bytes_ >= step:
            return f"{bytes_ / step:.3g} {unit}"
    return f"{bytes_} B"


def _pct(share: float | None, digits: int = 1) -> str:
    return NONE if share is None else f"{100 * share:.{digits}f} %"


def _error(error: float | None) -> Text:
    if error is None:
        return Text(NONE)
    shown = f"{100 * error:+.2f} %"
    if shown in ("+0.00 %", "-0.00 %"):
        shown = "0.00 %"
    size_ = abs(error)
    return Text(shown, style="green" if size_ <= 0.003 else "yellow" if size_ <= 0.01 else "red")


def _mode(vm: VmSnapshot) -> Text:
    return Text(vm.mode, style=MODE_STYLE[vm.mode])


def _state(vm: VmSnapshot) -> Text:
    return Text(vm.state, style=STATE_STYLE.get(vm.state, ""))


def _bar(rate: VmRate, width: int) -> Text:
    """What was received; a mark where the entitlement ends."""
    eighths = round(min(1.0, max(0.0, rate.received or 0.0)) * width * 8)
    cells = ("█" * (eighths // 8) + _STEPS[eighths % 8].strip()).ljust(width)[:width]
    text = Text(cells, style=MODE_STYLE[rate.vm.mode])
    if rate.entitled is not None and rate.entitled > 0:
        place = min(width - 1, round(min(1.0, rate.entitled) * width))
        if cells[place] == " ":
            text = Text.assemble(text[:place], ("│", "bold"), text[place + 1:])
    return text


_Column = tuple[str, str]        # heading, justification
_FLEXIBLE: Final = ("VM", "Why")


def _table(columns: Sequence[_Column], rows: Sequence[Sequence[Text | str]]) -> Table:
    """Where it is too narrow, names and reasons are shortened; numbers never are."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold",
                  padding=(0, 1, 0, 0))
    for index, (name, justify) in enumerate(columns):
        least = max(len(name), *(len(row[index]) for row in rows)) if rows else len(name)
        table.add_column(
            name, justify="right" if justify == "right" else "left", no_wrap=True,
            overflow="ellipsis", min_width=4 if name in _FLEXIBLE else least)
    for row in rows:
        table.add_row(*row)
    return table


def plain_table(columns: Sequence[_Column], rows: Sequence[Sequence[Text | str]]) -> Table:
    """A table whose last column takes what is left and wraps; for data that is no snapshot's."""
    table = _table(columns, rows)
    last = table.columns[-1]
    last.no_wrap, last.min_width, last.overflow = False, len(columns[-1][0]), "fold"
    return table


def live_view(
    snapshot: Snapshot, window: Sequence[VmRate], cpus: Sequence[CpuRate], *, width: int,
    title: str, footer: str = "",
) -> RenderableType:
    """The demo while it runs: what each VM got lately."""
    wide = width >= WIDE
    columns = [("VM", "left"), ("Mode", "left"), ("Why", "left"), ("Weight", "right"),
               ("Entitled", "right"), ("Received", "right"),
               *([("Share of CPU", "left")] if wide else []),
               ("Progress/s", "right"), ("Exits/s", "right")]
    rows = [[rate.vm.name, _mode(rate.vm), _why(rate.vm), str(rate.vm.weight),
             _pct(rate.entitled), _pct(rate.received),
             *([_bar(rate, BAR_CELLS)] if wide else []),
             count(rate.progress), count(rate.exits)] for rate in window]
    return Group(Text(title, style="bold"), Text(_schedule_line(snapshot, cpus), style="dim"),
                 Text(""), _table(columns, rows), Text(""), *_banners(snapshot.warnings),
                 *([Text(footer, style="dim")] if footer else []))


def _why(vm: VmSnapshot) -> Text:
    """The rule that decided the mode; of a VM that does not run, that it does not."""
    return Text(vm.mode_rule) if vm.state == "running" else _state(vm)


def _schedule_line(snapshot: Snapshot, cpus: Sequence[CpuRate]) -> str:
    scheduler = snapshot.scheduler
    parts = [f"{scheduler.dispatch} dispatch", f"slices of {scheduler.slice_ns / 1e6:g} ms"]
    if cpus:
        parts.append(f"{count(sum(c.vm_switches for c in cpus))} VM switches/s")
        parts.append(f"{count(sum(c.mode_switches for c in cpus))} mode switches/s")
    if scheduler.guard == "fired":
        parts.append("the guard took all threads back")
    return " · ".join(parts)


def _banners(warnings: Iterable[WarningSnapshot]) -> list[RenderableType]:
    shown: list[RenderableType] = []
    for warning in warnings:
        style = {"info": "blue", "warning": "yellow", "critical": "red"}[warning.severity]
        words = Text.assemble(warning.message, "\n", (warning.advice, "dim"))
        shown.append(Panel(words, title=f"{warning.severity}: {warning.code}", title_align="left",
                           border_style=style, padding=(0, 1), expand=False))
    return shown


def closing_view(
    snapshot: Snapshot, total: Sequence[VmRate], judged: Verdict, *, width: int,
) -> RenderableType:
    """The end of a demo: the whole run, why each VM ran as it did, and the verdict."""
    wide = width >= WIDE
    columns = [("VM", "left"), ("Mode", "left"), ("Why", "left"), ("Weight", "right"),
               ("Entitled", "right"), ("Received", "right"), ("Error", "right"),
               ("Progress", "right"), *([("Exits", "right"), ("Slices", "right")] if wide else [])]
    rows = [[rate.vm.name, _mode(rate.vm), _why(rate.vm), str(rate.vm.weight),
             _pct(rate.entitled, 2), _pct(rate.received, 2), _error(rate.error),
             count(rate.progress_total),
             *([count(rate.exits_total), count(rate.slices_total)] if wide else [])]
            for rate in total]
    seconds = total[0].seconds if total else 0.0
    return Group(
        Text(f"The whole run: {seconds:.1f} s, shares in percent of one host CPU", style="bold"),
        Text(""), _table(columns, rows), Text(""), *_reasons(snapshot.vms), Text(""),
        *_banners(snapshot.warnings),
        Text.assemble(("Verdict: ", "bold green" if judged.good else "bold yellow"), judged.text))


def _reasons(vms: Iterable[VmSnapshot]) -> list[RenderableType]:
    """Each rule with its sentence once, and the VMs it decided."""
    grouped: dict[tuple[str, str, str], list[str]] = {}
    for vm in vms:
        grouped.setdefault((vm.mode, vm.mode_rule, vm.mode_reason), []).append(vm.name)
    return [Text.assemble((", ".join(names), "bold"), ": ", (mode, MODE_STYLE[mode]),
                          f" ({rule}). {reason}")
            for (mode, rule, reason), names in grouped.items()]


def plain_line(window: Sequence[VmRate], seconds: float) -> str:
    """One line for a log or a pipe: `  5.0 s  sw-a 12.4 % (12.5 %)  ...`: received (entitled)."""
    shares = "  ".join(f"{rate.vm.name} {_pct(rate.received)} ({_pct(rate.entitled)})"
                       if rate.vm.state == "running" else f"{rate.vm.name} {rate.vm.state}"
                       for rate in window)
    return f"{seconds:6.1f} s  {shares}"


def ps_table(
    vms: Sequence[VmSnapshot], *, width: int, now_unix_s: float | None = None,
) -> RenderableType:
    """The VMs and how they are; a reason under the table where one is not well."""
    now = time.time() if now_unix_s is None else now_unix_s
    wide, medium = width >= WIDE, width >= MEDIUM
    columns = [("VM", "left"), ("State", "left"), ("Mode", "left"), ("Why", "left"),
               *([("Engine", "left")] if wide else []), ("Weight", "right"),
               *([("Latency", "left")] if any(vm.latency != "normal" for vm in vms) else []),
               *([("vCPUs", "right")] if wide else []), *([("Memory", "right")] if medium else []),
               *([("Pid", "right")] if wide else []), ("Up", "right"),
               *([("Console", "left")] if medium else [])]
    rows = [[vm.name, _state(vm), _mode(vm), vm.mode_rule, *([vm.engine] if wide else []),
             str(vm.weight), *([vm.latency] if any(vm.latency != "normal" for vm in vms) else []),
             *([str(len(vm.vcpus))] if wide else []),
             *([size(vm.memory_bytes)] if medium else []),
             *([str(vm.pid or NONE)] if wide else []), _up(vm, now),
             *([vm.console] if medium else [])] for vm in vms]
    notes = [Text.assemble((vm.name, "bold"), f": {vm.state_reason}")
             for vm in vms if vm.state_reason]
    return Group(_table(columns, rows), *notes)


def plan_table(plan: Mapping[str, ModeDecision]) -> RenderableType:
    """The mode that each VM would run in, the rule that says so, and its reason in full."""
    columns = [("VM", "left"), ("Mode", "left"), ("Engine", "left"), ("Rule", "left")]
    rows = [[name, Text(decision.mode, style=MODE_STYLE[decision.mode]), decision.engine, decision.rule]
            for name, decision in plan.items()]
    reasons = [Text.assemble((name, "bold"), f": {' '.join((decision.reason, *decision.notes))}")
               for name, decision in plan.items()]
    return Group(_table(columns, rows), *reasons)


def _up(vm: VmSnapshot, now: float) -> str:
    if vm.started_unix_s is None or vm.pid is None:
        return NONE
    return _age(now - vm.started_unix_s)


def _age(seconds: float) -> str:
    minutes, left = divmod(max(0, int(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours}h"
    if hours:
        return f"{hours}h {minutes}m"
    return f"{minutes}m {left}s" if minutes else f"{left}s"


def top_view(
    snapshot: Snapshot, rates: Sequence[VmRate], cpus: Sequence[CpuRate], *, width: int,
    hidden: int = 0,
) -> RenderableType:
    """`mixvisor top`: every VM's share, work and waiting over the last interval."""
    wide = width >= WIDE
    columns = [("VM", "left"), ("Mode", "left"), ("Why", "left"),
               *([("CPU", "right"), ("Weight", "right")] if wide else []),
               ("Entitled", "right"), ("Received", "right"),
               ("Steal", "right"), ("Progress/s", "right"), ("Exits/s", "right")]
    rows = [[rate.vm.name, _mode(rate.vm), _why(rate.vm),
             *([_placed(rate.vm), str(rate.vm.weight)] if wide else []),
             _pct(rate.entitled), _pct(rate.received), _pct(rate.wait), count(rate.progress),
             count(rate.exits)] for rate in rates]
    running = sum(vm.state == "running" for vm in snapshot.vms)
    head = (f"{running} of {len(snapshot.vms)} VMs running on host CPU "
            f"{','.join(map(str, snapshot.host.vm_cpus))}")
    from .costs import mixing_line  # which has tables of ours
    cost = mixing_line(snapshot)
    more = [Text(f"… and {hidden} more (--limit)", style="dim")] if hidden else []
    return Group(
        Text(head, style="bold"), Text(_schedule_line(snapshot, cpus), style="dim"),
        *([Text(cost, style="dim")] if cost else []), Text(""), _table(columns, rows), *more, Text(""),
        *_banners(snapshot.warnings))


def _placed(vm: VmSnapshot) -> str:
    """The host CPUs its vCPUs live on."""
    cpus = sorted({vcpu.cpu for vcpu in vm.vcpus if vcpu.cpu is not None})
    return ",".join(map(str, cpus)) or NONE


def fields_table(rows: Iterable[tuple[str, str]]) -> RenderableType:
    """Names and values, one a line."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, value in rows:
        table.add_row(name, Text(value))
    return table
