"""What an engine is: one vCPU over a piece of guest memory.

Theory.  An engine executes guest instructions over memory that somebody else owns (one
`mmap` of the VM's memfd) and turns everything that is not plain computation into calls of a
`Bus` (port and memory-mapped I/O) or into an `Exit`.  It knows no device, no BIOS, no
scheduler and no socket.  Two engines (`kvm`, `software`) and one fake implement `Cpu`; one
contract suite (tests/vm/engines) runs over all of them, so that the machine model above
cannot tell them apart.

Invariants.
- `run` returns only at an instruction boundary, with every register and memory effect of
  the instructions before it done exactly once, and none of the ones after (a progress
  counter must never be counted twice).
- A `Bus` call happens *during* an instruction; the registers seen inside it are those before
  the instruction, except that the instruction pointer may or may not have advanced. A device
  may change general registers (not RIP) inside `port_out`; the change survives.
- An external interrupt is taken between two instructions of a guest that allows it (IF set, not behind
  STI or a load of SS), and only while the bus asks (`request_interrupt`); its vector is fetched by
  `Bus.acknowledge` at that moment. A HLT that an interrupt ends at once is not reported.
- Kicks are never lost: one that arrives before `run` makes the next `run` return `KICKED`.

Addresses are guest-physical unless named linear. Sizes are bytes.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol

__all__ = [
    "EXIT_KINDS", "GPR", "MSRS", "Bus", "Cpu", "CpuState", "DescriptorTable", "EngineError", "Event",
    "Exit", "ExitKind", "ExitReason", "Fpu", "HostLimit", "Segment",
    "Watch", "WholeState", "nobody",
]


class EngineError(Exception):
    """The engine cannot be had on this host, or cannot go on; the text says what to do."""


class HostLimit(EngineError):
    """The *host* cannot do it (no /dev/kvm, no permission, a limit of its KVM), not the guest.

    `busy`: because somebody else holds VT-x or AMD-V.
    """

    def __init__(self, text: str, *, busy: bool = False) -> None:
        super().__init__(text)
        self.busy = busy


class ExitKind(enum.IntEnum):
    """Why guest context was left: the bounded label set of `mixvisor_vm_exits_total`.

    The value is the index into the counters of the status page (vm/worker/status.py).
    """

    IO_IN = 0
    IO_OUT = 1
    MMIO_READ = 2
    MMIO_WRITE = 3
    HALT = 4
    KICK = 5
    INTERRUPT = 6        # an external interrupt; on the software engine also every exception
    SHUTDOWN = 7
    OTHER = 8
    MSR_READ = 9         # of an MSR that the engine does not have: #GP in the guest
    MSR_WRITE = 10


EXIT_KINDS: Final = tuple(kind.name.lower() for kind in ExitKind)


class ExitReason(enum.Enum):
    """Why `Cpu.run` returned."""

    KICKED = "kicked"              # kick() or a signal; nothing else happened
    HALTED = "halted"              # HLT; RIP is behind it. Exit.interrupts_on: whether IF is set
    STOPPED = "stopped"            # the bus called Cpu.stop()
    TRIPLE_FAULT = "triple-fault"  # the guest's own fault: a PC would reset
    HOST_LIMIT = "host-limit"      # the host's KVM cannot run this (decoded instruction in detail)
    GUEST_ERROR = "guest-error"    # e.g. execution outside memory, where a PC runs floating bus
    ENDED = "ended"                # the guest shut the machine down or reset it; how, in detail
    UNSUPPORTED = "unsupported"    # an exit or state this engine does not handle; see detail


@dataclass(frozen=True, slots=True)
class Exit:
    reason: ExitReason
    detail: str = ""
    interrupts_on: bool = False    # meaningful with HALTED


# Order of the general registers in every list of registers: that of struct kvm_regs.
GPR: Final = (
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags",
)
RAX, RBX, RCX, RDX, RSI, RDI, RSP, RBP = range(8)
RIP, RFLAGS = 16, 17


@dataclass(slots=True)
class Segment:
    """A segment register with its hidden part (struct kvm_segment's fields, unpacked)."""

    selector: int = 0
    base: int = 0
    limit: int = 0xFFFF
    type: int = 3          # 4-bit type: 11 code/read/accessed, 3 data/write/accessed
    present: bool = True
    dpl: int = 0
    db: bool = False       # 32-bit
    s: bool = True         # code or data (False: system)
    l: bool = False        # 64-bit code  # noqa: E741 - the manual's name
    g: bool = False        # limit in pages
    avl: bool = False


@dataclass(slots=True)
class DescriptorTable:
    base: int = 0
    limit: int = 0xFFFF


@dataclass(slots=True)
class CpuState:
    """All architectural state an engine starts from, and reports when a guest dies."""

    gpr: list[int] = field(default_factory=lambda: [0] * 16 + [0, 2])
    cs: Segment = field(default_factory=lambda: Segment(type=11))
    ds: Segment = field(default_factory=Segment)
    es: Segment = field(default_factory=Segment)
    fs: Segment = field(default_factory=Segment)
    gs: Segment = field(default_factory=Segment)
    ss: Segment = field(default_factory=Segment)
    tr: Segment = field(default_factory=lambda: Segment(type=11, s=False))
    ldt: Segment = field(default_factory=lambda: Segment(type=2, s=False))
    gdt: DescriptorTable = field(default_factory=DescriptorTable)
    idt: DescriptorTable = field(default_factory=lambda: DescriptorTable(0, 0x3FF))
    cr0: int = 0x10        # ET; PE off: real mode
    cr2: int = 0
    cr3: int = 0
    cr4: int = 0
    efer: int = 0


# Model-specific registers that a guest may rely on, with their numbers. FS and GS base are in the segments, EFER
# beside the control registers, the time-stamp counter in WholeState.
MSRS: Final = {
    "sysenter_cs": 0x174, "sysenter_esp": 0x175, "sysenter_eip": 0x176, "pat": 0x277, "star": 0xC000_0081,
    "lstar": 0xC000_0082, "cstar": 0xC000_0083, "fmask": 0xC000_0084, "kernel_gs_base": 0xC000_0102,
}
_PAT_RESET: Final = 0x0007_0406_0007_0406


@dataclass(slots=True)
class Fpu:
    """x87, MMX and SSE: the fields of FXSAVE (SDM volume 1, 10.5.1), after FNINIT.

    `tags`: the abridged tag word, a bit for each *physical* register in use; `st`: 80-bit values of ST(0) to ST(7),
    counted from the top of the stack (whose number is in `status`); MMX registers are their low halves.
    """

    control: int = 0x37F
    status: int = 0
    tags: int = 0
    opcode: int = 0
    instruction: int = 0       # 64-bit pointers of the last x87 instruction and its operand
    operand: int = 0
    st: list[int] = field(default_factory=lambda: [0] * 8)
    xmm: list[int] = field(default_factory=lambda: [0] * 16)
    mxcsr: int = 0x1F80


@dataclass(frozen=True, slots=True)
class Event:
    """An interrupt that was acknowledged, or an exception that was raised, and is not delivered yet."""

    kind: Literal["interrupt", "exception"]
    vector: int
    error: int | None = None


@dataclass(slots=True)
class WholeState:
    """Everything that a vCPU is between two calls of `run`: another engine can go on from it.

    What guests cannot have here (vm/engines/cpuid.py keeps them from it): AVX and all else of XSAVE, a local APIC,
    machine checks, memory type ranges, performance counters.
    """

    registers: CpuState = field(default_factory=CpuState)
    fpu: Fpu = field(default_factory=Fpu)
    msrs: dict[str, int] = field(default_factory=lambda: {name: _PAT_RESET if name == "pat" else 0 for name in MSRS})
    debug: list[int] = field(default_factory=lambda: [0, 0, 0, 0, 0xFFFF_0FF0, 0x400])     # DR0 to DR3, DR6, DR7
    tsc: int | None = None     # time-stamp counter at this moment; None: leave it as it is
    event: Event | None = None
    shadow: bool = False       # behind STI or a load of SS: no interrupt before the next instruction is done
    halted: bool = False       # HLT is done, and `run` has not said so yet


# (kind: ExitKind, *, behind: bool = False, port: int | None = None): see vm/code/ledger.py
Watch = Callable[..., None]


def nobody(_kind: int, *, behind: bool = False, port: int | None = None) -> None:
    """The watch of a vCPU that nobody watches."""


class Bus(Protocol):
    """The machine around a vCPU. Values are unsigned, `size` is 1, 2, 4 or 8."""

    def port_in(self, port: int, size: int) -> int: ...
    def port_out(self, port: int, size: int, value: int) -> None: ...
    def mmio_read(self, address: int, size: int) -> int: ...
    def mmio_write(self, address: int, size: int, value: int) -> None: ...

    def acknowledge(self) -> int:
        """The vCPU takes the interrupt that was asked for: its vector. May ask for the next."""
        ...


class Cpu(Protocol):
    """One vCPU. Made by an engine's `create(memory, bus, exits, rom=None)`; not thread-safe.

    `memory`: a writable shared mmap, guest-physical 0 upwards. `rom`: whole pages that end at 4 GiB, at most 256 KiB,
    writable as shadow RAM is (Unicorn cannot drop a write). `exits`: a memoryview of 'Q'
    with len(ExitKind) counters, incremented by the engine at every exit.

    `watch` is called at every exit that an instruction causes, with its kind, whether the instruction
    pointer is known to be behind the instruction, and the port. `stops_at` says how fine `run` stops for a kick:
    "instruction" or "block".
    """

    watch: Watch

    @property
    def stops_at(self) -> str: ...

    @property
    def sleeps(self) -> bool:
        """Halted, or not started yet, inside of `run`: asked by the thread that runs it, between two runs."""
        ...

    def where(self) -> int:
        """Linear address of CS:RIP as of the present exit. Cheap: called at every exit that is watched."""
        ...

    def run(self) -> Exit:
        """Execute until something ends it. Releases the GIL while the guest computes."""
        ...

    def stop(self) -> None:
        """Called inside a Bus call: `run` returns STOPPED once the instruction is complete."""
        ...

    def kick(self) -> None:
        """Make `run` return KICKED soon; from the same thread or a signal handler."""
        ...

    def request_interrupt(self, wanted: bool) -> None:
        """The interrupt line, a level: the guest takes one as soon as it can. Also in Bus calls."""
        ...

    def get_gpr(self) -> list[int]:
        """18 values in the order of `GPR`. Cheap: called in the BIOS path."""
        ...

    def set_gpr(self, values: list[int]) -> None: ...

    def segment_base(self, name: str) -> int:
        """Base of 'cs' 'ds' 'es' 'fs' 'gs' or 'ss': the cheap part of `get_state`."""
        ...

    def get_state(self) -> CpuState:
        """The registers alone: for reports and samples."""
        ...

    def set_state(self, state: CpuState) -> None:
        """The registers alone; what else there is (FPU, MSRs ...) stays. Nothing is pending afterwards."""
        ...

    def get_whole(self) -> WholeState:
        """Between two calls of `run`. Raises EngineError for what it cannot tell (AVX, for instance)."""
        ...

    def set_whole(self, whole: WholeState) -> None:
        """Go on from there. Raises EngineError where this engine cannot; it is then of no use any more."""
        ...

    def memory_changed(self, address: int, length: int) -> None:
        """The host wrote guest memory (a disk load): forget translated code there."""
        ...

    def close(self) -> None: ...
