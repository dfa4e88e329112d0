"""The life of a VM: a table of phases and signals, and when a VM that ended comes back.

Theory.  A VM is in one phase at a time and moves only by a signal, and only where the table has
the pair. Signals are of two kinds: *requests* of a person or the service (START, PAUSE, RESUME,
STOP, KILL) and *reports* of what happened to the worker (STARTED, START_FAILED, ENDED_*). A
request that the phase does not allow is refused and changes nothing; a report must be allowed
wherever it can arrive, and reports race with requests: the "started" of a worker may be read
after somebody asked for a stop, and a guest may end while it is being paused. That is why
STOPPING takes STARTED, and every living phase every way to end.

    STOPPED   ended because it was asked to, or by itself in good order
    CRASHED   the guest did something that a PC would reset on, or its worker died under it
    FAILED    it could not be started

Invariants.  Every phase has a row. `Phase` values are the `state` label of the metrics, in the
order of a life. Nothing here reads a clock or knows a process: the restart decision gets how
long the VM ran and answers with a delay.

Units.  Seconds.

Poor at: there is no phase for a VM that hangs; a guest that spins is RUNNING.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

__all__ = [
    "ALIVE", "BACKOFF_MAX_S", "BACKOFF_RESET_S", "ENDED", "TRANSITIONS", "IllegalMove", "Phase",
    "Restart", "RestartPolicy", "Signal", "allowed", "decide_restart", "diagram", "ending_signal",
    "move",
]


class Phase(enum.Enum):
    """Where a VM is in its life."""

    DEFINED = "defined"        # in the configuration, never started
    STARTING = "starting"      # a worker is being made, no guest instruction has run
    RUNNING = "running"        # may be scheduled
    PAUSED = "paused"          # kept as it is, takes no CPU
    STOPPING = "stopping"      # asked to end
    STOPPED = "stopped"
    CRASHED = "crashed"
    FAILED = "failed"


class Signal(enum.Enum):
    """What moves a VM from phase to phase."""

    START = "start"                    # requests
    PAUSE = "pause"
    RESUME = "resume"
    STOP = "stop"
    KILL = "kill"
    STARTED = "started"                # reports
    START_FAILED = "start-failed"
    ENDED_STOPPED = "ended-stopped"
    ENDED_CRASHED = "ended-crashed"


_ENDINGS: Final[Mapping[Signal, Phase]] = {
    Signal.ENDED_STOPPED: Phase.STOPPED,
    Signal.ENDED_CRASHED: Phase.CRASHED,
}

TRANSITIONS: Final[Mapping[Phase, Mapping[Signal, Phase]]] = {
    Phase.DEFINED: {Signal.START: Phase.STARTING},
    Phase.STARTING: {
        Signal.STARTED: Phase.RUNNING,
        Signal.START_FAILED: Phase.FAILED,
        Signal.STOP: Phase.STOPPING,
        Signal.KILL: Phase.STOPPING,
        **_ENDINGS,                               # a short guest may end before it is seen to run
    },
    Phase.RUNNING: {
        Signal.PAUSE: Phase.PAUSED,
        Signal.STOP: Phase.STOPPING,
        Signal.KILL: Phase.STOPPING,
        Signal.START_FAILED: Phase.CRASHED,       # nonsense from a worker that has started
        **_ENDINGS,
    },
    Phase.PAUSED: {
        Signal.RESUME: Phase.RUNNING,
        Signal.STOP: Phase.STOPPING,
        Signal.KILL: Phase.STOPPING,
        Signal.START_FAILED: Phase.CRASHED,
        **_ENDINGS,
    },
    Phase.STOPPING: {
        Signal.STOP: Phase.STOPPING,              # asked twice: it is on its way
        Signal.KILL: Phase.STOPPING,              # the stop took too long for somebody
        Signal.STARTED: Phase.STOPPING,           # read late: the stop was asked for before
        Signal.START_FAILED: Phase.FAILED,
        **_ENDINGS,
    },
    Phase.STOPPED: {Signal.START: Phase.STARTING},
    Phase.CRASHED: {Signal.START: Phase.STARTING},
    Phase.FAILED: {Signal.START: Phase.STARTING},
}

ALIVE: Final = frozenset({Phase.STARTING, Phase.RUNNING, Phase.PAUSED, Phase.STOPPING})
ENDED: Final = frozenset({Phase.STOPPED, Phase.CRASHED, Phase.FAILED})


class IllegalMove(Exception):
    """A signal that the VM's phase does not allow; nothing was changed.

    `allowed` are the signals that the phase does allow, in the order of `Signal`.
    """

    def __init__(self, vm: str, phase: Phase, signal: Signal, allowed: tuple[Signal, ...]) -> None:
        self.vm = vm
        self.phase = phase
        self.signal = signal
        self.allowed = allowed
        requests = [item.value for item in allowed if item in _REQUESTS]
        possible = f"; possible now: {', '.join(requests)}" if requests else ""
        super().__init__(f"{vm} is {phase.value}: {signal.value} is not possible{possible}")


_REQUESTS: Final = frozenset(
    {Signal.START, Signal.PAUSE, Signal.RESUME, Signal.STOP, Signal.KILL})


def allowed(phase: Phase) -> tuple[Signal, ...]:
    """The signals that `phase` has a move for, in the order of `Signal`."""
    row = TRANSITIONS[phase]
    return tuple(signal for signal in Signal if signal in row)


def move(vm: str, phase: Phase, signal: Signal) -> Phase:
    """The phase after `signal`. Raises IllegalMove where the table has no such move."""
    try:
        return TRANSITIONS[phase][signal]
    except KeyError:
        raise IllegalMove(vm, phase, signal, allowed(phase)) from None


def ending_signal(fate: Literal["stopped", "crashed", "failed"]) -> Signal:
    """The signal for the `fate` of a worker's Ending (vm/worker/protocol.py)."""
    return _SIGNAL_OF_FATE[fate]


_SIGNAL_OF_FATE: Final = {
    "stopped": Signal.ENDED_STOPPED,
    "crashed": Signal.ENDED_CRASHED,
    "failed": Signal.START_FAILED,
}


# ---- restarts -------------------------------------------------------------------------------

RestartPolicy = Literal["no", "on-failure", "always"]

BACKOFF_MAX_S: Final = 60.0
BACKOFF_RESET_S: Final = 600.0     # as long a run as this shows that the trouble was another


@dataclass(frozen=True, slots=True)
class Restart:
    """Start again after `delay_s`; `attempts` goes into the next decision."""

    delay_s: float
    attempts: int


def decide_restart(
    policy: RestartPolicy, phase: Phase, *, asked: bool, attempts: int, ran_s: float,
) -> Restart | None:
    """Whether and when a VM that ended in `phase` is started again; None: it is not.

    `asked`: somebody stopped or killed it, or the service is closing; then it never comes back
    by itself. `attempts`: restarts since the last run of BACKOFF_RESET_S, 0 at first. The delays
    are 1, 2, 4 .. 60 s, so that a guest that crashes at once costs the host little.
    Raises ValueError for a phase that is not an end.
    """
    if phase not in ENDED:
        raise ValueError(f"a restart is decided when a VM has ended, not when it is {phase.value}")
    if asked or policy == "no" or (policy == "on-failure" and phase is Phase.STOPPED):
        return None
    earlier = 0 if ran_s >= BACKOFF_RESET_S else attempts
    # The exponent is bounded first: 2.0 ** 1024 is an OverflowError.
    return Restart(min(BACKOFF_MAX_S, 2.0 ** min(earlier, 10)), earlier + 1)


def diagram() -> str:
    """The table as a Mermaid state diagram; moves between the same two phases share an arrow."""
    lines = ["stateDiagram-v2", f"    [*] --> {Phase.DEFINED.value}"]
    for phase, row in TRANSITIONS.items():
        arrows: dict[Phase, list[str]] = {}
        for signal, target in row.items():
            arrows.setdefault(target, []).append(signal.value)
        lines += [f"    {phase.value} --> {target.value}: {', '.join(names)}"
                  for target, names in arrows.items()]
    return "\n".join(lines) + "\n"
