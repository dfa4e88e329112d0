"""How fast the simulator is, and how time and memory grow: `python -m benchmarks.simulate`.

Each point runs in a process of its own, so that its memory is its own. Two kinds of VMs: `busy`, where every
VM always wants the CPU, and `fleet`, where most sleep most of the time (config/examples/simulate-fleet.toml, scaled).
`plan`: the wall time of one plan of the production planner at that size, in the median and at most. Target: a
simulated minute of 64 host CPUs and 1,000 VMs within 60 s.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

from mixvisor.config.scenario import Scenario
from mixvisor.sched.simulate import Simulation

from .common import options, report, table

KINDS = {
    "busy": [("s", 0.5, "software", "busy", 100), ("h", 0.5, "hardware", "busy", 200)],
    "fleet": [("batch", 0.06, "software", "busy", 50), ("ci", 0.24, "software", "bursty", 100),
              ("web", 0.69, "hardware", "interactive", 200), ("io", 0.01, "hardware", "io", 100)],
}
# Host CPUs, VMs, simulated seconds.
POINTS = [(8, 125, 20), (64, 1000, 60), (256, 4000, 5), (1000, 20_000, 1)]
FAST = [(8, 125, 5), (64, 1000, 5)]


def scenario(kind: str, cpus: int, vms: int) -> Scenario:
    return Scenario.model_validate({"host": {"cpus": cpus}, "vm": [
        {"name": name, "count": max(1, round(part * vms)), "mode": mode, "behaviour": behaviour, "weight": weight}
        for name, part, mode, behaviour, weight in KINDS[kind]]})


def point(kind: str, policy: str, cpus: int, vms: int, seconds: float) -> dict[str, Any]:
    """One simulation, in this process."""
    plans: list[float] = []
    simulation = Simulation(scenario(kind, cpus, vms), policy)
    plan = simulation._plan

    def timed(argument: int) -> None:
        began = time.perf_counter()
        plan(argument)
        plans.append(time.perf_counter() - began)

    simulation._plan = timed  # type: ignore[method-assign]
    began, began_cpu = time.perf_counter(), time.process_time()
    result = simulation.run(seconds).result()
    wall, cpu = time.perf_counter() - began, time.process_time() - began_cpu
    simulation.close()
    return {
        "kind": kind, "policy": policy, "cpus": cpus, "vms": vms, "seconds": seconds, "wall_s": wall, "cpu_s": cpu,
        "decisions": result.decisions, "vm_switches_per_s": result.vm_switches_per_s,
        "plan_ms": statistics.median(plans) * 1e3 if plans else 0.0, "plan_max_ms": max(plans, default=0.0) * 1e3,
        "rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "share_error_most": result.share_error_most, "idle": result.idle}


def apart(*arguments: object) -> dict[str, Any]:
    """The same in a process of its own."""
    code = f"import json, benchmarks.simulate as b; print(json.dumps(b.point(*{arguments!r})))"
    answer = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=3600)
    return json.loads(answer.stdout)


def main() -> None:
    chosen = options(__doc__ or "", policies="fair,batch,kernel", fast=0)
    points = FAST if chosen.fast else POINTS
    found = [apart(kind, "fair", *at) for kind in KINDS for at in points]
    found += [apart("fleet", policy, *points[1]) for policy in chosen.policies.split(",") if policy != "fair"]
    head = ["kind", "policy", "host CPUs", "VMs", "simulated s", "wall s", "CPU s", "s/minute", "switches/s", "plan ms",
            "max ms", "MiB"]
    table("Wall time for a simulated minute", head, [
        [f["kind"], f["policy"], f["cpus"], f["vms"], f["seconds"], f["wall_s"], f["cpu_s"],
         f["wall_s"] / f["seconds"] * 60, f["vm_switches_per_s"], f["plan_ms"], f["plan_max_ms"], f["rss_mib"]]
        for f in found])
    report("simulate", {"points": found}, chosen.json)


if __name__ == "__main__":
    main()
