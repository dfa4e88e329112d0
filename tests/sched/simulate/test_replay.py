"""What run queues were told, told again: the same answers, for every policy and whatever the VMs do."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixvisor.sched.policy import POLICIES
from mixvisor.sched.simulate import ReplayError, Simulation, replay

from .test_simulation import VM, scenario

DISPATCHING = sorted(name for name, policy in POLICIES.items() if policy.dispatches)


def recorded(vms: list[dict[str, Any]], cpus: int, policy: str, seconds: float) -> list[str]:
    lines: list[str] = []
    simulation = Simulation(scenario(vms, cpus), policy, inputs=lines.append)
    simulation.run(seconds)
    simulation.close()
    return lines


@given(st.lists(VM, min_size=1, max_size=4), st.integers(1, 3), st.sampled_from(DISPATCHING))
@settings(max_examples=20, deadline=None)
def test_replayed_decisions_are_the_recorded_ones(vms: list[dict[str, Any]], cpus: int, policy: str) -> None:
    lines = recorded(vms, cpus, policy, 0.3)
    found = replay(lines)
    assert found.differing == 0, found.first
    assert found.decisions >= 30
    assert (found.policy, found.calls) == (policy, len(lines) - 1)


def test_recording_changes_nothing() -> None:
    def result(**more: Any) -> object:
        simulation = Simulation(scenario([{"count": 3}, {"behaviour": "io", "mode": "hardware"}], 2), "batch", **more)
        found = simulation.run(0.5).result()
        simulation.close()
        return found

    assert result() == result(inputs=lambda line: None)


def test_another_policy_decides_otherwise_and_that_is_said() -> None:
    lines = recorded([{"count": 2}, {"count": 2, "mode": "hardware"}], 1, "fair", 0.3)
    head = {**json.loads(lines[0]), "policy": "batch"}
    found = replay([json.dumps(head), *lines[1:]])
    assert found.differing > 0
    assert found.first[0].call == "pick"


@pytest.mark.parametrize(("lines", "says"), [
    ([], "line 1 is not JSON"),
    (["{}"], "line 1 is not the head"),
    (["HEAD", "[]"], "line 2 is no call"),
    (["HEAD", '[0,"__init__",[],null]'], "line 2: a run queue has no call '__init__'"),
    (["HEAD", '[0,"pick",["x"],null]'], "line 2: pick takes 1 numbers"),
    (["HEAD", '[0,"pick",[],null]'], "line 2: pick takes 1 numbers"),
    (["HEAD", '[0,"charge",[7,1],null]'], "line 2: charge cannot be made: slot 7 is not on this run queue"),
    (["HEAD", '[0,"add",[0,NaN,0,0,0],null]'], "line 2: add cannot be made"),
])
def test_what_is_no_recording_is_refused_with_its_line(lines: list[str], says: str) -> None:
    head = recorded([{}], 1, "fair", 0.01)[0]
    with pytest.raises(ReplayError, match=says.replace("[", "\\[")):
        replay([line.replace("HEAD", head) for line in lines])


def test_settings_of_no_policy_are_refused() -> None:
    head = json.loads(recorded([{}], 1, "fair", 0.01)[0])
    for change, says in (({"policy": "lottery"}, "unknown policy 'lottery'"), ({"slice_ns": 0}, "cannot be used"),
                         ({"batching": {"x": 1}}, "cannot be used")):
        with pytest.raises(ReplayError, match=says):
            replay([json.dumps({**head, **change})])
