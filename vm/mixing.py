"""What is said while software and hardware VMs run together.

Theory.  The manual (chapter 10.3) warns of mixing on VT-x, waives the warning on AMD-V, and knows
nothing of PVM. How much it matters depends on where the two kinds meet, so there is a warning for
each place, and each weighs more than the one before:

    host    they share memory and the last-level cache: light
    core    they run at once on two threads (SMT siblings) of one core and share its caches,
            TLB and predictors: medium
    cpu     they take turns on one CPU, so every turn from one kind to the other is a crossing: heavy

On AMD-V and PVM, where the book does not warn, there is one note that names the place. What a
crossing costs *here* is said once it was measured, with its bounds, and is called inconclusive
where they include zero.

Invariants.  Pure. Codes are stable. A pair of VMs is told at every place where it meets, so that a
warning of the wider place never goes away because a nearer one came.

Poor at: `where` is what was seen lately, not a promise: VMs move.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from ..config.model import format_cpus
from .modes import Mode, ModeDecision, Technology

__all__ = [
    "MIXED_CODES", "MIXED_MODES", "MIXED_ON_CORE", "MIXED_ON_CPU", "MeasuredCost", "MixingWarning",
    "mixing_warnings",
]

MIXED_MODES: Final = "mixed-modes"
MIXED_ON_CORE: Final = "mixed-modes-core"
MIXED_ON_CPU: Final = "mixed-modes-cpu"
MIXED_CODES: Final = (MIXED_MODES, MIXED_ON_CORE, MIXED_ON_CPU)

Place = Literal["core", "cpu"]
Weight = Literal["light", "medium", "heavy"]
NAMES_SHOWN: Final = 8                 # of the VMs of one kind, in a sentence


@dataclass(frozen=True, slots=True)
class MeasuredCost:
    """What one crossing of modes was measured to cost on this host, with its interval."""

    crossing_s: float
    lower_s: float
    upper_s: float
    confidence: float = 0.95
    none: bool = False             # the interval includes zero and is narrow: there is no cost worth a word
    how: str = ""                  # in words

    @property
    def conclusive(self) -> bool:
        """The interval leaves zero out."""
        return self.lower_s > 0 or self.upper_s < 0

    def sentence(self) -> str:
        how = f", {self.how}" if self.how else ""
        interval = (f"{self.confidence * 100:g} % interval {self.lower_s * 1e6:.1f} to "
                    f"{self.upper_s * 1e6:.1f} µs")
        if self.none:
            return f"Measured on this host{how}: no cost of a crossing was found ({interval})."
        if not self.conclusive:
            return f"Measured on this host{how}: inconclusive, no cost of a crossing was told from zero ({interval})."
        return f"Measured on this host{how}: a crossing costs {self.crossing_s * 1e6:.1f} µs ({interval})."


@dataclass(frozen=True, slots=True)
class MixingWarning:
    """Said while software and hardware VMs run together. `code` is stable."""

    code: str
    severity: Literal["info", "warning"]
    weight: Weight
    message: str
    advice: str
    vms: tuple[str, ...]


def mixing_warnings(
    running: Mapping[str, Mode], technology: Technology, *,
    where: Mapping[str, Collection[int]] | None = None, cores: Iterable[tuple[int, ...]] = (),
    cost: MeasuredCost | None = None, decisions: Mapping[str, ModeDecision] | None = None,
    policies: Collection[str] = (), policy: str = "",
) -> tuple[MixingWarning, ...]:
    """What to say about the VMs that run now (name -> mode), the lightest first; nothing while one
    mode has the host.

    where: the host CPUs that each VM runs on. cores: CPUs that are threads of one core. cost: what was
    measured. decisions: how the modes came about, for the advice to change one. policies: those that
    this version has; policy: the one in force.
    """
    software = sorted(name for name, mode in running.items() if mode == "software")
    hardware = sorted(name for name, mode in running.items() if mode == "hardware")
    if not software or not hardware:
        return ()
    together = f"Software ({_names(software)}) and hardware ({_names(hardware)}) VMs run together"
    vms = (*software, *hardware)
    measured = f" {cost.sentence()}" if cost else ""
    shared = _meetings(software, hardware, where or {}, cores)
    if technology == "vt-x":
        advice = _advice(software, hardware, decisions or {}, policies, policy)
        found = [MixingWarning(
            MIXED_MODES, "warning", "light",
            f"{together} on VT-x: a small performance penalty is in certain cases unavoidable.{measured}",
            f"Where maximum performance matters, do not mix the modes. {advice}", vms)]
        for place, code, weight, text in _NEARER:
            cpus, members = shared[place]
            if cpus:
                found.append(MixingWarning(
                    code, "warning", weight,
                    f"Software and hardware VMs run {text} on VT-x (CPU {format_cpus(cpus)}): "
                    + _WHY_HERE[place] + measured, advice, tuple(sorted(members))))
        return tuple(found)
    place = next((f" They meet {text} (CPU {format_cpus(shared[name][0])})." for name, text in (
        ("cpu", "by turns on the same host CPU"), ("core", "on SMT siblings")) if shared[name][0]), "")
    said, advice = _ELSEWHERE[technology]
    if cost is not None:
        advice = "Nothing needs to be done for the rule's sake; the measurement says what it costs."
        if cost.lower_s > 0:
            way = _advice(software, hardware, decisions or {}, policies, policy)
            advice += f" To avoid it: {way[:1].lower()}{way[1:]}"
    return (MixingWarning(MIXED_MODES, "info", "light", f"{together}{said}{place}{measured}", advice, vms),)


_NEARER: Final[tuple[tuple[Place, str, Weight, str], ...]] = (
    ("core", MIXED_ON_CORE, "medium", "at once on SMT siblings"),
    ("cpu", MIXED_ON_CPU, "heavy", "by turns on the same host CPU"),
)
_WHY_HERE: Final = {
    "core": "they share its caches, TLB and branch predictors while both run.",
    "cpu": "every turn from one kind to the other is a crossing of modes.",
}
_ELSEWHERE: Final[Mapping[Technology, tuple[str, str]]] = {
    "amd-v": (" on AMD-V: the manual's warning about mixing does not apply here.",
              "Nothing needs to be done. A measurement says what it costs here."),
    "pvm": (" on PVM (KVM without VT-x or AMD-V): the manual's rule says nothing about it.",
            "Only a measurement on this host can say what mixing costs."),
    "none": (", although no hardware virtualization was found on this host.",
             "Look at `mixvisor host`: what was found has changed since the VMs started."),
}


def _names(names: list[str]) -> str:
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _meetings(
    software: Iterable[str], hardware: Iterable[str], where: Mapping[str, Collection[int]],
    cores: Iterable[tuple[int, ...]],
) -> dict[str, tuple[set[int], set[str]]]:
    """For "core" and "cpu": the host CPUs where both kinds are, and the VMs there."""
    soft = {name: set(where.get(name, ())) for name in software}
    hard = {name: set(where.get(name, ())) for name in hardware}
    on_soft = {cpu for own in soft.values() for cpu in own}
    on_hard = {cpu for own in hard.values() for cpu in own}
    cpus = on_soft & on_hard
    threads: set[int] = set()
    for core in cores:
        inside = set(core)
        here_soft, here_hard = on_soft & inside, on_hard & inside
        # Two different threads: the same one alone is the other warning's matter.
        if here_soft and here_hard and len(here_soft | here_hard) > 1:
            threads |= here_soft | here_hard
    every = {**soft, **hard}
    return {place: (at, {name for name, own in every.items() if own & at})
            for place, at in (("core", threads), ("cpu", cpus))}


def _advice(
    software: list[str], hardware: list[str], decisions: Mapping[str, ModeDecision],
    policies: Collection[str], policy: str,
) -> str:
    """What avoids mixing here: another mode where it is possible, else another policy."""
    ways: list[str] = []
    for names, mode in ((software, "hardware"), (hardware, "software")):
        if all(name in decisions and any(other.possible for other in decisions[name].alternatives)
               for name in names):
            ways.append(f'all VMs can run in {mode} mode (mode = "{mode}" for {_names(names)})')
            break
    offered = [text for name, text in _POLICIES.items() if name in policies and name != policy]
    if offered:
        ways.append(f"under [scheduler], {' or '.join(offered)}")
    if not ways:
        ways.append("run the two kinds on different hosts")
    return _capital("; or ".join(ways)) + "."


_POLICIES: Final[Mapping[str, str]] = {
    "partition": 'policy = "partition" gives each kind host CPUs of its own',
    "batch": 'policy = "batch" lets one kind run long before the other, so that they cross seldom',
}


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]
