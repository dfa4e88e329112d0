"""`start`, `stop`, `kill`, `pause`, `resume`: one action on some VMs, in the order given.

A VM that refuses does not keep the others from their turn; each refusal is a line on stderr and
the exit code is that of the first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import click

from .common import connect, notice, output_option, print_json

if TYPE_CHECKING:
    from ..service.backend import Action

__all__ = ["kill", "pause", "resume", "start", "stop"]

_DONE: Final = {"start": "started", "stop": "stopped", "kill": "killed", "pause": "paused",
                "resume": "resumed"}


def _act(names: tuple[str, ...], action: Action, output: str) -> None:
    from ..service.backend import ServiceError

    results: list[dict[str, object]] = []
    code = 0
    with connect() as client:
        for name in names:
            try:
                client.act(name, action)
            except ServiceError as error:
                code = code or error.exit_code
                results.append({"name": name, "action": action, "done": False,
                                "error": {"code": error.code, "message": str(error)}})
                notice(f"Error: {error}")
            else:
                results.append({"name": name, "action": action, "done": True})
                if output == "table":
                    click.echo(f"{name} {_DONE[action]}")
    if output == "json":
        print_json(results)
    click.get_current_context().exit(code)


def _command(action: Action, help_: str) -> click.Command:
    @click.command(action, help=help_)
    @click.argument("names", metavar="NAME...", nargs=-1, required=True)
    @output_option
    def command(names: tuple[str, ...], output: str) -> None:
        _act(names, action, output)
    return command


start = _command("start", "Start VMs that do not run.")
stop = _command("stop", "Stop VMs in good order, and wait until they have ended.")
kill = _command("kill", "End VMs at once.")
pause = _command("pause", "Hold VMs where they are; they use no CPU.")
resume = _command("resume", "Let paused VMs go on.")
