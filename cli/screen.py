"""`screen` and `keys`: a VM's text screen and keyboard without sitting in front of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import click

from .common import connect, output_option, print_json

if TYPE_CHECKING:
    from ..service.client import Client
    from .keys import Key

__all__ = ["keys", "screen", "type_keys"]

POLL_SECONDS: Final = 0.05
STILL_SECONDS: Final = 0.4       # a screen that has not changed for so long has settled
TYPE_SECONDS: Final = 10.0       # the guest takes no key for so long: it does not read them
NOTATION: Final = r"\n is Enter; {F1} {ESC} {UP} {CTRL-C} {ALT-F4} name keys; \{ is a brace"


def type_keys(client: Client, name: str, codes: Sequence[Key]) -> None:
    """Give the guest all keys, as fast as its buffer takes them. Raises ServiceError."""
    from ..service.backend import TimedOut

    rest = list(codes)
    limit = time.monotonic() + TYPE_SECONDS
    while rest:
        taken = client.keys(name, rest)
        rest = rest[taken:]
        if taken:
            limit = time.monotonic() + TYPE_SECONDS
        elif time.monotonic() > limit:
            raise TimedOut(f"{name} took {len(codes) - len(rest)} of {len(codes)} keys and then "
                           f"none for {TYPE_SECONDS:.0f} s: its program does not read the keyboard")
        if rest:
            time.sleep(POLL_SECONDS)


def _parse(text: str) -> list[Key]:
    from .keys import UnknownKey, text_to_keys
    try:
        return text_to_keys(text)
    except UnknownKey as error:
        raise click.UsageError(str(error)) from error


@click.command(epilog=NOTATION)
@click.argument("name")
@click.argument("text")
def keys(name: str, text: str) -> None:
    """Type TEXT on the keyboard of a VM, for example `mixvisor keys dos 'ver\\n'`."""
    codes = _parse(text)
    with connect() as client:
        type_keys(client, name, codes)


@click.command(epilog=f"Keys: {NOTATION}")
@click.argument("name")
@click.option("--keys", "text", default=None, metavar="TEXT",
              help="Type this first and wait until the screen has settled.")
@click.option("--until", default=None, metavar="TEXT",
              help="Wait until this is on the screen (exit code 7 if it does not come).")
@click.option("--timeout", type=click.FloatRange(min=0), default=30.0, show_default=True,
              metavar="SECONDS", help="How long to wait for --until and --keys.")
@output_option
def screen(name: str, text: str | None, until: str | None, timeout: float, output: str) -> None:
    """Print the text screen of a VM."""
    codes = _parse(text) if text is not None else []
    with connect() as client:
        before = client.screen(name)
        picture = before
        if codes:
            type_keys(client, name, codes)
            picture = _settled(client, name, before["version"], timeout)
        if until is not None:
            picture = _until(client, name, until, timeout)
    if output == "json":
        print_json(picture)
        return
    rows = [row.rstrip() for row in picture["rows"]]
    while rows and not rows[-1]:
        rows.pop()
    click.echo("\n".join(rows))


def _settled(client: Client, name: str, before: int, timeout: float) -> dict[str, Any]:
    """The screen once it has changed and then kept still, or as it is after `timeout`."""
    limit = time.monotonic() + timeout
    picture = client.screen(name)
    since = time.monotonic()
    while time.monotonic() < limit:
        time.sleep(POLL_SECONDS)
        newer = client.screen(name)
        if newer["version"] != picture["version"]:
            since = time.monotonic()
        picture = newer
        if picture["version"] != before and time.monotonic() - since >= STILL_SECONDS:
            break
    return picture


def _until(client: Client, name: str, text: str, timeout: float) -> dict[str, Any]:
    from ..service.backend import TimedOut

    limit = time.monotonic() + timeout
    while True:
        picture = client.screen(name)
        if any(text in row for row in picture["rows"]):
            return picture
        if time.monotonic() >= limit:
            raise TimedOut(f"{text!r} did not appear on the screen of {name} within {timeout:g} s")
        time.sleep(POLL_SECONDS)
