"""The compiled usual slice against the interpreted one: the same host, the same decisions, to the last bit."""

from __future__ import annotations

import errno
import os
import random
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixvisor.sched import steady
from mixvisor.sched.dispatcher import AT_ONCE, Parcel
from mixvisor.sched.linux import EventCounter
from mixvisor.sched.policy import POLICIES
from mixvisor.sched.shared import ACTIVE, CPU_FIELDS, PAUSED, RingReader
from mixvisor.vm.worker.status import STATUS_SIZE, Phase

from .fakes import Host

LIBRARY = steady.load()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="sched/steady.c is not compiled: there was no C compiler")
VCPUS = 6
CROWD = AT_ONCE + 7                # of which not all are read after an unexplained slice


class Twin(Host):
    """A host whose dispatcher takes its usual steps in C where `native`; wakes late by a rule."""

    def __init__(self, kind: str, *, native: bool) -> None:
        super().__init__(kind)
        self.pages: dict[int, memoryview] = {}
        self.late_by = self.interrupted_every = self.noise_every = 0
        self.steady: steady.Steady | None = None
        self.in_c = 0
        if native:
            assert LIBRARY is not None
            types = dict(steady.Calls._fields_)
            self.steady = steady.Steady(LIBRARY, self.dispatcher, steady.Calls(
                types["now"](lambda: self.now), types["sleep_until"](self.sleep), types["run_ns"](self.run_ns),
                types["set"](self.set_state)))

    def page(self, slot: int) -> memoryview:
        # A view for the dispatcher to release, and one to write with.
        words = self.pages[slot] = self.pages.get(slot) or memoryview(bytearray(STATUS_SIZE)).cast("Q")
        words[1] = Phase.RUNNING if slot + 100 not in self.kernel.threads else words[1]
        return memoryview(words)

    def sleep(self, due: int) -> int:
        """1: interrupted, half-way."""
        chance = due * 2_654_435_761 >> 9
        interrupted = self.interrupted_every and chance % self.interrupted_every == 0
        at = (self.now + due) // 2 if interrupted else due + chance % (self.late_by + 1)
        if at > self.now:
            if self.noise_every and (chance >> 5) % self.noise_every == 0:
                # For a moment nobody ran, or another than the one that was picked.
                noise = min(at - self.now, 400_000)
                other = self.kernel.threads[100 + (chance >> 9) % len(self.kernel.threads)]
                if chance >> 8 & 1 and other.wants and not other.gone:
                    other.ran += noise
                self.now += noise
            self.kernel.run(at - self.now, self.cpu)
            self.now = at
        return int(interrupted)

    def run_ns(self, index: int) -> int:
        thread = self.kernel.threads[self.dispatcher._order[index].tid]
        return -1 if thread.gone else thread.ran

    def set_state(self, index: int, old: int, new: int) -> int:
        assert self.steady is not None
        before, after = (self.steady._states[number] for number in (old, new))
        tid = self.dispatcher._order[index].tid
        try:
            if after.policy != before.policy:
                if after.policy is not None:
                    self.kernel.set_class(tid, after.policy, after.parameters)
            elif after.priority != before.priority:
                self.kernel.set_priority(tid, after.parameters)
            if after.stopped != before.stopped:
                (self.kernel.stop if after.stopped else self.kernel.go_on)(tid)
        except ProcessLookupError:
            return errno.ESRCH
        return 0

    def go(self, steps: int) -> None:
        taken = 0
        while taken < steps:
            due = self.dispatcher.step(self.now)
            taken += 1
            assert due is not None
            if self.steady is not None and taken < steps and self.steady.possible():
                before = self.steady._g.steps
                now = self.steady.run(limit=steps - taken)
                done = self.steady._g.steps - before
                taken += done
                self.in_c += done
                if now is not None:
                    assert now == self.now
                    continue
                due = min(self.dispatcher._slice_end, self.dispatcher._edge)
            if due > self.now and self.sleep(due):
                self.dispatcher.interrupt(self.now)

    def everything(self) -> dict[str, Any]:
        queue = self.dispatcher._queue
        first, used = self.shared.slot(0), self.shared.slot(self.shared.get("used_slots"))
        block = self.shared.cpu(0)
        return {
            "now": self.now,
            "slots": self.shared.words[first:used].tolist(),
            "billed": self.shared.cpu_get(0, "billed_ns"),
            "block": self.shared.words[block:block + CPU_FIELDS["cpu_ns"]].tolist(),
            "records": RingReader(self.shared, 0).read(),
            "threads": {tid: (t.policy, t.priority, t.stopped, t.ran) for tid, t in self.kernel.threads.items()},
            "queue": [(e.slot, e.v, e.start, e.deadline, e.lag, e.weight, e.served, e.awake, e.request_ns)
                      for e in queue._entries.values()],
            "order": (queue._random, queue._jitter_ns),
            "virtual": (queue._virtual, queue._weight, queue._current, queue._clock_ns, queue._picked_at_ns),
            "turn": (self.dispatcher._credit, self.dispatcher._turn, self.dispatcher._breathing, self.dispatcher._edge),
        }


# What may happen between two stretches of slices: (what, vCPU, a number).
EVENTS = st.lists(
    st.tuples(
        st.sampled_from(("rate", "sleep", "wake", "pause", "go-on", "cap", "policy", "leave", "come", "gone", "late",
                         "interrupts", "noise", "slice", "latency", "order", "nothing")),
        st.integers(0, VCPUS - 1), st.integers(1, 1000), st.integers(1, 60)),
    min_size=1, max_size=25)


def happen(host: Twin, what: str, slot: int, number: int) -> None:
    shared, thread = host.shared, host.kernel.threads[slot + 100]
    if what == "rate":
        shared.slot_set(slot, "rate", number * 1_000_000)
        shared.bump()
    elif what in ("sleep", "wake"):
        thread.wants = what == "wake"
        host.pages[slot][1] = Phase.RUNNING if thread.wants else Phase.SLEEPING
    elif what in ("pause", "go-on"):
        shared.slot_set(slot, "flags", ACTIVE | (PAUSED if what == "pause" else 0))
        shared.bump()
    elif what == "latency":
        shared.slot_set(slot, "latency", number % 3)
        shared.bump()
    elif what == "cap":
        shared.slot_set(slot, "cap", (number % 3) * 200_000_000)
        shared.bump()
    elif what == "policy":
        shared.set("policy", number % (len(POLICIES) - 1))
        shared.set("mode_batch_ns", number * 100_000)
        shared.set("mode_wait_max_ns", 100_000_000)
        shared.bump()
    elif what in ("leave", "come"):
        if shared.slot_get(slot, "want_cpu") == shared.slot_get(slot, "have_cpu"):
            shared.slot_set(slot, "want_cpu", -1 if what == "leave" else host.cpu)
            if what == "come":
                host.parcels.append((slot, Parcel(slot + 1, host.page(slot))))
            shared.bump()
    elif what == "gone" and number > 900:
        thread.gone = True
    elif what == "late":
        host.late_by = number * 100
    elif what == "interrupts":
        host.interrupted_every = number % 6
    elif what == "noise":
        host.noise_every = number % 5
    elif what == "order":
        shared.set("order_jitter_ns", number % 3 * 500_000)
        shared.set("order_seed", number)
        shared.bump()
    elif what == "slice":
        shared.set("slice_ns", (1 + number % 10) * 1_000_000)
        shared.bump()


def live(host: Twin, events: list[tuple[str, int, int, int]], count: int = VCPUS) -> list[dict[str, Any]]:
    found = []
    for slot in range(count):
        host.add(slot, 2 * (slot + 1) / count / (count + 1), phase=host.page(slot), mode=slot % 2)
    for what, slot, number, steps in events:
        happen(host, what, slot, number)
        host.go(steps)
        found.append(host.everything())
    return found


@pytest.mark.parametrize("kind", ["precise", "gentle"])
@settings(max_examples=50, deadline=None)
@given(events=EVENTS, count=st.sampled_from((VCPUS, CROWD)))
def test_c_and_python_take_the_same_steps_to_the_last_bit(kind, events, count):
    interpreted, native = Twin(kind, native=False), Twin(kind, native=True)
    for one, other in zip(live(interpreted, events, count), live(native, events, count), strict=True):
        for name, value in one.items():
            assert other[name] == value, name


@pytest.mark.parametrize("count", [VCPUS, CROWD])
@pytest.mark.parametrize("policy", [0, 1])
@pytest.mark.parametrize("kind", ["precise", "gentle"])
def test_a_steady_host_is_stepped_in_c_almost_always(kind, policy, count):
    interpreted, native = Twin(kind, native=False), Twin(kind, native=True)
    chance = random.Random(7)
    events = [("late", 0, 300, 1), ("noise", 0, 4, 1), ("order", 0, 2, 1), ("policy", 0, policy * 250 + policy, 1)]
    events += [("rate", chance.randrange(count), chance.randint(1, 1000), 300) for _ in range(15)]
    assert live(interpreted, events, count) == live(native, events, count)
    assert native.in_c > 0.95 * sum(steps for *_, steps in events)


def test_a_count_that_is_read_from_a_descriptor_is_read_as_often_and_as_exactly_in_c():
    def records(native):
        host = Twin("precise", native=native)
        for slot in range(2):
            ours, theirs = os.pipe()            # each reading is one more
            os.write(theirs, b"".join(struct.pack("=q", 1000 * slot + number) for number in range(1, 400)))
            host.add(slot, 0.5, mode=slot)
            host.parcels.append((slot, Parcel(slot + 1, host.page(slot), EventCounter(ours))))
        host.go(300)
        assert native == (host.in_c > 200)
        found = RingReader(host.shared, 0).read()
        host.dispatcher.leave(host.now)          # which closes the descriptors
        return found

    found = records(native=False)
    assert found == records(native=True)
    assert sum(record.progress_after > record.progress_before > 0 for record in found) > 290


def test_a_library_of_another_version_is_not_used(monkeypatch):
    monkeypatch.setattr(steady, "VERSION", steady.VERSION + 1)
    assert steady.load() is None


def test_python_takes_every_step_where_nothing_was_compiled(monkeypatch, tmp_path):
    monkeypatch.setattr(steady, "__file__", str(tmp_path / "steady.py"))
    assert steady.load() is None
