"""Disks in a whole service: what is kept, what is discarded, who is refused, and what an operator is told."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from mixvisor.service.backend import ServiceError
from mixvisor.vm.disks.files import facts

from .conftest import running, until, vm

pytestmark = pytest.mark.usefixtures("nothing_left")

# Boot sector: the first byte of its second sector, one higher each time, is written back and is the exit code (where
# it cannot be written, the status of INT 13h is).
COUNTER = bytes.fromhex("31d28ec28edabb007eb90200b80102cd13fe06007eb80103cd13a0007e730288e0e6f4f4")
# Boot sector: writes sector after sector of the floppy but itself, for ever.
FLOOD = bytes.fromhex(
    "31d28ec28edabe0100bb007eff06007e89f046b112f6f188e1fec188c680e601d0e888c580fd507205be0100ebdbb80103cd13ebd4")


def floppy(folder: Path, code: bytes = COUNTER) -> Path:
    path = folder / "disk.img"
    path.write_bytes(code.ljust(1_474_560, b"\0"))
    return path


def dos(name: str, **disk: object) -> dict[str, object]:
    return {"name": name, "mode": "software", "boot": disk, "autostart": False}


async def exit_code(service, name: str) -> int:
    await service.act(name, "start")
    await until(lambda: vm(service, name).state == "stopped", what="its end")
    return (await service.ask(name, "why"))["exit_code"]


@pytest.mark.parametrize(("disk", "codes"), [
    ({}, [3, 3]), ({"writable": "overlay"}, [1, 1]), ({"writable": "overlay", "overlay": "kept"}, [1, 2]),
    ({"writable": "yes"}, [1, 2]),
])
async def test_what_a_guest_writes_is_refused_discarded_or_kept_as_the_file_says(tmp_path, disk, codes):
    image = floppy(tmp_path)
    before = image.read_bytes()
    if "overlay" in disk:
        disk = {**disk, "overlay": tmp_path / "kept"}
    async with running(tmp_path, [dos("one", disk=image, **disk)]) as service:
        assert [await exit_code(service, "one") for _ in range(2)] == codes
        counted = vm(service, "one").disks["fda"]
        assert (counted.reads, counted.writes, counted.errors) == (2, 0 if not disk else 2, 0)
    assert (image.read_bytes() == before) == (disk.get("writable") != "yes")
    if "overlay" in disk:
        assert facts(tmp_path / "kept", verify=True).changed_bytes == 512


async def test_an_image_that_one_vm_writes_is_refused_to_others_while_it_runs(tmp_path):
    image = floppy(tmp_path, FLOOD)
    async with running(tmp_path, [dos("one", disk=image, writable="yes"), dos("two", disk=image)]) as service:
        await service.act("one", "start")
        with pytest.raises(ServiceError, match="written by another VM or program"):
            await service.act("two", "start")
        assert str(image) in vm(service, "two").state_reason
        await service.act("one", "stop")
        await service.act("two", "start")
        with pytest.raises(ServiceError, match="only one may write it"):
            await service.act("one", "start")


async def test_a_worker_killed_while_it_writes_leaves_a_whole_overlay_that_goes_on(tmp_path):
    image, kept = floppy(tmp_path, FLOOD), tmp_path / "kept"
    async with running(tmp_path, [dos("one", disk=image, writable="overlay", overlay=kept)]) as service:
        for wanted in (100, 300, 5000):
            await service.act("one", "start")
            first = vm(service, "one").disks["fda"].writes
            await until(lambda wanted=wanted, first=first: vm(service, "one").disks["fda"].writes >= first + wanted)
            os.kill(vm(service, "one").pid, signal.SIGKILL)
            await until(lambda: vm(service, "one").state == "crashed")
            assert facts(kept, verify=True).image_fits == "yes"
    assert facts(kept).changed_bytes == 1_474_560 - 512


async def test_a_torn_overlay_is_refused_with_its_name_and_the_reason(tmp_path):
    image, kept = floppy(tmp_path), tmp_path / "kept"
    async with running(tmp_path, [dos("one", disk=image, writable="overlay", overlay=kept)]) as service:
        await exit_code(service, "one")
        with kept.open("r+b") as file:
            file.seek(50)
            file.write(b"torn")
        with pytest.raises(ServiceError, match="its header is damaged"):
            await service.act("one", "start")
        assert str(kept) in vm(service, "one").state_reason


@pytest.fixture
def small(tmp_path):
    """A file system of 128 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "none", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.privileged
async def test_a_full_file_system_is_a_fault_to_the_guest_and_a_warning_to_the_operator(tmp_path, small):
    image = floppy(tmp_path, FLOOD)
    async with running(tmp_path, [dos("one", disk=image, writable="overlay", overlay=small / "kept")]) as service:
        await service.act("one", "start")

        def warned():
            return [w for w in service.snapshot().warnings if w.code == "disk-failed:one"]

        told = await until(warned, what="the warning")
        assert "No space left on device" in told[0].message
        assert str(small / "kept") in told[0].message
        assert vm(service, "one").state == "running"
        assert vm(service, "one").disks["fda"].errors > 0
        await service.act("one", "stop")
    assert 0 < facts(small / "kept", verify=True).changed_bytes < 128 << 10
