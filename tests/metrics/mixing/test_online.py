"""The online estimate: planted costs are found with the stated coverage, none where none is; odd data tell nothing."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from scipy import stats

from mixvisor.metrics.mixing import online
from mixvisor.metrics.mixing.online import FIELDS, Online, student_t
from mixvisor.metrics.mixing.order import estimate_order
from mixvisor.sched.policy import Runqueue
from mixvisor.sched.shared import RECORD_ENTRY_SHIFT, SliceRecord

from .synthetic import random_blocks, record
from .test_null import PLANTED_US, enough

SEEDS = 40
MS = 1_000_000


def rows(recording, *, first_generation=1):
    """A recording's slices as a dispatcher would have logged them."""
    s, hardware = recording.slices, recording.modes()
    counters = dict.fromkeys(range(len(recording.vms)), 1)
    found = []
    for at in range(len(s)):
        vm, before = int(s.vm[at]), counters[int(s.vm[at])]
        after = counters[vm] = before + int(s.progress[at])
        found.append(SliceRecord(
            start_ns=int(s.start_ns[at]), end_ns=int(s.end_ns[at]),
            planned_end_ns=int(s.start_ns[at] + s.planned_ns[at]), slot=vm, generation=vm + first_generation,
            previous_slot=int(s.previous[at]), mode=int(hardware[vm]),
            run_ns=int(s.run_ns[at]), others_software_ns=int(s.others_ns[at]), others_hardware_ns=0,
            progress_before=before, progress_after=after, edge_late_ns=0, breath_ns=int(s.breath_ns[at]), decision_ns=0,
            flags=0))
    return found


def fed(records, slice_ns=MS, cpu=1):
    estimator = Online()
    estimator.reset(slice_ns)
    for at in range(0, len(records), 300):
        estimator.feed(cpu, records[at:at + 300])
    return estimator


def estimated(records, slice_ns=MS):
    return fed(records, slice_ns).estimate(records[-1].end_ns)


@cache
def planted(cost_us):
    """Hardware victims pay half more than the mean, software victims half less."""
    return [estimated(rows(record(seed + 1000 * cost_us, random_blocks(24), cross_us=(1.5 * cost_us, 0.5 * cost_us))))
            for seed in range(SEEDS)]


@pytest.mark.parametrize("cost_us", PLANTED_US)
def test_a_planted_cost_is_recovered_with_the_stated_coverage(cost_us):
    found = planted(cost_us)
    assert enough(sum(one.cost.includes(1e3 * cost_us) for one in found), SEEDS)
    assert abs(np.mean([one.cost.value for one in found]) - 1e3 * cost_us) < 3 * 1100 / 2 / SEEDS ** 0.5
    assert np.mean([one.cost.half_width() for one in found]) < 1200
    for mode, factor in (("hardware", 1.5), ("software", 0.5)):
        assert enough(sum(one.by_victim[mode].includes(1e3 * cost_us * factor) for one in found), SEEDS)


@pytest.mark.parametrize("cost_us", PLANTED_US)
def test_the_null_holds_whatever_a_crossing_costs(cost_us):
    assert enough(sum(one.null.includes(0.0) for one in planted(cost_us)), SEEDS)


def test_it_agrees_with_the_estimator_of_a_measurement_on_demand():
    for seed in range(8):
        recording = record(seed, random_blocks(24), cross_us=20.0)
        one, other = estimated(rows(recording)).cost, estimate_order(recording).cost
        assert abs(one.value - other.value) < one.half_width(0.99)
        assert one.half_width() == pytest.approx(other.half_width(), rel=0.5)


def test_a_difference_in_reuse_distance_alone_is_not_taken_for_a_cost_of_crossing():
    found = [estimated(rows(record(seed, random_blocks(24), refill_us=60.0))) for seed in range(20)]
    assert enough(sum(one.cost.includes(0.0) for one in found), 20)
    assert all(one.refill.value > 100_000 for one in found)


def test_a_favoured_predecessor_breaks_the_null():
    found = [estimated(rows(record(seed, random_blocks(24), favour_us=20.0))) for seed in range(5)]
    assert all(not null.includes(0.0, 0.99) for one in found for null in one.nulls.values())


def test_longer_slices_need_longer_and_find_the_same():
    one = estimated(rows(record(3, random_blocks(160, 5 * MS), cross_us=20.0, noise=0.005)), 5 * MS)
    assert one.cost.includes(20e3, 0.999)


def test_a_fixed_order_tells_nothing():
    recording = record(1, random_blocks(16))
    order = np.tile([0, 2, 1, 3], len(recording.slices))[:len(recording.slices)]
    recording.slices.vm[:] = order
    assert estimated(rows(recording)).cost is None


def test_one_vm_of_each_mode_tells_no_cost_for_every_switch_crosses():
    recording = record(1, random_blocks(40))
    recording.slices.vm[:] = np.where(recording.slices.vm < 2, 0, 2)
    found = estimated(rows(recording))
    assert found.cost is None
    assert found.by_victim == {}
    assert found.blocks > 20


def test_two_of_a_mode_beside_one_tell_what_the_two_lose():
    recording = record(1, random_blocks(40), cross_us=(30.0, 10.0))
    keep = recording.slices.vm < 3
    slices = recording.slices.take(keep)
    slices.start_ns[:] = np.concatenate([[0], slices.end_ns[:-1]])
    found = estimated(rows(type(recording)(
        vms=recording.vms, blocks=recording.blocks, slices=slices, about=recording.about)))
    assert found.cost is None
    assert set(found.by_victim) == {"hardware"}


def test_one_mode_alone_tells_nothing_and_keeps_its_blocks():
    records = [one._replace(mode=0) for one in rows(record(1, random_blocks(16)))]
    found = estimated(records)
    assert found.by_victim == {}
    assert found.slices == 0


def test_slices_of_a_script_are_left_out():
    records = [one._replace(flags=1 << RECORD_ENTRY_SHIFT) for one in rows(record(1, random_blocks(16)))]
    assert estimated(records).offered == 0
    assert 1 << RECORD_ENTRY_SHIFT == online.SCRIPTED


def test_a_guest_without_a_counter_is_not_seen():
    records = [one._replace(progress_before=0, progress_after=0) for one in rows(record(1, random_blocks(16)))]
    found = estimated(records)
    assert found.slices == 0
    assert found.measured_vms == {"software": 0, "hardware": 0}
    assert found.crossing_rate["hardware"] > 100


def test_a_vm_that_changes_its_mode_is_another_one_from_then_on():
    before, after = rows(record(1, random_blocks(24), cross_us=20.0)), rows(record(2, random_blocks(24), cross_us=20.0))
    shift = before[-1].end_ns
    # All change places: what was software is hardware, at the pace that it then has.
    after = [one._replace(generation=(one.generation + 1) % 4 + 1, start_ns=one.start_ns + shift,
                          end_ns=one.end_ns + shift, planned_end_ns=one.planned_end_ns + shift) for one in after]
    found = estimated(before + after)
    assert found.cost.includes(20e3, 0.999)
    assert found.measured_vms == {"software": 4, "hardware": 4}


def test_lost_records_cost_slices_and_no_truth():
    records = rows(record(1, random_blocks(30), cross_us=20.0))
    keep = np.random.default_rng(1).random(len(records)) > 0.05
    found = estimated([one for one, kept in zip(records, keep, strict=True) if kept])
    assert found.cost.includes(20e3, 0.999)


def test_memory_is_bounded_whatever_comes_and_goes():
    estimator = Online()
    estimator.reset(MS)
    for batch in range(30):
        records = rows(record(batch, random_blocks(4)), first_generation=1 + 4 * batch)
        shift = batch * 10**12
        estimator.feed(batch % 3, [one._replace(start_ns=one.start_ns + shift, end_ns=one.end_ns + shift,
                                                planned_end_ns=one.planned_end_ns + shift) for one in records])
    estimator.estimate(30 * 10**12)
    assert len(estimator._kept) <= online.KEEP
    assert not any(block.raw for block in estimator._kept)
    assert len(estimator._vms) <= 16         # of the last hour
    assert all(len(track.seen) <= 8 for track in estimator._tracks.values())


def test_crossings_are_counted_for_each_vm_and_taken_once():
    records = rows(record(1, random_blocks(4)))
    estimator = fed(records)
    expected: dict[tuple[int, str], int] = {}
    for before, after in pairwise(records):
        if before.mode != after.mode and after.start_ns == before.end_ns:
            vm = after.generation, online.MODES[after.mode]
            expected[vm] = expected.get(vm, 0) + 1
    assert estimator.take_crossings() == expected
    assert estimator.take_crossings() == {}


def test_a_slice_has_the_fields_that_the_dispatcher_writes():
    assert SliceRecord._fields == FIELDS


@pytest.mark.parametrize("df", [11, 30, 200, 2000])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_the_quantile_of_students_t_is_that_of_scipy(df, confidence):
    assert student_t(df, confidence) == pytest.approx(stats.t.ppf(0.5 + confidence / 2, df), rel=0.002)


def by_policy(seed, cost_ns, slices=6_000):
    """Slices in the order that the run queue makes of them: what was cut short comes first in the next round, breaths
    come like clockwork, modes overrun by different amounts, and the host has moods.
    """
    rng = np.random.default_rng(seed)
    queue = Runqueue(MS, 0, jitter_ns=MS // 2, seed=seed + 1)
    for slot in range(4):
        queue.add(slot, 0.25, mode=slot % 2)
    rates, progress, stopped = (1400.0, 10_000.0, 1410.0, 10_100.0), [1] * 4, [False] * 4      # a us
    now, mood, current, records = 0, 0.0, None, []
    for at in range(slices):
        before, current = current, queue.pick(current)
        mode = current % 2
        breath = MS if at % 20 >= 18 else 0
        mood = 0.95 * mood + rng.normal(0, 0.01)
        stolen = rng.exponential(300_000) if rng.random() < 0.02 else 0.0
        run = max(200_000, int(MS + 8000 * mode + rng.exponential(10_000) - stolen))
        lost = 40_000 * (1 + mode) if stopped[current] else 0
        if before is not None and before != current:
            # Stopped in a breath, it pays by who ran before: no cost of a crossing.
            lost += 50_000 if stopped[current] and before % 2 != mode else 0
            lost += 30_000 + (cost_ns if before % 2 != mode else 0)
        gained = int(rates[current] / 1000 * (1 + mood) * (1 + rng.normal(0, 0.015)) * (run - lost))
        end = now + run + int(stolen)
        records.append(SliceRecord(
            start_ns=now, end_ns=end, planned_end_ns=now + MS, slot=current, generation=current + 1, previous_slot=0,
            mode=mode, run_ns=run, others_software_ns=0, others_hardware_ns=0, progress_before=progress[current],
            progress_after=progress[current] + gained, edge_late_ns=0, breath_ns=breath, decision_ns=0, flags=0))
        progress[current] += gained
        stopped = [slot != current for slot in range(4)] if breath else [
            was and slot != current for slot, was in enumerate(stopped)]
        queue.advance(end - now)
        queue.charge(current, run)
        now = end
    return records


@pytest.mark.parametrize("cost_us", [0, 20])
def test_in_the_order_that_the_policy_makes_a_planted_cost_is_found_and_none_where_none_is(cost_us):
    found = [estimated(by_policy(seed, 1000 * cost_us)) for seed in range(6)]
    assert enough(sum(one.cost.includes(1e3 * cost_us) for one in found), 6)
    assert abs(np.mean([one.cost.value for one in found]) - 1e3 * cost_us) < 1500
    assert all(one.slices > 0.5 * one.offered for one in found)
