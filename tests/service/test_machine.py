"""One VM against every bad moment: fake processes, real sockets, and a clock that jumps."""

from __future__ import annotations

import contextlib
import os
import signal

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from mixvisor.service.backend import Conflict, ServiceError, TimedOut
from mixvisor.service.incarnation import START_SECONDS
from mixvisor.service.machine import BURY_SECONDS, STOP_SECONDS

from .fakes import SCREEN, FakeWorker, Lab, good, silent, started_then_silent

settled = trio.testing.wait_all_tasks_blocked


@pytest.fixture
async def nursery(autojump_clock):
    """Everything in it is over, and every descriptor closed, when a test ends."""
    before = sorted(os.listdir("/proc/self/fd"))
    async with trio.open_nursery() as nursery:
        yield nursery
        nursery.cancel_scope.cancel()
    assert sorted(os.listdir("/proc/self/fd")) == before


async def refused(kind, command):
    with pytest.raises(kind) as caught:
        await command()
    return str(caught.value)


# -- the end is wanted at a bad moment ------------------------------------------------------


@pytest.mark.parametrize("how", ["stop", "kill"])
async def test_an_end_wanted_while_the_worker_is_being_made_is_an_end(autojump_clock, nursery, how):
    lab = Lab(nursery)
    lab.zygote.seconds = 0.5
    async with trio.open_nursery() as commands:
        commands.start_soon(refused, Conflict, lab.machine.start)
        await settled()
        assert lab.state == "starting"
        await getattr(lab.machine, how)()
    assert lab.state == "stopped"
    assert lab.journal[-1] == "closed"
    assert "admitted" not in lab.journal


@pytest.mark.parametrize("how", ["stop", "kill"])
async def test_an_end_wanted_before_the_guest_runs_is_an_end(autojump_clock, nursery, how):
    lab = Lab(nursery)
    lab.zygote.script = silent
    async with trio.open_nursery() as commands:
        commands.start_soon(refused, Conflict, lab.machine.start)
        await settled()
        began = trio.current_time()
        await getattr(lab.machine, how)()
    assert trio.current_time() - began <= (STOP_SECONDS if how == "stop" else 0)
    assert lab.state == "stopped"
    assert lab.worker.status == signal.SIGKILL


async def test_a_silent_worker_is_killed_by_stop_after_its_thread_was_given_back(autojump_clock, nursery):
    lab = Lab(nursery)
    lab.zygote.script = started_then_silent
    await lab.machine.start()
    await lab.machine.stop()
    assert lab.state == "stopped"
    assert "did not stop within 3 s" in lab.reason
    assert lab.journal == ["spawned", "admitted", "released", "SIGKILL", "closed"]


async def test_kill_overtakes_a_stop_that_takes_long(autojump_clock, nursery):
    lab = Lab(nursery)
    lab.zygote.script = started_then_silent
    await lab.machine.start()
    async with trio.open_nursery() as commands:
        commands.start_soon(lab.machine.stop)
        await trio.sleep(0.2)
        began = trio.current_time()
        await lab.machine.kill()
        assert trio.current_time() == began
    assert (lab.state, lab.reason) == ("stopped", "killed")


async def test_a_stop_that_nobody_waits_for_goes_on(autojump_clock, nursery):
    lab = Lab(nursery)
    lab.zygote.script = started_then_silent
    await lab.machine.start()
    with trio.move_on_after(0.1):
        await lab.machine.stop()
    assert lab.state == "stopping"
    await trio.sleep(STOP_SECONDS)
    assert lab.state == "stopped"


async def test_who_waits_for_a_stop_is_not_held_by_a_start_that_follows_at_once(autojump_clock, nursery):
    lab = Lab(nursery)
    await lab.machine.start()

    async def start_again():
        while lab.state != "stopped":
            await trio.lowlevel.checkpoint()
        await lab.machine.start()

    async with trio.open_nursery() as commands:
        commands.start_soon(start_again)
        with trio.fail_after(10):
            await lab.machine.stop()
    assert lab.state == "running"


# -- workers that do not keep to the protocol -------------------------------------------------


async def test_a_worker_that_never_says_started_fails_its_vm(autojump_clock, nursery):
    lab = Lab(nursery)
    lab.zygote.script = silent
    text = await refused(ServiceError, lab.machine.start)
    assert f"did not start its guest within {START_SECONDS} s" in text
    assert lab.state == "failed"
    assert lab.worker.status == signal.SIGKILL


async def test_a_worker_that_hangs_up_and_lives_on_is_killed_and_the_vm_crashed(autojump_clock, nursery):
    async def hang_up(worker: FakeWorker) -> None:
        await worker.say(event="started")
        await trio.sleep(1)
        worker.hang_up()

    lab = Lab(nursery)
    lab.zygote.script = hang_up
    await lab.machine.start()
    await trio.sleep(5)
    assert lab.state == "crashed"
    assert "closed its control socket without a report" in lab.reason
    assert lab.journal == ["spawned", "admitted", "released", "SIGKILL", "closed"]


async def test_a_worker_that_lingers_after_its_last_word_is_killed(autojump_clock, nursery):
    async def linger(worker: FakeWorker) -> None:
        await worker.say(event="started")
        await trio.sleep(1)
        await worker.end()

    lab = Lab(nursery)
    lab.zygote.script = linger
    await lab.machine.start()
    await trio.sleep(3)
    assert (lab.state, lab.reason) == ("stopped", "the guest is done")
    assert lab.worker.status == signal.SIGKILL
    assert await lab.machine.ask("screen") == SCREEN


@pytest.mark.parametrize("packet", [
    {"id": 7, "ok": True}, {"event": "started"}, {"event": ["ended"]}, {"event": "ended", "fate": {"a": 1}},
    {"event": "ended", "fate": "crashed", "registers": {"\x1b[2J": 1}}, {"event": "failed", "reason": [[[1]]]},
])
async def test_a_worker_that_floods_or_talks_nonsense_ends_at_its_first_such_word(
    autojump_clock, nursery, packet,
):
    async def flood(worker: FakeWorker) -> None:
        await worker.say(event="started")
        await trio.sleep(1)
        while worker.status is None:
            await worker.say(**packet)

    lab = Lab(nursery)
    lab.zygote.script = flood
    await lab.machine.start()
    await trio.sleep(3)
    assert lab.state == "crashed"
    assert lab.reason.isprintable()


async def test_a_worker_ended_by_a_nameless_signal_is_a_crash_that_names_its_number(autojump_clock, nursery):
    lab = Lab(nursery)
    await lab.machine.start()
    lab.worker.said = "first\n\x1b[31mlast words"
    lab.worker.die(40)
    await settled()
    assert lab.state == "crashed"
    assert "signal 40" in lab.reason
    assert lab.reason.endswith("its last words: [31mlast words")
    assert lab.reason.isprintable()


async def test_a_process_that_the_kernel_does_not_let_go_does_not_hold_its_vm(autojump_clock, nursery):
    lab = Lab(nursery)
    lab.zygote.script = started_then_silent
    await lab.machine.start()
    lab.worker.immortal = True
    lab.worker.hang_up()
    await trio.sleep(BURY_SECONDS + 2)
    assert lab.state == "crashed"
    assert "closed its control socket" in lab.reason
    lab.worker.die()


@pytest.mark.parametrize("answer", [
    {"data": "QQ==", "offset": float("inf")}, {"data": "QQ==", "offset": [1]}, {"data": 7, "offset": 0}, {},
    {"data": "\ud800", "offset": 0}, {"data": "", "offset": -5},
])
async def test_serial_output_that_is_none_hurts_nobody(autojump_clock, nursery, answer):
    class Log:
        failing = False

        def append(self, data: bytes) -> None:
            raise AssertionError("nothing was to be logged")

    async def lie(worker: FakeWorker) -> None:
        await worker.say(event="started")
        with contextlib.suppress(trio.EndOfChannel, OSError, trio.ClosedResourceError):
            while True:
                request = await worker.request()
                await worker.say(id=request["id"], ok=True, **answer)

    lab = Lab(nursery, log=Log())
    lab.zygote.script = lie
    await lab.machine.start()
    lab.machine._logged = -1                      # as if there were something new
    await trio.sleep(2)
    assert "serial" in lab.worker.heard
    assert lab.state == "running"
    await lab.machine.kill()


def test_the_memory_that_the_supervisor_maps_cannot_be_shrunk_under_it():
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            lab = Lab(nursery)
            await lab.machine.start()
            memory, status = lab.worker.fds[:2]
            for fd in (memory, status):
                with pytest.raises(PermissionError):
                    os.ftruncate(fd, 0)
            assert lab.machine.snapshot().progress == 0
            await lab.machine.kill()

    trio.run(main)


# -- pause and resume ------------------------------------------------------------------------


async def test_a_pause_that_was_not_answered_is_taken_back(autojump_clock, nursery):
    async def late(worker: FakeWorker) -> None:
        await worker.say(event="started")
        await trio.sleep(30)
        await worker.serve()

    lab = Lab(nursery)
    lab.zygote.script = late
    await lab.machine.start()
    await refused(TimedOut, lab.machine.pause)
    assert lab.state == "running"
    await trio.sleep(60)
    assert lab.worker.heard == ["pause", "resume"]
    assert not lab.worker.paused
    assert not lab.scheduler.paused
    await lab.machine.pause()
    assert (lab.state, lab.worker.paused, lab.scheduler.paused) == ("paused", True, {"one"})


async def test_a_resume_that_was_not_answered_is_taken_back(autojump_clock, nursery):
    async def deaf_for_a_while(worker: FakeWorker) -> None:
        await worker.say(event="started")
        request = await worker.request()
        await worker.say(id=request["id"], ok=True)
        await trio.sleep(30)
        await worker.serve()

    lab = Lab(nursery)
    lab.zygote.script = deaf_for_a_while
    await lab.machine.start()
    await lab.machine.pause()
    await refused(TimedOut, lab.machine.resume)
    await trio.sleep(60)
    assert lab.worker.heard == ["pause", "resume", "pause"]
    assert (lab.state, lab.worker.paused, lab.scheduler.paused) == ("paused", True, {"one"})


async def test_a_pause_that_nobody_waits_for_any_more_is_taken_back(autojump_clock, nursery):
    async def slow(worker: FakeWorker) -> None:
        await worker.say(event="started")
        await worker.serve(seconds=2)

    lab = Lab(nursery)
    lab.zygote.script = slow
    await lab.machine.start()
    with trio.move_on_after(1):
        await lab.machine.pause()
    await trio.sleep(10)
    assert (lab.state, lab.worker.paused, lab.scheduler.paused) == ("running", False, set())


async def test_of_two_pauses_at_once_one_is_refused(autojump_clock, nursery):
    lab = Lab(nursery)
    await lab.machine.start()
    outcomes = []

    async def pause():
        try:
            await lab.machine.pause()
            outcomes.append("paused")
        except Conflict:
            outcomes.append("refused")

    async with trio.open_nursery() as commands:
        commands.start_soon(pause)
        commands.start_soon(pause)
    assert sorted(outcomes) == ["paused", "refused"]
    assert lab.worker.heard == ["pause"]


async def test_a_guest_that_crashes_while_it_is_being_paused_is_crashed(autojump_clock, nursery):
    async def crash(worker: FakeWorker) -> None:
        await worker.say(event="started")
        await worker.request()
        worker.die(signal.SIGSEGV)

    lab = Lab(nursery)
    lab.zygote.script = crash
    await lab.machine.start()
    await refused(Conflict, lab.machine.pause)
    await settled()
    assert lab.state == "crashed"
    assert "SIGSEGV" in lab.reason


# -- restarts ----------------------------------------------------------------------------------


async def test_an_end_wanted_during_the_wait_for_a_restart_is_final(autojump_clock, nursery):
    lab = Lab(nursery, restart="always")
    await lab.machine.start()
    lab.worker.die(signal.SIGSEGV)
    await settled()
    assert "starts again in 1 s" in lab.reason
    await lab.machine.stop()
    assert lab.reason == "asked to stop before its restart"
    await refused(Conflict, lab.machine.stop)
    await trio.sleep(100)
    assert len(lab.zygote.workers) == 1


@pytest.mark.parametrize("command", ["start", "stop"])
async def test_a_command_in_the_very_moment_of_a_restart_harms_nothing(autojump_clock, nursery, command):
    for _attempt in range(20):                     # which of the two tasks is first is drawn by lot
        lab = Lab(nursery, restart="always")
        await lab.machine.start()
        lab.worker.die(signal.SIGSEGV)
        await settled()
        await trio.sleep(1)
        with contextlib.suppress(Conflict):
            await getattr(lab.machine, command)()
        await trio.sleep(10)
        assert len(lab.zygote.workers) <= 2
        assert lab.state == ("running" if command == "start" else lab.state)
        if lab.state == "running":
            await lab.machine.kill()


async def test_restarts_come_ever_later_and_a_refused_spawn_counts_as_one(autojump_clock, nursery):
    lab = Lab(nursery, restart="on-failure")
    lab.zygote.refusal = "could not spawn a process: BlockingIOError: [Errno 11] Resource temporarily unavailable"
    text = await refused(ServiceError, lab.machine.start)
    assert "Resource temporarily unavailable" in text
    await trio.sleep(20)
    assert lab.state == "failed"
    assert lab.machine.restarts == 4               # after 1, 2, 4 and 8 s
    lab.zygote.refusal = None
    await lab.machine.start()
    assert lab.state == "running"


# -- one VM never ends the service ---------------------------------------------------------------


async def test_a_defect_of_ours_ends_the_vm_that_met_it_and_is_told(autojump_clock, nursery):
    lab = Lab(nursery)
    lab.scheduler.trouble = KeyError("a defect")
    await lab.machine.start()
    assert lab.state == "crashed"
    assert "defect of Mixvisor" in lab.reason
    lab.scheduler.trouble = None
    await lab.machine.start()
    assert lab.state == "running"


async def test_a_worker_is_killed_also_where_the_scheduler_has_ended_before_it(autojump_clock, nursery):
    lab = Lab(nursery)
    lab.zygote.script = started_then_silent
    await lab.machine.start()
    lab.scheduler.gone = True
    with trio.fail_after(60):
        await lab.machine.kill()
    assert lab.worker.status == signal.SIGKILL
    assert not lab.machine.unfinished


async def test_an_admission_that_is_refused_fails_the_vm_with_the_reason(autojump_clock, nursery):
    lab = Lab(nursery)
    lab.scheduler.trouble = ValueError("all places are taken")
    assert "all places are taken" in await refused(ServiceError, lab.machine.start)
    assert lab.state == "failed"


async def test_a_service_that_is_cancelled_leaves_its_vms_ended(autojump_clock, nursery):
    labs = []
    async with trio.open_nursery() as service:
        for script in (good, started_then_silent):
            lab = Lab(service)
            lab.zygote.script = script
            await lab.machine.start()
            labs.append(lab)
        late = Lab(service)
        late.zygote.seconds = 1
        service.start_soon(late.machine.start)
        await settled()
        service.cancel_scope.cancel()
    for lab in (*labs, late):
        assert lab.state == "stopped"
        assert not lab.machine.unfinished
        await refused(Conflict, lab.machine.stop)
        # The workers' own ends, which a kernel would have closed.
        for worker in lab.zygote.workers:
            worker.die()


MOMENTS = st.sampled_from([0.0, 0.0, 0.1, 0.5, 1.0, 3.0, 6.0])
EVENTS = st.sampled_from(["start", "start", "stop", "kill", "pause", "resume", "screen", "dies", "gives-up"])
SCRIPTS = st.lists(st.sampled_from(["good", "slow", "deaf", "mute", "done", "hangs-up"]), min_size=1, max_size=4)


async def _slow(worker: FakeWorker) -> None:
    await trio.sleep(0.5)
    await worker.say(event="started")
    await worker.serve(seconds=0.4)


async def _done(worker: FakeWorker) -> None:
    await worker.say(event="started")
    await worker.end()
    worker.die()


async def _hangs_up(worker: FakeWorker) -> None:
    await worker.say(event="started")
    await trio.sleep(0.5)
    worker.hang_up()


@given(st.lists(st.tuples(MOMENTS, EVENTS), max_size=12), SCRIPTS, st.sampled_from(["no", "on-failure", "always"]),
       st.sampled_from([0.0, 0.3]))
@settings(max_examples=150, deadline=None)
def test_whatever_is_asked_whenever_every_command_ends_and_nothing_is_left(events, scripts, restart, spawning):
    kinds = {"good": good, "slow": _slow, "deaf": started_then_silent, "mute": silent, "done": _done,
             "hangs-up": _hangs_up}
    lives = iter(scripts * 1000)

    async def script(worker: FakeWorker) -> None:
        await kinds[next(lives)](worker)

    async def obey(lab: Lab, event: str) -> None:
        with contextlib.suppress(ServiceError), trio.fail_after(60):
            if event == "screen":
                await lab.machine.ask("screen")
            else:
                await getattr(lab.machine, event)()

    async def main() -> None:
        async with trio.open_nursery() as processes, trio.open_nursery() as service:
            lab = Lab(service, restart=restart)
            lab.zygote._nursery, lab.zygote.script, lab.zygote.seconds = processes, script, spawning
            async with trio.open_nursery() as commands:
                for wait, event in events:
                    await trio.sleep(wait)
                    if event == "dies":
                        if lab.zygote.workers:
                            lab.worker.die(signal.SIGKILL)
                    elif event == "gives-up":
                        commands.cancel_scope.cancel()
                        break
                    else:
                        commands.start_soon(obey, lab, event)
            assert (lab.machine.phase.value == "running") <= lab.machine.unfinished
            if lab.machine.unfinished:
                await obey(lab, "kill")
                await settled()                    # where it was ending already, kill was refused
            assert not lab.machine.unfinished
            assert lab.state in ("defined", "stopped", "crashed", "failed")
            assert not lab.scheduler.admitted
            for number, word in enumerate(lab.journal):
                if word == "SIGKILL":              # no thread is killed before it is given back
                    admissions = lab.journal[:number].count("admitted")
                    assert lab.journal[:number].count("released") == admissions
            assert lab.journal.count("closed") == lab.journal.count("spawned")

    before = sorted(os.listdir("/proc/self/fd"))
    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert sorted(os.listdir("/proc/self/fd")) == before
