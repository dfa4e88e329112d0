"""`mode`, `save` and `restore` as a person types them, against a service without VMs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from .test_commands import path, run, service  # noqa: F401 - fixtures


def test_a_change_of_mode_says_how_long_the_guest_stood_still(run, service):  # noqa: F811
    assert run("mode", "sw-one", "hardware").stdout == "sw-one goes on in hardware mode; it stood still for 2.1 ms\n"
    assert run("mode", "sw-one", "hardware").stdout == "sw-one is in hardware mode already\n"
    assert json.loads(run("mode", "sw-two", "hardware", "-o", "json").stdout)["changed"] is True
    assert service.modes == {"sw-one": "hardware", "sw-two": "hardware"}


def test_a_file_is_named_from_where_the_person_is(run, service, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    assert "is saved to" in run("save", "sw-one", "one.mixvisor").stdout
    assert "3 MiB in 0.25 s; it goes on" in run("save", "sw-two", "--leave-running").stdout
    assert service.saved == [("sw-one", tmp_path / "one.mixvisor", False),
                             ("sw-two", Path("/var/lib/mixvisor/saved/sw-two.mixvisor"), True)]
    assert json.loads(run("save", "sw-one", "-o", "json").stdout)["bytes"] == 3 << 20


def test_a_saved_vm_is_restored_under_its_name_or_another(run, service):  # noqa: F811
    assert run("restore", "/x/sw-one.mixvisor").stdout.startswith(
        "sw-one goes on from /x/sw-one.mixvisor in software mode")
    assert json.loads(run("restore", "/x/a.mixvisor", "--name", "sw-two", "-o", "json").stdout)["name"] == "sw-two"


@pytest.mark.parametrize(("arguments", "code", "says"), [
    (("mode", "hw-four", "software"), 4, "hw-four stays in hardware mode"),
    (("mode", "nobody", "software"), 3, "there is no VM 'nobody'"),
    (("mode", "sw-one", "fast"), 2, "'fast' is not one of 'hardware', 'software'"),
    (("save", "nobody"), 3, "there is no VM 'nobody'"),
    (("restore", "/etc/passwd"), 1, "/etc/passwd is not a saved VM"),
    (("restore", os.sep), 2, "is a directory"),
])
def test_a_mistake_is_one_sentence_and_an_exit_code(run, service, arguments, code, says):  # noqa: F811
    result = run(*arguments)
    assert result.exit_code == code
    assert says in result.stderr
    assert result.stdout == ""
