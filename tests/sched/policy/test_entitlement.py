"""Entitlements: the invariants of weighted max-min shares, with and without affinity."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixvisor.sched.model import VmDemand
from mixvisor.sched.policy import admit, entitle

NEAR = 1e-6


def demand(vm, weight=100, vcpus=1, cpus=range(2), cap=0.0, reservation=0.0):
    return VmDemand(vm=vm, weight=weight, vcpus=vcpus, cpus=frozenset(cpus), cap=cap,
                    reservation=reservation)


@st.composite
def mixes(draw, *, affinity=True, bounds=True):
    cpus = range(draw(st.integers(1, 4)))
    sets = st.frozensets(st.sampled_from(cpus), min_size=1) if affinity else st.just(cpus)
    caps = st.sampled_from([0.0, 0.0, 0.3, 1.0, 1.5]) if bounds else st.just(0.0)
    return [
        demand(f"vm{number}", draw(st.integers(1, 10_000)), draw(st.integers(0, 3)),
               draw(sets), draw(caps))
        for number in range(draw(st.integers(1, 7)))
    ], list(cpus)


def upper(d, cpus):
    bound = min(d.vcpus, len(d.cpus & set(cpus)))
    return min(bound, d.cap) if d.cap else bound


def most(demands, cpus):
    """The greatest total that fits, by brute force over Hall's sets."""
    return min(
        sum(upper(d, cpus) for d in demands if d not in chosen)
        + len(frozenset().union(*(d.cpus for d in chosen)) & set(cpus))
        for size in range(len(demands) + 1) for chosen in combinations(demands, size)
    )


def test_weights_one_two_four_eight_share_one_cpu_in_proportion():
    shares = entitle([demand(str(w), w, cpus=[0]) for w in (1, 2, 4, 8)], [0])
    assert shares == pytest.approx({"1": 1 / 15, "2": 2 / 15, "4": 4 / 15, "8": 8 / 15})


def test_a_weight_that_asks_for_more_than_its_vcpus_is_readjusted():
    shares = entitle([demand("a", 10_000), demand("b"), demand("c")], [0, 1])
    assert shares == pytest.approx({"a": 1.0, "b": 0.5, "c": 0.5})


def test_a_pinned_pair_leaves_the_other_cpu_to_who_may_use_it():
    shares = entitle([demand("a", cpus=[0]), demand("b", cpus=[0]), demand("c")], [0, 1])
    assert shares == pytest.approx({"a": 0.5, "b": 0.5, "c": 1.0})


def test_a_reservation_lifts_a_light_vm_and_the_others_keep_their_proportion():
    shares = entitle([demand("a", 1, cpus=[0], reservation=0.4), demand("b", 100, cpus=[0]),
                      demand("c", 200, cpus=[0])], [0])
    assert shares == pytest.approx({"a": 0.4, "b": 0.2, "c": 0.4})


def test_reservations_that_no_longer_fit_are_met_in_proportion():
    shares = entitle([demand("a", reservation=0.9), demand("b", reservation=0.6)], [0])
    assert shares == pytest.approx({"a": 0.6, "b": 0.4}, abs=NEAR)


def test_sleeping_vms_and_vms_without_a_cpu_get_nothing():
    shares = entitle([demand("a", vcpus=0), demand("b", cpus=[7]), demand("c")], [0])
    assert shares == {"a": 0.0, "b": 0.0, "c": 1.0}


def test_two_demands_of_one_name_are_refused():
    with pytest.raises(ValueError, match="same VM name"):
        entitle([demand("a"), demand("a")], [0])


@given(mixes())
def test_all_that_can_be_used_is_given_and_nothing_more(mix):
    demands, cpus = mix
    shares = entitle(demands, cpus)
    assert sum(shares.values()) == pytest.approx(most(demands, cpus), abs=NEAR)
    for d in demands:
        assert -NEAR <= shares[d.vm] <= upper(d, cpus) + NEAR


@given(mixes())
def test_no_set_of_vms_gets_more_than_the_cpus_it_reaches(mix):
    demands, cpus = mix
    shares = entitle(demands, cpus)
    for size in range(1, len(demands) + 1):
        for chosen in combinations(demands, size):
            reached = frozenset().union(*(d.cpus for d in chosen)) & set(cpus)
            assert sum(shares[d.vm] for d in chosen) <= len(reached) + NEAR


@given(mixes())
def test_nobody_can_be_raised_without_lowering_one_that_has_less_per_weight(mix):
    """Max-min itself: whoever is below its bound is in a full set where none has a better level."""
    demands, cpus = mix
    shares = entitle(demands, cpus)
    for d in demands:
        if shares[d.vm] >= upper(d, cpus) - NEAR:
            continue
        level = shares[d.vm] / d.weight
        lower = [o for o in demands if shares[o.vm] / o.weight <= level * (1 + 1e-6) + 1e-12]
        # d and those not better off already fill the CPUs of some set that contains d.
        assert any(
            sum(shares[o.vm] for o in (d, *chosen))
            >= len(frozenset().union(d.cpus, *(o.cpus for o in chosen)) & set(cpus)) - NEAR
            for size in range(len(lower)) for chosen in combinations([o for o in lower if o != d],
                                                                     size)
        )


@given(mixes(), st.data())
def test_more_weight_never_means_less(mix, data):
    demands, cpus = mix
    at = data.draw(st.integers(0, len(demands) - 1))
    d = demands[at]
    heavier = demand(d.vm, d.weight * 2, d.vcpus, d.cpus, d.cap)
    before = entitle(demands, cpus)[d.vm]
    assert entitle([*demands[:at], heavier, *demands[at + 1:]], cpus)[d.vm] >= before - NEAR


@given(mixes(), st.randoms(use_true_random=False))
def test_neither_the_unit_of_weight_nor_the_order_matters(mix, random):
    demands, cpus = mix
    want = entitle(demands, cpus)
    other = [demand(d.vm, d.weight * 7, d.vcpus, d.cpus, d.cap) for d in demands]
    random.shuffle(other)
    assert entitle(other, cpus) == pytest.approx(want, abs=NEAR)


@settings(max_examples=50)
@given(mixes(affinity=False), st.lists(st.floats(0.0, 1.0), min_size=7, max_size=7))
def test_admitted_reservations_are_kept(mix, reservations):
    demands, cpus = mix
    demands = [
        demand(d.vm, d.weight, d.vcpus, d.cpus, d.cap, round(r, 3))
        for d, r in zip(demands, reservations, strict=False)
    ]
    if admit(demands, cpus) is None:
        shares = entitle(demands, cpus)
        for d in demands:
            assert shares[d.vm] >= d.reservation - NEAR


def test_a_refusal_names_the_vms_the_cpus_and_the_figures():
    sentence = admit([demand("a", cpus=[0], reservation=0.7),
                      demand("b", cpus=[0], reservation=0.7), demand("c")], [0, 1])
    assert sentence is not None
    assert "'a', 'b' together reserve 140 %" in sentence
    assert "'c'" not in sentence
    assert "have 100 %" in sentence


def test_a_reservation_above_the_cap_is_refused():
    assert "at most 50 %" in (admit([demand("a", cap=0.5, reservation=0.6)], [0, 1]) or "")


def test_a_vm_whose_cpus_are_not_the_schedulers_is_refused():
    assert "none of them" in (admit([demand("a", cpus=[5])], [0, 1]) or "")
