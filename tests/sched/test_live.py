"""Another policy and other parameters while VMs run: nobody is disturbed, no account is lost."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import trio

from mixvisor.sched.policy import Batching
from mixvisor.sched.policy.kernel import nice_of
from mixvisor.sched.simulate import replay
from mixvisor.sched.supervisor import AdmissionRefused
from mixvisor.vm.worker.status import Phase

from .conftest import CPU, Spawner, Spinner, until
from .test_scheduler import scheduling, thread

Make = Callable[[int], list[Spinner]]


async def test_every_change_of_policy_keeps_the_accounts_and_the_vms(spawner: Spawner, spinners: Make) -> None:
    ours = spinners(2)
    said: set[str] = set()
    async with scheduling(
        spawner, "gentle", warn=lambda code, *_rest: said.add(code), unwarn=said.discard,
    ) as scheduler:
        await scheduler.admit(thread(ours[0], "soft", 300, cap=0.9))
        await scheduler.admit(thread(ours[1], "hard", 100, mode="hardware"))
        await until(lambda: all(v.slices > 3 for v in scheduler.statistics().vcpus), 20)
        for policy in ("batch", "partition", "kernel", "fair", "kernel", "batch"):
            before = [v.run_ns for v in scheduler.statistics().vcpus]
            await scheduler.set_policy(policy, batching=Batching(batch_ns=8_000_000))
            assert scheduler.statistics().policy == policy
            after = scheduler.statistics().vcpus
            assert all(new.run_ns >= old for new, old in zip(after, before, strict=True))
            await until(lambda floor=[v.run_ns + 20_000_000 for v in after]: all(
                v.run_ns > least for v, least in zip(scheduler.statistics().vcpus, floor, strict=True)), 20)
            assert ("modes-meet" in said) == (policy == "partition")
            assert ("caps-not-held" in said) == (policy == "kernel")
            assert (scheduler.statistics().dispatch == "plain") == (policy == "kernel")
        seen = scheduler.statistics().vcpus
        assert all(v.run_ns <= s.ran_ns() for v, s in zip(seen, ours, strict=True))
        assert scheduler.statistics().errors == {}
    assert all(spinner.free() for spinner in ours)


async def test_under_the_kernel_policy_weights_are_nice_levels_and_affinity_is_the_vms(
    spawner: Spawner, spinners: Make,
) -> None:
    one, two = spinners(2)
    async with scheduling(spawner, "plain", policy="kernel") as scheduler:
        await scheduler.admit(thread(one, "one", 50))
        await scheduler.admit(thread(two, "two", 20))
        nice = lambda spinner: os.getpriority(os.PRIO_PROCESS, spinner.pid)  # noqa: E731
        await until(lambda: (nice(one), nice(two)) == (nice_of(50), nice_of(20)), 20)
        await until(lambda: os.sched_getaffinity(one.pid) == {CPU}, 20)
        await scheduler.set_parameters("one", weight=30)
        await until(lambda: nice(one) == nice_of(30), 20)
        if os.geteuid() == 0:
            await scheduler.set_policy("fair")
            assert (nice(one), nice(two)) == (0, 0)


async def test_parameters_change_together_or_not_at_all(spawner: Spawner, spinners: Make) -> None:
    one, two = spinners(2)
    async with scheduling(spawner, "plain") as scheduler:
        await scheduler.admit(thread(one, "one", reservation=0.6))
        await scheduler.admit(thread(two, "two"))
        with pytest.raises(AdmissionRefused, match="together reserve"):
            await scheduler.set_parameters("two", weight=900, reservation=0.6)
        with pytest.raises(AdmissionRefused, match="none of them is among"):
            await scheduler.set_parameters("two", cpus=frozenset({CPU + 1000}))
        await scheduler.set_parameters("two", weight=300, cap=0.5)
        await until(lambda: scheduler.figures("two").entitled_share == pytest.approx(0.4), 20)
        with pytest.raises(AdmissionRefused, match="not scheduled"):
            await scheduler.set_parameters("three", weight=1)


async def test_what_a_running_scheduler_decided_is_decided_again_in_the_simulator(
    spawner: Spawner, spinners: Make,
) -> None:
    """Recorded in the midst of things: a cap, a sleeper, changes of weight, class and policy while it runs."""
    ours = spinners(4)
    async with scheduling(spawner, "gentle") as scheduler:
        for number, (spinner, mode) in enumerate(zip(ours, ("software", "hardware") * 2, strict=True)):
            await scheduler.admit(thread(spinner, f"vm{number}", 100 * (number + 1), mode=mode))
        await scheduler.set_parameters("vm1", cap=0.2)
        await until(lambda: all(v.slices > 2 for v in scheduler.statistics().vcpus), 20)
        lines: list[str] = []

        async def note() -> None:
            lines.extend(await scheduler.record_inputs(1.2))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(note)
            await trio.sleep(0.3)
            ours[0].page.set("phase", Phase.SLEEPING)
            await scheduler.set_parameters("vm2", weight=50, latency="low")
            await trio.sleep(0.3)
            ours[0].page.set("phase", Phase.RUNNING)
            await scheduler.set_policy("batch", batching=Batching(batch_ns=8_000_000))
        before = scheduler.statistics().vcpus
        await until(lambda: all(
            new.run_ns > old.run_ns for new, old in zip(scheduler.statistics().vcpus, before, strict=True)), 20)
        assert scheduler.statistics().errors == {}
    found = replay(lines)
    assert found.differing == 0, found.first
    assert found.decisions > 50
    assert sum('"begin"' in line for line in lines) >= 2           # at the start, and with the other policy
    wrong = [line.replace('"pick",[null]', '"pick",[0]') for line in lines]
    index = next(n for n, line in enumerate(wrong) if '"charge"' in line)
    assert replay([*wrong[:index], *wrong[index + 1:]]).differing > 0


async def test_where_the_kernel_decides_there_are_no_inputs_to_record(spawner: Spawner) -> None:
    async with scheduling(spawner, "plain", policy="kernel") as scheduler:
        with pytest.raises(ValueError, match="the kernel takes the decisions"):
            await scheduler.record_inputs(0.1)
