"""/dev/kvm: what it answers, whether it can be used, and the remedy where it cannot.

Theory.  Whether /dev/kvm can be *used* is another question than what the CPU has. It has four
answers, each with its own remedy: usable, missing, forbidden, not answering. KVM is asked itself
where it answers: its API version, how many vCPUs it takes, and what CPUID it would give a guest,
which says whether guests may have long mode and virtualization of their own.

Invariant.  No VM is made to find out: KVM_CREATE_VM switches VT-x on where it is off, which another
hypervisor that runs may not survive.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from .files import field, text

__all__ = ["KVM_API_VERSION", "KvmAnswers", "KvmFacts", "KvmState", "ask_kvm", "read_kvm"]

KVM_API_VERSION: Final = 12                    # the only one since Linux 2.6.22
_GET_API_VERSION: Final = 0xAE00               # _IO(KVMIO, 0x00), linux/kvm.h
_CHECK_EXTENSION: Final = 0xAE03
_GET_SUPPORTED_CPUID: Final = 0xC008AE05       # _IOWR(KVMIO, 0x05, struct kvm_cpuid2)
_CAP_MAX_VCPUS: Final = 66
_CPUID_ENTRIES: Final = 256
_CPUID_ENTRY: Final = struct.Struct("<10I")    # function, index, flags, eax, ebx, ecx, edx, padding
_VMX: Final = (1, 5, 5)                        # (function, word of the entry, bit): ECX is word 5
_SVM: Final = (0x8000_0001, 5, 2)
_LONG_MODE: Final = (0x8000_0001, 6, 29)

KvmState = Literal["usable", "missing", "forbidden", "not-answering"]


@dataclass(frozen=True, slots=True)
class KvmAnswers:
    """What a /dev/kvm says of itself; None: it would not say."""

    api_version: int
    vcpus_max: int | None = None
    nested: bool | None = None         # a guest may have VT-x or AMD-V of its own
    long_mode: bool | None = None      # a guest may be 64-bit


@dataclass(frozen=True, slots=True)
class KvmFacts:
    """Whether /dev/kvm can be used; `why` and `remedy` are "" when it can."""

    state: KvmState
    api_version: int | None
    why: str                           # a sentence without its full stop
    remedy: str                        # what to do, sentences
    vcpus_max: int | None = None
    nested: bool | None = None
    long_mode: bool | None = None


def ask_kvm(device: Path) -> KvmAnswers:
    """Ask a /dev/kvm. Raises OSError where it cannot be opened or is none."""
    descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    try:
        version = fcntl.ioctl(descriptor, _GET_API_VERSION, 0)
        if version != KVM_API_VERSION:
            return KvmAnswers(version)
        vcpus = fcntl.ioctl(descriptor, _CHECK_EXTENSION, _CAP_MAX_VCPUS)
        bits = _offered(descriptor)
        return KvmAnswers(version, vcpus or None, *((None, None) if bits is None else bits))
    finally:
        os.close(descriptor)


def _offered(descriptor: int) -> tuple[bool, bool] | None:
    """(nested virtualization, long mode) of the CPUID that guests may be given."""
    table = bytearray(8 + _CPUID_ENTRIES * _CPUID_ENTRY.size)
    struct.pack_into("<I", table, 0, _CPUID_ENTRIES)
    try:
        fcntl.ioctl(descriptor, _GET_SUPPORTED_CPUID, table, True)
    except OSError:
        return None
    (count,) = struct.unpack_from("<I", table)
    entries = [_CPUID_ENTRY.unpack_from(table, 8 + index * _CPUID_ENTRY.size)
               for index in range(min(count, _CPUID_ENTRIES))]

    def has(function: int, word: int, bit: int) -> bool:
        return any(entry[0] == function and entry[word] >> bit & 1 for entry in entries)

    return has(*_VMX) or has(*_SVM), has(*_LONG_MODE)


def read_kvm(
    root: Path, flags: Collection[str], modules: Collection[str], locked: str,
    answers: KvmAnswers | OSError,
) -> KvmFacts:
    """The state of `root`'s /dev/kvm, which gave `answers`. `locked`: how it is known that the
    firmware has switched virtualization off, "" where it has not or nobody knows.
    """
    if isinstance(answers, OSError):
        if isinstance(answers, PermissionError):
            return KvmFacts("forbidden", None, "this user may not open /dev/kvm", _admission(root, root / "dev/kvm"))
        if answers.errno in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
            # Without an entry, or one that is there (a static one, say) with no driver behind it.
            return KvmFacts("missing", None, *_missing(flags, modules, locked))
        return KvmFacts(
            "not-answering", None, f"/dev/kvm does not answer as KVM does ({answers.strerror})",
            "Check what /dev/kvm is (ls -l /dev/kvm: character device 10, 232) and the kernel log "
            "for \"kvm:\".")
    version = answers.api_version
    if version != KVM_API_VERSION:
        return KvmFacts(
            "not-answering", version,
            f"/dev/kvm answers with API version {version} where {KVM_API_VERSION} is the only one",
            "Check what /dev/kvm is: this is no KVM that Linux ever had.")
    return KvmFacts("usable", version, "", "", answers.vcpus_max, answers.nested, answers.long_mode)


def _missing(flags: Collection[str], modules: Collection[str], locked: str) -> tuple[str, str]:
    """(why, remedy) where there is no /dev/kvm."""
    if locked:
        return (f"the firmware has hardware virtualization switched off ({locked})",
                "Enable VT-x (Intel) or SVM (AMD) in the firmware setup (BIOS), then switch the machine "
                "off and on: a restart does not lift the lock everywhere.")
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


def _admission(root: Path, device: Path) -> str:
    """What lets this user open the node: it depends on whose the node is."""
    status = text(root / "proc/self/status")
    try:
        owner = device.stat()
    except OSError:
        return ("Add the user to the group that owns it (usually: sudo usermod -aG kvm USER), then "
                "log in again.")
    groups = {line.split(":")[2]: line.split(":") for line in text(root / "etc/group").splitlines()
              if line.count(":") >= 3}
    row = groups.get(str(owner.st_gid), ["kvm", "", "", ""])
    group = row[0]
    if owner.st_mode & 0o060 != 0o060:
        return (f"Its group ({group}) may not use it either: sudo chgrp kvm /dev/kvm && sudo chmod 660 "
                "/dev/kvm (a udev rule keeps it: KERNEL==\"kvm\", GROUP=\"kvm\", MODE=\"0660\"), then add "
                "the user to that group: sudo usermod -aG kvm USER.")
    ids = field(status, "Groups").split()
    if str(owner.st_gid) in ids:
        return ("The user is in its group already: something else forbids it. Look at the container's device "
                "rules (docker run --device /dev/kvm, systemd DeviceAllow=/dev/kvm rw).")
    if _user(root, status) in row[3].split(","):
        return f"The user is in the group {group} since after this login: log in again (or: newgrp {group})."
    return f"Add the user to its group: sudo usermod -aG {group} USER, then log in again."


def _user(root: Path, status: str) -> str | None:
    """The name of the user that this process is, as /etc/passwd has it."""
    ids = field(status, "Uid").split()
    for line in text(root / "etc/passwd").splitlines():
        parts = line.split(":")
        if ids and len(parts) > 2 and parts[2] == ids[0]:
            return parts[0]
    return None
