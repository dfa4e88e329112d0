"""Small files of /proc, /sys and /dev, read below a root that a test may replace.

Invariant.  Absence is a fact about the host and no error: a file that is missing, forbidden or
garbled reads as "", None or the default, and never raises.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Final

from ...config.model import parse_cpus

__all__ = [
    "NewMessages", "cpu_list", "cpus_refused", "field", "kernel_log", "kib", "model_register", "number", "parameter",
    "switched_on", "text",
]

LOG_BYTES_MAX: Final = 4 << 20         # the largest ring buffers in use; a test's file may be anything
_RECORD_BYTES: Final = 8192            # one read of /dev/kmsg gives one record, at most this long
_REFUSED: Final = re.compile(r"kvm: enabling virtualization on CPU ?(\d+) failed")


def text(path: Path) -> str:
    """The file's text, "" where there is none."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def field(text_: str, key: str) -> str:
    """The value of the first `key : value` line."""
    match = re.search(rf"^{re.escape(key)}[ \t]*:[ \t]*(.*)$", text_, re.MULTILINE)
    return match[1].strip() if match else ""


def kib(text_: str, key: str) -> int:
    match = re.match(r"\d+", field(text_, key))
    return int(match[0]) if match else 0


def cpu_list(text_: str) -> tuple[int, ...]:
    try:
        return parse_cpus(text_.strip())
    except ValueError:
        return ()                      # empty or absent: the caller has another source


def number(text_: str, default: int) -> int:
    match = re.match(r"-?\d+", text_.strip())
    return int(match[0]) if match else default


def parameter(root: Path, module: str, name: str) -> str:
    """A kernel module's parameter as it stands, "" where there is none."""
    return text(root / "sys/module" / module / "parameters" / name).strip()


def switched_on(value: str) -> bool | None:
    """A boolean parameter: the kernel writes Y and N, older modules 1 and 0."""
    return {"Y": True, "1": True, "N": False, "0": False}.get(value)


def model_register(root: Path, cpu: int, register: int) -> int | None:
    """An MSR through /dev/cpu/N/msr: needs root and the module `msr`. Reading changes nothing."""
    try:
        descriptor = os.open(root / f"dev/cpu/{cpu}/msr", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        value = os.pread(descriptor, 8, register)
    except OSError:
        return None                    # EIO: the CPU, or the hypervisor below, has no such register
    finally:
        os.close(descriptor)
    return int.from_bytes(value, "little") if len(value) == 8 else None


def kernel_log(root: Path) -> str:
    """The kernel's messages since boot; "" where this user may not read them."""
    descriptor = _open_log(root)
    if descriptor is None:
        return ""
    try:
        return _messages(descriptor)
    finally:
        os.close(descriptor)


def cpus_refused(messages: str) -> frozenset[int]:
    """CPUs on which the kernel could not switch virtualization on for KVM, by its own words."""
    return frozenset(int(cpu) for cpu in _REFUSED.findall(messages))


class NewMessages:
    """The kernel's messages from now on: what happened before the service is no news."""

    def __init__(self, root: Path) -> None:
        self._descriptor = _open_log(root)
        if self._descriptor is not None:
            os.lseek(self._descriptor, 0, os.SEEK_END)

    def read(self) -> str:
        """Those that came since the last call."""
        return "" if self._descriptor is None else _messages(self._descriptor)

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _open_log(root: Path) -> int | None:
    try:
        return os.open(root / "dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None                    # sysctl kernel.dmesg_restrict, or a container without it


def _messages(descriptor: int) -> str:
    parts: list[bytes] = []
    length = 0
    with contextlib.suppress(OSError):     # EAGAIN: all is read
        while length < LOG_BYTES_MAX:
            try:
                record = os.read(descriptor, _RECORD_BYTES)
            except BrokenPipeError:
                continue               # overwritten while we read: the next one is there
            if not record:
                break
            parts.append(record)
            length += len(record)
    return b"".join(parts).decode(errors="replace")
