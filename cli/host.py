"""`host` and `version`: what this machine can do, and which Mixvisor this is."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import click

from .common import control_socket, output_option, print_json, print_table, strict_option

if TYPE_CHECKING:
    from ..vm.conflicts import Conflict

__all__ = ["host", "version"]

LABEL_LENGTH: Final = 24


@click.command()
@output_option
@strict_option
def host(output: str, strict: bool) -> None:
    """Show what this host has (VT-x, AMD-V, PVM or none; permissions; other hypervisors) and what that means."""
    from dataclasses import asdict

    from ..service.warnings import link, strict_exit
    from ..vm.conflicts import judge
    from ..vm.host import HostFacts, explain, unusable
    from ..vm.hosts.rivals import look_for_rivals

    facts = HostFacts.read()
    conflicts = judge(look_for_rivals(technology=facts.technology, own=_service()))
    found = [*unusable(facts), *conflicts]
    if output == "json":
        print_json({"schema": 1, "host": facts.to_json(), "explained": list(explain(facts)),
                    "warnings": [{**asdict(one), "link": link(one.code)} for one in found]})
    else:
        from .tables import fields_table
        print_table(fields_table([*(_labelled(line) for line in explain(facts)), *_others(conflicts)]))
    click.get_current_context().exit(strict_exit(one.severity for one in found) if strict else 0)


def _service() -> int | None:
    """Process of the service that runs, if one does: its VMs are not another program's."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as asked:
        asked.settimeout(1)
        asked.connect(str(control_socket()))
        pid, _user, _group = struct.unpack("3i", asked.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return pid
    return None


def _others(conflicts: Sequence[Conflict]) -> list[tuple[str, str]]:
    from ..service.warnings import link

    if not conflicts:
        return [("Other hypervisors", "none was seen.")]
    return [("Other hypervisors" if index == 0 else "",
             f"{one.severity}: {one.message} {one.advice} ({link(one.code)})") for index, one in enumerate(conflicts)]


def _labelled(line: str) -> tuple[str, str]:
    """A line of `explain` as name and value; a sentence without a label has no name."""
    label, colon, rest = line.partition(": ")
    return (label, rest) if colon and len(label) <= LABEL_LENGTH else ("", line)


@click.command()
@output_option
def version(output: str) -> None:
    """Show the versions of Mixvisor and of what it stands on."""
    import platform
    from importlib.metadata import version as version_of

    from ..sched import steady

    versions = {name: version_of(name) for name in ("mixvisor", "unicorn", "capstone", "trio")}
    versions["python"] = platform.python_version()
    versions["linux"] = platform.release()
    versions["dispatcher"] = "compiled" if steady.load() else "interpreted (no C compiler when this was installed)"
    if output == "json":
        print_json({"schema": 1, "versions": versions})
        return
    for name, text in versions.items():
        click.echo(f"{name} {text}")
