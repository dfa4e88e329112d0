"""Warnings: what an operator should know, raised and cleared while the service runs.

One `Board` holds the warnings that are true *now*, each under a stable code. Raising one that
is up already with the same text changes nothing; its coming and going is logged. The board is shown by the API,
the command line and as `mixvisor_warnings_active`.

KINDS has every code there is, with what it means and what to do: docs/warnings.md is printed from it, a section a
code, and each warning links to its section. A code may have a subject behind a colon (`log-lost:NAME`): then each
subject has a warning of its own, under the same section.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

import structlog

from ..metrics.snapshot import WarningSnapshot

__all__ = ["KINDS", "PAGE", "Board", "Kind", "Severity", "link", "sections", "strict_exit"]

log = structlog.get_logger("mixvisor")

Severity = Literal["info", "warning", "critical"]
PAGE: Final = "docs/warnings.md"
STRICT_EXIT: Final = 8               # of a command with --strict that had something to warn of


@dataclass(frozen=True, slots=True)
class Kind:
    """A code, for the documentation. `severity` is in words where it depends on the host."""

    code: str
    severity: str
    when: str
    means: str
    do: str


KINDS: Final[Mapping[str, Kind]] = {kind.code: kind for kind in (
    # Mixing.
    Kind("mixed-modes", "warning on VT-x, info elsewhere; light",
         "VMs of both modes run on this host.",
         "On VT-x the VirtualBox manual (10.3) warns that a small performance penalty is in certain cases unavoidable. "
         "On AMD-V it waives that, about PVM it says nothing: there the warning is a note. What a crossing of modes "
         "costs on this host is in the text once it was measured, with its interval.",
         "Where maximum performance matters, do not mix: let all VMs run in one mode (`mixvisor modes FILE` names the "
         "modes that are possible), keep the kinds on CPUs of their own (`policy = \"partition\"`), or let them take "
         "turns seldom (`policy = \"batch\"`)."),
    Kind("mixed-modes-core", "warning; medium",
         "On VT-x, VMs of both modes run at once on SMT siblings, two threads of one core.",
         "They share the core's caches, TLB and branch predictors while both run, so each can slow the other down.",
         "`policy = \"partition\"`, `cpus` that keep the kinds on different cores, or one mode for all."),
    Kind("mixed-modes-cpu", "warning; heavy",
         "On VT-x, VMs of both modes take turns on one host CPU.",
         "Every turn from one kind to the other is a crossing: what the manual's penalty is paid for. "
         "`mixvisor_host_cpu_mode_switches_total` counts them.",
         "`policy = \"partition\"` avoids crossings, `policy = \"batch\"` makes them fewer, longer slices "
         "(`slice_us`) do too; or one mode for all."),
    Kind("measuring", "info",
         "`mixvisor measure --vms` has borrowed VMs of this service (`measure = true` in their tables).",
         "A script decides when those VMs run, on one host CPU; they share their time evenly instead of by weight. VMs "
         "beside them keep their shares.",
         "Nothing: it is over in a minute, and everything goes back even if the one who measures dies. Pausing or "
         "stopping one of the VMs ends it at once."),
    # Other hypervisors.
    Kind("virtualbox-vms", "critical; info where KVM uses neither VT-x nor AMD-V",
         "VirtualBox runs VMs with its own driver (`/dev/vboxdrv` is held open).",
         "Two users of VT-x or AMD-V that do not know of each other can crash the whole host. Hardware VMs are not "
         "started meanwhile (`[host] conflicts = \"refuse\"`); those that run already are left alone.",
         "Stop VirtualBox's VMs, or run these VMs in software mode. `conflicts = \"warn\"` starts hardware VMs all the "
         "same, at the host's risk."),
    Kind("vmware-vms", "critical; info where KVM uses neither VT-x nor AMD-V",
         "VMware runs VMs with its own driver (`/dev/vmmon` is held open).",
         "The same as virtualbox-vms.", "The same as virtualbox-vms."),
    Kind("virtualbox-idle", "info",
         "VirtualBox's driver is loaded and none of its VMs runs.",
         "Harmless until one starts. Whether VirtualBox can start one beside a loaded KVM depends on its version and "
         "on `kvm.enable_virt_at_load` (Linux 6.12 and later): up to 7.2.8 it needs `0` or KVM unloaded "
         "(VERR_VMX_IN_VMX_ROOT_MODE, VERR_SVM_IN_USE), from 7.2.10 on it is reported to need `1` or KVM unloaded "
         "(VirtualBox issues 188, 711).",
         "Do not run its VMs and hardware VMs at the same time. The text has the advice for the version found."),
    Kind("vmware-idle", "info", "VMware's driver is loaded and none of its VMs runs.", "Harmless until one starts.",
         "Do not run its VMs and hardware VMs at the same time."),
    Kind("virtualization-held", "warning",
         "KVM could not have VT-x or AMD-V: it refused a VM (EBUSY), the kernel logged \"enabling virtualization on "
         "CPUn failed\", or AMD-V is switched on although no VM runs on KVM.",
         "Something else on this host holds the virtualization hardware, perhaps nothing that Mixvisor knows.",
         "Find and stop the other hypervisor, then start the VMs again; the warning goes when a hardware VM starts."),
    Kind("kvm-unusable", "warning", "`mixvisor host`: the CPU has VT-x or AMD-V, and this user cannot use `/dev/kvm`.",
         "Only software VMs can run. The text names the cause: no module, no permission, the firmware's lock.",
         "What the text says; then look again."),
    Kind("hypervisor-below", "info", "Linux runs as Xen's dom0 or as the root partition of Hyper-V.",
         "That hypervisor keeps VT-x or AMD-V and schedules the CPUs that Linux sees.",
         "Run hardware VMs with its tools, or boot Linux without it."),
    Kind("kvm-shared", "info", "Other programs run VMs on KVM (QEMU, Firecracker, Cloud Hypervisor and others).",
         "Safe: KVM shares VT-x and AMD-V among its users. But their CPU time is nobody's share here.",
         "Keep them off the CPUs of `[host] cpus` if shares are to hold."),
    # The scheduler and the service.
    Kind("dispatch-plain", "warning", "No kind of dispatch can be had.",
         "The kernel alone schedules the VMs; weights do not hold.", "Grant what the text names."),
    Kind("dispatch-signal", "warning", "VMs are scheduled by stopping and continuing their processes.",
         "Shares hold in the long run and coarsely.", "Grant what the text names."),
    Kind("dispatcher-died", "warning", "A dispatcher ended and was replaced.",
         "Its VMs were with the kernel meanwhile.", "Report it if it happens again."),
    Kind("guard-fired", "warning", "The guard found the supervisor stuck and gave every VM thread back.",
         "The VMs ran on under the kernel; dispatch is gentle from then on.",
         "Look for what stopped the supervisor, and restart it for precise dispatch."),
    Kind("guard-lost", "warning", "The guard's process ended.",
         "Dispatch is gentle: nobody would give real-time threads back.",
         "Look for what ended it, and restart the service."),
    Kind("host-cpus-gone", "warning", "A host CPU of `[host] cpus` is offline, or was taken from the service's cpuset.",
         "Its dispatcher has left and its VMs share the other CPUs; accounts and lags go on. It is used again when it "
         "comes back.", "Bring it back (`/sys/devices/system/cpu/cpuN/online`, `cpuset.cpus`), or take it out of "
         "`[host] cpus`."),
    Kind("affinity-impossible", "warning", "None of the host CPUs that a VM may use (`cpus`) is there.",
         "It runs on the others until one of its own comes back, as the kernel does with a thread.",
         "Bring one of its CPUs back, or `mixvisor set NAME cpus=all`."),
    Kind("reservations-not-met", "warning", "Host CPUs went, and the reservations do not fit on what is left.",
         "They are met in proportion.", "Bring the CPU back, or lower a reservation (`mixvisor set`)."),
    Kind("affinity-changed", "info", "Something other than Mixvisor has set the affinity of a VM's thread.",
         "It was put back within half a second: a vCPU belongs to one host CPU at a time. A changed cpuset does "
         "it too.",
         "Use `mixvisor set NAME cpus=...` instead of taskset."),
    Kind("modes-meet", "info", "Under `policy = \"partition\"` some VMs cannot be kept apart from the other mode.",
         "On the CPUs that they may use there is no core for their mode alone; where modes meet, a CPU changes modes "
         "as under batch.", "Let VMs use more cores (`[host] cpus`, `cpus` of the VM), or choose another policy."),
    Kind("nice-refused", "warning", "Under `policy = \"kernel\"` a nice level was refused.",
         "The VM's weight does not hold: its thread stays at the nice level that it has.",
         "Grant CAP_SYS_NICE or `LimitNICE=40`, or use weights of 100 and less."),
    Kind("caps-not-held", "info", "Under `policy = \"kernel\"` VMs have caps or reservations.",
         "That policy knows weights only.", "Choose another policy where they must hold."),
    Kind("no-spare-cpu", "info", "VMs may use every host CPU.", "The supervisor shares one with them.",
         "Leave one out of `[host] cpus`."),
    Kind("supervisor-priority", "info", "The supervisor may not raise its own priority.",
         "On a full host it may wake late.", "Grant CAP_SYS_NICE (systemd: `AmbientCapabilities=CAP_SYS_NICE`)."),
    Kind("limits-low", "warning",
         "The VMs of the configuration need more open files or processes than the kernel allows.",
         "Some of them will not start. The soft limit of open files has been raised to the hard one already.",
         "Raise what is named: `LimitNOFILE=` and `TasksMax=` of the systemd unit, `ulimit -Hn`, `ulimit -u`, "
         "`pids.max` of the cgroup; or run fewer VMs."),
    Kind("disk-failed", "warning",
         "The host could not read or write a disk of a VM (`disk-failed:NAME`): its file system is full, its medium "
         "fails, or a sector of an overlay is not what its checksum says.",
         "The guest got an error of the BIOS, as from a PC's disk; what was on the disk before is there still. The "
         "warning stays until the VM starts again.",
         "Free some space, or replace the disk; `mixvisor disk info FILE --verify` reads an overlay through."),
    Kind("log-lost", "warning", "A VM's serial log cannot be written (`log-lost:NAME`).",
         "What it says is lost; the VM runs on.",
         "Free some space on that disk."),
)}


def link(code: str) -> str:
    """Where the documentation explains a code."""
    return f"{PAGE}#{code.partition(':')[0]}"


def sections() -> str:
    """KINDS as the sections of docs/warnings.md."""
    parts: list[str] = []
    for kind in KINDS.values():
        parts.append(f"## {kind.code}\n**Severity:** {kind.severity}.\n\n**When:** {kind.when}\n\n"
                     f"**What it means:** {kind.means}\n\n**What to do:** {kind.do}\n")
    return "\n".join(parts)


def strict_exit(severities: Iterable[str]) -> int:
    """The exit code of a command under --strict: notes (info) do not count."""
    return STRICT_EXIT if any(severity != "info" for severity in severities) else 0


class Board:
    def __init__(self) -> None:
        self._up: dict[str, WarningSnapshot] = {}

    def put(
        self, code: str, severity: Severity, message: str, advice: str, vms: tuple[str, ...] = (), weight: str = "",
    ) -> None:
        """The warning is true from now on (or still, perhaps with another text)."""
        old = self._up.get(code)
        new = WarningSnapshot(code=code, severity=severity, message=message, advice=advice, link=link(code),
                              since_unix_s=old.since_unix_s if old else time.time(), vms=vms, weight=weight)
        if old == new:
            return
        self._up[code] = new
        # Which VMs it is about changes with every start and stop: shown, not logged each time.
        if old is None or old.severity != severity:
            write = log.info if severity == "info" else log.warning
            write(message, code=code, advice=advice, vms=list(vms), link=new.link)

    def clear(self, code: str) -> None:
        if self._up.pop(code, None) is not None:
            log.info("no longer so", code=code)

    def now(self) -> tuple[WarningSnapshot, ...]:
        return tuple(self._up.values())
