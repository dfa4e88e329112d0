"""Hostile guests: each has a defined fate, the same on both engines where the host allows."""

from __future__ import annotations

import base64
import time

import pytest

from mixvisor.vm.worker import process
from mixvisor.vm.worker.devices.serial import BURST_BYTES, RATE_BYTES_PER_S
from mixvisor.vm.worker.protocol import SERIAL_RING_BYTES
from mixvisor.vm.worker.status import Phase

# In protected mode without an IDT any fault is three faults. 32 bits, at 10000h: ud2
TRIPLE_32 = b"\x0F\x0B"
# 64 bits, ring 0: ud2 with an empty IDT
TRIPLE_64 = b"\x0F\x0B"
# 64 bits, ring 0: popcnt rax, rax; then exit port 5
POPCNT = bytes.fromhex("F3480FB8C0 B005 E6F4 EBFE")
# mov dx,3F8h; again: out dx,al; jmp again
FLOOD = bytes.fromhex("BAF803 EE EBFD")
# 32 bits: every dword from 20000h up to 256 MiB, then exit 9.
# mov edi,20000h; mov ecx,(10000000h-20000h)/1000h; L: mov [edi],ecx; add edi,1000h; loop L
WRITE_ALL = bytes.fromhex("BF00000200 B9E0FF0000 890F 81C700100000 E2F6 B009 E6F4 EBFE")
# 16 bits: jump to the reset vector's end and beyond: jmp FFFFh:FFFFh is past 1 MiB
# 32 bits: jmp to 0x40000000, where no memory is
JUMP_AWAY = bytes.fromhex("B800000040 FFE0")


def test_a_triple_fault_is_a_crash_that_names_the_instruction(start, engine):
    worker = start(engine, TRIPLE_32, bits=32)
    ended = worker.event("ended")
    assert (ended["fate"], ended["code"]) == ("crashed", "triple-fault")
    assert ended["instruction"] == "ud2"
    assert ended["registers"]["rip"] == 0x10000
    assert worker.wait() == 0


def test_a_triple_fault_in_long_mode_is_a_crash_too(start, engine):
    ended = start(engine, TRIPLE_64, bits=64).event("ended")
    assert (ended["fate"], ended["code"], ended["instruction"]) == (
        "crashed", "triple-fault", "ud2")


def test_an_instruction_that_the_hosts_kvm_cannot_run_is_the_hosts_limit(start, engine):
    ended = start(engine, POPCNT, bits=64).event("ended")
    if ended["fate"] == "stopped":                        # software, VT-x and AMD-V run it
        assert ended["exit_code"] == 5
    else:
        assert engine == "kvm"
        assert ended["code"] == "host-limit"
        assert "popcnt" in ended["instruction"]
        assert "host" in ended["reason"]


def test_execution_outside_memory_is_a_crash(start, engine):
    ended = start(engine, JUMP_AWAY, bits=32).event("ended")
    assert ended["fate"] == "crashed"
    assert ended["code"] in ("guest-error", "triple-fault", "host-limit")
    assert ended["reason"]


def test_a_flood_of_output_is_throttled_bounded_and_counted(start, engine):
    worker = start(engine, FLOOD)
    begun = time.monotonic()
    status = worker.status
    worker.until(lambda: status.get("serial_bytes") >= BURST_BYTES and (
        status.get("serial_dropped_bytes") > 0 or engine == "kvm"))
    answer = worker.ask("serial", offset=0)
    elapsed = time.monotonic() - begun
    assert status.get("serial_bytes") <= BURST_BYTES + (elapsed + 1) * RATE_BYTES_PER_S
    assert answer["end"] - answer["offset"] == SERIAL_RING_BYTES
    assert len(base64.b64decode(answer["data"])) <= 48 * 1024
    assert worker.ask("stop")["ok"]
    assert worker.event("ended")["code"] == "asked"


def test_writing_everywhere_reaches_only_its_own_memory(start, engine):
    worker = start(engine, WRITE_ALL, bits=32)
    ended = worker.event("ended")
    assert (ended["fate"], ended["exit_code"]) == ("stopped", 9)
    assert int.from_bytes(worker.memory[0x1FF000:0x1FF004], "little") == 0xFFE0 - (0x1FF - 0x20)


@pytest.mark.parametrize("image", [
    # es:bx beyond memory, every BIOS service with every AH: mov ax,0FFFFh; mov es,ax; ...
    # L: int 10h; int 13h; int 15h; int 1Ah; inc ah; jnz L; exit 3
    bytes.fromhex("B8FFFF 8EC0 8ED8 31C0 89C3 BBFFFF BAFFFF B9FFFF 89CF 89CE 89CD"
                  "50 CD10 58 50 CD13 58 50 CD15 58 50 CD1A 58 50 CD14 58 FEC4 75E8 B003 E6F4 EBFE"),
])
def test_bios_calls_with_absurd_registers_do_no_harm(start, engine, image):
    worker = start(engine, image, boot="disk", memory_bytes=1 << 20)
    deadline = time.monotonic() + 60
    # AH=86h waits for an hour and more: that guest is asleep, and stops when asked.
    # Read once a round: the guest wakes for a moment at each tick of its timer.
    while (phase := worker.status.get("phase")) not in (Phase.SLEEPING, Phase.ENDED):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    if phase == Phase.SLEEPING:
        assert worker.ask("stop")["ok"]
    assert worker.event("ended")["fate"] == "stopped"


def test_the_stack_at_the_end_of_memory_does_not_hurt_the_bios(start, engine):
    # mov ax,0FFFFh; mov ss,ax; mov sp,0; int 12h; exit 4: the frame lies beyond 1 MiB
    image = bytes.fromhex("B8FFFF 8ED0 BC0000 CD12 B004 E6F4 EBFE")
    worker = start(engine, image, boot="disk", memory_bytes=1 << 20)
    worker.event("started")
    # The return address was written nowhere: where the guest goes is its own affair. The worker
    # answers all the same, or has told how it ended.
    worker.link.settimeout(5)
    try:
        worker.ask("stop")
    except (AssertionError, OSError):
        assert worker.events
    ended = worker.event("ended")
    assert ended["fate"] in ("stopped", "crashed")


def test_a_guest_that_calls_everything_gets_a_bounded_answer_about_its_calls(start):
    # mov ah,0; L: int 80h; inc ah; jnz L; inc byte [L + 1]; jnz L; jmp $: 32768 kinds of call
    image = bytes.fromhex("B400 CD80 FEC4 75FA FE06037C 75F4 EBFE")
    worker = start("software", image, boot="disk", memory_bytes=1 << 20)
    worker.until(lambda: worker.status.get("bios_calls") == 128 * 256)
    answer = worker.ask("calls", trace_from=0)
    assert len(answer["calls"]) == process.CALLS_LIMIT
    assert len(answer["trace"]) == process.TRACE_CHUNK
    assert worker.ask("stop")["ok"]


def test_a_vm_too_small_for_a_screen_ends_with_its_last_words(start):
    # cli; hlt
    ended = start("software", b"\xFA\xF4", memory_bytes=128 << 10).event("ended")
    assert ended["code"] == "halted"
    assert "screen" not in ended
    assert ended["serial"]["end"] == 0
