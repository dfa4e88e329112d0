"""`policy` and `set` as a person types them, against a service without VMs."""

from __future__ import annotations

import json

import pytest

from .test_commands import path, run, service  # noqa: F401 - fixtures


def test_the_policy_is_shown_and_changed(run, service):  # noqa: F811
    shown = run("policy").stdout
    assert "policy" in shown
    assert "fair" in shown
    answer = json.loads(run("policy", "batch", "mode_batch_us=40000", "mode_loss_max=0.5", "-o", "json").stdout)
    assert (answer["policy"], answer["mode_batch_us"], answer["mode_loss_max"]) == ("batch", 40_000, 0.5)
    assert json.loads(run("policy", "slice_us=10000", "-o", "json").stdout)["policy"] == "batch"
    assert service.scheduling.slice_us == 10_000


def test_parameters_are_shown_and_changed_all_or_none(run, service):  # noqa: F811
    assert "all" in run("set", "sw-one").stdout
    result = run("set", "sw-one", "weight=300", "cap=50", "cpus=1")
    assert result.exit_code == 0
    assert "300" in result.stdout
    refused = run("set", "sw-one", "weight=5", "cap=-1")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "sw-one stays as it is: cap: found -1, allowed: 0 to 102400" in refused.stderr
    assert service.parameters["sw-one"].weight == 300
    assert json.loads(run("set", "sw-one", "cpus=all", "-o", "json").stdout)["cpus"] is None


@pytest.mark.parametrize(("arguments", "code", "says"), [
    (("policy", "bach"), 2, 'did you mean "batch"?'),
    (("policy", "batch", "fair"), 2, "'fair' is no KEY=VALUE"),
    (("policy", "batch", "policy=fair"), 2, "policy is given twice"),
    (("policy", "slice_us=fast"), 2, 'found "fast", allowed: a whole number'),
    (("set", "sw-one", "weight"), 2, "'weight' is no KEY=VALUE, such as weight=300"),
    (("set", "sw-one", "weight="), 2, "is no KEY=VALUE"),
    (("set", "sw-one", "weight=1", "weight=2"), 2, "weight is given twice"),
    (("set", "sw-one", "memory=4M"), 2, "sw-one has no 'memory'"),
    (("set", "nobody", "weight=1"), 3, "there is no VM 'nobody'"),
])
def test_a_mistake_is_one_sentence_and_an_exit_code(run, service, arguments, code, says):  # noqa: F811
    result = run(*arguments)
    assert result.exit_code == code
    assert says in result.stderr
