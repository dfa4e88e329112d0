"""The borrower's side against a service that plays scripts on a made-up host with a planted cost."""

from __future__ import annotations

import threading
from concurrent.futures import Future

import numpy as np
import pytest

from mixvisor.cli import measuring
from mixvisor.cli.measuring import Campaign, l2_bytes
from mixvisor.metrics.mixing.report import analyse, judge
from mixvisor.metrics.mixing.session import REST, Session
from mixvisor.service.backend import Conflict

from ..metrics.mixing.synthetic import HARDWARE, RATE, VMS

MS = 1_000_000


class Player:
    """What service.client.Client is to a campaign; a thousand slices pass between two calls."""

    def __init__(self, cross_us: float) -> None:
        self.cross_ns = cross_us * 1e3
        self.rng = np.random.default_rng(3)
        self.waiting: list[tuple[int, int, int]] = []
        self.written = self.now = 0
        self.before = -1
        self.ended: str | None = None
        self.given_back = False
        self.calls = 0

    def exchange(self, loan, script):
        assert loan == "it"
        self.calls += 1
        room = 2500 - len(self.waiting)
        taken = script[:room]
        self.waiting += [(self.written + i, vm, length) for i, (vm, length) in enumerate(taken)]
        self.written += len(taken)
        return {"written": len(taken), "slices": self.play(1000), "ended": self.ended, "dispatch": "precise"}

    def give_back(self, loan):
        self.given_back = True
        return {"slices": self.play(5), "ended": "given back", "dispatch": "precise"}

    def play(self, count):
        rows = []
        for number, vm, length in self.waiting[:count]:
            if vm == REST:
                continue
            lost = 30e3 * (vm != self.before)
            lost += self.cross_ns * (self.before >= 0 and HARDWARE[vm] != HARDWARE[self.before])
            progress = RATE[vm] * (length - lost) * (1 + self.rng.normal(0, 0.004))
            rows.append([number, vm, self.before, self.now, self.now + length, length, length, 0, 0, int(progress)])
            self.now += length
            self.before = vm
        del self.waiting[:count]
        return rows


class AtOnce:
    """A pool of one that has always done its work already."""

    def __init__(self, _workers):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        pass

    def submit(self, work, *arguments):
        done = Future()
        done.set_result(work(*arguments))
        return done


class View:
    def __init__(self, then=None):
        self.seen = []
        self.then = then

    def show(self, elapsed_s, slices, analysis):
        self.seen.append((slices, analysis))
        if self.then:
            self.then(len(self.seen))


def campaign(player, monkeypatch, view=None, *, seconds=1e6, precision=None, stop=None):
    monkeypatch.setattr(measuring, "EXCHANGE_SECONDS", 0.0)
    # Slices pass as fast as this computer makes them up: an analysis beside that would never have caught up.
    monkeypatch.setattr(measuring, "ANALYSE_EVERY_SECONDS", 0.0)
    monkeypatch.setattr(measuring, "ANALYSE_PART", 0.0)
    monkeypatch.setattr(measuring, "ThreadPoolExecutor", AtOnce)
    session = Session(VMS, (MS // 2, MS), MS, np.random.default_rng(1))
    return Campaign(
        player, {"loan": "it", "dispatch": "precise"}, session, lengths=2, seconds=seconds, precision=precision,
        wanted=0.002, view=view or View(), stop=stop or threading.Event(),
    ).run(lambda seconds, why: {"ended": why, "technology": "made up"})


def test_a_wanted_precision_ends_it_once_the_checks_can_speak_and_the_planted_cost_is_found(monkeypatch):
    player = Player(20.0)
    ended = campaign(player, monkeypatch, precision=0.002)
    assert ended.why == "precision"
    assert player.given_back
    analysis = analyse(ended.recording)
    assert analysis.precision <= 0.002
    assert all(point.replicates >= 3 for point in analysis.blocks.points)
    assert analysis.cost.includes(20e3, 0.999)
    assert judge(analysis).kind == "penalty"
    assert ended.recording.about["ended"] == "precision"
    assert ended.recording.about["dispatch"] == "precise"


def test_the_end_of_the_time_ends_it(monkeypatch):
    player = Player(0.0)
    assert campaign(player, monkeypatch, seconds=0.2).why == "time"
    assert player.given_back


def test_whoever_interrupts_it_gets_what_there_is(monkeypatch):
    player, stop = Player(0.0), threading.Event()
    ended = campaign(player, monkeypatch, View(lambda calls: calls == 3 and stop.set()), stop=stop)
    assert ended.why == "interrupted"
    assert player.given_back
    assert len(ended.recording.slices) > 2000


def test_a_loan_that_ends_under_it_leaves_what_was_measured(monkeypatch):
    player = Player(0.0)

    def trouble(calls):
        player.ended = "VM 'h1' ended" if calls == 3 else player.ended

    ended = campaign(player, monkeypatch, View(trouble))
    assert ended.why == "VM 'h1' ended"
    assert not player.given_back
    assert len(ended.recording.slices) > 2000


def test_a_refusal_in_the_middle_is_passed_on(monkeypatch):
    player = Player(0.0)
    monkeypatch.setattr(player, "exchange", lambda *_: (_ for _ in ()).throw(Conflict("no")))
    with pytest.raises(Conflict):
        campaign(player, monkeypatch)


def test_the_size_of_the_second_cache_is_read_where_the_kernel_tells(tmp_path):
    folder = tmp_path / "devices/system/cpu/cpu3/cache"
    for index, (level, size) in enumerate((("1", "32K"), ("2", "1024K"))):
        (folder / f"index{index}").mkdir(parents=True)
        (folder / f"index{index}/level").write_text(level + "\n")
        (folder / f"index{index}/size").write_text(size + "\n")
    assert l2_bytes(3, tmp_path) == 1 << 20
    assert l2_bytes(4, tmp_path) is None
