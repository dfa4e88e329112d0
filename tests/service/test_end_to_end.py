"""The installed program as its users run it: a process, its socket, a real Prometheus, and violence."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ..metrics.dashboard import examples, unanswered
from ..metrics.prom import Prometheus, free_port
from .conftest import processes, realtime_threads

PROGRAM = str(Path(sys.executable).with_name("mixvisor"))
ROOT = Path(__file__).resolve().parents[2]
CPU = max(os.sched_getaffinity(0))
# A boot sector that writes a sector of its disk at each tick and reads it back.
WRITER = bytes.fromhex("bb007eb9020031d28ec2b80103cd13b80102cd13fbf4ebe8").ljust(512, b"\0")

pytestmark = pytest.mark.usefixtures("nothing_left")


def wait_for(condition: Callable[[], Any], seconds: float = 30, what: str = "the condition") -> Any:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        value = condition()
        if value:
            return value
        time.sleep(0.03)
    pytest.fail(f"{what} did not come true within {seconds} s")


class Program:
    """`mixvisor run` in a process of its own, and the commands that ask it."""

    def __init__(self, folder: Path, text: str) -> None:
        self.folder = folder
        self.file = folder / "lab.toml"
        self.file.write_text(text)
        self.socket = folder / "state" / "control.sock"
        self.errors = (folder / "stderr").open("a+b")
        self.process = subprocess.Popen(
            [PROGRAM, "run", "--state-dir", str(folder / "state"), str(self.file)],
            stdin=subprocess.DEVNULL, stdout=self.errors, stderr=self.errors)
        wait_for(lambda: self.process.poll() is not None or self.ready(), what="readiness")
        assert self.process.poll() is None, self.said()

    def said(self) -> str:
        return (self.folder / "stderr").read_text()

    def ready(self) -> bool:
        answer = self.ask("ps", "-o", "json", check=False)
        if answer.returncode != 0:
            return False
        states = {vm["state"] for vm in json.loads(answer.stdout)["vms"]}
        return bool(states) and not states & {"defined", "starting"}

    def ask(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        answer = subprocess.run([PROGRAM, "--socket", str(self.socket), *words],
                                capture_output=True, text=True, timeout=30)
        assert not check or answer.returncode == 0, answer.stderr
        return answer

    def vms(self) -> dict[str, dict[str, Any]]:
        listed = json.loads(self.ask("ps", "-o", "json").stdout)
        return {vm["name"]: vm for vm in listed["vms"]}

    def family(self) -> set[int]:
        return {pid for pid in processes() if pid != self.process.pid} | {self.process.pid}

    def end(self, number: signal.Signals = signal.SIGINT) -> float:
        """Seconds from the signal to the end of the process."""
        began = time.monotonic()
        self.process.send_signal(number)
        self.process.wait(timeout=20)
        return time.monotonic() - began


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Callable[[str], Program]]:
    made: list[Program] = []

    def make(text: str) -> Program:
        made.append(Program(tmp_path, text))
        return made[-1]

    yield make
    for one in made:
        if one.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                one.process.send_signal(signal.SIGCONT)
            one.end(signal.SIGTERM)
        one.errors.close()


def lab(vms: str, *, listen: str = "none", dispatch: str = "gentle") -> str:
    return f'[host]\ncpus = "{CPU}"\ndispatch = "{dispatch}"\n[metrics]\nlisten = "{listen}"\n{vms}'


def guest(name: str, weight: int = 100, mode: str = "software", boot: str = '{ guest = "alu" }') -> str:
    return (f'[[vm]]\nname = "{name}"\nmode = "{mode}"\nweight = {weight}\nmemory = "4M"\n'
            f'boot = {boot}\n')


@pytest.mark.kvm
@pytest.mark.prometheus
@pytest.mark.privileged
def test_a_real_prometheus_scrapes_the_service_and_agrees_with_what_the_vms_did(program, tmp_path):
    port = free_port()
    disk = tmp_path / "disk.img"
    disk.write_bytes(WRITER)
    text = lab(guest("d1", boot='{ disk = "disk.img", writable = "overlay" }') + guest("s1")
               + guest("h1", mode="hardware") + guest("s2", 200, boot='{ guest = "portio" }')
               + guest("h2", 400, "hardware"), listen=f"127.0.0.1:{port}")
    one = program(text)
    with Prometheus(tmp_path, {"mixvisor": f"127.0.0.1:{port}"}, scrape_interval="1s") as prometheus:
        prometheus.wait_for('count(mixvisor_vm_state{state="running"} == 1) == 5')
        # What a crossing costs may be unknown for as long as this takes: saying nothing is honest then.
        unknown = ("rossing", "Verdict", "Last conclusion")
        wait_for(lambda: not [title for title in unanswered(prometheus, ROOT / "metrics/dashboards/mixvisor.json", "5s")
                              if not any(word in title for word in unknown)],
                 seconds=60, what="an answer to every expression of the dashboard")
        for query in examples(ROOT / "docs/metrics.md"):
            prometheus.query(query)
        # The counter is shown as it was between two of our own readings of it.
        for metric, ours in (("mixvisor_vm_progress_total", lambda vm: vm["progress"]),
                             ("mixvisor_vm_vcpu_run_seconds_total", lambda vm: vm["vcpus"][0]["run_ns"] / 1e9)):
            before = {name: ours(vm) for name, vm in one.vms().items() if ours(vm) is not None}
            stamp = f"timestamp({metric}) > {time.time()}"
            wait_for(lambda stamp=stamp, before=before: len(prometheus.query(stamp)) == len(before),
                     what="a newer scrape")
            shown = {vm: value for (vm,), value in prometheus.values(metric, "vm").items()}
            after = {name: ours(vm) for name, vm in one.vms().items() if ours(vm) is not None}
            for name in before:
                assert before[name] <= shown[name] <= after[name], (metric, name)
        mode = prometheus.values("mixvisor_vm_info", "name", "mode")
        assert ("s1", "software") in mode
        assert ("h2", "hardware") in mode
        assert prometheus.value('mixvisor_warnings_active{code="mixed-modes",severity="info"}') in (0, 1)
        one.ask("kill", "h2")
        prometheus.wait_for('mixvisor_vm_state{vm="h2",state="stopped"} == 1')


def test_ctrl_c_ends_everything_within_two_seconds(program):
    one = program(lab(guest("a") + guest("b"), dispatch="plain"))
    before = one.family()
    assert len(before) >= 4
    assert one.end() < 2.5          # two seconds for the service; the rest is this test's own clock
    assert one.process.returncode == 0, one.said()
    assert not one.socket.exists()


@pytest.mark.parametrize("dispatch", [pytest.param("precise", marks=pytest.mark.rt),
                                      pytest.param("gentle", marks=pytest.mark.rt), "plain"])
def test_a_killed_supervisor_leaves_no_process_no_priority_and_a_socket_that_does_not_matter(program, dispatch):
    one = program(lab(guest("a") + guest("b"), dispatch=dispatch))
    if dispatch == "precise":
        wait_for(lambda: realtime_threads(processes()), what="real-time dispatch")
    assert one.end(signal.SIGKILL) < 5
    wait_for(lambda: not processes(), what="the end of every process")
    assert one.socket.exists()
    again = program(lab(guest("a"), dispatch="plain"))
    assert again.vms()["a"]["state"] == "running"


@pytest.mark.rt
def test_a_stopped_supervisor_loses_its_priorities_but_not_its_vms(program):
    one = program(lab(guest("a") + guest("b"), dispatch="precise"))
    workers = {vm["pid"] for vm in one.vms().values()}
    wait_for(lambda: realtime_threads(workers), what="real-time dispatch")
    one.process.send_signal(signal.SIGSTOP)
    wait_for(lambda: not realtime_threads(processes()), what="everything given back")
    one.process.send_signal(signal.SIGCONT)
    wait_for(lambda: json.loads(one.ask("ps", "-o", "json").stdout), what="an answer")
    assert {vm["pid"] for vm in one.vms().values()} == workers
    warnings = one.ask("top", "--once", "-o", "json").stdout
    assert "guard-fired" in warnings


@pytest.mark.parametrize("mode", ["software", pytest.param("hardware", marks=pytest.mark.kvm)])
def test_freedos_is_typed_to_and_read_through_the_command_line(program, guests, mode):
    disk = guests / "freedos-1.4M.img"
    one = program(lab(guest("dos", mode=mode, boot=f'{{ disk = "{disk}" }}'), dispatch="plain"))
    wait_for(lambda: "A:\\>" in one.ask("screen", "dos").stdout, 60, "the prompt")
    one.ask("keys", "dos", "ver\\n")
    wait_for(lambda: "FreeCom version" in one.ask("screen", "dos").stdout.partition("ver")[2], 60, "the answer")


def test_every_command_says_no_in_one_line_and_with_its_exit_code(program, tmp_path):
    one = program(lab(guest("a"), dispatch="plain"))
    for words, code, says in (
        (("start", "nobody"), 3, "no VM 'nobody'"),
        (("start", "a"), 4, "a is running"),
        (("screen", "nobody"), 3, "no VM"),
    ):
        answer = one.ask(*words, check=False)
        assert (answer.returncode, says in answer.stderr) == (code, True), answer.stderr
        assert "Traceback" not in answer.stderr
    gone = subprocess.run([PROGRAM, "--socket", str(tmp_path / "none.sock"), "ps"], capture_output=True, text=True)
    assert gone.returncode == 5
    second = subprocess.run([PROGRAM, "run", "--state-dir", str(tmp_path / "state"), str(one.file)],
                            capture_output=True, text=True, timeout=30)
    assert second.returncode == 1
    assert "another mixvisor" in second.stderr
