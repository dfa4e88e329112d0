"""`mixvisor disk` on real files."""

from __future__ import annotations

import json
import os

import pytest
from click.testing import CliRunner

from mixvisor.cli import main as cli
from mixvisor.vm.disks.files import open_image, open_overlay
from mixvisor.vm.disks.overlay import Overlay


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(163_840))
    return path


@pytest.fixture
def overlay(tmp_path, image):
    path = tmp_path / "work.overlay"
    image_fd = open_image(image)
    fd = open_overlay(path, image, image_fd)
    Overlay(fd, 320).write(7, b"x" * 1024)
    os.close(fd)
    os.close(image_fd)
    return path


def run(*arguments, code=0):
    result = CliRunner().invoke(cli._mixvisor, ["disk", *map(str, arguments)])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.output


def test_info_says_what_an_image_and_an_overlay_are(image, overlay):
    assert "floppy, 40 cylinders, 1 heads, 8 sectors" in run("info", image)
    assert json.loads(run("info", image, "-o", "json"))["geometry"]["drive"] == "floppy"
    told = json.loads(run("info", overlay, "--verify", "-o", "json"))
    assert told["kind"] == "overlay"
    assert told["overlay"] == {"image": str(image), "image_bytes": 163_840, "changed_bytes": 1024,
                               "state": "ready", "image_fits": "yes"}
    assert "1024 of 163840 bytes" in run("info", overlay)


def test_commit_moves_the_changes_into_the_image_and_discard_drops_them(image, overlay):
    assert "1024 bytes are in the image now" in run("commit", overlay)
    assert image.read_bytes() == bytes(7 * 512) + b"x" * 1024 + bytes(163_840 - 9 * 512)
    assert "0 of 163840 bytes" in run("info", overlay)
    run("discard", overlay)


def test_discard_removes_an_overlay(image, overlay):
    run("discard", overlay)
    assert not overlay.exists()
    assert image.read_bytes() == bytes(163_840)


def test_what_cannot_be_done_is_one_sentence(image, overlay, tmp_path):
    assert "cannot be opened" in run("info", tmp_path / "nothing", code=1)
    assert "not an overlay of mixvisor" in run("commit", image, code=1)
    with overlay.open("r+b") as file:
        file.seek(100)
        file.write(b"damage")
    assert "header is damaged" in run("info", overlay, code=1)
    assert "header is damaged" in run("commit", overlay, code=1)
