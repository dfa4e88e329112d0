"""Every way in which KVM_RUN can come back, and what each means for the guest.

Theory.  KVM writes why it left the guest into the `kvm_run` page. A handful of exits are the guest's daily life
(port and memory-mapped I/O, HLT, the interrupt window): the engine does those in line, since they come by the
hundred thousand. All others are rows of `EXITS`: a function looks at the page and gives either an `Exit` that
ends the run, with words, or None: whatever was to be answered is in the page, the guest goes on.

Who is to blame is kept apart, because the remedies differ:

HOST_LIMIT   this host's KVM cannot do what the guest does, and hardware could: the text has the instruction, the mode,
             what this host's KVM is, and what to do
GUEST_ERROR  no PC could go on
UNSUPPORTED  the exit belongs to something that this engine has not switched on, or that nobody knows

Invariants.  A row for each exit that `abi.ExitCode` names, and a number that it does not name is kept as
`unsupported(n)`. Nothing here calls the kernel; `Scene` is made (registers read, code decoded) only where an ending
needs its words. Bytes in the page are KVM's, not the guest's, but an instruction's bytes are: they are only decoded.

Source: Documentation/virt/kvm/api.rst and arch/x86/kvm of Linux 6.1 to 6.18; SDM volume 3, appendix C (exit reasons)
and 31.4 (errors of VM entry); AMD64 volume 2, appendix C.
"""

from __future__ import annotations

import errno
import mmap
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from ..base import Exit, ExitKind, ExitReason
from .abi import RUN_OFFSETS, ExitCode, InternalError, SystemEvent

__all__ = ["EXITS", "IN_LINE", "Row", "Scene", "SceneOf", "judge", "run_failed", "table"]

Page = mmap.mmap | bytearray


@dataclass(frozen=True, slots=True)
class Scene:
    """What the guest was doing, in words."""

    instruction: str                # as text; of the bytes that KVM gave, where it gave any
    mode: str
    place: str
    outside: bool                   # there is no code in memory at CS:RIP
    host: str                       # what this host's KVM is
    advice: str                     # what to do about a limit of it
    pages_32: bool = False          # 32-bit paging was being switched on, and this KVM cannot do it


SceneOf = Callable[[bytes], Scene]      # of an instruction's bytes; b"": look at CS:RIP
Judge = Callable[[Page, SceneOf], Exit | None]

_ENOSYS: Final = -1000                  # KVM_ENOSYS: the hypercall does not exist
_WORD, _QUAD = struct.Struct("<I"), struct.Struct("<Q")
_BYTES_GIVEN: Final = 1                 # KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES
_CONTEXT_INVALID: Final = 1             # KVM_NOTIFY_CONTEXT_INVALID
_LONGEST: Final = 15
_RESET: Final = "f000:fff0"             # where a processor stands after a reset, its segment's base 0xFFFF0000
_EHWPOISON: Final = 133

# VT-x: bit 31 says that the entry failed, the rest why; without it the number of an error of VMLAUNCH.
_ENTRY_REASONS: Final = {
    0x8000_0021: "invalid guest state", 0x8000_0022: "an MSR could not be loaded",
    0x8000_0029: "machine check during the entry", 7: "invalid control fields", 8: "invalid host state",
    0xFFFF_FFFF_FFFF_FFFF: "invalid guest state (VMEXIT_INVALID)", 0xFFFF_FFFF: "invalid guest state (VMEXIT_INVALID)",
}
_VECTORS: Final = {
    0: "#DE", 1: "#DB", 3: "#BP", 4: "#OF", 5: "#BR", 6: "#UD", 7: "#NM", 8: "#DF", 10: "#TS", 11: "#NP", 12: "#SS",
    13: "#GP", 14: "#PF", 16: "#MF", 17: "#AC", 18: "#MC", 19: "#XM",
}


def _word(page: Page, name: str) -> int:
    return _WORD.unpack_from(page, RUN_OFFSETS[name])[0]


def _quad(page: Page, name: str) -> int:
    return _QUAD.unpack_from(page, RUN_OFFSETS[name])[0]


def _limit(text: str, scene: Scene) -> Exit:
    return Exit(ExitReason.HOST_LIMIT, f"{text} in {scene.mode}, on {scene.host}; {scene.advice}")


# -- rows --------------------------------------------------------------------------------------


def _go_on(_page: Page, _scene: SceneOf) -> Exit | None:
    return None


def _unsupported(what: str) -> Judge:
    def judge_it(_page: Page, _scene: SceneOf) -> Exit | None:
        return Exit(ExitReason.UNSUPPORTED, what)

    return judge_it


def _shutdown(_page: Page, scene_of: SceneOf) -> Exit | None:
    scene = scene_of(b"")
    if scene.pages_32:
        return _limit(f"this host's KVM cannot do 32-bit paging, which `{scene.instruction}` switches on,", scene)
    words = "the guest faulted while its fault handlers failed"
    if scene.outside and scene.place == _RESET:
        # AMD-V leaves the guest's state undefined, so KVM resets the vCPU before it tells.
        words += " (AMD-V gives no state of that moment: what is shown is the processor after its reset)"
    return Exit(ExitReason.TRIPLE_FAULT, words)


def _unknown(page: Page, scene_of: SceneOf) -> Exit | None:
    reason = _quad(page, "hw.hardware_exit_reason")
    scene = scene_of(b"")
    return _limit(f"the processor left the guest for a reason that KVM does not know ({reason:#x}) at "
                  f"`{scene.instruction}`", scene)


def _exception(page: Page, scene_of: SceneOf) -> Exit | None:
    vector, error = _word(page, "ex.exception"), _word(page, "ex.error_code")
    scene = scene_of(b"")
    return _limit(f"KVM handed over an exception of the guest that it did not deliver ({_vector(vector)}, error code "
                  f"{error:#x}) at `{scene.instruction}`", scene)


def _debug(page: Page, scene_of: SceneOf) -> Exit | None:
    exception, at = _word(page, "debug.arch.exception"), _quad(page, "debug.arch.pc")
    return Exit(ExitReason.UNSUPPORTED, f"KVM stopped the guest for a debugger, and none is attached "
                                        f"({_vector(exception)} at {at:#x})")


def _fail_entry(page: Page, _scene: SceneOf) -> Exit | None:
    reason = _quad(page, "fail_entry.hardware_entry_failure_reason")
    if reason == 0:
        # No reason of the processor's: it was not in VMX operation any more.
        return Exit(ExitReason.HOST_LIMIT, "the processor refused to enter the guest without a reason (0x0):"
                    " another hypervisor took VT-x or AMD-V away, as VirtualBox can; stop its VMs")
    known = _ENTRY_REASONS.get(reason)
    why = f"hardware reason {reason:#x}" + (f", {known}" if known else "")
    return Exit(ExitReason.UNSUPPORTED, f"the processor refused to enter the guest ({why}, on host CPU "
                f"{_word(page, 'fail_entry.cpu')}): its state is not one that VT-x or AMD-V can run")


def _internal_error(page: Page, scene_of: SceneOf) -> Exit | None:
    number = _word(page, "internal.suberror")
    if number == InternalError.EMULATION:
        code = _instruction_bytes(page)
        scene = scene_of(code)
        if scene.outside and not code:
            return Exit(ExitReason.GUEST_ERROR, f"the guest left its memory at {scene.place}: no code is there")
        return _limit(f"this host's KVM cannot run `{scene.instruction}`", scene)
    scene = scene_of(b"")
    try:
        name = InternalError(number).name.lower().replace("_", " ")
    except ValueError:
        name = "unknown"
    count = min(_word(page, "internal.ndata"), 16)
    data = struct.unpack_from(f"<{count}Q", page, RUN_OFFSETS["internal.data"])
    details = f", data {', '.join(f'{value:#x}' for value in data)}" if data else ""
    return _limit(f"this host's KVM failed (internal error {number}, {name}{details}) at `{scene.instruction}`", scene)


def _instruction_bytes(page: Page) -> bytes:
    """What KVM's emulator had before it; empty where KVM (before Linux 5.14) does not tell."""
    if _word(page, "internal.ndata") < 3 or not _quad(page, "emulation_failure.flags") & _BYTES_GIVEN:
        return b""
    at = RUN_OFFSETS["emulation_failure.insn_bytes"]
    return bytes(page[at:at + min(page[RUN_OFFSETS["emulation_failure.insn_size"]], _LONGEST)])


def _system_event(page: Page, scene_of: SceneOf) -> Exit | None:
    number = _word(page, "system_event.type")
    if number == SystemEvent.SHUTDOWN:
        return Exit(ExitReason.ENDED, "the guest shut itself down")
    if number == SystemEvent.RESET:
        return Exit(ExitReason.ENDED, "the guest reset itself")
    if number == SystemEvent.CRASH:
        return Exit(ExitReason.GUEST_ERROR, f"the guest reported its own crash at `{scene_of(b'').instruction}`")
    if number in (SystemEvent.WAKEUP, SystemEvent.SUSPEND):
        return None                     # the next entry goes on, as a spurious wake-up may at any time
    name = "SEV_TERM: an encrypted guest ended itself" if number == SystemEvent.SEV_TERM else "unknown"
    return Exit(ExitReason.UNSUPPORTED, f"the guest raised system event {number} ({name})")


def _msr(page: Page, _scene: SceneOf) -> Exit | None:
    """An MSR that KVM does not have or a value that it does not take: #GP, as on a processor."""
    page[RUN_OFFSETS["msr.error"]] = 1
    return None


def _hypercall(page: Page, _scene: SceneOf) -> Exit | None:
    _QUAD.pack_into(page, RUN_OFFSETS["hypercall.ret"], _ENOSYS & 0xFFFF_FFFF_FFFF_FFFF)
    return None


def _notify(page: Page, scene_of: SceneOf) -> Exit | None:
    if not _word(page, "notify.flags") & _CONTEXT_INVALID:
        return None
    scene = scene_of(b"")
    return Exit(ExitReason.GUEST_ERROR, f"the guest held the processor without an interruptible moment until its state "
                                        f"was lost, at `{scene.instruction}` in {scene.mode}")


def _memory_fault(page: Page, scene_of: SceneOf) -> Exit | None:
    address, length = _quad(page, "memory_fault.gpa"), _quad(page, "memory_fault.size")
    scene = scene_of(b"")
    return _limit(f"KVM could not reach the guest's memory at {address:#x} ({length} bytes) for `{scene.instruction}`",
                  scene)


def _vector(number: int) -> str:
    return _VECTORS.get(number, f"vector {number}")


@dataclass(frozen=True, slots=True)
class Row:
    kind: ExitKind                  # how it is counted
    judge: Judge
    about: str                      # for the documentation


_OTHER: Final = ExitKind.OTHER
_NOT_OURS: Final = "not asked for, so it does not come; ends the VM"
IN_LINE: Final = frozenset((ExitCode.IO, ExitCode.MMIO, ExitCode.HLT, ExitCode.IRQ_WINDOW_OPEN))

_FOREIGN: Final = {
    ExitCode.S390_SIEIC: "S/390", ExitCode.S390_RESET: "S/390", ExitCode.DCR: "PowerPC", ExitCode.OSI: "PowerPC",
    ExitCode.PAPR_HCALL: "PowerPC", ExitCode.S390_UCONTROL: "S/390", ExitCode.WATCHDOG: "PowerPC",
    ExitCode.S390_TSCH: "S/390", ExitCode.EPR: "PowerPC", ExitCode.S390_STSI: "S/390", ExitCode.ARM_NISV: "ARM",
    ExitCode.RISCV_SBI: "RISC-V", ExitCode.RISCV_CSR: "RISC-V", ExitCode.LOONGARCH_IOCSR: "LoongArch",
}

EXITS: Final[Mapping[int, Row]] = {
    ExitCode.UNKNOWN: Row(_OTHER, _unknown, "ends the VM as a limit of the host, with the hardware's exit reason"),
    ExitCode.EXCEPTION: Row(_OTHER, _exception, "ends the VM as a limit of the host, with vector and error code"),
    ExitCode.IO: Row(ExitKind.IO_OUT, _go_on, "port I/O, plain and string (a call an element): the machine's devices"),
    ExitCode.HYPERCALL: Row(_OTHER, _hypercall, "answered \"no such call\""),
    ExitCode.DEBUG: Row(_OTHER, _debug, _NOT_OURS),
    ExitCode.HLT: Row(ExitKind.HALT, _go_on, "the guest waits for an interrupt, or ends with interrupts off"),
    ExitCode.MMIO: Row(ExitKind.MMIO_READ, _go_on, "an access outside memory: reads ones, writes are dropped"),
    ExitCode.IRQ_WINDOW_OPEN: Row(ExitKind.INTERRUPT, _go_on, "the interrupt that waits is injected"),
    ExitCode.SHUTDOWN: Row(ExitKind.SHUTDOWN, _shutdown, "a triple fault: ends the VM as the guest's own fault"),
    ExitCode.FAIL_ENTRY: Row(_OTHER, _fail_entry, "ends the VM, with the processor's reason in words"),
    ExitCode.INTR: Row(_OTHER, _go_on, "a signal: looked at and on"),
    ExitCode.SET_TPR: Row(_OTHER, _go_on, "the task priority (CR8) is kept by KVM: on"),
    ExitCode.TPR_ACCESS: Row(_OTHER, _go_on, "on"),
    ExitCode.NMI: Row(_OTHER, _go_on, "an NMI of the host's: on"),
    ExitCode.INTERNAL_ERROR: Row(
        _OTHER, _internal_error, "KVM gave up: ends the VM as a limit of the host, with the instruction (from its own "
        "bytes where it gives them), the mode and the suberror's data; as the guest's fault where there is no code"),
    ExitCode.SYSTEM_EVENT: Row(
        _OTHER, _system_event, "shutdown and reset end the VM in good order, a crash as the guest's fault"),
    ExitCode.IOAPIC_EOI: Row(_OTHER, _go_on, "there is no I/O APIC of ours to tell: on"),
    ExitCode.HYPERV: Row(_OTHER, _unsupported("the guest used Hyper-V's interface, which is not offered"), _NOT_OURS),
    ExitCode.X86_RDMSR: Row(ExitKind.MSR_READ, _msr, "an MSR that KVM does not have: #GP in the guest, counted"),
    ExitCode.X86_WRMSR: Row(ExitKind.MSR_WRITE, _msr, "an MSR or value that KVM does not take: the same"),
    ExitCode.DIRTY_RING_FULL: Row(_OTHER, _unsupported("KVM's ring of dirty pages is full, and nobody asked for one"),
                                  _NOT_OURS),
    ExitCode.AP_RESET_HOLD: Row(_OTHER, _unsupported("a processor of an encrypted guest waits to be started, which is "
                                                     "not offered"), _NOT_OURS),
    ExitCode.X86_BUS_LOCK: Row(_OTHER, _go_on, "a locked access over two cache lines: on"),
    ExitCode.XEN: Row(_OTHER, _unsupported("the guest used Xen's interface, which is not offered"), _NOT_OURS),
    ExitCode.NOTIFY: Row(_OTHER, _notify, "no interruptible moment for long: on, unless the guest's state is lost"),
    ExitCode.MEMORY_FAULT: Row(_OTHER, _memory_fault, "ends the VM as a limit of the host, with the address"),
    **{code: Row(_OTHER, _unsupported(f"KVM gave an exit of {name}, not of x86"), "of another architecture")
       for code, name in _FOREIGN.items()},
}


def judge(page: Page, code: int, scene_of: SceneOf) -> tuple[ExitKind, Exit | None]:
    """How an exit is counted, and how it ends the run (None: the guest goes on)."""
    row = EXITS.get(code)
    if row is None:
        return _OTHER, Exit(ExitReason.UNSUPPORTED, f"KVM gave an exit that is not known here: unsupported({code})")
    return row.kind, row.judge(page, scene_of)


_RUN_ERRORS: Final = {
    errno.EFAULT: "KVM could not reach the guest's memory",
    errno.ENOMEM: "the host has no memory for what KVM needs: free some, or give the VMs less",
    _EHWPOISON: "a page of the guest's memory is broken in hardware; look for \"Memory failure\" in the kernel log",
    errno.EIO: "KVM could not go on with this VM (another hypervisor holding VT-x or AMD-V does that)",
    errno.EINVAL: "KVM does not accept the state of the vCPU",
}


def run_failed(error: OSError, page: Page, scene_of: SceneOf) -> Exit | None:
    """The ending that an error of KVM_RUN itself means; None where there are no words for it."""
    if error.errno in (errno.EFAULT, _EHWPOISON) and _word(page, "exit_reason") == ExitCode.MEMORY_FAULT:
        return _memory_fault(page, scene_of)
    words = _RUN_ERRORS.get(error.errno or 0)
    if words is None:
        return None
    scene = scene_of(b"")
    return _limit(f"{words} ({error.strerror}) at `{scene.instruction}`", scene)


def table() -> str:
    """EXITS as a Markdown table, for the documentation."""
    rows = ["| exit | counted as | what happens |", "|---|---|---|"]
    rows += [f"| {ExitCode(code).name} ({code}) | `{row.kind.name.lower()}` | {row.about} |"
             for code, row in EXITS.items() if code not in _FOREIGN]
    others = ", ".join(str(int(code)) for code in _FOREIGN)
    rows.append(f"| {others} | `other` | of other architectures, with no meaning on x86: end the VM |")
    rows.append("| any other | `other` | ends the VM as `unsupported(n)` |")
    return "\n".join(rows) + "\n"
