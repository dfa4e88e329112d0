"""What measuring the cost of mixing online costs, and whether it agrees with a measurement on demand.

One service with two software and two hardware VMs on one CPU. *Cost*: `random_order` is 0 (nothing is drawn and
measured), 50 (the default) and 0 again (the null: it must not differ), in an order drawn at random and then mirrored,
about a second each, so that whatever drifts on a shared machine drifts through all three alike. A round gives one
figure; shown are medians over rounds with 95 % bootstrap intervals: CPU time of the dispatcher a slice, switches, guest
work (progress counters) per CPU-second and per second. Beside it the estimator's own CPU time, which is spent on
another host CPU: a slice, and as parts of the dispatcher's time and of the CPU time of the guests, while it looks; and
what it is in a service as it is, minute by minute from the moment when modes meet (service/measuring.py bounds it).

*Agreement*: the same VMs, measured online and on demand (`mixvisor measure --vms`) in turn, each afresh, some times
over; the rounds of each are put together by their precision. While it is compared it may look all the time.
"""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import structlog
import trio

from mixvisor.config.model import Config
from mixvisor.service.app import Service

from .common import median, options, report, table
from .work import interval

STRETCHES = {"off": 0, "off again": 0, "on": 50}
PROGRAM = str(Path(sys.executable).with_name("mixvisor"))


def read(service: Service) -> dict[str, Any]:
    snapshot = service.snapshot()
    cpus = snapshot.cpus
    return {
        "at": time.monotonic_ns(), "dispatcher": sum(c.dispatcher_cpu_ns for c in cpus),
        "slices": sum(c.slices for c in cpus), "switches": sum(c.vm_switches for c in cpus),
        "estimator": service.measuring.cpu_ns,
        "vms": {vm.name: (vm.progress or 0, sum(vcpu.run_ns for vcpu in vm.vcpus)) for vm in snapshot.vms}}


async def stretch(service: Service, random_order: int, settle: float, seconds: float) -> dict[str, float]:
    await service.set_policy({"random_order": random_order})
    await trio.sleep(settle)
    first = read(service)
    await trio.sleep(seconds)
    last = read(service)
    slices = last["slices"] - first["slices"]
    wall = last["at"] - first["at"]
    ran = {name: last["vms"][name][1] - run for name, (_progress, run) in first["vms"].items()}
    logs = [math.log((last["vms"][name][0] - progress) / ran[name]) for name, (progress, _run) in first["vms"].items()]
    return {
        "dispatcher_us": (last["dispatcher"] - first["dispatcher"]) / slices / 1000,
        "switches": 1e9 * (last["switches"] - first["switches"]) / wall,
        "work_per_cpu": math.exp(sum(logs) / len(logs)),
        "work": math.exp(sum(logs) / len(logs)) * sum(ran.values()) / wall,
        "estimator_us": (last["estimator"] - first["estimator"]) / slices / 1000,
        "granted": sum(ran.values()) / slices / 1000}


def against(runs: dict[str, list[dict[str, float]]], name: str, what: str) -> list[float]:
    """By round: the ratio to `off`, the geometric mean over both stretches."""
    logs = [[math.log(one[what]) for one in runs[kind]] for kind in (name, "off")]
    pairs = [[(log[at] + log[at + 1]) / 2 for at in range(0, len(log), 2)] for log in logs]
    return [math.exp(mine - theirs) for mine, theirs in zip(*pairs, strict=True)]


def shown(values: Sequence[float]) -> str:
    low, high = interval(values)
    return f"{100 * (median(values) - 1):+.2f} [{100 * (low - 1):+.2f}, {100 * (high - 1):+.2f}]"


Interval = tuple[float, float, float]


async def online(service: Service, seconds: float) -> Interval:
    """A fresh online estimate of so many seconds: value and bounds, us."""
    service.measuring._online.reset(0)
    await trio.sleep(seconds)
    latest = service.snapshot().mixing.latest
    if latest is None or latest.cost_us is None:
        raise RuntimeError(f"nothing was told: {latest and latest.headline}")
    return latest.cost_us.value, latest.cost_us.low, latest.cost_us.high


def on_demand(socket: Path, names: Sequence[str], seconds: float, slice_us: int) -> Interval:
    done = subprocess.run(
        [PROGRAM, "--socket", str(socket), "measure", "--vms", ",".join(names), "--seconds", str(seconds), "--slices",
         f"{slice_us / 1000:g}", "--out", str(socket.with_name("mixing")), "--no-save", "-o", "json"],
        capture_output=True, text=True, timeout=seconds + 60)
    if done.returncode:
        raise RuntimeError(done.stderr)
    cost = json.loads(done.stdout)["cost_us"]
    return cost["value"], cost["low"], cost["high"]


def together(rounds: Sequence[Interval]) -> Interval:
    """Their mean, weighted by precision."""
    weights = [1 / (high - low) ** 2 for _value, low, high in rounds]
    value = sum(w * one[0] for w, one in zip(weights, rounds, strict=True)) / sum(weights)
    half = 0.5 / sum(weights) ** 0.5
    return value, value - half, value + half


async def spending(config: Config, minutes: int) -> list[dict[str, Any]]:
    """Of each of the first *minutes* of a service: what the estimator took, in percent, and what it knows by then."""
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="mixvisor-bench-") as folder:
        service = Service(config, state_dir=Path(folder), socket=None)
        async with trio.open_nursery() as nursery:
            await nursery.start(service.run)
            first = read(service)
            for minute in range(1, minutes + 1):
                await trio.sleep(60)
                last = read(service)
                spent, ran = last["estimator"] - first["estimator"], sum(
                    last["vms"][name][1] - run for name, (_progress, run) in first["vms"].items())
                latest = service.snapshot().mixing.latest
                cost = latest.cost_us if latest is not None else None
                found.append({
                    "minute": minute, "of_dispatcher": 100 * spent / (last["dispatcher"] - first["dispatcher"]),
                    "of_guests": 100 * spent / ran,
                    "cost": "-" if cost is None else f"{cost.value:.2f} [{cost.low:.2f}, {cost.high:.2f}]"})
                first = last
            service.request_shutdown()
    return found


async def main() -> None:
    chosen = options(__doc__ or "", seconds=0.8, settle=0.3, rounds=12, slice_us=1000, agreement=40.0, minutes=5,
                     agreements=3, cpu=str(max(os.sched_getaffinity(0))))
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    hardware = os.access("/dev/kvm", os.R_OK | os.W_OK)
    vms = [{"name": f"vm{number}", "mode": "hardware" if number % 2 and hardware else "software", "memory": "4M",
            "measure": True, "boot": {"guest": "randmem", "working_set": "64K"}} for number in range(4)]
    config = Config.model_validate({
        "host": {"cpus": chosen.cpu, "dispatch": "precise"}, "scheduler": {"slice_us": chosen.slice_us},
        "metrics": {"listen": "none"}, "vm": vms})
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in STRETCHES}
    agreement: dict[str, list[tuple[float, float, float]]] = {"online": [], "on demand": []}
    dice = random.Random(3)
    minutes = await spending(config, chosen.minutes)
    with tempfile.TemporaryDirectory(prefix="mixvisor-bench-") as folder:
        socket = Path(folder) / "control.sock"
        service = Service(config, state_dir=Path(folder), socket=socket)
        service.measuring.budget = 1.0
        async with trio.open_nursery() as nursery:
            await nursery.start(service.run)
            await trio.sleep(1)
            for _ in range(chosen.rounds):
                order = dice.sample(list(STRETCHES), len(STRETCHES))
                for name in (*order, *reversed(order)):
                    runs[name].append(await stretch(service, STRETCHES[name], chosen.settle, chosen.seconds))
            if chosen.agreement and hardware:
                await service.set_policy({"random_order": 50})
                for _ in range(chosen.agreements):
                    agreement["online"].append(await online(service, chosen.agreement))
                    agreement["on demand"].append(await trio.to_thread.run_sync(
                        on_demand, socket, [vm["name"] for vm in vms], chosen.agreement, chosen.slice_us))
            service.request_shutdown()
    table(f"Random order and online estimate against neither, {chosen.slice_us / 1000:g} ms slices, percent "
          f"({chosen.rounds} rounds: median, 95 % interval)",
          ("", "dispatcher us a slice", "VM switches", "work per CPU-second", "work per second"),
          [(name, *(shown(against(runs, name, what)) for what in ("dispatcher_us", "switches", "work_per_cpu", "work")))
           for name in ("on", "off again")])
    on, off = runs["on"], runs["off"]
    mine = median([one["estimator_us"] for one in on])
    table("The estimator itself, on another host CPU",
          ("", "us a slice", "dispatcher us a slice", "part of the dispatcher's", "part of guest CPU time"),
          [(when, part * mine, median([one["dispatcher_us"] for one in off]),
            f"{100 * part * mine / median([one['dispatcher_us'] for one in off]):.2f} %",
            f"{100 * part * mine / median([one['granted'] for one in on]):.4f} %")
           for when, part in (("while it looks", 1.0),)])
    table("What it spends, from the moment when modes meet",
          ("minute", "part of the dispatcher's", "part of guest CPU time", "cost of a crossing so far, us"),
          [(one["minute"], f"{one['of_dispatcher']:.2f} %", f"{one['of_guests']:.4f} %", one["cost"])
           for one in minutes])
    if agreement["online"]:
        rows = []
        for name, rounds in agreement.items():
            for title, (value, low, high) in ((f"{name}, together", together(rounds)),
                                              *((f"  round {at}", one) for at, one in enumerate(rounds, 1))):
                rows.append((title, f"{value:.2f}", f"{low:.2f} to {high:.2f}", f"{(high - low) / 2:.2f}"))
        table(f"Cost of a crossing, us, {chosen.agreement:g} s a round", ("", "cost", "95 %", "half-width"), rows)
    report("online", {"minutes": minutes, "runs": runs, "agreement": agreement, "slice_us": chosen.slice_us},
           chosen.json)


if __name__ == "__main__":
    trio.run(main)
