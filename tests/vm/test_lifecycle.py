"""A VM's life is a table: every phase is in it, and an illegal move changes nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixvisor.metrics.snapshot import STATES
from mixvisor.vm.lifecycle import (
    ALIVE,
    BACKOFF_MAX_S,
    BACKOFF_RESET_S,
    ENDED,
    TRANSITIONS,
    IllegalMove,
    Phase,
    Signal,
    allowed,
    decide_restart,
    diagram,
    ending_signal,
    move,
)

PHASES = st.sampled_from(list(Phase))
SIGNALS = st.sampled_from(list(Signal))
ENDINGS = (Signal.ENDED_STOPPED, Signal.ENDED_CRASHED, Signal.START_FAILED)


def test_every_phase_has_a_row_and_is_a_state_of_the_metrics() -> None:
    assert list(TRANSITIONS) == list(Phase)
    assert tuple(phase.value for phase in Phase) == STATES


def test_a_phase_is_alive_or_ended_or_not_begun() -> None:
    assert ALIVE.isdisjoint(ENDED)
    assert set(Phase) - ALIVE - ENDED == {Phase.DEFINED}


def test_a_life_from_start_to_stop() -> None:
    phase = Phase.DEFINED
    seen = [phase := move("dos", phase, signal) for signal in (
        Signal.START, Signal.STARTED, Signal.PAUSE, Signal.RESUME, Signal.STOP,
        Signal.ENDED_STOPPED, Signal.START)]
    assert seen == [Phase.STARTING, Phase.RUNNING, Phase.PAUSED, Phase.RUNNING, Phase.STOPPING,
                    Phase.STOPPED, Phase.STARTING]


@given(PHASES, SIGNALS)
def test_a_move_follows_the_table_or_raises_with_what_is_allowed(
        phase: Phase, signal: Signal) -> None:
    if signal in TRANSITIONS[phase]:
        assert move("dos", phase, signal) is TRANSITIONS[phase][signal]
        return
    with pytest.raises(IllegalMove) as caught:
        move("dos", phase, signal)
    error = caught.value
    assert (error.vm, error.phase, error.signal) == ("dos", phase, signal)
    assert set(error.allowed) == set(TRANSITIONS[phase]) == set(allowed(phase))
    assert f"dos is {phase.value}" in str(error)


def test_a_refusal_names_the_requests_that_are_possible_and_no_reports() -> None:
    with pytest.raises(IllegalMove, match=r"dos is running: resume is not possible; possible now: "
                                          r"pause, stop, kill$"):
        move("dos", Phase.RUNNING, Signal.RESUME)


@pytest.mark.parametrize("phase", sorted(ALIVE, key=lambda phase: phase.value))
@pytest.mark.parametrize("signal", ENDINGS)
def test_an_ending_may_arrive_at_any_time_of_a_life(phase: Phase, signal: Signal) -> None:
    assert move("dos", phase, signal) in ENDED


@pytest.mark.parametrize("phase", sorted(ALIVE, key=lambda phase: phase.value))
def test_whatever_lives_can_be_stopped_and_killed(phase: Phase) -> None:
    assert move("dos", phase, Signal.STOP) is Phase.STOPPING
    assert move("dos", phase, Signal.KILL) is Phase.STOPPING


def test_a_worker_that_starts_after_the_stop_was_asked_for_is_still_stopping() -> None:
    phase = move("dos", Phase.STARTING, Signal.STOP)
    assert move("dos", phase, Signal.STARTED) is Phase.STOPPING


def test_every_fate_of_a_worker_has_a_signal_to_an_end() -> None:
    assert {fate: move("dos", Phase.STARTING, ending_signal(fate))
            for fate in ("stopped", "crashed", "failed")} == {
        "stopped": Phase.STOPPED, "crashed": Phase.CRASHED, "failed": Phase.FAILED}


def test_every_phase_can_be_reached_and_the_diagram_shows_every_move() -> None:
    reached = {Phase.DEFINED}
    for _ in Phase:
        reached |= {target for phase in reached for target in TRANSITIONS[phase].values()}
    assert reached == set(Phase)
    text = diagram()
    assert text.startswith("stateDiagram-v2\n")
    for phase, row in TRANSITIONS.items():
        for signal, target in row.items():
            arrows = [line for line in text.splitlines()
                      if line.strip().startswith(f"{phase.value} --> {target.value}:")]
            assert len(arrows) == 1
            assert signal.value in arrows[0].split(": ", 1)[1].split(", ")


# ---- restarts --------------------------------------------------------------------------------

@pytest.mark.parametrize(("policy", "comes_back"), [
    ("no", set()),
    ("on-failure", {Phase.CRASHED, Phase.FAILED}),
    ("always", {Phase.STOPPED, Phase.CRASHED, Phase.FAILED}),
])
def test_the_policy_says_after_which_ends_a_vm_comes_back(
        policy: str, comes_back: set[Phase]) -> None:
    assert {phase for phase in ENDED if decide_restart(
        policy, phase, asked=False, attempts=0, ran_s=1)} == comes_back  # type: ignore[arg-type]


@given(st.sampled_from(sorted(ENDED, key=lambda phase: phase.value)), st.integers(0, 99))
def test_what_was_asked_to_end_never_comes_back_by_itself(phase: Phase, attempts: int) -> None:
    assert decide_restart("always", phase, asked=True, attempts=attempts, ran_s=0) is None


def test_delays_double_up_to_a_minute_and_begin_anew_after_a_long_run() -> None:
    delays: list[float] = []
    attempts = 0
    for _ in range(8):
        restart = decide_restart("always", Phase.CRASHED, asked=False, attempts=attempts, ran_s=1)
        assert restart is not None
        delays.append(restart.delay_s)
        attempts = restart.attempts
    assert delays == [1, 2, 4, 8, 16, 32, 60, 60]
    fresh = decide_restart(
        "always", Phase.CRASHED, asked=False, attempts=attempts, ran_s=BACKOFF_RESET_S)
    assert fresh is not None
    assert (fresh.delay_s, fresh.attempts) == (1, 1)


@given(st.integers(0, 10**9), st.floats(0, 1e9))
def test_a_delay_is_bounded_whatever_happened(attempts: int, ran_s: float) -> None:
    restart = decide_restart("always", Phase.CRASHED, asked=False, attempts=attempts, ran_s=ran_s)
    assert restart is not None
    assert 1 <= restart.delay_s <= BACKOFF_MAX_S


@pytest.mark.parametrize("phase", sorted(set(Phase) - ENDED, key=lambda phase: phase.value))
def test_a_restart_is_no_question_before_the_end(phase: Phase) -> None:
    with pytest.raises(ValueError, match="decided when a VM has ended"):
        decide_restart("always", phase, asked=False, attempts=0, ran_s=0)
