"""A whole service: running guests moved to the other mode, saved, restored, and what is refused."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import trio

from mixvisor.service.backend import Conflict, NotFound, ServiceError
from mixvisor.vm.host import HostFacts

from .conftest import running, until, vm

pytestmark = pytest.mark.usefixtures("nothing_left")
ALU = {"name": "one", "mode": "software", "boot": {"guest": "alu"}}
MODES = ["software", pytest.param("hardware", marks=pytest.mark.kvm)]


async def counts_on(service, name="one"):
    before = vm(service, name).progress or 0
    await until(lambda: (vm(service, name).progress or 0) > before, what=f"{name} counting on")


@pytest.mark.kvm
async def test_a_running_guest_is_moved_and_everything_that_is_told_of_it_follows(tmp_path):
    async with running(tmp_path, [ALU, {**ALU, "name": "two"}]) as service:
        await counts_on(service)
        pid, counted = vm(service, "one").pid, vm(service, "one").progress
        answer = await service.set_mode("one", "hardware")
        assert answer["changed"]
        assert 0 < answer["stop_seconds"] < 5
        now = vm(service, "one")
        assert (now.mode, now.engine, now.mode_rule, now.state, now.pid) == (
            "hardware", "kvm", "request", "running", pid)
        assert "by request" in now.mode_reason
        assert now.mode_alternatives[0].mode == "software"
        assert now.progress >= counted
        assert {mode: (sum(one.counts), one.sum_ns) for mode, one in now.mode_changes.items()} == {
            "hardware": (1, round(answer["stop_seconds"] * 1e9)), "software": (0, 0)}
        await until(lambda: any(w.code == "mixed-modes" for w in service.snapshot().warnings), what="the warning")
        await counts_on(service)
        # Its time is the hardware mode's now.
        await until(lambda: sum(cpu.residency_ns["hardware"] for cpu in service._picture().cpus) > 0,
                    what="residency in hardware mode")
        assert (await service.set_mode("one", "hardware"))["changed"] is False
        assert (await service.set_mode("one", "software"))["changed"]
        assert vm(service, "one").mode_rule == "explicit"
        await until(lambda: not any(w.code == "mixed-modes" for w in service.snapshot().warnings), what="its end")
        await counts_on(service)


@pytest.mark.kvm
async def test_a_moved_guest_starts_again_as_its_configuration_says(tmp_path):
    async with running(tmp_path, [ALU]) as service:
        await service.set_mode("one", "hardware")
        await service.act("one", "stop")
        assert vm(service, "one").mode == "hardware"          # how it ended
        await service.act("one", "start")
        assert (vm(service, "one").mode, vm(service, "one").mode_rule) == ("software", "explicit")
        await counts_on(service)


@pytest.mark.kvm
async def test_a_paused_guest_is_moved_and_stays_paused(tmp_path):
    async with running(tmp_path, [ALU]) as service:
        await counts_on(service)
        await service.act("one", "pause")
        await service.set_mode("one", "hardware")
        assert (vm(service, "one").state, vm(service, "one").mode) == ("paused", "hardware")
        await service.act("one", "resume")
        await counts_on(service)


@pytest.mark.kvm
@pytest.mark.rt
async def test_a_guest_is_moved_under_a_dispatcher_with_exact_slices(tmp_path):
    async with running(tmp_path, [ALU, {**ALU, "name": "two"}], dispatch="precise") as service:
        for mode in ("hardware", "software") * 5:
            assert (await service.set_mode("one", mode))["changed"]
            await counts_on(service)
        await counts_on(service, "two")
        assert service.snapshot().scheduler.guard == "watching"


async def test_what_does_not_run_is_not_moved_or_saved(tmp_path):
    async with running(tmp_path, [{**ALU, "autostart": False}]) as service:
        with pytest.raises(Conflict, match="one is defined; a change of mode needs a running or paused VM"):
            await service.set_mode("one", "hardware")
        with pytest.raises(Conflict, match="one is defined; saving needs a running or paused VM"):
            await service.save("one", None, leave_running=True)
        with pytest.raises(NotFound):
            await service.set_mode("two", "hardware")


async def test_a_host_without_kvm_refuses_with_its_reason(tmp_path, monkeypatch):
    monkeypatch.setattr("mixvisor.service.moving.KVM_DEVICE", "/dev/no-such-kvm")
    async with running(tmp_path, [ALU]) as service:
        with pytest.raises(Conflict, match="/dev/no-such-kvm cannot be opened: No such file"):
            await service.set_mode("one", "hardware")
        assert vm(service, "one").mode == "software"
        await counts_on(service)


@pytest.mark.kvm
@pytest.mark.skipif(HostFacts.read().technology != "pvm", reason="only PVM cannot run 32-bit paging")
async def test_a_state_that_this_host_cannot_run_is_refused_and_the_guest_goes_on(tmp_path):
    code = bytes.fromhex("c70500100000 83000000 0f20e0 0c10 0f22e0 b800100000 0f22d8 0f20c0 0d00000080 0f22c0"
                         "ff0500000200 ebf8")
    (tmp_path / "paged.bin").write_bytes(code)
    spec = {"name": "one", "mode": "software",
            "boot": {"flat": str(tmp_path / "paged.bin"), "bits": 32}, "progress": 0x20000}
    async with running(tmp_path, [spec]) as service:
        await counts_on(service)
        with pytest.raises(Conflict, match="one stays in software mode: the guest uses 32-bit paging"):
            await service.set_mode("one", "hardware")
        assert vm(service, "one").mode == "software"
        await counts_on(service)


async def test_a_worker_that_does_not_answer_is_not_said_to_be_moved(tmp_path, monkeypatch):
    monkeypatch.setattr("mixvisor.service.moving.MODE_SECONDS", 0.2)
    async with running(tmp_path, [ALU]) as service:
        await counts_on(service)
        os.kill(vm(service, "one").pid, signal.SIGSTOP)
        monkeypatch.setattr("mixvisor.service.moving.KVM_DEVICE", os.devnull)
        with pytest.raises(ServiceError):
            await service.set_mode("one", "hardware")
        assert vm(service, "one").mode == "software"
        os.kill(vm(service, "one").pid, signal.SIGCONT)
        await counts_on(service)


@pytest.mark.parametrize("mode", MODES)
async def test_a_saved_guest_ends_and_goes_on_from_its_file(tmp_path, mode):
    file = tmp_path / "one.mixvisor"
    async with running(tmp_path, [{**ALU, "mode": mode}]) as service:
        await counts_on(service)
        answer = await service.save("one", file, leave_running=False)
        assert answer["bytes"] == file.stat().st_size
        assert vm(service, "one").state == "stopped"
        assert vm(service, "one").state_reason == f"saved to {file}"
        total, saves = vm(service, "one").progress, vm(service, "one").saves
        assert saves == 1
        assert (await service.restore(file, None))["name"] == "one"
        assert vm(service, "one").state == "running"
        await until(lambda: vm(service, "one").progress > total, what="counting on")
        assert vm(service, "one").restores == 1
        # What it had counted is not counted again.
        assert vm(service, "one").progress < 2 * total + 10**9


async def test_a_guest_left_running_goes_on_and_its_past_can_be_started_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)                        # the state directory by a relative name: told is a whole one
    async with running(Path(), [ALU, {**ALU, "name": "two", "autostart": False}]) as service:
        await counts_on(service)
        answer = await service.save("one", None, leave_running=True)
        assert answer["running"]
        assert answer["file"] == str(tmp_path / "state" / "saved" / "one.mixvisor")
        await counts_on(service)
        with pytest.raises(Conflict, match="one is running"):
            await service.restore(tmp_path / "state" / "saved" / "one.mixvisor", None)
        await service.restore(tmp_path / "state" / "saved" / "one.mixvisor", "two")
        await counts_on(service, "two")


async def test_a_save_that_fails_lets_the_guest_go_on(tmp_path):
    async with running(tmp_path, [ALU]) as service:
        await counts_on(service)
        with pytest.raises(ServiceError, match="cannot be written"):
            await service.save("one", tmp_path / "none" / "file", leave_running=False)
        image = tmp_path / "disk.img"
        image.write_bytes(b"an image")
        with pytest.raises(ServiceError, match="is not a saved VM: it stays"):
            await service.save("one", image, leave_running=False)
        assert image.read_bytes() == b"an image"
        assert vm(service, "one").state == "running"
        await counts_on(service)


async def test_a_file_of_no_vm_changes_nothing(tmp_path):
    file = tmp_path / "x"
    file.write_bytes(b"not one of ours")
    async with running(tmp_path, [{**ALU, "autostart": False}]) as service:
        with pytest.raises(ServiceError, match="is not a saved VM"):
            await service.restore(file, None)
        assert vm(service, "one").state == "defined"


async def test_a_file_of_another_memory_size_or_guest_is_refused_with_the_reason(tmp_path):
    file = tmp_path / "one.mixvisor"
    others = [{**ALU, "name": "large", "memory": "8M", "autostart": False},
              {"name": "other", "mode": "software", "boot": {"guest": "portio"}, "autostart": False}]
    async with running(tmp_path, [{**ALU, "restart": "on-failure"}, *others]) as service:
        await service.save("one", file, leave_running=False)
        with pytest.raises(ServiceError, match="memory of 4194304 bytes, and large has 8388608"):
            await service.restore(file, "large")
        assert vm(service, "large").state == "failed"
        with pytest.raises(ServiceError, match="its built-in guest was 'alu' and is 'portio'"):
            await service.restore(file, "other")
        data = bytearray(file.read_bytes())
        data[-40] ^= 1
        file.write_bytes(data)
        with pytest.raises(ServiceError, match="damaged"):
            await service.restore(file, None)
        # Not in place of it: a fresh start.
        assert not service.machine("one").unfinished
        assert "starts again" not in vm(service, "one").state_reason
        await service.act("one", "start")      # and it can be started all the same
        await counts_on(service)


async def test_a_disk_that_was_written_to_meanwhile_is_refused(tmp_path):
    image, file = tmp_path / "disk.img", tmp_path / "one.mixvisor"
    image.write_bytes(bytes.fromhex("fb f4 ebfd").ljust(510, b"\0") + b"\x55\xaa")
    async with running(tmp_path, [{"name": "one", "mode": "software", "boot": {"disk": str(image)}}]) as service:
        await service.save("one", file, leave_running=False)
        await service.restore(file, None)
        await service.act("one", "stop")
        image.write_bytes(image.read_bytes() + b"changed")
        with pytest.raises(ServiceError, match=r"disk\.img is not what .* was saved with"):
            await service.restore(file, None)


async def test_commands_at_the_same_time_leave_a_vm_that_runs(tmp_path):
    async with running(tmp_path, [ALU]) as service:
        await counts_on(service)

        async def quietly(call, *arguments, **keys):
            try:
                await call(*arguments, **keys)
            except ServiceError:
                return

        async with trio.open_nursery() as nursery:
            for n in range(4):
                nursery.start_soon(quietly, service.act, "one", ("pause", "resume")[n % 2])
                nursery.start_soon(lambda: quietly(service.save, "one", tmp_path / "f", leave_running=True))
        if vm(service, "one").state == "paused":
            await service.act("one", "resume")
        await counts_on(service)
