"""Several vCPUs of one VM on /dev/kvm, a thread each: start, interrupts between them, kicks, what CPUID tells them."""

from __future__ import annotations

import json
import mmap
import random
import signal
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mixvisor.vm.engines import kick
from mixvisor.vm.engines.base import (
    RBX,
    RIP,
    RSP,
    CpuState,
    EngineError,
    Exit,
    ExitKind,
    ExitReason,
    HostLimit,
    WholeState,
)
from mixvisor.vm.engines.entry import flat_state
from mixvisor.vm.engines.kvm.engine import KvmCpu, create_several
from mixvisor.vm.engines.kvm.topology import Leaf, several
from mixvisor.vm.engines.portable import BadState

from .conftest import RecordingBus

PATIENCE_S = 20
BSP, AP = 0x10000, 0x8000
# The first vCPU, 32 bits: APIC on; INIT, SIPI with vector 8 to APIC id 1; waits for the count at 20000h to reach 1000,
# then writes what is at 20008h to the exit port.
STARTS = bytes.fromhex(
    "bf0000e0fec787f0000000ff010000c7871003000000000001c7870003000000450000c7870003000008460000f390813d00000200e803000072"
    "f2a008000200e6f4ebfe")
# The second, from 0800:0000: its APIC id by CPUID to 20008h; counts at 20000h.
COUNTS = bytes.fromhex("b800208ed866b8010000000fa266c1eb18881e0800f066ff060000ebf8")
# The second: x2APIC on, vector 40h counts at 20000h and ends its interrupt; 20004h = 1; again: sti; hlt; jmp again.
WAITS = bytes.fromhex(
    "31c08ed8c70600013d008c0e020166b91b0000000f32660d000c00000f3066b90f08000066b8ff0100006631d20f30b800208ed8c606040001fb"
    "f4ebfc66ff06000066b90b0800006631c06631d20f30cf")
# The first: starts the second, then sends it a hundred interrupts, each when the one before has been counted.
SENDS = bytes.fromhex(
    "bf0000e0fec787f0000000ff010000c7871003000000000001c7870003000000450000c7870003000008460000f390803d040002000175f531db"
    "43c7871003000000000001c7870003000040400000f390391d0000020075f683fb6472dc88d8e6f4ebfe")
# The first: starts the second, then counts at 20004h for ever.
FIRST = STARTS[:STARTS.index(b"\xF3\x90")] + bytes.fromhex("ff0504000200 ebf8")
# 0:7C00 real mode: x2APIC on, its timer on vector 40h every million ticks, which counts at 20000h; again: sti; hlt;
# jmp again.
TIMED = bytes.fromhex(
    "31c08ed8c70600016d7cc7060201000066b91b0000000f32660d000c00000f3066b90f08000066b8ff0100006631d20f3066b93e08000066"
    "b80b0000006631d20f3066b93208000066b8400002006631d20f3066b93808000066b840420f006631d20f30b800208ed8fbf4ebfc66ff06"
    "000066b90b0800006631c06631d20f30cf")
SPIN, CLI_HLT, STI_HLT = b"\xEB\xFE", b"\xFA\xF4", b"\xFB\xF4\xEB\xFD"

pytestmark = pytest.mark.kvm


class Several:
    """A VM; each vCPU but the first runs in a thread of its own until it ends or the test does."""

    def __init__(self, count: int) -> None:
        self.memory = mmap.mmap(-1, 4 << 20)
        self.buses = [RecordingBus() for _ in range(count)]
        self.exits = [memoryview(bytearray(8 * len(ExitKind))).cast("Q") for _ in range(count)]
        self.cpus: list[KvmCpu] = create_several(self.memory, self.buses, self.exits)
        self.left: dict[int, Exit] = {}
        self._ending = False
        self._threads: list[threading.Thread] = []

    def poke(self, address: int, data: bytes) -> None:
        self.memory[address:address + len(data)] = data

    def word(self, address: int) -> int:
        return struct.unpack_from("<I", self.memory, address)[0]

    def start(self, first: bytes, second: bytes = b"", *, bits: int = 32) -> None:
        self.poke(BSP, first)
        self.poke(AP, second)
        self.cpus[0].set_state(flat_state(self.memory, bits, BSP))
        for index in range(1, len(self.cpus)):
            self.spawn(index)

    def spawn(self, index: int) -> None:
        thread = threading.Thread(target=self._run, args=(index,))
        self._threads.append(thread)
        thread.start()

    def _run(self, index: int) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM, signal.SIGPROF})
        while not self._ending:
            self.left[index] = self.cpus[index].run()
            if self.left[index].reason is not ExitReason.KICKED:
                return

    def halt(self) -> None:
        """No vCPU runs any more."""
        self._ending = True
        for thread in self._threads:
            while thread.is_alive():
                for cpu in self.cpus:
                    cpu.kick()
                thread.join(0.05)

    def state(self) -> Any:
        """Of all vCPUs, once none runs, as from a file."""
        self.halt()
        return json.loads(json.dumps(self.cpus[0].get_all(self.cpus[1:])))

    def go_on(self, other: Several, state: Any) -> None:
        """Where *other* was."""
        self.memory[:] = other.memory[:]
        self.cpus[0].set_all(self.cpus[1:], state, "")
        for index in range(1, len(self.cpus)):
            self.spawn(index)

    def run_until(self, condition: Callable[[], object]) -> Exit:
        """The first vCPU, in this thread; how it left. A kick of any VM of this process kicks all."""
        other = threading.Thread(target=lambda: (until(lambda: over or condition()), self.cpus[0].kick()))
        over: list[Exit] = []
        other.start()
        left = self.cpus[0].run()
        while left.reason is ExitReason.KICKED and not condition():
            left = self.cpus[0].run()
        over.append(left)
        other.join()
        return left

    def end(self) -> None:
        """Idempotent."""
        self.halt()
        for cpu in reversed(self.cpus):
            cpu.close()


@pytest.fixture
def vm(deadline: None) -> Iterator[Callable[[int], Several]]:
    made: list[Several] = []

    def make(count: int) -> Several:
        made.append(Several(count))
        return made[-1]

    yield make
    for one in made:
        one.end()


def until(condition: Callable[[], object]) -> None:
    waiting = threading.Event()
    for _ in range(PATIENCE_S * 200):
        if condition():
            return
        waiting.wait(0.005)
    raise AssertionError("the condition did not come about")


def test_init_and_sipi_start_the_second_vcpu_which_counts_and_has_its_own_apic_id(vm):
    machine = vm(2)
    machine.start(STARTS, COUNTS)
    machine.buses[0].on_out = lambda port, *_: machine.cpus[0].stop() if port == 0xF4 else None
    assert machine.cpus[0].run().reason is ExitReason.STOPPED
    assert machine.buses[0].log == [("out", 0xF4, 1, 1)]
    assert machine.word(0x20000) >= 1000


def test_a_hundred_interrupts_between_vcpus_wake_the_halted_one_each_time(vm):
    machine = vm(2)
    machine.start(SENDS, WAITS)
    machine.buses[0].on_out = lambda *_: machine.cpus[0].stop()
    assert machine.cpus[0].run().reason is ExitReason.STOPPED
    assert machine.buses[0].log == [("out", 0xF4, 1, 100)]
    assert machine.word(0x20000) == 100
    assert machine.exits[1][ExitKind.HALT] == 0          # HLT is dealt with in the kernel


def test_a_vcpu_that_nobody_started_waits_and_can_be_kicked(vm):
    machine = vm(2)
    machine.start(SPIN)
    until(lambda: machine.cpus[1]._thread)
    machine.cpus[1].kick()
    until(lambda: machine.left.get(1))
    assert machine.left[1].reason is ExitReason.KICKED
    assert machine.exits[1][ExitKind.KICK] >= 1


@pytest.mark.parametrize("code", [SPIN, CLI_HLT, STI_HLT], ids=["spinning", "halted", "waiting"])
def test_a_kick_from_another_thread_gets_a_vcpu_out_of_whatever_it_does(vm, code):
    machine = vm(2)
    machine.start(code)
    for _ in range(20):
        other = threading.Thread(target=lambda: (until(lambda: machine.cpus[0]._thread), machine.cpus[0].kick()))
        other.start()
        assert machine.cpus[0].run().reason is ExitReason.KICKED
        other.join()


def test_a_stop_from_another_thread_is_a_stop_and_hides_no_kick(vm):
    machine = vm(2)
    machine.start(SPIN)
    other = threading.Thread(target=lambda: (until(lambda: machine.cpus[0]._thread), machine.cpus[0].stop()))
    other.start()
    reasons = [machine.cpus[0].run().reason]
    other.join()
    assert reasons == [ExitReason.STOPPED]
    machine.cpus[0].stop()
    machine.cpus[0].kick()
    assert [machine.cpus[0].run().reason for _ in range(2)] == [ExitReason.STOPPED, ExitReason.KICKED]


def test_the_controllers_interrupt_wakes_the_first_vcpu_from_its_halt_whoever_asks(vm):
    machine = vm(2)
    cpu = machine.cpus[0]
    # 0:7C00 real mode: again: sti; hlt; jmp again. Vector 21h counts at 500h and writes to port 10h.
    machine.poke(0x7C00, STI_HLT)
    machine.poke(0x21 * 4, struct.pack("<HH", 0x600, 0))
    machine.poke(0x600, bytes.fromhex("ff060005 e610 cf"))
    state = CpuState()
    state.gpr[RIP], state.gpr[RSP] = 0x7C00, 0x7000
    cpu.set_state(state)

    def acknowledge() -> int:
        cpu.request_interrupt(False)
        return 0x21

    def ask() -> None:
        for number in range(1, 51):
            cpu.request_interrupt(True)
            until(lambda number=number: machine.word(0x500) & 0xFFFF == number)
        cpu.kick()

    machine.buses[0].on_acknowledge = acknowledge
    other = threading.Thread(target=ask)
    other.start()
    while cpu.run().reason is not ExitReason.KICKED or machine.word(0x500) & 0xFFFF < 50:
        pass
    other.join()
    assert machine.exits[0][ExitKind.INTERRUPT] == 50


def test_four_vcpus_of_which_only_the_first_starts_by_itself(vm):
    machine = vm(4)
    machine.start(STARTS.replace(bytes.fromhex("10030000 00000001"), bytes.fromhex("10030000 00000003")), COUNTS)
    machine.buses[0].on_out = lambda *_: machine.cpus[0].stop()
    assert machine.cpus[0].run().reason is ExitReason.STOPPED
    assert machine.buses[0].log == [("out", 0xF4, 1, 3)]


def test_the_ports_of_the_second_vcpu_go_to_its_own_bus(vm):
    machine = vm(2)
    machine.start(STARTS, bytes.fromhex("b001 e610 ebfe"))
    machine.buses[1].on_out = lambda *_: machine.cpus[0].kick()
    while not machine.buses[1].log:
        assert machine.cpus[0].run().reason is ExitReason.KICKED
    assert machine.buses[1].log == [("out", 0x10, 1, 1)]
    assert machine.buses[0].log == []
    assert machine.exits[1][ExitKind.IO_OUT] == 1


def test_a_triple_fault_of_the_second_vcpu_ends_its_run(vm):
    machine = vm(2)
    # lidt [cs:6] (limit 0); int3
    machine.start(STARTS, bytes.fromhex("2e0f011e0800 0f0b 000000000000"))
    other = threading.Thread(target=lambda: (until(lambda: 1 in machine.left), machine.cpus[0].kick()))
    other.start()
    assert machine.cpus[0].run().reason is ExitReason.KICKED
    other.join()
    assert machine.left[1].reason in (ExitReason.TRIPLE_FAULT, ExitReason.HOST_LIMIT)


def test_closing_leaves_no_kick_byte_behind_in_any_order(vm):
    before = kick.used()
    cpus = create_several(mmap.mmap(-1, 1 << 20), [RecordingBus()] * 3,
                          [memoryview(bytearray(8 * len(ExitKind))).cast("Q")] * 3)
    assert kick.used() == before + 6
    for cpu in (*reversed(cpus), *cpus):
        cpu.close()
    assert kick.used() == before


def test_more_vcpus_than_kvm_takes_are_refused_with_the_number():
    with pytest.raises(HostLimit, match=r"at most \d+ vCPUs a VM, not 5000"):
        create_several(mmap.mmap(-1, 1 << 20), [RecordingBus()] * 5000, [memoryview(b"")] * 5000)


@pytest.mark.parametrize("seed", range(4))
def test_random_code_on_the_second_vcpu_ends_or_is_kicked_and_never_ends_the_process(vm, seed):
    rng = random.Random(seed)
    for _ in range(5):
        machine = vm(2)
        machine.start(FIRST, rng.randbytes(512))
        other = threading.Thread(target=lambda machine=machine: (
            until(lambda: machine.word(0x20004) > 3), [cpu.kick() for cpu in machine.cpus]))
        machine.poke(0x20004, bytes(4))
        other.start()
        # The first counts at 20004h; whatever the second does, it is kicked and its registers can be read.
        assert machine.cpus[0].run().reason is ExitReason.KICKED
        other.join()
        machine.end()
        if 1 in machine.left:
            assert isinstance(machine.left[1].reason, ExitReason)


# Saved and restored.

def test_a_vcpu_of_several_is_not_saved_by_itself(vm):
    machine = vm(2)
    with pytest.raises(EngineError, match="several vCPUs"):
        machine.cpus[0].get_whole()
    with pytest.raises(EngineError, match="by itself"):
        machine.cpus[1].set_whole(WholeState())


def test_interrupts_between_vcpus_are_none_more_or_less_where_the_vm_goes_on_in_new_ones(vm):
    machine, count = vm(2), 20_000
    # cmp ebx, count; jb in place of cmp ebx, 100; jb
    machine.start(SENDS.replace(bytes.fromhex("83fb64 72dc"), struct.pack("<HIH", 0xFB81, count, 0xD972)), WAITS)
    moves, chance = 0, random.Random(5)
    while moves < 1000:
        machine.buses[0].on_out = lambda *_, machine=machine: machine.cpus[0].stop()
        kicker = threading.Timer(chance.randrange(20) * 1e-3, machine.cpus[0].kick)
        kicker.start()
        left = machine.cpus[0].run()
        kicker.join()
        if machine.buses[0].log:
            break
        assert left.reason is ExitReason.KICKED
        state = machine.state()               # which kicks every VM that there is
        after = vm(2)
        after.go_on(machine, state)
        machine.end()
        machine, moves = after, moves + 1
    assert machine.buses[0].log == [("out", 0xF4, 1, count & 0xFF)]
    assert machine.word(0x20000) == count
    assert moves > 3


def test_the_timer_of_a_local_apic_goes_on_in_a_new_vm(vm):
    machine = vm(2)
    machine.poke(0x7C00, TIMED)
    state = CpuState()
    state.gpr[RIP], state.gpr[RSP] = 0x7C00, 0x7000
    machine.cpus[0].set_state(state)
    for _ in range(3):
        seen = machine.word(0x20000)
        assert machine.run_until(lambda machine=machine, seen=seen: machine.word(0x20000) > seen + 3).reason is (
            ExitReason.KICKED)
        state = machine.state()
        after = vm(2)
        after.go_on(machine, state)
        assert after.word(0x20000) > seen
        machine = after


def test_all_that_kvm_has_of_each_vcpu_comes_back_as_it_was(vm):
    machine, other = vm(3), vm(3)
    machine.start(FIRST, STI_HLT)
    machine.run_until(lambda: machine.word(0x20004) > 3)
    before = machine.state()
    again = machine.state()
    other.cpus[0].set_all(other.cpus[1:], before, "")
    after = other.state()
    assert len(before["vcpus"]) == 3
    # The time-stamp counter, and whatever else goes on by itself.
    moving = {0x10} | {index for at in range(3) for index, value in before["vcpus"][at]["MSRS"]
                       if [index, value] not in again["vcpus"][at]["MSRS"]}
    for old, new in zip(before["vcpus"], after["vcpus"], strict=True):
        assert len(old["MSRS"]) > 20
        assert sorted(index for index, _ in old["MSRS"]) == sorted(index for index, _ in new["MSRS"])
        lost = {hex(index): (hex(value), hex(dict(map(tuple, new["MSRS"]))[index])) for index, value in old["MSRS"]
                if [index, value] not in new["MSRS"] and index not in moving}
        assert not lost
        assert {key: old[key] for key in old if key != "MSRS"} == {key: new[key] for key in new if key != "MSRS"}
    times = [dict(map(tuple, vcpu["MSRS"]))[0x10] for vcpu in after["vcpus"]]
    assert max(times) - min(times) < 1_000_000_000          # one clock, read three times
    assert 0 <= times[0] - dict(map(tuple, before["vcpus"][0]["MSRS"]))[0x10] < 60_000_000_000


def test_registers_wider_than_sse_are_carried(vm):
    machine, other = vm(2), vm(2)
    vcpu = machine.cpus[1]._vcpu
    area = bytearray(vcpu.take("XSAVE", 4096))
    told = machine.cpus[0]._kvm.supported_cpuid()
    avx = next(leaf.ecx >> 28 & 1 for leaf in told.entries[:told.nent] if leaf.function == 1)
    at, bit = (576, 4) if avx else (160, 2)                 # the upper halves of YMM, or XMM; in XSTATE_BV
    area[512] |= bit
    area[at:at + 256] = bytes(range(256))
    vcpu.give("XSAVE", bytes(area))
    other.cpus[0].set_all(other.cpus[1:], machine.state(), "")
    assert other.cpus[1]._vcpu.take("XSAVE", 4096)[at:at + 256] == bytes(range(256))


@pytest.mark.parametrize("damage", [
    lambda state: state.pop("clock_ns"),
    lambda state: state["vcpus"].pop(),
    lambda state: state["vcpus"][1].pop("LAPIC"),
    lambda state: state["vcpus"][1].update(LAPIC="AAAA"),
    lambda state: state["vcpus"][0].update(REGS=7),
    lambda state: state["vcpus"][0].update(SREGS="?" * 416),
    lambda state: state["vcpus"][0].update(MSRS={}),
    lambda state: state["vcpus"][0]["MSRS"].append([1, 2, 3]),
    lambda state: state["vcpus"][0]["MSRS"].append([-1, 2]),
    lambda state: state["vcpus"][0]["MSRS"].append([0x10, 1 << 64]),
    lambda state: state.update(clock_ns=-1),
    lambda state: state.update(vcpus="two"),
])
def test_a_damaged_state_of_several_vcpus_is_refused_in_words(vm, damage):
    machine = vm(2)
    state = machine.state()
    damage(state)
    with pytest.raises(BadState):
        vm(2).cpus[0].set_all(vm(2).cpus[1:], state, "")


@pytest.mark.parametrize(("damage", "why"), [
    (lambda state: state.update(processor="0" * 32), "CPUID"),
    (lambda state: state["vcpus"][0]["MSRS"].append([0x7FFF_1234, 0]), "no MSR 0x7fff1234"),
    (lambda state: state["vcpus"][0].update(SREGS="/" * 416), "KVM refused"),
])
def test_a_state_of_another_host_or_that_kvm_does_not_take_is_refused_in_words(vm, damage, why):
    machine, other = vm(2), vm(2)
    state = machine.state()
    damage(state)
    with pytest.raises(EngineError, match=why):
        other.cpus[0].set_all(other.cpus[1:], state, "")


# What CPUID tells, without a device.

SUPPORTED = [
    Leaf(0, 0, 0, 0x1F, 1, 2, 3), Leaf(1, 0, 0, 0x306C3, 0x7F_20_08_00, 0xFFFF_FFFF, 0xFFFF_FFFF & ~(1 << 9)),
    Leaf(4, 0, 1, 0x3C00_0121), Leaf(4, 1, 1, 0x3C03_C163), Leaf(4, 2, 1, 0), Leaf(0xA, 0, 0, 7, 7, 7, 7),
    Leaf(0xB, 0, 1, 1, 2, 0x100, 9), Leaf(0x1F, 0, 1, 1, 2, 0x100, 9), Leaf(0x4000_0000, 0, 0, 0x4000_0001),
    Leaf(0x8000_0001, 0, 0, 0, 0, 0xFFFF_FFFF, 0x2C10_0800), Leaf(0x8000_0008, 0, 0, 0x3027, 0, 0x7007, 0),
    Leaf(0x8000_001E, 0, 0, 5, 5, 5, 5),
]


def told(index: int, count: int, *, deadline: bool = True) -> dict[tuple[int, int], Leaf]:
    return {(leaf.function, leaf.index): leaf for leaf in several(SUPPORTED, index, count, deadline=deadline)}


def test_each_vcpu_is_told_its_apic_id_and_how_many_there_are():
    table = told(2, 3)
    assert table[1, 0].ebx == 0x02_03_08_00
    assert table[0xB, 0] == Leaf(0xB, 0, 1, 0, 1, 0x100, 2)
    assert table[0xB, 1] == Leaf(0xB, 1, 1, 2, 3, 0x201, 2)
    assert table[4, 0].eax == 0x121 | 2 << 26                   # a cache of its own
    assert table[4, 1].eax == 0x163 | 2 << 14 | 2 << 26         # one that all share
    assert table[4, 2] == SUPPORTED[4]
    assert table[0x8000_0008, 0].ecx == 0x2002


def test_a_guest_is_told_of_the_hypervisor_and_the_apic_and_not_of_what_is_not_kept():
    table = told(0, 2)
    assert table[1, 0].ecx & (1 << 31)
    assert table[1, 0].edx & (1 << 9)
    assert not table[1, 0].ecx & (1 << 3 | 1 << 5)
    assert not table[0x8000_0001, 0].ecx & (1 << 2 | 1 << 22)
    assert table[0xA, 0].eax == 0
    assert not {(0x1F, 0), (0x8000_001E, 0)} & set(table)
    assert table[0x4000_0000, 0] == SUPPORTED[8]
    assert bool(told(0, 2, deadline=False)[1, 0].ecx & 1 << 24) is False


def test_the_guest_reads_what_the_table_of_this_host_says(vm):
    machine = vm(2)
    #   mov eax, 1; cpuid; mov esi, ebx; mov edi, ecx; mov eax, 0Bh; mov ecx, 1; cpuid; mov ebp, edx; out 10h, al
    machine.start(bytes.fromhex("b801000000 0fa2 89de 89cf b80b000000 b901000000 0fa2 89d5 e610 ebfe"))
    machine.buses[0].on_out = lambda *_: machine.cpus[0].stop()
    machine.cpus[0].run()
    gpr = machine.cpus[0].get_gpr()
    assert gpr[4] >> 16 & 0xFFFF == 0x0002              # ESI: APIC id 0, two in the package
    assert gpr[5] >> 31 & 1                             # EDI: under a hypervisor
    assert (gpr[RBX], gpr[7]) == (2, 0)
