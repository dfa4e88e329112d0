from __future__ import annotations

import os
import pathlib
import shutil
import struct
import subprocess

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mixvisor.vm.disks.geometry import geometry_of
from mixvisor.vm.engines.base import RIP
from mixvisor.vm.worker.bios import rom
from mixvisor.vm.worker.bios.keyboard import DEEP_NAP_NS, DEEP_POLLS, IDLE_NAP_NS, IDLE_POLLS
from mixvisor.vm.worker.clock import PIT_HZ, TICKS_PER_DAY
from mixvisor.vm.worker.devices.disk import Disk

SCREEN = 0xB8000
FLOPPY = b"".join(bytes([n & 0xFF, n >> 8]) * 256 for n in range(2880))


# ROM.

def test_every_vector_leads_to_its_own_port_write_or_to_a_handler():
    memory = _rom()
    handlers = rom.entries()
    assert set(handlers) >= {0x08, 0x09, 0x13, 0x15, 0x16, 0x1C, 0x70}
    for vector in set(range(256)) - {0x1D, 0x1E, 0x1F, 0x41, 0x46, *range(0x60, 0x68)}:
        offset, segment = struct.unpack_from("<HH", memory, vector * 4)
        assert (segment, offset) == (0xF000, handlers.get(vector, vector * 8))
        assert memory[0xF0000 + vector * 8:0xF0000 + vector * 8 + 3] == bytes([0xE6, 0xB0, 0xCF])


@pytest.mark.skipif(shutil.which("nasm") is None, reason="nasm is not installed")
def test_the_handlers_are_what_their_source_says(tmp_path):
    source = pathlib.Path(rom.__file__).with_name("handlers.asm")
    subprocess.run(["nasm", "-f", "bin", "-o", tmp_path / "handlers", source], check=True)
    assert (tmp_path / "handlers").read_bytes() == source.with_suffix(".bin").read_bytes()


def _rom() -> bytes:
    from mixvisor.vm.worker.memory import GuestMemory
    memory = GuestMemory(bytearray(1 << 20))
    rom.install(memory, disks={0: geometry_of(1474560)}, ticks=0)
    return bytes(memory.raw)


def test_a_port_write_from_elsewhere_is_no_bios_call(bench):
    b = bench()
    b.cpu.state.cs.base = 0x7C00
    b.machine.port_out(0xB0, 1, 0)
    assert not b.machine.bios.calls


def test_calls_are_counted_and_repeats_in_the_trace_collapsed(bench):
    b = bench()
    b.type("ab")
    b.call(0x12)
    b.call(0x10, ax=0x0300)
    assert b.machine.bios.calls[0x10, 0x0E] == 2
    assert b.machine.bios.trace == [(0x10, 0x0E), (0x12, 0), (0x10, 0x03)]
    assert b.counts["bios_calls"] == 4


def test_upper_register_halves_survive_a_call(bench):
    b = bench()
    b.call(0x12, ax=0)
    assert b.cpu.state.gpr[0] == 0xDEAD_BEEF_0000_0000 | 639


def test_flags_other_than_the_answer_survive_a_call(bench):
    b = bench()
    b.call(0x13, ax=0x0000, dx=0)
    assert b.memory.u16(b.STACK + 4) == 0x0202


@settings(max_examples=300, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(vector=st.sampled_from([0x10, 0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17, 0x1A]),
       ax=st.integers(0, 0xFFFF), bx=st.integers(0, 0xFFFF), cx=st.integers(0, 0xFFFF),
       dx=st.integers(0, 0xFFFF), si=st.integers(0, 0xFFFF), di=st.integers(0, 0xFFFF),
       bp=st.integers(0, 0xFFFF), es=st.integers(0, 0xFFFF), ds=st.integers(0, 0xFFFF),
       bda=st.binary(min_size=256, max_size=256))
def test_no_call_with_any_registers_over_any_data_area_hurts_the_worker(hostile, vector, bda, **regs):
    hostile.memory.poke(0x400, bda)
    hostile.call(vector, **regs)
    screen = hostile.machine.screen()
    assert screen is not None
    assert all(len(row) == 80 for row in screen.rows)
    assert len(screen.attributes) == 2000
    assert 0 <= screen.cursor[0] < 80
    assert 0 <= screen.cursor[1] < 25


@pytest.fixture
def hostile(bench):
    return bench(memory_bytes=1 << 20)


# Text screen.

def test_teletype_wraps_and_honours_the_control_characters(bench):
    b = bench()
    b.type("x" * 80 + "yz\b!\r\nnext\a")
    assert b.row(0) == "x" * 80
    assert b.row(1) == "y!"
    assert b.row(2) == "next"
    assert b.machine.screen().cursor == (4, 2)


def test_the_screen_scrolls_when_the_last_line_is_left(bench):
    b = bench()
    b.type("\r\n".join(f"line {n}" for n in range(30)))
    assert [b.row(n) for n in (0, 24)] == ["line 5", "line 29"]
    assert b.machine.screen().cursor == (7, 24)


def test_cursor_set_and_get_agree_per_page(bench):
    b = bench()
    b.call(0x10, ax=0x0200, bx=0x0000, dx=0x0A14)
    b.call(0x10, ax=0x0200, bx=0x0100, dx=0x0102)
    assert b.call(0x10, ax=0x0300, bx=0x0000)["dx"] == 0x0A14
    assert b.call(0x10, ax=0x0300, bx=0x0100)["dx"] == 0x0102
    assert b.machine.screen().cursor == (0x14, 0x0A)


def test_cursor_shape_is_remembered(bench):
    b = bench()
    assert b.call(0x10, ax=0x0300, bx=0)["cx"] == 0x0607
    b.call(0x10, ax=0x0100, cx=0x2000)
    assert b.call(0x10, ax=0x0300, bx=0)["cx"] == 0x2000


def test_scrolling_a_window_leaves_the_rest_alone(bench):
    b = bench()
    for n in range(5):
        b.type(f"{n}" * 6 + "\r\n")
    b.call(0x10, ax=0x0601, bx=0x1700, cx=0x0101, dx=0x0303)      # up, rows 1-3, columns 1-3
    assert [b.row(n) for n in range(5)] == ["000000", "122211", "233322", "3   33", "444444"]
    assert b.memory.u8(SCREEN + 3 * 160 + 2 * 2 + 1) == 0x17
    b.call(0x10, ax=0x0701, bx=0x0700, cx=0x0101, dx=0x0303)      # and down again
    assert [b.row(n) for n in range(5)] == ["000000", "1   11", "222222", "333333", "444444"]


@pytest.mark.parametrize("lines", [0, 25, 255])
def test_scrolling_by_nothing_or_too_much_clears(bench, lines):
    b = bench()
    b.type("gone")
    b.call(0x10, ax=0x0600 | lines, bx=0x0700, cx=0, dx=0x184F)
    assert b.row(0) == ""


def test_write_and_read_a_cell_with_attribute_do_not_move_the_cursor(bench):
    b = bench()
    b.call(0x10, ax=0x0941, bx=0x001E, cx=3)
    assert b.row(0) == "AAA"
    assert b.call(0x10, ax=0x0800, bx=0)["ax"] == 0x1E41
    b.call(0x10, ax=0x0A42, bx=0x0000, cx=1)
    assert b.call(0x10, ax=0x0800, bx=0)["ax"] == 0x1E42
    assert b.machine.screen().cursor == (0, 0)


def test_write_string_with_and_without_attributes(bench):
    b = bench()
    b.memory.poke(0x5000, b"plain")
    b.memory.poke(0x5100, b"c\x1Eo\x2Fl\x3F")
    b.call(0x10, ax=0x1301, bx=0x0007, cx=5, dx=0x0200, es=0x500, bp=0)
    b.call(0x10, ax=0x1302, bx=0x0000, cx=3, dx=0x0300, es=0x510, bp=0)
    assert (b.row(2), b.row(3)) == ("plain", "col")
    assert b.memory.u8(SCREEN + 3 * 160 + 3) == 0x2F
    assert b.machine.screen().cursor == (5, 2)          # only AL bit 0 moves it


def test_the_mode_is_reported_and_setting_it_clears(bench):
    b = bench()
    b.type("old")
    b.call(0x10, ax=0x0083)
    assert b.row(0) == "old"                            # bit 7: keep
    b.call(0x10, ax=0x0003)
    assert b.row(0) == ""
    assert b.call(0x10, ax=0x0F00)["ax"] == 0x5003
    b.call(0x10, ax=0x0001)
    assert b.call(0x10, ax=0x0F00)["ax"] == 0x2801
    b.call(0x10, ax=0x0013)                             # graphics: there is none
    assert b.call(0x10, ax=0x0F00)["ax"] == 0x2801


def test_a_page_is_selected_and_shown(bench):
    b = bench()
    b.type("page zero")
    b.call(0x10, ax=0x0501)
    assert b.row(0) == ""
    b.type("page one")
    assert b.row(0) == "page one"
    b.call(0x10, ax=0x0500)
    assert b.row(0) == "page zero"


def test_the_screen_version_moves_for_bios_output_and_for_direct_writes(bench):
    b = bench()
    b.machine.screen()
    versions = [b.counts["screen_version"]]
    b.type("a")
    b.machine.screen()
    versions.append(b.counts["screen_version"])
    b.memory.poke(SCREEN + 100, b"Z")
    b.machine.screen()
    versions.append(b.counts["screen_version"])
    b.machine.screen()
    versions.append(b.counts["screen_version"])
    assert versions[0] < versions[1] < versions[2] == versions[3]


def test_every_byte_has_a_glyph_of_one_column(bench):
    b = bench()
    b.memory.poke(SCREEN, bytes(byte for n in range(256) for byte in (n, 7)))
    rows = b.machine.screen().rows
    assert len("".join(rows[:4])) == 320
    assert (rows[0][1:7], rows[2][16:20]) == ("☺☻♥♦♣♠", "░▒▓│")
    assert all(c.isprintable() for row in rows for c in row)


# Keyboard.

def test_a_key_that_is_there_is_read_at_once(bench):
    b = bench()
    b.press((0x1E, 0x61), (0x30, 0x62))
    polled = b.call(0x16, ax=0x0100)
    assert (polled["ax"], polled["zero"]) == (0x1E61, 0)
    assert b.call(0x16, ax=0x0000)["ax"] == 0x1E61
    assert b.call(0x16, ax=0x1000)["ax"] == 0x3062
    assert b.call(0x16, ax=0x0100)["zero"] == 1
    assert b.cpu.stopped == 0


def test_waiting_for_a_key_stops_the_vcpu_until_one_comes(bench):
    b = bench()
    b.call(0x16, ax=0x0000)
    assert b.cpu.stopped == 1
    assert not b.machine.wait_is_over(b.clock.now_ns + 10**15)
    b.press((0x1C, 0x0D))
    assert b.machine.wait_is_over(b.clock.now_ns)
    b.machine.finish_wait()
    assert b.registers()["ax"] == 0x1C0D
    assert b.machine.wait is None


def test_an_idle_poller_naps_and_a_key_or_time_wakes_it(bench):
    b = bench()
    for _ in range(IDLE_POLLS):
        b.call(0x16, ax=0x0100)
    assert b.machine.wait is None
    b.call(0x16, ax=0x1100)
    assert not b.machine.wait_is_over(b.clock.now_ns + IDLE_NAP_NS - 1)
    assert b.machine.wait_is_over(b.clock.now_ns + IDLE_NAP_NS)
    b.press((0x1C, 0x0D))
    assert b.machine.wait_is_over(b.clock.now_ns)
    b.machine.finish_wait()
    assert b.call(0x16, ax=0x0100)["ax"] == 0x1C0D
    assert b.machine.wait is None


def test_naps_grow_only_to_their_longest(bench):
    b = bench()
    for _ in range(DEEP_POLLS * 2):
        b.call(0x16, ax=0x0100)
        b.machine.finish_wait()
    b.call(0x16, ax=0x0100)
    assert b.machine.wait.until_ns == b.clock.now_ns + DEEP_NAP_NS


def test_output_between_polls_is_no_idling(bench):
    b = bench()
    for _ in range(IDLE_POLLS * 3):
        b.call(0x16, ax=0x0100)
        b.call(0x10, ax=0x0E2E)
    assert b.machine.wait is None


def test_a_guest_can_push_a_key_and_a_full_buffer_says_so(bench):
    b = bench()
    assert b.call(0x16, ax=0x05FF, cx=0x1E61)["ax"] & 0xFF == 0
    assert b.call(0x16, ax=0x0000)["ax"] == 0x1E61


def test_keys_beyond_the_guests_buffer_wait_for_room(bench):
    b = bench()
    text = [(n, n) for n in range(1, 41)]
    b.press(*text)
    taken = []
    for _ in text:
        taken.append(b.call(0x16, ax=0)["ax"])
        b.serve_interrupts()
    assert taken == [n << 8 | n for n in range(1, 41)]


def test_a_guests_own_keyboard_handler_is_not_held_back_by_the_bios_buffer(bench):
    b = bench()
    b.press(*[(n, n) for n in range(1, 21)])
    assert len(b.machine.keyboard) > 0
    b.memory.poke(0x09 * 4, bytes.fromhex("00060000"))
    b.serve_interrupts()
    assert len(b.machine.keyboard) == 0


def test_shift_is_told_while_it_is_held(bench):
    b = bench()
    b.machine.press([(0x1E, ord("A"))])
    held = []
    for _ in range(4):                       # shift, a, and their ends
        assert b.machine.acknowledge() == 0x09
        b.call(0x09, ax=b.machine.port_in(0x60, 1))
        b.machine.port_out(0x20, 1, 0x20)
        held.append(b.call(0x16, ax=0x0200)["ax"] & 0xFF)
        b.clock.advance(0.001)
        b.machine.poll()
    assert held == [2, 2, 2, 0]
    assert b.call(0x16, ax=0)["ax"] == 0x1E41


def test_a_wait_that_an_interrupt_breaks_goes_on_behind_it_and_counts_once(bench):
    b = bench()
    b.call(0x16, ax=0x0000)
    b.cpu.state.gpr[RIP] += 2                # the engine is behind the `out`
    b.machine.interrupt_wait()
    assert b.machine.wait is None
    assert b.cpu.state.gpr[RIP] == 0x16 * 8
    b.call(0x16, ax=0x0000)                  # the handler has returned to it
    assert b.machine.wait is not None
    assert b.machine.bios.calls[0x16, 0] == 1
    assert b.counts["bios_calls"] == 1
    b.press((0x1C, 0x0D))
    b.machine.finish_wait()
    assert b.registers()["ax"] == 0x1C0D


def test_an_interrupt_ends_a_nap(bench):
    b = bench()
    for _ in range(IDLE_POLLS + 1):
        b.call(0x16, ax=0x0100)
    assert b.machine.wait is not None
    b.machine.interrupt_wait()
    assert b.machine.wait is None
    assert b.cpu.state.gpr[RIP] == 0x16 * 8  # not set back


def test_a_guest_that_flushes_its_buffer_by_hand_is_served(bench):
    b = bench()
    b.press((1, 1), (2, 2))
    b.memory.poke_u16(rom.BDA_KEY_HEAD, b.memory.u16(rom.BDA_KEY_TAIL))
    assert b.call(0x16, ax=0x0100)["zero"] == 1


# Disk.

def test_a_read_loads_sectors_and_tells_the_engine(bench):
    b = bench(FLOPPY)
    answer = b.call(0x13, ax=0x0203, cx=0x0102, dx=0x0100, es=0x1000, bx=0x20)
    first = (1 * 2 + 1) * 18 + 1
    assert (answer["ax"], answer["carry"]) == (0x0003, 0)
    assert b.memory.read(0x10020, 1536) == FLOPPY[first * 512:(first + 3) * 512]
    assert b.cpu.changed == [(0x10020, 1536)]
    assert b.counts["disk_read_bytes"] == 1536


@pytest.mark.parametrize(("registers", "status"), [
    ({"ax": 0x0201, "cx": 0x5001}, 0x04),                    # cylinder 80
    ({"ax": 0x0201, "cx": 0x0013}, 0x04),                    # sector 19
    ({"ax": 0x0201, "cx": 0x0000}, 0x04),                    # sector 0
    ({"ax": 0x0202, "cx": 0x4F12, "dx": 0x0100}, 0x04),      # behind the last
    ({"ax": 0x0200, "cx": 0x0001}, 0x01),                    # nothing
    ({"ax": 0x0201, "cx": 0x0001, "dx": 0x0001}, 0x80),      # drive B
    ({"ax": 0x0201, "cx": 0x0001, "dx": 0x0080}, 0x01),      # hard disk
    ({"ax": 0x0301, "cx": 0x0001}, 0x03),                    # write
    ({"ax": 0x4200}, 0x01),                                  # LBA on a floppy
    ({"ax": 0x9900}, 0x01),
])
def test_what_cannot_be_read_is_refused_with_its_status(bench, registers, status):
    b = bench(FLOPPY)
    answer = b.call(0x13, **registers)
    assert (answer["ax"] >> 8, answer["carry"]) == (status, 1)
    assert b.cpu.changed == []
    again = b.call(0x13, ax=0x0100, dx=registers.get("dx", 0))
    assert (again["ax"] >> 8, again["carry"]) == (status, 1)


def test_a_read_beyond_memory_is_refused(bench):
    b = bench(FLOPPY, memory_bytes=1 << 20)
    answer = b.call(0x13, ax=0x0201, cx=0x0001, es=0xFFFF, bx=0x10)
    assert (answer["ax"] >> 8, answer["carry"]) == (0x09, 1)


def test_floppy_parameters_type_and_change_line(bench):
    b = bench(FLOPPY)
    answer = b.call(0x13, ax=0x0800)
    assert (answer["cx"], answer["dx"], answer["bx"] & 0xFF) == (0x4F12, 0x0101, 4)
    assert b.call(0x13, ax=0x1500)["ax"] >> 8 == 2
    assert b.call(0x13, ax=0x1500, dx=0x80)["ax"] >> 8 == 0
    assert b.call(0x13, ax=0x1600)["carry"] == 0
    assert b.call(0x13, ax=0x0401, cx=0x0001)["carry"] == 0
    assert b.call(0x13, ax=0x0401, cx=0x0013)["carry"] == 1


def test_a_hard_disk_is_read_by_block_address(bench):
    image = b"".join(n.to_bytes(4, "little") * 128 for n in range(8000))
    b = bench(image)
    assert b.call(0x13, ax=0x4100, bx=0x55AA, dx=0x80)["bx"] == 0xAA55
    b.memory.poke(0x5000, struct.pack("<BBHHHQ", 16, 0, 2, 0x10, 0x2000, 7777))
    assert b.call(0x13, ax=0x4200, dx=0x80, ds=0x500)["carry"] == 0
    assert b.memory.read(0x20010, 1024) == image[7777 * 512:7779 * 512]
    b.memory.poke(0x5000, struct.pack("<BBHHHQ", 16, 0, 2, 0x10, 0x2000, 7999))
    assert b.call(0x13, ax=0x4200, dx=0x80, ds=0x500)["carry"] == 1
    assert b.memory.u16(0x5002) == 0
    b.memory.poke(0x5000, struct.pack("<H", 26))
    assert b.call(0x13, ax=0x4800, dx=0x80, ds=0x500)["carry"] == 0
    assert struct.unpack_from("<Q", b.memory.raw, 0x5010)[0] == 8000
    assert b.call(0x13, ax=0x1500, dx=0x80)["ax"] >> 8 == 3
    assert b.call(0x13, ax=0x0201, cx=0x0001, dx=0x0080, es=0x3000)["carry"] == 0


# System.

def test_memory_sizes_agree(bench):
    b = bench(memory_bytes=32 << 20)
    assert b.call(0x12)["ax"] == 639
    assert b.call(0x15, ax=0x8800)["ax"] == 31 * 1024
    answer = b.call(0x15, ax=0xE801)
    assert (answer["ax"], answer["bx"]) == (15 * 1024, 16 * 16)


def test_the_memory_map_covers_memory_without_overlap(bench):
    b = bench(memory_bytes=8 << 20)
    entries, index = [], 0
    while True:
        answer = b.call(0x15, ax=0xE820, bx=index, cx=20, dx=0x534D4150, es=0x500)
        assert (answer["carry"], answer["eax"]) == (0, 0x534D4150)
        entries.append(struct.unpack("<QQI", b.memory.read(0x5000, 20)))
        index = answer["ebx"]
        if index == 0:
            break
    end = 0
    for base, length, _kind in entries:
        assert base >= end
        end = base + length
    assert end == 8 << 20
    assert sum(length for _base, length, kind in entries if kind == 1) == (639 << 10) + (7 << 20)


def test_a_wait_takes_its_time(bench):
    b = bench()
    b.call(0x15, ax=0x8600, cx=0x0001, dx=0x86A0)
    assert not b.machine.wait_is_over(b.clock.now_ns + 99_999_000)
    assert b.machine.wait_is_over(b.clock.now_ns + 100_000_000)
    b.press((1, 1))
    assert not b.machine.wait_is_over(b.clock.now_ns)


def test_a20_is_open_and_unknown_services_say_so(bench):
    b = bench()
    answer = b.call(0x15, ax=0x2402)
    assert (answer["ax"], answer["carry"]) == (0x0001, 0)
    answer = b.call(0x15, ax=0x5300)
    assert (answer["ax"] >> 8, answer["carry"]) == (0x86, 1)


def test_a_block_move_copies_and_checks(bench):
    b = bench()
    b.memory.poke(0x20000, b"0123456789")
    table = bytearray(48)
    struct.pack_into("<HHBBH", table, 16, 0xFFFF, 0x0000, 0x02, 0x93, 0)
    struct.pack_into("<HHBBH", table, 24, 0xFFFF, 0x0000, 0x10, 0x93, 0)
    b.memory.poke(0x5000, bytes(table))
    assert b.call(0x15, ax=0x8700, cx=5, es=0x500)["carry"] == 0
    assert b.memory.read(0x100000, 10) == b"0123456789"
    table[28] = 0x20
    b.memory.poke(0x5000, bytes(table))
    assert b.call(0x15, ax=0x8700, cx=5, es=0x500)["carry"] == 1


def test_boot_failure_ends_the_vm(bench):
    b = bench()
    b.call(0x18)
    assert b.machine.ending.code == "no-boot"


# Time.

def test_ticks_follow_the_clock_and_start_at_the_time_of_day(bench):
    b = bench()
    answer = b.call(0x1A, ax=0)
    ticks = answer["cx"] << 16 | answer["dx"]
    assert ticks == (12 * 3600 + 34 * 60 + 56) * TICKS_PER_DAY // 86400
    for _ in range(1000):
        b.clock.advance(0.01)
        b.serve_interrupts()
    answer = b.call(0x1A, ax=0)
    passed = b.clock.now_ns - 1_000_000_000
    assert (answer["cx"] << 16 | answer["dx"]) - ticks == passed * PIT_HZ // 65536 // 10**9 == 182


def test_midnight_is_told_once(bench):
    b = bench()
    b.memory.poke_u8(rom.BDA_MIDNIGHT, 1)
    first, second = b.call(0x1A, ax=0), b.call(0x1A, ax=0)
    assert (first["ax"] & 0xFF, second["ax"] & 0xFF) == (1, 0)


def test_date_and_time_are_utc_in_bcd(bench):
    b = bench()
    time, date = b.call(0x1A, ax=0x0200), b.call(0x1A, ax=0x0400)
    assert (time["cx"], time["dx"] >> 8) == (0x1234, 0x56)
    assert (date["cx"], date["dx"]) == (0x2026, 0x0301)
    assert b.call(0x1A, ax=0xB101)["carry"] == 1        # no PCI BIOS


def test_date_and_time_can_be_set_and_go_on_from_there(bench):
    b = bench()
    assert b.call(0x1A, ax=0x0500, cx=0x1999, dx=0x1231)["carry"] == 0
    assert b.call(0x1A, ax=0x0300, cx=0x2359, dx=0x5800)["carry"] == 0
    b.clock.advance(3)
    time, date = b.call(0x1A, ax=0x0200), b.call(0x1A, ax=0x0400)
    assert (time["cx"], time["dx"] >> 8, date["cx"], date["dx"]) == (0x0000, 0x01, 0x2000, 0x0101)
    assert b.call(0x1A, ax=0x0500, cx=0x2000, dx=0x0231)["carry"] == 1          # no 31st of February
    assert b.call(0x1A, ax=0x0400)["dx"] == 0x0101


def test_an_alarm_is_set_once_and_taken_back(bench):
    b = bench()
    assert b.call(0x1A, ax=0x0600, cx=0x1235, dx=0x0500)["carry"] == 0
    assert b.call(0x1A, ax=0x0600, cx=0x1300, dx=0x0000)["carry"] == 1
    b.clock.advance(9.5)                                # 12:35:05
    b.machine.poll()
    b.machine.port_out(0x70, 1, 0x0C)
    assert b.machine.port_in(0x71, 1) & 0x20
    b.call(0x1A, ax=0x0700)
    assert b.call(0x1A, ax=0x0600, cx=0x1300, dx=0x0000)["carry"] == 0


# Serial and printer services.

def test_the_serial_service_prints_and_reads(bench):
    b = bench()
    assert b.call(0x14, ax=0x0141)["ax"] >> 8 & 0x80 == 0
    assert b.machine.serial.ring.read(0, 10)[1] == b"A"
    assert b.call(0x14, ax=0x0200)["ax"] >> 8 & 0x80
    b.machine.serial.feed(b"Z")
    assert b.call(0x14, ax=0x0200)["ax"] == 0x005A
    assert b.call(0x14, ax=0x0300, dx=1)["ax"] >> 8 == 0x80
    assert b.call(0x17, ax=0x0200)["ax"] >> 8 == 0x90
    assert b.call(0x17, ax=0x0200, dx=1)["ax"] >> 8 == 1            # there is one
    b.call(0x17, ax=0x0041)
    assert b.machine.serial.ring.read(b.machine.serial.ring.end - 1, 1)[1] == b"A"
    assert b.call(0x11)["ax"] >> 14 == 1


@pytest.fixture
def overlay():
    fd = os.memfd_create("overlay")
    yield fd
    os.close(fd)


@pytest.mark.parametrize("kind", ["yes", "overlay"])
def test_a_write_is_read_back_and_reaches_the_image_only_where_it_may(bench, overlay, kind):
    b = bench(FLOPPY, **({"writable": True} if kind == "yes" else {"overlay_fd": overlay}))
    data = b"written " * 128
    b.memory.poke(0x10020, data)
    written = b.call(0x13, ax=0x0302, cx=0x0102, dx=0x0100, es=0x1000, bx=0x20)
    assert (written["ax"], written["carry"]) == (0x0002, 0)
    b.call(0x13, ax=0x0202, cx=0x0102, dx=0x0100, es=0x2000, bx=0)
    assert b.memory.read(0x20000, 1024) == data
    first = ((1 * 2 + 1) * 18 + 1) * 512
    kept = os.pread(b.fd, len(FLOPPY), 0)
    assert kept == (FLOPPY[:first] + data + FLOPPY[first + 1024:] if kind == "yes" else FLOPPY)
    assert (b.counts["fda_written_bytes"], b.counts["fda_writes"], b.counts["disk_written_bytes"]) == (1024, 1, 1024)


@pytest.mark.parametrize(("registers", "status"), [
    ({"ax": 0x0301, "cx": 0x5001}, 0x04), ({"ax": 0x0301, "cx": 0x0013}, 0x04), ({"ax": 0x0300, "cx": 0x0001}, 0x01),
    ({"ax": 0x0302, "cx": 0x4F12, "dx": 0x0100}, 0x04), ({"ax": 0x0301, "cx": 0x0001, "es": 0xFFFF, "bx": 0x10}, 0x09),
    ({"ax": 0x0501, "cx": 0x0001, "es": 0x3000}, 0x04), ({"ax": 0x1800, "cx": 0x4F0F}, 0x0C),
])
def test_what_cannot_be_written_is_refused_with_its_status_and_changes_nothing(bench, registers, status):
    b = bench(FLOPPY, 1 << 20, writable=True)
    answer = b.call(0x13, **registers)
    assert (answer["ax"] >> 8, answer["carry"]) == (status, 1)
    assert os.pread(b.fd, len(FLOPPY) + 1, 0) == FLOPPY


def test_what_the_host_cannot_write_is_a_write_fault_and_is_counted(bench):
    b = bench(FLOPPY, writable=True)
    read_only = os.open(f"/proc/self/fd/{b.fd}", os.O_RDONLY)
    saved = os.dup(b.fd)
    os.dup2(read_only, b.fd)
    try:
        answer = b.call(0x13, ax=0x0301, cx=0x0001)
    finally:
        os.dup2(saved, b.fd)
        os.close(saved)
        os.close(read_only)
    assert (answer["ax"], answer["carry"]) == (0xCC00, 1)
    assert b.counts["fda_errors"] == 1


def test_a_track_is_formatted_as_its_address_fields_say(bench):
    b = bench(FLOPPY, writable=True)
    assert b.call(0x13, ax=0x1800, cx=0x4F12)["carry"] == 0
    b.memory.poke(0x10000, b"".join(bytes((3, 1, n, 2)) for n in range(1, 19)))
    assert b.call(0x13, ax=0x0512, cx=0x0301, dx=0x0100, es=0x1000)["carry"] == 0
    first = (3 * 2 + 1) * 18 * 512
    assert os.pread(b.fd, len(FLOPPY), 0) == FLOPPY[:first] + b"\xF6" * 9216 + FLOPPY[first + 9216:]


def test_a_hard_disk_is_written_by_block_address_and_not_formatted(bench):
    b = bench(bytes(4 << 20), writable=True)
    b.memory.poke(0x20010, b"block" * 205)
    packet = struct.pack("<BBHHHQ", 16, 0, 2, 0x10, 0x2000, 7777)
    b.memory.poke(0x5000, packet)
    assert b.call(0x13, ax=0x4300, dx=0x80, ds=0x500)["carry"] == 0
    assert os.pread(b.fd, 1024, 7777 * 512) == (b"block" * 205)[:1024]
    assert b.call(0x13, ax=0x4400, dx=0x80, ds=0x500)["carry"] == 0
    assert b.call(0x13, ax=0x4700, dx=0x80, ds=0x500)["carry"] == 0
    assert b.call(0x13, ax=0x4303, dx=0x80, ds=0x500)["ax"] >> 8 == 0x01
    b.memory.poke(0x5000, struct.pack("<BBHHHQ", 16, 0, 2, 0x10, 0x2000, 8191))
    assert b.call(0x13, ax=0x4300, dx=0x80, ds=0x500)["ax"] >> 8 == 0x04
    assert b.memory.u16(0x5002) == 0
    assert b.call(0x13, ax=0x0501, dx=0x80)["ax"] >> 8 == 0x01


def test_two_floppies_and_a_hard_disk_are_drives_of_their_own(bench):
    second, hard = (os.memfd_create(name) for name in ("second", "hard"))
    try:
        os.write(second, b"B" * 368_640)
        os.write(hard, b"C" * (8 << 20))
        b = bench(FLOPPY, 2 << 20, Disk(second, name="fdb"), Disk(hard, name="hda", writable=True))
        for drive, letter in ((0x01, b"B"), (0x80, b"C")):
            assert b.call(0x13, ax=0x0201, cx=0x0001, dx=drive, es=0x1000)["carry"] == 0
            assert b.memory.read(0x10000, 512) == letter * 512
        assert b.call(0x13, ax=0x0301, cx=0x0001, dx=0x01)["ax"] >> 8 == 0x03
        assert b.call(0x13, ax=0x0301, cx=0x0001, dx=0x80)["carry"] == 0
        assert b.call(0x11)["ax"] & 0xC1 == 0x41                    # two floppy drives
        assert b.memory.u8(0x475) == 1
        for drive, count in ((0x00, 2), (0x01, 2), (0x80, 1)):
            assert b.call(0x13, ax=0x0800, dx=drive)["dx"] & 0xFF == count
        assert b.call(0x13, ax=0x0800, dx=0x81)["carry"] == 1
        b.machine.port_out(0x70, 1, 0x10)
        assert b.machine.port_in(0x71, 1) == 0x41                   # 1.44 MB and 360 KB
        offset, segment = struct.unpack("<HH", b.memory.read(0x41 * 4, 4))
        table = b.memory.read((segment << 4) + offset, 16)
        assert struct.unpack_from("<HB", table) == (17, 16)
        assert table[14] == 63
    finally:
        os.close(second)
        os.close(hard)
