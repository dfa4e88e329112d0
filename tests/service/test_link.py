"""The control socket of a worker: answers find their askers, nonsense is not believed."""

import json
import socket

import pytest
import trio

from mixvisor.service.backend import Conflict, ServiceError, TimedOut
from mixvisor.service.link import Nonsense, WorkerLink, harmless_screen, parse_ending


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    yield trio.socket.from_stdlib_socket(ours), trio.socket.from_stdlib_socket(theirs)
    ours.close()
    theirs.close()


async def test_answers_out_of_order_reach_the_right_asker(pair, nursery):
    ours, theirs = pair
    kicks = []
    link = WorkerLink(ours, lambda: kicks.append(1))
    nursery.start_soon(link.events, lambda event: None)
    answers = {}

    async def ask(op):
        answers[op] = await link.ask(op)

    async with trio.open_nursery() as asking:
        asking.start_soon(ask, "screen")
        asking.start_soon(ask, "calls")
        requests = [json.loads(await theirs.recv(9999)) for _ in range(2)]
        for request in reversed(requests):
            await theirs.send(json.dumps({"id": request["id"], "ok": True, "was": request["op"]}).encode())
    assert answers == {"screen": {"was": "screen"}, "calls": {"was": "calls"}}
    assert len(kicks) == 2
    theirs.close()


async def test_a_refusal_a_silence_and_an_end_are_three_errors(pair, nursery, autojump_clock):
    ours, theirs = pair
    link = WorkerLink(ours, lambda: None)
    nursery.start_soon(link.events, lambda event: None)
    with pytest.raises(TimedOut, match="did not answer 'screen'"):
        await link.ask("screen", seconds=1)
    number = json.loads(await theirs.recv(999))["id"]

    async def refuse():
        request = json.loads(await theirs.recv(999))
        # The late answer to the first question is nobody's and harms nobody.
        await theirs.send(json.dumps({"id": number, "ok": True}).encode())
        await theirs.send(json.dumps({"id": request["id"], "ok": False, "error": "no screen"}).encode())

    nursery.start_soon(refuse)
    with pytest.raises(ServiceError, match="no screen"):
        await link.ask("screen")
    theirs.close()
    await trio.testing.wait_all_tasks_blocked()
    with pytest.raises(Conflict, match="has ended"):
        await link.ask("screen")


async def test_the_last_word_of_a_worker_is_heard_when_a_request_crossed_it(pair):
    ours, theirs = pair
    link = WorkerLink(ours, lambda: None)
    await link.tell("stop")
    await theirs.send(b'{"event": "ended"}')
    theirs.close()                                     # with the request unread: the kernel resets
    events = []
    await link.events(events.append)
    assert events == [{"event": "ended"}]


@pytest.mark.parametrize("packet", [b"\xff", b"[1]", b"[" * 60_000, b'{"id": "x"}', b"{}"])
async def test_nonsense_from_a_worker_ends_the_reading(pair, packet):
    ours, theirs = pair
    link = WorkerLink(ours, lambda: None)
    await theirs.send(packet)
    with pytest.raises(Nonsense):
        await link.events(lambda event: None)
    theirs.close()


def test_a_screen_is_cleaned_for_terminals_and_checked():
    screen = {"rows": ["  C:\\>\x1b[2J", "é║\u202e "], "version": 3}
    assert harmless_screen(screen) == {"rows": ["  C:\\> [2J", "é║  "], "version": 3}
    for bad in ({}, {"rows": "text"}, {"rows": [7]}, {"rows": ["x" * 999]}, {"rows": ["x"] * 999}):
        with pytest.raises(ServiceError, match="no text screen"):
            harmless_screen(bad)


def test_an_ending_is_cleaned_for_terminals_and_checked():
    ending = parse_ending({"fate": "crashed", "reason": "a\x1b[2Jb\nc", "code": "x", "exit_code": 3})
    assert ending.reason == "a [2Jb c"
    for bad in ({"fate": "eaten"}, {"fate": "stopped", "exit_code": "0"},
                {"fate": "stopped", "exit_code": -1}, {"fate": "crashed", "registers": {"rax": "x"}}):
        with pytest.raises(Nonsense):
            parse_ending(bad)
