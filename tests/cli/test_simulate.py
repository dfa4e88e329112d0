"""`simulate`: tables, JSON, timelines, recordings and what is said of a bad scenario."""

from __future__ import annotations

import json

import pytest

from .test_commands import path, run

__all__ = ["path", "run"]      # fixtures

SCENARIO = """
[simulation]
seconds = 1
policies = ["fair", "batch"]
[[vm]]
name = "soft"
count = 2
[[vm]]
name = "hard"
mode = "hardware"
weight = 200
[[vm]]
name = "desk"
behaviour = "interactive"
"""


@pytest.fixture
def scenario(tmp_path):
    file = tmp_path / "scenario.toml"
    file.write_text(SCENARIO)
    return str(file)


def test_a_table_compares_the_policies_of_the_file(run, scenario):
    result = run("simulate", scenario, socket=False)
    assert result.exit_code == 0, result.stderr
    for words in ("1 s of 4 VMs on 1 host CPU", "fair", "batch", "Mode switches/s", "Lost to mixing", "soft × 2",
                  "interactive", "Share error"):
        assert words in result.stdout
    assert "simulated in" in result.stderr


def test_json_has_every_figure_and_is_the_same_again(run, scenario):
    one, two = (run("simulate", scenario, "--seconds", "0.2", "--policy", "fair", "-o", "json", socket=False)
                for _ in range(2))
    assert one.stdout == two.stdout
    data = json.loads(one.stdout)
    assert (data["schema"], data["seed"]) == (1, 1)
    (found,) = data["policies"]
    assert found["policy"] == "fair"
    assert [group["name"] for group in found["groups"]] == ["soft", "hard", "desk"]
    assert found["groups"][1]["received"] > found["groups"][0]["received"]
    assert run("simulate", scenario, "--seconds", "0.2", "--policy", "fair", "--seed", "2", "-o", "json",
               socket=False).stdout != one.stdout


def test_a_timeline_for_each_policy(run, scenario, tmp_path):
    result = run("simulate", scenario, "--timeline", str(tmp_path / "t.json"), "--timeline-seconds", "0.1",
                 socket=False)
    assert result.exit_code == 0, result.stderr
    for policy in ("fair", "batch"):
        events = json.loads((tmp_path / f"t-{policy}.json").read_text())["traceEvents"]
        names = {event["name"] for event in events if event["ph"] == "X"}
        assert {"software", "hardware", "soft-1", "soft-2", "hard"} <= names
        assert max(event.get("ts", 0) for event in events) < 100_000


def test_what_is_recorded_replays_and_a_changed_answer_is_found(run, scenario, tmp_path):
    file = tmp_path / "inputs.jsonl"
    assert run("simulate", scenario, "--policy", "batch", "--record", str(file), socket=False).exit_code == 0
    result = run("simulate", "--replay", str(file), socket=False)
    assert result.exit_code == 0, result.stderr
    assert "all answers as recorded" in result.stdout
    text = file.read_text()
    at = text.rindex('"pick"')
    line_end = text.index("]\n", at)
    file.write_text(text[:text.rindex(",", at, line_end)] + ",77" + text[line_end:])
    result = run("simulate", "--replay", str(file), "-o", "json", socket=False)
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["differing"] == 1
    assert found["first"][0]["recorded"] == 77


@pytest.mark.parametrize(("arguments", "code", "says"), [
    ((), 2, "name either a scenario FILE or --replay FILE"),
    (("FILE", "--replay", "x"), 2, "name either a scenario FILE or --replay FILE"),
    (("FILE", "--policy", "lottery"), 2, "there is no policy 'lottery'; there are: fair, batch, partition, kernel"),
    (("absent.toml",), 1, "absent.toml cannot be used, 1 problem:\n  absent.toml: found no such file"),
    (("--replay", "absent.jsonl"), 1, "absent.jsonl cannot be read: No such file or directory"),
    (("--replay", "FILE"), 1, "line 1 is not JSON"),
    (("FILE", "--timeline", "/no/where.json"), 1, "cannot be written: No such file or directory"),
])
def test_a_wrong_call_is_one_sentence(run, scenario, arguments, code, says):
    result = run("simulate", *(scenario if one == "FILE" else one for one in arguments), socket=False)
    assert result.exit_code == code
    assert says in result.stderr
    assert result.stdout == ""


def test_reservations_beyond_the_host_are_refused(run, tmp_path):
    file = tmp_path / "s.toml"
    file.write_text('[[vm]]\nname = "a"\ncount = 3\nreservation = 60\n')
    result = run("simulate", str(file), socket=False)
    assert result.exit_code == 1
    assert "together reserve 180 %" in result.stderr
