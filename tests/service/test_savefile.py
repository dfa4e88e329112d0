"""Saved VMs as files: whole or not there, small, and nothing in them is believed."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mixvisor.service import savefile
from mixvisor.service.backend import ServiceError
from mixvisor.service.savefile import FileIdentity, Header, SavedError, SavedFile, identify, write
from mixvisor.vm.engines import cpuid

MIB = 1 << 20
PAGE = 4096
STATE = b'{"cpu": {}}'
MACHINE = {"boot": "flat", "drives": ["fda no"]}
fuzzed = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def memory(size: int = 4 * MIB, **pages: bytes) -> int:
    fd = os.memfd_create("memory")
    os.ftruncate(fd, size)
    for address, data in pages.items():
        os.pwrite(fd, data, int(address[1:]))
    return fd


def header(size: int = 4 * MIB, **changes) -> Header:
    return dataclasses.replace(Header(
        name="dos", saved_unix_s=1.5, mixvisor="1", mode="software", vendor=cpuid.vendor().decode(), memory_bytes=size,
        machine=MACHINE, files=[], state_bytes=len(STATE)), **changes)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "dos.mixvisor"


@pytest.fixture
def saved(path):
    fd = memory(_0=b"a" * 10, _8192=b"b" * 5000, _1048570=b"across", _4190208=b"end!" * 1024)
    write(path, header(), STATE, fd)
    yield path
    os.close(fd)


def filled(path, size: int = 4 * MIB) -> bytes:
    fd, file = memory(size), SavedFile(path)
    try:
        file.fill(fd)
        return os.pread(fd, size, 0)
    finally:
        file.close()
        os.close(fd)


def resealed(data: bytes) -> bytes:
    return data[:-32] + hashlib.blake2b(data[:-32], digest_size=32).digest()


def refusal(path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(SavedError) as caught:
        filled(path)
    return str(caught.value)


@fuzzed
@given(pages=st.dictionaries(st.integers(0, 255), st.binary(min_size=1, max_size=PAGE), max_size=20))
def test_memory_comes_back_as_it_was(path, pages):
    fd = memory(MIB)
    for page, data in pages.items():
        os.pwrite(fd, data, page * PAGE)
    write(path, header(MIB), STATE, fd)
    assert filled(path, MIB) == os.pread(fd, MIB, 0)
    os.close(fd)


def test_header_and_state_come_back(saved):
    file = SavedFile(saved)
    assert (file.header, file.state) == (header(), STATE)
    file.close()


def test_empty_pages_and_holes_take_no_room(path):
    fd = memory(64 * MIB, _33554432=b"x", _41943040=bytes(8 * MIB))
    assert write(path, header(64 * MIB), STATE, fd) == path.stat().st_size < 3 * PAGE
    os.close(fd)


def test_the_file_is_its_owners_alone_and_nothing_else_is_left(saved):
    assert saved.stat().st_mode & 0o777 == 0o600
    assert os.listdir(saved.parent) == [saved.name]


def test_a_save_that_fails_leaves_the_file_before(saved, monkeypatch):
    before = saved.read_bytes()

    def full(_memory_fd, _size):
        yield 0, memoryview(b"x" * PAGE)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(savefile, "_runs", full)
    fd = memory()
    with pytest.raises(ServiceError, match="No space left on device"):
        write(saved, header(), STATE, fd)
    os.close(fd)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


def test_only_a_save_is_replaced(path):
    fd = memory()
    path.write_bytes(b"\xeb\x3c\x90 a disk image, say" * 100)
    before = path.read_bytes()
    with pytest.raises(ServiceError, match="is there and is not a saved VM: it stays"):
        write(path, header(), STATE, fd)
    assert path.read_bytes() == before
    path.write_bytes(b"")                          # as mktemp leaves it
    write(path, header(), STATE, fd)
    write(path, header(name="again"), STATE, fd)
    file = SavedFile(path)
    assert file.header.name == "again"
    file.close()
    os.close(fd)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/null", path)])
def test_what_is_no_regular_file_is_never_replaced_by_a_save(path, make):
    make(path)
    before, fd = os.lstat(path), memory()
    with pytest.raises(ServiceError, match="not a regular file"):
        write(path, header(), STATE, fd)
    assert (os.lstat(path).st_ino, os.lstat(path).st_mode) == (before.st_ino, before.st_mode)
    assert os.listdir(path.parent) == [path.name]
    os.close(fd)


def test_a_folder_that_is_not_there_is_a_clear_error(tmp_path):
    fd = memory()
    with pytest.raises(ServiceError, match=r"none/x cannot be written: No such file"):
        write(tmp_path / "none" / "x", header(), STATE, fd)
    os.close(fd)


@pytest.mark.parametrize("data", [b"", b"MIX", b"hello, I am a text", b"\x7fELF" + bytes(100)])
def test_a_foreign_file_is_told_as_such(path, data):
    path.write_bytes(data)
    with pytest.raises(SavedError, match="is not a saved VM"):
        SavedFile(path)


def test_what_is_no_file_is_told_as_such(tmp_path):
    with pytest.raises(SavedError, match="is not a regular file"):
        SavedFile(tmp_path)
    with pytest.raises(SavedError, match="No such file"):
        SavedFile(tmp_path / "none")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SavedError, match="is not a regular file"):
        SavedFile(tmp_path / "pipe")


def test_a_newer_version_is_refused_with_both_numbers(saved):
    data = bytearray(saved.read_bytes())
    data[8] = 2
    assert "format version 2; this Mixvisor reads version 1" in refusal(saved, bytes(data))


def test_a_damaged_byte_is_found_wherever_it_is(saved):
    data = saved.read_bytes()
    for at in (20, len(data) // 2, len(data) - 1):
        broken = bytearray(data)
        broken[at] ^= 1
        assert "damaged" in refusal(saved, bytes(broken))


def test_a_longer_file_is_refused(saved):
    assert "checksum" in refusal(saved, saved.read_bytes() + b"more")


@fuzzed
@given(cut=st.floats(0, 1, exclude_max=True))
def test_a_file_that_is_cut_short_is_refused(tmp_path, saved, cut):
    data = saved.read_bytes()
    other = tmp_path / "cut"
    assert refusal(other, data[:int(len(data) * cut)])


@fuzzed
@given(at=st.integers(0, 1 << 14), junk=st.binary(min_size=1, max_size=40))
def test_whatever_is_written_over_a_file_is_refused_or_still_a_file(tmp_path, saved, at, junk):
    data = bytearray(saved.read_bytes())
    at %= len(data)
    data[at:at + len(junk)] = junk
    other = tmp_path / "fuzzed"
    other.write_bytes(resealed(bytes(data)))
    try:
        filled(other)
    except SavedError:
        return


@pytest.mark.parametrize(("run", "says"), [
    ((4 * MIB, PAGE), "its pages"), ((1, PAGE), "its pages"), ((PAGE, 100), "its pages"), ((PAGE, 0), "its pages"),
    ((1 << 63, PAGE), "its pages"), ((0, 8 * MIB), "its pages"), ((0, 1 << 62), "its pages"),
    ((0, 4 * MIB), "is cut short"),
])
def test_runs_that_no_memory_has_are_refused(saved, run, says):
    data = bytearray(saved.read_bytes())
    _, _, length = struct.unpack_from("<8sII", data)
    struct.pack_into("<QQ", data, 16 + length + len(STATE), *run)
    assert says in refusal(saved, resealed(bytes(data)))


@pytest.mark.parametrize(("changes", "says"), [
    ({"vendor": "NoSuchVendor"}, "processor"), ({"memory_bytes": 8 * MIB}, "memory of 8388608 bytes"),
    ({"machine": {**MACHINE, "boot": "disk"}}, "its boot was 'disk' and is 'flat'"),
    ({"files": [FileIdentity("/a", 1, 1, None)]}, "1 files open"),
])
def test_a_file_of_another_vm_is_refused(path, changes, says):
    fd = memory(changes.get("memory_bytes", 4 * MIB))
    write(path, header(**changes), STATE, fd)
    os.close(fd)
    file = SavedFile(path)
    with pytest.raises(SavedError, match=says):
        file.fits("dos", 4 * MIB, MACHINE, [])
    file.close()


def test_disks_must_be_what_they_were(tmp_path, path):
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(2048))

    def now() -> FileIdentity:
        with image.open("r+b") as file:
            return identify(file.fileno())

    before, fd = now(), memory()
    write(path, header(files=[before]), STATE, fd)
    os.close(fd)
    file = SavedFile(path)
    file.fits("dos", 4 * MIB, MACHINE, [now()])
    os.utime(image)                            # touched, and the same inside
    file.fits("dos", 4 * MIB, MACHINE, [now()])
    image.write_bytes(bytes(2047) + b"x")
    with pytest.raises(SavedError, match=r"disk\.img is not what .*: its contents have changed"):
        file.fits("dos", 4 * MIB, MACHINE, [now()])
    image.write_bytes(bytes(1024))
    with pytest.raises(SavedError, match="1024 bytes now and had 2048"):
        file.fits("dos", 4 * MIB, MACHINE, [now()])
    file.close()


def test_a_large_disk_is_known_by_its_date(tmp_path, monkeypatch):
    monkeypatch.setattr(savefile, "DIGEST_BYTES", 100)
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(2048))
    with image.open("r+b") as file:
        before = identify(file.fileno())
        assert before.digest is None
        assert savefile.differs(before, identify(file.fileno())) is None
        os.utime(image, ns=(1, 1))
        assert savefile.differs(before, identify(file.fileno())) == "it was written to meanwhile"
