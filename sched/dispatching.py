"""The process around a dispatcher: pinned, real-time, asleep between its steps.

Purpose.  What dispatcher.py decides is pure but for its `Kernel`; here are the clock, the sleep, the class and the
capabilities of the process, and the socket over which the supervisor hands it descriptors.

Theory.  One loop: step, note how long that took, sleep until it is due again.  Where steady.py's C part was compiled it
takes the usual steps, sleep included, and comes back when something is not usual.  The sleep ends early for one
signal, `INTERRUPT`, which is blocked and waited for: the supervisor wants the slice to end. Nothing is lost when it
comes at another moment (it is pending then), nor where it cannot be sent: a move then takes up to a slice.

Invariants.
- However the loop ends but by a signal that kills, every thread is given back (`leave`).
- The pid in the shared table is that of a process that lives, or that the supervisor has not reaped yet; 0 once it has
  left by itself.
- Descriptors that come with a parcel are closed once they are mapped; a parcel whose descriptors are of no use is a
  vCPU without a status page or counter, and is scheduled all the same.

Units: nanoseconds of CLOCK_MONOTONIC; `cpu_ns` in the table is CPU time over all dispatchers that this CPU has had.
"""

from __future__ import annotations

import contextlib
import gc
import json
import mmap
import os
import signal
import socket
import time
from collections.abc import Iterable
from typing import Any

from ..vm.worker.status import STATUS_SIZE
from . import linux, steady
from .dispatcher import INTERRUPT, Dispatcher, Parcel, Settings
from .linux import Kernel
from .shared import CPU_FIELDS, EVENTS, NOBODY, Shared
from .tape import InputFile

__all__ = ["SocketInbox", "main"]


class SocketInbox:
    """Parcels over a SOCK_SEQPACKET socket: JSON with the descriptors behind it."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        link.setblocking(False)

    def drain(self) -> Iterable[tuple[int, Parcel | InputFile]]:
        while True:
            try:
                data, fds, _flags, _address = socket.recv_fds(self._link, 4096, 2)
            except (BlockingIOError, ConnectionResetError):
                return
            if not data:
                return           # the supervisor is gone: the heartbeat tells what to do
            try:
                message = json.loads(data)
                if "inputs" in message:
                    yield NOBODY, InputFile(os.dup(fds[0]) if fds else -1, message["inputs"])
                    continue
                status = progress = None
                fds_left = list(fds)
                # Without them the vCPU is scheduled all the same.
                with contextlib.suppress(OSError, ValueError):
                    if message["status"]:
                        status = _map_words(fds_left.pop(0), 0, STATUS_SIZE // 8)
                    if message["progress"] is not None:
                        fd = fds_left.pop(0)
                        progress = (linux.EventCounter(os.dup(fd)) if message["progress"] == EVENTS
                                    else _map_words(fd, message["progress"], 1))
                yield message["slot"], Parcel(message["generation"], status, progress)
            finally:
                for fd in fds:
                    os.close(fd)


def _map_words(fd: int, offset: int, count: int) -> memoryview:
    """`count` 64-bit words at a byte offset (a multiple of 8) of a file, read-only."""
    page = offset & -mmap.PAGESIZE
    size = offset - page + count * 8
    mapped = mmap.mmap(fd, size, prot=mmap.PROT_READ, offset=page)
    return memoryview(mapped).cast("Q")[(offset - page) // 8:]


def main(arguments: dict[str, Any], fds: list[int]) -> int:
    """The process: `arguments` are the fields of Settings, `fds` the table and the inbox socket."""
    shared_fd, link_fd = fds
    settings = Settings(**{**arguments, "home_cpus": tuple(arguments["home_cpus"])})
    shared = Shared(shared_fd)
    link = socket.socket(fileno=link_fd)
    block = shared.cpu(settings.index)
    signal.pthread_sigmask(signal.SIG_BLOCK, {INTERRUPT})
    # What stops a process politely leaves the threads to the supervisor, as a crash would.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.sched_setaffinity(0, {settings.cpu})
    linux.set_timer_slack(1)           # else it is 50 us with kernels before 6.12
    if settings.kind != "plain":
        linux.become_realtime(linux.DISPATCHER_PRIORITY)
    # CAP_KILL: stopping a VM whose cap is used up, where VMs run as another user.
    linux.keep_capabilities(linux.CAP_SYS_NICE, linux.CAP_KILL)
    gc.disable()                       # no cycles are made below; a collection would be late
    clock, cpu_clock, wait = time.monotonic_ns, time.thread_time_ns, signal.sigtimedwait
    words = shared.words
    words[block + CPU_FIELDS["start_ticks"]] = linux.start_ticks(os.getpid()) or 0
    words[block + CPU_FIELDS["pid"]] = os.getpid()
    cpu_at = block + CPU_FIELDS["cpu_ns"]
    earlier = words[cpu_at] - cpu_clock()
    dispatcher = Dispatcher(shared, settings, Kernel(), SocketInbox(link), clock())
    library = steady.load() if settings.kind in ("precise", "gentle") else None
    usual = steady.Steady(library, dispatcher) if library is not None else None
    steps = 0
    try:
        now = clock()
        while (due := dispatcher.step(now)) is not None:
            steps += 1
            if not steps & 15:
                words[cpu_at] = earlier + cpu_clock()
            before = clock()
            dispatcher.note_decision(before - now)
            if usual is not None and usual.possible():
                now = usual.run(earlier, before) or clock()
                continue
            # One call where a timerfd takes two, and as punctual.
            interrupted = due > before and wait((INTERRUPT,), (due - before) / 1e9) is not None
            now = clock()
            if interrupted:
                dispatcher.interrupt(now)
    finally:
        dispatcher.leave(clock())
        words[cpu_at] = earlier + cpu_clock()
        words[block + CPU_FIELDS["pid"]] = 0
    return 0
