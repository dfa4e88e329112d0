"""Real processes for the scheduler's tests: spinners, and a spawn without a zygote."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio

from mixvisor.sched import dispatching, guard, linux, selftest
from mixvisor.sched.dispatcher import Dispatcher, Settings
from mixvisor.sched.shared import Shared
from mixvisor.vm.worker.status import STATUS_SIZE, Phase, StatusPage

from .fakes import SLICE, Host, TwoHosts

CPU = 1                     # the only one that real-time tests may use
LIFETIME_S = 12             # of any process a test starts, whatever becomes of the test

ENTRIES: dict[str, Callable[[dict[str, Any], list[int]], int]] = {
    "dispatcher": dispatching.main, "guard": guard.main, "spinner": selftest.spin}


class LocalProcess:
    """What service/children.py's Child is to the scheduler."""

    def __init__(self, pid: int, kind: str) -> None:
        self.pid = pid
        self.kind = kind
        self.pidfd = os.pidfd_open(pid)
        self.status: int | None = None

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    async def wait(self) -> None:
        await trio.lowlevel.wait_readable(self.pidfd)

    async def reap(self) -> int | None:
        await self.wait()
        if self.status is None:
            with contextlib.suppress(ChildProcessError):
                self.status = os.waitpid(self.pid, 0)[1]  # noqa: ASYNC222 - it has ended
        return self.status

    def words(self) -> str:
        return ""

    def close(self) -> None:
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1


def fork(run: Callable[[], int]) -> int:
    """A child that runs `run`, SCHED_OTHER, and never outlives LIFETIME_S."""
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            signal.alarm(LIFETIME_S)
            code = run()
        finally:
            os._exit(code)
    return pid


class Spawner:
    def __init__(self) -> None:
        self.made: list[LocalProcess] = []

    async def __call__(
        self, kind: str, arguments: dict[str, Any], fds: Sequence[int] = (),
    ) -> LocalProcess:
        copies = [os.dup(fd) for fd in fds]
        pid = fork(lambda: ENTRIES[kind](arguments, copies))
        for fd in copies:
            os.close(fd)
        process = LocalProcess(pid, kind)
        self.made.append(process)
        return process

    def alive(self, kind: str) -> list[LocalProcess]:
        return [p for p in self.made if p.kind == kind and p.status is None]


class Spinner:
    """A process with a status page that computes, or sleeps while its page says so."""

    def __init__(self) -> None:
        self.status_fd = os.memfd_create("status", os.MFD_CLOEXEC)
        os.ftruncate(self.status_fd, STATUS_SIZE)
        self.page = StatusPage(self.status_fd, writable=True)
        self.page.set("phase", Phase.RUNNING)
        self.pid = fork(self._run)
        self.pidfd = os.pidfd_open(self.pid)
        self.started = linux.start_ticks(self.pid)

    def _run(self) -> int:
        words = self.page.words
        while True:
            if words[1] == Phase.SLEEPING:
                time.sleep(0.002)
            elif words[1] == Phase.ENDED:
                return 0

    @property
    def policy(self) -> int:
        return os.sched_getscheduler(self.pid)

    def free(self) -> bool:
        """SCHED_OTHER, unpinned, not stopped."""
        state = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        return (self.policy == os.SCHED_OTHER and state != "T"
                and len(os.sched_getaffinity(self.pid)) == os.cpu_count())

    def ran_ns(self) -> int:
        clock = linux.Kernel().run_clock(self.pid, self.pid)
        return clock.read()

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            linux.give_back(self.pid, self.pid, range(os.cpu_count() or 1))
            os.kill(self.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)
        os.close(self.pidfd)
        self.page.close()
        os.close(self.status_fd)


@pytest.fixture
def rt() -> Iterator[None]:
    """One real-time test at a time on this machine."""
    with open(Path(tempfile.gettempdir()) / "mixvisor-rt-tests.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture
def spawner() -> Iterator[Spawner]:
    made = Spawner()
    yield made
    for process in made.made:
        if process.status is None:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(process.pid, signal.SIGKILL)
                os.waitpid(process.pid, 0)
        process.close()


@pytest.fixture
def spinners() -> Iterator[Callable[[int], list[Spinner]]]:
    made: list[Spinner] = []

    def make(count: int) -> list[Spinner]:
        made.extend(Spinner() for _ in range(count))
        return made[-count:]

    yield make
    for spinner in made:
        spinner.close()


async def until(condition: Callable[[], bool], seconds: float = 8.0) -> None:
    with trio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110 - other processes wake nobody
            await trio.sleep(0.002)


@pytest.fixture
def host() -> Iterator[Host]:
    made = Host()
    yield made
    made.close()


@pytest.fixture
def two_hosts() -> Iterator[TwoHosts]:
    """Two host CPUs over one table."""
    shared = Shared.create([1, 2], slots=4, ring_records=64)
    shared.set("slice_ns", SLICE)
    shared.set("guard_timeout_ns", 1 << 60)
    first, second = Host(shared=shared), Host(shared=shared, cpu=2)
    second.dispatcher = Dispatcher(
        shared, Settings(kind="precise", cpu=2, index=1, home_cpus=(0, 1)),
        second.kernel, second, 1_000)  # type: ignore[arg-type]
    second.kernel.threads = first.kernel.threads
    yield shared, first, second
    fd = shared.fd
    shared.close()
    os.close(fd)
