"""A host whose /dev/kvm cannot be used is told what is wrong and what to do."""

from __future__ import annotations

import errno
import mmap
import os
import re
import signal
from pathlib import Path

import pytest

from mixvisor.vm.engines import kick
from mixvisor.vm.engines.base import EngineError, ExitReason, HostLimit
from mixvisor.vm.engines.entry import flat_state
from mixvisor.vm.engines.kvm import api

from .conftest import KVM_MISSING

needs_kvm = [pytest.mark.kvm, pytest.mark.skipif(KVM_MISSING is not None, reason=str(KVM_MISSING))]


def test_a_missing_device_says_so_and_names_the_software_engine(tmp_path):
    with pytest.raises(HostLimit, match=r'does not exist.*engine = "software"'):
        api.Kvm(str(tmp_path / "kvm"))


def test_a_forbidden_device_names_user_and_group(monkeypatch):
    def refuse(path, flags):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(HostLimit, match=r"may not be opened by uid \d+.*group"):
        api.Kvm()


def test_a_file_that_is_no_kvm_device_is_refused(tmp_path):
    path = tmp_path / "kvm"
    path.write_bytes(b"")
    with pytest.raises(HostLimit, match="not a KVM device"):
        api.Kvm(str(path))


@pytest.mark.parametrize("engine", [pytest.param("kvm", marks=needs_kvm), "software"])
def test_memory_that_is_not_whole_pages_is_refused(make, engine):
    with pytest.raises(EngineError, match="whole pages"):
        make(engine, mmap.PAGESIZE + 1)


@pytest.mark.parametrize("engine", [pytest.param("kvm", marks=needs_kvm)])
def test_an_instruction_that_this_hosts_kvm_cannot_run_is_named_as_the_hosts_limit(make, engine):
    # Where ring 0 runs natively (VT-x, AMD-V) the guest simply goes on to the HLT, or faults without an IDT where the
    # processor has no POPCNT.
    machine = make(engine, 4 << 20)
    machine.poke(0x10000, bytes.fromhex("f3480fb8c3 f4"))
    machine.cpu.set_state(flat_state(machine.memory, 64, 0x10000))
    result = machine.cpu.run()
    if not re.search(r"^flags.* popcnt\b", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
        assert result.reason is ExitReason.TRIPLE_FAULT
    elif result.reason is not ExitReason.HALTED:
        assert result.reason is ExitReason.HOST_LIMIT
        assert "popcnt rax, rbx" in result.detail
        assert "64-bit long mode, ring 0" in result.detail


@pytest.mark.kvm
@pytest.mark.skipif(KVM_MISSING is not None, reason=str(KVM_MISSING))
def test_no_kick_makes_the_creation_of_a_vm_begin_anew(monkeypatch):
    before, seen, call = signal.pthread_sigmask(signal.SIG_BLOCK, ()), [], api._call

    def watched(fd, name, *argument):
        seen.append((name, signal.pthread_sigmask(signal.SIG_BLOCK, ())))
        return call(fd, name, *argument)

    kvm = api.Kvm()
    monkeypatch.setattr(api, "_call", watched)
    kvm.create_vm().close()
    assert [(name, mask >= set(kick.SIGNALS)) for name, mask in seen] == [("KVM_CREATE_VM", True)]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
    kvm.close()
