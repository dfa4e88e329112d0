"""Each defect of Unicorn that quirks.py names: that it is there, and that it does not show.

The first half of a test uses bare Unicorn; when a new version mends a defect, that half fails and
the work-around can go.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import pathlib
import struct

import pytest
from unicorn import unicorn_const, x86_const
from unicorn.unicorn_py3 import unicorn as binding

from mixvisor.vm.engines import cpuid
from mixvisor.vm.engines.base import RAX, RBX, RCX, RDX, RIP, CpuState, EngineError, ExitReason, Fpu
from mixvisor.vm.engines.software import quirks


@pytest.fixture
def machine(make):
    return make("software", 4 << 20)


def bare(mode: int = unicorn_const.UC_MODE_64, code: str = ""):
    uc = binding.Uc(unicorn_const.UC_ARCH_X86, mode)
    uc.mem_map(0, 1 << 20)
    uc.mem_write(0x1000, bytes.fromhex(code))
    return uc


def test_lost_stop(machine):
    uc = bare(code="90 f4")
    uc.emu_stop()
    uc.emu_start(0x1000, 0x1001)
    assert uc.reg_read(x86_const.UC_X86_REG_RIP) == 0x1001       # it ran: the stop was lost
    machine.load("90 f4")
    machine.cpu.kick()
    assert machine.cpu.run().reason is ExitReason.KICKED


def test_late_stop(machine):
    uc = bare(code="e610 ffc0 ffc0 f4")
    uc.hook_add(unicorn_const.UC_HOOK_INSN, lambda uc, *_: uc.emu_stop(), None, 1, 0,
                x86_const.UC_X86_INS_OUT)
    uc.emu_start(0x1000, 0xF0000)
    assert uc.reg_read(x86_const.UC_X86_REG_RIP) > 0x1002        # the rest of the block ran
    machine.bus.on_out = lambda *_: machine.cpu.stop()
    machine.run("e610 40 40 f4")
    assert machine.cpu.get_gpr()[RIP] == 0x7C02


def test_half_registers(machine):
    uc = bare(unicorn_const.UC_MODE_32)
    assert uc.reg_read(x86_const.UC_X86_REG_EAX) == 0
    machine.load("f4")
    gpr = machine.cpu.get_gpr()
    gpr[0] = gpr[8] = 0x1234_5678_9ABC_DEF0
    machine.cpu.set_gpr(gpr)
    machine.cpu.run()
    assert machine.cpu.get_gpr()[0] == machine.cpu.get_gpr()[8] == 0x1234_5678_9ABC_DEF0


def test_stale_code(machine):
    machine.run("b001 f4")
    machine.memory[0x7C01] = 2                                   # behind the engine's back
    state = CpuState()
    state.gpr[RIP] = 0x7C00
    machine.cpu.set_state(state)
    machine.cpu.run()
    assert machine.cpu.get_gpr()[0] == 1                         # the old code ran
    machine.cpu.memory_changed(0x7C00, 2)
    machine.cpu.set_state(state)
    machine.cpu.run()
    assert machine.cpu.get_gpr()[0] == 2


def test_the_layout_is_the_one_measured_for_this_version():
    unicorn = quirks.Unicorn(mmap.mmap(-1, 1 << 20))
    layout = unicorn.layout
    assert (layout.eip, layout.hflags, layout.segments, layout.control) == (128, 176, 184, 424)
    assert (layout.error_code, layout.old_exception) == (5384, 5496)


def test_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(quirks, "VERSION", "2.1.5")
    with pytest.raises(EngineError, match=r"pip install 'unicorn==2\.1\.5'"):
        quirks.Unicorn(mmap.mmap(-1, 1 << 20))


def test_a_cpu_that_is_not_found_is_refused(monkeypatch):
    monkeypatch.setattr(quirks, "_read_self", lambda fd, address, length: bytes(length))
    with pytest.raises(EngineError, match="not found"):
        quirks._find_layout()


def test_a_cpu_that_is_elsewhere_than_before_is_refused(monkeypatch):
    monkeypatch.setattr(quirks, "CPU_TO_ENV", quirks.CPU_TO_ENV - 8)
    with pytest.raises(EngineError, match="not where that of another instance was"):
        quirks.Unicorn(mmap.mmap(-1, 1 << 20))


def test_the_cpu_is_found_on_a_heap_full_of_other_instances():
    memory = mmap.mmap(-1, 1 << 20)
    instances = [quirks.Unicorn(memory) for _ in range(40)]
    assert {each.env - each.cpu for each in instances} == {quirks.CPU_TO_ENV}
    assert len({each.cpu for each in instances}) == len(instances)


def test_the_state_in_place_is_the_state_the_api_shows(machine):
    unicorn = machine.cpu._unicorn
    unicorn.words[0] = 0x1122_3344_5566_7788
    assert unicorn.uc.reg_read(x86_const.UC_X86_REG_RAX) == 0x1122_3344_5566_7788
    unicorn.uc.reg_write(x86_const.UC_X86_REG_R15, 99)
    assert unicorn.words[15] == 99


def test_cpuid_is_answered_with_the_common_processor(machine):
    uc = bare(code="0fa2 90")
    uc.reg_write(x86_const.UC_X86_REG_RAX, 1)
    uc.emu_start(0x1000, 0x1002)
    assert uc.reg_read(x86_const.UC_X86_REG_RAX) != cpuid.answer(1)[0]     # QEMU's own
    machine.run("66b801000000 0fa2 f4")
    gpr = machine.cpu.get_gpr()
    assert (gpr[RAX], gpr[RBX], gpr[RCX], gpr[RDX]) == cpuid.answer(1)


def test_the_x87_stack_begins_empty(machine):
    assert bare().reg_read(x86_const.UC_X86_REG_FPTAG) != 0xFFFF           # all in use
    assert machine.cpu.get_whole().fpu == Fpu()
    assert machine.cpu._unicorn.uc.reg_read(x86_const.UC_X86_REG_FPTAG) == 0xFFFF


@pytest.mark.parametrize("ring", [0, 3])
@pytest.mark.parametrize("bits", [16, 32, 64])
def test_hidden_flags_follow_from_the_state_as_unicorn_itself_computes_them(machine, bits, ring):
    """Let the guest load CS and SS itself and compare with what `sync` makes of the result."""
    from mixvisor.vm.engines.entry import flat_state
    machine.poke(0x10000, b"\xF4")
    state = flat_state(machine.memory, bits, 0x10000)
    if ring == 3 and bits == 64:
        # push 33; push 9000; push 2; push 2b; push 10040; iretq
        machine.poke(0x10000, bytes.fromhex("6a33 6800900000 6a02 6a2b 6840000100 48cf"))
        machine.poke(0x10040, bytes.fromhex("0f0b"))
    elif bits == 32:
        machine.poke(0x10000, bytes.fromhex("66b81000 8ed0 ea40000100 0800"))
        machine.poke(0x10040, b"\xF4")
    machine.cpu.set_state(state)
    machine.cpu.run()
    cell = ctypes.c_uint32.from_address(
        machine.cpu._unicorn.env + machine.cpu._unicorn.layout.hflags)
    before = cell.value
    machine.cpu._registers.sync()
    assert cell.value == before


def test_exception_in_flight_is_cleared_before_every_start(machine):
    unicorn = machine.cpu._unicorn
    at = unicorn.layout.old_exception
    struct.pack_into("<i", unicorn.bytes, at, 14)
    machine.run("f4")
    assert struct.unpack_from("<i", unicorn.bytes, at)[0] == -1


def test_busy_tss(machine):
    """A far call through a gate to an inner ring, which aborts the process where TR's cache says busy."""
    from mixvisor.vm.engines.base import DescriptorTable, Segment
    from mixvisor.vm.engines.entry import flat_state
    machine.poke(0x10000, bytes.fromhex("9A 00000000 2800"))                         # call 28:0
    machine.poke(0x11000, b"\xF4")
    state = flat_state(machine.memory, 32, 0x10000)
    machine.poke(0x7000 + 0x28, bytes.fromhex("0010 0800 00 EC 0100"))               # gate to 8:11000, DPL 3
    state.gdt = DescriptorTable(0x7000, 0x2F)
    flat = {"limit": 0xFFFF_FFFF, "dpl": 3, "g": True, "db": True}
    state.cs = Segment(selector=0x1B, type=11, **flat)
    state.ss = state.ds = state.es = Segment(selector=0x23, **flat)
    machine.poke(0x9004, struct.pack("<II", 0x8000, 0x10))
    state.tr = Segment(selector=0x38, base=0x9000, limit=103, type=11, s=False)
    machine.cpu.set_state(state)
    assert machine.cpu.run().reason is ExitReason.HALTED
    after = machine.cpu.get_state()
    assert (after.gpr[RIP], after.cs.dpl, after.ss.selector, after.tr.type) == (0x11001, 0, 0x10, 11)


def test_sticky_int(machine):
    """An intercepted instruction that follows an INT n stands where it stands."""
    machine.poke(0x21 * 4, struct.pack("<HH", 0x600, 0))
    machine.poke(0x600, b"\xCF")                                                      # iret
    # int 21; mov eax, cr0; mov cr0, eax; inc bx; hlt
    assert machine.run("CD21 0F20C0 0F22C0 43 F4").reason is ExitReason.HALTED
    gpr = machine.cpu.get_gpr()
    assert (gpr[RBX], gpr[RIP]) == (1, 0x7C0A)


def test_unchecked():
    uc = bare(code="B8FFFFFFFF 0F22E0 90")                       # mov eax, -1; mov cr4, rax; nop
    seen = []
    uc.hook_add(unicorn_const.UC_HOOK_INTR, lambda uc, number, _: seen.append(number))
    uc.emu_start(0x1000, 0x1009)
    assert seen == []                                            # bits that are not there: no #GP
    # What the engine makes of it: tests/vm/engines/test_conformance.py.


def test_an_intercepted_guest_may_touch_every_msr_that_is_there(machine):
    """Those of MSRS_PRESENT do not leave the guest (but WRMSR of EFER), the others are faults."""
    from mixvisor.vm.engines.software.privileged import MSRS_PRESENT
    machine.poke(13 * 4, struct.pack("<HH", 0x600, 0))
    machine.poke(0x600, b"\xF4")
    for number in (*sorted(MSRS_PRESENT), 0x11, 0x1FFF, 0x2000, 0xC000_0085, 0xC001_0000, 0xFFFF_FFFF):
        machine.run("66B9" + struct.pack("<I", number).hex() + "0F32 F4")            # mov ecx, n; rdmsr; hlt
        assert (machine.cpu.get_gpr()[RIP] == 0x7C09) == (number in MSRS_PRESENT), hex(number)


@pytest.mark.parametrize("code", ["F00FBBE8", "F00FABC0", "F00FB3D9", "66F00FBBE8", "F00FBAF807"])
def test_deadly_lock(make, code):
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        with contextlib.suppress(binding.UcError):
            bare(code=code).emu_start(0x1000, 0x1000 + len(code) // 2)
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    for engine in ("software", "unchecked"):
        machine = make(engine)
        machine.poke(6 * 4, struct.pack("<HH", 0x600, 0))
        machine.poke(0x600, b"\xF4")
        machine.run(code + "F4")
        assert machine.cpu.get_gpr()[RIP] == 0x601


def test_ports_free():
    # Ring 3 by the hidden flags, IOPL 0: bare Unicorn asks nobody.
    memory = mmap.mmap(-1, 1 << 20)
    memory[0x1000:0x1003] = bytes.fromhex("E464 90")
    unicorn = quirks.Unicorn(memory)
    unicorn.hidden.value |= 3
    seen = []
    unicorn.uc.hook_add(unicorn_const.UC_HOOK_INSN, lambda uc, port, size, _: seen.append(port) or 0, None, 1, 0,
                        x86_const.UC_X86_INS_IN)
    unicorn.uc.hook_add(unicorn_const.UC_HOOK_INTR, lambda uc, number, _: seen.append(-number))
    unicorn.words[16] = 0x1000
    unicorn.uc.ctl_set_exits([0x1002])
    unicorn.start()
    assert seen == [0x64]


def test_no_int1():
    uc = bare(code="F1 90")
    seen = []
    uc.hook_add(unicorn_const.UC_HOOK_INTR, lambda uc, number, _: seen.append(number))
    uc.hook_add(unicorn_const.UC_HOOK_INSN_INVALID, lambda uc, _: seen.append("invalid") or uc.emu_stop() or True)
    uc.emu_start(0x1000, 0x1001)
    assert seen == ["invalid"]


def test_huge_buffer():
    assert bare(code="90").ctl_get_tcg_buffer_size() > quirks.CODE_BUFFER_BYTES
    assert quirks.Unicorn(mmap.mmap(-1, 1 << 20)).uc.ctl_get_tcg_buffer_size() == quirks.CODE_BUFFER_BYTES


def test_slow_stores(make):
    """The library is patched, pages with code are marked, and those without are not."""
    stores = quirks._stores(quirks.found_layout().handle_to_cpu)
    assert stores.fast
    stores._marks.clear()                # of other tests' memory that lay at this address
    machine = make("software", 4 << 20)
    machine.run("C606003012 C606007C34 F4")             # mov byte [3000], 12; mov byte [7C00], 34; hlt
    _, size, marks = stores._words
    assert size == len(machine.memory)
    assert [ctypes.string_at(marks + page, 1)[0] for page in (3, 7)] == [0, 1]
    assert (machine.memory[0x3000], machine.memory[0x7C00]) == (0x12, 0x34)


def test_code_that_is_written_after_it_ran_and_its_page_was_data_before(machine):
    """Data page, then code, then written again: from fast stores to slow ones and back over, many times."""
    # L: mov byte [9001], cl; call 9000; add bx, ax; loop L; hlt.   9000: mov al, n; ret
    machine.poke(0x9000, bytes.fromhex("B000 C3"))
    machine.run("31DB 31C0 B96400 880E0190 E8F213 01C3 E2F5 F4")
    assert machine.cpu.get_gpr()[RBX] & 0xFFFF == sum(range(1, 101))


BODY = bytes.fromhex("48837DF000 0F85")                 # cmp qword [rbp-16], 0; jne: a block that tests for itself


def blocks_that_test() -> int:
    """In all translated code of this process."""
    found = 0
    with open("/proc/self/mem", "rb", buffering=0) as memory:
        for line in pathlib.Path("/proc/self/maps").read_text().splitlines():
            region, rights = line.split()[:2]
            start, end = (int(bound, 16) for bound in region.split("-"))
            if rights == "rwxp" and end - start > 1 << 20:
                memory.seek(start)
                with contextlib.suppress(OSError):                    # a guard page
                    found += memory.read(1 << 16).count(BODY)
    return found


def test_slow_blocks(machine, monkeypatch, make):
    blocks = quirks._blocks(quirks.found_layout().handle_to_cpu)
    assert blocks.fast
    unicorn = machine.cpu._unicorn
    assert unicorn.blocks is blocks
    before = blocks_that_test()
    machine.run("B90300 890E0090 E2FA F4")                            # mov cx, 3; mov [9000], cx; loop -4; hlt
    assert blocks_that_test() >= before + 2
    assert ctypes.string_at(unicorn.env - 12, 12) == bytes(12)        # padding, and the two bytes, which are 0
    machine.load("EB FE")
    machine.cpu.kick()
    assert machine.cpu.run().reason is ExitReason.KICKED
    # As ever where they cannot be made fast.
    monkeypatch.setattr(blocks, "fast", False)
    slow = make("software", 4 << 20)
    assert slow.cpu._unicorn.blocks is None
    slow.run("B90300 890E0090 E2FA F4")
    assert slow.cpu.get_gpr()[RCX] & 0xFFFF == 0
    slow.load("EB FE")
    slow.cpu.kick()
    assert slow.cpu.run().reason is ExitReason.KICKED


@pytest.mark.parametrize("changed", ["helper_check_exit_request_x86_64", "check_exit_request_x86_64",
                                     "gen_intermediate_code_x86_64"])
def test_blocks_of_a_library_that_is_another_are_left_alone(changed):
    other = (ctypes.c_ubyte * (1 << 20))()                            # no code that is known
    place = ctypes.addressof(other) + len(other) // 2
    found = quirks.Blocks(lambda name: place if name == changed else quirks._symbol(name),
                          quirks.found_layout().handle_to_cpu, quirks.CPU_TO_ENV)
    assert not found.fast


@pytest.mark.parametrize(("code", "count", "result"), [
    # xor bx, bx; mov cx, 5; L: inc bx; LOOP L; hlt
    ("31DB B90500 43 E2FD F4", 0, 5),
    # ... cmp bx, 3; LOOPNE L: ends with equal
    ("31DB B90900 43 83FB03 E0FA F4", 6, 3),
    # ... cmp bx, 9; LOOPE L: ends at once with unequal
    ("31DB B90900 43 83FB09 E1FA F4", 8, 1),
    # the flags of what came before LOOP reach the block behind it and the one at its target:
    # xor bx, bx; mov cx, 2; mov al, FF; L: add al, 1 (carry in the first round alone); adc bx, 0; loop L; adc bx, 10
    ("31DB B90200 B0FF 0401 83D300 E2F9 83D310 F4", 0, 0x11),
    # mov cx, 1; mov al, FF; add al, 1; loop +0; adc bx, 0: carry behind a LOOP not taken, and behind one taken
    ("31DB B90100 B0FF 0401 E200 83D300 F4", 0, 1),
    ("31DB B90200 B0FF 0401 E200 83D300 F4", 1, 1),
    # sub cx, cx (carry clear); stc; jcxz +1; hlt; adc bx, 7; hlt
    ("31DB 29C9 F9 E301 F4 83D307 F4", 0, 8),
    # sti; loop, as the instruction behind STI, taken and not
    ("31DB B90300 43 FB E2FC FA F4", 0, 3),
    # 32 bits wide: mov ecx, 10002h; L: inc bx; a32 loop L stops after 10002h rounds: bx wraps to 2
    ("31DB 66B902000100 43 67E2FC F4", 0, 2),
])
def test_loops_end_and_hand_on_flags_as_the_manual_says(machine, code, count, result):
    machine.run(code)
    gpr = machine.cpu.get_gpr()
    assert (gpr[RCX] & 0xFFFF_FFFF, gpr[RBX] & 0xFFFF) == (count, result)


def test_loop_is_stepped_one_by_one(machine):
    """TF: a #DB after each LOOP, taken or not. The handler counts in DX and returns."""
    machine.poke(0x04, bytes.fromhex("00900000"))                     # vector 1: 0:9000
    machine.poke(0x9000, bytes.fromhex("42 CF"))                      # inc dx; iret
    # xor dx, dx; mov cx, 3; pushf; pop ax; or ax, 100; push ax; popf; L: loop L; nop; nop; hlt
    machine.run("31D2 B90300 9C 58 0D0001 50 9D E2FE 90 90 9C 58 25FFFE 50 9D F4")
    # 3 LOOPs, 2 NOPs, pushf, pop, and, push; the POPF that clears TF still traps.
    assert machine.cpu.get_gpr()[RDX] & 0xFFFF == 10


# Where each defect of the list in quirks.py is shown, when not in a test of its name here.
ELSEWHERE = {
    "INEXACT_STOP": "test_progress_is_never_counted_twice_over_many_stops",
    "NO_IDT": "test_int_from_ring_3_reaches_ring_0",
    "STICKY_FAULT": "test_exception_in_flight_is_cleared_before_every_start",
    "UNTIL_PROBE": "test_page_faults_tell_address_and_kind_also_the_second",
    "RING_LOCK": "test_hidden_flags_follow_from_the_state_as_unicorn_itself",
    "NO_SYSCALL": "test_syscall_enters_ring_0",
    "OWN_CPUID": "cpuid", "FULL_STACK": "fpu", "NO_RF": "test_a_program_does_as_the_manual_says",
    "UNBOUNDED": "def test_what_is_let_pass_where_accesses_are_not_checked",
}


def test_every_defect_that_is_named_has_a_test():
    text = "\n".join(path.read_text() for path in pathlib.Path(__file__).parent.glob("test_*.py"))
    names = [name for name, _ in quirks.listed()]
    assert len(names) > 15
    for name in names:
        assert f"def test_{name.lower()}" in text or ELSEWHERE[name] in text, name
