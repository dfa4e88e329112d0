"""The slow decisions, published: entitlements and placement of all vCPUs on all host CPUs.

Theory.  policy/entitlement.py says what each VM should have, policy/placement.py where its vCPUs
live for the next period and at what local rate; here their inputs are read from the table and
their answers written to it, with the protocol by which a vCPU changes hands (shared.py). Under a
policy that partitions, policy/partition.py narrows the VMs' affinities first. Under one that does
not dispatch, a vCPU only has a CPU that keeps its account, and stays there.

Invariant. `want_cpu` changes only while `have_cpu == want_cpu`.
Where it is poor: a vCPU that wakes keeps its nominal rate until the next plan (30 ms).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Final

import trio

from .model import LATENCIES, VcpuLoad, VmDemand
from .policy import Partition, Policy, Split, Tenant, cores_of, entitle, place
from .shared import NOBODY, ONE_CPU
from .table import Table, Vcpu

__all__ = ["BALANCE_MAX_S", "BALANCE_PART", "BALANCE_S", "Planner"]

BALANCE_S: Final = 0.03
BALANCE_MAX_S: Final = 0.5
BALANCE_PART: Final = 30           # of our time at most 1/30 goes into planning
SHARES_KEPT: Final = 8
LOWEST_RATE: Final = 1e-6


class Planner:
    """siblings: the SMT siblings of each host CPU, where known. account: brings the ledger up to
    date. send_parcel: a vCPU's pages to its next CPU. split: told the partition, None without.
    clock: ns; another one where time is simulated.
    """

    def __init__(
        self, table: Table, cpus: Sequence[int], policy: Policy, *, migrate_resist_ns: int,
        siblings: Mapping[int, frozenset[int]],
        account: Callable[[], None],
        send_parcel: Callable[[int, Vcpu], Awaitable[None]],
        split: Callable[[Split | None], None],
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._table = table
        self._cpus = tuple(cpus)
        self.migrate_resist_ns = migrate_resist_ns
        self._siblings = siblings
        self._tell_split = split
        self._clock = clock
        self.adopt(policy)
        self._account = account
        self._send_parcel = send_parcel
        self.period_s = BALANCE_S        # until the next plan
        self._shares: dict[tuple[VmDemand, ...], dict[str, float]] = {}
        self.dirty = False               # demands changed: plan anew
        self.lent: dict[str, int] = {}   # VMs that live on this host CPU for a while (loan.py)
        self._awake_seen: tuple[tuple[int, bool], ...] = ()

    def adopt(self, policy: Policy) -> None:
        """Plan by *policy* from now on."""
        self._policy = policy
        self._partition = Partition(cores_of(self._cpus, self._siblings)) if policy.partitions else None
        self._split: Split | None = None
        self._split_ns = self._clock()

    def follow_cpus(self, cpus: Iterable[int]) -> None:
        """Plan for these host CPUs from now on: some went or came back."""
        self._cpus = tuple(sorted(cpus))
        self._shares.clear()
        self.dirty = True
        self.adopt(self._policy)

    def _left(self, vcpu: Vcpu) -> frozenset[int]:
        """Its host CPUs that are there; all that are, where none of its own is (hostcpus.py)."""
        present = frozenset(self._cpus)
        return vcpu.cpus & present or present

    def _confined(self, vcpu: Vcpu) -> frozenset[int]:
        """The host CPUs that it may use, under the partition if there is one, or while it is lent."""
        if vcpu.vm in self.lent:
            return frozenset({self.lent[vcpu.vm]})
        if self._split is None:
            return self._left(vcpu)
        return self._split.confine(vcpu.vm, vcpu.thread.mode, self._left(vcpu))

    def _divide(self) -> None:
        """The partition of now, by what the VMs were entitled to without one."""
        if self._partition is not None:
            free = self._entitled(self._demands(everyone=False, cpus_of=self._left))
            now = self._clock()
            tenants = {v.vm: Tenant(
                vm=v.vm, mode=v.thread.mode, cpus=self._left(v), demand=free[v.vm],
                reservation=v.reservation) for v in self._table if not v.leaving}
            self._split = self._partition.update(list(tenants.values()), now - self._split_ns)
            self._split_ns = now
        self._tell_split(self._split)

    def demands(self, *, everyone: bool, confined: bool = True) -> list[VmDemand]:
        """What the VMs ask for: with all their vCPUs, or those that compete now; on the host CPUs
        that the partition leaves them, or on all of their affinity.
        """
        return self._demands(everyone=everyone, cpus_of=self._confined if confined else lambda vcpu: vcpu.cpus)

    def _demands(self, *, everyone: bool, cpus_of: Callable[[Vcpu], frozenset[int]]) -> list[VmDemand]:
        by_vm: dict[str, list[Vcpu]] = {}
        for vcpu in self._table:
            if not vcpu.leaving:
                by_vm.setdefault(vcpu.vm, []).append(vcpu)
        return [
            VmDemand(
                vm=vm, weight=vcpus[0].weight,
                cpus=cpus_of(vcpus[0]), cap=vcpus[0].cap,
                reservation=vcpus[0].reservation,
                vcpus=len(vcpus) if everyone else sum(map(self._table.competes, vcpus)))
            for vm, vcpus in by_vm.items()]

    def _entitled(self, demands: list[VmDemand]) -> dict[str, float]:
        """`entitle`, remembered: the same demands come again and again."""
        key = tuple(demands)
        if key not in self._shares:
            if len(self._shares) >= SHARES_KEPT:
                self._shares.clear()
            self._shares[key] = entitle(demands, self._cpus)
        return self._shares[key]

    def _who_competes(self) -> tuple[tuple[int, bool], ...]:
        return tuple((v.generation, self._table.competes(v)) for v in self._table)

    def is_due(self) -> bool:
        """Whether a plan now could differ from the last one."""
        return (self.dirty or len(self._cpus) > 1
                or self._who_competes() != self._awake_seen)

    async def balance(self) -> None:
        """Plan for ever, as often as it is of use."""
        while True:
            # With very many vCPUs a plan takes milliseconds: then it is made less often.
            await trio.sleep(self.period_s)
            if self.is_due():
                began = time.thread_time()
                await self.plan()
                took = time.thread_time() - began
                self.period_s = max(BALANCE_S, min(BALANCE_MAX_S, took * BALANCE_PART))

    async def plan(self) -> None:
        """Entitlements and placement of now, published; parcels go ahead of their vCPUs."""
        table = self._table
        self._account()
        self.dirty = False
        vcpus = [vcpu for vcpu in table if not vcpu.leaving]
        competing = {vcpu.slot: table.competes(vcpu) for vcpu in vcpus}
        self._awake_seen = self._who_competes()
        self._divide()
        count = Counter(v.vm for v in vcpus if competing[v.slot])
        shares = self._entitled(self.demands(everyone=False))
        nominal = self._entitled(self.demands(everyone=True))
        loads: list[VcpuLoad] = []
        for vcpu in vcpus:
            vcpu.share = shares[vcpu.vm] / count[vcpu.vm] if competing[vcpu.slot] else 0.0
            want = table.word(vcpu, "want_cpu")
            if want == NOBODY or (competing[vcpu.slot] and self._policy.dispatches):
                loads.append(VcpuLoad(
                    slot=vcpu.slot, entitled=vcpu.share or nominal[vcpu.vm],
                    # Placement turns lag into a higher rate for one period. On a single CPU the
                    # run queue keeps the lag itself, and we plan only when something changes.
                    lag_ns=round(vcpu.lag_ns) if len(self._cpus) > 1 else 0,
                    cpus=self._confined(vcpu), last_cpu=want if want != NOBODY else None,
                    mode=vcpu.thread.mode))
        placement = place(
            loads, self._cpus, round(self.period_s * 1e9), migrate_resist_ns=self.migrate_resist_ns)
        changed = False
        moves: list[tuple[Vcpu, int]] = []
        for vcpu in vcpus:
            # A VM's cap is divided among those of its vCPUs that compete; one vCPU uses at most one CPU.
            cap, most = vcpu.cap / max(1, count[vcpu.vm]), 1 if vcpu.thread.siblings else len(self._cpus)
            cap = round(cap * ONE_CPU) if cap < most else 0
            rate = placement.rate.get(vcpu.slot) or nominal[vcpu.vm]
            for name, value in (("rate", round(max(rate, LOWEST_RATE) * ONE_CPU)), ("cap", cap),
                                ("latency", LATENCIES.index(vcpu.latency))):
                if table.word(vcpu, name) != value:
                    table.set(vcpu, name, value)
                    changed = True
            want = table.word(vcpu, "want_cpu")
            to = placement.cpu.get(vcpu.slot, want)
            if to != want:
                if table.word(vcpu, "have_cpu") == want:
                    moves.append((vcpu, to))
                else:
                    self.dirty = True
        for vcpu, to in moves:
            await self._send_parcel(to, vcpu)
            if (to in self._cpus and not vcpu.leaving and table.holds(vcpu)
                    and table.word(vcpu, "have_cpu") == table.word(vcpu, "want_cpu")):
                table.set(vcpu, "want_cpu", to)
                changed = True
        if changed or moves:
            table.bump()
