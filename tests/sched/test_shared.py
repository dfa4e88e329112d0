"""The shared table: layout, and a ring that never lies about what it lost."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixvisor.metrics import snapshot
from mixvisor.sched import shared as layout
from mixvisor.sched.shared import (
    CPU_FIELDS,
    CPU_WORDS,
    HEADER,
    HEADER_WORDS,
    RECORD_WORDS,
    SCRIPT_ENTRIES,
    SLOT_FIELDS,
    SLOT_WORDS,
    RingReader,
    RingWriter,
    ScriptReader,
    ScriptWriter,
    Shared,
    SharedMemoryError,
    SliceRecord,
    bucket,
)


@pytest.fixture
def table() -> Iterator[Shared]:
    made = Shared.create([3, 5], slots=8, ring_records=4)
    yield made
    made.close()
    os.close(made.fd)


def record(number: int) -> SliceRecord:
    return SliceRecord(*range(number, number + RECORD_WORDS))


def test_parts_follow_one_another_without_overlap(table: Shared) -> None:
    assert table.slot(0) == HEADER_WORDS
    assert table.slot(1) - table.slot(0) == SLOT_WORDS
    assert table.cpu(0) == table.slot(8)
    assert table.ring(0) == table.cpu(0) + CPU_WORDS
    assert table.cpu(1) == table.ring(0) + 4 * RECORD_WORDS
    assert table.script == table.ring(1) + 4 * RECORD_WORDS
    assert len(table.words) == table.script + 2 * SCRIPT_ENTRIES


def test_fields_have_words_of_their_own() -> None:
    for fields, words in ((HEADER, HEADER_WORDS), (SLOT_FIELDS, SLOT_WORDS),
                          (CPU_FIELDS, CPU_WORDS)):
        assert len(set(fields.values())) == len(fields)
        assert max(fields.values()) < words
    assert len(SliceRecord._fields) == RECORD_WORDS


def test_a_second_process_sees_the_same_words(table: Shared) -> None:
    table.slot_set(7, "rate", -5)
    again = Shared(os.dup(table.fd))
    assert again.slot_get(7, "rate") == -5
    assert again.cpu_get(1, "cpu") == 5
    assert again.slot_get(0, "want_cpu") == layout.NOBODY
    fd = again.fd
    again.close()
    os.close(fd)


def test_the_table_cannot_be_cut_short(table: Shared) -> None:
    with pytest.raises(PermissionError):
        os.ftruncate(table.fd, 8)


def test_a_stranger_is_refused() -> None:
    fd = os.memfd_create("stranger")
    os.ftruncate(fd, HEADER_WORDS * 8)
    with pytest.raises(SharedMemoryError, match="not a scheduler table"):
        Shared(fd)
    os.ftruncate(fd, 8)
    with pytest.raises(SharedMemoryError, match="holds 8 bytes"):
        Shared(fd)
    os.close(fd)


@given(st.lists(st.integers(0, 9), max_size=12))
def test_every_record_is_read_once_or_counted_as_lost(bursts: list[int]) -> None:
    table = Shared.create([0], slots=1, ring_records=4)
    writer, reader = RingWriter(table, 0), RingReader(table, 0)
    written, read = 0, []
    for burst in bursts:
        for _ in range(burst):
            writer.write(*record(written))
            written += 1
        got = reader.read()
        assert len(got) == min(burst, 3) or burst > 3
        read += got
    assert len(read) + reader.lost == written
    assert [r.start_ns for r in read] == sorted({r.start_ns for r in read})
    assert all(r == record(r.start_ns) for r in read)
    fd = table.fd
    table.close()
    os.close(fd)


def test_a_new_writer_goes_on_where_the_last_one_died(table: Shared) -> None:
    RingWriter(table, 1).write(*record(1))
    RingWriter(table, 1).write(*record(2))
    assert RingReader(table, 1).read() == [record(1), record(2)]


def test_bounds_are_those_that_metrics_shows() -> None:
    for name in ("DECISION_BOUNDS_NS", "LATENESS_BOUNDS_NS", "RUN_LENGTH_BOUNDS_NS", "MODES"):
        assert getattr(layout, name) == getattr(snapshot, name)


@given(st.integers(0, 2**40))
def test_a_value_falls_in_the_first_bucket_that_holds_it(value: int) -> None:
    at = bucket(layout.LATENESS_BOUNDS_NS, value)
    assert at == sum(1 for bound in layout.LATENESS_BOUNDS_NS if bound < value)


def test_a_script_is_read_as_it_was_written_however_often_its_ring_turns(table: Shared) -> None:
    writer, reader = ScriptWriter(table), ScriptReader(table, 1)
    written = read = 0
    while read < 3 * SCRIPT_ENTRIES:
        entries = [((written + i) % 7, written + i + 100) for i in range(1500)]
        written += writer.write(entries, table.cpu_get(1, "script_at"))
        for _ in range(1000):
            line = reader.peek()
            if line is None:
                break
            assert line == (read, read % 7, read + 100)
            reader.advance()
            read += 1


def test_a_full_script_takes_no_more_until_some_of_it_was_played(table: Shared) -> None:
    writer, reader = ScriptWriter(table), ScriptReader(table, 0)
    many = [(1, 1)] * SCRIPT_ENTRIES
    assert writer.write(many, 0) == SCRIPT_ENTRIES
    assert writer.write(many, table.cpu_get(0, "script_at")) == 0
    reader.advance()
    assert writer.write(many, table.cpu_get(0, "script_at")) == 1


def test_the_next_script_begins_where_the_last_was_written_to_not_where_it_was_played(table: Shared) -> None:
    writer, reader = ScriptWriter(table), ScriptReader(table, 0)
    writer.write([(1, 1), (2, 2), (3, 3)], 0)
    reader.advance()
    again = ScriptWriter(table)
    assert again.write([(4, 4)], table.cpu_get(0, "script_at")) == 1
    assert ScriptReader(table, 0).peek() == (3, 4, 4)
    # Another host CPU plays the next one: it does not begin with what the first left.
    assert ScriptReader(table, 1).peek() == (3, 4, 4)


def test_a_successor_goes_on_with_the_script_where_a_dead_dispatcher_stopped(table: Shared) -> None:
    ScriptWriter(table).write([(1, 1), (2, 2)], 0)
    ScriptReader(table, 0).advance()
    assert ScriptReader(table, 0).peek() == (1, 2, 2)
