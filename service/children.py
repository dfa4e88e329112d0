"""The supervisor's side of the zygote: asking for processes, and knowing how they end.

A `Child` is known by its pidfd: signals and waiting go through it, so a reused process id can
never be hit. The zygote itself is started again when it dies or hangs; children of a dead zygote go on
running, only their exit status is lost (`Child.reap` returns None).

Invariants.  A request that was sent is waited for, also by a task that is being cancelled, but
`ANSWER_SECONDS` at most: then the zygote is killed. One that comes up is given up when it stands still, not when it
is slow: a deadline of seconds would make a slow or crowded host unusable. A process that was made is either returned as
a `Child` or killed. Every zygote has the priority that the supervisor had at first.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import structlog
import trio

from ..sched.linux import Kernel
from .backend import ServiceError

__all__ = ["Child", "SpawnFailed", "Zygote", "open_zygote"]

STANDS_STILL_SECONDS: Final = 30.0   # while it comes up, which takes half a second of CPU time on a common host
WARM_UP_SECONDS: Final = 600.0       # however busy it is
ANSWER_SECONDS: Final = 3.0      # forking takes milliseconds
STDERR_TAIL_BYTES: Final = 4096

log = structlog.get_logger("mixvisor")


class SpawnFailed(ServiceError):
    """No process could be started; the text says why."""

    code = "spawn-failed"


@dataclass(slots=True)
class Child:
    """A process made by the zygote. `close` frees the descriptors; it ends nothing."""

    pid: int
    pidfd: int
    kind: str
    stderr_fd: int
    _maker: _Link
    _reaped: bool = field(default=False)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; one to a process that has ended is no error."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    async def wait(self) -> None:
        """Return once the process has ended (it may still be a zombie)."""
        await trio.lowlevel.wait_readable(self.pidfd)

    async def reap(self) -> int | None:
        """The wait status of an *ended* process; None when its zygote is gone."""
        await self.wait()
        if self._reaped:
            return None
        self._reaped = True
        with contextlib.suppress(SpawnFailed):
            return (await self._maker.ask({"op": "reap", "pid": self.pid}))[0]["status"]
        return None

    def words(self) -> str:
        """The end of what the process wrote to its standard error, for a report."""
        size = os.fstat(self.stderr_fd).st_size
        start = max(0, size - STDERR_TAIL_BYTES)
        return os.pread(self.stderr_fd, STDERR_TAIL_BYTES, start).decode(errors="replace").strip()

    def close(self) -> None:
        os.close(self.pidfd)
        os.close(self.stderr_fd)


class _Link:
    """One zygote process and the socket to it; requests are strictly one after the other.

    Once `broken` it stays so, and its process has been killed.
    """

    def __init__(self, link: trio.socket.SocketType, process: subprocess.Popen[bytes]) -> None:
        self._link = link
        self._turn = trio.Lock()
        self.process = process
        self.broken = False

    async def ask(
        self, request: dict[str, Any], fds: Sequence[int] = (),
    ) -> tuple[dict[str, Any], list[int]]:
        async with self._turn:
            if self.broken:
                raise SpawnFailed("the zygote process has ended")
            # An answer that nobody waits for any more would be taken for the next one's:
            # a request once sent is finished.
            data, received = b"", list[int]()
            with trio.move_on_after(ANSWER_SECONDS, shield=True) as limit:
                try:
                    await self._send(json.dumps(request).encode(), fds)
                    data, received = await self._receive()
                except OSError as error:
                    self._break()
                    raise SpawnFailed(f"the zygote process does not answer: {error}") from error
            if not data:
                self._break()
                raise SpawnFailed(f"the zygote process did not answer within {ANSWER_SECONDS:g} s"
                                  if limit.cancelled_caught else "the zygote process has ended")
        answer = json.loads(data)
        if "error" in answer:
            for fd in received:
                os.close(fd)
            raise SpawnFailed(f"could not {request['op']} a process: {answer['error']}")
        return answer, received

    def _break(self) -> None:
        self.broken = True
        self.process.kill()                   # nothing where it has ended and was waited for

    async def _send(self, data: bytes, fds: Sequence[int]) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, _fd_array(fds))] if fds else []
        await self._link.sendmsg([data], ancillary)

    async def _receive(self) -> tuple[bytes, list[int]]:
        space = socket.CMSG_SPACE(4 * 4)
        data, ancillary, _flags, _address = await self._link.recvmsg(64 * 1024, space)
        fds: list[int] = []
        for level, kind, payload in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.extend(memoryview(payload[:len(payload) // 4 * 4]).cast("i"))
        return data, fds

    async def warm(self) -> None:
        """Wait until it can make processes, as long as it gets on: until then it imports, which is CPU time."""
        began, used = trio.current_time(), 0.0
        clock = Kernel().run_clock(self.process.pid, self.process.pid)
        while True:
            data = None
            with trio.move_on_after(STANDS_STILL_SECONDS):
                data, _fds = await self._receive()
            if data:
                return
            if data is not None:
                await _wait_ended(self.process)               # its socket ends a little before it does
                code = self.process.poll()
                why = f"it ended with exit code {code}" if code is not None else "it has closed its socket"
                break
            waited = trio.current_time() - began
            before, used = used, clock.read() / 1e9   # not waited for: the number is still its own
            if used == before or waited >= WARM_UP_SECONDS:
                why = (f"after {waited:.0f} s it had used {used:.1f} s of CPU time, "
                       + (f"none in the last {STANDS_STILL_SECONDS:g} s" if used == before else "and was not done")
                       + ": the host is overloaded, or reading the program from its disk hangs")
                break
            log.warning(f"the service still loads its program after {waited:.0f} s ({used:.1f} s of CPU time): the "
                        "host is slow or crowded", code="slow-start")
        self._break()
        raise SpawnFailed(f"the zygote process did not come up: {why}")

    async def close(self) -> None:
        """End the zygote: it leaves by itself when its socket ends."""
        self.broken = True
        self._link.close()
        if self.process.poll() is not None:
            return
        await _wait_ended(self.process)
        self.process.kill()
        self.process.wait()


async def _wait_ended(process: subprocess.Popen[bytes]) -> None:
    """For two seconds at most."""
    if process.poll() is not None:
        return
    pidfd = os.pidfd_open(process.pid)        # not waited for until now, so the number is still its own
    try:
        with trio.move_on_after(2, shield=True):
            await trio.lowlevel.wait_readable(pidfd)
    finally:
        os.close(pidfd)


def _fd_array(fds: Sequence[int]) -> bytes:
    return b"".join(fd.to_bytes(4, sys.byteorder) for fd in fds)


class Zygote:
    """Makes processes; replaces its zygote process when that has died."""

    def __init__(self) -> None:
        self._current: _Link | None = None
        self._starting = trio.Lock()
        # The supervisor raises its own later: that must not be inherited by a second zygote's VMs.
        self._nice = os.getpriority(os.PRIO_PROCESS, 0)

    @property
    def pid(self) -> int | None:
        return self._current.process.pid if self._current else None

    async def _link(self) -> _Link:
        async with self._starting:
            link = self._current
            if link is not None and (link.broken or link.process.poll() is not None):
                self._current = None
                await link.close()
                link = None
            if link is None:
                link = await _start(self._nice)
                self._current = link
            return link

    async def spawn(
        self, kind: str, arguments: dict[str, Any], fds: Sequence[int] = (), *, title: str | None = None,
    ) -> Child:
        """Fork a process of `kind` (service/zygote.py) that owns copies of `fds`.

        Raises SpawnFailed. The caller keeps its own descriptors.
        """
        stderr_fd = os.memfd_create(f"mixvisor-{kind}-stderr", os.MFD_CLOEXEC)
        request = {"op": "spawn", "kind": kind, "arguments": arguments, "title": title}
        try:
            for attempt in (1, 2):
                link = await self._link()
                try:
                    answer, received = await link.ask(request, [*fds, stderr_fd])
                except SpawnFailed:
                    # A zygote that died since the last request is replaced once.
                    if not link.broken or attempt == 2:
                        raise
                    continue
                if not received:
                    await self._lose(link, answer["pid"])
                    raise SpawnFailed("no file descriptor is left for the new process: raise the limit (ulimit -n, "
                                      "LimitNOFILE=)")
                return Child(answer["pid"], received[0], kind, stderr_fd, link)
        except BaseException:
            os.close(stderr_fd)
            raise
        raise AssertionError("unreachable")

    async def _lose(self, link: _Link, pid: int) -> None:
        """End a process whose pidfd did not arrive. It is its zygote's until reaped, so the number is its own."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(SpawnFailed):
            await link.ask({"op": "reap", "pid": pid})

    async def close(self) -> None:
        if self._current is not None:
            await self._current.close()
            self._current = None


async def _start(nice: int) -> _Link:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        # Not trio.run_process: the zygote outlives any one task, and needs no pipes.
        process = subprocess.Popen(  # noqa: ASYNC220 - the fork of a small process, once
            [sys.executable, "-m", "mixvisor.service.zygote", str(theirs.fileno()), str(nice)],
            pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
    link = _Link(trio.socket.from_stdlib_socket(ours), process)
    try:
        await link.warm()
    except BaseException:
        process.kill()
        await link.close()
        raise
    return link


@contextlib.asynccontextmanager
async def open_zygote() -> AsyncIterator[Zygote]:
    """A warm zygote for the length of a block."""
    zygote = Zygote()
    await zygote._link()
    try:
        yield zygote
    finally:
        with trio.CancelScope(shield=True):
            await zygote.close()
