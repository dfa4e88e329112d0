"""How well CPUs are shared, against the kernel's own scheduler in the same run: `python -m benchmarks.sharing`.

1. shares: software and hardware VMs in turn (a guest that only computes), weights 1:1, 1:3, 1:2:4:8 and 100:1, slices
   of 2, 5, 10 and 20 ms: the worst |received - due| of a VM in percent of one host CPU over 10 s, under `fair` and, in
   the same service, under `kernel` (nice levels). Goal: 0.3 %. On several host CPUs there is a VM of each weight for
   each of them (`1:3 x2`: 1, 3, 1, 3), so that weights mean something; the same weights once, of which some ask for
   more than one VM can use; and sets that no fixed placement serves (`1:1:1`). Due is a part of what the VMs received
   together, so that other work on their CPUs is nobody's debt. Measured from two seconds after each change of policy.
2. modes: changes of mode a second under `fair` and `batch`, two VMs of each mode, and the longest that a mode waited.
3. wake: a process that sleeps 20 ms on average and then computes for half a millisecond, among ten that only
   compute: from the time that it asked to be woken for until it runs, by latency class under `fair` and
   under `kernel`. What a wake-up costs on an idle host CPU is in all of them.

`--quick`: about a minute, figures to see that it works. `--cpus` is what VMs may use; where that is all of the host,
dispatch is gentle. `--part` and `--weights` (a line of the table) take one of them.
"""

from __future__ import annotations

import os
import random
import struct
import time
from collections.abc import Sequence
from typing import Any

import trio

from mixvisor.config.model import parse_cpus
from mixvisor.sched import linux
from mixvisor.sched.model import LATENCIES
from mixvisor.sched.shared import NOBODY
from mixvisor.sched.supervisor import Scheduler, VcpuThread
from mixvisor.service.app import Service
from mixvisor.vm.worker.status import STATUS_SIZE, Phase, StatusPage

from .common import busy_service, median, options, quantile, report, table
from .dispatch import ENTRIES, Forked, bury, fork, spin_for_ever

WEIGHTS = ((1, 1), (1, 3), (1, 2, 4, 8), (100, 1))
ODD = ((1, 1, 1), (2, 3, 4))               # on two host CPUs: nobody can stay where it is
SLICES_US = (2000, 5000, 10_000, 20_000)
SETTLE_S = 2.0             # after a change of policy, which leaves lags of a slice to be made good
BUSY = 10
SLEEP_S, RUN_S = 0.020, 0.0005


def populations(cpus: int) -> list[tuple[str, tuple[int, ...]]]:
    """(what it is called, weights) to be shared by so many host CPUs."""
    once = [(":".join(map(str, weights)), weights) for weights in (*WEIGHTS, *(ODD if cpus > 1 else ()))]
    return [*((f"{name} x{cpus}", weights * cpus) for name, weights in once[:len(WEIGHTS)] if cpus > 1), *once]


def due_parts(weights: Sequence[int], cpus: int) -> list[float]:
    """What each VM of one vCPU is due of all that the VMs receive: filled up in proportion to weight until it has a
    host CPU. Written apart from what it judges (policy/entitlement.py).
    """
    shares = [0.0] * len(weights)
    left, hungry = float(min(cpus, len(weights))), set(range(len(weights)))
    while hungry:
        level = left / sum(weights[n] for n in hungry)
        full = {n for n in hungry if level * weights[n] >= 1.0}
        for n in full or hungry:
            shares[n] = min(1.0, level * weights[n])
        left -= len(full)
        hungry = hungry - full if full else set()
    return [share / sum(shares) for share in shares]


def vms(weights: Sequence[int]) -> list[dict[str, Any]]:
    scale = 100 if max(weights) < 100 else 1
    return [{"name": f"vm{n}", "mode": ("software", "hardware")[n % 2], "boot": {"guest": "alu"}, "bits": 64,
             "weight": weight * scale} for n, weight in enumerate(weights)]


async def errors(service: Service, weights: Sequence[int], cpus: int, seconds: float) -> float:
    """Worst |received - due| in percent of one host CPU, by the kernel's own account of the processes."""
    pids = [vm.pid for vm in service.snapshot().vms]
    clocks = [linux.Kernel().run_clock(pid, pid) for pid in pids if pid is not None]
    before, began = [clock.read() for clock in clocks], time.monotonic_ns()
    await trio.sleep(seconds)
    got = [clock.read() - first for clock, first in zip(clocks, before, strict=True)]
    passed = time.monotonic_ns() - began
    for clock in clocks:
        clock.close()
    due = [sum(got) * part for part in due_parts(weights, cpus)]
    return max(abs(g - d) for g, d in zip(got, due, strict=True)) / passed * 100


def moved(service: Service) -> int:
    """How often vCPUs have changed their host CPU so far."""
    return sum(vcpu.migrations for vm in service.snapshot().vms for vcpu in vm.vcpus)


async def shares(cpus: str, seconds: float, slices: Sequence[int], only: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    count = len(parse_cpus(cpus))
    for name, weights in populations(count):
        if only not in ("all", name):
            continue
        async with busy_service(vms(weights), cpus=cpus) as service:
            for slice_us in slices:
                await service.set_policy({"policy": "fair", "slice_us": slice_us})
                await trio.sleep(SETTLE_S)
                before = moved(service)
                ours = await errors(service, weights, count, seconds)
                moves = moved(service) - before
                await service.set_policy({"policy": "kernel"})
                await trio.sleep(SETTLE_S)
                found.append({"weights": name, "slice_us": slice_us, "fair_pct": ours, "moves_per_s": moves / seconds,
                              "kernel_pct": await errors(service, weights, count, seconds)})
    return found


async def modes(cpus: str, seconds: float) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    async with busy_service(vms((1, 1, 1, 1)), cpus=cpus) as service:
        for policy in ("fair", "batch"):
            await service.set_policy({"policy": policy})
            await trio.sleep(0.5)
            before = service.snapshot()
            await trio.sleep(seconds)
            after = service.snapshot()
            passed = (after.monotonic_ns - before.monotonic_ns) / 1e9
            changes = sum(count for cpu in after.cpus for (a, b), count in cpu.switches.items() if a != b)
            changes -= sum(count for cpu in before.cpus for (a, b), count in cpu.switches.items() if a != b)
            recording = service.recording(seconds).unpack()
            found.append({"policy": policy, "changes_per_s": changes / passed,
                          "longest_ms": max((_gap(records) for records in recording.slices.values()), default=0) / 1e6})
    return found


def _gap(records: Sequence[Any]) -> int:
    """The longest that a mode was without the CPU between two of its slices, ns."""
    last: dict[int, int] = {}
    longest = 0
    for record in records:
        if record.slot != NOBODY and record.run_ns:
            if record.mode in last:
                longest = max(longest, record.start_ns - last[record.mode])
            last[record.mode] = record.end_ns
    return longest


def waker(page: StatusPage, write: int, lifetime: float) -> None:
    """Sleeps and computes in turn; writes how late each time it ran."""
    rng, ends = random.Random(1), time.monotonic() + lifetime
    while time.monotonic() < ends:
        due = time.monotonic_ns() + round(rng.expovariate(1 / SLEEP_S) * 1e9)
        page.set("phase", Phase.SLEEPING)
        time.sleep(max(0, due - time.monotonic_ns()) / 1e9)
        page.set("phase", Phase.RUNNING)
        woke = time.monotonic_ns()
        os.write(write, struct.pack("q", woke - due))
        busy = time.thread_time_ns() + round(RUN_S * 1e9)
        while time.thread_time_ns() < busy:
            pass


async def wake(cpu: int, policy: str, latency: str, dispatch: str, seconds: float) -> list[float]:
    """How late it ran, in µs."""
    lifetime = seconds + 5
    children: list[Forked] = []
    read, write = os.pipe()
    status = os.memfd_create("status", os.MFD_CLOEXEC)
    os.ftruncate(status, STATUS_SIZE)
    page = StatusPage(status, writable=True)
    page.set("phase", Phase.RUNNING)

    async def spawn(kind: str, arguments: dict[str, Any], fds: Sequence[int] = ()) -> Forked:
        copies = [os.dup(fd) for fd in fds]
        child = fork(lambda: ENTRIES[kind](arguments, copies), round(lifetime) + 10)
        for fd in copies:
            os.close(fd)
        return child

    def thread(name: str, child: Forked, mode: str, **more: Any) -> VcpuThread:
        return VcpuThread(vm=name, index=0, pid=child.pid, tid=child.pid, pidfd=child.pidfd, mode=mode, weight=100,
                          cpus=frozenset({cpu}), **more)

    try:
        children += [fork(spin_for_ever, round(lifetime) + 10) for _ in range(BUSY)]
        children.append(fork(lambda: waker(page, write, seconds), round(lifetime) + 10))
        scheduler = Scheduler(cpus=[cpu], spawn=spawn, dispatch=dispatch, policy=policy)
        async with trio.open_nursery() as nursery:
            await nursery.start(scheduler.run)
            for number, child in enumerate(children[:-1]):
                await scheduler.admit(thread(f"busy{number}", child, ("software", "hardware")[number % 2]))
            await scheduler.admit(thread("waker", children[-1], "software", status_fd=status, latency=latency))
            await trio.sleep(0.3)
            os.set_blocking(read, False)
            _drain(read)
            await trio.sleep(seconds - 0.5)
            late = _drain(read)
            nursery.cancel_scope.cancel()
        return [ns / 1000 for ns in late]
    finally:
        bury(children)
        page.close()
        for fd in (read, write, status):
            os.close(fd)


def _drain(read: int) -> list[int]:
    found: list[int] = []
    while True:
        try:
            data = os.read(read, 8 * 512)
        except BlockingIOError:
            return found
        found += [value for (value,) in struct.iter_unpack("q", data)]


async def everything(cpus: str, cpu: int, quick: bool, part: str, weights: str) -> dict[str, Any]:
    seconds = 2.0 if quick else 10.0
    figures: dict[str, Any] = {}
    if part in ("all", "shares"):
        figures["shares"] = found = await shares(
            cpus, seconds, (5000,) if quick else SLICES_US, weights)
        table(f"Worst |received - due| of a VM over {seconds:g} s, % of a host CPU",
              ["weights", "slice", "fair", "kernel", "moves/s under fair"],
              [[f["weights"], f"{f['slice_us'] / 1000:g} ms", f["fair_pct"], f["kernel_pct"], f["moves_per_s"]]
               for f in found])
    if part in ("all", "modes"):
        figures["modes"] = found = await modes(cpus, seconds)
        table("Changes of mode, two VMs of each", ["policy", "a second", "longest without, ms"],
              [[f["policy"], f["changes_per_s"], f["longest_ms"]] for f in found])
    if part in ("all", "wake"):
        found = []
        for dispatch in ("precise", "gentle"):
            for policy, latency in (*(("fair", name) for name in LATENCIES), ("kernel", "normal")):
                if policy == "kernel" and dispatch != "gentle":
                    continue
                late = await wake(cpu, policy, latency, dispatch, 3.0 if quick else 30.0)
                if late:
                    found.append({"policy": policy, "dispatch": dispatch if policy == "fair" else "",
                                  "latency": latency if policy == "fair" else "", "count": len(late),
                                  "p50_us": median(late), "p99_us": quantile(late, 0.99),
                                  "p999_us": quantile(late, 0.999)})
        figures["wake"] = found
        table(f"From the time to wake to running, one of {BUSY + 1}, µs",
              ["policy", "dispatch", "class", "wakes", "p50", "p99", "p99.9"],
              [[f["policy"], f["dispatch"], f["latency"], f["count"], f["p50_us"], f["p99_us"], f["p999_us"]]
               for f in found])
    return figures


def main() -> None:
    chosen = options(__doc__ or "", quick=False, cpus="1", cpu=1, part="all", weights="all")
    figures = trio.run(everything, chosen.cpus, chosen.cpu, chosen.quick, chosen.part, chosen.weights)
    report("sharing", figures, chosen.json)


if __name__ == "__main__":
    main()
