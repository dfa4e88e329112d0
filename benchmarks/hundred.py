"""A hundred software VMs of 4 MiB on two CPUs: start, run fairly, be scraped, stop.

Weights 1, 2 and 3 in turn. Fairness is Jain's index of received over entitled CPU time of each VM; the
scrape is a real HTTP request of /metrics while everything runs.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import structlog
import trio

from mixvisor.config.model import Config
from mixvisor.sched.policy import jain
from mixvisor.service.app import Service

from .common import median, options, report, table


async def main() -> None:
    chosen = options(__doc__ or "", vms=100, seconds=20.0, scrapes=20, slice_us=5000,
                     cpus=",".join(map(str, sorted(os.sched_getaffinity(0))[:2])), dispatch="auto")
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    config = Config.model_validate({
        "host": {"cpus": chosen.cpus, "dispatch": chosen.dispatch},
        "scheduler": {"slice_us": chosen.slice_us}, "metrics": {"listen": "127.0.0.1:0"},
        "vm": [{"name": f"vm{i}", "mode": "software", "memory": "4M", "weight": 100 * (1 + i % 3),
                "boot": {"guest": "alu"}} for i in range(chosen.vms)]})
    with tempfile.TemporaryDirectory(prefix="mixvisor-bench-") as folder:
        service = Service(config, state_dir=Path(folder), socket=None)
        asked = time.monotonic()
        async with trio.open_nursery() as nursery:
            await nursery.start(service.run)
            up = time.monotonic() - asked
            running = sum(v.state == "running" for v in service.snapshot().vms)
            await trio.sleep(2)
            first = {v.name: v for v in service.snapshot().vms}
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
                await trio.sleep(max(0, chosen.seconds / chosen.scrapes - (time.monotonic() - began)))
            last = {v.name: v for v in service.snapshot().vms}
            ratios = [(v.vcpus[0].run_ns - first[n].vcpus[0].run_ns) / (v.entitled_ns - first[n].entitled_ns)
                      for n, v in last.items()]
            dispatch = service.snapshot().scheduler.dispatch
            ending = time.monotonic()
            service.request_shutdown()
        down = time.monotonic() - ending
    table(f"{chosen.vms} software VMs on host CPUs {chosen.cpus}, {dispatch}",
          ("figure", "value"),
          [("running", running), ("all started after s", up), ("all ended after s", down),
           ("Jain's index of received/entitled", jain(ratios)), ("received/entitled min", min(ratios)),
           ("received/entitled max", max(ratios)), *((f"scrape by a client {how}, {what} ms", of(scrapes[kind]))
             for kind, how in (("lifted", "at the supervisor's priority"), ("beside", "that competes with the VMs"))
             for what, of in (("median", median), ("max", max)))])
    report("hundred", {"up_s": up, "down_s": down, "ratios": ratios, "scrapes_ms": scrapes}, chosen.json)


if __name__ == "__main__":
    trio.run(main)
