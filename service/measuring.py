"""The cost of mixing, measured while the service runs: slices in, figures for everybody who shows or uses them out.

Theory.  The scheduler hands over the slice records that it reads anyway. Once a second they are folded into the online
estimate (metrics/mixing/online.py), in a worker thread, off the host CPUs of the VMs. Records of a host CPU on which
only one mode ran are thrown away unread, so a host whose modes do not meet pays nothing. It looks in stretches of
`STRETCH_S`, after each of which the estimate is asked what it knows, and begins one only when all that it has spent,
in CPU time, is below `BUDGET` of what the dispatchers have: about four seconds of every minute. So the figure
becomes sharp in minutes and stays fresh, and what measuring costs is bounded on every host.

Two measurements may be there: this one, and the one that `mixvisor measure` made (measured.py). `told` is the
one that warnings, gauges and budgets go by: what was concluded online, since it is about these VMs; else what was
concluded on demand on this very host (same CPU model, kernel and technology); else the better inconclusive one.

Lost time is counted for each VM from its crossings (those of the time that is not looked at are taken to be as many),
once and as long as a penalty is told, and never taken back.
*Overlap* is time in which both modes ran within the same second: on one host CPU, on threads of one core, on one
socket, anywhere on the host.

Invariants.  Bounded: `PENDING` records wait at most, more are dropped (and the estimate knows that something is
missing). An error here costs the figures, not the service. Where it is poor: what was learnt ends with the service.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

import structlog
import trio

from ..config.model import SchedulerConfig
from ..metrics.mixing.online import MODES, Online, OnlineEstimate
from ..metrics.mixing.result import Interval, MeasuredHost, MixingResult
from ..metrics.mixing.standing import Circumstances, caveats, to_result
from ..metrics.snapshot import SCOPES, MixingSnapshot, Mode
from ..sched.shared import SliceRecord
from ..vm.host import CpuFacts
from ..vm.hosts.instructions import why_not_counted
from .sharing import crossing_cost

__all__ = ["BUDGET", "FOLD_S", "STRETCH_S", "Measuring", "preferred"]

log = structlog.get_logger("mixvisor")

FOLD_S: Final = 1.0
STRETCH_S: Final = 4.0                # shorter ones have few whole blocks in them where slices are long
BUDGET: Final = 0.006              # of the dispatchers' CPU time
CREDIT_NS: Final = 10_000_000      # unspent budget that is kept: of more, modes that meet at last would take too much
PENDING: Final = 40_000
NAMES: Final = 8_192
LATELY_S: Final = 60.0             # both modes on a host CPU within this time: "together"


def preferred(online: MixingResult | None, on_demand: MixingResult | None, host: MeasuredHost) -> MixingResult | None:
    """The one to go by."""
    if on_demand is not None and not on_demand.is_of(host):
        on_demand = None
    for one in (online, on_demand):
        if one is not None and one.usable and one.verdict != "inconclusive":
            return one
    return online if online is not None and (online.cost_us is not None or on_demand is None) else on_demand


class Measuring:
    """running: the VMs that run now: mode, and whether the guest keeps a progress counter. scheduling: [scheduler] as
    in force. dispatch: the kind in force. ran: CPU time of software and of hardware VMs on each host CPU so far, ns.
    dispatching: CPU time of the dispatchers so far, ns. on_demand: what `mixvisor measure` found (measured.py). tell:
    called with `told` whenever it is looked at.
    """

    def __init__(
        self, host: MeasuredHost, topology: Iterable[CpuFacts], *,
        running: Callable[[], Mapping[str, tuple[Mode, bool]]], scheduling: Callable[[], SchedulerConfig],
        dispatch: Callable[[], str], ran: Callable[[], Mapping[int, tuple[int, int]]],
        dispatching: Callable[[], int],
        on_demand: Callable[[], MixingResult | None], tell: Callable[[MixingResult | None], None],
    ) -> None:
        self._host = host
        self._places = {cpu.cpu: {"cpu": cpu.cpu, "core": (cpu.socket, cpu.core), "socket": cpu.socket, "host": 0}
                        for cpu in topology}
        self._running = running
        self._scheduling = scheduling
        self._dispatch = dispatch
        self._ran = ran
        self._ran_before: Mapping[int, tuple[int, int]] = {}
        self._dispatching = dispatching
        self._on_demand = on_demand
        self._tell = tell
        self._no_instructions = why_not_counted()
        self._online = Online()
        self._estimate: OnlineEstimate | None = None
        self._latest: MixingResult | None = None
        self._told: MixingResult | None = None
        self._pending: dict[int, list[SliceRecord]] = {}
        self._waiting = 0
        self._looking = True
        self.budget = BUDGET
        self._credit_ns = 0.0
        self._paid_ns = 0                    # of `cpu_ns`
        self._dispatched_ns = 0
        self._looked_ns = self._skipped_ns = 0       # since crossings were counted last
        self._names: dict[int, str] = {}
        self._lost_ns: dict[str, float] = {}
        self._overlap_ns: dict[str, int] = {scope: 0 for scope in SCOPES}  # noqa: C420 - typed
        self._measurements: dict[str, int] = {}
        self._concluded_unix_s: float | None = None
        self._folded_at = time.monotonic()
        self._together_at: float | None = None
        self.cpu_ns = 0                      # spent on it so far

    # -- from the scheduler ------------------------------------------------------------------

    def named(self, generation: int, vm: str) -> None:
        """From now on slices of this generation are the VM's."""
        self._names[generation] = vm
        if len(self._names) > NAMES:
            del self._names[next(iter(self._names))]

    def slices(self, cpu: int, records: Sequence[SliceRecord]) -> None:
        """New slices of a host CPU, in the order of time."""
        if self._looking and self._waiting < PENDING:
            self._waiting += len(records)
            self._pending.setdefault(cpu, []).extend(records)

    # -- the work ----------------------------------------------------------------------------

    async def run(self) -> None:
        """Until cancelled."""
        self._dispatched_ns = self._dispatching()
        began = time.monotonic()
        while True:
            await trio.sleep(FOLD_S)
            over = self._looking and time.monotonic() - began >= STRETCH_S
            try:
                await self._round(over)
            except Exception as error:
                # Figures are worth less than the VMs: say so, and begin anew.
                log.error("measuring the cost of mixing failed and begins anew", code="measuring-failed",
                          exc_info=error)
                self._online.reset(self._scheduling().slice_us * 1000)
            self._settle()
            if over or not self._looking:
                began, self._looking = time.monotonic(), self._credit_ns >= 0.0

    def _settle(self) -> None:
        """What may be spent, by now."""
        dispatched = self._dispatching()
        earned = self.budget * max(0, dispatched - self._dispatched_ns)
        self._credit_ns = min(CREDIT_NS, self._credit_ns + earned - (self.cpu_ns - self._paid_ns))
        self._dispatched_ns, self._paid_ns = dispatched, self.cpu_ns

    async def _round(self, estimate: bool) -> None:
        began = time.thread_time_ns()
        pending, self._pending, self._waiting = self._pending, {}, 0
        now = time.monotonic()
        passed_ns, self._folded_at = round((now - self._folded_at) * 1e9), now
        met = self._meet(passed_ns)
        if met:
            self._together_at = now
        if self._looking:
            self._looked_ns += passed_ns
        else:
            self._skipped_ns += passed_ns
        met = [cpu for cpu in met if cpu in pending]
        config = self._scheduling()
        on = config.random_order > 0
        slice_ns = config.slice_us * 1000
        self.cpu_ns += time.thread_time_ns() - began

        def work() -> OnlineEstimate | None:
            began = time.thread_time_ns()
            if on:
                if self._online.slice_ns != slice_ns:
                    self._online.reset(slice_ns)
                for cpu in met:
                    self._online.feed(cpu, pending[cpu])
            found = self._online.estimate(time.monotonic_ns()) if estimate else None
            self.cpu_ns += time.thread_time_ns() - began
            return found

        if estimate or (on and met):
            # Cancelled with the service: the thread has at most some milliseconds to go.
            found = await trio.to_thread.run_sync(work)
            if found is not None:
                self._estimate = found
                self._conclude(config)
                self._count_lost()

    def _meet(self, passed_ns: int) -> list[int]:
        """The host CPUs on which both modes ran since this was asked last; overlap is counted."""
        before, self._ran_before = self._ran_before, self._ran()
        modes = {cpu: {mode for mode in (0, 1) if ran[mode] > before.get(cpu, (0, 0))[mode]}
                 for cpu, ran in self._ran_before.items()}
        for scope in SCOPES:
            at: dict[object, set[int]] = {}
            for cpu, ran in modes.items():
                place = self._places.get(cpu)
                if place is not None:
                    at.setdefault(place[scope], set()).update(ran)
            if any(len(ran) > 1 for ran in at.values()):
                self._overlap_ns[scope] += passed_ns
        return [cpu for cpu, ran in modes.items() if len(ran) > 1]

    def _conclude(self, config: SchedulerConfig) -> None:
        estimate = self._estimate
        assert estimate is not None
        running = self._running().values()
        lately = self._together_at is not None and time.monotonic() - self._together_at < LATELY_S
        self._latest = to_result(estimate, Circumstances(
            host=self._host, dispatch=self._dispatch(), policy=config.policy, random_order=config.random_order > 0,
            running={mode: sum(m == mode for m, _ in running) for mode in MODES},
            countless={mode: sum(m == mode and not counts for m, counts in running) for mode in MODES},
            together=lately, instructions=self._no_instructions, now_unix_s=time.time()))
        if lately:
            verdict = self._latest.verdict
            self._measurements[verdict] = self._measurements.get(verdict, 0) + 1
        self.reconsider()

    def reconsider(self) -> None:
        """Which figure to go by: there is a new one, of whatever source."""
        told = preferred(self._latest, self._on_demand(), self._host)
        if told is not None and told.usable and told.verdict != "inconclusive":
            self._concluded_unix_s = told.measured_unix_s
        self._told = told
        self._tell(told)

    def _count_lost(self) -> None:
        if not self._looked_ns:
            return
        crossings, scale = self._online.take_crossings(), 1 + self._skipped_ns / self._looked_ns
        self._looked_ns = self._skipped_ns = 0
        told = self._told
        if told is None or told.verdict != "penalty":
            return
        for (generation, mode), count in crossings.items():
            vm = self._names.get(generation, "")
            cost = told.cost_us_by_victim.get(mode)
            if vm and cost is not None and cost.value > 0:
                self._lost_ns[vm] = self._lost_ns.get(vm, 0.0) + scale * count * cost.value * 1e3

    # -- what it knows -----------------------------------------------------------------------

    @property
    def instructions_count(self) -> bool:
        """Guests without a progress counter are seen too, by their instructions."""
        return not self._no_instructions

    @property
    def told(self) -> MixingResult | None:
        return self._told

    def snapshot(self, config: SchedulerConfig, vms: Iterable[str]) -> MixingSnapshot:
        told, estimate = self._told, self._estimate
        usable = told is not None and told.usable
        rate = estimate.crossing_rate if estimate is not None else {}
        penalty: dict[Mode, Interval] = {
            mode: Interval(*(cost * 1e-6 * rate[mode] for cost in (one.value, one.low, one.high)))
            for mode, one in (told.cost_us_by_victim.items() if told is not None and usable else ()) if mode in rate}
        cost_us, source = crossing_cost(config, told)
        return MixingSnapshot(
            online=config.random_order > 0, told=told, latest=self._latest, on_demand=self._on_demand(),
            caveats=caveats(estimate) if estimate is not None else (), penalty=penalty, crossing_rate=dict(rate),
            measurements=dict(self._measurements), concluded_unix_s=self._concluded_unix_s,
            lost_ns={vm: round(self._lost_ns.get(vm, 0.0)) for vm in vms},
            overlap_ns=dict(self._overlap_ns),
            crossing_cost_us=cost_us, crossing_cost_source=source, estimator_cpu_ns=self.cpu_ns)
