"""A VM's surroundings made of nothing: a zygote whose workers are scripts, a scheduler that writes down."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from mixvisor.config.model import Config
from mixvisor.service.children import SpawnFailed
from mixvisor.service.machine import Machine, MachineContext
from mixvisor.service.warnings import Board
from mixvisor.vm.modes import ModeDecision
from mixvisor.vm.worker.protocol import WorkerSpec

SCREEN = {"rows": ["gone"], "version": 1}


class FakeWorker:
    """Both a `Child` for the supervisor and the worker process behind it."""

    def __init__(self, journal: list[str], fds: list[int]) -> None:
        self.pid = self.pidfd = 0
        self.journal = journal
        self.socket = trio.socket.from_stdlib_socket(socket.socket(fileno=fds[0]))
        self.fds = fds[1:]
        self.status: int | None = None             # a wait status, once it has ended
        self.said = ""
        self.immortal = False                      # the kernel holds it: SIGKILL does not end it
        self.stopped = False                       # by SIGSTOP: it neither listens nor speaks
        self.heard: list[str] = []
        self.paused = False
        self._ended = trio.Event()
        self._awaited = False

    # What the supervisor does with it.

    def signal(self, number: signal.Signals) -> None:
        if number == signal.SIGKILL and self.status is None:
            self.journal.append("SIGKILL")
            if not self.immortal:
                self.die(number)

    async def wait(self) -> None:
        if self._awaited:                          # as trio does for a pidfd
            raise trio.BusyResourceError("another task is already waiting")
        self._awaited = True
        try:
            await self._ended.wait()
        finally:
            self._awaited = False

    async def reap(self) -> int | None:
        await self.wait()
        return self.status

    def words(self) -> str:
        return self.said

    def close(self) -> None:
        self.journal.append("closed")

    # What it does by itself.

    def die(self, status: int = 0) -> None:
        if self.status is None:
            self.status = status
            self._ended.set()
            self.hang_up()

    def hang_up(self) -> None:
        self.socket.close()
        while self.fds:
            os.close(self.fds.pop())

    async def say(self, **packet: Any) -> None:
        try:
            await self.socket.send(json.dumps(packet).encode())
        except (OSError, trio.ClosedResourceError):
            self.die()

    async def request(self) -> dict[str, Any]:
        data = await self.socket.recv(1 << 17)
        if not data:
            raise trio.EndOfChannel
        request = json.loads(data)
        self.heard.append(request["op"])
        return request

    async def end(self, fate: str = "stopped", **fields: Any) -> None:
        await self.say(event="ended", fate=fate, reason="the guest is done", code="asked", screen=SCREEN, **fields)

    async def serve(self, seconds: float = 0.0) -> None:
        """Obey, `seconds` late each time, until told to stop or killed."""
        try:
            while True:
                request = await self.request()
                await trio.sleep(seconds)
                await self.say(id=request["id"], ok=True)
                if request["op"] in ("pause", "resume"):
                    self.paused = request["op"] == "pause"
                elif request["op"] == "stop":
                    await self.end()
                    self.die()
        except (OSError, trio.ClosedResourceError, trio.EndOfChannel):
            self.die()


Script = Callable[[FakeWorker], Awaitable[None]]


async def good(worker: FakeWorker) -> None:
    await worker.say(event="started")
    await worker.serve()


async def silent(worker: FakeWorker) -> None:
    """Like a process stopped by SIGSTOP before it could say anything."""
    await trio.sleep(600)


async def started_then_silent(worker: FakeWorker) -> None:
    await worker.say(event="started")
    await silent(worker)


class FakeZygote:
    def __init__(self, nursery: trio.Nursery, journal: list[str]) -> None:
        self.script: Script = good
        self.refusal: str | None = None
        self.seconds = 0.0
        self.workers: list[FakeWorker] = []
        self._nursery, self._journal = nursery, journal

    async def spawn(self, kind: str, arguments: dict[str, Any], fds: list[int], title: str = "") -> Any:
        await trio.sleep(self.seconds)
        if self.refusal:
            raise SpawnFailed(self.refusal)
        assert all(worker.status is not None or worker.immortal for worker in self.workers), "two workers at once"
        worker = FakeWorker(self._journal, [os.dup(fd) for fd in fds])
        self.workers.append(worker)
        self._journal.append("spawned")
        self._nursery.start_soon(self.script, worker)
        return worker


class FakeScheduler:
    def __init__(self, journal: list[str]) -> None:
        self.journal = journal
        self.admitted: set[str] = set()
        self.paused: set[str] = set()
        self.trouble: Exception | None = None
        self.gone = False

    async def admit(self, thread: Any) -> None:
        if self.trouble:
            raise self.trouble
        self.admitted.add(thread.vm)
        self.journal.append("admitted")
        await trio.lowlevel.checkpoint()

    async def release(self, vm: str) -> None:
        if self.gone:
            raise AssertionError("the scheduler has ended")
        if vm in self.admitted:
            self.journal.append("released")
        self.admitted.discard(vm)
        self.paused.discard(vm)
        await trio.lowlevel.checkpoint()

    async def pause(self, vm: str) -> None:
        self.paused.add(vm)
        await trio.lowlevel.checkpoint()

    async def resume(self, vm: str) -> None:
        self.paused.discard(vm)
        await trio.lowlevel.checkpoint()

    def schedules(self, vm: str) -> bool:
        return vm in self.admitted

    async def set_parameters(self, vm: str, **parameters: Any) -> None:
        await trio.lowlevel.checkpoint()
        if self.trouble:
            raise self.trouble
        self.journal.append(f"set {parameters}")

    def forget(self, vm: str) -> None:
        assert self.gone or vm not in self.admitted

    def figures(self, vm: str) -> None:
        return None

    def figures_of(self, vm: str) -> tuple[()]:
        return ()


class Lab:
    """One VM named `one`, its surroundings, and what happened in order."""

    def __init__(self, nursery: trio.Nursery, log: Any = None, **keys: Any) -> None:
        self.journal: list[str] = []
        self.zygote = FakeZygote(nursery, self.journal)
        self.scheduler = FakeScheduler(self.journal)
        self.board = Board()
        self.phases: list[str] = []
        vm = {"name": "one", "boot": {"guest": "alu"}, "memory": "4M", "mode": "software", **keys}
        config = Config.model_validate({"vm": [vm]}).vms[0]
        self.machine = Machine(
            config, ModeDecision("software", "software", "explicit", "asked for"),
            WorkerSpec(name="one", engine="software", memory_bytes=4 << 20, boot="flat"), frozenset({0}),
            MachineContext(zygote=self.zygote, scheduler=self.scheduler, board=self.board, nursery=nursery,
                           changed=self._changed), log)

    def _changed(self) -> None:
        # In whatever state a VM is, it can be shown.
        self.phases.append(self.machine.snapshot().state)

    @property
    def state(self) -> str:
        return self.machine.snapshot().state

    @property
    def reason(self) -> str:
        return self.machine.snapshot().state_reason

    @property
    def worker(self) -> FakeWorker:
        return self.zygote.workers[-1]
