"""Every exit that KVM_RUN can report, from a page written here: what it ends, what it answers, in which words."""

from __future__ import annotations

import errno
import pathlib
import re
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixvisor.vm.engines.base import ExitKind, ExitReason
from mixvisor.vm.engines.kvm import exits
from mixvisor.vm.engines.kvm.abi import RUN_OFFSETS, ExitCode

HEADER = pathlib.Path("/usr/include/linux/kvm.h")


def page(code: int, fields: dict[str, int] | None = None, tail: bytes = b"") -> bytearray:
    """A kvm_run page; fields by their name in RUN_OFFSETS, 32 bits wide where they are small."""
    made = bytearray(4096)
    struct.pack_into("<I", made, RUN_OFFSETS["exit_reason"], code)
    for name, value in (fields or {}).items():
        struct.pack_into("<Q" if value >= 1 << 32 else "<I", made, RUN_OFFSETS[name], value)
    at = RUN_OFFSETS["internal.data"]
    made[at:at + len(tail)] = tail
    return made


class Told:
    """A scene, and what it was asked for."""

    def __init__(self, *, outside: bool = False) -> None:
        self.asked: list[bytes] = []
        self._outside = outside

    def __call__(self, code: bytes) -> exits.Scene:
        self.asked.append(code)
        return exits.Scene(code.hex() or "mov eax, ebx", "32-bit protected mode, ring 0", "0x1234", self._outside,
                           "PVM", 'run it with mode = "software"')


GOES_ON = [
    ("INTR", {}), ("SET_TPR", {}), ("TPR_ACCESS", {}), ("NMI", {}), ("IOAPIC_EOI", {}), ("X86_BUS_LOCK", {}),
    ("NOTIFY", {}), ("X86_RDMSR", {"msr.index": 0x1234}), ("X86_WRMSR", {"msr.index": 0x1234}), ("HYPERCALL", {}),
    ("SYSTEM_EVENT", {"system_event.type": 4}), ("SYSTEM_EVENT", {"system_event.type": 5}),
]
ENDS = [
    ("UNKNOWN", {"hw.hardware_exit_reason": 77}, ExitReason.HOST_LIMIT, "0x4d"),
    ("EXCEPTION", {"ex.exception": 14, "ex.error_code": 2}, ExitReason.HOST_LIMIT, r"#PF, error code 0x2\) at `mov"),
    ("EXCEPTION", {"ex.exception": 77}, ExitReason.HOST_LIMIT, "vector 77"),
    ("DEBUG", {"debug.arch.exception": 1, "debug.arch.pc": 0x7C00}, ExitReason.UNSUPPORTED, "#DB at 0x7c00"),
    ("SHUTDOWN", {}, ExitReason.TRIPLE_FAULT, "fault handlers failed"),
    ("FAIL_ENTRY", {}, ExitReason.HOST_LIMIT, "VirtualBox"),
    ("FAIL_ENTRY", {"fail_entry.hardware_entry_failure_reason": 0x8000_0021, "fail_entry.cpu": 3},
     ExitReason.UNSUPPORTED, r"0x80000021, invalid guest state, on host CPU 3"),
    ("FAIL_ENTRY", {"fail_entry.hardware_entry_failure_reason": 99}, ExitReason.UNSUPPORTED, "0x63, on host CPU 0"),
    ("SYSTEM_EVENT", {"system_event.type": 1}, ExitReason.ENDED, "shut itself down"),
    ("SYSTEM_EVENT", {"system_event.type": 2}, ExitReason.ENDED, "reset itself"),
    ("SYSTEM_EVENT", {"system_event.type": 3}, ExitReason.GUEST_ERROR, "its own crash at `mov eax"),
    ("SYSTEM_EVENT", {"system_event.type": 6}, ExitReason.UNSUPPORTED, "SEV_TERM"),
    ("SYSTEM_EVENT", {"system_event.type": 60}, ExitReason.UNSUPPORTED, r"60 \(unknown\)"),
    ("NOTIFY", {"notify.flags": 1}, ExitReason.GUEST_ERROR, "without an interruptible moment"),
    ("MEMORY_FAULT", {"memory_fault.gpa": 0x5000, "memory_fault.size": 0x1000}, ExitReason.HOST_LIMIT, "0x5000"),
    ("HYPERV", {}, ExitReason.UNSUPPORTED, "Hyper-V"), ("XEN", {}, ExitReason.UNSUPPORTED, "Xen"),
    ("DIRTY_RING_FULL", {}, ExitReason.UNSUPPORTED, "dirty pages"),
    ("AP_RESET_HOLD", {}, ExitReason.UNSUPPORTED, "encrypted"),
    *((name, {}, ExitReason.UNSUPPORTED, "not of x86") for name in (
        "S390_SIEIC", "S390_RESET", "DCR", "OSI", "PAPR_HCALL", "S390_UCONTROL", "WATCHDOG", "S390_TSCH", "EPR",
        "S390_STSI", "ARM_NISV", "RISCV_SBI", "RISCV_CSR", "LOONGARCH_IOCSR")),
]
@pytest.mark.parametrize(("place", "outside", "told"), [
    ("f000:fff0", True, True), ("f000:fff0", False, False), ("0x10000", True, False)])
def test_a_triple_fault_whose_state_amd_v_has_lost_says_so(place, outside, told):
    scene = exits.Scene("outside memory", "real mode", place, outside, "AMD-V", "")
    left = exits.EXITS[ExitCode.SHUTDOWN].judge(page(ExitCode.SHUTDOWN), lambda _code: scene)
    assert left is not None
    assert left.reason is ExitReason.TRIPLE_FAULT
    assert ("after its reset" in left.detail) is told


INTERNAL = [
    (2, 0, b"", "internal error 2, simul ex"),
    (3, 3, struct.pack("<3Q", 0x8000_030E, 48, 0x184), "delivery ev, data 0x8000030e, 0x30, 0x184"),
    (4, 2, struct.pack("<2Q", 77, 1), "unexpected exit reason, data 0x4d, 0x1"),
    (9, 1000, bytes(128), "9, unknown"),
]


@pytest.mark.parametrize(("name", "fields"), GOES_ON)
def test_an_exit_that_is_answered_lets_the_guest_go_on(name, fields):
    told = Told()
    kind, ending = exits.judge(page(ExitCode[name], fields), ExitCode[name], told)
    assert (ending, told.asked) == (None, [])
    assert kind is {"X86_RDMSR": ExitKind.MSR_READ, "X86_WRMSR": ExitKind.MSR_WRITE}.get(name, ExitKind.OTHER)


@pytest.mark.parametrize(("name", "fields", "reason", "says"), ENDS)
def test_an_exit_that_ends_the_guest_has_its_reason_and_words(name, fields, reason, says):
    _kind, ending = exits.judge(page(ExitCode[name], fields), ExitCode[name], Told())
    assert ending.reason is reason
    assert re.search(says, ending.detail), ending.detail


@pytest.mark.parametrize(("suberror", "count", "data", "says"), INTERNAL)
def test_an_internal_error_has_its_suberror_and_data(suberror, count, data, says):
    made = page(ExitCode.INTERNAL_ERROR, {"internal.suberror": suberror, "internal.ndata": count}, data)
    _kind, ending = exits.judge(made, ExitCode.INTERNAL_ERROR, Told())
    assert ending.reason is ExitReason.HOST_LIMIT
    assert says in ending.detail
    assert ending.detail.endswith(
        'at `mov eax, ebx` in 32-bit protected mode, ring 0, on PVM; run it with mode = "software"')


def test_an_instruction_that_kvm_cannot_emulate_is_decoded_from_its_own_bytes():
    data = struct.pack("<QB15s", 1, 4, bytes.fromhex("f30fb8c0aabbcc"))
    told = Told()
    made = page(ExitCode.INTERNAL_ERROR, {"internal.suberror": 1, "internal.ndata": 3}, data)
    _kind, ending = exits.judge(made, ExitCode.INTERNAL_ERROR, told)
    assert told.asked == [bytes.fromhex("f30fb8c0")]
    assert (ending.reason, "cannot run `f30fb8c0`" in ending.detail) == (ExitReason.HOST_LIMIT, True)


@pytest.mark.parametrize(("count", "flags", "size"), [(0, 1, 4), (3, 0, 4), (3, 1, 0)])
def test_without_bytes_the_instruction_is_read_where_the_guest_stands(count, flags, size):
    made = page(ExitCode.INTERNAL_ERROR, {"internal.suberror": 1, "internal.ndata": count},
                struct.pack("<QB15s", flags, size, b"\x90" * 15))
    told = Told(outside=True)
    _kind, ending = exits.judge(made, ExitCode.INTERNAL_ERROR, told)
    assert told.asked == [b""]
    assert (ending.reason, ending.detail) == (
        ExitReason.GUEST_ERROR, "the guest left its memory at 0x1234: no code is there")


def test_an_msr_that_kvm_does_not_have_is_a_fault_in_the_guest():
    made = page(ExitCode.X86_RDMSR)
    exits.judge(made, ExitCode.X86_RDMSR, Told())
    assert made[RUN_OFFSETS["msr.error"]] == 1


def test_a_hypercall_is_answered_that_there_is_none():
    made = page(ExitCode.HYPERCALL)
    exits.judge(made, ExitCode.HYPERCALL, Told())
    assert struct.unpack_from("<q", made, RUN_OFFSETS["hypercall.ret"])[0] == -1000


@given(code=st.integers(0, 2**32 - 1), body=st.binary(max_size=300))
def test_any_page_has_an_answer(code, body):
    made = page(code)
    made[32:32 + len(body)] = body
    kind, ending = exits.judge(made, code, Told())
    assert isinstance(kind, ExitKind)
    if code not in exits.EXITS:
        assert ending.reason is ExitReason.UNSUPPORTED
        assert f"unsupported({code})" in ending.detail


def test_every_exit_has_a_row_and_every_row_a_test():
    assert set(exits.EXITS) == set(ExitCode)
    tested = {name for name, *_ in (*GOES_ON, *ENDS)} | {"INTERNAL_ERROR"} | {code.name for code in exits.IN_LINE}
    assert tested == {code.name for code in ExitCode}


def test_every_exit_of_the_installed_kernel_header_is_known():
    if not HEADER.exists():
        pytest.skip("no <linux/kvm.h> here: install linux-libc-dev")
    numbers = {int(number) for number in re.findall(r"^#define KVM_EXIT_\w+\s+(\d+)(?:\s+/\*.*)?$", HEADER.read_text(),
                                                    re.MULTILINE)}
    assert {38} <= numbers | {38}
    assert numbers - set(exits.EXITS) == set()


@pytest.mark.parametrize(("number", "code", "says"), [
    (errno.EFAULT, 0, "could not reach the guest's memory (Bad address)"),
    (errno.EFAULT, ExitCode.MEMORY_FAULT, "memory at 0x5000"),
    (133, 0, "broken in hardware"), (errno.ENOMEM, 0, "no memory"), (errno.EINVAL, 0, "does not accept"),
])
def test_an_error_of_kvm_run_itself_is_a_limit_of_the_host_in_words(number, code, says):
    error = OSError(number, "Bad address")
    ending = exits.run_failed(error, page(code, {"memory_fault.gpa": 0x5000}), Told())
    assert ending is not None
    assert (ending.reason, says in ending.detail) == (ExitReason.HOST_LIMIT, True)


def test_an_error_that_nobody_knows_is_left_to_the_engine():
    assert exits.run_failed(OSError(errno.EBADF, "x"), page(0), Told()) is None


def test_the_documentation_has_a_row_for_each_exit_of_x86():
    text = exits.table()
    assert "| MEMORY_FAULT (39) | `other` |" in text
    assert "unsupported(n)" in text
