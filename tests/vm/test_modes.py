"""The manual's rules and the plan for the whole set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixvisor.config.model import VmConfig
from mixvisor.vm.modes import (
    ENGINE_LIMITS,
    RULES,
    EngineLimit,
    Mode,
    ModeDecision,
    ModeHost,
    ModeRefusal,
    guest_system,
    plan,
    rules_table,
)
from mixvisor.vm.worker.status import VCPUS_MAX

VTX = ModeHost("vt-x", True)
AMDV = ModeHost("amd-v", True)
PVM = ModeHost("pvm", True)
NONE = ModeHost("none", False, "this host's CPU offers no hardware virtualization", "Enable it.")
LOCKED = ModeHost("vt-x", False, "this user may not open /dev/kvm", "Join the group kvm.")
OLD = ModeHost("vt-x", True, long_mode=False)
SMT = ModeHost("vt-x", True, cores=((0, 4), (1, 5), (2, 6), (3, 7)))
HOSTS = (VTX, AMDV, PVM, NONE, LOCKED, OLD, SMT)
BIG = {"kvm": EngineLimit(8, frozenset({"x86"}), "the kvm engine runs eight vCPUs"),
       "software": EngineLimit(4, frozenset({"x86", "arm"}), "the software engine runs four vCPUs")}


def vm(name: str = "a", **keys: Any) -> VmConfig:
    return VmConfig.model_validate({"name": name, "boot": {"disk": "x"}, **keys})


def decided(host: ModeHost, *vms: VmConfig) -> dict[str, tuple[str, str]]:
    return {name: (answer.mode if isinstance(answer, ModeDecision) else "refused", answer.rule)
            for name, answer in plan(vms, host).items()}


def one(host: ModeHost, **keys: Any) -> ModeDecision | ModeRefusal:
    return plan([vm(**keys)], host)["a"]


@pytest.mark.parametrize(("keys", "rule"), [
    ({"bits": 64}, "64-bit"),
    ({"os": "OpenBSD"}, "guest-system"),
    ({"memory": "3584M"}, "default"),
    ({"memory": "3588M"}, "memory"),
])
def test_what_needs_hardware_gets_it_with_the_rule_that_says_so(
        keys: dict[str, Any], rule: str) -> None:
    assert decided(VTX, vm(**keys)) == {"a": ("hardware", rule)}


def test_without_hardware_a_guest_that_needs_it_is_refused_with_the_remedy() -> None:
    answer = one(LOCKED, bits=64)
    assert isinstance(answer, ModeRefusal)
    assert answer.rule == "no-kvm"
    assert "this user may not open /dev/kvm" in answer.reason
    assert "Join the group kvm" in answer.remedy
    assert "fallback = true" in answer.remedy


def test_a_fallback_happens_only_where_the_file_allows_it_and_is_shown() -> None:
    assert decided(NONE, vm(bits=64, fallback=True)) == {"a": ("software", "fallback")}
    assert decided(VTX, vm(bits=64, fallback=True)) == {"a": ("hardware", "64-bit")}
    # fallback is a word about auto: an explicit hardware is never bent.
    assert decided(NONE, vm(mode="hardware", fallback=True)) == {"a": ("refused", "no-kvm")}


@pytest.mark.parametrize("host", HOSTS, ids=lambda host: f"{host.technology}-{host.kvm_usable}")
def test_what_the_file_says_is_done_or_refused_and_never_bent(host: ModeHost) -> None:
    for keys in ({"mode": "hardware"}, {"engine": "kvm"}):
        answer = one(host, **keys)
        assert isinstance(answer, ModeRefusal) == (not host.hardware)
        assert isinstance(answer, ModeRefusal) or answer.mode == "hardware"
    for keys in ({"mode": "software"}, {"engine": "software"}, {"mode": "software", "bits": 64}):
        answer = one(host, **keys)
        assert isinstance(answer, ModeDecision)
        assert (answer.mode, answer.engine) == ("software", "software")


def test_explicit_software_against_the_manual_is_a_note_and_no_error() -> None:
    answer = one(VTX, mode="software", bits=64, os="qnx")
    assert isinstance(answer, ModeDecision)
    assert answer.rule == "explicit"
    assert len(answer.notes) == 2
    assert "64-bit" in answer.notes[0]
    assert "QNX" in answer.notes[1]
    plain = one(VTX, mode="software", os="dos")
    assert isinstance(plain, ModeDecision)
    assert plain.notes == ()


def test_an_engine_that_contradicts_the_mode_is_refused() -> None:
    assert decided(VTX, vm(mode="software", engine="kvm")) == {"a": ("refused", "contradiction")}


@pytest.mark.parametrize(("mode", "vcpus", "limit", "remedy"), [
    ("software", 2, "one vCPU", "Write vcpus = 1."), ("hardware", 17, "at most 16 vCPUs", "Write vcpus = 16 or less."),
    ("auto", 17, "at most 16 vCPUs", "Write vcpus = 16 or less.")])
def test_more_vcpus_than_an_engine_runs_are_refused_with_its_limit(
        mode: str, vcpus: int, limit: str, remedy: str) -> None:
    answer = one(VTX, mode=mode, vcpus=vcpus)
    assert isinstance(answer, ModeRefusal)
    assert answer.rule == "engine-limit"
    assert limit in answer.reason
    assert answer.remedy == remedy


def test_the_kvm_engine_is_said_to_run_as_many_vcpus_as_a_worker_does() -> None:
    assert ENGINE_LIMITS["kvm"].vcpus == VCPUS_MAX


@pytest.mark.parametrize("mode", ["auto", "software", "hardware"])
def test_a_foreign_architecture_is_refused_while_no_engine_has_it(mode: str) -> None:
    answer = one(VTX, mode=mode, arch="aarch64")
    assert isinstance(answer, ModeRefusal)
    assert answer.rule == "foreign-arch"
    assert "aarch64" in answer.reason


# ---- the whole set ---------------------------------------------------------------------------

@pytest.mark.parametrize("host", [VTX, AMDV, PVM], ids=lambda host: host.technology)
@pytest.mark.parametrize("mode", ["software", "hardware"])
def test_a_flexible_guest_takes_the_mode_the_others_are_bound_to(
        host: ModeHost, mode: str) -> None:
    assert decided(host, vm("bound", mode=mode), vm("free")) == {
        "bound": (mode, "explicit"), "free": (mode, "avoid-mixing")}


def test_where_nothing_binds_hardware_is_taken_except_under_pvm() -> None:
    assert decided(VTX, vm())["a"] == ("hardware", "default")
    assert decided(AMDV, vm())["a"] == ("hardware", "default")
    assert decided(PVM, vm())["a"] == ("software", "default")
    assert decided(NONE, vm())["a"] == ("software", "no-hardware")


def test_a_refused_vm_binds_nobody() -> None:
    assert decided(VTX, vm("no", mode="software", vcpus=2), vm("free"))["free"] == (
        "hardware", "default")


def any_vm(name: str) -> st.SearchStrategy[VmConfig]:
    return st.builds(
        lambda **keys: vm(name, **keys),
        mode=st.sampled_from(["auto", "auto", "software", "hardware"]),
        engine=st.sampled_from(["auto", "auto", "kvm", "software"]),
        fallback=st.booleans(), bits=st.sampled_from([16, 32, 64]),
        vcpus=st.sampled_from([1, 1, 2]), arch=st.sampled_from(["x86", "x86", "arm"]),
        cpus=st.sampled_from([None, None, "0", "1", "2", "4", "0,1", "5", "9"]),
        os=st.sampled_from(["dos", "windows-10", "OS/2 Warp 4"]))


SETS = st.integers(1, 5).flatmap(
    lambda count: st.tuples(*(any_vm(f"v{index}") for index in range(count))))


@given(SETS, st.sampled_from(HOSTS), st.randoms())
def test_a_plan_does_not_depend_on_the_order_of_the_vms(
        vms: tuple[VmConfig, ...], host: ModeHost, random: Any) -> None:
    shuffled = list(vms)
    random.shuffle(shuffled)
    assert plan(shuffled, host) == plan(vms, host)


@given(SETS, st.sampled_from(HOSTS))
def test_every_vm_gets_an_answer_that_it_and_the_host_can_live_with(
        vms: tuple[VmConfig, ...], host: ModeHost) -> None:
    answers = plan(vms, host)
    assert list(answers) == [vm.name for vm in vms]
    for member in vms:
        answer = answers[member.name]
        assert answer.rule in RULES
        assert answer.reason.endswith(".")
        if isinstance(answer, ModeRefusal):
            assert answer.remedy.endswith(".")
            continue
        assert member.mode in ("auto", answer.mode)
        assert member.engine in ("auto", answer.engine)
        assert host.hardware or answer.mode == "software"
        assert member.vcpus <= ENGINE_LIMITS[answer.engine].vcpus
        assert member.arch in ENGINE_LIMITS[answer.engine].architectures
        if answer.rule == "fallback":
            assert member.fallback


# ---- against brute force ---------------------------------------------------------------------

def may_run_in(member: VmConfig, host: ModeHost, limits: Any) -> set[Mode]:
    """The modes that the issue's rules leave to a VM, said once more and in another way."""
    def able(mode: Mode) -> bool:
        limit = limits["kvm" if mode == "hardware" else "software"]
        has = mode == "software" or (host.hardware and (host.long_mode or member.bits != 64))
        return has and member.vcpus <= limit.vcpus and member.arch in limit.architectures

    both: tuple[Mode, Mode] = ("hardware", "software")
    modes = {mode for mode in both if able(mode)}
    named = {"kvm": "hardware", "software": "software"}.get(member.engine, member.mode)
    if member.mode not in ("auto", named):
        return set()
    if named != "auto":
        return modes & {named}                                    # type: ignore[arg-type]
    needs = member.arch == "x86" and (
        member.bits == 64 or member.vcpus > 1 or guest_system(member.os) is not None)
    if needs and "hardware" in modes:
        return {"hardware"}
    return modes if not needs or member.fallback else set()


def mixed(modes: Iterable[str]) -> bool:
    return len(set(modes)) > 1


def groups(vms: Sequence[VmConfig], host: ModeHost) -> list[set[str]]:
    """Names of VMs that can meet on a core, directly or by way of others: by flooding."""
    core = {cpu: index for index, threads in enumerate(host.cores) for cpu in threads}
    reach = {vm.name: None if vm.cpus is None else {core.get(cpu, -cpu) for cpu in vm.cpus} for vm in vms}

    def meet(a: set[int] | None, b: set[int] | None) -> bool:
        return a is None or b is None or bool(a & b)

    left, found = {vm.name for vm in vms}, []
    while left:
        group = {left.pop()}
        while more := {name for name in left if any(meet(reach[name], reach[own]) for own in group)}:
            group |= more
            left -= more
        found.append(group)
    return found


@pytest.mark.parametrize("limits", [ENGINE_LIMITS, BIG], ids=["these-engines", "bigger-engines"])
@given(vms=SETS, host=st.sampled_from(HOSTS))
def test_auto_never_mixes_where_a_plan_without_mixing_exists(
        limits: Any, vms: tuple[VmConfig, ...], host: ModeHost) -> None:
    answers = plan(vms, host, limits)
    free = {member.name: may_run_in(member, host, limits) for member in vms}
    running = [member for member in vms if free[member.name]]
    chosen = {name: answer.mode for name, answer in answers.items() if isinstance(answer, ModeDecision)}
    assert set(chosen) == {member.name for member in running}
    assert all(mode in free[name] for name, mode in chosen.items())
    every = [dict(zip(chosen, modes, strict=True)) for modes in product(*(sorted(free[name]) for name in chosen))]
    least = min((mixed(assignment.values()) for assignment in every), default=False)
    assert mixed(chosen.values()) == least
    if least:
        for group in groups(running, host):
            best = min(mixed(assignment[name] for name in group) for assignment in every)
            assert mixed(chosen[name] for name in group) == best


@given(SETS, st.sampled_from(HOSTS))
def test_every_vm_carries_the_mode_it_did_not_get_and_why(
        vms: tuple[VmConfig, ...], host: ModeHost) -> None:
    for member in vms:
        answer = plan(vms, host)[member.name]
        if isinstance(answer, ModeRefusal):
            assert answer.rule == "contradiction" or {a.mode for a in answer.alternatives} == {"hardware", "software"}
        else:
            (other,) = answer.alternatives
            assert other.mode != answer.mode
        for other in answer.alternatives:
            assert other.rule in RULES
            assert other.why
            assert not other.why.endswith(".")
            if other.possible:        # writing that mode into the file would be honoured
                honoured = one_of(member, host, other.mode)
                assert isinstance(honoured, ModeDecision)


def one_of(member: VmConfig, host: ModeHost, mode: Mode) -> ModeDecision | ModeRefusal:
    return plan([member.model_copy(update={"mode": mode, "engine": "auto"})], host)[member.name]


def test_where_modes_mix_already_a_flexible_guest_follows_the_vms_it_can_meet() -> None:
    vms = [vm("soft", mode="software", cpus="1"), vm("hard", mode="hardware", cpus="2"),
           vm("beside-soft", cpus="5"), vm("beside-hard", cpus="2,6"), vm("alone", cpus="3"), ]
    assert decided(SMT, *vms) == {
        "soft": ("software", "explicit"), "hard": ("hardware", "explicit"),
        "beside-soft": ("software", "avoid-mixing"), "beside-hard": ("hardware", "avoid-mixing"),
        "alone": ("hardware", "default")}
    assert decided(SMT, *vms, vm("anywhere"))["beside-soft"] == ("hardware", "default")


def test_a_32_bit_host_runs_64_bit_guests_in_software_only() -> None:
    assert decided(OLD, vm(bits=64)) == {"a": ("refused", "host-32-bit")}
    assert decided(OLD, vm(bits=64, mode="hardware")) == {"a": ("refused", "host-32-bit")}
    assert decided(OLD, vm(bits=64, fallback=True)) == {"a": ("software", "fallback")}
    assert decided(OLD, vm(bits=32)) == {"a": ("hardware", "default")}


def test_an_engine_that_can_do_more_gets_what_only_it_can_do() -> None:
    def asked(**keys: Any) -> tuple[str, str]:
        answer = plan([vm(**keys)], VTX, BIG)["a"]
        return (answer.mode if isinstance(answer, ModeDecision) else "refused", answer.rule)

    assert asked(arch="arm") == ("software", "foreign-arch")
    assert asked(arch="arm", bits=64) == ("software", "foreign-arch")
    assert asked(arch="arm", mode="hardware") == ("refused", "foreign-arch")
    assert asked(vcpus=4) == ("hardware", "smp")
    assert asked(vcpus=4, mode="software") == ("software", "explicit")
    assert asked(vcpus=8, mode="software") == ("refused", "engine-limit")
    assert asked(vcpus=9) == ("refused", "engine-limit")


# ---- guest systems ---------------------------------------------------------------------------

@pytest.mark.parametrize(("name", "system"), [
    ("OS2Warp45", "OS/2"), ("os/2 warp 4", "OS/2"), ("OS2eCS", "OS/2"), ("ArcaOS", "OS/2"),
    ("eComStation", "OS/2"), ("os2", "OS/2"), ("os/2 2.1", "OS/2"),
    ("Windows8", "Windows 8 or later"), ("Windows8_64", "Windows 8 or later"),
    ("windows-8.1", "Windows 8 or later"), ("Windows81", "Windows 8 or later"),
    ("windows 10", "Windows 8 or later"), ("Windows11_64", "Windows 8 or later"),
    ("Windows2012_64", "Windows 8 or later"), ("windows server 2022", "Windows 8 or later"),
    ("openbsd", "OpenBSD"), ("OpenBSD_64", "OpenBSD"), ("NetWare", "NetWare"), ("QNX", "QNX"),
    ("MacOS", "Mac OS X"), ("mac os x", "Mac OS X"), ("JRockitVE", "JRockit VE"),
])
def test_a_listed_system_is_known_however_it_is_written(name: str, system: str) -> None:
    assert guest_system(name) == system


@pytest.mark.parametrize("name", [
    "other", "dos", "freedos", "linux", "OS21x", "os/2 1.3", "windows-95", "windows 98",
    "Windows 1.0", "windows 3.11", "windows-2000", "windows xp", "windows7", "Windows7_64",
    "windows vista", "freebsd", "netbsd", "windows 2008", "minix", "",
])
def test_what_is_not_listed_needs_no_hardware(name: str) -> None:
    assert guest_system(name) is None


def test_the_table_of_rules_has_every_rule() -> None:
    table = rules_table()
    assert all(f"`{code}`" in table for code in RULES)
