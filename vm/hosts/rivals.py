"""Looking for other hypervisors: modules, device nodes and the processes that hold them open.

Theory.  A process that holds a hypervisor's node open uses it; /proc/PID/fd says which. Where a
process may not be looked into (another user's, without privileges) its name is all there is. This
program's own VMs are its descendants and are left out. It costs one small file a process and one
link an open file, some ten milliseconds on a host of a few hundred processes, and is done in a
thread of the supervisor, off the CPUs of VMs: nothing of the scheduler waits for it.

Invariant.  Only looking: no VM is made and no other hypervisor's node is opened.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..conflicts import Evidence, Holder
from ..modes import Technology
from .files import cpu_list, cpus_refused, field, kernel_log, model_register, parameter, switched_on, text
from .virtualization import platform

__all__ = ["look_for_rivals"]

NODES: Final = frozenset({
    "/dev/kvm", "/dev/vboxdrv", "/dev/vboxdrvu", "/dev/vmmon", "/dev/mshv", "anon_inode:kvm-vm"})
DRIVERS: Final = ("vboxdrv", "vmmon")
_EFER: Final = 0xC000_0080
_SVME: Final = 1 << 12
_STAT: Final = re.compile(r"\d+ \((.*)\) \S (\d+)", re.DOTALL)    # pid (name) state parent


@dataclass(frozen=True, slots=True)
class _Process:
    pid: int
    name: str
    parent: int


def look_for_rivals(
    root: Path = Path("/"), technology: Technology = "none", *, own: int | None = None, log: str | None = None,
) -> Evidence:
    """What other hypervisors show now. own: the process whose descendants are left out.
    log: the kernel's messages to judge (default: those since boot).
    """
    processes = list(_processes(root))
    ours = _family(processes, own)
    holders: list[Holder] = []
    unseen = 0
    ours_on_kvm = False
    for process in processes:
        if process.parent == 2 or process.pid == 2:
            continue                   # kernel threads hold no files
        nodes = _nodes(root, process.pid)
        if process.pid in ours:
            ours_on_kvm |= bool(nodes and nodes & {"/dev/kvm", "anon_inode:kvm-vm"})
            continue
        unseen += nodes is None
        if nodes or nodes is None:
            holders.append(Holder(process.pid, process.name, nodes or frozenset(), nodes is not None))
    flags = frozenset(field(text(root / "proc/cpuinfo"), "flags").split())
    at_load = switched_on(parameter(root, "kvm", "enable_virt_at_load"))
    kvm_is_idle = not ours_on_kvm and at_load is not True and not any(
        holder.nodes & {"/dev/kvm", "anon_inode:kvm-vm"} for holder in holders)
    messages = kernel_log(root) if log is None else log
    return Evidence(
        technology=technology, platform=platform(root, flags), drivers=dict(_drivers(root)),
        holders=tuple(holders), virt_at_load=at_load,
        # With files unseen, a VM on KVM may be among them: then EFER says nothing.
        svm_cpus=_svm_cpus(root) if technology == "amd-v" and kvm_is_idle and not unseen else (),
        refused_cpus=tuple(sorted(cpus_refused(messages))), unseen=unseen)


def _processes(root: Path) -> Iterator[_Process]:
    try:
        names = os.listdir(root / "proc")
    except OSError:
        return
    for name in names:
        if name.isdecimal():
            match = _STAT.match(text(root / "proc" / name / "stat"))
            if match:                  # else it has ended meanwhile
                yield _Process(int(name), match[1], int(match[2]))


def _family(processes: list[_Process], head: int | None) -> set[int]:
    """`head` and its descendants."""
    if head is None:
        return set()
    children: dict[int, list[int]] = {}
    for process in processes:
        children.setdefault(process.parent, []).append(process.pid)
    found, left = {head}, [head]
    while left:
        new = [pid for pid in children.get(left.pop(), ()) if pid not in found]
        found.update(new)
        left += new
    return found


def _nodes(root: Path, pid: int) -> frozenset[str] | None:
    """The hypervisors' nodes that a process holds open; None where it may not be looked into."""
    folder = f"{root}/proc/{pid}/fd"
    try:
        numbers = os.listdir(folder)
    except OSError:
        return None
    found: set[str] = set()
    for number in numbers:
        try:
            target = os.readlink(f"{folder}/{number}")
        except OSError:
            continue                   # closed meanwhile
        if target in NODES:
            found.add(target)
    return frozenset(found)


def _drivers(root: Path) -> Iterator[tuple[str, str]]:
    loaded = {line.split()[0] for line in text(root / "proc/modules").splitlines() if line.strip()}
    for name in DRIVERS:
        folder = root / "sys/module" / name
        if name in loaded or folder.is_dir():
            yield name, (text(folder / "version").split() or [""])[0]


def _svm_cpus(root: Path) -> tuple[int, ...]:
    cpus = cpu_list(text(root / "sys/devices/system/cpu/online"))
    return tuple(cpu for cpu in cpus if (model_register(root, cpu, _EFER) or 0) & _SVME)
