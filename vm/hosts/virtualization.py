"""The kind of hardware virtualization a host has, and what decides how fast entering a VM is.

Theory.  Four kinds are told apart, because the mode rules and the mixing warning differ: `vt-x`
(flag vmx), `amd-v` (flag svm), `pvm` (a /dev/kvm that answers with neither flag, or is served by
kvm_pvm: KVM on page tables inside a cloud VM) and `none`. For each feature there are two sources:
the CPU's flags (what there could be) and the parameters of the loaded KVM module (what is in use;
KVM clears a parameter that the CPU cannot keep). The module has the last word, the flags speak
while it is not loaded, and where neither says anything the answer is None: not known.

The firmware lock is known from the register that holds it (root, module `msr`), from the kernel's
log, or, where KVM works, from that. Newer kernels take the CPU flag away when the lock is on, so a
locked host looks like one without VT-x until one of the two speaks.

Invariant.  Reading changes nothing. What is unknown is None or "", never a guess.

Poor at: CPUs that differ from each other (one CPU's registers and flags stand for all).
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from ..modes import Technology
from .files import field, kernel_log, model_register, parameter, switched_on, text

__all__ = ["Firmware", "Mitigation", "Virtualization", "firmware", "mitigations", "platform", "technology"]

_FEATURE_CONTROL: Final = 0x3A             # Intel: IA32_FEATURE_CONTROL
_LOCKED, _VMX_ALLOWED = 1 << 0, 1 << 2     # bit 2: VMX outside of SMX
_VM_CR: Final = 0xC001_0114                # AMD
_SVM_DISABLED: Final = 1 << 4
_SAYS_LOCKED: Final = re.compile(
    r"(?:\bkvm(?:_intel|_amd)?: (?:support for .* )?disabled by bios"
    r"|VMX \(outside TXT\) disabled by BIOS|SVM disabled \(by BIOS\)|VMX not supported by BIOS)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Firmware:
    """Whether the firmware allows VT-x or AMD-V, and how that is known."""

    state: Literal["allows", "locked", "unknown"]
    how: str = ""


@dataclass(frozen=True, slots=True)
class Mitigation:
    """Something that the kernel does at every entry to or exit from a hardware VM because of a
    CPU defect; software VMs do not pay it.
    """

    name: str                          # of the file below /sys/devices/system/cpu/vulnerabilities
    state: str                         # what the kernel says of it
    effect: str                        # in words, when and what


@dataclass(frozen=True, slots=True)
class Virtualization:
    """What KVM has to work with. None: not known."""

    extended_paging: bool | None       # EPT (Intel) or NPT (AMD) is in use; else page tables are shadowed
    unrestricted_guest: bool | None    # VT-x runs real mode itself; AMD-V always does
    tagged_tlb: bool | None            # VPID or ASIDs: a VM switch need not flush the whole TLB
    nested: bool | None                # guests may use hardware virtualization themselves
    virt_at_load: bool | None          # KVM holds VT-x or AMD-V with no VM running (Linux 6.12 and later)
    firmware: Firmware
    long_mode: bool                    # a 64-bit CPU
    platform: str                      # the hypervisor around or below Linux ("Xen dom0", "WSL2"), or ""
    mitigations: tuple[Mitigation, ...]

    @classmethod
    def read(
        cls, root: Path, cpuinfo: str, kind: Technology, locked: Firmware, kvm_nested: bool | None,
    ) -> Virtualization:
        flags = frozenset(field(cpuinfo, "flags").split()) | frozenset(field(cpuinfo, "vmx flags").split())
        has_vmx_line = bool(field(cpuinfo, "vmx flags"))
        module = {"vt-x": "kvm_intel", "amd-v": "kvm_amd", "pvm": "kvm_pvm", "none": ""}[kind]

        def used(name: str, flag: str, *, told: bool = True) -> bool | None:
            """`told`: whether this kernel's flags would name the feature."""
            value = switched_on(parameter(root, module, name)) if module else None
            return value if value is not None else (flag in flags or (None if not told else False))

        paging = unrestricted = tagged = None
        if kind == "vt-x":
            paging = used("ept", "ept")
            # Kernels before 5.7 have no line "vmx flags" and name it nowhere but in the module.
            unrestricted = used("unrestricted_guest", "unrestricted_guest", told=has_vmx_line)
            tagged = used("vpid", "vpid")
        elif kind == "amd-v":
            paging, unrestricted, tagged = used("npt", "npt"), True, True
        elif kind == "pvm":
            paging, tagged = False, None
        nested = switched_on(parameter(root, module, "nested")) if module else None
        return cls(
            extended_paging=paging, unrestricted_guest=unrestricted, tagged_tlb=tagged,
            nested=kvm_nested if kvm_nested is not None else nested,
            virt_at_load=switched_on(parameter(root, "kvm", "enable_virt_at_load")),
            firmware=locked, long_mode="lm" in flags, platform=platform(root, flags),
            mitigations=mitigations(root) if kind in ("vt-x", "amd-v") else ())


def technology(flags: Collection[str], modules: Collection[str], *, kvm_usable: bool) -> Technology:
    """Which of the four kinds it is. Only x86 has any of them (other CPUs call the line Features)."""
    if "fpu" not in flags:
        return "none"
    if kvm_usable and "kvm_pvm" in modules and not {"kvm_intel", "kvm_amd"} & set(modules):
        return "pvm"
    if "vmx" in flags:
        return "vt-x"
    if "svm" in flags:
        return "amd-v"
    return "pvm" if kvm_usable else "none"


def firmware(root: Path, cpuinfo: str, modules: Collection[str], *, kvm_usable: bool) -> Firmware:
    """Whether the firmware lets VT-x or AMD-V be used."""
    vendor = field(cpuinfo, "vendor_id")
    loaded = {"GenuineIntel": "kvm_intel", "AuthenticAMD": "kvm_amd"}.get(vendor)
    if kvm_usable and loaded in modules:
        return Firmware("allows", "KVM works")
    if vendor == "GenuineIntel":
        control = model_register(root, 0, _FEATURE_CONTROL)
        if control is not None:
            return (Firmware("locked", "register IA32_FEATURE_CONTROL")
                    if control & _LOCKED and not control & _VMX_ALLOWED
                    else Firmware("allows", "register IA32_FEATURE_CONTROL"))
    elif vendor == "AuthenticAMD":
        control = model_register(root, 0, _VM_CR)
        if control is not None:
            return Firmware("locked" if control & _SVM_DISABLED else "allows", "register VM_CR")
    if _SAYS_LOCKED.search(kernel_log(root)):
        return Firmware("locked", "the kernel's log says so")
    return Firmware("unknown")


# ---- below and around -------------------------------------------------------------------------

_MAKERS: Final = tuple((re.compile(pattern, re.IGNORECASE), name) for pattern, name in (
    (r"innotek|virtualbox", "VirtualBox"), (r"vmware", "VMware"), (r"microsoft", "Hyper-V"),
    (r"amazon", "Amazon EC2"), (r"google", "Google Compute Engine"), (r"parallels", "Parallels"),
    (r"qemu|kvm|red ?hat|openstack|proxmox|bochs", "KVM or QEMU"), (r"xen", "Xen"),
))


def platform(root: Path, flags: Collection[str]) -> str:
    """The hypervisor that Linux runs under or rules with; "" on a bare machine or where it has no name."""
    release = text(root / "proc/sys/kernel/osrelease").lower()
    if "microsoft" in release:
        return "WSL2"
    if text(root / "sys/hypervisor/type").strip() == "xen":
        return "Xen dom0" if "control_d" in text(root / "proc/xen/capabilities") else "Xen guest"
    if (root / "dev/mshv").exists():
        return "Hyper-V root partition"
    if "hypervisor" not in flags:
        return ""
    made = " ".join(text(root / "sys/class/dmi/id" / name) for name in ("sys_vendor", "product_name", "bios_vendor"))
    return next((name for pattern, name in _MAKERS if pattern.search(made)), "")


# ---- what entering a VM costs because of CPU defects ------------------------------------------

# File, what its text must say, and what the kernel then does. Source: Documentation/admin-guide/hw-vuln.
_AT_ENTRY: Final = tuple((name, re.compile(pattern), effect) for name, pattern, effect in (
    ("l1tf", r"VMX: conditional cache flushes", "at entries after host work that could leak: the L1 data "
             "cache is flushed, so the guest starts cold"),
    ("l1tf", r"VMX: cache flushes", "at every entry: the L1 data cache is flushed, so the "
             "guest starts cold"),
    ("l1tf", r"VMX: EPT disabled", "EPT is off: page tables are shadowed"),
    ("mds", r"Clear CPU buffers", "at every entry: VERW clears CPU buffers"),
    ("tsx_async_abort", r"Clear CPU buffers", "at every entry: VERW clears CPU buffers"),
    ("mmio_stale_data", r"Clear CPU buffers", "at every entry: VERW clears CPU buffers"),
    ("reg_file_data_sampling", r"Clear Register File", "at every entry: VERW clears the register file"),
    ("tsa", r"Clear CPU buffers", "at every entry: VERW clears CPU buffers"),
    ("itlb_multihit", r"KVM: Mitigation: Split huge pages", "guest code is never mapped by huge pages: more "
                      "TLB misses"),
    ("itlb_multihit", r"VMX disabled", "none while VT-x is off"),
    ("spectre_v2", r"IBPB: (?:always-on|conditional)", "at a switch to another VM: IBPB empties the branch "
                   "predictors"),
    ("spectre_v2", r"(?:^|[ ;])KVM: SW loop|BHI: SW loop", "at every exit: a loop clears the branch history"),
    ("spectre_v2", r"PBRSB-eIBRS: SW sequence", "at every exit: the return stack is made safe"),
    ("retbleed", r"Mitigation: (?:IBRS|IBPB|untrained return thunk)", "at every exit: branch predictors are made safe"),
    ("spec_rstack_overflow", r"IBPB", "at every exit: IBPB empties the branch predictors"),
    ("vmscape", r"IBPB", "before the exit is handled outside the kernel: IBPB empties the branch predictors"),
))


def mitigations(root: Path) -> tuple[Mitigation, ...]:
    """The mitigations in force that touch entering and leaving a hardware VM, in order of their files."""
    folder = root / "sys/devices/system/cpu/vulnerabilities"
    found: list[Mitigation] = []
    for name, pattern, effect in _AT_ENTRY:
        state = text(folder / name).strip()
        # "Vulnerable: ..." says what is not done; a part of it may be done all the same (l1tf).
        if state and not state.startswith("Not affected") and pattern.search(state) and (
                "Mitigation" in state or name == "l1tf"):
            found.append(Mitigation(name, state, effect))
    return tuple(found)
