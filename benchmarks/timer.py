"""A timer of 1 kHz over a minute: ticks that a guest took, ticks that were given up, and its drift against the host.

A whole service; each engine has a VM that counts its timer interrupts (benchmarks/kilohertz.asm). The timer
divides 1193182 Hz by 1193: it is due 1000.15 times a second.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import trio

from .common import busy_service, options, report, table

HZ = 1_193_182 / 1193


async def measure(seconds: float) -> dict[str, dict[str, float]]:
    engines = ["software", "kvm"] if os.access("/dev/kvm", os.R_OK | os.W_OK) else ["software"]
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "kilohertz"
        image.write_bytes(Path(__file__).with_name("kilohertz.bin").read_bytes())
        vms = [{"name": engine, "engine": engine, "boot": {"flat": str(image), "bits": 16}, "memory": "1M",
                "progress": 0x20000} for engine in engines]
        async with busy_service(vms, cpus="1") as service:
            await trio.sleep(1)

            def counts() -> tuple[float, dict[str, tuple[int, int]]]:
                now = time.monotonic()
                return now, {vm.name: (vm.progress or 0, vm.timer_ticks_lost) for vm in service.snapshot().vms}

            begun, first = counts()
            await trio.sleep(seconds)
            ended, last = counts()
    found: dict[str, dict[str, float]] = {}
    for name in engines:
        ticks, due = last[name][0] - first[name][0], (ended - begun) * HZ
        found[name] = {"ticks": ticks, "due": due, "lost": last[name][1] - first[name][1],
                       "drift_ms": (ticks - due) / HZ * 1000}
    return found


def main() -> None:
    chosen = options(__doc__ or "", seconds=60.0)
    found = trio.run(measure, chosen.seconds)
    table(f"Timer of {HZ:.2f} Hz, {chosen.seconds:.0f} s", ("engine", "ticks", "due", "given up", "drift ms"),
          [(name, f"{each['ticks']:.0f}", f"{each['due']:.1f}", f"{each['lost']:.0f}", f"{each['drift_ms']:.1f}")
           for name, each in found.items()])
    report("timer", {"timer": found}, chosen.json)


if __name__ == "__main__":
    main()
