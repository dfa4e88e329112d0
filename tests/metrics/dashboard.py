"""The expressions of a Grafana dashboard, for tests: read from its JSON, variables filled in."""

from __future__ import annotations

import json
import re
from pathlib import Path

from .prom import Prometheus

VARIABLES = {"$job": "mixvisor", "$instance": ".*", "$vm": ".*"}


def panels(path: Path) -> list[dict]:
    """Every panel that is not a row."""
    board = json.loads(path.read_text(encoding="utf-8"))
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def expressions(path: Path) -> dict[str, str]:
    """Every query of every panel: "12 panel title A" to its expression, variables as they are."""
    return {f"{panel['id']} {panel['title']} {target['refId']}": target["expr"]
            for panel in panels(path) for target in panel["targets"]}


def substituted(expression: str, *, rate_interval: str = "5m",
                variables: dict[str, str] = VARIABLES) -> str:
    """What Grafana would send. Raises ValueError when a variable is left."""
    expression = expression.replace("$__rate_interval", rate_interval)
    for name, value in variables.items():
        expression = expression.replace(name, value)
    if "$" in expression:
        raise ValueError(f"a variable is left in {expression}")
    return expression


def examples(document: Path) -> list[str]:
    """The example queries of docs/metrics.md."""
    blocks = re.findall(r"```promql\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)
    return [query.strip() for block in blocks for query in block.split("\n\n")]


def unanswered(prometheus: Prometheus, path: Path, rate_interval: str) -> dict[str, object]:
    """The expressions that a Prometheus has no series for, with its answer; for end-to-end tests.

    A NaN counts as an answer: a quantile of nothing is one, e.g. where no mode ever switched.
    """
    answers = {title: prometheus.query(substituted(expression, rate_interval=rate_interval))
               for title, expression in expressions(path).items()}
    return {title: answer for title, answer in answers.items() if not answer}


def metric_names(expression: str) -> set[str]:
    return set(re.findall(r"\bmixvisor_[a-z0-9_]+", expression))
