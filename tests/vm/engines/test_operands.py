"""The decoder of operands, against capstone where that is right, and alone."""

from __future__ import annotations

import functools
import random

import capstone
import pytest
from capstone import x86
from hypothesis import given
from hypothesis import strategies as st

from mixvisor.vm.engines.software.operands import CS, DS, ES, FS, GS, SS, Access, Decoded, decoded

SEGMENTS = {x86.X86_REG_ES: ES, x86.X86_REG_CS: CS, x86.X86_REG_SS: SS, x86.X86_REG_DS: DS, x86.X86_REG_FS: FS,
            x86.X86_REG_GS: GS}
NAMES = ["ax", "cx", "dx", "bx", "sp", "bp", "si", "di"]
NUMBERS = {start + name: number for number, name in enumerate(NAMES) for start in ("", "e", "r")} | {
    f"r{number}{end}": number for number in range(8, 16) for end in ("", "d")}
WITHOUT_ACCESS = ("lea", "nop", "invlpg", "clflush", "clflushopt", "prefetch")
# What the library does not have either: VMX, MPX, CET, SHA, 3DNow, ADX, SSE4a, XSAVE and later; UD0 and UD1.
NOT_HERE = (
    "v", "pf", "pi2f", "pmulhrw", "pswapd", "pavgusb", "bnd", "inv", "rstorssp", "clrssbsy", "setssbsy", "incssp", "wr",
    "rd", "saveprevssp", "cldemote", "clwb", "ptwrite", "xsave", "xrstor", "sha", "gf2p8", "movdir", "adcx", "adox",
    "movntss", "movntsd", "extrq", "insertq", "ud", "enqcmd", "umonitor", "tpause", "umwait", "kmov", "femms")
# Where capstone is wrong, or tells another thing.
OTHER_SIZES = ("fxsave", "fxrstor", "fxsave64", "fxrstor64", "fnsave", "frstor", "fnstenv", "fldenv", "comisd")


@functools.cache
def capstone_of(bits):
    decoder = capstone.Cs(capstone.CS_ARCH_X86, {
        16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}[bits])
    decoder.detail = True
    return decoder


def number_of(found, register):
    return NUMBERS.get(found.reg_name(register) or "", -1) if register else -1


def same(code, bits):
    """Compare; whether there was anything to compare."""
    found = next(capstone_of(bits).disasm(code, 0, 1), None)
    if found is None:
        return False
    name = found.mnemonic.rpartition(" ")[2]
    if name.startswith(NOT_HERE) or name == "xlatb" or (bits == 64 and (name[0] == "j" or name == "call")):
        return False
    told = decoded(code, bits)
    if told.invalid:
        return False
    what = code.hex(), bits, name, found.op_str, told
    assert told.length == found.size, what
    theirs = [] if name.startswith(WITHOUT_ACCESS) else [
        operand for operand in found.operands if operand.type == x86.X86_OP_MEM]
    ours = [access for access in told.accesses if access.width]
    if name.startswith("maskmov"):
        ours = []
    assert len(ours) == len(theirs), what
    if len(ours) == 2:                                       # strings: ours tells the source first
        theirs.sort(key=lambda operand: number_of(found, operand.mem.base))
        ours.sort(key=lambda access: access.base)
    for access, operand in zip(ours, theirs, strict=True):
        if name not in OTHER_SIZES and (bits == 32 or 0x66 not in code[:2]) and not told.loads:
            assert access.size == operand.size, what
        segment = SEGMENTS.get(operand.mem.segment)
        assert segment is None or access.segment == segment, what
        assert (access.base, access.scaled) == (
            number_of(found, operand.mem.base), number_of(found, operand.mem.index)), what
        assert 1 << access.shift == operand.mem.scale or access.scaled < 0, what
        assert (access.displacement - operand.mem.disp) % (1 << 16 if access.width == 2 else 1 << 32) == 0, what
        if operand.access == capstone.CS_AC_WRITE:           # it tells too few
            assert access.write or name in ("push", "frstor"), what
    return True


@pytest.mark.parametrize("bits", [16, 32, 64])
@pytest.mark.parametrize("escape", ["", "0f", "0f38", "0f3a"])
def test_operands_are_those_that_capstone_tells(bits, escape):
    rng = random.Random(bits)
    prefixes = [b""] * 3 + ([b"\x66", b"\xF3", b"\xF2", b"\x67"] if bits == 32 else [b"\x67"])
    if bits == 64:
        prefixes += [b"\x48", b"\x45"]
    compared = 0
    for opcode in range(256):
        # Prefixes, escapes, VEX.
        if not escape and (opcode in (0x0F, 0xC4, 0xC5, 0x62, *range(0xF0, 0xF4), 0x26, 0x2E, 0x36, 0x3E,
                                      *range(0x64, 0x68)) or (bits == 64 and opcode & 0xF0 == 0x40)):
            continue
        if escape == "0f" and opcode in (0x0F, 0x38, 0x3A):
            continue
        for _ in range(60):
            code = rng.choice(prefixes) + bytes.fromhex(escape) + bytes([opcode]) + rng.randbytes(11)
            compared += same(code, bits)
    assert compared >= (500 if len(escape) < 4 else 50)


@pytest.mark.parametrize(("bits", "code", "accesses"), [
    (32, "8b4510", [Access(SS, 4, False, base=5, displacement=16)]),                              # mov eax, [ebp+16]
    (32, "648b0d04000000", [Access(FS, 4, False, displacement=4)]),                               # mov ecx, [fs:4]
    (32, "ff742408", [Access(SS, 4, False, base=4, displacement=8),                               # push dword [esp+8]
                      Access(SS, 4, True, base=4, displacement=-4, width=0)]),
    (32, "8f442408", [Access(SS, 4, False, base=4, width=0),                                      # pop dword [esp+8]
                      Access(SS, 4, True, base=4, displacement=12)]),
    (32, "0fab03", [Access(DS, 4, True, base=3, bits=(0, 4))]),                                   # bts [ebx], eax
    (16, "2ed7", [Access(CS, 1, False, base=3, plus_al=True, width=2)]),                          # cs xlatb
    (16, "f3a5", [Access(DS, 2, False, base=6, width=2, counted=True),                            # rep movsw
                  Access(ES, 2, True, base=7, width=2, counted=True)]),
    (16, "cf", [Access(SS, 2, False, base=4, displacement=at, width=0) for at in (0, 2, 4)]),     # iret
    (16, "669a7856341200ff", [Access(SS, 4, True, base=4, displacement=-at, width=0)              # call dword far
                              for at in (4, 8)]),
    (32, "dd33", [Access(DS, 108, True, base=3)]),                                                # fnsave [ebx]
    (64, "0f280510000000", [Access(DS, 16, False, displacement=16, width=8, relative=True,         # movaps [rip+16]
                                   aligned=True)]),
    (64, "660ff7c1", [Access(DS, 16, True, base=7, width=8)]),                                    # maskmovdqu
])
def test_what_instructions_access(bits, code, accesses):
    told = decoded(bytes.fromhex(code).ljust(15, b"\x90"), bits)
    assert list(told.accesses) == accesses
    assert told.length == len(code) // 2


@pytest.mark.parametrize(("code", "loads"), [
    ("8ed8", True), ("8e18", True), ("8cd8", False), ("1f", True), ("06", False), ("c51e", True), ("0fb21e", True),
    ("0fa9", True), ("0fa8", False), ("ff1e", True), ("ff2e", True), ("ff16", False), ("ea00000000", True),
    ("cb", True), ("cf", True), ("c3", False)])
def test_what_loads_a_segment_is_told(code, loads):
    assert decoded(bytes.fromhex(code).ljust(15, b"\0"), 16).loads is loads


@given(code=st.binary(max_size=15), bits=st.sampled_from((16, 32, 64)))
def test_the_decoder_is_total(code, bits):
    told = decoded(code, bits)
    assert told == Decoded() or 0 < told.length <= 15 + 16
    for access in told.accesses:
        assert 0 < access.size <= 512
        assert -1 <= access.base < 16
        assert -1 <= access.scaled < 16
        assert access.segment in range(6)
