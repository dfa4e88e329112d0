"""Many VMs of little memory on two CPUs: start, run fairly, be scraped, stop. A hundred software VMs, all busy, if not
told otherwise; `--vms 1000 --busy 50 --modes both` has a thousand of which all but fifty sleep.

The busy ones have weights 1, 2 and 3 in turn; the others mask the timer and halt. Fairness is Jain's index of received
over entitled CPU time, and the worst |received - due| in percent of one host CPU, due being a part of what the busy
ones received together (of equal parts no one can use more than a CPU). The scrape is a real HTTP request of /metrics
while everything runs. CPU is what the process of the supervisor used, this benchmark's few calls included; memory its
resident and proportional set, and the proportional sets of all that it started.
"""

from __future__ import annotations

import os
import resource
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import structlog
import trio

from mixvisor.config.model import Config, parse_cpus
from mixvisor.sched.policy import jain
from mixvisor.sched.shared import RingReader
from mixvisor.service.app import Service

from .common import median, options, quantile, report, table
from .sharing import due_parts

ASLEEP = bytes.fromhex("b0ff e621 fb f4 ebfc")      # mov al, ff; out 21, al; sti; again: hlt; jmp again


def vms(count: int, busy: int, modes: str, sleeper: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for i in range(count):
        works = i < busy
        mode = ("software", "hardware")[i % 2] if modes == "both" else modes
        found.append({"name": f"vm{i}", "mode": mode, "memory": "4M" if works else "1M",
                      "weight": 100 * (1 + i % 3), "bits": 64 if works else 16,
                      "boot": {"guest": "alu"} if works else {"flat": str(sleeper), "bits": 16}})
    return found


def used_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def text_of(path: str) -> str:
    """Nothing, where the process has ended."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def set_kib(pid: int | str, name: str) -> int:
    """Rss or Pss of a process."""
    lines = text_of(f"/proc/{pid}/smaps_rollup").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def proportional_kib() -> dict[str, list[int]]:
    """The proportional sets of what this process started, by what it is."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            text = text_of(f"{entry}/stat")
            if text:
                parents[int(entry.name)] = int(text[text.rindex(")") + 2:].split()[1])
    found: dict[str, list[int]] = defaultdict(list)
    for pid in parents:
        above = pid
        while above in parents and above != os.getpid():
            above = parents[above]
        if above == os.getpid() and pid != above:
            name = text_of(f"/proc/{pid}/comm")
            found["workers" if name.startswith("mixvisor:vm") else "helpers"].append(set_kib(pid, "Pss"))
    return found


async def main() -> None:
    chosen = options(__doc__ or "", vms=100, busy=-1, modes="software", seconds=20.0, scrapes=20, slice_us=5000,
                     cpus=",".join(map(str, sorted(os.sched_getaffinity(0))[:2])), dispatch="auto")
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    busy = chosen.vms if chosen.busy < 0 else chosen.busy
    with tempfile.TemporaryDirectory(prefix="mixvisor-bench-") as folder:
        sleeper = Path(folder) / "asleep.bin"
        sleeper.write_bytes(ASLEEP)
        config = Config.model_validate({
            "host": {"cpus": chosen.cpus, "dispatch": chosen.dispatch},
            "scheduler": {"slice_us": chosen.slice_us}, "metrics": {"listen": "127.0.0.1:0"},
            "vm": vms(chosen.vms, busy, chosen.modes, sleeper)})
        service = Service(config, state_dir=Path(folder), socket=None)
        asked = time.monotonic()
        async with trio.open_nursery() as nursery:
            await nursery.start(service.run)
            up = time.monotonic() - asked
            running = sum(v.state == "running" for v in service.snapshot().vms)
            await trio.sleep(2)
            readers = [RingReader(service._scheduler._shared, index) for index in range(len(parse_cpus(chosen.cpus)))]
            for reader in readers:
                reader.read()
            decisions: list[float] = []
            first, began_all, used = {v.name: v for v in service.snapshot().vms}, time.monotonic(), used_s()
            scrapes: dict[str, list[float]] = {"beside": [], "lifted": []}
            for number in range(chosen.scrapes):
                began = time.monotonic()
                # A scraper that competes with the VMs for the two CPUs waits for them too; one at
                # the supervisor's own priority shows what the service itself takes.
                kind = ("beside", "lifted")[number % 2]
                lift = ["nice", "-n", "-11"] if kind == "lifted" and os.geteuid() == 0 else []
                process = await trio.run_process(
                    [*lift, "curl", "-s", "-o", "/dev/null", "-w", "%{time_total}",
                     f"http://{service.metrics_address}/metrics"], capture_stdout=True)
                scrapes[kind].append(float(process.stdout) * 1e3)
                for reader in readers:
                    decisions += [record.decision_ns / 1000 for record in reader.read()]
                await trio.sleep(max(0, chosen.seconds / chosen.scrapes - (time.monotonic() - began)))
            snapshot = service.snapshot()
            passed, used = time.monotonic() - began_all, used_s() - used
            working = [v for v in snapshot.vms if int(v.name[2:]) < busy]
            got = [v.vcpus[0].run_ns - first[v.name].vcpus[0].run_ns for v in working]
            ratios = [g / (v.entitled_ns - first[v.name].entitled_ns) for g, v in zip(got, working, strict=True)]
            parts = due_parts([v.weight for v in working], len(parse_cpus(chosen.cpus)))
            error = max(abs(g - part * sum(got)) for g, part in zip(got, parts, strict=True)) / passed / 1e7
            started = proportional_kib()
            memory = {"rss": set_kib("self", "Rss") / 1024, "pss": set_kib("self", "Pss") / 1024,
                      "helpers": sum(started["helpers"]) / 1024,
                      "worker": median([kib / 1024 for kib in started["workers"]])}
            ending = time.monotonic()
            service.request_shutdown()
        down = time.monotonic() - ending
    table(f"{chosen.vms} VMs ({chosen.modes}), {busy} busy, on host CPUs {chosen.cpus}, {snapshot.scheduler.dispatch}",
          ("figure", "value"),
          [("running", running), ("all started after s", up), ("all ended after s", down),
           ("worst |received - due| of a busy VM, % of a CPU", error),
           ("Jain's index of received/entitled", jain(ratios)), ("received/entitled min", min(ratios)),
           ("received/entitled max", max(ratios)),
           *((f"scrape by a client {how}, {what} ms", of(scrapes[kind]))
             for kind, how in (("lifted", "at the supervisor's priority"), ("beside", "that competes with the VMs"))
             for what, of in (("median", median), ("max", max))),
           ("errors of scheduling", dict(snapshot.scheduler.errors) or "none"),
           ("supervisor, % of a CPU", 100 * used / passed),
           ("a decision, p50 µs", median(decisions)), ("a decision, p99 µs", quantile(decisions, 0.99)),
           ("supervisor, resident MiB", memory["rss"]), ("supervisor, proportional MiB", memory["pss"]),
           ("zygote, dispatchers, guard, proportional MiB", memory["helpers"]),
           ("a worker, proportional MiB, median", memory["worker"])])
    report("hundred", {"vms": chosen.vms, "busy": busy, "up_s": up, "down_s": down, "share_error_pct": error,
                       "ratios": ratios, "scrapes_ms": scrapes, "supervisor_cpu_pct": 100 * used / passed,
                       "decision_p50_us": median(decisions), "decision_p99_us": quantile(decisions, 0.99),
                       "memory_mib": memory}, chosen.json)


if __name__ == "__main__":
    trio.run(main)
