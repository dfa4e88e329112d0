"""Instructions as a stand-in for a progress counter: counted where the host can, and else said why not."""

from __future__ import annotations

import errno
import os
import time

import pytest

from mixvisor.sched.linux import EventCounter
from mixvisor.vm.hosts import instructions
from mixvisor.vm.hosts.instructions import open_instructions, why_not_counted

SOFTWARE, TASK_CLOCK = 1, 1            # an event that every Linux host has: ns that the thread ran


def counter():
    try:
        return EventCounter(open_instructions(0, "software", kind=SOFTWARE, event=TASK_CLOCK))
    except OSError as error:
        pytest.skip(f"perf_event_open: {error.strerror}")


def test_an_event_of_a_thread_is_read_as_a_word_that_only_grows():
    count = counter()
    try:
        before, began = count[0], time.thread_time_ns()
        while time.thread_time_ns() - began < 2_000_000:
            pass
        assert count[0] - before >= 1_000_000
    finally:
        count.release()


def test_what_cannot_be_read_is_zero():
    ours, theirs = os.pipe()
    os.close(theirs)
    count = EventCounter(ours)
    assert count[0] == 0
    count.release()


@pytest.mark.parametrize(("code", "says"), [
    (errno.ENOENT, "no performance counters"), (errno.EACCES, "CAP_PERFMON"), (errno.EPERM, "CAP_PERFMON"),
    (errno.ENOSYS, "cannot be counted"),
])
def test_why_it_cannot_be_had_is_said(monkeypatch, code, says):
    def refuse(tid, mode):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(instructions, "open_instructions", refuse)
    assert says in why_not_counted()


def test_a_thread_that_is_none_is_refused():
    with pytest.raises(OSError, match=r"."):
        open_instructions(1 << 30, "hardware", kind=SOFTWARE, event=TASK_CLOCK)
