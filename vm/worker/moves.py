"""A guest that goes on elsewhere: in another engine of this process, or in a worker that is given what this one wrote.

Theory.  Whatever a guest holds is memory, devices and a vCPU, and only the last of them is in an engine; `WholeState`
(vm/engines/base.py) is the one form that every engine gives and takes.  So a change of engine is: ask the old one for
it, make a new engine over the same memory and under the same machine, give it.  And a saved VM is that form as plain
data, together with what the devices declare (saved.py); memory is the supervisor's to copy, for nobody writes to it
while the VM is paused.  Several vCPUs run on KVM alone, and are saved in its form (engines/kvm/smp_state.py).

Invariants.
- Until the new engine has all of the state, nothing of the old one is touched: whatever is raised here leaves a guest
  that can go on where it was.
- What is read back is a file's, and as hostile as a guest: bounded, checked, and read behind the sandbox.  A state that
  is refused leaves a worker that must not run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from typing import Final

from .. import engines
from ..engines import portable
from ..engines.base import Cpu, EngineError
from .boot import StartFailed
from .machine import Machine
from .protocol import STATE_MAX_BYTES

__all__ = ["change_engine", "read_state", "write_state"]

_PARTS: Final = frozenset({"cpu", "machine", "halted"})
_PARTS_OF_SEVERAL: Final = frozenset({"cpus", "machine", "halted"})


def change_engine(old: Cpu, engine: str, technology: str, make: Callable[[], Cpu]) -> Cpu:
    """A vCPU of *engine*, made by *make*, that goes on where *old* stands. Raises EngineError."""
    whole = old.get_whole()
    why = portable.why_not(whole, engine, technology)
    if why is not None:
        raise EngineError(why)
    new = make()
    try:
        new.set_whole(whole)
    except EngineError:
        new.close()
        raise
    return new


def write_state(fd: int, cpus: Sequence[Cpu], machine: Machine, *, halted: bool) -> int:
    """The vCPUs and the devices into a file; how many bytes that were. Raises EngineError."""
    first, *others = cpus
    plain = {"cpus": engines.get_all(first, others)} if others else {"cpu": portable.to_plain(first.get_whole())}
    data = json.dumps({**plain, "machine": machine.capture(), "halted": halted}).encode()
    if len(data) > STATE_MAX_BYTES:
        raise EngineError(f"its state would have {len(data)} bytes")     # no device grows like that
    done = 0
    while done < len(data):
        done += os.write(fd, data[done:])
    return len(data)


def read_state(fd: int, cpus: Sequence[Cpu], machine: Machine, engine: str, technology: str) -> bool:
    """Go on from what `write_state` wrote; whether the first vCPU is behind a HLT. Closes *fd*. Raises StartFailed."""
    first, *others = cpus
    try:
        data = os.pread(fd, STATE_MAX_BYTES + 1, 0)
        os.close(fd)
        if len(data) > STATE_MAX_BYTES:
            raise portable.BadState("it is too long")
        state = json.loads(data)
        if not isinstance(state, dict) or state.keys() != (_PARTS_OF_SEVERAL if others else _PARTS):
            raise portable.BadState("it has not the parts that it must have")
        if others:
            engines.set_all(first, others, state["cpus"], technology)
        else:
            whole = portable.from_plain(state["cpu"])
            why = portable.why_not(whole, engine, technology)
            if why is not None:
                raise StartFailed("state", f"it cannot go on in this mode: {why}")
            first.set_whole(whole)
        machine.restore(state["machine"])
        return state["halted"] is True
    except (ValueError, RecursionError) as error:
        raise StartFailed("state", f"what was saved is no state of such a VM: {error}") from error
    except EngineError as error:
        raise StartFailed("state", f"the saved state cannot be gone on from: {error}") from error
