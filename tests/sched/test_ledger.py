"""What each was due and received, from the words that dispatchers leave."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mixvisor.sched.ledger import READ, Ledger
from mixvisor.sched.policy import POLICIES
from mixvisor.sched.shared import CPU_FIELDS
from mixvisor.sched.simulate import Simulation
from mixvisor.sched.table import Table

from .simulate.test_simulation import scenario

MS = 1_000_000
SLICE = 20 * MS


class Books:
    """A ledger over two vCPUs, one on each of two host CPUs, and the words of their dispatchers."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self.ledger = Ledger(table, SLICE)
        for cpu, vcpu in enumerate(table):
            vcpu.share = vcpu.nominal = 1.0
            for name, value in (("owned_generation", vcpu.generation), ("have_cpu", cpu), ("awake", 1)):
                table.set(vcpu, name, value)

    def bill(self, cpu: int, until: int, ran: int) -> None:
        vcpu = list(self.table)[cpu]
        self.table.set(vcpu, "charged_ns", self.table.word(vcpu, "charged_ns") + ran)
        shared = self.table.shared
        assert shared is not None
        shared.words[shared.cpu(cpu) + CPU_FIELDS["billed_ns"]] = until

    def lags(self, now: int) -> list[float]:
        self.ledger.account(now, 30 * MS)
        return [vcpu.lag_ns for vcpu in self.table]


@pytest.fixture
def books() -> Iterator[Books]:
    simulation = Simulation(scenario([{"count": 2}], cpus=2), "fair")
    yield Books(simulation._table)
    simulation.close()


def test_who_runs_is_not_owed_the_slice_that_is_not_over(books: Books) -> None:
    """Found: on one CPU a slice had just been billed and on the other not, and placement took that for a debt."""
    for cpu in (0, 1):
        books.bill(cpu, SLICE, SLICE)
    assert books.lags(SLICE) == [0, 0]
    books.bill(0, 2 * SLICE, SLICE)
    assert books.lags(2 * SLICE) == [0, 0]
    assert books.lags(2 * SLICE + MS) == [0, 0]
    books.bill(1, 2 * SLICE, SLICE)
    books.bill(0, 3 * SLICE, SLICE)
    assert books.lags(3 * SLICE) == [0, 0]


def test_what_one_cpu_withholds_is_owed_although_bills_come_cpu_by_cpu(books: Books) -> None:
    for number in range(1, 31):
        books.bill(0, number * SLICE - MS, SLICE - MS * 3 // 5)      # 3 % less
        books.lags(number * SLICE - MS)
        books.bill(1, number * SLICE, SLICE)
        lags = books.lags(number * SLICE)
        # Two periods and a slice: as far as an account of several CPUs goes.
        assert max(map(abs, lags)) <= SLICE + 60 * MS
    # Half of what is missing is each one's loss.
    assert lags == pytest.approx([9 * MS, -9 * MS], abs=MS)


def test_a_slice_that_is_not_over_is_no_sleep(books: Books) -> None:
    """Else a debt would wear off in it."""
    vcpu = next(iter(books.table))
    vcpu.nominal = vcpu.share = 0.1
    books.bill(0, SLICE, SLICE)
    books.bill(1, SLICE, SLICE)
    ahead = books.lags(SLICE)[0]
    assert ahead < -SLICE // 2
    assert books.lags(SLICE + SLICE // 2)[0] == ahead
    books.table.set(vcpu, "awake", 0)
    books.table.set(vcpu, "awake_ns", SLICE)
    books.bill(0, 2 * SLICE, 0)
    books.bill(1, 2 * SLICE, SLICE)
    assert books.lags(2 * SLICE)[0] == pytest.approx(ahead + 0.1 * SLICE, abs=MS)


def test_readings_that_a_slice_end_disturbed_are_taken_again(books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU's bill moves on while its vCPU's words are read."""
    books.bill(1, SLICE, SLICE)
    read: list[str] = []

    def column(name: str) -> list[int]:
        words = Table.column(books.table, name)
        if not read:                     # a slice of CPU 0 ends after the first of the words
            books.bill(0, SLICE, SLICE)
        read.append(name)
        return words

    monkeypatch.setattr(books.table, "column", column)
    assert books.lags(SLICE) == [0, 0]
    assert len(read) == 2 * len(READ)


def test_what_the_kernel_gave_by_its_own_weights_is_not_made_good_by_the_next_policy() -> None:
    simulation = Simulation(scenario([{"count": 2}], cpus=2), "kernel")
    planner, vcpus = simulation._planner, list(simulation._table)
    for policy, kept in (("kernel", False), ("fair", False), ("batch", True), ("kernel", True)):
        for vcpu in vcpus:
            vcpu.lag_ns = 5.0 * MS
        planner.adopt(POLICIES[policy])
        assert [vcpu.lag_ns for vcpu in vcpus] == [5.0 * MS * kept] * 2, policy
    simulation.close()
