"""A scenario for the simulator: which host, which VMs, how they behave, under which policies.

Theory.  A scenario is written and judged like a configuration (config/load.py): the same tables
where they mean the same ([scheduler] is that of the service, key for key), every fault at once,
with file, line and key. It names no host, so nothing of this machine is looked at.

Invariants.  A scenario that exists has every key in range. Pure but for reading the file.

Units.  `_us` microseconds, `cap` and `reservation` percent of one host CPU.
Poor at: one vCPU a VM; VMs neither come nor go while the time runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from .load import ConfigError, Problem, TableChecker, parse
from .model import Between, CpuList, SchedulerConfig, Text, Whole, format_cpus
from .rules import Finding

__all__ = ["BEHAVIOURS", "CostConfig", "Scenario", "ScenarioVm", "SimulationConfig", "load_scenario"]

CPUS_MAX: Final = 4096
VMS_MAX: Final = 50_000
_NAME: Final = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,62}")
_NAME_ALLOWED: Final = "1 to 63 letters, digits, '_', '.' or '-', the first a letter or digit"
# Behaviour -> mean run and mean sleep in µs; None: it never sleeps.
BEHAVIOURS: Final[Mapping[str, tuple[int, int] | None]] = {
    "busy": None,
    "interactive": (2_000, 50_000),
    "bursty": (300_000, 700_000),
    "io": (200, 1_000),
}


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class SimulationConfig(_Table):
    """How long, and what is compared."""

    seconds: Annotated[Whole, Between(1, 86_400, "seconds")] = Field(
        default=10, description="Simulated time.")
    seed: Annotated[Whole, Between(0, 2**63 - 1)] = Field(
        default=1, description="Of everything that is sampled; the same seed, the same result.")
    policies: tuple[Text, ...] = Field(
        default=(), description="Policies to compare on the same VMs. Default: that of [scheduler].")


class ScenarioHost(_Table):
    """The simulated host."""

    cpus: Annotated[Whole, Between(1, CPUS_MAX)] = Field(
        default=1, description="How many host CPUs VMs may use; they are numbered from 0.")


class CostConfig(_Table):
    """What it costs to change from one VM to another. Defaults: as measured (see measurement in docs/simulator.md)."""

    switch_software_us: Annotated[Whole, Between(0, 10_000, "microseconds")] = Field(
        default=15, description="Work that a software VM loses when it takes over from another VM.")
    switch_hardware_us: Annotated[Whole, Between(0, 10_000, "microseconds")] = Field(
        default=49, description="The same of a hardware VM.")
    mixed_software_us: Annotated[Whole, Between(0, 10_000, "microseconds")] = Field(
        default=16, description="What a software VM loses besides when the other VM's mode was hardware.")
    mixed_hardware_us: Annotated[Whole, Between(0, 10_000, "microseconds")] = Field(
        default=16, description="What a hardware VM loses besides when the other VM's mode was software.")
    dispatcher_us: Annotated[Whole, Between(0, 10_000, "microseconds")] = Field(
        default=60, description="CPU time of one decision, taken from the VMs of that host CPU.")
    late_us: Annotated[Whole, Between(0, 10_000, "microseconds")] = Field(
        default=24, description="How late a dispatcher wakes, in the median; 0: never.")


class ScenarioVm(_Table):
    """One VM, or `count` alike."""

    name: Text = Field(description="Unique name: " + _NAME_ALLOWED + ". Of several, NAME-1, NAME-2 ...")
    count: Annotated[Whole, Between(1, VMS_MAX)] = Field(default=1, description="How many of them.")
    mode: Literal["software", "hardware"] = Field(
        default="software", description="Virtualization mode.")
    weight: Annotated[Whole, Between(1, 10_000)] = Field(
        default=100, description="Share of the CPUs beside other VMs.")
    cap: Annotated[Whole, Between(0, 100, "percent of one host CPU (0: no cap)")] = Field(
        default=0, description="Most CPU time it may take, in percent of one host CPU; 0 = none.")
    reservation: Annotated[Whole, Between(0, 100, "percent of one host CPU")] = Field(
        default=0, description="CPU time it is always given when it wants it.")
    cpus: CpuList | None = Field(
        default=None, description='Host CPUs it may run on, such as "0-3,6". Default: all.')
    latency: Literal["low", "normal", "high"] = Field(
        default="normal", description="How soon it gets the CPU once it wants it; no class gets more of it.")
    behaviour: Literal["busy", "interactive", "bursty", "io", "scripted"] = Field(
        default="busy",
        description="busy never sleeps; interactive, bursty and io run and sleep for exponentially "
                    "distributed times; scripted repeats `script`.")
    run_us: Annotated[Whole, Between(1, 3_600_000_000, "microseconds")] | None = Field(
        default=None, description="Mean CPU time between two sleeps. Default: that of the behaviour.")
    sleep_us: Annotated[Whole, Between(1, 3_600_000_000, "microseconds")] | None = Field(
        default=None, description="Mean length of a sleep. Default: that of the behaviour.")
    script: tuple[tuple[Annotated[Whole, Between(1, 3_600_000_000, "microseconds")],
                        Annotated[Whole, Between(1, 3_600_000_000, "microseconds")]], ...] = Field(
        default=(), description="scripted: pairs [run_us, sleep_us], over and over.")

    @model_validator(mode="before")
    @classmethod
    def _named(cls, data: object) -> object:
        name = cast("Mapping[str, Any]", data).get("name") if isinstance(data, Mapping) else None
        if isinstance(name, str) and not _NAME.fullmatch(name):
            raise PydanticCustomError("not_allowed", "allowed: {allowed}", {"allowed": "a name of " + _NAME_ALLOWED})
        return cast("object", data)

    @property
    def names(self) -> tuple[str, ...]:
        """Of each VM that this table makes."""
        if self.count == 1:
            return (self.name,)
        return tuple(f"{self.name}-{number}" for number in range(1, self.count + 1))

    @property
    def spans_us(self) -> tuple[int, int] | None:
        """Mean run and sleep of a sampled behaviour; None: busy or scripted."""
        default = BEHAVIOURS.get(self.behaviour)
        if default is None:
            return None
        return self.run_us or default[0], self.sleep_us or default[1]


class Scenario(_Table):
    """A whole scenario."""

    simulation: SimulationConfig = Field(default_factory=SimulationConfig)
    host: ScenarioHost = Field(default_factory=ScenarioHost)
    scheduler: SchedulerConfig = Field(default_factory=SchedulerConfig)
    costs: CostConfig = Field(default_factory=CostConfig)
    vms: tuple[ScenarioVm, ...] = Field(default=(), alias="vm")

    @property
    def policies(self) -> tuple[str, ...]:
        return self.simulation.policies or (self.scheduler.policy,)


_SECTIONS: Final[Mapping[str, type[BaseModel]]] = {
    "simulation": SimulationConfig, "host": ScenarioHost, "scheduler": SchedulerConfig, "costs": CostConfig,
}


def load_scenario(path: Path | str) -> Scenario:
    """Read and check a scenario. Raises ConfigError with every problem."""
    path = Path(path)
    parsed = parse(path)
    if isinstance(parsed, Problem):
        raise ConfigError([parsed])
    checker = TableChecker(path, parsed[1], parsed[0], _SECTIONS)
    checker.unknown_tables()
    sections = {key: checker.validate((key,), model, parsed[0].get(key, {})) for key, model in _SECTIONS.items()}
    vms = dict(_vms(checker, parsed[0].get("vm", [])))
    host, simulation = sections["host"], sections["simulation"]
    for finding in _findings(host if isinstance(host, ScenarioHost) else None,
                             simulation if isinstance(simulation, SimulationConfig) else None, vms):
        checker.add(finding)
    if checker.problems:
        raise ConfigError(sorted(checker.problems, key=lambda problem: problem.line or 0))
    return Scenario.model_validate({**sections, "vm": tuple(vms.values())})


def _vms(checker: TableChecker, tables: object) -> Iterator[tuple[int, ScenarioVm]]:
    if not isinstance(tables, list) or not tables:
        checker.add(Finding(("vm",), "not-tables", "no [[vm]] table", "[[vm]] tables, at least one", "write [[vm]]"))
        return
    for index, table in enumerate(cast("list[object]", tables)):
        vm = checker.validate(("vm", index), ScenarioVm, table)
        if isinstance(vm, ScenarioVm):
            yield index, vm


def _findings(host: ScenarioHost | None, simulation: SimulationConfig | None,
              vms: Mapping[int, ScenarioVm]) -> Iterator[Finding]:
    """What several keys say together."""
    if simulation is not None:
        known = tuple(cast("Any", SchedulerConfig.model_fields["policy"].annotation).__args__)
        for index, policy in enumerate(simulation.policies):
            if policy not in known:
                yield Finding(("simulation", "policies", index), "not-allowed", f'"{policy}"',
                              " or ".join(f'"{word}"' for word in known))
    first: dict[str, int] = {}
    for index, vm in vms.items():
        at = ("vm", index)
        taken = next((name for name in vm.names if name in first), None)
        if taken is not None:
            yield Finding((*at, "name"), "duplicate-name", f'"{taken}", which [[vm]] #{first[taken] + 1} makes already',
                          "a name of its own")
        for name in vm.names:
            first.setdefault(name, index)
        outside = [cpu for cpu in vm.cpus or () if host is not None and cpu >= host.cpus]
        if outside and host is not None:
            yield Finding((*at, "cpus"), "cpu-not-for-vms", f"CPU {format_cpus(outside)}",
                          f"CPUs of [host]: 0 to {host.cpus - 1}")
        if vm.cap and vm.reservation > vm.cap:
            yield Finding((*at, "reservation"), "reservation-over-cap", str(vm.reservation),
                          f"at most the cap, {vm.cap} percent")
        if (vm.behaviour == "scripted") != bool(vm.script):
            yield Finding((*at, "script"), "script", "no script" if not vm.script else "a script",
                          'pairs [run_us, sleep_us] with behaviour = "scripted", and with no other')
        for key in ("run_us", "sleep_us"):
            if getattr(vm, key) is not None and vm.spans_us is None:
                yield Finding((*at, key), "contradiction", f"{key} with behaviour = \"{vm.behaviour}\"",
                              "interactive, bursty or io with it")
    if sum(vm.count for vm in vms.values()) > VMS_MAX:
        yield Finding(("vm",), "too-many", f"{sum(vm.count for vm in vms.values())} VMs", f"at most {VMS_MAX}")
