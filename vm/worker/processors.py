"""The vCPUs of a VM beside the first: a thread each, one machine behind a lock.

Theory.  The first vCPU is run by the process' main thread, as in every VM (process.py): it alone answers requests, is
interrupted by the alarm, and takes the interrupts of the 8259s. Each other vCPU has a thread here that runs it and does
nothing else. Every bus call takes the machine's lock, from whichever thread it comes; `Turn` is that lock and
the bus in one. A kick reaches one thread (KvmCpu.kick); what a thread changes that the main one must see
(the VM's end, an interrupt, an alarm) it tells by waking it.

A vCPU that nobody has started (INIT, SIPI) or that is halted sleeps in the kernel, inside its `run`.

Invariants.
- A thread is made after the sandbox was entered: its system call filter is per thread, and inherited.
- SIGALRM and SIGPROF are the main thread's: they are blocked here.
- While `hold` is in force no thread but the main one is in `run`; its vCPU's registers may be read.
- The lock is never held while a vCPU runs, nor by the main thread in `hold` and `end`.
- The first ending of any vCPU stands; the main thread is woken for it.

Poor: a thread that is demoted while it has the lock makes the others wait for its next slice, as in every hypervisor
without co-scheduling; BIOS calls are for the first vCPU, those of others do nothing.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Sequence

from ..engines.base import Bus, Cpu, Exit, ExitReason
from .bios import BIOS_PORT
from .machine import Machine

__all__ = ["Ended", "Processors", "Turn"]


class Ended(Exception):
    """A vCPU beside the first has ended: how (`left`), or by what error."""

    def __init__(self, index: int, left: Exit | BaseException) -> None:
        super().__init__(f"vCPU {index}")
        self.index, self.left = index, left


class Turn:
    """The bus of one vCPU: the machine, one call at a time. `noticed()` is called after each, with the lock held."""

    def __init__(self, machine: Machine, lock: threading.RLock, noticed: Callable[[], None] | None) -> None:
        self._machine, self._lock = machine, lock
        self._noticed = noticed            # None: this is the first vCPU

    def port_in(self, port: int, size: int) -> int:
        with self._lock:
            value = self._machine.port_in(port, size)
            self._notice()
            return value

    def port_out(self, port: int, size: int, value: int) -> None:
        if port == BIOS_PORT and self._noticed is not None:
            return
        with self._lock:
            self._machine.port_out(port, size, value)
            self._notice()

    def mmio_read(self, address: int, size: int) -> int:
        return self._machine.mmio_read(address, size)

    def mmio_write(self, address: int, size: int, value: int) -> None:
        self._machine.mmio_write(address, size, value)

    def acknowledge(self) -> int:
        with self._lock:
            return self._machine.acknowledge()

    def _notice(self) -> None:
        if self._noticed is not None:
            self._noticed()


class Processors:
    """Made and used by the main thread: `buses`, `start`, then `hold` and `go_on`, at last `end`."""

    def __init__(self, machine: Machine) -> None:
        self.lock = threading.RLock()
        self.threads: list[int] = []               # native ids, the main one first
        self.ended: Ended | None = None
        self._machine = machine
        self._main = threading.main_thread().ident or 0
        self._changed = threading.Condition()
        self.held = self._leaving = False           # held: `hold` is in force
        self._parked = 0
        self._running: list[threading.Thread] = []
        self._cpus: Sequence[Cpu] = ()
        self._asking = False
        self.stopped: Callable[[int], None] = lambda _index: None      # told by each thread of its vCPU's every stop

    def buses(self, count: int) -> list[Bus]:
        """The bus of each of *count* vCPUs."""
        return [Turn(self._machine, self.lock, self._notice if index else None) for index in range(count)]

    def start(self, cpus: Sequence[Cpu], *, held: bool) -> None:
        """Run these vCPUs, the second and so on; `threads` is complete on return."""
        self._cpus, self.held = cpus, held
        self.threads = [threading.get_native_id()]
        for index, cpu in enumerate(cpus, 1):
            ready = threading.Event()
            thread = threading.Thread(target=self._life, args=(index, cpu, ready), daemon=True)
            self._running.append(thread)
            thread.start()
            ready.wait()
            self.threads.append(thread.native_id or 0)

    def _life(self, index: int, cpu: Cpu, ready: threading.Event) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM, signal.SIGPROF})
        ready.set()
        try:
            while self._may_run():
                left = cpu.run()
                self.stopped(index)
                if left.reason not in (ExitReason.KICKED, ExitReason.STOPPED):
                    self._over(Ended(index, left))
                    return
        except BaseException as error:      # the edge of a thread: the main one tells it
            self._over(Ended(index, error))

    def _may_run(self) -> bool:
        """Wait while held. False: the thread is to end."""
        with self._changed:
            if self.held and not self._leaving:
                self._parked += 1
                self._changed.notify_all()
                self._changed.wait_for(lambda: not self.held or self._leaving)
                self._parked -= 1
            return not self._leaving

    def _over(self, ended: Ended) -> None:
        with self._changed:
            self.ended = self.ended or ended
            self._running.remove(threading.current_thread())
            self._changed.notify_all()
        self.wake_main()

    def _notice(self) -> None:
        """A vCPU beside the first has used the machine; tell the main thread what is its matter."""
        asking = self._machine.interrupts.asking
        if self._machine.ending is not None or (asking and not self._asking):
            self.wake_main()
        self._asking = asking

    def wake_main(self) -> None:
        """Have the main thread look, whatever it does. From any thread."""
        if threading.get_ident() != self._main:
            signal.pthread_kill(self._main, signal.SIGUSR1)

    def hold(self) -> None:
        """Until `go_on` no vCPU but the first runs; on return none does."""
        with self._changed:
            self.held = True
        self._stop_all(lambda: self._parked >= len(self._running))

    def go_on(self) -> None:
        with self._changed:
            self.held = False
            self._changed.notify_all()

    def end(self) -> None:
        """Every thread has ended on return; the vCPUs may be closed."""
        with self._changed:
            self._leaving = True
            self._changed.notify_all()
        for thread in list(self._running):
            while thread.is_alive():
                self._kick_all()
                thread.join(0.02)

    def _stop_all(self, done: Callable[[], bool]) -> None:
        while True:
            with self._changed:
                if done():
                    return
            # A kick between the look at `held` and `run` is not lost, but it may end the run before: again.
            self._kick_all()
            with self._changed:
                self._changed.wait_for(done, 0.02)

    def _kick_all(self) -> None:
        for cpu in self._cpus:
            cpu.kick()
