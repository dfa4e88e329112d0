"""One machine on every engine, the fake included: the same guest sees and shows the same, to the last port read.

Guest time is made of what the guest did (BIOS calls and sleep), so everything is deterministic: a difference between
two engines is a defect of one of them.  The programs keep to what the fake engine knows (vm/engines/fake.py).
"""

from __future__ import annotations

import dataclasses
import mmap
import os
import shutil
import signal
import subprocess
from collections.abc import Callable

import pytest

from mixvisor.vm import engines
from mixvisor.vm.engines import fake, kick
from mixvisor.vm.engines.base import ExitKind
from mixvisor.vm.worker.process import Worker
from mixvisor.vm.worker.protocol import DiskSpec, WorkerSpec
from mixvisor.vm.worker.status import STATUS_SIZE, StatusPage

from .test_freedos import GuestClock

SLEEPS_MAX = 20_000
CPU_SECONDS = 30
KEPT = 0x600                       # where programs leave what they saw
KEPT_BYTES = 0x400

PRELUDE = """
bits 16
org 0x7c00
%assign place 0x600
%macro keep 0                      ; AL
    mov [place], al
    %assign place place + 1
%endmacro
%macro keep_word 0                 ; AX
    mov [place], ax
    %assign place place + 2
%endmacro
%macro write 2                     ; port, value
    mov dx, %1
    mov al, %2
    out dx, al
%endmacro
%macro read 1
    mov dx, %1
    in al, dx
    keep
%endmacro
%macro vector 2                    ; number, handler
    mov ax, %2
    mov [%1 * 4], ax
    mov ax, 0
    mov [%1 * 4 + 2], ax
%endmacro
%macro print 1
    mov ax, 0x0e00 + %1
    int 0x10
%endmacro
%macro finish 0
    mov al, 7
    out 0xf4, al
    hlt
%endmacro
    mov ax, 0
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov sp, 0x7000
"""

SCREEN = """
    mov ax, 0x0003
    int 0x10
%assign letter 'A'
%rep 26
    print letter
    %assign letter letter + 1
%endrep
    print 13
    print 10
    mov ax, 0x092a                 ; three stars on blue
    mov bx, 0x001f
    mov cx, 3
    int 0x10
    mov ax, 0x0200                 ; the cursor to row 24, and over the edge
    mov bx, 0
    mov dx, 0x184e
    int 0x10
    print 'x'
    print 'y'
    print 'z'
    mov ax, 0x0800
    int 0x10
    keep_word
    mov ax, 0x0300
    int 0x10
    mov ax, dx
    keep_word
    mov ax, 0x0f00
    int 0x10
    keep_word
    mov ax, 0x0013                 ; no graphics
    int 0x10
    mov ax, 0x0f00
    int 0x10
    keep_word
    write 0x3d4, 0x0e
    read 0x3d5
    write 0x3d4, 0x0f
    read 0x3d5
    finish
"""

# Every port that somebody claims, as it is found at the start, and some after a write.
REGISTERS = """
%assign port 0
%rep 0x400
  %if port != 0x61 && port != 0x40 && port != 0x41 && port != 0x42 && port != 0x3da && port != 0xb0
    %if port < 0x100 || port >= 0x278
      %if (port & 0xff) < 0x10 || (port & 0xf0) == 0x20 || (port & 0xf0) == 0x40 || (port & 0xf0) == 0x60 || \\
          (port & 0xf0) == 0x70 || (port & 0xf0) == 0xa0 || (port & 0xf0) == 0xe0 || (port & 0x3f0) == 0x3f0
    read port
      %endif
    %endif
  %endif
  %assign port port + 1
%endrep
    write 0xcf8, 0x80
    mov dx, 0xcfc
    in ax, dx
    keep_word
    mov dx, 0xe0
    mov ax, 0x1234
    out dx, ax
    mov ax, 0
    in ax, dx
    keep_word
    write 0x43, 0x34
    write 0x40, 0x00
    write 0x40, 0x80
    write 0x43, 0xc2               ; status and count
    read 0x40
    read 0x40
    read 0x40
%assign index 0x0d
%rep 0x30
    write 0x70, index
    read 0x71
    %assign index index + 1
%endrep
    finish
"""

INTERRUPTS = """
    cli
    vector 0x08, tick
    vector 0x0c, serial
    vector 0x70, clock
    write 0x43, 0x34               ; a kilohertz
    write 0x40, 0xa9
    write 0x40, 0x04
    write 0x3fc, 0x0b
    write 0x3f9, 0x03              ; data, and transmitter empty
    write 0x21, 0xea               ; timer, cascade, serial
    write 0xa1, 0xfe
    write 0x70, 0x0b
    write 0x71, 0x42               ; periodic
    write 0x70, 0x0c
    mov dx, 0x71
    in al, dx
    mov bx, 500
    sti
again:
    hlt
    jmp again
tick:
    push ax
    inc word [0x600]
    mov al, 0x20
    out 0x20, al
    dec bx
    jz over
    pop ax
    iret
serial:
    push ax
    push dx
more:                              ; until IIR says that nothing is left
    mov dx, 0x3fa
    in al, dx
    cmp al, 1
    je done
    inc word [0x602]
    cmp al, 4
    jne more
    mov dx, 0x3f8
    in al, dx
    out dx, al
    jmp more
done:
    mov al, 0x20
    out 0x20, al
    pop dx
    pop ax
    iret
clock:
    push ax
    inc word [0x604]
    mov al, 0x0c
    out 0x70, al
    in al, 0x71
    mov al, 0x20
    out 0xa0, al
    out 0x20, al
    pop ax
    iret
over:
    finish
"""

DISK = """
%macro disk 4                      ; AX, CX, DX, BX; keeps AX and whether it carried
    mov ax, %1
    mov cx, %2
    mov dx, %3
    mov bx, %4
    int 0x13
    keep_word
%endmacro
    mov ax, 0x4241
    mov [0x8000], ax
    disk 0x0000, 0, 0, 0
    disk 0x0301, 0x0203, 0x0100, 0x8000
    disk 0x0201, 0x0203, 0x0100, 0x8200
    mov ax, [0x8200]
    keep_word
    disk 0x0302, 0x4f12, 0x0100, 0x8000
    disk 0x0100, 0, 0, 0
    disk 0x0301, 0x0001, 0x0001, 0x8000        ; drive B is protected
    disk 0x0201, 0x0001, 0x0080, 0x8000        ; no hard disk
    disk 0x0800, 0, 0x0001, 0
    mov ax, dx
    keep_word
    disk 0x1500, 0, 0, 0
    disk 0x0401, 0x0001, 0, 0
    finish
"""

KEYS = """
%rep 5
    mov ax, 0
    int 0x16
    keep_word
    int 0x10                       ; AH is the scan code: some call or none
%endrep
    mov ax, 0x0100
    int 0x16
    mov ax, 0x0200
    int 0x16
    keep_word
    finish
"""


class Script:
    """In place of the control socket: nobody asks, sleep is guest time, and a call that awaits a key gets one."""

    def __init__(self, clock: GuestClock, keys: list[tuple[int, int]]) -> None:
        self.gone = False
        self.worker: Worker
        self._clock, self._keys, self._sleeps = clock, keys, 0

    def requests(self):
        return ()

    def send(self, packet):
        raise AssertionError(packet)

    def wait(self, seconds):
        self._sleeps += 1
        assert self._sleeps < SLEEPS_MAX, "the guest sleeps without end"
        wait = self.worker.machine.wait
        if wait is not None and wait.for_key and self._keys:
            assert self.worker.machine.press([self._keys.pop(0)]) == 1
        else:
            assert seconds is not None, "the guest sleeps for good"
            self._clock.slept_ns += round(seconds * 1e9)


@dataclasses.dataclass(frozen=True)
class Seen:
    """Everything that a guest showed and left."""

    exit_code: int
    rows: tuple[str, ...]
    attributes: bytes
    cursor: tuple[int, int]
    printed: bytes
    calls: dict[tuple[int, int], int]
    trace: tuple[tuple[int, int], ...]
    kept: bytes
    interrupts: int
    port_exits: tuple[int, int]
    halts: int
    disk: bytes
    guest_time_ns: int


@pytest.fixture(autouse=True)
def deadline():
    """A guest that is lost in its own faults is a failure and no hanging run."""
    def late(_number, _frame):
        raise AssertionError(f"not done after {CPU_SECONDS} s of CPU")

    before = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
    yield
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.signal(signal.SIGVTALRM, before)


@pytest.fixture
def live(tmp_path, monkeypatch) -> Callable[..., Seen]:
    monkeypatch.setitem(engines.ENGINES, "fake",
                        lambda memory, bus, exits, *_more, **_options: fake.create(memory, bus, exits))

    def run(engine: str, code: bytes, *, typed: bytes = b"", keys: tuple[tuple[int, int], ...] = ()) -> Seen:
        kick.install()
        fds = [os.memfd_create(name) for name in ("status", "a", "b")]
        memory = mmap.mmap(-1, 2 << 20)
        try:
            os.ftruncate(fds[0], STATUS_SIZE)
            os.write(fds[1], code.ljust(1_474_560, b"\0"))
            os.write(fds[2], bytes(368_640))
            status = StatusPage(fds[0], writable=True)
            clock = GuestClock(status)
            script = Script(clock, list(keys))
            spec = WorkerSpec(name="guest", engine=engine, memory_bytes=len(memory), boot="disk",  # type: ignore
                              disks=[DiskSpec(name="fda", writable="yes"), DiskSpec(name="fdb")])
            # Programs may be longer than a boot sector: what a loader would do.
            memory[0x7E00:0x7E00 + max(0, len(code) - 512)] = code[512:]
            worker = Worker(spec, script, memory, status, fds[1:], clock)  # type: ignore
            script.worker = worker
            try:
                worker.machine.serial.feed(typed)
                ending = worker.live()
                assert ending is not None
                assert (ending.code, ending.exit_code) == ("exit-port", 7), ending
                screen, machine = worker.machine.screen(), worker.machine
                assert screen is not None
                assert machine.bios is not None
                exits = [int(status.exits[kind]) for kind in ExitKind]
                return Seen(
                    ending.exit_code, screen.rows, screen.attributes, screen.cursor,
                    machine.serial.ring.read(0, 1 << 16)[1], dict(machine.bios.calls), tuple(machine.bios.trace),
                    memory[KEPT:KEPT + KEPT_BYTES], status.get("interrupts"),
                    (exits[ExitKind.IO_IN], exits[ExitKind.IO_OUT]), exits[ExitKind.HALT],
                    os.pread(fds[1], 1_474_560, 0), clock.monotonic_ns())
            finally:
                worker.close()
                status.close()
        finally:
            for fd in fds:
                os.close(fd)

    return run


@pytest.fixture
def assembled(tmp_path) -> Callable[[str], bytes]:
    if shutil.which("nasm") is None:
        pytest.skip("nasm is not installed")

    def assemble(source: str) -> bytes:
        (tmp_path / "guest.asm").write_text(PRELUDE + source)
        subprocess.run(["nasm", "-f", "bin", "-o", tmp_path / "guest", tmp_path / "guest.asm"], check=True)
        return (tmp_path / "guest").read_bytes()

    return assemble


OTHERS = ("software", pytest.param("kvm", marks=pytest.mark.kvm))


@pytest.mark.parametrize("engine", OTHERS)
def test_a_screen_is_the_same(live, assembled, engine):
    code = assembled(SCREEN)
    seen = live("fake", code)
    assert seen.rows[0].startswith("***") or seen.rows[1].startswith("***") or seen.rows[0].startswith("ABC")
    assert seen.rows[23].rstrip().endswith("xy")
    assert seen.rows[24].startswith("z")
    assert live(engine, code) == seen


@pytest.mark.parametrize("engine", OTHERS)
def test_every_register_of_every_device_reads_the_same(live, assembled, engine):
    code = assembled(REGISTERS)
    seen = live("fake", code)
    assert len(set(seen.kept)) > 20
    assert live(engine, code) == seen


@pytest.mark.parametrize("engine", OTHERS)
def test_interrupts_come_as_often_and_serial_input_is_answered_the_same(live, assembled, engine):
    code = assembled(INTERRUPTS)
    seen = live("fake", code, typed=b"the wire")
    ticks, serial, clock = (int.from_bytes(seen.kept[at:at + 2], "little") for at in (0, 2, 4))
    assert ticks == 500
    assert serial == 9                            # eight bytes came, and then the transmitter was empty
    assert 510 <= clock <= 513                    # 1024 Hz for half a second
    assert seen.printed == b"the wire"
    assert live(engine, code, typed=b"the wire") == seen


@pytest.mark.parametrize("engine", OTHERS)
def test_disk_calls_answer_the_same_and_leave_the_same_disk(live, assembled, engine):
    code = assembled(DISK)
    seen = live("fake", code)
    assert seen.disk[((2 * 2 + 1) * 18 + 2) * 512:][:2] == b"AB"
    assert live(engine, code) == seen


@pytest.mark.parametrize("engine", OTHERS)
def test_keys_that_are_awaited_come_the_same(live, assembled, engine):
    code = assembled(KEYS)
    keys = ((0x1E, ord("a")), (0x1E, ord("A")), (0x3B, 0), (0x48, 0), (0x1C, 13))
    seen = live("fake", code, keys=keys)
    assert [seen.kept[at:at + 2] for at in range(0, 10, 2)] == [bytes((code, scan)) for scan, code in keys]
    assert live(engine, code, keys=keys) == seen
