"""Where software and hardware VMs meet, kept up to date on the board.

Theory.  Which modes run together changes when a VM starts or ends; where they meet changes with every
migration, many times a second. A warning must do neither flicker nor lag: so a VM counts as being on every CPU
that it was placed on within the last `KEEP_SECONDS`, and the warnings are computed anew at every
step in a VM's life (of very many soon after it) and every `LOOK_SECONDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Final, get_args

import trio

from ..config.model import SchedulerConfig
from ..metrics.mixing.result import MixingResult
from ..vm.mixing import MIXED_CODES, MeasuredCost, mixing_warnings
from ..vm.modes import ModeDecision, ModeHost
from .warnings import Board

__all__ = ["POLICY_NAMES", "Mixed", "measured_cost"]

LOOK_SECONDS: Final = 2.0
MANY: Final = 100                  # VMs: with more, steps in their lives are looked at together
PAUSE_SECONDS: Final = 0.1
KEEP_SECONDS: Final = 10.0
POLICY_NAMES: Final[tuple[str, ...]] = get_args(SchedulerConfig.model_fields["policy"].annotation)


def measured_cost(told: MixingResult | None) -> MeasuredCost | None:
    """What the warnings say of a measurement; None: nothing that is worth saying."""
    if told is None or not told.usable or told.cost_us is None:
        return None
    cost = told.cost_us
    return MeasuredCost(cost.value * 1e-6, cost.low * 1e-6, cost.high * 1e-6, none=told.verdict == "none",
                        how="while these VMs run" if told.source == "online" else "by mixvisor measure")


class Mixed:
    """running: the decisions of the VMs that run now, by name. placed: the host CPUs of a VM now."""

    def __init__(
        self, board: Board, host: ModeHost, policy: str, *, running: Callable[[], Mapping[str, ModeDecision]],
        placed: Callable[[str], Collection[int]],
    ) -> None:
        self._board = board
        self._host = host
        self._policy = policy
        self._running = running
        self._placed = placed
        self._seen: dict[tuple[str, int], float] = {}      # (VM, host CPU) -> when last
        self._cost: MeasuredCost | None = None
        self._moved = trio.Event()

    def schedule(self, policy: str) -> None:
        """The policy in force is another one."""
        self._policy = policy
        self.update()

    async def watch(self) -> None:
        while True:
            self.update()
            with trio.move_on_after(LOOK_SECONDS):
                await self._moved.wait()
                await trio.sleep(PAUSE_SECONDS)
            self._moved = trio.Event()

    def changed(self, vms: int) -> None:
        """One of so many VMs has moved along its life. Looked at now, or soon where there are many of them."""
        if vms <= MANY:
            self.update()
        else:
            self._moved.set()

    def measured(self, cost: MeasuredCost | None) -> None:
        """What a crossing costs here, as measured by now; None: not known any more."""
        if cost != self._cost:
            self._cost = cost
            self.update()

    def update(self) -> None:
        running = self._running()
        now = trio.current_time()
        for name in running:
            for cpu in self._placed(name):
                self._seen[name, cpu] = now
        self._seen = {(name, cpu): when for (name, cpu), when in self._seen.items()
                      if name in running and now - when < KEEP_SECONDS}
        where: dict[str, set[int]] = {}
        for name, cpu in self._seen:
            where.setdefault(name, set()).add(cpu)
        said = {warning.code: warning for warning in mixing_warnings(
            {name: decision.mode for name, decision in running.items()}, self._host.technology, where=where,
            cores=self._host.cores, cost=self._cost, decisions=running, policies=POLICY_NAMES, policy=self._policy)}
        for code in MIXED_CODES:
            warning = said.get(code)
            if warning is None:
                self._board.clear(code)
            else:
                self._board.put(code, warning.severity, warning.message, warning.advice, warning.vms, warning.weight)
