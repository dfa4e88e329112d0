"""Guest work delivered: four VMs on one CPU under the dispatcher against the same under the kernel alone.

Whole services run in alternation (plain, gentle, precise, precise, gentle, plain, ...), each with two software and two
hardware VMs of equal weight (all software where there is no /dev/kvm). Work is the guests' own progress counters, per
second of wall clock and per CPU-second that the kernel granted. `plain` is the kernel's own scheduler: the baseline of
both. Every run is compared with the plain run of its own round, and the interval is of the median over rounds
(bootstrap, 95 %), because a shared machine drifts by more than what is looked for.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Sequence

import trio

from .common import busy_service, median, options, report, table

KINDS = ("plain", "gentle", "precise")
RESAMPLES = 4000

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


def granted(run: dict[str, dict[str, int]]) -> float:
    return sum(v["run_ns"] for v in run.values()) / next(iter(run.values()))["wall_ns"]


def against(run: dict[str, dict[str, int]], plain: dict[str, dict[str, int]], per: str) -> float:
    """Work relative to the plain run of the same round, averaged over the VMs (their units differ by engine)."""
    return sum(run[n]["progress"] / run[n][per] * plain[n][per] / plain[n]["progress"] for n in run) / len(run)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    dice = random.Random(1)
    medians = sorted(median(dice.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return medians[round(RESAMPLES * 0.025)], medians[round(RESAMPLES * 0.975) - 1]


def shown(values: Sequence[float]) -> str:
    low, high = interval(values)
    return f"{100 * median(values):.1f} [{100 * low:.1f}, {100 * high:.1f}]"


async def main() -> None:
    chosen = options(__doc__ or "", seconds=2.0, rounds=12, slice_us=10_000, cpu=str(max(os.sched_getaffinity(0))))
    hardware = os.access("/dev/kvm", os.R_OK | os.W_OK)
    runs: dict[str, list[dict[str, dict[str, int]]]] = {kind: [] for kind in KINDS}
    for number in range(chosen.rounds):
        for kind in KINDS if number % 2 == 0 else reversed(KINDS):
            runs[kind].append(await one_run(kind, chosen.cpu, chosen.slice_us, chosen.seconds, hardware))
    rows = [(kind, shown([granted(r) for r in runs[kind]]),
             *(shown([against(r, p, per) for r, p in zip(runs[kind], runs["plain"], strict=True)])
               for per in ("run_ns", "wall_ns")))
            for kind in KINDS]
    # What two plain runs of neighbouring rounds differ by: the resolution of the figures above.
    pairs = zip(runs["plain"][1::2], runs["plain"][2::2], strict=False)
    null = [against(b, a, "run_ns") for a, b in pairs]
    if len(null) > 1:
        rows.append(("plain, next round", "", shown(null), ""))
    table(f"Guest work of four VMs on one CPU, {chosen.slice_us / 1000:g} ms slices, {chosen.rounds} rounds"
          " (median, 95 % interval)",
          ("dispatch", "CPU granted %", "work per CPU-second, % of plain", "work per second, % of plain"), rows)
    report("work", {"runs": runs, "slice_us": chosen.slice_us}, chosen.json)


if __name__ == "__main__":
    trio.run(main)
