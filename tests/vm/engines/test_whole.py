"""All of a vCPU's state goes from engine to engine, and the guest does not notice."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import itertools
import json
import signal
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mixvisor.vm.engines import cpuid
from mixvisor.vm.engines.base import (
    MSRS,
    RAX,
    RBX,
    RCX,
    RDX,
    RFLAGS,
    RIP,
    RSP,
    CpuState,
    DescriptorTable,
    EngineError,
    Event,
    ExitReason,
    Fpu,
    Segment,
    WholeState,
)
from mixvisor.vm.engines.entry import flat_state
from mixvisor.vm.engines.kvm import abi
from mixvisor.vm.engines.kvm import engine as kvm_engine
from mixvisor.vm.engines.portable import BadState, canonical, from_plain, to_plain, why_not
from mixvisor.vm.host import HostFacts

from .conftest import KVM, KVM_MISSING

REAL = ["software"] if KVM_MISSING else ["software", "kvm"]
PAIRS = [pytest.param(a, b, marks=KVM.marks if "kvm" in (a, b) else [], id=f"{a} to {b}")
         for a, b in itertools.product(("software", "kvm"), repeat=2)]
both_ways = pytest.mark.parametrize(("here", "there"), PAIRS)
examples = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


PVM = HostFacts.read().technology == "pvm"     # shows the processor's own features, whatever it is told


def without_tsc(whole: WholeState) -> WholeState:
    return dataclasses.replace(whole, tsc=None)


# Random states that a processor can be in.

words = st.integers(0, (1 << 64) - 1)
flags = st.integers(0, (1 << 12) - 1).map(lambda value: value & 0xCD5 | 2)      # arithmetic, DF; no TF, IF apart
canonical_addresses = st.integers(-(1 << 47), (1 << 47) - 1).map(lambda value: value & (1 << 64) - 1)


@st.composite
def fpus(draw: st.DrawFn) -> Fpu:
    number = st.integers(0, (1 << 80) - 1)
    return Fpu(
        control=draw(st.sampled_from((0x37F, 0x27F, 0x77F, 0xF7F))), status=draw(st.integers(0, 7)) << 11 | 0x4100,
        tags=draw(st.integers(0, 255)), opcode=draw(st.integers(0, 0x7FF)),
        st=[draw(number) for _ in range(8)], xmm=[draw(st.integers(0, (1 << 128) - 1)) for _ in range(16)],
        mxcsr=draw(st.sampled_from((0x1F80, 0x3F80, 0x5F80, 0x9FC0))))


def segments(*, base: st.SearchStrategy[int], limit: st.SearchStrategy[int], **fixed: object) -> st.SearchStrategy:
    return st.builds(Segment, selector=st.integers(0, 0xFFFF), base=base, limit=limit, **{
        name: value if isinstance(value, st.SearchStrategy) else st.just(value) for name, value in fixed.items()})


pages = st.integers(0x100, 0xF_FFFF).map(lambda number: number << 12 | 0xFFF)
limits = st.one_of(st.just(0xFFFF), st.integers(0, 0xF_FFFF), pages)
low = st.integers(0, 0xFFFF_FFFF)


@st.composite
def real_mode(draw: st.DrawFn) -> CpuState:
    state = CpuState(gpr=[draw(words) for _ in range(16)] + [draw(st.integers(0, 0xFFFF)), draw(flags)])
    for name in ("ds", "es", "fs", "gs", "ss"):
        # Unreal mode: base and limit of their own.
        setattr(state, name, draw(segments(base=low, limit=limits, db=st.booleans())))
    state.cs = draw(segments(base=st.integers(0, 0xF_FFFF), limit=st.just(0xFFFF), type=11))
    state.gdt, state.idt = (DescriptorTable(draw(low), draw(st.integers(0, 0xFFFF))) for _ in range(2))
    state.cr2, state.cr3 = draw(low), draw(st.integers(0, 0xFF)) << 12
    return canonical(state)


@st.composite
def protected_mode(draw: st.DrawFn) -> CpuState:
    state = draw(real_mode())
    state.cr0 = 0x11
    ring = draw(st.sampled_from((0, 3)))
    state.cs = draw(segments(base=low, limit=limits, type=st.sampled_from((9, 11)), dpl=ring, db=st.booleans()))
    state.ss = draw(segments(base=low, limit=limits, dpl=ring, db=st.booleans()))
    for name in ("ds", "es", "fs", "gs"):
        setattr(state, name, draw(segments(
            base=low, limit=limits, type=st.sampled_from((1, 3)), dpl=3, db=st.booleans(), present=st.booleans())))
    state.ldt = draw(segments(base=low, limit=st.integers(0, 0xFFFF), type=2, s=False, present=st.booleans()))
    state.tr = draw(segments(base=low, limit=st.just(0x67), type=st.sampled_from((9, 11)), s=False))
    return canonical(state)


@st.composite
def long_mode(draw: st.DrawFn) -> CpuState:
    state = draw(protected_mode())
    ring = state.ss.dpl
    state.cr0, state.cr4, state.efer, state.cr3 = 0x8000_0011, 0x20, 0xD00, 0x1000
    state.cs = Segment(selector=0x28 | ring, limit=0xFFFF_FFFF, type=11, dpl=ring, l=True, g=True)
    state.ss = Segment(selector=0x30 | ring, limit=0xFFFF_FFFF, dpl=ring, db=True, g=True)
    state.tr = dataclasses.replace(state.tr, type=11, base=draw(canonical_addresses))
    for name in ("fs", "gs"):
        getattr(state, name).base = draw(canonical_addresses)
    state.gpr[RIP] = draw(canonical_addresses)
    return canonical(state)


@st.composite
def wholes(draw: st.DrawFn, registers: st.SearchStrategy[CpuState]) -> WholeState:
    msrs = {name: draw(canonical_addresses) for name in MSRS}
    msrs |= {"pat": 0x0007_0406_0007_0406, "sysenter_cs": draw(st.integers(0, 0xFFFF)), "star": draw(words),
             "fmask": draw(st.integers(0, 0xFFFF_FFFF))}
    return WholeState(
        registers=draw(registers), fpu=draw(fpus()), msrs=msrs,
        debug=[*(draw(low) for _ in range(4)), 0xFFFF_0FF0, 0x400],
        event=draw(st.sampled_from((None, Event("interrupt", 0x20), Event("exception", 13, 0x18),
                                    Event("exception", 6)))),
        shadow=False, halted=draw(st.booleans()))


@examples
@given(whole=wholes(real_mode()))
def test_a_whole_state_comes_back_as_it_was_given(machine, whole):
    machine.cpu.set_whole(whole)
    assert without_tsc(machine.cpu.get_whole()) == whole


@examples
@given(whole=wholes(st.one_of(protected_mode(), long_mode())))
def test_a_whole_state_of_the_other_modes_comes_back(real_machine, whole):
    real_machine.cpu.set_whole(whole)
    assert without_tsc(real_machine.cpu.get_whole()) == whole


@pytest.mark.skipif(KVM_MISSING is not None, reason=str(KVM_MISSING))
@pytest.mark.kvm
@settings(examples, max_examples=25)
@given(whole=wholes(st.one_of(real_mode(), protected_mode(), long_mode())))
def test_both_engines_keep_a_state_alike(make, whole):
    for there in ("software", "kvm"):
        machine = make("kvm" if there == "software" else "software", 4 << 20)
        machine.cpu.set_whole(whole)
        machine.move(there)
        assert without_tsc(machine.cpu.get_whole()) == whole
        machine.cpu.close()


@given(whole=wholes(st.one_of(real_mode(), protected_mode(), long_mode())))
def test_plain_data_and_back_is_the_same_state(whole):
    assert from_plain(json.loads(json.dumps(to_plain(whole)))) == whole


@given(whole=wholes(st.one_of(real_mode(), protected_mode(), long_mode())))
def test_the_common_form_of_a_state_is_its_own_common_form(whole):
    assert canonical(canonical(whole.registers)) == canonical(whole.registers)


anything = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=20), st.dictionaries(st.text(max_size=8), inner, max_size=6)),
    max_leaves=20)


@given(data=anything)
def test_what_is_no_state_is_refused(data):
    with pytest.raises(BadState):
        from_plain(data)


@given(data=st.data())
def test_a_state_with_one_thing_wrong_is_refused_or_still_one(data):
    plain = to_plain(WholeState())
    inside = plain
    while True:
        key = data.draw(st.sampled_from(sorted(inside) if isinstance(inside, dict) else range(len(inside))))
        if not isinstance(inside[key], (dict, list)) or data.draw(st.booleans()):
            break
        inside = inside[key]
    inside[key] = data.draw(anything)
    try:
        again = from_plain(plain)
    except BadState:
        return
    assert from_plain(to_plain(again)) == again


# Guests that are moved.

@both_ways
def test_a_half_done_port_read_is_finished_before_it_is_carried(make, here, there):
    machine = make(here)
    machine.bus.reads = {0x10: 0x77}
    machine.bus.on_in = lambda *_: machine.cpu.stop()
    machine.load("b83412 e410 40 f4")
    assert machine.cpu.run().reason is ExitReason.STOPPED
    machine.move(there)
    gpr = machine.cpu.get_gpr()
    assert (gpr[RAX], gpr[RIP]) == (0x1277, 0x7C05)
    assert machine.cpu.run().reason is ExitReason.HALTED
    assert machine.cpu.get_gpr()[RAX] == 0x1278
    assert machine.bus.log == [("in", 0x10, 1)]


@both_ways
def test_an_interrupt_that_was_acknowledged_is_delivered_in_the_other_engine(make, here, there):
    machine = make(here)
    machine.load("fb eb fe")
    machine.interrupt(0x20, "b85500 f4")
    whole = machine.cpu.get_whole()
    machine.cpu.request_interrupt(False)
    whole.registers.gpr[RFLAGS] |= 0x200       # else none can have been acknowledged, and VT-x refuses the entry
    whole.event = Event("interrupt", 0x20)
    machine.cpu.set_whole(whole)
    machine.move(there)
    assert machine.cpu.get_whole().event == Event("interrupt", 0x20)
    assert machine.cpu.run().reason is ExitReason.HALTED
    assert machine.cpu.get_gpr()[RAX] == 0x55
    assert struct.unpack_from("<HH", machine.memory, 0x7000 - 6) == (0x7C00, 0)     # the frame: where it stood
    assert machine.cpu.get_whole().event is None


@pytest.mark.kvm
@pytest.mark.skipif(KVM_MISSING is not None, reason=str(KVM_MISSING))
def test_an_interrupt_that_kvm_has_taken_and_not_delivered_is_carried(make):
    machine = make("kvm")
    machine.load("fb 90 90 f4")
    machine.interrupt(0x20, "b85500 f4")
    acknowledge = machine.bus.on_acknowledge

    def kicked_just_then() -> int:
        machine.cpu.kick()                     # after the vector was fetched, before the guest is entered
        return acknowledge()

    machine.bus.on_acknowledge = kicked_just_then
    while (left := machine.cpu.run()).reason is not ExitReason.KICKED:
        raise AssertionError(left)
    assert machine.cpu.get_whole().event == Event("interrupt", 0x20)
    machine.move("software")
    assert machine.cpu.run().reason is ExitReason.HALTED
    assert machine.cpu.get_gpr()[RAX] == 0x55
    assert machine.bus.log == [("acknowledge",)]


@both_ways
def test_the_instruction_behind_sti_is_done_before_an_interrupt_also_after_a_move(make, here, there):
    machine = make(here)
    machine.load("43 43 f4")                   # inc bx; inc bx; hlt
    machine.interrupt(0x20, "f4")
    whole = machine.cpu.get_whole()
    whole.registers.gpr[RFLAGS] |= 0x200
    whole.shadow = True
    machine.cpu.set_whole(whole)
    machine.move(there)
    machine.cpu.request_interrupt(True)
    assert machine.cpu.get_whole().shadow
    assert machine.cpu.run().reason is ExitReason.HALTED
    returns_to, = struct.unpack_from("<H", machine.memory, 0x7000 - 6)
    assert returns_to > 0x7C00
    assert machine.cpu.get_gpr()[RBX] == min(2, returns_to - 0x7C00)


@both_ways
def test_a_guest_moved_right_behind_its_hlt_is_still_halted(make, here, there):
    machine = make(here)
    machine.load("fb f4 b002 fa f4")
    whole = machine.cpu.get_whole()
    whole.registers.gpr[RIP] = 0x7C02
    whole.registers.gpr[RFLAGS] |= 0x200
    whole.halted = True
    machine.cpu.set_whole(whole)
    machine.move(there)
    left = machine.cpu.run()
    assert (left.reason, left.interrupts_on) == (ExitReason.HALTED, True)
    assert machine.cpu.get_gpr()[RIP] == 0x7C02
    assert machine.cpu.run().interrupts_on is False
    assert machine.cpu.get_gpr()[RAX] == 2


@both_ways
def test_unreal_mode_reaches_high_memory_in_the_other_engine(make, here, there):
    machine = make(here, 4 << 20)
    # lgdt [7d00]; cr0 |= 1; bx = 8; ds = bx; cr0 &= ~1; xor bx,bx; ds = bx; out 10, al; mov eax, [esi]; hlt
    machine.load("0f0116007d 0f20c0 0c01 0f22c0 bb0800 8edb 24fe 0f22c0 31db 8edb e610 67668b06 f4")
    machine.poke(0x7D00, struct.pack("<HI", 15, 0x7D10))
    machine.poke(0x7D10, struct.pack("<QQ", 0, 0x00CF_9300_0000_FFFF))
    machine.poke(0x20_0000, struct.pack("<I", 0xCAFE_F00D))
    gpr = machine.cpu.get_gpr()
    gpr[4] = 0x20_0000                         # rsi
    machine.cpu.set_gpr(gpr)
    machine.bus.on_out = lambda *_: machine.cpu.stop()
    assert machine.cpu.run().reason is ExitReason.STOPPED
    machine.move(there)
    ds = machine.cpu.get_state().ds
    assert (ds.selector, ds.base, ds.limit) == (0, 0, 0xFFFF_FFFF)
    left = machine.cpu.run()
    assert left.reason is ExitReason.HALTED, left
    assert machine.cpu.get_gpr()[RAX] & 0xFFFF_FFFF == 0xCAFE_F00D


def ring_3(machine, code: str) -> None:
    machine.poke(0x10000, bytes.fromhex(code))
    state = flat_state(machine.memory, 64, 0x10000)
    flat = {"limit": 0xFFFF_FFFF, "dpl": 3, "g": True}
    state.cs = Segment(selector=0x2B, type=11, l=True, **flat)
    for name in ("ds", "es", "fs", "gs", "ss"):
        setattr(state, name, Segment(selector=0x33, db=True, **flat))
    state.cr4 |= 0x600                         # OSFXSR, OSXMMEXCPT
    state.gpr[RSP], state.gpr[7], state.gpr[RCX] = 0x9000, 0x30000, 1000
    machine.cpu.set_state(state)


# fninit; fld1; l: fld1; faddp (a sum on the x87 stack); cvtsi2sd xmm1, rcx; addsd xmm0, xmm1; paddq mm... ; loop
FLOATS = ("dbe3 d9e8"                          # fninit; fld1
          "f20f2ac9" "660fefc0"                # cvtsi2sd xmm1, ecx; pxor xmm0, xmm0
          "d9e8 dec1"                          # l: fld1; faddp st1
          "f20f58c1" "f20f51d1" "f20f58c2"     # addsd xmm0, xmm1; sqrtsd xmm2, xmm1; addsd xmm0, xmm2
          "e610"                               # out 10, al: where it may be moved
          "e2ec"                               # loop l
          "dd5d00 f20f114508"                  # fstp qword [rbp]; movsd [rbp+8], xmm0
          "f4")


def floats(make, moves: list[str]) -> tuple[float, float]:
    """What the sums are, with a move to the next of *moves* at every 50th port write."""
    machine = make(moves[0], 4 << 20)
    ring_3(machine, FLOATS)
    gpr = machine.cpu.get_gpr()
    gpr[7] = 0x30000                           # rbp
    machine.cpu.set_gpr(gpr)
    machine.bus.on_out = lambda *_: machine.cpu.stop() if len(machine.bus.log) % 50 == 0 else None
    following = itertools.cycle([*moves[1:], moves[0]])
    while (left := machine.cpu.run()).reason is ExitReason.STOPPED:
        machine.move(next(following))
    # HLT in ring 3 is a general protection fault without a table to go through.
    assert left.reason is ExitReason.TRIPLE_FAULT, left
    assert len(machine.bus.log) == 1000
    return struct.unpack_from("<dd", machine.memory, 0x30000)


@pytest.mark.kvm
@pytest.mark.skipif(KVM_MISSING is not None, reason=str(KVM_MISSING))
def test_sums_on_the_x87_stack_and_in_sse_are_the_same_with_and_without_moves(make):
    alone = [floats(make, [engine]) for engine in ("software", "kvm")]
    assert alone[0] == alone[1] == floats(make, ["software", "kvm"])
    assert alone[0][0] == 1001.0


@both_ways
def test_rounding_as_the_guest_has_set_it_goes_along(make, here, there):
    machine = make(here, 4 << 20)
    # fldcw [rbp]; ldmxcsr [rbp+4]; out 10; fld qword [rbp+8]; fistp qword [rbp+16]; cvtsd2si rax, [rbp+8]; hlt
    ring_3(machine, "d96d00 0fae5504 e610 dd4508 df7d10 f2480f2d4508 f4")
    machine.poke(0x30000, struct.pack("<HxxId", 0x0B7F, 0x5F80, 2.5))     # both round up
    machine.bus.on_out = lambda *_: machine.cpu.stop()
    assert machine.cpu.run().reason is ExitReason.STOPPED
    machine.move(there)
    assert machine.cpu.run().reason is ExitReason.TRIPLE_FAULT
    assert struct.unpack_from("<q", machine.memory, 0x30010) == (3,)
    assert machine.cpu.get_gpr()[RAX] == 3


@both_ways
def test_the_time_stamp_counter_goes_on_and_never_back(make, here, there):
    machine = make(here)
    machine.load("0f31 e610 0f31 f4")
    machine.bus.on_out = lambda *_: machine.cpu.stop()

    def counter() -> int:
        gpr = machine.cpu.get_gpr()
        return (gpr[RDX] & 0xFFFF_FFFF) << 32 | gpr[RAX] & 0xFFFF_FFFF

    assert machine.cpu.run().reason is ExitReason.STOPPED
    before = counter()
    machine.move(there)
    assert machine.cpu.run().reason is ExitReason.HALTED
    assert 0 <= counter() - before < 60 * 10**10


def test_a_guest_sees_the_same_processor_on_every_engine(real_machine):
    for leaf in (0, 1, 2, 4, 7, 0xD, 0x4000_0000, 0x8000_0000, 0x8000_0001, 0x8000_0002, 0x8000_0008):
        real_machine.load("0fa2 f4")
        gpr = real_machine.cpu.get_gpr()
        gpr[RAX], gpr[RCX] = leaf, 0
        real_machine.cpu.set_gpr(gpr)
        real_machine.cpu.run()
        gpr = real_machine.cpu.get_gpr()
        told = tuple(gpr[index] for index in (RAX, RBX, RCX, RDX))
        expected = cpuid.answer(leaf)
        if real_machine.engine == "kvm" and PVM:
            if leaf == 0xD:
                told = expected
            elif expected == cpuid.answer(1):       # on Intel, every leaf beyond the last one reads so, too
                told = (*told[:2], *expected[2:])
        assert told == expected, hex(leaf)
    assert not cpuid.answer(1)[2] & 1 << 26    # no XSAVE, hence no AVX


@pytest.mark.parametrize(("leaf", "beyond"), [
    (2, True), (0x8000_0009, True), (0x4000_0001, True), (0x4000_0100, True), (0xC000_0000, True),
    (0x8000_0005, False)])
def test_a_leaf_beyond_the_last_is_the_highest_basic_one_on_intel_and_zeros_on_amd(monkeypatch, leaf, beyond):
    monkeypatch.setattr(cpuid, "vendor", lambda: b"GenuineIntel")
    assert cpuid.answer(leaf) == (cpuid.answer(1) if beyond else (0, 0, 0, 0))
    monkeypatch.setattr(cpuid, "vendor", lambda: b"AuthenticAMD")
    assert cpuid.answer(leaf) == (0, 0, 0, 0)


@pytest.mark.kvm
@pytest.mark.spins
@pytest.mark.skipif(KVM_MISSING is not None, reason=str(KVM_MISSING))
def test_a_hundred_moves_of_a_counting_guest_lose_and_double_nothing(make):
    # l: inc rax; inc qword [rdi]; add rbx, 3; jmp l
    machine = make("software", 4 << 20)
    ring_3(machine, "48ffc0 48ff07 4883c303 ebf4")
    gpr = machine.cpu.get_gpr()
    gpr[RAX], gpr[RBX], gpr[5] = 0, 0, 0x20000
    machine.cpu.set_gpr(gpr)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    seen = set()
    for move in range(100):
        assert machine.cpu.run().reason is ExitReason.KICKED
        counted, = struct.unpack_from("<Q", machine.memory, 0x20000)
        gpr = machine.cpu.get_gpr()
        at = gpr[RIP] - 0x10000
        seen.add(at)
        assert gpr[RAX] == counted + (at == 3)
        assert gpr[RBX] == 3 * (counted - (at == 6))
        machine.move(REAL[(move + 1) % 2])
    assert seen <= {0, 3, 6, 10}


@pytest.mark.spins
@pytest.mark.parametrize("engines", [("software", "software")] if PVM or KVM_MISSING else [
    ("software", "software"), pytest.param(("software", "kvm"), marks=pytest.mark.kvm)])
def test_a_guest_in_virtual_8086_mode_counts_on_wherever_it_goes(make, engines):
    machine = make("software", 4 << 20)
    # 1000:0100, its data at 2000:0: l: inc ax; inc dword [0]; add bx, 3; jmp l
    machine.memory[0x10100:0x1010b] = bytes.fromhex("40 66ff060000 83c303 ebf5")
    segments = {name: Segment(selector=selector, base=selector << 4, limit=0xFFFF, type=3, dpl=3)
                for name, selector in (("cs", 0x1000), ("ds", 0x2000), ("es", 0x2000), ("fs", 0), ("gs", 0),
                                       ("ss", 0x3000))}
    state = dataclasses.replace(CpuState(), cr0=0x11, **segments)
    state.gpr[RIP], state.gpr[RFLAGS] = 0x100, 1 << 17 | 3 << 12 | 2
    machine.cpu.set_state(state)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    for move in range(100):
        assert machine.cpu.run().reason is ExitReason.KICKED
        counted, = struct.unpack_from("<I", machine.memory, 0x20000)
        now = machine.cpu.get_state()
        at = now.gpr[RIP] - 0x100
        assert now.gpr[RFLAGS] & (1 << 17 | 3 << 12) == 1 << 17 | 3 << 12
        assert (now.cs.selector, now.cs.dpl, now.ss.base) == (0x1000, 3, 0x30000)
        assert now.gpr[RAX] & 0xFFFF == (counted + (at == 1)) & 0xFFFF
        assert now.gpr[RBX] & 0xFFFF == 3 * (counted - (at == 6)) & 0xFFFF
        machine.move(engines[(move + 1) % 2])
    assert counted > 100


# What cannot be carried.

@pytest.mark.parametrize(("change", "engine", "technology", "words"), [
    ({"cr0": 0x8000_0011}, "kvm", "pvm", "32-bit paging"),
    ({"cr0": 0x8000_0010}, "kvm", "vt-x", "paging without protection"),
    ({"gdt": DescriptorTable(1 << 60, 0)}, "kvm", "vt-x", "GDT base"),
    ({"gpr": [0] * 17 + [1 << 17]}, "kvm", "pvm", "virtual-8086"),
    ({"cr4": 1 << 18}, "software", "", "CR4"),
    ({"efer": 1 << 12}, "software", "", "EFER"),
])
def test_what_an_engine_cannot_go_on_from_has_a_reason(change, engine, technology, words):
    whole = WholeState(registers=dataclasses.replace(CpuState(), **change))
    assert words in (why_not(whole, engine, technology) or "")
    assert why_not(WholeState(), engine, technology) is None


def test_hardware_breakpoints_keep_a_guest_from_software():
    whole = WholeState(debug=[0x1000, 0, 0, 0, 0xFFFF_0FF0, 0x401])
    assert "breakpoints" in (why_not(whole, "software") or "")
    assert why_not(whole, "kvm", "vt-x") is None


@pytest.mark.kvm
@pytest.mark.skipif(KVM_MISSING is not None, reason=str(KVM_MISSING))
def test_a_state_that_kvm_refuses_is_an_engine_error(make):
    whole = WholeState(registers=CpuState(cr4=1 << 30))
    with pytest.raises(EngineError, match="KVM refused the CPU state"):
        make("kvm").cpu.set_whole(whole)


@pytest.mark.parametrize(("used", "at", "refused"), [
    (0x3, None, False),
    (0x200, None, False),                  # PKRU as it begins: what KVM says where the host has protection keys
    (0x203, 2688, True),
    (0x7, 576, True),                      # AVX: the upper half of YMM0
])
def test_registers_beyond_sse_are_carried_only_as_a_processor_begins(used, at, refused):
    raw = bytearray(ctypes.sizeof(abi.Xsave))
    struct.pack_into("<Q", raw, 512, used)
    if at is not None:
        raw[at] = 1
    with pytest.raises(EngineError, match="beyond SSE") if refused else contextlib.nullcontext():
        assert kvm_engine._fpu(abi.Xsave.from_buffer(raw)).xmm == [0] * 16
