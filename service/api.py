"""The two applications of the service: control (unix socket) and metrics (TCP).

Control, JSON, every answer an object with `schema`:

    GET  /v1/snapshot                     the whole picture (service/wire.py)
    GET  /v1/vms, /v1/vms/{name}          VMs of that picture
    POST /v1/vms/{name}/{action}          start stop kill pause resume; answers when it is so
    GET  /v1/vms/{name}/screen            text screen, attributes, cursor, version
    POST /v1/vms/{name}/keys              {"scancodes": [[scan, ascii], ...]} -> {"accepted": n}
    GET  /v1/vms/{name}/serial?offset=N   output of the serial port from byte N on
    POST /v1/vms/{name}/serial            {"data": base64}
    GET  /v1/vms/{name}/registers, /calls
    GET  /v1/vms/{name}/why               where it stands, or how it ended: registers, code, last exits
    GET  /v1/vms/{name}/exits?limit=N     exits by reason, instruction and address, the most first
    POST /v1/vms/{name}/profile           {"hz": n, "seconds": s}: take samples; the answer comes at once
    POST /v1/vms/{name}/profile-end       ends it if it has not ended; what was sampled
    POST /v1/vms/{name}/parameters        {"weight": n, "cap": n, "reservation": n, "latency": "low",
                                          "cpus": "0-3"}: those to change
    POST /v1/vms/{name}/mode              {"mode": "hardware"}: move the running guest; {"changed", "stop_seconds"}
    POST /v1/vms/{name}/save              {"file": path, "leave_running": false}, both optional; {"file", "bytes"}
    POST /v1/restore                      {"file": path, "name": optional}: start a VM from a file; {"name", "mode"}
    GET  /v1/warnings
    GET  /v1/policy                       [scheduler] as it is in force
    POST /v1/policy                       keys of it with new values; the whole of it as in force then
    POST /v1/inputs                       {"seconds": n, 0.1 to 20}: what run queues are told and answer meanwhile
    GET  /v1/recording?seconds=N          slices of the last N seconds (all that are kept), JSON lines
    POST /v1/loans                        {"vms": [names]}: their host CPU's order, lent to a measurement
    POST /v1/loans/{id}                   {"script": [[vm, ns], ...]}: more to play; the slices since the last call
    POST /v1/loans/{id}/end               everything goes back; the last slices
    GET  /v1/mixing                       what mixing was measured to cost here (metrics/mixing/result.py), or null
    POST /v1/mixing                       a new measurement of it
    POST /v1/shutdown

An error is `{"error": {"code", "message"}}` with the status of the `ServiceError` that said it.
Bodies are at most `MAX_BODY` bytes; what is not the expected JSON is 422 with one sentence.

Metrics: `/metrics` (rendered in a thread from an immutable snapshot; scrapes at the same time
share one rendering), `/-/healthy` (200 while the process serves), `/-/ready`, and an index.
It offers nothing that changes anything.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, get_args

import structlog
import trio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from ..metrics.mixing.result import MixingResult, ResultError
from ..metrics.snapshot import Snapshot, VmSnapshot
from ..vm.modes import Mode
from .backend import Action, Backend, NotFound, ServiceError, Unusable
from .wire import SCHEMA, to_json

__all__ = ["MAX_BODY", "control_app", "metrics_app"]

log = structlog.get_logger("mixvisor")

MAX_BODY: Final = 128 * 1024
BODY_SECONDS: Final = 10.0
MAX_KEYS: Final = 4096
MAX_SERIAL_INPUT: Final = 48 * 1024
RECORDING_MAX_SECONDS: Final = 86_400.0
INPUTS_MIN_SECONDS: Final = 0.1
INPUTS_MAX_SECONDS: Final = 20.0       # below the client's patience
EXITS_MAX: Final = 256           # places in one answer (vm/worker/eyes.py)
HZ_MAX: Final = 1000
SECONDS_MAX: Final = 600
MODES: Final = get_args(Mode)
ACTIONS: Final = get_args(Action)
INDEX: Final = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Mixvisor</title>
<h1>Mixvisor</h1><p><a href="/metrics">/metrics</a> &middot; <a href="/-/healthy">/-/healthy</a>
&middot; <a href="/-/ready">/-/ready</a></p></html>
"""


# (what to collect from, the Accept header) -> (content type, body)
Render = Callable[[Any, str | None], tuple[str, bytes]]


class TooLarge(Unusable):
    status = 413


def control_app(backend: Backend) -> Starlette:
    """The control API over `backend`; to be served on a unix socket."""
    control = _Control(backend)
    vm = "/v1/vms/{name}"
    return Starlette(
        routes=[
            Route("/v1/snapshot", control.snapshot, methods=["GET"]),
            Route("/v1/vms", control.vms, methods=["GET"]),
            Route(vm, control.vm, methods=["GET"]),
            Route(vm + "/screen", control.screen, methods=["GET"]),
            Route(vm + "/keys", control.keys, methods=["POST"]),
            Route(vm + "/serial", control.serial, methods=["GET"]),
            Route(vm + "/serial", control.serial_input, methods=["POST"]),
            Route(vm + "/registers", control.registers, methods=["GET"]),
            Route(vm + "/calls", control.calls, methods=["GET"]),
            Route(vm + "/why", control.why, methods=["GET"]),
            Route(vm + "/exits", control.exits, methods=["GET"]),
            Route(vm + "/profile", control.profile, methods=["POST"]),
            Route(vm + "/profile-end", control.profile_end, methods=["POST"]),
            Route(vm + "/parameters", control.set_parameters, methods=["POST"]),
            Route(vm + "/mode", control.set_mode, methods=["POST"]),
            Route(vm + "/save", control.save, methods=["POST"]),
            Route("/v1/restore", control.restore, methods=["POST"]),
            Route(vm + "/{action}", control.act, methods=["POST"]),
            Route("/v1/policy", control.policy, methods=["GET"]),
            Route("/v1/policy", control.set_policy, methods=["POST"]),
            Route("/v1/warnings", control.warnings, methods=["GET"]),
            Route("/v1/recording", control.recording, methods=["GET"]),
            Route("/v1/loans", control.lend, methods=["POST"]),
            Route("/v1/loans/{loan}", control.exchange, methods=["POST"]),
            Route("/v1/loans/{loan}/end", control.give_back, methods=["POST"]),
            Route("/v1/mixing", control.mixing, methods=["GET"]),
            Route("/v1/mixing", control.keep_mixing, methods=["POST"]),
            Route("/v1/inputs", control.inputs, methods=["POST"]),
            Route("/v1/shutdown", control.shutdown, methods=["POST"]),
        ],
        exception_handlers={
            ServiceError: _service_error, HTTPException: _http_error, Exception: _our_error,
        },
    )


def metrics_app(backend: Backend, render: Render | None = None) -> Starlette:
    """Metrics and health over `backend`; `render` is metrics.exposition.render unless given."""
    scrapes = _Scrapes(backend, render)

    async def healthy(_request: Request) -> Response:
        return PlainTextResponse("Mixvisor is healthy.\n")

    async def ready(_request: Request) -> Response:
        if backend.snapshot().service.ready:
            return PlainTextResponse("Mixvisor is ready.\n")
        return PlainTextResponse("Mixvisor is not ready.\n", status_code=503)

    async def index(_request: Request) -> Response:
        return HTMLResponse(INDEX)

    return Starlette(
        routes=[Route("/metrics", scrapes.scrape), Route("/-/healthy", healthy),
                Route("/-/ready", ready), Route("/", index)],
        exception_handlers={HTTPException: _http_error, Exception: _our_error},
    )


class _Scrapes:
    """`/metrics`: the picture is taken here, counted and written in a worker thread."""

    def __init__(self, backend: Backend, render: Render | None) -> None:
        # prometheus-client is slow to import: only where metrics are served.
        from ..metrics import collector, exposition

        self._backend = backend
        self._render = render or exposition.render
        self._picture: Snapshot | Exception = RuntimeError("no scrape yet")
        self._collector = collector.SnapshotCollector(self._newest, on_failure=_collecting_failed)
        self._turn = trio.Lock()

    def _newest(self) -> Snapshot:
        if isinstance(self._picture, Exception):
            raise self._picture
        return self._picture

    async def scrape(self, request: Request) -> Response:
        async with self._turn:
            try:
                self._picture = self._backend.snapshot()
            except Exception as error:  # the collector shows it: collector_success 0
                self._picture = error
            # Tens of milliseconds for a hundred VMs: not on the thread that watches them.
            content_type, body = await trio.to_thread.run_sync(
                self._render, self._collector, request.headers.get("accept"))
        return Response(body, headers={"content-type": content_type})


def _collecting_failed(error: Exception) -> None:
    log.error("collecting the metrics failed; the last good ones are shown",
              code="collector-failed", exc_info=error)


class _Control:
    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    async def snapshot(self, _request: Request) -> Response:
        return _answer({"snapshot": to_json(self._backend.snapshot())})

    async def vms(self, _request: Request) -> Response:
        return _answer({"vms": to_json(self._backend.snapshot().vms)})

    async def vm(self, request: Request) -> Response:
        return _answer({"vm": to_json(self._find(request.path_params["name"]))})

    def _find(self, name: str) -> VmSnapshot:
        vms = self._backend.snapshot().vms
        for vm in vms:
            if vm.name == name:
                return vm
        raise NotFound(f"there is no VM {name!r}; there are: "
                       f"{', '.join(vm.name for vm in vms) or 'none'}")

    async def warnings(self, _request: Request) -> Response:
        return _answer({"warnings": to_json(self._backend.snapshot().warnings)})

    async def policy(self, _request: Request) -> Response:
        return _answer({"scheduler": await self._backend.set_policy({})})

    async def set_policy(self, request: Request) -> Response:
        return _answer({"scheduler": await self._backend.set_policy(await _body(request))})

    async def set_parameters(self, request: Request) -> Response:
        name = request.path_params["name"]
        self._find(name)
        return _answer({"name": name, "parameters": await self._backend.set_parameters(name, await _body(request))})

    async def set_mode(self, request: Request) -> Response:
        name = request.path_params["name"]
        mode: Any = (await _body(request)).get("mode")
        self._find(name)
        if mode not in MODES:
            raise Unusable(f"mode is one of {', '.join(MODES)}")
        return _answer({"name": name, **await self._backend.set_mode(name, mode)})

    async def save(self, request: Request) -> Response:
        name, body = request.path_params["name"], await _body(request)
        self._find(name)
        leave_running = body.get("leave_running", False)
        if type(leave_running) is not bool:
            raise Unusable("leave_running is true or false")
        file = None if body.get("file") is None else _path(body["file"])
        return _answer({"name": name, **await self._backend.save(name, file, leave_running=leave_running)})

    async def restore(self, request: Request) -> Response:
        body = await _body(request)
        name = body.get("name")
        if name is not None and not isinstance(name, str):
            raise Unusable("name is that of a VM")
        return _answer(await self._backend.restore(_path(body.get("file")), name))

    async def recording(self, request: Request) -> Response:
        text = request.query_params.get("seconds")
        try:
            seconds = None if text is None else float(text)
        except ValueError:
            seconds = -1.0
        if seconds is not None and not 0.0 < seconds <= RECORDING_MAX_SECONDS:
            raise Unusable(f"seconds is a number above 0, at most {RECORDING_MAX_SECONDS:g}; found {text!r}")
        packed = self._backend.recording(seconds)
        # Up to a second's work: not on the thread that watches the VMs.
        body = await trio.to_thread.run_sync(lambda: "\n".join(packed.unpack().lines()) + "\n")
        return Response(body, media_type="application/x-ndjson")

    async def lend(self, request: Request) -> Response:
        return _answer(await self._backend.lend((await _body(request)).get("vms")))

    async def exchange(self, request: Request) -> Response:
        return _answer(self._backend.exchange(request.path_params["loan"], (await _body(request)).get("script")))

    async def give_back(self, request: Request) -> Response:
        return _answer(self._backend.give_back(request.path_params["loan"]))

    async def mixing(self, _request: Request) -> Response:
        result = self._backend.mixing()
        return _answer({"mixing": None if result is None else result.to_json()})

    async def keep_mixing(self, request: Request) -> Response:
        try:
            result = MixingResult.from_json(await _body(request))
        except ResultError as error:
            raise Unusable(str(error)) from error
        self._backend.keep_mixing(result)
        return _answer({"mixing": result.to_json()})

    async def inputs(self, request: Request) -> Response:
        seconds = (await _body(request)).get("seconds")
        if (isinstance(seconds, bool) or not isinstance(seconds, int | float)
                or not INPUTS_MIN_SECONDS <= seconds <= INPUTS_MAX_SECONDS):
            raise Unusable(f"seconds is a number from {INPUTS_MIN_SECONDS:g} to {INPUTS_MAX_SECONDS:g};"
                           f" found {seconds!r}")
        lines = await self._backend.record_inputs(float(seconds))
        body = await trio.to_thread.run_sync(lambda: "\n".join(lines) + "\n")
        return Response(body, media_type="application/x-ndjson")

    async def shutdown(self, _request: Request) -> Response:
        self._backend.request_shutdown()
        return _answer({"stopping": True})

    async def act(self, request: Request) -> Response:
        name, action = request.path_params["name"], request.path_params["action"]
        if action not in ACTIONS:
            raise NotFound(f"there is no action {action!r}; there are: {', '.join(ACTIONS)}")
        self._find(name)
        await self._backend.act(name, action)
        return _answer({"name": name, "action": action, "done": True})

    async def _ask(self, request: Request, op: str, **arguments: Any) -> Response:
        name = request.path_params["name"]
        self._find(name)
        return _answer(await self._backend.ask(name, op, **arguments))

    async def screen(self, request: Request) -> Response:
        return await self._ask(request, "screen")

    async def registers(self, request: Request) -> Response:
        return await self._ask(request, "registers")

    async def calls(self, request: Request) -> Response:
        return await self._ask(request, "calls")

    async def why(self, request: Request) -> Response:
        return await self._ask(request, "why")

    async def exits(self, request: Request) -> Response:
        text = request.query_params.get("limit", str(EXITS_MAX))
        if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= EXITS_MAX):
            raise Unusable(f"limit is a number from 1 to {EXITS_MAX}; found {text!r}")
        return await self._ask(request, "exits", limit=int(text))

    async def profile(self, request: Request) -> Response:
        body = await _body(request)
        hz, seconds = body.get("hz"), body.get("seconds")
        if type(hz) is not int or not 1 <= hz <= HZ_MAX:
            raise Unusable(f"hz is a whole number of samples a second, 1 to {HZ_MAX}")
        if not isinstance(seconds, (int, float)) or isinstance(seconds, bool) or not 0 < seconds <= SECONDS_MAX:
            raise Unusable(f"seconds is a number above 0 and at most {SECONDS_MAX}")
        return await self._ask(request, "profile", hz=hz, duration_s=seconds)

    async def profile_end(self, request: Request) -> Response:
        return await self._ask(request, "profile-end")

    async def serial(self, request: Request) -> Response:
        text = request.query_params.get("offset", "0")
        if not (text.isascii() and text.isdigit() and len(text) <= 18):
            raise Unusable(f"offset is a count of bytes, 0 or more; found {text!r}")
        return await self._ask(request, "serial", offset=int(text))

    async def serial_input(self, request: Request) -> Response:
        data = (await _body(request)).get("data")
        try:
            size = len(base64.b64decode(data, validate=True)) if isinstance(data, str) else None
        except binascii.Error:
            size = None
        if size is None or size > MAX_SERIAL_INPUT:
            raise Unusable(f"data must be base64 of at most {MAX_SERIAL_INPUT} bytes")
        return await self._ask(request, "serial-input", data=data)

    async def keys(self, request: Request) -> Response:
        codes = (await _body(request)).get("scancodes")
        if not (isinstance(codes, list) and len(codes) <= MAX_KEYS and all(map(_is_key, codes))):
            raise Unusable(f"scancodes must be an array of at most {MAX_KEYS} pairs [scan code, "
                           "ASCII code], each 0 to 255")
        return await self._ask(request, "keys", scancodes=codes)


def _path(text: Any) -> Path:
    """A file of the service's host. Raises Unusable."""
    if not isinstance(text, str) or "\0" in text or not text.startswith("/") or len(text) > 4096:
        raise Unusable("file is the whole path of a file, from /")
    return Path(text)


def _is_key(pair: Any) -> bool:
    return (isinstance(pair, list) and len(pair) == 2
            and all(type(code) is int and 0 <= code <= 255 for code in pair))


async def _body(request: Request) -> dict[str, Any]:
    """The request's JSON object. Raises Unusable."""
    received = bytearray()
    with trio.move_on_after(BODY_SECONDS) as limit:
        async with contextlib.aclosing(request.stream()) as chunks:
            async for chunk in chunks:
                received += chunk
                if len(received) > MAX_BODY:
                    raise TooLarge(f"the body is larger than {MAX_BODY} bytes")
    if limit.cancelled_caught:
        raise Unusable(f"the body did not arrive within {BODY_SECONDS:g} s")
    try:
        data = json.loads(received)
    except (ValueError, RecursionError) as error:
        raise Unusable(f"the body is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise Unusable("the body must be a JSON object")
    return data


def _answer(data: dict[str, Any]) -> Response:
    return JSONResponse({"schema": SCHEMA, **data})


def _error(status: int, code: str, message: str) -> Response:
    return JSONResponse({"schema": SCHEMA, "error": {"code": code, "message": message}}, status)


async def _service_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    return _error(error.status, error.code, str(error))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "not-found", 405: "method-not-allowed"}.get(error.status_code, "failed")
    return _error(error.status_code, code,
                  f"{request.method} {request.url.path}: {error.detail.lower()}")


async def _our_error(request: Request, error: Exception) -> Response:
    # anycorn's log is off: said here, or nowhere.
    log.error("a request failed by a defect of Mixvisor", code="api-defect",
              method=request.method, path=request.url.path, exc_info=error)
    return _error(500, "defect", "Mixvisor failed to answer; its log has the details")


