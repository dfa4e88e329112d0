"""What the policies cost: `python -m benchmarks.policy` prints two tables.

One *decision* is what a run queue does for each slice: advance, charge, pick, each timed by itself. *Warm*: one right
after the other. *Cold*: 8 MiB are copied before each, as a slice of guests leaves no cache warm. In production
C takes the usual one (sched/steady.c, see `benchmarks.dispatch`); these are the interpreted ones, which are taken where
anything is not usual: somebody wakes, or has a cap. *Leaking*: as many vCPUs ran a little in every slice as are
read after one. Goals: p99 below 100 µs with 100 vCPUs, below 1 ms with 1,000.

One *period* is what the supervisor does every 30 ms or more rarely: entitle, place. The best of several rounds, since
anything else on the host only adds.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from time import perf_counter, thread_time_ns
from typing import Any

from mixvisor.sched.dispatcher import AT_ONCE
from mixvisor.sched.model import Slot, VcpuLoad, VmDemand
from mixvisor.sched.policy import POLICIES, Runqueue, entitle, place

from .common import median, options, quantile, report, table

SLICE_NS = 5_000_000
RATELIMIT_NS = 500_000
PERIOD_NS = 40_000_000
ROUNDS = 7
DECISIONS = {"warm": 5000, "cold": 1000}
CACHES_BYTES = 8 << 20
QUEUES = (1, 8, 100, 1000)


def decider(policy: str, vcpus: int, *, capped: bool, charge_all: bool) -> Callable[[], None]:
    """advance + charge + pick with *vcpus* awake, of both modes.

    *charge_all*: as where demoted threads leak, of which a dispatcher reads so many after one slice (AT_ONCE).
    """
    queue: Runqueue = POLICIES[policy].runqueue(SLICE_NS, RATELIMIT_NS)
    for number in range(vcpus):
        queue.add(Slot(number), (1 + number % 8) / (5 * vcpus), mode=number % 2)
        if capped:
            queue.set_cap(Slot(number), 0.5)
    queue.advance(10 * SLICE_NS)                     # a bucket begins empty
    leaked = [Slot(number) for number in range(min(vcpus, AT_ONCE))] if charge_all else []
    current: Slot | None = None

    def step() -> None:
        nonlocal current
        queue.advance(SLICE_NS)
        if current is not None:
            queue.charge(current, SLICE_NS)
        for slot in leaked:
            queue.charge(slot, 1_000)
        current = queue.pick(current)

    return step


def each_us(step: Callable[[], None], count: int, *, cold: bool) -> list[float]:
    """What each of *count* calls took of our CPU time (0.3 µs are the clock's)."""
    one, other = bytearray(CACHES_BYTES), bytes(CACHES_BYTES)
    took: list[float] = []
    gc.disable()                                     # as in a dispatcher
    for _ in range(count):
        if cold:
            one[:] = other
        began = thread_time_ns()
        step()
        took.append((thread_time_ns() - began) / 1000)
    gc.enable()
    return took


def decisions() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for policy in ("fair", "batch"):
        for kind in ("plain", "all capped", "leaking"):
            for vcpus in QUEUES:
                row: dict[str, Any] = {"policy": policy, "kind": kind, "vcpus": vcpus}
                for caches, count in DECISIONS.items():
                    step = decider(policy, vcpus, capped=kind == "all capped", charge_all=kind == "leaking")
                    took = each_us(step, count, cold=caches == "cold")
                    row |= {f"{caches}_p50_us": median(took), f"{caches}_p99_us": quantile(took, 0.99)}
                found.append(row)
    return found


def best_us(step: Callable[[], object], repeats: int) -> float:
    """The least mean time of one *step* in µs, over ROUNDS rounds of *repeats*."""
    rounds: list[float] = []
    for _ in range(ROUNDS):
        start = perf_counter()
        for _ in range(repeats):
            step()
        rounds.append((perf_counter() - start) / repeats * 1e6)
    return min(rounds)


def period_us(vms: int, cpus: int, *, restricted: bool = False) -> tuple[float, float]:
    """entitle, place for *vms* VMs of one vCPU, in steady state."""
    rng = random.Random(vms * 1000 + cpus)
    everywhere = range(cpus)
    demands = [
        VmDemand(
            vm=str(number), weight=rng.randint(1, 1000), vcpus=1,
            cpus=frozenset(rng.sample(everywhere, rng.randint(1, cpus)) if restricted
                           else everywhere),
        )
        for number in range(vms)
    ]
    shares = entitle(demands, everywhere)
    last: dict[Slot, int] = {}
    lag = [0.0] * vms

    def once() -> None:
        answer = place([
            VcpuLoad(slot=Slot(n), entitled=shares[d.vm], lag_ns=round(lag[n]), cpus=d.cpus,
                     last_cpu=last.get(Slot(n)))
            for n, d in enumerate(demands)
        ], everywhere, PERIOD_NS, migrate_resist_ns=500_000)
        last.update(answer.cpu)
        for number, d in enumerate(demands):
            lag[number] += (shares[d.vm] - answer.rate[Slot(number)]) * PERIOD_NS

    return best_us(lambda: entitle(demands, everywhere), 3), best_us(once, 5)


def main() -> None:
    chosen = options(__doc__ or "")
    single = decisions()
    keys = ("policy", "kind", "vcpus", "warm_p50_us", "warm_p99_us", "cold_p50_us", "cold_p99_us")
    table("A decision: advance, charge and pick, µs", keys, [[row[key] for key in keys] for row in single])
    periods: list[dict[str, Any]] = []
    for vms, cpus in ((4, 2), (100, 2), (100, 64), (1000, 2)):
        for restricted in (False, True):
            entitling, placing = period_us(vms, cpus, restricted=restricted)
            periods.append({"vms": vms, "cpus": cpus, "affinity": "narrow" if restricted else "any",
                            "entitle_us": entitling, "place_us": placing})
    keys = ("vms", "cpus", "affinity", "entitle_us", "place_us")
    table("A period, µs", keys, [[row[key] for key in keys] for row in periods])
    report("policy", {"decisions": single, "periods": periods}, chosen.json)


if __name__ == "__main__":
    main()
