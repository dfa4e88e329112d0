"""Programs made by chance, in real workers: whatever they do, the worker tells how it ended, and it can be stopped.

Guests are raw noise, and programs of pieces that ask for trouble, each a template with holes for random bytes: loads of
segments and descriptor tables, control and model-specific registers, far transfers, interrupts, port and string
instructions, FPU and SSE, stores over their own code.  They lie among small jumps, so that later pieces are reached.
Deterministic by seed.

`MIXVISOR_HOSTILE_GUESTS=3000 pytest tests/vm/worker/test_hostile_programs.py` runs as many on each engine, from seed
`MIXVISOR_HOSTILE_SEED` on; the suite runs few of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import struct
import time
from dataclasses import dataclass, field
from typing import Any

import pytest

from mixvisor.vm.worker.status import Phase

GUESTS = int(os.environ.get("MIXVISOR_HOSTILE_GUESTS", "120"))
FIRST = int(os.environ.get("MIXVISOR_HOSTILE_SEED", "0"))
ROUND = 40
RUN_S = 0.02
GROWTH_MAX = 200 << 20               # of a worker over what its parent has: the engine's code buffer and tables

# Hex with holes: .. is any byte, ## one of the interesting ones.
PIECES = (
    "0F01..", "0F01 1E ....", "0F01 16 ....", "0F00..", "0F22 C#", "0F22 ..", "0F20..", "0F23..", "0F21..", "0F30",
    "0F32", "B9 800000C0 0F32 0D 00..0000 0F30", "B9.......  0F32", "8E..", "8EC0", "8ED0", "8ED8", "07", "17",
    "1F", "0FA1", "0FA9", "CD..", "CC", "CE", "F1", "CF", "48CF", "66CF", "CB", "CA....", "EA ## 00 ## 00",
    "9A ....  ....", "9A ........ ....", "FF..", "FF 1E ....", "FF 2E ....", "E4..", "E5..", "E6..", "E7..", "EC",
    "ED", "EE", "EF", "6C", "6D", "6E", "6F", "F36C", "F36D", "F36E", "F36F", "F3A4", "F3A5", "F3AA", "F3AB",
    "F2AE", "A4", "A5", "AA", "AB", "BA....", "B9....", "BF....", "BE....", "B8....", "BC....", "8904", "8907",
    "C606......", "C60500000100..", "A2....", "A3....", "FB", "FA", "F4", "FC", "FD", "9C", "9D", "66 9C",
    "6800......9D", "0F05", "0F34", "0F35", "0F07", "0F31", "0FA2", "0F0B", "0F08", "0F09", "0F06", "F0....",
    "F00F....",
    "D9..", "DB..", "DDD8", "DBE3", "D9E8", "DEF9", "9B", "0FAE..", "0F58..", "0F28..", "660F6F..", "0FC7..",
    "0FC7 0E ....", "62..", "63..", "C4..", "C5..", "D4..", "D5..", "27", "2F", "37", "3F", "F6F0", "F7F0", "F7F9",
    "66F7F1", "0FB2 ....", "0FB4..", "C8 ....##", "C9", "60", "61", "6660", "D7", "E3..", "E2 FE", "EBFE", "0F01F8",
    "0F01 38", "0F01 D0", "0F01C1", "67 8B..", "B0 .. E6 64", "B0 .. E6 20", "B0 .. E6 43 E6 40",
    "B0 .. E6 70 B0 .. E6 71", "B0 .. E6 92", "E6 B0", "E6 F5", "E6 E9", "0F02..", "0F03..",
)
INTERESTING = (0x00, 0x01, 0x07, 0x08, 0x10, 0x18, 0x1B, 0x20, 0x23, 0x28, 0x2B, 0x33, 0x38, 0x7C, 0x80, 0xF0, 0xFF)
ACCESS = (0x9A, 0x92, 0xFA, 0xF2, 0x89, 0x8B, 0x8C, 0xEC, 0x85, 0x82, 0x8E)        # bytes of descriptors


@dataclass(frozen=True, slots=True)
class Hostile:
    """`fields`: of the WorkerSpec."""

    seed: int
    kind: str
    image: bytes
    fields: dict[str, Any] = field(default_factory=dict)


def _piece(chance: random.Random, text: str) -> bytes:
    out = bytearray()
    digits = text.replace(" ", "")
    for at in range(0, len(digits) - 1, 2):
        pair = digits[at:at + 2]
        if pair == "##":
            out.append(chance.choice(INTERESTING))
        elif "." in pair:
            out.append(chance.choice(INTERESTING) if chance.random() < 0.4 else chance.randrange(256))
        elif "#" in pair:
            out.append(int(pair[0], 16) << 4 | chance.randrange(16))
        else:
            out.append(int(pair, 16))
    return bytes(out)


def _program(chance: random.Random, size: int) -> bytes:
    out = bytearray()
    while len(out) < size:
        if chance.random() < 0.15:
            out += bytes((0xEB, chance.randrange(16))) + chance.randbytes(chance.randrange(16))
        out += _piece(chance, chance.choice(PIECES))
        if chance.random() < 0.1:
            out += bytes((chance.choice((0x66, 0x67, 0xF0, 0xF2, 0xF3, 0x2E, 0x36, 0x64, 0x65)),))
    return bytes(out[:size])


def _descriptor(chance: random.Random) -> bytes:
    return struct.pack("<HHBBBB", chance.choice((0, 0xFFFF, chance.randrange(1 << 16))), chance.randrange(1 << 16),
                       chance.randrange(4), chance.choice((*ACCESS, chance.randrange(256))),
                       chance.choice((0x00, 0xCF, 0xAF, 0x4F, chance.randrange(256))), 0)


def made(seed: int) -> Hostile:
    """The guest of this number."""
    chance = random.Random(seed)
    kind = chance.choice(("noise", "boot", "flat16", "flat32", "flat64", "tables"))
    if kind == "noise":
        return Hostile(seed, kind, chance.randbytes(510) + b"\x55\xAA", {"boot": "disk"})
    if kind == "boot":
        return Hostile(seed, kind, _program(chance, 510) + b"\x55\xAA", {"boot": "disk"})
    if kind == "tables":
        # In 32 bits: LIDT and LGDT of random descriptors that lie behind the program, LLDT and LTR, then trouble.
        setup = bytes.fromhex("0F0115 00000200 0F011D 08000200") + b"".join(
            _piece(chance, text) for text in ("66B8 ##00 0F00D0", "66B8 ##00 0F00D8"))
        image = bytearray((setup + _program(chance, 2048)).ljust(0x10000, b"\x90"))
        image += struct.pack("<HIHHIH", 0x7FF, 0x20100, 0, 0x7FF, 0x20900, 0)
        image = image.ljust(0x10100, b"\0") + b"".join(_descriptor(chance) for _ in range(512))
        return Hostile(seed, kind, bytes(image), {"boot": "flat", "bits": 32})
    return Hostile(seed, kind, _program(chance, 4096), {"boot": "flat", "bits": int(kind[4:])})


def _resident(pid: int) -> int:
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def _ending(worker, said: str) -> dict[str, Any]:
    try:
        while (packet := worker._receive()).get("event") != "ended":
            pass
    except AssertionError as error:
        raise AssertionError(f"{said}: {error}") from error
    return packet


@pytest.mark.parametrize("first", range(FIRST, FIRST + GUESTS, ROUND))
def test_no_program_ends_a_worker_without_its_own_word(start, engine, first):
    for seed in range(first, min(first + ROUND, FIRST + GUESTS)):
        guest = made(seed)
        worker = start(engine, guest.image, memory_bytes=2 << 20, **guest.fields)
        said = f"seed {seed} ({guest.kind}) on {engine}"
        worker.event("started")
        deadline = time.monotonic() + RUN_S
        while worker.status.get("phase") != Phase.ENDED and time.monotonic() < deadline:
            time.sleep(0.002)
        assert _resident(worker.pid) - _resident(os.getpid()) < GROWTH_MAX, said
        if engine == "software":             # a KVM process has a thread of the kernel's
            assert len(os.listdir(f"/proc/{worker.pid}/task")) == 1, said
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):          # it may have ended meanwhile
            worker.link.send(json.dumps({"id": 1, "op": "stop"}).encode())
            worker.kick()
        ended = _ending(worker, said)
        assert ended["fate"] in ("stopped", "crashed"), said
        assert ended["code"] not in ("internal", "engine"), f"{said}: {ended['reason']}"
        assert worker.wait() == 0, said
