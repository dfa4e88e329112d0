"""`trace`: what the host CPUs did in the last seconds, as a file for Perfetto or as it was recorded."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

import click

from .common import connect, notice

if TYPE_CHECKING:
    from ..metrics.trace import TraceSlice
    from ..sched.recorder import Recording

__all__ = ["trace"]

ASKED_FOR = "asked for"


@click.command()
@click.option("--seconds", type=click.FloatRange(min=0, min_open=True, max=86_400), default=None, metavar="N",
              help="Only the last N seconds. Default: all that the service has kept.")
@click.option("-o", "--output", "target", type=click.Path(path_type=Path, dir_okay=False, allow_dash=True),
              required=True, metavar="FILE", help="Where to write it; - is stdout.")
@click.option("--raw", is_flag=True, help="Write the recording itself, JSON lines, instead of a trace.")
@click.option("--from", "source", type=click.Path(path_type=Path, dir_okay=False), default=None, metavar="FILE",
              help="Ask no service: make a trace of this recording, such as one that the service kept below "
                   "recordings/ in its state directory when something went wrong.")
@click.option("--inputs", is_flag=True,
              help="Record from now on for N seconds (default 2, at most 20) what the run queues are told and answer, "
                   "for `mixvisor simulate --replay FILE`.")
def trace(seconds: float | None, target: Path, raw: bool, source: Path | None, inputs: bool) -> None:
    """Write who had which host CPU in the last seconds; open it with https://ui.perfetto.dev.

    One track a host CPU; its upper row is the mode it was in (one colour a mode), below are the
    slices by VM, with what each received, how late it ended and what the decision cost.
    """
    if source is not None and (raw or seconds is not None):
        raise click.UsageError("--from makes a trace of a whole recording: leave out --raw and --seconds")
    if inputs and (raw or source is not None):
        raise click.UsageError("--inputs is a recording of its own: leave out --raw and --from")
    from ..service.backend import ServiceError
    if inputs:
        with connect() as client:
            text = client.record_inputs(2.0 if seconds is None else seconds)
        _keep(target, text)
        if str(target) != "-":
            notice(f"{target}: {text.count(chr(10))} lines; take its decisions again with"
                   f" mixvisor simulate --replay {target}")
        return
    if source is None:
        with connect() as client:
            text = client.recording(seconds)
    else:
        try:
            text = source.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ServiceError(f"the recording {source} cannot be read: {error}") from error
    recording = _parsed(text, source)
    count = sum(len(records) for records in recording.slices.values())
    try:
        with _opened(target) as out:
            if raw:
                out.write(text)
            else:
                _write(out, recording)
    except OSError as error:
        raise ServiceError(f"{target} cannot be written: {error.strerror}") from error
    if str(target) != "-":
        notice(f"{target}: {count} slices" + ("" if raw else "; open it with https://ui.perfetto.dev"))


def _parsed(text: str, source: Path | None) -> Recording:
    from ..sched.recorder import RecordingError, read_recording
    from ..service.backend import ServiceError
    try:
        return read_recording(text.splitlines())
    except RecordingError as error:
        raise ServiceError(f"{source or 'the answer of the service'}: {error}") from error


def _keep(target: Path, text: str) -> None:
    from ..service.backend import ServiceError
    try:
        with _opened(target) as out:
            out.write(text)
    except OSError as error:
        raise ServiceError(f"{target} cannot be written: {error.strerror}") from error


@contextmanager
def _opened(target: Path) -> Iterator[IO[str]]:
    if str(target) == "-":
        yield sys.stdout
        return
    with target.open("w", encoding="utf-8") as out:
        yield out


def _write(out: IO[str], recording: Recording) -> None:
    from ..metrics.trace import TraceMark, write_trace
    marks = () if recording.reason == ASKED_FOR else (TraceMark(recording.taken_ns, recording.reason),)
    write_trace(out.write, _slices(recording), title=f"Mixvisor, {recording.reason}", marks=marks)


def _slices(recording: Recording) -> Iterator[TraceSlice]:
    """A slice for each that a VM was picked for, or that VMs had unpicked; idle time is a gap."""
    from ..metrics.trace import TraceSlice as Slice
    from ..sched.shared import MODES, NOBODY, RECORD_MIGRATED

    for cpu, records in recording.slices.items():
        for r in records:
            leak_ns = r.others_software_ns + r.others_hardware_ns
            arguments: dict[str, int | float | str | bool] = {
                "received_us": r.run_ns / 1000, "others_us": leak_ns / 1000, "late_us": r.late_ns / 1000,
                "decision_us": r.decision_ns / 1000, "breath_us": r.breath_ns / 1000}
            if r.slot == NOBODY:
                if leak_ns:
                    mode = MODES[int(r.others_hardware_ns > r.others_software_ns)]
                    yield Slice(cpu, r.start_ns, r.end_ns, "nobody picked", mode, arguments)
                continue
            if r.progress_after > r.progress_before:
                arguments["progress"] = r.progress_after - r.progress_before
            if r.flags & RECORD_MIGRATED:
                arguments["migrated"] = True
            yield Slice(cpu, r.start_ns, r.end_ns, recording.vms.get(r.generation, f"slot {r.slot}"),
                        MODES[r.mode], arguments)
