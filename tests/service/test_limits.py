"""Open files and processes that do not suffice: told once, with what to do, and the VMs that fit run."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from mixvisor.service.limits import explain, processes_left, shortage

from ..trees import tree

ENOUGH = {"vms": 10, "vcpus": 10, "disks": 0, "cpus": 2, "open_files": 10_000, "processes": 10_000}


def test_nothing_is_said_while_all_of_it_suffices() -> None:
    assert shortage(**ENOUGH) is None


@pytest.mark.parametrize(("change", "says", "do"), [
    ({"open_files": 163}, "10 VMs need about 164 open files, and this service may have 163: some", "LimitNOFILE="),
    ({"disks": 10, "open_files": 170}, "about 184 open files", "ulimit -Hn"),
    ({"processes": 13}, "14 processes and threads, and 13 more are allowed", "TasksMax="),
    ({"processes": 13, "open_files": 100}, "have 100; and 14 processes", "unit) and the limit of processes"),
])
def test_what_does_not_suffice_is_one_sentence_with_what_to_do(change: dict[str, int], says: str, do: str) -> None:
    short = shortage(**(ENOUGH | change))
    assert short is not None
    message, advice = short
    assert says in message
    assert do in advice


@pytest.mark.parametrize(("files", "left"), [
    ({"proc/self/cgroup": "8:pids:/a/b\n0::/\n", "sys/fs/cgroup/pids/a/b/pids.max": "max",
      "sys/fs/cgroup/pids/a/pids.max": "100\n", "sys/fs/cgroup/pids/a/pids.current": "40\n"}, 60),
    ({"proc/self/cgroup": "0::/system.slice/m.service\n", "sys/fs/cgroup/system.slice/m.service/pids.max": "50\n",
      "sys/fs/cgroup/system.slice/m.service/pids.current": "8\n", "sys/fs/cgroup/system.slice/pids.max": "20\n"}, 20),
    ({"proc/self/cgroup": "0::/x\n", "sys/fs/cgroup/x/pids.max": "5", "sys/fs/cgroup/x/pids.current": "9"}, 0),
    ({}, 1 << 62),
])
def test_the_tightest_cgroup_above_says_how_many_processes_are_left(
    tmp_path: Path, files: dict[str, str], left: int,
) -> None:
    assert processes_left(tree(tmp_path, files), user=0) == left


def test_an_ordinary_user_has_a_limit_of_its_own() -> None:
    soft, _hard = resource.getrlimit(resource.RLIMIT_NPROC)
    if soft == resource.RLIM_INFINITY:
        pytest.skip("no limit of processes for users here")
    assert processes_left(Path("/nowhere"), user=1000) <= soft


@pytest.mark.parametrize(("number", "says"), [
    (errno.EMFILE, "LimitNOFILE="), (errno.EAGAIN, "TasksMax="), (errno.ENOMEM, "memory"),
    (errno.EPERM, "PermissionError"),
])
def test_a_refusal_is_told_in_words(number: int, says: str) -> None:
    assert says in explain(OSError(number, os.strerror(number)))


def test_the_soft_limit_of_open_files_goes_up_to_the_hard_one() -> None:
    program = ("import resource; from mixvisor.service.limits import raise_open_files\n"
               "resource.setrlimit(resource.RLIMIT_NOFILE, (100, 200))\n"
               "print(raise_open_files(), resource.getrlimit(resource.RLIMIT_NOFILE))")
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert said == "200 (200, 200)\n"
