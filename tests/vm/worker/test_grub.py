"""A boot loader that nobody here wrote: GRUB goes to 32-bit protected mode and back at every key and every sector.

Its segments are tight in one and flat in the other, and it is code that was unpacked by code that was loaded.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

MODULES = Path("/usr/lib/grub/i386-pc")
pytestmark = pytest.mark.skipif(shutil.which("grub-mkimage") is None or not MODULES.exists(),
                                reason="GRUB (packages grub-common, grub-pc-bin) is absent")


@pytest.fixture(scope="module")
def floppy(tmp_path_factory) -> bytes:
    core = tmp_path_factory.mktemp("grub") / "core.img"
    subprocess.run(["grub-mkimage", "-O", "i386-pc", "-o", core, "-p", "/", "biosdisk", "echo", "ls"], check=True)
    return ((MODULES / "boot.img").read_bytes() + core.read_bytes()).ljust(1440 << 10, b"\0")


def rows(worker) -> list[str]:
    return [row.rstrip() for row in worker.ask("screen")["rows"]]


def answers(worker, word: str) -> None:
    worker.press(f"echo {word}\r")
    worker.until(lambda: word in rows(worker))


def test_grub_comes_up_and_answers(start, floppy):
    worker = start("software", floppy, boot="disk", memory_bytes=32 << 20)
    worker.until(lambda: "grub>" in rows(worker))
    answers(worker, "mixvisor")
    worker.press("ls\r")
    worker.until(lambda: any("fd0" in row for row in rows(worker)))


@pytest.mark.kvm
def test_grub_goes_there_and_back_between_the_engines(start, floppy):
    worker = start("software", floppy, boot="disk", memory_bytes=32 << 20)
    worker.until(lambda: "grub>" in rows(worker))
    for number, word in enumerate(("once", "twice", "thrice", "more")):
        assert worker.move(("kvm", "software")[number % 2])["ok"]
        answers(worker, word)
