"""`mixvisor`: the group of commands, and what an error becomes.

Theory.  Every command lives in a module of its own family that is imported when it is asked for,
and imports what it needs inside the function: `mixvisor --version` and a misspelt command answer
before trio, pydantic or rich are loaded. A `ServiceError`, wherever it comes from, ends as one
line on stderr and its exit code; data goes to stdout and nothing else does.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, Final

import click

__all__ = ["main"]

# Command -> (module, attribute), in the order of the help.
COMMANDS: Final = {
    "demo": ("demo", "demo"),
    "run": ("serve", "run"),
    "check": ("files", "check"),
    "schema": ("files", "schema"),
    "modes": ("modes", "modes"),
    "measure": ("measure", "measure"),
    "simulate": ("simulate", "simulate"),
    "scan": ("scan", "scan"),
    "disk": ("disk", "disk"),
    "ps": ("show", "ps"),
    "top": ("show", "top"),
    "mixing": ("mixing", "mixing"),
    "start": ("control", "start"),
    "stop": ("control", "stop"),
    "kill": ("control", "kill"),
    "pause": ("control", "pause"),
    "resume": ("control", "resume"),
    "mode": ("state", "mode"),
    "save": ("state", "save"),
    "restore": ("state", "restore"),
    "set": ("sharing", "set_"),
    "policy": ("sharing", "policy"),
    "console": ("console", "console"),
    "why": ("why", "why"),
    "exits": ("exits", "exits"),
    "profile": ("profile", "profile"),
    "screen": ("screen", "screen"),
    "keys": ("screen", "keys"),
    "trace": ("trace", "trace"),
    "host": ("host", "host"),
    "version": ("host", "version"),
}

EPILOG: Final = """\b
Exit codes:
  0  done                       4  not possible in this state
  1  failed                     5  no service to ask
  2  wrong usage                6  not permitted
  3  no such VM                 7  not in time
                                8  a warning, with --strict

\b
A first look:      mixvisor demo
A file of yours:   mixvisor run FILE        (mixvisor check FILE only looks at it)
While it runs:     mixvisor top             (from another terminal)
"""


class Failure(click.ClickException):
    """One sentence on stderr and an exit code."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        # click reads it of the instance, and declares it for the class.
        self.exit_code = exit_code  # pyright: ignore[reportAttributeAccessIssue]


class Commands(click.Group):
    """The commands, imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute = COMMANDS[cmd_name]
        return getattr(importlib.import_module(f".{module}", __package__), attribute)

    def resolve_command(
        self, ctx: click.Context, args: list[str],
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            near = get_close_matches(name, COMMANDS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "; `mixvisor --help` lists them"
            raise click.UsageError(f"there is no command {name!r}{hint}", ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        from ..service.backend import ServiceError
        try:
            return super().invoke(ctx)
        except ServiceError as error:
            raise Failure(str(error), error.exit_code) from error
        except KeyboardInterrupt:
            # Not click's "Aborted!": the person knows. The shell's code for SIGINT.
            ctx.exit(130)


def _show_version(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        from importlib.metadata import version
        click.echo(f"mixvisor {version('mixvisor')}")
        ctx.exit()


@click.group(cls=Commands, invoke_without_command=True, epilog=EPILOG,
             context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--socket", "socket", envvar="MIXVISOR_SOCKET", metavar="PATH", default=None,
              help="Control socket of the service [env MIXVISOR_SOCKET; default "
                   "/run/mixvisor/control.sock, or below XDG_RUNTIME_DIR for other users].")
@click.option("--version", is_flag=True, is_eager=True, expose_value=False,
              callback=_show_version, help="Show the version and exit.")
@click.pass_context
def _mixvisor(ctx: click.Context, socket: str | None) -> None:
    """Software- and hardware-virtualized VMs side by side: sharing the CPUs fairly, measured.

    `mixvisor demo` shows it; `mixvisor run FILE` is the service.
    """
    ctx.obj = socket
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script."""
    _mixvisor(args=arguments, prog_name="mixvisor")
