"""The flight recorder in a whole service: asked for, and left behind when something went wrong."""

from __future__ import annotations

import signal

import pytest
import structlog
import trio

from mixvisor.sched.recorder import FlightRecorder, read_recording
from mixvisor.service.client import Client
from mixvisor.service.statedir import RECORDINGS, StateDir

from .conftest import running, until

LOADS = [{"name": name, "mode": "software", "boot": {"guest": "alu"}} for name in ("one", "two")]


@pytest.mark.usefixtures("nothing_left")
async def test_slices_can_be_asked_for_and_are_kept_when_a_dispatcher_dies(tmp_path):
    # signal: the one kind of ours that needs no rights.
    with structlog.testing.capture_logs() as logs:
        async with running(tmp_path, LOADS, dispatch="signal") as service:
            def names() -> set[str]:
                recording = service.recording(5.0).unpack()
                return {recording.vms[r.generation] for records in recording.slices.values() for r in records
                        if r.slot >= 0}

            await until(lambda: names() == {"one", "two"}, what="slices of both VMs")

            def ask() -> str:
                with Client(tmp_path / "run" / "control.sock") as client:
                    return client.recording(60.0)

            asked = read_recording((await trio.to_thread.run_sync(ask)).splitlines())
            assert set(asked.vms.values()) == {"one", "two"}
            (host,) = service._scheduler._crew.hosts.values()
            host.process.signal(signal.SIGKILL)
            folder = tmp_path / "state" / "recordings"
            await until(lambda: any(line.get("code") == "recording-kept" for line in logs), what="a recording")
            (kept,) = folder.glob("*.jsonl")
    recording = read_recording(kept.read_text().splitlines())
    assert recording.reason == "dispatcher-died"
    assert set(recording.vms.values()) == {"one", "two"}
    (told,) = [line for line in logs if line.get("code") == "recording-kept"]
    assert told["file"] == str(kept)


def test_the_newest_recordings_stay(tmp_path):
    state = StateDir(tmp_path / "state")
    lines = list(FlightRecorder([0]).copy(0, "x").unpack().lines())
    made = [state.keep_recording("guard-fired", lines) for _ in range(RECORDINGS + 3)]
    state.close()
    assert sorted((tmp_path / "state" / "recordings").iterdir()) == made[3:]
    assert read_recording(made[-1].read_text().splitlines()).slices == {}
