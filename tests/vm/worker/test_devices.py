from __future__ import annotations

import errno
import fcntl
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixvisor.vm.disks.geometry import geometry_of
from mixvisor.vm.worker.clock import PIT_HZ
from mixvisor.vm.worker.devices.board import Board
from mixvisor.vm.worker.devices.cmos import Cmos, bcd
from mixvisor.vm.worker.devices.disk import DAMAGED, Disk, Fault
from mixvisor.vm.worker.devices.fwcfg import FirmwareConfig
from mixvisor.vm.worker.devices.keyboard import ALT, BYTE_NS, CTRL, QUEUE_KEYS, SHIFT, Keyboard, strokes
from mixvisor.vm.worker.devices.pic import Interrupts
from mixvisor.vm.worker.devices.timer import CATCH_UP, OWED_S, Timer
from mixvisor.vm.worker.devices.vga import Vga


class Ports:
    def __init__(self, device):
        self.table = {port: (read, write) for port, read, write in device.ports()}

    def read(self, port):
        value = self.table[port][0]()
        assert 0 <= value <= 0xFF
        return value

    def write(self, port, *values):
        for value in values:
            self.table[port][1](value)


def timer(clock, interrupts=None, lost=None):
    return Timer(clock, interrupts or Interrupts(lambda _asking: None, firmware=True),
                 changed=lambda: None, lost=lost or (lambda _n: None))


@pytest.fixture
def ended():
    return []


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


# Timer.

def test_the_counter_moves_with_the_clock_and_not_without(clock):
    ports = Ports(timer(clock))
    ports.write(0x43, 0x34)                 # channel 0, low then high, mode 2
    ports.write(0x40, 0x00, 0x00)
    first = ports.read(0x40) | ports.read(0x40) << 8
    assert first == 0                       # 65536
    assert ports.read(0x40) | ports.read(0x40) << 8 == first
    clock.advance(0.01)
    moved = ports.read(0x40) | ports.read(0x40) << 8
    assert 0x10000 - moved == PIT_HZ // 100


def test_single_byte_reads_of_the_running_counter_vary(clock):
    ports = Ports(timer(clock))
    seen = set()
    for _ in range(50):
        clock.advance(0.000_777)
        seen.add(ports.read(0x40))
    assert len(seen) > 10


def test_a_latched_count_stays_until_both_bytes_are_read(clock):
    ports = Ports(timer(clock))
    ports.write(0x43, 0x34)
    ports.write(0x40, 0x00, 0x80)
    clock.advance(0.001)
    ports.write(0x43, 0x00)
    clock.advance(0.001)
    latched = ports.read(0x40) | ports.read(0x40) << 8
    assert 0x8000 - latched == PIT_HZ // 1000
    assert 0x8000 - (ports.read(0x40) | ports.read(0x40) << 8) == PIT_HZ // 500


def test_a_one_shot_on_channel_2_is_over_after_its_count(clock):
    ports = Ports(timer(clock))
    ports.write(0x61, 0x01)
    ports.write(0x43, 0xB0)                 # channel 2, mode 0
    ports.write(0x42, 0xFF, 0xFF)
    assert not ports.read(0x61) & 0x20
    clock.advance(65535 / PIT_HZ + 1e-6)
    assert ports.read(0x61) & 0x20


def read_back(ports, channel):
    ports.write(0x43, 0xC0 | 2 << channel)   # count and status
    status = ports.read(0x40 + channel)
    return status, ports.read(0x40 + channel) | ports.read(0x40 + channel) << 8


def test_read_back_tells_output_null_count_access_and_mode_and_the_count(clock):
    ports = Ports(timer(clock))
    ports.write(0x43, 0x30)                  # mode 0
    assert read_back(ports, 0)[0] == 0x70    # output low, no count yet
    ports.write(0x40, 0x00, 0x10)
    assert read_back(ports, 0) == (0x30, 0x1000)
    clock.advance(0x800 / PIT_HZ + 1e-9)
    assert read_back(ports, 0) == (0x30, 0x800)
    clock.advance(0x800 / PIT_HZ + 1e-9)
    assert read_back(ports, 0)[0] == 0xB0


@pytest.mark.parametrize("mode", [2, 3])
def test_periodic_modes_start_high(clock, mode):
    ports = Ports(timer(clock))
    ports.write(0x43, 0x30 | mode << 1)
    ports.write(0x40, 0x00, 0x10)
    assert read_back(ports, 0) == (0xB0 | mode << 1, 0x1000)


def test_a_closed_gate_stops_the_count_and_an_open_one_goes_on_or_starts_anew(clock):
    ports = Ports(timer(clock))
    ports.write(0x43, 0xB0)                  # channel 2, mode 0, the gate closed
    ports.write(0x42, 0x00, 0x10)
    clock.advance(0.1)
    assert read_back(ports, 2)[1] == 0x1000
    ports.write(0x61, 0x01)
    clock.advance(0x400 / PIT_HZ + 1e-9)
    ports.write(0x61, 0x00)
    clock.advance(0.1)
    assert read_back(ports, 2)[1] == 0xC00
    ports.write(0x61, 0x01)
    clock.advance(0xC00 / PIT_HZ + 1e-9)
    assert ports.read(0x61) & 0x20
    ports.write(0x61, 0x00)
    ports.write(0x43, 0xB2)                  # mode 1: a rising gate starts it
    ports.write(0x42, 0x00, 0x10)
    clock.advance(1)
    assert ports.read(0x61) & 0x20
    ports.write(0x61, 0x01)
    assert not ports.read(0x61) & 0x20
    clock.advance(0x1000 / PIT_HZ + 1e-9)
    assert ports.read(0x61) & 0x20


def test_a_counter_counts_in_decimal(clock):
    ports = Ports(timer(clock))
    ports.write(0x43, 0x35)
    ports.write(0x40, 0x00, 0x01)            # 100
    assert read_back(ports, 0) == (0xB5, 0x100)
    clock.advance(1 / PIT_HZ + 1e-9)
    assert read_back(ports, 0)[1] == 0x99
    clock.advance(99 / PIT_HZ + 1e-9)
    assert read_back(ports, 0)[1] == 0x100


@given(st.lists(st.tuples(st.sampled_from([0x40, 0x41, 0x42, 0x43, 0x61]), st.booleans(),
                          st.integers(0, 255), st.integers(0, 10**9)), max_size=60))
def test_no_sequence_of_timer_accesses_gives_more_than_a_byte(accesses):
    class Moving:
        now = 0

        def monotonic_ns(self):
            return self.now

        wall_ns = monotonic_ns

    clock = Moving()
    ports = Ports(timer(clock))
    for port, write, value, gap in accesses:
        clock.now += gap
        if write:
            ports.write(port, value)
        else:
            ports.read(port)


# Board.

def test_the_exit_port_ends_with_its_byte(ended):
    printed = []
    ports = Ports(Board(printed.append, lambda *what: ended.append(what)))
    ports.write(0xE9, 0x41)
    ports.write(0xF4, 42)
    assert printed == [0x41]
    assert [(code, number) for code, _reason, number in ended] == [("exit-port", 42)]


def test_port_92_resets_with_bit_0_and_keeps_the_a20_bit(ended):
    ports = Ports(Board(lambda _byte: None, lambda *what: ended.append(what)))
    ports.write(0x92, 2)
    assert ports.read(0x92) == 2
    assert ended == []
    ports.write(0x92, 1)
    assert ended[0][0] == "reset"


def test_the_echo_ports_give_back_what_was_written():
    ports = Ports(Board(lambda _byte: None, lambda *_what: None))
    for offset, value in enumerate((1, 2, 3, 4)):
        ports.write(0xE0 + offset, value)
    assert [ports.read(0xE0 + offset) for offset in range(4)] == [1, 2, 3, 4]


def test_the_pci_address_register_is_there_and_no_device_is():
    device = Board(lambda _byte: None, lambda *_what: None)
    ports = Ports(device)
    for offset, value in enumerate((0x00, 0x08, 0x00, 0x80)):
        ports.write(0xCF8 + offset, value)
    assert [ports.read(0xCF8 + offset) for offset in range(4)] == [0x00, 0x08, 0x00, 0x80]
    assert not set(range(0xCFC, 0xD00)) & set(ports.table)        # unclaimed: ones


def test_the_cmos_tells_date_and_memory(clock):
    ports = Ports(cmos(clock))

    def register(index):
        ports.write(0x70, index)
        return ports.read(0x71)

    assert [register(i) for i in (0x32, 9, 8, 7, 4, 2, 0)] == [
        0x20, 0x26, 0x03, 0x01, 0x12, 0x34, 0x56]
    assert register(6) == 1                  # Sunday
    assert register(0x17) | register(0x18) << 8 == 63 * 1024
    assert register(0x34) | register(0x35) << 8 == 48 * 16
    assert register(0x10) == 0x40
    ports.write(0x70, 0x0B)
    ports.write(0x71, 0x06)                  # binary
    assert register(2) == 34
    clock.advance(60)
    assert register(2) == 35


@given(st.integers(0, 99))
def test_bcd_reads_as_decimal(value):
    assert f"{bcd(value):x}" == str(value)


def test_the_clock_is_set_while_updates_are_stopped(clock):
    ports = Ports(cmos(clock))

    def register(index, *value):
        ports.write(0x70, index)
        ports.write(0x71, *value)
        return ports.read(0x71)

    register(0x0B, 0x82)
    for index, value in ((0x32, 0x19), (9, 0x94), (8, 0x11), (7, 0x30), (4, 0x23), (2, 0x59), (0, 0x59)):
        assert register(index, value) == value
    clock.advance(10)                        # nothing moves meanwhile
    assert register(0x00) == 0x59
    register(0x0B, 0x02)
    clock.advance(2)
    assert [register(index) for index in (0x32, 9, 8, 7, 4, 2, 0)] == [0x19, 0x94, 0x12, 0x01, 0x00, 0x00, 0x01]


def test_a_field_of_the_clock_is_set_at_once_in_twelve_hours_too(clock):
    ports = Ports(cmos(clock))
    ports.write(0x70, 0x0B)
    ports.write(0x71, 0x04)                  # binary, 12 hours
    ports.write(0x70, 0x04)
    assert ports.read(0x71) == 0x8C          # noon
    ports.write(0x71, 0x83)                  # three in the afternoon
    assert ports.read(0x71) == 0x83
    ports.write(0x70, 0x08)
    ports.write(0x71, 13)                    # no such month: nothing happens
    assert ports.read(0x71) == 3


def test_an_update_shows_just_before_the_second(clock):
    ports = Ports(cmos(clock))
    ports.write(0x70, 0x0A)
    seen = []
    for _ in range(1000):
        clock.advance(0.001)
        seen.append(ports.read(0x71) >> 7)
    assert 1 <= sum(seen) <= 3
    assert seen[0] == 0


def test_the_checksum_of_the_configuration_bytes_is_right(clock):
    ports = Ports(cmos(clock))

    def register(index):
        ports.write(0x70, index)
        return ports.read(0x71)

    assert sum(register(index) for index in range(0x10, 0x2E)) == register(0x2E) << 8 | register(0x2F)


# Interrupt controllers.

class Controllers(Ports):
    """Both 8259s, initialised as a PC's, all lines open; `asking` is what the processor sees."""

    def __init__(self, masks=(0x00, 0x00), fourth=0x01):
        self.told = []
        self.device = Interrupts(self.told.append, firmware=False)
        super().__init__(self.device)
        for base, vector, cascade in ((0x20, 0x08, 0x04), (0xA0, 0x70, 0x02)):
            self.write(base, 0x11)
            self.write(base + 1, vector, cascade, fourth)
        self.write(0x21, masks[0])
        self.write(0xA1, masks[1])

    def end(self, chip=0x20):
        self.write(chip, 0x20)


def test_an_edge_is_asked_for_once_and_comes_as_its_vector():
    c = Controllers()
    c.device.set(4, True)
    assert c.told == [True]
    assert c.device.acknowledge() == 0x0C
    assert c.told == [True, False]
    c.end()
    assert not c.device.asking              # the level that stays is no edge
    c.device.set(4, False)
    c.device.set(4, True)
    assert c.device.asking


def test_a_lower_line_waits_for_the_end_of_a_higher_one_and_not_the_reverse():
    c = Controllers()
    c.device.pulse(3)
    assert c.device.acknowledge() == 0x0B
    c.device.pulse(5)
    assert not c.device.asking
    c.device.pulse(1)
    assert c.device.acknowledge() == 0x09
    c.end()                                  # line 1, the one served last
    assert not c.device.asking
    c.end()
    assert c.device.acknowledge() == 0x0D


def test_the_second_controller_goes_through_line_2():
    c = Controllers()
    c.device.set(8, True)
    assert c.device.acknowledge() == 0x70
    c.device.pulse(9)
    assert not c.device.asking
    c.device.pulse(0)
    assert c.device.acknowledge() == 0x08
    c.end()
    c.end(0xA0)
    c.end()
    assert c.device.acknowledge() == 0x71


def test_masked_lines_are_remembered_and_told_when_opened():
    c = Controllers(masks=(0xFF, 0xFF))
    c.device.pulse(0)
    assert not c.device.asking
    assert c.device.masked(0)
    assert c.device.requested(0)
    assert c.read(0x20) == 0x01              # IRR
    c.write(0x21, 0xFE)
    assert c.device.asking
    assert c.device.masked(8)                # behind line 2


def test_a_request_that_vanished_is_the_spurious_vector_and_needs_no_end():
    c = Controllers()
    assert c.device.acknowledge() == 0x0F
    c.write(0x20, 0x0B)
    assert c.read(0x20) == 0                 # ISR


def test_automatic_end_and_rotation():
    c = Controllers(fourth=0x03)
    c.device.pulse(6)
    assert c.device.acknowledge() == 0x0E
    c.device.pulse(6)
    assert c.device.asking                   # nothing is in service
    c = Controllers()
    c.device.pulse(0)
    c.device.acknowledge()
    c.write(0x20, 0xA0)                      # end, and line 0 becomes the last
    c.device.pulse(0)
    c.device.pulse(7)
    assert c.device.acknowledge() == 0x0F


def test_special_mask_lets_lower_lines_through():
    c = Controllers()
    c.device.pulse(1)
    c.device.acknowledge()
    c.device.pulse(3)
    assert not c.device.asking
    c.write(0x21, 0x02)
    c.write(0x20, 0x68)
    assert c.device.acknowledge() == 0x0B


def test_polling_takes_a_request_without_the_processor():
    c = Controllers()
    c.device.pulse(4)
    c.write(0x20, 0x0C)
    assert c.read(0x20) == 0x84
    assert not c.device.asking


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 255)), max_size=80))
def test_no_sequence_of_accesses_confuses_the_controllers(accesses):
    c = Controllers()
    for what, value in accesses:
        if what < 4:
            port = (0x20, 0x21, 0xA0, 0xA1)[what]
            c.write(port, value) if value & 1 else c.read(port)
        elif what == 4:
            c.device.set(value & 15, bool(value & 16))
        elif c.device.asking:
            assert 0 <= c.device.acknowledge() <= 0xFF
        assert c.told[-1:] in ([], [c.device.asking])


def test_a_level_triggered_line_asks_as_long_as_it_is_up():
    c = Controllers()
    c.write(0x4D0, 0xFF)
    assert c.read(0x4D0) == 0xF8             # timer, keyboard and cascade are edges
    c.device.set(4, True)
    assert c.device.acknowledge() == 0x0C
    c.end()
    assert c.device.asking
    c.device.set(4, False)
    assert not c.device.asking


# Interrupts of timer and clock.

def run_ticks(device, controllers, clock, step_s, steps):
    """Time goes on in steps; every interrupt is served at once. How many there were."""
    served = 0
    for _ in range(steps):
        clock.advance(step_s)
        device.poll(clock.monotonic_ns())
        while controllers.asking:
            controllers.acknowledge()
            controllers._command(controllers._master, 0x20)
            controllers._command(controllers._slave, 0x20)
            served += 1
            device.poll(clock.monotonic_ns())
    return served


def test_every_period_of_channel_0_is_one_tick_without_drift(clock):
    c = Controllers()
    lost = []
    device = timer(clock, c.device, lost.append)
    ports = Ports(device)
    ports.write(0x43, 0x34)
    ports.write(0x40, 0xA9, 0x04)            # 1193: a kilohertz
    assert run_ticks(device, c.device, clock, 0.0001, 100_000) == 10 * PIT_HZ // 1193
    assert not lost


def test_the_next_tick_is_announced_to_the_nanosecond(clock):
    c = Controllers()
    device = timer(clock, c.device)
    Ports(device).write(0x43, 0x34)
    Ports(device).write(0x40, 0xA9, 0x04)
    then = device.next_ns()
    device.poll(then - 1)
    assert not c.device.asking
    device.poll(then)
    assert c.device.asking


def test_ticks_owed_are_made_up_for_one_by_one_and_not_faster_than_agreed(clock):
    c = Controllers()
    lost = []
    device = timer(clock, c.device, lost.append)
    ports = Ports(device)
    ports.write(0x43, 0x34)
    ports.write(0x40, 0xA9, 0x04)
    clock.advance(0.1)                       # the VM had no CPU
    served = run_ticks(device, c.device, clock, 0.000_05, 20)
    assert served <= CATCH_UP + 1            # one millisecond
    served += run_ticks(device, c.device, clock, 0.000_05, 4000)
    assert served == (clock.now_ns - 1_000_000_000) * PIT_HZ // 1193 // 10**9
    assert not lost


def test_what_is_owed_beyond_the_limit_is_lost_and_told(clock):
    c = Controllers()
    lost = []
    device = timer(clock, c.device, lost.append)
    ports = Ports(device)
    ports.write(0x43, 0x34)
    ports.write(0x40, 0xA9, 0x04)
    clock.advance(60)
    device.poll(clock.monotonic_ns())
    assert sum(lost) == 60 * PIT_HZ // 1193 - OWED_S * PIT_HZ // 1193


def test_a_masked_timer_owes_nothing_but_one_edge_and_wakes_nobody(clock):
    c = Controllers(masks=(0xFF, 0xFF))
    device = timer(clock, c.device)
    c.device.masking = lambda: device.poll(clock.monotonic_ns())
    assert device.next_ns() is None
    clock.advance(10)
    c.write(0x21, 0xFE)
    assert run_ticks(device, c.device, clock, 0, 1) == 1


def test_a_one_shot_interrupts_once(clock):
    c = Controllers()
    device = timer(clock, c.device)
    Ports(device).write(0x43, 0x30)
    assert device.next_ns() is None          # no count yet
    Ports(device).write(0x40, 0x00, 0x10)
    assert run_ticks(device, c.device, clock, 0.001, 100) == 1
    assert device.next_ns() is None


def cmos(clock, interrupts=None, changed=lambda: None):
    return Cmos(clock, 64 << 20, {0: geometry_of(1474560)},
                interrupts or Interrupts(lambda _asking: None, firmware=True), changed)


def test_the_periodic_interrupt_of_the_clock_waits_for_its_flags_to_be_read(clock):
    c = Controllers()
    device = cmos(clock, c.device)
    ports = Ports(device)

    def register(index, *value):
        ports.write(0x70, index)
        if value:
            ports.write(0x71, *value)
            return None
        return ports.read(0x71)

    register(0x0B, 0x42)                     # periodic, 24 hours: 1024 Hz
    clock.advance(0.002)
    device.poll(clock.monotonic_ns())
    assert c.device.acknowledge() == 0x70
    c.end(0xA0)
    c.end()
    clock.advance(0.002)
    device.poll(clock.monotonic_ns())
    assert not c.device.asking
    assert register(0x0C) == 0xC0
    assert register(0x0C) == 0
    clock.advance(0.001)
    device.poll(clock.monotonic_ns())
    assert c.device.asking
    assert device.next_ns() is None          # until it is read
    register(0x0B, 0x02)
    assert device.next_ns() is None


def test_update_and_alarm_interrupts_come_with_the_second(clock):
    c = Controllers()
    device = cmos(clock, c.device)
    ports = Ports(device)
    for index, value in ((1, 0x05), (3, 0xFF), (5, 0xC0), (0x0B, 0x22)):    # at second 5 of any minute
        ports.write(0x70, index)
        ports.write(0x71, value)
    clock.advance(8.9)                       # 12:35:04.9
    device.poll(clock.monotonic_ns())
    assert not c.device.asking
    clock.advance(0.2)
    device.poll(clock.monotonic_ns())
    assert c.device.asking
    ports.write(0x70, 0x0C)
    assert ports.read(0x71) == 0xF0          # any, and periodic and update, which were not enabled


# Keyboard.

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


# Display.

def test_the_cursor_is_where_the_crt_controller_says(clock):
    vga = Vga(clock)
    ports = Ports(vga)
    for index, value in ((0x0E, 0x01), (0x0F, 0x23)):
        ports.write(0x3D4, index)
        ports.write(0x3D5, value)
    assert vga.cursor == 0x123


def test_indices_flip_flop_and_palette_are_a_vga_cards(clock):
    ports = Ports(Vga(clock))
    ports.write(0x3D4, 0x09)
    assert ports.read(0x3D5) == 0x4F         # 16 lines a character
    ports.read(0x3DA)                        # the attribute controller expects an index
    ports.write(0x3C0, 0x10, 0x0C, 0x30)
    ports.read(0x3DA)
    ports.write(0x3C0, 0x30)
    assert ports.read(0x3C1) == 0x0C
    ports.write(0x3C7, 0x07)
    assert [ports.read(0x3C9) for _ in range(6)] == [0x2A, 0x2A, 0x2A, 0x00, 0x00, 0x15]
    ports.write(0x3C8, 0xFF)
    ports.write(0x3C9, 0x41, 0x02, 0x03)
    ports.write(0x3C7, 0xFF)
    assert [ports.read(0x3C9) for _ in range(3)] == [0x01, 0x02, 0x03]
    ports.write(0x3C4, 0x02)
    ports.write(0x3C5, 0x0F)
    assert ports.read(0x3C5) == 0x0F
    ports.write(0x3C2, 0xE3)
    assert ports.read(0x3CC) == 0xE3


def test_retrace_comes_and_goes(clock):
    ports = Ports(Vga(clock))
    seen = set()
    for _ in range(200):
        clock.advance(0.0005)
        seen.add(ports.read(0x3DA) & 8)
    assert seen == {0, 8}


# Disk.

def test_a_short_image_reads_zeros_behind_its_end_and_nothing_outside_its_format(file):
    disk = Disk(file(b"x" * 700))
    assert disk.read(1, 2) == b"x" * 188 + bytes(1024 - 188)
    assert disk.read(319, 1) == bytes(512)
    assert disk.read(319, 2) is Fault.NOT_FOUND
    assert disk.read(-1, 1) is Fault.NOT_FOUND


def test_an_empty_image_is_refused(file):
    with pytest.raises(ValueError, match="empty"):
        Disk(file())


def test_a_disk_is_protected_unless_it_is_writable_or_has_an_overlay(file):
    fd, overlay = file(bytes(163_840)), file()
    assert Disk(fd).write(0, b"a" * 512) is Fault.PROTECTED
    with_overlay = Disk(fd, overlay_fd=overlay)
    assert with_overlay.write(1, b"b" * 512) is None
    assert with_overlay.read(0, 3) == bytes(512) + b"b" * 512 + bytes(512)
    assert os.pread(fd, 163_840, 0) == bytes(163_840)
    assert Disk(fd, writable=True).write(2, b"c" * 1024) is None
    assert os.pread(fd, 1536, 512) == bytes(512) + b"c" * 1024
    assert os.fstat(overlay).st_size <= with_overlay.end_bytes
    assert Disk(fd, writable=True).write(319, b"d" * 1024) is Fault.NOT_FOUND


def test_what_the_host_refuses_is_a_fault_and_its_errno_is_kept(file):
    overlay = os.memfd_create("overlay", os.MFD_ALLOW_SEALING)
    try:
        disk = Disk(file(bytes(163_840)), overlay_fd=overlay)
        assert disk.write(0, b"a" * 512) is None
        fcntl.fcntl(overlay, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        assert disk.write(0, b"b" * 512) is Fault.UNWRITABLE
        assert disk.error == errno.EPERM
        assert disk.read(0, 1) == b"a" * 512
    finally:
        os.close(overlay)
    assert disk.read(0, 1) is Fault.UNREADABLE
    assert disk.error == errno.EBADF


def test_a_sector_that_is_not_what_its_checksum_says_is_unreadable(file):
    overlay = file()
    disk = Disk(file(bytes(163_840)), overlay_fd=overlay)
    disk.write(0, b"a" * 512)
    os.pwrite(overlay, b"?", 8192)
    assert disk.read(0, 1) is Fault.UNREADABLE
    assert disk.error == DAMAGED


# Firmware configuration.

def test_an_item_of_the_firmware_configuration_is_read_byte_by_byte_then_zeros():
    ports = Ports(FirmwareConfig(48 << 20, 3))

    def item(number, length):
        ports.write(0x510, number & 0xFF)
        ports.write(0x511, number >> 8)
        return bytes(ports.read(0x511) for _ in range(length))

    assert item(0, 6) == b"QEMU\0\0"
    assert item(3, 8) == (48 << 20).to_bytes(8, "little")
    assert item(5, 2) == item(15, 2) == b"\3\0"
    assert item(0x19, 4) == item(0x8003, 4) == bytes(4)
