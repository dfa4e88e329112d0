"""ROM images in place of a BIOS: the reset vector, both places of the ROM, POST codes, printer ports."""

from __future__ import annotations

import base64
import os

import pytest

from mixvisor.vm.worker.devices.parallel import PRINTER_PORTS, Parallel

RESET = 0xFFF0


def rom(code: str, *, size: int = 0x10000, reset: str = "EA000000F0") -> bytes:
    """Code (hex) at the start of the last 64 KiB, or of the whole where it is less, a far jump to it at the end."""
    image = bytearray(b"\xFF" * size)
    start = max(0, size - 0x10000)
    image[start:start + len(bytes.fromhex(code))] = bytes.fromhex(code)
    image[-16:-16 + len(bytes.fromhex(reset))] = bytes.fromhex(reset)
    return bytes(image)


def started(start, engine, image, **fields):
    return start(engine, image, boot="rom", **{"post_ports": [0x80, 0x190], **fields})


# mov al,1; out 80,al; out 80,al; mov dx,190; mov al,2; out dx,al; mov al,FF; out dx,al; cli; hlt
POSTS = "B001 E680 E680 BA9001 B002 EE B0FF EE FA F4"


def test_a_rom_runs_from_the_reset_vector_and_its_post_codes_are_told(start, engine):
    ended = started(start, engine, rom(POSTS)).event("ended")
    assert (ended["fate"], ended["code"]) == ("stopped", "halted")
    assert ended["reason"] == "the guest halted with interrupts off after POST code FFh"
    assert ended["report"]["post"] == [1, 2, 0xFF]
    assert ended["registers"]["cs"] == 0xF000


def test_the_port_of_post_codes_can_be_another_one_that_does_something_itself(start, engine):
    # mov dx,3F8; mov al,41; out dx,al; out 80,al; cli; hlt
    ended = started(start, engine, rom("BAF803 B041 EE E680 FA F4"), post_ports=[0x3F8]).event("ended")
    assert ended["report"]["post"] == [0x41]
    assert base64.b64decode(ended["serial"]["data"]) == b"A"


def test_the_reset_vector_is_at_the_top_of_4_gib_and_code_runs_there(start, engine):
    # At FFFFFFF0: in al,E9; out F4,al. No jump: CS still has its base.
    ended = started(start, engine, rom("", reset="E4E9 E6F4 FAF4")).event("ended")
    assert (ended["code"], ended["exit_code"]) == ("exit-port", 0xE9)


@pytest.mark.parametrize("size", [0x2000, 0x20000, 0x40000])
def test_roms_of_other_sizes_end_at_1_mib_and_at_4_gib(start, engine, size):
    # jmp F000:(start of the last 64 KiB or of the ROM)
    offset = 0x10000 - min(size, 0x10000)
    reset = f"EA{offset & 0xFF:02X}{offset >> 8:02X}00F0"
    ended = started(start, engine, rom("B007 E6F4", size=size, reset=reset)).event("ended")
    assert ended["exit_code"] == 7


@pytest.mark.parametrize(("size", "memory", "words"), [
    (0x10001, 2 << 20, "whole pages"), (0x41000, 2 << 20, "at most 262144"), (0x10000, 512 << 10, "at least 1 MiB")])
def test_a_rom_that_cannot_be_mapped_is_refused_with_the_reason(start, engine, size, memory, words):
    failed = started(start, engine, bytes(size), memory_bytes=memory).event("failed")
    assert words in failed["reason"]


@pytest.mark.skipif(not os.path.exists("/usr/share/seabios/bios.bin"), reason="SeaBIOS (package seabios) is absent")
def test_seabios_comes_up_and_looks_for_something_to_boot(start):
    with open("/usr/share/seabios/bios.bin", "rb") as file:
        image = file.read()
    worker = started(start, "software", image, memory_bytes=16 << 20)

    def output() -> bytes:
        return base64.b64decode(worker.ask("serial", offset=0)["data"])

    worker.until(lambda: b"No bootable device" in output())
    assert b"SeaBIOS" in output()
    assert worker.ask("stop")["ok"]


@pytest.mark.parametrize("number", range(3))
def test_a_printer_prints_each_byte_once_strobed_or_not(number):
    printed = bytearray()
    ports = {port: (read, write) for port, read, write in Parallel(printed.append).ports()}
    data, status, control = (PRINTER_PORTS[number] + index for index in range(3))
    for byte in b"ab":
        ports[data][1](byte)
    assert ports[status][0]() & 0x88 == 0x88               # not busy, no error
    for byte in b"cd":
        ports[data][1](byte)
        for value in (0x0D, 0x0C):
            ports[control][1](value)
    assert bytes(printed) == b"abcd"
    assert ports[data][0]() == ord("d")
