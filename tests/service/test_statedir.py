"""The state directory and the serial logs."""

import errno
import os

import pytest

from mixvisor.service.statedir import LOG_BYTES, AlreadyRunning, SerialLog, StateDir


def test_a_second_service_in_the_same_directory_is_refused_with_the_pid_of_the_first(tmp_path):
    first = StateDir(tmp_path / "state")
    with pytest.raises(AlreadyRunning, match=f"pid {os.getpid()}"):
        StateDir(tmp_path / "state")
    first.close()
    StateDir(tmp_path / "state").close()


def test_a_log_is_bounded_and_keeps_the_newest(tmp_path):
    log = SerialLog(tmp_path / "dos.log")
    for letter in b"abc":
        assert log.append(bytes([letter]) * (LOG_BYTES * 3 // 4)) is None
    assert (tmp_path / "dos.log").read_bytes()[-1:] == b"c"
    assert (tmp_path / "dos.log.1").read_bytes()[-1:] == b"b"
    assert sum(f.stat().st_size for f in tmp_path.iterdir()) <= 2 * LOG_BYTES


def test_a_full_disk_is_said_once_and_again_only_after_it_was_mended(tmp_path):
    full = True

    def write(path, data, rotate):
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")

    log = SerialLog(tmp_path / "x.log", write)
    assert "No space left" in log.append(b"12345")
    assert log.append(b"12345") is None
    assert log.lost_bytes == 10
    full = False
    assert log.append(b"1") is None
    full = True
    assert "No space left" in log.append(b"1")


def test_a_log_on_a_really_full_device_loses_its_lines_only(tmp_path):
    (tmp_path / "full.log").symlink_to("/dev/full")
    log = SerialLog(tmp_path / "full.log")
    assert log.append(b"x") is not None          # O_NOFOLLOW refuses the link as well
    assert log.lost_bytes == 1
