"""`host` and `version`: what this machine can do, and which Mixvisor this is."""

from __future__ import annotations

from typing import Final

import click

from .common import output_option, print_json, print_table

__all__ = ["host", "version"]

LABEL_LENGTH: Final = 24


@click.command()
@output_option
def host(output: str) -> None:
    """Show what this host has (VT-x, AMD-V, PVM or none; permissions) and what that means."""
    from ..vm.host import HostFacts, explain

    facts = HostFacts.read()
    if output == "json":
        print_json({"schema": 1, "host": facts.to_json(), "explained": list(explain(facts))})
        return
    from .tables import fields_table
    print_table(fields_table(_labelled(line) for line in explain(facts)))


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

    versions = {name: version_of(name) for name in ("mixvisor", "unicorn", "capstone", "trio")}
    versions["python"] = platform.python_version()
    versions["linux"] = platform.release()
    if output == "json":
        print_json({"schema": 1, "versions": versions})
        return
    for name, text in versions.items():
        click.echo(f"{name} {text}")
