"""The control API as Python calls, over the unix socket: what the command line speaks.

Synchronous, one connection, no retries: a person waits for each answer. An error of the service
comes back as the `ServiceError` it was, with its exit code; where there is no service to ask,
`Unreachable` says so and what to do. `httpx2` is imported with this module, so import it late.
"""

from __future__ import annotations

import os
import socket as sockets
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import httpx2

from ..metrics.snapshot import Snapshot
from .backend import Action, Conflict, Denied, NotFound, ServiceError, TimedOut, Unusable
from .wire import SCHEMA, Misread, snapshot_from_json

__all__ = ["Client", "Unreachable"]

# Longer than the service's own limits (stopping a guest is the longest), so that its words win.
TIMEOUT_SECONDS: Final = 30.0
KNOCK_SECONDS: Final = 5.0


class Unreachable(ServiceError):
    """No service answers on the socket."""

    code, status, exit_code = "unreachable", 503, 5


_KINDS: Final = {kind.code: kind for kind in (NotFound, Conflict, Denied, TimedOut, Unusable)}


class Client:
    """A connection to the service on `socket`. Every call raises ServiceError, this one too."""

    def __init__(self, socket: Path, *, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        _knock(socket)
        self._socket = socket
        self._http = httpx2.Client(
            transport=httpx2.HTTPTransport(uds=os.fspath(socket)), base_url="http://mixvisor",
            timeout=timeout_seconds, trust_env=False)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def snapshot(self) -> Snapshot:
        try:
            return snapshot_from_json(self._call("GET", "/v1/snapshot").get("snapshot"))
        except Misread as error:
            raise ServiceError(f"the service on {self._socket} is of another version ({error}); "
                               "restart it with this one") from error

    def vms(self) -> dict[str, Any]:
        return self._call("GET", "/v1/vms")

    def vm(self, name: str) -> dict[str, Any]:
        return self._call("GET", _vm(name))

    def act(self, name: str, action: Action) -> None:
        """Returns when it is so."""
        self._call("POST", _vm(name, action))

    def screen(self, name: str) -> dict[str, Any]:
        """`rows`, `attributes`, `cursor`, `version` (vm/worker/protocol.py)."""
        return self._call("GET", _vm(name, "screen"))

    def keys(self, name: str, scancodes: list[tuple[int, int]]) -> int:
        """How many of the keys the guest's keyboard buffer had room for."""
        answer = self._call("POST", _vm(name, "keys"), {"scancodes": scancodes})
        return int(answer["accepted"])

    def serial(self, name: str, offset: int) -> dict[str, Any]:
        return self._call("GET", _vm(name, f"serial?offset={offset}"))

    def serial_input(self, name: str, data_base64: str) -> int:
        """How many bytes the guest had room for."""
        return int(self._call("POST", _vm(name, "serial"), {"data": data_base64})["accepted"])

    def registers(self, name: str) -> dict[str, Any]:
        return self._call("GET", _vm(name, "registers"))

    def calls(self, name: str) -> dict[str, Any]:
        return self._call("GET", _vm(name, "calls"))

    def policy(self, change: dict[str, Any] | None = None) -> dict[str, Any]:
        """The keys of [scheduler] as in force, after *change* of some of them."""
        answer = self._call("POST", "/v1/policy", change) if change else self._call("GET", "/v1/policy")
        return answer["scheduler"]

    def set_parameters(self, name: str, change: dict[str, Any]) -> dict[str, Any]:
        """`weight`, `cap`, `reservation`, `latency`, `cpus` as in force after the change."""
        return self._call("POST", _vm(name, "parameters"), change)["parameters"]

    def set_mode(self, name: str, mode: str) -> dict[str, Any]:
        """`mode`, `changed`, `stop_seconds`."""
        return self._call("POST", _vm(name, "mode"), {"mode": mode})

    def save(self, name: str, file: Path | None, *, leave_running: bool = False) -> dict[str, Any]:
        """`file`, `bytes`, `seconds`, `running`."""
        return self._call("POST", _vm(name, "save"), {
            "file": None if file is None else os.fspath(file), "leave_running": leave_running})

    def restore(self, file: Path, name: str | None = None) -> dict[str, Any]:
        """`name`, `file`, `mode`."""
        return self._call("POST", "/v1/restore", {"file": os.fspath(file), "name": name})

    def why(self, name: str) -> dict[str, Any]:
        """`state`, `reason`, `registers`, `report` ... (service/machine.py)."""
        return self._call("GET", _vm(name, "why"))

    def exits(self, name: str, limit: int) -> dict[str, Any]:
        return self._call("GET", _vm(name, f"exits?limit={limit}"))

    def profile(self, name: str, hz: int, seconds: float) -> None:
        """Begin to take samples; `profile_end` has them."""
        self._call("POST", _vm(name, "profile"), {"hz": hz, "seconds": seconds})

    def profile_end(self, name: str) -> dict[str, Any]:
        return self._call("POST", _vm(name, "profile-end"))

    def recording(self, seconds: float | None) -> str:
        """The slices of the last seconds, as JSON lines (sched/recorder.py)."""
        response = self._answer("GET", "/v1/recording" + ("" if seconds is None else f"?seconds={seconds:g}"))
        if response.is_error:
            raise _error(self._document(response))
        return response.text

    def lend(self, vms: list[str]) -> dict[str, Any]:
        """A loan of these VMs' host CPU to a measurement: `loan`, `cpu`, `vms` ... (service/loans.py)."""
        return self._call("POST", "/v1/loans", {"vms": vms})

    def exchange(self, loan: str, script: list[tuple[int, int]]) -> dict[str, Any]:
        """`written` of the script, `played`, `slices` since the last call, `ended` or None."""
        return self._call("POST", f"/v1/loans/{quote(loan, safe='')}", {"script": script})

    def give_back(self, loan: str) -> dict[str, Any]:
        """The last `slices`."""
        return self._call("POST", f"/v1/loans/{quote(loan, safe='')}/end")

    def mixing(self) -> dict[str, Any] | None:
        """What mixing was measured to cost (metrics/mixing/result.py)."""
        return self._call("GET", "/v1/mixing")["mixing"]

    def keep_mixing(self, result: dict[str, Any]) -> None:
        self._call("POST", "/v1/mixing", result)

    def record_inputs(self, seconds: float) -> str:
        """What run queues are told and answer for so long, as JSON lines (sched/tape.py)."""
        response = self._answer("POST", "/v1/inputs", {"seconds": seconds})
        if response.is_error:
            raise _error(self._document(response))
        return response.text

    def shutdown(self) -> None:
        self._call("POST", "/v1/shutdown")

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        response = self._answer(method, path, body)
        answer = self._document(response)
        if response.is_error:
            raise _error(answer)
        if answer["schema"] != SCHEMA:
            raise ServiceError(f"the service speaks schema {answer['schema']}, this command "
                               f"{SCHEMA}; use the same version of both")
        return answer

    def _answer(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx2.Response:
        try:
            return self._http.request(method, path, json=body)
        except httpx2.TimeoutException as error:
            raise TimedOut(f"the service on {self._socket} did not answer in time; is it stopped "
                           "or overloaded?") from error
        except httpx2.TransportError as error:
            raise Unreachable(f"the connection to the service on {self._socket} was lost: "
                              f"{error}") from error

    def _document(self, response: httpx2.Response) -> dict[str, Any]:
        """What every answer but a recording is. Raises ServiceError."""
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if not isinstance(answer, dict) or "schema" not in answer:
            raise ServiceError(f"what answers on {self._socket} is not a Mixvisor service")
        return answer


def _knock(path: Path) -> None:
    """Raise the right ServiceError where nobody answers.

    Asked of the socket itself, because the HTTP library hides the error number (and leaks the
    socket of a failed connection, httpcore2 2.16).
    """
    with sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM) as probe:
        probe.settimeout(KNOCK_SECONDS)
        try:
            probe.connect(os.fspath(path))
        except PermissionError as error:
            raise Denied(f"no permission for the control socket {path}; ask as the user that runs "
                         "the service, or as root") from error
        except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError) as error:
            raise Unreachable(
                f"no Mixvisor service is running on {path}; start one with `mixvisor run FILE`, "
                "or name its socket with --socket") from error
        except TimeoutError as error:
            raise TimedOut(f"the service on {path} takes no connections; is it stopped or "
                           "overloaded?") from error
        except OSError as error:
            raise Unreachable(f"cannot reach a service on {path}: {error}") from error


def _vm(name: str, rest: str = "") -> str:
    path = f"/v1/vms/{quote(name, safe='')}"
    return f"{path}/{rest}" if rest else path


def _error(answer: dict[str, Any]) -> ServiceError:
    said = answer.get("error")
    said = said if isinstance(said, dict) else {}
    kind = _KINDS.get(str(said.get("code")), ServiceError)
    return kind(str(said.get("message", "the service refused without a reason")))
