"""Scanning: what is reached, under which mode it is counted, and that no bytes can do harm."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mixvisor.vm.code import scan as scanning
from mixvisor.vm.code.classes import Kind, classify
from mixvisor.vm.code.image import LIMIT, Image, ImageError, load, read_image
from mixvisor.vm.code.scan import SHOWN, scan


def sector(code: str) -> bytes:
    return bytes.fromhex(code).ljust(510, b"\0") + b"\x55\xAA"


# Real mode, LGDT, CR0.PE, far jump to 32 bits, PAE, EFER.LME, CR0.PG, far jump to 64 bits: SWAPGS, SYSCALL, CLI, HLT.
THREE_MODES = sector(
    "fa31c08ed80f0116787c0f20c00c010f22c0ea197c08000f0f66b810008ed80f20e083c8200f22e0b9800000c00f320d000100000f300f20c00d"
    "000000800f22c0ea4a7c00001800ffff0f01f80f05faf490909090909090"
    "0000000000000000ffff0000009bcf00ffff00000093cf00ffff0000009baf001f00587c0000")
# Copies itself to 1000:0000 and goes on there; prints a text that stands behind the call; jumps far through a pointer.
MOVED = sector(
    "31c08ed8be007cb800108ec031ffb90001f3a5ea18000010e81b00696e20616c2c2064782069732074657874008b1e47002eff2e49005eac5684"
    "c07407b40ecd105eebf3c30100020000006000")
# 32 bits at 1 MiB: a jump table of three, a pointer, and one jump that nobody can follow.
TABLE = bytes.fromhex("83f8037308ff248520001000eefaf40f010500000000ebf5ff152c001000ffe20c0010000f0010001800100030001000"
                      "9ccf78563412")


def families(report, mode=None):
    return {f.family: f.count for f in report.findings if mode is None or f.mode == mode}


def flat(code: str, bits=32, base=0x10000) -> Image:
    return read_image(bytes.fromhex(code), bits=bits, base=base)


# -- reachability ----------------------------------------------------------------------------


def test_the_way_from_real_mode_to_long_mode_is_followed_with_its_widths():
    report = scan(read_image(THREE_MODES))
    assert report.modes == {"real mode": 7, "16-bit protected mode": 1, "32-bit protected mode": 13,
                            "64-bit long mode": 4}
    assert [(step.mode, step.address) for step in report.entered] == [
        ("protected mode", 0x7C0F), ("32-bit protected mode", 0x7C12), ("long mode enabled", 0x7C34),
        ("paging, long mode", 0x7C3E), ("64-bit long mode", 0x7C41)]
    assert families(report, "64-bit long mode") == {"swapgs": 1, "cli": 1, "hlt": 1}
    assert families(report, "real mode") == {"cli": 1, "lgdt": 1, "mov cr0": 2, "mov segment": 1}
    assert report.undecodable == (0, [])                      # nothing behind the far jumps was taken for code


def test_code_that_moves_itself_is_followed_and_a_printed_text_is_no_code():
    report = scan(read_image(MOVED))
    assert families(report) == {"mov segment": 2, "int n": 1, "jmp far": 2}      # the text holds "in al, dx"
    assert report.total(Kind.IO) == 0
    assert report.outside == (1, [0x600])                     # 0060:0000, where it would have loaded something
    assert report.translated == report.instructions == 22


def test_jump_tables_and_pointers_are_followed_and_what_cannot_be_is_told():
    report = scan(read_image(TABLE, bits=32, base=0x10_0000))
    assert families(report) == {"out": 1, "cli": 1, "hlt": 1, "sgdt": 1, "pushf": 1, "iret": 1}
    assert report.indirect == (1, [0x10_001E])
    assert (report.traps, report.patches) == (3, 3)


def test_freedos_boot_sectors_are_followed_to_where_they_load_the_kernel(guests):
    for name in ("freedos-1.4M.img", "freedos-160K.img"):
        report = scan(load(guests / name), "pvm")
        assert report.outside == (1, [0x600])
        assert set(report.modes) == {"real mode"}
        assert families(report)["int n"] == 6
        assert (report.advice.mode, report.advice.rule) == ("software", "default")


def test_branches_that_meet_are_counted_once():
    # test eax, eax; jz over; nop; over: cli; jmp over
    assert scan(flat("85c0 7401 90 fa ebfd")).instructions == 5


@pytest.mark.parametrize(("code", "bits", "count"), [
    ("fa f4 eeeeeeee", 32, 2),                   # cli; hlt: the end
    ("f4 ee ebfc", 32, 3),                       # hlt with interrupts on goes on
    ("cd19 eeee", 16, 1),                        # the BIOS boots again
    ("0f0b eeee", 32, 1),
    ("c3 eeee", 32, 1),
])
def test_what_does_not_go_on_is_not_followed_on(code, bits, count):
    assert scan(flat(code, bits)).instructions == count


def test_real_mode_wraps_within_its_segment():
    # jmp back from offset 0 to FFFEh of the segment, where `jmp 0` stands
    code = bytearray(0x10000)
    code[:2], code[0xFFFE:] = b"\xEB\xFC", b"\xEB\x00"
    report = scan(read_image(bytes(code), bits=16, base=0x20000))
    assert (report.instructions, report.outside[0]) == (2, 0)


def test_the_scan_says_so_when_it_stops_at_its_limit(monkeypatch):
    monkeypatch.setattr(scanning, "LIMIT", 10)
    report = scan(flat("90" * 64 + "c3"))
    assert not report.complete
    assert report.instructions <= 10 + 32


# -- classes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "bits", "kind", "family"), [
    ("0f0100", 32, Kind.SENSITIVE, "sgdt"), ("0f0108", 32, Kind.SENSITIVE, "sidt"),
    ("0f00c0", 32, Kind.SENSITIVE, "sldt"),
    ("0f01e0", 32, Kind.SENSITIVE, "smsw"), ("0f00c8", 32, Kind.SENSITIVE, "str"), ("9c", 32, Kind.SENSITIVE, "pushf"),
    ("9d", 32, Kind.SENSITIVE, "popf"), ("0f02c0", 32, Kind.SENSITIVE, "lar"), ("0f03c0", 32, Kind.SENSITIVE, "lsl"),
    ("0f00e0", 32, Kind.SENSITIVE, "verr"), ("0f00e8", 32, Kind.SENSITIVE, "verw"),
    ("1e", 32, Kind.SENSITIVE, "push segment"), ("07", 32, Kind.SENSITIVE, "pop segment"),
    ("8cd8", 32, Kind.SENSITIVE, "mov segment"), ("8ed8", 32, Kind.SENSITIVE, "mov segment"),
    ("9a000000000800", 32, Kind.SENSITIVE, "call far"), ("ea000000000800", 32, Kind.SENSITIVE, "jmp far"),
    ("cb", 32, Kind.SENSITIVE, "ret far"), ("cd80", 32, Kind.SENSITIVE, "int n"), ("cf", 32, Kind.SENSITIVE, "iret"),
    ("0f22c0", 32, Kind.PRIVILEGED, "mov cr0"), ("0f23c0", 32, Kind.PRIVILEGED, "mov dr0"),
    ("0f30", 64, Kind.PRIVILEGED, "wrmsr"), ("fb", 16, Kind.PRIVILEGED, "sti"),
    ("6c", 32, Kind.IO, "ins"), ("f36f", 32, Kind.IO, "outs"), ("e460", 16, Kind.IO, "in"),
    ("e660", 16, Kind.IO, "out"),
    ("0fa2", 64, Kind.REVEALING, "cpuid"),
    ("63c0", 32, Kind.ESOTERIC, "arpl"), ("d6", 16, Kind.ESOTERIC, "salc"), ("0f05", 16, Kind.ESOTERIC, "loadall"),
    ("c8000001", 32, Kind.ESOTERIC, "enter nested"),
])
def test_an_instruction_is_of_its_class(code, bits, kind, family):
    [finding] = scan(flat(code + "0f0b", bits)).findings
    assert (finding.kind, finding.family, finding.count, finding.addresses) == (kind, family, 1, [0x10000])


@pytest.mark.parametrize("text", ["mov eax, dword ptr ds:[0x10]", "mov ebx, ecx", "push esi", "pop dx", "enter 8, 0",
                                  "syscall "])
def test_plain_instructions_are_of_no_class(text):
    name, operands = text.split(" ", 1)
    assert classify(name, operands.strip(), 32) is None


def test_addresses_are_bounded_and_counts_are_whole():
    [finding] = scan(flat("ee" * 100 + "c3")).findings
    assert finding.count == 100
    assert finding.addresses == list(range(0x10000, 0x10000 + SHOWN))


def test_instructions_that_pvm_gives_up_on_are_told_apart():
    report = scan(flat("f30fb8c0 0faefb 0fae10 c3"))
    assert {f.family for f in report.pvm_cannot} >= {"popcnt"}


# -- advice ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "bits", "technology", "mode", "rule"), [
    ("90c3", 64, "vt-x", "hardware", "64-bit"), ("90c3", 64, "none", "software", "64-bit"),
    ("d6c3", 32, "amd-v", "hardware", "esoteric"), ("9cc3", 32, "vt-x", "hardware", "patches"),
    ("9cc3", 32, "pvm", "software", "default"), ("9cc3", 32, "none", "software", "no-hardware"),
    ("9cc3", 16, "vt-x", "hardware", "default"), ("90c3", 32, "vt-x", "hardware", "default"),
])
def test_the_recommended_mode_follows_the_rules(code, bits, technology, mode, rule):
    advice = scan(flat(code, bits), technology).advice
    assert (advice.mode, advice.rule) == (mode, rule)


# -- images ----------------------------------------------------------------------------------


def multiboot_elf(code: bytes, entry: int = 0x10_000C) -> bytes:
    header = struct.pack("<4sBBB9xHHIIIIIHHHHHH", b"\x7FELF", 1, 1, 1, 2, 3, 1, entry, 52, 0, 0, 52, 32, 1, 0, 0, 0)
    program = struct.pack("<8I", 1, 0x1000, 0x10_0000, 0x10_0000, 12 + len(code), 12 + len(code), 5, 0x1000)
    magic = struct.pack("<III", 0x1BAD_B002, 0, -0x1BAD_B002 & 0xFFFF_FFFF)
    return (header + program).ljust(0x1000, b"\0") + magic + code


def greedy_elf() -> bytes:
    """Two megabytes that want to be loaded 128 times."""
    image = bytearray(multiboot_elf(b"\xF4").ljust(2 << 20, b"\0"))
    struct.pack_into("<H", image, 44, 128)
    for number in range(128):
        struct.pack_into("<8I", image, 52 + 32 * number, 1, 0, number << 22, number << 22, 2 << 20, 2 << 20, 5, 0)
    return bytes(image)


def bzimage(*, kernel: bytes = b"\xFA\xF4".ljust(0x200, b"\0") + b"\x0F\x01\xF8\xFA\xF4", flags: int = 1) -> bytes:
    setup = bytearray(1024)
    setup[0x1F1] = 1
    setup[0x200:0x206] = b"\xEB\x66HdrS"                      # jmp 0x268
    struct.pack_into("<H", setup, 0x206, 0x20C)
    setup[0x211] = 1                                          # loaded high
    struct.pack_into("<I", setup, 0x214, 0x10_0000)
    struct.pack_into("<H", setup, 0x236, flags)
    setup[0x268:0x26B] = b"\x0E\xFA\xF4"                      # push cs; cli; hlt
    return bytes(setup) + kernel


def test_a_multiboot_kernel_is_scanned_from_its_entry_in_32_bits():
    image = read_image(multiboot_elf(bytes.fromhex("0f0115000010000f22c0faf4")))
    assert (image.format, image.entries[0].linear, image.entries[0].bits) == ("multiboot", 0x10_000C, 32)
    assert families(scan(image)) == {"lgdt": 1, "mov cr0": 1, "cli": 1, "hlt": 1}


def test_a_flat_multiboot_kernel_is_loaded_where_its_header_says():
    flags = 1 << 16
    magic = struct.pack("<IIIIIIII", 0x1BAD_B002, flags, -(0x1BAD_B002 + flags) & 0xFFFF_FFFF,
                        0x20_0010, 0x20_0000, 0, 0, 0x20_0030)
    image = read_image(bytes(16) + magic + b"\xEE\xFA\xF4")
    assert image.entries[0].linear == 0x20_0030
    assert families(scan(image)) == {"out": 1, "cli": 1, "hlt": 1}


def test_a_bzimage_is_entered_at_setup_and_at_both_kernel_entries():
    image = read_image(bzimage())
    assert [(entry.bits, entry.linear) for entry in image.entries] == [
        (16, 0x9_0200), (32, 0x10_0000), (64, 0x10_0200)]
    report = scan(image)
    assert families(report, "real mode") == {"push segment": 1, "cli": 1, "hlt": 1}
    assert families(report, "64-bit long mode") == {"swapgs": 1, "cli": 1, "hlt": 1}
    assert [entry.bits for entry in read_image(bzimage(flags=0)).entries] == [16, 32]


@pytest.mark.parametrize(("data", "options", "says"), [
    (b"", {}, "empty"),
    (b"hello", {}, "no boot sector"),
    (b"hello", {"bits": 20}, "16, 32 or 64"),
    (b"hello", {"bits": 16, "base": 0xF_FFFF}, "beyond what 16-bit"),
    (b"hello", {"bits": 32, "base": -1}, "--base"),
    (b"hello", {"bits": 32, "entry": 0x20000}, "not within"),
    (THREE_MODES, {"format": "boot-sector", "bits": 16}, "--bits is for flat"),
    (THREE_MODES, {"format": "multiboot"}, "no multiboot"),
    (THREE_MODES, {"format": "bzimage"}, "no HdrS"),
    (THREE_MODES, {"format": "elf"}, "no little-endian ELF"),
    (b"hello", {"format": "boot-sector"}, "no 55 AA"),
    (multiboot_elf(b"\xF4", entry=0x40_0000), {}, "none of its segments"),
    (greedy_elf(), {"format": "elf"}, "more than 64 MiB"),
    (multiboot_elf(b"\xF4")[:0x1008], {"format": "elf"}, "cut off"),
    (struct.pack("<III", 0x1BAD_B002, 0, -0x1BAD_B002 & 0xFFFF_FFFF), {}, "no ELF"),
    (bzimage()[:0x300], {}, "cut off"),
    (b"\x90", {"bits": 32, "size": LIMIT + 1}, "at most 64 MiB"),
])
def test_an_image_that_cannot_be_used_says_why(data, options, says):
    with pytest.raises(ImageError, match=says):
        read_image(data, **options)


def test_a_file_that_cannot_be_read_says_its_name(tmp_path):
    with pytest.raises(ImageError, match=f"{tmp_path}/none cannot be read"):
        load(tmp_path / "none")
    with pytest.raises(ImageError, match="cannot be read"):
        load(tmp_path)


# -- hostile bytes ---------------------------------------------------------------------------

SEEDS = (THREE_MODES, MOVED, TABLE, multiboot_elf(TABLE), bzimage())


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32), bits=st.sampled_from((16, 32, 64)), size=st.integers(1, 3000))
@example(seed=1, bits=16, size=65536)
def test_random_bytes_end_with_bounded_findings(seed, bits, size):
    image = read_image(random.Random(seed).randbytes(size), bits=bits, base=0x10000)
    report = scan(image)
    assert 0 <= report.instructions <= 3 * (size + 2 * 65536)
    assert sum(report.modes.values()) == report.instructions
    assert all(len(f.addresses) <= SHOWN <= max(SHOWN, f.count) for f in report.findings)
    assert report.advice is not None


@settings(max_examples=200, deadline=None)
@given(which=st.sampled_from(SEEDS),
       changes=st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), max_size=12),
       cut=st.integers(0, 600))
def test_a_damaged_image_is_scanned_or_refused(which, changes, cut):
    data = bytearray(which)
    for at, value in changes:
        data[at % len(data)] = value
    try:
        image = read_image(bytes(data[:len(data) - cut]))
    except ImageError:
        return
    assert scan(image).instructions >= 0


def test_a_rom_is_known_by_its_size_and_the_jump_at_its_reset_vector():
    rom = bytearray(b"\xFF" * 0x20000)
    rom[0x10000:0x10003] = bytes.fromhex("FA 0F 20")            # at F000:0000: cli, mov eax, cr0
    rom[0x10003] = 0xC0
    rom[-16:-11] = bytes.fromhex("EA000000F0")
    image = read_image(bytes(rom))
    assert (image.format, image.entries[0].linear) == ("rom", 0xFFFF0)
    assert image.read(0xF0000, 2) == b"\xFA\x0F"
    assert image.read(0xE0000, 1) == b"\xFF"
