"""The keyboard and its controller."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixvisor.vm.worker.devices.keyboard import ALT, BYTE_NS, CTRL, QUEUE_KEYS, SHIFT, Keyboard, strokes

from .ports import Ports


@pytest.fixture
def line():
    """Every level of the keyboard's line so far."""
    return []


@pytest.fixture
def serving():
    """Whether the keyboard's interrupt is in service; a test changes it."""
    return [False]


@pytest.fixture
def keyboard(clock, line, serving, ended):
    return Keyboard(clock, line.append, lambda: serving[0], lambda: None, lambda *what: ended.append(what))


def test_the_queue_is_bounded(keyboard):
    assert [keyboard.press(0x1E, ord("a")) for _ in range(QUEUE_KEYS + 1)].count(False) == 1


def read_codes(keyboard, clock):
    ports = Ports(keyboard)
    codes = []
    while ports.read(0x64) & 1:
        codes.append(ports.read(0x60))
        clock.advance(BYTE_NS / 1e9)
    return codes


def test_a_polling_guest_sees_make_and_break_codes_with_their_modifier(keyboard, clock):
    assert read_codes(keyboard, clock) == []
    keyboard.press(0x1E, ord("a"))
    keyboard.press(0x1E, ord("A"))
    assert read_codes(keyboard, clock) == [0x1E, 0x9E, 0x2A, 0x1E, 0x9E, 0xAA]


def test_a_second_read_gets_the_same_byte_until_the_next_has_come(keyboard, clock):
    ports = Ports(keyboard)
    keyboard.press(0x1E, ord("a"))
    assert [ports.read(0x60), ports.read(0x60)] == [0x1E, 0x1E]
    assert keyboard.key == (0x1E, ord("a"))
    assert not ports.read(0x64) & 1
    assert keyboard.next_ns() == clock.now_ns + BYTE_NS
    clock.advance(BYTE_NS / 1e9)
    keyboard.poll(clock.now_ns)
    assert ports.read(0x60) == 0x9E
    assert keyboard.key is None


def test_a_guest_that_is_slow_in_its_handler_finds_the_byte_and_its_key(keyboard, clock, serving):
    ports = Ports(keyboard)
    keyboard.press(0x1E, ord("a"))
    serving[0] = True
    assert ports.read(0x60) == 0x1E
    clock.advance(10)                        # the VM had no CPU
    keyboard.poll(clock.now_ns)
    assert keyboard.key == (0x1E, ord("a"))
    assert ports.read(0x60) == 0x1E          # the BIOS reads it again
    assert keyboard.next_ns() is None
    serving[0] = False
    keyboard.poll(clock.now_ns)
    assert keyboard.key == (0x1E, ord("a"))  # of the byte that was read, not of the one that is shown
    assert ports.read(0x60) == 0x9E


def test_the_line_is_up_while_a_byte_waits_and_down_when_interrupts_are_off(keyboard, line):
    ports = Ports(keyboard)
    keyboard.press(0x1E, ord("a"))
    ports.read(0x60)
    assert line == [True, False]
    ports.write(0x64, 0x60)
    ports.write(0x60, 0x44)                  # command byte without the interrupt
    del line[:]
    keyboard.press(0x1E, ord("a"))
    assert True not in line


def test_a_disabled_keyboard_keeps_its_bytes(keyboard):
    ports = Ports(keyboard)
    ports.write(0x64, 0xAD)
    keyboard.press(0x1E, ord("a"))
    assert not ports.read(0x64) & 1
    assert keyboard.next_ns() is None
    ports.write(0x64, 0xAE)
    assert ports.read(0x60) == 0x1E


@pytest.mark.parametrize(("key", "modifier", "make"), [
    ((0x1E, 0x61), 0, 0x1E), ((0x1E, 0x41), SHIFT, 0x1E), ((0x1E, 0x01), CTRL, 0x1E), ((0x1E, 0), ALT, 0x1E),
    ((0x1C, 0x0D), 0, 0x1C), ((0x0F, 0), SHIFT, 0x0F), ((0x3B, 0), 0, 0x3B), ((0x55, 0), SHIFT, 0x3C),
    ((0x5E, 0), CTRL, 0x3B), ((0x71, 0), ALT, 0x44), ((0x86, 0), 0, 0x58), ((0x48, 0), 0, 0x48),
    ((0x8D, 0), CTRL, 0x48), ((0x98, 0), ALT, 0x48), ((0x78, 0), ALT, 0x02), ((0, 0x84), ALT, 0),
])
def test_a_key_of_the_bios_is_typed_as_a_keyboard_would(key, modifier, make):
    assert strokes(*key) == (modifier, make)


@given(st.integers(0, 255), st.integers(0, 255))
def test_every_key_has_strokes_that_are_make_codes(scan, ascii_code):
    modifier, make = strokes(scan, ascii_code)
    assert modifier in (0, SHIFT, CTRL, ALT)
    assert 0 <= make < 0x80


def test_the_controller_answers_its_self_tests_without_an_interrupt_and_the_keyboard_with_one(keyboard, line):
    ports = Ports(keyboard)
    ports.write(0x64, 0xAA)
    assert ports.read(0x60) == 0x55
    assert True not in line
    ports.write(0x60, 0xFF)
    assert (ports.read(0x60), ports.read(0x60)) == (0xFA, 0xAA)
    assert line.count(True) == 2


@pytest.mark.parametrize(("sent", "answers"), [
    ((0xF2,), (0xFA, 0xAB, 0x41)), ((0xEE,), (0xEE,)), ((0xED, 0x02), (0xFA, 0xFA)), ((0xF3, 0x00), (0xFA, 0xFA)),
    ((0xF0, 0x00), (0xFA, 0xFA, 0x41)), ((0xF0, 0x01, 0xF0, 0x00), (0xFA, 0xFA, 0xFA, 0xFA, 0x43)),
    ((0xF0, 0x03), (0xFA, 0xFE)), ((0x20,), (0xFE,)), ((0xED, 0xF4), (0xFA, 0xFA)), ((0xFF,), (0xFA, 0xAA)),
    ((0xF4, 0xFE), (0xFA, 0xFA)),
])
def test_the_keyboard_answers_its_commands(keyboard, sent, answers):
    ports = Ports(keyboard)
    heard = []
    for value in sent:
        ports.write(0x60, value)
        while ports.read(0x64) & 1:
            heard.append(ports.read(0x60))
    assert tuple(heard) == answers


def test_without_translation_keys_come_in_set_2_or_in_the_set_that_was_asked_for(keyboard, clock):
    ports = Ports(keyboard)
    ports.write(0x64, 0x60)
    ports.write(0x60, 0x05)
    keyboard.press(0x1E, ord("A"))
    assert read_codes(keyboard, clock) == [0x12, 0x1C, 0xF0, 0x1C, 0xF0, 0x12]
    for value in (0xF0, 0x01):
        ports.write(0x60, value)
        assert ports.read(0x60) == 0xFA
    clock.advance(BYTE_NS / 1e9)
    keyboard.press(0x1E, ord("a"))
    assert read_codes(keyboard, clock) == [0x1E, 0x9E]


def test_a_keyboard_that_is_switched_off_says_nothing_until_it_is_on_again(keyboard, clock):
    ports = Ports(keyboard)
    ports.write(0x60, 0xF5)
    assert ports.read(0x60) == 0xFA
    assert keyboard.press(0x1E, ord("a"))
    assert read_codes(keyboard, clock) == []
    ports.write(0x60, 0xF4)
    assert ports.read(0x60) == 0xFA
    clock.advance(BYTE_NS / 1e9)
    keyboard.press(0x1E, ord("a"))
    assert read_codes(keyboard, clock) == [0x1E, 0x9E]


def test_there_is_no_second_port(keyboard):
    ports = Ports(keyboard)
    for command in (0xA8, 0xA9):
        ports.write(0x64, command)
        assert not ports.read(0x64) & 1
    ports.write(0x64, 0x20)
    assert ports.read(0x60) & 0x20


def test_the_reset_line_ends_the_machine_and_the_a20_line_does_not(keyboard, ended):
    ports = Ports(keyboard)
    ports.write(0x64, 0xD1)
    ports.write(0x60, 0xDF)
    assert ended == []
    ports.write(0x64, 0xFE)
    assert [what[0] for what in ended] == ["reset"]
