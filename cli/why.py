"""`why`: where a guest stands, or how it ended: registers, mode, code, last exits, POST codes."""

from __future__ import annotations

import time
from typing import Any

import click

from .common import connect, output_option, print_json
from .inside import code_lines, exit_lines, register_lines

__all__ = ["why"]


@click.command()
@click.argument("name")
@output_option
def why(name: str, output: str) -> None:
    """Say why a VM ended, or where it stands: reason, registers, mode, code around, last exits."""
    with connect() as client:
        answer = client.why(name)
    if output == "json":
        print_json(answer)
        return
    click.echo("\n".join(_lines(name, answer, time.time())))


def _lines(name: str, answer: dict[str, Any], now_unix_s: float) -> list[str]:
    since = answer.get("since_unix_s")
    ago = f" {max(0, round(now_unix_s - since))} s ago" if since is not None else ""
    reason = f": {answer['reason']}" if answer.get("reason") else ""
    code = f" ({answer['code']})" if answer.get("code") else ""
    lines = [f"{name} is {answer['state']}{', ended' + ago if ago else ''}{reason}{code}"]
    report, registers = answer.get("report"), answer.get("registers")
    if report is not None:
        verb = "stood" if answer.get("code") else "stands"
        lines += [f"It {verb} at {report['place']} in {report['mode']}: {report['instruction']}", "",
                  *code_lines(report["code"], report["address"])]
    if registers:
        lines += ["", *register_lines(registers)]
    if report is not None and report["exits"]:
        lines += ["", "Last exits, the newest last:", *exit_lines(report["exits"])]
    if report is not None and report["post"]:
        lines += ["", "POST codes, the newest last: " + " ".join(f"{code:02X}" for code in report["post"])]
    if report is None and not registers:
        lines.append("Nothing is known of its registers and code: " + (
            "it has not run yet" if answer["state"] == "defined" else "its worker did not say"))
    return lines
