"""The whole service on real workers: commands, endings, faults."""

from __future__ import annotations

import os
import signal
import socket

import pytest
import trio

from mixvisor.service.backend import Conflict, NotFound, ServiceError, Unusable

from .conftest import processes, running, until, vm

pytestmark = pytest.mark.usefixtures("nothing_left")
ENGINES = ["software", pytest.param("hardware", marks=pytest.mark.kvm)]

# Real-mode bytes, loaded and entered at 0x10000 (CS:IP = 1000:0).
SPIN_WITHOUT_INTERRUPTS = bytes.fromhex("fa ebfe")                       # cli; jmp $
TRIPLE_FAULT = bytes.fromhex("fa 0f011e0700 cd03 f4 00000000 0000")      # cli; lidt [7+..]; int 3
SAY_A_FOREVER = bytes.fromhex("ba f803 b041 ee ebfd")                    # mov dx,3f8; mov al,'A'; out dx,al; jmp
EXIT_7 = bytes.fromhex("b007 e6f4 f4")                                   # mov al,7; out 0xf4,al; hlt


def flat(tmp_path, code: bytes) -> dict[str, str]:
    path = tmp_path / "guest.bin"
    path.write_bytes(code)
    return {"flat": str(path)}


@pytest.mark.parametrize("mode", ENGINES)
async def test_a_guest_counts_is_paused_resumed_and_stopped(tmp_path, mode):
    async with running(tmp_path, [{"name": "one", "mode": mode, "boot": {"guest": "alu"}}]) as service:
        await until(lambda: (vm(service, "one").progress or 0) > 0)
        await service.act("one", "pause")
        assert vm(service, "one").state == "paused"
        still = vm(service, "one").progress
        run = vm(service, "one").vcpus[0].run_ns
        await trio.sleep(0.3)
        assert service._picture().vms[0].progress == still
        assert service._picture().vms[0].vcpus[0].run_ns - run < 50_000_000
        await service.act("one", "resume")
        await until(lambda: vm(service, "one").progress > still)
        await service.act("one", "stop")
        assert vm(service, "one").state == "stopped"
        total = vm(service, "one").progress
        assert total >= still
        await service.act("one", "start")
        await until(lambda: vm(service, "one").progress > total, what="counters go on over a restart")


@pytest.mark.parametrize("mode", ENGINES)
async def test_a_guest_that_spins_without_interrupts_stops_and_is_killed_within_a_second(tmp_path, mode):
    spec = {"name": "spin", "mode": mode, "boot": flat(tmp_path, SPIN_WITHOUT_INTERRUPTS)}
    async with running(tmp_path, [spec]) as service:
        for how in ("stop", "kill"):
            if vm(service, "spin").state != "running":
                await service.act("spin", "start")
            with trio.fail_after(5):
                await service.act("spin", how)
            assert vm(service, "spin").state == "stopped"


@pytest.mark.parametrize("mode", ENGINES)
async def test_the_exit_port_ends_a_guest_with_its_code(tmp_path, mode):
    spec = {"name": "exit", "mode": mode, "boot": flat(tmp_path, EXIT_7)}
    async with running(tmp_path, [spec]) as service:
        await until(lambda: vm(service, "exit").state == "stopped")
        assert "7" in vm(service, "exit").state_reason


@pytest.mark.parametrize("mode", ENGINES)
async def test_a_flood_on_the_serial_port_is_bounded_counted_and_logged(tmp_path, mode):
    spec = {"name": "flood", "mode": mode, "boot": flat(tmp_path, SAY_A_FOREVER)}
    quiet = {"name": "quiet", "mode": mode, "boot": {"guest": "alu"}}
    async with running(tmp_path, [spec, quiet]) as service:
        await until(lambda: vm(service, "flood").serial_bytes > 100)
        log = tmp_path / "state" / "logs" / "flood.log"
        await until(lambda: log.exists() and log.stat().st_size > 0)
        assert set(log.read_bytes()) == {0x41}
        await until(lambda: (vm(service, "quiet").progress or 0) > 0)
        with trio.fail_after(5):
            await service.act("flood", "kill")


@pytest.mark.parametrize("mode", ENGINES)
async def test_a_killed_worker_is_a_crash_that_hurts_nobody_and_restarts_where_asked(tmp_path, mode):
    vms = [{"name": "a", "mode": mode, "boot": {"guest": "alu"}, "restart": "on-failure"},
           {"name": "b", "mode": mode, "boot": {"guest": "alu"}}]
    async with running(tmp_path, vms) as service:
        first = vm(service, "a").pid
        os.kill(first, signal.SIGKILL)
        await until(lambda: vm(service, "a").state == "crashed")
        assert "SIGKILL" in vm(service, "a").state_reason
        assert vm(service, "b").state == "running"
        await until(lambda: vm(service, "a").state == "running")
        assert vm(service, "a").restarts == 1
        assert vm(service, "a").pid != first


async def test_a_worker_killed_by_the_operator_does_not_restart(tmp_path):
    one = {"name": "a", "mode": "software", "boot": {"guest": "alu"}, "restart": "always"}
    async with running(tmp_path, [one]) as service:
        await service.act("a", "kill")
        assert vm(service, "a").state == "stopped"
        with pytest.raises(Conflict, match="a is stopped"):
            await service.act("a", "pause")


async def test_an_image_that_vanished_fails_its_vm_only(tmp_path):
    boot = flat(tmp_path, EXIT_7)
    (tmp_path / "guest.bin").unlink()
    vms = [{"name": "gone", "mode": "software", "boot": boot},
           {"name": "there", "mode": "software", "boot": {"guest": "alu"}}]
    async with running(tmp_path, vms) as service:
        assert vm(service, "gone").state == "failed"
        assert "guest.bin" in vm(service, "gone").state_reason
        assert vm(service, "there").state == "running"
        with pytest.raises(ServiceError, match=r"guest\.bin"):
            await service.act("gone", "start")


async def test_an_unknown_vm_is_named_beside_the_known_ones(tmp_path):
    async with running(tmp_path, [{"name": "a", "mode": "software", "boot": {"guest": "alu"}}]) as service:
        with pytest.raises(NotFound, match="'b'; defined: a"):
            await service.act("b", "start")
        with pytest.raises(Unusable, match="no operation"):
            await service.ask("a", "format-disk")


async def test_a_port_in_use_refuses_the_service_and_leaves_nothing(tmp_path):
    before = processes()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.RaisesGroup(pytest.RaisesExc(ServiceError, match=listen), flatten_subgroups=True):
            async with running(tmp_path, [], metrics={"listen": listen}):
                pass
    assert processes() == before


@pytest.mark.kvm
async def test_modes_that_mix_are_warned_of_while_they_mix(tmp_path):
    vms = [{"name": "s", "mode": "software", "boot": {"guest": "alu"}},
           {"name": "h", "mode": "hardware", "boot": {"guest": "alu"}}]
    async with running(tmp_path, vms) as service:
        (warning,) = [w for w in service.snapshot().warnings if w.code == "mixed-modes"]
        assert set(warning.vms) == {"s", "h"}
        await service.act("h", "kill")
        assert not [w for w in service.snapshot().warnings if w.code == "mixed-modes"]


async def test_a_second_service_on_the_same_state_directory_is_refused(tmp_path):
    async with running(tmp_path, []):
        with pytest.RaisesGroup(pytest.RaisesExc(ServiceError, match="another mixvisor"), flatten_subgroups=True):
            async with running(tmp_path, []):
                pass


@pytest.mark.parametrize("dispatch", ["plain", "gentle"])
async def test_a_cancelled_service_leaves_nothing_either(tmp_path, dispatch):
    """An operator's Ctrl-C is a request; a failing caller cancels, and everything ends at once."""
    vms = [{"name": name, "mode": "software", "boot": {"guest": "alu"}} for name in "ab"]
    with trio.CancelScope() as scope:
        async with running(tmp_path, vms, dispatch=dispatch) as service:
            await until(lambda: (vm(service, "b").progress or 0) > 0)
            scope.cancel()
            await trio.lowlevel.checkpoint()
    assert scope.cancelled_caught
