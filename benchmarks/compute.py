"""A guest's speed in software: the same bytes on the software engine and on `qemu-system-x86_64 -accel tcg`.

Four loops (benchmarks/compute.asm: arithmetic, memory, branches, calls) count in guest memory; a figure is counts per
CPU-second of the vCPU's thread.  The two take turns on one CPU (ABBA), each a tenth of a second: where a core's other
thread is somebody else's, its work halves such loops for seconds at a time, and longer turns would compare a busy core
with a free one.  The ratio is taken turn by turn, of neighbours; "undisturbed" compares the 90th percentiles.

The processor is a 64-bit one in both.  `--qemu qemu-system-i386` compares with one that has 32 bits only, and so need
not extend what it computes.  The reference needs Debian's qemu-system-x86.
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

from .common import median, options, quantile, report, table

LOOPS = ("arithmetic", "memory", "branches", "calls")
BOOT_SECTOR, COUNT, KIND, MEMORY_BYTES = 0x7C00, 0x20000, 3, 16 << 20
WARM_UP = 4
KICK_S = 0.02


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


class Ours:
    """The software engine with such a guest, on this thread."""

    def __init__(self, kind: int) -> None:
        self.memory = mmap.mmap(-1, MEMORY_BYTES)
        self.memory[BOOT_SECTOR:BOOT_SECTOR + 512] = boot_sector(kind)
        self.cpu = engines.create(
            "software", self.memory, Nothing(), memoryview(bytearray(8 * len(ExitKind))).cast("Q"))
        state = CpuState()
        state.gpr[RIP] = state.gpr[RSP] = BOOT_SECTOR
        self.cpu.set_state(state)

    def rate(self, seconds: float) -> float:
        """Counts a CPU-second."""
        first, begun = _count(self.memory), time.thread_time()
        signal.setitimer(signal.ITIMER_REAL, KICK_S, KICK_S)
        try:
            while (spent := time.thread_time() - begun) < seconds:
                if self.cpu.run().reason is not ExitReason.KICKED:
                    raise RuntimeError("the guest ended")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        return (_count(self.memory) - first & 0xFFFF_FFFF) / spent

    def close(self) -> None:
        self.cpu.close()


def _count(memory: mmap.mmap) -> int:
    return int.from_bytes(memory[COUNT:COUNT + 4], "little")


class Qemu:
    """A QEMU whose memory and vCPU thread can be looked at."""

    def __init__(self, program: str, kind: int, folder: Path) -> None:
        disk, ram = folder / "disk", folder / "ram"
        disk.write_bytes(boot_sector(kind).ljust(1440 << 10, b"\0"))
        self.process = subprocess.Popen(
            [program, "-accel", "tcg", "-name", "guest,debug-threads=on", "-m", "16",
             "-machine", "pc,memory-backend=ram",
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
        self.hold(signal.SIGSTOP)

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
def qemu(program: str, kind: int) -> Iterator[Qemu]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        running = Qemu(program, kind, Path(folder))
        try:
            yield running
        finally:
            running.process.kill()
            running.process.wait()


def one_loop(program: str, kind: int, seconds: float, turns: int) -> list[tuple[float, float]]:
    """(ours, QEMU's) counts a CPU-second, turn by turn; the other stands still meanwhile."""
    found: list[tuple[float, float]] = []
    with qemu(program, kind) as other, contextlib.closing(Ours(kind)) as mine:
        for number in range(turns + WARM_UP):
            figures: dict[str, float] = {}
            for who in (("ours", "qemu"), ("qemu", "ours"))[number % 2]:
                if who == "qemu":
                    other.hold(signal.SIGCONT)
                    figures[who] = other.rate(seconds)
                    other.hold(signal.SIGSTOP)
                else:
                    figures[who] = mine.rate(seconds)
            found.append((figures["ours"], figures["qemu"]))
    return found[WARM_UP:]


def main() -> None:
    chosen = options(__doc__ or "", seconds=0.1, turns=50, qemu="qemu-system-x86_64")
    if shutil.which(chosen.qemu) is None:
        raise SystemExit(f"{chosen.qemu} is not installed: apt install qemu-system-x86")
    kick.install()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    figures = {name: one_loop(chosen.qemu, kind, chosen.seconds, chosen.turns) for kind, name in enumerate(LOOPS)}
    rows: list[tuple[str, ...]] = []
    for name, turns in figures.items():
        mine, theirs, ratios = [m for m, _ in turns], [t for _, t in turns], sorted(m / t for m, t in turns)
        rows.append((name, f"{median(mine):,.0f}", f"{median(theirs):,.0f}", f"{median(ratios):.2f}",
                     f"{ratios[len(ratios) // 4]:.2f} to {ratios[len(ratios) * 3 // 4]:.2f}",
                     f"{quantile(mine, 0.9) / quantile(theirs, 0.9):.2f}"))
    table(f"Counts per CPU-second, medians of {chosen.turns} turns", ("loop", "software engine", chosen.qemu, "ratio",
          "middle half", "ratio undisturbed"), rows)
    report("compute", {"qemu": chosen.qemu, "counts_per_cpu_second": figures}, chosen.json)


if __name__ == "__main__":
    main()
