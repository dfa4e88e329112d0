"""What supervisor and worker say to each other, and what a worker is given.

Transport: one SOCK_SEQPACKET socket a worker, one JSON object a packet, at most
`MAX_PACKET` bytes. The supervisor sends requests `{"id": n, "op": ..., ...}`, then raises
SIGUSR1 in the worker (through its pidfd) so that a computing guest is interrupted; the worker
drains the socket and answers `{"id": n, "ok": true, ...}` or `{"id": n, "ok": false, "error": "..."}`. Unasked, a
worker sends only `{"event": "started", "threads": [id of the thread of each vCPU], ...}`,
`{"event": "failed", "error": ...}` (it could not start; it then exits) and
`{"event": "ended", ...fields of Ending, "screen": {...}, "serial": {...}}`, the last two as answers of those
operations, to be read when the process is gone (no screen below 768 KiB of memory). It never
floods: serial output stays in the worker's ring buffer until asked for.

Operations: `pause`, `resume`, `stop` (ends the guest in good order: Ending STOPPED),
`screen` -> {rows: [25 str of 80], attributes: base64 of 2000 bytes, cursor: [x, y], version: int},
`keys` {scancodes: [[scan, ascii], ...]} -> {accepted: n} (a full buffer accepts fewer),
`serial` {offset: int} -> {offset, data: base64, dropped_bytes, end: int} (at most 48 KiB a time;
an offset that has left the ring is moved up to the oldest byte kept),
`serial-input` {data: base64} -> {accepted: n},
`registers` -> {...}, `calls` {trace_from: int, optional} -> {calls: [[int, ah, count], ...], trace: [[int, ah], ...]}
(BIOS calls so far, the 2048 most frequent kinds; of the first 16384 in order, repeats collapsed, at most 4096
from `trace_from`);
`where` -> {mode, place, address, instruction, registers, code: [[address, hex, text], ...], exits: [[reason,
address, text], ...], post: [code, ...]} (the code around CS:RIP; the newest exits and POST codes, the newest last),
`exits` {limit: int} -> {total, places, sites: [{reason, address, mnemonic, instruction, mode, count}, ...]},
`profile` {hz: int, duration_s: number} -> {} (starts), `profile-end` -> {samples, rings, modes, hot, code, ...}
(vm/worker/eyes.py).

`mode` {engine, technology} with /dev/kvm as its descriptor where the engine is `kvm` -> {engine, changed, stop_ns} or
{refused: why}, and then nothing has changed; `state` with a file as its descriptor, into which a paused worker writes
the vCPU and the devices as JSON -> {bytes: n} or {refused: why} (vm/worker/moves.py).

The worker's packets are the words of a process that runs hostile code: the supervisor checks
types and lengths and ends a worker that talks nonsense.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

__all__ = ["MAX_PACKET", "SERIAL_RING_BYTES", "STATE_MAX_BYTES", "DiskSpec", "Ending", "WorkerSpec"]

MAX_PACKET: Final = 128 * 1024
SERIAL_RING_BYTES: Final = 64 * 1024
STATE_MAX_BYTES: Final = 1 << 20                  # of vCPU and devices as JSON; some 20 KiB are usual


@dataclass(frozen=True, slots=True)
class Ending:
    """How a guest ended.

    `stopped`: asked to stop, or ended itself; `crashed`: guest fault, host limit or engine fault; `failed`: never
    started. `exit_code` is of the exit port (isa-debug-exit: the byte written).
    """

    fate: Literal["stopped", "crashed", "failed"]
    reason: str                       # one sentence for a person
    # Stable. Stopped: asked, exit-port, halted, reset, no-boot. Crashed: triple-fault, host-limit,
    # guest-error, unsupported, engine, internal. Failed: memory, image, host-limit, host-busy
    # (another hypervisor holds VT-x or AMD-V), engine, state (of a saved VM), start.
    code: str
    exit_code: int | None = None
    instruction: str | None = None    # capstone's text of the instruction at RIP
    registers: dict[str, int] | None = None
    report: dict[str, Any] | None = None      # an answer of `where`: mode, code around RIP, last exits

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskSpec:
    """A disk of a worker. Its descriptors are the image, and behind it the overlay where it has one."""

    name: str                                 # the drive: a key of vm/disks/geometry.py DRIVES
    writable: Literal["no", "overlay", "yes"] = "no"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """What a worker is started with (JSON), beside these descriptors, in this order:
    control socket, guest memory memfd, status memfd, and then the flat image (read-only; -1 where the image is a
    built-in guest), or the descriptors of the disks, the one that it boots from first, or a multiboot kernel and its
    modules. With `restored`, guest memory is filled already and the last descriptor is what `state` wrote.
    """

    name: str
    engine: Literal["kvm", "software"]
    memory_bytes: int
    vcpus: int = 1                            # kvm only
    boot: Literal["flat", "disk", "rom", "multiboot"]
    disks: list[DiskSpec] = field(default_factory=list["DiskSpec"])     # none: one, read-only
    builtin: str | None = None                # name in vm/guests; boots flat, or as a boot sector
    bits: Literal[16, 32, 64] = 16            # flat: the mode the vCPU starts in
    load: int = 0x10000                       # flat: guest-physical address of the first byte
    entry: int = 0x10000                      # flat: where execution starts (linear)
    post_ports: list[int] = field(default_factory=lambda: [0x80])     # where the guest writes its POST codes
    command_line: str = ""                    # multiboot: the name of the kernel first
    modules: list[str] = field(default_factory=list)   # multiboot: the command line of each
    pokes: list[tuple[int, int]] = field(default_factory=list)  # (address, u64) before start
    check_accesses: bool = True               # software: as a processor does (vm/engines/software/checks.py)
    sandbox: bool = True                      # nobody, namespaces, seccomp as far as permitted
    started_paused: bool = False
    restored: bool = False
    technology: str = ""                      # of the host (vm/modes.py), for what its KVM cannot go on from

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> WorkerSpec:
        return cls(**{**data, "pokes": [tuple(p) for p in data.get("pokes", [])],
                      "disks": [DiskSpec(**disk) for disk in data.get("disks", [])]})
