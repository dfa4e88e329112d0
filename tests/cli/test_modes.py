"""`modes`, and --strict of `modes`, `check` and `host`, on hosts of the test's choice."""

from __future__ import annotations

import dataclasses
import json

import pytest
from click.testing import CliRunner

from mixvisor.cli import main as cli
from mixvisor.vm.conflicts import Evidence, Holder
from mixvisor.vm.host import HostFacts, KvmFacts

SOFT = '[[vm]]\nname = "soft"\nmode = "software"\nboot = { guest = "hello" }\n'
HARD = '[[vm]]\nname = "hard"\nmode = "hardware"\nboot = { guest = "hello" }\n'
FREE = '[[vm]]\nname = "free"\nboot = { guest = "hello" }\n'
VIRTUALBOX = Evidence(technology="vt-x", holders=(Holder(7, "VBoxHeadless", frozenset({"/dev/vboxdrv"})),))


@pytest.fixture
def on(monkeypatch):
    """Choose the host: technology, why KVM cannot be used, what other hypervisors show."""
    real = HostFacts.read()

    def choose(technology, why="", evidence=None):
        kvm = KvmFacts("missing", None, why, "Make one.") if why else KvmFacts("usable", 12, "", "")
        facts = dataclasses.replace(real, technology=technology, kvm=kvm)
        monkeypatch.setattr(HostFacts, "read", lambda *_arguments: facts)
        monkeypatch.setattr("mixvisor.vm.hosts.rivals.look_for_rivals",
                            lambda *_a, **_k: evidence or Evidence(technology=technology))

    return choose


@pytest.fixture
def ask(tmp_path):
    def ask(*words, text=None):
        (tmp_path / "lab.toml").write_text(text or "")
        file = [str(tmp_path / "lab.toml")] if text is not None else []
        return CliRunner().invoke(cli._mixvisor, [*words, *file])
    return ask


def test_the_mode_the_rule_and_the_mode_not_taken_are_shown(on, ask):
    on("vt-x")
    result = ask("modes", text=SOFT + FREE)
    assert result.exit_code == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["soft", "software", "software", "explicit"] in [row[:4] for row in rows]
    assert ["free", "software", "software", "avoid-mixing"] in [row[:4] for row in rows]
    assert ["not", "hardware", "avoid-mixing", "it", "would", "mix", "the", "modes"] in rows


def test_in_json_every_vm_has_one_shape_refused_ones_too(on, ask):
    on("none", why="there is no /dev/kvm here")
    result = ask("modes", "-o", "json", text=SOFT + HARD)
    assert result.exit_code == 1
    data = json.loads(result.stdout)
    soft, hard = data["vms"]
    assert soft.keys() == hard.keys()
    assert (data["ok"], soft["mode"], hard["mode"], hard["rule"]) == (False, "software", None, "no-kvm")
    assert {other["mode"]: other["possible"] for other in hard["alternatives"]} == {"hardware": False, "software": True}
    assert hard["remedy"] == "Make one."


def test_a_file_without_vms_is_said_to_be_one(on, ask):
    on("vt-x")
    result = ask("modes", text="")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "nothing would run" in result.stderr


@pytest.mark.parametrize("command", ["modes", "check"])
@pytest.mark.parametrize(("technology", "text", "code"), [
    ("vt-x", SOFT + HARD, 8), ("vt-x", SOFT + FREE, 0), ("amd-v", SOFT + HARD, 0)])
def test_under_strict_mixing_on_vt_x_is_an_exit_code_and_a_note_is_none(on, ask, command, technology, text, code):
    on(technology)
    assert ask(command, "--strict", text=text).exit_code == code
    assert ask(command, text=text).exit_code == 0


@pytest.mark.parametrize("command", ["modes", "check"])
def test_a_dangerous_hypervisor_is_told_before_a_hardware_vm_meets_it(on, ask, command):
    on("vt-x", evidence=VIRTUALBOX)
    result = ask(command, "--strict", "-o", "json", text=HARD)
    assert result.exit_code == 8
    (warning,) = json.loads(result.stdout)["warnings"]
    assert (warning["code"], warning["severity"], warning["link"]) == (
        "virtualbox-vms", "critical", "docs/warnings.md#virtualbox-vms")
    assert json.loads(ask(command, "-o", "json", text=SOFT).stdout)["warnings"] == []


@pytest.mark.parametrize(("technology", "why", "evidence", "codes", "exit_code"), [
    ("vt-x", "", None, [], 0), ("none", "nothing there", None, [], 0),
    ("vt-x", "the module is not loaded", None, ["kvm-unusable"], 8),
    ("vt-x", "", VIRTUALBOX, ["virtualbox-vms"], 8),
])
def test_host_under_strict_warns_of_what_keeps_hardware_vms_from_running(
        on, ask, technology, why, evidence, codes, exit_code):
    on(technology, why, evidence)
    result = ask("host", "--strict", "-o", "json")
    assert result.exit_code == exit_code
    assert [warning["code"] for warning in json.loads(result.stdout)["warnings"]] == codes


def test_host_names_other_hypervisors_in_plain_words_or_says_that_there_is_none(on, ask):
    on("vt-x")
    assert "Other hypervisors" in (quiet := ask("host").stdout)
    assert "none was seen" in quiet
    on("vt-x", evidence=VIRTUALBOX)
    assert "VBoxHeadless, pid 7" in " ".join(ask("host").stdout.split())
