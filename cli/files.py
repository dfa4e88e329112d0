"""`check` and `schema`: configuration files without a service."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .common import notice, output_option, print_json, print_table, strict_option

if TYPE_CHECKING:
    from ..config.load import HostLimits
    from ..config.model import Config
    from ..vm.host import HostFacts

__all__ = ["check", "load_file", "schema"]


def load_file(path: Path, facts: HostFacts) -> Config:
    """The configuration, held against this host. Raises ServiceError with every problem."""
    from ..config.load import ConfigError, load
    from ..service.backend import ServiceError
    try:
        return load(path, _limits(facts))
    except ConfigError as error:
        count = len(error.problems)
        raise ServiceError(f"{path} cannot be used, {count} problem{'s'[:count != 1]}:\n"
                           + "\n".join(f"  {problem}" for problem in error.problems)) from error


def _limits(facts: HostFacts) -> HostLimits:
    from ..config.load import HostLimits as Limits
    return Limits(online_cpus=facts.online_cpus, memory_bytes=facts.memory_bytes)


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@output_option
@strict_option
def check(file: Path, output: str, strict: bool) -> None:
    """Check a configuration file against the rules and this host; change nothing.

    Every problem is shown with its line; a good file with the mode that each VM would run in, and
    why. Exit code 1 if there is any problem.
    """
    from ..config.load import check as problems_of
    from ..config.load import load
    from ..service.warnings import strict_exit
    from ..vm.host import HostFacts
    from ..vm.modes import ModeDecision, ModeRefusal, plan
    from .modes import foreseen, tell

    facts = HostFacts.read()
    problems = problems_of(file, _limits(facts))
    config = None if problems else load(file, _limits(facts))
    answers = {} if config is None else plan(config.vms, facts.modes)
    refused = [answer for answer in answers.values() if isinstance(answer, ModeRefusal)]
    decided = {vm: answer for vm, answer in answers.items() if isinstance(answer, ModeDecision)}
    warnings = [] if config is None else foreseen(config, facts, answers)
    good = not problems and not refused
    if output == "json":
        print_json({
            "schema": 1, "file": str(file), "ok": good,
            "problems": [asdict(problem) for problem in problems],
            "refused": [asdict(refusal) for refusal in refused],
            "plan": [{"vm": vm, **asdict(decision)} for vm, decision in decided.items()],
            "warnings": warnings,
        })
    elif good:
        click.echo(f"{file} can be used: {len(decided)} VM{'s'[:len(decided) != 1]}."
                   if decided else f"{file} can be used, but it has no [[vm]]: nothing would run.")
        if decided:
            from .tables import plan_table
            print_table(plan_table(decided))
        tell(warnings)
    else:
        for problem in (*problems, *refused):
            notice(str(problem))
    click.get_current_context().exit(1 if not good else strict_exit(w["severity"] for w in warnings) if strict else 0)


@click.command()
def schema() -> None:
    """Print the JSON schema of the configuration file, for editors."""
    from ..config.schema import json_schema
    print_json(json_schema())
