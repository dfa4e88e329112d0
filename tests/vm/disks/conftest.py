from __future__ import annotations

import os

import pytest

SECTORS = 320


@pytest.fixture
def image(tmp_path):
    """A 160K floppy whose sectors have their number in them."""
    path = tmp_path / "disk.img"
    path.write_bytes(b"".join(sector(number, 0) for number in range(SECTORS)))
    return path


@pytest.fixture
def fds():
    """Descriptors to close at the end."""
    opened: list[int] = []
    yield opened
    for fd in opened:
        os.close(fd)


def sector(number, version):
    return (number.to_bytes(4, "little") + version.to_bytes(4, "little")) * 64


def numbered(data):
    """(number, version) of each whole sector; a torn one raises."""
    found = []
    for at in range(0, len(data), 512):
        words = {data[at + index:at + index + 8] for index in range(0, 512, 8)}
        assert len(words) == 1, "a torn sector"
        word = words.pop()
        found.append((int.from_bytes(word[:4], "little"), int.from_bytes(word[4:], "little")))
    return found
