"""Policies under a simulated clock, on a simulated host: the scheduler of production and nothing like it.

`Simulation` is one policy on one scenario (config/scenario.py), `machine` what takes the kernel's
place, `judge` what would have been fair, `replay` what feeds recorded inputs to a policy again.
"""

from __future__ import annotations

from .figures import Group, PolicyResult, Quantiles
from .replay import Difference, Replayed, ReplayError, replay
from .simulation import ScenarioRefused, Simulation

__all__ = [
    "Difference", "Group", "PolicyResult", "Quantiles", "ReplayError", "Replayed", "ScenarioRefused", "Simulation",
    "replay",
]
