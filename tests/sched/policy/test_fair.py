"""The fair picker alone and on the bench: shares, lag, caps, sleepers, thieves."""

from __future__ import annotations

from collections import Counter
from functools import partial
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixvisor.sched.policy import Runqueue, jain
from mixvisor.sched.policy.fair import seed_of

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


# -- random order --------------------------------------------------------------------------------

JITTER = SLICE // 2
mixed = st.lists(st.tuples(st.integers(1, 1000), st.sampled_from([0, 1])), min_size=2, max_size=12)


def drawn(seed=7, jitter_ns=JITTER):
    return partial(Runqueue, jitter_ns=jitter_ns, seed=seed)


def order_of(bench):
    return [slot for _, _, slot in bench.trace]


@settings(max_examples=60, deadline=None)
@given(mixed, st.integers(0, MS), st.sampled_from([SLICE // 10, SLICE // 2, SLICE]), st.integers(1, 99))
def test_a_random_order_widens_the_bound_of_the_lag_by_the_jitter_and_no_more(mix, late, jitter_ns, seed):
    bench = Bench([Task(weight=w, mode=m) for w, m in mix], jitter_ns=late, queue=drawn(seed, jitter_ns))
    worst_owed = worst_ahead = 0
    (queue,) = bench.queues
    for _ in range(60):
        bench.run(17 * MS)
        lags = [queue.lag_ns(slot) for slot in queue]
        worst_owed, worst_ahead = max(worst_owed, *lags), max(worst_ahead, *(-lag for lag in lags))
        assert abs(sum(lags)) <= len(lags)
    assert worst_owed <= SLICE + jitter_ns + late + 1
    assert worst_ahead <= SLICE + late + 1
    assert bench.bad_idle == 0
    assert sum(task.ran for task in bench.tasks) == bench.now


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 8), st.integers(1, 99))
def test_among_equals_a_random_order_leaves_the_lag_within_a_slice(count, seed):
    bench = Bench([Task(mode=slot % 2) for slot in range(count)], queue=drawn(seed)).run(1_000 * MS)
    assert bench.worst_local_lag <= SLICE + 1


@settings(max_examples=20, deadline=None)
@given(mixed, st.integers(1, 99))
def test_a_random_order_leaves_the_shares_as_they_are(mix, seed):
    bench = Bench([Task(weight=w, mode=m) for w, m in mix], queue=drawn(seed)).run(10_000 * MS)
    want = [w / sum(w for w, _ in mix) for w, _ in mix]
    assert shares(bench) == pytest.approx(want, abs=0.003)


def test_among_equals_of_both_modes_every_predecessor_is_about_as_frequent():
    bench = Bench([Task(mode=m) for m in (0, 0, 1, 1)], jitter_ns=MS // 20, queue=drawn()).run(30_000 * MS)
    order = [slot for slot in order_of(bench) if slot is not None]
    for slot in range(4):
        before = Counter(a for a, b in pairwise(order) if b == slot and a != slot)
        assert len(before) == 3
        assert min(before.values()) > 0.8 * sum(before.values()) / 3


def test_the_order_of_one_seed_is_the_same_and_of_another_is_not():
    def trace(seed):
        tasks = [Task(weight=w, mode=m) for w, m in ((1, 0), (2, 1), (2, 0), (4, 1))]
        return order_of(Bench(tasks, queue=drawn(seed)).run(1_000 * MS))

    assert trace(1) == trace(1)
    assert trace(1) != trace(2)


def test_where_one_mode_has_the_cpu_nothing_is_drawn():
    def trace(queue):
        return Bench([Task(weight=w, mode=1) for w in (1, 2, 2, 4)], queue=queue).run(1_000 * MS).trace

    assert trace(drawn()) == trace(Runqueue)


def test_draws_begin_when_the_other_mode_wakes_and_end_when_it_sleeps():
    queue = drawn()(SLICE)
    for slot, mode in ((0, 0), (1, 0), (2, 1)):
        queue.add(slot, 1 / 3, mode=mode)
    queue.sleep(2)
    seed = queue._random
    for _ in range(10):
        queue.charge(queue.pick(), SLICE)
    assert queue._random == seed
    queue.wake(2)
    queue.pick()
    assert queue._random != seed


def test_a_change_of_policy_or_slice_begins_with_requests_of_a_slice():
    queue = drawn()(SLICE)
    for slot in range(4):
        queue.add(slot, 0.25, mode=slot % 2)
    for _ in range(20):
        queue.charge(queue.pick(), SLICE)
    other = Runqueue(2 * SLICE)
    other.take_over(queue)
    assert {entry.request_ns for entry in other._awake} == {2 * SLICE}
    other.charge(other.pick(), SLICE)
    assert {entry.request_ns for entry in other._awake} == {2 * SLICE}


def test_the_first_words_of_all_cpus_and_seeds_differ_and_none_is_zero():
    words = {seed_of(seed, cpu) for seed in range(64) for cpu in range(64)}
    assert len(words) == 64 * 64
    assert 0 not in words


@pytest.mark.parametrize(("settings", "says"), [
    ({"jitter_ns": -1}, "jitter_ns must be between"), ({"jitter_ns": SLICE + 1}, "jitter_ns must be between"),
    ({"seed": 0}, "not 0"), ({"seed": 1 << 64}, "64-bit word"),
])
def test_an_impossible_order_is_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        Runqueue(SLICE, **settings)


def test_time_that_a_cap_took_is_told_and_only_while_the_cpu_was_wanted():
    queue = Runqueue(SLICE)
    queue.add(0, 0.5)
    queue.set_cap(0, 0.2)            # a new bucket starts empty
    queue.advance(1 * MS)
    queue.advance(1 * MS)
    assert queue.take_capped_ns(0) == 2 * MS
    assert queue.take_capped_ns(0) == 0
    queue.sleep(0)
    queue.advance(1 * MS)
    assert queue.take_capped_ns(0) == 0
    queue.advance(100 * MS)
    queue.wake(0)
    queue.advance(5 * MS)
    assert queue.take_capped_ns(0) == 0


@given(st.lists(st.tuples(st.integers(1, 1000), st.integers(-SLICE, SLICE)), min_size=2, max_size=8), st.randoms())
def test_lags_can_be_set_anew_in_any_order_and_still_sum_to_zero(vcpus, chance):
    """What a dispatcher does where one vCPU takes the place of another."""
    queue = Runqueue(SLICE)
    for slot, (weight, _lag) in enumerate(vcpus):
        queue.add(slot, weight / 1000)
    for _ in range(2 * len(vcpus)):
        queue.charge(queue.pick(), SLICE)
    more = [(slot, lag - queue.lag_ns(slot)) for slot, (_weight, lag) in enumerate(vcpus)]
    chance.shuffle(more)
    for slot, ns in more:
        queue.owe(slot, ns)
    total, weights = sum(lag for _weight, lag in vcpus), sum(weight for weight, _lag in vcpus)
    for slot, (weight, lag) in enumerate(vcpus):
        assert queue.lag_ns(slot) == pytest.approx(lag - total * weight / weights, abs=2 + len(vcpus))
    assert sum(queue.lag_ns(slot) for slot in range(len(vcpus))) == pytest.approx(0, abs=len(vcpus))


def test_a_sleeper_is_owed_nothing_more():
    queue = Runqueue(SLICE)
    queue.add(0, 0.5)
    queue.add(1, 0.5)
    queue.sleep(0)
    queue.owe(0, SLICE)
    assert queue.lag_ns(0) == 0
    with pytest.raises(ValueError, match="slot 7"):
        queue.owe(7, 1)
