"""A host CPU's order, lent: the script is played by real dispatchers, and everything goes back."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import trio

from mixvisor.sched.loan import REST, LoanRefused
from mixvisor.sched.supervisor import Scheduler

from .conftest import CPU, Spawner, Spinner, until
from .test_scheduler import scheduling, thread

Make = Callable[[int], list[Spinner]]
MS = 1_000_000


async def three(scheduler: Scheduler, ours: list[Spinner]) -> None:
    for spinner, (name, mode, weight) in zip(
            ours, (("soft", "software", 100), ("hard", "hardware", 300), ("beside", "software", 400)), strict=True):
        await scheduler.admit(thread(spinner, name, weight, mode=mode))
    await until(lambda: all(v.slices for v in scheduler.statistics().vcpus))


@pytest.mark.rt
async def test_a_script_is_played_by_the_lenders_and_who_lends_nothing_keeps_its_share(
    rt: None, spawner: Spawner, spinners: Make,
) -> None:
    ours = spinners(3)
    async with scheduling(spawner, "precise") as scheduler:
        await three(scheduler, ours)
        loan = await scheduler.lend(["soft", "hard"])
        assert (loan.modes, loan.counts, loan.cpu) == (("software", "hardware"), (False, False), CPU)
        # Only the one of less weight, in bursts of 50 ms.
        script = ([(0, MS)] * 50 + [(REST, 0)]) * 15
        first = [spinner.ran_ns() for spinner in ours]
        assert loan.write(script) == len(script)
        await until(lambda: loan.played == len(script))
        ran = [spinner.ran_ns() - before for spinner, before in zip(ours, first, strict=True)]
        share = ran[2] / sum(ran)            # of what the three got: the CPU may have had others to serve
        scheduler.note_loan()
        slices = loan.take()
        numbers = [s.entry for s in slices if s.entry >= 0]
        assert numbers == [n for n, (vm, _length) in enumerate(script[:numbers[-1] + 1]) if vm != REST]
        assert {s.vm for s in slices if s.entry >= 0} == {0}
        assert {s.vm for s in slices if s.entry < 0} <= {-1, 0, 1}
        assert share == pytest.approx(0.5, abs=0.12)
        # Among the lenders nobody is behind: entitlement followed what the script gave.
        figures = {v.vm: v for v in scheduler.statistics().vcpus}
        assert abs(figures["hard"].lag_ns) <= 5 * MS
        scheduler.end_loan(loan, "done")
        assert loan.ended == "done"
        assert loan.write(script) == 0
        before = [spinner.ran_ns() for spinner in ours]
        await trio.sleep(0.6)
        ran = [spinner.ran_ns() - first for spinner, first in zip(ours, before, strict=True)]
        assert [got / sum(ran) for got in ran] == pytest.approx([0.125, 0.375, 0.5], abs=0.06)
    assert all(spinner.free() for spinner in ours)


@pytest.mark.rt
@pytest.mark.parametrize("how", ["released", "paused", "policy", "parameters", "closed"])
async def test_whatever_ends_a_loan_gives_everything_back(
    rt: None, spawner: Spawner, spinners: Make, how: str,
) -> None:
    ours = spinners(3)
    async with scheduling(spawner, "gentle") as scheduler:
        await three(scheduler, ours)
        loan = await scheduler.lend(["soft", "hard"])
        loan.write([(1, MS)] * 2000)
        await until(lambda: loan.played > 10)
        if how == "released":
            await scheduler.release("hard")
        elif how == "paused":
            await scheduler.pause("hard")
        elif how == "policy":
            await scheduler.set_policy("batch")
        elif how == "parameters":
            await scheduler.set_parameters("hard", weight=300)
        if how != "closed":
            assert loan.ended
            assert loan.take()
            played = loan.played
            slices = scheduler.figures("soft").slices
            await until(lambda: scheduler.figures("soft").slices > slices + 3)
            assert loan.played <= played + 1
            again = await scheduler.lend(["soft", "beside"])
            scheduler.end_loan(again, "done")
    assert loan.ended
    assert all(spinner.free() for spinner in ours)


@pytest.mark.rt
async def test_vms_that_cannot_lend_are_refused_and_nothing_has_changed(
    rt: None, spawner: Spawner, spinners: Make,
) -> None:
    ours = spinners(3)
    async with scheduling(spawner, "gentle") as scheduler:
        await three(scheduler, ours)
        await scheduler.set_parameters("beside", cap=0.5)
        for vms, said in ((["soft", "beside"], "cap or a reservation"), (["soft", "soft"], "twice"),
                          (["soft", "nobody"], "does not run")):
            with pytest.raises(LoanRefused, match=said):
                await scheduler.lend(vms)
        await scheduler.pause("hard")
        with pytest.raises(LoanRefused, match="does not run"):
            await scheduler.lend(["soft", "hard"])
        await scheduler.resume("hard")
        loan = await scheduler.lend(["soft", "hard"])
        with pytest.raises(LoanRefused, match="already"):
            await scheduler.lend(["soft", "hard"])
        for entry in ((2, MS), (-2, MS), (0, 0), (0, 1 << 40)):
            with pytest.raises(ValueError, match="an entry is"):
                loan.write([entry])
        scheduler.end_loan(loan, "done")


@pytest.mark.rt
async def test_lenders_are_brought_together_from_all_host_cpus_and_go_where_they_like_afterwards(
    rt: None, spawner: Spawner, spinners: Make,
) -> None:
    cpus = sorted(os.sched_getaffinity(0))[:2]
    ours = spinners(4)
    scheduler = Scheduler(cpus=cpus, spawn=spawner, dispatch="gentle")
    async with trio.open_nursery() as nursery:
        await nursery.start(scheduler.run)
        for at, spinner in enumerate(ours):
            mode = ("software", "hardware")[at % 2]
            await scheduler.admit(thread(spinner, f"vm{at}", cpus=frozenset(cpus), mode=mode))

        def where(vm: str) -> int | None:
            return scheduler.figures(vm).cpu

        await until(lambda: {where(f"vm{at}") for at in range(4)} == set(cpus))
        loan = await scheduler.lend(["vm0", "vm1", "vm2"])
        assert {where(f"vm{at}") for at in range(3)} == {loan.cpu}
        loan.write([(at % 3, MS) for at in range(300)])
        await until(lambda: loan.played == 300)
        assert {where(f"vm{at}") for at in range(3)} == {loan.cpu}
        scheduler.end_loan(loan, "done")
        await until(lambda: len({where(f"vm{at}") for at in range(3)}) == 2)
        nursery.cancel_scope.cancel()
    assert all(spinner.free() for spinner in ours)


async def test_where_the_kernel_schedules_there_is_no_order_to_lend(spawner: Spawner, spinners: Make) -> None:
    (one,) = spinners(1)
    async with scheduling(spawner, "plain") as scheduler:
        await scheduler.admit(thread(one, "one"))
        with pytest.raises(LoanRefused, match="the kernel alone"):
            await scheduler.lend(["one"])
    assert os.sched_getscheduler(one.pid) == os.SCHED_OTHER
