"""The dispatcher's step over a kernel that only remembers."""

from __future__ import annotations

import itertools
import json
import os
import socket
import sys
from collections.abc import Callable, Iterable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixvisor.sched.dispatcher import AT_ONCE, AWAITED_TICK_NS, IDLE_TICK_NS, READY, Dispatcher, Parcel, Settings
from mixvisor.sched.dispatching import SocketInbox
from mixvisor.sched.linux import KINDS, Level, states_of
from mixvisor.sched.model import Slot
from mixvisor.sched.shared import (
    ACTIVE,
    EVENTS,
    LENT,
    NOBODY,
    ONE_CPU,
    PAUSED,
    RECORD_ENTRY_SHIFT,
    RingReader,
    ScriptWriter,
    Shared,
)
from mixvisor.vm.worker.status import Phase

SLICE = 5_000_000


class FakeClock:
    native = (1, 0)

    def __init__(self, thread: FakeThread) -> None:
        self._thread = thread

    def read(self) -> int:
        if self._thread.gone:
            raise OSError(22, "gone")
        return self._thread.ran

    def close(self) -> None:
        self._thread.closed += 1


class FakeThread:
    def __init__(self) -> None:
        self.ran = 0
        self.gone = self.stopped = False
        self.wants = True
        self.policy, self.priority = os.SCHED_OTHER, 0
        self.cpus: tuple[int, ...] = (0, 1)
        self.closed = 0
        self.calls = 0


class FakeKernel:
    """Runs threads as Linux would: highest real-time priority, then OTHER, then IDLE."""

    def __init__(self) -> None:
        self.threads: dict[int, FakeThread] = {}

    def _thread(self, tid: int) -> FakeThread:
        thread = self.threads[tid]
        if thread.gone:
            raise ProcessLookupError
        thread.calls += 1
        return thread

    def run_clock(self, pid: int, tid: int, *, alone: bool = True) -> FakeClock:
        return FakeClock(self._thread(tid))

    def set_class(self, tid: int, policy: int, parameters: os.sched_param) -> None:
        thread = self._thread(tid)
        thread.policy = policy & ~os.SCHED_RESET_ON_FORK
        thread.priority = parameters.sched_priority

    def set_priority(self, tid: int, parameters: os.sched_param) -> None:
        thread = self._thread(tid)
        assert (thread.policy == os.SCHED_FIFO) == (parameters.sched_priority > 0), "as Linux would say: EINVAL"
        thread.priority = parameters.sched_priority

    def waits(self, pid: int, tid: int) -> bool:
        return not self._thread(tid).wants

    def pin(self, tid: int, cpus: Iterable[int]) -> None:
        self._thread(tid).cpus = tuple(cpus)

    def stop(self, pid: int) -> None:
        self._thread(pid).stopped = True

    def go_on(self, pid: int) -> None:
        self._thread(pid).stopped = False

    def run(self, passed: int, cpu: int) -> None:
        order = {os.SCHED_FIFO: 2, os.SCHED_OTHER: 1, os.SCHED_IDLE: 0}
        ready = [t for t in self.threads.values()
                 if t.wants and not t.stopped and not t.gone and cpu in t.cpus]
        if ready:
            max(ready, key=lambda t: (order[t.policy], t.priority)).ran += passed


class Host:
    """One host CPU: table, fake kernel, dispatcher, and a clock that only the test moves."""

    def __init__(self, kind: str = "precise", cpu: int = 1, shared: Shared | None = None) -> None:
        self.shared = shared or Shared.create([cpu], slots=16, ring_records=4096)
        self.owns = shared is None
        if self.owns:
            self.shared.set("slice_ns", SLICE)
            self.shared.set("ratelimit_ns", 0)
            self.shared.set("guard_timeout_ns", 1 << 60)
        self.kernel = FakeKernel()
        self.cpu = cpu
        self.now = 1_000
        self.parcels: list[tuple[int, Parcel]] = []
        self.dispatcher = Dispatcher(
            self.shared, Settings(kind=kind, cpu=cpu, index=0, home_cpus=(0, 1)), self.kernel,
            self, self.now)  # type: ignore[arg-type]
        self.reader = RingReader(self.shared, 0)

    def drain(self) -> Iterable[tuple[int, Parcel]]:
        parcels, self.parcels = self.parcels, []
        return parcels

    def add(self, slot: int, rate: float, *, phase: memoryview | None = None, cap: float = 0.0,
            mode: int = 0) -> FakeThread:
        tid = slot + 100
        thread = self.kernel.threads.setdefault(tid, FakeThread())
        for name, value in (
            ("generation", slot + 1), ("flags", ACTIVE), ("pid", tid), ("tid", tid),
            ("mode", mode), ("want_cpu", self.cpu), ("rate", int(rate * 1e9)),
            ("cap", int(cap * 1e9)),
        ):
            self.shared.slot_set(slot, name, value)
        if phase is not None:
            self.parcels.append((slot, Parcel(slot + 1, phase)))
        self.shared.set("used_slots", max(self.shared.get("used_slots"), slot + 1))
        self.shared.bump()
        return thread

    def go(self, steps: int) -> None:
        for _ in range(steps):
            due = self.dispatcher.step(self.now)
            assert due is not None
            assert due > self.now
            self.kernel.run(due - self.now, self.cpu)
            self.now = due

    def close(self) -> None:
        if self.owns:
            fd = self.shared.fd
            self.shared.close()
            os.close(fd)


@pytest.fixture
def host() -> Iterator[Host]:
    made = Host()
    yield made
    made.close()


def page(phase: Phase) -> memoryview:
    words = memoryview(bytearray(64)).cast("Q")
    words[1] = phase
    return words


@given(st.lists(st.integers(1, 20), min_size=2, max_size=6), st.sampled_from(["precise", "gentle"]))
@settings(max_examples=30, deadline=None)
def test_received_time_follows_rates(weights: list[int], kind: str) -> None:
    host = Host(kind)
    threads = [host.add(i, w / sum(weights)) for i, w in enumerate(weights)]
    host.go(3)
    before, start = [t.ran for t in threads], host.now
    host.go(600)
    for thread, first, weight in zip(threads, before, weights, strict=True):
        due = (host.now - start) * weight / sum(weights)
        assert abs(thread.ran - first - due) <= 3 * SLICE
    host.close()


def test_every_nanosecond_that_a_thread_ran_is_billed_once(host: Host) -> None:
    threads = [host.add(i, 0.25) for i in range(4)]
    host.go(50)
    threads[2].ran += 777            # behind the dispatcher's back
    host.go(200)
    host.dispatcher.leave(host.now)
    for slot, thread in enumerate(threads):
        assert host.shared.slot_get(slot, "charged_ns") == thread.ran


def test_records_tell_who_ran_without_gaps(host: Host) -> None:
    host.add(0, 0.5, mode=0)
    host.add(1, 0.5, mode=1)
    host.go(40)
    records = [r for r in host.reader.read() if r.slot != NOBODY]
    for one, two in itertools.pairwise(records):
        assert one.end_ns == two.start_ns
        assert two.previous_slot == one.slot
    for r in records:
        assert r.mode == r.slot
        assert r.run_ns == r.end_ns - r.start_ns
    assert host.reader.lost == 0


def test_the_same_winner_again_costs_no_system_call(host: Host) -> None:
    thread = host.add(0, 1.0)
    host.go(3)
    calls = thread.calls
    host.dispatcher._edge = 1 << 62          # no breath meanwhile
    host.go(20)
    assert thread.calls == calls


def test_a_sleeper_is_never_picked_while_another_is_awake(host: Host) -> None:
    phase = page(Phase.RUNNING)
    sleeper, busy = host.add(0, 0.9, phase=phase), host.add(1, 0.1)
    host.go(10)
    phase[1] = Phase.SLEEPING
    sleeper.wants = False
    host.go(2)
    host.reader.read()
    ran = busy.ran
    start = host.now
    host.go(30)
    assert busy.ran - ran == host.now - start
    assert {r.slot for r in host.reader.read()} == {1}
    assert host.shared.slot_get(0, "awake") == 0


def test_a_waker_runs_at_once_and_is_billed(host: Host) -> None:
    phase = page(Phase.SLEEPING)
    sleeper = host.add(0, 0.5, phase=phase)
    host.add(1, 0.5)
    sleeper.wants = False
    host.go(5)
    assert (sleeper.policy, sleeper.priority) == (os.SCHED_FIFO, 3)
    sleeper.wants = True
    phase[1] = Phase.RUNNING
    host.kernel.run(SLICE, host.cpu)         # before the dispatcher has noticed
    assert sleeper.ran == SLICE
    host.now += SLICE
    host.go(1)
    assert host.shared.slot_get(0, "charged_ns") == SLICE
    assert host.shared.slot_get(0, "awake") == 1


def test_claiming_to_sleep_while_computing_gains_nothing(host: Host) -> None:
    liar = host.add(0, 0.25, phase=page(Phase.SLEEPING))
    honest = host.add(1, 0.75)
    host.go(600)
    assert liar.ran / (liar.ran + honest.ran) < 0.25 + 0.02


def test_a_thief_that_always_wakes_gains_nothing(host: Host) -> None:
    phase = page(Phase.SLEEPING)
    thief, honest = host.add(0, 0.25, phase=phase), host.add(1, 0.75)
    for _ in range(600):
        # Sleeps whenever the dispatcher looks, computes for a fifth of each slice otherwise.
        phase[1] = Phase.SLEEPING
        due = host.dispatcher.step(host.now)
        assert due is not None
        if thief.priority == 3 or thief.policy == os.SCHED_OTHER:
            thief.ran += (due - host.now) // 5
            honest.ran += due - host.now - (due - host.now) // 5
        else:
            honest.ran += due - host.now
        host.now = due
    assert thief.ran / (thief.ran + honest.ran) < 0.25


def test_an_ended_thread_is_left_alone_and_reported(host: Host) -> None:
    one, two = host.add(0, 0.5), host.add(1, 0.5)
    host.go(10)
    one.gone = True
    host.go(5)
    ran, start = two.ran, host.now
    host.go(10)
    assert two.ran - ran == host.now - start
    assert host.shared.slot_get(0, "gone") == 1
    assert host.shared.cpu_get(0, "lost_threads") == 1


def test_paused_is_out_of_the_race_and_comes_back(host: Host) -> None:
    one, two = host.add(0, 0.5), host.add(1, 0.5)
    host.go(10)
    host.shared.slot_set(0, "flags", ACTIVE | PAUSED)
    host.shared.bump()
    host.go(2)
    assert one.policy == os.SCHED_OTHER
    one.wants = False
    ran, start = two.ran, host.now
    host.go(10)
    assert two.ran - ran == host.now - start
    one.wants = True
    host.shared.slot_set(0, "flags", ACTIVE)
    host.shared.bump()
    host.go(40)
    assert one.ran > 10 * SLICE


def test_a_capped_vcpu_is_stopped_when_its_budget_is_used_up(host: Host) -> None:
    one = host.add(0, 1.0, cap=0.25)
    host.go(20)
    ran, start = one.ran, host.now
    host.go(400)
    assert (one.ran - ran) / (host.now - start) == pytest.approx(0.25, abs=0.03)
    host.dispatcher.leave(host.now)
    assert not one.stopped


def two_hosts() -> tuple[Shared, Host, Host]:
    shared = Shared.create([1, 2], slots=4, ring_records=64)
    shared.set("slice_ns", SLICE)
    shared.set("guard_timeout_ns", 1 << 60)
    first, second = Host(shared=shared), Host(shared=shared, cpu=2)
    second.dispatcher = Dispatcher(
        shared, Settings(kind="precise", cpu=2, index=1, home_cpus=(0, 1)),
        second.kernel, second, 1_000)  # type: ignore[arg-type]
    second.kernel.threads = first.kernel.threads
    return shared, first, second


def test_hand_over_between_cpus_loses_nothing_and_bills_nothing_twice() -> None:
    shared, first, second = two_hosts()
    thread = first.add(0, 0.5)
    first.go(10)
    for _ in range(5):
        for owner, other in ((first, second), (second, first)):
            assert shared.slot_get(0, "have_cpu") == owner.cpu
            shared.slot_set(0, "want_cpu", other.cpu)
            shared.bump()
            other.go(1)
            assert shared.slot_get(0, "have_cpu") == owner.cpu, "taken before it was let go"
            thread.ran += 123                       # still runs meanwhile
            owner.go(2)                                 # one of them may be a breath's edge
            assert shared.slot_get(0, "have_cpu") == NOBODY
            thread.ran += 456
            other.go(3)
            assert thread.cpus == (other.cpu,)
    first.dispatcher.leave(first.now)
    assert shared.slot_get(0, "charged_ns") == thread.ran
    assert shared.slot_get(0, "migrations") == 10
    assert thread.cpus == (0, 1)
    fd = shared.fd
    shared.close()
    os.close(fd)


def awake_ns(shared: Shared, slot: int, now: int) -> int:
    since = now - shared.slot_get(slot, "awake_since_ns") if shared.slot_get(slot, "awake") else 0
    return shared.slot_get(slot, "awake_ns") + since


def test_a_vcpu_that_changes_hands_competes_all_the_while() -> None:
    """Else it would be entitled to nothing on the way: a slice a move, and 2:3:4 on two CPUs was 2 % off."""
    shared, first, second = two_hosts()
    first.add(0, 0.5)
    first.go(4)
    since = first.now - awake_ns(shared, 0, first.now)
    shared.slot_set(0, "want_cpu", 2)
    shared.bump()
    first.go(2)
    assert shared.slot_get(0, "have_cpu") == NOBODY
    second.now = first.now + 3 * SLICE
    second.go(1)
    assert shared.slot_get(0, "have_cpu") == 2
    assert awake_ns(shared, 0, second.now) == second.now - since
    # Taken from everybody it competes no more.
    shared.slot_set(0, "want_cpu", NOBODY)
    shared.bump()
    second.go(2)
    assert not shared.slot_get(0, "awake")
    assert awake_ns(shared, 0, second.now + SLICE) <= second.now - since
    fd = shared.fd
    shared.close()
    os.close(fd)


def test_who_sleeps_on_the_way_to_another_cpu_does_not_compete_meanwhile() -> None:
    shared, first, second = two_hosts()
    thread = first.add(0, 0.5)
    first.add(1, 0.5)
    first.go(4)
    thread.wants = False
    first.go(8)
    assert not shared.slot_get(0, "awake")
    slept = awake_ns(shared, 0, first.now)
    shared.slot_set(0, "want_cpu", 2)
    shared.bump()
    first.go(2)
    second.now = first.now + 3 * SLICE
    second.dispatcher.step(second.now)
    assert awake_ns(shared, 0, second.now) == slept
    fd = shared.fd
    shared.close()
    os.close(fd)


def test_a_cpu_that_waits_for_a_vcpu_from_another_looks_again_soon() -> None:
    """An idle CPU beside a runnable vCPU: it looked after 5 ms, and lost 1.4 % of a CPU to exchanges."""
    shared, first, second = two_hosts()
    first.add(0, 0.5)
    first.go(2)
    assert second.dispatcher.step(second.now) == second.now + IDLE_TICK_NS
    second.now += IDLE_TICK_NS
    shared.slot_set(0, "want_cpu", 2)
    shared.bump()
    due = second.dispatcher.step(second.now)
    assert due is not None
    assert due - second.now <= AWAITED_TICK_NS < IDLE_TICK_NS
    # Who has it may be long in letting it go: then not so often.
    waits = []
    for _ in range(40):
        now = second.now
        second.go(1)
        waits.append(second.now - now)
    assert sum(waits) > 40 * AWAITED_TICK_NS
    assert max(waits) <= IDLE_TICK_NS
    fd = shared.fd
    shared.close()
    os.close(fd)


def test_an_interrupt_ends_the_slice_and_who_is_to_go_goes_at_once() -> None:
    shared, first, _second = two_hosts()
    for slot in range(3):
        first.add(slot, 1 / 3)
    first.go(8)
    first.dispatcher.step(first.now)
    shared.slot_set(1, "want_cpu", 2)
    shared.bump()
    first.now += SLICE // 10
    first.dispatcher.step(first.now)
    assert shared.slot_get(1, "have_cpu") == 1, "a slice is not cut by a look alone"
    first.dispatcher.interrupt(first.now)
    first.dispatcher.step(first.now)
    assert shared.slot_get(1, "have_cpu") == NOBODY
    record = first.reader.read()[-1]
    assert record.end_ns == first.now
    assert record.late_ns == 0
    fd = shared.fd
    shared.close()
    os.close(fd)


def test_an_exchange_leaves_everybody_owed_what_they_were() -> None:
    """Found: beside a heavy vCPU that went, a light one was alone for a moment and no longer ahead of its share, and
    got another slice for nothing at each exchange: 100:1 on two CPUs was 0.4 % off with slices of 20 ms.
    """
    shared, first, second = two_hosts()
    first.add(0, 0.99)
    first.add(1, 0.01)
    second.add(2, 0.99)
    light = first.kernel.threads[101]
    while not light.ran:
        first.go(1)
    first.go(4)
    second.go(4)
    for one in (first, second):
        one.dispatcher.step(one.now)
    ahead = first.dispatcher._queue.lag_ns(1)
    assert ahead < -SLICE // 2
    for slot, cpu in ((0, 2), (2, 1)):
        shared.slot_set(slot, "want_cpu", cpu)
    shared.bump()
    for one in (first, second, first):
        one.now += 1000
        one.dispatcher.interrupt(one.now)
        one.dispatcher.step(one.now)
    assert shared.slot_get(2, "have_cpu") == 1
    queue = first.dispatcher._queue
    assert queue.lag_ns(1) == pytest.approx(ahead + shared.slot_get(2, "lag_ns") * 0.01, abs=SLICE * 0.02)
    assert queue.lag_ns(1) + queue.lag_ns(2) == pytest.approx(0, abs=2)
    # And it does not have the CPU while it is ahead, although it was picked last.
    assert first.dispatcher._pick.slot == 2
    fd = shared.fd
    shared.close()
    os.close(fd)


def test_what_everybody_is_owed_is_in_the_table_after_each_slice(host: Host) -> None:
    for slot in range(4):
        host.add(slot, (slot + 1) / 10)
    for _ in range(30):
        host.go(1)
        if host.dispatcher._breathing or host.now < host.dispatcher._slice_end:
            continue
        host.dispatcher.step(host.now)
        lags = [host.shared.slot_get(slot, "lag_ns") for slot in range(4)]
        assert host.shared.cpu_get(0, "billed_ns") == host.now
        assert lags == [host.dispatcher._queue.lag_ns(slot) for slot in range(4)]
        assert sum(lags) == pytest.approx(0, abs=4)


@pytest.mark.parametrize("kind", ["precise", "gentle"])
def test_of_very_many_sleepers_each_nanosecond_is_billed_and_whoever_wakes_is_seen(kind: str) -> None:
    """Found: after every slice that other work had a part of, a thousand clocks were read (0.5 ms, p99 8 ms)."""
    count = 4 * AT_ONCE
    shared = Shared.create([1], slots=count, ring_records=4096)
    for name, value in (("slice_ns", SLICE), ("ratelimit_ns", 0), ("guard_timeout_ns", 1 << 60)):
        shared.set(name, value)
    host = Host(kind, shared=shared)
    pages = [page(Phase.RUNNING if slot < 2 else Phase.SLEEPING) for slot in range(count)]
    threads = [host.add(slot, 1 / count, phase=pages[slot]) for slot in range(count)]
    for thread in threads[2:]:
        thread.wants = False
    host.go(40)
    reads = 0

    def counted(read: Callable[[], int]) -> Callable[[], int]:
        def one() -> int:
            nonlocal reads
            reads += 1
            return read()
        return one

    for vcpu in host.dispatcher._order:
        vcpu.clock.read = counted(vcpu.clock.read)  # type: ignore[union-attr]
    # Other work takes a third of every slice from now on: nothing is explained any more.
    for _ in range(50):
        due = host.dispatcher.step(host.now)
        assert due is not None
        host.kernel.run((due - host.now) * 2 // 3, host.cpu)
        host.now = due
    assert reads <= 51 * (AT_ONCE + 4)
    # One that says it sleeps and ran all the same is billed in turn, and one that wakes is seen in turn.
    liar, waker = 60, 100
    threads[liar].ran += 123_456
    threads[waker].wants = True
    pages[waker][1] = Phase.RUNNING
    host.kernel.run(SLICE // 2, host.cpu)
    host.now += SLICE
    for _ in range(count // AT_ONCE + 1):
        due = host.dispatcher.step(host.now)
        assert due is not None
        host.kernel.run((due - host.now) // 2, host.cpu)
        host.now = due
    assert shared.slot_get(waker, "awake")
    # Some are taken away between the reading and the look.
    for slot in range(0, count, 3):
        shared.slot_set(slot, "want_cpu", NOBODY)
        shared.bump()
        due = host.dispatcher.step(host.now)
        assert due is not None
        host.kernel.run((due - host.now) // 2, host.cpu)
        host.now = due
    for slot in range(0, count, 3):
        assert shared.slot_get(slot, "have_cpu") == NOBODY
        shared.slot_set(slot, "want_cpu", 1)
    shared.bump()
    host.go(60)
    assert shared.slot_get(liar, "charged_ns") == threads[liar].ran
    host.dispatcher.leave(host.now)
    assert [shared.slot_get(slot, "charged_ns") for slot in range(count)] == [thread.ran for thread in threads]
    fd = shared.fd
    shared.close()
    os.close(fd)


@pytest.mark.parametrize("why", ["halt", "leave", "heartbeat"])
def test_it_leaves_and_gives_everything_back(host: Host, why: str) -> None:
    threads = [host.add(i, 0.3) for i in range(3)]
    host.go(20)
    if why == "halt":
        host.shared.set("halt", 1)
    elif why == "leave":
        host.shared.words[host.shared.cpu(0) + 1] = 1
    else:
        host.shared.set("guard_timeout_ns", 1)
        host.now += 100_000_000
    assert host.dispatcher.step(host.now) is None
    host.dispatcher.leave(host.now)
    for slot, thread in enumerate(threads):
        assert thread.policy == os.SCHED_OTHER
        assert thread.cpus == (0, 1)
        assert not thread.stopped
        assert host.shared.slot_get(slot, "have_cpu") == NOBODY


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


def lend(host: Host, *slots: int) -> ScriptWriter:
    writer = ScriptWriter(host.shared)
    for slot in slots:
        host.shared.slot_set(slot, "flags", ACTIVE | LENT)
    host.shared.set("script_cpu", host.cpu)
    host.shared.bump()
    return writer


def test_a_script_is_played_with_its_lengths_and_its_numbers_are_in_the_records(host: Host) -> None:
    for slot in range(3):
        host.add(slot, 0.3)
    host.go(10)
    host.reader.read()
    script = [(1, 1_000_000), (0, 2_000_000), (0, 2_000_000), (2, 500_000)] * 20
    lend(host, 0, 1, 2).write(script, 0)
    host.go(150)
    found = [(r.flags >> RECORD_ENTRY_SHIFT, r.slot, r.planned_end_ns - r.start_ns)
             for r in host.reader.read() if r.flags >> RECORD_ENTRY_SHIFT]
    assert found == [(number, *entry) for number, entry in enumerate(script, 1)]


def test_what_is_run_by_a_script_is_billed_to_who_ran_and_afterwards_the_rates_hold_again(host: Host) -> None:
    threads = [host.add(slot, rate) for slot, rate in enumerate((0.2, 0.8))]
    host.go(10)
    lend(host, 0, 1).write([(0, 5_000_000)] * 100, 0)
    host.go(120)
    host.shared.set("script_cpu", NOBODY)
    for slot in range(2):
        host.shared.slot_set(slot, "flags", ACTIVE)
    host.shared.bump()
    host.go(2)
    before = [thread.ran for thread in threads]
    host.go(500)
    ran = [thread.ran - first for thread, first in zip(threads, before, strict=True)]
    assert ran[0] / sum(ran) == pytest.approx(0.2, abs=0.01)
    host.dispatcher.leave(host.now)
    assert [host.shared.slot_get(slot, "charged_ns") for slot in range(2)] == [thread.ran for thread in threads]


def test_breaths_of_a_script_stay_within_what_the_kernel_allows_real_time_threads(host: Host) -> None:
    threads = [host.add(slot, 0.5) for slot in range(2)]
    host.go(10)
    lend(host, 0, 1).write([(at % 2, 1_000_000) for at in range(2000)], 0)
    calm, began = 0, host.now
    while host.now - began < 1_000_000_000:
        start = host.now
        host.go(1)
        if not any(thread.policy == os.SCHED_FIFO and not thread.stopped for thread in threads):
            calm += host.now - start
    assert calm / (host.now - began) > 0.06       # the kernel wants 5 %


def test_what_the_kernel_withheld_while_it_picked_is_nobodys_debt() -> None:
    """Found: after the policy `kernel` a light VM was hundreds of ms ahead in its run queue, and waited for that."""
    host = Host("plain")
    for slot in range(2):
        host.add(slot, (0.99, 0.01)[slot])
    host.go(1)
    for _ in range(100):
        host.kernel.threads[101].ran += SLICE
        host.now += SLICE
        host.dispatcher.step(host.now)
    host.dispatcher.leave(host.now)
    assert host.shared.slot_get(1, "charged_ns") >= 100 * SLICE
    assert [host.shared.slot_get(slot, "lag_ns") for slot in range(2)] == [0, 0]
    host.close()


def test_every_level_has_a_state_in_every_kind() -> None:
    for kind in KINDS:
        for breathing in (False, True):
            assert len(states_of(kind, breathing=breathing)) == len(Level)
    assert states_of("signal")[Level.WAIT].policy is None
    # In a breath nothing that wants the CPU is real-time and goes.
    breath = states_of("precise", breathing=True)
    assert breath[Level.RUN].policy == os.SCHED_OTHER
    assert breath[Level.WAIT].stopped


@pytest.mark.parametrize("kind", ["precise", "gentle"])
def test_a_clock_that_jumps_ahead_charges_nobody_and_nobody_is_owed_for_it(kind: str) -> None:
    """The host is a VM and was stopped, or the dispatcher was: no thread ran meanwhile."""
    host = Host(kind)
    threads = [host.add(slot, 1 / 3) for slot in range(3)]
    host.shared.slot_set(0, "cap", ONE_CPU // 5)
    host.go(200)
    before = [thread.ran for thread in threads]
    lags = [host.dispatcher._queue.lag_ns(Slot(slot)) for slot in range(3)]
    host.now += 3_600_000_000_000
    host.go(1)
    after = [host.dispatcher._queue.lag_ns(Slot(slot)) for slot in range(3)]
    assert max(abs(a - b) for a, b in zip(lags, after, strict=True)) <= 2 * SLICE
    start = host.now
    host.go(300)
    passed = host.now - start
    ran = [thread.ran - first for thread, first in zip(threads, before, strict=True)]
    # The bucket of the cap is full after an hour, and no fuller than that.
    assert ran[0] <= passed // 5 + 4 * SLICE
    assert abs(ran[1] - ran[2]) <= 4 * SLICE
    host.close()


def test_a_clock_that_steps_back_is_waited_for() -> None:
    host = Host("gentle")
    threads = [host.add(slot, 1 / 2) for slot in range(2)]
    host.go(50)
    ran = sum(thread.ran for thread in threads)
    due = host.dispatcher.step(host.now - 40_000_000)
    assert due is not None
    assert due >= host.now
    assert sum(thread.ran for thread in threads) == ran
    host.close()


def test_a_parcel_may_bring_a_counter_to_read_instead_of_a_word_in_memory():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    read, write = os.pipe()
    os.write(write, (7).to_bytes(8, sys.byteorder))
    message = {"slot": 3, "generation": 9, "status": False, "progress": EVENTS}
    with ours, theirs:
        socket.send_fds(theirs, [json.dumps(message).encode()], [read])
        os.close(read)
        [(slot, parcel)] = SocketInbox(ours).drain()
    os.close(write)
    assert (slot, parcel.generation, parcel.status) == (3, 9, None)
    assert parcel.progress[0] == 7
    parcel.progress.release()
