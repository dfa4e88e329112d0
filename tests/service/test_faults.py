"""Hostile guests and broken hosts, through the whole service: each has its fate, and hurts no neighbour."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import socket
import stat

import pytest
import structlog
import trio

from mixvisor.config.model import Config
from mixvisor.service.app import Service
from mixvisor.service.backend import ServiceError, Unusable
from mixvisor.vm.host import HostFacts
from mixvisor.vm.lifecycle import Phase

from .conftest import processes, running, until, vm

pytestmark = pytest.mark.usefixtures("nothing_left")
ENGINES = ["software", pytest.param("hardware", marks=pytest.mark.kvm)]

TRIPLE_FAULT_32 = bytes.fromhex("0f0b")                                  # ud2, and no IDT
POPCNT_64 = bytes.fromhex("f3480fb8c0 b005 e6f4 ebfe")                   # popcnt rax, rax; exit 5
INT3_64 = bytes.fromhex("cc b005 e6f4 ebfe")                             # int3, and no IDT
# 32 bits: mov edi,20000h; mov ecx,0FFE0h; L: mov [edi],ecx; add edi,1000h; loop L; exit 9
WRITE_256_MIB = bytes.fromhex("bf00000200 b9e0ff0000 890f 81c700100000 e2f6 b009 e6f4 ebfe")
SAY_A_FOREVER = bytes.fromhex("ba f803 b041 ee ebfd")


def guest(tmp_path, code: bytes, bits: int = 16) -> dict[str, object]:
    path = tmp_path / "guest.bin"
    path.write_bytes(code)
    return {"flat": str(path), "bits": bits}


def quiet(mode: str) -> dict[str, object]:
    return {"name": "neighbour", "mode": mode, "boot": {"guest": "alu"}}


async def hang(*_arguments: object) -> None:
    await trio.sleep_forever()


async def goes_on(service: Service, name: str = "neighbour") -> None:
    """It makes progress from now on."""
    seen = service._picture()
    before = next(v.progress for v in seen.vms if v.name == name) or 0
    await until(lambda: (vm(service, name).progress or 0) > before, what=f"progress of {name}")


@pytest.mark.parametrize("mode", ENGINES)
async def test_a_triple_fault_is_a_crash_whose_log_names_the_instruction(tmp_path, mode):
    spec = {"name": "bad", "mode": mode, "boot": guest(tmp_path, TRIPLE_FAULT_32, 32)}
    with structlog.testing.capture_logs() as logs:
        async with running(tmp_path, [spec, quiet(mode)]) as service:
            await until(lambda: vm(service, "bad").state == "crashed")
            assert "triple-fault" in vm(service, "bad").state_reason
            await goes_on(service)
    (told,) = [line for line in logs if line.get("code") == "guest-triple-fault"]
    assert (told["vm"], told["instruction"], told["log_level"]) == ("bad", "ud2", "error")
    assert told["registers"]["rip"] == 0x10000


@pytest.mark.parametrize("mode", ENGINES)
@pytest.mark.parametrize(("code", "name"), [(POPCNT_64, "popcnt"), (INT3_64, "int3")], ids=["popcnt", "int3"])
async def test_an_instruction_that_the_hosts_kvm_cannot_run_is_said_to_be_the_hosts_limit(tmp_path, mode, code, name):
    spec = {"name": "bad", "mode": mode, "boot": guest(tmp_path, code, 64)}
    with structlog.testing.capture_logs() as logs:
        async with running(tmp_path, [spec, quiet(mode)]) as service:
            await until(lambda: vm(service, "bad").state in ("crashed", "stopped"))
            pvm = service.facts.technology == "pvm" and mode == "hardware"
            end = vm(service, "bad")
            await goes_on(service)
    told = [line for line in logs if str(line.get("code")).startswith("guest-")]
    if not pvm:                                    # elsewhere int3 is three faults, and popcnt is run
        assert [line["code"] for line in told] == (["guest-triple-fault"] if name == "int3" else [])
        return
    assert end.state == "crashed"
    assert "host" in end.state_reason
    assert [line["code"] for line in told] == ["guest-host-limit"]
    assert name in told[0]["instruction"]


@pytest.mark.parametrize("mode", ENGINES)
async def test_a_guest_that_writes_everywhere_reaches_only_its_own_memory(tmp_path, mode):
    spec = {"name": "bad", "mode": mode, "boot": guest(tmp_path, WRITE_256_MIB, 32)}
    async with running(tmp_path, [spec, quiet(mode)]) as service:
        await until(lambda: vm(service, "bad").state == "stopped")
        assert "9" in vm(service, "bad").state_reason
        assert vm(service, "neighbour").restarts == 0
        await goes_on(service)


@pytest.mark.parametrize("mode", ENGINES)
async def test_a_stopped_worker_holds_up_nobody_and_ends_when_told(tmp_path, mode):
    spec = {"name": "bad", "mode": mode, "boot": {"guest": "alu"}}
    async with running(tmp_path, [spec, quiet(mode)]) as service:
        await until(lambda: vm(service, "bad").pid)
        os.kill(vm(service, "bad").pid, signal.SIGSTOP)
        await goes_on(service)
        with trio.fail_after(8):
            await service.act("bad", "stop")
        assert vm(service, "bad").state == "stopped"


async def test_a_service_whose_worker_is_stopped_ends_within_two_seconds_or_so(tmp_path):
    async with running(tmp_path, [{"name": "bad", "mode": "software", "boot": {"guest": "alu"}}]) as service:
        await until(lambda: vm(service, "bad").pid)
        os.kill(vm(service, "bad").pid, signal.SIGSTOP)
        began = trio.current_time()
    assert trio.current_time() - began < 4         # 2 on an idle machine
    assert service.machine("bad").phase is Phase.STOPPED     # the snapshot may be a moment old


async def test_a_shutdown_asked_for_while_vms_start_does_not_wait_for_them(tmp_path, monkeypatch):
    monkeypatch.setattr("mixvisor.service.incarnation.Incarnation.wait_started", hang)
    config = Config.model_validate({
        "host": {"cpus": "0", "dispatch": "plain"}, "metrics": {"listen": "none"},
        "vm": [{"name": "a", "mode": "software", "boot": {"guest": "alu"}, "memory": "4M"}]})
    service = Service(config, state_dir=tmp_path / "state", socket=None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(service.run)
        await until(lambda: any(v.pid for v in service.snapshot().vms))
        began = trio.current_time()
        service.request_shutdown()
    assert trio.current_time() - began < 4
    assert not service.ready


async def test_a_service_cancelled_in_the_middle_of_its_end_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("mixvisor.service.machine.Machine._ask_to_stop", hang)
    with trio.fail_after(20), trio.CancelScope() as second_ctrl_c:
        async with running(tmp_path, [{"name": "bad", "mode": "software", "boot": {"guest": "alu"}}]) as service:
            service.request_shutdown()
            await until(lambda: vm(service, "bad").state == "stopping")
            second_ctrl_c.cancel()
    assert service._machines["bad"].snapshot().state == "stopped"


async def test_a_killed_zygote_costs_no_vm_and_the_next_start_has_another(tmp_path):
    vms = [{"name": "a", "mode": "software", "boot": {"guest": "alu"}},
           {"name": "b", "mode": "software", "boot": {"guest": "alu"}, "autostart": False}]
    async with running(tmp_path, vms) as service:
        worker = vm(service, "a").pid
        os.kill(parent_of(worker), signal.SIGKILL)
        await goes_on(service, "a")
        await service.act("b", "start")
        await goes_on(service, "b")
        os.kill(worker, signal.SIGKILL)
        await until(lambda: vm(service, "a").state == "crashed")
        await service.act("a", "start")
        await goes_on(service, "a")


def parent_of(pid: int) -> int:
    with open(f"/proc/{pid}/stat") as stat_:
        return int(stat_.read().rpartition(")")[2].split()[1])


# -- /dev/kvm --------------------------------------------------------------------------------------


def without_kvm(number: int, root) -> HostFacts:
    """This machine's CPUs, and a /dev/kvm that answers with an error."""
    for name in ("proc/cpuinfo", "proc/meminfo", "proc/self/status", "sys/devices/system/cpu/online"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        with open("/" + name) as source:
            (root / name).write_text(source.read())

    def ask(_device) -> int:
        raise OSError(number, os.strerror(number))

    return HostFacts.read(root, ask)


@pytest.mark.parametrize(("number", "remedy"), [(errno.ENOENT, "."), (errno.EACCES, "usermod -aG kvm")])
async def test_without_dev_kvm_a_hardware_vm_is_refused_with_a_remedy_and_nothing_starts(tmp_path, number, remedy):
    facts = without_kvm(number, tmp_path / "host")
    assert facts.kvm.remedy
    before = processes()
    vms = [{"name": "soft", "mode": "software", "boot": {"guest": "alu"}},
           {"name": "hard", "mode": "hardware", "boot": {"guest": "alu"}}]
    with pytest.raises(Unusable) as refusal:
        async with running(tmp_path, vms, facts=facts):
            pytest.fail("it started")
    assert str(refusal.value).startswith("hard: ")
    assert facts.kvm.remedy in str(refusal.value)
    assert remedy in str(refusal.value)
    assert processes() == before
    assert not (tmp_path / "state").exists()


async def test_without_dev_kvm_a_guest_that_may_fall_back_runs_in_software(tmp_path):
    facts = without_kvm(errno.ENOENT, tmp_path / "host")
    vms = [{"name": "a", "mode": "auto", "fallback": True, "boot": {"guest": "alu"}}]
    async with running(tmp_path, vms, facts=facts) as service:
        assert (vm(service, "a").mode, vm(service, "a").mode_rule) == ("software", "fallback")
        await goes_on(service, "a")


# -- disks and sockets -------------------------------------------------------------------------------


@contextlib.contextmanager
def tiny_disk(path, size: str):
    path.mkdir(parents=True)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", os.fsencode(path), b"tmpfs", 0, f"size={size}".encode()) != 0:
        pytest.skip(f"no file system can be mounted here: {os.strerror(ctypes.get_errno())}")
    try:
        yield
    finally:
        assert libc.umount2(os.fsencode(path), 0) == 0


@pytest.mark.privileged
async def test_a_full_disk_costs_log_lines_and_says_so_once_while_vms_run_on(tmp_path):
    logs = tmp_path / "state" / "logs"
    with tiny_disk(logs, "16k"), structlog.testing.capture_logs() as said:
        (logs / "others.file").write_bytes(b"x" * 16384)
        spec = {"name": "talks", "mode": "software", "boot": guest(tmp_path, SAY_A_FOREVER)}
        async with running(tmp_path, [spec, quiet("software")]) as service:
            def warning():
                return [w for w in service.snapshot().warnings if w.code == "log-lost:talks"]

            await until(warning)
            assert "No space left" in warning()[0].message
            assert vm(service, "talks").state == "running"
            before = vm(service, "talks").serial_bytes
            await until(lambda: vm(service, "talks").serial_bytes > before + 1000)
            await goes_on(service)
            (logs / "others.file").unlink()
            await until(lambda: not warning(), what="the warning goes when there is room")
            assert (logs / "talks.log").stat().st_size > 0
    lines = [line for line in said if line.get("code") == "log-lost:talks"]
    # It goes on talking, so the disk may be full once more.
    assert [line["log_level"] for line in lines][:2] == ["warning", "info"]


async def test_a_socket_left_by_a_dead_supervisor_is_replaced(tmp_path):
    path = tmp_path / "run" / "control.sock"
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert stat.S_ISSOCK(path.stat().st_mode)
    async with running(tmp_path, []):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
    assert not path.exists()


async def test_a_file_in_the_sockets_place_is_refused_and_kept(tmp_path):
    path = tmp_path / "run" / "control.sock"
    path.parent.mkdir()
    path.write_text("precious")
    with pytest.RaisesGroup(pytest.RaisesExc(ServiceError, match=r"control\.sock"), flatten_subgroups=True):
        async with running(tmp_path, []):
            pytest.fail("it started")
    assert path.read_text() == "precious"
