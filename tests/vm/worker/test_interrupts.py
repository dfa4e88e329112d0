"""The two 8259s, and the interrupts that timer and clock ask them for."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mixvisor.vm.worker.clock import PIT_HZ
from mixvisor.vm.worker.devices.pic import Interrupts
from mixvisor.vm.worker.devices.timer import CATCH_UP, OWED_S

from .ports import Ports, cmos, timer


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
