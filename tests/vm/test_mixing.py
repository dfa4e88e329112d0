"""What is said while modes mix: worded by the host, weighed by where they meet."""

from __future__ import annotations

from typing import Any

import pytest

from mixvisor.config.model import VmConfig
from mixvisor.vm.mixing import MIXED_CODES, MeasuredCost, mixing_warnings
from mixvisor.vm.modes import ModeDecision, ModeHost, plan

TWO: dict[str, Any] = {"s": "software", "h": "hardware"}
CORES = ((0, 2), (1, 3))


def said(**keys: Any) -> dict[str, Any]:
    return {warning.code: warning for warning in mixing_warnings(TWO, keys.pop("technology", "vt-x"), **keys)}


def test_one_mode_alone_is_no_reason_to_warn() -> None:
    for running in ({}, {"a": "software"}, {"a": "hardware", "b": "hardware"}):
        assert mixing_warnings(running, "vt-x", where={"a": [0], "b": [0]}) == ()


@pytest.mark.parametrize(("technology", "severity", "words"), [
    ("vt-x", "warning", "penalty"), ("amd-v", "info", "does not apply"), ("pvm", "info", "says nothing"),
    ("none", "info", "no hardware virtualization"),
])
def test_mixing_is_worded_by_what_the_host_is(technology: Any, severity: str, words: str) -> None:
    (warning,) = mixing_warnings(TWO, technology)
    assert (warning.code, warning.severity, warning.weight) == ("mixed-modes", severity, "light")
    assert words in warning.message
    assert warning.vms == ("s", "h")


@pytest.mark.parametrize(("where", "codes"), [
    ({}, ["mixed-modes"]),
    ({"s": [0], "h": [1]}, ["mixed-modes"]),
    ({"s": [0], "h": [2]}, ["mixed-modes", "mixed-modes-core"]),
    ({"s": [0], "h": [0]}, ["mixed-modes", "mixed-modes-cpu"]),
    ({"s": [0], "h": [0, 2]}, ["mixed-modes", "mixed-modes-core", "mixed-modes-cpu"]),
    ({"s": [0, 2], "h": [1, 3]}, ["mixed-modes"]),
])
def test_on_vt_x_each_place_where_they_meet_has_a_warning_of_its_own(where: Any, codes: list[str]) -> None:
    warnings = said(where=where, cores=CORES)
    assert list(warnings) == codes
    assert set(codes) <= set(MIXED_CODES)
    weights = {"mixed-modes": "light", "mixed-modes-core": "medium", "mixed-modes-cpu": "heavy"}
    assert {code: warning.weight for code, warning in warnings.items()} == {code: weights[code] for code in codes}
    assert all(warning.severity == "warning" for warning in warnings.values())


def test_a_warning_names_the_cpus_and_only_the_vms_that_meet_there() -> None:
    running: dict[str, Any] = {"s": "software", "h": "hardware", "far": "hardware"}
    warnings = {w.code: w for w in mixing_warnings(running, "vt-x", where={"s": [1], "h": [1], "far": [0]})}
    assert "(CPU 1)" in warnings["mixed-modes-cpu"].message
    assert set(warnings["mixed-modes-cpu"].vms) == {"s", "h"}
    assert set(warnings["mixed-modes"].vms) == {"s", "h", "far"}


@pytest.mark.parametrize("technology", ["amd-v", "pvm"])
def test_where_the_book_does_not_warn_one_note_names_the_place(technology: Any) -> None:
    warnings = said(technology=technology, where={"s": [1], "h": [1]}, cores=CORES)
    assert list(warnings) == ["mixed-modes"]
    assert "by turns on the same host CPU (CPU 1)" in warnings["mixed-modes"].message


def test_the_measured_cost_is_said_with_its_bounds_and_inconclusive_is_called_so() -> None:
    for technology in ("vt-x", "amd-v", "pvm"):
        text = said(technology=technology, cost=MeasuredCost(3.1e-6, 2.4e-6, 3.9e-6))["mixed-modes"].message
        assert "a crossing costs 3.1 µs (95 % interval 2.4 to 3.9 µs)" in text
    text = said(cost=MeasuredCost(0.2e-6, -0.3e-6, 0.4e-6))["mixed-modes"].message
    assert "inconclusive" in text
    assert "costs 0.2" not in text


def decisions(host: ModeHost, **vms: dict[str, Any]) -> dict[str, ModeDecision]:
    members = [VmConfig.model_validate({"name": name, "boot": {"disk": "x"}, **keys}) for name, keys in vms.items()]
    return {name: answer for name, answer in plan(members, host).items() if isinstance(answer, ModeDecision)}


def test_the_advice_is_the_change_of_mode_that_is_possible() -> None:
    made = decisions(ModeHost("vt-x", True), s={"mode": "software"}, h={"bits": 64})
    assert 'All VMs can run in hardware mode (mode = "hardware" for s)' in said(decisions=made)["mixed-modes"].advice
    narrow = ModeHost("vt-x", True, long_mode=False)
    made = decisions(narrow, s={"mode": "software", "bits": 64}, h={"mode": "hardware"})
    assert 'All VMs can run in software mode (mode = "software" for h)' in said(decisions=made)["mixed-modes"].advice


def test_the_advice_names_only_policies_that_there_are_and_not_the_one_in_force() -> None:
    assert "policy" not in said()["mixed-modes"].advice
    assert "different hosts" in said()["mixed-modes"].advice
    both = said(policies=("fair", "batch", "partition"), policy="batch")["mixed-modes"].advice
    assert 'policy = "partition"' in both
    assert 'policy = "batch"' not in both


def test_a_hundred_vms_are_not_all_named_in_a_sentence() -> None:
    running: dict[str, Any] = {f"v{n:03}": "software" if n % 2 else "hardware" for n in range(100)}
    (warning,) = mixing_warnings(running, "vt-x")
    assert "and 42 more" in warning.message
    assert len(warning.vms) == 100


@pytest.mark.parametrize("technology", ["amd-v", "pvm"])
def test_where_a_price_was_measured_what_avoids_it_is_named_whatever_the_book_says(technology: Any) -> None:
    made = decisions(ModeHost(technology, True), s={"mode": "software"}, h={"bits": 64})
    policies = ("fair", "batch", "partition")
    dear = said(technology=technology, cost=MeasuredCost(16e-6, 15e-6, 17e-6), decisions=made, policies=policies,
                policy="fair")["mixed-modes"].advice
    for part in ('mode = "hardware" for s', 'policy = "partition"', 'policy = "batch"'):
        assert part in dear
    for cheap in (MeasuredCost(0.1e-6, -0.3e-6, 0.4e-6, none=True), MeasuredCost(-5e-6, -6e-6, -4e-6)):
        text = said(technology=technology, cost=cheap, decisions=made, policies=policies)["mixed-modes"].advice
        assert "policy" not in text


def test_how_it_was_measured_is_said_and_no_cost_is_called_so() -> None:
    text = said(cost=MeasuredCost(0.1e-6, -0.3e-6, 0.4e-6, none=True, how="while these VMs run"))["mixed-modes"].message
    assert "Measured on this host, while these VMs run: no cost of a crossing was found" in text
