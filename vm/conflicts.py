"""Other hypervisors on the host: which are there, which are a danger, and what to do.

Theory.  The manual (chapter 10.3) forbids other hypervisors beside ours: it cannot track what they
do with VT-x, and two users of it can crash the whole host. What counts is *whose driver* switches
VT-x or AMD-V on. Everybody on KVM shares it through KVM, which is safe and a note. A driver of its
own (VirtualBox's vboxdrv, VMware's vmmon) that runs a VM is the danger. Such a driver loaded with no VM
running is harmless until it does. Evidence (vm/hosts/rivals.py) is judged here and nowhere else.

VirtualBox and Linux 6.12: with kvm.enable_virt_at_load=Y, KVM holds VT-x on every CPU although no
VM runs, and VirtualBox up to 7.2.8 then fails (VERR_VMX_IN_VMX_ROOT_MODE, VERR_SVM_IN_USE). From
7.2.10 on it is reported to want the opposite (VERR_SVM_HOST_SVME_NOT_ENABLED with N; VirtualBox issues
188, 711). So the advice depends on both.

Invariants.  Pure. Codes are stable. Only `dangerous` conflicts refuse hardware VMs; they are about a driver
that uses VT-x or AMD-V now, never about one that merely could.

Poor at: on Intel nothing tells passively that VT-x is taken; a rival that is neither on the list nor on
a known device node is seen only when KVM refuses (vm/engines/kvm/errors.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from .modes import Technology

__all__ = ["Conflict", "Evidence", "Holder", "danger", "judge"]

NAMES_SHOWN: Final = 6


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that holds hypervisors' device nodes open. `seen` is False where its files may not
    be looked at, so that its name is all there is.
    """

    pid: int
    name: str                          # as the kernel keeps it, 15 characters
    nodes: frozenset[str]
    seen: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What was found on the host at one moment."""

    technology: Technology
    platform: str = ""                              # the hypervisor below Linux, or ""
    drivers: Mapping[str, str] = field(default_factory=dict[str, str])   # module -> its version ("" unknown)
    holders: tuple[Holder, ...] = ()                # other processes; this program's own VMs are left out
    virt_at_load: bool | None = None
    svm_cpus: tuple[int, ...] = ()                  # AMD-V switched on there although no KVM VM runs
    refused_cpus: tuple[int, ...] = ()              # "kvm: enabling virtualization on CPUn failed" in the log
    unseen: int = 0                                 # processes whose files may not be looked at


@dataclass(frozen=True, slots=True)
class Conflict:
    """One finding. `dangerous`: hardware VMs should not start beside it."""

    code: str
    severity: Literal["info", "warning", "critical"]
    dangerous: bool
    message: str
    advice: str
    pids: tuple[int, ...] = ()


def danger(conflicts: Iterable[Conflict]) -> Conflict | None:
    """The first conflict beside which hardware VMs should not start."""
    return next((conflict for conflict in conflicts if conflict.dangerous), None)


def judge(evidence: Evidence) -> tuple[Conflict, ...]:
    """Every conflict that the evidence shows, dangers first."""
    found = [*_virtualbox(evidence), *_vmware(evidence), *_held(evidence), *_below(evidence), *_on_kvm(evidence)]
    return tuple(sorted(found, key=lambda conflict: not conflict.dangerous))


# ---- drivers of their own ---------------------------------------------------------------------

_VIRTUALBOX_VMS: Final = ("VBoxHeadless", "VirtualBoxVM", "VBoxSDL")
_VMWARE_VMS: Final = ("vmware-vmx",)


def _virtualbox(evidence: Evidence) -> Iterable[Conflict]:
    vms = _using(evidence, "/dev/vboxdrv", _VIRTUALBOX_VMS)
    if vms:
        yield _rival(evidence, "virtualbox-vms", "VirtualBox", vms)
    elif "vboxdrv" in evidence.drivers:
        version = evidence.drivers["vboxdrv"]
        said = f"VirtualBox's driver {version + ' ' if version else ''}is loaded; none of its VMs runs."
        yield Conflict("virtualbox-idle", "info", False, said, _virtualbox_advice(evidence))


def _vmware(evidence: Evidence) -> Iterable[Conflict]:
    vms = _using(evidence, "/dev/vmmon", _VMWARE_VMS)
    if vms:
        yield _rival(evidence, "vmware-vms", "VMware", vms)
    elif "vmmon" in evidence.drivers:
        yield Conflict("vmware-idle", "info", False, "VMware's driver is loaded; none of its VMs runs.",
                       "Do not start VMware's VMs while hardware VMs run here.")


def _using(evidence: Evidence, node: str, names: tuple[str, ...]) -> list[Holder]:
    """Processes that have the node open; where that cannot be seen, those with such a name."""
    return [holder for holder in evidence.holders
            if node in holder.nodes or (not holder.seen and holder.name.startswith(tuple(n[:15] for n in names)))]


def _rival(evidence: Evidence, code: str, who: str, vms: list[Holder]) -> Conflict:
    what = {"vt-x": "VT-x", "amd-v": "AMD-V"}.get(evidence.technology)
    pids = tuple(holder.pid for holder in vms)
    said = f"{who} runs VMs on this host ({_named(vms)})"
    if what is None:
        said += "; this host's KVM uses neither VT-x nor AMD-V, so they share none."
        return Conflict(code, "info", False, said,
                        "Nothing needs to be done.", pids)
    advice = (f"Stop {who}'s VMs, or run these VMs in software mode. [host] conflicts = \"warn\" lets hardware VMs "
              "start all the same, at the host's risk.")
    if who == "VirtualBox":
        advice += f" {_virtualbox_advice(evidence)}"
    said += f" with a driver of its own: two users of {what} can crash the whole host."
    return Conflict(code, "critical", True, said, advice, pids)


_SINCE_ON_KVM: Final = (7, 2, 10)


def _virtualbox_advice(evidence: Evidence) -> str:
    """What makes VirtualBox work beside KVM (never at once), by its version and the kernel's parameter."""
    at_load = evidence.virt_at_load
    error = "VERR_SVM_IN_USE" if evidence.technology == "amd-v" else "VERR_VMX_IN_VMX_ROOT_MODE"
    module = "kvm_amd" if evidence.technology == "amd-v" else "kvm_intel"
    one_at_a_time = "Do not run its VMs and hardware VMs at the same time."
    if at_load is None:
        return one_at_a_time
    version = _version(evidence.drivers.get("vboxdrv", ""))
    older = (f"while enable_virt_at_load=Y its VMs fail with {error} (load the module kvm with enable_virt_at_load=0, "
             f"or unload {module})")
    newer = (f"it is reported to fail unless enable_virt_at_load=1 or {module} is unloaded "
             "(github.com/VirtualBox/virtualbox/issues/711)")
    if version is None:
        return f"{one_at_a_time} VirtualBox up to 7.2.8: {older}. VirtualBox 7.2.10 and later: {newer}."
    if version < _SINCE_ON_KVM:
        return f"{one_at_a_time} With this version {older}." if at_load else one_at_a_time
    return one_at_a_time if at_load else f"{one_at_a_time} From version 7.2.10 on {newer}."


def _version(text: str) -> tuple[int, ...] | None:
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", text)
    return tuple(int(part) for part in match.groups()) if match else None


# ---- signs that something holds it --------------------------------------------------------------

def _held(evidence: Evidence) -> Iterable[Conflict]:
    if evidence.refused_cpus:
        yield Conflict(
            "virtualization-held", "warning", False,
            "The kernel could not switch hardware virtualization on for KVM on CPU "
            f"{', '.join(map(str, evidence.refused_cpus))}: something else holds it.",
            "Stop the other hypervisor (`mixvisor host` names those that it knows), then start the VMs again.")
    elif evidence.svm_cpus:
        yield Conflict(
            "virtualization-held", "warning", False,
            f"AMD-V is switched on (EFER.SVME) on CPU {', '.join(map(str, evidence.svm_cpus))} although no VM runs "
            "on KVM: another driver holds it.",
            "Find and stop the other hypervisor before hardware VMs start; KVM would refuse them (EBUSY).")


def _below(evidence: Evidence) -> Iterable[Conflict]:
    if evidence.platform in ("Xen dom0", "Hyper-V root partition"):
        who = "Xen" if evidence.platform == "Xen dom0" else "Hyper-V"
        yield Conflict(
            "hypervisor-below", "info", False,
            f"Linux runs as {evidence.platform}: {who} keeps VT-x or AMD-V and schedules the CPUs itself.",
            f"Run hardware VMs with {who}'s own tools, or boot Linux without {who}. Shares promised here hold only for "
            f"the CPU time that {who} gives to Linux.")


# ---- others on KVM ------------------------------------------------------------------------------

_KVM_NODES: Final = frozenset({"/dev/kvm", "anon_inode:kvm-vm"})
_KVM_USERS: Final = ("qemu-system-", "qemu-kvm", "firecracker", "cloud-hypervis", "crosvm", "lkvm")


def _on_kvm(evidence: Evidence) -> Iterable[Conflict]:
    users = [holder for holder in evidence.holders
             if holder.nodes & _KVM_NODES or (not holder.seen and holder.name.startswith(_KVM_USERS))]
    if users:
        yield Conflict(
            "kvm-shared", "info", False, f"Other programs run VMs on KVM ({_named(users)}); KVM shares it safely.",
            "Nothing needs to be done for safety's sake. Their CPU time is nobody's share here: keep them off the CPUs "
            "of [host] cpus.", tuple(holder.pid for holder in users))


def _named(holders: list[Holder]) -> str:
    shown = ", ".join(f"{holder.name}, pid {holder.pid}" for holder in holders[:NAMES_SHOWN])
    more = len(holders) - NAMES_SHOWN
    return shown + (f" and {more} more" if more > 0 else "")
