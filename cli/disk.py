"""`disk`: what an image or an overlay is, and what becomes of what an overlay holds. Asks no service."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .common import notice, output_option, print_json

if TYPE_CHECKING:
    from ..vm.disks.files import DiskFacts

__all__ = ["disk"]

FILE = click.argument("file", type=click.Path(path_type=Path))


@click.group()
def disk() -> None:
    """Look at disk images and overlays; commit or discard what an overlay holds.

    A disk with `writable = "overlay"` leaves its image as it is. What the guest wrote is kept in the file that
    `overlay` names, or nowhere: then it is discarded when the VM ends.
    """


@disk.command()
@FILE
@click.option("--verify", is_flag=True, help="Read an overlay through and compare every sector with its checksum.")
@output_option
def info(file: Path, verify: bool, output: str) -> None:
    """Say what a file is: size and geometry of an image; of an overlay its image, and whether it fits still."""
    from ..service.backend import ServiceError
    from ..vm.disks.files import DiskError, facts

    try:
        told = facts(file, verify=verify)
    except DiskError as error:
        raise ServiceError(str(error)) from error
    if output == "json":
        print_json(_json(told))
        return
    for name, value in _words(told):
        click.echo(f"{name + ':':<10}{value}")


@disk.command()
@FILE
@click.option("--image", type=click.Path(path_type=Path), default=None,
              help="The image that it belongs to. Default: the one it was made for.")
def commit(file: Path, image: Path | None) -> None:
    """Write what an overlay holds into its image, and empty the overlay.

    No VM may use either of them. When this is interrupted, do it again: nothing is lost.
    """
    from ..service.backend import ServiceError
    from ..vm.disks.files import DiskError
    from ..vm.disks.files import commit as put

    try:
        written = put(file, image)
    except DiskError as error:
        raise ServiceError(str(error)) from error
    notice(f"{file}: {written} bytes are in the image now; the overlay is empty.")


@disk.command()
@FILE
@click.option("--force", is_flag=True, help="Also when a commit of it was interrupted and its image is half changed.")
def discard(file: Path, force: bool) -> None:
    """Remove an overlay and what it holds; its image stays as it is. No VM may use it."""
    from ..service.backend import ServiceError
    from ..vm.disks.files import DiskError
    from ..vm.disks.files import discard as remove

    try:
        remove(file, force=force)
    except DiskError as error:
        raise ServiceError(str(error)) from error
    notice(f"{file} is removed.")


def _json(told: DiskFacts) -> dict[str, Any]:
    overlay, geometry = told.overlay, told.geometry
    return {
        "schema": 1, "file": told.path, "kind": "image" if overlay is None else "overlay", "bytes": told.size_bytes,
        "geometry": None if geometry is None else {
            "drive": "floppy" if geometry.floppy_type else "hard disk", "cylinders": geometry.cylinders,
            "heads": geometry.heads, "sectors": geometry.sectors},
        "overlay": None if overlay is None else {
            "image": overlay.image, "image_bytes": overlay.image_bytes, "changed_bytes": told.changed_bytes,
            "state": overlay.state.name.lower(), "image_fits": told.image_fits},
    }


def _words(told: DiskFacts) -> list[tuple[str, str]]:
    overlay, geometry = told.overlay, told.geometry
    if overlay is None:
        words = [("file", told.path), ("kind", "disk image"), ("size", f"{told.size_bytes} bytes")]
        if geometry is not None:
            drive = "floppy" if geometry.floppy_type else "hard disk"
            words.append(("geometry", f"{drive}, {geometry.cylinders} cylinders, {geometry.heads} heads, "
                                      f"{geometry.sectors} sectors a track"))
        return words
    return [("file", told.path), ("kind", "overlay"), ("image", overlay.image),
            ("changed", f"{told.changed_bytes} of {overlay.image_bytes} bytes"),
            ("fits", told.image_fits or "")]
