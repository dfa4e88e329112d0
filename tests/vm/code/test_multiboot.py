"""What the file of a Multiboot 1 kernel says, and what damaged and hostile ones are told."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixvisor.vm.code.multiboot import PARTS_MAX, SEARCH, Kernel, MultibootError, find_header, parse, requirement

CODE = b"\xFA\xF4".ljust(32, b"\x90")


def header(flags: int = 0, *fields: int) -> bytes:
    return struct.pack(f"<{3 + len(fields)}I", 0x1BAD_B002, flags, -(0x1BAD_B002 + flags) & 0xFFFF_FFFF, *fields)


def elf(*segments: tuple[int, int, int, int, int], entry: int = 0x10_000C, flags: int = 0,
        **changes: int) -> bytes:
    """segments: (virtual, physical, offset, bytes in the file, bytes in memory)."""
    parts = segments or ((0x10_0000, 0x10_0000, 0x1000, 44, 0x2000),)
    values = {"wide": 1, "machine": 3, "headers": 52, "each": 32, "count": len(parts), **changes}
    head = struct.pack("<4sBBB9xHHIIIIIHHHHHH", b"\x7FELF", values["wide"], 1, 1, 2, values["machine"], 1, entry,
                       values["headers"], 0, 0, 52, values["each"], values["count"], 0, 0, 0)
    for virtual, physical, offset, length, memory in parts:
        head += struct.pack("<8I", 1, offset, virtual, physical, length, memory, 7, 0x1000)
    return head.ljust(0x1000, b"\0") + header(flags) + CODE


def kludge(at: int = 16, load: int = 0x20_0000, load_end: int = 0, bss_end: int = 0, entry: int | None = None,
           where: int | None = None) -> bytes:
    entry = load + at + 32 if entry is None else entry
    return bytes(at) + header(1 << 16, load + at if where is None else where, load, load_end, bss_end, entry) + CODE


def kernel_of(data: bytes) -> Kernel:
    return parse(lambda offset, length: data[offset:offset + length], len(data))


def test_an_elf_kernel_has_its_segments_with_zeros_behind_them():
    kernel = kernel_of(elf())
    [part] = kernel.parts
    assert (kernel.entry, part.address, part.offset, part.file_bytes, part.memory_bytes) == (
        0x10_000C, 0x10_0000, 0x1000, 44, 0x2000)


def test_the_entry_of_a_kernel_that_is_linked_high_is_translated():
    kernel = kernel_of(elf((0xC010_0000, 0x10_0000, 0x1000, 44, 44), entry=0xC010_000C))
    assert kernel.entry == 0x10_000C


def test_segments_without_memory_are_no_parts_and_parts_are_in_order():
    kernel = kernel_of(elf((0x40_0000, 0x40_0000, 0x1000, 44, 44), (0, 0, 0, 0, 0),
                           (0x10_0000, 0x10_0000, 0, 0, 64), entry=0x40_000C))
    assert [part.address for part in kernel.parts] == [0x10_0000, 0x40_0000]


def test_the_addresses_of_the_header_are_taken_where_it_gives_them():
    [part] = kernel_of(kludge(bss_end=0x20_1000)).parts
    assert (part.address, part.offset, part.file_bytes, part.memory_bytes) == (0x20_0000, 0, 80, 0x1000)
    [part] = kernel_of(kludge(load=0x10_0004, where=0x10_0004, entry=0x10_0024)).parts
    assert (part.address, part.offset, part.file_bytes) == (0x10_0004, 16, 64)


def test_a_header_is_found_on_its_alignment_and_within_the_first_8_kib():
    assert find_header(bytes(SEARCH - 12) + header()) == SEARCH - 12
    assert find_header(bytes(SEARCH - 8) + header()) is None
    assert find_header(bytes(2) + header() + bytes(100)) is None
    assert find_header(bytes(2) + header()[:4] + bytes(2) + header(3)) == 8
    assert find_header(header()[:8] + bytes(4) + header(1)) == 12


def test_only_features_that_nobody_defined_are_refused_and_named():
    assert requirement(0x7) is None
    assert requirement(0xFFFF_0000) is None
    assert "bits 3, 15" in str(requirement(0x8009))


@pytest.mark.parametrize(("data", "says"), [
    (b"", "no multiboot kernel"),
    (header(), "no ELF file"),
    (b"\x7FELF" + header(), "cut off"),
    (kludge()[:40], "header is cut off"),
    (kludge(where=0x30_0000), "of a file of 80"),
    (kludge(load_end=0x20_1000), "of a file of 80"),
    (kludge(bss_end=0x20_0010), "before the end"),
    (kludge(entry=0x20_0100), "outside of what it loads"),
    (kludge(load=0xFFFF_FFF0, where=0xFFFF_FFF0, entry=0xFFFF_FFF8), "beyond 4 GiB"),
    (elf(wide=2), "64-bit ELF file"),
    (elf(machine=40), "another processor"),
    (elf(each=56), "56 bytes each"),
    (elf(count=0xFFFF), "65535 program headers"),
    (elf(headers=0x2000), "headers are cut off"),
    (elf()[:0x1020], "outside the file"),
    (elf((0, 0x10_0000, 0x1000, 44, 40)), "44 bytes in the file and 40 in memory"),
    (elf((0, 0xFFFF_F000, 0x1000, 44, 0x2000)), "beyond 4 GiB"),
    (elf((0, 0x10_0000, 0x1000, 44, 0x2000), (0, 0x10_1000, 0x1000, 4, 4)), "overlap: 0x100000 to 0x101fff and"),
    (elf(*((number, number * 64, 0x1000, 1, 1) for number in range(PARTS_MAX + 1)),), "more than 128 segments"),
    (elf(entry=0x10_0000 + 44), "none of its segments"),
])
def test_a_kernel_that_cannot_be_booted_says_why(data, says):
    with pytest.raises(MultibootError, match=says):
        kernel_of(data)


@settings(max_examples=300, deadline=None)
@given(which=st.sampled_from((elf(), kludge(), elf((0xC010_0000, 0x10_0000, 0x1000, 44, 44), entry=0xC010_000C))),
       changes=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=8),
       words=st.lists(st.tuples(st.integers(0, 30), st.sampled_from((0, 1, 0x7FFF_FFFF, 0xFFFF_FFFF, 0x10_0000))),
                      max_size=4),
       cut=st.integers(0, 0x1030))
def test_a_damaged_kernel_is_refused_or_lies_within_its_file_and_4_gib(which, changes, words, cut):
    data = bytearray(which)
    for at, value in words:
        struct.pack_into("<I", data, min(4 * at, len(data) - 4), value)
    for at, value in changes:
        data[at % len(data)] = value
    data = data[:len(data) - cut]
    try:
        kernel = kernel_of(bytes(data))
    except MultibootError:
        return
    before = 0
    for part in kernel.parts:
        assert before <= part.address < part.end <= 1 << 32
        assert 0 <= part.offset <= part.offset + part.file_bytes <= len(data)
        assert part.file_bytes <= part.memory_bytes
        before = part.end
    assert any(part.address <= kernel.entry < part.address + part.file_bytes for part in kernel.parts)
