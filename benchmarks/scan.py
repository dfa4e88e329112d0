"""Scan of boot images: seconds, and instructions a second.

The synthetic binary is 1 MiB of 32-bit functions, each calling the next ones, so that all of it can be reached; its
instructions are the commonest encodings of compiled code in about their frequency, with a privileged, a
sensitive or an I/O instruction in every twentieth function. The two FreeDOS floppies (where `shared/guests` is) have
one boot sector of code each that can be followed. The best of the runs counts: a scan is deterministic.
"""

from __future__ import annotations

import os
import random
import struct
import time
from pathlib import Path

from mixvisor.vm.code.image import Image, load, read_image
from mixvisor.vm.code.scan import Report, scan

from .common import options, report, table

SHARED = Path(os.environ.get("MIXVISOR_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "guests"
BASE = 0x10_0000
# Encodings without a displacement that could lead anywhere: moves, loads, stores, arithmetic, tests, pushes.
PLAIN = [bytes.fromhex(code) for code in (
    "89e5", "89c2", "89d8", "8b4508", "8b550c", "8b442404", "89442404", "8945fc", "31c0", "85c0", "83c001", "83ec18",
    "83c410", "01d0", "29d8", "0fb6c0", "8d0440", "8d742600", "c1e002", "39d0", "50", "53", "56", "5b", "5e",
    "b801000000", "be78563412", "c745f800000000", "a100001000", "f7d8", "0fafc2", "d1e8", "25ff000000", "3d00010000",
    "6690", "8b048500001000", "f3a5", "66b83412", "0f95c0")]
SPECIAL = [bytes.fromhex(code) for code in ("fa", "fb", "0f22c0", "0f20c0", "0f0138", "9c", "9d", "1e", "07", "8ed8",
                                            "0f01e0", "ec", "ee", "0f32", "0f30", "cd80", "0fa2")]


def synthetic(size: int, seed: int = 1) -> Image:
    """A flat 32-bit image of *size* bytes in which (almost) every byte is code that can be reached."""
    rng = random.Random(seed)
    functions: list[bytearray] = []
    starts: list[int] = []
    length = 0
    while length < size - 256:
        body = bytearray(b"\x55\x89\xe5")
        for _ in range(rng.randint(3, 8)):
            block = b"".join(rng.choices(PLAIN, k=rng.randint(2, 6)))
            body += bytes((rng.choice((0x74, 0x75, 0x7c, 0x7f)), len(block))) + block        # jcc over the block
        if len(functions) % 20 == 0:
            body += rng.choice(SPECIAL)
        body += b"\xe8\0\0\0\0" * 2 + b"\xc9\xc3"                                # two calls, leave, ret
        starts.append(length)
        functions.append(body)
        length += len(body)
    for number, body in enumerate(functions):
        for call, target in enumerate((2 * number + 1, 2 * number + 2)):
            at = len(body) - 2 - 5 * (2 - call)
            to = starts[target] if target < len(starts) else starts[0]
            struct.pack_into("<i", body, at + 1, to - (starts[number] + at + 5))
    return read_image(b"".join(functions).ljust(size, b"\x90"), bits=32, base=BASE)


def best(image: Image, runs: int) -> tuple[float, Report]:
    seconds, found = float("inf"), None
    for _ in range(runs):
        begun = time.perf_counter()
        found = scan(image)
        seconds = min(seconds, time.perf_counter() - begun)
    assert found is not None
    return seconds, found


def main() -> None:
    chosen = options(__doc__ or "", runs=3)
    images = {path.name: load(path) for path in sorted(SHARED.glob("freedos-*.img"))}
    if not images:
        print(f"left out: no freedos-*.img in {SHARED}")
    images["synthetic, 1 MiB"] = synthetic(1 << 20)
    rows, figures = [], {}
    for name, image in images.items():
        seconds, found = best(image, chosen.runs)
        figures[name] = {"seconds": seconds, "instructions": found.instructions, "code_bytes": found.code_bytes}
        rows.append((name, found.instructions, f"{100 * found.code_bytes / sum(len(d) for _, d in image.pieces):.0f} %",
                     f"{seconds:.4f}", f"{found.instructions / seconds / 1e3:.0f} k"))
    table("Scan of what can be reached", ("image", "instructions", "of its code", "seconds", "instructions/s"), rows)
    report("scan", figures, chosen.json)


if __name__ == "__main__":
    main()
