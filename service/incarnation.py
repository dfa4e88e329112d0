"""One worker process of one VM: made, talked to, ended; nothing of it outlives `close`.

Owns the descriptors (guest memory, status page, control socket, images) and the read-only page
with the guest's progress counter, the only guest memory that the supervisor maps. The child gets
copies; the memory itself is freed by the kernel when the last of both is gone.

Invariant.  What the supervisor maps is sealed against shrinking: a worker that truncated it would
end the supervisor by SIGBUS.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import random
import signal
import socket
import time
from dataclasses import replace
from typing import Any, Final, cast

import trio

from ..vm.hosts.instructions import open_instructions
from ..vm.modes import Mode
from ..vm.worker.protocol import Ending, WorkerSpec
from ..vm.worker.status import STATUS_SIZE, StatusPage
from .backend import ServiceError
from .children import Child, Zygote
from .images import Images
from .link import Nonsense, WorkerLink, harmless, parse_ending
from .savefile import SavedFile, identify

__all__ = ["Incarnation", "StartFailed", "shape"]

START_SECONDS: Final = 20
EXIT_SECONDS: Final = 1.0        # between the end of a worker's process and that of its socket
RESIDENT_SECONDS: Final = 2.0
PAGE: Final = mmap.PAGESIZE


class StartFailed(ServiceError):
    code = "start-failed"


class Incarnation:
    """A worker process and what belongs to it, `images` included. Made by `launch`."""

    def __init__(self, spec: WorkerSpec, images: Images, progress: int | None) -> None:
        self.spec = replace(spec, disks=images.disks)
        self.images = images
        self._state: bytes | None = None   # of a saved VM, to go on from
        self._progress_base = 0
        self.ending: Ending | None = None
        self.legacy: dict[str, dict[str, Any]] = {}   # `screen` and `serial` of a guest that has ended
        self.ended = trio.Event()          # the worker said how its guest ended, or is gone
        self.threads: list[int] = []       # of the vCPUs, once started; the kernel knows whether they are the child's
        self._announced = trio.Event()     # started or failed
        self._gone = trio.Event()          # the process has ended
        self._fds: list[int] = []
        self._progress_page: mmap.mmap | None = None
        self._resident = 0
        self._resident_at = -RESIDENT_SECONDS
        self.child: Child | None = None
        self.link: WorkerLink | None = None
        try:
            self.memory_fd = self._own(_sealed_memory(f"mixvisor:{spec.name}", spec.memory_bytes))
            self.status_fd = self._own(_sealed_memory(f"mixvisor-status:{spec.name}", STATUS_SIZE))
            self._progress_at = 0
            if progress is not None:
                self._progress_at = progress % PAGE // 8
                self._progress_page = mmap.mmap(
                    self.memory_fd, PAGE, prot=mmap.PROT_READ, offset=progress - progress % PAGE)
                self._progress_words = memoryview(self._progress_page).cast("Q")
            self.status = StatusPage(self.status_fd, writable=False)
        except BaseException:
            self._release()
            raise

    def _own(self, fd: int) -> int:
        self._fds.append(fd)
        return fd

    def go_on_from(self, saved: SavedFile) -> None:
        """Before `launch`: memory is filled from a file, the worker gets the state in it. Raises SavedError. Blocks."""
        saved.fits(self.spec.name, self.spec.memory_bytes, shape(self.spec), [identify(fd) for fd in self.images.fds])
        saved.fill(self.memory_fd)
        self._state = saved.state
        self.spec = replace(self.spec, restored=True)
        self._progress_base = self.progress() or 0

    async def launch(self, zygote: Zygote) -> None:
        """Fork the worker. Raises SpawnFailed."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                fds = [theirs.fileno(), self.memory_fd, self.status_fd, *self.images.fds]
                if self._state is not None:
                    # Owned: the worker reads it some time after this.
                    fds.append(self._own(os.memfd_create("mixvisor-state", os.MFD_CLOEXEC)))
                    os.pwrite(fds[-1], self._state, 0)
                child = await zygote.spawn(
                    "worker", self.spec.to_json(), fds, title=f"mixvisor:{self.spec.name}")
            except BaseException:
                ours.close()
                raise
        self.child = child
        self.link = WorkerLink(trio.socket.from_stdlib_socket(ours), lambda: child.signal(signal.SIGUSR1))

    async def watch(self) -> None:
        """Listen until the worker has said its last word or is gone; the process may still be there."""
        child, link = self._live()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._listen, link)
            nursery.start_soon(self._exited, child)
            await self.ended.wait()
            if self.ending is None:
                with trio.move_on_after(EXIT_SECONDS) as limit:
                    await self._gone.wait()
                if limit.cancelled_caught:
                    self.ending = Ending(
                        "crashed", "its worker closed its control socket without a report", "protocol")
            nursery.cancel_scope.cancel()
        self._announced.set()

    async def _exited(self, child: Child) -> None:
        await child.wait()
        self._gone.set()
        # What it said last is still in the socket: the listener reads to its end.
        with trio.move_on_after(EXIT_SECONDS):
            await self.ended.wait()
        self.ended.set()

    async def _listen(self, link: WorkerLink) -> None:
        try:
            await link.events(self._heard)
        except Nonsense as error:
            if self.ending is None:
                self.ending = Ending("crashed", f"its worker broke the protocol: {error}", "protocol")
        self.ended.set()

    def _heard(self, packet: dict[str, Any]) -> None:
        event = packet["event"]
        if event == "started" and not self._announced.is_set():
            self.threads = self._vcpu_threads(packet.get("threads"))
            self._announced.set()
        elif event == "failed":
            self.ending = parse_ending({"fate": "failed", "code": packet.get("code", "start"),
                                        "reason": packet.get("reason") or packet.get("error")})
            self._announced.set()
            self.ended.set()
        elif event == "ended":
            self.ending = parse_ending(packet)
            self.legacy = {op: packet[op] for op in ("screen", "serial") if isinstance(packet.get(op), dict)}
            self._announced.set()
            self.ended.set()
        else:
            raise Nonsense(f"an unexpected event {harmless(event)[:40]!r}")

    def _vcpu_threads(self, told: object) -> list[int]:
        """A claim of the worker's: as many different threads as there are vCPUs, its first one first."""
        child, _link = self._live()
        if self.spec.vcpus == 1:
            return [child.pid]
        threads = cast("list[object]", told) if isinstance(told, list) else []
        numbers = [thread for thread in threads if type(thread) is int and 0 < thread < 1 << 31]
        if len(numbers) != len(threads) or len(set(numbers)) != self.spec.vcpus or numbers[0] != child.pid:
            raise Nonsense(f"it has {self.spec.vcpus} vCPUs and names other threads")
        return numbers

    async def wait_started(self) -> None:
        """Return when the guest runs (or has run). Raises StartFailed."""
        with trio.move_on_after(START_SECONDS) as limit:
            await self._announced.wait()
        if limit.cancelled_caught:
            raise StartFailed(f"the worker did not start its guest within {START_SECONDS} s")
        if self.ending is not None and self.ending.fate == "failed":
            raise StartFailed(self.ending.reason)

    async def conclude(self) -> Ending:
        """After `watch`: reap the ended (or killed) process and say how it ended."""
        child, _link = self._live()
        status = await child.reap()
        if self.ending is None:
            words = child.words().splitlines()
            last = f"; its last words: {harmless(words[-1])}" if words else ""
            if status is not None and os.WIFSIGNALED(status):
                name = _signal_name(os.WTERMSIG(status))
                self.ending = Ending("crashed", f"its worker process was ended by {name}{last}", "worker-killed")
            else:
                code = f" with exit code {os.WEXITSTATUS(status)}" if status is not None else ""
                self.ending = Ending("crashed", f"its worker process ended{code} without a report{last}",
                                     "worker-died")
        return self.ending

    def progress(self) -> int | None:
        """What the guest has counted, since it was restored where it was."""
        if self._progress_page is None:
            return None
        counted = self._progress_words[self._progress_at]
        return counted - self._progress_base if counted >= self._progress_base else counted

    def resident_bytes(self) -> int:
        """Resident set of the worker, shared guest memory included, at most two seconds old; 0 once it is gone."""
        if self.child is None:
            return 0
        now = time.monotonic()
        if now - self._resident_at >= RESIDENT_SECONDS:
            # Many VMs are not all read for one and the same snapshot.
            self._resident_at = now - RESIDENT_SECONDS * random.random() / 2
            try:
                with open(f"/proc/{self.child.pid}/statm", "rb", buffering=0) as statm:
                    self._resident = int(statm.read(64).split()[1]) * PAGE
            except (OSError, IndexError):
                self._resident = 0
        return self._resident

    def _live(self) -> tuple[Child, WorkerLink]:
        assert self.child is not None
        assert self.link is not None
        return self.child, self.link

    def count_instructions(self, mode: Mode) -> int | None:
        """A descriptor that tells the guest's instructions on its first vCPU's thread; None: this host counts none.

        Progress of a guest that keeps no counter, for those who measure; of several vCPUs only one would be seen.
        """
        if len(self.threads) != 1:
            return None
        try:
            return self._own(open_instructions(self.threads[0], mode))
        except OSError:
            return None                            # why: `why_not_counted`, said by `mixvisor mixing`

    def close(self) -> None:
        if self.link is not None:
            self.link.close()
        if self.child is not None:
            self.child.close()
        self.status.close()
        self._release()

    def _release(self) -> None:
        self.images.close()                        # and the locks with them, once the worker is gone too
        if self._progress_page is not None:
            self._progress_words.release()
            self._progress_page.close()
            self._progress_page = None
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()


def shape(spec: WorkerSpec) -> dict[str, Any]:
    """What a VM must have in common with a saved one whose state it is to go on from."""
    return {"boot": spec.boot, "built-in guest": spec.builtin, "vCPUs": spec.vcpus,
            "drives": [f"{disk.name} {disk.writable}" for disk in spec.disks]}


def _sealed_memory(name: str, size: int) -> int:
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"                 # real-time signals have no names of their own
