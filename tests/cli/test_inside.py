"""`why`, `exits` and `profile`: what a person reads and a program parses, and the exit codes."""

from __future__ import annotations

import json
import threading
from functools import partial

import pytest
import trio
from click.testing import CliRunner

from mixvisor.cli import inside
from mixvisor.cli import main as cli
from mixvisor.service.api import control_app
from mixvisor.service.http import serve

from ..fake_backend import INSIDE, FakeBackend

DEADLINE = 20


@pytest.fixture
def run(tmp_path):
    """`run("why", "dos")` against a service without VMs, served from a thread of its own."""
    path, up = tmp_path / "control.sock", threading.Event()
    token: list[tuple[trio.lowlevel.TrioToken, trio.CancelScope]] = []

    async def served():
        async with trio.open_nursery() as nursery:
            await nursery.start(partial(serve, control_app(FakeBackend()), unix_socket=path))
            token.append((trio.lowlevel.current_trio_token(), nursery.cancel_scope))
            up.set()

    thread = threading.Thread(target=trio.run, args=(served,), daemon=True)
    thread.start()
    assert up.wait(DEADLINE)
    yield lambda *arguments: CliRunner().invoke(cli._mixvisor, ["--socket", str(path), *map(str, arguments)])
    token[0][0].run_sync_soon(token[0][1].cancel)
    thread.join(DEADLINE)


def test_why_shows_reason_registers_code_and_last_exits(run):
    lines = run("why", "dos").output.splitlines()
    assert lines[0].startswith("dos is paused, ended ")
    assert lines[0].endswith("s ago: the guest triple-faulted (triple-fault)")
    assert lines[1] == "It stood at 0x10008 in 32-bit protected mode, ring 0: int3"
    assert [line.split() for line in lines if line.startswith("→")] == [["→", "0x10008", "cc", "int3"]]
    assert any(line.split() == ["rip", "00010008", "rflags", "00000002"] for line in lines)
    assert lines[-1] == "POST codes, the newest last: 42"
    assert [line.split(maxsplit=2) for line in lines[-4:-2]] == [
        ["io_out", "0x10007", "out dx, al   (3 times)"], ["interrupt", "0x10008", "int3"]]


def test_why_in_json_is_the_services_answer(run):
    data = json.loads(run("why", "dos", "-o", "json").output)
    assert data["report"] == INSIDE["why"]["report"]
    assert data["registers"]["rip"] == 0x10008


def test_exits_are_by_reason_instruction_and_address(run):
    output = run("exits", "sw-one").output
    assert "2000 exits caused by instructions at 3 places" in output
    rows = [line.split() for line in output.splitlines() if line.startswith(("io_out", "halt"))]
    assert rows[0][:6] == ["io_out", "out", "1.50", "k", "75.0", "%"]
    assert rows[0][6] == "0x10007"
    assert rows[2][:5] == ["halt", "–", "10", "0.5", "%"]
    data = json.loads(run("exits", "sw-one", "-o", "json").output)
    assert data["sites"] == INSIDE["exits"]["sites"]
    assert "kick" in data["by_reason"]


def test_profile_shows_rings_contexts_and_hot_code(run):
    output = run("profile", "sw-one", "--seconds", "0.1").output
    assert "guest context 75.0 %, host context (handling exits) 25.0 %" in output
    assert [line.split() for line in output.splitlines() if line[:1].isdigit()][:4] == [
        ["0", "25", "25.0", "%"], ["1", "0", "0.0", "%"], ["2", "0", "0.0", "%"], ["3", "75", "75.0", "%"]]
    assert "75.0 % in 64-bit long mode, ring 3" in output
    assert "  60.0 %  vCPU 1" in output
    assert json.loads(run("profile", "sw-one", "--seconds", "0.1", "-o", "json").output)["samples"] == 100


@pytest.mark.parametrize(("arguments", "code", "says"), [
    (["why", "nobody"], 3, "there is no VM"),
    (["exits", "nobody"], 3, "there is no VM"),
    (["profile", "nobody", "--seconds", "0.1"], 3, "there is no VM"),
    (["profile", "dos", "--hz", "0"], 2, "--hz"),
    (["profile", "dos", "--seconds", "1e9"], 2, "--seconds"),
    (["exits", "dos", "--limit", "0"], 2, "--limit"),
])
def test_what_cannot_be_is_one_error_with_its_code(run, arguments, code, says):
    result = run(*arguments)
    assert result.exit_code == code
    assert says in result.output
    assert "Traceback" not in result.output


def test_without_a_service_the_error_says_so(tmp_path):
    result = CliRunner().invoke(cli._mixvisor, ["--socket", str(tmp_path / "none"), "why", "dos"])
    assert result.exit_code == 5


def test_high_halves_of_registers_are_shown_when_one_is_used():
    assert inside.register_lines({"rax": 1, "rbx": 2})[0] == "rax 00000001  rbx 00000002"
    lines = inside.register_lines({"rax": 1, "r8": 1 << 40, "cs": 8})
    assert lines[0] == "rax 0000000000000001"
    assert "r8  0000010000000000" in lines
    assert "cs  0008" in lines
