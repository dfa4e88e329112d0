"""The simulated host and what is found on it: conservation, determinism, and what theory says must come out."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixvisor.config.scenario import Scenario
from mixvisor.sched.policy import POLICIES
from mixvisor.sched.simulate import PolicyResult, ScenarioRefused, Simulation

MODES = ("software", "hardware")
EXACT = {"dispatcher_us": 0, "late_us": 0}


def scenario(
    vms: list[dict[str, Any]], cpus: int = 1, seed: int = 1, scheduler: dict[str, Any] | None = None, **costs: int,
) -> Scenario:
    return Scenario.model_validate({
        "simulation": {"seed": seed}, "host": {"cpus": cpus}, "costs": costs, "scheduler": scheduler or {},
        "vm": [{"name": f"vm{number}", **vm} for number, vm in enumerate(vms)]})


def simulated(scenario: Scenario, policy: str = "fair", seconds: float = 1.0, **more: Any) -> PolicyResult:
    simulation = Simulation(scenario, policy, **more)
    try:
        return simulation.run(seconds).result()
    finally:
        simulation.close()


VM = st.fixed_dictionaries({
    "mode": st.sampled_from(["software", "hardware"]), "weight": st.integers(1, 1000),
    "behaviour": st.sampled_from(["busy", "busy", "interactive", "bursty", "io"]),
    "cap": st.sampled_from([0, 0, 0, 30]), "count": st.integers(1, 3)})


@given(st.lists(VM, min_size=1, max_size=5), st.integers(1, 4), st.sampled_from(sorted(POLICIES)), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_time_is_conserved_and_a_seed_decides_everything(
    vms: list[dict[str, Any]], cpus: int, policy: str, seed: int,
) -> None:
    one = simulated(scenario(vms, cpus, seed), policy, 0.4)
    assert one == simulated(scenario(vms, cpus, seed), policy, 0.4)
    total = one.delivered + one.idle + one.dispatching
    # The last decision of each CPU may lie partly behind the end.
    assert total == pytest.approx(1.0, abs=0.001)
    assert sum(one.mode_residency.values()) == pytest.approx(one.delivered, abs=1e-9)
    assert one.delivered == pytest.approx(sum(g.received * g.count for g in one.groups) / cpus, abs=1e-6)
    assert one.mode_switches_per_s <= one.vm_switches_per_s


@given(st.lists(st.integers(1, 20), min_size=2, max_size=6))
@settings(max_examples=15, deadline=None)
def test_shares_follow_weights_to_a_slice(weights: list[int]) -> None:
    found = simulated(scenario([{"weight": weight} for weight in weights], **EXACT), seconds=2.0)
    assert found.lag_most_ns is not None
    assert found.lag_most_ns <= 2 * 5_000_000
    for group, weight in zip(found.groups, weights, strict=True):
        assert group.received == pytest.approx(weight / sum(weights), abs=0.005)
        assert group.due == pytest.approx(weight / sum(weights), abs=1e-6)


def test_a_random_order_changes_who_comes_when_and_no_share() -> None:
    def run(**scheduler: int) -> PolicyResult:
        mix = [{"mode": "software", "count": 2}, {"mode": "hardware", "count": 2}]
        return simulated(scenario(mix, scheduler=scheduler, **EXACT), seconds=4.0)

    fixed, one, again, other = run(random_order=0), run(), run(random_seed=1), run(random_seed=2)
    assert one == again != other
    assert one != fixed
    for found in (fixed, one, other):
        assert found.lag_most_ns is not None
        assert found.lag_most_ns <= 2 * 5_000_000
        assert [group.received for group in found.groups] == pytest.approx([0.25, 0.25], abs=0.003)


def test_three_equal_vms_on_two_cpus_have_two_thirds_each() -> None:
    found = simulated(scenario([{"count": 3}], cpus=2, **EXACT), seconds=4.0)
    assert found.groups[0].received_least == pytest.approx(2 / 3, abs=0.01)
    assert found.groups[0].received_most == pytest.approx(2 / 3, abs=0.01)
    assert found.migrations_per_s > 1


class Uneven(Simulation):
    """A host whose CPU 0 gives VMs less than the others: other work runs there."""

    TAKEN = 0.03

    def _decision_ns(self, cpu: int) -> int:
        return round(self.TAKEN * self._slice_ns) if cpu == 0 else 0


WEIGHTS = [(1, 1), (1, 3), (1, 2, 4, 8), (100, 1), (1, 1, 1), (2, 3, 4)]


@pytest.mark.parametrize("slice_us", [2000, 5000, 10_000, 20_000])
@pytest.mark.parametrize("weights", [*WEIGHTS, *(weights * 2 for weights in WEIGHTS[:4])])
def test_shares_over_two_cpus_hold_within_three_in_a_thousand_also_where_one_gives_less(
    weights: tuple[int, ...], slice_us: int,
) -> None:
    """Found: lags were clamped to a slice, and what a period withheld beyond it was forgotten (2:3:4 at 2 ms: 11 %);
    nothing was done about a CPU that gives less (1.5 %); and with slices of 20 ms, which a move had to wait for, and
    placement by lags that were whose turn it was, it was up to 0.9 %.
    """
    scale = 1 if max(weights) == 100 else 100
    mix = [{"weight": weight * scale, "mode": MODES[n % 2]} for n, weight in enumerate(weights)]
    for kind in (Simulation, Uneven):
        simulation = kind(scenario(mix, cpus=2, scheduler={"slice_us": slice_us}), "fair")
        found = simulation.run(10.0).result()
        simulation.close()
        assert found.share_error_most is not None
        assert found.share_error_most <= 0.003
        assert found.idle < 0.005


def test_a_nap_on_one_of_several_cpus_forgives_nothing_and_earns_nothing() -> None:
    """Three VMs on two CPUs, so that who is ahead and who is owed changes all the time, and one of them naps."""
    for script in ([[29_000, 1_000]], [[24_900, 100]], [[60_000, 5_000]]):
        found = simulated(scenario([{"script": script}, {"count": 2}], cpus=2, **EXACT), seconds=6.0)
        assert found.groups[0].received <= 2 / 3 + 0.005
        assert found.groups[1].received_least >= 2 / 3 - 0.01


def test_an_alternation_of_two_modes_costs_what_the_model_says() -> None:
    found = simulated(scenario([{"mode": "software"}, {"mode": "hardware"}], scheduler={"random_order": 0},
                               switch_software_us=10, switch_hardware_us=20, mixed_software_us=3, mixed_hardware_us=5,
                               **EXACT), seconds=2.0)
    # Two slices of 5 ms each in turn, as who runs keeps the CPU on a tie; half of the crossings into each mode.
    assert found.mode_switches_per_s == found.vm_switches_per_s == pytest.approx(100, abs=1)
    assert found.lost_switching == pytest.approx(100 * 15e-6, rel=0.02)
    assert found.lost_mixed == pytest.approx(100 * 4e-6, rel=0.02)


def test_batching_crosses_less_and_partition_not_at_all() -> None:
    mixed = scenario([{"mode": "software", "count": 4}, {"mode": "hardware", "count": 4}], cpus=2)
    fair, batch, partition = (simulated(mixed, policy, 3.0) for policy in ("fair", "batch", "partition"))
    assert batch.mode_switches_per_s * 4 < fair.mode_switches_per_s
    assert partition.mode_switches_per_s < 1
    assert batch.lost_mixed < fair.lost_mixed
    assert batch.wait.p99_ns > fair.wait.p99_ns


def test_nice_levels_cannot_express_a_hundred_to_one() -> None:
    vms = [{"weight": 10_000}, {"weight": 1}]
    assert (simulated(scenario(vms, **EXACT)).share_error_most or 0) < 0.011
    kernel = simulated(scenario([{"weight": 300}, {"weight": 100}]), "kernel", 3.0)
    # Nice -5 is 3121 : 1024, not 3 : 1.
    assert kernel.groups[0].received == pytest.approx(3121 / (3121 + 1024), abs=0.01)


def test_the_kernels_balancer_leaves_no_cpu_idle_beside_a_waiting_vm() -> None:
    found = simulated(scenario([{"count": 5}], cpus=4), "kernel", 1.0)
    assert found.idle < 0.001
    assert found.groups[0].received_least > 0.4


def test_caps_hold() -> None:
    found = simulated(scenario([{"cap": 20}, {}], **EXACT), seconds=3.0)
    assert found.groups[0].received == pytest.approx(0.2, abs=0.01)
    assert found.groups[1].received == pytest.approx(0.8, abs=0.01)
    assert (found.share_error_most or 0) < 0.01


def test_a_script_is_followed_to_the_nanosecond() -> None:
    found = simulated(scenario([{"behaviour": "scripted", "script": [[1000, 9000]]}], **EXACT), seconds=1.0)
    assert found.delivered == pytest.approx(0.1, abs=0.0011)
    assert found.wake.max_ns == 0
    assert found.share_error_most is None
    assert found.fairness is None


def test_the_same_vm_asks_for_the_same_under_every_policy() -> None:
    alone = scenario([{"behaviour": "interactive"}, {"behaviour": "io", "mode": "hardware"}], cpus=2,
                     switch_software_us=0, switch_hardware_us=0, mixed_software_us=0, mixed_hardware_us=0, **EXACT)
    received = {tuple(round(group.received, 4) for group in simulated(alone, policy, 2.0).groups)
                for policy in ("fair", "batch", "partition")}
    assert len(received) == 1


def test_reservations_that_do_not_fit_are_refused_in_a_sentence() -> None:
    with pytest.raises(ScenarioRefused, match="together reserve 120 %"):
        Simulation(scenario([{"reservation": 60}, {"reservation": 60}]), "fair")


@pytest.fixture
def timeline() -> Iterator[Simulation]:
    simulation = Simulation(scenario([{}, {"mode": "hardware"}, {"behaviour": "io"}], cpus=2), "fair",
                            timeline_ns=300_000_000)
    yield simulation.run(0.5)
    simulation.close()


def test_the_timeline_has_all_that_ran_and_one_vm_a_cpu_at_a_time(timeline: Simulation) -> None:
    for cpu in range(2):
        spans = [span for span in timeline.spans if span.cpu == cpu]
        for one, two in pairwise(spans):
            assert one.start_ns < one.end_ns <= two.start_ns
        # Within the last slice: a pick may sleep at the end, and in a breath nobody else runs then.
        assert 295_000_000 <= spans[-1].end_ns <= 300_000_000
    for name in ("vm0", "vm1"):
        # A vCPU is on one CPU at a time.
        mine = sorted((s.start_ns, s.end_ns) for s in timeline.spans if s.thread.name == name)
        assert all(one[1] <= two[0] for one, two in pairwise(mine))
