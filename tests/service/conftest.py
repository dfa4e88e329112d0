"""A whole service in one's own process, and proof that nothing of it is left."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from mixvisor.config.model import Config
from mixvisor.service.app import Service


async def until(condition: Callable[[], Any], seconds: float = 20, what: str = "the condition") -> Any:
    """Wait for a condition, not for a duration."""
    with trio.move_on_after(seconds):
        while True:
            value = condition()
            if value:
                return value
            await trio.sleep(0.02)
    pytest.fail(f"{what} did not come true within {seconds} s")


os.environ["MIXVISOR_TEST_RUN"] = RUN = f"{os.getpid()}-{os.urandom(8).hex()}"


def _ours(folder: Path) -> bool:
    try:
        return RUN.encode() in (folder / "environ").read_bytes()
    except PermissionError:
        return True                # without root a sandboxed worker's cannot be read: better one too many


def processes() -> set[int]:
    """Every live process of the project that this test run started (zombies do not count)."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            alive = (folder / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
            if alive and _ours(folder) and (folder / "comm").read_text().startswith("mixvisor"):
                found.add(int(folder.name))
    return found


def realtime_threads(pids: set[int]) -> list[int]:
    found = []
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                policy = os.sched_getscheduler(int(task.name)) & ~os.SCHED_RESET_ON_FORK
                if policy in (os.SCHED_FIFO, os.SCHED_RR):
                    found.append(int(task.name))
    return found


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """The test's own processes are gone afterwards, and so is its shared memory."""
    before, shm = processes(), set(os.listdir("/dev/shm"))
    fds = set(os.listdir("/proc/self/fd"))
    yield
    assert processes() - before == set()
    assert set(os.listdir("/dev/shm")) - shm == set()
    # One descriptor more is the listing itself, in both counts.
    assert len(os.listdir("/proc/self/fd")) <= len(fds) + 1


@contextlib.asynccontextmanager
async def running(
    tmp_path: Path, vms: list[dict[str, Any]], *, dispatch: str = "plain", facts: Any = None, **tables: Any,
) -> AsyncIterator[Service]:
    config = Config.model_validate({
        "host": {"cpus": str(max(os.sched_getaffinity(0))), "dispatch": dispatch},
        "metrics": {"listen": "127.0.0.1:0"}, **tables,
        "vm": [{"memory": "4M", **vm} for vm in vms]})
    service = Service(config, state_dir=tmp_path / "state", socket=tmp_path / "run" / "control.sock", facts=facts)
    async with trio.open_nursery() as nursery:
        with trio.fail_after(60):
            await nursery.start(service.run)
        try:
            yield service
        finally:
            service.request_shutdown()


def vm(service: Service, name: str):
    return next(v for v in service.snapshot().vms if v.name == name)
