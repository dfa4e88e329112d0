"""The worker's end of the control socket: packets in, packets out, sleeping on it.

Theory.  One SOCK_SEQPACKET socket, one JSON object a packet (protocol.py).  The main thread, which
computes for the guest, reads the socket when it is kicked (the supervisor sends
first and kicks after, so a kick always finds its packet) and whenever it sleeps, because it
sleeps in poll() on this very socket.  So no message is lost and none waits longer than the
vCPU waits for a CPU.

The end of the stream means that the supervisor is gone: `gone` stays true from then on. A guest
that computes is told of it too: the kernel itself raises SIGUSR1, the kick, when something happens
on the socket (O_ASYNC with F_SETSIG, see fcntl(2)), so a worker outlives nobody, guard or no guard.
Sending blocks: a supervisor that asks and does not read the answers holds up its own VM, no other.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import select
import signal
import socket
from collections.abc import Iterator
from typing import Any, Final

from .protocol import MAX_PACKET

__all__ = ["Control"]

_libc = ctypes.CDLL(None, use_errno=True)


class _PollFd(ctypes.Structure):
    _fields_ = (("fd", ctypes.c_int), ("events", ctypes.c_short), ("revents", ctypes.c_short))


class _TimeSpec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


_libc.ppoll.argtypes = [ctypes.POINTER(_PollFd), ctypes.c_ulong, ctypes.POINTER(_TimeSpec), ctypes.c_void_p]
F_SETSIG: Final = 10           # linux/fcntl.h; Python's module has no name for it


class Control:
    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)
        self._socket.setblocking(False)
        # The kick must have its handler by now (vm/engines/kick.py): the default action is death.
        fcntl.fcntl(fd, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(fd, F_SETSIG, signal.SIGUSR1)
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_ASYNC)
        self._readable = _PollFd(fd, select.POLLIN, 0)
        self._writable = select.poll()
        self._writable.register(fd, select.POLLOUT)
        self.gone = False
        self._descriptor: int | None = None

    def requests(self) -> Iterator[dict[str, Any]]:
        """Every packet that has come. What is no request is dropped: nobody could be answered."""
        while not self.gone:
            try:
                packet, fds, _flags, _from = socket.recv_fds(self._socket, MAX_PACKET, 1)
            except BlockingIOError:
                return
            except ConnectionError:
                self.gone = True
                return
            if not packet:
                self.gone = True
                return
            self._descriptor = fds[0] if fds else None
            try:
                request = json.loads(packet)
            except ValueError:
                request = None
            try:
                if isinstance(request, dict) and isinstance(request.get("id"), int):
                    yield request
            finally:
                if self._descriptor is not None:
                    os.close(self._descriptor)         # nobody wanted it

    def descriptor(self) -> int:
        """The one that came with the present request, from now on the caller's. Raises ValueError without one."""
        fd, self._descriptor = self._descriptor, None
        if fd is None:
            raise ValueError("this request needs a descriptor")
        return fd

    def send(self, packet: dict[str, Any]) -> None:
        data = json.dumps(packet, separators=(",", ":")).encode()
        while not self.gone:
            try:
                self._socket.send(data)
                return
            except BlockingIOError:
                self._writable.poll()
            except ConnectionError:
                self.gone = True

    def wait(self, seconds: float | None) -> None:
        """Sleep until a packet comes or *seconds* have passed (None: for ever)."""
        timeout = None
        if seconds is not None:
            whole = max(0, round(seconds * 1e9))
            timeout = ctypes.byref(_TimeSpec(*divmod(whole, 1_000_000_000)))
        # Not select.poll(): it rounds up to milliseconds, a whole period of a guest's 1 kHz timer. A
        # kick ends it (EINTR), which is as good as its packet.
        _libc.ppoll(ctypes.byref(self._readable), 1, timeout, None)

    def close(self) -> None:
        self._socket.close()
