"""The real input: other people's boot disks, the same on both engines."""

from __future__ import annotations

import dataclasses
import mmap
import os
import signal
import time

import pytest

from mixvisor.vm.engines import kick
from mixvisor.vm.worker.process import Worker
from mixvisor.vm.worker.protocol import DiskSpec, WorkerSpec
from mixvisor.vm.worker.status import STATUS_SIZE, Phase, StatusPage

PROMPT = "A:\\>"
SCANS = {" ": 0x39, "\r": 0x1C, ".": 0x34, ":": 0x27, **{
    letter: first + at for first, row in ((0x10, "qwertyuiop"), (0x1E, "asdfghjkl"), (0x2C, "zxcvbnm"))
    for at, letter in enumerate(row)}}
CALL_NS = 50_000          # what a BIOS call takes by the scripted clock
PATIENCE_S = 240          # host time for a whole run on a loaded machine


def image(guests, name):
    path = guests / name
    if not path.exists():
        pytest.skip(f"no {name} among the boot disks")
    return path.read_bytes()


def rows(worker):
    return [row.rstrip() for row in worker.ask("screen")["rows"]]


class GuestClock:
    """Guest time made of what the guest did: BIOS calls and naps, never the host's time.

    DOS reads the disk again once some timer ticks have passed, so under the host's clock the number
    of its reads depends on how slow the host is.
    """

    def __init__(self, status):
        self._status = status
        self.slept_ns = 0

    def monotonic_ns(self):
        return 1_000_000_000 + self._status.get("bios_calls") * CALL_NS + self.slept_ns

    def wall_ns(self):
        return 1_772_368_496 * 1_000_000_000 + self.monotonic_ns()


class Operator:
    """In place of the control socket: types a command at each idle prompt, stops at the one behind the last.

    It acts only where the guest sleeps, which is the same point of the guest's life on every host;
    kicks by the timer come whenever they like and must change nothing.
    """

    def __init__(self, clock, commands):
        self.gone = False
        self._commands = list(commands)
        self._row = -1                        # of the prompt where something was typed last
        self.answers = []
        self._clock = clock
        self._requests = []
        self._deadline = time.monotonic() + PATIENCE_S
        self.worker = None
        self.move_every = self.moves = self.turns = 0

    def requests(self):
        self.turns += 1
        if self.move_every and self.turns % self.move_every == 0:
            self._requests.append({"id": 0, "op": "mode", "engine": ("kvm", "software")[self.moves % 2]})
        assert time.monotonic() < self._deadline, f"not done in {PATIENCE_S} s: {self.worker.machine.screen()}"
        pending, self._requests = self._requests, []
        return pending

    def send(self, packet):
        assert packet["ok"], packet
        if packet["id"] == 0:
            assert packet.get("changed"), packet
            self.moves += 1
        else:
            self.answers.append(packet["id"])

    def descriptor(self):
        return os.open("/dev/kvm", os.O_RDWR)

    def wait(self, seconds):
        screen = self.worker.machine.screen()
        column, row = screen.cursor
        at_prompt = screen.rows[row].rstrip() == PROMPT and column == len(PROMPT)
        # The first prompt shows up while AUTOEXEC.BAT still runs: the cleared screen is its end.
        ready = at_prompt and (row > self._row if self.answers else row == 0)
        if ready and self._commands:
            codes = [(SCANS[letter], ord(letter)) for letter in self._commands.pop(0) + "\r"]
            self._requests.append({"id": 1, "op": "keys", "scancodes": codes})
            self._row = row
        elif ready and len(self.answers):
            self._requests.append({"id": 2, "op": "stop"})
        elif seconds is None:
            raise AssertionError(f"the guest waits for a key elsewhere than at its prompt: {screen}")
        else:
            self._clock.slept_ns += round(seconds * 1e9)


@dataclasses.dataclass(frozen=True)
class Life:
    screen: tuple[str, ...]
    calls: dict[tuple[int, int], int]
    trace: list[tuple[int, int]]
    disk_read_bytes: int
    guest_time_ns: int


def boot_and_type(engine, disk, *commands, overlay_fd=None, move_every=0):
    """A whole worker but for its socket and its sandbox, run to the end of the commands in this process.

    With `move_every` it goes on in the other engine at every so many stops, whatever they are for; the number of moves.
    """
    kick.install()
    memory_bytes = 2 << 20
    memory = mmap.mmap(-1, memory_bytes)
    fds = [os.memfd_create(name) for name in ("status", "image")]
    os.ftruncate(fds[0], STATUS_SIZE)
    os.write(fds[1], disk)
    status = StatusPage(fds[0], writable=True)
    clock = GuestClock(status)
    operator = Operator(clock, commands)
    spec = WorkerSpec(name="dos", engine=engine, memory_bytes=memory_bytes, boot="disk",
                      disks=[DiskSpec(name="fda", writable="no" if overlay_fd is None else "overlay")])
    overlays = [] if overlay_fd is None else [overlay_fd]
    worker = Worker(spec, operator, memory, status, [fds[1], *overlays], clock)
    operator.worker = worker
    operator.move_every = move_every
    if move_every:
        signal.setitimer(signal.ITIMER_PROF, 0.002, 0.002)         # stops at whatever the guest is doing
    try:
        ending = worker.live()
        assert (ending.fate, ending.code) == ("stopped", "asked"), ending
        screen, bios = worker.machine.screen(), worker.machine.bios
        life = Life(tuple(row.rstrip() for row in screen.rows), dict(bios.calls), list(bios.trace),
                    status.get("disk_read_bytes"), clock.monotonic_ns())
        return (life, operator.moves) if move_every else life
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        worker.close()
        status.close()
        for fd in fds:
            os.close(fd)


@pytest.mark.slow
@pytest.mark.kvm
def test_freedos_moved_between_the_engines_all_the_time_does_what_it_does_without(guests):
    disk = image(guests, "freedos-1.4M.img")
    moved, moves = boot_and_type("software", disk, "ver", move_every=5)
    assert moves >= 40
    assert moved == boot_and_type("software", disk, "ver")
    assert any("FreeCom version" in row for row in moved.screen)


@pytest.mark.slow
@pytest.mark.kvm
def test_freedos_answers_the_same_on_both_engines_with_the_same_bios_calls(guests):
    disk = image(guests, "freedos-1.4M.img")
    software, hardware = (boot_and_type(engine, disk, "ver") for engine in ("software", "kvm"))
    assert any("FreeCom version" in row for row in software.screen)
    assert software.disk_read_bytes > 100_000
    assert len(software.trace) > 50
    assert software.screen == hardware.screen
    assert software.trace == hardware.trace
    assert software.calls == hardware.calls
    assert software == hardware


@pytest.mark.slow
@pytest.mark.kvm
def test_a_file_that_freedos_copies_is_the_same_on_both_engines_and_there_after_a_restart(guests):
    disk = image(guests, "freedos-1.4M.img")
    overlays = {engine: os.memfd_create(engine) for engine in ("software", "kvm")}
    try:
        lives = {engine: boot_and_type(engine, disk, "copy readme.txt kept.txt", overlay_fd=fd)
                 for engine, fd in overlays.items()}
        assert lives["software"] == lives["kvm"]
        sizes = {os.fstat(fd).st_size for fd in overlays.values()}
        assert len(sizes) == 1
        assert len({os.pread(fd, max(sizes), 0) for fd in overlays.values()}) == 1
        again = boot_and_type("software", disk, "dir kept.txt", overlay_fd=overlays["kvm"])
        assert any("KEPT     TXT" in row for row in again.screen), again.screen
    finally:
        for fd in overlays.values():
            os.close(fd)


@pytest.mark.slow
def test_freedos_on_a_live_worker_answers_what_is_typed(start, engine, guests):
    worker = start(engine, image(guests, "freedos-1.4M.img"), boot="disk")

    def at_prompt():
        screen = worker.ask("screen")
        column, row = screen["cursor"]
        return screen["rows"][row].rstrip() == PROMPT and column == len(PROMPT) and screen

    worker.until(lambda: (screen := at_prompt()) and screen["cursor"] == [4, 0])
    worker.press("ver\r")
    worker.until(lambda: (screen := at_prompt()) and screen["cursor"][1] > 1)
    worker.until_phase(Phase.SLEEPING)
    assert any("FreeCom version" in row for row in rows(worker))


@pytest.mark.slow
def test_freedos_boots_from_the_small_floppy(start, guests):
    worker = start("software", image(guests, "freedos-160K.img"), boot="disk")
    worker.until(lambda: any(row.startswith(PROMPT) for row in rows(worker)))


def test_bootrogue_draws_its_dungeon_and_its_hero_moves(start, engine, guests):
    worker = start(engine, image(guests, "bootrogue.img"), boot="disk")
    worker.until(lambda: sum("☺" in row for row in rows(worker)) == 1)
    worker.until_phase(Phase.SLEEPING)

    def hero():
        screen = rows(worker)
        return next(((row.index("☺"), y) for y, row in enumerate(screen) if "☺" in row), None)

    before = hero()
    scans = {"up": 0x48, "left": 0x4B, "right": 0x4D, "down": 0x50}
    moved = set()
    for scan in scans.values():
        taken = worker.status.get("bios_calls")
        worker.ask("keys", scancodes=[[scan, 0]])
        worker.until(lambda taken=taken: worker.status.get("bios_calls") > taken)
        moved.add(hero())
    assert moved - {before, None}, "no key moved the hero"
