"""Which mode each VM runs in, why, and what is said when the modes mix.

Theory.  `mode = auto` follows the rules of the VirtualBox manual, chapter 10.3, and the list of
guest systems in its source (`Global.cpp`): some guests *need* hardware virtualization (64-bit,
more than one vCPU, listed systems, memory past the PCI hole), a foreign architecture needs
software, a host without hardware virtualization has only software. The rest are *flexible*, and
because the manual's advice is not to mix the modes where speed matters, they are decided last and
for the whole set: they take the mode that the others are bound to. Where nothing binds (or both
modes are bound already) they take the host's quicker one: hardware, except under PVM, which
emulates everything outside long-mode ring 3 at about 5 MIPS against Unicorn's 127 (reference:
guests.md), so that 16 and 32-bit guests are quicker in software there.

What the file says explicitly is never bent: `hardware` without a usable /dev/kvm is refused, and
`software` is refused only where the engine cannot do it. An explicit `software` that goes against
a rule of the manual gets a note (Unicorn runs 64-bit guests well). Falling back to software for a
guest that needs hardware happens only with `fallback = true`, and its rule says so.

Invariants.  Pure: the same set and host give the same plan, whatever the order of the VMs. Every VM
gets exactly one of a decision and a refusal. No refusal of one VM changes the mode of another,
except that a refused VM binds nobody. Rule codes are stable: they are labels and JSON.

Poor at: engines here are micro-VMs, so more than one vCPU and other architectures are refused until
an engine can run them (ENGINE_LIMITS is the one place that says so).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from ..config.model import GIB, MIB, VmConfig, format_size

__all__ = [
    "ENGINE_LIMITS", "MIXED_MODES", "RULES", "Alternative", "EngineLimit", "MixingWarning", "Mode",
    "ModeDecision", "ModeHost", "ModeRefusal", "Rule", "Technology", "guest_system",
    "mixing_warning", "plan", "rules_table",
]

Mode = Literal["software", "hardware"]
EngineName = Literal["kvm", "software"]
Technology = Literal["vt-x", "amd-v", "pvm", "none"]

ENGINE_OF: Final[Mapping[Mode, EngineName]] = {"hardware": "kvm", "software": "software"}
MODE_OF: Final[Mapping[EngineName, Mode]] = {"kvm": "hardware", "software": "software"}
MIXED_MODES: Final = "mixed-modes"


@dataclass(frozen=True, slots=True)
class ModeHost:
    """What the rules need to know of a host; `HostFacts.modes` makes it."""

    technology: Technology
    kvm_usable: bool
    why_not: str = ""          # a sentence without its full stop: why KVM cannot be used
    remedy: str = ""           # what to do about it

    @property
    def hardware(self) -> bool:
        return self.kvm_usable and self.technology != "none"


@dataclass(frozen=True, slots=True)
class EngineLimit:
    """What an engine of this version can run at most."""

    vcpus: int
    architectures: frozenset[str]
    about: str


ENGINE_LIMITS: Final[Mapping[EngineName, EngineLimit]] = {
    "kvm": EngineLimit(1, frozenset({"x86"}), "the kvm engine runs one vCPU in this version"),
    "software": EngineLimit(1, frozenset({"x86"}), "the software engine (Unicorn) runs one vCPU"),
}


@dataclass(frozen=True, slots=True)
class Alternative:
    """The mode not taken, and why."""

    mode: Mode
    why: str


@dataclass(frozen=True, slots=True)
class ModeDecision:
    """How a VM runs. `rule` is a key of RULES; `reason` and `notes` are sentences."""

    mode: Mode
    engine: EngineName
    rule: str
    reason: str
    alternatives: tuple[Alternative, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ModeRefusal:
    """Why a VM cannot run on this host as its configuration asks, and what to do."""

    vm: str
    rule: str
    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.vm}: {self.reason} {self.remedy}".rstrip()


@dataclass(frozen=True, slots=True)
class Rule:
    code: str
    mode: str                  # what it asks for
    says: str
    source: str


_MANUAL: Final = "VirtualBox manual, 10.3"
_GLOBAL: Final = "VirtualBox, Global.cpp"
_OURS: Final = "Mixvisor"

RULES: Final[Mapping[str, Rule]] = {rule.code: rule for rule in (
    Rule("explicit", "as written", "The file names the mode.", _OURS),
    Rule("engine", "as written", "The file names the engine, and an engine has one mode.", _OURS),
    Rule("foreign-arch", "software", "A guest for another processor architecture can only be "
         "emulated.", _MANUAL),
    Rule("64-bit", "hardware", "A 64-bit guest needs hardware virtualization.", _MANUAL),
    Rule("smp", "hardware", "A guest with more than one vCPU needs hardware virtualization.",
         _MANUAL),
    Rule("guest-system", "hardware", "Some guest systems need hardware virtualization although "
         "they are not 64-bit.", _GLOBAL),
    Rule("memory", "hardware", "Memory that with the PCI hole passes 4 GiB needs hardware "
         "virtualization.", _GLOBAL),
    Rule("no-hardware", "software", "A host without hardware virtualization has only software.",
         _MANUAL),
    Rule("fallback", "software", "A guest that needs hardware runs in software where the host has "
         "none and the file says fallback = true.", _OURS),
    Rule("avoid-mixing", "either", "A guest that can run in both modes takes the one that keeps "
         "the whole set in one mode.", _MANUAL),
    Rule("default", "either", "Where nothing decides: hardware, except under PVM, which emulates "
         "16 and 32-bit guests more slowly than software does.", _OURS),
    Rule("engine-limit", "refused", "No engine of this version can run the guest.", _OURS),
    Rule("no-kvm", "refused", "Hardware was asked for or is needed, and KVM cannot be used.",
         _OURS),
    Rule("contradiction", "refused", "The engine that is named has not the mode that is named.",
         _OURS),
)}


def rules_table() -> str:
    """RULES as a Markdown table, for the documentation and `mixvisor host`."""
    rows = ["| Rule | Mode | What it says | Source |", "|---|---|---|---|"]
    rows += [f"| `{r.code}` | {r.mode} | {r.says} | {r.source} |" for r in RULES.values()]
    return "\n".join(rows) + "\n"


# ---- guest systems ---------------------------------------------------------------------------

# On a name in lower case without spaces, '-', '_' and '/': "OS/2 Warp 4.5" -> "os2warp4.5". The dot
# stays, else Windows 1.0 would be Windows 10. OS/2 1.x is not marked in Global.cpp.
_GUEST_SYSTEMS: Final = tuple((name, re.compile(pattern)) for name, pattern in (
    ("OS/2", r"(ibm)?os2(?!v?1)|ecomstation|arcaos"),
    ("Windows 8 or later",
     r"win(dows)?(nt)?(server)?(8(\.1|1)?|1[01]|20(12|16|19|22|25))(?![0-9.])"),
    ("OpenBSD", r"openbsd"),
    ("NetWare", r"(novell)?netware"),
    ("QNX", r"qnx"),
    ("Mac OS X", r"macos|osx"),
    ("JRockit VE", r"jrockit"),
))
_WIDTH: Final = re.compile(r"[ _-]x?(32|64)(-?bit)?$")      # VirtualBox writes Windows8_64


def guest_system(os: str) -> str | None:
    """The listed system that `os` names, as people write it; None where it is not listed."""
    name = re.sub(r"[\s_/-]+", "", _WIDTH.sub("", os.strip().lower()))
    for system, pattern in _GUEST_SYSTEMS:
        if pattern.match(name):
            return system
    return None


# RAM below 4 GiB ends where the PCI hole begins: 512 MiB, VirtualBox's MM_RAM_HOLE_SIZE_DEFAULT.
_BELOW_HOLE_BYTES: Final = 4 * GIB - 512 * MIB


def _needs_hardware(vm: VmConfig) -> list[tuple[str, str]]:
    """(rule, why) for every rule by which this guest needs hardware."""
    needs: list[tuple[str, str]] = []
    if vm.bits == 64:
        needs.append(("64-bit", "a 64-bit guest needs hardware virtualization"))
    if vm.vcpus > 1:
        needs.append(("smp", f"a guest with {vm.vcpus} vCPUs needs hardware virtualization"))
    system = guest_system(vm.os)
    if system is not None:
        needs.append(("guest-system", f"{system} needs hardware virtualization"))
    if vm.memory > _BELOW_HOLE_BYTES:
        needs.append(("memory", f"{format_size(vm.memory)} of memory and the PCI hole pass 4 GiB, "
                                "which needs hardware virtualization"))
    return needs


# ---- the plan -------------------------------------------------------------------------------

def plan(vms: Iterable[VmConfig], host: ModeHost) -> dict[str, ModeDecision | ModeRefusal]:
    """Decide every VM of the set, by name and in the order given.

    `vms` is the whole set of a configuration: what is flexible depends on the others.
    """
    members = list(vms)
    bound = {vm.name: _bound(vm, host) for vm in members}
    taken: set[Mode] = {
        answer.mode for answer in bound.values() if isinstance(answer, ModeDecision)}
    return {
        vm.name: answer if (answer := bound[vm.name]) is not None else _flexible(host, taken)
        for vm in members
    }


def _bound(vm: VmConfig, host: ModeHost) -> ModeDecision | ModeRefusal | None:
    """The decision that does not depend on other VMs; None for a flexible guest."""
    asked: Mode | None = None if vm.mode == "auto" else vm.mode
    rule = "explicit"
    if vm.engine != "auto":
        of_engine = MODE_OF[vm.engine]
        if asked is not None and asked != of_engine:
            return ModeRefusal(
                vm.name, "contradiction",
                f'engine = "{vm.engine}" runs in {of_engine} mode, and mode = "{asked}" is asked.',
                f'Write mode = "{of_engine}", or leave out one of the two.')
        if asked is None:
            asked, rule = of_engine, "engine"
    refusal = _engine_limit(vm, asked)
    if refusal is not None:
        return refusal
    needs = _needs_hardware(vm)
    if asked == "hardware":
        if not host.hardware:
            return _no_kvm(vm, host, "hardware mode is asked for", "")
        return _decision("hardware", rule, f'The file says {_said(vm)}.',
                         Alternative("software", f"the file says {_said(vm)}"))
    if asked == "software":
        notes = tuple(
            f"By the manual {why}; the file asks for software, and this engine can run it."
            for _, why in needs)
        return _decision("software", rule, f'The file says {_said(vm)}.',
                         Alternative("hardware", f"the file says {_said(vm)}"), notes)
    if needs:
        code, why = needs[0]
        every = " and ".join(text for _, text in needs)
        if host.hardware:
            return _decision("hardware", code, f"{_capital(every)}.", Alternative("software", why))
        if vm.fallback:
            return _decision(
                "software", "fallback",
                f"{_capital(why)}, but {host.why_not or 'the host has none'}; the file allows "
                "software instead (fallback = true).",
                Alternative("hardware", host.why_not or "the host has none"))
        return _no_kvm(vm, host, why, "or allow software with fallback = true.")
    if not host.hardware:
        return _decision(
            "software", "no-hardware",
            f"{_capital(host.why_not or 'this host has no hardware virtualization')}: only "
            "software is possible.",
            Alternative("hardware", host.why_not or "the host has none"))
    return None


def _said(vm: VmConfig) -> str:
    return f'mode = "{vm.mode}"' if vm.mode != "auto" else f'engine = "{vm.engine}"'


def _engine_limit(vm: VmConfig, asked: Mode | None) -> ModeRefusal | None:
    """Refused where no engine that may be taken can run it; the same limits in both modes now."""
    modes: tuple[Mode, ...] = ("hardware", "software") if asked is None else (asked,)
    limits = [ENGINE_LIMITS[ENGINE_OF[mode]] for mode in modes]
    if not any(vm.arch in limit.architectures for limit in limits):
        if asked == "hardware":
            return ModeRefusal(
                vm.name, "foreign-arch",
                f"A guest for {vm.arch} cannot run in hardware mode on an x86 host.",
                "It needs software emulation, which no engine of this version has for it.")
        return ModeRefusal(
            vm.name, "foreign-arch",
            f"A guest for {vm.arch} needs software emulation of that architecture, which no "
            "engine of this version has.",
            "Only x86 guests run.")
    if not any(vm.vcpus <= limit.vcpus for limit in limits):
        return ModeRefusal(
            vm.name, "engine-limit",
            f"{vm.vcpus} vCPUs are asked for; {' and '.join(limit.about for limit in limits)}.",
            "Write vcpus = 1.")
    return None


def _no_kvm(vm: VmConfig, host: ModeHost, why: str, otherwise: str) -> ModeRefusal:
    because = host.why_not or "this host has no hardware virtualization"
    remedy = f"{host.remedy.rstrip('.') or 'Use a host that has it'}{',' if otherwise else '.'}"
    return ModeRefusal(vm.name, "no-kvm", f"{_capital(why)}, but {because}.",
                       f"{remedy} {otherwise}".rstrip())


def _flexible(host: ModeHost, taken: set[Mode]) -> ModeDecision:
    """A guest that can run in both modes, beside VMs that are bound to the modes in `taken`."""
    if len(taken) == 1:
        (mode,) = taken
        other: Mode = "software" if mode == "hardware" else "hardware"
        return _decision(
            mode, "avoid-mixing",
            f"It can run in both modes; the other VMs of this file are bound to {mode}, and not "
            "mixing is the recommendation.",
            Alternative(other, "it would mix the modes"))
    beside = "both modes are in use already" if taken else "nothing asks for one"
    if host.technology == "pvm":
        return _decision(
            "software", "default",
            f"It can run in both modes and {beside}; PVM emulates 16 and 32-bit guests, and "
            "software is quicker at that.",
            Alternative("hardware", "PVM emulates 16 and 32-bit guests instruction by instruction"))
    return _decision(
        "hardware", "default",
        f"It can run in both modes and {beside}; hardware is quicker.",
        Alternative("software", "hardware is quicker"))


def _decision(mode: Mode, rule: str, reason: str, alternative: Alternative,
              notes: tuple[str, ...] = ()) -> ModeDecision:
    return ModeDecision(mode, ENGINE_OF[mode], rule, reason, (alternative,), notes)


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


# ---- the warning ----------------------------------------------------------------------------

@dataclass(frozen=True, slots=True)
class MixingWarning:
    """Said while software and hardware VMs run together. `code` is stable."""

    code: str
    severity: Literal["info", "warning"]
    message: str
    advice: str
    vms: tuple[str, ...]


def mixing_warning(
    running: Mapping[str, Mode], technology: Technology,
) -> MixingWarning | None:
    """What to say about the VMs that run now (name -> mode); None while one mode has the host.

    Source: the manual's chapter 10.3. The rule is about VT-x; on AMD-V it is waived by the book,
    and about PVM the book is silent.
    """
    software = sorted(name for name, mode in running.items() if mode == "software")
    hardware = sorted(name for name, mode in running.items() if mode == "hardware")
    if not software or not hardware:
        return None
    together = (f"Software ({', '.join(software)}) and hardware ({', '.join(hardware)}) VMs run "
                "together")
    vms = (*software, *hardware)
    if technology == "vt-x":
        return MixingWarning(
            MIXED_MODES, "warning",
            f"{together} on VT-x: a small performance penalty is in certain cases unavoidable.",
            "Where maximum performance matters, do not mix the modes: give all VMs one mode, or "
            "run the two kinds on different hosts.", vms)
    if technology == "amd-v":
        return MixingWarning(
            MIXED_MODES, "info",
            f"{together} on AMD-V: the manual's warning about mixing does not apply here.",
            "Nothing needs to be done.", vms)
    if technology == "pvm":
        return MixingWarning(
            MIXED_MODES, "info",
            f"{together} on PVM (KVM without VT-x or AMD-V): the manual's rule says nothing about "
            "it.", "Only a measurement on this host can say what mixing costs.", vms)
    return MixingWarning(
        MIXED_MODES, "info",
        f"{together}, although no hardware virtualization was found on this host.",
        "Look at `mixvisor host`: what was found has changed since the VMs started.", vms)
