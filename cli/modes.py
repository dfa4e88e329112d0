"""`modes`: which mode each VM of a file would run in, by which rule, and what was refused instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .common import notice, output_option, print_json, print_table, strict_option

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..config.model import Config
    from ..vm.host import HostFacts
    from ..vm.modes import ModeDecision, ModeRefusal

__all__ = ["foreseen", "modes", "tell"]

Foreseen = list[dict[str, Any]]


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@output_option
@strict_option
def modes(file: Path, output: str, strict: bool) -> None:
    """Show the mode that each VM of FILE would get here, the rule that decides and why not the other.

    All VMs are planned together: one that could run in either mode takes the one that avoids mixing.
    Nothing is started. Exit code 1 if a VM cannot run here as the file asks.
    """
    from ..service.warnings import strict_exit
    from ..vm.host import HostFacts
    from ..vm.modes import ModeRefusal, plan
    from .files import load_file

    facts = HostFacts.read()
    config = load_file(file, facts)
    answers = plan(config.vms, facts.modes)
    warnings = foreseen(config, facts, answers)
    refused = any(isinstance(answer, ModeRefusal) for answer in answers.values())
    if output == "json":
        print_json({
            "schema": 1, "file": str(file), "ok": not refused,
            "host": {"technology": facts.technology, "kvm": facts.kvm.why or "usable"},
            "vms": [_document(name, answer) for name, answer in answers.items()], "warnings": warnings})
    elif answers:
        print_table(_table(answers))
        tell(warnings)
    else:
        notice(f"{file} has no [[vm]]: nothing would run.")
    click.get_current_context().exit(1 if refused else strict_exit(w["severity"] for w in warnings) if strict else 0)


def foreseen(
    config: Config, facts: HostFacts, answers: Mapping[str, ModeDecision | ModeRefusal],
) -> Foreseen:
    """What would be warned of if all VMs ran now, as the API has its warnings: code, severity, message,
    advice, vms, weight, link.
    """
    from ..config.model import vm_cpus
    from ..service.mixed import POLICY_NAMES
    from ..service.warnings import link
    from ..vm.conflicts import judge
    from ..vm.hosts.rivals import look_for_rivals
    from ..vm.mixing import mixing_warnings
    from ..vm.modes import ModeDecision

    usable = set(vm_cpus(config, facts.cpus))
    policy = config.scheduler.policy
    decided = {name: answer for name, answer in answers.items() if isinstance(answer, ModeDecision)}
    # Where they may meet; under `partition` they meet nowhere that can be helped.
    where = {} if policy == "partition" else {
        vm.name: set(vm.cpus) & usable if vm.cpus else usable for vm in config.vms}
    mixing = mixing_warnings(
        {name: decision.mode for name, decision in decided.items()}, facts.technology, where=where,
        cores=facts.modes.cores, decisions=decided, policies=POLICY_NAMES, policy=policy)
    found: Foreseen = [{**asdict(warning), "link": link(warning.code)} for warning in mixing]
    if any(decision.mode == "hardware" for decision in decided.values()):
        found += [
            {"code": conflict.code, "severity": conflict.severity, "weight": "", "message": conflict.message,
             "advice": conflict.advice, "vms": (), "link": link(conflict.code)}
            for conflict in judge(look_for_rivals(technology=facts.technology)) if conflict.severity != "info"]
    return found


def tell(warnings: Sequence[Mapping[str, Any]]) -> None:
    """Warnings on stderr, beside the data."""
    for warning in warnings:
        notice(f"{warning['severity']}: {warning['code']}: {warning['message']} {warning['advice']} "
               f"({warning['link']})")


def _document(name: str, answer: ModeDecision | ModeRefusal) -> dict[str, Any]:
    """One VM; a refused one has no mode and no engine, and a remedy."""
    return {"vm": name, "mode": None, "engine": None, "remedy": "", "notes": (), **asdict(answer)}


def _table(answers: Mapping[str, ModeDecision | ModeRefusal]) -> RenderableType:
    from rich.text import Text

    from ..vm.modes import ModeDecision
    from .tables import MODE_STYLE, plain_table

    rows: list[list[Text | str]] = []
    for name, answer in answers.items():
        if isinstance(answer, ModeDecision):
            rows.append([name, Text(answer.mode, style=MODE_STYLE[answer.mode]), answer.engine, answer.rule,
                         " ".join((answer.reason, *answer.notes))])
        else:
            rows.append([name, Text("refused", style="bold red"), "", answer.rule,
                         f"{answer.reason} {answer.remedy}".rstrip()])
        rows += [["", Text(f"not {other.mode}", style="dim"), "", Text(other.rule, style="dim"),
                  Text(other.why, style="dim")] for other in answer.alternatives]
    return plain_table([("VM", "left"), ("Mode", "left"), ("Engine", "left"), ("Rule", "left"), ("Why", "left")], rows)
