"""The control and metrics API over real sockets, with a service that has no VMs."""

from __future__ import annotations

import base64
import json
import socket
import stat
import threading
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import httpx2
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from mixvisor.metrics.mixing.result import MixingResult
from mixvisor.service.api import MAX_BODY, control_app, metrics_app
from mixvisor.service.backend import Conflict, Denied, NotFound, ServiceError, TimedOut, Unusable
from mixvisor.service.client import Client, Unreachable
from mixvisor.service.http import CannotListen, serve
from mixvisor.service.wire import Misread, snapshot_from_json, to_json

from ..fake_backend import FakeBackend
from ..metrics.mixing.test_result import RESULT


@asynccontextmanager
async def served(app, **where):
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            yield await nursery.start(partial(serve, app, **where))
            nursery.cancel_scope.cancel()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "control.sock"


@pytest.fixture
def backend():
    return FakeBackend()


async def ask(path, method, url, **more):
    transport = httpx2.AsyncHTTPTransport(uds=str(path))
    async with httpx2.AsyncClient(transport=transport, base_url="http://x") as http:
        return await http.request(method, url, **more)


async def call(path, work):
    """`work(client)` in a thread, as the command line does it."""
    def run():
        with Client(path, timeout_seconds=10) as client:
            return work(client)
    return await trio.to_thread.run_sync(run)


# The picture.

@given(seconds=st.floats(0, 1e6), mixed=st.booleans())
def test_a_snapshot_survives_the_wire(seconds, mixed):
    clock = iter((0, int(seconds * 1e9)))
    snapshot = FakeBackend(now_ns=lambda: next(clock), mixed=mixed).snapshot()
    assert snapshot_from_json(json.loads(json.dumps(to_json(snapshot)))) == snapshot


@pytest.mark.parametrize(("change", "says"), [
    (lambda d: d.pop("vms"), "snapshot: no field 'vms'"),
    (lambda d: d["vms"][0].update(weight="heavy"), r"snapshot.vms\[0\].weight: expected int"),
    (lambda d: d["vms"][0].update(mode="both"), "'both' is none of software, hardware"),
    (lambda d: d["cpus"][0].update(switches={"a": 1}), "expected an array, found dict"),
    (lambda d: d["scheduler"].update(slice_ns=True), "expected int, found bool"),
])
def test_another_schema_is_named_and_not_guessed_at(backend, change, says):
    data = to_json(backend.snapshot())
    change(data)
    with pytest.raises(Misread, match=says):
        snapshot_from_json(data)


async def test_a_field_of_a_newer_service_is_ignored(backend):
    snapshot = backend.snapshot()
    data = to_json(snapshot)
    data["vms"][0]["novelty"] = 1
    assert snapshot_from_json(data) == snapshot


async def test_the_client_sees_the_snapshot_that_the_service_has(path, backend):
    snapshot = backend.snapshot()
    backend.snapshot = lambda: snapshot
    async with served(control_app(backend), unix_socket=path):
        assert await call(path, lambda c: c.snapshot()) == snapshot
        vms = await call(path, lambda c: c.vms())
        assert vms["schema"] == 1
        assert [vm["name"] for vm in vms["vms"]] == [vm.name for vm in snapshot.vms]
        assert (await call(path, lambda c: c.vm("dos")))["vm"] == to_json(snapshot.vms[-1])
        warnings = (await ask(path, "GET", "/v1/warnings")).json()["warnings"]
        assert [w["code"] for w in warnings] == ["mixed-modes"]


# Actions and refusals.

async def test_an_action_is_done_when_it_is_answered(path, backend):
    async with served(control_app(backend), unix_socket=path):
        await call(path, lambda c: c.act("sw-one", "pause"))
        assert (await call(path, lambda c: c.vm("sw-one")))["vm"]["state"] == "paused"
        await call(path, lambda c: c.act("sw-one", "resume"))
    assert backend.actions == [("sw-one", "pause"), ("sw-one", "resume")]


@pytest.mark.parametrize(("name", "action", "kind", "says"), [
    ("nobody", "start", NotFound, "there is no VM 'nobody'; there are: sw-one,"),
    ("sw-one", "fly", NotFound, "there is no action 'fly'; there are: start, stop"),
    ("sw-one", "resume", Conflict, "cannot resume sw-one: it is running"),
    ("sw-two", "kill", Denied, "may not"),
    ("sw-two", "stop", TimedOut, "did not stop within 10 s"),
    ("a/b é", "start", NotFound, "a/b é|POST"),
])
async def test_a_refusal_arrives_as_the_error_it_was(path, backend, name, action, kind, says):
    async with served(control_app(backend), unix_socket=path):
        with pytest.raises(ServiceError, match=says) as caught:
            await call(path, lambda c: c.act(name, action))
    assert type(caught.value) is kind
    assert backend.actions == []


async def test_a_defect_is_an_answer_and_the_service_goes_on(path, backend):
    async with served(control_app(backend), unix_socket=path):
        response = await ask(path, "POST", "/v1/vms/sw-two/pause")
        assert response.status_code == 500
        assert response.json()["error"] == {
            "code": "defect", "message": "Mixvisor failed to answer; its log has the details"}
        assert (await ask(path, "GET", "/v1/vms")).status_code == 200


@pytest.mark.parametrize(("url", "body", "says"), [
    ("keys", b"{", "the body is not JSON"),
    ("keys", b"[" * 100_000, "the body is not JSON"),
    ("keys", b"\xff\xfe", "the body is not JSON"),
    ("keys", b"[]", "must be a JSON object"),
    ("keys", b"{}", "scancodes must be"),
    ("keys", b'{"scancodes": [[1, 256]]}', "scancodes must be"),
    ("keys", b'{"scancodes": [[1, true]]}', "scancodes must be"),
    ("keys", b'{"scancodes": [[1]]}', "scancodes must be"),
    ("serial", b'{"data": "%%%"}', "data must be base64"),
    ("serial", b'{"data": 7}', "data must be base64"),
])
async def test_a_wrong_body_is_refused_in_one_sentence(path, backend, url, body, says):
    async with served(control_app(backend), unix_socket=path):
        response = await ask(path, "POST", f"/v1/vms/dos/{url}", content=body)
    assert response.status_code == 422
    error = response.json()["error"]
    assert error["code"] == "unusable"
    assert says in error["message"]
    assert "\n" not in error["message"]


async def test_a_body_without_end_is_cut_off(path, backend):
    async def endless():
        while True:
            yield b" " * 65536

    async with served(control_app(backend), unix_socket=path):
        response = await ask(path, "POST", "/v1/vms/dos/keys", content=b" " * (MAX_BODY + 1))
        assert response.status_code == 413
        try:
            response = await ask(path, "POST", "/v1/vms/dos/keys", content=endless())
        except httpx2.TransportError:
            pass                    # hung up on while still sending: as good
        else:
            assert response.status_code == 413
        assert (await ask(path, "GET", "/v1/vms")).status_code == 200


async def test_a_body_that_does_not_come_is_not_waited_for(path, backend, monkeypatch):
    monkeypatch.setattr("mixvisor.service.api.BODY_SECONDS", 0.05)
    async with (served(control_app(backend), unix_socket=path),
                await trio.open_unix_socket(path) as slow):
        await slow.send_all(b"POST /v1/vms/dos/keys HTTP/1.1\r\nhost: x\r\n"
                            b"content-length: 9\r\n\r\n{")
        answer = await slow.receive_some(65536)
    assert answer.startswith(b"HTTP/1.1 422")


@pytest.mark.parametrize("offset", ["-1", "x", "1e3", "9" * 30, "²"])
async def test_an_offset_that_is_no_count_is_refused(path, backend, offset):
    async with served(control_app(backend), unix_socket=path):
        response = await ask(path, "GET", "/v1/vms/dos/serial", params={"offset": offset})
    assert response.status_code == 422


async def test_unknown_paths_and_methods_are_json_too(path, backend):
    async with served(control_app(backend), unix_socket=path):
        missing = await ask(path, "GET", "/v2/vms")
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not-found")
        wrong = await ask(path, "DELETE", "/v1/vms")
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method-not-allowed")


async def test_screen_keys_and_serial_reach_the_guest(path, backend):
    async with served(control_app(backend), unix_socket=path):
        assert await call(path, lambda c: c.keys("dos", [(0x2F, 118), (0x1C, 13)])) == 2
        screen = await call(path, lambda c: c.screen("dos"))
        assert [row.rstrip() for row in screen["rows"][:2]] == ["A:\\>v", "A:\\>"]
        await call(path, lambda c: c.serial_input("dos", base64.b64encode(b"hi").decode()))
        tail = await call(path, lambda c: c.serial("dos", 28))
        assert base64.b64decode(tail["data"]) == b"hi"
        assert (await call(path, lambda c: c.registers("dos")))["registers"] == {"rax": 1}
        assert (await call(path, lambda c: c.calls("dos")))["calls"] == [[16, 14, 4]]
    assert backend.typed == [[0x2F, 118], [0x1C, 13]]


async def test_modes_and_files_go_through_the_api(path, backend):
    async with served(control_app(backend), unix_socket=path):
        moved = await call(path, lambda c: c.set_mode("sw-one", "hardware"))
        assert (moved["name"], moved["mode"], moved["changed"]) == ("sw-one", "hardware", True)
        saved = await call(path, lambda c: c.save("sw-one", Path("/x/sw-one.mixvisor"), leave_running=True))
        assert (saved["file"], saved["running"]) == ("/x/sw-one.mixvisor", True)
        restored = await call(path, lambda c: c.restore(Path("/x/sw-one.mixvisor")))
        assert (restored["name"], restored["mode"]) == ("sw-one", "software")
        with pytest.raises(Conflict, match="stays in hardware mode"):
            await call(path, lambda c: c.set_mode("hw-four", "software"))


@pytest.mark.parametrize(("url", "body", "says"), [
    ("vms/dos/mode", {}, "mode is one of software, hardware"),
    ("vms/dos/mode", {"mode": ["software"]}, "mode is one of"),
    ("vms/dos/save", {"leave_running": 1}, "leave_running is true or false"),
    ("vms/dos/save", {"file": "relative"}, "file is the whole path"),
    ("vms/dos/save", {"file": 5}, "file is the whole path"),
    ("restore", {}, "file is the whole path"),
    ("restore", {"file": "/x\0y"}, "file is the whole path"),
    ("restore", {"file": "/x", "name": 3}, "name is that of a VM"),
])
async def test_a_body_that_makes_no_sense_is_refused_in_a_sentence(path, backend, url, body, says):
    async with served(control_app(backend), unix_socket=path):
        response = await ask(path, "POST", f"/v1/{url}", json=body)
    assert response.status_code == 422
    assert says in response.json()["error"]["message"]


async def test_shutdown_is_asked_for_and_answered(path, backend):
    async with served(control_app(backend), unix_socket=path):
        await call(path, lambda c: c.shutdown())
    assert backend.stopping.is_set()


# The unix socket.

async def test_the_socket_and_its_directory_have_their_modes(path, backend):
    async with served(control_app(backend), unix_socket=path) as address:
        assert address == str(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o750
    assert not path.parent.exists()


async def test_the_mode_of_a_directory_that_was_there_is_left_alone(tmp_path, backend):
    tmp_path.chmod(0o755)
    async with served(control_app(backend), unix_socket=tmp_path / "s"):
        assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755


async def test_the_socket_of_a_dead_service_is_replaced(path, backend):
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        dead.listen()
    assert path.exists()
    async with served(control_app(backend), unix_socket=path):
        assert (await call(path, lambda c: c.snapshot())).service.pid == 1234


async def test_the_socket_of_a_live_service_is_refused_and_left_alone(path, backend):
    async with served(control_app(backend), unix_socket=path):
        with pytest.raises(CannotListen, match=r"a Mixvisor service is running already on .*sock"):
            await serve(control_app(backend), unix_socket=path)
        assert (await call(path, lambda c: c.snapshot())).service.pid == 1234


async def test_a_live_service_that_does_not_accept_is_not_taken_for_dead(path, backend):
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as waiting:
        busy.bind(str(path))
        busy.listen(0)
        waiting.connect(str(path))          # the queue is full now
        with pytest.raises(CannotListen, match="running already"):
            await serve(control_app(backend), unix_socket=path)


async def test_of_two_services_started_together_one_wins(path, backend):
    outcomes = []

    async def contend():
        async def note(task_status):
            try:
                await serve(control_app(backend), unix_socket=path, task_status=task_status)
            except CannotListen:
                outcomes.append("refused")
                task_status.started("")
        address = await nursery.start(lambda task_status: note(task_status))
        if address:
            outcomes.append("serves")

    async with trio.open_nursery() as nursery:
        async with trio.open_nursery() as contest:
            for _ in range(5):
                contest.start_soon(contend)
        nursery.cancel_scope.cancel()
    assert sorted(outcomes) == ["refused"] * 4 + ["serves"]


async def test_a_file_that_is_no_socket_is_not_removed(path, backend):
    path.parent.mkdir()
    path.write_text("precious")
    with pytest.raises(CannotListen, match="is not a socket"):
        await serve(control_app(backend), unix_socket=path)
    assert path.read_text() == "precious"


async def test_a_path_too_long_or_not_writable_is_one_clear_error(tmp_path, backend):
    with pytest.raises(CannotListen, match="too long"):
        await serve(control_app(backend), unix_socket=tmp_path / ("x" * 120))
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotListen, match="cannot make the control socket"):
        await serve(control_app(backend), unix_socket=tmp_path / "file" / "s")


async def test_a_socket_that_was_replaced_is_not_unlinked(path, backend):
    async with served(control_app(backend), unix_socket=path):
        path.unlink()
        path.write_text("another's")
    assert path.read_text() == "another's"


# The client without a service.

def test_no_service_is_exit_code_5_and_says_what_to_do(path):
    with pytest.raises(Unreachable, match=r"start one with `mixvisor run FILE`") as caught:
        Client(path)
    assert caught.value.exit_code == 5


def test_a_dead_socket_is_unreachable_too(tmp_path):
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "s"))
    with pytest.raises(Unreachable, match="no Mixvisor service is running"):
        Client(tmp_path / "s")


@pytest.fixture
def someone_else(tmp_path):
    """A program that is not Mixvisor on a unix socket: reads one request, says `words`."""
    threads = []

    def start(words: bytes | None) -> Path:
        path = tmp_path / "other.sock"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen()
        done = threading.Event()

        def talk():
            with listener:
                listener.accept()[0].close()        # the client's knock
                connection = listener.accept()[0]
            with connection:
                connection.recv(65536)
                if words is None:
                    done.wait(10)
                else:
                    connection.sendall(words)

        thread = threading.Thread(target=talk)
        thread.start()
        threads.append((thread, done))
        return path

    yield start
    for thread, done in threads:
        done.set()
        thread.join()


@pytest.mark.parametrize("words", [
    b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi",
    b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}",
    b"HTTP/1.1 200 OK\r\ncontent-length: 14\r\n\r\n{\"schema\": 99}",
    b"SSH-2.0-OpenSSH\r\n",
    b"",
])
def test_another_program_on_the_socket_is_a_service_error(someone_else, words):
    with pytest.raises(ServiceError), Client(someone_else(words)) as client:
        client.snapshot()


def test_a_service_that_does_not_answer_is_exit_code_7(someone_else):
    with (pytest.raises(TimedOut) as caught,
          Client(someone_else(None), timeout_seconds=0.05) as client):
        client.snapshot()
    assert caught.value.exit_code == 7


def test_every_refusal_has_an_exit_code_of_its_own():
    kinds = (ServiceError, Unusable, NotFound, Conflict, Unreachable, Denied, TimedOut)
    assert [kind.exit_code for kind in kinds] == [1, 2, 3, 4, 5, 6, 7]


# The end.

async def test_cancelling_is_quick_even_with_a_client_that_reads_nothing(path, backend):
    big = b"x" * (8 << 20)

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": big})

    async with trio.open_nursery() as nursery:
        await nursery.start(partial(serve, app, unix_socket=path))
        with socket.socket(socket.AF_UNIX) as deaf:
            deaf.connect(str(path))
            deaf.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            with trio.fail_after(5):
                # The answer has begun: the server is now stuck in sending the rest.
                while not await trio.to_thread.run_sync(lambda: deaf.recv(1, socket.MSG_PEEK)):
                    pass
            begin = trio.current_time()
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True), trio.fail_after(5):
                while path.exists():  # noqa: ASYNC110 - a file has no event
                    await trio.sleep(0.01)
    assert trio.current_time() - begin < 1.0
    assert not path.exists()


async def test_a_request_in_flight_is_answered_before_the_end(path):
    begun = trio.Event()

    async def app(scope, receive, send):
        begun.set()
        await trio.sleep(0.05)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})

    answers = []

    async def client():
        answers.append((await ask(path, "GET", "/")).text)

    async with trio.open_nursery() as asking, trio.open_nursery() as nursery:
        await nursery.start(partial(serve, app, unix_socket=path))
        asking.start_soon(client)
        await begun.wait()
        nursery.cancel_scope.cancel()
    assert answers == ["done"]


async def test_a_client_that_hangs_up_or_talks_nonsense_hurts_nobody(path, backend):
    async with served(control_app(backend), unix_socket=path):
        for words in (b"", b"GET", b"\x00" * 1000, b"GET /v1/vms HTTP/1.1\r\nhost: x\r\n\r\n",
                      b"POST /v1/vms/dos/keys HTTP/1.1\r\nhost: x\r\ncontent-length: 50\r\n\r\n{"):
            with socket.socket(socket.AF_UNIX) as rude:
                rude.connect(str(path))
                rude.sendall(words)
        assert (await ask(path, "GET", "/v1/vms")).status_code == 200


# Metrics over TCP.

async def test_metrics_and_health_answer_over_tcp(backend):
    async with (served(metrics_app(backend), tcp="127.0.0.1:0") as address,
                httpx2.AsyncClient(base_url=f"http://{address}") as http):
        metrics = await http.get("/metrics")
        assert metrics.status_code == 200
        assert 'mixvisor_vm_state{state="running",vm="sw-one"} 1.0' in metrics.text
        assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
        assert (await http.get("/-/healthy")).status_code == 200
        assert (await http.get("/-/ready")).status_code == 200
        backend.ready = False
        assert (await http.get("/-/ready")).status_code == 503
        assert (await http.get("/-/healthy")).status_code == 200
        assert "/metrics" in (await http.get("/")).text
        assert (await http.post("/v1/shutdown")).status_code == 404


async def test_openmetrics_is_served_to_who_asks_for_it(backend):
    async with (served(metrics_app(backend), tcp="127.0.0.1:0") as address,
                httpx2.AsyncClient() as http):
        metrics = await http.get(f"http://{address}/metrics",
                                 headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert metrics.headers["content-type"].startswith("application/openmetrics-text")
    assert metrics.text.endswith("# EOF\n")


async def test_metrics_are_rendered_off_the_event_loop_and_the_picture_taken_on_it(backend):
    rendering, taking = [], []
    take = backend.snapshot

    def snapshot():
        taking.append(threading.get_ident())
        return take()

    def render(collector, accept):
        collector.collect()
        rendering.append(threading.get_ident())
        return "text/plain", b""

    backend.snapshot = snapshot
    async with (served(metrics_app(backend, render), tcp="127.0.0.1:0") as address,
                httpx2.AsyncClient() as http):
        assert (await http.get(f"http://{address}/metrics")).status_code == 200
    assert taking == [threading.get_ident()]
    assert rendering != taking


async def test_a_service_that_cannot_be_pictured_still_answers_a_scrape(backend):
    def snapshot():
        raise RuntimeError("a defect, on purpose")
    backend.snapshot = snapshot
    async with (served(metrics_app(backend), tcp="127.0.0.1:0") as address,
                httpx2.AsyncClient() as http):
        metrics = await http.get(f"http://{address}/metrics")
    assert metrics.status_code == 200
    [line] = [line for line in metrics.text.splitlines()
              if line.startswith("mixvisor_collector_success")]
    assert line.endswith(" 0.0")


@pytest.mark.parametrize(("address", "says"), [
    ("nonsense", "an address is HOST:PORT"),
    ("127.0.0.1:99999", "an address is HOST:PORT"),
    ("127.0.0.1:", "an address is HOST:PORT"),
    ("192.0.2.1:0", "this host does not have this address"),
])
async def test_a_wrong_address_is_one_clear_error(backend, address, says):
    with pytest.raises(CannotListen, match=says):
        await serve(metrics_app(backend), tcp=address)


async def test_a_port_in_use_is_named_with_what_to_do(backend):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(CannotListen, match=f"{address}: another program uses this") as caught:
            await serve(metrics_app(backend), tcp=address)
    assert "--listen" in str(caught.value)


async def test_nothing_is_printed_and_no_signal_handler_is_set(path, backend, capfd):
    import signal
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    async with served(control_app(backend), unix_socket=path):
        assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
        await ask(path, "GET", "/v1/vms")
    assert capfd.readouterr() == ("", "")


# Measurements.

async def test_a_result_of_a_measurement_travels_and_what_is_none_is_refused_with_the_field(path, backend):
    async with served(control_app(backend), unix_socket=path):
        assert await call(path, lambda c: c.mixing()) is None
        await call(path, lambda c: c.keep_mixing(RESULT.to_json()))
        assert backend.measured == RESULT
        assert MixingResult.from_json(await call(path, lambda c: c.mixing())) == RESULT
        with pytest.raises(Unusable, match="verdict"):
            await call(path, lambda c: c.keep_mixing({**RESULT.to_json(), "verdict": "maybe"}))
        with pytest.raises(Unusable, match="format"):
            await call(path, lambda c: c.keep_mixing({}))
        with pytest.raises(Denied, match="a, b may not"):
            await call(path, lambda c: c.lend(["a", "b"]))
        for work in (lambda c: c.exchange("x/y", [(0, 1)]), lambda c: c.give_back("x")):
            with pytest.raises(NotFound):
                await call(path, work)
