"""Guest instructions as the CPU's own counters see them: progress of a guest that keeps no counter itself.

Theory.  Linux counts retired instructions of one thread on request (perf_event_open(2)), where the host has a
performance monitoring unit and permits it. Of a hardware VM's thread only those in guest mode are counted
(`exclude_host`); of a software VM's thread those in user mode, the translated guest with its translator: what it gets
done either way. A machine in the cloud often has no such unit to offer (ENOENT), and then nothing stands in for it.

Units: instructions. Where it is poor: instructions are not work when a guest waits in a loop; nothing is scaled, since
the counter is pinned: it counts always, or (where others hold the unit) reads nothing.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from typing import Final, Literal

__all__ = ["open_instructions", "why_not_counted"]

_PERF_EVENT_OPEN: Final = {"x86_64": 298, "aarch64": 241}
_HARDWARE, _INSTRUCTIONS = 0, 1
_SIZE: Final = 112                     # of struct perf_event_attr, version 5
_PINNED, _EXCLUDE_KERNEL, _EXCLUDE_HV, _EXCLUDE_HOST, _EXCLUDE_GUEST = (1 << bit for bit in (2, 5, 6, 19, 20))
_FLAGS: Final = {"hardware": _PINNED | _EXCLUDE_HOST,
                 "software": _PINNED | _EXCLUDE_KERNEL | _EXCLUDE_HV | _EXCLUDE_GUEST}
_CLOEXEC: Final = 1 << 3

_libc = ctypes.CDLL(None, use_errno=True)


def open_instructions(
    tid: int, mode: Literal["software", "hardware"], *, kind: int = _HARDWARE, event: int = _INSTRUCTIONS,
) -> int:
    """A descriptor to read a thread's count from: 8 bytes. The caller's to close. Raises OSError.

    kind, event: another event of perf_event_open(2), for tests on hosts without the unit.
    """
    number = _PERF_EVENT_OPEN.get(os.uname().machine)
    if number is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    attributes = struct.pack("=IIQQQQQ", kind, _SIZE, event, 0, 0, 0, _FLAGS[mode]).ljust(_SIZE, b"\0")
    fd = _libc.syscall(number, attributes, tid, -1, -1, _CLOEXEC)
    if fd < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return fd


def why_not_counted() -> str:
    """Why this host counts no instructions for us, as the end of a sentence; "" where it does."""
    try:
        os.close(open_instructions(0, "software"))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENODEV, errno.EOPNOTSUPP):
            return "this host has no performance counters that could count its instructions instead"
        if error.errno in (errno.EACCES, errno.EPERM):
            return ("its instructions may not be counted instead: grant CAP_PERFMON, or set kernel.perf_event_paranoid "
                    "to 1")
        return f"its instructions cannot be counted instead ({error.strerror})"
    return ""
