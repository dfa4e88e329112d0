"""Start of a micro-VM: from request to its first guest instruction, and its private memory.

Each run starts and stops one VM through the whole service (mode plan, zygote, sandbox, engine). The time runs from
`Machine.start` to the moment that the worker stamps before its first guest instruction. Private memory is
Private_Clean + Private_Dirty of the idle worker less the guest's RAM, which is shared memory and so not
counted as private.
"""

from __future__ import annotations

import os
import time

import trio

from .common import busy_service, median, options, quantile, report, table


def private_bytes(pid: int) -> int:
    """Sum of private pages, in bytes (smaps_rollup)."""
    with open(f"/proc/{pid}/smaps_rollup") as rollup:
        return sum(int(line.split()[1]) * 1024 for line in rollup if line.startswith("Private_"))


async def one_engine(mode: str, runs: int, cpu: str) -> tuple[list[float], list[int]]:
    starts: list[float] = []
    memory: list[int] = []
    vm = {"name": "one", "mode": mode, "memory": "16M", "boot": {"guest": "alu"}, "autostart": False}
    async with busy_service([vm], cpus=cpu) as service:
        one = service.machine("one")
        for _ in range(runs):
            before = time.monotonic_ns()
            await one.start()
            while not (started := one.status_word("started_ns")):  # noqa: ASYNC110
                await trio.sleep(0.001)
            starts.append((started - before) / 1e6)
            memory.append(private_bytes(one.snapshot().pid or os.getpid()))
            await one.kill()
    return starts, memory


async def main() -> None:
    chosen = options(__doc__ or "", runs=30, cpu=str(max(os.sched_getaffinity(0))))
    rows, figures = [], {}
    for mode in ("hardware", "software"):
        if mode == "hardware" and not os.access("/dev/kvm", os.R_OK | os.W_OK):
            print("hardware: left out, /dev/kvm cannot be used")
            continue
        starts, memory = await one_engine(mode, chosen.runs, chosen.cpu)
        figures[mode] = {"start_ms": starts, "private_bytes": memory}
        rows.append((mode, median(starts), quantile(starts, .95), max(starts), median(memory) / 2**20))
    table("Start of a micro-VM, request to first guest instruction", ("mode", "median ms", "p95 ms", "max ms",
          "private MiB"), rows)
    report("start", figures, chosen.json)


if __name__ == "__main__":
    trio.run(main)
