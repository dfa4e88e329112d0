"""The engines alone: guest work and exits per CPU-second, in this process, without service or scheduler.

The built-in guests (what each counts: vm/guests), `portio` with a batch of 1 and so counting exits through the
Python machine model, per second of the CPU time that the thread used. Engines alternate (ABBA...). Every figure is the
median of the rounds.
"""

from __future__ import annotations

import mmap
import os
import signal
import time

from mixvisor.vm import engines, guests
from mixvisor.vm.engines import entry, kick
from mixvisor.vm.engines.base import ExitKind, ExitReason
from mixvisor.vm.worker.clock import HostClock
from mixvisor.vm.worker.machine import Machine
from mixvisor.vm.worker.memory import GuestMemory

from .common import median, options, report, table

MEMORY_BYTES = 4 << 20
KICK_S = 0.02
GUESTS: dict[str, dict[str, int]] = {
    "alu": {}, "randmem": {"working_set": 256 << 10}, "portio": {"batch": 1}, "rings": {}}


def rate(engine: str, guest_name: str, parameters: dict[str, int], seconds: float) -> float:
    """Counts per CPU-second of a built-in guest."""
    guest = guests.BUILTIN[guest_name]
    memory = mmap.mmap(-1, MEMORY_BYTES)
    image = guests.image(guest_name)
    memory[guest.load:guest.load + len(image)] = image
    for address, value in guests.pokes(guest_name, parameters):
        memory[address:address + 8] = value.to_bytes(8, "little")
    machine = Machine(GuestMemory(memory), HostClock(), lambda _name, _n: None)
    cpu = engines.create(engine, memory, machine, memoryview(bytearray(8 * len(ExitKind))).cast("Q"))
    machine.attach(cpu)
    cpu.set_state(entry.flat_state(memory, guest.bits, guest.entry))
    assert guest.progress is not None

    def progress() -> int:
        return int.from_bytes(memory[guest.progress:guest.progress + 8], "little")

    def spend(cpu_seconds: float) -> None:
        until = time.thread_time() + cpu_seconds
        while time.thread_time() < until:
            if cpu.run().reason is not ExitReason.KICKED:
                raise RuntimeError(f"{guest_name} ended on {engine}")

    signal.setitimer(signal.ITIMER_REAL, KICK_S, KICK_S)
    try:
        spend(0.2)
        first, at = progress(), time.thread_time()
        spend(seconds)
        return (progress() - first) / (time.thread_time() - at)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        cpu.close()


def main() -> None:
    chosen = options(__doc__ or "", seconds=2.0, rounds=3)
    kick.install()
    names = ["software", "kvm"] if os.access("/dev/kvm", os.R_OK | os.W_OK) else ["software"]
    figures: dict[str, dict[str, list[float]]] = {name: {guest: [] for guest in GUESTS} for name in names}
    for number in range(chosen.rounds):
        for name in names if number % 2 == 0 else reversed(names):
            for guest, parameters in GUESTS.items():
                figures[name][guest].append(rate(name, guest, parameters, chosen.seconds))
    table(f"Work per CPU-second, median of {chosen.rounds}", ("engine", *GUESTS),
          [(name, *(f"{median(each[guest]):,.0f}" for guest in GUESTS)) for name, each in figures.items()])
    report("engines", {"work_per_cpu_second": figures}, chosen.json)


if __name__ == "__main__":
    main()
