"""What is wrong with the disks of all VMs together: drives that a PC has not, files that two would write.

Theory.  A VM's disks are its boot disk and those of `disks`.  A PC has two floppy drives and, for a BIOS, two hard
disks; which of them an image is in follows from its size (`type` overrides).  A file may be read by many and written by
one.  The same rules hold when a VM starts (vm/disks/files.py locks the files); here they are told at once, with
their place.

`look_at(path)` says what a file is (config/load.py); nothing else is asked of the host.
Poor at: two paths that lead to one file by links are two files here; the lock knows better.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

from .locate import Place
from .model import FLOPPY_MAX_BYTES, VmConfig
from .rules import Finding, ImageFacts

__all__ = ["DRIVES_EACH", "disk_findings"]

DRIVES_EACH: Final = 2                 # floppy drives, and hard disks

_STATES: Final = {
    "missing": ("image-missing", "which does not exist", "a file, named relative to the configuration's folder"),
    "directory": ("image-directory", "which is a directory", "a file"),
    "special": ("image-special", "which is no regular file", "a regular file"),
    "unreadable": ("image-unreadable", "which cannot be read", "a file that this user may read"),
}


def disk_findings(vms: Mapping[int, VmConfig], look_at: Callable[[Path], ImageFacts]) -> Iterator[Finding]:
    """Faults of disks, those of boot images excepted that every kind of boot has (config/rules.py)."""
    for index, vm in vms.items():
        if vm.disks and not vm.drives:
            yield Finding(("vm", index, "disks"), "disks-without-bios", f"disks with boot = {{ {vm.boot.kind} = ... }}",
                          "disks only beside boot = { disk = ... }: the BIOS reads them, and it comes with that",
                          rests_on=("boot",))
        yield from _drives(("vm", index), vm, look_at)
    yield from _shared(vms)


def _drives(at: Place, vm: VmConfig, look_at: Callable[[Path], ImageFacts]) -> Iterator[Finding]:
    kinds: Counter[str] = Counter()
    for number, disk in enumerate(vm.drives):
        place = (*at, "boot") if number == 0 else (*at, "disks", number - 1)
        image = look_at(disk.disk)
        if number and image.state in _STATES:
            code, what, allowed = _STATES[image.state]
            yield Finding((*place, "disk"), code, f'"{disk.disk}", {what}', allowed)
        if image.state != "file":
            continue
        if number and image.size_bytes == 0:
            yield Finding((*place, "disk"), "image-empty", f'"{disk.disk}", which is empty', "a file with a disk in it")
        if disk.type == "floppy" and image.size_bytes > FLOPPY_MAX_BYTES:
            yield Finding((*place, "type"), "floppy-too-large", f'"floppy" for {image.size_bytes} bytes',
                          f"a floppy of at most {FLOPPY_MAX_BYTES} bytes, or a hard disk")
        if disk.writable == "yes" and not image.writable:
            yield Finding((*place, "writable"), "image-not-writable", f'"yes" for "{disk.disk}"',
                          'a file that this user may write, or "overlay"')
        if disk.overlay is not None:
            yield from _overlay((*place, "overlay"), disk.overlay, look_at)
        kind = "floppy drives" if disk.is_floppy(image.size_bytes) else "hard disks"
        kinds[kind] += 1
        if kinds[kind] == DRIVES_EACH + 1:
            yield Finding((*place, "disk") if number else place, "too-many-drives", f"a third of its {kind}",
                          f"at most {DRIVES_EACH} {kind}")


def _overlay(at: Place, path: Path, look_at: Callable[[Path], ImageFacts]) -> Iterator[Finding]:
    facts = look_at(path)
    if facts.state == "missing" and look_at(path.parent).state != "directory":
        yield Finding(at, "overlay-folder-missing", f'"{path}" in a folder that does not exist',
                      "a file in a folder that exists")
    elif facts.state in ("directory", "special") or (facts.state == "file" and not facts.writable):
        yield Finding(at, "overlay-not-writable", f'"{path}"', "a file that this user may write")


def _shared(vms: Mapping[int, VmConfig]) -> Iterator[Finding]:
    """Files that one disk writes and another uses."""
    uses: list[tuple[Path, bool, Place]] = []        # file, whether it is written, where it says so
    for index, vm in vms.items():
        for number, disk in enumerate(vm.drives):
            place: Place = ("vm", index, "boot") if number == 0 else ("vm", index, "disks", number - 1)
            uses.append((disk.disk, disk.writable == "yes", (*place, "disk")))
            if disk.overlay is not None:
                uses.append((disk.overlay, True, (*place, "overlay")))
    for number, (path, written, place) in enumerate(uses):
        for other, also_written, at in uses[:number]:
            if path == other and (written or also_written):
                yield Finding(place, "file-shared", f'"{path}", which [[vm]] #{int(at[1]) + 1} '
                              f"{'writes' if also_written else 'uses'} too",
                              "a file of its own (many may read one image, each with an overlay of its own)")
                break
