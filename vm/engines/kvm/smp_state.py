"""The state of a VM with several vCPUs as plain data, in KVM's own form.

Theory.  Such a VM runs on KVM alone, is shown the host's processor and has local APICs in the kernel, so nothing else
could go on from it: its state need not be understood, only carried. Each vCPU gives what KVM has of it, structure by
structure, and takes it back in the order in which one depends on another: registers that hold the APIC's base before
the APIC, the APIC before the MSRs (its deadline is one), all before what is under way.

MSRs are those that KVM lists. Given back are the ones that differ from a new vCPU's: some may be read only. The
time-stamp counter is the first vCPU's for all of them, as KVM synchronises vCPUs that are given the same: they were
read one after the other.

Invariants.  What comes back is a file's: every part is there, of its size, or `BadState` names it; whether its contents
make sense is for KVM to say, which keeps any vCPU inside of its VM. A VM goes on only where CPUID says the same.

Poor: no state of more than the 4 KiB that KVM_GET_XSAVE gives (AMX; KVM offers it to nobody who has not asked for it).
"""

from __future__ import annotations

import base64
import binascii
import ctypes
import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, Final

from ..base import EngineError
from ..portable import BadState
from . import abi
from .api import Vcpu, Vm

__all__ = ["digest", "from_plain", "to_plain"]

_TSC, _TSC_DEADLINE = 0x10, 0x6E0
# In the order in which they are given back; MP_STATE is asked for first, which may still bring INIT and SIPI about.
_BEFORE: Final = {
    "MP_STATE": abi.BLOBS["kvm_mp_state"], "REGS": ctypes.sizeof(abi.Registers),
    "SREGS": ctypes.sizeof(abi.SpecialRegisters), "XSAVE": ctypes.sizeof(abi.Xsave), "XCRS": abi.BLOBS["kvm_xcrs"],
    "DEBUGREGS": ctypes.sizeof(abi.DebugRegisters), "LAPIC": abi.BLOBS["kvm_lapic_state"],
}
_BEHIND: Final = {"VCPU_EVENTS": ctypes.sizeof(abi.Events)}
_PARTS: Final = {**_BEFORE, **_BEHIND}
_KEYS: Final = frozenset({"processor", "clock_ns", "vcpus"})


def digest(leaves: Iterable[abi.CpuidEntry]) -> str:
    """Of what CPUID tells a vCPU."""
    return hashlib.blake2b(b"".join(bytes(leaf) for leaf in leaves), digest_size=16).hexdigest()


def to_plain(vm: Vm, vcpus: Sequence[Vcpu], msrs: list[int], processor: str) -> dict[str, Any]:
    """JSON's types only. No vCPU is in `run`. Raises EngineError."""
    try:
        return {"processor": processor, "clock_ns": vm.get_clock(), "vcpus": [{
            **{call: base64.b64encode(vcpu.take(call, size)).decode() for call, size in _PARTS.items()},
            "MSRS": [[index, value] for index, value in vcpu.known_msrs(msrs).items()],
        } for vcpu in vcpus]}
    except OSError as error:
        raise EngineError(f"KVM did not give the CPU state: {error}") from error


def from_plain(vm: Vm, vcpus: Sequence[Vcpu], msrs: list[int], processor: str, data: Any) -> None:
    """Make new vCPUs those of which `to_plain` told. Raises BadState, EngineError; the VM must not run then."""
    if not isinstance(data, dict) or data.keys() != _KEYS:
        raise BadState("the state of several vCPUs has not the parts that it must have")
    if data["processor"] != processor:
        raise EngineError("it was saved where processor or KVM have other features (CPUID), and a VM of several vCPUs"
                          " sees them")
    if not isinstance(data["vcpus"], list) or len(data["vcpus"]) != len(vcpus):
        raise BadState(f"it is not that of {len(vcpus)} vCPUs")
    clock_ns = _word(data["clock_ns"], "clock_ns", 63)
    states = [_checked(state, set(msrs)) for state in data["vcpus"]]
    tsc = states[0][1].get(_TSC)
    try:
        for vcpu, (blobs, given) in zip(vcpus, states, strict=True):
            for call in _BEFORE:
                vcpu.give(call, blobs[call])
            fresh = vcpu.known_msrs(msrs)
            changed = {index: value for index, value in given.items()
                       if index not in (_TSC, _TSC_DEADLINE) and fresh.get(index) != value}
            if tsc is not None:
                changed = {_TSC: tsc, **changed}
            if given.get(_TSC_DEADLINE):
                changed[_TSC_DEADLINE] = given[_TSC_DEADLINE]
            for index, value in changed.items():
                vcpu.set_msrs({index: value})
            for call in _BEHIND:
                vcpu.give(call, blobs[call])
        vm.set_clock(clock_ns)
    except OSError as error:
        raise EngineError(f"KVM refused the CPU state: {error}") from error


def _checked(state: Any, msrs: set[int]) -> tuple[dict[str, bytes], dict[int, int]]:
    if not isinstance(state, dict) or state.keys() != {*_PARTS, "MSRS"}:
        raise BadState("a vCPU has not the parts that it must have")
    blobs: dict[str, bytes] = {}
    for call, size in _PARTS.items():
        try:
            blobs[call] = base64.b64decode(state[call], validate=True)
        except (binascii.Error, TypeError, ValueError):
            blobs[call] = b""
        if len(blobs[call]) != size:
            raise BadState(f"{call} of a vCPU: {size} bytes in base64 were expected")
    given: dict[int, int] = {}
    pairs = state["MSRS"]
    if not isinstance(pairs, list) or len(pairs) > abi.MSR_INDICES_MAX:
        raise BadState("the MSRs of a vCPU are no list")
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadState("an MSR of a vCPU is no pair of numbers")
        index = _word(pair[0], "an MSR's number", 32)
        if index not in msrs:
            raise EngineError(f"this host's KVM has no MSR {index:#x}, which the guest has")
        given[index] = _word(pair[1], f"MSR {index:#x}", 64)
    return blobs, given


def _word(value: Any, what: str, bits: int) -> int:
    if type(value) is not int or not 0 <= value < 1 << bits:
        raise BadState(f"{what} is no {bits}-bit number")
    return value
