"""The zygote: processes are made, known by pidfd, and their end is told."""

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import structlog
import trio

from mixvisor.service import children
from mixvisor.service.children import SpawnFailed, _Link, open_zygote


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


@contextlib.contextmanager
def coming_up(does: str):
    """A link to a process that is to say that it is ready on the descriptor FD."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen([sys.executable, "-c", does.replace("FD", str(theirs.fileno()))],
                                   pass_fds=[theirs.fileno()])
    link = _Link(trio.socket.from_stdlib_socket(ours), process)
    try:
        yield link
    finally:
        process.kill()
        process.wait()
        ours.close()


COMPUTES = "import os, time\nwhile time.process_time() < {}: pass\nos.write(FD, b'ready')\ntime.sleep(60)"


async def test_a_zygote_that_is_slow_to_come_up_is_waited_for_with_a_word_as_long_as_it_gets_on(monkeypatch):
    monkeypatch.setattr(children, "STANDS_STILL_SECONDS", 0.25)
    with coming_up(COMPUTES.format(0.8)) as link, structlog.testing.capture_logs() as said:
        await link.warm()
    assert {entry["code"] for entry in said} == {"slow-start"}
    assert "the host is slow or crowded" in said[0]["event"]


@pytest.mark.parametrize(("does", "still", "at_most", "words"), [
    ("import time\ntime.sleep(60)", 1.0, 60.0, "none in the last 1 s: the host is overloaded"),
    (COMPUTES.format(60), 0.25, 0.5, "and was not done: the host is overloaded"),
    ("raise SystemExit(3)", 60.0, 60.0, "it ended with exit code 3"),
])
async def test_a_zygote_that_does_not_come_up_is_given_up_with_the_reason(monkeypatch, does, still, at_most, words):
    monkeypatch.setattr(children, "STANDS_STILL_SECONDS", still)
    monkeypatch.setattr(children, "WARM_UP_SECONDS", at_most)
    with coming_up(does) as link, pytest.raises(SpawnFailed, match=words):
        await link.warm()
