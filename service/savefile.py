"""A saved VM as a file: vCPU, devices and memory, and of what; written whole or not at all, and never believed.

Layout, version 1 (little-endian):

| what | how |
|---|---|
| prefix | magic `MIXVSAVE`, u32 version, u32 length of the header |
| header | JSON: `Header` |
| state | JSON of the worker: vCPU and devices (vm/worker/moves.py), `state_bytes` long |
| memory | runs: u64 address, u64 length (whole pages), the bytes; the rest is zero; then the memory's size and 0 |
| digest | BLAKE2b, 32 bytes, of everything before |

Theory.  Writing goes to a new file beside the wanted one, is forced to the disk, and takes its name in the end, so a
file of that name is always whole: the one before or the new one.  Only a save is ever replaced, never a disk image or
a device.  Guest memory is a memfd; its holes and its zero pages are skipped.  It is copied by reads, never mapped: a
supervisor maps no guest memory.

A file comes from anywhere.  The prefix tells what is none of ours or of a later version; every length is held
against the file's before anything of that length is read; runs must be pages, in order, inside of memory; the
digest must match.  What the state means is read by the worker behind its sandbox, not here.

Disks are not in the file.  Each file that the VM has open is named in the header with size, date and, up to
`DIGEST_BYTES`, a digest of its contents: a restored guest must find the disks that it left.

Blocking: everything here belongs into a thread.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import struct
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

from ..vm.engines import cpuid
from ..vm.worker.protocol import STATE_MAX_BYTES
from .backend import ServiceError

__all__ = [
    "SUFFIX", "VERSION", "FileIdentity", "Header", "SavedError", "SavedFile", "differs", "identify",
    "write",
]

SUFFIX: Final = ".mixvisor"
MAGIC: Final = b"MIXVSAVE"
VERSION: Final = 1
PAGE: Final = 4096
CHUNK: Final = 1 << 20
HEADER_MAX_BYTES: Final = 64 << 10
DIGEST_BYTES: Final = 64 << 20
_PREFIX: Final = struct.Struct("<8sII")
_RUN: Final = struct.Struct("<QQ")
_DIGEST: Final = 32
_ZERO_PAGE: Final = bytes(PAGE)
_ZERO_CHUNK: Final = bytes(CHUNK)


class SavedError(ServiceError):
    """The file is not one that this VM can be restored from, and why."""

    code, status = "bad-file", 422


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """A file that the VM had open: image, overlay, ROM, kernel, module."""

    path: str
    size: int
    mtime_ns: int
    digest: str | None         # of the contents; None: too long for that


@dataclass(frozen=True, slots=True)
class Header:
    name: str
    saved_unix_s: float
    mixvisor: str              # version that wrote it
    mode: str
    vendor: str                # of the processor that the guest has seen
    memory_bytes: int
    machine: dict[str, Any]    # what a VM must have in common with the saved one: boot, built-in guest, disks
    files: list[FileIdentity]
    state_bytes: int


# -- what is open ------------------------------------------------------------------------------


def identify(fd: int) -> FileIdentity:
    """Of an open file. What was written to it is forced to its disk first."""
    with suppress(OSError):
        os.fsync(fd)                               # a file that cannot be written needs none
    about = os.fstat(fd)
    digest = None
    if about.st_size <= DIGEST_BYTES:
        hasher = hashlib.blake2b(digest_size=_DIGEST)
        at = 0
        while piece := os.pread(fd, CHUNK, at):
            hasher.update(piece)
            at += len(piece)
        digest = hasher.hexdigest()
    return FileIdentity(os.readlink(f"/proc/self/fd/{fd}"), about.st_size, about.st_mtime_ns, digest)


def differs(saved: FileIdentity, now: FileIdentity) -> str | None:
    """In what a file is not the one that it was; None: it is."""
    if now.size != saved.size:
        return f"it has {now.size} bytes now and had {saved.size}"
    if saved.digest is not None and now.digest is not None:
        return None if now.digest == saved.digest else "its contents have changed"
    return None if now.mtime_ns == saved.mtime_ns else "it was written to meanwhile"


# -- writing -----------------------------------------------------------------------------------


def _filled(memory_fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Start and end of the parts of a memfd that are no holes."""
    at = 0
    while at < size:
        try:
            start = os.lseek(memory_fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        at = os.lseek(memory_fd, start, os.SEEK_HOLE)
        yield start, at


def _runs(memory_fd: int, size: int) -> Iterator[tuple[int, memoryview]]:
    """Address and bytes of what is not zero, in whole pages, at most a chunk at a time."""
    for begin, end in _filled(memory_fd, size):
        for at in range(begin, end, CHUNK):
            chunk = os.pread(memory_fd, min(CHUNK, end - at), at)
            if chunk == _ZERO_CHUNK:
                continue
            view, start = memoryview(chunk), None
            for page in range(0, len(chunk), PAGE):
                empty = view[page:page + PAGE] == _ZERO_PAGE
                if not empty and start is None:
                    start = page
                elif empty and start is not None:
                    yield at + start, view[start:page]
                    start = None
            if start is not None:
                yield at + start, view[start:]


def write(path: Path, header: Header, state: bytes, memory_fd: int) -> int:
    """Make the file; its length. Raises ServiceError; then there is what there was before."""
    text = json.dumps(asdict(header), separators=(",", ":")).encode()
    if len(text) > HEADER_MAX_BYTES or len(state) != header.state_bytes:
        raise ServiceError(f"{header.name} cannot be saved: what is to be said of it is too long")
    _may_take_its_name(path)
    try:
        fd, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)       # mode 0600
    except OSError as error:
        raise ServiceError(f"{path} cannot be written: {error.strerror}") from error
    try:
        with open(fd, "wb", buffering=0) as out:
            hasher = hashlib.blake2b(digest_size=_DIGEST)

            def put(data: bytes | memoryview) -> None:
                hasher.update(data)
                view = memoryview(data)
                while view:
                    view = view[out.write(view):]

            put(_PREFIX.pack(MAGIC, VERSION, len(text)) + text + state)
            for address, data in _runs(memory_fd, header.memory_bytes):
                put(_RUN.pack(address, len(data)))
                put(data)
            put(_RUN.pack(header.memory_bytes, 0))
            out.write(hasher.digest())
            os.fsync(out.fileno())
            size = out.tell()
        os.rename(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise ServiceError(f"{path} cannot be written: {error.strerror}") from error
        raise
    _sync_directory(path.parent)
    return size


def _may_take_its_name(path: Path) -> None:
    """The name that a save takes in the end is free or that of another save: else a slip of the keyboard would cost
    a disk image or, as root, a device node such as /dev/null."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return
    except OSError as error:
        raise ServiceError(f"{path} cannot be written: {error.strerror}") from error
    try:
        regular = stat.S_ISREG(os.fstat(fd).st_mode)
        begins = os.read(fd, len(MAGIC)) if regular else b""
    except OSError as error:
        raise ServiceError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        os.close(fd)
    if not regular:
        raise ServiceError(f"{path} is not a regular file; a save needs the name of one, or a name that is free")
    if begins not in (b"", MAGIC):
        raise ServiceError(f"{path} is there and is not a saved VM: it stays; choose another name, or remove it first")


def _sync_directory(path: Path) -> None:
    with suppress(OSError):                        # some file systems cannot; the rename stands all the same
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


# -- reading -----------------------------------------------------------------------------------


class SavedFile:
    """An open file whose prefix, header and lengths have been checked. `close` it."""

    def __init__(self, path: Path) -> None:
        """Raises SavedError."""
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise SavedError(f"{path} cannot be opened: {error.strerror}") from error
        try:
            about = os.fstat(self._fd)
            if not stat.S_ISREG(about.st_mode):
                raise SavedError(f"{path} is not a regular file")
            self._size = about.st_size
            self._hasher = hashlib.blake2b(digest_size=_DIGEST)
            self._at = 0
            self.header = self._read_header()
            self.state = self._take(self.header.state_bytes)
        except OSError as error:
            self.close()
            raise SavedError(f"{path} cannot be read: {error.strerror}") from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _take(self, length: int) -> bytes:
        """The next bytes. Raises SavedError where the file has not so many."""
        if length > self._size - self._at:
            raise SavedError(f"{self.path} is cut short: at least {self._at + length} bytes were written, it has"
                             f" {self._size}")
        data = os.pread(self._fd, length, self._at)
        if len(data) != length:
            raise SavedError(f"{self.path} is being changed by somebody while it is read")
        self._at += length
        self._hasher.update(data)
        return data

    def _read_header(self) -> Header:
        if self._size < _PREFIX.size or os.pread(self._fd, len(MAGIC), 0) != MAGIC:
            raise SavedError(f"{self.path} is not a saved VM")
        _magic, version, length = _PREFIX.unpack(self._take(_PREFIX.size))
        if version != VERSION:
            raise SavedError(f"{self.path} has format version {version}; this Mixvisor reads version {VERSION}")
        if length > HEADER_MAX_BYTES:
            raise self._damaged("its header is too long")
        try:
            return _header(json.loads(self._take(length)))
        except (ValueError, RecursionError) as error:
            raise self._damaged(f"its header cannot be read ({error})") from error

    def _damaged(self, what: str) -> SavedError:
        return SavedError(f"{self.path} is damaged: {what}")

    def fill(self, memory_fd: int) -> None:
        """Guest memory, all zero so far, becomes what it was. Raises SavedError; it is then to be thrown away."""
        size, least = self.header.memory_bytes, 0
        try:
            while True:
                address, length = _RUN.unpack(self._take(_RUN.size))
                if address == size and length == 0:
                    break
                if address < least or length == 0 or (address | length) % PAGE or address + length > size:
                    raise self._damaged("its pages are not those of such a memory")
                done = 0
                while done < length:
                    piece = self._take(min(CHUNK, length - done))
                    view = memoryview(piece)
                    while view:
                        written = os.pwrite(memory_fd, view, address + done)
                        done, view = done + written, view[written:]
                least = address + length
            expected = self._hasher.digest()
            if self._size - self._at != _DIGEST or os.pread(self._fd, _DIGEST, self._at) != expected:
                raise self._damaged("its checksum does not match")
        except OSError as error:
            raise SavedError(f"{self.path} cannot be read into guest memory: {error.strerror}") from error

    def fits(self, name: str, memory_bytes: int, machine: dict[str, Any], files: list[FileIdentity]) -> None:
        """Whether a VM as it is configured now can go on from this. Raises SavedError."""
        header = self.header
        if header.vendor != cpuid.vendor().decode():
            raise SavedError(f"{self.path} was saved on a processor of {header.vendor}, and this is one of"
                             f" {cpuid.vendor().decode()}: the guest would not go on well")
        if header.memory_bytes != memory_bytes:
            raise SavedError(f"{self.path} has a memory of {header.memory_bytes} bytes, and {name} has {memory_bytes}")
        for key, value in machine.items():
            if header.machine.get(key) != value:
                raise SavedError(f"{self.path} is of another VM than {name}: its {key} was"
                                 f" {header.machine.get(key)!r} and is {value!r}")
        if len(header.files) != len(files):
            raise SavedError(f"{self.path} was saved with {len(header.files)} files open (images, overlays), and {name}"
                             f" has {len(files)}")
        for saved, now in zip(header.files, files, strict=True):
            what = differs(saved, now)
            if what is not None:
                raise SavedError(f"{now.path} is not what {self.path} was saved with: {what}; the guest would find"
                                 " another disk than it left")


def _header(data: Any) -> Header:
    """Raises ValueError."""
    _has(data, Header)
    if not isinstance(data["files"], list) or len(data["files"]) > 64 or not isinstance(data["machine"], dict):
        raise ValueError("files or machine")
    for name in ("name", "mixvisor", "mode", "vendor"):
        if not isinstance(data[name], str) or len(data[name]) > 256 or not data[name].isprintable():
            raise ValueError(name)
    if type(data["saved_unix_s"]) not in (int, float):
        raise ValueError("saved_unix_s")
    for name, most in (("memory_bytes", 1 << 40), ("state_bytes", STATE_MAX_BYTES)):
        if type(data[name]) is not int or not 0 < data[name] <= most:
            raise ValueError(name)
    if data["memory_bytes"] % PAGE:
        raise ValueError("memory_bytes")
    return Header(**{**data, "files": [_identity(one) for one in data["files"]]})


def _identity(data: Any) -> FileIdentity:
    _has(data, FileIdentity)
    numbers = (data["size"], data["mtime_ns"])
    if (not isinstance(data["path"], str) or any(type(number) is not int for number in numbers)
            or not isinstance(data["digest"], (str, type(None)))):
        raise ValueError("files")
    return FileIdentity(**data)


def _has(data: Any, kind: type) -> None:
    names = {field.name for field in fields(kind)}
    if not isinstance(data, dict) or data.keys() != names:
        raise ValueError("it has not the fields that it must have")
