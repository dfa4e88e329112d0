"""What this host is: hardware virtualization, CPUs, memory, and what this process may do.

Theory.  Everything is read once from /proc, /sys and /dev below a replaceable root, so that a
host that is not at hand (VT-x, AMD-V, none, a container without /dev/kvm) is a small folder in a
test. Four kinds of hardware virtualization are told apart, because the mode rules and the mixing
warning differ: `vt-x` (flag vmx), `amd-v` (flag svm), `pvm` (a /dev/kvm that answers with neither
flag, or served by kvm_pvm: KVM on page tables inside a cloud VM) and `none`. Whether /dev/kvm can
be *used* is another question with four answers, each with its own remedy: usable, missing,
forbidden, not answering.

Invariants.  Reading changes nothing on the host (no VM is created to find out) and never raises
for a file that is absent: absent means "not there", and the facts say so. `HostFacts` is a frozen
value; nothing here is cached.

Units.  Memory in bytes. Limits as the kernel counts them: RLIMIT_RTPRIO 0..99, RLIMIT_NICE 0..40
(20 is nice 0).

Poor at: that real-time priorities are permitted on paper does not make them work
(CONFIG_RT_GROUP_SCHED answers EPERM to root in a child cpu cgroup): the self-test of the scheduler
has the last word. Another hypervisor that holds VT-x is not seen here.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

from ..config.model import format_cpus, parse_cpus
from ..config.rules import HostLimits
from .modes import ModeHost, Technology

__all__ = [
    "KVM_API_VERSION", "CpuFacts", "HostFacts", "KvmFacts", "KvmState", "Privileges",
    "ask_kvm_version", "explain",
]

KVM_API_VERSION: Final = 12                    # the only one since Linux 2.6.22
_KVM_GET_API_VERSION: Final = 0xAE00           # _IO(KVMIO, 0x00), linux/kvm.h
_CAP_SYS_ADMIN: Final = 21                     # linux/capability.h
_CAP_SYS_NICE: Final = 23
_RTPRIO_NEEDED: Final = 10                     # the dispatcher's; VM threads are at 2 and 1
_NICE_NEEDED: Final = 20                       # RLIMIT_NICE that lets a thread go back to nice 0
_MODULES: Final = ("kvm", "kvm_intel", "kvm_amd", "kvm_pvm", "vboxdrv", "vmmon")

KvmState = Literal["usable", "missing", "forbidden", "not-answering"]


@dataclass(frozen=True, slots=True)
class KvmFacts:
    """Whether /dev/kvm can be used; `why` and `remedy` are "" when it can."""

    state: KvmState
    api_version: int | None
    why: str                       # a sentence without its full stop
    remedy: str                    # what to do, sentences


@dataclass(frozen=True, slots=True)
class CpuFacts:
    """One online host CPU and where it sits."""

    cpu: int
    core: int
    socket: int
    siblings: tuple[int, ...]      # hardware threads of the same core, itself included


@dataclass(frozen=True, slots=True)
class Privileges:
    """What this process may do to scheduling, as the kernel's files say it."""

    user_id: int                   # effective
    sys_nice: bool                 # CAP_SYS_NICE
    sys_admin: bool                # CAP_SYS_ADMIN
    rtprio_limit: int              # RLIMIT_RTPRIO: highest real-time priority without CAP_SYS_NICE
    nice_limit: int                # RLIMIT_NICE: 20 allows nice 0 again after SCHED_IDLE
    rt_runtime_us: int | None      # kernel.sched_rt_runtime_us; -1 = no throttling, None = unknown

    @property
    def can_real_time(self) -> bool:
        """SCHED_FIFO at the priorities that precise dispatch uses."""
        return self.sys_nice or self.rtprio_limit >= _RTPRIO_NEEDED

    @property
    def can_demote_and_promote(self) -> bool:
        """SCHED_IDLE and back to SCHED_OTHER, which gentle dispatch does at every slice."""
        return self.sys_nice or self.nice_limit >= _NICE_NEEDED


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFacts:
    """A host at one moment. `cpus` are the online ones that this process may use: read the facts
    before the process pins itself anywhere, for a pin looks like a limit from outside.
    """

    technology: Technology
    kvm: KvmFacts
    kernel: str
    cpu_model: str
    x86: bool
    virtualized: bool              # the host is itself a virtual machine (flag hypervisor)
    online_cpus: tuple[int, ...]
    cpus: tuple[int, ...]
    topology: tuple[CpuFacts, ...]  # one for each of `online_cpus`
    memory_bytes: int
    memory_available_bytes: int
    modules: tuple[str, ...]       # hypervisor modules, loaded or built in
    privileges: Privileges

    @property
    def modes(self) -> ModeHost:
        """What the mode rules need."""
        return ModeHost(self.technology, self.kvm.state == "usable", self.kvm.why,
                        self.kvm.remedy)

    @property
    def limits(self) -> HostLimits:
        """What a configuration is held against."""
        return HostLimits(self.cpus, self.memory_bytes)

    def to_json(self) -> dict[str, Any]:
        """Plain values for `mixvisor host -o json`; keys are the field names."""
        return {**asdict(self), "privileges": {
            **asdict(self.privileges),
            "can_real_time": self.privileges.can_real_time,
            "can_demote_and_promote": self.privileges.can_demote_and_promote,
        }}

    @classmethod
    def read(cls, root: Path = Path("/"),
             kvm_version: Callable[[Path], int] | None = None) -> HostFacts:
        """Read the host below `root`. `kvm_version` asks a /dev/kvm (default: `ask_kvm_version`)
        and raises OSError where it cannot.
        """
        cpuinfo = _text(root / "proc/cpuinfo")
        flags = frozenset(_field(cpuinfo, "flags").split())
        modules = _modules(root)
        kvm = _kvm(root, flags, modules, kvm_version or ask_kvm_version)
        status = _text(root / "proc/self/status")
        online = (_cpu_list(_text(root / "sys/devices/system/cpu/online"))
                  or tuple(int(n) for n in re.findall(r"^processor\s*:\s*(\d+)", cpuinfo, re.M))
                  or (0,))
        may_use = set(_cpu_list(_field(status, "Cpus_allowed_list"))) or set(online)
        memory = _text(root / "proc/meminfo")
        return cls(
            technology=_technology(flags, modules, kvm),
            kvm=kvm,
            kernel=_text(root / "proc/sys/kernel/osrelease").strip() or "unknown",
            cpu_model=_field(cpuinfo, "model name") or "unknown",
            x86="fpu" in flags,      # other architectures call the line Features
            virtualized="hypervisor" in flags,
            online_cpus=online,
            cpus=tuple(cpu for cpu in online if cpu in may_use) or online,
            topology=tuple(_topology(root, cpu) for cpu in online),
            memory_bytes=_kib(memory, "MemTotal") * 1024,
            memory_available_bytes=_kib(memory, "MemAvailable") * 1024,
            modules=modules,
            privileges=_privileges(root, status),
        )


def ask_kvm_version(device: Path) -> int:
    """KVM_GET_API_VERSION of a /dev/kvm. Raises OSError."""
    descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    try:
        return fcntl.ioctl(descriptor, _KVM_GET_API_VERSION, 0)
    finally:
        os.close(descriptor)


# ---- reading ---------------------------------------------------------------------------------

def _text(path: Path) -> str:
    """The file's text, "" where there is none: absence is a fact about the host, not an error."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _field(text: str, key: str) -> str:
    """The value of the first `key : value` line."""
    match = re.search(rf"^{re.escape(key)}[ \t]*:[ \t]*(.*)$", text, re.MULTILINE)
    return match[1].strip() if match else ""


def _kib(text: str, key: str) -> int:
    match = re.match(r"\d+", _field(text, key))
    return int(match[0]) if match else 0


def _cpu_list(text: str) -> tuple[int, ...]:
    try:
        return parse_cpus(text.strip())
    except ValueError:
        return ()                  # empty or absent: the caller has another source


def _number(text: str, default: int) -> int:
    match = re.match(r"-?\d+", text.strip())
    return int(match[0]) if match else default


def _modules(root: Path) -> tuple[str, ...]:
    # /proc/modules has no built-in ones, /sys/module may be hidden in a container: ask both.
    loaded = {line.split()[0] for line in _text(root / "proc/modules").splitlines() if line.strip()}
    return tuple(name for name in _MODULES
                 if name in loaded or (root / "sys/module" / name).is_dir())


def _topology(root: Path, cpu: int) -> CpuFacts:
    folder = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
    siblings = _cpu_list(_text(folder / "thread_siblings_list"))
    return CpuFacts(
        cpu=cpu,
        core=_number(_text(folder / "core_id"), cpu),
        socket=max(0, _number(_text(folder / "physical_package_id"), 0)),   # -1: unknown
        siblings=siblings or (cpu,),
    )


def _privileges(root: Path, status: str) -> Privileges:
    try:
        capabilities = int(_field(status, "CapEff"), 16)
    except ValueError:
        capabilities = 0
    limits = _text(root / "proc/self/limits")
    runtime = _text(root / "proc/sys/kernel/sched_rt_runtime_us")
    user = _field(status, "Uid").split()
    return Privileges(
        user_id=int(user[1]) if len(user) > 1 else 0,
        sys_nice=bool(capabilities >> _CAP_SYS_NICE & 1),
        sys_admin=bool(capabilities >> _CAP_SYS_ADMIN & 1),
        rtprio_limit=_limit(limits, "Max realtime priority"),
        nice_limit=_limit(limits, "Max nice priority"),
        rt_runtime_us=int(runtime) if re.fullmatch(r"-?\d+\s*", runtime) else None,
    )


def _limit(limits: str, name: str) -> int:
    """The soft limit of a row of /proc/self/limits; "unlimited" is the kernel's most."""
    match = re.search(rf"^{name}\s+(\S+)", limits, re.MULTILINE)
    if not match:
        return 0
    return 99 if match[1] == "unlimited" else _number(match[1], 0)


# ---- KVM --------------------------------------------------------------------------------------

def _technology(flags: frozenset[str], modules: Iterable[str], kvm: KvmFacts) -> Technology:
    loaded = set(modules)
    if kvm.state == "usable" and "kvm_pvm" in loaded and not loaded & {"kvm_intel", "kvm_amd"}:
        return "pvm"
    if "vmx" in flags:
        return "vt-x"
    if "svm" in flags:
        return "amd-v"
    return "pvm" if kvm.state == "usable" else "none"


def _kvm(root: Path, flags: frozenset[str], modules: tuple[str, ...],
         ask: Callable[[Path], int]) -> KvmFacts:
    device = root / "dev/kvm"
    try:
        version = ask(device)
    except FileNotFoundError:
        return KvmFacts("missing", None, *_missing(flags, modules))
    except PermissionError:
        return KvmFacts(
            "forbidden", None, "this user may not open /dev/kvm",
            "Add the user to the group that owns it (usually: sudo usermod -aG kvm USER), then "
            "log in again.")
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.ENODEV):
            # The node is there (a static one, say), the driver behind it is not.
            return KvmFacts("missing", None, *_missing(flags, modules))
        return KvmFacts(
            "not-answering", None, f"/dev/kvm does not answer as KVM does ({error.strerror})",
            "Check what /dev/kvm is (ls -l /dev/kvm: character device 10, 232) and the kernel log "
            "for \"kvm:\".")
    if version != KVM_API_VERSION:
        return KvmFacts(
            "not-answering", version,
            f"/dev/kvm answers with API version {version} where {KVM_API_VERSION} is the only one",
            "Check what /dev/kvm is: this is no KVM that Linux ever had.")
    return KvmFacts("usable", version, "", "")


def _missing(flags: frozenset[str], modules: tuple[str, ...]) -> tuple[str, str]:
    """(why, remedy) where there is no /dev/kvm."""
    module = "kvm_intel" if "vmx" in flags else "kvm_amd" if "svm" in flags else None
    if module is None:
        if "hypervisor" in flags:
            return ("this host is a virtual machine whose CPU offers no hardware virtualization",
                    "Allow nested virtualization for it where it is hosted.")
        return ("this host's CPU offers no hardware virtualization",
                "If it has VT-x or AMD-V, enable it in the firmware setup (BIOS).")
    if module in modules:
        return ("/dev/kvm is missing although KVM is loaded",
                "In a container, pass the device in (docker run --device /dev/kvm); else make the "
                "node with: sudo mknod /dev/kvm c 10 232.")
    return ("the kernel's KVM module is not loaded",
            f"Load it: sudo modprobe {module}. If that fails, enable "
            f"{'VT-x' if module == 'kvm_intel' else 'AMD-V (SVM)'} in the firmware setup (BIOS).")


# ---- plain words ------------------------------------------------------------------------------

def explain(facts: HostFacts) -> list[str]:
    """What the host has and what that means, a sentence or two a line."""
    lines = [
        f"CPU: {facts.cpu_model}, {_cpus_sentence(facts)}",
        f"Memory: {facts.memory_bytes / 2**30:.1f} GiB, "
        f"{facts.memory_available_bytes / 2**30:.1f} GiB of it available.",
        f"Kernel: Linux {facts.kernel}{', inside a virtual machine' if facts.virtualized else ''}.",
        f"Hardware virtualization: {_TECHNOLOGY_WORDS[facts.technology]}",
    ]
    if facts.kvm.state == "usable":
        lines.append("/dev/kvm: usable. Hardware VMs can run.")
    else:
        lines.append(f"/dev/kvm: {facts.kvm.state.replace('-', ' ')}: {facts.kvm.why}. "
                     f"Only software VMs can run. {facts.kvm.remedy}")
    lines += _privilege_lines(facts.privileges)
    others = [name for name in facts.modules if name in ("vboxdrv", "vmmon")]
    if others:
        lines.append(
            f"Another hypervisor's driver is loaded ({', '.join(others)}): do not run its VMs "
            "beside hardware VMs, two users of VT-x or AMD-V can crash the host.")
    if not facts.x86:
        lines.append("This is no x86 processor: only software VMs can run.")
    return lines


_TECHNOLOGY_WORDS: Final = {
    "vt-x": "VT-x (Intel). Mixing software and hardware VMs can cost a little speed here.",
    "amd-v": "AMD-V. The warning about mixing software and hardware VMs does not apply here.",
    "pvm": "PVM (KVM without VT-x or AMD-V, as in cloud VMs). 64-bit applications run at full "
           "speed, kernels and 16 and 32-bit code are emulated slowly; the rule about mixing "
           "says nothing about it, only measuring does.",
    "none": "none. Software VMs run, and they need no CPU feature.",
}


def _cpus_sentence(facts: HostFacts) -> str:
    count = len(facts.online_cpus)
    cores = len({(cpu.socket, cpu.core) for cpu in facts.topology})
    sockets = len({cpu.socket for cpu in facts.topology})
    text = (f"{count} online CPU{'s' if count != 1 else ''} ({format_cpus(facts.online_cpus)}) on "
            f"{cores} core{'s' if cores != 1 else ''}")
    if sockets > 1:
        text += f" in {sockets} sockets"
    if facts.cpus != facts.online_cpus:
        text += f"; this process may use {format_cpus(facts.cpus)}"
    if count == 1:
        text += ". With one CPU nothing is left over for the rest of the system"
    return text + "."


def _privilege_lines(may: Privileges) -> list[str]:
    grant = ("Run as root, or grant CAP_SYS_NICE (systemd: AmbientCapabilities=CAP_SYS_NICE), or "
             f"raise the limits rtprio to {_RTPRIO_NEEDED} and nice to 0 in "
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
