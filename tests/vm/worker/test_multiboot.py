"""Multiboot kernels in guest memory, and booted on both engines."""

from __future__ import annotations

import base64
import mmap
import os
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixvisor.vm.engines.base import RAX, RBX, RSP
from mixvisor.vm.worker.multiboot import AVOIDED, HOLE, BootError, Module, boot

# At 10000Ch: checks EAX, prints the loader's name, the command line, each module's line and bytes; exits with 0.
TELLS = bytes.fromhex(
    "3d02b0ad2b753ebaf80300008b7340e8360000008b7310e82e0000008b4b148b6b18e31c8b7508e81e0000008b7d003b7d0474068a07ee47ebf5"
    "83c51049ebe231c0e6f4f4b001e6f4f4ac84c07403eeebf8b00aeec3")


def header(flags: int = 0, *fields: int) -> bytes:
    return struct.pack(f"<{3 + len(fields)}I", 0x1BAD_B002, flags, -(0x1BAD_B002 + flags) & 0xFFFF_FFFF, *fields)


def elf(code: bytes = TELLS, address: int = 0x10_0000, memory: int = 0x2000, flags: int = 0) -> bytes:
    length = 12 + len(code)
    return (struct.pack("<4sBBB9xHHIIIIIHHHHHH", b"\x7FELF", 1, 1, 1, 2, 3, 1, address + 12, 52, 0, 0, 52, 32, 1,
                        0, 0, 0)
            + struct.pack("<8I", 1, 0x1000, 0xC000_0000, address, length, memory, 7, 0x1000)
            ).ljust(0x1000, b"\0") + header(flags) + code


def flat(code: bytes = TELLS, load: int = 0x10_0000) -> bytes:
    """In the form without ELF; the code runs anywhere."""
    return header(1 << 16, load, load, 0, load + 0x2000, load + 32) + code


class Info:
    """The information that a booted kernel finds."""

    def __init__(self, memory: mmap.mmap, state) -> None:
        self.memory, self.at = memory, state.gpr[RBX]
        assert state.gpr[RAX] == 0x2BAD_B002
        self.flags = self.word(0)

    def word(self, offset: int) -> int:
        return struct.unpack_from("<I", self.memory, self.at + offset)[0]

    def text(self, address: int) -> str:
        return self.memory[address:self.memory.find(b"\0", address)].decode()

    def modules(self) -> list[tuple[bytes, str]]:
        found = []
        for number in range(self.word(20)):
            start, end, text, _ = struct.unpack_from("<4I", self.memory, self.word(24) + 16 * number)
            found.append((self.memory[start:end], self.text(text)))
        return found

    def map(self) -> list[tuple[int, int, int]]:
        entries, at = [], self.word(48)
        while at < self.word(48) + self.word(44):
            size, *entry = struct.unpack_from("<IQQI", self.memory, at)
            entries.append(tuple(entry))
            at += size + 4
        return entries


def test_a_kernel_is_told_its_memory_command_line_modules_and_screen(file):
    memory = mmap.mmap(-1, 4 << 20)
    modules = [Module(file(b"first" * 1000), "a.txt x=1"), Module(file(b""), "none"), Module(file(b"third"), "c")]
    info = Info(memory, boot(memory, file(elf()), "kernel.elf quiet", modules))
    assert info.flags == 0x124D
    assert (info.word(4), info.word(8)) == (639, 3 << 10)
    assert (info.text(info.word(16)), info.text(info.word(64))) == ("kernel.elf quiet", "Mixvisor")
    assert info.modules() == [(b"first" * 1000, "a.txt x=1"), (b"", "none"), (b"third", "c")]
    assert info.map() == [(0, 639 << 10, 1), (639 << 10, 1 << 10, 2), (0xF_0000, 0x1_0000, 2), (1 << 20, 3 << 20, 1)]
    assert struct.unpack_from("<QIIIBB", memory, info.at + 88) == (0xB_8000, 160, 80, 25, 16, 2)
    for number in range(3):
        assert struct.unpack_from("<I", memory, info.word(24) + 16 * number)[0] % 4096 == 0


def test_the_kernel_is_entered_in_flat_32_bit_mode_with_tables_that_work(file):
    memory = mmap.mmap(-1, 2 << 20)
    state = boot(memory, file(elf()), "k", [])
    assert memory[0x10_0000:0x10_0000 + 12 + len(TELLS)] == header() + TELLS
    assert (state.cr0, state.gpr[16], state.gpr[17]) == (0x11, 0x10_000C, 2)
    for segment, kind in ((state.cs, 11), (state.ds, 3), (state.ss, 3)):
        assert (segment.base, segment.limit, segment.type, segment.db) == (0, 0xFFFF_FFFF, kind, True)
    descriptor, = struct.unpack_from("<Q", memory, state.gdt.base + state.cs.selector)
    assert descriptor == 0x00CF_9B00_0000_FFFF
    assert state.gpr[RSP] % 16 == 0
    assert struct.unpack_from("<H3xH", memory, 0x40E) == (0x9FC0, 639)


@pytest.mark.parametrize(("address", "memory_bytes"), [
    (0x10_0000, 0x2000), (0x4000, 0xF000), (0x1_3000, 0x8_0000), (0x1000, 0x9_8000), (0x9_0000, 0xF000), (0, 0x500)])
def test_what_a_kernel_is_told_stays_clear_of_the_kernel_the_hole_and_real_mode_code(file, address, memory_bytes):
    memory = mmap.mmap(-1, 4 << 20)
    state = boot(memory, file(elf(address=address, memory=memory_bytes)), "k" * 3000, [Module(file(b"m"), "m" * 4000)])
    info = Info(memory, state)
    block = range(info.at, state.gpr[RSP])
    for other in (range(address, address + memory_bytes), AVOIDED, HOLE, range(0x500)):
        assert not (block.start < other.stop and other.start < block.stop)
    assert info.modules() == [(b"m", "m" * 4000)]


@pytest.mark.parametrize(("image", "kind", "says"), [
    (b"hello", "image", "no multiboot kernel"),
    (elf(flags=8), "image", "flag bits 3"),
    (elf(address=0x20_0000), "memory", "at least 3M"),
    (elf(address=0x9_F800), "image", "video memory"),
    (elf(memory=0x7FFF_0000), "memory", "at least 2049M"),
    (elf(address=0x500, memory=0x9F600), "image", "none"),
])
def test_a_kernel_that_cannot_be_booted_says_what_to_change_and_writes_nothing(file, image, kind, says):
    memory = mmap.mmap(-1, 2 << 20)
    if says == "none":
        boot(memory, file(image), "k", [])           # all of low memory is its own: the rest lies above 1 MiB
        return
    with pytest.raises(BootError, match=says) as caught:
        boot(memory, file(image), "k", [])
    assert caught.value.kind == kind
    assert memory[:] == bytes(2 << 20)


def test_modules_that_do_not_fit_are_refused_by_name(file):
    memory = mmap.mmap(-1, 2 << 20)
    big = os.memfd_create("big")
    os.ftruncate(big, 1 << 40)
    with pytest.raises(BootError, match=r"module big.bin of 1099511627776 bytes .* at least 1048578M"):
        boot(memory, file(elf()), "k", [Module(big, "big.bin x")])
    os.close(big)
    with pytest.raises(BootError, match="nothing is free"):
        boot(memory, file(elf(address=0x500, memory=0x9F600)), "k", [Module(file(bytes(0xF_FF00)), "m")])


@settings(max_examples=200, deadline=None)
@given(address=st.integers(0, 0x20_0000), length=st.integers(1, 0x20_0000), changes=st.lists(
    st.tuples(st.integers(0, 84), st.integers(0, 255)), max_size=6), module=st.integers(0, 0x10_0000))
def test_any_kernel_is_loaded_whole_or_refused_and_memory_left_alone(address, length, changes, module):
    data = bytearray(elf(address=address, memory=length))
    for at, value in changes:
        data[at] = value
    memory = mmap.mmap(-1, 2 << 20)
    image, other = os.memfd_create("image"), os.memfd_create("module")
    os.write(image, data)
    os.ftruncate(other, module)
    try:
        state = boot(memory, image, "k", [Module(other, "m")])
        assert Info(memory, state).text(Info(memory, state).word(16)) == "k"
    except BootError as error:
        said = str(error)
        assert memory[:] == bytes(2 << 20), said
    finally:
        os.close(image)
        os.close(other)
        memory.close()


@pytest.mark.parametrize("image", [elf(), flat(), elf(address=0x4000), elf(flags=7)],
                         ids=["elf", "flat", "low", "flags"])
def test_a_kernel_and_its_modules_run(start, engine, image):
    worker = start(engine, image, boot="multiboot", command_line="k.elf a b", modules=["env", "two x"],
                   module_files=[b"NR_CPUS=1\n", b"2"])
    ended = worker.event("ended")
    assert (ended["code"], ended["exit_code"]) == ("exit-port", 0), ended
    assert base64.b64decode(ended["serial"]["data"]) == b"Mixvisor\nk.elf a b\nenv\nNR_CPUS=1\ntwo x\n2"


@pytest.mark.parametrize(("image", "code"), [(b"\x7FELF", "image"), (elf(address=0x100_0000), "memory")])
def test_a_kernel_that_cannot_be_booted_fails_to_start(start, image, code):
    worker = start("software", image, boot="multiboot")
    failed = worker.event("failed")
    assert failed["code"] == code
    assert worker.wait() == 1
