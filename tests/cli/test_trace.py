"""`trace` against a service without VMs, and recordings from files."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from mixvisor.cli import main as cli
from mixvisor.sched.recorder import FlightRecorder, read_recording

from .test_commands import path, run, service

__all__ = ["path", "run", "service"]      # fixtures of a service on a socket


def test_a_trace_has_a_track_for_each_cpu_with_modes_above_vms(run, service, tmp_path):
    target = tmp_path / "trace.json"
    result = run("trace", "-o", str(target))
    assert result.exit_code == 0, result.stderr
    assert "100 slices" in result.stderr
    assert result.stdout == ""
    events = json.loads(target.read_text())["traceEvents"]
    tracks = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert tracks == {"CPU 1"}
    slices = [event for event in events if event["ph"] == "X"]
    names = [event["name"] for event in slices]
    assert names.count("sw-one") == names.count("hw-two") == 50
    assert names.count("software") == names.count("hardware") == 50
    assert {event["cname"] for event in slices if event["name"] in ("sw-one", "software")} == {"rail_response"}
    assert {event["args"]["decision_us"] for event in slices if event["name"] == "sw-one"} == {60.0}


def test_the_last_part_can_be_asked_for(run, service):
    result = run("trace", "--seconds", "0.105", "--raw", "-o", "-")
    recording = read_recording(result.stdout.splitlines())
    assert 5 <= len(recording.slices[1]) <= 11
    assert recording.vms == {1: "sw-one", 2: "hw-two"}
    assert recording.reason == "asked for"


def test_a_kept_recording_becomes_a_trace_without_a_service(run, tmp_path):
    source, target = tmp_path / "kept.jsonl", tmp_path / "trace.json"
    recorder = FlightRecorder([3])
    source.write_text("\n".join(recorder.copy(5, "guard-fired").unpack().lines()))
    result = run("trace", "--from", str(source), "-o", str(target))
    assert result.exit_code == 0, result.stderr
    trace = json.loads(target.read_text())
    assert [event["name"] for event in trace["traceEvents"] if event["ph"] == "i"] == ["guard-fired"]


@pytest.mark.parametrize(("text", "says"), [
    ("", "line 1 is not JSON"),
    ("{}", "line 1 is not the head"),
    ('{"mixvisor_recording": 1, "fields": ["cpu"], "vms": {}}', "another version"),
    ("HEAD\n[1, 2]", "line 2 is no slice"),
    ("HEAD\n" + json.dumps([1] * 6 + [0] * 1 + [99] + [0] * 9), "line 2 is no slice"),
])
def test_what_is_no_recording_is_refused_with_its_line(run, tmp_path, text, says):
    head = next(iter(FlightRecorder([1]).copy(0, "x").unpack().lines()))
    source = tmp_path / "bad.jsonl"
    source.write_text(text.replace("HEAD", head))
    result = run("trace", "--from", str(source), "-o", str(tmp_path / "out.json"))
    assert result.exit_code == 1
    assert says in result.stderr
    assert str(source) in result.stderr
    assert not (tmp_path / "out.json").exists()


def test_a_target_that_cannot_be_written_is_said(run, service, tmp_path):
    result = run("trace", "-o", str(tmp_path / "no" / "trace.json"))
    assert result.exit_code == 1
    assert "cannot be written: No such file or directory" in result.stderr


def test_a_recording_is_converted_whole(run, tmp_path):
    result = CliRunner().invoke(cli._mixvisor, ["trace", "--from", "x", "--raw", "-o", "y"])
    assert result.exit_code == 2


def test_impossible_seconds_are_refused_by_the_service(service, path):
    import httpx2
    with httpx2.Client(transport=httpx2.HTTPTransport(uds=str(path)), base_url="http://x") as http:
        for text in ("0", "-1", "nan", "x", "1e9"):
            answer = http.get(f"/v1/recording?seconds={text}")
            assert answer.status_code == 422
            assert "seconds is a number above 0" in answer.json()["error"]["message"]


def test_inputs_are_recorded_and_replayed_with_the_same_answers(run, service, tmp_path):
    target = tmp_path / "inputs.jsonl"
    result = run("trace", "--inputs", "--seconds", "0.2", "-o", str(target))
    assert result.exit_code == 0, result.output
    assert "simulate --replay" in result.output
    assert len(target.read_text().splitlines()) == 3
    replayed = run("simulate", "--replay", str(target))
    assert replayed.exit_code == 0, replayed.output
    assert "1 decisions of fair on 1 host CPU, 2 calls: all answers as recorded" in replayed.output


@pytest.mark.parametrize(("arguments", "says"), [
    (("--inputs", "--raw"), "leave out --raw"), (("--inputs", "--seconds", "99"), "from 0.1 to 20; found 99"),
])
def test_inputs_that_cannot_be_had_are_refused(run, service, tmp_path, arguments, says):
    result = run("trace", *arguments, "-o", str(tmp_path / "x"))
    assert result.exit_code != 0
    assert says in result.output
