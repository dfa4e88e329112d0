"""The zygote: processes are made, known by pidfd, and their end is told."""

import os
import resource
import signal
import socket
from pathlib import Path

import pytest
import trio

from mixvisor.service.children import SpawnFailed, open_zygote


async def test_a_child_gets_its_descriptors_and_its_end_is_known():
    async with open_zygote() as zygote:
        child = await zygote.spawn("spinner", {"seconds": 30}, [])
        assert os.getsid(child.pid) == zygote.pid
        child.signal(signal.SIGKILL)
        with trio.fail_after(10):
            assert os.WTERMSIG(await child.reap()) == signal.SIGKILL
        child.close()


async def test_an_unknown_kind_is_refused_by_the_child_and_said_on_its_stderr():
    async with open_zygote() as zygote:
        child = await zygote.spawn("nonsense", {}, [])
        with trio.fail_after(10):
            assert os.WEXITSTATUS(await child.reap()) == 70
        child.close()


async def test_a_dead_zygote_is_replaced_and_its_children_run_on():
    async with open_zygote() as zygote:
        first = await zygote.spawn("spinner", {"seconds": 30}, [])
        old = zygote.pid
        os.kill(old, signal.SIGKILL)
        second = await zygote.spawn("spinner", {"seconds": 30}, [])
        assert zygote.pid != old
        os.kill(first.pid, 0)
        for child in (first, second):
            child.signal(signal.SIGKILL)
            with trio.fail_after(10):
                await child.wait()
        assert await first.reap() is None
        assert await second.reap() == signal.SIGKILL
        first.close()
        second.close()


async def test_the_zygote_leaves_when_the_supervisor_is_gone():
    async with open_zygote() as zygote:
        pidfd = os.pidfd_open(zygote.pid)
        zygote._current._link.shutdown(socket.SHUT_RDWR)
        with trio.fail_after(10):
            await trio.lowlevel.wait_readable(pidfd)
        os.close(pidfd)


async def test_a_spawn_after_the_end_of_a_closed_link_says_so():
    async with open_zygote() as zygote:
        link = zygote._current
    with pytest.raises(SpawnFailed, match="has ended"):
        await link.ask({"op": "reap", "pid": 1})


async def test_a_zygote_that_hangs_is_killed_and_replaced_also_for_who_is_being_cancelled():
    async with open_zygote() as zygote:
        old = zygote.pid
        os.kill(old, signal.SIGSTOP)
        with trio.fail_after(20), trio.move_on_after(0.1) as given_up:
            # Waited for all the same: a process that was made must not be lost.
            child = await zygote.spawn("spinner", {"seconds": 30}, [])
        assert given_up.cancel_called
        with trio.fail_after(20):
            child = await zygote.spawn("spinner", {"seconds": 30}, [])
        assert zygote.pid != old
        child.signal(signal.SIGKILL)
        await child.reap()
        child.close()


def children_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


async def test_a_supervisor_without_descriptors_gets_a_sentence_and_leaves_no_process():
    before = set(os.listdir("/proc/self/fd"))
    async with open_zygote() as zygote:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        lowest_free = os.dup(0)
        os.close(lowest_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + 1, hard))    # one: for the child's stderr
        try:
            with pytest.raises(SpawnFailed, match="no file descriptor is left"):
                await zygote.spawn("spinner", {"seconds": 30}, [])
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert children_of(zygote.pid) == []
    assert set(os.listdir("/proc/self/fd")) == before


async def test_a_second_zygote_does_not_inherit_the_priority_that_the_supervisor_took_since():
    before = os.getpriority(os.PRIO_PROCESS, 0)
    async with open_zygote() as zygote:
        try:
            os.setpriority(os.PRIO_PROCESS, 0, before - 5)
        except PermissionError:
            pytest.skip("needs root")
        try:
            os.kill(zygote.pid, signal.SIGKILL)
            child = await zygote.spawn("spinner", {"seconds": 30}, [])
            assert os.getpriority(os.PRIO_PROCESS, child.pid) == before
        finally:
            os.setpriority(os.PRIO_PROCESS, 0, before)
        child.signal(signal.SIGKILL)
        await child.reap()
        child.close()


@pytest.mark.parametrize("dies_noticed", [True, False])
async def test_the_service_can_end_after_its_zygote_died(dies_noticed):
    async with open_zygote() as zygote:
        process = zygote._current.process
        os.kill(process.pid, signal.SIGKILL)
        if dies_noticed:
            pidfd = os.pidfd_open(process.pid)
            await trio.lowlevel.wait_readable(pidfd)
            os.close(pidfd)
            child = await zygote.spawn("spinner", {"seconds": 30}, [])
            child.signal(signal.SIGKILL)
            await child.reap()
            child.close()
