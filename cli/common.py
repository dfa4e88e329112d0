"""What the commands share: where the service is, how output is chosen, what a table is printed to.

Data goes to stdout, notices to stderr. rich obeys NO_COLOR and draws no colour into a pipe; a
pipe gets wide tables, so that nothing is cut before `grep` sees it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from ..service.client import Client

__all__ = [
    "connect", "control_socket", "default_directory", "notice", "output_option", "print_json",
    "print_table", "screen_width", "stdout_console", "strict_option",
]

PIPE_WIDTH: Final = 160
_F = TypeVar("_F", bound=Callable[..., Any])


def default_directory() -> Path:
    """Where a service of this user keeps its socket and state."""
    if os.geteuid() == 0:
        return Path("/run/mixvisor")
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime:
        return Path(runtime) / "mixvisor"
    return Path.home() / ".local" / "state" / "mixvisor"


def named_socket() -> Path | None:
    """What --socket or MIXVISOR_SOCKET says, if anything."""
    given = click.get_current_context().find_root().obj
    return Path(given) if given else None


def control_socket() -> Path:
    """The socket to ask."""
    return named_socket() or default_directory() / "control.sock"


def connect(timeout_seconds: float | None = None) -> Client:
    """A client of the running service. Raises ServiceError (exit code 5 where there is none)."""
    from ..service.client import TIMEOUT_SECONDS, Client
    return Client(control_socket(), timeout_seconds=timeout_seconds or TIMEOUT_SECONDS)


def output_option(function: _F) -> _F:
    return click.option(
        "-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True,
        help="A table for people or JSON for programs.")(function)


def strict_option(function: _F) -> _F:
    return click.option(
        "--strict", is_flag=True, help="Exit with code 8 where there is a warning (notes do not count).")(function)


def stdout_console() -> Console:
    from rich.console import Console
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPE_WIDTH
    return console


def screen_width() -> int:
    return stdout_console().width


def print_table(table: RenderableType) -> None:
    stdout_console().print(table)


def print_json(data: Any) -> None:
    """One document, indented: the same fields as the API's."""
    click.echo(json.dumps(data, indent=2, ensure_ascii=False))


def notice(text: str) -> None:
    """Something a person may want to know, beside the data."""
    click.echo(text, err=True)
