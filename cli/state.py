"""`mode`, `save`, `restore`: a running guest's other mode, and its way into a file and out of one."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final

import click

from .common import connect, output_option, print_json

__all__ = ["mode", "restore", "save"]

FILE_SECONDS: Final = 600.0        # a large guest on a slow disk


@click.command()
@click.argument("name")
@click.argument("to", metavar="hardware|software", type=click.Choice(["hardware", "software"]))
@output_option
def mode(name: str, to: str, output: str) -> None:
    """Move a running VM to the other mode, without a reboot.

    It stays there until it ends; its next start goes by its configuration again. Where the guest's state cannot be
    carried (a host whose KVM cannot run it, for instance) nothing changes and the reason is told: exit code 4.
    """
    with connect() as client:
        answer = client.set_mode(name, to)
    if output == "json":
        print_json(answer)
    elif answer["changed"]:
        click.echo(f"{name} goes on in {to} mode; it stood still for {answer['stop_seconds'] * 1000:.1f} ms")
    else:
        click.echo(f"{name} is in {to} mode already")


@click.command()
@click.argument("name")
@click.argument("file", required=False, type=click.Path(path_type=Path, dir_okay=False))
@click.option("--leave-running", is_flag=True, help="Let the VM go on afterwards; it stands still meanwhile.")
@output_option
def save(name: str, file: Path | None, leave_running: bool, output: str) -> None:
    """Save a VM to FILE (default: one in the service's state directory) and end it.

    The file has the processor, the devices and the memory, not the disks: `restore` wants to find these as they are
    now, so a VM that is left running and writes to its disks cannot go back. The service writes the file, for its
    own user alone: guest memory has secrets.
    """
    with connect(FILE_SECONDS) as client:
        answer = client.save(name, None if file is None else file.absolute(), leave_running=leave_running)
    if output == "json":
        print_json(answer)
    else:
        from .tables import size
        click.echo(f"{name} is saved to {answer['file']}: {size(answer['bytes'])}"
                   f" in {answer['seconds']:.2f} s" + ("; it goes on" if answer["running"] else ""))


@click.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--name", default=None, metavar="NAME", help="Restore into this VM instead of the one that was saved.")
@output_option
def restore(file: Path, name: str | None, output: str) -> None:
    """Start a VM from a file that `save` made: it goes on where it was.

    The VM must be defined and not run, with the same memory and the same disks. The file stays.
    """
    began = time.monotonic()
    with connect(FILE_SECONDS) as client:
        answer = client.restore(file.absolute(), name)
    if output == "json":
        print_json(answer)
    else:
        click.echo(f"{answer['name']} goes on from {answer['file']} in {answer['mode']} mode,"
                   f" {time.monotonic() - began:.2f} s")
