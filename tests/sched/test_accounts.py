"""Figures from records."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixvisor.sched.accounts import CpuAccount, fairness
from mixvisor.sched.selftest import judge
from mixvisor.sched.shared import NOBODY, RECORD_IDLE, SliceRecord


def record(start: int, slot: int, mode: int, run: int, length: int = 10, **more: int) -> SliceRecord:
    values = {"generation": slot + 1, "previous_slot": NOBODY, "others_software_ns": 0,
              "others_hardware_ns": 0, "progress_before": 0, "progress_after": 0,
              "edge_late_ns": 0, "breath_ns": 0, "decision_ns": 1, "flags": 0, **more}
    return SliceRecord(start_ns=start, end_ns=start + length, planned_end_ns=start + length,
                       slot=slot, mode=mode, run_ns=run, **values)


def figures(account: CpuAccount):
    return account.figures(dispatcher_cpu_ns=0, lost_records=0, runnable=(0, 0))


records = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 10), st.booleans()), max_size=30)


@given(records)
def test_residency_adds_up_to_the_time_that_passed(steps: list[tuple[int, int, bool]]) -> None:
    account = CpuAccount(0)
    for number, (slot, run, idle) in enumerate(steps):
        account.fold([record(number * 10, slot, slot % 2, run, flags=RECORD_IDLE * idle)], "fair")
    assert sum(figures(account).residency_ns.values()) == 10 * len(steps)


@given(records)
def test_switches_by_mode_add_up_to_switches(steps: list[tuple[int, int, bool]]) -> None:
    account = CpuAccount(0)
    account.fold((record(n * 10, slot, slot % 2, run) for n, (slot, run, _idle) in enumerate(steps)), "fair")
    shown = figures(account)
    ran = [slot for slot, run, _idle in steps if run]
    expected = sum(1 for a, b in itertools.pairwise(ran) if a != b)
    assert sum(shown.switches.values()) == shown.vm_switches == expected


def test_run_length_ends_with_the_mode_and_not_with_the_slice() -> None:
    account = CpuAccount(0)
    account.fold([record(0, 0, 0, 10), record(10, 2, 0, 10), record(20, 1, 1, 10),
                  record(30, 0, 0, 10)], "fair")
    lengths = figures(account).run_length
    assert (sum(lengths["software"].counts), lengths["software"].sum_ns) == (1, 20)
    assert (sum(lengths["hardware"].counts), lengths["hardware"].sum_ns) == (1, 10)


def test_a_decision_counts_as_that_of_the_policy_that_took_it() -> None:
    account = CpuAccount(0)
    account.fold([record(0, 0, 0, 10), record(10, 1, 1, 10)], "fair")
    account.fold([record(20, 0, 0, 10)], "batch")
    assert {policy: sum(h.counts) for policy, h in figures(account).decision.items()} == {"fair": 2, "batch": 1}


def test_only_lateness_beyond_jitter_counts_as_frozen() -> None:
    account = CpuAccount(0)
    late = record(0, 0, 0, 10)
    account.fold([late._replace(end_ns=late.planned_end_ns + 9_000_000),
                  late._replace(end_ns=late.planned_end_ns + 50_000_000)], "fair")
    assert account.frozen_ns == 50_000_000


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=8), st.integers(1, 50))
def test_jain_is_one_exactly_for_proportional_shares(due: list[int], factor: int) -> None:
    assert fairness([d * factor for d in due], due) == pytest.approx(1.0)


def test_jain_of_one_that_takes_all_is_one_over_n() -> None:
    assert fairness([12, 0, 0], [4, 4, 4]) == pytest.approx(1 / 3)


def test_jain_says_nothing_where_nothing_competes() -> None:
    assert fairness([5], [5]) is None
    assert fairness([0, 0], [1, 1]) is None
    assert fairness([3, 4], [0, 5]) is None


@pytest.mark.parametrize(("shares", "works"), [
    ((0.99, 0.97), True), ((0.5, 0.5), False), ((0.99, 0.01), False), ((), False)])
def test_promotion_must_work_both_ways(shares: tuple[float, ...], works: bool) -> None:
    verdict = judge("gentle", shares)
    assert verdict.works is works
    assert verdict.sentence
