"""The processor that a guest sees: the same one on every engine.

Theory.  A guest looks at CPUID once and believes it for ever. So that it can go on in the other mode, and so that a
comparison of modes compares the same code, both engines show one table: what a plain x86-64 of the first generation
has, with SSE2 and SSE3: Unicorn translates that, and every KVM supports it.  There is no AVX and no XSAVE (Unicorn
has neither), no local APIC, no machine checks and no memory type ranges (a micro-VM has none).  The vendor is the
host's, since processors differ by vendor in SYSCALL and SYSENTER; the hypervisor's leaf reads `MixvisorVMM`.

Sources: SDM volume 2, CPUID; AMD64 volume 3, appendix E.
Poor: PVM shows the processor's own features in leaf 1, whatever it is told; a guest that then uses one that cannot be
carried stays where it is (`why_not` of portable.py, and the kvm engine's look at what is in use).  A saved guest can
only be restored on a host of the same vendor.
"""

from __future__ import annotations

import ctypes
import functools
import platform
from typing import Final

from . import kick

__all__ = ["HYPERVISOR", "answer", "leaves", "vendor"]

HYPERVISOR: Final = b"MixvisorVMM\0"
_AMD: Final = b"AuthenticAMD"
_INTEL: Final = b"GenuineIntel"
_VENDORS: Final = (_AMD, _INTEL)
_SIGNATURE: Final = 0x60FB1                # family 15, model 107, stepping 1: QEMU's generic 64-bit processor
_BRAND: Final = b"Mixvisor micro-VM processor".ljust(48, b"\0")
_PHYSICAL_BITS, _LINEAR_BITS = 40, 48


def _bits(*numbers: int) -> int:
    return sum(1 << number for number in numbers)


# FPU DE PSE TSC MSR PAE CX8 SEP PGE CMOV PAT PSE36 CLFSH MMX FXSR SSE SSE2
_FEATURES_EDX: Final = _bits(0, 2, 3, 4, 5, 6, 8, 11, 13, 15, 16, 17, 19, 23, 24, 25, 26)
_FEATURES_ECX: Final = _bits(0, 31)        # SSE3, "under a hypervisor"
_EXTENDED_EDX: Final = _bits(11, 20, 29)   # SYSCALL NX LM
_EXTENDED_ECX: Final = _bits(0)            # LAHF in 64-bit mode
_CLFLUSH_8_BYTES: Final = 8 << 8

_Regs = tuple[int, int, int, int]          # EAX EBX ECX EDX


@functools.cache
def vendor() -> bytes:
    """The host's, twelve letters; the first of the known ones where it is neither."""
    if platform.machine() != "x86_64":
        return _VENDORS[0]
    # void read(u32 out[3]): push rbx; xor eax, eax; cpuid; mov [rdi], ebx; mov [rdi+4], edx; mov [rdi+8], ecx; pop rbx
    page, address = kick.executable(bytes.fromhex("53 31C0 0FA2 891F 895704 894F08 5B C3"))
    out = (ctypes.c_uint32 * 3)()
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)(ctypes.addressof(out))
    del page
    return bytes(out) if bytes(out) in _VENDORS else _VENDORS[0]


def _text(text: bytes) -> tuple[int, ...]:
    return tuple(int.from_bytes(text[at:at + 4], "little") for at in range(0, len(text), 4))


@functools.cache
def leaves() -> dict[int, _Regs]:
    """Leaf -> EAX, EBX, ECX, EDX. None of them has sub-leaves."""
    first, second, third = _text(vendor())
    one, two, three = _text(HYPERVISOR)
    brand = _text(_BRAND)
    return {
        0: (1, first, third, second),
        1: (_SIGNATURE, _CLFLUSH_8_BYTES, _FEATURES_ECX, _FEATURES_EDX),
        0x4000_0000: (0x4000_0000, one, two, three),
        0x8000_0000: (0x8000_0008, first, third, second),
        0x8000_0001: (_SIGNATURE, 0, _EXTENDED_ECX, _EXTENDED_EDX),
        **{0x8000_0002 + n: (brand[4 * n], brand[4 * n + 1], brand[4 * n + 2], brand[4 * n + 3]) for n in range(3)},
        0x8000_0008: (_LINEAR_BITS << 8 | _PHYSICAL_BITS, 0, 0, 0),
    }


def answer(leaf: int) -> _Regs:
    """What the CPUID instruction gives for what there is not, too: zeros, and of Intel's processors the highest basic
    leaf where the number is beyond the last of its class (KVM does so as the processors do).
    """
    found = leaves().get(leaf)
    if found is not None:
        return found
    if vendor() != _INTEL:
        return 0, 0, 0, 0
    first = leaf & 0xFFFF_FF00 if leaf >> 28 == 4 else 0xC000_0000 if leaf >= 0xC000_0000 else leaf & 0x8000_0000
    last = leaves().get(first)
    return (0, 0, 0, 0) if last is not None and leaf <= last[0] else leaves()[leaves()[0][0]]
