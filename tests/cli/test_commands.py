"""The commands: what they print where, and their exit codes; against a service without VMs."""

from __future__ import annotations

import dataclasses
import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import structlog
import trio
from click.testing import CliRunner

from mixvisor.cli import main as cli
from mixvisor.cli.show import _remembering_interrupts
from mixvisor.service.api import control_app
from mixvisor.service.http import CannotListen, serve
from mixvisor.vm.host import HostFacts, KvmFacts

from ..fake_backend import FakeBackend, FakeService

FAKE = [sys.executable, "-P", str(Path(__file__).parents[1] / "fake_backend.py"), "command"]
REAL = [sys.executable, "-P", "-c", "from mixvisor.cli.main import main; main()"]
DEADLINE = 20

GOOD = """
[metrics]
listen = "none"
[[vm]]
name = "a"
mode = "software"
boot = { guest = "alu" }
memory = "4M"
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "control.sock"


@pytest.fixture
def service(path):
    """A service without VMs, served from a thread of its own."""
    backend = FakeBackend()
    up = threading.Event()
    token: list[tuple[trio.lowlevel.TrioToken, trio.CancelScope]] = []

    async def run():
        async with trio.open_nursery() as nursery:
            await nursery.start(partial(serve, control_app(backend), unix_socket=path))
            token.append((trio.lowlevel.current_trio_token(), nursery.cancel_scope))
            up.set()

    # In this process the service would log to the stdout of the command.
    structlog.configure(processors=[], logger_factory=structlog.ReturnLoggerFactory())
    thread = threading.Thread(target=trio.run, args=(run,))
    thread.start()
    assert up.wait(DEADLINE)
    yield backend
    token[0][0].run_sync_soon(token[0][1].cancel)
    thread.join()
    structlog.reset_defaults()


@pytest.fixture
def run(path):
    """`run("ps", ...)` -> click's result, asked of the service on `path`."""
    def invoke(*arguments, socket=True):
        where = ["--socket", str(path)] if socket else []
        result = CliRunner(env={"COLUMNS": "100", "MIXVISOR_SOCKET": ""}).invoke(
            cli._mixvisor, [*where, *arguments], prog_name="mixvisor")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result
    return invoke


# Help.

def test_without_arguments_it_says_what_to_do(run):
    result = run(socket=False)
    assert result.exit_code == 0
    for words in ("mixvisor demo", "mixvisor run FILE", "Exit codes:", "7  not in time"):
        assert words in result.stdout


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(run, command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"Usage: mixvisor {command}")


def test_a_misspelt_command_is_a_usage_error_with_a_suggestion(run):
    result = run("strat")
    assert result.exit_code == 2
    assert "did you mean 'start'?" in result.stderr
    assert result.stdout == ""


def test_the_version_is_answered_without_loading_the_service():
    code = ("import sys; sys.argv = ['mixvisor', '--version']\n"
            "from mixvisor.cli.main import main\n"
            "try: main()\n"
            "except SystemExit: pass\n"
            "print(*sorted({'trio', 'rich', 'pydantic', 'httpx2', 'unicorn', 'structlog'}"
            " & set(sys.modules)))")
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True,
                            timeout=DEADLINE, check=True)
    first, second = result.stdout.splitlines()
    assert first.startswith("mixvisor ")
    assert second == ""


# Exit codes, every one.

@pytest.mark.parametrize(("arguments", "code", "says"), [
    (["pause", "sw-one"], 0, ""),
    (["pause", "sw-two"], 1, "Error: Mixvisor failed to answer"),
    (["keys", "dos", "{NOPE}"], 2, "is no key"),
    (["start"], 2, "Missing argument"),
    (["start", "nobody"], 3, "Error: there is no VM 'nobody'; there are: sw-one"),
    (["screen", "nobody"], 3, "there is no VM"),
    (["resume", "sw-one"], 4, "Error: cannot resume sw-one: it is running"),
    (["kill", "sw-two"], 6, "may not be killed"),
    (["stop", "sw-two"], 7, "did not stop within 10 s"),
    (["screen", "dos", "--until", "never", "--timeout", "0.1"], 7, "'never' did not appear"),
])
def test_every_refusal_has_its_exit_code_and_one_line_on_stderr(
        service, run, arguments, code, says):
    result = run(*arguments)
    assert result.exit_code == code
    assert says in result.stderr
    assert "Traceback" not in result.output
    if code:
        assert result.stdout == ""


@pytest.mark.parametrize("arguments", [
    ["ps"], ["ps", "-o", "json"], ["top", "--once"], ["stop", "a"], ["screen", "a"],
    ["keys", "a", "b"],
])
def test_without_a_service_every_command_says_so_with_exit_code_5(run, arguments):
    result = run(*arguments)
    assert result.exit_code == 5
    assert "no Mixvisor service is running on" in result.stderr
    assert "mixvisor run FILE" in result.stderr
    assert result.stdout == ""


def test_the_socket_may_come_from_the_environment(service, path):
    result = CliRunner().invoke(cli._mixvisor, ["ps"], env={"MIXVISOR_SOCKET": str(path)})
    assert result.exit_code == 0
    assert "hw-four" in result.stdout


# Tables and JSON.

def test_ps_shows_every_vm_with_its_mode_and_why(service, run):
    lines = run("ps").stdout.splitlines()
    [line] = [line for line in lines if line.startswith("hw-four")]
    assert line.split()[1:4] == ["running", "hardware", "64-bit"]


def test_ps_as_json_has_the_fields_of_the_snapshot(service, run):
    data = json.loads(run("ps", "-o", "json").stdout)
    assert data["schema"] == 1
    assert [vm["name"] for vm in data["vms"]] == [vm.name for vm in service.snapshot().vms]


def test_top_once_shows_rates_and_the_banner(service, run):
    result = run("top", "--once", "--interval", "0.2", "--sort", "received", "--limit", "2")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    names = [line.split()[0] for line in lines if line.startswith(("sw-", "hw-", "dos"))]
    assert names == ["hw-four", "hw-two"]
    assert "… and 3 more" in result.stdout
    assert "mixed-modes" in result.stdout
    assert "mode switches/s" in result.stdout


def test_top_as_json_is_one_object_a_line(service, run):
    [line] = run("top", "--once", "--interval", "0.1", "-o", "json").stdout.splitlines()
    data = json.loads(line)
    assert data["warnings"] == ["mixed-modes"]
    by_name = {vm["name"]: vm for vm in data["vms"]}
    assert by_name["hw-four"]["received"] == pytest.approx(0.5, abs=0.05)


def test_mixing_says_what_is_known_and_as_json_all_of_it(service, run):
    result = run("mixing")
    assert result.exit_code == 0
    assert result.stdout.startswith("Not measured: the order of slices is fixed")
    data = json.loads(run("mixing", "-o", "json").stdout)
    assert data["schema"] == 1
    assert data["mixing"]["told"] is None


def test_one_refusal_does_not_keep_the_others_from_their_turn(service, run):
    result = run("pause", "sw-one", "nobody", "hw-two", "-o", "json")
    assert result.exit_code == 3
    assert [(one["name"], one["done"]) for one in json.loads(result.stdout)] == [
        ("sw-one", True), ("nobody", False), ("hw-two", True)]
    assert service.actions == [("sw-one", "pause"), ("hw-two", "pause")]


# Screen and keys.

def test_screen_types_and_prints_what_came_of_it(service, run):
    result = run("screen", "dos", "--keys", "ver\\n")
    assert result.exit_code == 0
    assert result.stdout == "A:\\>ver\nA:\\>\n"
    assert json.loads(run("screen", "dos", "-o", "json").stdout)["cursor"] == [4, 1]


def test_more_keys_than_the_guests_buffer_has_room_for_all_arrive(service, run):
    service.key_room = 2
    assert run("keys", "dos", "hello{F1}\\n").exit_code == 0
    assert [chr(code) for _scan, code in service.typed] == [*"hello", "\0", "\r"]


def test_a_guest_that_takes_no_keys_is_exit_code_7(service, run, monkeypatch):
    monkeypatch.setattr("mixvisor.cli.screen.TYPE_SECONDS", 0.1)
    service.key_room = 0
    result = run("keys", "dos", "hello")
    assert result.exit_code == 7
    assert "took 0 of 5 keys" in result.stderr


def test_until_waits_for_the_text(service, run):
    def later():
        time.sleep(0.2)
        service.screen_text += "READY"
        service.screen_version += 1
    thread = threading.Thread(target=later)
    thread.start()
    result = run("screen", "dos", "--until", "READY")
    thread.join()
    assert (result.exit_code, result.stdout) == (0, "A:\\>READY\n")


def test_a_console_without_a_terminal_is_a_usage_error(service, run):
    result = run("console", "dos")
    assert result.exit_code == 2
    assert "needs a terminal" in result.stderr


class Terminal:
    """A command on a pseudo-terminal of 100 by 30."""

    def __init__(self, command, **more):
        import fcntl
        import struct
        import termios
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
        self.before = termios.tcgetattr(slave)
        self.slave = slave
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            # Its controlling terminal, so that Ctrl-C becomes SIGINT.
            preexec_fn=lambda: fcntl.ioctl(slave, termios.TIOCSCTTY, 0),
            env={**os.environ, "TERM": "xterm-256color"}, **more)
        self.text = ""

    def until(self, words):
        limit = time.monotonic() + DEADLINE
        while words not in self.text:
            assert time.monotonic() < limit, f"{words!r} did not come:\n{self.text[-2000:]}"
            if select.select([self.master], [], [], 0.1)[0]:
                self.text += os.read(self.master, 65536).decode("utf-8", "replace")

    def type(self, data):
        os.write(self.master, data)

    def end(self):
        """Exit code, once it has ended; its terminal is as before."""
        import termios
        limit = time.monotonic() + DEADLINE
        while self.process.poll() is None:
            assert time.monotonic() < limit, f"did not end:\n{self.text[-2000:]}"
            if select.select([self.master], [], [], 0.05)[0]:
                self.text += os.read(self.master, 65536).decode("utf-8", "replace")
        while select.select([self.master], [], [], 0)[0]:
            self.text += os.read(self.master, 65536).decode("utf-8", "replace")
        assert termios.tcgetattr(self.slave) == self.before
        return self.process.returncode

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def terminal():
    opened = []

    def start(*command, **more):
        opened.append(Terminal(command, **more))
        return opened[-1]
    yield start
    for one in opened:
        one.close()


def test_the_console_shows_the_screen_types_keys_and_leaves(service, path, terminal):
    window = terminal(*REAL, "--socket", str(path), "console", "dos")
    window.until("A:\\>")
    window.type(b"di\x1b[A\x03")
    window.until("A:\\>di")
    window.type(b"r\r\x1d")
    assert window.end() == 0
    assert "Left the console of dos" in window.text
    assert service.typed == [[0x20, 100], [0x17, 105], [0x48, 0], [0x2E, 3], [0x13, 114],
                             [0x1C, 13]]


def test_the_console_ends_when_its_vm_does(service, path, terminal, monkeypatch):
    from mixvisor.service.backend import Conflict
    ask = service.ask
    ended = threading.Event()

    async def asked(name, op, **arguments):
        if ended.is_set():
            raise Conflict("the VM has ended")
        return await ask(name, op, **arguments)

    monkeypatch.setattr(service, "ask", asked)
    window = terminal(*REAL, "--socket", str(path), "console", "dos")
    window.until("A:\\>")
    ended.set()
    assert window.end() == 4
    assert "the console of dos ended: the VM has ended" in window.text


def test_the_serial_console_shows_output_and_sends_input(service, path, terminal):
    window = terminal(*REAL, "--socket", str(path), "console", "dos", "--serial")
    window.until("hello from the serial port")
    window.type(b"echo")
    window.until("echo")            # the fake guest echoes
    window.type(b"\x1d")
    assert window.end() == 0
    assert service.serial_out.endswith(b"echo")


def test_a_vm_without_a_console_is_told(service, path, terminal):
    window = terminal(*REAL, "--socket", str(path), "console", "sw-one")
    assert window.end() == 4
    assert "sw-one has no console" in window.text


def test_q_ends_a_live_view_at_once_and_the_terminal_is_as_before(service, path, terminal):
    window = terminal(*REAL, "--socket", str(path), "top", "--interval", "3600")
    window.until("\x1b[?1049h")                # the other screen: the first interval has begun
    window.type(b"xQ")
    assert window.end() == 0


def test_top_draws_again_and_again_and_ends_with_ctrl_c(service, path, terminal):
    window = terminal(*REAL, "--socket", str(path), "top", "--interval", "0.1")
    window.until("mode switches/s")
    window.text = ""
    window.until("mode switches/s")
    window.type(b"\x03")
    assert window.end() == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_is_lost_in_a_finalizer_is_still_known():
    class Dying:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with _remembering_interrupts() as came:
        assert not came
        Dying()                                # its exception is ignored, as any from there
        assert came
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


# Files.

@pytest.fixture
def config(tmp_path):
    file = tmp_path / "good.toml"
    file.write_text(GOOD)
    return file


def test_check_of_a_good_file(run, config):
    result = run("check", str(config))
    assert result.exit_code == 0, result.stderr
    assert "can be used: 1 VM." in result.stdout


TWO_MODES = """
[[vm]]
name = "soft"
mode = "software"
boot = { guest = "alu" }
memory = "4M"

[[vm]]
name = "hard"
mode = "hardware"
boot = { guest = "alu" }
memory = "4M"
"""


def on_a_host_with(monkeypatch, technology, why=""):
    """The host of the test, with other virtualization."""
    real = HostFacts.read()
    kvm = KvmFacts("missing", None, why, "Make one.") if why else KvmFacts("usable", 12, "", "")
    facts = dataclasses.replace(real, technology=technology, kvm=kvm)
    monkeypatch.setattr(HostFacts, "read", lambda *_arguments: facts)


def test_check_tells_the_mode_that_each_vm_would_run_in_and_why(run, config, monkeypatch):
    on_a_host_with(monkeypatch, "vt-x")
    config.write_text(TWO_MODES)
    result = run("check", str(config))
    assert result.exit_code == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["soft", "software", "software", "explicit"] in rows
    assert ["hard", "hardware", "kvm", "explicit"] in rows
    assert ["hard:"] in [row[:1] for row in rows]
    assert "run together" in " ".join(result.stderr.split())
    data = json.loads(run("check", str(config), "-o", "json").stdout)
    assert [(vm["vm"], vm["mode"], vm["engine"], vm["rule"], bool(vm["reason"])) for vm in data["plan"]] == [
        ("soft", "software", "software", "explicit", True), ("hard", "hardware", "kvm", "explicit", True)]
    assert next(warning["code"] for warning in data["warnings"]) == "mixed-modes"


def test_check_says_which_vm_this_host_has_no_mode_for_and_what_to_do(run, config, monkeypatch):
    on_a_host_with(monkeypatch, "none", why="there is no /dev/kvm here")
    config.write_text(TWO_MODES)
    result = run("check", str(config))
    assert result.exit_code == 1
    assert "hard: " in result.stderr
    assert "Make one." in result.stderr
    data = json.loads(run("check", str(config), "-o", "json").stdout)
    assert (data["ok"], [vm["vm"] for vm in data["plan"]]) == (False, ["soft"])
    assert [refusal["vm"] for refusal in data["refused"]] == ["hard"]


def test_check_tells_every_problem_with_its_line(run, config):
    config.write_text(GOOD.replace("memory", "memroy") + "weight = 0\n")
    result = run("check", str(config))
    assert result.exit_code == 1
    assert result.stdout == ""
    assert 'did you mean "memory"?' in result.stderr
    assert "weight" in result.stderr
    data = json.loads(run("check", str(config), "-o", "json").stdout)
    assert data["ok"] is False
    assert len(data["problems"]) == 2


def test_a_bad_file_is_not_run(run, config):
    config.write_text("[[vm]]\n")
    result = run("run", str(config))
    assert result.exit_code == 1
    assert "cannot be used" in result.stderr


def test_schema_is_a_json_schema(run):
    assert "properties" in json.loads(run("schema").stdout)


def test_host_says_what_it_has_and_what_that_means(run):
    result = run("host")
    assert result.exit_code == 0
    assert "/dev/kvm" in result.stdout
    data = json.loads(run("host", "-o", "json").stdout)
    assert data["host"]["technology"] in ("vt-x", "amd-v", "pvm", "none")


def test_host_does_not_take_the_vms_of_its_own_service_for_another_programs(service, run, monkeypatch):
    from mixvisor.vm.conflicts import Evidence
    asked = []
    monkeypatch.setattr("mixvisor.vm.hosts.rivals.look_for_rivals",
                        lambda **more: asked.append(more["own"]) or Evidence(technology=more["technology"]))
    assert run("host").exit_code == 0
    assert asked == [os.getpid()]                  # the fake service is in this process


def test_version_names_what_it_stands_on(run):
    assert "mixvisor" in json.loads(run("version", "-o", "json").stdout)["versions"]


# The service and the demo, with a service that has no VMs.

@pytest.fixture
def fake_service(monkeypatch):
    from types import SimpleNamespace
    monkeypatch.setitem(sys.modules, "mixvisor.service.app", SimpleNamespace(Service=FakeService))
    monkeypatch.setattr(FakeService, "made", [])
    monkeypatch.setattr(FakeService, "refusal", None)
    return FakeService


def test_run_gives_the_service_its_directory_socket_and_address(
        fake_service, run, config, tmp_path, monkeypatch):
    service_run = FakeService.run

    async def briefly(self, task_status):
        self.stopping.set()
        await service_run(self, task_status)

    monkeypatch.setattr(FakeService, "run", briefly)
    result = run("run", str(config), "--state-dir", str(tmp_path / "state"),
                 "--listen", "127.0.0.1:9999", socket=False)
    assert result.exit_code == 0, result.output
    [made] = fake_service.made
    assert made.state_dir == tmp_path / "state"
    assert made.socket == tmp_path / "state" / "control.sock"
    assert made.config.metrics.listen == "127.0.0.1:9999"
    assert made.ended


def test_what_the_service_refuses_is_one_line_and_its_exit_code(
        fake_service, run, config, tmp_path, monkeypatch):
    monkeypatch.setattr(FakeService, "refusal", CannotListen("cannot listen on 127.0.0.1:9736"))
    result = run("run", str(config), "--state-dir", str(tmp_path))
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == "Error: cannot listen on 127.0.0.1:9736"
    assert "Traceback" not in result.output


def test_a_wrong_listen_address_is_a_usage_error(fake_service, run, config):
    result = run("run", str(config), "--listen", "nonsense")
    assert result.exit_code == 2
    assert "--listen" in result.stderr
    assert fake_service.made == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_service_cleanly(config, path, number):
    process = subprocess.Popen(
        [*FAKE, "--socket", str(path), "run", str(config), "--state-dir", str(path.parent)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        ready = next(data for line in lines if (data := json.loads(line))["code"] == "ready")
        assert ready["socket"] == str(path)
        assert path.exists()
        process.send_signal(number)
        out, _err = process.communicate(timeout=DEADLINE)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0
    assert out == ""
    assert not path.exists()


def test_the_api_ends_a_running_service(config, path):
    from mixvisor.service.client import Client
    process = subprocess.Popen(
        [*FAKE, "--socket", str(path), "run", str(config), "--state-dir", str(path.parent)],
        stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        process.stderr.readline()
        with Client(path) as client:
            client.shutdown()
        process.communicate(timeout=DEADLINE)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0


def test_a_log_that_cannot_be_written_does_not_end_the_service(config, path):
    from mixvisor.service.client import Client
    with open("/dev/full", "w") as full:
        process = subprocess.Popen(
            [*FAKE, "--socket", str(path), "run", str(config), "--state-dir", str(path.parent)],
            stderr=full)
    try:
        limit = time.monotonic() + DEADLINE
        while not path.exists() and time.monotonic() < limit:
            time.sleep(0.02)
        with Client(path) as client:
            client.shutdown()
        assert process.wait(DEADLINE) in (0, 120)       # 120: Python could not flush stderr
    finally:
        process.kill()
        process.wait()


def test_a_demo_into_a_pipe_prints_lines_and_a_closing_table(fake_service, run):
    result = run("demo", "--seconds", "1.2", "--listen", "none")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert "hw-four" in lines[0]
    assert any(line.startswith("Verdict: ") for line in lines)
    assert "\x1b" not in result.stdout
    [made] = fake_service.made
    assert made.ended
    assert made.config.host.cpus == (max(os.sched_getaffinity(0)),)
    assert [vm.weight for vm in made.config.vms] == [100, 100, 200, 400]
    assert not made.state_dir.exists()


def test_a_demo_as_json_is_one_document(fake_service, run):
    data = json.loads(run("demo", "--seconds", "0.5", "--listen", "none", "-o", "json").stdout)
    assert data["verdict"]["text"]
    assert {vm["name"] for vm in data["vms"]} >= {"sw-one", "hw-four"}


def test_a_demo_on_a_cpu_that_is_not_there_is_a_usage_error(fake_service, run):
    result = run("demo", "--cpu", "9999")
    assert result.exit_code == 2
    assert "host CPU 9999 cannot be used" in result.stderr


def test_a_demo_in_which_a_vm_crashed_does_not_end_with_0(fake_service, run, monkeypatch):
    init = FakeService.__init__

    def broken(self, *arguments, **more):
        init(self, *arguments, **more)
        self._state["hw-two"] = "crashed"

    monkeypatch.setattr(FakeService, "__init__", broken)
    result = run("demo", "--seconds", "0.5", "--listen", "none")
    assert result.exit_code == 1
    assert "hw-two crashed" in result.stdout


def test_a_demo_without_kvm_says_so_and_runs_all_in_software(fake_service, run, monkeypatch):
    from dataclasses import replace

    from mixvisor.vm.host import HostFacts, KvmFacts
    facts = replace(HostFacts.read(), kvm=KvmFacts(
        "missing", None, "there is no /dev/kvm", "Load the module kvm_intel or kvm_amd."))
    monkeypatch.setattr(HostFacts, "read", classmethod(lambda cls: facts))
    result = run("demo", "--seconds", "0.3", "--listen", "none")
    assert result.exit_code == 0
    assert "Hardware VMs cannot run here: there is no /dev/kvm" in result.stderr
    from mixvisor.vm.modes import plan
    [made] = fake_service.made
    assert {answer.mode for answer in plan(made.config.vms, facts.modes).values()} == {"software"}


def test_a_demo_on_a_terminal_draws_a_table_and_ctrl_c_closes_it(terminal, path):
    window = terminal(*FAKE, "--socket", str(path), "demo", "--listen", "none")
    window.until("Mixvisor demo · ")
    window.until("mixvisor top")
    window.type(b"\x03")
    assert window.end() == 0
    assert "The whole run:" in window.text
    assert "Verdict: " in window.text
    assert not path.exists()


def test_a_held_terminal_does_not_keep_the_demos_vms_alive(terminal, path):
    window = terminal(*FAKE, "--socket", str(path), "demo", "--listen", "none")
    window.until("Mixvisor demo · ")
    window.type(b"\x13")                # Ctrl-S
    time.sleep(1.0)                     # long enough for a drawing to be stuck
    window.process.send_signal(signal.SIGTERM)
    limit = time.monotonic() + DEADLINE
    while path.exists():                # the service goes, though nothing can be written
        assert time.monotonic() < limit
        time.sleep(0.02)
    window.type(b"\x11")                # Ctrl-Q
    assert window.end() == 0
    assert "Verdict: " in window.text


def test_no_color_is_obeyed(terminal, path, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    window = terminal(*FAKE, "--socket", str(path), "demo", "--listen", "none", "--seconds", "1")
    assert window.end() == 0
    assert "\x1b[36m" not in window.text        # cyan, of software
    assert "Verdict: " in window.text
