"""Host CPUs that go and come back: on a fake /sys, on a fake host with real processes, in a real cpuset."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import trio

from mixvisor.sched import planner
from mixvisor.sched.hostcpus import cpus_left, usable_cpus
from mixvisor.sched.supervisor import Scheduler
from mixvisor.vm.worker.status import Phase

from ..trees import tree
from .conftest import CPU, Spawner, Spinner, until
from .test_scheduler import thread

Make = Callable[[int], list[Spinner]]
CPUSET = Path("/sys/fs/cgroup/cpuset")
needs_two_cpus = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two host CPUs")


@pytest.mark.parametrize(("files", "cpus"), [
    ({"sys/devices/system/cpu/online": "0-3,6\n"}, {0, 1, 2, 3, 6}),
    # cgroup v1: what is in force, where the kernel tells; else what was asked for.
    ({"sys/devices/system/cpu/online": "0-3", "proc/self/cgroup": "3:cpuset:/a\n0::/\n",
      "sys/fs/cgroup/cpuset/a/cpuset.effective_cpus": "1-2\n"}, {1, 2}),
    ({"sys/devices/system/cpu/online": "0-3", "proc/self/cgroup": "3:cpu,cpuset:/a\n",
      "sys/fs/cgroup/cpuset/a/cpuset.cpus": "0,3"}, {0, 3}),
    # v2.
    ({"sys/devices/system/cpu/online": "0-1,3", "proc/self/cgroup": "0::/system.slice/m.service\n",
      "sys/fs/cgroup/system.slice/m.service/cpuset.cpus.effective": "1-3"}, {1, 3}),
    # Not delegated, garbled, absent: no limit.
    ({"sys/devices/system/cpu/online": "0-1", "proc/self/cgroup": "0::/x\n"}, {0, 1}),
    ({"sys/devices/system/cpu/online": "0-1", "proc/self/cgroup": "3:cpuset:/a\n",
      "sys/fs/cgroup/cpuset/a/cpuset.cpus": "rubbish"}, {0, 1}),
    ({}, set()),
])
def test_usable_is_what_is_online_and_in_the_cpuset(tmp_path: Path, files: dict[str, str], cpus: set[int]) -> None:
    assert usable_cpus(tree(tmp_path, files)) == cpus


def test_who_has_no_cpu_left_may_use_what_there_is() -> None:
    assert cpus_left(frozenset({1, 2}), frozenset({0, 2})) == {2}
    assert cpus_left(frozenset({1}), frozenset({0, 2})) == {0, 2}


class Board:
    def __init__(self) -> None:
        self.up: dict[str, str] = {}

    def warn(self, code: str, severity: str, message: str, advice: str) -> None:
        assert message
        assert advice
        self.up[code] = message

    def unwarn(self, code: str) -> None:
        self.up.pop(code, None)


@contextlib.asynccontextmanager
async def scheduling(
    spawner: Spawner, board: Board, usable: Callable[[], frozenset[int]] = usable_cpus,
) -> AsyncIterator[Scheduler]:
    scheduler = Scheduler(cpus=[0, CPU], spawn=spawner, dispatch="signal", warn=board.warn, unwarn=board.unwarn,
                          usable_cpus=usable)
    async with trio.open_nursery() as nursery:
        await nursery.start(scheduler.run)
        yield scheduler
        nursery.cancel_scope.cancel()


def where(scheduler: Scheduler) -> dict[str, int | None]:
    return {vcpu.vm: vcpu.cpu for vcpu in scheduler.statistics().vcpus}


@needs_two_cpus
async def test_a_cpu_goes_and_comes_back_and_its_vms_run_on(spawner: Spawner, spinners: Make) -> None:
    (fixed, free) = spinners(2)
    board, there = Board(), {0, CPU}
    async with scheduling(spawner, board, lambda: frozenset(there)) as scheduler:
        await scheduler.admit(thread(fixed, "fixed", cpus=frozenset({0}), reservation=0.6))
        await scheduler.admit(thread(free, "free", cpus=frozenset({0, CPU}), reservation=0.6))
        await until(lambda: where(scheduler) == {"fixed": 0, "free": CPU})
        there.discard(0)
        await until(lambda: where(scheduler) == {"fixed": CPU, "free": CPU})
        await until(lambda: {"host-cpus-gone", "affinity-impossible", "reservations-not-met"} <= set(board.up))
        assert "fixed" in board.up["affinity-impossible"]
        await until(lambda: len(spawner.alive("dispatcher")) == 1)
        assert os.sched_getaffinity(fixed.pid) == {CPU}
        received = {vcpu.vm: vcpu.run_ns for vcpu in scheduler.statistics().vcpus}
        await until(lambda: all(v.run_ns > received[v.vm] for v in scheduler.statistics().vcpus))
        there.add(0)
        await until(lambda: where(scheduler) == {"fixed": 0, "free": CPU})
        await until(lambda: not board.up)
        for vcpu in scheduler.statistics().vcpus:
            assert vcpu.run_ns >= received[vcpu.vm]          # accounts went on
        assert scheduler.statistics().errors == {}
    assert fixed.free()
    assert free.free()


@needs_two_cpus
async def test_if_every_cpu_is_said_to_be_gone_all_are_kept(spawner: Spawner, spinners: Make) -> None:
    (one,) = spinners(1)
    board, there = Board(), {0, CPU}
    async with scheduling(spawner, board, lambda: frozenset(there)) as scheduler:
        await scheduler.admit(thread(one, "one"))
        there.clear()
        there.add(99)
        await trio.sleep(0.6)
        assert len(spawner.alive("dispatcher")) == 2
        assert where(scheduler) == {"one": CPU}


@needs_two_cpus
async def test_an_affinity_that_somebody_else_sets_is_put_back_and_told(spawner: Spawner, spinners: Make) -> None:
    (one,) = spinners(1)
    board = Board()
    async with scheduling(spawner, board) as scheduler:
        await scheduler.admit(thread(one, "one"))
        await until(lambda: where(scheduler) == {"one": CPU})
        os.sched_setaffinity(one.pid, {0})
        dispatchers = spawner.alive("dispatcher")
        os.sched_setaffinity(dispatchers[1].pid, {0})
        await until(lambda: os.sched_getaffinity(one.pid) == {CPU})
        await until(lambda: os.sched_getaffinity(dispatchers[1].pid) == {CPU})
        await until(lambda: "one" in board.up.get("affinity-changed", ""))
        assert scheduler.statistics().errors == {"affinity": 1}


@pytest.fixture
def cpuset() -> Iterator[Callable[[str], None]]:
    """This process in a cpuset of its own (cgroup v1), both CPUs of it; the function narrows or widens it."""
    ours = CPUSET / f"mixvisor-test-{os.getpid()}"
    try:
        home = next(line.split(":", 2)[2] for line in Path("/proc/self/cgroup").read_text().splitlines()
                    if line.split(":")[1] == "cpuset")
        ours.mkdir()
    except (OSError, StopIteration):
        pytest.skip("needs a cpuset hierarchy of cgroup v1 that may be written")
    affinity = os.sched_getaffinity(0)
    try:
        (ours / "cpuset.mems").write_text((CPUSET / "cpuset.mems").read_text())
        (ours / "cpuset.cpus").write_text(f"0,{CPU}")
        (ours / "cgroup.procs").write_text(str(os.getpid()))
        yield lambda cpus: (ours / "cpuset.cpus").write_text(cpus) and None
    finally:
        (CPUSET / home.lstrip("/") / "cgroup.procs").write_text(str(os.getpid()))
        for pid in (ours / "cgroup.procs").read_text().split():
            with contextlib.suppress(OSError):
                (CPUSET / home.lstrip("/") / "cgroup.procs").write_text(pid)
        os.sched_setaffinity(0, affinity)
        ours.rmdir()


@needs_two_cpus
@pytest.mark.privileged
async def test_a_cpuset_that_is_narrowed_under_us_takes_a_cpu_and_widened_gives_it_back(
    cpuset: Callable[[str], None], spawner: Spawner, spinners: Make,
) -> None:
    (one, two) = spinners(2)
    board = Board()
    async with scheduling(spawner, board) as scheduler:
        await scheduler.admit(thread(one, "one", cpus=frozenset({0, CPU})))
        await scheduler.admit(thread(two, "two", cpus=frozenset({0, CPU})))
        await until(lambda: set(where(scheduler).values()) == {0, CPU})
        cpuset(str(CPU))
        await until(lambda: set(where(scheduler).values()) == {CPU})
        await until(lambda: "host-cpus-gone" in board.up)
        cpuset(f"0,{CPU}")
        await until(lambda: set(where(scheduler).values()) == {0, CPU})
        await until(lambda: all(os.sched_getaffinity(p.pid) != {0, CPU} for p in spawner.alive("dispatcher")))
        await until(lambda: {frozenset(os.sched_getaffinity(s.pid)) for s in (one, two)}
                    == {frozenset({0}), frozenset({CPU})})
        await until(lambda: "host-cpus-gone" not in board.up)


@needs_two_cpus
async def test_a_cpu_that_falls_idle_takes_a_waiting_vcpu_before_the_next_plan(
    spawner: Spawner, spinners: Make, monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours = spinners(3)
    # As on a host with very many VMs, only more so: plans are made where VMs come and go, and else hardly ever.
    monkeypatch.setattr(planner, "BALANCE_S", 60.0)
    async with scheduling(spawner, Board()) as scheduler:
        scheduler._planner.period_s = 60.0
        for number, spinner in enumerate(ours):
            await scheduler.admit(thread(spinner, f"vm{number}", cpus=frozenset({0, CPU})))
        await until(lambda: all(v.slices > 1 for v in scheduler.statistics().vcpus))
        plans = scheduler._planner.plans
        alone = [name for name, cpu in where(scheduler).items()
                 if list(where(scheduler).values()).count(cpu) == 1]
        ours[int(alone[0][2:])].page.set("phase", Phase.SLEEPING)
        await until(lambda: len({cpu for name, cpu in where(scheduler).items() if name != alone[0]}) == 2)
        assert scheduler._planner.plans == plans
        ours[int(alone[0][2:])].page.set("phase", Phase.RUNNING)
