"""The fair picker alone and on the bench: shares, lag, caps, sleepers, thieves."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixvisor.sched.policy import Runqueue, jain

from ..bench import MS, Bench, Task

SLICE = 5 * MS


def shares(bench):
    return [task.ran / bench.now for task in bench.tasks]


@pytest.mark.parametrize("weights", [(1, 2, 4, 8), (100, 1), (1,), (7, 7, 7), (10_000, 1, 500)])
@pytest.mark.parametrize("jitter", [0, MS // 5])
def test_ten_seconds_of_one_cpu_are_shared_by_weight_within_three_in_a_thousand(weights, jitter):
    bench = Bench([Task(weight=w) for w in weights], jitter_ns=jitter).run(10_000 * MS)
    want = [w / sum(weights) for w in weights]
    assert shares(bench) == pytest.approx(want, abs=0.003)
    # Where a single slice is a small part of what is due, the ratios agree as well.
    ratios = [s / w for s, w in zip(shares(bench), want, strict=True)
              if w * bench.now > 15 * SLICE]
    assert jain(ratios) > 0.999


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=12), st.integers(0, MS),
       st.integers(0, 99))
def test_lag_stays_within_a_slice_and_what_the_timer_overran(weights, jitter, seed):
    bench = Bench([Task(weight=w) for w in weights], jitter_ns=jitter, seed=seed)
    bench.run(1_000 * MS)
    assert bench.worst_local_lag <= SLICE + jitter + 1
    assert bench.bad_idle == 0
    assert sum(task.ran for task in bench.tasks) == bench.now


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.sampled_from(["run", "sleep", "wake", "rate"]),
                          st.integers(1, 10 * MS)), max_size=200))
def test_the_lags_of_the_awake_always_sum_to_zero(steps):
    queue = Runqueue(SLICE)
    for slot in range(5):
        queue.add(slot, (slot + 1) / 15)
    for slot, action, amount in steps:
        if action == "run":
            queue.charge(slot, amount)
        elif action == "sleep":
            queue.sleep(slot)
        elif action == "wake":
            queue.wake(slot)
        else:
            queue.set_rate(slot, amount / (10 * MS))
        awake = [s for s in queue if queue.is_awake(s)]
        assert abs(sum(queue.lag_ns(s) for s in awake)) <= len(awake)


def test_a_change_of_rate_leaves_what_is_owed():
    queue = Runqueue(SLICE)
    queue.add(0, 0.5)
    queue.add(1, 0.5)
    queue.charge(0, 3 * MS)
    before = queue.lag_ns(0), queue.lag_ns(1)
    queue.set_rate(0, 0.9)
    queue.set_rate(1, 0.1)
    assert (queue.lag_ns(0), queue.lag_ns(1)) == before == (-1.5 * MS, 1.5 * MS)


@given(st.lists(st.integers(1, SLICE), min_size=1, max_size=300))
def test_charge_does_not_depend_on_how_runtime_is_sliced(parts):
    whole, sliced = Runqueue(SLICE), Runqueue(SLICE)
    for queue in (whole, sliced):
        queue.add(0, 0.3)
        queue.add(1, 0.7)
    whole.charge(0, sum(parts))
    for part in parts:
        sliced.charge(0, part)
    assert whole.lag_ns(0) == pytest.approx(sliced.lag_ns(0), abs=1)


def test_hours_of_small_charges_do_not_drift():
    queue = Runqueue(SLICE)
    queue.add(0, 1.0)
    queue.add(1, 2.0)
    for _ in range(1000):        # 4.6 hours, several rebases
        queue.charge(0, 5_555_555_555)
        queue.charge(1, 11_111_111_113)
    # Slot 0 is short of its third by one nanosecond of three in each round.
    assert queue.lag_ns(0) == pytest.approx(1000, abs=2)
    assert queue.lag_ns(1) == pytest.approx(-1000, abs=2)


def test_a_sleeper_does_not_gain_on_one_that_always_runs():
    bench = Bench([Task(), Task(script=[(3 * MS, 2 * MS)])]).run(5_000 * MS)
    busy, sleeper = shares(bench)
    assert busy >= 0.5 - 0.003
    assert busy + sleeper == pytest.approx(1.0)


def test_a_thief_that_yields_just_before_the_slice_ends_gains_nothing():
    thief = Task(script=[(SLICE - 1000, 1000)])
    bench = Bench([thief, Task(), Task()]).run(5_000 * MS)
    assert shares(bench)[0] <= 1 / 3 + 0.003


def test_who_slept_long_is_owed_one_slice_at_most():
    queue = Runqueue(SLICE)
    queue.add(0, 0.5)
    queue.add(1, 0.5)
    queue.charge(1, 100 * MS)
    queue.sleep(0)
    queue.charge(1, 1_000 * MS)
    queue.wake(0)
    assert queue.lag_ns(0) == SLICE


def test_who_overdrew_cannot_sleep_it_off():
    queue = Runqueue(SLICE)
    queue.add(0, 0.5)
    queue.add(1, 0.5)
    queue.charge(0, 8 * MS)
    queue.sleep(0)
    assert queue.lag_ns(0) == -4 * MS
    queue.wake(0)
    assert queue.lag_ns(0) == -4 * MS
    assert queue.pick() == 1


def test_a_lag_goes_along_from_one_cpu_to_another():
    here, there = Runqueue(SLICE), Runqueue(SLICE)
    for queue in (here, there):
        queue.add(8, 0.5)
    here.add(0, 0.5)
    here.charge(8, 4 * MS)
    there.add(0, 0.5, here.remove(0))
    assert there.lag_ns(0) == 2 * MS
    assert 0 not in here
    assert here.lag_ns(8) == 0


@pytest.mark.parametrize("cap", [0.05, 0.2, 0.5])
@pytest.mark.parametrize("others", [0, 1, 4])
def test_a_cap_holds_over_every_window_and_is_delivered(cap, others):
    capped = Task(weight=1000, cap=cap)
    bench = Bench([capped, *[Task() for _ in range(others)]], jitter_ns=MS // 5)
    bench.run(5_000 * MS)
    assert len(capped.services) > 40
    for first, (start, _, _) in enumerate(capped.services):
        total = 0
        for began, end, _ in capped.services[first:first + 40]:
            total += end - began
            assert total <= cap * (end - start) + 3 * SLICE + MS
    assert capped.ran / bench.now == pytest.approx(cap, abs=0.003)
    assert bench.bad_idle == 0
    if others:
        assert sum(bench.idle) == 0


def test_a_debt_is_carried_and_parks_until_it_is_paid():
    queue = Runqueue(SLICE, MS // 2)
    queue.add(0, 1.0)
    queue.set_cap(0, 0.5, budget_ns=MS)
    assert queue.pick() == 0
    queue.charge(0, 4 * MS)
    assert queue.budget_ns(0) == -3 * MS
    assert queue.is_parked(0)
    assert queue.pick() is None
    assert queue.unpark_in_ns() == pytest.approx(7 * MS, abs=2)
    queue.advance(7 * MS)
    assert queue.pick() == 0


def test_moving_to_another_cpu_earns_no_fresh_budget():
    queue = Runqueue(SLICE, MS // 2)
    queue.add(0, 1.0)
    queue.set_cap(0, 0.5)
    assert queue.pick() is None
    queue.advance(MS)
    assert queue.pick() == 0
    assert queue.slice_ns(0) == MS // 2


def test_an_ineligible_vcpu_runs_rather_than_leaving_the_cpu_idle():
    queue = Runqueue(SLICE)
    queue.add(0, 0.5)
    queue.add(1, 0.5)
    queue.set_cap(0, 0.01)                      # parked, and it holds what is owed
    for _ in range(40):                         # a tenth short of its minimum run
        queue.advance(MS)
        queue.charge(1, MS)
        assert queue.pick(1) == 1
    assert queue.lag_ns(0) <= SLICE + MS


def test_the_current_one_stays_for_the_minimum_run_and_on_ties():
    queue = Runqueue(SLICE, ratelimit_ns=MS)
    queue.add(0, 0.5)
    queue.add(1, 0.5)
    assert queue.pick() == 0
    queue.advance(MS - 1)
    queue.charge(0, MS - 1)
    assert queue.pick(0) == 0                  # ahead, but within its minimum run
    queue.advance(1)
    queue.charge(0, 1)
    assert queue.pick(0) == 1
    tied = Runqueue(SLICE)
    tied.add(0, 0.5)
    tied.add(1, 0.5)
    assert tied.pick(1) == 1


def test_a_current_one_that_sleeps_is_not_kept():
    queue = Runqueue(SLICE, ratelimit_ns=MS)
    queue.add(0, 0.5)
    queue.add(1, 0.5)
    assert queue.pick() == 0
    queue.sleep(0)
    assert queue.pick(0) == 1
    queue.sleep(1)
    assert queue.pick(1) is None


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 100), min_size=2, max_size=8))
def test_everyone_waits_a_bounded_time(weights):
    bench = Bench([Task(weight=w) for w in weights]).run(3_000 * MS)
    for task in bench.tasks:
        rate = task.weight / sum(weights)
        assert task.longest_wait <= 2 * SLICE / rate + bench.period_ns


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=8), st.sampled_from([2, 8, 64]),
       st.randoms(use_true_random=False))
def test_neither_the_scale_of_rates_nor_the_order_of_adding_changes_the_choice(
    weights, scale, random
):
    order = list(range(len(weights)))
    random.shuffle(order)
    plain, other = Runqueue(SLICE), Runqueue(SLICE)
    for slot, weight in enumerate(weights):
        plain.add(slot, weight / 1024)
    for slot in order:
        other.add(slot, weights[slot] * scale / 1024)
    now = None
    for _ in range(200):
        now = plain.pick(now)
        assert other.pick(now) == now
        for queue in (plain, other):
            queue.advance(SLICE)
            queue.charge(now, SLICE)


def test_the_same_seed_gives_the_same_trace():
    def trace(seed):
        tasks = [Task(weight=3), Task(script=[(MS, 7 * MS), (9 * MS, MS)]), Task(cap=0.3)]
        return Bench(tasks, 2, jitter_ns=MS, seed=seed).run(500 * MS).trace

    assert trace(1) == trace(1)
    assert trace(1) != trace(2)


@pytest.mark.parametrize(("call", "says"), [
    (lambda q: q.add(0, 0.5), "remove it first"),
    (lambda q: q.add(1, 0.0), "rate must be positive"),
    (lambda q: q.add(1, float("nan")), "rate must be positive"),
    (lambda q: q.charge(0, -1), "ran_ns must be >= 0"),
    (lambda q: q.charge(9, 1), "not on this run queue"),
    (lambda q: q.advance(-1), "elapsed_ns must be >= 0"),
    (lambda q: q.set_cap(0, -0.1), "cap must be >= 0"),
    (lambda q: q.set_slice(0), "0 < slice_ns"),
])
def test_a_wrong_call_says_what_is_wrong_and_changes_nothing(call, says):
    queue = Runqueue(SLICE)
    queue.add(0, 0.5)
    with pytest.raises(ValueError, match=says):
        call(queue)
    assert list(queue) == [0]
    assert queue.lag_ns(0) == 0


def test_jain_is_one_for_equals_and_one_nth_for_a_monopoly():
    assert jain([3, 3, 3]) == pytest.approx(1.0)
    assert jain([1, 0, 0, 0]) == pytest.approx(0.25)
    assert jain([]) == jain([0.0, 0.0]) == 1.0
