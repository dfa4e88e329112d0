"""Other hypervisors: what is seen of them, which are a danger, and what is advised."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mixvisor.vm.conflicts import Conflict, Evidence, Holder, danger, judge
from mixvisor.vm.hosts.rivals import look_for_rivals

Host = Callable[[str], Path]


def seen(root: Path, technology: Any = "vt-x", **keys: Any) -> dict[str, Conflict]:
    return {found.code: found for found in judge(look_for_rivals(root, technology, **keys))}


def test_a_virtualbox_vm_on_vt_x_is_a_danger_and_its_helpers_are_not_named(host: Host) -> None:
    found = seen(host("virtualbox"))
    conflict = found["virtualbox-vms"]
    assert (conflict.dangerous, conflict.severity, conflict.pids) == (True, "critical", (2345,))
    assert "VBoxHeadless, pid 2345" in conflict.message
    assert "VBoxSVC" not in conflict.message
    assert "virtualbox-idle" not in found
    assert danger(found.values()) is conflict


def test_a_loaded_driver_without_a_vm_is_a_note(host: Host) -> None:
    found = seen(host("virtualbox-idle"))
    assert [(c.code, c.severity) for c in found.values()] == [("virtualbox-idle", "info")]
    assert danger(found.values()) is None


def test_a_process_that_may_not_be_looked_into_is_known_by_its_name(host: Host) -> None:
    conflict = seen(host("vmware"))["vmware-vms"]
    assert (conflict.dangerous, conflict.pids) == (True, (777,))


def test_others_on_kvm_are_a_note_and_this_programs_own_vms_are_no_others(host: Host) -> None:
    root = host("shared-kvm")
    found = seen(root, "amd-v", own=4000)
    assert [c.code for c in found.values()] == ["kvm-shared"]
    assert sorted(found["kvm-shared"].pids) == [5001, 5002, 5003]     # 5004 is QEMU without KVM
    assert found["kvm-shared"].severity == "info"
    assert danger(found.values()) is None
    assert 4002 in seen(root, "amd-v")["kvm-shared"].pids


@pytest.mark.parametrize("technology", ["pvm", "none"])
def test_a_rival_is_no_danger_where_kvm_uses_no_vt_x(host: Host, technology: str) -> None:
    conflict = seen(host("virtualbox"), technology)["virtualbox-vms"]
    assert not conflict.dangerous
    assert conflict.severity == "info"


def test_xen_below_linux_is_told(host: Host) -> None:
    assert "Xen keeps VT-x" in seen(host("xen-dom0"), "none")["hypervisor-below"].message


def test_amd_v_in_use_while_kvm_is_idle_is_told_but_not_while_kvm_itself_holds_it(host: Host) -> None:
    root = host("svm-held")
    assert "EFER.SVME" in seen(root, "amd-v")["virtualization-held"].message
    assert seen(root, "vt-x") == {}
    parameter = root / "sys/module/kvm/parameters/enable_virt_at_load"
    parameter.write_text("Y\n")
    assert seen(root, "amd-v") == {}
    parameter.write_text("N\n")
    (root / "proc/50").mkdir()
    (root / "proc/50/stat").write_text("50 (qemu-system-x86) S 1 50\n")
    assert seen(root, "amd-v").keys() == {"kvm-shared"}


def test_the_kernels_own_complaint_is_told_with_the_cpus(host: Host) -> None:
    log = "6,1,2,-;kvm: enabling virtualization on CPU3 failed\n6,2,3,-;kvm: enabling virtualization on CPU1 failed\n"
    assert "on CPU 1, 3:" in seen(host("vt-x"), log=log)["virtualization-held"].message
    root = host("vt-x")
    (root / "dev").mkdir(exist_ok=True)
    (root / "dev/kmsg").write_text(log)
    assert "virtualization-held" in seen(root)


# ---- VirtualBox beside KVM, by versions ----------------------------------------------------------

@pytest.mark.parametrize(("technology", "version", "at_load", "words"), [
    ("vt-x", "7.1.10", True, ["VERR_VMX_IN_VMX_ROOT_MODE", "enable_virt_at_load=0", "kvm_intel"]),
    ("amd-v", "7.2.8", True, ["VERR_SVM_IN_USE", "enable_virt_at_load=0", "kvm_amd"]),
    ("vt-x", "7.2.10", False, ["enable_virt_at_load=1", "issues/711"]),
    ("amd-v", "7.2.12", False, ["enable_virt_at_load=1", "kvm_amd"]),
    ("vt-x", "8.0.0", False, ["enable_virt_at_load=1"]),
    ("vt-x", "", True, ["VirtualBox up to 7.2.8", "VirtualBox 7.2.10 and later"]),
])
def test_virtualbox_advice_depends_on_its_version_and_on_who_holds_vt_x(
        technology: Any, version: str, at_load: bool, words: list[str]) -> None:
    (found,) = judge(Evidence(technology=technology, drivers={"vboxdrv": version}, virt_at_load=at_load))
    for word in words:
        assert word in found.advice


@pytest.mark.parametrize(("version", "at_load"), [("7.1.10", False), ("7.1.10", None), ("7.2.10", True), ("", None)])
def test_where_virtualbox_can_run_the_advice_is_only_not_at_the_same_time(version: str, at_load: bool | None) -> None:
    (found,) = judge(Evidence(technology="vt-x", drivers={"vboxdrv": version}, virt_at_load=at_load))
    assert found.advice == "Do not run its VMs and hardware VMs at the same time."


def test_the_versions_are_read_from_the_module(host: Host) -> None:
    advice = seen(host("virt-at-load"), "amd-v")["virtualbox-idle"].advice
    assert "With this version" in advice
    assert "VERR_SVM_IN_USE" in advice


def test_dangers_come_first_and_long_lists_are_cut() -> None:
    holders = [Holder(n, "qemu-system-x86", frozenset({"/dev/kvm"})) for n in range(10)]
    holders.append(Holder(99, "vmware-vmx", frozenset({"/dev/vmmon"})))
    found = judge(Evidence(technology="vt-x", holders=tuple(holders)))
    assert [conflict.code for conflict in found] == ["vmware-vms", "kvm-shared"]
    assert "and 4 more" in found[1].message
    assert len(found[1].pids) == 10


# ---- this very host ---------------------------------------------------------------------------

def test_this_process_and_its_children_are_no_rivals_of_themselves() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        try:
            evidence = look_for_rivals(Path("/"), "none", own=os.getpid())
        finally:
            child.kill()
    assert not {child.pid, os.getpid()} & {holder.pid for holder in evidence.holders}


@pytest.mark.kvm
def test_a_real_process_on_the_real_kvm_is_seen() -> None:
    with subprocess.Popen(["sleep", "60"], stdin=os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)) as child:
        try:
            evidence = look_for_rivals(Path("/"), "none")
            (found,) = [holder for holder in evidence.holders if holder.pid == child.pid]
            assert found.nodes == {"/dev/kvm"}
        finally:
            child.kill()
