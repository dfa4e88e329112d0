"""What an x86 instruction means to who virtualizes it: a table from mnemonic to class.

Theory.  Popek and Goldberg: a processor is virtualizable by trap and emulate when every
*sensitive* instruction (one that reads or changes the machine's state) is *privileged* (traps
outside ring 0).  x86 is not: Robin and Irvine (2000) counted seventeen that are sensitive and do
not trap.  Software virtualization runs the guest's ring 0 in ring 1 and must find and patch exactly
those; the privileged ones and port I/O trap by themselves; real mode it can only interpret or
translate, and 64-bit code it cannot hold in ring 1 at all, because long mode has no segment limits.

`iret` belongs with the seventeen (it pops flags and segments) and stands on the manual's list, so it
is counted here too.  CPUID and RDTSC read what a hypervisor may want to hide, but trap only where
the processor offers faulting: a class of their own, `revealing`.

Esoteric is what the VirtualBox manual means by "rare guests with very esoteric instructions" (OS/2):
rings 1 and 2 cannot be seen in bytes, so it is what hardly any other system uses.

Names are capstone's mnemonics (Intel syntax, prefixes cut off).  Pure.
"""

from __future__ import annotations

import enum
import re
from typing import Final

__all__ = ["PVM_CANNOT", "Kind", "classify"]


class Kind(enum.Enum):
    PRIVILEGED = "privileged"
    SENSITIVE = "sensitive"          # and not privileged: it does not trap
    IO = "io"
    REVEALING = "revealing"
    ESOTERIC = "esoteric"


_PRIVILEGED: Final = (
    "hlt", "lgdt", "lidt", "lldt", "ltr", "lmsw", "clts", "invd", "wbinvd", "wbnoinvd", "invlpg", "invlpga", "invpcid",
    "rdmsr", "wrmsr", "rdpmc", "swapgs", "sysexit", "sysexitq", "sysret", "sysretq", "monitor", "mwait", "xsetbv",
    "stac", "clac", "cli", "sti",
    "vmcall", "vmclear", "vmfunc", "vmlaunch", "vmptrld", "vmptrst", "vmread", "vmresume", "vmwrite", "vmxoff", "vmxon",
    "invept", "invvpid", "vmrun", "vmload", "vmsave", "vmmcall", "stgi", "clgi", "skinit", "encls")

# Robin and Irvine's seventeen, with IRET; those with a far or a near form are in `classify`.
_SENSITIVE: Final = {
    **dict.fromkeys(("sgdt", "sidt", "sldt", "smsw", "str", "lar", "lsl", "verr", "verw")),
    **dict.fromkeys(("pushf", "pushfd", "pushfq"), "pushf"),
    **dict.fromkeys(("popf", "popfd", "popfq"), "popf"),
    **dict.fromkeys(("lcall",), "call far"), **dict.fromkeys(("ljmp",), "jmp far"),
    **dict.fromkeys(("retf", "retfq"), "ret far"),
    **dict.fromkeys(("int", "int3", "into"), "int n"),
    **dict.fromkeys(("iret", "iretd", "iretq"), "iret"),
    **dict.fromkeys(("lds", "les", "lfs", "lgs", "lss"), "mov segment"),
}
_IO: Final = {"in": "in", "out": "out", "insb": "ins", "insw": "ins", "insd": "ins", "outsb": "outs", "outsw": "outs",
              "outsd": "outs"}
_REVEALING: Final = ("cpuid", "rdtsc", "rdtscp")
_ESOTERIC: Final = ("arpl", "bound", "int1", "salc", "rsm", "getsec", "loadall")

_SEGMENT: Final = re.compile(r"(?:^|, )[c-gs]s(?:$|,)")
_CONTROL: Final = re.compile(r"\b[cd]r\d+\b")

# KVM under PVM gives up on these in ring 0, where VT-x and AMD-V run them (docs/eyes.md).
PVM_CANNOT: Final = frozenset((
    "int3", "cmpxchg16b", "xrstor", "xrstor64", "xgetbv", "rdrand", "popcnt", "clac", "stac", "wait", "fwait",
    "ldmxcsr", "movbe"))

_ALWAYS: Final[dict[str, tuple[Kind, str]]] = {
    **{name: (Kind.PRIVILEGED, name) for name in _PRIVILEGED},
    **{name: (Kind.SENSITIVE, family or name) for name, family in _SENSITIVE.items()},
    **{name: (Kind.IO, family) for name, family in _IO.items()},
    **{name: (Kind.REVEALING, name) for name in _REVEALING},
    **{name: (Kind.ESOTERIC, name) for name in _ESOTERIC},
}
# Mnemonics whose operands decide, for who wants to skip the rest quickly.
LOOKED_AT: Final = frozenset(("mov", "push", "pop", "enter", "syscall", "sysret", *_ALWAYS, *PVM_CANNOT))


def classify(mnemonic: str, operands: str, bits: int) -> tuple[Kind, str] | None:
    """Class and family (`mov segment`, `pushf`, `wrmsr`) of an instruction; None for a plain one."""
    found = _ALWAYS.get(mnemonic)
    if found is not None:
        return found
    if mnemonic == "mov":
        if _SEGMENT.search(operands):
            return Kind.SENSITIVE, "mov segment"
        control = _CONTROL.search(operands)
        if control is not None:
            return Kind.PRIVILEGED, f"mov {control[0]}"
    elif mnemonic in ("push", "pop") and _SEGMENT.search(operands):
        return Kind.SENSITIVE, f"{mnemonic} segment"
    elif mnemonic in ("syscall", "sysret") and bits == 16:
        # 0F 05 and 0F 07: what SYSCALL and SYSRET are now was LOADALL on the 286 and 386.
        return Kind.ESOTERIC, "loadall"
    elif mnemonic == "enter" and not operands.endswith(", 0"):
        return Kind.ESOTERIC, "enter nested"
    return None
