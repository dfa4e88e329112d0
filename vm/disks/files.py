"""Images and overlays as files: opened and locked for a VM, committed and discarded for an operator.

Theory.  Who runs a VM opens its files and passes the descriptors on; a worker opens nothing.  Each file is locked
(flock(2), which belongs to the open file and so to the worker as well, whoever of the two dies first): an image that
is written, by a VM or by a commit, by one alone; one that is only read, by many.  An overlay belongs to one VM.

An overlay fits one image as it was.  That is known by size and by modification time, and where the time differs (a
copy, a restored backup) by a digest of the contents: of all of them up to DIGEST_BYTES, above of samples, the first
and last pieces among them, where file systems keep what every change touches.

A commit is repeatable: the overlay is read through first, marked as committing, and emptied only when the image
is safely on its disk.  Killed at any point it leaves an overlay that holds everything, and `commit` again completes it.

Blocking: reads whole files. Not for an event loop's thread.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .geometry import SECTOR_BYTES, Geometry, geometry_of, sectors_of
from .overlay import Header, Overlay, OverlayError, State, read_header, write_header

__all__ = [
    "DIGEST_BYTES", "DiskError", "DiskFacts", "anonymous_overlay", "commit", "discard", "facts", "open_image",
    "open_overlay",
]

DIGEST_BYTES: Final = 64 << 20
_PIECE: Final = 64 << 10
_COPY_BYTES: Final = 1 << 20
_UNLOCKED: Final = (errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS)     # a file system without locks


class DiskError(Exception):
    """A disk cannot be used; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class DiskFacts:
    """What a file is, for people. `overlay` and what follows it are of an overlay, else None."""

    path: str
    size_bytes: int
    geometry: Geometry | None
    overlay: Header | None = None
    changed_bytes: int | None = None
    image_fits: str | None = None        # "yes", or why not


# ---- opening ----------------------------------------------------------------------------------

def open_image(path: Path, *, write: bool = False) -> int:
    """A descriptor of an image, locked. Raises DiskError."""
    return _open(path, "the disk image", write=write, exclusive=write)


def open_overlay(path: Path, image: Path, image_fd: int, *, floppy: bool | None = None) -> int:
    """A descriptor of the overlay of an image, locked; made where there is none yet. Raises DiskError."""
    fd = _open(path, "the overlay", write=True, exclusive=True, create=True)
    try:
        sectors = _sectors(image_fd, floppy)
        if os.fstat(fd).st_size == 0:
            write_header(fd, _header(image, image_fd, sectors))
            return fd
        header = read_header(fd)
        if header.state is State.COMMITTING:
            raise OverlayError(f"a commit of it was interrupted: `mixvisor disk commit {path}` completes it")
        if header.sectors != sectors:
            raise OverlayError(f"it was made for a disk of {header.sectors} sectors, {image} has {sectors}")
        why = _misfit(header, image_fd)
        if why:
            raise OverlayError(f"{why} ({image}): what it holds would not fit")
        for _run in Overlay(fd, sectors).changed():
            pass
        if header.image_mtime_ns != os.fstat(image_fd).st_mtime_ns:
            write_header(fd, _header(image, image_fd, sectors))       # the same contents: quicker next time
    except (OverlayError, OSError) as error:
        os.close(fd)
        raise DiskError(f"the overlay {path} cannot be used: {_words(error)}") from error
    return fd


def anonymous_overlay(image: Path, image_fd: int, *, floppy: bool | None = None) -> int:
    """A descriptor of an overlay without a name: it is gone when the last descriptor is. Raises DiskError."""
    folder = os.environ.get("TMPDIR") or "/var/tmp"
    try:
        with tempfile.TemporaryFile(dir=folder, prefix="mixvisor-overlay-") as file:
            fd = os.dup(file.fileno())
    except OSError as error:
        raise DiskError(f"no overlay for {image} can be made in {folder} (TMPDIR): {error.strerror}") from error
    try:
        write_header(fd, _header(image, image_fd, _sectors(image_fd, floppy)))
    except OSError as error:
        os.close(fd)
        raise DiskError(f"no overlay for {image} can be made in {folder} (TMPDIR): {error.strerror}") from error
    return fd


def _open(path: Path, what: str, *, write: bool, exclusive: bool, create: bool = False) -> int:
    flags = (os.O_RDWR if write else os.O_RDONLY) | (os.O_CREAT if create else 0)
    try:
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
    except OSError as error:
        how = " for writing" if write else ""
        raise DiskError(f"{what} {path} cannot be opened{how}: {error.strerror}") from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise DiskError(f"{what} {path} is not a regular file")
        _lock(fd, path, what, exclusive=exclusive)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _lock(fd: int, path: Path, what: str, *, exclusive: bool) -> None:
    try:
        fcntl.flock(fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError as error:
        other = "used" if exclusive else "written"
        raise DiskError(f"{what} {path} is {other} by another VM or program"
                        + (", and only one may write it" if exclusive else "")) from error
    except OSError as error:
        if error.errno not in _UNLOCKED or exclusive:
            raise DiskError(f"{what} {path} cannot be locked: {error.strerror}") from error


# ---- what fits what ---------------------------------------------------------------------------

def _geometry(fd: int, floppy: bool | None) -> Geometry:
    return geometry_of(os.fstat(fd).st_size, os.pread(fd, SECTOR_BYTES, 0), floppy=floppy)


def _sectors(fd: int, floppy: bool | None) -> int:
    return sectors_of(os.fstat(fd).st_size, _geometry(fd, floppy))


def _header(image: Path, fd: int, sectors: int) -> Header:
    status = os.fstat(fd)
    return Header(sectors, status.st_size, status.st_mtime_ns, _digest(fd), str(image.absolute()))


def _digest(fd: int) -> bytes:
    """Of the contents, all of them or of evenly spread pieces."""
    size = os.fstat(fd).st_size
    pieces = -(-size // _PIECE)
    step = max(1, pieces * _PIECE // DIGEST_BYTES)
    digest = hashlib.blake2b(size.to_bytes(8, "little"), digest_size=32)
    for piece in (*range(0, pieces, step), max(0, pieces - 1)):
        digest.update(os.pread(fd, _PIECE, piece * _PIECE))
    return digest.digest()


def _misfit(header: Header, fd: int) -> str | None:
    """Why an overlay does not belong to this image as it is now; None if it does."""
    status = os.fstat(fd)
    if status.st_size != header.image_bytes:
        return f"its image had {header.image_bytes} bytes, this one has {status.st_size}"
    if status.st_mtime_ns != header.image_mtime_ns and _digest(fd) != header.image_digest:
        return "its image has been changed since, or is another one"
    return None


def _words(error: OverlayError | OSError) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


# ---- for the operator -------------------------------------------------------------------------

@contextmanager
def _opened(path: Path, *, write: bool) -> Iterator[tuple[int, Header]]:
    fd = _open(path, "the overlay", write=write, exclusive=write)
    try:
        yield fd, read_header(fd)
    except (OverlayError, OSError) as error:
        raise DiskError(f"{path}: {_words(error)}") from error
    finally:
        os.close(fd)


def commit(path: Path, image: Path | None = None) -> int:
    """Write what an overlay holds into its image, then empty it; bytes written. Raises DiskError."""
    with _opened(path, write=True) as (fd, header):
        target = image or Path(header.image)
        image_fd = open_image(target, write=True)
        try:
            if header.state is State.READY:
                why = _misfit(header, image_fd)
                if why:
                    raise OverlayError(f"{why} ({target}); nothing was written")
            overlay = Overlay(fd, header.sectors)
            overlay.verify()
            os.fsync(fd)
            write_header(fd, header.committing())
            os.fsync(fd)
            written = 0
            for first, count in overlay.changed():
                for at in range(first, first + count, _COPY_BYTES // SECTOR_BYTES):
                    piece = min(_COPY_BYTES // SECTOR_BYTES, first + count - at)
                    data = overlay.read(at, piece, _no_image)
                    _write_all(image_fd, data, at * SECTOR_BYTES)
                    written += len(data)
            os.fsync(image_fd)
            # Emptied first: a file of no bytes is a new overlay to whoever comes in between.
            os.ftruncate(fd, 0)
            write_header(fd, _header(target, image_fd, header.sectors))
            os.fsync(fd)
        finally:
            os.close(image_fd)
    return written


def discard(path: Path, *, force: bool = False) -> None:
    """Remove an overlay. Raises DiskError: also where its image is half committed, unless forced."""
    with _opened(path, write=True) as (_fd, header):
        if header.state is State.COMMITTING and not force:
            raise DiskError(f"{path}: a commit of it was interrupted, so {header.image} has only a part of its "
                            f"changes: complete it with `mixvisor disk commit {path}` (or discard it by force)")
        path.unlink()


def facts(path: Path, *, verify: bool = False) -> DiskFacts:
    """What a file is; `verify` reads an overlay through. Raises DiskError."""
    fd = _open(path, "the disk image", write=False, exclusive=False)
    try:
        size = os.fstat(fd).st_size
        if os.pread(fd, 16, 0) != b"mixvisor overlay":
            return DiskFacts(str(path), size, _geometry(fd, None) if size else None)
        header = read_header(fd)
        overlay = Overlay(fd, header.sectors)
        sectors = overlay.verify() if verify else sum(count for _first, count in overlay.changed())
        return DiskFacts(str(path), size, None, header, sectors * SECTOR_BYTES, _image_fits(header))
    except (OverlayError, OSError) as error:
        raise DiskError(f"{path}: {_words(error)}") from error
    finally:
        os.close(fd)


def _image_fits(header: Header) -> str:
    if header.state is State.COMMITTING:
        return "a commit was interrupted; commit it again"
    try:
        fd = open_image(Path(header.image))
    except DiskError as error:
        return str(error)
    try:
        return _misfit(header, fd) or "yes"
    finally:
        os.close(fd)


def _no_image(first: int, count: int) -> bytes:
    raise OverlayError(f"sectors {first} to {first + count - 1} are not in it")


def _write_all(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done
