"""What the estimators make of odd recordings, and the arithmetic of intervals."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from mixvisor.metrics.mixing.blocks import estimate_blocks
from mixvisor.metrics.mixing.design import BLOCK_NS, CONDITIONS, SEQUENCES, Roles, rounds, runs
from mixvisor.metrics.mixing.interval import Estimate, combine, trimmed_mean
from mixvisor.metrics.mixing.order import estimate_order
from mixvisor.metrics.mixing.slices import Block, Slices, clean, reuse_distance

from .synthetic import HARDWARE, ROLES, random_blocks, record


def plan(count: int, slices=(1_000_000,), seed=1):
    endless = rounds(slices, 1_000_000, np.random.default_rng(seed))
    return [block for one in itertools.islice(endless, count) for block in one]


def without(recording, **columns):
    return replace(recording, slices=replace(recording.slices, **columns))


def test_an_untrimmed_mean_has_the_interval_of_students_t():
    values = np.random.default_rng(1).normal(3, 2, 9)
    mine = trimmed_mean(values, trim=0.0)
    low, high = stats.t.interval(0.95, 8, loc=values.mean(), scale=stats.sem(values))
    assert mine.bounds() == pytest.approx((low, high))
    assert mine.p_value() == pytest.approx(stats.ttest_1samp(values, 0).pvalue)


def test_a_wild_replicate_moves_a_trimmed_mean_little():
    values = [*np.random.default_rng(1).normal(0, 1, 19), 1e6]
    assert abs(trimmed_mean(values).value) < 1


def test_too_few_replicates_have_no_interval():
    assert trimmed_mean([1.0, 2.0]) is None


def test_a_combination_of_equal_parts_is_their_mean_with_a_smaller_error():
    one = Estimate(2.0, 1.0, 10, 11)
    both = combine([(0.5, one), (0.5, one)])
    assert both.value == 2.0
    assert both.error == pytest.approx(1 / np.sqrt(2))
    assert both.df == pytest.approx(20)


def test_every_transition_is_estimated():
    found = estimate_order(record(1, random_blocks(40), cross_us=(40.0, 10.0), switch_us=30.0))
    lost = {key: one.value / 1e3 for key, one in found.transitions.items()}
    assert lost["hardware", "hardware"] == pytest.approx(30, abs=4)
    assert lost["hardware", "software"] == pytest.approx(70, abs=4)
    assert lost["software", "software"] == pytest.approx(30, abs=4)
    assert lost["software", "hardware"] == pytest.approx(40, abs=4)


def test_an_order_in_which_no_vm_follows_itself_still_tells_the_cost():
    recording = record(1, random_blocks(40), cross_us=20.0)
    moved = recording.slices.vm != recording.slices.previous
    slices = recording.slices.take(moved)
    # What is left follows on without gaps.
    slices = replace(slices, start_ns=np.concatenate([[0], slices.end_ns[:-1]]))
    found = estimate_order(replace(recording, slices=slices))
    assert found.transitions is None
    assert found.cost.value / 1e3 == pytest.approx(20, abs=3)


def test_one_mode_alone_has_no_estimate():
    recording = record(1, random_blocks(20))
    keep = HARDWARE[recording.slices.vm]
    assert estimate_order(replace(recording, slices=recording.slices.take(keep))) is None


def test_too_few_blocks_have_no_estimate():
    assert estimate_order(record(1, random_blocks(4))) is None
    assert estimate_blocks(record(1, [b for b in plan(2) if b.kind != "random"])) is None


def test_an_empty_recording_has_no_estimate():
    empty = replace(record(1, random_blocks(8)), slices=Slices.from_rows([]))
    assert estimate_order(empty) is None
    assert estimate_blocks(empty) is None


def test_half_a_replicate_is_left_out():
    blocks = [b for b in plan(5) if b.kind != "random"]
    whole, cut = record(1, blocks), record(1, blocks[:-1])
    cut = replace(cut, blocks=tuple(blocks))
    assert estimate_blocks(whole).replicates == 5
    assert estimate_blocks(cut).replicates == 4


def test_losing_single_slices_loses_no_replicate():
    blocks = [b for b in plan(5) if b.kind != "random"]
    recording = record(1, blocks, cross_us=20.0)
    keep = np.random.default_rng(1).random(len(recording.slices)) > 0.05
    found = estimate_blocks(replace(recording, slices=recording.slices.take(keep)))
    assert found.replicates == 5
    assert found.cost.includes(20e3, 0.999)


def test_a_slice_is_clean_only_if_nothing_but_the_order_can_have_changed_it():
    recording = record(1, random_blocks(8))
    at = int(np.flatnonzero(clean(recording.slices))[50])

    def still(name, value):
        column = getattr(recording.slices, name).copy()
        column[at] = value
        return bool(clean(without(recording, **{name: column}).slices)[at])

    assert still("run_ns", 1_000_000)
    assert not still("run_ns", 500_000)
    assert not still("run_ns", 2_000_000)
    assert not still("others_ns", 100_000)
    assert not still("breath_ns", 1)
    assert not still("progress", 0)
    assert not still("vm", -1)
    assert not still("block", 0)


def test_the_first_slice_after_a_breath_is_not_clean_except_of_the_vm_that_ran_on():
    recording = record(1, random_blocks(8))
    slices = replace(recording.slices, breath_ns=np.zeros_like(recording.slices.breath_ns))
    slices.breath_ns[100] = 1_000_000
    good = clean(slices)
    for vm in range(4):
        later = next(at for at in np.flatnonzero(slices.vm == vm) if at > 100)
        if vm != slices.vm[100]:
            assert not good[later]


def test_reuse_distance_ends_at_a_gap():
    recording = record(1, [Block(1, "mixed", 1, 1_000_000)])
    whole = reuse_distance(recording.slices)
    assert set(whole[:2]) == {-1}
    keep = np.ones(len(whole), dtype=bool)
    keep[50] = False
    cut = reuse_distance(recording.slices.take(keep))
    assert list(cut[50:52]) == [-1, -1]
    assert set(cut[52:60]) == {2}


def test_conditions_are_matched_for_reuse_distance_and_number_of_switches():
    for kind in ("mixed", "mixed-swapped", "batched", "batched-swapped"):
        cycles = SEQUENCES[kind](ROLES)
        assert sorted(vm for cycle in cycles for vm in cycle) == [0, 1, 2, 3]
        assert {len(cycle) for cycle in cycles} == {2}
        for first, second in cycles:
            assert (HARDWARE[first] != HARDWARE[second]) is np.bool_(kind.startswith("mixed"))


def test_a_replicate_is_mirrored():
    blocks = [b.kind for b in plan(1) if b.kind != "random"]
    assert blocks == blocks[::-1]
    assert set(blocks) == set(CONDITIONS)


def test_every_block_gives_every_vm_the_same_time():
    for kind in (*CONDITIONS, "random"):
        parts = runs(Block(1, kind, 1, 1_000_000), Roles((0, 1), (2, 3)), np.random.default_rng(1))
        count = np.bincount([vm for part in parts for vm in part.cycle * part.times], minlength=4)
        assert count.sum() == pytest.approx(BLOCK_NS / 1e6, abs=4)
        if kind != "random":
            assert len(set(count.tolist())) == 1
