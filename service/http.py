"""Serving an ASGI application on trio: the thin wrapper around anycorn.

Theory.  anycorn (beta, pinned) speaks HTTP on a connection; everything around a connection is
ours, because the service must survive and end on its own terms:

- The socket. A unix socket has mode 0660; its directory, where we make it, 0750: those modes
  are the trust boundary of the control API. The mode is set between bind and listen, when
  nobody can connect yet. A socket file that nobody answers is left from a dead service
  and is removed; one that answers belongs to a live service and is refused. Check and bind are
  under a lock on the directory, so that of two services started together one wins.
- The connections. At most `MAX_CONNECTIONS` (others wait in the kernel's queue); a failure
  inside one is logged and ends only that one.
- The end. On cancellation nothing more is accepted, requests in flight have `GRACE_SECONDS` to
  answer, then all are cancelled, and a peer that does not read its answer is cut off: anycorn
  shields its sends, so only shutting the socket down ends one. Under half a second in all.

anycorn's own logs (to stdout and stderr) are off; it installs no signal handlers in this use.

Where it is poor: one address a call; no TLS (see reference to a proxy in the documentation).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Final, cast

import anycorn.config
import anyio.abc
import structlog
import trio
from anycorn.tcp_server import tcp_server_handler
from anycorn.typing import ASGIFramework, ConnectionState
from anycorn.utils import wrap_app
from anycorn.worker_context import WorkerContext
from starlette.types import ASGIApp

from .backend import ServiceError

__all__ = ["CannotListen", "serve"]

log = structlog.get_logger("mixvisor")

MAX_CONNECTIONS: Final = 64
BACKLOG: Final = 128
GRACE_SECONDS: Final = 0.2
CUT_SECONDS: Final = 0.1
DEAF_MILLISECONDS: Final = 30_000
LOCK_SECONDS: Final = 2.0
SOCKET_MODE: Final = 0o660
DIRECTORY_MODE: Final = 0o750
SUN_PATH_BYTES: Final = 107     # struct sockaddr_un, without the closing NUL


class CannotListen(ServiceError):
    """An address cannot be served; the text names it and says what to do."""

    code = "cannot-listen"


async def serve(
    app: ASGIApp, *, unix_socket: Path | None = None, tcp: str | None = None,
    task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve `app` on one address until cancelled; `started` gets the address really bound.

    `tcp` is `HOST:PORT` (`[::1]:9464` for IPv6; port 0 lets the kernel choose). Raises
    CannotListen before `started`.
    """
    if (unix_socket is None) == (tcp is None):
        raise ValueError("serve() takes either unix_socket or tcp")
    opened = _unix_listener(unix_socket) if unix_socket is not None else _tcp_listener(tcp or "")
    async with opened as (listener, address):
        stopping = trio.Event()
        async with trio.open_nursery() as nursery:
            accept = await nursery.start(_connections, app, stopping)
            task_status.started(address)
            try:
                await _accept_forever(listener, accept)
            finally:
                listener.close()
                stopping.set()


async def _accept_forever(listener: trio.socket.SocketType, accept: Any) -> None:
    while True:
        try:
            connection, _peer = await listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                # Out of descriptors: what is open goes on, newcomers wait in the queue.
                await trio.sleep(0.1)
            elif error.errno != errno.ECONNABORTED:
                raise
            continue
        await accept(connection)


async def _connections(
    app: ASGIApp, stopping: trio.Event, *, task_status: trio.TaskStatus[Any],
) -> None:
    """The home of all connections: shielded, so that they can end in good order."""
    config = anycorn.config.Config()
    config.accesslog = config.errorlog = None
    config.include_server_header = False
    context = WorkerContext(None)
    asgi = wrap_app(cast("ASGIFramework", app), config.wsgi_max_body_size, "asgi")
    handle = tcp_server_handler(asgi, config, context, ConnectionState({}))
    room = trio.CapacityLimiter(MAX_CONNECTIONS)
    sockets: set[socket.socket] = set()
    ended = trio.Event()

    async def one(connection: socket.socket) -> None:
        nonlocal ended
        try:
            await handle(await anyio.abc.SocketStream.from_socket(connection))
        except Exception:      # the edge of a connection: it ends, the others and the service do not
            log.exception("a connection of the API failed", code="connection-failed")
        finally:
            sockets.discard(connection)
            connection.close()
            room.release_on_behalf_of(connection)
            ended.set()

    async def all_ended(seconds: float) -> None:
        nonlocal ended
        with trio.move_on_after(seconds):
            while sockets:
                ended = trio.Event()
                await ended.wait()

    with trio.CancelScope(shield=True):
        async with trio.open_nursery() as nursery:

            async def accept(connection: trio.socket.SocketType) -> None:
                plain = _plain(connection)
                try:
                    await room.acquire_on_behalf_of(plain)
                except BaseException:
                    plain.close()
                    raise
                sockets.add(plain)
                nursery.start_soon(one, plain)

            task_status.started(accept)
            await stopping.wait()
            await context.terminated.set()      # idle connections end now, others after the answer
            await all_ended(GRACE_SECONDS)
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                await all_ended(CUT_SECONDS)
            for stuck in sockets:
                with contextlib.suppress(OSError):
                    stuck.shutdown(socket.SHUT_RDWR)


def _plain(connection: trio.socket.SocketType) -> socket.socket:
    return socket.socket(fileno=connection.detach())


@contextlib.asynccontextmanager
async def _unix_listener(path: Path) -> AsyncIterator[tuple[trio.socket.SocketType, str]]:
    if len(os.fsencode(path)) > SUN_PATH_BYTES:
        raise CannotListen(f"the path of the control socket is too long ({path}): at most "
                           f"{SUN_PATH_BYTES} bytes; choose a shorter one with --socket")
    try:
        made = _make_directory(path.parent)
        async with _directory_lock(path.parent):
            _remove_stale(path)
            plain = _bind_unix(path)
            identity = _identity(path)
    except OSError as error:
        raise CannotListen(f"cannot make the control socket {path}: {error.strerror}; choose a "
                           "place that you may write with --socket") from error
    with trio.socket.from_stdlib_socket(plain) as listener:
        try:
            yield listener, str(path)
        finally:
            _unlink_ours(path, identity)
            if made:
                with contextlib.suppress(OSError):      # there is more in it by now
                    path.parent.rmdir()


def _make_directory(path: Path) -> bool:
    if path.exists():
        return False
    path.mkdir(parents=True)
    path.chmod(DIRECTORY_MODE)
    return True


def _bind_unix(path: Path) -> socket.socket:
    plain = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        plain.bind(os.fspath(path))
        path.chmod(SOCKET_MODE)     # nobody can connect before listen
        plain.listen(BACKLOG)
        plain.setblocking(False)
    except BaseException:
        plain.close()
        raise
    return plain


def _unlink_ours(path: Path, identity: tuple[int, int] | None) -> None:
    # It may have been replaced since: then it is another's.
    if _identity(path) == identity:
        path.unlink(missing_ok=True)


@contextlib.asynccontextmanager
async def _directory_lock(directory: Path) -> AsyncIterator[None]:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with trio.move_on_after(LOCK_SECONDS) as limit:
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    await trio.sleep(0.01)
        if limit.cancelled_caught:
            raise CannotListen(f"another program holds a lock on {directory}; choose another place "
                               "for the control socket with --socket")
        yield
    finally:
        os.close(fd)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        facts = path.lstat()
    except FileNotFoundError:
        return None
    return facts.st_dev, facts.st_ino


def _remove_stale(path: Path) -> None:
    """Make way for a new socket. Raises CannotListen where something else has the place."""
    try:
        if not path.is_socket():
            if os.path.lexists(path):
                raise CannotListen(f"{path} exists and is not a socket; move it away or choose "
                                   "another place with --socket")
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            probe.connect(os.fspath(path))
    except (ConnectionRefusedError, FileNotFoundError):
        log.info("removed the socket of a service that is gone", code="stale-socket",
                 path=str(path))
        path.unlink(missing_ok=True)
        return
    except BlockingIOError:
        pass    # its queue is full: very much alive
    raise CannotListen(f"a Mixvisor service is running already on {path}; stop it first, or give "
                       "this one another socket with --socket")


@contextlib.asynccontextmanager
async def _tcp_listener(address: str) -> AsyncIterator[tuple[trio.socket.SocketType, str]]:
    host, port = _host_and_port(address)
    try:
        found = await trio.socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise CannotListen(f"cannot listen on {address}: the host {host!r} is not known "
                           f"({error.strerror})") from error
    family, kind, protocol, _name, where = found[0]
    with trio.socket.socket(family, kind, protocol) as listener:
        with _tcp_errors(address):
            # Lets a restarted service have its port at once (TIME_WAIT); on Linux it
            # does not let two listeners share one.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # A peer that reads nothing for so long is cut off, and its place is free again
            # (accepted sockets inherit it; tcp(7): also while the window is zero).
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAF_MILLISECONDS)
            await listener.bind(where)
            listener.listen(BACKLOG)
        bound = listener.getsockname()
        shown = f"[{bound[0]}]" if ":" in bound[0] else bound[0]
        yield listener, f"{shown}:{bound[1]}"


@contextlib.contextmanager
def _tcp_errors(address: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        why = {
            errno.EADDRINUSE: "another program uses this address; end it (`ss -ltnp` names it) or "
                              "choose another with `listen` under [metrics] or --listen",
            errno.EACCES: "ports below 1024 are for root; choose another with `listen` under "
                          "[metrics] or --listen",
            errno.EADDRNOTAVAIL: "this host does not have this address; 127.0.0.1 always works",
        }.get(error.errno or 0, f"{error.strerror}")
        raise CannotListen(f"cannot listen on {address}: {why}") from error


def _host_and_port(address: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise CannotListen(f"cannot listen on {address!r}: an address is HOST:PORT, for example "
                           "127.0.0.1:9464")
    return host.removeprefix("[").removesuffix("]"), int(port)
