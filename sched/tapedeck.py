"""The supervisor's end of recording what run queues are told: files handed out, collected, and put together.

Theory.  See tape.py. Each dispatcher gets a memfd with the message, follows at the next epoch, and is told in the
same way to stop. What it had written by then is the recording, whatever became of it.

Invariant.  However this ends, dispatchers are told to stop and no descriptor is left.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, Final

import trio

from .crew import Crew, until
from .inputs import FORMAT
from .shared import Shared
from .tape import LIMIT_BYTES, Manner

__all__ = ["SECONDS_MAX", "record"]

SECONDS_MAX: Final = 60.0
ANSWER_S: Final = 1.0


async def record(crew: Crew, shared: Shared, manner: Callable[[], Manner], seconds: float) -> Iterator[str]:
    """Have all dispatchers note their inputs for so long; the log, line by line. *manner*: that of now."""
    began = manner()
    files: dict[int, int] = {}

    async def tell(message: dict[str, Any], *, handing: bool) -> None:
        for cpu, fd in files.items():
            await crew.send(cpu, message, [fd] if handing else [])
        epoch = shared.bump()
        with trio.move_on_after(ANSWER_S):
            await until(lambda: crew.closing or crew.follow(epoch))

    try:
        for cpu in sorted(crew.present):
            files[cpu] = os.memfd_create("mixvisor-inputs", os.MFD_CLOEXEC)
        await tell({"inputs": LIMIT_BYTES}, handing=True)
        try:
            await trio.sleep(min(seconds, SECONDS_MAX))
        finally:
            with trio.CancelScope(shield=True):
                await tell({"inputs": 0}, handing=False)
        parts = [_read(fd) for fd in files.values()]
    finally:
        for fd in files.values():
            os.close(fd)

    def lines() -> Iterator[str]:
        yield json.dumps({
            "mixvisor_inputs": FORMAT, "policy": began.policy, "slice_ns": began.slice_ns,
            "ratelimit_ns": began.ratelimit_ns, "batching": asdict(began.batching), "order": asdict(began.order)})
        for part in parts:
            # A dispatcher that was killed meanwhile leaves its last line unfinished.
            yield from part[:part.rfind("\n") + 1].splitlines()

    return lines()


def _read(fd: int) -> str:
    size = os.fstat(fd).st_size
    return os.pread(fd, size, 0).decode("utf-8", "replace")
