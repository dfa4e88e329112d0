"""`console`: sit in front of a VM. Its text screen and your keyboard, or its serial port.

Theory.  The screen is polled: quickly while something changes or was typed, slowly otherwise,
because each question interrupts the guest for a moment; it is drawn again only when its version
moved. The terminal is raw, so every key, Ctrl-C too, goes to the guest; Ctrl-] leaves, as in
telnet and virsh. What was set on the terminal is put back whatever happens.

Where it is poor: a terminal smaller than 80 by 25 shows the upper left part; blinking is not
shown, and a VM in a graphics mode shows its stale text screen.
"""

from __future__ import annotations

import base64
import contextlib
import os
import select
import shutil
import sys
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import click

from .common import connect, notice

if TYPE_CHECKING:
    from ..service.client import Client
    from .keys import Key

__all__ = ["console", "draw"]

LEAVE: Final = b"\x1d"              # Ctrl-]
BUSY_SECONDS: Final = 0.04
IDLE_SECONDS: Final = 0.2
BUSY_POLLS: Final = 25              # this many polls at the quick rate after the last change
ESCAPE_SECONDS: Final = 0.05        # an ESC followed by nothing for so long is a key
KEYS_WAITING: Final = 4096
BYTES_WAITING: Final = 1 << 20
SERIAL_PIECE_BYTES: Final = 4096
# The PC's colours are blue-green-red where a terminal's are red-green-blue.
_COLOURS: Final = (0, 4, 2, 6, 1, 5, 3, 7)
_CONTROLS: Final = dict.fromkeys([*range(32), 0x7F, *range(0x80, 0xA0)], " ")


@click.command()
@click.argument("name")
@click.option("--serial", is_flag=True, help="The serial port, where the VM has a screen too.")
def console(name: str, serial: bool) -> None:
    """Use a VM: its screen or serial port, and your keyboard; Ctrl-] leaves."""
    from ..service.backend import Conflict, ServiceError

    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise click.UsageError("a console needs a terminal; `mixvisor screen` and `mixvisor keys` "
                               "work without one")
    with connect() as client:
        kind = client.vm(name)["vm"]["console"]
        if kind == "none" and not serial:
            raise Conflict(f"{name} has no console (its `console` is \"none\")")
        try:
            if serial or kind == "serial":
                notice(f"Serial port of {name}; Ctrl-] leaves.")
                with _raw_terminal():
                    _serial(client, name)
            else:
                with _raw_terminal(), _other_screen():
                    _screen(client, name)
        except ServiceError as error:
            # Said after the terminal is itself again.
            raise type(error)(f"the console of {name} ended: {error}") from error
    notice(f"\nLeft the console of {name}; the VM goes on.")


@contextlib.contextmanager
def _raw_terminal() -> Iterator[None]:
    import termios
    import tty

    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    try:
        tty.setraw(fd)
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


@contextlib.contextmanager
def _other_screen() -> Iterator[None]:
    """The terminal's second screen: the first comes back as it was."""
    _write("\x1b[?1049h\x1b[2J")
    try:
        yield
    finally:
        _write("\x1b[0m\x1b[?25h\x1b[?1049l")


def _write(text: str) -> None:
    data = text.encode("utf-8", "replace")
    while data:
        data = data[os.write(sys.stdout.fileno(), data):]


def _typed(seconds: float) -> bytes | None:
    """What was typed within `seconds`, b"" for nothing, None when the terminal is gone."""
    if not select.select([sys.stdin.fileno()], [], [], seconds)[0]:
        return b""
    return os.read(sys.stdin.fileno(), 4096) or None


def _screen(client: Client, name: str) -> None:
    from .keys import TerminalKeys

    terminal = TerminalKeys()
    waiting: deque[Key] = deque()
    shown: tuple[int, os.terminal_size] | None = None
    busy = BUSY_POLLS
    while True:
        data = _typed(ESCAPE_SECONDS if terminal.pending else
                      BUSY_SECONDS if busy or waiting else IDLE_SECONDS)
        if data is None:
            return
        leaving = LEAVE in data
        typed = terminal.feed(data.partition(LEAVE)[0]) if data else terminal.flush()
        waiting.extend(typed[:KEYS_WAITING - len(waiting)])
        if waiting:
            for _ in range(client.keys(name, list(waiting))):
                waiting.popleft()
            busy = BUSY_POLLS
        if leaving:
            return
        picture = client.screen(name)
        now = (picture["version"], shutil.get_terminal_size())
        busy = BUSY_POLLS if now != shown else max(0, busy - 1)
        if now != shown:
            _write(draw(picture, now[1], name))
            shown = now


def draw(picture: dict[str, Any], size: os.terminal_size, name: str) -> str:
    """The escape sequences that show a text screen on a terminal of `size`."""
    attributes = base64.b64decode(picture["attributes"])
    parts = ["\x1b[?25l"]
    height = len(picture["rows"])
    for y, row in enumerate(picture["rows"][:size.lines]):
        parts.append(f"\x1b[{y + 1};1H")
        last = None
        for x, letter in enumerate(row.translate(_CONTROLS)[:size.columns]):
            place = y * 80 + x
            attribute = attributes[place] if place < len(attributes) else 7
            if attribute != last:
                parts.append(_sgr(attribute))
                last = attribute
            parts.append(letter)
        parts.append("\x1b[0m\x1b[K")
    if size.lines > height:
        hint = f" {name} · Ctrl-] leaves "[:size.columns]
        parts.append(f"\x1b[{height + 1};1H\x1b[2m{hint}\x1b[0m\x1b[J")
    x, y = picture["cursor"]
    if 0 <= x < size.columns and 0 <= y < min(height, size.lines):
        parts.append(f"\x1b[{y + 1};{x + 1}H\x1b[?25h")
    return "".join(parts)


def _sgr(attribute: int) -> str:
    """A VGA attribute as a terminal says it; grey on black is the terminal's own."""
    if attribute == 0x07:
        return "\x1b[0m"
    front = (90 if attribute & 8 else 30) + _COLOURS[attribute & 7]
    back = 40 + _COLOURS[attribute >> 4 & 7]
    return f"\x1b[0;{front};{back}m"


def _serial(client: Client, name: str) -> None:
    offset = 0
    busy = BUSY_POLLS
    waiting = b""
    while True:
        data = _typed(BUSY_SECONDS if busy or waiting else IDLE_SECONDS)
        if data is None:
            return
        before, leave, _after = data.partition(LEAVE)
        # What the guest has no room for yet is offered again: a pasted page arrives as a whole.
        waiting = (waiting + before)[:BYTES_WAITING]
        if waiting:
            sent = waiting[:SERIAL_PIECE_BYTES]
            waiting = waiting[client.serial_input(name, base64.b64encode(sent).decode()):]
            busy = BUSY_POLLS
        if leave:
            return
        answer = client.serial(name, offset)
        output = base64.b64decode(answer["data"])
        offset = answer["offset"] + len(output)
        busy = BUSY_POLLS if output else max(0, busy - 1)
        if output:
            # As a dumb terminal: the guest's own sequences are for a terminal to read.
            _write(output.decode("utf-8", "replace"))
