"""Timer, board, clock, display, disk and firmware configuration."""

from __future__ import annotations

import errno
import fcntl
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixvisor.vm.worker.clock import PIT_HZ
from mixvisor.vm.worker.devices.board import Board
from mixvisor.vm.worker.devices.cmos import bcd
from mixvisor.vm.worker.devices.disk import DAMAGED, Disk, Fault
from mixvisor.vm.worker.devices.fwcfg import FirmwareConfig
from mixvisor.vm.worker.devices.vga import Vga

from .ports import Ports, cmos, timer

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
