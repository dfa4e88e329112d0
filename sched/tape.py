"""What the run queues of a running service are told and answer, for a while: to be replayed.

Theory.  A dispatcher that is handed an `InputFile` writes the whole state of its run queue (policy/state.py) and
from then on every call with its answer (inputs.py) into that file, until it is told to stop; where policy or settings
change, another state follows. So `mixvisor simulate --replay` begins in the midst of things and must take every
decision of production again. The file is a memfd of the supervisor's,
which puts the host CPUs' parts together (tapedeck.py).

Invariants.  Bounded in bytes (`LIMIT_BYTES` a host CPU) and time: where the first is reached the rest is left
out, and the log says so by a line `end`. Decisions are the same with it as without it.

Where it is poor: steps are Python's meanwhile (not steady.c's) and cost 10 to 20 us more; while a measurement
has the host CPU (loan.py) nothing is recorded of it, for its order comes from a script.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from .inputs import Logged
from .policy import Batching, Order, Runqueue
from .policy.state import state_of

__all__ = ["LIMIT_BYTES", "InputFile", "Manner", "Tape"]

LIMIT_BYTES: Final = 32 << 20
_CHUNK: Final = 64 << 10


@dataclass(frozen=True, slots=True)
class InputFile:
    """Where a dispatcher is to write; fd -1: it is to stop."""

    fd: int
    limit_bytes: int = LIMIT_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Manner:
    """Policy and settings of a run queue."""

    policy: str
    slice_ns: int
    ratelimit_ns: int
    batching: Batching
    order: Order


class Tape:
    """A dispatcher's end."""

    def __init__(self, file: InputFile, cpu: int) -> None:
        self._file = file
        self._cpu = cpu
        self._lines: list[str] = []
        self._held = self._written = 0
        self._open = True

    def follow(self, manner: Manner, queue: Runqueue) -> Logged:
        """That queue, noted from its present state on."""
        self._put("begin", [manner.policy, manner.slice_ns, manner.ratelimit_ns, asdict(manner.batching),
                            asdict(manner.order), state_of(queue)], None)
        return Logged(queue, self._put)

    def end(self) -> None:
        """Nothing more is noted of this host CPU for now: another queue has it, or there is no room."""
        if self._open:
            self._put("end", (), None)

    def close(self) -> None:
        self._flush()
        os.close(self._file.fd)

    def _put(self, call: str, arguments: Sequence[Any], answer: Any) -> None:
        if not self._open:
            return
        line = json.dumps([self._cpu, call, arguments, answer], separators=(",", ":"))
        self._lines.append(line)
        self._held += len(line) + 1
        if self._written + self._held > self._file.limit_bytes and call != "end":
            self.end()
            self._open = False
        if self._held > _CHUNK or not self._open:
            self._flush()

    def _flush(self) -> None:
        data = "".join(line + "\n" for line in self._lines).encode()
        self._lines.clear()
        self._written += self._held
        self._held = 0
        view = memoryview(data)
        while view:
            view = view[os.write(self._file.fd, view):]
