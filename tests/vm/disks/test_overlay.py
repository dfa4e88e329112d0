"""The overlay's format: what was answered is there, whoever dies, and what is damaged is not believed."""

from __future__ import annotations

import errno
import mmap
import os
import random
import signal
import struct
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mixvisor.vm.disks import overlay as module
from mixvisor.vm.disks.overlay import Damaged, Header, Overlay, OverlayError, read_header, write_header

from .conftest import SECTORS, numbered, sector

HEADER = Header(SECTORS, SECTORS * 512, 1234567890, bytes(range(32)), "/some where/disk.img")


def from_image(first, count):
    return b"".join(sector(number, 0) for number in range(first, first + count))


@pytest.fixture
def fd(tmp_path, fds):
    fds.append(os.open(tmp_path / "overlay", os.O_RDWR | os.O_CREAT))
    write_header(fds[-1], HEADER)
    return fds[-1]


def contents(fd):
    return numbered(Overlay(fd, SECTORS).read(0, SECTORS, from_image))


writes = st.lists(st.tuples(st.integers(0, SECTORS - 1), st.integers(1, 40)), max_size=40)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(writes)
def test_it_reads_what_was_written_last_and_the_rest_from_the_image(fd, runs):
    os.ftruncate(fd, 0)
    write_header(fd, HEADER)
    disk, versions = Overlay(fd, SECTORS), [0] * SECTORS
    for version, (first, count) in enumerate(runs, 1):
        count = min(count, SECTORS - first)
        disk.write(first, b"".join(sector(n, version) for n in range(first, first + count)))
        versions[first:first + count] = [version] * count
    assert contents(fd) == list(enumerate(versions))
    changed = {n for first, count in disk.changed() for n in range(first, first + count)}
    assert changed == {n for n, version in enumerate(versions) if version}
    assert disk.verify() == len(changed)
    assert os.fstat(fd).st_size <= disk.end


def test_a_header_is_read_as_it_was_written(fd):
    assert read_header(fd) == HEADER
    write_header(fd, HEADER.committing())
    assert read_header(fd) == HEADER.committing()


@pytest.mark.parametrize(("damage", "says"), [
    (lambda raw: b"#!/bin/sh\n" + raw[10:], "not an overlay"), (lambda _raw: b"", "not an overlay"),
    (lambda raw: raw[:16] + b"\x07" + raw[17:], "version 7"),
    (lambda raw: raw[:40] + b"\xFF" + raw[41:], "header is damaged"),
    (lambda raw: raw[:100], "header is damaged"),
])
def test_a_foreign_or_damaged_header_is_refused_with_the_reason(fd, damage, says):
    raw = os.pread(fd, 4096, 0)
    os.ftruncate(fd, 0)
    os.pwrite(fd, damage(raw), 0)
    with pytest.raises(OverlayError, match=says):
        read_header(fd)


def test_a_cut_or_damaged_overlay_is_refused_and_a_damaged_sector_is_no_data(fd):
    disk = Overlay(fd, SECTORS)
    disk.write(7, sector(7, 1) + sector(8, 1))
    place = 4096 + 4096 + 8 * 512
    os.pwrite(fd, b"?", place + 100)
    with pytest.raises(Damaged, match="sector 8 is damaged"):
        disk.read(7, 2, from_image)
    assert numbered(disk.read(7, 1, from_image)) == [(7, 1)]
    with pytest.raises(Damaged):
        disk.verify()
    os.ftruncate(fd, place)
    with pytest.raises(OverlayError, match="cut short: sector 8"):
        list(disk.changed())
    os.pwrite(fd, struct.pack("<Q", 0x7000_0000_0000_0000), 4096 + 8 * 3)
    with pytest.raises(OverlayError, match="table is damaged"):
        list(disk.changed())


class Crash(Exception):
    pass


def crashing(monkeypatch, calls, pages):
    """The process dies at its call number *calls* of pwrite, when *pages* of it were written (page by page)."""
    real, left = os.pwrite, [calls]

    def pwrite(fd, data, offset):
        left[0] -= 1
        if left[0] >= 0:
            return real(fd, data, offset)
        if pages:
            stop = (offset // 4096 + pages) * 4096 - offset
            real(fd, bytes(data)[:stop], offset)
        raise Crash

    monkeypatch.setattr(module.os, "pwrite", pwrite)


@pytest.mark.parametrize("pages", [0, 1, 2])
def test_whoever_dies_at_any_write_to_the_file_leaves_every_sector_whole_old_or_new(fd, monkeypatch, pages):
    disk, dice = Overlay(fd, SECTORS), random.Random(pages)
    acknowledged = [0] * SECTORS
    crashes = 0
    for version in range(1, 120):
        first, count = dice.randrange(SECTORS), dice.randint(1, 50)
        count = min(count, SECTORS - first)
        with monkeypatch.context() as patched:
            crashing(patched, dice.randrange(4), pages)
            try:
                disk.write(first, b"".join(sector(n, version) for n in range(first, first + count)))
            except Crash:
                crashes += 1
        seen = contents(fd)
        for number, old in enumerate(acknowledged):
            allowed = {old, version} if first <= number < first + count else {old}
            assert seen[number][0] == number
            assert seen[number][1] in allowed
        acknowledged = [found for _number, found in seen]
    assert crashes > 20


def test_a_full_disk_is_an_error_that_changes_nothing_it_should_not(fd, monkeypatch):
    disk = Overlay(fd, SECTORS)
    disk.write(10, sector(10, 1) + sector(11, 1))
    real = os.pwrite

    def full(fd, data, offset):
        if len(data) > 512:
            return real(fd, bytes(data)[:512], offset)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(module.os, "pwrite", full)
        with pytest.raises(OSError, match="No space"):
            disk.write(9, b"".join(sector(n, 2) for n in range(9, 13)))
    assert contents(fd)[9:13] == [(9, 0), (10, 1), (11, 1), (12, 0)]
    disk.verify()


def writer(path, told, seed):
    """In a child: write for ever; `told` has the number of the write begun, and of the one done last."""
    fd = os.open(path, os.O_RDWR)
    disk = Overlay(fd, SECTORS)
    for version, (first, count) in enumerate(planned(seed), 1):
        told[0:8] = version.to_bytes(8, "little")
        disk.write(first, b"".join(sector(n, version) for n in range(first, first + count)))
        told[8:16] = version.to_bytes(8, "little")


def planned(seed):
    dice = random.Random(seed)
    while True:
        first = dice.randrange(SECTORS)
        yield first, min(dice.randint(1, 64), SECTORS - first)


@pytest.mark.parametrize("seed", range(12))
def test_a_writer_killed_at_a_random_moment_has_lost_nothing_that_it_was_told_is_done(tmp_path, fd, seed):
    told = mmap.mmap(-1, 4096)
    dice = random.Random(seed)
    pid = os.fork()
    if pid == 0:
        try:
            writer(tmp_path / "overlay", told, seed)
        finally:
            os._exit(1)
    try:
        enough, deadline = dice.randint(1, 300), time.monotonic() + 60
        while int.from_bytes(told[8:16], "little") < enough:
            assert time.monotonic() < deadline
            time.sleep(dice.random() * 0.001)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    begun, done = (int.from_bytes(told[at:at + 8], "little") for at in (0, 8))
    expected = [{0} for _ in range(SECTORS)]
    for version, (first, count) in enumerate(planned(seed), 1):
        if version > begun:
            break
        for number in range(first, first + count):
            expected[number] = {version} if version <= done else expected[number] | {version}
    for number, version in contents(fd):
        assert version in expected[number]
