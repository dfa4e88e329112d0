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

The plan.  Each VM has two candidate modes. What stands against a mode is of two kinds: a *barrier*
(no engine of that mode can run the guest, or the host has no such mode), which nothing lifts, and a
*rule* (the file names the other mode; the manual says that the guest needs hardware). A VM with one
mode left is bound to it; one with none is refused; one with both is flexible. The flexible ones
take the mode that all bound ones have. Where the bound ones mix already, the same question is asked
once more of each group of VMs that can meet on a core: there, too, nothing mixes that need not.

Invariants.  Pure: the same set and host give the same plan, whatever the order of the VMs. Every VM
gets exactly one of a decision and a refusal, with the other mode and why not. No refusal of one VM
changes the mode of another, except that a refused VM binds nobody. Rule codes are stable: they are
labels and JSON.

Poor at: engines here are micro-VMs, so several vCPUs in software and other architectures are refused until
an engine can run them (ENGINE_LIMITS is the one place that says so). A flexible VM that can meet
bound VMs of both modes takes the quicker one; that another choice would mix with fewer is not weighed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from ..config.model import GIB, MIB, VmConfig, format_size

__all__ = [
    "ENGINE_LIMITS", "RULES", "Alternative", "EngineLimit", "Mode", "ModeDecision", "ModeHost", "ModeRefusal",
    "Rule", "Technology", "guest_system", "moved", "plan", "rules_table", "why_not_moved",
]

Mode = Literal["software", "hardware"]
EngineName = Literal["kvm", "software"]
Technology = Literal["vt-x", "amd-v", "pvm", "none"]

ENGINE_OF: Final[Mapping[Mode, EngineName]] = {"hardware": "kvm", "software": "software"}
MODE_OF: Final[Mapping[EngineName, Mode]] = {"kvm": "hardware", "software": "software"}


@dataclass(frozen=True, slots=True)
class ModeHost:
    """What the rules need to know of a host; `HostFacts.modes` makes it."""

    technology: Technology
    kvm_usable: bool
    why_not: str = ""          # a sentence without its full stop: why KVM cannot be used
    remedy: str = ""           # what to do about it
    long_mode: bool = True     # hardware VMs may be 64-bit
    cores: tuple[tuple[int, ...], ...] = ()     # host CPUs that are threads of one core, core by core

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
    "kvm": EngineLimit(16, frozenset({"x86"}), "the kvm engine runs at most 16 vCPUs a VM"),
    "software": EngineLimit(1, frozenset({"x86"}), "the software engine (Unicorn) runs one vCPU"),
}


@dataclass(frozen=True, slots=True)
class Alternative:
    """A mode not taken: `rule` (a key of RULES) refused it, and why. `possible`: the host and an
    engine could run the VM so, if the file said so.
    """

    mode: Mode
    rule: str
    why: str
    possible: bool


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
    alternatives: tuple[Alternative, ...] = ()

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
    Rule("request", "either", "An operator moved the running guest: until it ends it runs so.", _OURS),
    Rule("avoid-mixing", "either", "A guest that can run in both modes takes the one that keeps "
         "the whole set in one mode; where the others mix already, the VMs that it can meet on a core.", _MANUAL),
    Rule("default", "either", "Where nothing decides: hardware, except under PVM, which emulates "
         "16 and 32-bit guests more slowly than software does.", _OURS),
    Rule("engine-limit", "refused", "No engine of this version can run the guest.", _OURS),
    Rule("host-32-bit", "refused", "A 64-bit guest in hardware mode needs a 64-bit CPU under a 64-bit kernel.", _OURS),
    Rule("no-kvm", "refused", "Hardware was asked for or is needed, and KVM cannot be used.",
         _OURS),
    Rule("contradiction", "refused", "The engine that is named has not the mode that is named.",
         _OURS),
)}


def moved(planned: ModeDecision, mode: Mode) -> ModeDecision:
    """How a VM runs that was moved to *mode* while it ran; *planned* is what its configuration says."""
    if mode == planned.mode:
        return planned
    return ModeDecision(
        mode, ENGINE_OF[mode], "request",
        f"It was moved to {mode} by request while it ran; by its configuration it starts in {planned.mode}.",
        (Alternative(planned.mode, planned.rule, planned.reason, possible=True),))


def why_not_moved(planned: ModeDecision, mode: Mode) -> str | None:
    """What keeps a VM from ever running in *mode* on this host; None: nothing."""
    for other in planned.alternatives:
        if other.mode == mode and not other.possible:
            return other.why
    return None


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

_OTHER: Final[Mapping[Mode, Mode]] = {"hardware": "software", "software": "hardware"}


@dataclass(frozen=True, slots=True)
class _Barrier:
    """Why a VM cannot run in a mode, whatever the file says. `why` is no whole sentence."""

    rule: str
    why: str
    remedy: str


def plan(
    vms: Iterable[VmConfig], host: ModeHost, limits: Mapping[EngineName, EngineLimit] = ENGINE_LIMITS,
) -> dict[str, ModeDecision | ModeRefusal]:
    """Decide every VM of the set, by name and in the order given.

    `vms` is the whole set of a configuration: what is flexible depends on the others.
    """
    members = list(vms)
    answers = {vm.name: _bound(vm, host, limits) for vm in members}
    flexible = [vm for vm in members if answers[vm.name] is None]
    taken = _modes_of(answers, members)
    if len(taken) < 2:
        answers |= {vm.name: _flexible(host, taken, "the other VMs of this file") for vm in flexible}
    else:
        running = [vm for vm in members if not isinstance(answers[vm.name], ModeRefusal)]
        for group in _groups(running, host.cores):
            inside = _modes_of(answers, group)
            answers |= {vm.name: _flexible(host, inside or taken, "the VMs that it can meet on a core")
                        for vm in group if answers[vm.name] is None}
    return {name: answer for name, answer in answers.items() if answer is not None}


def _modes_of(
    answers: Mapping[str, ModeDecision | ModeRefusal | None], vms: Iterable[VmConfig],
) -> set[Mode]:
    decided = (answers[vm.name] for vm in vms)
    return {answer.mode for answer in decided if isinstance(answer, ModeDecision)}


def _groups(vms: Sequence[VmConfig], cores: Iterable[tuple[int, ...]]) -> list[list[VmConfig]]:
    """The VMs that can meet on a core, directly or by way of others. Without `cpus` a VM may run anywhere."""
    core_of = {cpu: core for core in cores for cpu in core}
    groups: list[tuple[set[int] | None, list[VmConfig]]] = []      # None: every core
    for vm in vms:
        reach: set[int] | None = None if vm.cpus is None else {min(core_of.get(cpu, (cpu,))) for cpu in vm.cpus}
        members = [vm]
        apart: list[tuple[set[int] | None, list[VmConfig]]] = []
        for other, inside in groups:
            if reach is None or other is None or reach & other:
                reach = None if reach is None or other is None else reach | other
                members = inside + members
            else:
                apart.append((other, inside))
        groups = [*apart, (reach, members)]
    return [members for _, members in groups]


def _bound(
    vm: VmConfig, host: ModeHost, limits: Mapping[EngineName, EngineLimit],
) -> ModeDecision | ModeRefusal | None:
    """The decision that does not depend on other VMs; None for a flexible guest."""
    asked: Mode | None = None if vm.mode == "auto" else vm.mode
    rule, said = "explicit", f'mode = "{vm.mode}"'
    if vm.engine != "auto":
        of_engine = MODE_OF[vm.engine]
        if asked is not None and asked != of_engine:
            return ModeRefusal(
                vm.name, "contradiction",
                f'engine = "{vm.engine}" runs in {of_engine} mode, and mode = "{asked}" is asked.',
                f'Write mode = "{of_engine}", or leave out one of the two.')
        if asked is None:
            asked, rule, said = of_engine, "engine", f'engine = "{vm.engine}"'
    barriers: dict[Mode, _Barrier | None] = {
        "hardware": _hardware_barrier(vm, host, limits["kvm"]), "software": _software_barrier(vm, limits["software"])}
    # The manual's rules are about guests for this processor; another's can only be emulated.
    needs = _needs_hardware(vm) if vm.arch in limits["kvm"].architectures else []
    if asked is not None:
        return _asked(vm, asked, rule, said, barriers, needs)
    no_hardware, no_software = barriers["hardware"], barriers["software"]
    if needs:
        code, why = needs[0]
        if no_hardware is None:
            every = " and ".join(text for _, text in needs)
            return _decision("hardware", code, f"{_capital(every)}.", _alternative("software", no_software, code, why))
        if vm.fallback and no_software is None:
            return _decision(
                "software", "fallback",
                f"{_capital(why)}, but {no_hardware.why}; the file allows software instead (fallback = true).",
                _alternative("hardware", no_hardware, "", ""))
        otherwise = "or allow software with fallback = true." if no_software is None else ""
        return _refusal(vm, no_hardware, why, otherwise,
                        (_alternative("hardware", no_hardware, "", ""),
                         _alternative("software", no_software, code, why)))
    if no_hardware is None and no_software is None:
        return None
    if no_software is None and no_hardware is not None:
        code = "no-hardware" if no_hardware.rule == "no-kvm" else no_hardware.rule
        return _decision("software", code, f"{_capital(no_hardware.why)}: only software is possible.",
                         _alternative("hardware", no_hardware, "", ""))
    if no_hardware is None and no_software is not None:
        return _decision("hardware", no_software.rule, f"{_capital(no_software.why)}: only hardware is possible.",
                         _alternative("software", no_software, "", ""))
    # What stands against both modes is told by the one that more hosts could lift: software's.
    assert no_software is not None
    return _refusal(vm, no_software, "", "", (_alternative("hardware", no_hardware, "", ""),
                                              _alternative("software", no_software, "", "")))


def _asked(
    vm: VmConfig, asked: Mode, rule: str, said: str, barriers: Mapping[Mode, _Barrier | None],
    needs: Sequence[tuple[str, str]],
) -> ModeDecision | ModeRefusal:
    """What the file names is honoured or refused."""
    other = _OTHER[asked]
    refused = _alternative(other, barriers[other], rule, f"the file says {said}")
    barrier = barriers[asked]
    if barrier is not None:
        return _refusal(vm, barrier, f"{asked} mode is asked for", "",
                        (_alternative(asked, barrier, "", ""), refused))
    notes = tuple(f"By the manual {why}; the file asks for software, and this engine can run it."
                  for _, why in needs) if asked == "software" else ()
    return _decision(asked, rule, f"The file says {said}.", refused, notes)


def _hardware_barrier(vm: VmConfig, host: ModeHost, limit: EngineLimit) -> _Barrier | None:
    if vm.arch not in limit.architectures:
        return _Barrier("foreign-arch", f"a guest for {vm.arch} cannot run in hardware mode on an x86 host",
                        "It needs software emulation.")
    if vm.vcpus > limit.vcpus:
        return _Barrier("engine-limit", f"{vm.vcpus} vCPUs are asked for and {limit.about}",
                        f"Write vcpus = {limit.vcpus}{' or less' if limit.vcpus > 1 else ''}.")
    if not host.hardware:
        return _Barrier("no-kvm", host.why_not or "this host has no hardware virtualization",
                        host.remedy or "Use a host that has it.")
    if vm.bits == 64 and not host.long_mode:
        return _Barrier("host-32-bit", "this host is 32-bit and cannot run 64-bit guests in hardware mode",
                        "Use a 64-bit host.")
    return None


def _software_barrier(vm: VmConfig, limit: EngineLimit) -> _Barrier | None:
    if vm.arch not in limit.architectures:
        return _Barrier("foreign-arch", f"a guest for {vm.arch} needs software emulation of that architecture, which "
                        "no engine of this version has", "Only x86 guests run.")
    if vm.vcpus > limit.vcpus:
        return _Barrier("engine-limit", f"{vm.vcpus} vCPUs are asked for and {limit.about}",
                        f"Write vcpus = {limit.vcpus}{' or less' if limit.vcpus > 1 else ''}.")
    return None


def _alternative(mode: Mode, barrier: _Barrier | None, rule: str, why: str) -> Alternative:
    """The mode not taken: for the barrier where there is one, else for `rule`."""
    if barrier is not None:
        return Alternative(mode, barrier.rule, barrier.why, False)
    return Alternative(mode, rule, why, True)


def _refusal(
    vm: VmConfig, barrier: _Barrier, wanted: str, otherwise: str, alternatives: tuple[Alternative, ...],
) -> ModeRefusal:
    reason = f"{wanted}, but {barrier.why}" if wanted else barrier.why
    remedy = f"{barrier.remedy.rstrip('.')}, {otherwise}" if otherwise else barrier.remedy
    return ModeRefusal(vm.name, barrier.rule, f"{_capital(reason)}.", remedy, alternatives)


def _flexible(host: ModeHost, taken: set[Mode], who: str) -> ModeDecision:
    """A guest that can run in both modes, beside `who` that are bound to the modes in `taken`."""
    if len(taken) == 1:
        (mode,) = taken
        return _decision(
            mode, "avoid-mixing",
            f"It can run in both modes; {who} are bound to {mode}, and not mixing is the recommendation.",
            Alternative(_OTHER[mode], "avoid-mixing", "it would mix the modes", True))
    beside = "both modes are in use already" if taken else "nothing asks for one"
    if host.technology == "pvm":
        return _decision(
            "software", "default",
            f"It can run in both modes and {beside}; PVM emulates 16 and 32-bit guests, and "
            "software is quicker at that.",
            Alternative("hardware", "default", "PVM emulates 16 and 32-bit guests instruction by instruction", True))
    return _decision(
        "hardware", "default",
        f"It can run in both modes and {beside}; hardware is quicker.",
        Alternative("software", "default", "hardware is quicker", True))


def _decision(mode: Mode, rule: str, reason: str, alternative: Alternative,
              notes: tuple[str, ...] = ()) -> ModeDecision:
    return ModeDecision(mode, ENGINE_OF[mode], rule, reason, (alternative,), notes)


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]
