"""Guest work delivered: four VMs on one CPU under the dispatcher against the same under the kernel alone.

Whole services run in alternation (ABBA...), each with two software and two hardware VMs of equal weight (all software
where there is no /dev/kvm). Work is the guests' own progress counters, per second of wall clock and per CPU-second that
the kernel granted. `plain` is the kernel's own scheduler: the baseline of both.
"""

from __future__ import annotations

import os
import time

import trio

from .common import busy_service, median, options, report, table


async def one_run(dispatch: str, cpu: str, slice_us: int, seconds: float, hardware: bool) -> dict[str, dict[str, int]]:
    vms = [{"name": f"{kind[0]}{i}", "mode": kind, "memory": "16M", "boot": {"guest": "alu"}}
           for kind in (("software", "hardware") if hardware else ("software", "software")) for i in (1, 2)]
    for number, vm in enumerate(vms):
        vm["name"] = f"{vm['name']}-{number}"
    async with busy_service(vms, cpus=cpu, dispatch=dispatch, slice_us=slice_us) as service:
        await trio.sleep(1)
        first, at = {v.name: v for v in service.snapshot().vms}, time.monotonic_ns()
        await trio.sleep(seconds)
        last, to = {v.name: v for v in service.snapshot().vms}, time.monotonic_ns()
        return {name: {"progress": (last[name].progress or 0) - (old.progress or 0),
                       "run_ns": last[name].vcpus[0].run_ns - old.vcpus[0].run_ns, "wall_ns": to - at,
                       "hardware": int(old.mode == "hardware")}
                for name, old in first.items()}


async def main() -> None:
    chosen = options(__doc__ or "", seconds=5.0, rounds=5, slice_us=10_000, cpu=str(max(os.sched_getaffinity(0))))
    hardware = os.access("/dev/kvm", os.R_OK | os.W_OK)
    kinds = ("plain", "gentle", "precise")
    runs: dict[str, list[dict[str, dict[str, int]]]] = {kind: [] for kind in kinds}
    for number in range(chosen.rounds):
        for kind in kinds if number % 2 == 0 else reversed(kinds):
            runs[kind].append(await one_run(kind, chosen.cpu, chosen.slice_us, chosen.seconds, hardware))

    def granted(run: dict[str, dict[str, int]]) -> float:
        return sum(v["run_ns"] for v in run.values()) / next(iter(run.values()))["wall_ns"]

    def rate(run: dict[str, dict[str, int]], per: str) -> float:
        """Work relative to plain's median, averaged over the VMs (their units differ by engine)."""
        return sum(v["progress"] / v[per] / base[per][n] for n, v in run.items()) / len(run)

    base = {per: {name: median([run[name]["progress"] / run[name][per] for run in runs["plain"]])
                  for name in runs["plain"][0]} for per in ("run_ns", "wall_ns")}
    rows = [(kind, 100 * median([granted(r) for r in runs[kind]]),
             100 * median([rate(r, "run_ns") for r in runs[kind]]),
             100 * median([rate(r, "wall_ns") for r in runs[kind]])) for kind in kinds]
    table(f"Guest work of four VMs on one CPU, {chosen.slice_us / 1000:g} ms slices, {chosen.rounds} rounds",
          ("dispatch", "CPU granted %", "work per CPU-second, % of plain", "work per second, % of plain"), rows)
    report("work", {"runs": runs, "slice_us": chosen.slice_us}, chosen.json)


if __name__ == "__main__":
    trio.run(main)
