"""The partition alone: who gets which cores, when the border moves, and what affinity does to it."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mixvisor.sched.model import VmDemand
from mixvisor.sched.policy import Partition, Tenant, cores_of, entitle

S = 1_000_000_000
MODES = ("software", "hardware")


def single(count):
    return tuple(frozenset({cpu}) for cpu in range(count))


def tenant(vm, mode, demand=1.0, cpus=range(64), **more):
    return Tenant(vm=vm, mode=mode, demand=demand, cpus=frozenset(cpus), **more)


@st.composite
def populations(draw):
    cores = draw(st.integers(1, 6))
    threads = draw(st.sampled_from([1, 2]))
    cpus = range(cores * threads)
    some = st.one_of(st.just(frozenset(cpus)), st.frozensets(st.sampled_from(list(cpus)), min_size=1))
    tenants = [
        Tenant(vm=f"vm{n}", mode=draw(st.sampled_from(MODES)), cpus=draw(some), demand=draw(st.floats(0, 2)),
               reservation=draw(st.sampled_from([0.0, 0.0, 0.5])))
        for n in range(draw(st.integers(0, 7)))]
    return tuple(frozenset(range(c * threads, (c + 1) * threads)) for c in range(cores)), tenants


@settings(max_examples=200, deadline=None, derandomize=True)
@given(populations(), st.integers(0, 5 * S))
@example((single(2), [tenant("a", "software", cpus=[1]), tenant("b", "hardware", cpus=[0, 1])]), 0)
@example((single(2), [tenant("a", "software", cpus=[0]), tenant("b", "hardware", cpus=[0])]), 0)
def test_everyone_has_a_cpu_of_its_own_and_modes_meet_only_where_it_says_so(population, elapsed):
    cores, tenants = population
    partition = Partition(cores)
    for _ in range(2):
        split = partition.update(tenants, elapsed)
        used = {t.vm: split.confine(t.vm, t.mode, t.cpus) for t in tenants}
        for t in tenants:
            assert used[t.vm]
            assert used[t.vm] <= t.cpus
        for a in tenants:
            for b in tenants:
                if a.mode != b.mode and not {a.vm, b.vm} & set(split.meeting):
                    for core in cores:
                        assert not (core & used[a.vm] and core & used[b.vm])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(populations(), st.randoms(use_true_random=False))
def test_the_order_of_the_vms_does_not_matter_and_the_same_again_changes_nothing(population, random):
    cores, tenants = population
    shuffled = random.sample(tenants, len(tenants))
    one, other = Partition(cores), Partition(cores)
    first = one.update(tenants, 0)
    assert other.update(shuffled, 0) == first
    for _ in range(5):
        assert one.update(tenants, S) == first


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(2, 12), st.floats(0.05, 20), st.floats(0.05, 20))
def test_cores_follow_demand_to_within_one_and_no_mode_is_left_without(count, software, hardware):
    split = Partition(single(count)).update([tenant("s", "software", software), tenant("h", "hardware", hardware)], 0)
    got = len(split.cpus["software"])
    wish = count * software / (software + hardware)
    assert got == pytest.approx(min(max(wish, 1), count - 1), abs=0.5 + 1e-9)
    assert got + len(split.cpus["hardware"]) == count


def test_demand_that_rests_on_a_border_moves_nobody_to_and_fro():
    partition = Partition(single(4))
    seen = set()
    for turn in range(200):
        software = 1.5 + (0.2 if turn % 2 else -0.2)
        split = partition.update([tenant("s", "software", software), tenant("h", "hardware", 4 - software)], S)
        seen.add(split.cpus["software"])
    assert len(seen) == 1


def test_a_lasting_change_of_demand_moves_the_border_one_core_at_a_time_and_only_there():
    partition = Partition(single(8))
    border = [len(partition.update([tenant("s", "software", 4), tenant("h", "hardware", 4)], 0).cpus["software"])]
    for _ in range(100):
        split = partition.update([tenant("s", "software", 7), tenant("h", "hardware", 1)], S // 10)
        border.append(len(split.cpus["software"]))
        assert split.cpus["software"] == frozenset(range(border[-1]))
    assert border[0] == 4
    assert border[-1] == 7
    assert all(b - a in (0, 1) for a, b in pairwise(border))


def test_a_mode_that_only_sleeps_keeps_one_core():
    partition = Partition(single(4))
    for _ in range(50):
        split = partition.update([tenant("s", "software", 4.0), tenant("h", "hardware", 0.0)], S)
    assert split.cpus["hardware"] == {3}


def test_one_mode_alone_has_all_cpus():
    split = Partition(single(3)).update([tenant("a", "hardware"), tenant("b", "hardware", 0.0)], 0)
    assert split.cpus == {"hardware": frozenset({0, 1, 2})}
    assert split.meeting == ()


def test_on_one_core_the_modes_meet_and_everyone_may_use_it():
    split = Partition([frozenset({2, 3})]).update([tenant("a", "software"), tenant("b", "hardware")], 0)
    assert split.meeting == ("a", "b")
    assert split.confine("a", "software", frozenset({3})) == {3}


def test_smt_siblings_stay_together():
    siblings = {cpu: frozenset({cpu, cpu ^ 4}) for cpu in range(8)}
    cores = cores_of(range(8), siblings)
    assert cores == tuple(frozenset({cpu, cpu + 4}) for cpu in range(4))
    split = Partition(cores).update([tenant("s", "software", 4), tenant("h", "hardware", 4)], 0)
    assert split.cpus["hardware"] == {2, 3, 6, 7}
    # A CPU that VMs may not use is no part of a core, one without known siblings is a core.
    assert cores_of([1, 5, 6, 9], siblings) == (frozenset({1, 5}), frozenset({6}), frozenset({9}))


def test_cores_behind_one_cache_stand_side_by_side_so_at_most_one_cache_serves_both_modes():
    siblings = {cpu: frozenset({cpu, cpu ^ 4}) for cpu in range(8)}
    caches = {cpu: frozenset(range(cpu % 2, 8, 2)) for cpu in range(8)}       # CPUs numbered in turn over the sockets
    cores = cores_of(range(8), siblings, caches)
    assert cores == (frozenset({0, 4}), frozenset({2, 6}), frozenset({1, 5}), frozenset({3, 7}))
    split = Partition(cores).update([tenant("s", "software", 4), tenant("h", "hardware", 4)], 0)
    assert (split.cpus["software"], split.cpus["hardware"]) == ({0, 2, 4, 6}, {1, 3, 5, 7})


def test_a_core_changes_sides_for_a_vm_that_can_run_nowhere_else():
    tenants = [tenant("s", "software", 3), tenant("pinned", "hardware", 1, cpus=[0])]
    split = Partition(single(4)).update(tenants, 0)
    assert 0 in split.cpus["hardware"]
    assert split.confine("pinned", "hardware", frozenset({0})) == {0}
    assert split.meeting == ()


def test_vms_of_both_modes_pinned_to_one_core_meet_there_and_are_named():
    tenants = [tenant("s", "software", 1, cpus=[1]), tenant("h", "hardware", 1, cpus=[1]), tenant("t", "hardware", 1)]
    split = Partition(single(3)).update(tenants, 0)
    assert len(split.meeting) == 1
    assert split.confine(split.meeting[0], "software", frozenset({1})) == {1}


def test_reservations_of_a_mode_get_the_cores_they_need():
    tenants = [tenant("s", "software", 3.5), tenant("h", "hardware", 0.5, reservation=1.6)]
    split = Partition(single(4)).update(tenants, 0)
    assert len(split.cpus["hardware"]) == 2
    impossible = [tenant("s", "software", 1, reservation=1.5), tenant("h", "hardware", 1, reservation=1.5)]
    split = Partition(single(3)).update(impossible, 0)
    assert {len(cpus) for cpus in split.cpus.values()} == {1, 2}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(populations())
def test_within_a_mode_weights_hold_on_its_cores(population):
    cores, tenants = population
    split = Partition(cores).update(tenants, 0)
    shares = entitle(
        [VmDemand(vm=t.vm, weight=100, vcpus=1, cpus=split.confine(t.vm, t.mode, t.cpus)) for t in tenants],
        sorted(frozenset().union(*cores)))
    assert all(share > 0 for share in shares.values())


@pytest.mark.parametrize(("call", "says"), [
    (lambda: Partition([]), "at least one core"),
    (lambda: Partition(single(2)).update([], -1), "elapsed_ns must be >= 0"),
])
def test_a_wrong_call_says_what_is_wrong(call, says):
    with pytest.raises(ValueError, match=says):
        call()
