"""The kernel's KVM interface in numbers: ioctl numbers, exit reasons and struct layouts.

Theory.  `/dev/kvm` is driven by ioctls on three kinds of descriptor (system, VM, vCPU) and by
one page shared with the kernel (`struct kvm_run`).  Here are only the numbers; the calls are
in `api.py`, the behaviour in `engine.py`.  Everything is little-endian x86-64.

Source: <linux/kvm.h> of Linux 6.1 and <asm/kvm.h>.  tests/vm/engines/test_kvm_abi.py compiles
a C program against the installed header and compares every number and offset written here.
"""

from __future__ import annotations

import ctypes
import enum
from typing import Final

__all__ = [
    "API_VERSION", "BLOBS", "CPUID_ENTRIES_MAX", "IOCTLS", "RUN_OFFSETS", "CpuidEntry", "CpuidHeader", "DebugRegisters",
    "EnableCapability", "Events", "ExitCode", "InternalError", "IoDirection", "MsrEntry", "MsrHeader", "MsrList",
    "Registers", "SegmentAbi", "SpecialRegisters", "SystemEvent", "TableAbi", "UserMemoryRegion", "Xsave",
]

API_VERSION: Final = 12

# name in <linux/kvm.h> -> number
IOCTLS: Final = {
    "KVM_GET_API_VERSION": 0xAE00,
    "KVM_CREATE_VM": 0xAE01,
    "KVM_CHECK_EXTENSION": 0xAE03,
    "KVM_GET_VCPU_MMAP_SIZE": 0xAE04,
    "KVM_GET_SUPPORTED_CPUID": 0xC008AE05,
    "KVM_CREATE_VCPU": 0xAE41,
    "KVM_SET_USER_MEMORY_REGION": 0x4020AE46,
    "KVM_SET_TSS_ADDR": 0xAE47,
    "KVM_SET_IDENTITY_MAP_ADDR": 0x4008AE48,
    "KVM_RUN": 0xAE80,
    "KVM_GET_REGS": 0x8090AE81,
    "KVM_SET_REGS": 0x4090AE82,
    "KVM_GET_SREGS": 0x8138AE83,
    "KVM_SET_SREGS": 0x4138AE84,
    "KVM_SET_CPUID2": 0x4008AE90,
    "KVM_INTERRUPT": 0x4004AE86,
    "KVM_GET_MSRS": 0xC008AE88,
    "KVM_SET_MSRS": 0x4008AE89,
    "KVM_GET_MSR_INDEX_LIST": 0xC004AE02,
    "KVM_GET_CLOCK": 0x8030AE7C,
    "KVM_SET_CLOCK": 0x4030AE7B,
    "KVM_GET_LAPIC": 0x8400AE8E,
    "KVM_SET_LAPIC": 0x4400AE8F,
    "KVM_GET_XCRS": 0x8188AEA6,
    "KVM_SET_XCRS": 0x4188AEA7,
    "KVM_GET_MP_STATE": 0x8004AE98,
    "KVM_SET_MP_STATE": 0x4004AE99,
    "KVM_GET_VCPU_EVENTS": 0x8040AE9F,
    "KVM_SET_VCPU_EVENTS": 0x4040AEA0,
    "KVM_GET_DEBUGREGS": 0x8080AEA1,
    "KVM_SET_DEBUGREGS": 0x4080AEA2,
    "KVM_GET_XSAVE": 0x9000AEA4,
    "KVM_SET_XSAVE": 0x5000AEA5,
    "KVM_ENABLE_CAP": 0x4068AEA3,
}

CAP_XSAVE: Final = 55
CAP_SYNC_REGS: Final = 74
SYNC_REGISTERS: Final = 1 | 2        # KVM_SYNC_X86_REGS, KVM_SYNC_X86_SREGS
CAP_IMMEDIATE_EXIT: Final = 136
CAP_MAX_VCPUS: Final = 66
CAP_TSC_DEADLINE_TIMER: Final = 72
CAP_SPLIT_IRQCHIP: Final = 121
CAP_X86_USER_SPACE_MSR: Final = 188
MSR_REASONS: Final = 1 | 2           # KVM_MSR_EXIT_REASON_INVAL, _UNKNOWN


class ExitCode(enum.IntEnum):
    """`kvm_run.exit_reason`. Numbers that are not here stay plain numbers."""

    UNKNOWN = 0
    EXCEPTION = 1
    IO = 2
    HYPERCALL = 3
    DEBUG = 4
    HLT = 5
    MMIO = 6
    IRQ_WINDOW_OPEN = 7
    SHUTDOWN = 8
    FAIL_ENTRY = 9
    INTR = 10
    SET_TPR = 11
    TPR_ACCESS = 12
    S390_SIEIC = 13
    S390_RESET = 14
    DCR = 15
    NMI = 16
    INTERNAL_ERROR = 17
    OSI = 18
    PAPR_HCALL = 19
    S390_UCONTROL = 20
    WATCHDOG = 21
    S390_TSCH = 22
    EPR = 23
    SYSTEM_EVENT = 24
    S390_STSI = 25
    IOAPIC_EOI = 26
    HYPERV = 27
    ARM_NISV = 28
    X86_RDMSR = 29
    X86_WRMSR = 30
    DIRTY_RING_FULL = 31
    AP_RESET_HOLD = 32
    X86_BUS_LOCK = 33
    XEN = 34
    RISCV_SBI = 35
    RISCV_CSR = 36
    NOTIFY = 37
    LOONGARCH_IOCSR = 38      # Linux 6.10
    MEMORY_FAULT = 39         # Linux 6.8


class InternalError(enum.IntEnum):
    """`kvm_run.internal.suberror`."""

    EMULATION = 1
    SIMUL_EX = 2
    DELIVERY_EV = 3
    UNEXPECTED_EXIT_REASON = 4


class SystemEvent(enum.IntEnum):
    """`kvm_run.system_event.type`."""

    SHUTDOWN = 1
    RESET = 2
    CRASH = 3
    WAKEUP = 4
    SUSPEND = 5
    SEV_TERM = 6


class IoDirection(enum.IntEnum):
    IN = 0
    OUT = 1


# Offsets inside struct kvm_run (bytes).
RUN_OFFSETS: Final = {
    "request_interrupt_window": 0,
    "immediate_exit": 1,
    "kvm_valid_regs": 288,
    "s.regs": 304,                     # struct kvm_sync_regs: general registers, then special ones
    "exit_reason": 8,
    "ready_for_interrupt_injection": 12,
    "hw.hardware_exit_reason": 32,
    "fail_entry.hardware_entry_failure_reason": 32,
    "fail_entry.cpu": 40,
    "ex.exception": 32,
    "ex.error_code": 36,
    "debug.arch.exception": 32,
    "debug.arch.pc": 40,
    "hypercall.ret": 88,
    "system_event.type": 32,
    "msr.error": 32,
    "msr.index": 44,
    "msr.data": 48,
    "notify.flags": 32,
    "memory_fault.gpa": 40,            # Linux 6.8
    "memory_fault.size": 48,
    "io.direction": 32,
    "io.size": 33,
    "io.port": 34,
    "io.count": 36,
    "io.data_offset": 40,
    "mmio.phys_addr": 32,
    "mmio.data": 40,
    "mmio.len": 48,
    "mmio.is_write": 52,
    "internal.suberror": 32,
    "internal.ndata": 36,
    "internal.data": 40,
    "emulation_failure.flags": 40,
    "emulation_failure.insn_size": 48,
    "emulation_failure.insn_bytes": 49,
}


class UserMemoryRegion(ctypes.Structure):
    """struct kvm_userspace_memory_region."""

    _fields_ = (
        ("slot", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("guest_phys_addr", ctypes.c_uint64),
        ("memory_size", ctypes.c_uint64),
        ("userspace_addr", ctypes.c_uint64),
    )


class EnableCapability(ctypes.Structure):
    """struct kvm_enable_cap."""

    _fields_ = (
        ("cap", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("args", ctypes.c_uint64 * 4),
        ("pad", ctypes.c_uint8 * 64),
    )


class Registers(ctypes.Structure):
    """struct kvm_regs: the order of `vm.engines.base.GPR`."""

    _fields_ = tuple((name, ctypes.c_uint64) for name in (
        "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp",
        "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags",
    ))


class SegmentAbi(ctypes.Structure):
    """struct kvm_segment."""

    _fields_ = (
        ("base", ctypes.c_uint64),
        ("limit", ctypes.c_uint32),
        ("selector", ctypes.c_uint16),
        *((name, ctypes.c_uint8) for name in (
            "type", "present", "dpl", "db", "s", "l", "g", "avl", "unusable", "padding")),
    )


class TableAbi(ctypes.Structure):
    """struct kvm_dtable."""

    _fields_ = (
        ("base", ctypes.c_uint64),
        ("limit", ctypes.c_uint16),
        ("padding", ctypes.c_uint16 * 3),
    )


class SpecialRegisters(ctypes.Structure):
    """struct kvm_sregs."""

    _fields_ = (
        *((name, SegmentAbi) for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")),
        ("gdt", TableAbi),
        ("idt", TableAbi),
        *((name, ctypes.c_uint64) for name in (
            "cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")),
        ("interrupt_bitmap", ctypes.c_uint64 * 4),
    )


class CpuidEntry(ctypes.Structure):
    """struct kvm_cpuid_entry2."""

    _fields_ = (
        *((name, ctypes.c_uint32) for name in (
            "function", "index", "flags", "eax", "ebx", "ecx", "edx")),
        ("padding", ctypes.c_uint32 * 3),
    )


CPUID_ENTRIES_MAX: Final = 256      # KVM_MAX_CPUID_ENTRIES of the kernel


class CpuidHeader(ctypes.Structure):
    """struct kvm_cpuid2 with room for the most entries the kernel takes."""

    _fields_ = (
        ("nent", ctypes.c_uint32),
        ("padding", ctypes.c_uint32),
        ("entries", CpuidEntry * CPUID_ENTRIES_MAX),
    )


class MsrEntry(ctypes.Structure):
    """struct kvm_msr_entry."""

    _fields_ = (("index", ctypes.c_uint32), ("reserved", ctypes.c_uint32), ("data", ctypes.c_uint64))


MSR_ENTRIES_MAX: Final = 32


class MsrHeader(ctypes.Structure):
    """struct kvm_msrs with room for as many as we ask for."""

    _fields_ = (
        ("nmsrs", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
        ("entries", MsrEntry * MSR_ENTRIES_MAX),
    )


MSR_INDICES_MAX: Final = 1024


class MsrList(ctypes.Structure):
    """struct kvm_msr_list with room for more than any kernel has."""

    _fields_ = (("nmsrs", ctypes.c_uint32), ("indices", ctypes.c_uint32 * MSR_INDICES_MAX))


class DebugRegisters(ctypes.Structure):
    """struct kvm_debugregs."""

    _fields_ = (
        ("db", ctypes.c_uint64 * 4),
        ("dr6", ctypes.c_uint64),
        ("dr7", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
        ("reserved", ctypes.c_uint64 * 9),
    )


class Xsave(ctypes.Structure):
    """struct kvm_xsave: the legacy area of FXSAVE, then the header, of which the first word says what is in use."""

    _fields_ = (("region", ctypes.c_uint32 * 1024),)


# Structures that are only carried, never looked into, and their sizes.
BLOBS: Final = {"kvm_lapic_state": 1024, "kvm_xcrs": 392, "kvm_mp_state": 4, "kvm_clock_data": 48}


EVENT_SHADOW: Final = 4              # KVM_VCPUEVENT_VALID_SHADOW
SHADOW_MOV_SS, SHADOW_STI = 1, 2     # KVM_X86_SHADOW_INT_MOV_SS, _STI


class _Exception(ctypes.Structure):
    _fields_ = (*((name, ctypes.c_uint8) for name in ("injected", "nr", "has_error_code", "pending")),
                ("error_code", ctypes.c_uint32))


class _Interrupt(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint8) for name in ("injected", "nr", "soft", "shadow"))


class _Nmi(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint8) for name in ("injected", "pending", "masked", "pad"))


class _Smi(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint8) for name in ("smm", "pending", "smm_inside_nmi", "latched_init"))


class Events(ctypes.Structure):
    """struct kvm_vcpu_events, as far as we read it."""

    _fields_ = (
        ("exception", _Exception),
        ("interrupt", _Interrupt),
        ("nmi", _Nmi),
        ("sipi_vector", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("smi", _Smi),
        ("rest", ctypes.c_uint8 * 36),
    )
