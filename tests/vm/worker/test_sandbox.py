"""The closed door: what a worker cannot do any more, tried in a child that has entered."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from mixvisor.vm.worker import sandbox

ATTEMPTS = r'''
import ctypes, fcntl, errno, json, mmap, os, resource, select, signal, socket, sys, threading, time
from mixvisor.vm.worker import sandbox
pair = socket.socketpair()
victim = int(sys.argv[1])
tell = os.dup(1)
libc = ctypes.CDLL(None, use_errno=True)
null = os.open("/dev/null", os.O_RDWR)
if len(sys.argv) > 2:
    os.setgroups([])
    os.setresgid(1000, 1000, 1000)
    os.setresuid(1000, 1000, 1000)
achieved = sandbox.enter()

def attempt(what):
    try:
        what()
    except OSError as error:
        return errno.errorcode[error.errno]
    return "done"

def prctl():
    if libc.prctl(38, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")

def ptrace():
    if libc.ptrace(16, victim, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "ptrace")

def raw(number, *arguments):
    def call():
        libc.syscall.restype = ctypes.c_long
        if libc.syscall(number, *(ctypes.c_ulong(a & (1 << 64) - 1) for a in arguments)) < 0:
            raise OSError(ctypes.get_errno(), "system call")
    return call

def thread():
    one = threading.Thread(target=lambda: None)
    one.start(); one.join()

def ioctl():
    import fcntl
    fcntl.ioctl(null, 0x5413, b"\0" * 8)

def memory():
    page = mmap.mmap(-1, 4096); page[0] = 1; page.close()

results = {
    "open": attempt(lambda: os.open("/etc/passwd", os.O_RDONLY)),
    "kill": attempt(lambda: os.kill(victim, 0)),
    "kill-self": attempt(lambda: os.kill(os.getpid(), 0)),
    "socket": attempt(lambda: socket.socket()),
    "execve": attempt(lambda: os.execv("/bin/true", ["true"])),
    "fork": attempt(os.fork),
    "ptrace": attempt(ptrace),
    "prctl": attempt(prctl),
    "ioctl": attempt(ioctl),
    "setuid": attempt(lambda: os.setuid(0)),
    "chdir": attempt(lambda: os.chdir("/")),
    "fcntl": attempt(lambda: fcntl.fcntl(tell, fcntl.F_SETFL, os.O_ASYNC)),
    "dup2": attempt(lambda: os.dup2(tell, 9)),
    # What one worker could do to another: all of a root service's workers are user nobody.
    "tkill": attempt(raw(200, victim, 0)),
    "tgkill": attempt(raw(234, victim, victim, 0)),
    "rt_sigqueueinfo": attempt(raw(129, victim, 0, 0)),
    "rt_tgsigqueueinfo": attempt(raw(297, victim, victim, 0, 0)),
    "pidfd_open": attempt(raw(434, victim, 0)),
    "pidfd_send_signal": attempt(raw(424, null, 0, 0, 0)),
    "process_vm_readv": attempt(raw(310, victim, 0, 0, 0, 0, 0)),
    "process_vm_writev": attempt(raw(311, victim, 0, 0, 0, 0, 0)),
    "sched_setaffinity": attempt(raw(203, victim, 0, 0)),
    "sched_setaffinity-self": attempt(raw(203, 0, 0, 0)),
    "sched_setscheduler": attempt(raw(144, victim, 0, 0)),
    "sched_setparam": attempt(raw(142, victim, 0)),
    "sched_setattr": attempt(raw(314, victim, 0, 0)),
    "setpriority": attempt(raw(141, 0, victim, 19)),
    "ioprio_set": attempt(raw(251, 1, victim, 0)),
    "prlimit64": attempt(raw(302, victim, 7, 0, 0)),
    "setrlimit": attempt(raw(160, 7, 0)),
    "kcmp": attempt(raw(312, victim, victim, 0, 0, 0)),
    # By the owner of a descriptor's signals, or by cutting memory that the supervisor has mapped.
    "fcntl": attempt(raw(72, null, 8, victim)),
    "ftruncate": attempt(raw(77, null, 0)),
    "fallocate": attempt(raw(285, null, 3, 0, 4096)),
    "unshare": attempt(raw(272, 0)),
    "vfork": attempt(raw(58)),
    "io_uring_setup": attempt(raw(425, 1, 0)),
    "perf_event_open": attempt(raw(298, 0, victim, 0, 0, 0)),
    "bpf": attempt(raw(321, 0, 0, 0)),
    "seccomp": attempt(raw(317, 0, 0, 0)),
    "userfaultfd": attempt(raw(323, 0)),
    "keyctl": attempt(raw(250, 0, 0, 0)),
    "memory": attempt(memory),
    "thread": attempt(thread),
    "sleep": attempt(lambda: time.sleep(0.001)),
    "poll": attempt(lambda: select.poll().poll(1)),
    "send": attempt(lambda: pair[0].send(b"x") and pair[1].recv(1)),
    "alarm": attempt(lambda: signal.setitimer(signal.ITIMER_REAL, 1000)),
}
os.write(tell, json.dumps({"achieved": achieved, "results": results, "uid": os.geteuid()}).encode())
'''
REFUSED = ("open", "kill", "kill-self", "socket", "execve", "fork", "ptrace", "prctl", "ioctl",
           "setuid", "chdir", "fcntl", "dup2")
REFUSED_TO_EACH_OTHER = (
    "tkill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo", "pidfd_open", "pidfd_send_signal",
    "process_vm_readv", "process_vm_writev", "sched_setaffinity", "sched_setaffinity-self", "sched_setscheduler",
    "sched_setparam", "sched_setattr", "setpriority", "ioprio_set", "prlimit64", "setrlimit", "kcmp", "fcntl",
    "ftruncate", "fallocate", "unshare", "vfork", "io_uring_setup", "perf_event_open", "bpf", "seccomp",
    "userfaultfd", "keyctl")
KEPT = ("memory", "thread", "sleep", "poll", "send", "alarm")


def entered(*arguments):
    with subprocess.Popen(["sleep", "60"]) as victim:
        try:
            done = subprocess.run([sys.executable, "-c", ATTEMPTS, str(victim.pid), *arguments],
                                  timeout=60, capture_output=True, text=True, check=True)
        finally:
            victim.kill()
    return json.loads(done.stdout)


def test_files_processes_and_sockets_are_out_of_reach_and_computing_is_not():
    told = entered()
    assert {name: told["results"][name] for name in REFUSED} == dict.fromkeys(REFUSED, "EPERM")
    assert {name: told["results"][name] for name in KEPT} == dict.fromkeys(KEPT, "done")
    assert "system call filter" in told["achieved"]
    assert "no new privileges" in told["achieved"]


def test_no_worker_can_signal_trace_or_reschedule_another_nor_cut_shared_memory():
    results = entered()["results"]
    assert {name: results[name] for name in REFUSED_TO_EACH_OTHER} == dict.fromkeys(REFUSED_TO_EACH_OTHER, "EPERM")


@pytest.mark.privileged
def test_a_worker_of_root_becomes_nobody_in_namespaces_of_its_own():
    told = entered()
    assert told["uid"] == sandbox.NOBODY
    assert not [what for what in told["achieved"] if what.startswith("not:")]


@pytest.mark.privileged
def test_without_root_the_filter_still_stands_and_the_rest_is_said_to_be_missing():
    told = entered("as uid 1000")
    assert told["results"]["open"] == "EPERM"
    assert told["uid"] == 1000
    assert any(what.startswith("not: user nobody") for what in told["achieved"])


def test_the_filter_is_whole_instructions_that_jump_inside_it():
    code = sandbox.compile_filter(1234)
    count = len(code) // 8
    assert len(code) % 8 == 0
    assert count < 4096
    for index in range(count):
        operation, yes, no, _value = struct.unpack_from("<HBBI", code, index * 8)
        if operation & 7 == 5:
            assert index + 1 + max(yes, no) < count


def test_a_running_guest_under_the_filter_is_told_in_the_started_event(start, engine):
    worker = start(engine, b"\xEB\xFE")
    told = worker.event("started")["sandbox"]
    assert "system call filter" in told
    lines = Path(f"/proc/{worker.pid}/status").read_text().splitlines()
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    assert (status["Seccomp"], status["NoNewPrivs"]) == ("2", "1")
    if os.geteuid() == 0:
        assert status["Uid"].split() == [str(sandbox.NOBODY)] * 4
        assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0
        assert os.readlink(f"/proc/{worker.pid}/ns/net") != os.readlink("/proc/self/ns/net")


def test_a_sandbox_can_be_switched_off_and_says_so(start):
    worker = start("software", b"\xEB\xFE", sandbox=False)
    assert worker.event("started")["sandbox"] == ["not: anything (switched off)"]


@pytest.mark.parametrize("engine_name", ["software", pytest.param("kvm", marks=pytest.mark.kvm)])
def test_a_worker_inherits_no_descriptor_but_its_own(start, engine_name):
    with open("/dev/null") as stray, socket.socket():
        worker = start(engine_name, b"\xEB\xFE")
        worker.event("started")
        links = [os.readlink(f"/proc/{worker.pid}/fd/{fd}")
                 for fd in os.listdir(f"/proc/{worker.pid}/fd") if int(fd) > 2]
        sockets = [link for link in links if link.startswith("socket:")]
        assert len(sockets) == 1
        assert stray.name not in links
