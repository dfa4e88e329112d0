"""The committed dashboard: in step with its source, and every expression true to its rules."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mixvisor.metrics import dashboards
from mixvisor.metrics.collector import SnapshotCollector
from mixvisor.metrics.exposition import render

from .dashboard import expressions, metric_names, panels, substituted
from .prom import promtool
from .snapshots import snapshot_at

DASHBOARD = Path(dashboards.__file__).with_name("mixvisor.json")
EXPRESSIONS = expressions(DASHBOARD)


def test_the_committed_json_is_what_its_source_builds():
    pytest.importorskip("grafana_foundation_sdk", reason="grafana-foundation-sdk not installed")
    from mixvisor.metrics.dashboards.build import built_json
    assert DASHBOARD.read_text(encoding="utf-8") == built_json(), (
        "run python -m mixvisor.metrics.dashboards.build")


def test_it_can_be_imported_anywhere():
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    assert board["uid"] == "mixvisor"
    assert "id" not in board or board["id"] is None, "an id of one Grafana is not for another"
    variables = {each["name"]: each for each in board["templating"]["list"]}
    assert list(variables) == ["datasource", "job", "instance", "vm"]
    assert variables["datasource"]["type"] == "datasource"
    sources = re.findall(r'"uid": "(\$?[^"]*)"', json.dumps(board["panels"]))
    assert sources
    assert set(sources) == {"${datasource}"}, "a data source is hard-coded"


def test_it_has_the_rows_that_were_asked_for():
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    assert [panel["title"] for panel in board["panels"] if panel["type"] == "row"] == [
        "Overview", "VMs and shares", "Modes", "Mixing", "Scheduler", "Exits and devices",
        "Warnings and health"]


def test_every_panel_says_what_it_shows_in_which_unit():
    for panel in panels(DASHBOARD):
        assert len(panel["description"]) > 20, panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["targets"], panel["title"]
        assert "repeat" not in panel, f"{panel['title']}: repeated panels hang at hundreds of VMs"


def test_panels_do_not_overlap_and_ids_are_unique():
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    taken: dict[tuple[int, int], str] = {}
    for panel in board["panels"]:
        place = panel["gridPos"]
        for x in range(place["x"], place["x"] + place["w"]):
            assert x < 24, panel["title"]
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, f"{panel['title']} on {taken[x, y]}"
                taken[x, y] = panel["title"]


def test_every_expression_selects_by_job_and_instance_and_rates_over_the_rate_interval():
    for title, expression in EXPRESSIONS.items():
        selectors = re.findall(r"mixvisor_[a-z_]+(\{[^}]*\})?", expression)
        assert selectors, title
        for selector in selectors:
            assert 'job=~"$job"' in selector, title
            assert 'instance=~"$instance"' in selector, title
        assert set(re.findall(r"\[([^\]]*)\]", expression)) <= {"$__rate_interval"}, title


def test_a_line_per_vm_is_drawn_for_the_top_ones_only():
    for panel in panels(DASHBOARD):
        for target in panel["targets"]:
            if panel["type"] in ("timeseries", "state-timeline") and "{{vm}}" in target[
                    "legendFormat"]:
                assert target["expr"].startswith("topk("), panel["title"]


def test_every_metric_of_the_dashboard_is_exported():
    text = render(SnapshotCollector(lambda: snapshot_at(10.0)))[1].decode()
    exported = {re.split(r"[{ ]", line)[0] for line in text.splitlines() if line[0] != "#"}
    for title, expression in EXPRESSIONS.items():
        assert metric_names(expression) <= exported, title


@pytest.mark.prometheus
def test_promtool_accepts_every_expression(tmp_path: Path):
    rules = [{"record": f"dashboard:expression_{number}", "expr": substituted(expression)}
             for number, expression in enumerate(EXPRESSIONS.values())]
    file = tmp_path / "rules.yml"
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    result = promtool("check", "rules", str(file))
    assert result.returncode == 0, (result.stdout + result.stderr).decode()
    assert f"{len(rules)} rules found".encode() in result.stdout
