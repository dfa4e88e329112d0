"""A worker with several vCPUs on /dev/kvm: threads of one process, one machine."""

from __future__ import annotations

import base64
import json
import signal
import struct
import threading
import time
from pathlib import Path

import pytest

from mixvisor.vm.engines import kick
from mixvisor.vm.engines.base import EngineError, Exit, ExitKind, ExitReason
from mixvisor.vm.worker.machine import Machine
from mixvisor.vm.worker.memory import CONVENTIONAL_END, GuestMemory
from mixvisor.vm.worker.mptable import POINTER, install
from mixvisor.vm.worker.processors import Processors
from mixvisor.vm.worker.status import VCPUS_MAX, Phase

from ..engines.test_smp import SENDS, WAITS
from .test_worker import HALTING

# The first vCPU, 32 bits at 10000h, starts the second (INIT, SIPI to 8000h) and waits until the word at 20000h reaches
# the number at +3Ah; then it writes the byte at 20008h to the exit port. The second puts its APIC id there and counts.
FIRST = bytes.fromhex(
    "bf0000e0fec787f0000000ff010000c7871003000000000001c7870003000000450000c7870003000008460000f390813d00000200e803000072"
    "f2a008000200e6f4ebfe")
COUNTS = bytes.fromhex("b800208ed866b8010000000fa266c1eb18881e0800f066ff060000ebf8")
FOR_EVER = FIRST.replace(struct.pack("<I", 1000), struct.pack("<I", 0xFFFF_FFFF))


def image(second: bytes = COUNTS, first: bytes = FIRST) -> bytes:
    """Loaded at 8000h."""
    return second.ljust(0x8000, b"\0") + first


def until(condition):
    waiting = threading.Event()
    for _ in range(4000):
        if condition():
            return
        waiting.wait(0.005)
    raise AssertionError("the condition did not come about")


def count(worker) -> int:
    return struct.unpack_from("<I", worker.memory, 0x20000)[0]


def ran_ns(pid: int) -> int:
    """CPU time of a process, all of its threads."""
    return time.clock_gettime_ns(~pid << 3 | 2)


@pytest.fixture
def smp(start):
    def make(code: bytes, **fields):
        return start("kvm", code, **{"bits": 32, "load": 0x8000, "entry": 0x10000, "vcpus": 2, **fields})

    return make


@pytest.mark.kvm
def test_the_second_vcpu_is_started_by_the_guest_in_a_thread_of_its_own(smp):
    worker = smp(image())
    threads = worker.event("started")["threads"]
    assert threads[0] == worker.pid
    assert len(set(threads)) == 2
    ended = worker.event("ended")
    assert (ended["code"], ended["exit_code"]) == ("exit-port", 1)
    assert worker.wait() == 0


@pytest.mark.kvm
def test_the_threads_of_all_vcpus_are_behind_the_same_filter(smp):
    worker = smp(image(first=FOR_EVER))
    worker.until(lambda: count(worker) > 100)
    for thread in worker.event("started")["threads"]:
        status = Path(f"/proc/{worker.pid}/task/{thread}/status").read_text()
        assert "\nSeccomp:\t2\n" in status
        assert "\nNoNewPrivs:\t1\n" in status


@pytest.mark.kvm
def test_a_pause_holds_every_vcpu_and_a_resume_lets_all_go_on(smp):
    worker = smp(image(first=FOR_EVER))
    for _ in range(5):
        before = count(worker)
        worker.until(lambda before=before: count(worker) > before)
        assert worker.ask("pause")["ok"]
        worker.until_phase(Phase.PAUSED)
        held = count(worker)
        assert worker.ask("registers")["ok"]
        assert count(worker) == held
        assert worker.ask("resume")["ok"]


@pytest.mark.kvm
def test_a_vm_that_is_started_paused_starts_no_vcpu(smp):
    worker = smp(image(), started_paused=True)
    worker.event("started")
    worker.until_phase(Phase.PAUSED)
    assert count(worker) == 0
    worker.ask("resume")
    assert worker.event("ended")["exit_code"] == 1


@pytest.mark.kvm
def test_stop_ends_a_vm_whose_vcpus_all_spin(smp):
    worker = smp(image(first=FOR_EVER))
    worker.until(lambda: count(worker) > 100)
    assert worker.ask("stop")["ok"]
    assert worker.event("ended")["code"] == "asked"
    assert worker.wait() == 0


@pytest.mark.kvm
def test_the_worker_leaves_when_its_supervisor_is_gone(smp):
    worker = smp(image(first=FOR_EVER))
    worker.until(lambda: count(worker) > 100)
    worker.link.close()
    assert worker.wait() == 2


@pytest.mark.kvm
def test_any_vcpu_may_end_the_vm_and_write_to_the_serial_port(smp):
    # mov dx, 3F8h; mov al, '2'; out dx, al; mov al, 9; out F4h, al; jmp $
    worker = smp(image(bytes.fromhex("baf803 b032 ee b009 e6f4 ebfe"), FOR_EVER))
    ended = worker.event("ended")
    assert (ended["code"], ended["exit_code"]) == ("exit-port", 9)
    assert base64.b64decode(ended["serial"]["data"]) == b"2"
    assert [worker.status.exits_of(1)[kind] for kind in (ExitKind.IO_OUT, ExitKind.IO_IN)] == [2, 0]
    assert worker.status.exits_of(0)[ExitKind.IO_OUT] == 0
    assert worker.status.exits_of_all(2)[ExitKind.IO_OUT] == 2


@pytest.mark.kvm
def test_exits_of_all_vcpus_are_told_by_their_places(smp):
    # Both write to port 80h for ever, the first from 1002Eh on, the second from 8000h on.
    first = FIRST[:FIRST.index(b"\xF3\x90")] + bytes.fromhex("e680 ebfc")
    worker = smp(image(bytes.fromhex("e680 ebfc"), first))
    places = {0x8000, 0x10000 + len(first) - 4}

    def seen() -> dict[int, int]:
        answer = worker.ask("exits", limit=10)
        assert answer["total"] == sum(site["count"] for site in answer["sites"])
        return {site["address"]: site["count"] for site in answer["sites"] if site["instruction"] == "out 0x80, al"}

    worker.until(lambda: set(seen()) == places and min(seen().values()) > 100)
    worker.ask("pause")
    worker.until_phase(Phase.PAUSED)        # the answer comes before the second vCPU has stopped
    counted = seen()
    assert [counted[place] for place in sorted(places)] == [
        worker.status.exits_of(vcpu)[ExitKind.IO_OUT] for vcpu in (1, 0)]


@pytest.mark.kvm
@pytest.mark.parametrize("sleeper", [0, 1])
def test_a_profile_samples_the_vcpu_that_computes_and_not_the_one_that_sleeps(smp, sleeper):
    # The first halts for ever once it has started the second, which spins; or the other way round.
    halts, spins = bytes.fromhex("fa f4 ebfd"), bytes.fromhex("ebfe")
    first = FIRST[:FIRST.index(b"\xF3\x90")] + (spins if sleeper else halts)
    worker = smp(image(halts if sleeper else spins, first))
    worker.until_phase(Phase.RUNNING)
    assert worker.ask("profile", hz=500, duration_s=60)["ok"]
    begun = ran_ns(worker.pid)
    until(lambda: ran_ns(worker.pid) > begun + 400_000_000)
    answer = worker.ask("profile-end")
    assert answer["ok"]
    counts = answer["vcpus"]
    assert counts[1 - sleeper] > 50
    assert counts[sleeper] <= 2, "on the way to its first halt"
    assert sum(counts) == answer["samples"]
    assert counts[1 - sleeper] <= 1.4 * 500 * answer["cpu_ns"] / 1e9 + 2
    hottest = answer["hot"][0]
    assert hottest["address"] == (0x10000 + len(first) - 2 if sleeper else 0x8000)


@pytest.mark.kvm
def test_a_profile_of_vcpus_that_all_compute_samples_each_at_the_rate_that_was_asked_for(smp):
    first = FIRST[:FIRST.index(b"\xF3\x90")] + bytes.fromhex("ebfe")
    worker = smp(image(bytes.fromhex("ebfe"), first))
    worker.until_phase(Phase.RUNNING)
    assert worker.ask("profile", hz=200, duration_s=60)["ok"]
    begun = ran_ns(worker.pid)
    until(lambda: ran_ns(worker.pid) > begun + 1_000_000_000)
    answer = worker.ask("profile-end")
    assert min(answer["vcpus"]) > 10
    assert sum(answer["vcpus"]) <= 1.4 * 200 * answer["cpu_ns"] / 1e9 + 4
    assert {place["address"] for place in answer["hot"][:2]} == {0x8000, 0x10000 + len(first) - 2}


@pytest.mark.kvm
def test_the_crash_of_the_second_vcpu_is_told_with_its_own_registers(smp):
    # lidt [cs:8] (limit 0); mov bx, 1234h; ud2
    worker = smp(image(bytes.fromhex("2e0f011e1000 bb3412 66bb78563412 0f0b 000000000000"), FOR_EVER))
    ended = worker.event("ended")
    assert ended["fate"] == "crashed"
    assert "vCPU 1" in ended["reason"]
    assert ended["registers"]["rbx"] == 0x1234_5678
    assert worker.wait() == 0


@pytest.mark.kvm
def test_bios_calls_of_other_vcpus_do_nothing(smp):
    worker = smp(image(bytes.fromhex("e6b0") + COUNTS, FOR_EVER))
    worker.until(lambda: count(worker) > 100)
    assert worker.status.get("bios_calls") == 0


@pytest.mark.kvm
def test_timer_interrupts_wake_the_first_vcpu_from_a_halt_in_the_kernel(start):
    worker = start("kvm", HALTING, vcpus=2)
    worker.until(lambda: struct.unpack_from("<H", worker.memory, 0x10100)[0] >= 5)
    assert worker.status.get("interrupts") >= 5
    assert worker.status.exits_of(0)[ExitKind.HALT] == 0


@pytest.mark.kvm
def test_both_vcpus_hammer_one_device_and_nothing_is_lost(smp):
    # Each writes 2000 bytes to the debug port, '1' and '2'; the second then marks 20004h; the first waits and exits.
    first = FIRST[:FIRST.index(b"\xF3\x90")] + bytes.fromhex(
        "b9d0070000 b031 e6e9 e2fc f390 803d0400020001 75f5 b000 e6f4 ebfe")
    second = bytes.fromhex("b800208ed8 b9d007 b032 e6e9 e2fc c606040001 ebfe")
    worker = smp(image(second, first))
    ended = worker.event("ended")
    assert ended["exit_code"] == 0
    data = base64.b64decode(ended["serial"]["data"])
    dropped = ended["serial"]["dropped_bytes"]
    assert len(data) + dropped == 4000
    if not dropped:
        assert (data.count(b"1"), data.count(b"2")) == (2000, 2000)


def test_the_software_engine_says_that_it_has_one_vcpu(start):
    worker = start("software", image(), bits=32, load=0x8000, entry=0x10000, vcpus=2)
    failed = worker.event("failed")
    assert (failed["code"], "runs one vCPU, not 2" in failed["reason"]) == ("engine", True)


def test_more_vcpus_than_the_status_page_has_room_for_are_refused(start):
    worker = start("kvm", image(), bits=32, load=0x8000, entry=0x10000, vcpus=VCPUS_MAX + 1)
    assert f"at most {VCPUS_MAX} vCPUs" in worker.event("failed")["reason"]


# The threads, with vCPUs that are made here.

class Blocked:
    """A vCPU that runs until it is kicked, or does what it was told once."""

    def __init__(self, then=None):
        self.runs, self._then = 0, then
        self._kick = threading.Event()

    def run(self):
        self.runs += 1
        if isinstance(self._then, BaseException):
            raise self._then
        if self._then is not None:
            return self._then
        self._kick.wait()
        self._kick.clear()
        return Exit(ExitReason.KICKED)

    def kick(self):
        self._kick.set()


@pytest.fixture
def crew(clock):
    """Makes `Processors` with these vCPUs running; they end with the test."""
    made = []
    kick.install((signal.SIGUSR1,))

    def make(*cpus, held=False):
        made.append(Processors(Machine(GuestMemory(bytearray(1 << 20)), clock, lambda _name, _n: None)))
        made[-1].start(cpus, held=held)
        return made[-1]

    yield make
    for one in made:
        one.end()
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def test_held_vcpus_do_not_run_until_they_are_let_go(crew):
    cpus = Blocked(), Blocked()
    processors = crew(*cpus)
    assert len(set(processors.threads)) == 3
    for _ in range(20):
        processors.hold()
        before = [cpu.runs for cpu in cpus]
        for cpu in cpus:
            cpu.kick()
        processors.hold()
        assert [cpu.runs for cpu in cpus] == before
        processors.go_on()
        until(lambda before=before: all(cpu.runs > old for cpu, old in zip(cpus, before, strict=True)))


def test_vcpus_that_start_held_have_not_run(crew):
    cpu = Blocked()
    processors = crew(cpu, held=True)
    processors.hold()
    assert cpu.runs == 0
    processors.go_on()
    until(lambda: cpu.runs == 1)


@pytest.mark.parametrize("then", [EngineError("no more"), Exit(ExitReason.TRIPLE_FAULT, "dead")])
def test_the_first_end_of_any_vcpu_stands_and_the_others_can_still_be_held(crew, then):
    other = Blocked()
    processors = crew(Blocked(then), other)
    until(lambda: processors.ended)
    assert (processors.ended.index, processors.ended.left) == (1, then)
    processors.hold()
    processors.end()
    assert processors.ended.index == 1


def test_the_end_of_all_ends_those_that_are_held_as_well(crew):
    processors = crew(Blocked(), Blocked(), held=True)
    processors.end()
    assert not [thread for thread in threading.enumerate() if "_life" in thread.name]


# The table of processors.

@pytest.mark.parametrize("vcpus", [2, 3, VCPUS_MAX])
def test_the_table_of_processors_is_found_and_has_right_sums(vcpus):
    memory = GuestMemory(bytearray(1 << 20))
    install(memory, vcpus)
    pointer = memory.read(POINTER, 16)
    assert (pointer[:4], sum(pointer) & 0xFF, pointer[9]) == (b"_MP_", 0, 4)
    at = memory.u32(POINTER + 4)
    length = memory.u16(at + 4)
    table = memory.read(at, length)
    assert (table[:4], sum(table) & 0xFF) == (b"PCMP", 0)
    assert memory.u32(at + 36) == 0xFEE0_0000
    kinds, ids, where = [], [], 44
    while where < length:
        kinds.append(table[where])
        if table[where] == 0:
            ids.append((table[where + 1], table[where + 3]))
        where += 20 if table[where] == 0 else 8
    assert (where, memory.u16(at + 34)) == (length, len(kinds))
    assert kinds == [0] * vcpus + [1, 4, 4]
    assert ids == [(0, 3), *((index, 1) for index in range(1, vcpus))]
    assert at + length <= 0xA0000


def test_without_room_for_the_table_the_vm_is_refused():
    with pytest.raises(ValueError, match="at least 640K"):
        install(GuestMemory(bytearray(CONVENTIONAL_END)), 2)


@pytest.mark.kvm
def test_a_vm_whose_vcpus_send_each_other_interrupts_is_saved_and_goes_on_in_another_worker(smp, start):
    # The first sends interrupts one by one for ever, the second counts each at 20000h.
    first_code = SENDS.replace(bytes.fromhex("83fb64 72dc"), bytes.fromhex("ebdf 909090"))
    fields = {"bits": 32, "load": 0x8000, "entry": 0x10000, "vcpus": 2}
    worker = smp(image(WAITS, first_code))
    for _ in range(4):
        seen = count(worker)
        worker.until(lambda worker=worker, seen=seen: count(worker) > seen + 100)
        # In one go: what is asked behind the pause is answered when all vCPUs stand.
        worker.ask("pause")
        state = worker.saved()
        memory = bytes(worker.memory)
        assert json.loads(state).keys() == {"cpus", "machine", "halted"}
        worker.until_phase(Phase.PAUSED)
        assert bytes(worker.memory) == memory
        worker = start("kvm", image(WAITS, first_code), saved=(memory, state), **fields)
        assert struct.unpack_from("<I", memory, 0x20000)[0] <= count(worker)


@pytest.mark.kvm
def test_the_state_of_one_vcpu_is_not_that_of_several(smp, start):
    worker = smp(image(first=FOR_EVER))
    worker.until(lambda: count(worker) > 100)
    worker.ask("pause")
    one = start("kvm", image(first=FOR_EVER), saved=(bytes(worker.memory), worker.saved()), bits=32, load=0x8000,
                entry=0x10000)
    told = one.event("failed")
    assert told["code"] == "state"
    assert "it has not the parts that it must have" in told["reason"]
