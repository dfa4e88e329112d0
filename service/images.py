"""The files of a VM, opened and locked for one incarnation of its worker.

A flat image is one descriptor, a kernel one and one more for each of its modules; each disk is its image and, where it
has one, its overlay, in the order that the worker expects (vm/worker/protocol.py).  Which drive a disk is in depends on
its size, so it is known only here.

Blocking: an overlay whose image has another date is compared by its contents. `open_images` belongs into a thread.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from ..config.disks import DRIVES_EACH
from ..config.model import DiskBoot, DiskConfig, MultibootBoot, VmConfig
from ..vm.disks.files import DiskError, anonymous_overlay, open_image, open_overlay
from ..vm.worker.protocol import DiskSpec
from .backend import ServiceError

__all__ = ["Images", "open_images"]


class Images:
    """Descriptors to pass on, in order; `disks` says what they are. `close` when the worker has its own."""

    def __init__(self) -> None:
        self.fds: list[int] = []
        self.disks: list[DiskSpec] = []
        self.paths: dict[str, Path] = {}           # by drive: where what the guest writes goes

    def close(self) -> None:
        while self.fds:
            os.close(self.fds.pop())


def open_images(config: VmConfig) -> Images:
    """Everything that the VM boots from and its disks. Raises ServiceError; then nothing is open."""
    images = Images()
    try:
        if isinstance(config.boot, DiskBoot):
            _open_disks(config, images)
        elif config.boot.image is not None:
            images.fds.append(open_image(config.boot.image))
            if isinstance(config.boot, MultibootBoot):
                images.fds += map(open_image, config.boot.module_files)
    except (DiskError, ValueError, OSError) as error:
        images.close()
        raise ServiceError(str(error)) from error
    except BaseException:
        images.close()
        raise
    return images


def _open_disks(config: VmConfig, images: Images) -> None:
    used: Counter[str] = Counter()
    for disk in config.drives:
        fd = open_image(disk.disk, write=disk.writable == "yes")
        images.fds.append(fd)
        floppy = disk.is_floppy(os.fstat(fd).st_size)
        kind = "fd" if floppy else "hd"
        if used[kind] == DRIVES_EACH:
            what = "floppy" if floppy else "hard disk"
            raise DiskError(f"{disk.disk} would be a third {what}: a PC has two of a kind")
        name = kind + "ab"[used[kind]]
        used[kind] += 1
        if disk.writable == "overlay":
            images.fds.append(_overlay(disk, fd, floppy))
        images.disks.append(DiskSpec(name=name, writable=disk.writable))
        images.paths[name] = disk.overlay or disk.disk


def _overlay(disk: DiskBoot | DiskConfig, image_fd: int, floppy: bool) -> int:
    if disk.overlay is None:
        return anonymous_overlay(disk.disk, image_fd, floppy=floppy)
    return open_overlay(disk.overlay, disk.disk, image_fd, floppy=floppy)
