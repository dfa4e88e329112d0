"""The zygote: a warm process that forks every other process of the service.

Theory.  Importing Unicorn, Capstone and ourselves takes some hundred milliseconds; forking a
process that has done so takes a few. The zygote imports everything once, freezes the garbage
collector's heap (so that copy-on-write pages stay shared) and then does nothing but fork.
It has no threads and no event loop: forking a trio process, or one with threads, would be unsafe.
It is also the one *session* (setsid) of all VM threads: with autogroup scheduling, SCHED_IDLE
against SCHED_OTHER means something only inside one session.

Protocol (one SOCK_SEQPACKET socket, one JSON object a packet, requests from the supervisor only):

| request | answer |
|---|---|
| `{"op": "spawn", "kind": k, "arguments": {...}}` + descriptors | `{"pid": n}` + a pidfd |
| `{"op": "reap", "pid": n}` | `{"status": wait status}` |

Invariants.
- A child stays a zombie until the supervisor asks to reap it, so a thread id in the scheduler's
  shared table can never belong to a stranger.
- When the supervisor goes away the socket ends and so does the zygote. Its children are
  the guard's business (sched/guard.py), not the zygote's.
- The last descriptor of a spawn becomes the child's standard error: a memfd that the supervisor
  reads when the child dies without a word. The children's words never mix with the service's log.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any, Final

from .limits import explain

__all__ = ["KINDS", "MAX_DESCRIPTORS", "main"]

MAX_DESCRIPTORS: Final = 16
PACKET: Final = 64 * 1024

# kind -> (module, function); each function is `(arguments, fds) -> exit code`.
KINDS: Final = {
    "worker": ("mixvisor.vm.worker.process", "spawned"),
    "dispatcher": ("mixvisor.sched.dispatching", "main"),
    "guard": ("mixvisor.sched.guard", "main"),
    "spinner": ("mixvisor.sched.selftest", "spin"),
}
# Imported for the children's sake: they find them in memory.
WARM: Final = ("unicorn", "unicorn.x86_const", "capstone", "mixvisor.vm.engines",
               "mixvisor.vm.engines.kvm.engine", "mixvisor.vm.engines.software.engine")

Entry = Callable[[dict[str, Any], list[int]], int]


def _load() -> dict[str, Entry]:
    for name in WARM:
        try:
            importlib.import_module(name)
        except ImportError:
            # An engine that cannot be had is the worker's error to report, with its reason.
            continue
    entries = {kind: getattr(importlib.import_module(module), function)
               for kind, (module, function) in KINDS.items()}
    importlib.import_module("mixvisor.vm.worker.process").warm()
    return entries


def _child(entry: Entry, arguments: dict[str, Any], fds: list[int], title: str) -> int:
    """Run in the freshly forked child; returns its exit code."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    stderr = fds.pop()
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(stderr, 1)
    os.dup2(stderr, 2)
    os.close(null)
    os.close(stderr)
    _set_title(title)
    try:
        return entry(arguments, fds)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 70                                # EX_SOFTWARE


def _set_title(title: str) -> None:
    """The name that `ps` and `top` show for the thread (15 bytes)."""
    with open("/proc/self/comm", "w") as comm:
        comm.write(title[:15])


def _spawn(link: socket.socket, entries: dict[str, Entry], request: dict[str, Any], fds: list[int]) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            link.close()
            kind = request["kind"]
            code = _child(entries[kind], request["arguments"], fds, request.get("title") or f"mixvisor-{kind}")
        finally:
            # Not sys.exit: no finaliser of the parent's objects may run here.
            os._exit(code)
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        # Nobody would ever know of it.
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    try:
        socket.send_fds(link, [json.dumps({"pid": pid}).encode()], [pidfd])
    finally:
        os.close(pidfd)


def serve(link: socket.socket) -> None:
    """Answer requests until the supervisor is gone."""
    entries = _load()
    gc.collect()
    gc.freeze()
    link.send(b'{"ready": true}')
    while True:
        try:
            data, fds, _flags, _address = socket.recv_fds(link, PACKET, MAX_DESCRIPTORS)
        except ConnectionResetError:
            return
        if not data:
            return
        request = json.loads(data)
        try:
            if request["op"] == "spawn":
                _spawn(link, entries, request, fds)
            elif request["op"] == "reap":
                _pid, status = os.waitpid(request["pid"], 0)
                link.send(json.dumps({"status": status}).encode())
            else:
                raise ValueError(f"unknown operation {request['op']!r}")
        except OSError as error:
            link.send(json.dumps({"error": explain(error)}).encode())
        except (ValueError, KeyError) as error:
            link.send(json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())
        finally:
            for fd in fds:
                os.close(fd)


def main() -> None:
    """`python -m mixvisor.service.zygote FD NICE`, in a session of its own."""
    os.setpriority(os.PRIO_PROCESS, 0, max(int(sys.argv[2]), os.getpriority(os.PRIO_PROCESS, 0)))
    # A terminal's Ctrl-C goes to the foreground process group: we have left it by setsid
    # (start_new_session), but be deaf all the same; the socket tells when it is over.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # Children are kicked by these (vm/engines/kick.py): one that comes before a worker has its
    # own handler must not be its death. What it announced is read all the same.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_IGN)
    _set_title("mixvisor-zygote")
    link = socket.socket(fileno=int(sys.argv[1]))
    link.set_inheritable(False)
    try:
        serve(link)
    except BrokenPipeError:
        return


if __name__ == "__main__":
    main()
