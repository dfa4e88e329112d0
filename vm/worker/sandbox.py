"""Shutting the door: what a worker gives up before the first instruction of its guest.

Theory.  A guest that breaks out of an engine (a TCG bug is not even counted as a security bug by
its authors) finds itself in a process that can compute, use its own VM and speak to its
supervisor, and nothing else.  Several layers, each taken as far as the host permits; `enter`
returns what was achieved, in words, and the VM's `started` event carries them:

1. user and group nobody, no supplementary groups: when started by root;
2. new network, IPC and mount namespaces: when started by root. No PID namespace: Unicorn makes a
   thread at run time and aborts in a process that has unshared it;
3. not dumpable (no core, no ptrace, no /proc/PID/mem even for the same user; schedstat and
   scheduling calls are not affected, which the scheduler needs);
4. small limits: no core file, no file larger than 1 MiB or than a disk that it may write, few descriptors. Not
   RLIMIT_AS: Unicorn reserves 1 GiB of addresses. Not fewer than 16 descriptors: poll() refuses more than the limit;
5. no_new_privs;
6. a seccomp filter: an allow-list of system calls. Everything else is EPERM (Python survives that
   and reports), a call of another architecture kills. ioctl only with KVM's type byte, clone
   only for threads, tgkill only to this process, fcntl only to copy a descriptor (Python's mmap of a vCPU does),
   prctl not at all.

Invariants.  Descriptors that are needed are open before `enter` and stay usable: /dev/kvm's
are checked by KVM against the address space, not the user.  A worker in software mode has no way to KVM: for a change
of mode it is handed /dev/kvm and closes it when it has its one VM.  Nothing is imported after `enter`.
Order matters: users and namespaces need the privileges that later steps take away.

Sources: seccomp(2), capabilities(7), linux/audit.h, linux/filter.h, asm/unistd_64.h.
Poor: x86-64 only (elsewhere the filter is left out, and said so); all workers of a root
service share the user nobody, so it is dumpable and the filter that keep them apart.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import struct
from typing import Final

__all__ = ["ALLOWED", "NOBODY", "compile_filter", "enter"]

NOBODY: Final = 65534
OPEN_FILES: Final = 24              # four disks with overlays, KVM's three, the worker's own
FILE_BYTES: Final = 1 << 20

_CLONE_NEWNS, _CLONE_NEWIPC, _CLONE_NEWNET = 0x0002_0000, 0x0800_0000, 0x4000_0000
_CLONE_THREAD: Final = 0x0001_0000
_PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 4, 22, 38
_SECCOMP_MODE_FILTER: Final = 2
_AUDIT_ARCH_X86_64: Final = 0xC000_003E
_X32: Final = 0x4000_0000
_RET_ALLOW, _RET_ERRNO, _RET_KILL = 0x7FFF_0000, 0x0005_0000, 0x8000_0000
_KVM_IOCTL_TYPE: Final = 0xAE

# Offsets in struct seccomp_data; arguments are 64 bits, low half first.
_NR, _ARCH, _ARG0, _ARG1 = 0, 4, 16, 24

# BPF: load word at an absolute offset, jump if equal / any bit set / greater or equal, and, return.
_LD, _JEQ, _JSET, _JGE, _AND, _RET = 0x20, 0x15, 0x45, 0x35, 0x54, 0x06

# name: number on x86-64. What both engines and Python were seen to need at run time, and
# their close relatives; each needs only what the process already has.
ALLOWED: Final = {
    "read": 0, "write": 1, "close": 3, "fstat": 5, "poll": 7, "lseek": 8, "mmap": 9,
    "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14,
    "rt_sigreturn": 15, "pread64": 17, "pwrite64": 18, "readv": 19, "writev": 20, "sched_yield": 24, "mremap": 25,
    "madvise": 28, "nanosleep": 35, "getitimer": 36, "setitimer": 38, "getpid": 39, "sendto": 44,
    "recvfrom": 45, "sendmsg": 46, "recvmsg": 47, "shutdown": 48, "exit": 60,
    "gettimeofday": 96, "getrusage": 98, "getuid": 102, "getgid": 104, "geteuid": 107,
    "getegid": 108, "rt_sigpending": 127, "sigaltstack": 131, "gettid": 186, "futex": 202,
    "sched_getaffinity": 204, "restart_syscall": 219, "clock_gettime": 228, "clock_getres": 229,
    "clock_nanosleep": 230, "exit_group": 231, "ppoll": 271, "set_robust_list": 273,
    "getrandom": 318, "membarrier": 324, "rseq": 334,
}
_CLONE, _IOCTL, _TGKILL, _CLONE3, _FCNTL = 56, 16, 234, 435, 72
_F_DUPFD_CLOEXEC: Final = 1030


def _op(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("<HBBI", code, yes, no, value & 0xFFFF_FFFF)


def compile_filter(pid: int) -> bytes:
    """The BPF program (array of struct sock_filter) for a process with this id."""
    allow, refuse = _op(_RET, _RET_ALLOW), _op(_RET, _RET_ERRNO | errno.EPERM)
    program = [
        _op(_LD, _ARCH), _op(_JEQ, _AUDIT_ARCH_X86_64, 1, 0), _op(_RET, _RET_KILL),
        _op(_LD, _NR), _op(_JGE, _X32, 0, 1), _op(_RET, _RET_KILL),
        # The busiest first.
        _op(_JEQ, _IOCTL, 0, 5),
        _op(_LD, _ARG1), _op(_AND, 0xFF00), _op(_JEQ, _KVM_IOCTL_TYPE << 8, 0, 1), allow, refuse,
        _op(_JEQ, _CLONE, 0, 4),
        _op(_LD, _ARG0), _op(_JSET, _CLONE_THREAD, 0, 1), allow, refuse,
        _op(_JEQ, _TGKILL, 0, 4),
        _op(_LD, _ARG0), _op(_JEQ, pid, 0, 1), allow, refuse,
        _op(_JEQ, _FCNTL, 0, 4),
        _op(_LD, _ARG1), _op(_JEQ, _F_DUPFD_CLOEXEC, 0, 1), allow, refuse,
        # glibc falls back to clone, whose flags can be seen.
        _op(_JEQ, _CLONE3, 0, 1), _op(_RET, _RET_ERRNO | errno.ENOSYS),
    ]
    for number in ALLOWED.values():
        program += [_op(_JEQ, number, 0, 1), allow]
    program.append(refuse)
    return b"".join(program)


_libc = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, *arguments: int) -> None:
    padded = [ctypes.c_ulong(value) for value in (*arguments, 0, 0, 0, 0)[:4]]
    if _libc.prctl(option, *padded) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _become_nobody() -> str:
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    return "user nobody"


def _unshare() -> str:
    if _libc.unshare(_CLONE_NEWNET | _CLONE_NEWIPC | _CLONE_NEWNS) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return "own network, IPC and mount namespaces"


def _not_dumpable() -> str:
    _prctl(_PR_SET_DUMPABLE, 0)
    return "not dumpable"


def _limits(file_bytes: int) -> str:
    # Only downwards: a hard limit that is already smaller stays.
    for what, most in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, max(FILE_BYTES, file_bytes)),
                       (resource.RLIMIT_NOFILE, OPEN_FILES)):
        _soft, hard = resource.getrlimit(what)
        limit = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (limit, limit))
    return "limits on core, file size and descriptors"


def _no_new_privileges() -> str:
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    return "no new privileges"


def _seccomp() -> str:
    code = compile_filter(os.getpid())
    buffer = ctypes.create_string_buffer(code, len(code))
    # struct sock_fprog { unsigned short len; struct sock_filter *filter; }
    program = ctypes.create_string_buffer(
        struct.pack("<H6xQ", len(code) // 8, ctypes.addressof(buffer)), 16)
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(program))
    return "system call filter"


def enter(file_bytes: int = 0) -> list[str]:
    """Give up everything that a running guest does not need; for good. No file may grow beyond *file_bytes*.

    Returns what was achieved and, as `not: ...`, what the host or the lack of privileges
    denied. Raises nothing: the caller decides whether less than everything will do.
    """
    def limits() -> str:
        return _limits(file_bytes)

    steps = [_not_dumpable, limits, _no_new_privileges]
    achieved: list[str] = []
    if os.geteuid() == 0:
        # Namespaces first (privileged), dumpable again after the change of user, which sets it.
        steps = [_unshare, limits, _become_nobody, _not_dumpable, _no_new_privileges]
    else:
        achieved.append("not: user nobody, own namespaces (the service is not root)")
    if platform.machine() == "x86_64":
        steps.append(_seccomp)
    else:
        achieved.append("not: system call filter (only written for x86-64)")
    for step in steps:
        try:
            achieved.append(step())
        except OSError as error:
            achieved.append(f"not: {step.__name__.strip('_').replace('_', ' ')} ({error.strerror})")
    return achieved
