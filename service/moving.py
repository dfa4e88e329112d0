"""What the service does so that a running guest goes on elsewhere: in the other mode, or in a file.

The worker changes its engine, and writes the state of vCPU and devices, by itself (vm/worker/moves.py); here is what
it may not do: open /dev/kvm, which it is handed for a change to hardware mode and keeps only as the one VM made of it,
and write the file (savefile.py).  Which VM may go where when is the machine's (machine.py).
"""

from __future__ import annotations

import os
import time
from bisect import bisect_left
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import trio

from ..metrics.families import merged
from ..metrics.snapshot import STOP_BOUNDS_NS, Histogram
from ..vm.engines.cpuid import vendor
from ..vm.modes import ENGINE_OF, Mode, ModeDecision, why_not_moved
from ..vm.worker.protocol import STATE_MAX_BYTES
from .backend import Conflict, ServiceError
from .incarnation import Incarnation, shape
from .link import WorkerLink, harmless
from .savefile import Header, identify, write

__all__ = ["KVM_DEVICE", "MODE_SECONDS", "Moves", "ask_for_mode", "check_move", "write_saved"]

MODE_SECONDS: Final = 20.0       # for an answer: of a VM with a small share on a full host
STOP_NS_MAX: Final = 10**12      # of what a worker says
KVM_DEVICE: Final = "/dev/kvm"
VERSION: Final = version("mixvisor")


@dataclass(slots=True)
class Moves:
    """Counters of one VM, over its incarnations."""

    saves: int = 0
    restores: int = 0
    # How long the guest stood still in each change of mode, by target mode.
    changes: dict[str, Histogram] = field(
        default_factory=lambda: dict[str, Histogram].fromkeys(ENGINE_OF, merged((), STOP_BOUNDS_NS)))

    def note(self, mode: Mode, stop_ns: int) -> None:
        counts = [0] * (len(STOP_BOUNDS_NS) + 1)
        counts[bisect_left(STOP_BOUNDS_NS, stop_ns)] = 1
        self.changes[mode] = merged(
            (self.changes[mode], Histogram(STOP_BOUNDS_NS, tuple(counts), stop_ns)), STOP_BOUNDS_NS)


def check_move(name: str, planned: ModeDecision, now: Mode, mode: Mode) -> None:
    """Raises Conflict where this VM can never run in *mode* on this host."""
    why = why_not_moved(planned, mode)
    if why is not None:
        raise Conflict(f"{name} stays in {now} mode: {why}")


async def ask_for_mode(link: WorkerLink, name: str, now: Mode, mode: Mode, technology: str) -> int:
    """How long the guest stood still, in ns, as its worker says. Raises Conflict, ServiceError."""
    device = _open_kvm() if mode == "hardware" else None
    try:
        answer = await link.ask("mode", seconds=MODE_SECONDS, descriptor=device, engine=ENGINE_OF[mode],
                                technology=technology)
    finally:
        if device is not None:
            os.close(device)
    _not_refused(answer, f"{name} stays in {now} mode")
    stop_ns = answer.get("stop_ns")
    if answer.get("engine") != ENGINE_OF[mode] or type(stop_ns) is not int or not 0 <= stop_ns < STOP_NS_MAX:
        raise ServiceError("the worker's answer to a change of mode makes no sense")
    return stop_ns


def _open_kvm() -> int:
    try:
        return os.open(KVM_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise Conflict(
            f"{KVM_DEVICE} cannot be opened: {error.strerror}; `mixvisor host` says what is missing") from error


def _not_refused(answer: dict[str, Any], what: str) -> None:
    if "refused" in answer:
        raise Conflict(f"{what}: {harmless(answer['refused'])}")


async def write_saved(path: Path, one: Incarnation, mode: Mode) -> int:
    """A paused guest into a file; its length. Raises Conflict, ServiceError; there is then what there was before."""
    name = one.spec.name
    if any(os.fstat(fd).st_nlink == 0 for fd in one.images.fds):
        raise Conflict(f"{name} writes to an overlay that ends with it, and what is saved would miss it;"
                       " give the overlay a file (overlay = ...)")
    assert one.link is not None
    fd = os.memfd_create("mixvisor-state", os.MFD_CLOEXEC)
    try:
        answer = await one.link.ask("state", descriptor=fd)
        _not_refused(answer, f"{name} cannot be saved")
        state = os.pread(fd, STATE_MAX_BYTES + 1, 0)
    finally:
        os.close(fd)
    if not 0 < len(state) <= STATE_MAX_BYTES:
        raise ServiceError("the worker's answer to a save makes no sense")

    def write_it() -> int:
        return write(path, Header(
            name=name, saved_unix_s=time.time(), mixvisor=VERSION, mode=mode, vendor=vendor().decode(),
            memory_bytes=one.spec.memory_bytes, machine=shape(one.spec),
            files=[identify(image) for image in one.images.fds], state_bytes=len(state)), state, one.memory_fd)

    return await trio.to_thread.run_sync(write_it)
