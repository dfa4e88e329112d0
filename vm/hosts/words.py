"""A host in plain words: what there is, and what follows from it for the VMs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ...config.model import format_cpus

if TYPE_CHECKING:
    from ..host import HostFacts, Privileges

__all__ = ["NICE_NEEDED", "RTPRIO_NEEDED", "explain"]

RTPRIO_NEEDED: Final = 10                      # the dispatcher's; VM threads are at 2 and 1
NICE_NEEDED: Final = 20                        # RLIMIT_NICE that lets a thread go back to nice 0


def explain(facts: HostFacts) -> list[str]:
    """What the host has and what that means, a sentence or two a line."""
    lines = [
        f"CPU: {facts.cpu_model}, {_cpus_sentence(facts)}",
        f"Memory: {facts.memory_bytes / 2**30:.1f} GiB, "
        f"{facts.memory_available_bytes / 2**30:.1f} GiB of it available.",
        f"Kernel: Linux {facts.kernel}{_around(facts)}.",
        f"Hardware virtualization: {_TECHNOLOGY_WORDS[facts.technology]}",
    ]
    if facts.kvm.state == "usable" and facts.x86:
        many = f" At most {facts.kvm.vcpus_max} vCPUs a VM." if facts.kvm.vcpus_max else ""
        lines.append(f"/dev/kvm: usable. Hardware VMs can run.{many}")
    elif facts.x86:
        lines.append(f"/dev/kvm: {facts.kvm.state.replace('-', ' ')}: {facts.kvm.why}. "
                     f"Only software VMs can run. {facts.kvm.remedy}")
    else:
        lines.append("This is no x86 processor: only software VMs can run.")
    lines += _virtualization_lines(facts)
    lines += _privilege_lines(facts.privileges)
    return lines


_TECHNOLOGY_WORDS: Final = {
    "vt-x": "VT-x (Intel). Mixing software and hardware VMs can cost a little speed here.",
    "amd-v": "AMD-V. The warning about mixing software and hardware VMs does not apply here.",
    "pvm": "PVM (KVM without VT-x or AMD-V, as in cloud VMs). 64-bit applications run at full "
           "speed, kernels and 16 and 32-bit code are emulated slowly; the rule about mixing "
           "says nothing about it, only measuring does.",
    "none": "none. Software VMs run, and they need no CPU feature.",
}


def _around(facts: HostFacts) -> str:
    platform = facts.virtualization.platform
    if platform in ("Xen dom0", "Hyper-V root partition"):
        return f", as {platform}"
    if not facts.virtualized and not platform:
        return ""
    return f", inside a virtual machine ({platform})" if platform else ", inside a virtual machine"


def _virtualization_lines(facts: HostFacts) -> list[str]:
    have, lines = facts.virtualization, []
    if facts.technology in ("vt-x", "amd-v"):
        paging = "EPT" if facts.technology == "vt-x" else "NPT"
        parts = {
            True: f"the CPU walks the guests' page tables ({paging})",
            False: f"no {paging}: KVM shadows the guests' page tables, so guests that change them often are slow",
            None: f"whether {paging} is in use is not known",
        }[have.extended_paging]
        if have.unrestricted_guest is False:
            parts += "; no unrestricted guest: 16-bit code is partly emulated by KVM"
        if have.tagged_tlb is False:
            parts += "; no VPID: every switch between VMs empties the TLB"
        lines.append(f"Memory of guests: {parts}.")
        where = " This host is itself a VM, so every VM exit also costs one of its own host." if (
            facts.virtualized) else ""
        lines.append(f"Nested virtualization: {_NESTED[have.nested]}{where}")
    elif have.platform == "Xen dom0":
        lines.append("Xen: it keeps VT-x or AMD-V for itself; hardware VMs run under Xen's own tools, not here.")
    if have.platform == "WSL2" and facts.kvm.state != "usable":
        lines.append("WSL2: hardware VMs need nestedVirtualization=true under [wsl2] in %UserProfile%\\.wslconfig "
                     "(Windows 11), then wsl --shutdown.")
    if have.firmware.state == "locked":
        lines.append(f"Firmware: it has hardware virtualization switched off ({have.firmware.how}). Enable VT-x or "
                     "SVM in its setup (BIOS).")
    if facts.technology in ("vt-x", "amd-v") and have.virt_at_load is not None:
        lines.append(
            "KVM at load: it holds VT-x or AMD-V with no VM running (enable_virt_at_load=Y); other hypervisors "
            "cannot take it meanwhile." if have.virt_at_load else
            "KVM at load: it takes VT-x or AMD-V with its first VM (enable_virt_at_load=N).")
    if facts.x86 and not have.long_mode:
        lines.append("This CPU is 32-bit: 64-bit guests run in software only.")
    if have.mitigations:
        lines.append("Cost of VM entries: " + "; ".join(
            f"{m.effect} ({m.name})" for m in have.mitigations) + ". Software VMs do not pay it.")
    return lines


_NESTED: Final = {
    True: "guests may run hypervisors of their own.",
    False: "guests may not run hypervisors of their own.",
    None: "not known.",
}


def _cpus_sentence(facts: HostFacts) -> str:
    count = len(facts.online_cpus)
    cores = len({(cpu.socket, cpu.core) for cpu in facts.topology})
    sockets = len({cpu.socket for cpu in facts.topology})
    text = (f"{count} online CPU{'s' if count != 1 else ''} ({format_cpus(facts.online_cpus)}) on "
            f"{cores} core{'s' if cores != 1 else ''}")
    if sockets > 1:
        text += f" in {sockets} sockets"
    caches = len({cpu.cache for cpu in facts.topology})
    if caches > sockets:
        text += f", with {caches} last-level caches"
    if facts.cpus != facts.online_cpus:
        text += f"; this process may use {format_cpus(facts.cpus)}"
    if count == 1:
        text += ". With one CPU nothing is left over for the rest of the system"
    return text + "."


def _privilege_lines(may: Privileges) -> list[str]:
    grant = ("Run as root, or grant CAP_SYS_NICE (systemd: AmbientCapabilities=CAP_SYS_NICE), or "
             f"raise the limits rtprio to {RTPRIO_NEEDED} and nice to 0 in "
             "/etc/security/limits.conf.")
    lines: list[str] = []
    if may.can_real_time:
        throttled = ("" if may.rt_runtime_us == -1 else
                     " (the kernel throttles them; VMs breathe to avoid it)")
        lines.append("Real-time priorities: permitted"
                     f"{throttled}. Precise dispatch is possible; a self-test at start decides.")
    else:
        lines.append("Real-time priorities: not permitted, so slices are not exact. " + grant)
    if may.can_demote_and_promote:
        lines.append("Raising a thread's priority again: permitted. Gentle dispatch is possible.")
    else:
        lines.append(
            "Raising a thread's priority again: not permitted, so turns are enforced by stopping "
            "and continuing VMs. " + grant)
    return lines
