"""A service without VMs: moving snapshots, a keyboard that types on a screen, every refusal.

Run as a program it serves the control API on a socket (`python -P tests/fake_backend.py SOCKET`)
and, with a second argument HOST:PORT, the metrics application: for trying the command line by
hand and in tests that need a real process. `python -P tests/fake_backend.py command ARGUMENTS` is
`mixvisor ARGUMENTS` with a service that has no VMs.
"""

from __future__ import annotations

import base64
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import trio

from mixvisor.config.model import SchedulerConfig, VmConfig
from mixvisor.config.rules import HostLimits
from mixvisor.metrics.mixing.result import MixingResult
from mixvisor.metrics.snapshot import (
    DECISION_BOUNDS_NS,
    LATENESS_BOUNDS_NS,
    RUN_LENGTH_BOUNDS_NS,
    CpuSnapshot,
    Histogram,
    HostSnapshot,
    SchedulerSnapshot,
    ServiceSnapshot,
    Snapshot,
    VcpuSnapshot,
    VmSnapshot,
    WarningSnapshot,
)
from mixvisor.sched.inputs import FORMAT
from mixvisor.sched.recorder import FlightRecorder, PackedRecording
from mixvisor.sched.shared import SliceRecord
from mixvisor.service.backend import Action, Conflict, Denied, NotFound, TimedOut
from mixvisor.service.savefile import SavedError
from mixvisor.service.sharing import PARAMETERS, changed_scheduler, changed_vm
from mixvisor.vm.modes import Mode

__all__ = ["FakeBackend", "FakeService", "make_vm"]

SECOND = 1_000_000_000
REASONS = {
    "explicit": "The configuration asks for this mode.",
    "64-bit": "A 64-bit guest needs hardware virtualization.",
    "avoid-mixing": "Either mode would do; this one avoids mixing.",
}

_EXIT = {"reason": "io_out", "address": 0x10007, "mnemonic": "out", "instruction": "out dx, al",
         "mode": "32-bit protected mode, ring 0", "count": 1500}
# Answers of the operations that look into a guest, as the service gives them.
INSIDE: dict[str, dict[str, Any]] = {
    "why": {
        "reason": "the guest triple-faulted", "restarts": 0, "code": "triple-fault", "exit_code": None,
        "since_unix_s": 1_700_000_000.0, "instruction": "int3",
        "registers": {"rax": 0x12, "rip": 0x10008, "rflags": 2, "cs": 8, "cr0": 0x11},
        "report": {"mode": "32-bit protected mode, ring 0", "place": "0x10008", "address": 0x10008,
                   "instruction": "int3",
                   "code": [[0x10007, "ee", "out dx, al"], [0x10008, "cc", "int3"], [0x10009, "90", "nop"]],
                   "exits": [["io_out", 0x10007, "out dx, al"]] * 3 + [["interrupt", 0x10008, "int3"]],
                   "post": [0x42]}},
    "exits": {"total": 2000, "places": 3, "sites": [
        _EXIT, {**_EXIT, "address": 0x20000, "count": 490},
        {**_EXIT, "reason": "halt", "mnemonic": "", "instruction": "(beyond the first 4096 places)", "mode": "",
         "address": 0, "count": 10}]},
    "profile": {},
    "profile-end": {
        "samples": 100, "places": 2, "rings": [25, 0, 0, 75], "vcpus": [40, 60],
        "modes": {"64-bit long mode, ring 3": 75, "64-bit long mode, ring 0": 25},
        "hot": [{"address": 0x10040, "count": 75, "ring": 3, "mode": "64-bit long mode, ring 3",
                 "instruction": "imul eax, ecx"}],
        "code": [{"count": 75, "ring": 3, "mode": "64-bit long mode, ring 3",
                  "lines": [[0x10040, "0fafc1", "imul eax, ecx", 75], [0x10043, "ebfb", "jmp 0x10040", 0]]}],
        "wall_ns": 1_000_000_000, "cpu_ns": 400_000_000, "host_ns": 100_000_000, "sleeping_ns": 0,
        "granularity": "instruction"},
}


def make_vm(
    name: str, *, mode: str = "software", rule: str = "explicit", weight: int = 100,
    state: str = "running", seconds: float = 0.0, share: float = 0.0, error: float = 0.0,
    progress_rate: float | None = 1e6, console: str = "none", wait: float = 0.0,
) -> VmSnapshot:
    """A VM that has had `share` + `error` of a CPU for `seconds`."""
    run = int(max(0.0, share * seconds + error) * SECOND)
    return VmSnapshot(
        id=name, name=name, state=state, state_reason="", mode=mode,  # type: ignore[arg-type]
        engine="kvm" if mode == "hardware" else "software", mode_rule=rule,
        mode_reason=REASONS.get(rule, rule), os="none", bits=64, weight=weight, cap_pct=0,
        reservation_pct=0, latency="normal", cpus=(1,), memory_bytes=4 << 20, resident_bytes=9 << 20, pid=4000,
        started_unix_s=1.0, restarts=0,
        vcpus=(VcpuSnapshot(index=0, cpu=1, run_ns=run, wait_ns=int(wait * seconds * SECOND),
                            halted_ns=0, capped_ns=0, migrations=0, slices=int(seconds * 25)),),
        entitled_ns=int(share * seconds * SECOND), entitled_share=share,
        lag_ns=int(-error * SECOND), leak_ns=0, emulator_ns=0,
        progress=None if progress_rate is None else int(progress_rate * run / SECOND),
        exits={"io_out": int(seconds * 40), "kick": int(seconds * 25)}, exit_handling_ns=0,
        serial_bytes=0, serial_dropped_bytes=0, bios_calls=0, interrupts=0,
        timer_ticks_lost=0, console=console,
    )


class FakeBackend:
    """Implements service.backend.Backend from a clock alone."""

    def __init__(
        self, *, now_ns: Callable[[], int] = time.monotonic_ns, mixed: bool = True,
        error: float = 0.0005,
    ) -> None:
        self._now_ns = now_ns
        self._begin_ns = now_ns()
        self._mixed = mixed
        self._error = error
        self._state = {"sw-one": "running", "sw-two": "running", "hw-two": "running",
                       "hw-four": "running", "dos": "paused"}
        self.typed: list[list[int]] = []
        self.serial_out = b"hello from the serial port\r\n"
        self.screen_text = "A:\\>"
        self.screen_version = 1
        self.key_room = 15
        self.actions: list[tuple[str, Action]] = []
        self.stopping = trio.Event()
        self.scheduling = SchedulerConfig()
        self.parameters: dict[str, VmConfig] = {}
        self.measured: MixingResult | None = None
        self.modes: dict[str, str] = {}
        self.saved: list[tuple[str, Path, bool]] = []
        self.ready = True

    def snapshot(self) -> Snapshot:
        now = self._now_ns()
        seconds = (now - self._begin_ns) / SECOND
        hw = "hardware" if self._mixed else "software"
        wobble = self._error * math.sin(seconds * 3)
        rows = (("sw-one", "software", "explicit", 100, 0.125, wobble, 1.3e8),
                ("sw-two", "software", "avoid-mixing", 100, 0.125, -wobble, 1.3e8),
                ("hw-two", hw, "explicit", 200, 0.25, wobble / 2, 2.0e9),
                ("hw-four", hw, "64-bit", 400, 0.5, -wobble / 2, 2.0e9))
        vms = [
            make_vm(name, mode=mode, rule=rule, weight=weight, share=share, error=error,
                    seconds=seconds, progress_rate=rate, state=self._state[name],
                    wait=1 - share)
            for name, mode, rule, weight, share, error, rate in rows
        ]
        vms.append(make_vm("dos", state=self._state["dos"], progress_rate=None, console="text"))
        warnings = (WarningSnapshot(
            code="mixed-modes", severity="warning",
            message="Software and hardware VMs run together on this host (PVM).",
            advice="Give all VMs one mode where you can.", since_unix_s=1_700_000_000.0,
            vms=("sw-one", "sw-two", "hw-two", "hw-four")),) if self._mixed else ()
        switches = int(seconds * 20) if self._mixed else 0
        empty = Histogram(LATENESS_BOUNDS_NS, (0,) * (len(LATENESS_BOUNDS_NS) + 1), 0)
        decision = Histogram(DECISION_BOUNDS_NS, (0,) * (len(DECISION_BOUNDS_NS) + 1), 0)
        runs = Histogram(RUN_LENGTH_BOUNDS_NS, (0,) * (len(RUN_LENGTH_BOUNDS_NS) + 1), 0)
        cpu = CpuSnapshot(
            cpu=1, core=1, socket=0,
            residency_ns={"hardware": int(seconds * 0.75 * SECOND), "idle": 0, "other": 0,
                          "software": int(seconds * 0.25 * SECOND)},
            switches={("software", "hardware"): switches // 2,
                      ("hardware", "software"): switches - switches // 2},
            run_length={"hardware": runs, "software": runs}, vm_switches=int(seconds * 95),
            slices=int(seconds * 100), lateness=empty, decision={"fair": decision}, overrun=empty,
            dispatcher_cpu_ns=int(seconds * 3_000_000), frozen_ns=0, lost_records=0,
            runnable={"software": 2, "hardware": 2})
        return Snapshot(
            taken_unix_s=1_700_000_000.0 + seconds, monotonic_ns=now,
            service=ServiceSnapshot(version="0.0.0", pid=1234, started_unix_s=1_700_000_000.0,
                                    config_path=None, ready=self.ready),
            host=HostSnapshot(technology="pvm", kvm="usable", kernel="6.1.0", cpu_model="Fake CPU",
                              cpus=(0, 1), vm_cpus=(1,), memory_bytes=8 << 30),
            scheduler=SchedulerSnapshot(
                policy="fair", dispatch="precise", slice_ns=10_000_000, fairness=0.9999,
                dispatch_reason="real-time priorities are permitted and a CPU is left to the rest",
                errors={}, guard="watching"),
            cpus=(cpu,), vms=tuple(vms), warnings=warnings)

    async def set_policy(self, change: Mapping[str, Any]) -> dict[str, Any]:
        await trio.lowlevel.checkpoint()
        if change:
            self.scheduling = changed_scheduler(self.scheduling, change)
        return self.scheduling.model_dump()

    async def set_parameters(self, name: str, change: Mapping[str, Any]) -> dict[str, Any]:
        self._known(name)
        await trio.lowlevel.checkpoint()
        vm = self.parameters.get(name) or VmConfig.model_validate({"name": name, "boot": {"guest": "alu"}})
        if change:
            vm = self.parameters[name] = changed_vm(
                vm, change, others=(), vm_cpus=(1,), limits=HostLimits((0, 1), 8 << 30))
        return {key: getattr(vm, key) for key in PARAMETERS}

    async def set_mode(self, name: str, mode: Mode) -> dict[str, Any]:
        self._known(name)
        await trio.lowlevel.checkpoint()
        if name == "hw-four":
            raise Conflict("hw-four stays in hardware mode: it has four vCPUs")
        changed = self.modes.get(name) != mode
        self.modes[name] = mode
        return {"mode": mode, "changed": changed, "stop_seconds": 0.0021 if changed else 0.0}

    async def save(self, name: str, file: Path | None, *, leave_running: bool) -> dict[str, Any]:
        self._known(name)
        await trio.lowlevel.checkpoint()
        where = file or Path(f"/var/lib/mixvisor/saved/{name}.mixvisor")
        self.saved.append((name, where, leave_running))
        return {"file": str(where), "bytes": 3 << 20, "seconds": 0.25, "running": leave_running}

    async def restore(self, file: Path, name: str | None) -> dict[str, Any]:
        await trio.lowlevel.checkpoint()
        if file.suffix != ".mixvisor":
            raise SavedError(f"{file} is not a saved VM")
        self._known(name or file.stem)
        return {"name": name or file.stem, "file": str(file), "mode": "software"}

    async def record_inputs(self, seconds: float) -> Iterator[str]:
        head = {"mixvisor_inputs": FORMAT, "policy": "fair", "slice_ns": 5_000_000, "ratelimit_ns": 0,
                "batching": {}, "order": {}}
        return iter([json.dumps(head), '[1,"add",[0,1.0,0,0,0],null]', '[1,"pick",[null],0]'])

    def recording(self, seconds: float | None) -> PackedRecording:
        """Two VMs in turn on CPU 1, 10 ms each, for a second."""
        recorder = FlightRecorder([1])
        recorder.name(1, "sw-one")
        recorder.name(2, "hw-two")
        now = self._now_ns()
        recorder.note(1, [SliceRecord(
            start_ns=at, end_ns=at + 10_000_000, planned_end_ns=at + 10_000_000, slot=turn, generation=turn + 1,
            previous_slot=1 - turn, mode=turn, run_ns=9_900_000, others_software_ns=0, others_hardware_ns=0,
            progress_before=0, progress_after=0, edge_late_ns=0, breath_ns=0, decision_ns=60_000, flags=0)
            for at, turn in ((now - 1_000_000_000 + n * 10_000_000, n % 2) for n in range(100))])
        return recorder.copy(now, "asked for", seconds)

    async def lend(self, vms: Any) -> dict[str, Any]:
        await trio.lowlevel.checkpoint()
        raise Denied(f"{', '.join(vms)} may not be measured")

    def exchange(self, loan: str, script: Any) -> dict[str, Any]:
        raise NotFound(f"there is no loan {loan!r}")

    def give_back(self, loan: str) -> dict[str, Any]:
        raise NotFound(f"there is no loan {loan!r}")

    def mixing(self) -> MixingResult | None:
        return self.measured

    def keep_mixing(self, result: MixingResult) -> None:
        self.measured = result

    def _known(self, name: str) -> str:
        if name not in self._state:
            raise NotFound(f"there is no VM {name!r}")
        return self._state[name]

    async def act(self, name: str, action: Action) -> None:
        state = self._known(name)
        await trio.lowlevel.checkpoint()
        if (name, action) == ("sw-two", "kill"):
            raise Denied("sw-two may not be killed by you")
        if (name, action) == ("sw-two", "stop"):
            raise TimedOut("sw-two did not stop within 10 s; `mixvisor kill sw-two` ends it")
        if (name, action) == ("sw-two", "pause"):
            raise RuntimeError("a defect, on purpose")
        legal = {"start": {"stopped"}, "resume": {"paused"}, "pause": {"running"},
                 "stop": {"running", "paused"}, "kill": {"running", "paused"}}
        if state not in legal[action]:
            raise Conflict(f"cannot {action} {name}: it is {state}")
        self._state[name] = {"start": "running", "resume": "running", "pause": "paused",
                             "stop": "stopped", "kill": "stopped"}[action]
        self.actions.append((name, action))

    async def ask(self, name: str, op: str, **arguments: Any) -> dict[str, Any]:
        self._known(name)
        await trio.lowlevel.checkpoint()
        if op == "screen":
            rows = self.screen_text.split("\n")[-25:]
            rows = [row[:80].ljust(80) for row in rows]
            cursor = [len(self.screen_text.split("\n")[-1]), len(rows) - 1]
            rows += [" " * 80] * (25 - len(rows))
            return {"rows": rows, "attributes": base64.b64encode(b"\x07" * 2000).decode(),
                    "cursor": cursor, "version": self.screen_version}
        if op == "keys":
            taken = arguments["scancodes"][:self.key_room]
            self.typed += taken
            for _scan, code in taken:
                self.screen_text += "\nA:\\>" if code == 13 else chr(code) if code >= 32 else ""
            self.screen_version += bool(taken)
            return {"accepted": len(taken)}
        if op == "serial":
            offset = min(arguments["offset"], len(self.serial_out))
            return {"offset": offset, "dropped_bytes": 0, "end": len(self.serial_out),
                    "data": base64.b64encode(self.serial_out[offset:]).decode()}
        if op == "serial-input":
            data = base64.b64decode(arguments["data"])
            self.serial_out += data
            return {"accepted": len(data)}
        if op in INSIDE:
            return {**INSIDE[op], "name": name, "state": self._state[name]} if op == "why" else INSIDE[op]
        return {"registers": {"rax": 1}} if op == "registers" else {"calls": [[0x10, 0x0E, 4]]}

    def request_shutdown(self) -> None:
        self.stopping.set()


class FakeService(FakeBackend):
    """Has the life of service.app.Service, and serves the control API; but no VMs.

    `refusal` is raised at the start. Keeps what it was made with.
    """

    made: ClassVar[list[FakeService]] = []
    refusal: ClassVar[Exception | None] = None

    def __init__(self, config: Any, *, state_dir: Path, socket: Path | None, facts: Any) -> None:
        super().__init__()
        self.ready = False
        self.config, self.state_dir, self.socket, self.facts = config, state_dir, socket, facts
        self.metrics_address = None if config.metrics.listen == "none" else config.metrics.listen
        self.ended = False
        self.made.append(self)

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        from mixvisor.service.api import control_app
        from mixvisor.service.http import serve

        if self.refusal is not None:
            raise self.refusal
        try:
            async with trio.open_nursery() as nursery:
                if self.socket is not None:
                    await nursery.start(lambda task_status: serve(
                        control_app(self), unix_socket=self.socket, task_status=task_status))
                self.ready = True
                task_status.started()
                await self.stopping.wait()
                nursery.cancel_scope.cancel()
        finally:
            self.ready = False
            self.ended = True


async def _main(path: Path, tcp: str | None) -> None:
    from mixvisor.service.api import control_app, metrics_app
    from mixvisor.service.http import serve

    backend = FakeBackend()
    async with trio.open_nursery() as nursery:
        await nursery.start(lambda task_status: serve(
            control_app(backend), unix_socket=path, task_status=task_status))
        if tcp is not None:
            await nursery.start(lambda task_status: serve(
                metrics_app(backend), tcp=tcp, task_status=task_status))
        print("serving", flush=True)
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async def leave() -> None:
                async for _number in signals:
                    backend.request_shutdown()
            nursery.start_soon(leave)
            await backend.stopping.wait()
        nursery.cancel_scope.cancel()


def _command(arguments: list[str]) -> None:
    """The command line with `FakeService` for the service."""
    from types import SimpleNamespace

    from mixvisor.cli.main import main

    module = SimpleNamespace(Service=FakeService)
    sys.modules["mixvisor.service.app"] = module  # type: ignore[assignment]
    main(arguments)


if __name__ == "__main__":
    if sys.argv[1] == "command":
        _command(sys.argv[2:])
    trio.run(_main, Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)
