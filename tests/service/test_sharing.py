"""Changes of how CPUs are shared: checked as the file would be, had or refused as a whole."""

from __future__ import annotations

import pytest

from mixvisor.config.model import SchedulerConfig, VmConfig
from mixvisor.config.rules import HostLimits
from mixvisor.sched.policy import Batching, Order
from mixvisor.service.backend import Conflict, Unusable
from mixvisor.service.sharing import PARAMETERS, changed_scheduler, changed_vm, scheduler_settings
from mixvisor.vm.lifecycle import Phase

from .conftest import running

LIMITS = HostLimits((0, 1, 2), 8 << 30)


def vm(name="a", **keys):
    return VmConfig.model_validate({"name": name, "boot": {"guest": "alu"}, **keys})


def change(old, others=(), **keys):
    return changed_vm(old, keys, others=others, vm_cpus=(1, 2), limits=LIMITS)


def test_a_change_of_some_parameters_leaves_the_others_and_all_other_keys():
    old = vm(weight=5, cap=50, reservation=10)
    new = change(old, weight=300, cpus="1")
    assert {key: getattr(new, key) for key in PARAMETERS} == {
        "weight": 300, "cap": 50, "reservation": 10, "latency": "normal", "cpus": (1,)}
    assert new.model_copy(update={"weight": 5, "cpus": None}) == old
    assert change(new, cpus=None).cpus is None


@pytest.mark.parametrize(("keys", "says"), [
    ({"weight": 0}, "a stays as it is: weight: found 0, allowed: 1 to 10000"),
    ({"weight": "much"}, 'found "much", allowed: a whole number'),
    ({"weight": True}, "found true, allowed: a whole number"),
    ({"weight": 10, "cap": -1}, "cap: found -1"),
    ({"cap": 20, "reservation": 30}, "at most the cap, 20 percent"),
    ({"cap": 5}, "at most the cap, 5 percent"),
    ({"latency": "lowest"}, 'latency: found "lowest", allowed: "low", "normal" or "high"'),
    ({"reservation": 160}, "at most 100 percent"),
    ({"reservation": 90, "cpus": "1"}, r'170 percent in all \("b", "a"\), allowed: at most 100 percent on CPU 1'),
    ({"cpus": "0"}, "cpus: found CPU 0, allowed: CPUs of .* 1-2"),
    ({"cpus": "7"}, "cpus: found CPU 7"),
    ({"cpus": "x"}, "cpus: found \"x\", allowed: host CPUs such as"),
    ({"memory": "1M"},
     "a has no 'memory' that can be changed while it runs; allowed: weight, cap, reservation, latency, cpus"),
    ({}, "nothing to change of a: name at least one of weight, cap, reservation, latency, cpus"),
])
def test_what_the_file_could_not_say_is_refused_in_one_message(keys, says):
    old = vm(reservation=10)
    with pytest.raises(Unusable, match=says):
        change(old, [vm("b", reservation=80, cpus="1")], **keys)


def test_what_was_wrong_with_another_vm_before_is_not_held_against_a_change():
    assert change(vm(), [vm("b", cpus="0"), vm("c", reservation=90, cap=10)], weight=7).weight == 7


def test_a_change_of_the_scheduler_reaches_its_settings():
    new = changed_scheduler(SchedulerConfig(), {
        "policy": "batch", "slice_us": 2000, "mode_wait_max_us": 90_000, "mode_loss_max": 0.5, "crossing_cost_us": 40})
    assert scheduler_settings(new) == {
        "policy": "batch", "slice_ns": 2_000_000, "ratelimit_ns": 1_000_000, "migrate_resist_ns": 500_000,
        "batching": Batching(batch_ns=25_000_000, wait_max_ns=90_000_000, budget_ns=8_000_000),
        "order": Order(jitter_ns=1_000_000, seed=1)}


@pytest.mark.parametrize(("keys", "says"), [
    ({"policy": "bach"}, r'"partition" or "kernel" \(did you mean "batch"\?\)'),
    ({"slice_us": 1, "mode_loss_max": -1}, "slice_us: found 1, .*; mode_loss_max: found -1, allowed: a number from 0"),
    ({"mode_loss_max": float("nan")}, "mode_loss_max: found nan"),
    ({"quantum": 1}, "the policy has no 'quantum'"),
])
def test_a_setting_that_is_none_is_refused(keys, says):
    with pytest.raises(Unusable, match=says):
        changed_scheduler(SchedulerConfig(), keys)


async def test_a_running_vm_gets_other_parameters_and_the_service_another_policy(tmp_path):
    vms = [{"name": name, "mode": "software", "boot": {"guest": "alu"}, "memory": "4M"} for name in ("a", "b")]
    async with running(tmp_path, vms) as service:
        machine = service.machine("a")
        before = machine.snapshot().vcpus[0].run_ns
        pid = machine.snapshot().pid
        assert (await service.set_parameters("a", {"weight": 300, "cap": 50}))["weight"] == 300
        shown = {vm.name: vm for vm in service.snapshot().vms}
        assert (shown["a"].weight, shown["a"].cap_pct, shown["b"].weight) == (300, 50, 100)
        with pytest.raises(Unusable, match="a stays as it is"):
            await service.set_parameters("a", {"weight": 1, "cap": -5})
        assert machine.config.weight == 300
        for policy in ("batch", "partition", "kernel", "fair"):
            assert (await service.set_policy({"policy": policy}))["policy"] == policy
            assert service.snapshot().scheduler.policy == policy
            assert machine.phase is Phase.RUNNING
        after = machine.snapshot()
        assert after.pid == pid
        assert after.vcpus[0].run_ns >= before
        assert (await service.set_policy({}))["policy"] == "fair"


async def test_what_the_scheduler_does_not_admit_changes_nothing(tmp_path, monkeypatch):
    vms = [{"name": "a", "mode": "software", "boot": {"guest": "alu"}, "memory": "4M"}]
    async with running(tmp_path, vms) as service:
        from mixvisor.sched.supervisor import AdmissionRefused

        async def refuse(*_arguments, **_keys):
            raise AdmissionRefused("the reservations do not fit")

        monkeypatch.setattr(service.machine("a")._context.scheduler, "set_parameters", refuse)
        with pytest.raises(Conflict, match="a stays as it is: the reservations do not fit"):
            await service.set_parameters("a", {"reservation": 30})
        assert service.machine("a").config.reservation == 0


async def test_a_vm_that_does_not_run_keeps_its_change_for_its_start(tmp_path):
    vms = [{"name": "a", "mode": "software", "boot": {"guest": "alu"}, "memory": "4M", "autostart": False}]
    async with running(tmp_path, vms) as service:
        await service.set_parameters("a", {"weight": 77})
        await service.act("a", "start")
        assert service._scheduler._table.get("a").weight == 77
