"""Thin wrappers of the KVM ioctls: one class per kind of descriptor, one method per call.

Theory.  `Kvm` is /dev/kvm, `Vm` what KVM_CREATE_VM gives, `Vcpu` what KVM_CREATE_VCPU gives
plus its shared `kvm_run` page.  No decision is taken here: every failure is an `OSError` with
the name of the call, except opening the device, which is the host's matter (`HostLimit`).

Invariant: no page of memory is owned here but `Vcpu.page`; descriptors are closed by `close`,
vCPU first.  `Vcpu.run` is the only call that may last; it releases the GIL (ctypes.CDLL).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
from typing import Final

from .. import kick
from ..base import HostLimit
from . import abi

__all__ = ["Kvm", "Vcpu", "Vm", "address_of"]

DEVICE: Final = "/dev/kvm"

_libc = ctypes.CDLL(None, use_errno=True)
_ioctl = _libc.ioctl
_ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]
_ioctl.restype = ctypes.c_int


def address_of(memory: mmap.mmap) -> int:
    """Where a writable mapping lies in this process. The mapping must outlive every use."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _call(fd: int, name: str, argument: int = 0) -> int:
    while True:
        result = _ioctl(fd, abi.IOCTLS[name], argument)
        if result >= 0:
            return result
        number = ctypes.get_errno()
        if number != errno.EINTR:      # a kick while KVM_CREATE_VM waits: tried again
            raise OSError(number, f"{name}: {os.strerror(number)}")


class Kvm:
    """/dev/kvm. Raises `HostLimit` when it is missing, forbidden or of another version.

    *fd*: where it has been opened already, by somebody who may; it is closed with this.
    """

    def __init__(self, device: str = DEVICE, fd: int | None = None) -> None:
        try:
            self.fd = os.open(device, os.O_RDWR | os.O_CLOEXEC) if fd is None else fd
        except FileNotFoundError as error:
            raise HostLimit(
                f"{device} does not exist: this host offers no hardware virtualization (no"
                " VT-x/AMD-V, or its kvm module is not loaded); use engine = \"software\""
            ) from error
        except PermissionError as error:
            raise HostLimit(
                f"{device} may not be opened by uid {os.geteuid()}: add the user to the group that"
                " owns it (often `kvm`), or use engine = \"software\""
            ) from error
        except OSError as error:
            raise HostLimit(f"{device} cannot be opened: {error.strerror}") from error
        try:
            version = _call(self.fd, "KVM_GET_API_VERSION")
        except OSError as error:
            os.close(self.fd)
            raise HostLimit(f"{device} is not a KVM device: {error.strerror}") from error
        if version != abi.API_VERSION:
            os.close(self.fd)
            raise HostLimit(f"{device} speaks KVM API {version}; {abi.API_VERSION} is needed")

    def has(self, capability: int) -> int:
        return _call(self.fd, "KVM_CHECK_EXTENSION", capability)

    def create_vm(self) -> Vm:
        # It waits for a kernel thread, and a signal makes it begin anew: a fast timer's would keep it from ever ending.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, kick.SIGNALS)
        try:
            return Vm(_call(self.fd, "KVM_CREATE_VM"))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def run_size(self) -> int:
        """Bytes of a vCPU's shared mapping."""
        return _call(self.fd, "KVM_GET_VCPU_MMAP_SIZE")

    def supported_cpuid(self) -> abi.CpuidHeader:
        """Every CPUID leaf that this host's KVM can give a guest."""
        table = abi.CpuidHeader(nent=abi.CPUID_ENTRIES_MAX)
        _call(self.fd, "KVM_GET_SUPPORTED_CPUID", ctypes.addressof(table))
        return table

    def msr_indices(self) -> list[int]:
        """The MSRs that this host's KVM keeps for a guest."""
        table = abi.MsrList(nmsrs=abi.MSR_INDICES_MAX)
        _call(self.fd, "KVM_GET_MSR_INDEX_LIST", ctypes.addressof(table))
        return table.indices[:table.nmsrs]

    def close(self) -> None:
        """Its VM lives on. Harmless when closed already."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Vm:
    def __init__(self, fd: int) -> None:
        self.fd = fd

    def set_tss_address(self, address: int) -> None:
        """Three guest-physical pages that VT-x without unrestricted guests needs for itself."""
        _call(self.fd, "KVM_SET_TSS_ADDR", address)

    def set_identity_map_address(self, address: int) -> None:
        """One more such page."""
        value = ctypes.c_uint64(address)
        _call(self.fd, "KVM_SET_IDENTITY_MAP_ADDR", ctypes.addressof(value))

    def set_memory(self, slot: int, guest_physical: int, memory: mmap.mmap) -> None:
        region = abi.UserMemoryRegion(slot, 0, guest_physical, len(memory), address_of(memory))
        _call(self.fd, "KVM_SET_USER_MEMORY_REGION", ctypes.addressof(region))

    def enable(self, capability: int, argument: int) -> None:
        """KVM_ENABLE_CAP with one argument."""
        wanted = abi.EnableCapability(cap=capability)
        wanted.args[0] = argument
        _call(self.fd, "KVM_ENABLE_CAP", ctypes.addressof(wanted))

    def get_clock(self) -> int:
        """What kvmclock shows, ns."""
        raw = ctypes.create_string_buffer(abi.BLOBS["kvm_clock_data"])
        _call(self.fd, "KVM_GET_CLOCK", ctypes.addressof(raw))
        return int.from_bytes(raw[:8], "little")

    def set_clock(self, clock_ns: int) -> None:
        raw = ctypes.create_string_buffer(clock_ns.to_bytes(8, "little"), abi.BLOBS["kvm_clock_data"])
        _call(self.fd, "KVM_SET_CLOCK", ctypes.addressof(raw))

    def create_vcpu(self, number: int, run_size: int) -> Vcpu:
        return Vcpu(_call(self.fd, "KVM_CREATE_VCPU", number), run_size)

    def close(self) -> None:
        os.close(self.fd)


class Vcpu:
    def __init__(self, fd: int, run_size: int) -> None:
        self.fd = fd
        self.page = mmap.mmap(fd, run_size)

    def set_cpuid(self, table: abi.CpuidHeader) -> None:
        _call(self.fd, "KVM_SET_CPUID2", ctypes.addressof(table))

    def run(self) -> bool:
        """KVM_RUN. True: an exit is in `page`; False: interrupted (EINTR) or to be tried again.

        Raises OSError for anything else.
        """
        if _ioctl(self.fd, 0xAE80, None) == 0:
            return True
        number = ctypes.get_errno()
        if number in (errno.EINTR, errno.EAGAIN):
            return False
        raise OSError(number, f"KVM_RUN: {os.strerror(number)}")

    def interrupt(self, vector: int) -> None:
        """KVM_INTERRUPT: taken at the next KVM_RUN; only when the vCPU is ready for it."""
        number = ctypes.c_uint32(vector)
        _call(self.fd, "KVM_INTERRUPT", ctypes.addressof(number))

    def runnable(self) -> bool:
        """KVM_GET_MP_STATE: it is neither halted in the kernel nor waits there for INIT or SIPI."""
        state = ctypes.c_uint32()
        _call(self.fd, "KVM_GET_MP_STATE", ctypes.addressof(state))
        return state.value == 0                  # KVM_MP_STATE_RUNNABLE

    def get_registers(self, into: abi.Registers) -> None:
        _call(self.fd, "KVM_GET_REGS", ctypes.addressof(into))

    def set_registers(self, values: abi.Registers) -> None:
        _call(self.fd, "KVM_SET_REGS", ctypes.addressof(values))

    def get_special(self) -> abi.SpecialRegisters:
        values = abi.SpecialRegisters()
        _call(self.fd, "KVM_GET_SREGS", ctypes.addressof(values))
        return values

    def set_special(self, values: abi.SpecialRegisters) -> None:
        _call(self.fd, "KVM_SET_SREGS", ctypes.addressof(values))

    def take(self, call: str, size: int) -> bytes:
        """What KVM_GET_*call* gives, as it is."""
        raw = ctypes.create_string_buffer(size)
        _call(self.fd, f"KVM_GET_{call}", ctypes.addressof(raw))
        return raw.raw

    def give(self, call: str, data: bytes) -> None:
        """Back to KVM_SET_*call*."""
        raw = ctypes.create_string_buffer(data, len(data))
        _call(self.fd, f"KVM_SET_{call}", ctypes.addressof(raw))

    def known_msrs(self, indices: list[int]) -> dict[int, int]:
        """The values of those that this vCPU has."""
        found: dict[int, int] = {}
        at = 0
        while at < len(indices):
            some = indices[at:at + abi.MSR_ENTRIES_MAX]
            table = self._msrs(some, [0] * len(some))
            done = _call(self.fd, "KVM_GET_MSRS", ctypes.addressof(table))
            found |= {table.entries[index].index: table.entries[index].data for index in range(done)}
            at += done if done == len(some) else done + 1          # it stops at the first that it has not
        return found

    def get_msrs(self, indices: list[int]) -> list[int]:
        """Raises OSError naming the first that KVM does not have."""
        table = self._msrs(indices, [0] * len(indices))
        self._all(indices, _call(self.fd, "KVM_GET_MSRS", ctypes.addressof(table)))
        return [table.entries[at].data for at in range(len(indices))]

    def set_msrs(self, values: dict[int, int]) -> None:
        """Raises OSError naming the first that KVM refuses."""
        table = self._msrs(list(values), list(values.values()))
        self._all(list(values), _call(self.fd, "KVM_SET_MSRS", ctypes.addressof(table)))

    @staticmethod
    def _msrs(indices: list[int], values: list[int]) -> abi.MsrHeader:
        table = abi.MsrHeader(nmsrs=len(indices))
        for at, (index, value) in enumerate(zip(indices, values, strict=True)):
            table.entries[at].index, table.entries[at].data = index, value
        return table

    @staticmethod
    def _all(indices: list[int], done: int) -> None:
        if done != len(indices):
            raise OSError(errno.EINVAL, f"KVM has no such value of MSR {indices[done]:#x}")

    def get_events(self) -> abi.Events:
        values = abi.Events()
        _call(self.fd, "KVM_GET_VCPU_EVENTS", ctypes.addressof(values))
        return values

    def set_events(self, values: abi.Events) -> None:
        _call(self.fd, "KVM_SET_VCPU_EVENTS", ctypes.addressof(values))

    def get_debug(self) -> abi.DebugRegisters:
        values = abi.DebugRegisters()
        _call(self.fd, "KVM_GET_DEBUGREGS", ctypes.addressof(values))
        return values

    def set_debug(self, values: abi.DebugRegisters) -> None:
        _call(self.fd, "KVM_SET_DEBUGREGS", ctypes.addressof(values))

    def get_xsave(self) -> abi.Xsave:
        values = abi.Xsave()
        _call(self.fd, "KVM_GET_XSAVE", ctypes.addressof(values))
        return values

    def set_xsave(self, values: abi.Xsave) -> None:
        _call(self.fd, "KVM_SET_XSAVE", ctypes.addressof(values))

    def close(self) -> None:
        self.page.close()
        os.close(self.fd)
