"""What the policies cost: `python benchmarks/policy.py` prints a small table.

One *slice* is what a dispatcher does for each: advance, charge, pick. One *period* is what the
supervisor does every 20 to 40 ms at most: entitle, place. The best of several rounds, since
anything else on the host only adds. Compare with the 60 µs that a slice may cost in all.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from time import perf_counter

from mixvisor.sched.model import Slot, VcpuLoad, VmDemand
from mixvisor.sched.policy import Runqueue, entitle, place

SLICE_NS = 5_000_000
PERIOD_NS = 40_000_000
ROUNDS = 7


def best_us(step: Callable[[], object], repeats: int) -> float:
    """The least mean time of one *step* in µs, over ROUNDS rounds of *repeats*."""
    rounds: list[float] = []
    for _ in range(ROUNDS):
        start = perf_counter()
        for _ in range(repeats):
            step()
        rounds.append((perf_counter() - start) / repeats * 1e6)
    return min(rounds)


def slice_us(vcpus: int, *, capped: bool = False, charge_all: bool = False) -> float:
    """advance + charge + pick with *vcpus* awake; *charge_all* as where demoted threads leak."""
    queue = Runqueue(SLICE_NS)
    for number in range(vcpus):
        queue.add(Slot(number), (1 + number % 8) / (5 * vcpus))
        if capped:
            queue.set_cap(Slot(number), 0.5)
    leaked = [Slot(number) for number in range(vcpus)] if charge_all else []
    current: Slot | None = None

    def step() -> None:
        nonlocal current
        queue.advance(SLICE_NS)
        if current is not None:
            queue.charge(current, SLICE_NS)
        for slot in leaked:
            queue.charge(slot, 1_000)
        current = queue.pick(current)

    return best_us(step, max(20, 20_000 // vcpus))


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
    print("a slice: advance + charge + pick, µs")
    print(f"{'vCPUs':>8}{'plain':>10}{'all capped':>12}{'all charged':>13}")
    for vcpus in (1, 8, 100, 1000):
        print(f"{vcpus:>8}{slice_us(vcpus):>10.1f}{slice_us(vcpus, capped=True):>12.1f}"
              f"{slice_us(vcpus, charge_all=True):>13.1f}")
    print("\na period, µs")
    print(f"{'VMs':>8}{'CPUs':>6}{'affinity':>10}{'entitle':>10}{'place':>10}")
    for vms, cpus in ((4, 2), (100, 2), (100, 64), (1000, 2)):
        for restricted in (False, True):
            entitling, placing = period_us(vms, cpus, restricted=restricted)
            print(f"{vms:>8}{cpus:>6}{'narrow' if restricted else 'any':>10}"
                  f"{entitling:>10.0f}{placing:>10.0f}")


if __name__ == "__main__":
    main()
