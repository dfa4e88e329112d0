"""From design to script and back: every slice is found in the block that it was played for."""

from __future__ import annotations

import numpy as np
import pytest

from mixvisor.metrics.mixing.design import CONDITIONS
from mixvisor.metrics.mixing.session import REST, SLICE_COLUMNS, Session, WrongVms, roles_of
from mixvisor.metrics.mixing.slices import Vm, clean, reuse_distance
from mixvisor.sched.loan import LoanedSlice

from .synthetic import VMS

MS = 1_000_000
MIXED_UP = (VMS[2], VMS[0], VMS[3], VMS[1])      # in whatever order they were named


def played(session: Session, count: int) -> list[list[int]]:
    """What a dispatcher makes of so many entries: rests vanish."""
    rows: list[list[int]] = []
    now, before = 0, -1
    entries = session.next_entries(count)
    session.sent(count)
    for number, (vm, length) in enumerate(entries):
        if vm != REST:
            rows.append([number, vm, before, now, now + length, length, length, 0, 0, 1000])
            now, before = now + length, vm
    return rows


def test_columns_are_those_that_a_loan_gives():
    assert LoanedSlice._fields == SLICE_COLUMNS


def test_every_slice_is_found_in_its_block_with_its_condition():
    session = Session(MIXED_UP, (MS // 2, MS, 2 * MS), MS, np.random.default_rng(1))
    session.add(played(session, 12_000))
    recording = session.recording({"cpu": 1})
    slices = recording.slices
    assert recording.about == {"cpu": 1, "reference_slice_ns": MS}
    assert {block.kind for block in recording.blocks} == {*CONDITIONS, "random"}
    hardware = recording.modes()
    distance = reuse_distance(slices)
    good = clean(slices)
    for block in recording.blocks:
        mine = (slices.block == block.number) & good
        assert set(slices.planned_ns[mine]) == {block.slice_ns}
        crossed = hardware[slices.vm[mine]] != hardware[slices.previous[mine]]
        if block.kind.startswith("mixed"):
            assert crossed.all()
        elif block.kind != "random":
            assert not crossed.any()
        if block.kind == "solo":
            assert set(distance[mine]) == {1}


def test_blocks_rest_before_they_begin():
    session = Session(VMS, (MS,), MS, np.random.default_rng(1))
    entries = session.next_entries(1000)
    assert entries[0] == (REST, 0)
    assert 6 <= sum(vm == REST for vm, _length in entries) <= 10


def test_entries_that_found_no_room_come_again():
    session = Session(VMS, (MS,), MS, np.random.default_rng(1))
    first = session.next_entries(100)
    session.sent(40)
    assert session.next_entries(60) == first[40:]


def test_slices_that_were_not_of_the_script_or_lost_belong_to_no_block_and_spoil_none():
    session = Session(VMS, (MS,), MS, np.random.default_rng(1))
    rows = played(session, 500)
    rows[50][0] = -1
    del rows[100:130]
    session.add(rows[:200])
    session.add([])
    session.add(rows[200:])
    recording = session.recording({})
    assert recording.slices.block[50] == 0
    whole = Session(VMS, (MS,), MS, np.random.default_rng(1))
    whole.add(played(whole, 500))
    of = dict(zip(whole.recording({}).slices.start_ns.tolist(), whole.recording({}).slices.block.tolist(), strict=True))
    assert all(block in (0, of[start]) for start, block in
               zip(recording.slices.start_ns.tolist(), recording.slices.block.tolist(), strict=True))


def test_nothing_yet_is_an_empty_recording():
    recording = Session(VMS, (MS,), MS, np.random.default_rng(1)).recording({})
    assert len(recording.slices) == 0
    assert recording.blocks == ()


@pytest.mark.parametrize("modes", [("hardware",) * 4, ("software", "hardware"), ("hardware", "hardware", "software")])
def test_two_vms_of_each_mode_are_needed(modes):
    with pytest.raises(WrongVms, match="two hardware and two software"):
        roles_of([Vm(f"vm{at}", mode) for at, mode in enumerate(modes)])
