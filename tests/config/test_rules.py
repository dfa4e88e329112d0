"""What keys say together, and what the host allows."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixvisor.config.load import HostLimits, check
from mixvisor.config.model import HostConfig, VmConfig, usable_cpus
from mixvisor.config.rules import host_findings

FOUR = HostLimits((0, 1, 2, 3), 64 << 20)


def codes(folder: Path, text: str, host: HostLimits | None = None) -> list[tuple[str, str]]:
    path = folder / "lab.toml"
    path.write_text(text)
    return [(problem.key, problem.code) for problem in check(path, host)]


def vm(extra: str, name: str = "a", boot: str = '{ guest = "alu" }') -> str:
    return f'[[vm]]\nname = "{name}"\nboot = {boot}\n{extra}\n'


@pytest.mark.parametrize(("extra", "expected"), [
    ('engine = "kvm"\nmode = "software"', ("mode", "contradiction")),
    ('engine = "software"\nmode = "hardware"', ("mode", "contradiction")),
    ("bits = 16", ("bits", "contradiction")),
    ("cap = 20\nreservation = 21", ("reservation", "reservation-over-cap")),
    ("reservation = 101", ("reservation", "reservation-over-vcpus")),
    ('memory = "4M"\nprogress = 0x3FFFF8', None),
    ('memory = "4M"\nprogress = 0x400000', ("progress", "progress-outside-memory")),
    ('memory = "512K"', ("memory", "memory-too-small")),
    ("cap = 20\nreservation = 20", None),
    ("reservation = 100", None),
    ('engine = "kvm"\nmode = "hardware"', None),
])
def test_keys_of_one_vm_that_contradict_each_other(
        tmp_path: Path, extra: str, expected: tuple[str, str] | None) -> None:
    assert codes(tmp_path, vm(extra)) == ([expected] if expected else [])


def test_a_flat_image_starts_inside_memory_and_where_its_mode_reaches(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\xf4")
    assert codes(tmp_path, vm("", boot='{ flat = "x", load = 0x200000 }')) == [
        ("boot.load", "address-outside-memory")]
    assert codes(tmp_path, vm("", boot='{ flat = "x", load = 0x200000, bits = 32 }')) == []
    assert codes(tmp_path, vm('memory = "1M"', boot='{ flat = "x", entry = 0x100000 }')) == [
        ("boot.entry", "address-outside-memory")]


def test_a_rom_is_whole_pages_and_needs_memory_below_and_around_it(tmp_path: Path) -> None:
    for name, size in (("rom", 0x10000), ("odd", 0x10001), ("large", 0x41000)):
        (tmp_path / name).write_bytes(bytes(size))
    assert codes(tmp_path, vm("", boot='{ rom = "rom", post = 0x190 }')) == []
    assert codes(tmp_path, vm("", boot='{ rom = "odd" }')) == [("boot.rom", "rom-of-no-size")]
    assert codes(tmp_path, vm("", boot='{ rom = "large" }')) == [("boot.rom", "rom-of-no-size")]
    for memory in ("512K", "4G"):
        assert codes(tmp_path, vm(f'memory = "{memory}"', boot='{ rom = "rom" }')) == [
            ("memory", "memory-not-for-a-rom")]


@pytest.mark.parametrize(("head", "extra", "expected"), [
    ('[host]\ncpus = "0-4"\n', "", [("cpus", "no-such-cpu")]),
    ("", 'cpus = "9"', [("cpus", "no-such-cpu")]),
    ("", "cpus = [0]", [("cpus", "cpu-not-for-vms")]),          # CPU 0 is left to the system
    ('[host]\ncpus = "0-1"\n', "cpus = [0]", []),
    ('[host]\ncpus = "0-1"\n', "cpus = [2]", [("cpus", "cpu-not-for-vms")]),
    ("", "vcpus = 5", [("vcpus", "more-vcpus-than-cpus")]),
    ("", 'memory = "128M"', [("memory", "more-memory-than-host")]),
    ("", 'memory = "64M"\nvcpus = 4', []),
])
def test_what_the_host_has_not_is_refused(
        tmp_path: Path, head: str, extra: str, expected: list[tuple[str, str]]) -> None:
    assert codes(tmp_path, head + vm(extra), FOUR) == expected


def test_reservations_that_do_not_fit_their_cpus_are_told_once(tmp_path: Path) -> None:
    pinned = 'cpus = "1"\nreservation = 60'
    text = vm(pinned, "a") + vm(pinned, "b") + vm("reservation = 100", "c")
    assert codes(tmp_path, text, FOUR) == [("reservation", "reservations-do-not-fit")]
    fits = vm(pinned, "a") + vm('cpus = "2"\nreservation = 60', "b") + vm("reservation = 100", "c")
    assert codes(tmp_path, fits, FOUR) == []


@given(st.lists(st.integers(0, 100), max_size=6), st.integers(2, 5))
def test_unpinned_reservations_fit_exactly_when_their_sum_does(
        reservations: list[int], cpus: int) -> None:
    vms = {index: VmConfig.model_validate(
        {"name": f"v{index}", "boot": {"guest": "alu"}, "reservation": reservation})
        for index, reservation in enumerate(reservations)}
    limits = HostLimits(tuple(range(cpus)), 1 << 30)
    faults = [found.code for found in host_findings(HostConfig(), vms, limits)]
    assert faults == (["reservations-do-not-fit"] if sum(reservations) > 100 * (cpus - 1) else [])


@given(st.sets(st.integers(0, 63), min_size=1))
def test_without_a_word_in_the_file_the_lowest_cpu_is_left_to_the_system(online: set[int]) -> None:
    cpus = usable_cpus(HostConfig(), online)
    assert set(cpus) == (online - {min(online)} if len(online) > 1 else online)
    assert list(cpus) == sorted(cpus)
