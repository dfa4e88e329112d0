"""The shared memory between supervisor, dispatchers and guard.

Purpose.  The supervisor publishes *what is wanted* (which vCPU lives where, at what rate), each
dispatcher publishes *what is* (who runs, what it received) and logs every slice. Nobody waits
for anybody: all of it is plain words in one memfd.

Theory.  Every field is one aligned 64-bit signed word with a single writer, named below, so a
reader sees an old or a new value, never a torn one. Changes that belong together are ordered:
the supervisor writes the words of a slot first and the header's `epoch` last; a dispatcher
writes a record first and its ring's `head` last. (x86 keeps stores in order; CPython adds no
reordering of its own. On a weakly ordered machine a fence would belong at these two places.)

A vCPU changes hands by two words, `want_cpu` (supervisor) and `have_cpu` (its dispatcher):

| want | have | meaning | who acts |
|---|---|---|---|
| -1 | -1 | nobody's: the thread is SCHED_OTHER, unpinned | supervisor may free or give it |
| c | -1 | given to c | dispatcher c takes it: have = c |
| c | c | c schedules it | dispatcher c |
| d or -1 | c | taken from c | dispatcher c lets go: final account, have = -1 |

The supervisor changes `want_cpu` only while `have_cpu == want_cpu`, that is, after the last
change has been answered. So two dispatchers can never both believe that a vCPU is theirs, and
`charged_ns`, the last reading of the thread's run time that was billed, passes from owner to
owner: nothing is lost and nothing billed twice. The words of a dead dispatcher are the
supervisor's to write (it alone knows that the process has ended); `halt` is the guard's while it
lives, and the supervisor's after that.

A *script* (sched/loan.py) is a ring of (slot, length) pairs that one dispatcher plays instead of its
policy's picks: the supervisor writes entries first and `script_head` last, the dispatcher of
`script_cpu` counts those it has played in `script_at`. Entries are numbered for the life of the table.

Units: `_ns` nanoseconds; `rate` and `cap` in 1e-9 of a host CPU (`ONE_CPU`).
Where it is poor: fixed sizes (2048 vCPUs, 4096 slice records a CPU: 2 s at 0.5 ms slices), one script.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from bisect import bisect_left
from collections.abc import Sequence
from typing import Final, NamedTuple

__all__ = [
    "ACTIVE", "CPU_FIELDS", "CPU_WORDS", "DECISION_BOUNDS_NS", "EVENTS", "HEADER", "HEADER_WORDS",
    "LAGS_KEPT", "LATENESS_BOUNDS_NS", "LENT", "MODES", "NOBODY", "ONE_CPU", "PAUSED", "RECORD_ENTRY_SHIFT",
    "RECORD_IDLE", "RECORD_MIGRATED", "RECORD_WORDS", "RESIDENCIES", "RUN_LENGTH_BOUNDS_NS", "SCRIPT_ENTRIES",
    "SLOT_FIELDS", "SLOT_WORDS", "RingReader", "RingWriter", "ScriptReader", "ScriptWriter", "Shared",
    "SharedMemoryError", "SliceRecord", "bucket",
]

MAGIC: Final = 0x3144_4548_4353_564D           # "MVSCHED1"
ONE_CPU: Final = 1_000_000_000
NOBODY: Final = -1
EVENTS: Final = -1                             # instead of an offset: a descriptor of perf_event_open(2)
MODES: Final = ("software", "hardware")       # a mode is stored as its index
RESIDENCIES: Final = ("software", "hardware", "idle", "other")

# Upper bounds of the histogram buckets; one more bucket catches the rest. metrics/snapshot.py
# has the same tuples (rooms beside each other do not import each other).
DECISION_BOUNDS_NS: Final = tuple(
    us * 1000 for us in (1, 2, 5, 10, 20, 30, 40, 60, 100, 200, 500, 1000, 10_000, 100_000))
LATENESS_BOUNDS_NS: Final = tuple(
    us * 1000 for us in (10, 20, 50, 100, 200, 300, 500, 1000, 2000, 5000, 10_000, 100_000))
RUN_LENGTH_BOUNDS_NS: Final = tuple(
    us * 1000 for us in (500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 1_000_000))


def _number(names: Sequence[str | tuple[str, int]]) -> tuple[dict[str, int], int]:
    """Word offsets of fields in order; a pair is an array of so many words."""
    offsets: dict[str, int] = {}
    at = 0
    for entry in names:
        name, words = (entry, 1) if isinstance(entry, str) else entry
        offsets[name] = at
        at += words
    return offsets, at


HEADER_WORDS: Final = 512
HEADER, _used = _number((
    "magic", "slots", "cpus", "ring_records",             # written once
    "supervisor_pid", "slice_ns", "ratelimit_ns", "guard_timeout_ns",
    "used_slots",       # supervisor: no slot from here on was ever used
    "epoch",            # supervisor: moves when a slot or a parameter changed
    "heartbeat_ns",     # supervisor: CLOCK_MONOTONIC of its last sign of life
    "halt",             # guard (see above): every dispatcher gives its threads back and exits
    "fired_ns",         # guard: when it gave the threads back, 0 = never
    "given_back",       # guard: how many threads that were
    "guard_ready",      # guard: 1 once it watches
    "policy",           # supervisor: index in policy.POLICIES
    "mode_batch_ns", "mode_wait_max_ns", "mode_budget_ns",    # supervisor: policy.Batching
    "order_jitter_ns", "order_seed",                          # supervisor: policy.Order
    "script_cpu",       # supervisor: the host CPU whose dispatcher plays the script, NOBODY = none
    "script_first",     # supervisor: number of the first entry that is still to be played
    "script_head",      # supervisor: entries written, ever
))
assert _used <= HEADER_WORDS

SLOT_WORDS: Final = 32
SLOT_FIELDS, _used = _number((
    # The supervisor's words.
    "generation",       # unique to an admission; 0 = free
    "flags",            # ACTIVE, PAUSED, LENT
    "pid", "tid", "start_ticks",
    "mode",
    "want_cpu",         # host CPU or NOBODY
    "rate", "cap",      # 1e-9 of a host CPU; cap 0 = none
    "latency",          # index in model.LATENCIES
    "siblings",         # how many other vCPUs the VM has
    ("reserved", 4),
    # The owner's words: the dispatcher `have_cpu`.
    "have_cpu",         # host CPU or NOBODY
    "owned_generation", # the admission that the words below belong to
    "first_run_ns",     # total run time when its first owner took it: billing starts here
    "charged_ns",       # total run time up to which it has been billed
    "leak_ns",          # received while another vCPU (or none) was picked
    "slices", "migrations",
    "awake",            # 1: competes for the CPU
    "awake_since_ns",   # CLOCK_MONOTONIC of when it began to, while awake
    "awake_ns",         # time for which it competed before that
    "lag_ns",           # on its present host CPU; goes with it to the next. As of the last slice of `LAGS_KEPT` or
                        # fewer; of more, as of when it was last read in turn
    "budget_ns",        # of its cap, likewise
    "capped_ns",        # wanted the CPU, and its cap was used up
    "gone",             # 1: the kernel knows the thread no more
    "picked",           # 1: it is the one that runs
))
assert _used <= SLOT_WORDS
ACTIVE: Final = 1
PAUSED: Final = 2
LENT: Final = 4                # its time is lent to a script
LAGS_KEPT: Final = 32

CPU_WORDS: Final = 64
CPU_FIELDS, _used = _number((
    "cpu",              # supervisor, once: the host CPU's number
    "leave",            # supervisor: 1 = give everything back and exit in good order
    # The dispatcher's words.
    "pid", "start_ticks",            # which process it is, for the guard
    "heartbeat_ns", "seen_epoch",
    "head",             # records written to the ring, ever
    "cpu_ns",           # CPU time of all dispatchers of this host CPU so far
    "lost_threads",     # threads that ended while they were scheduled
    "refusals",         # calls that the kernel did not permit
    ("runnable", len(MODES)),        # awake vCPUs placed here, by mode
    "billed_ns",        # CLOCK_MONOTONIC up to which what its vCPUs received is in their words
    "script_at",        # number of the next entry of the script
))
assert _used <= CPU_WORDS

SCRIPT_ENTRIES: Final = 4096
_SCRIPT_WORDS: Final = 2       # slot (NOBODY: the policy's turn), length in ns

RECORD_WORDS: Final = 16
RECORD: Final = struct.Struct(f"@{RECORD_WORDS}q")   # native: each word copied whole
_RECORD_BYTES: Final = RECORD.size
_pack_into = RECORD.pack_into
RECORD_MIGRATED: Final = 1     # the vCPU's first slice on this host CPU
RECORD_IDLE: Final = 2         # time that no VM received was wanted by none
RECORD_ENTRY_SHIFT: Final = 8  # above: the number of the script's entry + 1, 0 = not of a script


class SharedMemoryError(Exception):
    """The descriptor is not a table of ours."""


class SliceRecord(NamedTuple):
    """One slice as a dispatcher saw it. `slot` -1: nobody was picked."""

    start_ns: int          # CLOCK_MONOTONIC
    end_ns: int
    planned_end_ns: int
    slot: int
    generation: int
    previous_slot: int
    mode: int              # index in MODES, -1 = none
    run_ns: int            # received by the picked vCPU
    others_software_ns: int    # found to have been received by other VMs meanwhile
    others_hardware_ns: int
    progress_before: int   # the guest's counter, 0 and 0 where it has none
    progress_after: int
    edge_late_ns: int      # worst lateness of a breath's edges within the slice
    breath_ns: int         # of the slice in which the CPU breathed
    decision_ns: int       # of the decision that began it (and of breath edges in it)
    flags: int

    @property
    def late_ns(self) -> int:
        """Lateness of the wake-up that ended the slice."""
        return max(0, self.end_ns - self.planned_end_ns)


def bucket(bounds: Sequence[int], value: int) -> int:
    """The index of the histogram bucket that `value` falls in (upper bounds are inclusive)."""
    return bisect_left(bounds, value)


class Shared:
    """The mapped table. `words[...]` is the raw access that the hot paths use."""

    def __init__(self, fd: int) -> None:
        size = os.fstat(fd).st_size
        if size < HEADER_WORDS * 8:
            raise SharedMemoryError(f"descriptor {fd} holds {size} bytes, no scheduler table")
        self.fd = fd
        self.map = mmap.mmap(fd, size)
        self.words = memoryview(self.map).cast("q")
        header = self.words
        self.slots = header[HEADER["slots"]]
        self.cpus = header[HEADER["cpus"]]
        self.ring_records = header[HEADER["ring_records"]]
        if header[HEADER["magic"]] != MAGIC or size != _size(
                self.slots, self.cpus, self.ring_records):
            self.close()
            raise SharedMemoryError(f"descriptor {fd} is not a scheduler table of this version")

    @classmethod
    def create(cls, cpus: Sequence[int], *, slots: int = 2048, ring_records: int = 4096) -> Shared:
        """A new table for these host CPUs; the caller owns `fd`. `ring_records`: a power of two."""
        if ring_records & (ring_records - 1) or ring_records <= 0:
            raise ValueError(f"ring_records must be a power of two, got {ring_records}")
        fd = os.memfd_create("mixvisor-sched", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            size = _size(slots, len(cpus), ring_records)
            os.ftruncate(fd, size)
            # A process with the descriptor could otherwise cut it short: SIGBUS for the rest.
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            first = struct.pack("@4q", MAGIC, slots, len(cpus), ring_records)
            os.pwrite(fd, first, HEADER["magic"] * 8)
            shared = cls(fd)
        except BaseException:
            os.close(fd)
            raise
        for index, cpu in enumerate(cpus):
            shared.words[shared.cpu(index) + CPU_FIELDS["cpu"]] = cpu
        for slot in range(slots):
            base = shared.slot(slot)
            shared.words[base + SLOT_FIELDS["want_cpu"]] = NOBODY
            shared.words[base + SLOT_FIELDS["have_cpu"]] = NOBODY
        shared.set("script_cpu", NOBODY)
        return shared

    def slot(self, index: int) -> int:
        """First word of a slot."""
        return HEADER_WORDS + index * SLOT_WORDS

    def cpu(self, index: int) -> int:
        """First word of the block of the index-th host CPU."""
        return (HEADER_WORDS + self.slots * SLOT_WORDS
                + index * (CPU_WORDS + self.ring_records * RECORD_WORDS))

    def ring(self, index: int) -> int:
        """First word of the ring of the index-th host CPU."""
        return self.cpu(index) + CPU_WORDS

    @property
    def script(self) -> int:
        """First word of the script."""
        return self.cpu(self.cpus)

    def get(self, name: str) -> int:
        """A word of the header."""
        return self.words[HEADER[name]]

    def set(self, name: str, value: int) -> None:
        self.words[HEADER[name]] = value

    def slot_get(self, index: int, name: str) -> int:
        return self.words[self.slot(index) + SLOT_FIELDS[name]]

    def slot_set(self, index: int, name: str, value: int) -> None:
        self.words[self.slot(index) + SLOT_FIELDS[name]] = value

    def cpu_get(self, index: int, name: str) -> int:
        return self.words[self.cpu(index) + CPU_FIELDS[name]]

    def cpu_words(self, index: int, name: str, count: int) -> tuple[int, ...]:
        """An array of a CPU's block."""
        at = self.cpu(index) + CPU_FIELDS[name]
        return tuple(self.words[at:at + count])

    def billed(self) -> dict[int, int]:
        """Of each host CPU, the time up to which what was received there is known."""
        return {self.cpu_get(index, "cpu"): self.cpu_get(index, "billed_ns") for index in range(self.cpus)}

    def bump(self) -> int:
        """Tell the dispatchers to look; returns the new epoch. Supervisor only."""
        epoch = self.words[HEADER["epoch"]] + 1
        self.words[HEADER["epoch"]] = epoch
        return epoch

    def close(self) -> None:
        """Unmap; the descriptor stays the caller's."""
        self.words.release()
        self.map.close()


def _size(slots: int, cpus: int, ring_records: int) -> int:
    return 8 * (HEADER_WORDS + slots * SLOT_WORDS
                + cpus * (CPU_WORDS + ring_records * RECORD_WORDS) + SCRIPT_ENTRIES * _SCRIPT_WORDS)


class ScriptWriter:
    """The supervisor's end of the script, from its next entry on."""

    def __init__(self, shared: Shared) -> None:
        self._words = shared.words
        self._first_word = shared.script
        self.first = self.head = shared.get("script_head")
        shared.set("script_first", self.first)

    def write(self, entries: Sequence[tuple[int, int]], played: int) -> int:
        """Append (slot, length) pairs as far as there is room; returns how many. *played*: `script_at`."""
        room = SCRIPT_ENTRIES - (self.head - max(played, self.first))
        for slot, length_ns in entries[:room]:
            at = self._first_word + self.head % SCRIPT_ENTRIES * _SCRIPT_WORDS
            self._words[at], self._words[at + 1] = slot, length_ns
            self.head += 1
        self._words[HEADER["script_head"]] = self.head
        return min(room, len(entries))


class ScriptReader:
    """A dispatcher's end; goes on where a dead predecessor stopped."""

    def __init__(self, shared: Shared, index: int) -> None:
        self._words = shared.words
        self._first_word = shared.script
        self._at_word = shared.cpu(index) + CPU_FIELDS["script_at"]
        self._words[self._at_word] = max(self._words[self._at_word], shared.get("script_first"))

    def peek(self) -> tuple[int, int, int] | None:
        """(number, slot, length) of the next entry; None: nothing is written yet."""
        words = self._words
        number = words[self._at_word]
        if number >= words[HEADER["script_head"]]:
            return None
        at = self._first_word + number % SCRIPT_ENTRIES * _SCRIPT_WORDS
        return number, words[at], words[at + 1]

    def advance(self) -> None:
        self._words[self._at_word] += 1


class RingWriter:
    """A dispatcher's end of its ring; goes on where a dead predecessor stopped."""

    def __init__(self, shared: Shared, index: int) -> None:
        self._words = shared.words
        self._map = shared.map
        self._head_at = shared.cpu(index) + CPU_FIELDS["head"]
        self._first = shared.ring(index) * 8
        self._mask = shared.ring_records - 1
        self.refresh()

    def refresh(self) -> None:
        """Somebody else wrote records in between."""
        self._head = self._words[self._head_at]

    def write(self, *record: int) -> None:
        """The fields of a SliceRecord, in order (a tuple would be made for nothing)."""
        _pack_into(
            self._map, self._first + (self._head & self._mask) * _RECORD_BYTES, *record)
        self._head += 1
        self._words[self._head_at] = self._head


class RingReader:
    """The supervisor's end of a ring. `lost` counts records that were overwritten unread."""

    def __init__(self, shared: Shared, index: int) -> None:
        self._shared = shared
        self._head_at = shared.cpu(index) + CPU_FIELDS["head"]
        self._first = shared.ring(index) * 8
        self._records = shared.ring_records
        self._next = 0
        self.lost = 0

    def read(self) -> list[SliceRecord]:
        """Records written since the last call, oldest first."""
        head = self._shared.words[self._head_at]
        first = self._skip(head)
        size = _RECORD_BYTES
        raw: list[bytes] = []
        for number in range(first, head):
            at = self._first + (number % self._records) * size
            raw.append(self._shared.map[at:at + size])
        # What the writer may have been overwriting while we copied is not to be believed:
        # everything up to and including the record whose place it is writing now.
        now = self._shared.words[self._head_at]
        torn = max(0, min(now + 1 - self._records - first, len(raw))) if raw else 0
        self.lost += torn
        self._next = head
        return [SliceRecord._make(RECORD.unpack(one)) for one in raw[torn:]]

    def _skip(self, head: int) -> int:
        """The first record to read: those already overwritten are lost."""
        oldest = max(self._next, head - self._records + 1)
        self.lost += oldest - self._next
        return oldest
