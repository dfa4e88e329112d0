"""What the control API needs of a running service, and how a refusal is said.

The API (service/api.py) and the command line know only this; `service.app.Service` implements
it, and tests put a fake in its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from ..metrics.mixing.result import MixingResult
from ..metrics.snapshot import Snapshot
from ..sched.recorder import PackedRecording
from ..vm.modes import Mode

__all__ = [
    "Action", "Backend", "Conflict", "Denied", "NotFound", "ServiceError", "TimedOut", "Unusable",
]

Action = Literal["start", "stop", "kill", "pause", "resume"]


class ServiceError(Exception):
    """A refused request: `code` is stable, the text is one sentence for a person.

    `status` is the HTTP status, `exit_code` that of the command line.
    """

    code: ClassVar[str] = "failed"
    status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 1


class NotFound(ServiceError):
    code, status, exit_code = "not-found", 404, 3


class Conflict(ServiceError):
    """The VM is not in a state that allows it."""

    code, status, exit_code = "conflict", 409, 4


class Denied(ServiceError):
    code, status, exit_code = "denied", 403, 6


class TimedOut(ServiceError):
    code, status, exit_code = "timeout", 504, 7


class Unusable(ServiceError):
    """The request itself is wrong."""

    code, status, exit_code = "unusable", 422, 2


class Backend(Protocol):
    def snapshot(self) -> Snapshot:
        """The newest picture, at most 100 ms old. Never blocks."""
        ...

    async def act(self, name: str, action: Action) -> None:
        """Do it and return when it is so (stop: the guest has ended). Raises ServiceError."""
        ...

    async def ask(self, name: str, op: str, **arguments: Any) -> dict[str, Any]:
        """An operation of the worker protocol (`screen`, `keys`, `serial`, ...). Raises ServiceError."""
        ...

    async def set_policy(self, change: Mapping[str, Any]) -> dict[str, Any]:
        """Change keys of [scheduler] (none: nothing) and return all of it as in force. Raises ServiceError."""
        ...

    async def set_parameters(self, name: str, change: Mapping[str, Any]) -> dict[str, Any]:
        """Change a VM's weight, cap, reservation, latency or cpus; all as in force. Raises ServiceError."""
        ...

    async def record_inputs(self, seconds: float) -> Iterator[str]:
        """What run queues are told and answer from now on for so long, JSON lines. Raises ServiceError."""
        ...

    async def set_mode(self, name: str, mode: Mode) -> dict[str, Any]:
        """Move the running guest; `mode`, `changed`, `stop_seconds`. Raises ServiceError."""
        ...

    async def save(self, name: str, file: Path | None, *, leave_running: bool) -> dict[str, Any]:
        """Into a file (None: in the state directory); `file`, `bytes`, `seconds`, `running`. Raises ServiceError."""
        ...

    async def restore(self, file: Path, name: str | None) -> dict[str, Any]:
        """Start a VM (None: the one that it was) from a file; `name`, `file`, `mode`. Raises ServiceError."""
        ...

    def recording(self, seconds: float | None) -> PackedRecording:
        """The slices of the last `seconds` (None: all that are kept). Raises ServiceError."""
        ...

    async def lend(self, vms: Any) -> dict[str, Any]:
        """A loan of these VMs' host CPU to a measurement (service/loans.py). Raises ServiceError."""
        ...

    def exchange(self, loan: str, script: Any) -> dict[str, Any]:
        """More of the loan's script in, its slices out. Raises ServiceError."""
        ...

    def give_back(self, loan: str) -> dict[str, Any]:
        """The end of a loan, and its last slices. Raises ServiceError."""
        ...

    def mixing(self) -> MixingResult | None:
        """What mixing was measured to cost on this host, if it was."""
        ...

    def keep_mixing(self, result: MixingResult) -> None:
        """A new measurement: kept in the state directory, and acted on. Raises ServiceError."""
        ...

    def request_shutdown(self) -> None: ...
