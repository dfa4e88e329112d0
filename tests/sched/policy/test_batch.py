"""The batch picker on the bench: how rarely modes change, and what that may cost nobody."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mixvisor.sched.policy import POLICIES, Batching, BatchRunqueue, Runqueue

from ..bench import MS, Bench, Task

SLICE = 5 * MS
NEVER = 10**15
SOFTWARE, HARDWARE = 0, 1

mixes = st.lists(st.tuples(st.integers(1, 50), st.sampled_from([SOFTWARE, HARDWARE])), min_size=2, max_size=8)


def bench_of(mix, milliseconds=4_000, *, jitter_ns=0, **batching):
    queue = partial(BatchRunqueue, **batching)
    return Bench([Task(weight=w, mode=m) for w, m in mix], queue=queue, jitter_ns=jitter_ns).run(milliseconds * MS)


def changes(bench):
    """How often the CPU went from one mode to the other."""
    modes = [bench.tasks[slot].mode for _, _, slot in bench.trace if slot is not None]
    return sum(a != b for a, b in pairwise(modes))


def part(mix):
    """One mode's part of the weights."""
    return sum(w for w, m in mix if m == HARDWARE) / sum(w for w, _ in mix)


def longest_gap(bench, mode):
    """The longest time for which nobody of *mode* ran."""
    spans = sorted((start, end) for task in bench.tasks if task.mode == mode for start, end, _ in task.services)
    ends = [0, *[end for _, end in spans]]
    starts = [*[start for start, _ in spans], bench.now]
    return max(start - end for start, end in zip(starts, ends, strict=True))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(mixes, st.sampled_from([0, 10 * MS, 25 * MS, 60 * MS]), st.sampled_from([50 * MS, 200 * MS, NEVER]),
       st.integers(0, MS), st.sampled_from([0, SLICE // 2]))
def test_lag_of_group_and_vcpu_stay_within_the_stated_bounds(mix, batch_ns, wait_max_ns, jitter, order_ns):
    bench = Bench([Task(weight=w, mode=m) for w, m in mix], jitter_ns=jitter,
                  queue=partial(BatchRunqueue, batch_ns=batch_ns, wait_max_ns=wait_max_ns, jitter_ns=order_ns))
    q, (queue,) = SLICE + jitter + order_ns, bench.queues
    of_mode = [sum(w for w, m in mix if m == mode) for mode in (SOFTWARE, HARDWARE)]
    for _ in range(60):
        bench.run(17 * MS)
        groups = [queue.group_lag_ns(mode) for mode in (SOFTWARE, HARDWARE)]
        assert abs(sum(groups)) <= 4
        assert abs(groups[0]) <= batch_ns + q + 4
        for slot, (weight, mode) in enumerate(mix):
            assert abs(queue.lag_ns(slot)) <= (batch_ns + q) * weight / of_mode[mode] + q + 4
    assert bench.bad_idle == 0
    assert sum(task.ran for task in bench.tasks) == bench.now


@settings(max_examples=25, deadline=None, derandomize=True)
@given(mixes, st.sampled_from([10 * MS, 25 * MS, 60 * MS]))
def test_modes_change_no_oftener_than_the_law_says(mix, batch_ns):
    bench = bench_of(mix, batch_ns=batch_ns, wait_max_ns=NEVER)
    f = part(mix)
    assert changes(bench) <= f * (1 - f) * bench.now / batch_ns + 2


@settings(max_examples=25, deadline=None, derandomize=True)
@given(mixes, st.sampled_from([30 * MS, 100 * MS, 200 * MS]), st.sampled_from([25 * MS, 100 * MS, 10_000 * MS]))
@example([(1, SOFTWARE), (99, HARDWARE)], 200 * MS, 25 * MS)        # a turn of B paid by two seconds without one
@example([(1, SOFTWARE), (1, SOFTWARE), (30, HARDWARE), (30, HARDWARE)], 200 * MS, 25 * MS)
def test_no_mode_waits_longer_than_the_bound_beyond_the_gap_that_is_fair(mix, wait_max_ns, batch_ns):
    bench = bench_of(mix, batch_ns=batch_ns, wait_max_ns=wait_max_ns)
    for mode in {m for _, m in mix}:
        f = sum(w for w, m in mix if m == mode) / sum(w for w, _ in mix)
        assert longest_gap(bench, mode) <= wait_max_ns + 2 * SLICE / f


@settings(max_examples=20, deadline=None, derandomize=True)
@given(mixes, st.sampled_from([0.002, 0.01, 0.05]), st.sampled_from([10_000, 50_000, 400_000]))
def test_a_budget_keeps_the_loss_to_mixing_below_it(mix, loss_max, crossing_ns):
    bench = bench_of(mix, batch_ns=0, wait_max_ns=NEVER, budget_ns=Batching.budget(loss_max, crossing_ns))
    assert changes(bench) * crossing_ns <= loss_max * bench.now + 2 * crossing_ns


@settings(max_examples=15, deadline=None, derandomize=True)
@given(mixes)
def test_over_long_times_it_is_as_fair_as_fair(mix):
    bench = bench_of(mix, 20_000)
    for task in bench.tasks:
        want = task.weight / sum(w for w, _ in mix)
        # Over any time it is off by its lag at most: 30 ms of 20 s, and the slice in hand.
        assert task.ran / bench.now == pytest.approx(want, abs=0.003)


def test_equal_modes_change_a_tenth_as_often_as_under_fair_and_wait_no_longer_than_stated():
    mix = [(100, SOFTWARE), (200, SOFTWARE), (100, HARDWARE), (400, HARDWARE)]
    fair = Bench([Task(weight=w, mode=m) for w, m in mix]).run(10_000 * MS)
    batch = bench_of(mix, 10_000)
    assert changes(batch) <= changes(fair) / 10
    assert max(longest_gap(batch, mode) for mode in (SOFTWARE, HARDWARE)) <= 200 * MS


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=6), st.integers(0, MS))
def test_where_modes_do_not_meet_it_decides_as_fair_does(weights, jitter):
    def trace(queue):
        tasks = [Task(weight=w, mode=HARDWARE) for w in weights]
        return Bench(tasks, queue=queue, jitter_ns=jitter, seed=3).run(400 * MS).trace

    assert trace(BatchRunqueue) == trace(Runqueue)


@pytest.mark.parametrize("thief_mode", [SOFTWARE, HARDWARE])
def test_a_thief_that_yields_just_before_the_slice_ends_gains_nothing(thief_mode):
    thief = Task(script=[(SLICE - 1000, 1000)], mode=thief_mode)
    bench = Bench([thief, Task(mode=SOFTWARE), Task(mode=HARDWARE)], queue=BatchRunqueue).run(5_000 * MS)
    assert thief.ran / bench.now <= 1 / 3 + 0.01


def test_a_sleeper_does_not_gain_on_one_of_another_mode_that_always_runs():
    busy, sleeper = Task(mode=SOFTWARE), Task(script=[(3 * MS, 2 * MS)], mode=HARDWARE)
    Bench([busy, sleeper], queue=BatchRunqueue).run(5_000 * MS)
    assert busy.ran >= 0.5 * 5_000 * MS - 30 * MS


def test_a_cap_holds_and_does_not_keep_the_other_mode_waiting():
    capped, other = Task(cap=0.2, mode=HARDWARE), Task(mode=SOFTWARE)
    bench = Bench([capped, other], queue=BatchRunqueue).run(5_000 * MS)
    assert capped.ran / bench.now == pytest.approx(0.2, abs=0.005)
    assert sum(bench.idle) == 0


def test_the_mode_is_kept_while_only_the_other_sleeps():
    queue = BatchRunqueue(SLICE)
    queue.add(0, 0.5, mode=SOFTWARE)
    queue.add(1, 0.5, mode=HARDWARE)
    assert queue.pick() == 0
    queue.sleep(0)
    assert (queue.pick(), queue.mode) == (1, HARDWARE)
    queue.wake(0)
    assert queue.pick(1) == 1
    queue.sleep(1)
    queue.sleep(0)
    assert queue.pick() is None


@settings(max_examples=15, deadline=None, derandomize=True)
@given(mixes, st.randoms(use_true_random=False), st.sampled_from([2, 64]))
def test_neither_the_scale_of_rates_nor_the_order_of_adding_changes_the_choice(mix, random, scale):
    order = list(range(len(mix)))
    random.shuffle(order)
    plain, other = BatchRunqueue(SLICE), BatchRunqueue(SLICE)
    for slot, (weight, mode) in enumerate(mix):
        plain.add(slot, weight / 1024, mode=mode)
    for slot in order:
        other.add(slot, mix[slot][0] * scale / 1024, mode=mix[slot][1])
    now = None
    for _ in range(200):
        now = plain.pick(now)
        assert other.pick(now) == now
        for queue in (plain, other):
            queue.advance(SLICE)
            queue.charge(now, SLICE)


def test_a_wrong_bound_is_refused():
    with pytest.raises(ValueError, match="must be >= 0"):
        BatchRunqueue(batch_ns=-1)


def test_every_policy_makes_a_run_queue_and_says_what_it_is():
    for name, policy in POLICIES.items():
        assert policy.name == name
        assert policy.about
        queue = policy.runqueue(SLICE, 0, Batching(batch_ns=1))
        queue.add(0, 1.0, mode=HARDWARE)
        assert queue.pick() == 0
    assert type(POLICIES["fair"].runqueue(SLICE, 0)) is Runqueue
    assert type(POLICIES["batch"].runqueue(SLICE, 0)) is BatchRunqueue


@pytest.mark.parametrize(("first", "second"), [("fair", "batch"), ("batch", "fair"), ("batch", "partition")])
def test_another_policy_takes_over_every_lag_and_budget_exactly(first, second):
    old, new = POLICIES[first].runqueue(SLICE, 0), POLICIES[second].runqueue(2 * SLICE, 0)
    for slot in range(4):
        old.add(slot, (slot + 1) / 10, mode=slot % 2)
    old.set_cap(3, 0.4)
    for ran in range(1, 30):
        slot = old.pick()
        old.advance(ran * MS // 4)
        old.charge(slot, ran * MS // 4)
    old.sleep(2)
    seen = [(old.lag_ns(slot), old.budget_ns(slot), old.is_awake(slot), old.is_parked(slot)) for slot in range(4)]
    new.take_over(old)
    assert [(new.lag_ns(s), new.budget_ns(s), new.is_awake(s), new.is_parked(s)) for s in range(4)] == seen
    assert new.pick() is not None


def test_the_current_one_stays_for_the_minimum_run_whatever_the_other_mode_is_owed():
    queue = BatchRunqueue(SLICE, MS, batch_ns=0)
    queue.add(0, 0.5, mode=0)
    queue.add(1, 0.5, mode=1)
    first = queue.pick()
    queue.advance(MS - 1)
    queue.charge(first, MS - 1)
    assert queue.pick(first) == first
    queue.advance(1)
    queue.charge(first, 1)
    assert queue.pick(first) == 1 - first
