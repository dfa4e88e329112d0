"""Flows from affinity sets to CPUs: what fits, what is crowded, which ways are of use."""

from __future__ import annotations

import pytest

from mixvisor.sched.policy.flow import bits, merge, route, usable


def test_equal_affinity_sets_are_one():
    assert merge([(0b11, 0.5), (0b01, 1.0), (0b11, 0.25)]) == {0b11: 0.75, 0b01: 1.0}
    assert list(bits(0b1010)) == [0b10, 0b1000]


def test_what_fits_is_routed_in_full_past_greedy_mistakes():
    flow = route({0b011: 1.0, 0b110: 1.0, 0b101: 1.0})
    assert flow.total == pytest.approx(3.0)
    assert not flow.crowded
    assert flow.taken == 0


def test_the_minimum_cut_names_who_asks_for_too_much_and_where():
    flow = route({0b001: 1.5, 0b110: 1.0})
    assert flow.total == pytest.approx(2.0)
    assert flow.crowded == {0b001}
    assert flow.taken == 0b001


def test_a_set_keeps_off_cpus_that_others_need_in_full():
    # CPU 0 is taken in full by those who have no other; the flexible set has CPU 1 alone.
    assert usable({0b01: 1.0, 0b11: 0.5}) == {0b01: 0b01, 0b11: 0b10}


def test_a_set_keeps_every_cpu_that_some_solution_uses():
    assert usable({0b01: 0.5, 0b11: 1.5}) == {0b01: 0b01, 0b11: 0b11}
    assert usable({0b01: 0.2, 0b11: 0.2}) == {0b01: 0b01, 0b11: 0b11}
