"""What run queues were told, told again: the same answers, for every policy and whatever the VMs do."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixvisor.sched.policy import POLICIES, Order
from mixvisor.sched.policy.state import restore, state_of
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


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["charge", "sleep", "wake", "rate", "cap", "latency", "pick", "advance"]),
                          st.integers(0, 4), st.integers(1, 9_000_000)), max_size=120),
       st.sampled_from(["fair", "batch"]), st.integers(0, 100))
def test_a_queue_restored_from_its_state_answers_as_it_does_itself(
    steps: list[tuple[str, int, int]], policy: str, at: int,
) -> None:
    def do(queue: Any, step: tuple[str, int, int]) -> object:
        what, slot, number = step
        if what == "pick":
            return queue.pick(queue._current), [queue.lag_ns(s) for s in range(5)]
        if what == "advance":
            return queue.advance(number), queue.unpark_in_ns(), [queue.take_capped_ns(s) for s in range(5)]
        if what in ("sleep", "wake"):
            return getattr(queue, what)(slot), queue.barred_ns(slot)
        if what == "charge":
            return queue.charge(slot, number)
        if what == "latency":
            return queue.set_latency(slot, number % 3)
        return queue.set_rate(slot, number / 2e7) if what == "rate" else queue.set_cap(slot, number % 3 / 4)

    def empty() -> Any:
        return POLICIES[policy].runqueue(5_000_000, 500_000, None, Order(jitter_ns=1_000_000, seed=3))

    one = empty()
    for slot in range(5):
        one.add(slot, (slot + 1) / 15, 0, slot % 2, slot % 3)
    for step in steps[:at]:
        do(one, step)
    other = empty()
    restore(other, json.loads(json.dumps(state_of(one))))
    for step in steps[at:]:
        assert do(one, step) == do(other, step)
    assert state_of(one) == state_of(other)


@pytest.mark.parametrize(("state", "says"), [
    ({}, "needs a list of entries"), ({"entries": [1]}, "an entry is a table"),
    ({"entries": [{"slot": 1}]}, "must be a whole number"),
    (None, "state cannot be used"),
])
def test_a_state_that_no_queue_could_have_is_refused_with_its_line(state: object, says: str) -> None:
    head = recorded([{}], 1, "fair", 0.01)[0]
    begin = json.dumps([0, "begin", ["fair", 5_000_000, 0, {}, {}, state], None])
    with pytest.raises(ReplayError, match="line 2: .*" + says):
        replay([head, begin])


def test_what_follows_an_end_is_refused() -> None:
    head = recorded([{}], 1, "fair", 0.01)[0]
    with pytest.raises(ReplayError, match="line 3: pick after the end"):
        replay([head, '[0,"end",[],null]', '[0,"pick",[null],null]'])
