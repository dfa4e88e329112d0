"""Hosts that are not at hand, as small trees of files."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mixvisor.vm.host import HostFacts, KvmAnswers, explain

from ..trees import tree

INTEL = "vendor_id : GenuineIntel\nmodel name : Xeon\nflags : fpu lm vmx\n"
AMD = "vendor_id : AuthenticAMD\nmodel name : EPYC\nflags : fpu lm svm\n"
CLOUD = "vendor_id : AuthenticAMD\nmodel name : EPYC\nflags : fpu lm hypervisor\n"
PLAIN = "vendor_id : GenuineIntel\nmodel name : Core\nflags : fpu lm\n"


Ask = Callable[[Path], KvmAnswers]


def answers(version: int) -> Ask:
    return lambda _device: KvmAnswers(version)


def refuses(number: int) -> Ask:
    def ask(_device: Path) -> KvmAnswers:
        raise OSError(number, "refused")
    return ask


def host(root: Path, cpuinfo: str, ask: Ask, *, modules: str = "",
         **files: str) -> HostFacts:
    tree(root, {"proc/cpuinfo": cpuinfo, "proc/modules": modules, **files})
    return HostFacts.read(root, ask)


@pytest.mark.parametrize(("cpuinfo", "ask", "technology", "state"), [
    (INTEL, answers(12), "vt-x", "usable"),
    (AMD, answers(12), "amd-v", "usable"),
    (CLOUD, answers(12), "pvm", "usable"),
    (CLOUD, refuses(errno.ENOENT), "none", "missing"),
    (PLAIN, refuses(errno.ENOENT), "none", "missing"),
    (INTEL, refuses(errno.ENOENT), "vt-x", "missing"),
    (INTEL, refuses(errno.ENODEV), "vt-x", "missing"),
    (AMD, refuses(errno.EACCES), "amd-v", "forbidden"),
    (AMD, refuses(errno.EPERM), "amd-v", "forbidden"),
    (INTEL, answers(11), "vt-x", "not-answering"),
    (INTEL, refuses(errno.ENOTTY), "vt-x", "not-answering"),
])
def test_technology_and_device_are_told_apart(
        tmp_path: Path, cpuinfo: str, ask: Ask, technology: str,
        state: str) -> None:
    facts = host(tmp_path, cpuinfo, ask)
    assert (facts.technology, facts.kvm.state) == (technology, state)
    assert facts.modes.hardware == (state == "usable")
    assert bool(facts.kvm.remedy) == bool(facts.kvm.why) == (state != "usable")


def test_pvm_is_known_by_its_module_although_the_flag_is_there(tmp_path: Path) -> None:
    assert host(tmp_path, INTEL, answers(12), modules="kvm_pvm 1 0 - Live 0x0\n"
                ).technology == "pvm"
    assert host(tmp_path, INTEL, answers(12), modules="kvm_pvm 1 0\nkvm_intel 1 0\n"
                ).technology == "vt-x"


@pytest.mark.parametrize(("cpuinfo", "modules", "remedy"), [
    (INTEL, "", "modprobe kvm_intel"),
    (AMD, "", "modprobe kvm_amd"),
    (AMD, "kvm_amd 1 0\n", "docker run --device /dev/kvm"),
    (CLOUD, "", "nested virtualization"),
    (PLAIN, "", "BIOS"),
])
def test_a_missing_device_has_the_remedy_of_its_cause(
        tmp_path: Path, cpuinfo: str, modules: str, remedy: str) -> None:
    facts = host(tmp_path, cpuinfo, refuses(errno.ENOENT), modules=modules)
    assert remedy in facts.kvm.remedy


def test_a_forbidden_device_has_the_group_as_its_remedy(tmp_path: Path) -> None:
    assert "group" in host(tmp_path, AMD, refuses(errno.EACCES)).kvm.remedy


def test_a_file_in_the_place_of_the_device_does_not_answer(tmp_path: Path) -> None:
    tree(tmp_path, {"proc/cpuinfo": INTEL, "dev/kvm": "no device"})
    assert HostFacts.read(tmp_path).kvm.state == "not-answering"


def test_modules_are_found_loaded_and_built_in(tmp_path: Path) -> None:
    (tmp_path / "sys/module/kvm").mkdir(parents=True)
    facts = host(tmp_path, INTEL, answers(12), modules="vboxdrv 1 0\next4 1 0\n")
    assert facts.modules == ("kvm", "vboxdrv")


def test_cpus_memory_and_topology_are_read(tmp_path: Path) -> None:
    files = {
        "sys/devices/system/cpu/online": "0-2,5\n",
        "proc/self/status": "Name:\tx\nCpus_allowed_list:\t1-2,5\n",
        "proc/meminfo": "MemTotal:    2048 kB\nMemAvailable:    1024 kB\n",
        "proc/sys/kernel/osrelease": "6.1.0-test\n",
    }
    for cpu, (core, socket, siblings) in {
            0: (0, 0, "0-1"), 1: (0, 0, "0-1"), 2: (1, 0, "2"), 5: (0, 1, "5")}.items():
        folder = f"sys/devices/system/cpu/cpu{cpu}/topology"
        files |= {f"{folder}/core_id": f"{core}\n", f"{folder}/physical_package_id": f"{socket}\n",
                  f"{folder}/thread_siblings_list": f"{siblings}\n"}
    for at, (level, kind, shared) in enumerate([(1, "Data", "0-1"), (1, "Instruction", "0-1"), (3, "Unified", "0-2")]):
        folder = f"sys/devices/system/cpu/cpu2/cache/index{at}"
        files |= {f"{folder}/level": f"{level}\n", f"{folder}/type": f"{kind}\n",
                  f"{folder}/shared_cpu_list": f"{shared}\n"}
    facts = host(tmp_path, INTEL, answers(12), **files)
    assert facts.online_cpus == (0, 1, 2, 5)
    assert facts.cpus == (1, 2, 5)
    assert [(cpu.core, cpu.socket, cpu.siblings) for cpu in facts.topology] == [
        (0, 0, (0, 1)), (0, 0, (0, 1)), (1, 0, (2,)), (0, 1, (5,))]
    # Where no cache is told, the core's siblings are the least that share one.
    assert [cpu.cache for cpu in facts.topology] == [(0, 1), (0, 1), (0, 1, 2), (5,)]
    assert (facts.memory_bytes, facts.memory_available_bytes) == (2 << 20, 1 << 20)
    assert facts.kernel == "6.1.0-test"
    assert (facts.limits.online_cpus, facts.limits.memory_bytes) == ((1, 2, 5), 2 << 20)
    assert "4 online CPUs (0-2,5) on 3 cores in 2 sockets" in explain(facts)[0]


def status(capabilities: int) -> dict[str, str]:
    return {"proc/self/status": f"Uid:\t1000\t1001\t0\t0\nCapEff:\t{capabilities:016x}\n"}


def limits(rtprio: str, nice: str) -> dict[str, str]:
    return {"proc/self/limits":
            "Limit                     Soft Limit           Hard Limit           Units     \n"
            f"Max nice priority         {nice:<20} 40\n"
            f"Max realtime priority     {rtprio:<20} 99\n"}


@pytest.mark.parametrize(("files", "real_time", "back"), [
    (status(0) | limits("0", "0"), False, False),
    (status(1 << 23) | limits("0", "0"), True, True),
    (status(1 << 21) | limits("0", "0"), False, False),
    (status(0) | limits("10", "0"), True, False),
    (status(0) | limits("9", "20"), False, True),
    (status(0) | limits("unlimited", "unlimited"), True, True),
    ({}, False, False),
])
def test_privileges_come_from_capabilities_and_limits(
        tmp_path: Path, files: dict[str, str], real_time: bool, back: bool) -> None:
    facts = host(tmp_path, AMD, answers(12), **files)
    assert facts.privileges.can_real_time is real_time
    assert facts.privileges.can_demote_and_promote is back
    said = "\n".join(explain(facts))
    assert ("Real-time priorities: permitted" in said) is real_time
    assert ("Grant" in said or "grant CAP_SYS_NICE" in said) is not (real_time and back)


def test_the_effective_user_and_the_throttle_are_read(tmp_path: Path) -> None:
    facts = host(tmp_path, AMD, answers(12), **status(0),
                 **{"proc/sys/kernel/sched_rt_runtime_us": "-1\n"})
    assert (facts.privileges.user_id, facts.privileges.rt_runtime_us) == (1001, -1)


def test_a_host_without_any_file_still_has_facts(tmp_path: Path) -> None:
    facts = HostFacts.read(tmp_path)
    assert (facts.technology, facts.kvm.state, facts.cpus) == ("none", "missing", (0,))
    assert all(explain(facts))


@pytest.mark.parametrize(("cpuinfo", "words"), [
    (INTEL, "VT-x"), (AMD, "does not apply"), (CLOUD, "PVM"), ])
def test_the_words_say_what_kind_of_virtualization_there_is(
        tmp_path: Path, cpuinfo: str, words: str) -> None:
    assert words in "\n".join(explain(host(tmp_path, cpuinfo, answers(12))))


def test_without_kvm_the_words_say_that_software_runs_and_what_to_do(tmp_path: Path) -> None:
    said = "\n".join(explain(host(tmp_path, INTEL, refuses(errno.ENOENT))))
    assert "Only software VMs can run" in said
    assert "modprobe kvm_intel" in said


def test_the_facts_of_this_very_host_can_be_read_and_written_as_json() -> None:
    facts = HostFacts.read()
    assert json.loads(json.dumps(facts.to_json()))["technology"] == facts.technology
    assert set(facts.cpus) <= set(facts.online_cpus)
    assert facts.memory_bytes > facts.memory_available_bytes > 0
