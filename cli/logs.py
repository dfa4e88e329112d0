"""Where the service's log goes: JSON for machines, readable on a terminal, never in its way.

Theory.  structlog is set up once per process, to stderr. Lines are handed to a thread: a
terminal held with Ctrl-S, a pipe that nobody reads or a full disk must not stop the supervisor,
whose missed heartbeat would end exact scheduling. The queue is bounded; what does not fit or cannot be
written is counted, and the count is logged once there is room again.
"""

from __future__ import annotations

import contextlib
import queue
import sys
import threading
from collections.abc import Iterator
from typing import Any, Final, Literal, TextIO

import structlog

__all__ = ["logging_to"]

QUEUE_LINES: Final = 1000
FLUSH_SECONDS: Final = 0.5


class _Writer:
    """The logger at the end of structlog's chain: `msg(line)` never blocks and never raises."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lines: queue.Queue[str | None] = queue.Queue(QUEUE_LINES)
        self._lost = 0
        self._thread = threading.Thread(target=self._run, name="mixvisor-log", daemon=True)
        self._thread.start()

    def msg(self, line: str) -> None:
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._lost += 1

    debug = info = warning = error = critical = exception = log = msg

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                if self._lost:
                    self._stream.write(f"(log: {self._lost} lines were lost)\n")
                    self._lost = 0
                self._stream.write(line + "\n")
                self._stream.flush()
            except (OSError, ValueError):
                # A full disk or a closed pipe: the VMs matter more than their log.
                self._lost += 1

    def close(self) -> None:
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(None)
        self._thread.join(FLUSH_SECONDS)


@contextlib.contextmanager
def logging_to(
    kind: Literal["auto", "json", "text"] = "auto", *, least: str = "info",
    stream: TextIO | None = None,
) -> Iterator[None]:
    """Log to stderr for the length of a block; `auto` is text on a terminal, else JSON."""
    target = stream or sys.stderr
    if kind == "auto":
        kind = "text" if target.isatty() else "json"
    writer = _Writer(target)
    last: list[Any] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=str)]
        if kind == "json" else
        [structlog.dev.ConsoleRenderer(colors=_colours(target), pad_event_to=0)])
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(
                fmt="iso" if kind == "json" else "%H:%M:%S", utc=kind == "json"),
            *last,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(least),
        logger_factory=lambda *_names: writer, cache_logger_on_first_use=False)
    try:
        yield
    finally:
        writer.close()
        structlog.reset_defaults()


def _colours(stream: TextIO) -> bool:
    import os
    return stream.isatty() and not os.environ.get("NO_COLOR")
