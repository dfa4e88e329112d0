"""The guard and the dispatcher against a supervisor that dies or stands still."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable

import pytest
import trio

from mixvisor.sched import linux
from mixvisor.sched.shared import Shared
from mixvisor.sched.supervisor import Scheduler

from .conftest import CPU, Spawner, Spinner, fork, until
from .test_scheduler import thread

Make = Callable[[int], list[Spinner]]


def supervise(ours: list[Spinner], told: int) -> int:
    """A supervisor in a process of its own; writes a byte when it schedules."""
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            scheduler = Scheduler(cpus=[CPU], spawn=Spawner(), dispatch="precise")
            await nursery.start(scheduler.run)
            for number, spinner in enumerate(ours):
                await scheduler.admit(thread(spinner, f"vm{number}"))
            await until(lambda: all(v.slices for v in scheduler.statistics().vcpus))
            os.write(told, b"1")
            await trio.sleep_forever()
    trio.run(main)
    return 0


def wait_for(condition: Callable[[], bool], seconds: float = 8.0) -> None:
    """`until` for a test that forks a trio process, which must not happen inside trio."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.002)


def stand_in(ours: list[Spinner]) -> int:
    read, write = os.pipe()
    pid = fork(lambda: supervise(ours, write))
    os.close(write)
    assert os.read(read, 1) == b"1", "the stand-in for a supervisor did not come up"
    os.close(read)
    return pid


def is_realtime(spinner: Spinner) -> bool:
    return spinner.policy & ~os.SCHED_RESET_ON_FORK == os.SCHED_FIFO


def ended(spinner: Spinner) -> bool:
    return os.waitid(os.P_PID, spinner.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


@pytest.mark.rt
def test_a_dead_supervisor_leaves_no_vm_and_no_realtime_thread(
    rt: None, spinners: Make,
) -> None:
    ours = spinners(3)
    supervisor = stand_in(ours)
    wait_for(lambda: any(map(is_realtime, ours)))
    os.kill(supervisor, signal.SIGKILL)
    os.waitpid(supervisor, 0)
    wait_for(lambda: all(map(ended, ours)))


@pytest.mark.rt
def test_a_stuck_supervisor_has_its_vms_given_back_and_left_running(
    rt: None, spinners: Make,
) -> None:
    ours = spinners(3)
    supervisor = stand_in(ours)
    try:
        wait_for(lambda: any(map(is_realtime, ours)))
        os.kill(supervisor, signal.SIGSTOP)
        wait_for(lambda: all(spinner.free() for spinner in ours), 4)
        before = [spinner.ran_ns() for spinner in ours]
        wait_for(lambda: all(
            s.ran_ns() > old + 10_000_000 for s, old in zip(ours, before, strict=True)))
        assert not any(map(ended, ours))
    finally:
        os.kill(supervisor, signal.SIGKILL)
        os.waitpid(supervisor, 0)


@pytest.mark.rt
async def test_a_dispatcher_without_supervisor_and_guard_gives_up_by_itself(
    rt: None, spawner: Spawner, spinners: Make,
) -> None:
    (one,) = spinners(1)
    shared = Shared.create([CPU], slots=4, ring_records=16)
    shared.set("slice_ns", 5_000_000)
    shared.set("guard_timeout_ns", 100_000_000)
    shared.set("heartbeat_ns", time.monotonic_ns())
    for name, value in (("pid", one.pid), ("tid", one.pid), ("want_cpu", CPU), ("rate", 10**9),
                        ("flags", 1), ("generation", 1)):
        shared.slot_set(0, name, value)
    shared.set("used_slots", 1)
    shared.bump()


    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = await spawner(
        "dispatcher", {"kind": "precise", "cpu": CPU, "index": 0, "home_cpus": [0, 1]},
        [shared.fd, theirs.fileno()])
    def beating_until_it_runs() -> bool:
        # On a loaded machine the dispatcher may take longer to come up than a heartbeat lasts.
        shared.set("heartbeat_ns", time.monotonic_ns())
        return is_realtime(one)

    await until(beating_until_it_runs)
    with trio.fail_after(8):
        assert await process.reap() == 0
    assert one.free()
    assert shared.slot_get(0, "have_cpu") == -1
    ours.close()
    theirs.close()

    shared.close()
    os.close(shared.fd)


def test_a_reused_pid_is_not_signalled(spinners: Make) -> None:
    (one,) = spinners(1)
    assert one.started is not None
    assert linux.kill_exactly(one.pid, one.started + 1) is None
    assert not ended(one)
    fd = linux.kill_exactly(one.pid, one.started)
    assert fd is not None
    os.close(fd)
    os.waitpid(one.pid, 0)
    assert linux.kill_exactly(one.pid, one.started) is None


