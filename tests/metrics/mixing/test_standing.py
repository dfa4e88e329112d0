"""What is said of the online estimate: a verdict on the same terms as on demand, or the reason why there is none."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mixvisor.metrics.mixing.online import Figure, OnlineEstimate
from mixvisor.metrics.mixing.result import MeasuredHost
from mixvisor.metrics.mixing.standing import Circumstances, caveats, to_result

HOST = MeasuredHost(technology="pvm", cpu_model="Invented CPU", kernel="6.12.0")
AROUND = Circumstances(
    host=HOST, dispatch="precise", policy="fair", random_order=True, running={"software": 2, "hardware": 2},
    countless={}, together=True, instructions="this host counts no guest instructions", now_unix_s=1.8e9)
NOTHING = OnlineEstimate(
    cost=None, by_victim={}, null=None, nulls={}, switching=None, refill=None, crossing_rate={}, slices=0, offered=0,
    blocks=0, seconds=4.0, slice_ns=1_000_000, measured_vms={"software": 2, "hardware": 2})


def us(value, error):
    return Figure(1e3 * value, 1e3 * error, 60)


def estimate(cost, null=None, **more):
    null = null or us(0, 0.2)
    return replace(NOTHING, cost=cost, by_victim={"software": cost, "hardware": cost}, null=null,
                   nulls={"software": null, "hardware": null}, slices=9000, offered=10_000, blocks=60, **more)


@pytest.mark.parametrize(("cost", "verdict"), [
    (us(16, 0.5), "penalty"), (us(-5, 0.5), "gain"), (us(0.1, 0.5), "none"), (us(1, 4), "inconclusive"),
])
def test_the_verdict_follows_the_interval(cost, verdict):
    told = to_result(estimate(cost), AROUND)
    assert told.verdict == verdict
    assert told.usable
    assert told.source == "online"
    assert told.cost_us.value == pytest.approx(cost.value / 1e3)


def test_a_broken_null_makes_it_inconclusive_whatever_the_figure():
    told = to_result(estimate(us(16, 0.5), null=us(5, 0.5)), AROUND)
    assert told.verdict == "inconclusive"
    assert not told.usable
    assert "should not matter" in told.doubts[0]


def test_one_side_alone_is_no_price():
    told = to_result(replace(NOTHING, by_victim={"software": us(12, 1)}), AROUND)
    assert told.verdict == "inconclusive"
    assert "only what software VMs lose" in told.headline
    assert set(told.cost_us_by_victim) == {"software"}


@pytest.mark.parametrize(("around", "found", "says"), [
    ({"running": {"software": 2, "hardware": 0}}, {}, "no hardware VM runs"),
    ({"random_order": False}, {}, "random_order = 0"),
    ({"policy": "kernel"}, {}, "the kernel alone schedules"),
    ({"countless": {"software": 2, "hardware": 2}}, {}, "no VM keeps a progress counter"),
    ({"countless": {"software": 2, "hardware": 2}}, {}, "this host counts no guest instructions"),
    ({"together": False}, {}, "have not shared a host CPU lately"),
    ({"dispatch": "gentle"}, {"offered": 5000, "slices": 10}, "under gentle dispatch slices are not exact"),
    ({}, {"blocks": 100}, "leaves nothing to compare"),
    ({}, {}, "4 s of slices are too few"),
])
def test_where_nothing_can_be_told_the_first_reason_is_said(around, found, says):
    told = to_result(replace(NOTHING, **found), replace(AROUND, **around))
    assert told.verdict == "inconclusive"
    assert told.cost_us is None
    assert says in told.headline


def test_what_a_reader_should_know_is_said():
    sound = estimate(us(16, 0.5), refill=us(2, 1))
    assert caveats(sound) == ()
    (working_sets,) = caveats(estimate(us(16, 0.5), refill=us(40, 2)))
    assert "Working sets" in working_sets
    one_side = replace(NOTHING, by_victim={"software": us(12, 1)})
    assert any("null needs two VMs" in note for note in caveats(one_side))
    assert any("What hardware VMs lose is not told apart" in note for note in caveats(one_side))
    assert caveats(NOTHING) == ()
