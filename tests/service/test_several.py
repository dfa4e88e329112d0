"""VMs of several vCPUs in a whole service: scheduled thread by thread, shown vCPU by vCPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mixvisor.service.backend import Conflict

from .conftest import running, until, vm

pytestmark = [pytest.mark.usefixtures("nothing_left"), pytest.mark.kvm]

# As in tests/vm/worker/test_processors.py: the first vCPU starts the second and spins; the second counts at 20000h.
FIRST = bytes.fromhex(
    "bf0000e0fec787f0000000ff010000c7871003000000000001c7870003000000450000c7870003000008460000f390813d00000200ffffffff72"
    "f2a008000200e6f4ebfe")
COUNTS = bytes.fromhex("b800208ed866b8010000000fa266c1eb18881e0800f066ff060000ebf8")
# The first starts the second and halts with interrupts on; the second is parked in a halt, too.
BOTH_HALT = FIRST[:FIRST.index(b"\xF3\x90")] + b"\xFB\xF4\xEB\xFD"


def several(tmp_path, name: str = "two", *, first: bytes = FIRST, second: bytes = COUNTS, **keys):
    path = tmp_path / f"{name}.bin"
    path.write_bytes(second.ljust(0x8000, b"\0") + first)
    boot = {"flat": str(path), "bits": 32, "load": 0x8000, "entry": 0x10000}
    return {"name": name, "vcpus": 2, "boot": boot, "progress": 0x20000, **keys}


def used_ns(pid: int) -> int:
    """CPU time of a process, up to the next tick."""
    text = Path(f"/proc/{pid}/stat").read_text()
    return (sum(map(int, text.rpartition(")")[2].split()[11:13])) + 2) * 1_000_000_000 // os.sysconf("SC_CLK_TCK")


async def test_each_vcpu_is_scheduled_billed_and_shown_and_the_vm_obeys(tmp_path):
    async with running(tmp_path, [several(tmp_path)], dispatch="gentle") as service:
        assert vm(service, "two").mode == "hardware"
        await until(lambda: all(vcpu.run_ns > 20_000_000 and vcpu.slices > 1 for vcpu in vm(service, "two").vcpus))
        shown = vm(service, "two")
        assert [vcpu.index for vcpu in shown.vcpus] == [0, 1]
        assert len({vcpu.cpu for vcpu in shown.vcpus}) == 1
        # Billed once: by thread, not by process.
        assert sum(vcpu.run_ns for vcpu in shown.vcpus) <= used_ns(shown.pid) + 100_000_000
        await service.act("two", "pause")
        still = service._picture().vms[0].progress
        await service.act("two", "resume")
        await until(lambda: (vm(service, "two").progress or 0) > still)
        run = [vcpu.run_ns for vcpu in vm(service, "two").vcpus]
        await service.act("two", "stop")
        assert vm(service, "two").state == "stopped"
        kept = vm(service, "two").vcpus
        assert all(after.run_ns >= before for after, before in zip(kept, run, strict=True))
        await service.act("two", "start")
        await until(lambda: all(new.run_ns > old.run_ns for new, old
                                in zip(vm(service, "two").vcpus, kept, strict=True)),
                    what="the counters of each vCPU go on over a restart")


async def test_a_vm_of_several_vcpus_is_saved_and_goes_on_and_says_why_it_stays_in_its_mode(tmp_path):
    file = tmp_path / "two.mixvisor"
    async with running(tmp_path, [several(tmp_path)], dispatch="gentle") as service:
        await until(lambda: (vm(service, "two").progress or 0) > 1000)
        with pytest.raises(Conflict, match=r"two stays in hardware mode: .*vCPUs"):
            await service.set_mode("two", "software")
        await service.save("two", file, leave_running=True)
        seen = vm(service, "two").progress
        await until(lambda: vm(service, "two").progress > seen, what="it goes on where it was left running")
        await service.save("two", file, leave_running=False)
        seen = vm(service, "two").progress
        await service.restore(file, None)
        await until(lambda: vm(service, "two").progress > seen + 1000)
        run = [vcpu.run_ns for vcpu in vm(service, "two").vcpus]
        await until(lambda: all(after.run_ns > before for after, before
                                in zip(vm(service, "two").vcpus, run, strict=True)), what="each vCPU runs on")


async def test_a_vm_whose_vcpus_all_wait_is_billed_for_nothing_and_can_be_stopped(tmp_path):
    # cli; hlt for the second
    spec = several(tmp_path, first=BOTH_HALT, second=b"\xFA\xF4\xEB\xFD")
    async with running(tmp_path, [spec], dispatch="gentle") as service:
        scheduler = service._scheduler
        await until(lambda: len(scheduler.figures_of("two")) == 2
                    and not any(one.awake for one in scheduler.figures_of("two")))
        before = sum(vcpu.run_ns for vcpu in service._picture().vms[0].vcpus)
        await until(lambda: service._picture().vms[0].vcpus)
        assert sum(vcpu.run_ns for vcpu in service._picture().vms[0].vcpus) - before < 50_000_000
        await service.act("two", "stop")
        assert vm(service, "two").state == "stopped"


async def test_a_vm_of_two_vcpus_and_one_of_one_share_a_cpu_by_their_weights(tmp_path):
    vms = [several(tmp_path, weight=100), {"name": "one", "mode": "hardware", "boot": {"guest": "alu"}, "weight": 100}]
    async with running(tmp_path, vms, dispatch="gentle") as service:
        def entitled(name: str) -> float:
            return sum(one.entitled_share for one in service._scheduler.figures_of(name))

        await until(lambda: entitled("two") == pytest.approx(0.5, abs=0.01)
                    and entitled("one") == pytest.approx(0.5, abs=0.01))
        assert [one.entitled_share for one in service._scheduler.figures_of("two")] == pytest.approx([0.25, 0.25])
        await service.act("one", "pause")
        await until(lambda: entitled("two") == pytest.approx(1.0, abs=0.01))


async def test_dispatch_by_signals_refuses_it_and_says_why(tmp_path):
    async with running(tmp_path, [several(tmp_path)], dispatch="signal") as service:
        shown = vm(service, "two")
        assert shown.state == "failed"
        assert "stops whole processes" in shown.state_reason


async def test_a_vcpu_that_crashes_is_named_in_the_reason(tmp_path):
    # lidt [cs:8] (limit 0); ud2
    second = bytes.fromhex("2e0f011e0800 0f0b").ljust(16, b"\0")
    async with running(tmp_path, [several(tmp_path, second=second)]) as service:
        await until(lambda: vm(service, "two").state == "crashed")
        assert "vCPU 1" in vm(service, "two").state_reason
