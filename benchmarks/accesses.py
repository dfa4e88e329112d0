"""What checking each access costs on the software engine: the same loops with and without `check_accesses`.

Loops (benchmarks/accesses.asm) of real mode, and of 32-bit protected mode in flat segments and in segments of 1 MiB,
where each access is looked at. A figure is counts (1,000 times round) per CPU-second of the vCPU's thread. And code
that is run once: instructions translated per CPU-second, where the checks of each are found. The two take turns
(ABBA...); the ratio is taken round by round, of neighbours.
"""

from __future__ import annotations

import mmap
import signal
import time
from collections.abc import Callable
from pathlib import Path

from mixvisor.vm import engines
from mixvisor.vm.engines import kick
from mixvisor.vm.engines.base import RIP, RSP, Cpu, CpuState, ExitKind, ExitReason

from .common import median, options, report, table
from .compute import Nothing

LOOPS = ("real mode: words", "bytes", "calls", "strings", "32 bits, flat: words", "32 bits, 1 MiB: words")
BOOT_SECTOR, COUNT, KIND, MEMORY_BYTES = 0x7C00, 0x20000, 3, 1 << 20
KICK_S = 0.02
# mov ax, [si]; add bx, ax; push bx; pop dx; inc cx; mov [di], al
ONCE = bytes.fromhex("8b04 01c3 53 5a 41 8805")
ONCE_INSTRUCTIONS = 6


def made(checked: bool, at: int) -> tuple[mmap.mmap, Cpu]:
    memory = mmap.mmap(-1, MEMORY_BYTES)
    exits = memoryview(bytearray(8 * len(ExitKind))).cast("Q")
    cpu = engines.create("software", memory, Nothing(), exits, checked=checked)
    state = CpuState()
    state.gpr[RIP], state.gpr[RSP] = at, 0x7000
    cpu.set_state(state)
    return memory, cpu


def loop(kind: int, checked: bool, seconds: float) -> float:
    memory, cpu = made(checked, BOOT_SECTOR)
    image = bytearray(Path(__file__).with_name("accesses.bin").read_bytes())
    image[KIND] = kind
    memory[BOOT_SECTOR:BOOT_SECTOR + len(image)] = image
    signal.setitimer(signal.ITIMER_REAL, KICK_S, KICK_S)

    def count() -> int:
        return int.from_bytes(memory[COUNT:COUNT + 4], "little")

    def spend(cpu_seconds: float) -> float:
        begun, first = time.thread_time(), count()
        while time.thread_time() < begun + cpu_seconds:
            if cpu.run().reason is not ExitReason.KICKED:
                raise RuntimeError("the guest ended")
        return (count() - first & 0xFFFF_FFFF) / (time.thread_time() - begun)

    try:
        spend(0.1)
        return spend(seconds)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        cpu.close()


def once(checked: bool) -> float:
    memory, cpu = made(checked, 0x8000)
    code = ONCE * (0x7000 // len(ONCE))
    memory[0x8000:0x8000 + len(code) + 1] = code + b"\xF4"
    begun = time.thread_time()
    if cpu.run().reason is not ExitReason.HALTED:
        raise RuntimeError("the guest did not end")
    spent = time.thread_time() - begun
    cpu.close()
    return len(code) // len(ONCE) * ONCE_INSTRUCTIONS / spent


def main() -> None:
    chosen = options(__doc__ or "", seconds=0.5, rounds=5)
    kick.install()
    kinds: list[tuple[str, Callable[[bool], float]]] = [
        (name, lambda checked, kind=kind: loop(kind, checked, chosen.seconds)) for kind, name in enumerate(LOOPS)]
    kinds.append(("instructions translated", once))
    rows: list[tuple[str, str, str, str]] = []
    figures: dict[str, list[tuple[float, float]]] = {}
    for name, measure in kinds:
        found: list[tuple[float, float]] = []
        for number in range(chosen.rounds):
            both = {checked: measure(checked) for checked in ((False, True), (True, False))[number % 2]}
            found.append((both[False], both[True]))
        figures[name] = found
        rows.append((name, f"{median([each[0] for each in found]):,.0f}", f"{median([each[1] for each in found]):,.0f}",
                     f"{median([each[1] / each[0] for each in found]):.2f}"))
    table(f"Per CPU-second, median of {chosen.rounds}", ("loop", "unchecked", "checked", "ratio"), rows)
    report("accesses", {"unchecked_and_checked": figures}, chosen.json)


if __name__ == "__main__":
    main()
