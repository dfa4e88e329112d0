"""What it costs to attribute every exit to its instruction: exits a CPU-second with the ledger and without.

A ring-0 loop of 64-bit code that writes to a port, on each engine that this host has, over a bus that does
nothing; the two conditions alternate (ABBA), each run ends itself. The last column is what the ledger adds to an exit.
"""

from __future__ import annotations

import mmap
import os
import time

from mixvisor.vm import engines
from mixvisor.vm.code.ledger import Ledger
from mixvisor.vm.engines.base import ExitKind, nobody
from mixvisor.vm.engines.entry import flat_state

from .common import median, options, report, table

LOOP = bytes.fromhex("ee ebfd")                     # out dx, al; jmp back
AT = 0x10000


class CountingBus:
    """Ends the run after so many writes."""

    def __init__(self) -> None:
        self.left = 0
        self.cpu = None

    def port_out(self, _port: int, _size: int, _value: int) -> None:
        self.left -= 1
        if self.left <= 0:
            self.cpu.stop()

    def port_in(self, _port: int, _size: int) -> int:
        return 0

    def mmio_read(self, _address: int, _size: int) -> int:
        return 0

    def mmio_write(self, _address: int, _size: int, _value: int) -> None:
        return

    def acknowledge(self) -> int:
        return 0


def one_engine(engine: str, exits: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of CPU per exit, of each run, by condition."""
    memory = mmap.mmap(-1, 1 << 20)
    memory[AT:AT + len(LOOP)] = LOOP
    bus = CountingBus()
    cpu = bus.cpu = engines.create(engine, memory, bus, memoryview(bytearray(8 * len(ExitKind))).cast("Q"))
    ledger = Ledger(memory, cpu.where, cpu.get_state)
    watches = {"without": nobody, "with": ledger.note}
    found: dict[str, list[float]] = {name: [] for name in watches}
    for number in range(rounds):
        for name in (("without", "with"), ("with", "without"))[number % 2]:
            cpu.watch = watches[name]
            cpu.set_state(flat_state(memory, 64, AT))
            bus.left = exits
            begun = time.thread_time()
            cpu.run()
            found[name].append((time.thread_time() - begun) / exits)
    cpu.close()
    return found


def main() -> None:
    chosen = options(__doc__ or "", exits=20_000, rounds=10)
    rows, figures = [], {}
    for engine in ("software", "kvm"):
        if engine == "kvm" and not os.access("/dev/kvm", os.R_OK | os.W_OK):
            print("kvm: left out, /dev/kvm cannot be used")
            continue
        figures[engine] = found = one_engine(engine, chosen.exits, chosen.rounds)
        without, with_ledger = median(found["without"]), median(found["with"])
        rows.append((engine, f"{1 / without / 1e3:.0f} k", f"{1 / with_ledger / 1e3:.0f} k",
                     f"{(with_ledger - without) * 1e9:.0f} ns"))
    table("Exits a CPU-second", ("engine", "without the ledger", "with it", "cost an exit"), rows)
    report("watch", figures, chosen.json)


if __name__ == "__main__":
    main()
