"""The host's time-stamp counter: what a guest's begins as, on every engine.

A guest's counter is a value that goes on wherever the guest does; engines keep the difference to the host's. It begins
as the host's own, not as 0, so that both engines begin alike and a comparison of modes compares the same code.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

from . import kick

__all__ = ["read_tsc"]


@functools.cache
def _reader() -> tuple[object, Callable[[], int]]:
    # rdtsc; shl rdx, 32; or rax, rdx; ret
    page, address = kick.executable(bytes.fromhex("0F31 48C1E220 4809D0 C3"))
    return page, ctypes.CFUNCTYPE(ctypes.c_uint64)(address)


def read_tsc() -> int:
    return _reader()[1]()
