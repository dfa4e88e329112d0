"""What CPUID tells each vCPU of a VM with several: the host's processor, in a package of its own.

Theory.  A VM with several vCPUs runs in hardware only, so it need not be shown the modest processor that both engines
have (vm/engines/cpuid.py); it gets what this host's KVM supports, less what a micro-VM has no use for, and with numbers
of its own: APIC id = index of the vCPU, one thread a core, all cores in one package.

Passed through: vendor, family, and every feature that KVM_GET_SUPPORTED_CPUID names, x2APIC among them.
Set: hypervisor bit, APIC (KVM follows the enable bit of the APIC's base), APIC ids, the counts of leaves 1, 4, 0Bh and
80000008h, the TSC deadline timer where KVM's local APIC has it.
Hidden: VMX and SVM, MONITOR, the performance counters (leaf 0Ah; they would show the host), the topology leaves that
repeat the host's (1Fh, 8000001Dh, 8000001Eh, 80000026h).

Sources: SDM volume 2, CPUID, and volume 3, 9.9 (topology); AMD64 volume 3, appendix E.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

__all__ = ["Leaf", "several"]


@dataclass(frozen=True, slots=True)
class Leaf:
    """struct kvm_cpuid_entry2 without its padding."""

    function: int
    index: int = 0
    flags: int = 0
    eax: int = 0
    ebx: int = 0
    ecx: int = 0
    edx: int = 0


_SIGNIFICANT_INDEX: Final = 1              # KVM_CPUID_FLAG_SIGNIFCANT_INDEX
_HYPERVISOR, _APIC, _HTT = 1 << 31, 1 << 9, 1 << 28
_HIDDEN_1_ECX: Final = 1 << 3 | 1 << 5     # MONITOR, VMX
_DEADLINE: Final = 1 << 24
_HIDDEN_EXT_ECX: Final = 1 << 2 | 1 << 22 | 1 << 23 | 1 << 24 | 1 << 28      # SVM, topology extensions, counters
_DROPPED: Final = frozenset((0xB, 0x1F, 0x8000_001D, 0x8000_001E, 0x8000_0026))
_SHARED_BY_ALL: Final = 3                  # the level of cache that all cores share


def several(supported: Iterable[Leaf], index: int, count: int, *, deadline: bool) -> list[Leaf]:
    """The table of vCPU *index* of *count*. deadline: KVM's local APIC has the TSC deadline timer."""
    bits = (count - 1).bit_length()
    told: list[Leaf] = []
    highest = 0
    for leaf in supported:
        if leaf.function in _DROPPED:
            continue
        highest = max(highest, leaf.function if leaf.function < 0x4000_0000 else 0)
        told.append(_adapted(leaf, index, count, bits, deadline=deadline))
    if highest >= 4:
        # Threads of a core (there is one), then cores of the package.
        told += [Leaf(0xB, 0, _SIGNIFICANT_INDEX, 0, 1, 1 << 8, index),
                 Leaf(0xB, 1, _SIGNIFICANT_INDEX, bits, count, 2 << 8 | 1, index)]
        told = [replace(leaf, eax=max(leaf.eax, 0xB)) if leaf.function == 0 else leaf for leaf in told]
    return sorted(told, key=lambda leaf: (leaf.function, leaf.index))


def _adapted(leaf: Leaf, index: int, count: int, bits: int, *, deadline: bool) -> Leaf:
    if leaf.function == 1:
        return replace(
            leaf, ebx=leaf.ebx & 0xFFFF | min(count, 255) << 16 | (index & 0xFF) << 24,
            ecx=leaf.ecx & ~_HIDDEN_1_ECX & ~_DEADLINE | _HYPERVISOR | (_DEADLINE if deadline else 0),
            edx=leaf.edx & ~_HTT | _APIC | (_HTT if count > 1 else 0))
    if leaf.function == 4 and leaf.eax & 0x1F:
        sharing = count - 1 if leaf.eax >> 5 & 7 >= _SHARED_BY_ALL else 0
        return replace(leaf, eax=leaf.eax & 0x3FFF | min(sharing, 0xFFF) << 14 | min(count - 1, 63) << 26)
    if leaf.function == 0xA:
        return replace(leaf, eax=0, ebx=0, ecx=0, edx=0)
    if leaf.function == 0x8000_0001:
        return replace(leaf, ecx=leaf.ecx & ~_HIDDEN_EXT_ECX)
    if leaf.function == 0x8000_0008:
        return replace(leaf, ecx=leaf.ecx & ~0xF0FF | min(count - 1, 255) | bits << 12)
    return leaf
