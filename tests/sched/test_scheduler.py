"""The whole of scheduling with real processes: shares, sleepers, and every way to die."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import trio

from mixvisor.sched import planner
from mixvisor.sched.supervisor import (
    AdmissionRefused,
    Scheduler,
    VcpuThread,
)
from mixvisor.vm.worker.status import Phase

from .conftest import CPU, Spawner, Spinner, until

Make = Callable[[int], list[Spinner]]
WEIGHTS = (1, 2, 4, 8)


def thread(spinner: Spinner, name: str, weight: int = 100, **more: object) -> VcpuThread:
    return VcpuThread(**{  # type: ignore[arg-type]
        "vm": name, "index": 0, "pid": spinner.pid, "tid": spinner.pid, "pidfd": spinner.pidfd,
        "mode": "software", "weight": weight, "cpus": frozenset({CPU}),
        "status_fd": spinner.status_fd, **more})


@contextlib.asynccontextmanager
async def scheduling(spawner: Spawner, dispatch: str, **more: object) -> AsyncIterator[Scheduler]:
    scheduler = Scheduler(cpus=[CPU], spawn=spawner, dispatch=dispatch, **more)  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        await nursery.start(scheduler.run)
        yield scheduler
        nursery.cancel_scope.cancel()


@pytest.mark.rt
@pytest.mark.parametrize("dispatch", ["precise", "gentle"])
async def test_weights_hold_and_nothing_is_left_behind(
    rt: None, spawner: Spawner, spinners: Make, dispatch: str,
) -> None:
    ours = spinners(4)
    async with scheduling(spawner, dispatch) as scheduler:
        for spinner, weight in zip(ours, WEIGHTS, strict=True):
            await scheduler.admit(thread(spinner, f"vm{weight}", weight))
        await until(lambda: all(v.slices for v in scheduler.statistics().vcpus))
        before = [spinner.ran_ns() for spinner in ours]
        await trio.sleep(2)
        ran = [spinner.ran_ns() - first for spinner, first in zip(ours, before, strict=True)]
        for got, weight in zip(ran, WEIGHTS, strict=True):
            assert got / sum(ran) == pytest.approx(weight / sum(WEIGHTS), abs=0.03)
        # The window of two seconds may still begin before the second VM was there.
        await until(lambda: scheduler.statistics().fairness is not None)
        figures = scheduler.statistics()
        assert figures.dispatch == dispatch
        assert figures.guard == "watching"
        assert figures.errors == {}
        assert figures.cpus[0].slices > 100
        assert figures.fairness is not None
        assert figures.fairness > 0.9
        for vcpu in figures.vcpus:
            # On a busy machine a turn before all four were there is much of what the lightest has had.
            assert vcpu.run_ns == pytest.approx(vcpu.entitled_ns, rel=0.2, abs=0.05 * sum(ran))
    assert all(spinner.free() for spinner in ours)
    assert not spawner.alive("dispatcher")
    assert not spawner.alive("guard")


@pytest.mark.rt
async def test_released_vm_is_free_and_its_figures_stay_until_forgotten(
    rt: None, spawner: Spawner, spinners: Make,
) -> None:
    (one, two) = spinners(2)
    async with scheduling(spawner, "precise") as scheduler:
        await scheduler.admit(thread(one, "one"))
        await scheduler.admit(thread(two, "two"))
        await until(lambda: scheduler.figures("one").slices > 2)
        await scheduler.release("one")
        assert one.free()
        last = scheduler.figures("one")
        assert last is not None
        assert last.run_ns > 0
        scheduler.forget("one")
        assert scheduler.figures("one") is None
        await scheduler.release("one")
        await scheduler.admit(thread(one, "one"))
        await until(lambda: scheduler.figures("one").slices > 2)


@pytest.mark.rt
async def test_a_sleeper_wastes_nothing_and_is_served_when_it_wakes(
    rt: None, spawner: Spawner, spinners: Make,
) -> None:
    sleeper, busy = spinners(2)
    sleeper.page.set("phase", Phase.SLEEPING)
    async with scheduling(spawner, "precise") as scheduler:
        await scheduler.admit(thread(sleeper, "sleeper", 800))
        await scheduler.admit(thread(busy, "busy", 100))
        await until(lambda: not scheduler.figures("sleeper").awake)
        start, ran = time.monotonic_ns(), busy.ran_ns()
        await trio.sleep(0.5)
        assert (busy.ran_ns() - ran) / (time.monotonic_ns() - start) > 0.7
        sleeper.page.set("phase", Phase.RUNNING)
        ran, other = sleeper.ran_ns(), busy.ran_ns()
        await until(lambda: scheduler.figures("sleeper").awake)
        await trio.sleep(0.5)
        assert sleeper.ran_ns() - ran > 3 * (busy.ran_ns() - other)


async def test_very_many_that_start_at_once_share_a_plan(
    spawner: Spawner, spinners: Make, monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours = spinners(4)
    monkeypatch.setattr(planner, "OFFLOAD_FROM", 1)
    async with scheduling(spawner, "signal") as scheduler:
        before = scheduler._planner.plans
        async with trio.open_nursery() as nursery:
            for number, spinner in enumerate(ours):
                nursery.start_soon(scheduler.admit, thread(spinner, f"vm{number}"))
        assert scheduler._planner.plans - before < 4
        await until(lambda: all(v.slices for v in scheduler.statistics().vcpus))


@pytest.mark.rt
async def test_a_paused_vm_does_not_compete(rt: None, spawner: Spawner, spinners: Make) -> None:
    one, two = spinners(2)
    async with scheduling(spawner, "precise") as scheduler:
        await scheduler.admit(thread(one, "one"))
        await scheduler.admit(thread(two, "two"))
        await scheduler.pause("one")
        one.page.set("phase", Phase.SLEEPING)
        await until(lambda: one.policy == os.SCHED_OTHER)
        before = scheduler.figures("one").entitled_ns
        start, ran = time.monotonic_ns(), two.ran_ns()
        await trio.sleep(0.3)
        assert (two.ran_ns() - ran) / (time.monotonic_ns() - start) > 0.7
        assert scheduler.figures("one").entitled_ns - before < 50_000_000
        one.page.set("phase", Phase.RUNNING)
        await scheduler.resume("one")
        slices = scheduler.figures("one").slices
        await until(lambda: scheduler.figures("one").slices > slices + 3)


@pytest.mark.rt
async def test_a_cap_holds_on_an_idle_cpu(rt: None, spawner: Spawner, spinners: Make) -> None:
    (one,) = spinners(1)
    async with scheduling(spawner, "precise") as scheduler:
        await scheduler.admit(thread(one, "one", cap=0.3))
        await until(lambda: scheduler.figures("one").slices > 2)
        start, ran = time.monotonic_ns(), one.ran_ns()
        await trio.sleep(1)
        assert (one.ran_ns() - ran) / (time.monotonic_ns() - start) == pytest.approx(0.3, abs=0.06)
    assert one.free()


@pytest.mark.rt
async def test_a_killed_dispatcher_is_replaced_and_accounts_go_on(
    rt: None, spawner: Spawner, spinners: Make,
) -> None:
    ours = spinners(2)
    warned: list[str] = []
    async with scheduling(
        spawner, "precise", warn=lambda code, *_rest: warned.append(code),
    ) as scheduler:
        for number, spinner in enumerate(ours):
            await scheduler.admit(thread(spinner, f"vm{number}"))
        await until(lambda: all(v.slices > 3 for v in scheduler.statistics().vcpus))
        before = [v.run_ns for v in scheduler.statistics().vcpus]
        (first,) = spawner.alive("dispatcher")
        first.signal(signal.SIGKILL)
        await until(lambda: scheduler.statistics().errors.get("dispatcher") == 1)
        slices = [v.slices for v in scheduler.statistics().vcpus]
        await until(lambda: all(
            v.slices > old + 3
            for v, old in zip(scheduler.statistics().vcpus, slices, strict=True)))
        # Slices are read from the table itself, received time is folded in every tenth of a second.
        await until(lambda: all(
            v.run_ns > old for v, old in zip(scheduler.statistics().vcpus, before, strict=True)))
        after = scheduler.statistics().vcpus
        # Nothing is billed twice: what the table says is what the kernel says, at most.
        assert all(v.run_ns <= s.ran_ns() for v, s in zip(after, ours, strict=True))
        assert warned == ["dispatcher-died"]
    assert all(spinner.free() for spinner in ours)


@pytest.mark.rt
async def test_a_killed_guard_is_replaced_and_precise_gives_way_to_gentle(
    rt: None, spawner: Spawner, spinners: Make,
) -> None:
    ours = spinners(2)
    warned: list[str] = []
    async with scheduling(
        spawner, "precise", warn=lambda code, *_rest: warned.append(code),
    ) as scheduler:
        for number, spinner in enumerate(ours):
            await scheduler.admit(thread(spinner, f"vm{number}"))
        await until(lambda: any(s.policy & ~os.SCHED_RESET_ON_FORK == os.SCHED_FIFO for s in ours))
        (guard,) = spawner.alive("guard")
        guard.signal(signal.SIGKILL)
        await until(lambda: scheduler.statistics().dispatch == "gentle")
        await until(lambda: scheduler.statistics().guard == "watching")
        await until(lambda: any(s.policy == os.SCHED_IDLE for s in ours))
        assert not any(s.policy & ~os.SCHED_RESET_ON_FORK == os.SCHED_FIFO for s in ours)
        assert warned == ["guard-lost"]
        assert "fell back" in scheduler.statistics().dispatch_reason


def stopped(spinner: Spinner) -> bool:
    return Path(f"/proc/{spinner.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"


@pytest.mark.rt
async def test_a_dispatcher_killed_in_a_breath_leaves_nobody_stopped(
    rt: None, spawner: Spawner, spinners: Make,
) -> None:
    ours = spinners(4)
    async with scheduling(spawner, "precise") as scheduler:
        for number, spinner in enumerate(ours):
            await scheduler.admit(thread(spinner, f"vm{number}"))
        await until(lambda: all(v.slices > 2 for v in scheduler.statistics().vcpus))
        (dispatcher,) = spawner.alive("dispatcher")
        # Stopped itself in the midst of a breath, it cannot end the breath before it is killed.
        async def caught() -> bool:
            await until(lambda: any(map(stopped, ours)))
            dispatcher.signal(signal.SIGSTOP)
            if any(map(stopped, ours)):
                return True
            dispatcher.signal(signal.SIGCONT)
            return False

        with trio.fail_after(8):
            while not await caught():
                pass
        before = [spinner.ran_ns() for spinner in ours]
        dispatcher.signal(signal.SIGKILL)
        await until(lambda: scheduler.statistics().errors.get("dispatcher") == 1)
        await until(lambda: all(
            s.ran_ns() > old + 10_000_000 for s, old in zip(ours, before, strict=True)))
    assert all(spinner.free() for spinner in ours)


async def test_three_equals_on_two_cpus_take_turns_by_migrating(
    spawner: Spawner, spinners: Make,
) -> None:
    # The kind `plain` needs no real-time thread, and is placed and migrated all the same.
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two CPUs")
    ours = spinners(3)
    scheduler = Scheduler(cpus=[0, 1], spawn=spawner, dispatch="plain")
    async with trio.open_nursery() as nursery:
        await nursery.start(scheduler.run)
        for number, spinner in enumerate(ours):
            await scheduler.admit(thread(spinner, f"vm{number}", cpus=frozenset({0, 1})))
        await until(lambda: all(v.migrations > 1 for v in scheduler.statistics().vcpus), 8)
        seen = scheduler.statistics().vcpus
        # What was billed is what the kernel says, across all those changes of hands.
        assert all(
            v.run_ns <= s.ran_ns() for v, s in zip(seen, ours, strict=True))
        assert all(v.entitled_share == pytest.approx(2 / 3) for v in seen)
        nursery.cancel_scope.cancel()
    assert all(spinner.free() for spinner in ours)


async def test_a_reservation_that_does_not_fit_is_refused(
    spawner: Spawner, spinners: Make,
) -> None:
    one, two = spinners(2)
    async with scheduling(spawner, "plain") as scheduler:
        await scheduler.admit(thread(one, "one", reservation=0.7))
        with pytest.raises(AdmissionRefused):
            await scheduler.admit(thread(two, "two", reservation=0.7))
        assert len(scheduler.statistics().vcpus) == 1
        with pytest.raises(AdmissionRefused, match="already"):
            await scheduler.admit(thread(one, "one"))


async def test_many_asked_for_in_a_row_let_the_heartbeat_go_on(spawner: Spawner, spinners: Make) -> None:
    (one,) = spinners(1)
    async with scheduling(spawner, "plain") as scheduler:
        await scheduler.admit(thread(one, "one"))
        others = 0

        async def count() -> None:
            nonlocal others
            while True:
                await trio.lowlevel.checkpoint()
                others += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(count)
            for _ in range(100):
                with pytest.raises(AdmissionRefused, match="already"):
                    await scheduler.admit(thread(one, "one"))
            nursery.cancel_scope.cancel()
        assert others >= 90


async def test_signal_dispatch_needs_no_privilege_and_leaves_nobody_stopped(
    rt: None, spawner: Spawner, spinners: Make,
) -> None:
    ours = spinners(2)
    async with scheduling(spawner, "signal", slice_ns=10_000_000) as scheduler:
        await scheduler.admit(thread(ours[0], "one", 100))
        await scheduler.admit(thread(ours[1], "three", 300))
        await until(lambda: all(v.slices > 3 for v in scheduler.statistics().vcpus))
        before = [s.ran_ns() for s in ours]
        await trio.sleep(1)
        first, second = (s.ran_ns() - b for s, b in zip(ours, before, strict=True))
        assert second / (first + second) == pytest.approx(0.75, abs=0.08)
    assert all(spinner.free() for spinner in ours)


async def test_a_vm_whose_process_ended_is_refused(spawner: Spawner, spinners: Make) -> None:
    (one,) = spinners(1)
    os.kill(one.pid, signal.SIGKILL)
    os.waitpid(one.pid, 0)  # noqa: ASYNC222 - killed above
    async with scheduling(spawner, "plain") as scheduler:
        with pytest.raises(AdmissionRefused, match="has ended"):
            await scheduler.admit(thread(one, "one"))
        assert scheduler.statistics().vcpus == ()


@pytest.mark.rt
async def test_a_vm_killed_while_scheduled_can_be_released(
    rt: None, spawner: Spawner, spinners: Make,
) -> None:
    one, two = spinners(2)
    async with scheduling(spawner, "precise") as scheduler:
        await scheduler.admit(thread(one, "one"))
        await scheduler.admit(thread(two, "two"))
        await until(lambda: scheduler.figures("one").slices > 2)
        os.kill(one.pid, signal.SIGKILL)
        with trio.fail_after(8):
            await scheduler.release("one")
        await until(lambda: os.waitpid(one.pid, os.WNOHANG)[0] == one.pid)
        await until(lambda: scheduler.figures("two").slices > 5)


