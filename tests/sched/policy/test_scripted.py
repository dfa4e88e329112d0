"""The scripted picker: the script is played, and nobody but the lenders pays for it."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from mixvisor.sched.model import Slot
from mixvisor.sched.policy.fair import Runqueue
from mixvisor.sched.policy.scripted import OWED_MAX_NS, REST, ScriptedRunqueue

MS = 1_000_000
SLICE = 5 * MS


class Script:
    def __init__(self, *lines: tuple[int, int]) -> None:
        self.lines = list(lines)
        self.at = 0

    def peek(self) -> tuple[int, int, int] | None:
        return (self.at, *self.lines[self.at]) if self.at < len(self.lines) else None

    def advance(self) -> None:
        self.at += 1


def queue_of(script: Script, rates: dict[int, float], lent: set[int]) -> ScriptedRunqueue:
    queue = ScriptedRunqueue(script, SLICE, 0)
    for slot, rate in rates.items():
        queue.add(Slot(slot), rate)
        queue.lend(Slot(slot), slot in lent)
    return queue


def play(queue: ScriptedRunqueue, slices: int, ran: Counter[int] | None = None) -> list[tuple[int | None, int, int]]:
    """(slot, entry, length) of each; the picked one runs all of it."""
    found: list[tuple[int | None, int, int]] = []
    current = None
    for _ in range(slices):
        current = queue.pick(current)
        found.append((current, queue.entry, queue.length_ns))
        queue.advance(queue.length_ns)
        if current is not None:
            queue.charge(current, queue.length_ns)
            if ran is not None:
                ran[current] += queue.length_ns
    return found


def test_the_script_says_who_runs_and_for_how_long():
    queue = queue_of(Script((2, MS), (0, 2 * MS), (0, MS), (1, MS)), {0: 0.3, 1: 0.3, 2: 0.4}, {0, 1, 2})
    assert play(queue, 4) == [(2, 1, MS), (0, 2, 2 * MS), (0, 3, MS), (1, 4, MS)]


def test_a_script_that_has_run_dry_leaves_the_order_to_the_policy():
    queue = queue_of(Script((1, MS)), {0: 0.5, 1: 0.5}, {0, 1})
    found = play(queue, 21)
    assert found[0][1] == 1
    assert all(entry == 0 and length == SLICE for _slot, entry, length in found[1:])
    # While they lend they count as one, so whose turn it is does not follow from what each got.
    assert {slot for slot, _entry, _length in found[1:]} <= {0, 1}


def test_entries_of_vcpus_that_are_gone_asleep_or_not_lent_are_left_out():
    queue = queue_of(Script((7, MS), (1, MS), (2, MS), (0, MS)), {0: 0.5, 1: 0.2, 2: 0.3}, {0, 1})
    queue.sleep(Slot(1))
    assert play(queue, 1) == [(0, 4, MS)]


def test_lenders_owe_each_other_nothing_afterwards_however_uneven_the_script_was():
    script = Script(*[(0, MS)] * 400)
    queue = queue_of(script, {0: 0.1, 1: 0.2, 2: 0.7}, {0, 1, 2})
    before = {slot: queue.lag_ns(Slot(slot)) for slot in range(3)}
    play(queue, 400)
    assert all(abs(queue.lag_ns(Slot(slot)) - lag) < 100 for slot, lag in before.items())
    after = Runqueue(SLICE, 0)
    after.take_over(queue)
    ran: Counter[int] = Counter()
    for _ in range(200):
        slot = after.pick()
        after.advance(SLICE)
        after.charge(slot, SLICE)
        ran[slot] += 1
    assert [ran[slot] for slot in range(3)] == [20, 40, 140]


@given(st.lists(st.sampled_from([0, 1, 2, 3, REST]), min_size=200, max_size=400), st.integers(1, 8))
@settings(max_examples=40, deadline=None)
def test_one_that_lends_nothing_keeps_its_share_over_every_quarter_of_a_second(order, parts):
    """Whatever the script: slots 2 and 3 lend nothing, so entries that name them are left out."""
    total = 2 + 2 * parts / 4
    rates = {0: 1 / total, 1: 1 / total, 2: parts / 4 / total, 3: parts / 4 / total}
    queue = queue_of(Script(*[(slot, MS) for slot in order * 8]), rates, {0, 1})
    ran: Counter[int] = Counter()
    passed = 0
    for _ in range(40):
        play(queue, 25, ran)
        passed = sum(ran.values())
        for slot in (2, 3):
            assert abs(ran[slot] - rates[slot] * passed) <= OWED_MAX_NS + 2 * SLICE


def test_at_a_rest_the_others_are_served_until_they_are_even():
    script = Script(*[(0, MS), (1, MS)] * 20, (REST, 0), *[(0, MS)] * 10)
    queue = queue_of(script, {0: 0.25, 1: 0.25, 2: 0.5}, {0, 1})
    ran: Counter[int] = Counter()
    found = play(queue, 60, ran)
    rest = [slot for slot, entry, _length in found if entry == 0][:6]
    assert set(rest) == {2}
    assert [entry for _slot, entry, _length in found[:40]] == list(range(1, 41))
    assert found[40][1] == 0
    assert 42 in [entry for _slot, entry, _length in found]


def test_a_rest_ends_also_when_one_lender_was_far_ahead_of_the_other():
    """Regression: what lenders owe each other is frozen, so the others stayed owed time and the script stood still."""
    script = Script(*([(1, MS)] * 10 + [(REST, 0)]) * 10)
    queue = ScriptedRunqueue(script, SLICE, 0)
    for slot, (rate, lag) in {1: (0.375, 0), 2: (0.5, 0), 0: (0.125, -12 * MS)}.items():
        queue.add(Slot(slot), rate, lag)
        queue.lend(Slot(slot), slot != 2)
    ran: Counter[int] = Counter()
    play(queue, 150, ran)
    assert script.at == len(script.lines)
    assert 0.4 < ran[2] / sum(ran.values()) < 0.6
