"""Guest work delivered: four VMs on one CPU under our policy `fair`, against the same VMs under the kernel alone.

One service at a time, with two software and two hardware VMs of equal weight (all software where there is no
/dev/kvm). While they run, the policy changes: `kernel` (the baseline), `kernel` once more (the null: it must not
differ) and `fair`, in an order drawn at random and then mirrored, about a second each, so that whatever drifts on a
shared machine drifts through all three alike. Each round gives one figure: the difference of the mean logarithms of
the VMs' rates; shown are medians over rounds with 95 % bootstrap intervals. Work is the guests' own progress
counters, per CPU-second (what a VM makes of the time it gets: the cost of switching) and per second (with what
dispatching takes off). The first part of each stretch, in which dispatchers come and go, is left out.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Sequence
from typing import Any

import trio

from mixvisor.sched.linux import Kernel
from mixvisor.service.app import Service

from .common import busy_service, median, options, report, table

KINDS = ("gentle", "precise")
STRETCHES = {"kernel": "kernel", "again": "kernel", "fair": "fair"}
RESAMPLES = 4000

Rates = dict[str, dict[str, float]]           # by VM: per CPU-second, per second, CPU-seconds per second


def read(service: Service, pids: dict[str, int]) -> dict[str, tuple[int, int, int]]:
    """Progress, CPU time and the clock, of every VM. The CPU clock of a process is exact while it runs, too."""
    found = {}
    for vm in service.snapshot().vms:
        clock = Kernel().run_clock(pids[vm.name], pids[vm.name])
        found[vm.name] = (vm.progress or 0, clock.read(), time.monotonic_ns())
    return found


async def stretch(service: Service, pids: dict[str, int], policy: str, settle: float, seconds: float) -> Rates:
    await service.set_policy({"policy": policy})
    await trio.sleep(settle)
    first = read(service, pids)
    await trio.sleep(seconds)
    last = read(service, pids)
    rates: Rates = {}
    for name, (progress, ran, at) in first.items():
        more, run_ns, wall_ns = last[name][0] - progress, last[name][1] - ran, last[name][2] - at
        rates[name] = {"work_per_cpu": more / run_ns, "work": more / wall_ns, "cpu": run_ns / wall_ns}
    return rates


async def one_kind(dispatch: str, chosen: Any, hardware: bool) -> dict[str, list[Rates]]:
    modes = ("software", "hardware") if hardware else ("software", "software")
    vms = [{"name": f"vm{number}", "mode": modes[number % 2], "memory": "4M", "boot": {"guest": "alu"}}
           for number in range(4)]
    runs: dict[str, list[Rates]] = {name: [] for name in STRETCHES}
    dice = random.Random(3)
    async with busy_service(vms, cpus=chosen.cpu, dispatch=dispatch, slice_us=chosen.slice_us) as service:
        await trio.sleep(1)
        pids = {vm.name: vm.pid for vm in service.snapshot().vms if vm.pid is not None}
        for _ in range(chosen.rounds):
            order = dice.sample(list(STRETCHES), len(STRETCHES))
            for name in (*order, *reversed(order)):
                runs[name].append(await stretch(service, pids, STRETCHES[name], chosen.settle, chosen.seconds))
    return runs


def against(runs: dict[str, list[Rates]], name: str, what: str) -> list[float]:
    """By round: the ratio of *what* to the kernel's, the geometric mean over the VMs and both stretches."""
    logs = [[sum(math.log(vm[what]) for vm in rates.values()) / len(rates) for rates in runs[kind]]
            for kind in (name, "kernel")]
    pairs = [[(log[at] + log[at + 1]) / 2 for at in range(0, len(log), 2)] for log in logs]
    return [math.exp(mine - theirs) for mine, theirs in zip(*pairs, strict=True)]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    dice = random.Random(1)
    medians = sorted(median(dice.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return medians[round(RESAMPLES * 0.025)], medians[round(RESAMPLES * 0.975) - 1]


def shown(values: Sequence[float]) -> str:
    low, high = interval(values)
    return f"{100 * median(values):.2f} [{100 * low:.2f}, {100 * high:.2f}]"


async def main() -> None:
    chosen = options(__doc__ or "", seconds=0.8, settle=0.3, rounds=20, slice_us=10_000,
                     cpu=str(max(os.sched_getaffinity(0))))
    hardware = os.access("/dev/kvm", os.R_OK | os.W_OK)
    results: dict[str, Any] = {}
    rows = []
    for kind in KINDS:
        runs = results[kind] = await one_kind(kind, chosen, hardware)
        for name, title in (("fair", f"fair, {kind}"), ("again", f"kernel again, beside {kind} (null)")):
            rows.append((title, *(shown(against(runs, name, what)) for what in ("work_per_cpu", "work", "cpu"))))
    table(f"Work of four VMs on one CPU, {chosen.slice_us / 1000:g} ms slices, percent of what they do under the kernel"
          f" alone ({chosen.rounds} rounds: median, 95 % interval)",
          ("policy", "per CPU-second", "per second", "CPU granted"), rows)
    report("work", {"runs": results, "slice_us": chosen.slice_us}, chosen.json)


if __name__ == "__main__":
    trio.run(main)
