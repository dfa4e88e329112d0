"""Measuring beside the service: which figure is gone by, what is counted, and a real service that gets one."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import trio

from mixvisor.config.model import SchedulerConfig
from mixvisor.metrics.mixing.online import Online
from mixvisor.metrics.mixing.result import Interval, MeasuredHost
from mixvisor.sched.shared import SliceRecord
from mixvisor.service import measuring
from mixvisor.service.measuring import Measuring, preferred
from mixvisor.service.mixed import measured_cost
from mixvisor.service.sharing import crossing_cost, scheduler_settings
from mixvisor.vm.host import HostFacts

from ..metrics.snapshots import a_result
from .conftest import running, until, vm

HOST = MeasuredHost(technology="pvm", cpu_model="Invented CPU", kernel="6.12.0")
ONLINE = a_result()
ON_DEMAND = a_result(source="on-demand", cpu=1, cost_us=Interval(15.5, 15.0, 16.0))
UNSURE = replace(ONLINE, verdict="inconclusive", cost_us=Interval(2.0, -3.0, 7.0))
BLIND = replace(UNSURE, cost_us=None, cost_us_by_victim={})
MS = 1_000_000


@pytest.mark.parametrize(("online", "on_demand", "told"), [
    (None, None, None), (ONLINE, None, ONLINE), (ONLINE, ON_DEMAND, ONLINE), (UNSURE, ON_DEMAND, ON_DEMAND),
    (None, ON_DEMAND, ON_DEMAND), (UNSURE, None, UNSURE), (BLIND, replace(ON_DEMAND, verdict="inconclusive"),
                                                           replace(ON_DEMAND, verdict="inconclusive")),
    (replace(ONLINE, doubts=("a doubt",)), ON_DEMAND, ON_DEMAND),
    (BLIND, replace(ON_DEMAND, host=replace(HOST, kernel="5.10")), BLIND),
])
def test_what_was_concluded_about_these_vms_goes_before_what_was_measured_once(online, on_demand, told):
    assert preferred(online, on_demand, HOST) == told


def test_a_budget_goes_by_the_file_then_by_what_was_measured_then_by_the_default():
    silent, said = SchedulerConfig(mode_loss_max=0.5), SchedulerConfig(mode_loss_max=0.5, crossing_cost_us=40)
    assert crossing_cost(silent, None) == (50.0, "default")
    assert crossing_cost(silent, UNSURE) == (50.0, "default")
    assert crossing_cost(silent, replace(ONLINE, doubts=("a doubt",))) == (50.0, "default")
    assert crossing_cost(silent, ONLINE) == (16.0, "measured")
    assert crossing_cost(said, ONLINE) == (40.0, "configured")
    assert scheduler_settings(silent, ONLINE)["batching"].budget_ns == 3_200_000
    assert scheduler_settings(said, ONLINE)["batching"].budget_ns == 8_000_000


def test_a_warning_says_what_was_measured_and_only_what_may_be_said():
    assert "a crossing costs 16.0 µs" in measured_cost(ONLINE).sentence()
    assert "while these VMs run" in measured_cost(ONLINE).sentence()
    assert "by mixvisor measure" in measured_cost(ON_DEMAND).sentence()
    assert "no cost of a crossing was found" in measured_cost(replace(UNSURE, verdict="none")).sentence()
    assert "inconclusive" in measured_cost(UNSURE).sentence()
    assert measured_cost(replace(ONLINE, doubts=("a doubt",))) is None
    assert measured_cost(BLIND) is None


def slices(start, count, modes=(0, 1), slice_ns=MS):
    """VMs of these modes in turn; generation n + 1 is of the n-th."""
    return [SliceRecord(
        start_ns=start + at * slice_ns, end_ns=start + (at + 1) * slice_ns, planned_end_ns=start + (at + 1) * slice_ns,
        slot=at % len(modes), generation=at % len(modes) + 1, previous_slot=0, mode=modes[at % len(modes)],
        run_ns=slice_ns, others_software_ns=0, others_hardware_ns=0, progress_before=at, progress_after=at + 1,
        edge_late_ns=0, breath_ns=0, decision_ns=0, flags=0) for at in range(count)]


class Clock:
    """trio's, for a module that asks `time`."""

    monotonic = staticmethod(trio.current_time)


class Lab:
    def __init__(self, **config):
        self.config = SchedulerConfig(slice_us=1000, **config)
        self.told = []
        self.on_demand = None
        self.ran = dict.fromkeys(os.sched_getaffinity(0), (0, 0))
        self.dispatching_ns = 0
        self.measuring = Measuring(
            HOST, HostFacts.read().topology, running=lambda: {"s": ("software", True), "h": ("hardware", True)},
            scheduling=lambda: self.config, dispatch=lambda: "precise", ran=lambda: dict(self.ran),
            dispatching=lambda: self.dispatching_ns, on_demand=lambda: self.on_demand, tell=self.told.append)
        self.measuring.named(1, "s")
        self.measuring.named(2, "h")

    def give(self, records, cpu):
        software, hardware = (sum(record.run_ns for record in records if record.mode == mode) for mode in (0, 1))
        self.ran[cpu] = self.ran[cpu][0] + software, self.ran[cpu][1] + hardware
        self.measuring.slices(cpu, records)

    async def round(self, records=(), *, estimate=False, cpu=0):
        self.give(records, cpu)
        await self.measuring._round(estimate)
        return self.measuring.snapshot(self.config, ("s", "h"))


async def test_time_with_both_modes_is_counted_where_they_meet():
    lab = Lab()
    shown = await lab.round(slices(0, 40, modes=(0,)))
    assert not any(shown.overlap_ns.values())
    lab.give(slices(0, 40, modes=(0,)), 0)
    shown = await lab.round(slices(0, 40, modes=(1,)), cpu=max(os.sched_getaffinity(0)))
    assert shown.overlap_ns["host"] > 0
    assert shown.overlap_ns["cpu"] == 0
    shown = await lab.round(slices(0, 40))
    assert shown.overlap_ns["cpu"] > 0


async def test_lost_time_is_counted_for_each_vm_while_a_penalty_is_told():
    lab = Lab()
    shown = await lab.round(slices(0, 101), estimate=True)
    assert shown.lost_ns == {"s": 0, "h": 0}
    assert shown.crossing_cost_source == "default"
    lab.on_demand = ON_DEMAND
    lab.measuring.reconsider()
    assert lab.told[-1].source == "on-demand"
    shown = await lab.round(slices(10**9, 101), estimate=True)
    assert shown.lost_ns == {"s": 50 * 12_000, "h": 50 * 20_000}
    assert shown.concluded_unix_s == ON_DEMAND.measured_unix_s
    assert (shown.crossing_cost_us, shown.crossing_cost_source) == (15.5, "measured")


async def test_what_was_not_looked_at_is_taken_to_have_lost_as_much():
    lab = Lab()
    lab.on_demand = ON_DEMAND
    await lab.round(estimate=True)
    lab.measuring._looking = False
    lab.measuring._folded_at -= 90
    await lab.round(slices(0, 101))
    assert lab.measuring._pending == {}
    lab.measuring._looking = True
    lab.measuring._folded_at -= 10
    shown = await lab.round(slices(10**9, 101), estimate=True)
    assert shown.lost_ns["s"] == pytest.approx(50 * 12_000 * 10, rel=0.1)


@pytest.mark.parametrize(("spent_a_second", "least", "most"), [(2 * MS, 45, 150), (20 * MS, 4, 20), (0, 600, 600)])
async def test_it_spends_no_more_than_its_part_of_what_dispatching_takes(
    monkeypatch, autojump_clock, spent_a_second, least, most,
):
    """Ten minutes of a CPU whose dispatcher takes 2.5 %, with an estimator that is cheap, dear or not needed."""
    lab = Lab()
    monkeypatch.setattr(measuring, "time", Clock())
    looked, asked = [], []

    async def a_round(estimate):
        lab.dispatching_ns += 25 * MS
        lab.measuring.cpu_ns += spent_a_second * lab.measuring._looking
        looked.append(lab.measuring._looking)
        asked.append(estimate)

    monkeypatch.setattr(lab.measuring, "_round", a_round)
    with trio.move_on_after(600.5):
        await lab.measuring.run()
    assert least <= sum(looked) <= most
    # The first stretch is on credit; after it the budget holds at any time.
    stretch = round(measuring.STRETCH_S)
    assert all(looked[:stretch])
    assert sum(looked) * spent_a_second <= 0.006 * lab.dispatching_ns + stretch * spent_a_second
    # A stretch is whole, and at its end the estimate is asked.
    assert sum(asked) == sum(looked) // stretch
    assert all(all(looked[at + 1 - stretch:at + 1]) for at, one in enumerate(asked) if one)


async def test_what_was_not_spent_for_long_is_not_spent_at_once_when_modes_meet(monkeypatch, autojump_clock):
    lab = Lab()
    monkeypatch.setattr(measuring, "time", Clock())
    looked = []

    async def a_round(_estimate):
        lab.dispatching_ns += 25 * MS
        if trio.current_time() > 3600:
            lab.measuring.cpu_ns += 2 * MS * lab.measuring._looking
            looked.append(lab.measuring._looking)

    monkeypatch.setattr(lab.measuring, "_round", a_round)
    with trio.move_on_after(3660.5):
        await lab.measuring.run()
    assert looked[0], "nothing was spent: it looks when modes meet at last"
    assert sum(looked) <= 20


async def test_where_nothing_can_be_told_the_snapshot_says_why():
    lab = Lab(random_order=0)
    shown = await lab.round(slices(0, 400), estimate=True)
    assert not shown.online
    assert "random_order = 0" in shown.latest.headline
    assert shown.penalty == {}
    lab = Lab()
    shown = await lab.round(slices(0, 400), estimate=True)
    assert shown.told.verdict == "inconclusive"
    assert shown.measurements == {"inconclusive": 1}


async def test_what_waits_is_bounded_and_an_error_costs_the_figures_only(monkeypatch):
    lab = Lab()
    monkeypatch.setattr(measuring, "PENDING", 1000)
    for _ in range(5):
        lab.give(slices(0, 800), 0)
    assert sum(map(len, lab.measuring._pending.values())) <= 1600
    monkeypatch.setattr(measuring, "FOLD_S", 0.01)
    calls = []

    def feed(self, cpu, records):
        calls.append(len(records))
        assert len(calls) > 1, "the first time it fails"

    monkeypatch.setattr(Online, "feed", feed)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lab.measuring.run)
        await until(lambda: calls, what="a failure")
        lab.give(slices(0, 40), 0)
        await until(lambda: len(calls) > 1, what="a new beginning")
        nursery.cancel_scope.cancel()


@pytest.mark.kvm
@pytest.mark.rt
async def test_a_real_service_tells_what_mixing_costs_or_why_it_cannot(tmp_path, nothing_left, monkeypatch):
    monkeypatch.setattr(measuring, "FOLD_S", 0.2)
    monkeypatch.setattr(measuring, "STRETCH_S", 0.5)
    monkeypatch.setattr(measuring, "BUDGET", 1.0)
    vms = [{"name": f"{mode}-{number}", "mode": mode, "boot": {"guest": "alu"}}
           for mode in ("software", "hardware") for number in (1, 2)]
    async with running(tmp_path, vms, dispatch="precise", scheduler={"slice_us": 500}) as service:
        await until(lambda: all(vm(service, v["name"]).state == "running" for v in vms))
        early = await until(lambda: service.snapshot().mixing.latest)
        assert early.verdict == "inconclusive"
        assert early.cost_us is None
        assert "too few" in early.headline
        mixing = await until(lambda: (m := service.snapshot().mixing).latest.cost_us is not None and m,
                             what="an interval")
        result = mixing.latest
        assert result.verdict in ("penalty", "none", "gain", "inconclusive")
        assert set(result.cost_us_by_victim) == {"software", "hardware"}
        # Whatever it is: a crossing neither costs nor saves a slice.
        assert -200 < result.cost_us.low < result.cost_us.high < 200
        assert mixing.crossing_rate["hardware"] > 100
        assert mixing.overlap_ns["cpu"] > 0
        if result.usable:
            (warning,) = [w for w in service.snapshot().warnings if w.code == "mixed-modes"]
            assert "Measured on this host, while these VMs run" in warning.message
