"""A guest's speed in software: the same bytes on the software engine and on `qemu-system-i386 -accel tcg`, in one run.

Four loops (benchmarks/compute.asm: arithmetic, memory, branches, calls) count in guest memory; a figure is counts per
CPU-second of the vCPU's thread. The two take turns (ABBA...), each for the same time; the ratio is taken
round by round, of neighbours. The reference needs Debian's qemu-system-x86.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from mixvisor.vm import engines
from mixvisor.vm.engines import kick
from mixvisor.vm.engines.base import RIP, RSP, CpuState, ExitKind, ExitReason

from .common import median, options, report, table

LOOPS = ("arithmetic", "memory", "branches", "calls")
BOOT_SECTOR, COUNT, KIND, MEMORY_BYTES = 0x7C00, 0x20000, 3, 16 << 20
KICK_S = 0.02
QEMU = "qemu-system-i386"


def boot_sector(kind: int) -> bytes:
    image = bytearray(Path(__file__).with_name("compute.bin").read_bytes())
    image[KIND] = kind
    return bytes(image)


class Nothing:
    """A machine without devices."""

    def port_in(self, _port: int, size: int) -> int:
        return (1 << 8 * size) - 1

    def port_out(self, _port: int, _size: int, _value: int) -> None:
        return

    def mmio_read(self, _address: int, size: int) -> int:
        return (1 << 8 * size) - 1

    def mmio_write(self, _address: int, _size: int, _value: int) -> None:
        return

    def acknowledge(self) -> int:
        return 0


def ours(kind: int, seconds: float) -> float:
    """Counts a CPU-second on the software engine."""
    memory = mmap.mmap(-1, MEMORY_BYTES)
    memory[BOOT_SECTOR:BOOT_SECTOR + 512] = boot_sector(kind)
    cpu = engines.create("software", memory, Nothing(), memoryview(bytearray(8 * len(ExitKind))).cast("Q"))
    state = CpuState()
    state.gpr[RIP] = state.gpr[RSP] = BOOT_SECTOR
    cpu.set_state(state)
    signal.setitimer(signal.ITIMER_REAL, KICK_S, KICK_S)

    def spend(cpu_seconds: float) -> tuple[int, float]:
        begun, first = time.thread_time(), _count(memory)
        while time.thread_time() < begun + cpu_seconds:
            if cpu.run().reason is not ExitReason.KICKED:
                raise RuntimeError("the guest ended")
        return _count(memory) - first & 0xFFFF_FFFF, time.thread_time() - begun

    try:
        spend(0.3)
        counts, spent = spend(seconds)
        return counts / spent
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        cpu.close()


def _count(memory: mmap.mmap) -> int:
    return int.from_bytes(memory[COUNT:COUNT + 4], "little")


class Qemu:
    """A QEMU whose memory and vCPU thread can be looked at."""

    def __init__(self, kind: int, folder: Path) -> None:
        disk, ram = folder / "disk", folder / "ram"
        disk.write_bytes(boot_sector(kind).ljust(1440 << 10, b"\0"))
        self.process = subprocess.Popen(
            [QEMU, "-accel", "tcg", "-name", "guest,debug-threads=on", "-m", "16", "-machine", "pc,memory-backend=ram",
             "-object", f"memory-backend-file,id=ram,size={MEMORY_BYTES},mem-path={ram},share=on", "-drive",
             f"format=raw,if=floppy,file={disk}", "-display", "none", "-vga", "none", "-nic", "none", "-serial", "none",
             "-monitor", "none"], stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not ram.exists() or ram.stat().st_size < MEMORY_BYTES:
            _wait(deadline)
        with ram.open("rb") as file:
            self.memory = mmap.mmap(file.fileno(), MEMORY_BYTES, prot=mmap.PROT_READ)
        while _count(self.memory) == 0:
            _wait(deadline)
        tasks = Path(f"/proc/{self.process.pid}/task")
        self.thread = next(task for task in tasks.iterdir() if "TCG" in (task / "comm").read_text())

    def rate(self, seconds: float) -> float:
        first, begun = _count(self.memory), self._spent()
        time.sleep(seconds)
        return (_count(self.memory) - first & 0xFFFF_FFFF) / (self._spent() - begun)

    def _spent(self) -> float:
        return int((self.thread / "schedstat").read_text().split()[0]) / 1e9

    def hold(self, number: int) -> None:
        os.kill(self.process.pid, number)


def _wait(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise RuntimeError("QEMU did not start the guest")
    time.sleep(0.05)


@contextlib.contextmanager
def qemu(kind: int) -> Iterator[Qemu]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        running = Qemu(kind, Path(folder))
        try:
            yield running
        finally:
            running.process.kill()
            running.process.wait()


def one_loop(kind: int, seconds: float, rounds: int) -> list[tuple[float, float]]:
    """(ours, QEMU's) counts a CPU-second, of each round; QEMU is stopped while we run."""
    found: list[tuple[float, float]] = []
    with qemu(kind) as other:
        time.sleep(0.3)
        for number in range(rounds):
            figures: dict[str, float] = {}
            for who in (("ours", "qemu"), ("qemu", "ours"))[number % 2]:
                if who == "qemu":
                    other.hold(signal.SIGCONT)
                    figures[who] = other.rate(seconds)
                    other.hold(signal.SIGSTOP)
                else:
                    other.hold(signal.SIGSTOP)
                    figures[who] = ours(kind, seconds)
            found.append((figures["ours"], figures["qemu"]))
    return found


def main() -> None:
    chosen = options(__doc__ or "", seconds=1.0, rounds=5)
    if shutil.which(QEMU) is None:
        raise SystemExit(f"{QEMU} is not installed: apt install qemu-system-x86")
    kick.install()
    figures = {name: one_loop(kind, chosen.seconds, chosen.rounds) for kind, name in enumerate(LOOPS)}
    table(f"Counts per CPU-second, medians of {chosen.rounds} rounds", ("loop", "software engine", "QEMU TCG", "ratio"),
          [(name, f"{median([mine for mine, _ in rounds]):,.0f}", f"{median([theirs for _, theirs in rounds]):,.0f}",
            f"{median([mine / theirs for mine, theirs in rounds]):.2f}") for name, rounds in figures.items()])
    report("compute", {"counts_per_cpu_second": figures}, chosen.json)


if __name__ == "__main__":
    main()
