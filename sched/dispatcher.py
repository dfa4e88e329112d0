"""The dispatcher: which of the vCPUs placed on one host CPU runs the next slice.

Purpose.  One small process a host CPU, pinned to it, above its VMs in priority. While it runs,
every VM thread on its CPU is frozen, so what it reads is exact and what it decides is so at once.

Theory.  At the end of each slice (times on a fixed grid): bill the picked thread
what the kernel says it ran, and whoever else may have run; ask the policy's run queue (policy/)
for the next; move threads between levels (linux.py) only where something changes; log the slice.
`Dispatcher.step(now)` is all of that, over a `Kernel` that tests replace; dispatching.py makes a process of it.

Accounting.  Where the picked thread's run time explains the time that passed, nobody else ran
and nobody else is read, except a few in turn, so that each is read about every 250 ms. Where it
does not, all are read and looked at; of more than `AT_ONCE` so many in turn, until it is explained. Nothing is lost
in any case: readings are totals.

Sleepers.  A vCPU is asleep when its status page says so and it is not computing; without a
page, when it did not run and the kernel says that it waits. A sleeper is never picked
while another is awake. It dozes above the picked one, so that it runs the moment it wakes and
competes from the next slice; one that is ahead of its share waits like anybody else until that
is worn off. So waking early gains latency, never time, and so does lying about it.

Coming and going.  Who moves to another host CPU leaves at the end of a slice, which the supervisor ends early for it
(`interrupt`): with long slices a CPU would else have one too few for that long, and another one too many. Until one
that is on its way has come, slices are short; once it is here, the pick has no claim to stay.

Breathing (precise only).  The kernel freezes real-time threads that never leave the CPU to
others; so for a tenth of the time nothing of ours is: 2 to 5 ms of every 20 to 50, whole slices
where they are that short, so that the edges are slice ends and wake nobody. The picked one runs
as SCHED_OTHER then; those that wait are stopped, because the fair class is not exact over so
short a time (linux.py); those that doze are left alone. After a breath, `READY` of them go on
and wait at FIFO 1, in case that the pick falls asleep; any more stay stopped until they are
picked. So a breath costs the same for five as for five hundred.

Script.  While the CPU's order is lent to a measurement (loan.py) the run queue is one that plays a
script; slices then have their own lengths, and breaths are as long and as rare as they may be.

Never waits for the supervisor: a stale heartbeat, `halt` or any error of its own ends in every
thread given back. Where it is poor: a pick that falls asleep in mid-slice leaves the rest of
the slice to the kernel's choice among the others (billed, and corrected in the next slices); if
it does so in a breath, or with all of those that are ready, the CPU idles for the rest of it. A
step wakes to cold caches, which makes it many times as dear as a warm one: so the usual step is taken in C where that
was compiled (steady.py), and here where it was not or something is not usual.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Protocol, cast

from ..vm.worker.status import FIELDS, Phase
from . import linux
from .inputs import Logged
from .linux import Kernel, Level, RunClock, State
from .model import Slot
from .policy import POLICIES, Batching, Order, Runqueue, ScriptedRunqueue
from .shared import (
    ACTIVE,
    CPU_FIELDS,
    HEADER,
    LAGS_KEPT,
    LENT,
    MODES,
    NOBODY,
    ONE_CPU,
    PAUSED,
    RECORD_ENTRY_SHIFT,
    RECORD_IDLE,
    RECORD_MIGRATED,
    SLOT_FIELDS,
    SLOT_WORDS,
    RingWriter,
    ScriptReader,
    Shared,
)
from .tape import InputFile, Manner, Tape

__all__ = ["INTERRUPT", "Dispatcher", "Inbox", "Parcel", "Settings"]

# Blocked and waited for by the process around a dispatcher: the slice is to end. One that is ignored where it is not.
INTERRUPT: Final = signal.SIGURG
IDLE_TICK_NS: Final = 5_000_000          # nobody awake: how soon a waker is noticed
AWAITED_TICK_NS: Final = 200_000         # one is on the way from another host CPU; longer each time
UNEXPLAINED_NS: Final = 150_000          # of a slice: interrupts, the timer, our own work
AT_ONCE: Final = 32                      # vCPUs that are read after one slice
READ_ALL_WITHIN_NS: Final = 250_000_000  # each thread is read at least this often
COMPUTING: Final = 4                     # asleep by its own word, yet ran over 1/4 of the time
READY: Final = 4                         # waiting vCPUs that a breath's end lets go on
BREATH_NS: Final = 2_000_000             # shorter ones cost more than they give
BREATH_MAX_NS: Final = 5_000_000         # at ten times that the kernel is still far from freezing
BREATHLESS: Final = 9                    # breaths between one and the next
HEARTBEAT_EVERY_NS: Final = 20_000_000
FOREVER: Final = 1 << 62
_NOTHING: Final = (0, 0)

_SLEEPING: Final = frozenset((int(Phase.SLEEPING), int(Phase.PAUSED), int(Phase.ENDED)))
_PHASE: Final = FIELDS["phase"]
_WANT: Final = SLOT_FIELDS["want_cpu"]
_HAVE: Final = SLOT_FIELDS["have_cpu"]
_GENERATION: Final = SLOT_FIELDS["generation"]
_FLAGS: Final = SLOT_FIELDS["flags"]
_RATE: Final = SLOT_FIELDS["rate"]
_CAP: Final = SLOT_FIELDS["cap"]
_LATENCY: Final = SLOT_FIELDS["latency"]
_OWNED: Final = SLOT_FIELDS["owned_generation"]
_CHARGED: Final = SLOT_FIELDS["charged_ns"]
_LEAK: Final = SLOT_FIELDS["leak_ns"]
_SLICES: Final = SLOT_FIELDS["slices"]
_MIGRATIONS: Final = SLOT_FIELDS["migrations"]
_AWAKE: Final = SLOT_FIELDS["awake"]
_AWAKE_SINCE: Final = SLOT_FIELDS["awake_since_ns"]
_AWAKE_NS: Final = SLOT_FIELDS["awake_ns"]
_LAG: Final = SLOT_FIELDS["lag_ns"]
_BUDGET: Final = SLOT_FIELDS["budget_ns"]
_CAPPED: Final = SLOT_FIELDS["capped_ns"]
_GONE: Final = SLOT_FIELDS["gone"]
_PICKED: Final = SLOT_FIELDS["picked"]
_EPOCH: Final = HEADER["epoch"]
_HALT: Final = HEADER["halt"]
_HEARTBEAT: Final = HEADER["heartbeat_ns"]
_TIMEOUT: Final = HEADER["guard_timeout_ns"]
_LEAVE: Final = CPU_FIELDS["leave"]
_BEAT: Final = CPU_FIELDS["heartbeat_ns"]
_REFUSALS: Final = CPU_FIELDS["refusals"]
_RUNNABLE: Final = CPU_FIELDS["runnable"]
_BILLED: Final = CPU_FIELDS["billed_ns"]
_POLICY: Final = (
    "policy", "slice_ns", "ratelimit_ns", "mode_batch_ns", "mode_wait_max_ns", "mode_budget_ns", "order_jitter_ns",
    "order_seed", "script_cpu")
_POLICIES: Final = tuple(POLICIES.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What does not change while a dispatcher lives."""

    kind: str                       # linux.KINDS
    cpu: int
    index: int                      # of its block in the shared table
    home_cpus: tuple[int, ...]      # where a thread may run that is given back
    floats: bool = False            # only accounts are kept here: affinity is the supervisor's


@dataclass(frozen=True, slots=True)
class Parcel:
    """The descriptors of a vCPU, mapped: its status page and its guest's progress counter."""

    generation: int
    status: memoryview | None = None     # 64-bit words
    progress: memoryview | linux.EventCounter | None = None   # one 64-bit word


class Inbox(Protocol):
    def drain(self) -> Iterable[tuple[int, Parcel | InputFile]]:
        """(slot, parcel) of every vCPU announced since the last call, (NOBODY, file) to record into. Never waits."""
        ...


def breath_ns(slice_ns: int) -> int:
    """How long a breath lasts: whole slices where they are short."""
    if slice_ns > BREATH_MAX_NS:
        return BREATH_MAX_NS
    return -(-BREATH_NS // slice_ns) * slice_ns


@dataclass(slots=True, eq=False)
class _Vcpu:
    slot: Slot
    base: int                        # first word of its slot
    generation: int
    pid: int
    tid: int
    mode: int
    clock: RunClock | None           # None: the thread has ended
    status: memoryview | None
    progress: memoryview | linux.EventCounter | None
    charged: int                     # run time billed so far (a total)
    state: State                     # what the kernel was told last
    level: Level = Level.FREE
    awake: bool = False
    awake_since: int = 0
    paused: bool = False
    fresh: bool = True               # has not been picked on this CPU yet
    ran: int = 0                     # since the last decision
    watched: bool = False            # a sleeper in debt, or one that says so and yet ran: may change any moment
    doze_at: int = 0                 # overdrawn sleeper: when it may run at once again
    rate: int = 0
    cap: int = 0
    latency: int = 0
    native: bytes | None = None      # what of this does not change, for C (steady.py)


class Dispatcher:
    """One host CPU. `step(now)` answers when it wants to be called again, None: it is over.

    The slice that runs now is spread over the `_slice_*` fields: this is the one hot path of
    the project, and cold caches make every Python operation in it cost several times its price.
    """

    SLEEPING: Final = tuple(sorted(_SLEEPING))
    POLICY_WORDS: Final = _POLICY

    # Beyond thirty attributes CPython gives up its fast access, except by slots.
    __slots__ = (
        "_arrived", "_asked", "_base", "_beat_seen", "_breath_ns", "_breathes", "_breathing", "_capped", "_credit",
        "_decision", "_early", "_edge", "_edge_at", "_epoch", "_inbox", "_kernel", "_lags", "_order", "_parcels",
        "_pick", "_plain", "_queue", "_read", "_relevel", "_retry", "_ring", "_script", "_settings", "_shared",
        "_slice_breath", "_slice_edge_late",
        "_slice_end", "_slice_flags", "_slice_ns", "_slice_previous", "_slice_progress", "_slice_start", "_states",
        "_tape", "_turn", "_vcpus", "_watched", "_words",
    )

    def __init__(
        self, shared: Shared, settings: Settings, kernel: Kernel, inbox: Inbox, now: int,
    ) -> None:
        self._shared = shared
        self._words = shared.words
        self._settings = settings
        self._kernel = kernel
        self._inbox = inbox
        self._slice_ns = shared.get("slice_ns")
        self._tape: Tape | None = None     # where the run queue's inputs are noted
        self._asked = self._wanted()
        self._script: ScriptedRunqueue | None = None     # the queue, while it plays one
        self._queue = self._new_queue()
        self._base = shared.cpu(settings.index)
        self._ring = RingWriter(shared, settings.index)
        self._parcels: dict[int, Parcel] = {}
        self._vcpus: dict[Slot, _Vcpu] = {}
        self._order: list[_Vcpu] = []      # for reading in turn
        self._turn = 0
        self._read: list[_Vcpu] = []       # of these the clocks were read after the last slice
        self._credit = 0
        self._epoch = -1
        self._retry = 0                    # so often a vCPU was ours, and its last owner still had it
        self._arrived = False              # somebody came in this step
        self._lags: dict[Slot, int] = {}   # before somebody went for whom another is to come
        self._capped = 0                   # how many of ours have a cap
        self._relevel = False              # somebody's level may have to change
        self._pick: _Vcpu | None = None
        self._slice_start = self._slice_end = now
        self._slice_previous = NOBODY
        self._slice_progress = 0
        self._slice_flags = 0
        self._slice_breath = 0
        self._slice_edge_late = 0
        self._decision = 0                 # ns spent deciding for this slice
        self._beat_seen = now
        self._breathes = settings.kind == "precise"
        self._breathing = False
        self._breath_ns = breath_ns(self._slice_ns)
        self._edge = now + BREATHLESS * self._breath_ns if self._breathes else FOREVER
        self._edge_at = now
        self._early = self._slice_ns * 3 // 4
        self._states = linux.states_of(settings.kind)
        self._plain = settings.kind == "plain"
        self._watched: list[_Vcpu] = []    # looked at after every slice: see `_Vcpu.watched`
        for mode in range(len(MODES)):
            self._words[self._base + _RUNNABLE + mode] = 0

    # -- the step ----------------------------------------------------------------------------

    def step(self, now: int) -> int | None:
        """All that is due at `now` (CLOCK_MONOTONIC ns); returns the next time, None: leave."""
        words = self._words
        if words[_HALT] or words[self._base + _LEAVE]:
            return None
        if now >= self._slice_end:
            if now - self._beat_seen >= HEARTBEAT_EVERY_NS:
                self._beat_seen = now
                words[self._base + _BEAT] = now
                if now - words[_HEARTBEAT] > 2 * words[_TIMEOUT]:
                    return None
            explained = self._finish(now)
            if words[_EPOCH] != self._epoch or self._retry:
                self._sync(now)
            pick = self._pick
            if explained and pick is not None and pick.awake and not self._watched \
                    and pick.status is not None and pick.status[_PHASE] not in _SLEEPING:
                pick.ran = 0             # the usual slice: nothing changed
            else:
                self._observe(now, explained)
            if self._edge - now < self._early:
                self._cross_edge(now)
                self._decide(now)
                self._follow_breath()
            else:
                self._decide(now)
        elif now >= self._edge:
            self._slice_edge_late = max(self._slice_edge_late, now - self._edge)
            if self._breathing:
                self._slice_breath += now - max(self._edge_at, self._slice_start)
            self._cross_edge(now)
            self._follow_breath()
        end, edge = self._slice_end, self._edge
        return end if end < edge else edge

    def interrupt(self, now: int) -> None:
        """Let the slice end by `now`: a vCPU is to come or to go. Not while a script is played."""
        if self._script is None and now < self._slice_end:
            self._slice_end = now

    def note_decision(self, took_ns: int) -> None:
        """How long the last step took, from wake-up to going to sleep."""
        self._decision += took_ns

    def leave(self, now: int) -> None:
        """Let go of everything, whatever state it is in."""
        for vcpu in list(self._vcpus.values()):
            self._charge(vcpu)
            self._free(vcpu)
            self._drop(vcpu, now)
        self._words[self._base + _BEAT] = now
        if self._tape is not None:
            self._tape.close()
            self._tape = None

    # -- accounts ----------------------------------------------------------------------------

    def _charge(self, vcpu: _Vcpu) -> int:
        """Bill what the thread ran since it was last read; returns that."""
        if vcpu.clock is None:
            return 0
        try:
            run = vcpu.clock.read()
        except OSError:
            self._ended(vcpu)
            return 0
        ran = run - vcpu.charged
        words, base = self._words, vcpu.base
        if ran <= 0:
            # Zero, or a reading a little behind one taken on another CPU: billed next time.
            return 0
        vcpu.charged = words[base + _CHARGED] = run
        vcpu.ran += ran
        if vcpu is not self._pick:
            words[base + _LEAK] += ran
        # Where the kernel alone picks, what it withholds grows for ever, and is nobody's debt.
        if not (vcpu.paused or self._plain):
            self._queue.charge(vcpu.slot, ran)
        return ran

    def _finish(self, now: int) -> bool:
        """Account for the time since the last decision and log the slice.

        Whether the picked one's run time explains all of it: then nobody else can have changed.
        """
        start, pick, words, queue = self._slice_start, self._pick, self._words, self._queue
        elapsed = now - start
        self._read = self._order
        if elapsed <= 0:
            return False
        queue.advance(elapsed)
        run = self._charge(pick) if pick is not None else 0
        others = _NOTHING
        explained = elapsed - run <= UNEXPLAINED_NS + self._decision
        if not explained:
            others = self._charge_others(elapsed - run)
        elif len(self._order) > 1:
            self._credit += elapsed * len(self._order)
            while self._credit >= READ_ALL_WITHIN_NS:
                self._credit -= READ_ALL_WITHIN_NS
                self._turn = (self._turn + 1) % len(self._order)
                vcpu = self._order[self._turn]
                if vcpu is not pick and (ran := self._charge(vcpu)):
                    found: list[int] = [*others]
                    found[vcpu.mode] += ran
                    others = found
                if not vcpu.paused:
                    if vcpu is not pick:
                        self._look(vcpu, now, READ_ALL_WITHIN_NS)
                    words[vcpu.base + _LAG] = queue.lag_ns(vcpu.slot)
        if len(self._order) <= LAGS_KEPT:
            for vcpu in self._order:
                if not vcpu.paused:
                    words[vcpu.base + _LAG] = queue.lag_ns(vcpu.slot)
        words[self._base + _BILLED] = now
        flags = self._slice_flags
        if self._breathing:
            since = self._edge_at
            self._slice_breath += now - (since if since > start else start)
        if pick is None:
            self._ring.write(
                start, now, self._slice_end, NOBODY, 0, self._slice_previous, NOBODY, 0,
                others[0], others[1], 0, 0, self._slice_edge_late, self._slice_breath,
                self._decision, flags | RECORD_IDLE)
            return False
        words[pick.base + _SLICES] += 1
        # A pick that sleeps leaves the CPU to any other vCPU that wants it, so what is left
        # over then was wanted by nobody.
        if run * 2 < elapsed and (pick.status is None or pick.status[_PHASE] in _SLEEPING):
            flags |= RECORD_IDLE
        progress = pick.progress[0] if pick.progress is not None else 0
        self._ring.write(
            start, now, self._slice_end, pick.slot, pick.generation, self._slice_previous,
            pick.mode, run, others[0], others[1], self._slice_progress, progress,
            self._slice_edge_late, self._slice_breath, self._decision, flags)
        return explained

    def _charge_others(self, unexplained: int) -> list[int]:
        """Bill whoever may have run beside the pick; returns what they did, by mode."""
        pick, order = self._pick, self._order
        others = [0, 0]
        if len(order) <= AT_ONCE:
            for vcpu in order:
                if vcpu is not pick:
                    others[vcpu.mode] += self._charge(vcpu)
            return others
        self._read = read = [*self._watched]
        for vcpu in self._watched:
            if vcpu is not pick:
                others[vcpu.mode] += self._charge(vcpu)
        if pick is not None and not pick.watched:
            read.append(pick)
        for _ in range(AT_ONCE):
            if unexplained - others[0] - others[1] <= UNEXPLAINED_NS + self._decision:
                break
            self._turn = (self._turn + 1) % len(order)
            vcpu = order[self._turn]
            if vcpu is not pick and not vcpu.watched:
                others[vcpu.mode] += self._charge(vcpu)
                read.append(vcpu)
        return others

    # -- who is here -------------------------------------------------------------------------

    def _sync(self, now: int) -> None:
        """Let go of what was taken from us, take what was given, follow changed parameters."""
        words = self._words
        epoch = words[_EPOCH]
        retry, self._retry = self._retry + 1, 0
        self._relevel = True
        cpu = self._settings.cpu
        asked = self._wanted()
        if asked != self._asked:
            self._asked = asked
            self._slice_ns = words[HEADER["slice_ns"]]
            old, self._queue = self._queue, self._new_queue()
            self._queue.take_over(old)
            self._follow_tape()
            self._breath_ns = breath_ns(self._slice_ns)
        for slot, parcel in self._inbox.drain():
            if isinstance(parcel, InputFile):
                self._record_inputs(parcel)
            else:
                self._parcels[slot] = parcel
        leaving = [vcpu for vcpu in self._order if words[vcpu.base + _WANT] != cpu]
        if leaving and not self._lags and self._script is None and len(self._order) <= LAGS_KEPT:
            self._lags = {v.slot: self._queue.lag_ns(v.slot) for v in self._order if not v.paused}
        for vcpu in leaving:
            self._release(vcpu, now)
        for vcpu in self._order:
            self._follow(vcpu, now)
        used = words[HEADER["used_slots"]]
        first = self._shared.slot(0)
        wants = words[first + _WANT:first + used * SLOT_WORDS:SLOT_WORDS].tolist()
        for index, want in enumerate(wants):
            if want == cpu and Slot(index) not in self._vcpus:
                base = first + index * SLOT_WORDS
                if words[base + _HAVE] == NOBODY:
                    self._take(Slot(index), base, now)
                    self._arrived = True
                else:
                    self._retry = retry
        self._capped = sum(1 for vcpu in self._order if vcpu.cap)
        if self._arrived:
            self._settle()
        if not self._retry:
            self._lags.clear()
        self._epoch = epoch
        words[self._base + CPU_FIELDS["seen_epoch"]] = epoch

    def _settle(self) -> None:
        """Somebody came, perhaps in place of another: all others are owed what they were before.

        In between those left behind owed nobody anything, and one alone is never ahead: that would be forgiven.
        """
        queue = self._queue
        more = [(vcpu.slot, self._lags[vcpu.slot] - queue.lag_ns(vcpu.slot)) for vcpu in self._order
                if vcpu.slot in self._lags and not vcpu.paused]
        for slot, ns in more:
            queue.owe(slot, ns)

    def _record_inputs(self, file: InputFile) -> None:
        """Note what the run queue is told from now on; of a file that is none: no longer (tape.py)."""
        if isinstance(self._queue, Logged):
            self._queue = self._queue.plain
        if self._tape is not None:
            self._tape.close()
            self._tape = None
        if file.fd >= 0:
            self._tape = Tape(file, self._settings.cpu)
            self._follow_tape()

    def _follow_tape(self) -> None:
        if self._tape is None:
            return
        if self._script is not None:
            self._tape.end()
            return
        # Its type is not ours to say: it forwards every call to what it was.
        self._queue = cast(Runqueue, self._tape.follow(self._manner(), self._queue))

    def _manner(self) -> Manner:
        policy, slice_ns, ratelimit_ns, batch_ns, wait_max_ns, budget_ns, jitter_ns, seed, _scripted = self._asked
        # Words are written one by one: a shorter slice may be seen before what depends on it.
        return Manner(
            policy=_POLICIES[policy].name, slice_ns=slice_ns, ratelimit_ns=min(ratelimit_ns, slice_ns),
            batching=Batching(batch_ns=batch_ns, wait_max_ns=wait_max_ns, budget_ns=budget_ns),
            order=Order(jitter_ns=min(jitter_ns, slice_ns), seed=seed))

    def _wanted(self) -> tuple[int, ...]:
        """Policy and settings as the supervisor wants them now, and who is to play a script."""
        return tuple(map(self._shared.get, _POLICY))

    def _new_queue(self) -> Runqueue:
        how = self._manner()
        self._script = None
        if self._asked[-1] == self._settings.cpu:
            self._script = ScriptedRunqueue(
                ScriptReader(self._shared, self._settings.index), how.slice_ns, how.ratelimit_ns)
            return self._script
        return POLICIES[how.policy].runqueue(
            how.slice_ns, how.ratelimit_ns, how.batching, how.order, self._settings.cpu)

    def _take(self, slot: Slot, base: int, now: int) -> None:
        words, kernel = self._words, self._kernel
        generation = words[base + _GENERATION]
        pid, tid, mode = (words[base + SLOT_FIELDS[name]] for name in ("pid", "tid", "mode"))
        new = words[base + _OWNED] != generation
        if new:
            for name in ("leak_ns", "slices", "migrations", "awake", "awake_ns", "lag_ns",
                         "budget_ns", "capped_ns", "gone", "picked", "first_run_ns", "charged_ns"):
                words[base + SLOT_FIELDS[name]] = 0
        else:
            words[base + _MIGRATIONS] += 1
        parcel = self._parcels.pop(slot, None)
        if parcel is None or parcel.generation != generation:
            parcel = Parcel(generation)
        vcpu = _Vcpu(slot, base, generation, pid, tid, mode, None, parcel.status, parcel.progress,
                     words[base + _CHARGED], self._states[Level.FREE])
        self._vcpus[slot] = vcpu
        self._order.append(vcpu)
        self._enter(vcpu, now)
        words[base + _HAVE] = self._settings.cpu
        try:
            vcpu.clock = kernel.run_clock(pid, tid, alone=not words[base + SLOT_FIELDS["siblings"]])
            if not self._settings.floats:
                kernel.pin(tid, (self._settings.cpu,))
            if new:
                # What it ran before nobody was entitled to: it was not scheduled yet.
                vcpu.charged = vcpu.clock.read()
                words[base + SLOT_FIELDS["first_run_ns"]] = vcpu.charged
                words[base + _CHARGED] = vcpu.charged
        except (FileNotFoundError, ProcessLookupError):
            self._ended(vcpu)
        except PermissionError:
            words[self._base + _REFUSALS] += 1
        # Only now are these words of this admission.
        words[base + _OWNED] = generation
        self._follow(vcpu, now)
        if not new and vcpu.cap:
            self._queue.set_cap(slot, vcpu.cap / ONE_CPU, words[base + _BUDGET])

    def _enter(self, vcpu: _Vcpu, now: int) -> None:
        """Into the run queue, awake, at the rate and with the lag that its slot says."""
        words, base = self._words, vcpu.base
        vcpu.rate, vcpu.cap, vcpu.latency = words[base + _RATE], 0, words[base + _LATENCY]
        self._queue.add(vcpu.slot, max(vcpu.rate, 1) / ONE_CPU, words[base + _LAG], vcpu.mode, vcpu.latency)
        self._set_awake(vcpu, True, now)

    def _exit(self, vcpu: _Vcpu, now: int) -> None:
        """Out of the run queue; what it is owed and its budget stay in its slot."""
        words, base = self._words, vcpu.base
        words[base + _BUDGET] = self._queue.budget_ns(vcpu.slot)
        words[base + _CAPPED] += self._queue.take_capped_ns(vcpu.slot)
        words[base + _LAG] = self._queue.remove(vcpu.slot)
        if vcpu.awake and words[base + _WANT] != NOBODY and not vcpu.paused:
            # On the way to its next dispatcher it wants the CPU as before: `_set_awake` goes on there.
            words[self._base + _RUNNABLE + vcpu.mode] -= 1
            vcpu.awake = False
            return
        self._set_awake(vcpu, False, now)

    def _set_awake(self, vcpu: _Vcpu, awake: bool, now: int) -> None:
        words, base = self._words, vcpu.base
        if awake != vcpu.awake:
            words[self._base + _RUNNABLE + vcpu.mode] += 1 if awake else -1
        vcpu.awake, vcpu.doze_at, vcpu.watched = awake, 0, False
        if awake:
            if words[base + _AWAKE]:
                words[base + _AWAKE_NS] += max(0, now - words[base + _AWAKE_SINCE])
            vcpu.awake_since = now
            words[base + _AWAKE_SINCE] = now
        elif words[base + _AWAKE]:
            words[base + _AWAKE_NS] += now - vcpu.awake_since
        words[base + _AWAKE] = awake
        self._relevel = True

    def _follow(self, vcpu: _Vcpu, now: int) -> None:
        """Rate, cap, latency class and pause as the supervisor wants them now."""
        words, base, slot = self._words, vcpu.base, vcpu.slot
        paused = words[base + _FLAGS] & (PAUSED | ACTIVE) != ACTIVE
        if paused != vcpu.paused:
            vcpu.paused = paused
            if paused:
                self._exit(vcpu, now)
                self._apply(vcpu, Level.FREE)
            else:
                self._enter(vcpu, now)
        if paused:
            return
        if self._script is not None:
            self._script.lend(slot, bool(words[base + _FLAGS] & LENT))
        rate, cap = words[base + _RATE], words[base + _CAP]
        if rate != vcpu.rate:
            vcpu.rate = rate
            self._follow_rate(vcpu)
        if words[base + _LATENCY] != vcpu.latency:
            vcpu.latency = words[base + _LATENCY]
            self._queue.set_latency(slot, vcpu.latency)
        if cap != vcpu.cap:
            vcpu.cap = cap
            self._queue.set_cap(slot, cap / ONE_CPU)

    def _follow_rate(self, vcpu: _Vcpu) -> None:
        self._queue.set_rate(vcpu.slot, max(vcpu.rate, 1) / ONE_CPU)

    def _release(self, vcpu: _Vcpu, now: int) -> None:
        """Final account, out of real time, and it is anybody's."""
        self._charge(vcpu)
        if self._words[vcpu.base + _WANT] == NOBODY:
            self._free(vcpu)
        else:
            self._apply(vcpu, Level.FREE)
        self._drop(vcpu, now)

    def _drop(self, vcpu: _Vcpu, now: int) -> None:
        words, base = self._words, vcpu.base
        if not vcpu.paused:
            self._exit(vcpu, now)
        if self._pick is vcpu:
            self._pick = None
        del self._vcpus[vcpu.slot]
        self._order.remove(vcpu)
        if vcpu.clock is not None:
            vcpu.clock.close()
        for view in (vcpu.status, vcpu.progress):
            if view is not None:
                view.release()
        vcpu.watched = False
        words[base + _PICKED] = 0
        words[base + _HAVE] = NOBODY

    def _ended(self, vcpu: _Vcpu) -> None:
        """The kernel knows the thread no more: it keeps its slot until the supervisor takes it."""
        if vcpu.clock is not None:
            vcpu.clock.close()
            vcpu.clock = vcpu.native = None
        words = self._words
        if not words[vcpu.base + _GONE]:
            words[vcpu.base + _GONE] = 1
            words[self._base + CPU_FIELDS["lost_threads"]] += 1

    # -- asleep or awake ---------------------------------------------------------------------

    def _observe(self, now: int, explained: bool) -> None:
        """Who competes from now on."""
        elapsed = now - self._slice_start
        if not explained:
            for vcpu in self._read:
                # It may have been taken from us since.
                if not vcpu.paused and self._vcpus.get(vcpu.slot) is vcpu:
                    self._look(vcpu, now, elapsed)
            self._watched = [vcpu for vcpu in self._watched if vcpu.watched]
            return
        pick = self._pick
        if pick is not None and not pick.paused:
            self._look(pick, now, elapsed)
        if self._watched:
            for vcpu in self._watched:
                if vcpu.watched:
                    self._look(vcpu, now, elapsed)
            self._watched = [vcpu for vcpu in self._watched if vcpu.watched]

    def _look(self, vcpu: _Vcpu, now: int, elapsed: int) -> None:
        """Whether one that is not paused is awake; `elapsed` since it was last looked at."""
        doubtful = False
        if vcpu.clock is None:
            awake = False
        elif vcpu.status is not None:
            awake = vcpu.status[_PHASE] not in _SLEEPING
            if not awake and vcpu.ran * COMPUTING > elapsed > 0:
                awake = doubtful = True
        elif vcpu.ran or (vcpu.awake and vcpu is not self._pick):
            awake = True
        else:
            awake = not self._waits(vcpu)
        vcpu.ran = 0
        if awake:
            if not vcpu.awake:
                self._queue.wake(vcpu.slot)
                self._set_awake(vcpu, True, now)
            self._watch(vcpu, doubtful)
        else:
            if vcpu.awake:
                self._queue.sleep(vcpu.slot)
                self._set_awake(vcpu, False, now)
            self._mind_debt(vcpu, now)

    def _waits(self, vcpu: _Vcpu) -> bool:
        """No status page to ask, and it did not run: the kernel knows whether it wants to."""
        try:
            return self._kernel.waits(vcpu.pid, vcpu.tid)
        except (FileNotFoundError, ProcessLookupError):
            self._ended(vcpu)
            return True

    def _mind_debt(self, vcpu: _Vcpu, now: int) -> None:
        """A sleeper that is too far ahead has no right to run at once until that is worn off."""
        barred = self._queue.barred_ns(vcpu.slot)
        if bool(barred) != bool(vcpu.doze_at):
            self._relevel = True
        vcpu.doze_at = now + barred if barred else 0
        self._watch(vcpu, barred > 0)

    def _watch(self, vcpu: _Vcpu, wanted: bool) -> None:
        if wanted and not vcpu.watched:
            vcpu.watched = True
            if vcpu not in self._watched:
                self._watched.append(vcpu)
        elif not wanted:
            vcpu.watched = False

    # -- the decision ------------------------------------------------------------------------

    def _decide(self, now: int) -> None:
        old, queue = self._pick, self._queue
        # Whoever came may be owed more than the pick, which would else be left alone for a while.
        current = None if old is None or self._arrived else old.slot
        self._arrived = False
        slot = None if self._plain else queue.pick(current)
        new = self._vcpus[slot] if slot is not None else None
        self._pick = new
        flags = 0
        if new is not old:
            # The new one first: the fair class lets a promoted thread in late when nothing of
            # the usual weight is queued beside it.
            if new is not None:
                self._words[new.base + _PICKED] = 1
                self._apply(new, Level.RUN)
                if new.fresh:
                    new.fresh = False
                    flags = RECORD_MIGRATED
            if old is not None:
                self._words[old.base + _PICKED] = 0
                if not self._relevel:
                    self._apply(old, Level.WAIT)
        if (self._relevel or self._capped) and not self._plain:
            self._set_levels(new)
        if new is not None:
            length = queue.slice_ns(new.slot) if self._capped else self._slice_ns
            if self._script is not None and self._script.entry:
                length = self._script.length_ns
                flags |= self._script.entry << RECORD_ENTRY_SHIFT
                self._breath_ns = max(length, BREATH_MAX_NS // length * length)
        else:
            length = IDLE_TICK_NS
            if self._capped:
                length = min(length, queue.unpark_in_ns() or length)
        if self._retry:
            length = min(length, self._retry * AWAITED_TICK_NS)
        # Ends lie on a fixed grid as long as we are not behind by a whole slice.
        grid = self._slice_end + length
        self._slice_end = grid if now < grid <= now + length else now + length
        self._slice_start = now
        self._slice_previous = old.slot if old is not None else NOBODY
        self._slice_progress = (
            new.progress[0] if new is not None and new.progress is not None else 0)
        self._slice_flags = flags
        self._slice_breath = self._slice_edge_late = self._decision = 0

    def _set_levels(self, picked: _Vcpu | None) -> None:
        self._relevel = False
        queue = self._queue
        for vcpu in self._order:
            if vcpu.paused:
                continue
            if self._capped and vcpu.cap:
                self._words[vcpu.base + _CAPPED] += queue.take_capped_ns(vcpu.slot)
            if self._capped and queue.is_parked(vcpu.slot):
                level = Level.HELD
            elif vcpu is picked:
                level = Level.RUN
            elif vcpu.awake or vcpu.doze_at:
                level = Level.WAIT
            else:
                level = Level.DOZE
            if level is not vcpu.level:
                self._apply(vcpu, level)

    # -- levels ------------------------------------------------------------------------------

    def _apply(self, vcpu: _Vcpu, level: Level) -> None:
        if vcpu.clock is None:
            return
        vcpu.level = level
        old, new = vcpu.state, self._states[level]
        if new is old:
            return
        vcpu.state = new
        try:
            # What is to be stopped needs the CPU for that, and gets it only when it is its turn;
            # what is to go on should be in its new class by then.
            if new.policy != old.policy:
                if new.policy is not None:
                    self._kernel.set_class(vcpu.tid, new.policy, new.parameters)
            elif new.priority != old.priority:
                self._kernel.set_priority(vcpu.tid, new.parameters)
            if new.stopped != old.stopped:
                (self._kernel.stop if new.stopped else self._kernel.go_on)(vcpu.pid)
        except ProcessLookupError:
            self._ended(vcpu)
        except PermissionError:
            self._words[self._base + _REFUSALS] += 1

    def _free(self, vcpu: _Vcpu) -> None:
        """SCHED_OTHER, everywhere, going on: each step whatever became of the one before."""
        kernel = self._kernel
        for step in (
            lambda: kernel.set_class(vcpu.tid, os.SCHED_OTHER, os.sched_param(0)),
            lambda: kernel.pin(vcpu.tid, self._settings.home_cpus),
            lambda: kernel.go_on(vcpu.pid),
        ):
            try:
                step()
            except ProcessLookupError:
                return
            except OSError:
                self._words[self._base + _REFUSALS] += 1
        vcpu.level, vcpu.state = Level.FREE, self._states[Level.FREE]

    # -- breathing ---------------------------------------------------------------------------

    def _cross_edge(self, now: int) -> None:
        """Into a breath or out of it: what the levels mean from now on."""
        self._breathing = not self._breathing
        self._edge_at = now
        phase = self._breath_ns * (1 if self._breathing else BREATHLESS)
        self._edge = now + phase
        # A slice's end may stand for an edge that would cut the next slice.
        self._early = min(self._slice_ns * 3, phase) // 4
        self._states = linux.states_of(self._settings.kind, breathing=self._breathing)

    def _follow_breath(self) -> None:
        """Everybody to what their level means now; the picked one first, as in _decide."""
        pick = self._pick
        if pick is not None:
            self._apply(pick, pick.level)
        ready = 0
        for vcpu in self._order:
            if vcpu.level is Level.WAIT:
                if vcpu.state.stopped and not self._breathing:
                    ready += 1
                    if ready > READY:
                        break
                self._apply(vcpu, Level.WAIT)
