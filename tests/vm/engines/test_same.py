"""Instructions of real mode made by chance do the same on both engines: registers, memory, faults and their frames.

KVM's side is the processor, or the kernel's emulator where that runs real mode (PVM): both compare every access with
its segment's limit, and registers here lie at such limits more often than not.
"""

from __future__ import annotations

import random
import struct

import pytest

from mixvisor.vm.engines.base import RAX, RCX, RFLAGS, RIP, RSP, CpuState, Exit, ExitReason
from mixvisor.vm.engines.software.operands import decoded

from .conftest import KVM, ORIGIN

ROUNDS, A_ROUND = 10, 300
GENERAL = range(8)
HANDLERS = 0x500
SEGMENTS = {"es": 0x1000, "ss": 0x2000, "ds": 0x3000, "fs": 0x4000, "gs": 0x5000}
LIMITS = (0, 1, 2, 3, 4, 5, 7, 8, 0xF, 0x10, 0x8000, 0x7FFF, 0xFFFA, 0xFFFB, 0xFFFC, 0xFFFD, 0xFFFE, 0xFFFF, 0x1_0000,
          0x1_FFFF, 0x8000_0000, 0xFFFF_FFFE, 0xFFFF_FFFF)
PREFIXES = ("", "", "", "66", "67", "6667", "2e", "36", "64", "f3", "f2", "f0")
# Without what leaves results or flags undefined, changes CS, or is done in several ways (TEST by /1, PUSH of a segment,
# POP by /1, which is #UD but not to the kernel's emulator; far pointers, whose parts Bochs reads apart).
ONE = (*(first + each for first in range(0, 0x40, 8) for each in range(6)), *range(0x40, 0x62), 0x68, 0x6A, 0x80, 0x81,
       0x83, *range(0x84, 0x8E), 0x8F, *range(0x90, 0x9A), 0x9C, *range(0xA0, 0xC0), 0xC9, 0xD7, 0xFE, 0x07, 0x1F)
TWO = (*range(0x40, 0x50), *range(0x90, 0xA0), 0xA1, 0xA3, 0xA9, 0xAB, 0xAF, 0xB0, 0xB1, 0xB3, 0xB6, 0xB7, 0xBA, 0xBB,
       0xBE, 0xBF, 0xC0, 0xC1)


def instruction(chance: random.Random) -> bytes:
    while True:
        code = bytes.fromhex(chance.choice(PREFIXES))
        code += bytes([chance.choice(ONE)]) if chance.random() < 0.8 else b"\x0F" + bytes([chance.choice(TWO)])
        code += chance.randbytes(10)
        told = decoded(code, 16)
        if told.length and (0x8F not in code[:told.length] or not told.invalid):
            return code[:told.length]


def state(chance: random.Random) -> CpuState:
    made = CpuState()
    for index in GENERAL:
        made.gpr[index] = chance.choice(LIMITS) if chance.random() < 0.7 else chance.getrandbits(32)
    # Even, so that the frame of a fault finds room; in a few cases at the end, where words go on at the other.
    # KVM leaves the upper half of ESP out of it.
    ends = chance.random() < 0.1
    made.gpr[RSP] = chance.choice((0, 2, 8, 16, 0xFFF0)) if ends else chance.randrange(0x80, 0x7FF0) * 2
    made.gpr[RIP] = ORIGIN
    made.gpr[RFLAGS] = 2 | chance.getrandbits(12) & 0xCD5
    for name, selector in SEGMENTS.items():
        segment = getattr(made, name)
        segment.selector, segment.base = selector, selector << 4
    return made


@pytest.mark.parametrize("engine", [KVM])
@pytest.mark.parametrize("seed", range(ROUNDS))
def test_instructions_made_by_chance_do_the_same_on_both_engines(make, engine, seed):
    chance = random.Random(seed)
    machines = [make("software"), make(engine)]
    start = bytearray(chance.randbytes(len(machines[0].memory)))
    start[:0x400] = b"".join(struct.pack("<HH", HANDLERS + vector, 0) for vector in range(256))
    start[HANDLERS:HANDLERS + 256] = b"\xF4" * 256
    for machine in machines:
        machine.poke(0, bytes(start))
    for _ in range(A_ROUND):
        code, begin = instruction(chance), chance.getrandbits(64)
        ends: list[tuple[Exit, list[int], bytes]] = []
        for machine in machines:
            machine.poke(ORIGIN, code + b"\xF4" * 3)
            machine.cpu.set_state(state(random.Random(begin)))
            if code[0] in (0xF2, 0xF3):
                few = machine.cpu.get_gpr()
                few[RCX] &= 0xFFFF_0003
                machine.cpu.set_gpr(few)
            result = machine.cpu.run()
            ends.append((result, machine.cpu.get_gpr()[:RFLAGS], machine.memory[:]))
        (ours, registers, memory), (theirs, expected, expected_memory) = ends
        what = code.hex(), state(random.Random(begin)).gpr
        if theirs.reason is ExitReason.HOST_LIMIT:
            machines[1].poke(0, memory)
            continue
        assert ours.reason is theirs.reason is ExitReason.HALTED, (what, ours, theirs)
        assert registers == expected, what
        assert memory == expected_memory, what
        assert registers[RAX] < 1 << 32
