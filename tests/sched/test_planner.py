"""The planner beside an event loop: what waits for it, and what does not."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import trio

from mixvisor.sched import planner
from mixvisor.sched.planner import OFFLOAD_FROM
from mixvisor.sched.policy import place
from mixvisor.sched.shared import NOBODY
from mixvisor.sched.simulate import Simulation

from .simulate.test_simulation import scenario


async def test_the_event_loop_goes_on_while_a_long_placement_is_sought(monkeypatch: pytest.MonkeyPatch) -> None:
    """The heartbeat is on it: a plan of half a second would have the guard give every VM back."""
    simulation = Simulation(scenario([{"count": OFFLOAD_FROM}], cpus=4), "fair")
    sought, found = threading.Event(), threading.Event()

    def slow(*arguments: Any, **named: Any) -> Any:
        sought.set()
        assert found.wait(30), "the event loop was kept waiting"
        return place(*arguments, **named)

    monkeypatch.setattr(planner, "place", slow)
    simulation._planner._offload = True          # simulations have no threads
    beats = 0
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(simulation._planner.plan)
            while not sought.is_set() or beats < 100:
                await trio.sleep(0.001)
                beats += sought.is_set()
            wants = simulation._table.column("want_cpu")
            assert set(wants) == {NOBODY}, "nothing is published before it is decided"
            found.set()
    assert NOBODY not in simulation._table.column("want_cpu")
    simulation.close()
