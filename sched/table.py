"""The supervisor's side of the shared table: which vCPUs there are, and the words of each.

Theory.  A vCPU has an entry here (what the service said of it, what has been accounted so far)
and a slot in shared memory (what its dispatcher is told, and what it tells). An entry is made by
`put` and ends with `forget`, which gives the thread back to the kernel first. A slot's generation
is new with every `put`, so nobody takes words of an earlier vCPU for its own.

Invariants. Only the supervisor's words are written here, but for those of a dispatcher that has
ended (shared.py). A slot is free again only when nobody has its thread.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from . import linux
from .model import LATENCIES, LATENCY_DEFAULT, Slot
from .shared import ACTIVE, MODES, NOBODY, ONE_CPU, SLOT_FIELDS, SLOT_WORDS, Shared

__all__ = ["Table", "Vcpu", "VcpuThread"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VcpuThread:
    """A vCPU to schedule. Descriptors stay the caller's until `release` has returned."""

    vm: str
    index: int
    pid: int
    tid: int
    pidfd: int
    mode: str                        # software, hardware
    weight: int
    cap: float = 0.0                 # of the VM, in host CPUs, 0 = none
    reservation: float = 0.0
    latency: str = LATENCY_DEFAULT
    cpus: frozenset[int]
    siblings: int = 0                # other vCPUs of the VM: threads of the same process
    status_fd: int | None = None     # vm/worker/status.py; None: the kernel knows when it sleeps
    progress_fd: int | None = None
    progress_offset: int = 0         # of a 64-bit counter in it; EVENTS: the descriptor is read instead


@dataclass(slots=True, eq=False)
class Vcpu:
    """One scheduled vCPU: parameters in force, and its account (ledger.py)."""

    thread: VcpuThread
    slot: Slot
    generation: int
    base: int                        # first word of its slot
    weight: int
    cap: float
    reservation: float
    cpus: frozenset[int]
    latency: str = LATENCY_DEFAULT
    paused: bool = False
    leaving: bool = False
    lent: bool = False               # to a measurement (loan.py)
    at_kernel: tuple[int, frozenset[int]] | None = None     # nice and affinity (baseline.py)
    share: float = 0.0               # entitled, in host CPUs
    nominal: float = 0.0             # that when all vCPUs want to run
    entitled_ns: float = 0.0
    lag_ns: float = 0.0
    local_lag_ns: int = 0            # of that, what its run queue owes it and will make good by itself
    drift_ns: float = 0.0            # entitled - received since it came to its host CPU, not clamped
    seen_run: int = 0
    seen_awake: int = 0
    seen_until: int = 0              # what it received and was due is known up to then
    wait_ns: int = 0
    emulator_ns: int = 0
    stat_fd: int = -1

    @property
    def vm(self) -> str:
        return self.thread.vm


class Table:
    """All vCPUs, by VM and index. Iterating gives the vCPUs in the order of admission.

    home: the host CPUs that a thread may use once it is given back.
    """

    def __init__(self, home: Sequence[int]) -> None:
        self.home = tuple(home)
        self.shared: Shared | None = None        # between `open` and `close`
        self._vcpus: dict[tuple[str, int], Vcpu] = {}
        self._of: dict[str, list[Vcpu]] = {}     # the same, by VM
        self._free: list[int] = []
        self._generation = 0

    def open(self, cpus: Sequence[int]) -> Shared:
        shared = self.shared = Shared.create(cpus)
        self._free = list(range(shared.slots - 1, -1, -1))
        return shared

    def close(self) -> None:
        shared, self.shared = self.shared, None
        if shared is not None:
            fd = shared.fd
            shared.close()
            os.close(fd)

    # -- who is here -------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Vcpu]:
        return iter(self._vcpus.values())

    def __len__(self) -> int:
        return len(self._vcpus)

    def get(self, vm: str, index: int = 0) -> Vcpu | None:
        return self._vcpus.get((vm, index))

    def of(self, vm: str) -> list[Vcpu]:
        """The vCPUs of a VM."""
        return list(self._of.get(vm, ()))

    def holds(self, vcpu: Vcpu) -> bool:
        """False: given back meanwhile, by another release or because scheduling ended under us."""
        return self.shared is not None and self.get(vcpu.vm, vcpu.thread.index) is vcpu

    @property
    def full(self) -> bool:
        return not self._free

    def put(self, thread: VcpuThread) -> Vcpu:
        """A new vCPU, nobody's yet. Raises OSError where its process has ended."""
        assert self.shared is not None
        started = linux.start_ticks(thread.pid)
        stat_fd = os.open(
            f"/proc/{thread.pid}/task/{thread.tid}/schedstat", os.O_RDONLY | os.O_CLOEXEC)
        self._generation += 1
        slot = Slot(self._free.pop())
        vcpu = Vcpu(
            thread, slot, self._generation, self.shared.slot(slot), thread.weight, thread.cap,
            thread.reservation, thread.cpus, thread.latency, stat_fd=stat_fd)
        for name, value in (
            ("pid", thread.pid), ("tid", thread.tid), ("start_ticks", started or 0),
            ("mode", MODES.index(thread.mode)), ("want_cpu", NOBODY), ("have_cpu", NOBODY),
            ("rate", 1), ("cap", round(thread.cap * ONE_CPU)),
            ("latency", LATENCIES.index(thread.latency)), ("siblings", thread.siblings), ("flags", ACTIVE),
            ("generation", self._generation),
        ):
            self.set(vcpu, name, value)
        self.shared.set("used_slots", max(self.shared.get("used_slots"), slot + 1))
        self._vcpus[thread.vm, thread.index] = vcpu
        self._of.setdefault(thread.vm, []).append(vcpu)
        return vcpu

    def forget(self, vcpu: Vcpu) -> None:
        """Out of the table, its thread given back."""
        self.give_back(vcpu)
        for name, value in (("flags", 0), ("generation", 0), ("pid", 0), ("tid", 0),
                            ("want_cpu", NOBODY), ("have_cpu", NOBODY)):
            self.set(vcpu, name, value)
        if vcpu.stat_fd >= 0:
            os.close(vcpu.stat_fd)
            vcpu.stat_fd = -1
        self._free.append(vcpu.slot)
        if self._vcpus.pop((vcpu.vm, vcpu.thread.index), None) is not None:
            self._of[vcpu.vm].remove(vcpu)
            if not self._of[vcpu.vm]:
                del self._of[vcpu.vm]

    # -- words -------------------------------------------------------------------------------

    def word(self, vcpu: Vcpu, name: str) -> int:
        assert self.shared is not None
        return self.shared.words[vcpu.base + SLOT_FIELDS[name]]

    def set(self, vcpu: Vcpu, name: str, value: int) -> None:
        assert self.shared is not None
        self.shared.words[vcpu.base + SLOT_FIELDS[name]] = value

    def column(self, name: str) -> list[int]:
        """That word of every slot that was ever used, by slot: one copy where many are wanted."""
        shared = self.shared
        assert shared is not None
        first = shared.slot(0) + SLOT_FIELDS[name]
        return shared.words[first:first + shared.get("used_slots") * SLOT_WORDS:SLOT_WORDS].tolist()

    def competing(self) -> dict[Slot, bool]:
        """Whether each vCPU is awake and not paused, by slot, in the order of admission.

        One that nobody has yet counts as awake.
        """
        owned, gone, have, awake = map(self.column, ("owned_generation", "gone", "have_cpu", "awake"))
        found: dict[Slot, bool] = {}
        for vcpu in self._vcpus.values():
            slot = vcpu.slot
            if vcpu.paused or vcpu.leaving:
                found[slot] = False
            elif owned[slot] != vcpu.generation:
                found[slot] = True
            else:
                found[slot] = not gone[slot] and (have[slot] == NOBODY or bool(awake[slot]))
        return found

    def bump(self) -> None:
        """Tell the dispatchers to look."""
        if self.shared is not None:
            self.shared.bump()

    def is_owned(self, vcpu: Vcpu) -> bool:
        """A dispatcher has had it: the owner's words are of this vCPU and of no earlier one."""
        return self.word(vcpu, "owned_generation") == vcpu.generation

    # -- what a dispatcher that ended left behind --------------------------------------------

    def give_back(self, vcpu: Vcpu) -> None:
        linux.give_back(vcpu.thread.pid, vcpu.thread.tid, self.home)
        vcpu.at_kernel = None

    def take_over(self, vcpu: Vcpu) -> None:
        """Its dispatcher has ended: close its awake time; it is nobody's."""
        self.give_back(vcpu)
        if self.word(vcpu, "awake"):
            since = self.word(vcpu, "awake_since_ns")
            total = self.word(vcpu, "awake_ns") + time.monotonic_ns() - since
            self.set(vcpu, "awake", 0)
            self.set(vcpu, "awake_ns", total)
        self.set(vcpu, "have_cpu", NOBODY)
