"""docs/metrics.md says what the code exports, and its example queries work."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mixvisor.metrics.collector import SnapshotCollector
from mixvisor.metrics.document import END, families_table, main, renewed
from mixvisor.metrics.exposition import render
from mixvisor.metrics.families import FAMILIES, SELF_FAMILIES

from .dashboard import examples, metric_names
from .prom import promtool
from .snapshots import snapshot_at

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"
QUERIES = examples(DOCUMENT)


def test_the_document_is_in_step_with_the_code():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert renewed(text) == text, "run python -m mixvisor.metrics.document --write docs/metrics.md"


def test_every_family_has_its_row():
    rows = families_table().splitlines()[2:]
    assert [re.match(r"\| `(\w+)`", row)[1] for row in rows] == [
        family.name for family in (*FAMILIES, *SELF_FAMILIES)]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 5 for row in rows)


def test_what_stands_around_the_table_is_kept():
    text = DOCUMENT.read_text(encoding="utf-8")
    stale = text.replace("| counter |", "| gauge |")
    assert stale != text
    assert renewed(stale) == text


def test_a_document_without_the_place_for_the_table_is_refused():
    with pytest.raises(ValueError, match="no lines"):
        renewed("# Metrics\n" + END)


def test_check_tells_an_old_document_from_a_new_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
):
    file = tmp_path / "metrics.md"
    assert main(["--check", str(file)]) == 2
    file.write_text(DOCUMENT.read_text(encoding="utf-8").replace("| counter |", "| gauge |"))
    assert main(["--check", str(file)]) == 1
    assert "out of date" in capsys.readouterr().err
    assert main(["--write", str(file)]) == 0
    assert main(["--check", str(file)]) == 0


def test_the_example_queries_use_only_what_is_exported():
    text = render(SnapshotCollector(lambda: snapshot_at(10.0)))[1].decode()
    exported = {re.split(r"[{ ]", line)[0] for line in text.splitlines() if line[0] != "#"}
    assert len(QUERIES) >= 7
    for query in QUERIES:
        assert metric_names(query), query
        assert metric_names(query) <= exported, query


@pytest.mark.prometheus
@pytest.mark.parametrize("query", QUERIES)
def test_promtool_accepts_the_example_queries(query: str, tmp_path: Path):
    file = tmp_path / "rules.yml"
    lines = "\n".join("          " + line for line in query.splitlines())
    file.write_text("groups:\n  - name: examples\n    rules:\n      - record: example:query\n"
                    f"        expr: |\n{lines}\n")
    result = promtool("check", "rules", str(file))
    assert result.returncode == 0, (result.stdout + result.stderr).decode()
