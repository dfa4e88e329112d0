"""The manual's rules, the plan for the whole set, and the warning."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixvisor.config.model import VmConfig
from mixvisor.vm.modes import (
    ENGINE_LIMITS,
    RULES,
    ModeDecision,
    ModeHost,
    ModeRefusal,
    guest_system,
    mixing_warning,
    plan,
    rules_table,
)

VTX = ModeHost("vt-x", True)
AMDV = ModeHost("amd-v", True)
PVM = ModeHost("pvm", True)
NONE = ModeHost("none", False, "this host's CPU offers no hardware virtualization", "Enable it.")
LOCKED = ModeHost("vt-x", False, "this user may not open /dev/kvm", "Join the group kvm.")
HOSTS = (VTX, AMDV, PVM, NONE, LOCKED)


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


@pytest.mark.parametrize("mode", ["auto", "software", "hardware"])
def test_more_vcpus_than_an_engine_runs_are_refused_with_its_limit(mode: str) -> None:
    answer = one(VTX, mode=mode, vcpus=2)
    assert isinstance(answer, ModeRefusal)
    assert answer.rule == "engine-limit"
    assert "one vCPU" in answer.reason
    assert answer.remedy == "Write vcpus = 1."


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


@given(SETS, st.sampled_from(HOSTS))
def test_flexible_guests_never_cause_mixing(vms: tuple[VmConfig, ...], host: ModeHost) -> None:
    decisions = [answer for answer in plan(vms, host).values() if isinstance(answer, ModeDecision)]
    bound = {answer.mode for answer in decisions if answer.rule not in ("default", "avoid-mixing")}
    if len(bound) < 2:
        assert len({answer.mode for answer in decisions}) <= 1


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


# ---- the warning -----------------------------------------------------------------------------

def test_one_mode_alone_is_no_reason_to_warn() -> None:
    for running in ({}, {"a": "software"}, {"a": "hardware", "b": "hardware"}):
        assert mixing_warning(running, "vt-x") is None  # type: ignore[arg-type]


@pytest.mark.parametrize(("technology", "severity", "words"), [
    ("vt-x", "warning", "penalty"), ("amd-v", "info", "does not apply"),
    ("pvm", "info", "says nothing"),
])
def test_mixing_is_worded_by_what_the_host_is(technology: Any, severity: str, words: str) -> None:
    warning = mixing_warning({"s": "software", "h": "hardware"}, technology)
    assert warning is not None
    assert (warning.code, warning.severity) == ("mixed-modes", severity)
    assert words in warning.message
    assert warning.vms == ("s", "h")


def test_on_vt_x_the_advice_is_not_to_mix_where_performance_matters() -> None:
    warning = mixing_warning({"s": "software", "h": "hardware"}, "vt-x")
    assert warning is not None
    assert "do not mix" in warning.advice
