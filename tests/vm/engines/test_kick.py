"""The native signal handler: it sets bytes, and leaves Python's own signals alone."""

from __future__ import annotations

import ctypes
import os
import pathlib
import signal

import pytest

from mixvisor.vm.engines import kick
from mixvisor.vm.engines.base import EngineError


@pytest.fixture
def installed():
    kick.install()
    yield
    for number in kick.SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def test_a_signal_sets_every_registered_byte_and_no_other(installed):
    cells = (ctypes.c_ubyte * 4)()
    base = ctypes.addressof(cells)
    kick.register(base)
    kick.register(base + 2)
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert list(cells) == [1, 0, 1, 0]
    finally:
        kick.unregister(base)
        kick.unregister(base + 2)


def test_an_unregistered_byte_is_left_alone(installed):
    cell = ctypes.c_ubyte(0)
    kick.register(ctypes.addressof(cell))
    kick.unregister(ctypes.addressof(cell))
    os.kill(os.getpid(), signal.SIGALRM)
    assert cell.value == 0


def test_a_byte_that_is_taken_is_clear_until_the_next_kick(installed):
    byte = kick.Byte()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert byte.take()
    assert not byte.take()
    byte.set()
    assert byte.take()
    byte.close()


def test_pythons_handlers_of_other_signals_still_run(installed):
    seen = []
    previous = signal.signal(signal.SIGUSR2, lambda number, frame: seen.append(number))
    try:
        os.kill(os.getpid(), signal.SIGUSR2)
        assert seen == [signal.SIGUSR2]
    finally:
        signal.signal(signal.SIGUSR2, previous)


def test_a_full_table_is_an_error_and_not_a_lost_kick():
    cells = (ctypes.c_ubyte * (kick.SLOTS + 1))()
    base = ctypes.addressof(cells)
    taken = []
    try:
        for index in range(kick.SLOTS - kick.used()):
            kick.register(base + index)
            taken.append(base + index)
        with pytest.raises(EngineError, match="kick bytes"):
            kick.register(base + kick.SLOTS)
    finally:
        for address in taken:
            kick.unregister(address)


def test_the_handler_survives_a_fork(installed):
    byte = kick.Byte()
    child = os.fork()
    if child == 0:
        signal.alarm(5)
        os.kill(os.getpid(), signal.SIGUSR1)
        os._exit(0 if byte.take() else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert not byte.take()
    byte.close()


def test_machine_code_is_never_writable_and_executable_at_once():
    page, address = kick.executable(b"\xC3")
    maps = pathlib.Path("/proc/self/maps").read_text().splitlines()
    rights = next(line.split()[1] for line in maps
                  if int(line.split("-")[0], 16) <= address
                  < int(line.split("-")[1].split()[0], 16))
    assert rights.startswith("r-x")
    page.close()
