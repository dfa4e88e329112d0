"""A real Prometheus for tests: started on a free loopback port, asked, stopped cleanly.

    with Prometheus(tmp_path, {"mixvisor": f"127.0.0.1:{port}"}) as prometheus:
        prometheus.wait_for("up == 1")
        prometheus.value("mixvisor_scheduler_fairness_ratio")

Waits are for conditions, each with a deadline; the process is killed when it does not end, and
dies with its tester (util-linux' setpriv). `MetricsServer` serves a renderer over HTTP where no
service is at hand.
"""

from __future__ import annotations

import json
import math
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self

DEADLINE_S = 30.0
Labels = dict[str, str]


class PrometheusFailed(AssertionError):
    """Prometheus ended, refused a query, or a condition did not come true in time."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Prometheus:
    """`targets`: job name to host:port. All times in seconds."""

    def __init__(
        self, folder: Path, targets: Mapping[str, str], *, scrape_interval: str = "200ms",
    ) -> None:
        self._folder = folder
        self._log = folder / "prometheus.log"
        self.port = free_port()
        jobs = [{"job_name": job, "static_configs": [{"targets": [target]}]}
                for job, target in targets.items()]
        self._configuration = folder / "prometheus.yml"
        # YAML is a superset of JSON.
        self._configuration.write_text(json.dumps({
            "global": {"scrape_interval": scrape_interval, "scrape_timeout": scrape_interval},
            "scrape_configs": jobs}))
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "--",
                 "prometheus", f"--config.file={self._configuration}",
                 f"--storage.tsdb.path={self._folder / 'data'}",
                 f"--web.listen-address=127.0.0.1:{self.port}", "--log.level=warn"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            self._wait(self._ready, "ready")
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=10)

    def query(self, expression: str) -> list[tuple[Labels, float]]:
        """Every series of an instant query with its value now (NaN included)."""
        answer = self._get("/api/v1/query", query=expression)
        data = answer["data"]
        if data["resultType"] == "scalar":
            return [({}, float(data["result"][1]))]
        return [(sample["metric"], float(sample["value"][1])) for sample in data["result"]]

    def values(self, expression: str, *labels: str) -> dict[tuple[str, ...], float]:
        """The answer by the values of some labels, e.g. values(e, "vm")["alpha",]."""
        answer: dict[tuple[str, ...], float] = {}
        for found, value in self.query(expression):
            key = tuple(found.get(label, "") for label in labels)
            if key in answer:
                raise PrometheusFailed(f"{expression}: two series with {labels} = {key}")
            answer[key] = value
        return answer

    def value(self, expression: str) -> float:
        """The one number that the expression answers."""
        answer = self.query(expression)
        if len(answer) != 1:
            raise PrometheusFailed(f"{expression}: {len(answer)} series instead of one: {answer}")
        return answer[0][1]

    def wait_for(
        self,
        expression: str,
        accept: Callable[[list[tuple[Labels, float]]], bool] | None = None,
        *,
        deadline_s: float = DEADLINE_S,
    ) -> list[tuple[Labels, float]]:
        """Ask until the answer is accepted (default: it has series and no value is NaN)."""
        accept = accept or has_data
        last: list[tuple[Labels, float]] = []

        def asked() -> bool:
            nonlocal last
            last = self.query(expression)
            return accept(last)

        self._wait(asked, lambda: f"{expression} accepted; the last answer was {last}", deadline_s)
        return last

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/-/ready", timeout=5) as got:
                return got.status == 200
        except OSError:          # not listening yet, or answering 503: ask again
            return False

    def _wait(self, condition: Callable[[], bool], what: str | Callable[[], str],
              deadline_s: float = DEADLINE_S) -> None:
        deadline = time.monotonic() + deadline_s
        while not condition():
            if self._process is None or self._process.poll() is not None:
                raise PrometheusFailed(f"prometheus ended:\n{self._log.read_text()}")
            if time.monotonic() > deadline:
                text = what if isinstance(what, str) else what()
                raise PrometheusFailed(f"not within {deadline_s} s: {text}")
            time.sleep(0.05)

    def _get(self, path: str, **parameters: str) -> dict:
        url = f"http://127.0.0.1:{self.port}{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise PrometheusFailed(f"{parameters}: {error.read().decode()}") from error


def has_data(answer: list[tuple[Labels, float]]) -> bool:
    return bool(answer) and not any(math.isnan(value) for _, value in answer)


class MetricsServer:
    """A small HTTP server over `render(accept header) -> (content type, body)`."""

    def __init__(self, render: Callable[[str | None], tuple[str, bytes]]) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                content_type, body = render(self.headers.get("Accept"))
                self.send_response(200)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Quiet: a test's output is for its failures."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.address = f"127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=10)


def promtool(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run promtool with a deadline; its complaints are in stdout and stderr."""
    return subprocess.run(["promtool", *arguments], input=stdin, capture_output=True, timeout=60,
                          check=False)
