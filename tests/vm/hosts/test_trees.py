"""What is read from the trees of many hosts, and what is said about them."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mixvisor.sched.policy import cores_of
from mixvisor.vm.host import HostFacts, KvmAnswers, explain
from mixvisor.vm.hosts.files import kernel_log, model_register, switched_on
from mixvisor.vm.hosts.kvm import ask_kvm

Host = Callable[[str], Path]
WORKS = KvmAnswers(12, 1024, True, True)


def answers(value: KvmAnswers | int) -> Callable[[Path], KvmAnswers]:
    def ask(_device: Path) -> KvmAnswers:
        if isinstance(value, int):
            raise OSError(value, os.strerror(value))
        return value
    return ask


def read(root: Path, value: KvmAnswers | int) -> HostFacts:
    return HostFacts.read(root, answers(value))


MISSING = errno.ENOENT


@pytest.mark.parametrize(("name", "kvm", "technology", "paging", "unrestricted", "tagged"), [
    ("vt-x", WORKS, "vt-x", True, True, True),
    ("vt-x-no-ept", WORKS, "vt-x", False, False, False),
    ("vt-x-old-kernel", MISSING, "vt-x", True, None, True),
    ("amd-v", WORKS, "amd-v", True, True, True),
    ("none", MISSING, "none", None, None, None),
    ("locked-intel", MISSING, "none", None, None, None),
    ("locked-amd", MISSING, "amd-v", True, True, True),
    ("pvm", WORKS, "pvm", False, None, None),
    ("nested", WORKS, "vt-x", True, True, True),
    ("virtualbox", WORKS, "vt-x", True, None, True),
    ("xen-dom0", MISSING, "none", None, None, None),
    ("wsl2", WORKS, "vt-x", True, True, True),
    ("virt-at-load", WORKS, "amd-v", True, True, True),
    ("32-bit", KvmAnswers(12, 288, False, False), "vt-x", False, False, False),
    ("arm64", KvmAnswers(12, 512, False, False), "none", None, None, None),
])
def test_each_host_is_told_for_what_it_is(
        host: Host, name: str, kvm: Any, technology: str, paging: bool | None, unrestricted: bool | None,
        tagged: bool | None) -> None:
    facts = read(host(name), kvm)
    have = facts.virtualization
    assert (facts.technology, have.extended_paging, have.unrestricted_guest, have.tagged_tlb) == (
        technology, paging, unrestricted, tagged)
    assert facts.modes.hardware == (kvm is not MISSING and technology != "none")
    assert all(line and not line.isspace() for line in explain(facts))


@pytest.mark.parametrize(("name", "kvm", "words"), [
    ("vt-x", WORKS, ["the CPU walks the guests' page tables (EPT)", "guests may run hypervisors",
                     "VERW clears CPU buffers (mmio_stale_data)", "a loop clears the branch history", "1024 vCPUs"]),
    ("vt-x-no-ept", WORKS, ["no EPT", "no unrestricted guest", "empties the TLB", "EPT is off"]),
    ("vt-x-old-kernel", MISSING, ["flushed, so the guest starts cold (l1tf)", "modprobe kvm_intel"]),
    ("amd-v", WORKS, ["(NPT)", "does not apply", "IBPB empties the branch predictors (spec_rstack_overflow)",
                      "(vmscape)"]),
    ("none", MISSING, ["inside a virtual machine (Google Compute Engine)", "Allow nested virtualization"]),
    ("locked-intel", MISSING, ["Firmware: it has hardware virtualization switched off (the kernel's log says so)",
                               "switch the machine off and on"]),
    ("locked-amd", MISSING, ["switched off (register VM_CR)"]),
    ("nested", WORKS, ["inside a virtual machine (KVM or QEMU)", "This host is itself a VM"]),
    ("xen-dom0", MISSING, ["as Xen dom0", "it keeps VT-x or AMD-V for itself"]),
    ("wsl2", MISSING, ["inside a virtual machine (WSL2)", "nestedVirtualization=true"]),
    ("virt-at-load", WORKS, ["with no VM running (enable_virt_at_load=Y)"]),
    ("32-bit", WORKS, ["This CPU is 32-bit"]),
    ("arm64", WORKS, ["no x86 processor: only software VMs can run"]),
    ("pvm", WORKS, ["only measuring does"]),
])
def test_the_words_say_what_matters_on_each_host(
        host: Host, name: str, kvm: Any, words: list[str]) -> None:
    text = "\n".join(explain(read(host(name), kvm)))
    for word in words:
        assert word in text
    if name in ("pvm", "none"):        # what is about VT-x and AMD-V is not said where there is neither
        assert "Nested virtualization" not in text
        assert "KVM at load" not in text


@pytest.mark.parametrize(("name", "kvm", "state", "how"), [
    ("vt-x", WORKS, "allows", "KVM works"),
    ("none", MISSING, "unknown", ""),
    ("locked-intel", MISSING, "locked", "the kernel's log says so"),
    ("locked-amd", MISSING, "locked", "register VM_CR"),
    ("vt-x-old-kernel", MISSING, "unknown", ""),
])
def test_the_firmware_lock_is_known_or_said_to_be_unknown(
        host: Host, name: str, kvm: Any, state: str, how: str) -> None:
    firmware = read(host(name), kvm).virtualization.firmware
    assert (firmware.state, firmware.how) == (state, how)


@pytest.mark.parametrize(("control", "state"), [(0x1, "locked"), (0x5, "allows"), (0x0, "allows"), (0x20005, "allows")])
def test_intels_lock_is_read_from_its_register(host: Host, control: int, state: str) -> None:
    root = host("vt-x-old-kernel")
    (root / "dev/cpu/0").mkdir(parents=True)
    (root / "dev/cpu/0/msr").write_bytes(bytes(0x3A) + control.to_bytes(8, "little"))
    facts = read(root, MISSING)
    assert facts.virtualization.firmware.state == state
    assert ("BIOS" in facts.kvm.remedy and "switched off" in facts.kvm.why) == (state == "locked")


def test_mitigations_that_are_not_in_force_are_not_told(host: Host) -> None:
    root = host("vt-x")
    folder = root / "sys/devices/system/cpu/vulnerabilities"
    (folder / "mmio_stale_data").write_text("Vulnerable: Clear CPU buffers attempted\n")
    (folder / "spectre_v2").write_text("Not affected\n")
    assert read(root, WORKS).virtualization.mitigations == ()


def test_what_kvm_itself_answers_has_the_last_word(host: Host) -> None:
    assert read(host("vt-x"), KvmAnswers(12, 1024, False, True)).virtualization.nested is False
    assert read(host("nested"), KvmAnswers(12)).virtualization.nested is False        # by the module
    facts = read(host("amd-v"), KvmAnswers(12, 1024, False, False))                   # a 32-bit kernel
    assert facts.virtualization.long_mode
    assert not facts.modes.long_mode


def test_threads_of_one_core_reach_the_mode_rules(host: Host) -> None:
    assert read(host("vt-x"), WORKS).modes.cores == ((0, 2), (1, 3))


# ---- permissions ------------------------------------------------------------------------------

def node(root: Path, mode: int, groups: str, *, own: str = "1000", member: str = "") -> str:
    device = root / "dev/kvm"
    device.parent.mkdir(parents=True, exist_ok=True)
    device.write_text("")
    device.chmod(mode)
    (root / "etc").mkdir(exist_ok=True)
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\njane:x:1000:1000::/home/jane:/bin/sh\n")
    (root / "etc/group").write_text(f"virt:x:{device.stat().st_gid}:{member}\n")
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    (root / "proc/self/status").write_text(f"Uid:\t{own}\t{own}\t{own}\t{own}\nGroups:\t{groups}\n")
    facts = read(root, errno.EACCES)
    assert facts.kvm.state == "forbidden"
    return facts.kvm.remedy


def test_who_may_not_open_dev_kvm_is_told_which_group_to_join(host: Host) -> None:
    assert "sudo usermod -aG virt USER" in node(host("vt-x"), 0o660, "5 6")


def test_a_member_since_this_login_is_told_to_log_in_again(host: Host) -> None:
    remedy = node(host("vt-x"), 0o660, "5 6", member="bob,jane")
    assert "log in again" in remedy
    assert "usermod" not in remedy


def test_a_node_that_no_group_may_use_is_told_with_the_rule_that_changes_it(host: Host) -> None:
    assert 'GROUP="kvm", MODE="0660"' in node(host("vt-x"), 0o600, "5 6")


def test_a_member_that_is_refused_all_the_same_is_told_to_look_at_the_container(host: Host) -> None:
    remedy = node(host("vt-x"), 0o660, f"5 {os.getgid()}")
    assert "DeviceAllow=/dev/kvm" in remedy


# ---- the readers ------------------------------------------------------------------------------

def test_a_parameter_is_on_off_or_unknown() -> None:
    assert [switched_on(value) for value in ("Y", "1", "N", "0", "", "-1", "auto")] == [
        True, True, False, False, None, None, None]


def test_what_may_not_be_read_is_absent(tmp_path: Path) -> None:
    assert kernel_log(tmp_path) == ""
    assert model_register(tmp_path, 0, 0x3A) is None
    (tmp_path / "dev/cpu/0").mkdir(parents=True)
    (tmp_path / "dev/cpu/0/msr").write_bytes(b"short")
    assert model_register(tmp_path, 0, 0x3A) is None


@pytest.mark.kvm
def test_the_kvm_of_this_host_answers_for_itself() -> None:
    found = ask_kvm(Path("/dev/kvm"))
    assert found.api_version == 12
    assert found.vcpus_max is not None
    assert found.vcpus_max >= 1
    assert found.long_mode is not None


def test_who_shares_a_core_and_who_a_last_level_cache_is_read(host: Host) -> None:
    facts = read(host("two-sockets"), WORKS)
    where = {cpu.cpu: cpu for cpu in facts.topology}
    assert [where[cpu].socket for cpu in range(8)] == [0, 1] * 4
    assert (where[3].siblings, where[3].cache) == ((3, 7), (1, 3, 5, 7))
    assert (where[4].siblings, where[4].cache) == ((0, 4), (0, 2, 4, 6))
    assert "8 online CPUs (0-7) on 4 cores in 2 sockets" in explain(facts)[0]
    siblings = {cpu.cpu: frozenset(cpu.siblings) for cpu in facts.topology}
    caches = {cpu.cpu: frozenset(cpu.cache) for cpu in facts.topology}
    assert cores_of(facts.online_cpus, siblings, caches) == ({0, 4}, {2, 6}, {1, 5}, {3, 7})
