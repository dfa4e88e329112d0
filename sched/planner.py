"""The slow decisions, published: entitlements and placement of all vCPUs on all host CPUs.

Theory.  policy/entitlement.py says what each VM should have, policy/placement.py where its vCPUs
live for the next period and at what local rate; here their inputs are read from the table and
their answers written to it, with the protocol by which a vCPU changes hands (shared.py). Under a
policy that partitions, policy/partition.py narrows the VMs' affinities first. Under one that does
not dispatch, a vCPU only has a CPU that keeps its account, and stays there.

Scale.  Plans cost in proportion to vCPUs and host CPUs, so with many they are rarer (`BALANCE_PART`), and long
placements are sought in a thread, on values: the event loop and with it the heartbeat go on. Between plans a
host CPU that has nothing to run takes a vCPU that waits elsewhere (`steal`), which needs no plan.

A move does not wait for the end of a slice: the dispatchers of both host CPUs are interrupted for it.

Invariant. `want_cpu` changes only while `have_cpu == want_cpu`; one plan or steal at a time.
Where it is poor: a vCPU that wakes keeps its nominal rate until the next plan (30 ms).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Final

import trio

from .model import LATENCIES, Placement, VcpuLoad, VmDemand
from .policy import Partition, Policy, Split, Tenant, cores_of, entitle, place
from .shared import LAGS_KEPT, MODES, NOBODY, ONE_CPU
from .table import Table, Vcpu

__all__ = ["BALANCE_MAX_S", "BALANCE_PART", "BALANCE_S", "Planner"]

BALANCE_S: Final = 0.03
BALANCE_MAX_S: Final = 0.5
BALANCE_PART: Final = 30           # of our time at most 1/30 goes into planning
SHARES_KEPT: Final = 8
STEAL_S: Final = 0.01              # how often idle host CPUs are looked for between plans
PLAN_PAUSE: Final = 3              # times as long as a plan took, with very many, until one that is asked for
OFFLOAD_FROM: Final = 400          # vCPUs: a placement of fewer takes some milliseconds
_Asks = tuple[tuple[str, int, float, float, int, frozenset[int]], ...]     # VmDemand's fields, cheap to compare
_Timed = tuple[Placement, float]
LOWEST_RATE: Final = 1e-6


class Planner:
    """slice_ns: of the run queues. siblings, caches: who shares a core, and who a last-level cache, with each host
    CPU, where known. account: brings the ledger up to date. send_parcel: a vCPU's pages to its next CPU. interrupt:
    lets the slices of host CPUs end now, between which vCPUs move. split: told the partition, None without. clock: ns;
    another one where time is simulated. offload: whether long plans may be made in a thread.
    """

    def __init__(
        self, table: Table, cpus: Sequence[int], policy: Policy, *, slice_ns: int, migrate_resist_ns: int,
        siblings: Mapping[int, frozenset[int]], caches: Mapping[int, frozenset[int]],
        account: Callable[[], None],
        send_parcel: Callable[[int, Vcpu], Awaitable[None]],
        interrupt: Callable[[Iterable[int]], None],
        split: Callable[[Split | None], None],
        clock: Callable[[], int] = time.monotonic_ns, offload: bool = True,
    ) -> None:
        self._table = table
        self._cpus = tuple(cpus)
        self.slice_ns = slice_ns
        self.migrate_resist_ns = migrate_resist_ns
        self._siblings, self._caches = siblings, caches
        self._tell_split = split
        self._clock = clock
        self._policy = policy
        self.adopt(policy)
        self._account = account
        self._send_parcel = send_parcel
        self._interrupt = interrupt
        self.period_s = BALANCE_S        # until the next plan
        self._shares: dict[_Asks, dict[str, float]] = {}
        self._lefts: dict[frozenset[int], frozenset[int]] = {}     # of affinities, what is there
        self._planning = Turns()         # one plan at a time, and no steal within one
        self._index = {cpu: index for index, cpu in enumerate(self._cpus)}
        self._offload = offload
        self.took_s = 0.0                # CPU time of the last plan
        self.plans = 0                   # made so far
        self.dirty = False               # demands changed: plan anew
        self.lent: dict[str, int] = {}   # VMs that live on this host CPU for a while (loan.py)
        self._awake_seen: tuple[tuple[int, bool], ...] = ()

    def adopt(self, policy: Policy) -> None:
        """Plan by *policy* from now on."""
        ours, self._policy = self._policy.dispatches, policy
        for vcpu in self._table:
            vcpu.drift_ns = 0.0          # what another policy made of it says nothing of its place
            if not ours:
                vcpu.lag_ns = 0.0        # what the kernel withheld or gave too much was by other weights than ours
        self._partition = (
            Partition(cores_of(self._cpus, self._siblings, self._caches)) if policy.partitions else None)
        self._split: Split | None = None
        self._split_ns = self._clock()

    @property
    def period_ns(self) -> int:
        """Of the placement; 0 where the kernel places."""
        return round(self.period_s * 1e9) if self._policy.dispatches else 0

    def follow_cpus(self, cpus: Iterable[int]) -> None:
        """Plan for these host CPUs from now on: some went or came back."""
        self._cpus = tuple(sorted(cpus))
        self._shares.clear()
        self._lefts.clear()
        self.dirty = True
        self.adopt(self._policy)

    def _left(self, vcpu: Vcpu) -> frozenset[int]:
        """Its host CPUs that are there; all that are, where none of its own is (hostcpus.py)."""
        left = self._lefts.get(vcpu.cpus)
        if left is None:
            present = frozenset(self._cpus)
            left = self._lefts[vcpu.cpus] = vcpu.cpus & present or present
        return left

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
            free = self._entitled(self._asks(everyone=False, cpus_of=self._left))
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
        return _demands(self._asks(everyone=everyone, cpus_of=self._confined if confined else _all_of))

    def _asks(self, *, everyone: bool, cpus_of: Callable[[Vcpu], frozenset[int]]) -> _Asks:
        competing = {} if everyone else self._table.competing()
        first: dict[str, Vcpu] = {}
        count: dict[str, int] = {}
        for vcpu in self._table:
            if not vcpu.leaving:
                vm = vcpu.thread.vm
                first.setdefault(vm, vcpu)
                count[vm] = count.get(vm, 0) + (everyone or competing[vcpu.slot])
        return tuple((vm, vcpu.weight, vcpu.cap, vcpu.reservation, count[vm], cpus_of(vcpu))
                     for vm, vcpu in first.items())

    def _entitled(self, asks: _Asks) -> dict[str, float]:
        """`entitle`, remembered: the same demands come again and again."""
        if asks not in self._shares:
            if len(self._shares) >= SHARES_KEPT:
                self._shares.clear()
            self._shares[asks] = entitle(_demands(asks), self._cpus)
        return self._shares[asks]

    def _who_competes(self) -> tuple[tuple[int, bool], ...]:
        competing = self._table.competing()
        return tuple((v.generation, competing[v.slot]) for v in self._table)

    def is_due(self) -> bool:
        """Whether a plan now could differ from the last one."""
        return (self.dirty or len(self._cpus) > 1
                or self._who_competes() != self._awake_seen)

    async def balance(self) -> None:
        """Plan for ever, as often as it is of use; between plans let idle host CPUs take work."""
        while True:
            # With very many vCPUs a plan takes milliseconds: then it is made less often.
            until = trio.current_time() + self.period_s
            while (left := until - trio.current_time()) > 0.0:
                # VMs may come meanwhile, and with them something to look for.
                await trio.sleep(min(left, STEAL_S if self.steals else 3 * STEAL_S))
                if self.steals:
                    await self.steal()
            if self.is_due():
                await self.plan()
                self.period_s = max(BALANCE_S, min(BALANCE_MAX_S, self.took_s * BALANCE_PART))

    async def plan(self) -> None:
        """Entitlements and placement of now, published; parcels go ahead of their vCPUs.

        With many vCPUs a plan serves all who asked for one since the last: VMs that start by the hundred do
        not plan for each.
        """
        wanted = self.plans + 1
        if self._offload and len(self._table) >= OFFLOAD_FROM:
            await trio.sleep(PLAN_PAUSE * self.took_s)
        async with self._planning:
            if self.plans < wanted:
                await self._plan()

    async def _plan(self) -> None:
        table, began = self._table, time.thread_time()
        self._account()
        self.dirty = False
        self.plans += 1
        vcpus = [vcpu for vcpu in table if not vcpu.leaving]
        competing = table.competing()
        self._awake_seen = self._who_competes()
        self._divide()
        count = Counter(v.thread.vm for v in vcpus if competing[v.slot])
        shares = self._entitled(self._asks(everyone=False, cpus_of=self._confined))
        nominal = self._entitled(self._asks(everyone=True, cpus_of=self._confined))
        wants = table.column("want_cpu")
        dispatches, several = self._policy.dispatches, len(self._cpus) > 1
        crowd = Counter(wants[vcpu.slot] for vcpu in vcpus)
        loads: list[VcpuLoad] = []
        for vcpu in vcpus:
            slot, vm = vcpu.slot, vcpu.thread.vm
            awake = competing[slot]
            vcpu.share = shares[vm] / count[vm] if awake else 0.0
            vcpu.nominal = nominal[vm] / (vcpu.thread.siblings + 1)
            want = wants[slot]
            if want == NOBODY or (awake and dispatches):
                loads.append(VcpuLoad(
                    slot=slot, entitled=vcpu.share or nominal[vm],
                    # Placement turns lag into a higher rate for one period. On a single CPU the
                    # run queue keeps the lag itself, and we plan only when something changes.
                    lag_ns=self._misplaced_ns(vcpu, crowd[want] > LAGS_KEPT) if several else 0,
                    drift_ns=round(vcpu.drift_ns),
                    cpus=self._confined(vcpu), last_cpu=want if want != NOBODY else None,
                    mode=vcpu.thread.mode))
        cpus, period_ns = self._cpus, round(self.period_s * 1e9)
        self.took_s = time.thread_time() - began
        placement, took_s = await self._elsewhere(len(loads), lambda: _timed(lambda: place(
            loads, cpus, period_ns, migrate_resist_ns=self.migrate_resist_ns)))
        began = time.thread_time()
        await self._publish(vcpus, placement, nominal, count)
        self.took_s += took_s + time.thread_time() - began

    def _misplaced_ns(self, vcpu: Vcpu, crowded: bool) -> int:
        """Its lag, but for what is a matter of whose turn it is: that its run queue makes good by itself.

        *crowded*: there are so many beside it that its lag there is not known at every moment.
        """
        if not crowded:
            return round(vcpu.lag_ns - vcpu.local_lag_ns)
        turn = self.slice_ns / 2
        return round(vcpu.lag_ns - max(-turn, min(turn, vcpu.lag_ns)))

    async def _publish(
        self, vcpus: Sequence[Vcpu], placement: Placement, nominal: Mapping[str, float], count: Mapping[str, int],
    ) -> None:
        table = self._table
        if table.shared is None:
            return                           # it ended while the placement was sought elsewhere
        wants, haves, rates, caps, latencies = map(
            table.column, ("want_cpu", "have_cpu", "rate", "cap", "latency"))
        changed = False
        moves: list[tuple[Vcpu, int]] = []
        for vcpu in vcpus:
            slot = vcpu.slot
            if vcpu.leaving or not table.holds(vcpu):
                continue
            rate = round(max(placement.rate.get(slot) or nominal[vcpu.thread.vm], LOWEST_RATE) * ONE_CPU)
            if rates[slot] != rate:
                table.set(vcpu, "rate", rate)
                changed = True
            # A VM's cap is divided among those of its vCPUs that compete; one vCPU uses at most one CPU.
            part, most = vcpu.cap / max(1, count[vcpu.thread.vm]), 1 if vcpu.thread.siblings else len(self._cpus)
            cap = round(part * ONE_CPU) if part < most else 0
            if caps[slot] != cap:
                table.set(vcpu, "cap", cap)
                changed = True
            latency = LATENCIES.index(vcpu.latency)
            if latencies[slot] != latency:
                table.set(vcpu, "latency", latency)
                changed = True
            want = wants[slot]
            to = placement.cpu.get(slot, want)
            if to != want:
                if haves[slot] == want:
                    moves.append((vcpu, to))
                else:
                    self.dirty = True
        between: set[int] = set()
        for vcpu, to in moves:
            if await self._move(vcpu, to):
                between |= {wants[vcpu.slot], to}
        if changed or moves:
            table.bump()
        self._interrupt(between - {NOBODY})

    async def _move(self, vcpu: Vcpu, to: int) -> bool:
        """Give a vCPU to another host CPU, if it is still anybody's to give."""
        table = self._table
        await self._send_parcel(to, vcpu)
        if (to in self._cpus and not vcpu.leaving and table.holds(vcpu)
                and table.word(vcpu, "have_cpu") == table.word(vcpu, "want_cpu")):
            table.set(vcpu, "want_cpu", to)
            vcpu.drift_ns = 0.0
            return True
        return False

    @property
    def steals(self) -> bool:
        """Whether idle host CPUs are looked for: with no more vCPUs than host CPUs each has one to itself."""
        return 1 < len(self._cpus) < len(self._table) and self._policy.dispatches

    async def steal(self) -> int:
        """Let host CPUs that have nothing to run take one vCPU each from those that have most waiting; returns how
        many did. No entitlement changes: the next plan sees where they are.
        """
        table, shared = self._table, self._table.shared
        if shared is None or self._planning.taken:
            return 0
        runnable = {cpu: sum(shared.cpu_words(self._index[cpu], "runnable", len(MODES))) for cpu in self._cpus}
        due = [cpu for cpu, count in runnable.items() if not count]
        if not due or max(runnable.values()) < 2:
            return 0
        stolen = 0
        between: set[int] = set()
        async with self._planning:
            on = self._waiting_by_cpu()
            for cpu in due:
                donors = sorted((c for c in on if runnable[c] > 1 and on[c]), key=lambda c: (-runnable[c], c))
                found = next(((donor, vcpu) for donor in donors for vcpu in on[donor]
                              if cpu in self._confined(vcpu)), None)
                if found is None:
                    continue
                donor, vcpu = found
                on[donor].remove(vcpu)
                if await self._move(vcpu, cpu):
                    runnable[donor] -= 1
                    runnable[cpu] += 1
                    stolen += 1
                    between |= {donor, cpu}
            if stolen:
                table.bump()
                self._interrupt(between)
        return stolen

    def _waiting_by_cpu(self) -> dict[int, list[Vcpu]]:
        """The vCPUs that want to run and are not picked, by host CPU, who is owed most first."""
        table = self._table
        competing = table.competing()
        wants, haves, picked = map(table.column, ("want_cpu", "have_cpu", "picked"))
        on: dict[int, list[Vcpu]] = {cpu: [] for cpu in self._cpus}
        for vcpu in table:
            slot = vcpu.slot
            cpu = wants[slot]
            if (competing[slot] and not vcpu.leaving and not picked[slot] and cpu == haves[slot] and cpu in on
                    and vcpu.thread.vm not in self.lent):
                on[cpu].append(vcpu)
        for waiting in on.values():
            waiting.sort(key=lambda vcpu: (-vcpu.lag_ns, vcpu.slot))
        return on

    async def _elsewhere(self, count: int, work: Callable[[], _Timed]) -> _Timed:
        """In a thread where it takes so long that nobody else would be heard meanwhile."""
        if not self._offload or count < OFFLOAD_FROM:
            return work()
        return await trio.to_thread.run_sync(work)


class Turns:
    """One at a time. A lock that waits only where it must, so that it works where time is simulated."""

    def __init__(self) -> None:
        self.taken = False
        self._free = trio.Event()

    async def __aenter__(self) -> None:
        while self.taken:
            await self._free.wait()
        self.taken, self._free = True, trio.Event()

    async def __aexit__(self, *_error: object) -> None:
        self.taken = False
        self._free.set()


def _timed(work: Callable[[], Placement]) -> _Timed:
    """Its answer, and the CPU time that it took."""
    began = time.thread_time()
    answer = work()
    return answer, time.thread_time() - began


def _all_of(vcpu: Vcpu) -> frozenset[int]:
    return vcpu.cpus


def _demands(asks: _Asks) -> list[VmDemand]:
    return [VmDemand(vm=vm, weight=weight, cap=cap, reservation=reservation, vcpus=vcpus, cpus=cpus)
            for vm, weight, cap, reservation, vcpus, cpus in asks]
