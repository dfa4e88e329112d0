"""The simulated kernel chooses as Linux does; waits are counted without samples; the judge is fair."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixvisor.sched.model import VmDemand
from mixvisor.sched.simulate.figures import Waits
from mixvisor.sched.simulate.judge import Judge
from mixvisor.sched.simulate.machine import Costs, Machine, SimulatedKernel, Thread, scripted

FREE = Costs(switch_ns=(0, 0), mixed_ns=(0, 0), dispatcher_ns=0, late_ns=0)


def machine(*threads: Thread) -> tuple[Machine, SimulatedKernel]:
    made = Machine(2, FREE)
    kernel = SimulatedKernel(made)
    for thread in threads:
        made.add(thread)
        kernel.pin(thread.slot, (0,))
    return made, kernel


def go(made: Machine, until: int) -> None:
    for cpu in made.cpus:
        made.settle(cpu)
        made.choose(cpu)
    made.run(until)


def test_priority_before_class_before_idle() -> None:
    threads = [Thread(n, str(n), 0) for n in range(4)]
    made, kernel = machine(*threads)
    kernel.set_class(0, os.SCHED_IDLE, os.sched_param(0))
    kernel.set_class(2, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    kernel.set_class(3, os.SCHED_FIFO, os.sched_param(2))
    for last in (3, 2, 1, 0):
        go(made, made.now + 1000)
        assert [t.slot for t in threads if t.ran] == list(range(3, last - 1, -1))[::-1]
        kernel.stop(last)


def test_a_lowered_thread_goes_to_the_head_and_a_raised_one_to_the_tail() -> None:
    threads = [Thread(n, str(n), 0) for n in range(3)]
    made, kernel = machine(*threads)
    for slot in range(3):
        kernel.set_class(slot, os.SCHED_FIFO, os.sched_param(1))
    kernel.set_priority(2, os.sched_param(2))
    kernel.set_priority(2, os.sched_param(1))
    go(made, 1000)
    assert [t.ran for t in threads] == [0, 0, 1000]
    kernel.set_priority(0, os.sched_param(0))
    kernel.set_priority(0, os.sched_param(1))
    kernel.stop(2)
    go(made, 2000)
    assert [t.ran for t in threads] == [0, 1000, 1000]


def test_who_wakes_above_takes_the_cpu_at_once_and_gives_it_back() -> None:
    busy, sleeper = Thread(0, "busy", 0), Thread(1, "sleeper", 1, spans=scripted([(100, 900)]), first_wake_ns=500)
    made, kernel = machine(busy, sleeper)
    kernel.set_class(0, os.SCHED_FIFO, os.sched_param(2))
    kernel.set_class(1, os.SCHED_FIFO, os.sched_param(3))
    go(made, 10_500)
    assert (busy.ran, sleeper.ran) == (9500, 1000)
    assert sleeper.wakes.quantiles().max_ns == 0
    assert busy.waits.quantiles().max_ns == 100
    assert made.cpus[0].mode_switches == 20


def test_a_thread_that_moves_takes_its_time_along() -> None:
    one, two = Thread(0, "one", 0), Thread(1, "two", 0)
    made, kernel = machine(one, two)
    go(made, 1000)
    kernel.pin(1, (1,))
    go(made, 3000)
    assert (one.ran, two.ran) == (3000, 2000)
    assert kernel.run_clock(1, 1).read() == 2000
    assert made.cpus[1].idle_ns == 1000


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=200))
def test_quantiles_err_to_the_safe_side_by_an_eighth(values: list[int]) -> None:
    waits = Waits()
    for value in values:
        waits.add(value)
    found, ordered = waits.quantiles(), sorted(values)
    assert (found.count, found.max_ns) == (len(values), ordered[-1])
    for part, answer in ((0.5, found.p50_ns), (0.99, found.p99_ns)):
        exact = ordered[min(len(values) - 1, max(0, -int(-part * len(values) // 1) - 1))]
        assert exact <= answer <= exact * 1.125 + 1


def test_the_judge_gives_the_hungry_what_sleepers_left() -> None:
    everywhere = frozenset((0, 1))
    judge = Judge([VmDemand(vm=name, weight=weight, vcpus=1, cpus=everywhere)
                   for name, weight in (("sleeper", 100), ("a", 100), ("b", 200))], [False, True, True], 2)
    # Two CPUs of which a tenth each was used up by decisions; the sleeper took 0.3.
    judge.look(1000, [300, 600, 900], 200)
    assert judge.due_ns[0] == pytest.approx(300)
    assert judge.due_ns[1] + judge.due_ns[2] == pytest.approx(1500)
    assert judge.due_ns[2] == pytest.approx(900)       # a whole CPU, as far as there was one
    assert judge.lag_most_ns == pytest.approx(0)
    assert judge.fairness() == pytest.approx(1.0)
    judge.look(2000, [600, 1400, 1600], 400)
    assert judge.errors_ns() == pytest.approx([200, -200])
