"""Weights as nice levels: the nearest there is, and how far off that may be."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixvisor.sched.policy.kernel import NICE_MAX, NICE_MIN, nice_of, weight_of


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(1, 10_000))
def test_no_other_level_is_nearer_and_between_the_ends_it_is_at_most_an_eighth_off(weight):
    nice = nice_of(weight)
    assert NICE_MIN <= nice <= NICE_MAX
    ratio = weight_of(nice) / weight
    if weight_of(NICE_MAX) <= weight <= weight_of(NICE_MIN):
        assert 1 / 1.13 <= ratio <= 1.13


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 10_000), st.integers(1, 10_000))
def test_more_weight_never_means_a_worse_level(one, other):
    low, high = sorted((one, other))
    assert nice_of(high) <= nice_of(low)


def test_the_default_weight_is_nice_0_and_the_ends_are_the_kernels():
    assert nice_of(100) == 0
    assert nice_of(10_000) == NICE_MIN
    assert nice_of(1) == NICE_MAX
    assert weight_of(0) == 100


def test_a_weight_that_is_none_is_refused():
    with pytest.raises(ValueError, match="must be positive"):
        nice_of(0)
