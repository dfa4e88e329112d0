"""The lab's result as a table: a row a host, a column a check; below it what failed, in its own words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .emulator import Report
from .hosts import CHECKS

__all__ = ["document", "table"]


def _cell(report: Report, check: str) -> str:
    outcome = report.outcomes.get(check)
    if check not in report.checks:
        return "-"
    if outcome is None:
        return "not run" if report.trouble else "missing"
    word = {True: "ok", False: "FAILED", None: "-"}[outcome.ok]
    return f"{word} {outcome.notes}".rstrip()


def table(reports: Iterable[Report]) -> str:
    """Plain text: it goes into logs."""
    done = list(reports)
    rows = [["host", *CHECKS, "wall", "CPU"]]
    rows += [[report.host.name, *(_cell(report, check) for check in CHECKS), f"{report.wall_s:.0f} s",
              f"{report.cpu_s:.0f} s"] for report in done]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("─" * width for width in widths))
    return "\n".join([*lines, *_words(done)])


def _words(reports: Sequence[Report]) -> list[str]:
    lines: list[str] = []
    for report in reports:
        bad = [(check, outcome.words) for check, outcome in report.outcomes.items() if outcome.ok is False]
        if not report.trouble and not bad:
            continue
        lines += ["", f"{report.host.name} ({report.host.title}):"]
        if report.trouble:
            lines.append(f"  {report.trouble}")
        for check, words in bad:
            lines.append(f"  {check}:")
            lines += [f"    {line}" for line in words.splitlines()]
    return lines


def document(reports: Iterable[Report]) -> dict[str, Any]:
    """The same for programs."""
    return {"schema": 1, "hosts": [{
        "host": report.host.name, "title": report.host.title, "good": report.good, "trouble": report.trouble,
        "wall_s": round(report.wall_s, 1), "cpu_s": round(report.cpu_s, 1), "facts": report.facts,
        "checks": {check: {"ok": outcome.ok, "words": outcome.words, "notes": outcome.notes}
                   for check, outcome in report.outcomes.items()},
    } for report in reports]}
