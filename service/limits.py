"""What the kernel allows a service of many VMs: open files and processes.

Theory.  A VM holds some descriptors here (its process, its control socket, the pages that it shares, its images) and
one or two in the dispatcher of its host CPU; it is a process, with a thread for each vCPU. The soft limit of
open files is usually 1024 for the sake of select(), which nobody here uses, so it is raised to the hard one. Whatever
does not suffice even so is said once, when the service starts, with what to do; VMs that find no room fail, each by
itself.

Facts.  Processes and threads count alike against `pids.max` of every cgroup above (v1: the controller `pids`; v2), and,
but for root, against RLIMIT_NPROC of the user. Where they are used up fork is EAGAIN.
"""

from __future__ import annotations

import errno
import os
import re
import resource
from pathlib import Path
from typing import Final

from ..vm.hosts.files import number, text

__all__ = ["OPEN_FILES_A_VM", "explain", "processes_left", "raise_open_files", "shortage"]

OPEN_FILES: Final = 64             # of the service itself
OPEN_FILES_A_VM: Final = 10        # a process, its socket, its pages and image, what is open while it starts
OPEN_FILES_A_DISK: Final = 2       # with an overlay
UNLIMITED: Final = 1 << 62


def raise_open_files() -> int:
    """The soft limit up to the hard one; children inherit it. Returns how many may be open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard not in (soft, resource.RLIM_INFINITY):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return UNLIMITED if soft == resource.RLIM_INFINITY else soft


def processes_left(root: Path = Path("/"), user: int | None = None) -> int:
    """How many processes and threads may still be started. user: None is whoever runs this."""
    left = UNLIMITED
    groups = text(root / "proc/self/cgroup")
    folders = [root / "sys/fs/cgroup/pids" / path.lstrip("/")
               for path in re.findall(r"^\d+:(?:[^:\n]*,)?pids(?:,[^:\n]*)?:(.*)$", groups, re.MULTILINE)]
    folders += [root / "sys/fs/cgroup" / path.lstrip("/") for path in re.findall(r"^0::(.*)$", groups, re.MULTILINE)]
    for folder in folders:
        while folder != root and root in folder.parents:
            most = number(text(folder / "pids.max"), -1)       # "max", or none here: no limit
            if most >= 0:
                left = min(left, most - number(text(folder / "pids.current"), 0))
            folder = folder.parent
    if (os.geteuid() if user is None else user) != 0:
        soft, _hard = resource.getrlimit(resource.RLIMIT_NPROC)
        if soft != resource.RLIM_INFINITY:
            left = min(left, soft)                             # of all that the user runs: at most so many
    return max(0, left)


def shortage(*, vms: int, vcpus: int, disks: int, cpus: int, open_files: int, processes: int) -> tuple[str, str] | None:
    """What does not suffice, and what to do; None: all of it does. vcpus, disks: of all VMs; cpus: of theirs."""
    need = OPEN_FILES + OPEN_FILES_A_VM * vms + OPEN_FILES_A_DISK * disks
    short: list[str] = []
    advice: list[str] = []
    if need > open_files:
        short.append(f"about {need} open files, and this service may have {open_files}")
        advice.append("the limit of open files (ulimit -Hn, LimitNOFILE= of the systemd unit)")
    if (threads := vcpus + cpus + 2) > processes:
        short.append(f"{threads} processes and threads, and {processes} more are allowed")
        advice.append("the limit of processes (pids.max of the cgroup, TasksMax= of the unit, ulimit -u)")
    if not short:
        return None
    return (f"{vms} VMs need {'; and '.join(short)}: some of them will not start",
            f"raise {' and '.join(advice)}, or run fewer VMs")


def explain(error: OSError) -> str:
    """A refusal of the kernel in words, with what to do where a limit was reached."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "no file descriptor is left: raise the limit of open files (ulimit -Hn, LimitNOFILE=)"
    if error.errno == errno.EAGAIN:
        return ("the kernel allows no further process: raise the limit (pids.max of the cgroup, TasksMax= of the unit,"
                " ulimit -u)")
    if error.errno == errno.ENOMEM:
        return "the kernel has no memory left for another process"
    return f"{type(error).__name__}: {error}"
