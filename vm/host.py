"""What this host is: hardware virtualization, CPUs, memory, and what this process may do.

Theory.  Everything is read once from /proc, /sys and /dev below a replaceable root, so that a
host that is not at hand (VT-x with or without EPT, AMD-V, Xen dom0, WSL2, a container without
/dev/kvm) is a small folder in a test. The parts: hosts/kvm.py (can /dev/kvm be used, and what it
says of itself), hosts/virtualization.py (which kind of hardware virtualization, its features, the
firmware's lock, mitigations), hosts/words.py (all of it in plain words). Other hypervisors on the
host come and go: they are no fact of the host but a matter of the moment (vm/conflicts.py).

Invariants.  Reading changes nothing on the host (no VM is created to find out) and never raises
for a file that is absent: absent means "not there", and the facts say so. `HostFacts` is a frozen
value; nothing here is cached.

Units.  Memory in bytes. Limits as the kernel counts them: RLIMIT_RTPRIO 0..99, RLIMIT_NICE 0..40
(20 is nice 0).

Poor at: that real-time priorities are permitted on paper does not make them work
(CONFIG_RT_GROUP_SCHED answers EPERM to root in a child cpu cgroup): the self-test of the scheduler
has the last word.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from ..config.rules import HostLimits
from .conflicts import Conflict
from .hosts.files import cpu_list, field, kib, number, text
from .hosts.kvm import KVM_API_VERSION, KvmAnswers, KvmFacts, KvmState, ask_kvm, read_kvm
from .hosts.virtualization import Firmware, Mitigation, Virtualization, firmware, technology
from .hosts.words import NICE_NEEDED, RTPRIO_NEEDED, explain
from .modes import ModeHost, Technology

__all__ = [
    "KVM_API_VERSION", "CpuFacts", "Firmware", "HostFacts", "KvmAnswers", "KvmFacts", "KvmState", "Mitigation",
    "Privileges", "Virtualization", "ask_kvm", "explain", "unusable",
]

_CAP_SYS_ADMIN: Final = 21                     # linux/capability.h
_CAP_SYS_NICE: Final = 23
_MODULES: Final = ("kvm", "kvm_intel", "kvm_amd", "kvm_pvm", "vboxdrv", "vmmon")


@dataclass(frozen=True, slots=True)
class CpuFacts:
    """One online host CPU and where it sits."""

    cpu: int
    core: int
    socket: int
    siblings: tuple[int, ...]      # hardware threads of the same core, itself included
    cache: tuple[int, ...]         # CPUs behind the same last-level cache, itself included


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
        return self.sys_nice or self.rtprio_limit >= RTPRIO_NEEDED

    @property
    def can_demote_and_promote(self) -> bool:
        """SCHED_IDLE and back to SCHED_OTHER, which gentle dispatch does at every slice."""
        return self.sys_nice or self.nice_limit >= NICE_NEEDED


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
    virtualization: Virtualization
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
        cores = {tuple(sorted(cpu.siblings)) for cpu in self.topology}
        return ModeHost(
            self.technology, self.kvm.state == "usable" and self.x86, self.kvm.why, self.kvm.remedy,
            # KVM has the last word: under a 32-bit kernel a 64-bit CPU runs no 64-bit guests.
            long_mode=self.virtualization.long_mode if self.kvm.long_mode is None else self.kvm.long_mode,
            cores=tuple(sorted(cores)))

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
    def read(cls, root: Path = Path("/"), ask: Callable[[Path], KvmAnswers] = ask_kvm) -> HostFacts:
        """Read the host below `root`. `ask` asks a /dev/kvm and raises OSError where it cannot."""
        cpuinfo = text(root / "proc/cpuinfo")
        flags = frozenset(field(cpuinfo, "flags").split())
        modules = _modules(root)
        try:
            answers: KvmAnswers | OSError = ask(root / "dev/kvm")
        except OSError as error:
            answers = error
        usable = isinstance(answers, KvmAnswers) and answers.api_version == KVM_API_VERSION
        lock = firmware(root, cpuinfo, modules, kvm_usable=usable)
        kvm = read_kvm(root, flags, modules, lock.how if lock.state == "locked" else "", answers)
        kind = technology(flags, modules, kvm_usable=usable)
        status = text(root / "proc/self/status")
        online = (cpu_list(text(root / "sys/devices/system/cpu/online"))
                  or tuple(int(n) for n in re.findall(r"^processor\s*:\s*(\d+)", cpuinfo, re.M))
                  or (0,))
        may_use = set(cpu_list(field(status, "Cpus_allowed_list"))) or set(online)
        memory = text(root / "proc/meminfo")
        return cls(
            technology=kind,
            kvm=kvm,
            kernel=text(root / "proc/sys/kernel/osrelease").strip() or "unknown",
            cpu_model=field(cpuinfo, "model name") or "unknown",
            x86="fpu" in flags,      # other architectures call the line Features
            virtualized="hypervisor" in flags,
            virtualization=Virtualization.read(root, cpuinfo, kind, lock, kvm.nested),
            online_cpus=online,
            cpus=tuple(cpu for cpu in online if cpu in may_use) or online,
            topology=tuple(_topology(root, cpu) for cpu in online),
            memory_bytes=kib(memory, "MemTotal") * 1024,
            memory_available_bytes=kib(memory, "MemAvailable") * 1024,
            modules=modules,
            privileges=_privileges(root, status),
        )


def unusable(facts: HostFacts) -> tuple[Conflict, ...]:
    """A warning where the CPU has hardware virtualization that this user cannot use; else nothing."""
    if facts.technology == "none" or facts.kvm.state == "usable":
        return ()
    return (Conflict("kvm-unusable", "warning", False, f"Hardware VMs cannot run: {facts.kvm.why}.", facts.kvm.remedy),)


# ---- reading ---------------------------------------------------------------------------------

def _modules(root: Path) -> tuple[str, ...]:
    # /proc/modules has no built-in ones, /sys/module may be hidden in a container: ask both.
    loaded = {line.split()[0] for line in text(root / "proc/modules").splitlines() if line.strip()}
    return tuple(name for name in _MODULES
                 if name in loaded or (root / "sys/module" / name).is_dir())


def _topology(root: Path, cpu: int) -> CpuFacts:
    folder = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
    siblings = cpu_list(text(folder / "thread_siblings_list"))
    return CpuFacts(
        cpu=cpu,
        core=number(text(folder / "core_id"), cpu),
        socket=max(0, number(text(folder / "physical_package_id"), 0)),   # -1: unknown
        siblings=siblings or (cpu,),
        cache=_last_cache(root, cpu) or siblings or (cpu,),
    )


def _last_cache(root: Path, cpu: int) -> tuple[int, ...]:
    """Who shares the CPU's cache of the highest level; nobody, where that is not told."""
    caches = (root / f"sys/devices/system/cpu/cpu{cpu}/cache").glob("index[0-9]*")
    told = [(number(text(one / "level"), 0), cpu_list(text(one / "shared_cpu_list"))) for one in caches
            if text(one / "type").strip() != "Instruction"]
    return max(told, default=(0, ()))[1]


def _privileges(root: Path, status: str) -> Privileges:
    try:
        capabilities = int(field(status, "CapEff"), 16)
    except ValueError:
        capabilities = 0
    limits = text(root / "proc/self/limits")
    runtime = text(root / "proc/sys/kernel/sched_rt_runtime_us")
    user = field(status, "Uid").split()
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
    return 99 if match[1] == "unlimited" else number(match[1], 0)
