"""What several keys say together, and what the host allows: findings over a whole configuration.

Theory.  A model (config/model.py) can judge one key. Whether two VMs have one name, a reservation
fits below its cap, a counter lies inside the memory, or the host has the CPUs that are named, is
judged here, on values only: the configuration, a `HostLimits` and what was seen of each boot image.
Everything is found at once, nothing is raised, and the caller says it with file and line.

Invariants.  Pure. `at` of a finding is the place of the key in the file, as config/locate.py names
it. Codes are stable, one for each kind of fault.

Poor at: reservations are compared with the CPUs by sets that VMs name, not by a flow over all of
them; the scheduler's admission has the last word.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from .locate import Place
from .model import (
    GUESTS,
    PAGE_BYTES,
    ROM_MAX_BYTES,
    HostConfig,
    VmConfig,
    format_cpus,
    format_size,
    usable_cpus,
)

__all__ = [
    "Finding", "HostLimits", "ImageFacts", "findings", "host_findings", "image_findings", "module_findings",
]

SECTOR_BYTES: Final = 512
ROM_MEMORY_BYTES: Final = (1 << 20, 3 << 30)     # its copy ends at 1 MiB, and memory must end below the ROM
REAL_MODE_END: Final = 0x10FFF0    # FFFF:FFFF + 1, the last byte that real mode reaches


@dataclass(frozen=True, slots=True)
class HostLimits:
    """What a configuration is held against."""

    online_cpus: tuple[int, ...]
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What was seen of a boot image."""

    state: Literal["file", "missing", "directory", "special", "unreadable"]
    size_bytes: int = 0
    detail: str = ""               # of "unreadable": what the system said
    writable: bool = False         # by this user


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault: at a place of the file, what was found and what is allowed, in words."""

    at: Place
    code: str
    found: str
    allowed: str
    suggestion: str | None = None
    rests_on: tuple[str, ...] = ()     # other keys of the VM that it would not hold without


Vms = Mapping[int, VmConfig]           # by index of the [[vm]] table


def findings(host: HostConfig | None, vms: Vms, names: Mapping[int, str]) -> Iterator[Finding]:
    """Faults that need no look at the host. `host` is None where its table is faulty; `names` has
    the faulty VMs too: a name that is taken twice is told at once with whatever else is wrong.
    """
    first: dict[str, int] = {}
    for index, name in names.items():
        if name in first:
            yield Finding(("vm", index, "name"), "duplicate-name",
                          f'"{name}", which [[vm]] #{first[name] + 1} is called already',
                          "a name of its own")
        first.setdefault(name, index)
    for index, vm in vms.items():
        yield from _one(("vm", index), vm)
        if host is not None and host.cpus is not None and vm.cpus is not None:
            outside = sorted(set(vm.cpus) - set(host.cpus))
            if outside:
                yield Finding(("vm", index, "cpus"), "cpu-not-for-vms",
                              f"CPU {format_cpus(outside)}",
                              f"CPUs of [host] cpus: {format_cpus(host.cpus)}")


def _one(at: Place, vm: VmConfig) -> Iterator[Finding]:
    of_engine = {"kvm": "hardware", "software": "software"}.get(vm.engine)
    if of_engine is not None and vm.mode not in ("auto", of_engine):
        yield Finding((*at, "mode"), "contradiction", f'"{vm.mode}" with engine = "{vm.engine}"',
                      f'"{of_engine}" or "auto"')
    if vm.cap and vm.reservation > vm.cap:
        yield Finding((*at, "reservation"), "reservation-over-cap", str(vm.reservation),
                      f"at most the cap, {vm.cap} percent", rests_on=("cap",))
    if vm.reservation > 100 * vm.vcpus:
        yield Finding((*at, "reservation"), "reservation-over-vcpus", str(vm.reservation),
                      f"at most {100 * vm.vcpus} percent: 100 for each of its vCPUs",
                      rests_on=("vcpus",))
    if vm.progress is not None and vm.progress + 8 > vm.memory:
        yield Finding((*at, "progress"), "progress-outside-memory", hex(vm.progress),
                      f"at most {hex(vm.memory - 8)}, the last 8 bytes of its "
                      f"{format_size(vm.memory)} of memory", rests_on=("memory", "boot"))
    boot = vm.boot
    if boot.kind == "flat":
        end = min(vm.memory, REAL_MODE_END) if boot.bits == 16 else vm.memory
        for key, address in (("load", boot.load), ("entry", boot.start)):
            if key == "entry" and boot.entry is None:
                continue
            if address >= end:
                why = "what real mode reaches" if end < vm.memory else "its memory"
                yield Finding((*at, "boot", key), "address-outside-memory", hex(address),
                              f"below {hex(end)}, the end of {why}", rests_on=("memory",))
    elif boot.kind == "rom":
        low, high = ROM_MEMORY_BYTES
        if not low <= vm.memory <= high:
            yield Finding((*at, "memory"), "memory-not-for-a-rom", format_size(vm.memory),
                          f"{format_size(low)} to {format_size(high)} for a machine with a ROM")
    elif boot.kind == "guest":
        info = GUESTS[boot.guest]
        for key in boot.parameters:
            if key not in info.parameters:
                yield Finding((*at, "boot", key), "unknown-parameter", f"{key} for {boot.guest}",
                              "no parameter" if not info.parameters
                              else " or ".join(info.parameters))
        if vm.bits != info.bits:
            yield Finding((*at, "bits"), "contradiction", str(vm.bits),
                          f"{info.bits}, as {boot.guest} is written for (or no bits at all)")
        if vm.memory < info.memory_bytes(boot.parameters):
            least = info.memory_bytes(boot.parameters)
            yield Finding((*at, "memory"), "memory-too-small", format_size(vm.memory),
                          f"at least {format_size(least)} for {boot.guest}")


def host_findings(host: HostConfig | None, vms: Vms, limits: HostLimits) -> Iterator[Finding]:
    """Faults of a configuration on a host with these limits."""
    online = set(limits.online_cpus)
    count = len(online)
    has = f"this host's CPUs: {format_cpus(online)}"
    if host is not None and host.cpus is not None:
        absent = sorted(set(host.cpus) - online)
        if absent:
            yield Finding(("host", "cpus"), "no-such-cpu", f"CPU {format_cpus(absent)}", has)
    usable = set(usable_cpus(host, online)) if host is not None else online
    for index, vm in vms.items():
        at: Place = ("vm", index)
        absent = sorted(set(vm.cpus or ()) - online)
        if absent:
            yield Finding((*at, "cpus"), "no-such-cpu", f"CPU {format_cpus(absent)}", has)
        elif vm.cpus is not None and host is not None and host.cpus is None:
            outside = sorted(set(vm.cpus) - usable)
            if outside:
                yield Finding(
                    (*at, "cpus"), "cpu-not-for-vms", f"CPU {format_cpus(outside)}",
                    f"CPUs that VMs may use: {format_cpus(usable)}",
                    f'name them under [host], e.g. cpus = "{format_cpus(usable | set(outside))}"')
        if vm.vcpus > count:
            yield Finding((*at, "vcpus"), "more-vcpus-than-cpus", str(vm.vcpus),
                          f"at most {count}, the CPUs of this host")
        if vm.memory > limits.memory_bytes:
            yield Finding((*at, "memory"), "more-memory-than-host", format_size(vm.memory),
                          f"at most the host's {_about(limits.memory_bytes)}")
    yield from _reservations(vms, usable)


def _reservations(vms: Vms, usable: set[int]) -> Iterator[Finding]:
    """Reservations that cannot all be kept: over the CPUs, or over the few that VMs name."""
    allowed = {index: usable & set(vm.cpus) if vm.cpus is not None else usable
               for index, vm in vms.items() if vm.reservation}
    told: set[int] = set()
    # Small sets first: a VM that does not fit on its own CPUs is not told again about the host's.
    for cpus in sorted({frozenset(own) for own in allowed.values()}, key=len):
        inside = [index for index, own in allowed.items() if own <= cpus]
        wanted = sum(vms[index].reservation for index in inside)
        if cpus and wanted > 100 * len(cpus) and not told.intersection(inside):
            told.update(inside)
            names = ", ".join(f'"{vms[index].name}"' for index in inside)
            yield Finding(
                ("vm", inside[-1], "reservation"), "reservations-do-not-fit",
                f"{wanted} percent in all ({names})",
                f"at most {100 * len(cpus)} percent on CPU{'s' if len(cpus) > 1 else ''} "
                f"{format_cpus(cpus)}")


def image_findings(vms: Vms, images: Mapping[int, ImageFacts]) -> Iterator[Finding]:
    """Boot images that cannot be booted from; `images` by index of the [[vm]] table."""
    for index, image in images.items():
        vm = vms[index]
        boot = vm.boot
        if boot.kind == "guest":
            continue
        at: Place = ("vm", index, "boot", boot.kind)
        path = f'"{boot.image}"'
        unusable = _unusable(at, path, image)
        if unusable is not None:
            yield unusable
        elif image.size_bytes == 0:
            yield Finding(at, "image-empty", f"{path}, which is empty", "a file with a guest in it")
        elif boot.kind == "disk" and image.size_bytes < SECTOR_BYTES:
            yield Finding(at, "image-too-small", f"{path} of {image.size_bytes} bytes",
                          f"at least one sector of {SECTOR_BYTES} bytes, the boot sector")
        elif boot.kind == "rom" and (image.size_bytes % PAGE_BYTES or image.size_bytes > ROM_MAX_BYTES):
            yield Finding(at, "rom-of-no-size", f"{path} of {image.size_bytes} bytes",
                          f"whole pages of {PAGE_BYTES} bytes, at most {ROM_MAX_BYTES} bytes in all, the reset vector "
                          "16 bytes before the end")
        elif boot.kind == "flat" and boot.load + image.size_bytes > vm.memory > boot.load:
            yield Finding(
                at, "image-larger-than-memory",
                f"{path} of {_about(image.size_bytes)} at {hex(boot.load)}",
                f"at most {vm.memory - boot.load} bytes there, with {format_size(vm.memory)} of "
                "memory", rests_on=("memory",))


def module_findings(modules: Mapping[tuple[int, int], tuple[Path, ImageFacts]]) -> Iterator[Finding]:
    """Modules of multiboot kernels that cannot be had; by index of the [[vm]] table and of the module.

    An empty one is a module like any other.
    """
    for (index, number), (path, facts) in modules.items():
        unusable = _unusable(("vm", index, "boot", "modules", number), f'"{path}"', facts)
        if unusable is not None:
            yield unusable


def _unusable(at: Place, path: str, image: ImageFacts) -> Finding | None:
    """What is wrong with a file before a byte of it is looked at."""
    if image.state == "missing":
        return Finding(at, "image-missing", f"{path}, which does not exist",
                       "a file, named relative to the configuration's folder")
    if image.state == "directory":
        return Finding(at, "image-directory", f"{path}, which is a directory", "a file")
    if image.state == "special":
        return Finding(at, "image-special", f"{path}, which is no regular file", "a regular file")
    if image.state == "unreadable":
        return Finding(at, "image-unreadable", f"{path}, which cannot be read ({image.detail})",
                       "a file that this user may read")
    return None


def _about(size_bytes: int) -> str:
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size_bytes >= 10 << shift or (size_bytes >= 1 << shift and shift == 10):
            return f"{size_bytes / (1 << shift):.1f} {unit}"
    return f"{size_bytes} bytes"


