"""The usual slice of a dispatcher, in C: what a step costs while nothing changes.

Purpose.  A step of dispatcher.py costs 2.5 us warm and up to 100 us with the cold caches that it always finds after
some milliseconds of guests, because the interpreter touches hundreds of cache lines for it. steady.c
takes the same step in a few dozen. It is optional: setuptools builds it where there is a C compiler, and
without it (`load` gives None) Python takes every step, with the same decisions.

Theory.  A step is *usual* when the picked vCPU ran for most of the slice and is still awake, whoever had the rest of it
is as it was, nobody came, went, woke, fell asleep or was paused, and nobody here has a cap. Then only numbers change:
accounts, rates, which of the same vCPUs is picked, breaths. `Steady.run` copies those numbers into flat structures,
lets C sleep and step until something is not usual, and copies them back; Python takes that one step, whatever it is. C
never does half a step: it first only looks, and acts when all of it is usual. So policy, accounts and every corner of
them are Python's alone; what C repeats is kept equal by a test that drives both with the same host and compares
decisions, accounts, records and kernel calls to the last bit.

Invariants.  Between two calls of `run` this holds nothing that matters: it can be dropped at any moment. Numbers in C
are doubles and 64-bit integers as in Python, used in the same order.

Units: ns. Where it is poor: each return to Python costs some 15 us more than Python's step alone and more than 1 us a
vCPU here, so a host CPU whose vCPUs fall asleep and wake all the time gains little; a capped vCPU keeps its whole CPU
in Python.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

from ..vm.worker.status import FIELDS
from . import linux
from .linux import Level
from .policy import BatchRunqueue, Runqueue
from .shared import ACTIVE, CPU_FIELDS, HEADER, NOBODY, PAUSED, RECORD_WORDS, SLOT_FIELDS, SLOT_WORDS

if TYPE_CHECKING:
    from .dispatcher import Dispatcher, _Vcpu

__all__ = ["Calls", "Steady", "load"]

VERSION: Final = 10
_POLICIES_MAX: Final = 12
_LEVELS: Final = tuple(Level)
WORTH: Final = 32                  # vCPUs whose numbers are copied to C and back in the time that a step there saves
_word = ctypes.c_int64
_double = ctypes.c_double
_pointer = ctypes.c_void_p


class _State(ctypes.Structure):
    _fields_ = [(name, _word) for name in ("policy", "priority", "stopped")]


# An entry and a vCPU of steady.c, by its fields; the way back skips what C does not change.
_ENTRY: Final = struct.Struct("=3d5q3d")
_ENTRY_BACK: Final = struct.Struct("=3d3q40x")
_FIXED: Final = struct.Struct("=3Q8q")
_CHANGING: Final = struct.Struct("=10qd3q")
_VCPU_BACK: Final = struct.Struct("=88x6q64x")
_VCPU_SIZE: Final = _FIXED.size + _CHANGING.size


class Calls(ctypes.Structure):
    """The kernel's calls, replaced: for tests."""

    _fields_ = [
        ("now", ctypes.CFUNCTYPE(_word)),
        ("sleep_until", ctypes.CFUNCTYPE(_word, _word)),      # 1: interrupted
        ("run_ns", ctypes.CFUNCTYPE(_word, _word)),
        ("set", ctypes.CFUNCTYPE(_word, _word, _word, _word)),
    ]


class _Fields(ctypes.Structure):
    _fields_ = [
        *((name, _word) for name in (
            "halt", "epoch", "heartbeat", "timeout", "used_slots", "first_slot", "slot_words")),
        ("policy", _word * _POLICIES_MAX), ("policies", _word),
        *((name, _word) for name in (
            "leave", "beat", "seen_epoch", "head", "cpu_ns", "refusals", "billed",
            "want", "flags", "rate", "cap", "latency", "charged", "leak", "slices", "lag", "picked", "active",
            "active_mask")),
    ]


# Fields of `_Steady` and of a Dispatcher (with an underscore before them) that mean the same.
_SAME: Final = (
    "slice_ns", "slice_start", "slice_end", "slice_previous", "slice_progress", "slice_flags", "slice_breath",
    "slice_edge_late", "decision", "breathing", "edge", "edge_at", "early", "credit", "turn", "beat_seen", "epoch",
)


class _Steady(ctypes.Structure):
    _fields_ = [
        *((name, _word) for name in ("version", "size", "entry_size", "vcpu_size")),
        *((name, _pointer) for name in ("words", "block", "ring")),
        *((name, _word) for name in ("ring_mask", "cpu", "count", "awake_count")),
        ("vcpus", _pointer), ("entries", _pointer), ("calls", ctypes.POINTER(Calls)),
        ("at", _Fields), ("states", _State * (2 * len(Level))), ("state_of", _word * len(Level) * 2),
        ("sleeping", _word * 8), ("asked", _word * _POLICIES_MAX),
        ("virtual_ns", _double),
        *((name, _word) for name in (
            "weight", "current", "clock_ns", "picked_at_ns", "ratelimit_ns",
            "batches", "batch_ns", "wait_max_ns", "budget_ns", "mode", "jitter_ns", "random",
            "pick", "slice_ns", "slice_start", "slice_end", "slice_previous", "slice_progress", "slice_flags",
            "slice_breath", "slice_edge_late", "decision", "breathes", "breathing", "breath_ns", "edge", "edge_at",
            "early", "credit", "turn", "beat_seen", "epoch", "earlier_cpu_ns", "steps", "reads",
            "limit", "before", "now", "error")),
    ]


class Library(Protocol):
    steady_size: Callable[[int], int]
    steady_run: Callable[[Any], None]


def load() -> Library | None:
    """The compiled half, None where it was not built or does not fit this module."""
    for path in sorted(Path(__file__).parent.glob("_steady*.so")):
        try:
            library = ctypes.CDLL(str(path))
            library.steady_size.argtypes, library.steady_size.restype = [_word], _word
            library.steady_run.argtypes, library.steady_run.restype = [ctypes.POINTER(_Steady)], None
        except (OSError, AttributeError):
            continue
        sizes = (VERSION, ctypes.sizeof(_Steady), _ENTRY.size, _VCPU_SIZE, ctypes.sizeof(Calls))
        if tuple(library.steady_size(index) for index in range(len(sizes))) == sizes:
            return cast(Library, library)
    return None


class _Buffer(ctypes.Structure):
    """CPython's Py_buffer: the way to the address of a mapping that may not be written."""

    _fields_ = [
        ("address", _pointer), ("owner", ctypes.py_object), ("length", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t), ("readonly", ctypes.c_int), ("dimensions", ctypes.c_int),
        ("format", ctypes.c_char_p), *((name, _pointer) for name in ("shape", "strides", "suboffsets", "internal")),
    ]


def _address_of(view: memoryview) -> int:
    """Where a view's first byte lies. The view must outlive every use."""
    buffer = _Buffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(view), ctypes.byref(buffer), 0)
    address = buffer.address or 0
    ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))
    return address


class Steady:
    """The C half of one dispatcher. It reads and writes the private fields of that and of its run queue:
    they are one thing in two languages.
    """

    def __init__(self, library: Library, dispatcher: Dispatcher, calls: Calls | None = None) -> None:
        self._run = library.steady_run
        self._dispatcher = dispatcher
        shared, settings = dispatcher._shared, dispatcher._settings
        self._kept: list[object] = [calls]
        self._g = g = _Steady()
        self._words_at = words_at = _address_of(shared.words)
        g.words, g.block = words_at, words_at + 8 * shared.cpu(settings.index)
        g.ring, g.ring_mask = words_at + 8 * shared.ring(settings.index), shared.ring_records - 1
        g.cpu = settings.cpu
        if calls is not None:
            g.calls = ctypes.pointer(calls)
        g.at = self._fields(dispatcher)
        self._states = self._number_states()
        self._numbers = {id(state): number for number, state in enumerate(self._states)}
        g.sleeping[:] = [*dispatcher.SLEEPING, *[-1] * (8 - len(dispatcher.SLEEPING))]
        g.breathes = dispatcher._breathes
        self._make_room(WORTH)
        self._rest = 0                       # Python's steps until C takes some again

    def _fields(self, dispatcher: Dispatcher) -> _Fields:
        at = _Fields(
            halt=HEADER["halt"], epoch=HEADER["epoch"], heartbeat=HEADER["heartbeat_ns"],
            timeout=HEADER["guard_timeout_ns"], used_slots=HEADER["used_slots"],
            first_slot=dispatcher._shared.slot(0), slot_words=SLOT_WORDS, policies=len(dispatcher.POLICY_WORDS),
            leave=CPU_FIELDS["leave"], beat=CPU_FIELDS["heartbeat_ns"], seen_epoch=CPU_FIELDS["seen_epoch"],
            head=CPU_FIELDS["head"], cpu_ns=CPU_FIELDS["cpu_ns"], refusals=CPU_FIELDS["refusals"],
            billed=CPU_FIELDS["billed_ns"],
            want=SLOT_FIELDS["want_cpu"], flags=SLOT_FIELDS["flags"], rate=SLOT_FIELDS["rate"],
            cap=SLOT_FIELDS["cap"], latency=SLOT_FIELDS["latency"], charged=SLOT_FIELDS["charged_ns"],
            leak=SLOT_FIELDS["leak_ns"], slices=SLOT_FIELDS["slices"],
            lag=SLOT_FIELDS["lag_ns"], picked=SLOT_FIELDS["picked"],
            active=ACTIVE, active_mask=ACTIVE | PAUSED)
        for index, name in enumerate(dispatcher.POLICY_WORDS):
            at.policy[index] = HEADER[name]
        return at

    def _number_states(self) -> list[linux.State]:
        """Every state of this kind of dispatch, numbered; levels that share one share its number."""
        states: list[linux.State] = []
        for breathing in (False, True):
            for level, state in enumerate(linux.states_of(self._dispatcher._settings.kind, breathing=breathing)):
                if not any(state is known for known in states):
                    policy = -1 if state.policy is None else state.policy
                    self._g.states[len(states)] = _State(policy, state.priority, state.stopped)
                    states.append(state)
                self._g.state_of[breathing][level] = next(
                    number for number, known in enumerate(states) if known is state)
        return states

    def possible(self) -> bool:
        """Whether the next step may be a usual one. Cheap: asked before every sleep."""
        d = self._dispatcher
        pick = d._pick
        if self._rest:
            self._rest -= 1
            return False
        return (
            pick is not None and pick.awake and pick.clock is not None and not d._capped and not d._watched
            and not d._relevel and not d._retry and not d._plain and type(d._queue) in (Runqueue, BatchRunqueue))

    def run(self, earlier_cpu_ns: int = 0, before: int = 0, limit: int = 0) -> int | None:
        """Sleep and take usual steps; returns the time at which the dispatcher is to take a step.

        None: none is due yet (*limit* steps were taken, or the picked thread has ended). *earlier_cpu_ns*: CPU time
        of this host CPU's dispatchers before this one. *before*: when the last step was done; what has been spent
        since then on the way to C is part of that decision.
        """
        g = self._g
        self._load()
        g.earlier_cpu_ns, g.before, g.limit, g.error = earlier_cpu_ns, before, limit, 0
        taken = g.steps
        self._run(g)
        self._store()
        # With many vCPUs the way to C and back costs what some steps there save: after fewer, not at once again.
        worth = len(self._dispatcher._order) // WORTH
        self._rest = worth if g.steps - taken < worth else 0
        if g.error:
            raise OSError(g.error, os.strerror(g.error))
        return g.now or None

    # -- the numbers, to C and back ----------------------------------------------------------

    def _load(self) -> None:
        d, g = self._dispatcher, self._g
        queue, order = d._queue, d._order
        if len(order) > self._room:
            self._make_room(2 * len(order))
        for name in _SAME:
            setattr(g, name, getattr(d, "_" + name))
        g.breath_ns = d._breath_ns
        for index, value in enumerate(d._asked):
            g.asked[index] = value
        g.count = len(order)
        place = {entry.slot: index for index, entry in enumerate(queue._awake)}
        where: dict[int, int] = {}
        vcpus, numbers, entries, at = self._vcpus, self._numbers, queue._entries, 0
        for index, vcpu in enumerate(order):
            slot = vcpu.slot
            where[slot] = index
            vcpus[at:at + _FIXED.size] = vcpu.native or self._fix(vcpu)
            entry = place.get(slot, -1)
            lag, asleep_at, weight = 0.0, 0, 0
            if entry < 0 and not vcpu.paused:
                asleep = entries[slot]
                lag, asleep_at, weight = asleep.lag, asleep.asleep_at, asleep.weight
            _CHANGING.pack_into(
                vcpus, at + _FIXED.size, vcpu.charged, vcpu.rate, vcpu.level, numbers[id(vcpu.state)], vcpu.fresh, 0,
                vcpu.latency, vcpu.awake, vcpu.paused, entry, lag, asleep_at, weight, 0)
            at += _VCPU_SIZE
        if d._pick is not None:
            g.pick = where[d._pick.slot]
        g.awake_count = len(queue._awake)
        at = 0
        for entry in queue._awake:
            _ENTRY.pack_into(
                self._entries, at, entry.v, entry.start, entry.deadline, entry.weight, entry.served, entry.request_ns,
                entry.mode, where[entry.slot], *entry.latency)
            at += _ENTRY.size
        g.virtual_ns, g.weight = queue._virtual, queue._weight
        g.current = NOBODY if queue._current is None else place.get(queue._current, NOBODY)
        g.clock_ns, g.picked_at_ns, g.ratelimit_ns = queue._clock_ns, queue._picked_at_ns, queue._ratelimit_ns
        g.jitter_ns, g.random = queue._jitter_ns, queue._random
        g.batches = isinstance(queue, BatchRunqueue)
        if isinstance(queue, BatchRunqueue):
            g.batch_ns, g.wait_max_ns = queue._batch_ns, queue._wait_max_ns
            g.budget_ns, g.mode = queue._budget_ns, queue._mode

    def _make_room(self, count: int) -> None:
        self._room = count
        self._vcpus, self._entries = bytearray(count * _VCPU_SIZE), bytearray(count * _ENTRY.size)
        # While they are held so, an array of bytes does not move.
        self._still = memoryview(self._vcpus), memoryview(self._entries)
        self._g.vcpus, self._g.entries = map(_address_of, self._still)

    def _fix(self, vcpu: _Vcpu) -> bytes:
        """What does not change while it is here, packed and kept."""
        progress, kind, clock = vcpu.progress, *(vcpu.clock.native if vcpu.clock is not None else (0, 0))
        vcpu.native = _FIXED.pack(
            self._words_at + 8 * vcpu.base,
            0 if vcpu.status is None else _address_of(vcpu.status) + 8 * FIELDS["phase"],
            _address_of(progress) if isinstance(progress, memoryview) else 0,
            progress.fd if isinstance(progress, linux.EventCounter) else -1,
            kind, clock, vcpu.pid, vcpu.tid, vcpu.slot, vcpu.generation, vcpu.mode)
        return vcpu.native

    def _store(self) -> None:
        d, g = self._dispatcher, self._g
        queue, order = d._queue, d._order
        for name in _SAME:
            setattr(d, "_" + name, getattr(g, name))
        d._breathing = bool(g.breathing)
        d._states = linux.states_of(d._settings.kind, breathing=d._breathing)
        d._pick = order[g.pick]
        for entry, out in zip(queue._awake, _ENTRY_BACK.iter_unpack(self._entries), strict=False):
            entry.v, entry.start, entry.deadline, entry.weight, entry.served, entry.request_ns = out
        queue._virtual, queue._weight = g.virtual_ns, g.weight
        queue._current = queue._awake[g.current].slot if g.current >= 0 else queue._current
        queue._clock_ns, queue._picked_at_ns = g.clock_ns, g.picked_at_ns
        queue._random = g.random % (1 << 64)
        if isinstance(queue, BatchRunqueue):
            queue._mode = g.mode
        d._ring.refresh()
        gone = []
        states = self._states
        for vcpu, out in zip(order, _VCPU_BACK.iter_unpack(self._vcpus), strict=False):
            vcpu.charged, rate, level, state, fresh, ended = out
            vcpu.level, vcpu.state, vcpu.fresh = _LEVELS[level], states[state], bool(fresh)
            if rate != vcpu.rate:
                vcpu.rate = rate
                if not vcpu.awake:
                    d._follow_rate(vcpu)
            if ended:
                gone.append(vcpu)
        for vcpu in gone:
            d._ended(vcpu)


assert RECORD_WORDS == 16      # steady.c writes them one by one
