"""How exact dispatching is, and what it costs: `python -m benchmarks.dispatch` (about two minutes).

Spinning processes on one host CPU, scheduled by the real supervisor, dispatcher and guard:
1. shares: weights 1:2:4:8 under `precise` and `gentle`, error in percent of what all received;
2. slices: `precise` at several slice lengths: time on another VM than the picked one, dispatcher CPU a slice;
3. crowds: the same with more VMs, all awake;
4. punctuality: a whole service with two software and two hardware VMs, scraped over HTTP once a second: how late
   slices end, and how long the kernel froze all real-time threads.

Beside the dispatcher's CPU stand two loops, Python processes at the same priority on the same CPU, beside the same
real-time spinners, waking at the same times: the *bare loop* only sleeps, the *calls loop* also reads one spinner's CPU
clock and makes the two changes of priority of a slice, and decides, bills and logs nothing. That is what this host
charges for waking up, and for the kernel calls that no dispatcher can do without; on a virtual machine most of it is
cold caches. `calls_p99_us` is how long those calls took, from wake-up on, at the 99th percentile: what the host itself
puts into a `decision_p99_us`, which is a dispatcher's whole step. `steal` is what the hypervisor took from the CPU: no
scheduler inside can undo it.
Needs the right to real-time priorities.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trio

from mixvisor.sched import dispatching, guard, linux, selftest
from mixvisor.sched.shared import RingReader, SliceRecord
from mixvisor.sched.supervisor import Scheduler, VcpuThread

from .common import busy_service, median, options, quantile, report, table

WEIGHTS = (1, 2, 4, 8)
ENTRIES = {"dispatcher": dispatching.main, "guard": guard.main, "spinner": selftest.spin}
CROWDS = (2, 8, 30, 100, 1000)
# The kernel freezes real-time threads after 0.95 s of a second: the bare loop does not breathe.
BARE_S = 0.7


class Forked:
    """A child without a zygote, alive for `lifetime` seconds at most."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    async def wait(self) -> None:
        await trio.lowlevel.wait_readable(self.pidfd)

    async def reap(self) -> int | None:
        await self.wait()
        with contextlib.suppress(ChildProcessError):
            return os.waitpid(self.pid, 0)[1]  # noqa: ASYNC222 - it has ended
        return None

    def words(self) -> str:
        return ""

    def close(self) -> None:
        os.close(self.pidfd)


def fork(run: Any, lifetime: int) -> Forked:
    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(lifetime)
            os.setpriority(os.PRIO_PROCESS, 0, 0)
            os._exit(run() or 0)
        finally:
            os._exit(70)
    return Forked(pid)


def spin_for_ever() -> None:
    while True:
        pass


def bury(children: Sequence[Forked]) -> None:
    for child in children:
        linux.give_back(child.pid, child.pid, range(os.cpu_count() or 1))
        child.signal(signal.SIGKILL)
        os.waitpid(child.pid, 0)
        child.close()


def stolen_s(cpu: int) -> float:
    """What the hypervisor has taken from a CPU so far."""
    for line in Path("/proc/stat").read_text().splitlines():
        name, *fields = line.split()
        if name == f"cpu{cpu}":
            return int(fields[7]) / os.sysconf("SC_CLK_TCK")
    return 0.0


def loop_us(cpu: int, slice_ns: int, *, calls: bool) -> tuple[float, float]:
    """CPU µs a wake-up of a process that decides nothing, beside real-time spinners; 99th percentile of the µs in
    which it makes its calls. Medians of three."""
    read, write = os.pipe()
    parameters = os.sched_param(1), os.sched_param(2)

    def run(beside: Sequence[Forked]) -> None:
        os.sched_setaffinity(0, {cpu})
        linux.become_realtime(linux.DISPATCHER_PRIORITY)
        clocks = [linux.Kernel().run_clock(child.pid, child.pid) for child in beside]
        count = max(1, int(BARE_S * 1e9 / slice_ns))
        picked = 0
        took: list[int] = []
        due, used = time.monotonic_ns(), time.thread_time_ns()
        for _ in range(count):
            due += slice_ns
            time.sleep(max(0, due - time.monotonic_ns()) / 1e9)
            woken = time.monotonic_ns()
            if calls:
                clocks[picked].read()
                os.sched_setparam(beside[picked].pid, parameters[0])
                picked = (picked + 1) % len(beside)
                os.sched_setparam(beside[picked].pid, parameters[1])
            took.append(time.monotonic_ns() - woken)
        used = time.thread_time_ns() - used
        os.write(write, f"{used / count / 1000} {quantile(took, 0.99) / 1000}\n".encode())

    def spin() -> None:
        os.sched_setaffinity(0, {cpu})
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        spin_for_ever()

    found: list[tuple[float, ...]] = []
    try:
        for _ in range(3):
            beside = [fork(spin, 3) for _ in WEIGHTS]
            try:
                time.sleep(0.05)                # they are real-time by then
                child = fork(lambda: run(beside), 3)  # noqa: B023 - it has ended before the next round
                os.waitpid(child.pid, 0)
                child.close()
            finally:
                bury(beside)
            found.append(tuple(map(float, os.read(read, 64).split())))
            time.sleep(0.3)
    finally:
        os.close(read)
        os.close(write)
    return median(each for each, _ in found), median(p99 for _, p99 in found)


def figures(records: Sequence[SliceRecord], frozen_ns: int) -> dict[str, Any]:
    late = [r.late_ns / 1000 for r in records] or [0.0]
    decision = [r.decision_ns / 1000 for r in records] or [0.0]
    return {
        "late_p50_us": round(median(late), 1), "late_p99_us": round(quantile(late, 0.99), 1),
        "late_max_us": round(max(late), 1), "decision_p50_us": round(median(decision), 1),
        "decision_p99_us": round(quantile(decision, 0.99), 1),
        "frozen_ms": frozen_ns / 1e6,
    }


async def spinners(
    kind: str, cpu: int, slice_ns: int, seconds: float, weights: Sequence[int] = WEIGHTS,
) -> dict[str, Any]:
    """One scheduler over so many spinning processes."""
    lifetime = int(seconds) + 15 + len(weights) // 20

    def spin() -> None:
        # From the start, or a crowd would starve the supervisor before it is admitted.
        os.sched_setaffinity(0, {cpu})
        spin_for_ever()

    ours = [fork(spin, lifetime) for _ in weights]

    async def spawn(what: str, arguments: dict[str, Any], fds: Sequence[int] = ()) -> Forked:
        copies = [os.dup(fd) for fd in fds]
        child = fork(lambda: ENTRIES[what](arguments, copies), lifetime)
        for fd in copies:
            os.close(fd)
        return child

    records: list[SliceRecord] = []
    try:
        async with trio.open_nursery() as nursery:
            scheduler = Scheduler(cpus=[cpu], spawn=spawn, dispatch=kind, slice_ns=slice_ns)
            await nursery.start(scheduler.run)
            for number, (child, weight) in enumerate(zip(ours, weights, strict=True)):
                await scheduler.admit(VcpuThread(
                    vm=f"vm{number}", index=0, pid=child.pid, tid=child.pid, pidfd=child.pidfd, mode="software",
                    weight=weight, cpus=frozenset({cpu})))
            await trio.sleep(0.5)
            assert scheduler._shared is not None
            reader = RingReader(scheduler._shared, 0)
            reader.read()
            first, began, stolen = scheduler.statistics(), time.monotonic_ns(), stolen_s(cpu)
            while time.monotonic_ns() - began < seconds * 1e9:
                await trio.sleep(0.1)
                records += reader.read()
            last, passed, stolen = scheduler.statistics(), time.monotonic_ns() - began, stolen_s(cpu) - stolen
            nursery.cancel_scope.cancel()
    finally:
        bury(ours)
    ran = [b.run_ns - a.run_ns for a, b in zip(first.vcpus, last.vcpus, strict=True)]
    leak = sum(b.leak_ns - a.leak_ns for a, b in zip(first.vcpus, last.vcpus, strict=True))
    total = sum(ran)
    errors = [100 * (r / total - w / sum(weights)) for r, w in zip(ran, weights, strict=True)]
    slices = max(1, last.cpus[0].slices - first.cpus[0].slices)
    cpu_ns = last.cpus[0].dispatcher_cpu_ns - first.cpus[0].dispatcher_cpu_ns
    return {
        "kind": kind, "vms": len(weights), "slice_ms": slice_ns / 1e6, "seconds": passed / 1e9, "slices": slices,
        "share_error_pct": [round(e, 3) for e in errors],
        "worst_share_error_pct": round(max(map(abs, errors)), 3),
        "delivered_pct": round(100 * total / passed, 2), "steal_pct": round(100e9 * stolen / passed, 2),
        "wrong_vm_pct": round(100 * leak / total, 3),
        "dispatcher_us_a_slice": round(cpu_ns / slices / 1000, 1),
        **figures(records, last.cpus[0].frozen_ns - first.cpus[0].frozen_ns),
        "lost_records": reader.lost, "errors": dict(last.errors),
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


async def punctuality(cpu: int, slice_ns: int, seconds: float) -> dict[str, Any]:
    """The whole service, scraped once a second."""
    second = "hardware" if os.access("/dev/kvm", os.R_OK | os.W_OK) else "software"
    vms = [{"name": f"vm{number}", "mode": mode, "memory": "4M", "weight": weight, "boot": {"guest": guest}}
           for number, (mode, weight, guest) in enumerate((
               ("software", 100, "alu"), (second, 200, "alu"), ("software", 400, "randmem"),
               (second, 800, "randmem")))]
    address = f"127.0.0.1:{free_port()}"
    records: list[SliceRecord] = []
    scrapes = 0
    async with busy_service(
            vms, cpus=str(cpu), dispatch="precise", slice_us=slice_ns // 1000, listen=address) as service:
        await trio.sleep(1)
        scheduler = service._scheduler
        assert scheduler is not None
        assert scheduler._shared is not None
        reader = RingReader(scheduler._shared, 0)
        reader.read()
        first, began, stolen = scheduler.statistics(), time.monotonic_ns(), stolen_s(cpu)
        while time.monotonic_ns() - began < seconds * 1e9:
            def scrape() -> bytes:
                with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as answer:
                    return answer.read()
            scrapes += bool(await trio.to_thread.run_sync(scrape))
            await trio.sleep(1)
            records += reader.read()
        last, passed, stolen = scheduler.statistics(), time.monotonic_ns() - began, stolen_s(cpu) - stolen
    before = {vcpu.vm: vcpu for vcpu in first.vcpus}
    ran = [vcpu.run_ns - before[vcpu.vm].run_ns for vcpu in last.vcpus]
    leak = sum(vcpu.leak_ns - before[vcpu.vm].leak_ns for vcpu in last.vcpus)
    slices = max(1, last.cpus[0].slices - first.cpus[0].slices)
    cpu_ns = last.cpus[0].dispatcher_cpu_ns - first.cpus[0].dispatcher_cpu_ns
    weights = {vm["name"]: vm["weight"] for vm in vms}
    shares = [weights[vcpu.vm] for vcpu in last.vcpus]
    errors = [100 * (r / sum(ran) - w / sum(shares)) for r, w in zip(ran, shares, strict=True)]
    return {
        "dispatch": last.dispatch, "seconds": passed / 1e9, "scrapes": scrapes,
        "worst_share_error_pct": round(max(map(abs, errors)), 3),
        "delivered_pct": round(100 * sum(ran) / passed, 2), "steal_pct": round(100e9 * stolen / passed, 2),
        "wrong_vm_pct": round(100 * leak / sum(ran), 3),
        "dispatcher_us_a_slice": round(cpu_ns / slices / 1000, 1),
        **figures(records, last.cpus[0].frozen_ns - first.cpus[0].frozen_ns),
        "lost_records": reader.lost, "errors": dict(last.errors),
    }


def show(title: str, runs: Sequence[dict[str, Any]], keys: Sequence[str]) -> None:
    table(title, keys, [[str(run.get(key, "")) for key in keys] for run in runs])


def main() -> None:
    chosen = options(__doc__ or "", seconds=10.0, service_seconds=30.0, cpu=max(os.sched_getaffinity(0)))
    cpu, short = chosen.cpu, max(1.0, chosen.seconds * 0.3)
    # All children are in one scheduling group with us, unlike in the service, whose VMs have a session of their own:
    # by load, a crowd on the VMs' CPU would leave the supervisor a thirtieth of its group's share on the other one.
    os.setpriority(os.PRIO_PROCESS, 0, -20)
    everywhere = os.sched_getaffinity(0)
    os.sched_setaffinity(0, everywhere - {cpu} or {cpu})

    shares = [trio.run(spinners, kind, cpu, 5_000_000, chosen.seconds) for kind in ("precise", "gentle")]
    show(f"Shares: weights {WEIGHTS}, 5 ms slices, {chosen.seconds:g} s", shares,
         ("kind", "worst_share_error_pct", "share_error_pct", "wrong_vm_pct", "delivered_pct", "steal_pct"))

    slices: list[dict[str, Any]] = []
    for slice_ms in (1, 2, 5, 10):
        slice_ns = slice_ms * 1_000_000
        run = trio.run(spinners, "precise", cpu, slice_ns, short)
        (bare, _), (calls, p99) = (loop_us(cpu, slice_ns, calls=calls) for calls in (False, True))
        slices.append({**run, "bare_loop_us": round(bare, 1), "calls_loop_us": round(calls, 1),
                       "calls_p99_us": round(p99, 1)})
    columns = ("wrong_vm_pct", "dispatcher_us_a_slice", "bare_loop_us", "calls_loop_us", "calls_p99_us",
               "decision_p50_us", "decision_p99_us", "late_p50_us", "late_p99_us", "late_max_us",
               "delivered_pct", "steal_pct")
    show(f"Slices: precise, {short:g} s each", slices, ("slice_ms", *columns))

    crowds = [trio.run(spinners, "precise", cpu, 5_000_000, short, (1,) * count) for count in CROWDS]
    show(f"Crowds: precise, 5 ms slices, equal weights, all awake, {short:g} s each", crowds,
         ("vms", *(column for column in columns if not column.startswith(("bare", "calls")))))

    os.sched_setaffinity(0, everywhere)          # the service keeps off the VMs' CPUs by itself
    service = trio.run(punctuality, cpu, 5_000_000, chosen.service_seconds)
    show(f"Punctuality: a whole service, 5 ms slices, {chosen.service_seconds:g} s", [service],
         ("dispatch", "scrapes", "late_p50_us", "late_p99_us", "late_max_us", "frozen_ms", "worst_share_error_pct",
          "wrong_vm_pct", "dispatcher_us_a_slice", "delivered_pct", "steal_pct"))
    report("dispatch", {"shares": shares, "slices": slices, "crowds": crowds, "service": service}, chosen.json)


if __name__ == "__main__":
    main()
