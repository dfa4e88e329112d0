"""How the CPUs are shared, changed while everything runs: the policy, and single VMs' parameters.

Theory.  A change is a few keys of the configuration with new values. It is checked as the file
would be, by the same models and rules, together with what stays as it is; it is had as a whole or
refused as a whole, in one message that names every fault. The file itself is not written: what
was changed here lasts as long as the service.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

from pydantic import BaseModel

from ..config.load import Problem, TableChecker
from ..config.model import HostConfig, SchedulerConfig, VmConfig
from ..config.rules import HostLimits, findings, host_findings
from ..metrics.mixing.result import MixingResult
from ..sched.policy import Batching, Order
from .backend import Unusable

__all__ = ["PARAMETERS", "changed_scheduler", "changed_vm", "crossing_cost", "scheduler_settings"]

PARAMETERS: Final = ("weight", "cap", "reservation", "latency", "cpus")
_Model = TypeVar("_Model", bound=BaseModel)


def crossing_cost(config: SchedulerConfig, told: MixingResult | None) -> tuple[float, str]:
    """What mode_loss_max reckons with (us), and where it comes from: configured, measured or default."""
    if "crossing_cost_us" in config.model_fields_set:
        return float(config.crossing_cost_us), "configured"
    if told is not None and told.usable and told.verdict != "inconclusive" and told.cost_us is not None:
        return max(0.0, told.cost_us.value), "measured"
    return float(config.crossing_cost_us), "default"


def scheduler_settings(config: SchedulerConfig, told: MixingResult | None = None) -> dict[str, Any]:
    """The keys of [scheduler] as sched.supervisor.Scheduler takes them, there and in `set_policy`.

    told: what mixing was measured to cost.
    """
    cost_us, _source = crossing_cost(config, told)
    return {
        "policy": config.policy,
        "slice_ns": config.slice_us * 1000, "ratelimit_ns": config.ratelimit_us * 1000,
        "migrate_resist_ns": config.migrate_resist_us * 1000,
        "batching": Batching(
            batch_ns=config.mode_batch_us * 1000, wait_max_ns=config.mode_wait_max_us * 1000,
            budget_ns=Batching.budget(config.mode_loss_max / 100, round(cost_us * 1000))),
        "order": Order(jitter_ns=Order.jitter(config.random_order, config.slice_us * 1000), seed=config.random_seed)}


def changed_scheduler(config: SchedulerConfig, change: Mapping[str, Any]) -> SchedulerConfig:
    """[scheduler] with the keys of *change*. Raises Unusable."""
    return _changed(config, change, tuple(SchedulerConfig.model_fields), "the policy")[0]


def changed_vm(
    vm: VmConfig, change: Mapping[str, Any], *, others: Iterable[VmConfig], vm_cpus: Iterable[int],
    limits: HostLimits,
) -> VmConfig:
    """A VM with the parameters of *change*, beside the other VMs as they are. Raises Unusable.

    `cpus` None is all of *vm_cpus*, those that VMs may use.
    """
    new, checker = _changed(vm, change, PARAMETERS, vm.name)
    vms = dict(enumerate((*others, new)))
    host = HostConfig(cpus=tuple(vm_cpus))
    last = ("vm", len(vms) - 1)
    for finding in (*findings(host, vms, {}), *host_findings(host, vms, limits)):
        # What was wrong before, of this VM or of another, is not this change's fault.
        if (finding.at[:2] == last and finding.at[2] in PARAMETERS
                and not any(problem.key == finding.at[2] for problem in checker.problems)):
            checker.add(finding)
    _refuse_if(checker.problems, vm.name)
    return new


def _changed(
    old: _Model, change: Mapping[str, Any], allowed: tuple[str, ...], what: str,
) -> tuple[_Model, TableChecker]:
    if not change:
        raise Unusable(f"nothing to change of {what}: name at least one of {', '.join(allowed)}")
    unknown = [key for key in change if key not in allowed]
    if unknown:
        raise Unusable(f"{what} has no {', '.join(map(repr, unknown))} that can be changed while it"
                       f" runs; allowed: {', '.join(allowed)}")
    checker = TableChecker(Path(), {}, {}, {})
    model = type(old)
    # Only what the file said and the change: defaults that follow from other keys stay so.
    given = {name: getattr(old, name) for name in old.model_fields_set}
    new = checker.validate(("vm", 0), model, {**given, **change})
    _refuse_if(checker.problems, what)
    assert isinstance(new, model)
    return new, checker


def _refuse_if(problems: Iterable[Problem], what: str) -> None:
    faults = "; ".join(
        f"{p.key}: found {p.found}, allowed: {p.allowed}" + (f" ({p.suggestion})" if p.suggestion else "")
        for p in problems)
    if faults:
        raise Unusable(f"{what} stays as it is: {faults}")
