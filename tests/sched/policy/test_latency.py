"""Latency classes: who comes first, and that nobody gets more by it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixvisor.sched.model import LATENCIES
from mixvisor.sched.policy import BatchRunqueue, Runqueue
from mixvisor.sched.policy.fair import CLASSES

from ..bench import MS, Bench, Task

SLICE = 5 * MS
LOW, NORMAL, HIGH = map(LATENCIES.index, ("low", "normal", "high"))
CREDIT_NS = CLASSES[LOW].credit * SLICE
QUEUES = {"fair": Runqueue, "batch": BatchRunqueue}


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 400), st.sampled_from((LOW, NORMAL, HIGH)), st.integers(0, 1)),
                min_size=2, max_size=8),
       st.sampled_from(sorted(QUEUES)), st.integers(0, MS))
def test_a_class_changes_no_long_run_share(tasks, policy, jitter):
    bench = Bench([Task(weight=w, latency=c, mode=m) for w, c, m in tasks], queue=QUEUES[policy],
                  jitter_ns=jitter)
    bench.run(10_000 * MS)
    total = sum(weight for weight, _class, _mode in tasks)
    # What one may be ahead for good: its credit, what the batch bound allows, and a slice.
    ahead = CREDIT_NS + (BatchRunqueue(SLICE)._batch_ns if policy == "batch" else 0) + SLICE + jitter
    for task, (weight, _class, _mode) in zip(bench.tasks, tasks, strict=True):
        due = bench.now * weight / total
        others = sum(1 for _w, c, _m in tasks if c == LOW) * ahead + ahead
        assert task.ran - due <= ahead + SLICE
        assert due - task.ran <= others + CLASSES[HIGH].request * SLICE
    assert bench.bad_idle == 0


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 400), st.sampled_from((LOW, NORMAL, HIGH))), min_size=2, max_size=8),
       st.integers(0, 99))
def test_what_was_ahead_at_one_second_is_not_more_at_ten(tasks, seed):
    """The error is a constant, no drift: the share goes to what the weights say."""
    def error(seconds):
        bench = Bench([Task(weight=w, latency=c) for w, c in tasks], seed=seed).run(seconds * 1000 * MS)
        total = sum(weight for weight, _class in tasks)
        return max(abs(t.ran - bench.now * t.weight / total) for t in bench.tasks)

    bound = len(tasks) * (CREDIT_NS + SLICE) + CLASSES[HIGH].request * SLICE
    assert error(1) <= bound
    assert error(10) <= bound


@pytest.mark.parametrize("policy", sorted(QUEUES))
def test_an_interactive_vcpu_waits_the_less_the_lower_its_class(policy):
    waits = {}
    for latency in (LOW, NORMAL, HIGH):
        inter = Task(script=[(2 * MS, 61 * MS), (3 * MS, 37 * MS), (1 * MS, 83 * MS)], latency=latency)
        Bench([inter, *[Task(mode=1) for _ in range(10)]], queue=QUEUES[policy]).run(10_000 * MS)
        waits[latency] = inter.longest_wait
        assert inter.ran <= 10_000 * MS / 11 + CREDIT_NS + SLICE
    assert waits[LOW] < waits[NORMAL] <= waits[HIGH]
    # Under fair within two slices; under batch within its part of the longest wait besides.
    patience = CLASSES[LOW].patience * BatchRunqueue(SLICE)._wait_max_ns if policy == "batch" else 0
    assert waits[LOW] <= 2 * SLICE + patience


@pytest.mark.parametrize("policy", sorted(QUEUES))
def test_one_of_a_low_class_that_takes_more_than_its_share_is_held_to_it(policy):
    """Awake nearly always, asleep for a moment: the class must not pay."""
    greedy = Task(script=[(19 * MS, 1 * MS)], latency=LOW)
    bench = Bench([greedy, *[Task() for _ in range(3)]], queue=QUEUES[policy]).run(10_000 * MS)
    assert greedy.ran / bench.now <= 0.25 + (CREDIT_NS + 2 * SLICE) / bench.now


def test_a_debt_wears_off_in_sleep_at_the_rate_that_was_due_and_no_further():
    queue = Runqueue(SLICE)
    queue.add(0, 0.25)
    queue.add(1, 0.75)
    queue.charge(0, 4 * MS)
    queue.sleep(0)
    assert queue.lag_ns(0) == -3 * MS
    queue.advance(4 * MS)
    assert queue.lag_ns(0) == -2 * MS
    queue.advance(100 * MS)
    assert queue.lag_ns(0) == 0


def test_a_sleeper_is_barred_until_its_debt_is_within_its_credit():
    for latency, barred in ((NORMAL, True), (LOW, False)):
        queue = Runqueue(SLICE)
        queue.add(0, 0.5, latency=latency)
        queue.add(1, 0.5)
        queue.charge(0, 8 * MS)
        queue.sleep(0)
        wait = queue.barred_ns(0)
        assert (wait > 0) is barred
        if barred:
            assert wait == pytest.approx(8 * MS, abs=2)        # 4 ms at half a CPU
            queue.advance(wait)
            assert queue.barred_ns(0) == 0


def test_a_debt_within_the_credit_is_kept_on_waking():
    queue = Runqueue(SLICE)
    queue.add(0, 0.5, latency=LOW)
    queue.add(1, 0.5)
    queue.charge(0, 24 * MS)
    queue.sleep(0)
    queue.wake(0)
    assert queue.lag_ns(0) == -12 * MS
    assert queue.pick() == 1            # beyond its credit it waits like anybody


def test_the_class_can_change_while_it_runs_and_what_is_owed_stays():
    queue = Runqueue(SLICE)
    queue.add(0, 0.5)
    queue.add(1, 0.5)
    queue.charge(0, 4 * MS)
    assert queue.pick() == 1
    queue.set_latency(0, LOW)
    assert queue.lag_ns(0) == -2 * MS
    assert queue.pick() == 0
    queue.set_latency(0, HIGH)
    assert queue.pick() == 1
