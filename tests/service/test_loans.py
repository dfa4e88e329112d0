"""A loan of a real service: consent, the note, and that everything comes back whatever happens."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import trio

from mixvisor.metrics.mixing.result import RESULT_FILE
from mixvisor.service import loans
from mixvisor.service.backend import Conflict, Denied, NotFound, ServiceError, Unusable

from ..metrics.mixing.test_result import RESULT
from .conftest import running, until

pytestmark = pytest.mark.usefixtures("nothing_left")
MS = 1_000_000
GUESTS = [{"name": name, "mode": "software", "boot": {"guest": "alu"}, "measure": name != "shy"}
          for name in ("one", "two", "shy")]


def codes(service):
    return {warning.code for warning in service.board.now()}


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(loans, "PATIENCE_SECONDS", 0.4)


async def taken(service, lent, script, want):
    """Slices of the script, until there are so many."""
    rows = []
    written = service.exchange(lent["loan"], script)["written"]
    assert written == len(script)
    with trio.fail_after(20):
        while len(rows) < want:
            rows += [s for s in service.exchange(lent["loan"], [])["slices"] if s.entry >= 0]
            await trio.sleep(0.02)
    return rows


@pytest.mark.rt
async def test_a_loan_is_played_and_given_back_and_a_borrower_that_falls_silent_loses_it(tmp_path, impatient):
    async with running(tmp_path, GUESTS, dispatch="precise") as service:
        with pytest.raises(Denied, match=r"shy may not be measured: .* measure = true"):
            await service.lend(["one", "shy"])
        with pytest.raises(NotFound, match="no VM named 'nobody'"):
            await service.lend(["nobody"])
        for wrong in (None, [], ["one", 1], "one", ["one"] * 17):
            with pytest.raises(Unusable, match="vms must be"):
                await service.lend(wrong)
        lent = await service.lend(["one", "two"])
        assert [(vm["name"], vm["mode"], vm["counts"], vm["working_set_bytes"]) for vm in lent["vms"]] == [
            ("one", "software", True, 0), ("two", "software", True, 0)]
        assert lent["dispatch"] == "precise"
        assert "measuring" in codes(service)
        with pytest.raises(Conflict, match="already"):
            await service.lend(["one", "two"])
        for wrong in (None, [[0]], [[0, True]], [[0, 1.5]], [[0, 1]] * 5000, [[2, MS]], [["one", MS]]):
            with pytest.raises(Unusable):
                service.exchange(lent["loan"], wrong)
        with pytest.raises(NotFound, match="no loan"):
            service.exchange("other", [])
        rows = await taken(service, lent, [[0, MS], [1, MS], [1, 2 * MS]] * 30, 80)
        assert [row.entry for row in rows] == list(range(len(rows)))
        assert [row.vm for row in rows[:3]] == [0, 1, 1]
        # It has hardly started, but counts in most slices.
        assert sum(row.progress > 0 for row in rows) > len(rows) / 2
        assert service.give_back(lent["loan"])["ended"] == "given back"
        await until(lambda: "measuring" not in codes(service))
        with pytest.raises(NotFound):
            service.exchange(lent["loan"], [])
        # Nobody calls: it is over by itself, and another one can be had.
        silent = await service.lend(["one", "two"])
        await until(lambda: "measuring" not in codes(service))
        with pytest.raises(NotFound):
            service.exchange(silent["loan"], [])
        # A lender dies: the borrower hears of it, with the slices until then.
        lent = await service.lend(["one", "two"])
        await taken(service, lent, [[0, MS], [1, MS]] * 50, 10)
        await service.act("two", "kill")
        answer = service.exchange(lent["loan"], [])
        assert answer["ended"] == "VM 'two' ended"
        assert service.exchange(lent["loan"], [[0, MS]])["written"] == 0
        await until(lambda: "measuring" not in codes(service))
        assert service.machine("one").phase.value == "running"


async def test_where_nothing_dispatches_nothing_is_lent(tmp_path):
    async with running(tmp_path, GUESTS[:2], dispatch="plain") as service:
        with pytest.raises(Conflict, match="the kernel alone schedules"):
            await service.lend(["one", "two"])
        assert "measuring" not in codes(service)


async def test_a_result_is_kept_said_and_recalled_but_only_of_this_host(tmp_path):
    path = tmp_path / "state" / RESULT_FILE
    async with running(tmp_path, []) as service:
        assert service.mixing() is None
        with pytest.raises(Unusable, match="not measured on this host"):
            service.keep_mixing(RESULT)
        mine = replace(RESULT, host=service._measured.host)
        service.keep_mixing(mine)
        assert service.mixing() == mine
        assert service.mixed._cost.crossing_s == pytest.approx(16e-6)
        doubtful = replace(mine, doubts=("the null",), verdict="inconclusive")
        service.keep_mixing(doubtful)
        assert service.mixed._cost is None
        service.keep_mixing(mine)
    async with running(tmp_path, []) as service:
        assert service.mixing() == mine
    path.write_text(json.dumps({**RESULT.to_json(), "host": {**RESULT.to_json()["host"], "kernel": "2.0"}}))
    async with running(tmp_path, []) as service:
        assert service.mixing() is None
    path.write_text("{")
    async with running(tmp_path, []) as service:
        assert service.mixing() is None
        path.unlink()
        path.mkdir()
        with pytest.raises(ServiceError, match="cannot be written"):
            service.keep_mixing(mine)
