"""A made-up host CPU for a dispatcher: a kernel that only remembers, threads, and a clock that the test moves."""

from __future__ import annotations

import os
from collections.abc import Iterable

from mixvisor.sched.dispatcher import Dispatcher, Parcel, Settings
from mixvisor.sched.shared import ACTIVE, RingReader, Shared
from mixvisor.vm.worker.status import Phase

__all__ = ["SLICE", "FakeKernel", "FakeThread", "Host", "TwoHosts", "page"]

SLICE = 5_000_000


class FakeClock:
    native = (1, 0)

    def __init__(self, thread: FakeThread) -> None:
        self._thread = thread

    def read(self) -> int:
        if self._thread.gone:
            raise OSError(22, "gone")
        return self._thread.ran

    def close(self) -> None:
        self._thread.closed += 1


class FakeThread:
    def __init__(self) -> None:
        self.ran = 0
        self.gone = self.stopped = False
        self.wants = True
        self.policy, self.priority = os.SCHED_OTHER, 0
        self.cpus: tuple[int, ...] = (0, 1)
        self.closed = 0
        self.calls = 0


class FakeKernel:
    """Runs threads as Linux would: highest real-time priority, then OTHER, then IDLE."""

    def __init__(self) -> None:
        self.threads: dict[int, FakeThread] = {}

    def _thread(self, tid: int) -> FakeThread:
        thread = self.threads[tid]
        if thread.gone:
            raise ProcessLookupError
        thread.calls += 1
        return thread

    def run_clock(self, pid: int, tid: int, *, alone: bool = True) -> FakeClock:
        return FakeClock(self._thread(tid))

    def set_class(self, tid: int, policy: int, parameters: os.sched_param) -> None:
        thread = self._thread(tid)
        thread.policy = policy & ~os.SCHED_RESET_ON_FORK
        thread.priority = parameters.sched_priority

    def set_priority(self, tid: int, parameters: os.sched_param) -> None:
        thread = self._thread(tid)
        assert (thread.policy == os.SCHED_FIFO) == (parameters.sched_priority > 0), "as Linux would say: EINVAL"
        thread.priority = parameters.sched_priority

    def waits(self, pid: int, tid: int) -> bool:
        return not self._thread(tid).wants

    def pin(self, tid: int, cpus: Iterable[int]) -> None:
        self._thread(tid).cpus = tuple(cpus)

    def stop(self, pid: int) -> None:
        self._thread(pid).stopped = True

    def go_on(self, pid: int) -> None:
        self._thread(pid).stopped = False

    def run(self, passed: int, cpu: int) -> None:
        order = {os.SCHED_FIFO: 2, os.SCHED_OTHER: 1, os.SCHED_IDLE: 0}
        ready = [t for t in self.threads.values()
                 if t.wants and not t.stopped and not t.gone and cpu in t.cpus]
        if ready:
            max(ready, key=lambda t: (order[t.policy], t.priority)).ran += passed


class Host:
    """One host CPU: table, fake kernel, dispatcher, and a clock that only the test moves."""

    def __init__(self, kind: str = "precise", cpu: int = 1, shared: Shared | None = None) -> None:
        self.shared = shared or Shared.create([cpu], slots=64, ring_records=4096)
        self.owns = shared is None
        if self.owns:
            self.shared.set("slice_ns", SLICE)
            self.shared.set("ratelimit_ns", 0)
            self.shared.set("guard_timeout_ns", 1 << 60)
        self.kernel = FakeKernel()
        self.cpu = cpu
        self.now = 1_000
        self.parcels: list[tuple[int, Parcel]] = []
        self.dispatcher = Dispatcher(
            self.shared, Settings(kind=kind, cpu=cpu, index=0, home_cpus=(0, 1)), self.kernel,
            self, self.now)  # type: ignore[arg-type]
        self.reader = RingReader(self.shared, 0)

    def drain(self) -> Iterable[tuple[int, Parcel]]:
        parcels, self.parcels = self.parcels, []
        return parcels

    def add(self, slot: int, rate: float, *, phase: memoryview | None = None, cap: float = 0.0,
            mode: int = 0) -> FakeThread:
        tid = slot + 100
        thread = self.kernel.threads.setdefault(tid, FakeThread())
        for name, value in (
            ("generation", slot + 1), ("flags", ACTIVE), ("pid", tid), ("tid", tid),
            ("mode", mode), ("want_cpu", self.cpu), ("rate", int(rate * 1e9)),
            ("cap", int(cap * 1e9)),
        ):
            self.shared.slot_set(slot, name, value)
        if phase is not None:
            self.parcels.append((slot, Parcel(slot + 1, phase)))
        self.shared.set("used_slots", max(self.shared.get("used_slots"), slot + 1))
        self.shared.bump()
        return thread

    def go(self, steps: int) -> None:
        for _ in range(steps):
            due = self.dispatcher.step(self.now)
            assert due is not None
            assert due > self.now
            self.kernel.run(due - self.now, self.cpu)
            self.now = due

    def close(self) -> None:
        if self.owns:
            fd = self.shared.fd
            self.shared.close()
            os.close(fd)


TwoHosts = tuple[Shared, Host, Host]


def page(phase: Phase) -> memoryview:
    words = memoryview(bytearray(64)).cast("Q")
    words[1] = phase
    return words
