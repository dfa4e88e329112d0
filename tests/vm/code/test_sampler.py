"""The sampler: shares by ring and mode, hot code with its samples, bounded."""

from __future__ import annotations

import json
import mmap
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from mixvisor.vm.code import sampler
from mixvisor.vm.code.sampler import Sampler
from mixvisor.vm.engines.base import RIP
from mixvisor.vm.engines.entry import flat_state

AT = 0x10000
# xor ecx, ecx; loop: inc ecx; imul eax, ecx; cmp ecx, 100; jne loop; ret
LOOP = bytes.fromhex("31c9 ffc1 0fafc1 83f964 75f6 c3")


def guest(bits=64, ring=3):
    memory = mmap.mmap(-1, 1 << 20)
    memory[AT:AT + len(LOOP)] = LOOP
    state = flat_state(memory, bits, AT)
    state.cs.dpl = state.ss.dpl = ring
    return memory, state


def test_shares_are_by_ring_and_mode():
    memory, state = guest()
    watch = Sampler(memory)
    for ring, times in ((0, 2), (3, 6)):
        state.ss.dpl = ring
        for _ in range(times):
            watch.sample(state)
    told = watch.told()
    assert (told["samples"], told["rings"]) == (8, [2, 0, 0, 6])
    assert told["modes"] == {"64-bit long mode, ring 0": 2, "64-bit long mode, ring 3": 6}
    assert told["hot"][0] == {"address": AT, "count": 6, "ring": 3, "mode": "64-bit long mode, ring 3",
                              "instruction": "xor ecx, ecx"}


def test_hot_code_is_one_stretch_with_its_samples():
    memory, state = guest()
    watch = Sampler(memory)
    for offset, times in ((2, 5), (4, 9), (10, 3)):
        state.gpr[RIP] = AT + offset
        for _ in range(times):
            watch.sample(state)
    [stretch] = watch.told()["code"]
    assert stretch["count"] == 17
    assert [(line[0] - AT, line[2].split()[0], line[3]) for line in stretch["lines"]] == [
        (2, "inc", 5), (4, "imul", 9), (7, "cmp", 0), (10, "jne", 3)]


def test_code_far_apart_is_two_stretches_the_hotter_first():
    memory, state = guest()
    memory[AT + 0x4000:AT + 0x4002] = b"\xEB\xFE"
    watch = Sampler(memory)
    watch.sample(state)
    state.gpr[RIP] = AT + 0x4000
    watch.sample(state)
    watch.sample(state)
    assert [(stretch["count"], stretch["lines"][0][0]) for stretch in watch.told()["code"]] == [
        (2, AT + 0x4000), (1, AT)]


def test_real_mode_is_ring_0_with_its_segment(monkeypatch):
    memory, state = guest(16, 0)
    state.ss.dpl = 3                                 # without protection it means nothing
    watch = Sampler(memory)
    watch.sample(state)
    assert watch.told()["rings"] == [1, 0, 0, 0]
    assert watch.told()["hot"][0]["address"] == AT


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), bits=st.sampled_from((16, 32, 64)))
def test_a_guest_that_is_everywhere_takes_bounded_memory_and_one_packet(seed, bits):
    rng = random.Random(seed)
    memory, state = guest(bits)
    memory[:] = rng.randbytes(len(memory))
    before, sampler.PLACES_MAX = sampler.PLACES_MAX, 200
    try:
        watch = Sampler(memory)
        for _ in range(400):
            state.gpr[RIP] = rng.randrange(1 << 16 if bits == 16 else 1 << 21)
            state.ss.dpl = rng.randrange(4)
            watch.sample(state)
        told = watch.told()
    finally:
        sampler.PLACES_MAX = before
    assert told["samples"] == sum(told["rings"]) == 400
    assert told["places"] <= 200
    assert len(json.dumps(told)) < 64 * 1024
