"""What KVM means when it refuses, and what it is on this host: in plain words, with what to do.

Source: the KVM API documentation and the kernel's kvm_main.c, vmx.c and svm.c. A number that is not
here is told as the system words it.
"""

from __future__ import annotations

import errno
import functools
from typing import Final, NamedTuple

from ...hosts.virtualization import technology

__all__ = ["HostKvm", "is_busy", "refusal", "what_kvm_is"]

_WORDS: Final = {
    errno.EBUSY: "another hypervisor holds VT-x or AMD-V (VirtualBox or VMware running a VM, or a driver of theirs "
                 "that does not give it back). Stop its VMs; `mixvisor host` names the ones that it knows",
    errno.EIO: "the CPU refused to switch VT-x on, as it does when the firmware or another hypervisor holds it. Look "
               "for \"kvm:\" in the kernel log",
    errno.EOPNOTSUPP: "KVM cannot use this CPU's VT-x or AMD-V; often it is switched off in the firmware setup (BIOS)",
    errno.ENODEV: "the module behind /dev/kvm is gone. Load it again: sudo modprobe kvm_intel (or kvm_amd)",
    errno.ENXIO: "the module behind /dev/kvm is gone. Load it again: sudo modprobe kvm_intel (or kvm_amd)",
    errno.EPERM: "this process may not: a container or a security module (SELinux, AppArmor) forbids it",
    errno.EACCES: "this process may not: a container or a security module (SELinux, AppArmor) forbids it",
    errno.ENOMEM: "the kernel has no memory for another VM. Free some, or give the VMs less",
    errno.EMFILE: "too many files are open in this process (limit nofile)",
    errno.ENFILE: "too many files are open on this host (sysctl fs.file-max)",
    errno.ENOSPC: "KVM has no identifiers left for another VM. End some VMs",
    errno.EINVAL: "this kernel's KVM does not know the request: it is older than Linux 4.11, or was built without it",
    errno.ENOTTY: "/dev/kvm is no KVM device, or one that lacks this request",
}


def refusal(error: OSError) -> str:
    """The sentence for an OSError of an ioctl, whose text begins with the name of the call."""
    words = _WORDS.get(error.errno or 0)
    said = f"{error.strerror or error} ({errno.errorcode.get(error.errno or 0, 'no number')})"
    return f"this host's KVM refused to make a VM: {said}" + (f": {words}" if words else "")


def is_busy(error: OSError) -> bool:
    """It says that somebody else holds the virtualization hardware."""
    return error.errno in (errno.EBUSY, errno.EIO)


class HostKvm(NamedTuple):
    """What this host's KVM is, and what to do about what it cannot do."""

    name: str
    advice: str
    pages_32: bool                    # it can do 32-bit paging


_SOFTWARE: Final = 'run it with mode = "software"'
_KINDS: Final = {
    "vt-x": HostKvm("KVM on VT-x", _SOFTWARE, True), "amd-v": HostKvm("KVM on AMD-V", _SOFTWARE, True),
    "pvm": HostKvm("PVM (KVM without VT-x or AMD-V, which emulates all but 64-bit code of ring 3)",
                   f"{_SOFTWARE}, or on a host with VT-x or AMD-V", False),
    "none": HostKvm("a KVM of unknown kind", _SOFTWARE, True),
}
_ENOUGH: Final = 16384                     # of /proc/cpuinfo: the first processor's flags; all of it takes long


@functools.cache
def what_kvm_is() -> HostKvm:
    """Reads /proc at the first call."""
    return _KINDS[technology(_flags(), _modules(), kvm_usable=True)]


def _flags() -> frozenset[str]:
    for line in _begin("/proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            return frozenset(value.split())
    return frozenset()


def _modules() -> frozenset[str]:
    return frozenset(line.split(" ")[0] for line in _begin("/proc/modules").splitlines())


def _begin(path: str) -> str:
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read(_ENOUGH).decode(errors="replace")
    except OSError:
        return ""
