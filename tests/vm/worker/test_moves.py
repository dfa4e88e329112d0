"""A live, sandboxed worker: its guest moved to the other engine, saved, and gone on from in a new worker."""

from __future__ import annotations

import json
import os
import struct

import pytest

from mixvisor.vm.engines.base import ExitKind
from mixvisor.vm.guests import PROGRESS_ADDRESS, pokes
from mixvisor.vm.worker.status import Phase

from .conftest import TECHNOLOGY

FLAT_64 = {"bits": 64, "memory_bytes": 4 << 20}
# l: inc eax; out 80, al; hlt with interrupts on never comes back: it waits
WAITS = bytes.fromhex("fb f4 ebfd")
# 32-bit paging switched on over an identity map of 4 MiB, then a loop that counts at 20000h.
PAGED = bytes.fromhex(
    "c70500100000 83000000"                    # mov dword [1000h], 83h: a large page
    "0f20e0 0c10 0f22e0"                       # cr4 |= PSE
    "b800100000 0f22d8"                        # cr3 = 1000h
    "0f20c0 0d00000080 0f22c0"                 # cr0 |= PG
    "ff0500000200 ebf8")                       # l: inc dword [20000h]; jmp l


def progress(worker):
    return struct.unpack_from("<Q", worker.memory, PROGRESS_ADDRESS)[0]


def builtin(start, engine, name, **parameters):
    worker = start(engine, builtin=name, pokes=pokes(name, parameters), **FLAT_64)
    worker.event("started")
    worker.until(lambda: progress(worker) > 0)
    return worker


def pause(worker):
    assert worker.ask("pause")["ok"]
    worker.until_phase(Phase.PAUSED)


@pytest.mark.kvm
@pytest.mark.parametrize("name", ["alu", "randmem", "portio", "rings"])
def test_a_counting_guest_goes_there_and_back_and_counts_on(start, name):
    worker = builtin(start, "software", name)
    before = progress(worker)
    for engine in ["kvm", "software"] * 6:
        answer = worker.move(engine)
        assert answer.get("changed"), answer
        assert 0 < answer["stop_ns"] < 10**10
        worker.until(lambda before=before: progress(worker) > before)
        before = progress(worker)
    assert worker.ask("registers")["rip"] >= 0x10000


@pytest.mark.kvm
def test_no_port_write_is_lost_or_doubled_by_moves(start):
    worker = builtin(start, "kvm", "portio", batch=50)
    for engine in ["software", "kvm"] * 12:
        assert worker.move(engine)["changed"]
        counted = progress(worker)
        worker.until(lambda counted=counted: progress(worker) > counted)
    pause(worker)
    # The count comes right behind the write.
    assert worker.status.exits[ExitKind.IO_OUT] - progress(worker) in (0, 1)


@pytest.mark.kvm
def test_a_move_to_where_it_is_changes_nothing(start):
    worker = builtin(start, "software", "alu")
    assert worker.ask("mode", engine="software") == {
        "id": worker._next, "ok": True, "engine": "software", "changed": False, "stop_ns": 0}


@pytest.mark.kvm
def test_a_paused_guest_is_moved_and_stays_paused(start):
    worker = builtin(start, "software", "alu")
    pause(worker)
    at = progress(worker)
    assert worker.move("kvm")["changed"]
    worker.until_phase(Phase.PAUSED)
    assert progress(worker) == at
    worker.ask("resume")
    worker.until(lambda: progress(worker) > at)


@pytest.mark.kvm
def test_a_guest_that_waits_is_moved_and_waits_on(start):
    worker = start("kvm", WAITS)
    worker.until_phase(Phase.SLEEPING)
    assert worker.move("software")["changed"]
    worker.until_phase(Phase.SLEEPING)
    assert worker.ask("registers")["rip"] == 0x2


def test_hardware_without_its_descriptor_is_refused_and_nothing_changes(start):
    worker = builtin(start, "software", "alu")
    answer = worker.ask("mode", engine="kvm")
    assert not answer["ok"]
    assert "descriptor" in answer["error"]
    before = progress(worker)
    worker.until(lambda: progress(worker) > before)


def test_a_descriptor_that_is_not_kvm_is_refused_and_nothing_changes(start):
    worker = builtin(start, "software", "alu")
    fd = os.open(os.devnull, os.O_RDWR)
    try:
        answer = worker.ask("mode", engine="kvm", descriptor=fd)
    finally:
        os.close(fd)
    assert "not a KVM device" in answer["refused"]
    before = progress(worker)
    worker.until(lambda: progress(worker) > before)


def test_a_descriptor_that_nobody_asked_for_is_closed(start):
    worker = builtin(start, "software", "alu")
    end, other = os.pipe()
    assert worker.ask("registers", descriptor=other)["ok"]
    os.close(other)
    assert os.read(end, 1) == b""              # no writer is left
    os.close(end)


@pytest.mark.kvm
@pytest.mark.skipif(TECHNOLOGY != "pvm", reason="only PVM cannot run 32-bit paging")
def test_what_this_hosts_kvm_cannot_run_is_refused_before_anything_changes(start):
    worker = start("software", PAGED, bits=32, memory_bytes=4 << 20)
    worker.until(lambda: progress(worker) > 1000)
    assert "32-bit paging" in worker.move("kvm")["refused"]
    before = progress(worker)
    worker.until(lambda: progress(worker) > before)


def test_only_a_paused_guest_is_saved(start):
    worker = builtin(start, "software", "alu")
    fd = os.memfd_create("state")
    answer = worker.ask("state", descriptor=fd)
    os.close(fd)
    assert "only a paused VM can be saved" in answer["error"]


def test_a_saved_guest_goes_on_in_a_new_worker(start, engine):
    first = builtin(start, engine, "randmem", working_set=65536)
    pause(first)
    memory, state, registers = bytes(first.memory), first.saved(), first.ask("registers")
    second = start(engine, builtin="randmem", saved=(memory, state), started_paused=True, **FLAT_64)
    second.event("started")
    second.until_phase(Phase.PAUSED)
    assert bytes(second.memory) == memory
    assert second.ask("registers") | {"id": 0} == registers | {"id": 0}
    at = progress(second)
    second.ask("resume")
    second.until(lambda: progress(second) > at)


@pytest.mark.kvm
def test_a_guest_saved_in_software_goes_on_in_hardware(start):
    first = builtin(start, "software", "rings")
    pause(first)
    second = start("kvm", builtin="rings", saved=(bytes(first.memory), first.saved()), **FLAT_64)
    at = progress(first)
    second.until(lambda: progress(second) > at + 100)


def test_a_guest_that_waits_for_a_key_is_restored_and_takes_it(start, engine):
    # xor ah, ah; int 16; mov [500], al; jmp $: a boot sector
    sector = bytes.fromhex("30e4 cd16 a20005 ebfe").ljust(510, b"\0") + b"\x55\xaa"
    first = start(engine, sector, boot="disk")
    first.until_phase(Phase.SLEEPING)
    first.ask("pause")
    first.until_phase(Phase.PAUSED)
    second = start(engine, sector, boot="disk", saved=(bytes(first.memory), first.saved()))
    second.until_phase(Phase.SLEEPING)
    second.press("q")
    second.until(lambda: second.memory[0x500] == ord("q"))


@pytest.mark.parametrize("data", [
    b"", b"{}", b"[1]", b"\xff", b"[" * 100_000, b'{"cpu": {}, "machine": {}, "halted": true}', b" " * (1 << 20)])
def test_a_state_that_is_none_fails_the_start_with_a_sentence(start, data):
    worker = start("software", builtin="alu", saved=(b"", data), **FLAT_64)
    told = worker.event("failed")
    assert told["code"] == "state"
    assert "what was saved is no state of such a VM" in told["reason"]
    assert worker.wait() == 1


def test_the_state_of_another_kind_of_vm_fails_the_start(start):
    first = builtin(start, "software", "alu")
    pause(first)
    sector = b"\xeb\xfe".ljust(510, b"\0") + b"\x55\xaa"
    second = start("software", sector, boot="disk", saved=(b"", first.saved()))
    assert "another kind" in second.event("failed")["reason"]


def test_the_saved_state_is_small_and_plain(start):
    worker = start("software", b"\xeb\xfe".ljust(510, b"\0") + b"\x55\xaa", boot="disk")
    worker.event("started")
    worker.ask("pause")
    worker.until_phase(Phase.PAUSED)
    state = worker.saved()
    assert len(state) < 32 << 10
    assert set(json.loads(state)) == {"cpu", "machine", "halted"}
