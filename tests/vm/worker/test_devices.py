from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixvisor.vm.worker.clock import PIT_HZ, TICKS_PER_DAY, next_tick_ns, tick_index
from mixvisor.vm.worker.devices.board import Board, Cmos, Interrupts, bcd
from mixvisor.vm.worker.devices.disk import FLOPPIES, DiskImage, geometry_of
from mixvisor.vm.worker.devices.keyboard import QUEUE_KEYS, Keyboard
from mixvisor.vm.worker.devices.timer import Timer
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


@pytest.fixture
def ended():
    return []


@pytest.fixture
def keyboard(ended):
    return Keyboard(lambda *what: ended.append(what))


# Clock.

@given(st.integers(0, 10**18))
def test_the_next_tick_is_the_first_moment_with_a_higher_tick(now_ns):
    then = next_tick_ns(now_ns)
    assert tick_index(then) == tick_index(now_ns) + 1
    assert tick_index(then - 1) == tick_index(now_ns)


def test_a_day_has_the_number_of_ticks_that_the_bios_says():
    assert abs(tick_index(86_400 * 10**9) - TICKS_PER_DAY) <= 10


# Timer.

def test_the_counter_moves_with_the_clock_and_not_without(clock):
    ports = Ports(Timer(clock))
    ports.write(0x43, 0x34)                 # channel 0, low then high, mode 2
    ports.write(0x40, 0x00, 0x00)
    first = ports.read(0x40) | ports.read(0x40) << 8
    assert first == 0                       # 65536
    assert ports.read(0x40) | ports.read(0x40) << 8 == first
    clock.advance(0.01)
    moved = ports.read(0x40) | ports.read(0x40) << 8
    assert 0x10000 - moved == PIT_HZ // 100


def test_single_byte_reads_of_the_running_counter_vary(clock):
    ports = Ports(Timer(clock))
    seen = set()
    for _ in range(50):
        clock.advance(0.000_777)
        seen.add(ports.read(0x40))
    assert len(seen) > 10


def test_a_latched_count_stays_until_both_bytes_are_read(clock):
    ports = Ports(Timer(clock))
    ports.write(0x43, 0x34)
    ports.write(0x40, 0x00, 0x80)
    clock.advance(0.001)
    ports.write(0x43, 0x00)
    clock.advance(0.001)
    latched = ports.read(0x40) | ports.read(0x40) << 8
    assert 0x8000 - latched == PIT_HZ // 1000
    assert 0x8000 - (ports.read(0x40) | ports.read(0x40) << 8) == PIT_HZ // 500


def test_a_one_shot_on_channel_2_is_over_after_its_count(clock):
    ports = Ports(Timer(clock))
    ports.write(0x61, 0x01)
    ports.write(0x43, 0xB0)                 # channel 2, mode 0
    ports.write(0x42, 0xFF, 0xFF)
    assert not ports.read(0x61) & 0x20
    clock.advance(65535 / PIT_HZ + 1e-6)
    assert ports.read(0x61) & 0x20


@given(st.lists(st.tuples(st.sampled_from([0x40, 0x41, 0x42, 0x43, 0x61]), st.booleans(),
                          st.integers(0, 255), st.integers(0, 10**9)), max_size=60))
def test_no_sequence_of_timer_accesses_gives_more_than_a_byte(accesses):
    class Moving:
        now = 0

        def monotonic_ns(self):
            return self.now

        wall_ns = monotonic_ns

    clock = Moving()
    ports = Ports(Timer(clock))
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


def test_interrupt_masks_are_remembered_and_initialisation_words_are_not_masks():
    device = Interrupts()
    ports = Ports(device)
    ports.write(0x20, 0x11)
    ports.write(0x21, 0x20, 0x04, 0x01, 0xFB)
    assert ports.read(0x21) == 0xFB
    assert device.vectors[0] == 0x20
    assert ports.read(0x20) == 0


def test_the_cmos_tells_date_and_memory(clock):
    ports = Ports(Cmos(clock, 64 << 20, 4))

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


# Keyboard.

def test_the_queue_is_bounded_and_keeps_order(keyboard):
    assert [keyboard.press(i & 0x7F, 0) for i in range(QUEUE_KEYS + 1)].count(False) == 1
    assert keyboard.take() == (0, 0)
    assert keyboard.take() == (1, 0)


def test_a_polling_guest_sees_make_and_break_codes(keyboard):
    ports = Ports(keyboard)
    assert not ports.read(0x64) & 1
    keyboard.press(0x1E, ord("a"))
    assert ports.read(0x64) & 1
    assert ports.read(0x60) == 0x1E
    assert not ports.read(0x64) & 1
    assert ports.read(0x60) == 0x9E


def test_the_controller_answers_its_self_tests(keyboard):
    ports = Ports(keyboard)
    ports.write(0x64, 0xAA)
    assert ports.read(0x60) == 0x55
    ports.write(0x60, 0xFF)
    assert (ports.read(0x60), ports.read(0x60)) == (0xFA, 0xAA)


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


def test_retrace_comes_and_goes(clock):
    ports = Ports(Vga(clock))
    seen = set()
    for _ in range(200):
        clock.advance(0.0005)
        seen.add(ports.read(0x3DA) & 8)
    assert seen == {0, 8}


# Disk.

@given(st.integers(1, 9 << 30))
def test_every_sector_of_an_image_lies_within_its_geometry(size_bytes):
    geometry = geometry_of(size_bytes)
    sectors = -(-size_bytes // 512)
    assert geometry.cylinders <= 1024
    assert geometry.total >= sectors or (geometry.cylinders, geometry.heads) == (1024, 255)
    assert geometry.drive == (0x80 if size_bytes > 2880 * 1024 else 0)


@pytest.mark.parametrize(("kib", "heads", "sectors", "cylinders"), [
    (160, 1, 8, 40), (180, 1, 9, 40), (320, 2, 8, 40), (360, 2, 9, 40), (720, 2, 9, 80),
    (1200, 2, 15, 80), (1440, 2, 18, 80), (2880, 2, 36, 80),
])
def test_floppy_sizes_have_their_standard_geometry(kib, heads, sectors, cylinders):
    geometry = geometry_of(kib * 1024)
    assert (geometry.heads, geometry.sectors, geometry.cylinders) == (heads, sectors, cylinders)


@given(st.sampled_from(FLOPPIES), st.integers(0, 100), st.integers(0, 3), st.integers(0, 64))
def test_cylinder_head_sector_is_a_number_below_the_total_or_nothing(geometry, c, h, s):
    number = geometry.sector(c, h, s)
    exists = c < geometry.cylinders and h < geometry.heads and 1 <= s <= geometry.sectors
    assert (number is not None) == exists
    if number is not None:
        assert 0 <= number < geometry.total


def test_a_short_image_reads_zeros_behind_its_end_and_nothing_outside_its_format():
    fd = os.memfd_create("image")
    try:
        os.write(fd, b"x" * 700)
        disk = DiskImage(fd)
        assert disk.read(1, 2) == b"x" * 188 + bytes(1024 - 188)
        assert disk.read(319, 1) == bytes(512)
        assert disk.read(319, 2) is None
        assert disk.read(-1, 1) is None
    finally:
        os.close(fd)


def test_an_empty_image_is_refused():
    fd = os.memfd_create("image")
    try:
        with pytest.raises(ValueError, match="empty"):
            DiskImage(fd)
    finally:
        os.close(fd)
