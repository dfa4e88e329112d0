"""Proof, on this host and now, that promoting a thread gives it the CPU.

Why.  The kernel may be willing and the effect still absent: with autogroups or cpu cgroups
SCHED_IDLE against SCHED_OTHER means nothing between groups (50 : 50 was measured), real-time may
be refused per cgroup, a container may filter calls. So before a dispatch kind is used, two
spinning processes from the same zygote as the VMs are pinned to one VM CPU; first the one, then
the other is promoted, and each must get the larger part of the CPU while it is.

A spinner ends by itself after `SPINNER_LIVES_S` whatever becomes of us, so that even a
supervisor that dies here leaves nothing real-time behind for longer.
Where it is poor: the shares are of some ten milliseconds, so only the direction is judged;
finding that a kind does not work takes nearly a second.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import trio

from . import linux
from .linux import Level

__all__ = ["SPINNER_LIVES_S", "Verdict", "judge", "spin", "try_kind"]

SPINNER_LIVES_S: Final = 2
# A round that fails is tried again for longer: what the fair class owed the other one, or other
# work on the CPU, wears off; a CPU shared half and half by two scheduling groups does not.
ROUNDS_S: Final = (0.06, 0.12, 0.24)
ENOUGH: Final = 0.6            # of what both received, to the promoted one, in each round


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a dispatch kind works here. `shares`: of the promoted one, round by round."""

    works: bool
    shares: tuple[float, ...]
    sentence: str


def spin(arguments: dict[str, Any], fds: list[int]) -> int:
    """The process: computes until it is killed or its time is over."""
    del arguments
    for fd in fds:
        os.close(fd)
    signal.alarm(SPINNER_LIVES_S)          # the default action ends the process
    deadline = time.monotonic() + SPINNER_LIVES_S
    while time.monotonic() < deadline:
        pass
    return 0


def judge(kind: str, shares: Sequence[float]) -> Verdict:
    """The rule, apart from the measuring."""
    shown = " and ".join(f"{share:.0%}" for share in shares)
    if len(shares) == 2 and min(shares) >= ENOUGH:
        return Verdict(True, tuple(shares), f"a promoted thread received {shown} of the CPU")
    return Verdict(
        False, tuple(shares),
        f"promoting a thread had no effect here: it received {shown or 'nothing'} of the CPU"
        f" in a trial of {kind} dispatch (are the VMs' processes in different cpu cgroups?)")


async def try_kind(kind: str, cpu: int, pids: tuple[int, int], home: Sequence[int]) -> Verdict:
    """Promote one spinner after the other on `cpu`; both are given back and going afterwards."""
    clocks = [linux.Kernel().run_clock(pid, pid) for pid in pids]
    shares: list[float] = []
    try:
        for pid in pids:
            os.sched_setaffinity(pid, {cpu})
        for chosen in (0, 1):
            # The chosen one first: see linux.py and dispatcher.py on the fair class.
            _set(kind, pids[chosen], Level.RUN)
            _set(kind, pids[1 - chosen], Level.WAIT)
            share = 0.0
            for length in ROUNDS_S:
                before = [clock.read() for clock in clocks]
                await trio.sleep(length)
                ran = [clock.read() - start for clock, start in zip(clocks, before, strict=True)]
                share = ran[chosen] / sum(ran) if sum(ran) else 0.0
                if share >= ENOUGH:
                    break
            shares.append(share)
    except PermissionError as error:
        return Verdict(False, (), linux.explain_refusal(kind, error))
    except ProcessLookupError:
        return Verdict(False, (), f"the trial of {kind} dispatch lost its processes")
    finally:
        for pid, clock in zip(pids, clocks, strict=True):
            linux.give_back(pid, pid, home)
            clock.close()
    return judge(kind, shares)


def _set(kind: str, pid: int, level: Level) -> None:
    state = linux.states_of(kind)[level]
    if state.policy is not None:
        os.sched_setscheduler(pid, state.policy, state.parameters)
    os.kill(pid, signal.SIGSTOP if state.stopped else signal.SIGCONT)
