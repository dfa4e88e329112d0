"""A real worker process over a real socket: its life, its requests, its endings."""

from __future__ import annotations

import base64
import os
import signal
import struct
import time
from pathlib import Path

import pytest

from mixvisor.vm.worker import process
from mixvisor.vm.worker.status import Phase

# 16-bit code, loaded and entered at 10000h (CS = 1000h, IP = 0).
SPIN = b"\xEB\xFE"
CLI_SPIN = b"\xFA\xEB\xFE"
EXIT_42 = bytes.fromhex("B02A E6F4 EBFE")                       # mov al,42; out F4h,al
CLI_HALT = b"\xFA\xF4"
# mov dx,3F8h; then each of "hi" out; then exit 0
SERIAL = bytes.fromhex("BAF803 B068 EE B069 EE B000 E6F4 EBFE")
# vector 08h to a handler (out 20h, 20h; iret), 8259 set up with only the timer open; sti;
# again: hlt; inc word [cs:100h]; jmp again
HALTING = bytes.fromhex("31c08ed8c70620002b008c0e2200b011e620b008e621b004e621b001"
                        "e621b0fee621fbf42eff060001ebf850b020e62058cf")
# boot sector: INT 1Ch counts at 0:600h, INT 09h keeps port 60h at 0:602h, counts at 0:603h and goes on to the
# BIOS; then INT 16h/00h, and the key's ASCII code to the exit port
HOOKS = bytes.fromhex(
    "fa31c08ed8c7067000297ca3720066a1240066a3417cc70624002f7cc70626000000fbb400cd16e6f42eff060006cf50e460"
    "2ea202062efe060306582eff2e417c00000000")
# boot sector: the timer at 1 kHz (count 1193), INT 08h counts at 0:600h (u32) and ends the interrupt; jmp $
KILOHERTZ = bytes.fromhex(
    "fa31c08ed8c70620001d7ca32200b034e643b0a9e640b004e640fbebfe502e66ff060006b020e62058cf")
STI_HALT = b"\xFB\xF4\xEB\xFD"
# echo: mov dx,3FDh; in al,dx; test al,1; jz; mov dx,3F8h; in al,dx; out dx,al; jmp
ECHO = bytes.fromhex("BAFD03 EC A801 74FB BAF803 EC EE EBF1")
# again: inc dword [cs:0200h]; jmp again
COUNT = bytes.fromhex("662EFF060002 EBF8")
# wait for a key by the BIOS, then out its ASCII code to the exit port
KEY_EXIT = bytes.fromhex("B400 CD16 E6F4 EBFE")


def serial_text(worker, offset=0):
    answer = worker.ask("serial", offset=offset)
    return base64.b64decode(answer["data"])


def test_the_exit_port_ends_the_vm_with_its_code(start, engine):
    worker = start(engine, EXIT_42)
    worker.event("started")
    ended = worker.event("ended")
    assert (ended["fate"], ended["code"], ended["exit_code"]) == ("stopped", "exit-port", 42)
    assert worker.wait() == 0
    assert worker.status.get("phase") == Phase.ENDED
    assert worker.status.get("started_ns") > 0


def test_a_final_halt_is_a_stop(start, engine):
    worker = start(engine, CLI_HALT)
    ended = worker.event("ended")
    assert (ended["fate"], ended["code"]) == ("stopped", "halted")
    assert ended["registers"]["rip"] == 2


def test_output_stays_until_asked_for(start, engine):
    worker = start(engine, ECHO)
    worker.event("started")
    assert worker.ask("serial-input", data=base64.b64encode(b"hello").decode())["accepted"] == 5
    worker.until(lambda: worker.status.get("serial_bytes") == 5)
    assert serial_text(worker) == b"hello"
    assert serial_text(worker, 3) == b"lo"
    answer = worker.ask("serial", offset=99)
    assert (answer["offset"], answer["end"], answer["dropped_bytes"]) == (5, 5, 0)


def test_stop_answers_a_guest_that_spins_with_interrupts_off(start, engine):
    worker = start(engine, CLI_SPIN)
    worker.until_phase(Phase.RUNNING)
    begun = time.monotonic()
    assert worker.ask("stop")["ok"]
    ended = worker.event("ended")
    assert time.monotonic() - begun < 1
    assert (ended["fate"], ended["code"]) == ("stopped", "asked")
    assert worker.wait() == 0


def test_a_paused_guest_makes_no_progress_and_resumes_where_it_was(start, engine):
    worker = start(engine, COUNT)

    def count():
        return int.from_bytes(worker.memory[0x10200:0x10204], "little")

    worker.until(lambda: count() > 1000)
    assert worker.ask("pause")["ok"]
    worker.until_phase(Phase.PAUSED)
    held = count()
    assert worker.ask("registers")["rip"] in (0, 6)
    assert count() == held
    assert worker.ask("resume")["ok"]
    worker.until(lambda: count() > held)


def test_a_worker_can_be_started_paused(start, engine):
    worker = start(engine, EXIT_42, started_paused=True)
    worker.event("started")
    worker.until_phase(Phase.PAUSED)
    assert worker.status.get("started_ns") == 0
    worker.ask("resume")
    assert worker.event("ended")["exit_code"] == 42


def test_stop_reaches_a_paused_guest(start, engine):
    worker = start(engine, SPIN, started_paused=True)
    worker.until_phase(Phase.PAUSED)
    worker.ask("stop")
    assert worker.event("ended")["code"] == "asked"


def test_halt_sleeps_until_the_timer_interrupts(start, engine):
    worker = start(engine, HALTING)
    worker.until(lambda: int.from_bytes(worker.memory[0x10100:0x10102], "little") >= 3)
    assert worker.status.get("sleeping_ns") > 50_000_000
    assert worker.status.get("interrupts") >= 3
    worker.until_phase(Phase.SLEEPING)


def test_halt_with_every_line_masked_sleeps_for_good_and_can_be_stopped(start, engine):
    worker = start(engine, STI_HALT)
    worker.until_phase(Phase.SLEEPING)
    assert worker.ask("keys", scancodes=[[0x1E, 0x61]])["accepted"] == 1
    assert worker.status.get("interrupts") == 0
    assert worker.status.get("phase") == Phase.SLEEPING
    assert worker.ask("stop")["ok"]
    assert worker.event("ended")["code"] == "asked"


def test_a_guest_that_awaits_a_key_sleeps_and_can_be_paused_meanwhile(start, engine):
    worker = start(engine, KEY_EXIT, boot="disk")
    worker.until_phase(Phase.SLEEPING)
    assert worker.ask("calls")["calls"] == [[0x16, 0, 1]]
    worker.ask("pause")
    worker.until_phase(Phase.PAUSED)
    worker.press("k")
    assert worker.status.get("phase") == Phase.PAUSED
    worker.ask("resume")
    assert worker.event("ended")["exit_code"] == ord("k")


def test_a_program_that_hooks_the_tick_and_the_keyboard_is_served_while_it_awaits_a_key(start, engine):
    worker = start(engine, HOOKS, boot="disk")
    worker.until(lambda: worker.memory[0x600] >= 3)
    assert worker.ask("calls")["calls"] == [[0x16, 0, 1]]        # one call, however often it was interrupted
    worker.press("k")
    assert worker.event("ended")["exit_code"] == ord("k")
    # Its own handler saw the code first; whether also that of letting go depends on who was faster.
    assert worker.memory[0x602] in (0x25, 0xA5)
    assert worker.memory[0x603] >= 1


def test_a_kilohertz_timer_ticks_for_a_guest_that_computes(start, engine):
    worker = start(engine, KILOHERTZ, boot="disk")
    status = worker.status
    worker.until(lambda: int.from_bytes(worker.memory[0x600:0x604], "little") >= 500)
    assert status.get("interrupts") >= 500
    assert worker.ask("stop")["ok"]
    assert worker.event("ended")["code"] == "asked"
    assert int.from_bytes(worker.memory[0x600:0x604], "little") <= status.get("interrupts")


def test_the_bios_clock_word_moves_for_a_guest_that_calls_nobody(start, engine):
    worker = start(engine, SPIN, boot="disk")
    worker.until_phase(Phase.RUNNING)
    first = worker.memory[0x46C:0x470]
    worker.until(lambda: worker.memory[0x46C:0x470] != first)


def test_no_request_is_lost_when_they_come_in_a_storm(start, engine):
    worker = start(engine, COUNT)
    worker.event("started")
    for _ in range(300):
        assert worker.ask("calls")["ok"]
        worker.kick()


def test_a_storm_of_kicks_counts_nothing_twice(start, engine):
    # 100000 times: inc dword [cs:200h], exit 7 at the end. mov ecx,n; L: inc; dec ecx; jnz L
    image = bytes.fromhex("66B9A0860100 662EFF060002 6649 75F6 B007 E6F4 EBFE")
    worker = start(engine, image, started_paused=True)
    worker.until_phase(Phase.PAUSED)
    worker.ask("resume")
    worker.link.setblocking(False)
    while True:
        worker.kick()
        try:
            packet = worker.link.recv(4096)
        except BlockingIOError:
            continue
        if b"ended" in packet:
            break
    assert int.from_bytes(worker.memory[0x10200:0x10204], "little") == 100_000


def test_unknown_and_malformed_requests_are_answered_with_an_error(start):
    worker = start("software", SPIN)
    for arguments in ({"op": "dance"}, {"op": "keys"}, {"op": "keys", "scancodes": [["x"]]},
                      {"op": "keys", "scancodes": 7}, {"op": "serial", "offset": "first"},
                      {"op": "serial-input", "data": "!"}):
        answer = worker.ask(**arguments)
        assert answer["ok"] is False
        assert answer["error"]
    worker.link.send(b"not json")
    worker.link.send(b'["a list"]')
    worker.link.send(b'{"op": "pause"}')
    assert worker.ask("calls")["ok"]
    worker.until_phase(Phase.RUNNING)


@pytest.mark.parametrize("sleeping", [True, False])
def test_a_worker_leaves_when_its_supervisor_is_gone(start, engine, sleeping):
    worker = start(engine, KEY_EXIT if sleeping else SPIN, boot="disk")
    worker.until_phase(Phase.SLEEPING if sleeping else Phase.RUNNING)
    worker.link.close()                 # nobody is left who could kick it: the kernel does
    assert worker.wait() == 2


def test_a_machine_that_fits_no_text_screen_says_so(start, engine):
    worker = start(engine, SPIN, memory_bytes=256 << 10)
    answer = worker.ask("screen")
    assert answer["ok"] is False
    assert "no text screen" in answer["error"]


def test_pokes_are_there_before_the_first_instruction(start, engine):
    # mov al,[cs:300h]; out F4h,al
    worker = start(engine, bytes.fromhex("2EA00003 E6F4 EBFE"), pokes=[(0x10300, 99)])
    assert worker.event("ended")["exit_code"] == 99


@pytest.mark.parametrize(("fields", "image", "code"), [
    ({"memory_bytes": 128 << 10, "load": 0x1F000}, bytes(8192), "memory"),
    ({"load": 1 << 40}, b"x", "memory"),
    ({"boot": "disk", "memory_bytes": 512 << 10}, b"x", "memory"),
    ({"boot": "disk"}, b"", "image"),
    ({"pokes": [(1 << 30, 1)]}, b"x", "memory"),
    ({"builtin": "no-such-guest"}, None, "image"),
])
def test_what_cannot_start_says_why_and_leaves(start, fields, image, code):
    worker = start("software", image, **fields)
    failed = worker.event("failed")
    assert (failed["fate"], failed["code"]) == ("failed", code)
    assert failed["error"]
    assert worker.wait() == 1


def test_kill_ends_a_spinning_worker(start, engine):
    worker = start(engine, CLI_SPIN)
    worker.until_phase(Phase.RUNNING)
    os.kill(worker.pid, signal.SIGKILL)
    assert worker.wait() == -signal.SIGKILL


def test_the_thread_keeps_readable_accounts_for_the_scheduler(start, engine):
    worker = start(engine, SPIN)
    worker.until_phase(Phase.RUNNING)

    def ran():
        return int(Path(f"/proc/{worker.pid}/task/{worker.pid}/schedstat").read_text().split()[0])

    before = ran()
    worker.until(lambda: ran() > before + 1_000_000)
    # The kernel's own helper of a KVM VM (kvm-nx-lpage-recovery) is listed among its threads.
    names = {Path(f"/proc/{worker.pid}/task/{tid}/comm").read_text()[:4]
             for tid in os.listdir(f"/proc/{worker.pid}/task") if int(tid) != worker.pid}
    assert names <= {"kvm-"}, "more threads than a vCPU"


def test_exits_are_counted_by_kind_and_timed(start, engine):
    worker = start(engine, SERIAL)
    worker.event("ended")
    assert worker.status.exits[1] >= 3                   # port writes
    assert worker.status.get("serial_bytes") == 2
    assert 0 < worker.status.get("exit_handling_ns") < 10**9


@pytest.mark.parametrize("name", ["hello", "alu"])
def test_built_in_guests_run(start, engine, name):
    from mixvisor.vm import guests
    guest = guests.BUILTIN[name]
    worker = start(engine, builtin=name, bits=guest.bits, load=guest.load, entry=guest.entry)
    worker.event("started")
    if name == "hello":
        ended = worker.event("ended")
        assert ended["fate"] == "stopped"
        assert worker.status.get("serial_bytes") > 0
    else:
        worker.until_phase(Phase.RUNNING)
        assert worker.ask("stop")["ok"]


def test_workers_run_when_forked_from_a_process_that_has_warmed_up(start, engine):
    process.warm()
    assert os.listdir("/proc/self/task") == [str(os.getpid())], "forking with threads is unsafe"
    assert start(engine, EXIT_42).event("ended")["exit_code"] == 42


@pytest.mark.parametrize("checked", [False, True])
def test_a_write_to_a_read_only_segment_is_seen_where_the_vm_asks_for_it(start, checked):
    # 32 bits: its own GDT, whose second data segment is read-only; mov ds, 18h; mov [20000h], al; then port F4h: 0.
    # Vector 13's gate leads to `mov al, 7; out F4h, al`.
    gdt = struct.pack("<4Q", 0, 0xCF9B000000FFFF, 0xCF93000000FFFF, 0xCF91000000FFFF)
    code = bytes.fromhex("0f0115 00010100 0f011d 10010100 66b81800 8ed8 a200000200 b000 e6f4 ebfe").ljust(0x80, b"\x90")
    handler = bytes.fromhex("b007 e6f4 ebfe").ljust(0x80, b"\x90")
    tables = struct.pack("<HI10xHI", 31, 0x10200, 0x7F, 0x10300).ljust(0x100, b"\0")
    gate = struct.pack("<HHBBH", 0x0080, 8, 0, 0x8E, 1)
    image = code + handler + tables + gdt.ljust(0x100, b"\0") + bytes(13 * 8) + gate
    worker = start("software", image, bits=32, check_accesses=checked)
    ended = worker.event("ended")
    assert ended["code"] == "exit-port"
    assert ended["exit_code"] == (7 if checked else 0)
