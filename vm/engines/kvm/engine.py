"""The `kvm` engine: vCPUs on raw /dev/kvm.

Theory.  KVM_RUN executes guest code until something needs us, and leaves the reason in the
shared `kvm_run` page.  Port and memory-mapped I/O are handed to the bus and the guest goes
on; the *next* KVM_RUN completes the instruction that did the I/O.  There is no in-kernel
interrupt controller: HLT comes back to us.

Interrupts.  While the bus asks for one, KVM is told to leave the guest as soon as it can take one
(`request_interrupt_window`).  At every entry with `ready_for_interrupt_injection` the vector is fetched and
injected; a port instruction that KVM has still to complete is completed first.  PVM, which emulates ring 0
some hundred instructions at a time, looks for the window between those: a guest that opens
it for a few instructions only (STI, NOP, CLI) may not be interrupted there.

Leaving.  Everything that wants `run` to return stores 1 into `kvm_run.immediate_exit` (see
`kick.py`): KVM_RUN then first completes a pending I/O instruction, so that the vCPU stands at an
instruction boundary, and returns EINTR without entering the guest.  A byte of our own beside
it tells a kick from a `stop()`, since both may be wanted at once and neither may be lost.

Invariants.  The order "clear immediate_exit, then look at the kick byte" in `_left` makes a
kick at any point either part of this KICKED or the reason of the next one.  A string
instruction (rep outs) counts as one exit a transfer of KVM's, and calls the bus once an element.

Several vCPUs (`create_several`).  Each is a `KvmCpu` that one thread runs; they share the VM. KVM then has their local
APICs (a split irqchip: the 8259s stay ours), so INIT, SIPI, IPIs, the APIC timer and HLT are dealt with in the kernel:
a halted vCPU sleeps inside KVM_RUN, and HALTED is never reported. `kick`, `stop` and `request_interrupt` may be called
from any thread: they signal the one that runs the vCPU. Everything else of a `KvmCpu` is for its own thread, or for
others while it is not in `run`. The 8259s' interrupt goes to the first vCPU, as the LINT0 of its APIC says.

Poor: memory ends below 0xFEE00000 (no hole is made for it).
Exits that are not daily life are in `exits.py`, each with what it means.
"""

from __future__ import annotations

import ctypes
import mmap
import signal
import struct
import threading
from collections.abc import Sequence
from typing import Any, Final

from ...code import decode
from .. import cpuid, kick
from ..base import (
    GPR,
    MSRS,
    RIP,
    Bus,
    CpuState,
    DescriptorTable,
    EngineError,
    Event,
    Exit,
    ExitKind,
    ExitReason,
    Fpu,
    HostLimit,
    Segment,
    Watch,
    WholeState,
    nobody,
)
from ..portable import canonical, why_not
from ..tsc import read_tsc
from . import abi, exits, smp_state
from .api import Kvm, Vcpu, Vm, address_of
from .errors import is_busy, refusal, what_kvm_is
from .topology import Leaf, several

__all__ = ["KvmCpu", "create", "create_several"]

# Three pages and one page that VT-x hosts without unrestricted guest need: below the BIOS area.
TSS_ADDRESS: Final = 0xFFFB_D000
IDENTITY_MAP_ADDRESS: Final = 0xFFFB_C000
FOUR_GIB: Final = 1 << 32                # where a ROM ends; at most 256 KiB lie above the pages above
MEMORY_MAX: Final = 0xFEE0_0000          # the local APIC's page: nothing of ours goes beyond

_IMMEDIATE_EXIT: Final = abi.RUN_OFFSETS["immediate_exit"]
_EXIT_REASON: Final = abi.RUN_OFFSETS["exit_reason"]
_WINDOW: Final = abi.RUN_OFFSETS["request_interrupt_window"]
_READY: Final = abi.RUN_OFFSETS["ready_for_interrupt_injection"]
_VALID_REGISTERS: Final = abi.RUN_OFFSETS["kvm_valid_regs"]
_SYNCED_RIP: Final = abi.RUN_OFFSETS["s.regs"] + 16 * 8
_SYNCED_CS_BASE: Final = abi.RUN_OFFSETS["s.regs"] + ctypes.sizeof(abi.Registers)   # first of the special ones
_UNION: Final = 32                       # the union of exit details in kvm_run
_QUAD: Final = struct.Struct("<Q").unpack_from
_WORD: Final = struct.Struct("<I").unpack_from
_FORMATS: Final = {1: "<B", 2: "<H", 4: "<I", 8: "<Q"}
_SEGMENTS: Final = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")
_INTERRUPT_FLAG: Final = 0x200
_PAGING: Final = 1 << 31                 # CR0.PG
_LONG_MODE_ENABLED: Final = 1 << 8       # EFER.LME
_APIC_ENABLED: Final = 1 << 11           # IA32_APIC_BASE's global enable

_TSC: Final = 0x10
_XSTATE: Final = 512                     # offset of XSTATE_BV in the area of XSAVE
_XSTATE_HEADER_END: Final = 576          # what comes behind x87 and SSE
_X87_AND_SSE: Final = 3
_FXSAVE: Final = struct.Struct("<HHBxHQQI4x")


def create(memory: mmap.mmap, bus: Bus, exits: memoryview, device: int | None = None,
           rom: mmap.mmap | None = None) -> KvmCpu:
    """A vCPU over *memory*. Raises HostLimit where /dev/kvm cannot be used.

    *device*: /dev/kvm where somebody else has opened it; it is closed by this, also in case of an error.
    """
    return KvmCpu(memory, bus, exits, device, rom)


def create_several(
    memory: mmap.mmap, buses: Sequence[Bus], exits: Sequence[memoryview], device: int | None = None,
    rom: mmap.mmap | None = None,
) -> list[KvmCpu]:
    """As many vCPUs as there are buses, over one *memory*. The first starts; the others wait for INIT and SIPI.

    Closing the first closes the VM: the others come before it. Raises HostLimit, EngineError.
    """
    first = KvmCpu(memory, buses[0], exits[0], device, rom, len(buses))
    cpus = [first]
    try:
        for index, (bus, counters) in enumerate(zip(buses[1:], exits[1:], strict=True), 1):
            cpus.append(Sibling(first, index, bus, counters))
    except BaseException:
        for cpu in reversed(cpus):
            cpu.close()
        raise
    return cpus


class KvmCpu:
    stops_at = "instruction"

    def __init__(self, memory: mmap.mmap, bus: Bus, exits: memoryview, device: int | None = None,
                 rom: mmap.mmap | None = None, count: int = 1) -> None:
        self._kvm = Kvm(fd=device)
        self.count = count                      # of the VM's vCPUs
        try:
            self._build(memory, rom)
            try:
                self._start(0, bus, exits)
            except BaseException:
                self._vm.close()
                raise
        except OSError as error:
            self._kvm.close()
            raise HostLimit(refusal(error), busy=is_busy(error)) from error
        except BaseException:
            self._kvm.close()
            raise
        if count == 1:
            self._kvm.close()                   # a worker needs no way to make further VMs

    def _build(self, memory: mmap.mmap, rom: mmap.mmap | None) -> None:
        """The VM. Raises OSError too."""
        if len(memory) > MEMORY_MAX or len(memory) % mmap.PAGESIZE:
            raise EngineError(
                f"memory of {len(memory)} bytes: the kvm engine takes whole pages up to"
                f" {MEMORY_MAX} bytes")
        self._memory, self._rom = memory, rom          # the mappings must live as long as we do
        what_kvm_is()                           # while files can be read
        if not self._kvm.has(abi.CAP_IMMEDIATE_EXIT):
            raise HostLimit("this host's KVM has no KVM_CAP_IMMEDIATE_EXIT (Linux 4.11 has it)")
        if self.count > 1:
            most = self._kvm.has(abi.CAP_MAX_VCPUS) or 4
            if not self._kvm.has(abi.CAP_SPLIT_IRQCHIP):
                raise HostLimit(f"{self.count} vCPUs need local APICs in the kernel, and this host's KVM has no "
                                "KVM_CAP_SPLIT_IRQCHIP (Linux 4.5 has it); write vcpus = 1")
            if self.count > most:
                raise HostLimit(f"this host's KVM takes at most {most} vCPUs a VM, not {self.count}")
        self._vm: Vm = self._kvm.create_vm()
        try:
            self._vm.set_identity_map_address(IDENTITY_MAP_ADDRESS)
            self._vm.set_tss_address(TSS_ADDRESS)
            if self.count > 1:
                self._vm.enable(abi.CAP_SPLIT_IRQCHIP, 0)      # no I/O APIC of ours
            self._vm.set_memory(0, 0, memory)
            if rom is not None:
                self._vm.set_memory(1, FOUR_GIB - len(rom), rom)
            if self._kvm.has(abi.CAP_X86_USER_SPACE_MSR):
                # So that what KVM does not have is counted and seen, and #GP whatever ignore_msrs of the host says.
                self._vm.enable(abi.CAP_X86_USER_SPACE_MSR, abi.MSR_REASONS)
        except BaseException:
            self._vm.close()
            raise

    def _start(self, index: int, bus: Bus, exits: memoryview) -> None:
        """The vCPU. Raises OSError too."""
        self._bus = bus
        self._exits = exits
        self.watch: Watch = nobody
        self._closed = False
        self._halted = False                    # HLT is done and not reported: told by another engine
        self._several = self.count > 1
        self._thread = 0                        # that is in `run`, where there are several
        self._waking = threading.Lock()
        supported = self._kvm.supported_cpuid()
        self._vcpu: Vcpu = self._vm.create_vcpu(index, self._kvm.run_size())
        try:
            if self._several:
                table = _one_of_several(supported, index, self.count,
                                        deadline=bool(self._kvm.has(abi.CAP_TSC_DEADLINE_TIMER)))
                self._vcpu.set_cpuid(table)
                self._processor = smp_state.digest(table.entries[:table.nent])
            else:
                self._vcpu.set_cpuid(_processor(supported))
                # As Unicorn has it, and so far from KVM's own zero that it is not taken for a slip of synchronisation.
                self._vcpu.set_msrs({_TSC: read_tsc()})
            self._synced = self._kvm.has(abi.CAP_SYNC_REGS) & abi.SYNC_REGISTERS == abi.SYNC_REGISTERS
        except BaseException:
            self._vcpu.close()
            raise
        self._page = self._vcpu.page
        if self._synced:
            # KVM then leaves the registers in the page at each exit, for `where`.
            struct.pack_into("<Q", self._page, _VALID_REGISTERS, abi.SYNC_REGISTERS)
        self._registers = abi.Registers()
        self._register_words = (ctypes.c_uint64 * 18).from_buffer(self._registers)
        self._stopping = False
        self._wanted = False                    # an interrupt
        self._kicked = mmap.mmap(-1, mmap.PAGESIZE)
        self._kick_addresses = (
            address_of(self._kicked), address_of(self._page) + _IMMEDIATE_EXIT)
        for address in self._kick_addresses:
            kick.register(address)

    # -- running -----------------------------------------------------------------------------

    def run(self) -> Exit:
        if self._halted:
            self._halted = False
            interrupts_on = bool(self.get_gpr()[17] & _INTERRUPT_FLAG)
            if not (self._wanted and interrupts_on):
                return self._halt(interrupts_on)
        if not self._several:
            return self._run()
        self._thread = threading.get_ident()
        try:
            return self._run()
        finally:
            with self._waking:                  # nobody signals a thread that has gone on to end
                self._thread = 0

    def _run(self) -> Exit:
        page, vcpu, counts = self._page, self._vcpu, self._exits
        while True:
            if self._wanted and page[_READY] and not page[_IMMEDIATE_EXIT]:
                counts[ExitKind.INTERRUPT] += 1
                vcpu.interrupt(self._bus.acknowledge())
            try:
                entered = vcpu.run()
            except OSError as error:
                ending = exits.run_failed(error, page, self._scene)
                if ending is None:
                    raise EngineError(f"the vCPU cannot go on: {error}") from error
                return ending
            if not entered:
                if self._several and not self._is_asked_to_leave():
                    continue
                return self._left()
            reason = page[_EXIT_REASON]
            if reason == abi.ExitCode.IO:
                self._port_io()
            elif reason == abi.ExitCode.MMIO:
                self._mmio()
            elif reason == abi.ExitCode.IRQ_WINDOW_OPEN:
                pass                            # the next entry takes the interrupt
            elif reason == abi.ExitCode.HLT:
                if self._wanted and page[_READY]:
                    continue
                return self._halt(bool(self.get_gpr()[17] & _INTERRUPT_FLAG))
            else:
                ending = self._other(_WORD(page, _EXIT_REASON)[0])
                if ending is not None:
                    return ending

    def _halt(self, interrupts_on: bool) -> Exit:
        self._exits[ExitKind.HALT] += 1
        self.watch(ExitKind.HALT, behind=True)
        return Exit(ExitReason.HALTED, interrupts_on=interrupts_on)

    def _is_asked_to_leave(self) -> bool:
        """Not so: woken for an interrupt of ours, or by INIT. The order is that of `_left`."""
        if self._stopping or self._kicked[0]:
            return True
        self._page[_IMMEDIATE_EXIT] = 0
        return bool(self._stopping or self._kicked[0])

    def _left(self) -> Exit:
        page = self._page
        page[_IMMEDIATE_EXIT] = 0
        if self._stopping:
            self._stopping = False
            if self._kicked[0]:
                page[_IMMEDIATE_EXIT] = 1
            return Exit(ExitReason.STOPPED)
        self._kicked[0] = 0
        self._exits[ExitKind.KICK] += 1
        return Exit(ExitReason.KICKED)

    def _port_io(self) -> None:
        page = self._page
        direction, size, port, count, offset = struct.unpack_from("<BBHIQ", page, _UNION)
        form = _FORMATS[size]
        if direction == abi.IoDirection.OUT:
            self._exits[ExitKind.IO_OUT] += 1
            self.watch(ExitKind.IO_OUT, port=port)
            out = self._bus.port_out
            for index in range(count):
                out(port, size, struct.unpack_from(form, page, offset + index * size)[0])
        else:
            self._exits[ExitKind.IO_IN] += 1
            self.watch(ExitKind.IO_IN, port=port)
            mask = (1 << size * 8) - 1
            read = self._bus.port_in
            for index in range(count):
                struct.pack_into(form, page, offset + index * size, read(port, size) & mask)

    def _mmio(self) -> None:
        page = self._page
        address, data, length, is_write = struct.unpack_from("<Q8sIB", page, _UNION)
        # KVM hands over odd lengths where an access crosses a page: cut them into bus sizes.
        done = 0
        kind = ExitKind.MMIO_WRITE if is_write else ExitKind.MMIO_READ
        self._exits[kind] += 1
        self.watch(kind)
        while done < length:
            size = next(size for size in (8, 4, 2, 1) if size <= length - done)
            if is_write:
                value = struct.unpack_from(_FORMATS[size], data, done)[0]
                self._bus.mmio_write(address + done, size, value)
            else:
                value = self._bus.mmio_read(address + done, size) & ((1 << size * 8) - 1)
                struct.pack_into(_FORMATS[size], page, 40 + done, value)
            done += size

    def _other(self, code: int) -> Exit | None:
        """Any exit that is not dealt with in `run`. None: the guest goes on."""
        kind, ending = exits.judge(self._page, code, self._scene)
        self._exits[kind] += 1
        self.watch(kind)
        return ending

    def _scene(self, code: bytes) -> exits.Scene:
        state = self.get_state()
        text = decode.describe(self._memory, state)
        outside = text.startswith("outside memory")
        if code:
            line, = decode.disassemble(code, decode.linear_of(state), decode.bits_of(state), 1, state.gpr[RIP])
            text = line.text
        kvm = what_kvm_is()
        return exits.Scene(text, decode.mode_name(state), decode.place(state), outside, kvm.name, kvm.advice,
                           not kvm.pages_32 and _switches_on_32_bit_paging(text, state))

    def stop(self) -> None:
        self._stopping = True
        self._page[_IMMEDIATE_EXIT] = 1
        self._wake()

    def request_interrupt(self, wanted: bool) -> None:
        self._wanted = wanted
        self._page[_WINDOW] = wanted
        if wanted and self._several and self._thread != threading.get_ident():
            self._page[_IMMEDIATE_EXIT] = 1     # a vCPU that is halted in the kernel does not look at the window
            self._wake()

    def kick(self) -> None:
        self._kicked[0] = 1
        self._page[_IMMEDIATE_EXIT] = 1
        self._wake()

    @property
    def sleeps(self) -> bool:
        return self._several and not self._vcpu.runnable()

    def _wake(self) -> None:
        """Have the thread that runs it look, where that is another."""
        if self._several:
            with self._waking:
                if self._thread not in (0, threading.get_ident()):
                    signal.pthread_kill(self._thread, signal.SIGUSR1)

    # -- state -------------------------------------------------------------------------------

    def where(self) -> int:
        if not self._synced:
            return self.segment_base("cs") + self.get_gpr()[16]
        page = self._page
        return (_QUAD(page, _SYNCED_CS_BASE)[0] + _QUAD(page, _SYNCED_RIP)[0])

    def get_gpr(self) -> list[int]:
        self._vcpu.get_registers(self._registers)
        return list(self._register_words)

    def set_gpr(self, values: list[int]) -> None:
        self._register_words[:] = values
        self._registers.rflags |= 2
        if not values[17] & _INTERRUPT_FLAG:
            self._page[_READY] = 0              # of the flags before
        self._vcpu.set_registers(self._registers)

    def segment_base(self, name: str) -> int:
        return getattr(self._vcpu.get_special(), name).base

    def get_state(self) -> CpuState:
        special = self._vcpu.get_special()
        return CpuState(
            gpr=self.get_gpr(),
            gdt=DescriptorTable(special.gdt.base, special.gdt.limit),
            idt=DescriptorTable(special.idt.base, special.idt.limit),
            cr0=special.cr0, cr2=special.cr2, cr3=special.cr3, cr4=special.cr4,
            efer=special.efer,
            **{name: _segment(getattr(special, name)) for name in _SEGMENTS},
        )

    def set_state(self, state: CpuState) -> None:
        try:
            self._set_registers(canonical(state))
            self._vcpu.set_events(abi.Events(flags=abi.EVENT_SHADOW))
        except OSError as error:
            raise EngineError(f"KVM refused the CPU state: {error}") from error

    def _set_registers(self, state: CpuState) -> None:
        special = self._vcpu.get_special()       # keeps the APIC base
        if not self._several:
            special.apic_base &= ~_APIC_ENABLED  # there is none, and KVM tells of it in CPUID by this bit
        self._page[_READY] = 0                   # of the state before
        self._halted = False
        for name in _SEGMENTS:
            _set_segment(getattr(special, name), getattr(state, name))
        for name in ("gdt", "idt"):
            table, given = getattr(special, name), getattr(state, name)
            table.base, table.limit = given.base, given.limit
        for name in ("cr0", "cr2", "cr3", "cr4", "efer"):
            setattr(special, name, getattr(state, name))
        self._vcpu.set_special(special)
        self.set_gpr(state.gpr)

    def get_whole(self) -> WholeState:
        """`run` has returned, so no port instruction is half done (see "Leaving" above)."""
        if self._several:
            raise EngineError("a VM with several vCPUs runs on KVM alone: no other engine has local APICs")
        vcpu = self._vcpu
        try:
            if vcpu.get_special().cr8:
                raise EngineError("the guest has set a task priority (CR8), which only a local APIC would heed")
            debug, msrs = vcpu.get_debug(), vcpu.get_msrs([*MSRS.values(), _TSC])
            events = vcpu.get_events()
            return WholeState(
                registers=canonical(self.get_state()), fpu=_fpu(vcpu.get_xsave()),
                msrs=dict(zip(MSRS, msrs, strict=False)), debug=[*debug.db, debug.dr6, debug.dr7], tsc=msrs[-1],
                event=_event(events), shadow=bool(events.interrupt.shadow), halted=self._halted)
        except OSError as error:
            raise EngineError(f"KVM did not give the CPU state: {error}") from error

    def set_whole(self, whole: WholeState) -> None:
        if self._several:
            raise EngineError("a vCPU of several is not restored by itself")
        vcpu = self._vcpu
        debug = abi.DebugRegisters(dr6=whole.debug[4], dr7=whole.debug[5])
        debug.db[:] = whole.debug[:4]
        msrs = {MSRS[name]: value for name, value in whole.msrs.items()}
        if whole.tsc is not None:
            msrs[_TSC] = whole.tsc
        try:
            self._set_registers(canonical(whole.registers))
            vcpu.set_xsave(_xsave(whole.fpu))
            vcpu.set_debug(debug)
            vcpu.set_msrs(msrs)
            vcpu.set_events(_events(whole))
        except OSError as error:
            raise EngineError(f"KVM refused the CPU state: {error}") from error
        self._halted = whole.halted

    def get_all(self, others: Sequence[KvmCpu]) -> dict[str, Any]:
        """The state of a VM with several vCPUs, of which this is the first, as plain data. None of them runs."""
        return smp_state.to_plain(self._vm, [cpu._vcpu for cpu in (self, *others)], self._kvm.msr_indices(),
                                 self._processor)

    def set_all(self, others: Sequence[KvmCpu], data: Any, technology: str) -> None:
        """Go on from what `get_all` gave. Raises BadState, EngineError."""
        cpus = (self, *others)
        smp_state.from_plain(self._vm, [cpu._vcpu for cpu in cpus], self._kvm.msr_indices(), self._processor, data)
        for index, cpu in enumerate(cpus):
            cpu._page[_READY] = 0
            why = why_not(WholeState(registers=canonical(cpu.get_state())), "kvm", technology)
            if why is not None:
                raise EngineError(f"vCPU {index}: {why}")

    def memory_changed(self, address: int, length: int) -> None:
        """Nothing to do: the hardware (or PVM's emulator) reads memory afresh."""

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._close_vcpu()
        self._vm.close()
        self._kvm.close()

    def _close_vcpu(self) -> None:
        for address in self._kick_addresses:
            kick.unregister(address)
        self._vcpu.close()


class Sibling(KvmCpu):
    """Another vCPU of the VM of *first*, whose end is not that of the VM."""

    def __init__(self, first: KvmCpu, index: int, bus: Bus, exits: memoryview) -> None:
        self._kvm, self._vm, self._memory, self._rom = first._kvm, first._vm, first._memory, first._rom
        self.count = first.count
        try:
            self._start(index, bus, exits)
        except OSError as error:
            raise HostLimit(f"vCPU {index}: {refusal(error)}") from error

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._close_vcpu()


def _switches_on_32_bit_paging(text: str, state: CpuState) -> bool:
    """`mov cr0, REG` with PG in the register, outside of long mode."""
    name, _, operands = text.partition(" ")
    register = operands.removeprefix("cr0, ")
    if name != "mov" or register == operands or state.efer & _LONG_MODE_ENABLED:
        return False
    number = GPR.index(f"r{register[1:]}") if f"r{register[1:]}" in GPR else None
    return number is not None and bool(state.gpr[number] & _PAGING)


def _segment(given: abi.SegmentAbi) -> Segment:
    return Segment(
        selector=given.selector, base=given.base, limit=given.limit, type=given.type,
        present=bool(given.present) and not given.unusable, dpl=given.dpl, db=bool(given.db),
        s=bool(given.s), l=bool(given.l), g=bool(given.g), avl=bool(given.avl))


def _set_segment(into: abi.SegmentAbi, given: Segment) -> None:
    into.base, into.limit, into.selector = given.base, given.limit, given.selector
    into.type, into.dpl = given.type, given.dpl
    into.present, into.unusable = given.present, not given.present
    into.db, into.s, into.l, into.g, into.avl = given.db, given.s, given.l, given.g, given.avl


def _processor(supported: abi.CpuidHeader) -> abi.CpuidHeader:
    """The common processor, less what this host's KVM cannot give."""
    have = {entry.function: entry for entry in supported.entries[:supported.nent] if entry.index == 0}
    table = abi.CpuidHeader(nent=len(cpuid.leaves()))
    for entry, (leaf, (eax, ebx, ecx, edx)) in zip(table.entries, cpuid.leaves().items(), strict=False):
        entry.function, entry.eax, entry.ebx, entry.ecx, entry.edx = leaf, eax, ebx, ecx, edx
        if leaf in (1, 0x8000_0001) and leaf in have:
            entry.ecx, entry.edx = ecx & (have[leaf].ecx | 1 << 31), edx & have[leaf].edx
    return table


def _one_of_several(supported: abi.CpuidHeader, index: int, count: int, *, deadline: bool) -> abi.CpuidHeader:
    """What this host's KVM has, as topology.py arranges it."""
    names = Leaf.__slots__
    leaves = several((Leaf(*(getattr(entry, name) for name in names)) for entry in supported.entries[:supported.nent]),
                     index, count, deadline=deadline)
    if len(leaves) > abi.CPUID_ENTRIES_MAX:
        raise EngineError(f"{len(leaves)} CPUID leaves, KVM takes {abi.CPUID_ENTRIES_MAX}")
    table = abi.CpuidHeader(nent=len(leaves))
    for entry, leaf in zip(table.entries, leaves, strict=False):
        for name in names:
            setattr(entry, name, getattr(leaf, name))
    return table


def _fpu(area: abi.Xsave) -> Fpu:
    raw = bytes(area)
    used, = _QUAD(raw, _XSTATE)
    # A host with protection keys marks PKRU as used in every guest: what is all zero is as a processor begins.
    if used & ~_X87_AND_SSE and any(raw[_XSTATE_HEADER_END:]):
        raise EngineError(f"the guest uses registers beyond SSE (XSTATE_BV {used:#x}), which cannot be carried")
    control, status, tags, opcode, instruction, operand, mxcsr = _FXSAVE.unpack_from(raw)
    return Fpu(
        control=control, status=status, tags=tags, opcode=opcode, instruction=instruction, operand=operand, mxcsr=mxcsr,
        st=[int.from_bytes(raw[at:at + 10], "little") for at in range(32, 160, 16)],
        xmm=[int.from_bytes(raw[at:at + 16], "little") for at in range(160, 416, 16)])


def _xsave(fpu: Fpu) -> abi.Xsave:
    raw = bytearray(ctypes.sizeof(abi.Xsave))
    _FXSAVE.pack_into(raw, 0, fpu.control, fpu.status, fpu.tags, fpu.opcode, fpu.instruction, fpu.operand, fpu.mxcsr)
    for index, value in enumerate(fpu.st):
        raw[32 + 16 * index:42 + 16 * index] = value.to_bytes(10, "little")
    for index, value in enumerate(fpu.xmm):
        raw[160 + 16 * index:176 + 16 * index] = value.to_bytes(16, "little")
    struct.pack_into("<Q", raw, _XSTATE, _X87_AND_SSE)
    return abi.Xsave.from_buffer(raw)


def _event(events: abi.Events) -> Event | None:
    """INT n on its way is not told by KVM: the guest stands before it and will do it again."""
    if events.nmi.injected or events.nmi.pending or events.smi.smm or events.smi.pending:
        raise EngineError("a non-maskable or system management interrupt is on its way, of which a micro-VM has none")
    exception = events.exception
    if exception.injected or exception.pending:
        return Event("exception", exception.nr, exception.error_code if exception.has_error_code else None)
    return Event("interrupt", events.interrupt.nr) if events.interrupt.injected else None


def _events(whole: WholeState) -> abi.Events:
    events, event = abi.Events(flags=abi.EVENT_SHADOW), whole.event
    if whole.shadow:
        # Behind STI is said only with IF set (VT-x checks that).
        interrupts_on = whole.registers.gpr[17] & _INTERRUPT_FLAG
        events.interrupt.shadow = abi.SHADOW_STI if interrupts_on else abi.SHADOW_MOV_SS
    if event is not None and event.kind == "interrupt":
        events.interrupt.injected, events.interrupt.nr = 1, event.vector
    elif event is not None:
        events.exception.injected, events.exception.nr = 1, event.vector
        events.exception.has_error_code, events.exception.error_code = event.error is not None, event.error or 0
    return events
