"""Whose doing an end on the real /dev/kvm is: a limit of PVM, nobody's on VT-x and AMD-V, or the guest's."""

from __future__ import annotations

import re
import struct

import pytest

from mixvisor.vm.engines.base import RBX, RIP, DescriptorTable, ExitKind, ExitReason
from mixvisor.vm.engines.entry import flat_state
from mixvisor.vm.engines.kvm.errors import what_kvm_is

pytestmark = pytest.mark.kvm


def test_unknown_msrs_fault_in_the_guest_and_are_counted(make):
    machine = make("kvm", 4 << 20)
    # mov ecx, 12345678h; rdmsr; 10007h: wrmsr. Handler: inc ebx; add esp, 16; cmp bl, 2; je end; jmp 10007h; end: hlt
    machine.poke(0x10000, bytes.fromhex("b978563412 0f32 0f30"))
    machine.poke(0x11000, bytes.fromhex("43 83c410 80fb02 7405 e9f9efffff f4"))
    state = flat_state(machine.memory, 32, 0x10000)
    machine.poke(0x9000 + 13 * 8, struct.pack("<HHHH", 0x1000, 0x08, 0x8E00, 1))
    state.idt = DescriptorTable(0x9000, 14 * 8 - 1)
    machine.cpu.set_state(state)
    seen = []
    machine.cpu.watch = lambda kind, **_: seen.append(kind)
    assert machine.cpu.run().reason is ExitReason.HALTED
    gpr = machine.cpu.get_gpr()
    assert (gpr[RBX], gpr[RIP]) == (2, 0x1100F)
    assert (machine.count(ExitKind.MSR_READ), machine.count(ExitKind.MSR_WRITE)) == (1, 1)
    assert seen[:2] == [ExitKind.MSR_READ, ExitKind.MSR_WRITE]


@pytest.mark.parametrize(("code", "bits", "instruction"), [
    ("cc", 64, "int3"), ("f30fb8c0", 64, "popcnt eax, eax"), ("0f01cb", 32, "stac"), ("0f20c0 0d00000080 0f22c0", 32,
                                                                                     "mov cr0, eax")])
def test_a_limit_of_pvm_is_told_with_instruction_mode_host_and_advice_and_no_limit_elsewhere(
        make, code, bits, instruction):
    machine = make("kvm", 4 << 20)
    machine.poke(0x10000, bytes.fromhex(code + "f4"))
    machine.cpu.set_state(flat_state(machine.memory, bits, 0x10000))
    ending = machine.cpu.run()
    if not what_kvm_is().name.startswith("PVM"):
        assert ending.reason is not ExitReason.HOST_LIMIT
        return
    assert ending.reason is ExitReason.HOST_LIMIT
    assert re.search(rf"`{instruction}`.* in {bits}-bit .* mode, ring 0, on PVM .*mode = \"software\"", ending.detail)


def test_a_guest_that_faults_by_itself_is_not_taken_for_a_limit(make):
    machine = make("kvm", 4 << 20)
    machine.poke(0x10000, bytes.fromhex("0f0b"))
    machine.cpu.set_state(flat_state(machine.memory, 32, 0x10000))
    assert machine.cpu.run().reason is ExitReason.TRIPLE_FAULT


def test_what_this_hosts_kvm_is_has_words():
    kvm = what_kvm_is()
    assert "KVM" in kvm.name
    assert "software" in kvm.advice
