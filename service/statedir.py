"""The state directory: one running service per directory, and the serial logs of its VMs.

`DIR/lock` is held by flock for the life of the service (the kernel lets go of it when the
process dies, however it dies). `DIR/logs/NAME.log` is what a VM wrote to its serial port, at most
twice `LOG_BYTES` (one older file is kept). A full disk loses log lines and says so once; it
never touches a VM. `DIR/recordings/` has the flight recorder's newest `RECORDINGS` recordings of
moments when something went wrong (sched/recorder.py).
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from .backend import ServiceError

__all__ = ["LOG_BYTES", "RECORDINGS", "AlreadyRunning", "SerialLog", "StateDir"]

LOG_BYTES: Final = 1 << 20
RECORDINGS: Final = 5


class AlreadyRunning(ServiceError):
    code = "already-running"


class StateDir:
    """Made on entry, mode 0750; holds the lock until `close`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(mode=0o750, parents=True, exist_ok=True)
            (path / "logs").mkdir(mode=0o750, exist_ok=True)
            self._lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        except OSError as error:
            raise ServiceError(
                f"the state directory {path} cannot be used: {error.strerror}; "
                "name another with --state-dir or [host] state_dir") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._lock, 32, 0).decode(errors="replace").strip()
            os.close(self._lock)
            raise AlreadyRunning(
                f"another mixvisor (pid {holder or 'unknown'}) uses the state directory {path}; "
                "stop it, or name another directory with --state-dir") from None
        try:
            os.truncate(self._lock, 0)
            os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)
        except OSError:
            # A full disk: the pid in the file only serves the message above.
            os.truncate(self._lock, 0)

    def log_of(self, vm: str) -> SerialLog:
        return SerialLog(self.path / "logs" / f"{vm}.log")

    def keep_recording(self, reason: str, lines: Iterable[str]) -> Path:
        """Write a recording, then drop the oldest beyond `RECORDINGS`. Raises OSError."""
        folder = self.path / "recordings"
        folder.mkdir(mode=0o750, exist_ok=True)
        # Names sort by time.
        path = folder / f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{time.monotonic_ns()}-{reason}.jsonl"
        with path.open("x", encoding="utf-8") as out:
            out.writelines(f"{line}\n" for line in lines)
        for old in sorted(folder.glob("*.jsonl"))[:-RECORDINGS]:
            old.unlink(missing_ok=True)
        return path

    def close(self) -> None:
        os.close(self._lock)


class SerialLog:
    """Append-only, bounded. `append` returns an error text once per run of failures."""

    def __init__(
        self, path: Path, write: Callable[[Path, bytes, bool], None] | None = None,
    ) -> None:
        self.path = path
        self.lost_bytes = 0
        self._failing = False
        self._write = write or _append

    def append(self, data: bytes) -> str | None:
        """Add bytes. None while all is well or already complained of."""
        try:
            full = self.path.exists() and self.path.stat().st_size + len(data) > LOG_BYTES
            self._write(self.path, data, full)
        except OSError as error:
            self.lost_bytes += len(data)
            if self._failing:
                return None
            self._failing = True
            return (f"the serial log {self.path} cannot be written: {error.strerror}; its lines are "
                    "lost until that is mended, the VM runs on")
        self._failing = False
        return None

    @property
    def failing(self) -> bool:
        return self._failing


def _append(path: Path, data: bytes, rotate: bool) -> None:
    if rotate:
        path.replace(path.with_suffix(".log.1"))
    # O_NOFOLLOW: the directory is ours alone, but a log is not worth a link's surprise.
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o640)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)
