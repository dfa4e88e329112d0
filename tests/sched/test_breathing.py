"""Breaths of a real-time host CPU: long enough for the kernel, over before anybody notices."""

from __future__ import annotations

import os

import pytest

from mixvisor.sched.dispatcher import READY
from mixvisor.sched.linux import Level
from mixvisor.sched.model import Slot
from mixvisor.sched.shared import ACTIVE, NOBODY, PAUSED, Shared
from mixvisor.vm.worker.status import Phase

from .fakes import SLICE, Host, page


def test_breathing_never_leaves_real_time_for_long(host: Host) -> None:
    threads = [host.add(i, 0.3) for i in range(3)]
    host.go(3)
    last_breath, longest = host.now, 0
    for _ in range(300):
        host.go(1)
        if all(thread.policy != os.SCHED_FIFO or thread.stopped for thread in threads):
            last_breath = host.now
        longest = max(longest, host.now - last_breath)
    records = host.reader.read()
    share = sum(r.breath_ns for r in records) / sum(r.end_ns - r.start_ns for r in records)
    assert longest <= 50_000_000
    assert 0.06 < share < 0.15          # the kernel's limit is 5 % away from real-time


@pytest.mark.parametrize("slice_ms", [1, 2, 3, 5, 8, 20])
def test_a_breath_is_a_tenth_of_the_time_and_wakes_nobody_of_its_own(slice_ms: int) -> None:
    shared = Shared.create([1], slots=16, ring_records=4096)
    shared.set("slice_ns", slice_ms * 1_000_000)
    shared.set("guard_timeout_ns", 1 << 60)
    host = Host(shared=shared)
    for slot in range(3):
        host.add(slot, 0.3)
    steps = 1000
    for _ in range(steps):
        host.go(1)
        host.now += 30_000                  # each wake-up comes a little late
    records = host.reader.read()
    share = sum(r.breath_ns for r in records) / sum(r.end_ns - r.start_ns for r in records)
    assert 0.06 < share < 0.15
    edges_alone = steps - len(records)
    assert edges_alone <= (5 if slice_ms <= 5 else steps * slice_ms // 45 + 5)
    shared.close()
    os.close(shared.fd)


def to_breath(host: Host, breathing: bool) -> None:
    for _ in range(100):
        if host.dispatcher._breathing is breathing:
            return
        host.go(1)
    pytest.fail(f"breathing never became {breathing}")


def test_in_a_breath_only_the_picked_one_and_sleepers_go(host: Host) -> None:
    threads = [host.add(i, 0.2) for i in range(4)]
    dozer = host.add(4, 0.2, phase=page(Phase.SLEEPING))
    dozer.wants = False
    host.go(20)
    to_breath(host, False)
    to_breath(host, True)
    assert sorted(thread.stopped for thread in threads) == [False, True, True, True]
    assert [t.policy for t in threads if not t.stopped] == [os.SCHED_OTHER]
    assert not dozer.stopped
    to_breath(host, False)
    assert not any(thread.stopped for thread in threads)
    assert all(thread.policy == os.SCHED_FIFO for thread in threads)


def test_after_a_breath_only_so_many_wait_ready_and_the_rest_are_served_all_the_same(
    host: Host,
) -> None:
    count = 4 * READY
    threads = [host.add(i, 1 / count) for i in range(count)]
    host.go(20)
    to_breath(host, False)
    to_breath(host, True)
    to_breath(host, False)
    # Neither the one that ran through the breath nor the next one counts among the READY.
    assert sum(thread.stopped for thread in threads) == count - 2 - READY
    before = [thread.ran for thread in threads]
    host.go(8 * count)
    received = [thread.ran - first for thread, first in zip(threads, before, strict=True)]
    assert max(received) - min(received) <= 3 * SLICE


def test_the_end_of_a_breath_continues_neither_the_capped_nor_the_paused(host: Host) -> None:
    capped = host.add(0, 0.9, cap=0.01)
    paused = host.add(1, 0.05)
    host.add(2, 0.05)
    host.go(40)
    host.shared.slot_set(1, "flags", ACTIVE | PAUSED)
    host.shared.bump()
    host.go(3)
    for breathing in (False, True, False, True, False):
        to_breath(host, breathing)
        assert capped.stopped or host.dispatcher._vcpus[Slot(0)].level is not Level.HELD
        assert (paused.policy, paused.stopped) == (os.SCHED_OTHER, False)
    assert capped.stopped


@pytest.mark.parametrize("why", ["leave", "taken", "paused"])
def test_whoever_is_let_go_in_a_breath_is_not_left_stopped(host: Host, why: str) -> None:
    threads = [host.add(i, 0.3) for i in range(3)]
    host.go(20)
    to_breath(host, False)
    to_breath(host, True)
    assert any(thread.stopped for thread in threads)
    if why == "leave":
        host.dispatcher.leave(host.now)
    else:
        for slot in range(3):
            if why == "taken":
                host.shared.slot_set(slot, "want_cpu", NOBODY)
            else:
                host.shared.slot_set(slot, "flags", ACTIVE | PAUSED)
        host.shared.bump()
        host.go(3)
    assert not any(thread.stopped for thread in threads)
    assert all(thread.policy == os.SCHED_OTHER for thread in threads)
