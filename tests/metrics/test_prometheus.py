"""A real Prometheus scrapes snapshots that change as a known function of time, and is asked."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from mixvisor.metrics import dashboards
from mixvisor.metrics.collector import SnapshotCollector
from mixvisor.metrics.exposition import render
from mixvisor.metrics.snapshot import Snapshot

from .dashboard import examples, expressions, substituted, unanswered
from .prom import MetricsServer, Prometheus, PrometheusFailed
from .snapshots import MODES, SHARES, SWITCHES_PER_S, WORK_PER_CPU_S, snapshot_at

pytestmark = pytest.mark.prometheus

RATE_INTERVAL = "3s"
DASHBOARD = Path(dashboards.__file__).with_name("mixvisor.json")
EXPRESSIONS = expressions(DASHBOARD)
EXAMPLES = examples(Path(__file__).resolve().parents[2] / "docs" / "metrics.md")
# How long the windows were by the snapshots' own clock: dividing by it takes out when exactly
# Prometheus came to scrape, so that answers can be compared sharply.
SECONDS = f"scalar(increase(mixvisor_snapshot_timestamp_seconds[{RATE_INTERVAL}]))"


@dataclass
class InventedService:
    """Time runs from second 100, until it is stopped for good by `freeze`."""

    began: float = field(default_factory=lambda: time.monotonic() - 100)
    frozen: Snapshot | None = None

    def __call__(self) -> Snapshot:
        return self.frozen or snapshot_at(time.monotonic() - self.began)

    def freeze(self) -> Snapshot:
        self.frozen = self()
        return self.frozen


@pytest.fixture(scope="module")
def service() -> InventedService:
    return InventedService()


@pytest.fixture(scope="module")
def prometheus(service: InventedService, tmp_path_factory: pytest.TempPathFactory,
               ) -> Iterator[Prometheus]:
    collector = SnapshotCollector(service)
    with (MetricsServer(lambda accept: render(collector, accept)) as server,
          Prometheus(tmp_path_factory.mktemp("prometheus"), {"mixvisor": server.address}) as asked):
        # Every window full: three seconds of scrapes have been.
        asked.wait_for(f"count_over_time(mixvisor_service_ready[{RATE_INTERVAL}])",
                       lambda answer: bool(answer) and answer[0][1] >= 12)
        yield asked


@pytest.mark.parametrize("title", EXPRESSIONS)
def test_every_expression_of_the_dashboard_has_data(prometheus: Prometheus, title: str):
    expression = substituted(EXPRESSIONS[title], rate_interval=RATE_INTERVAL)
    answer = prometheus.wait_for(expression)
    assert all(math.isfinite(value) for _, value in answer)


@pytest.mark.parametrize("query", EXAMPLES)
def test_every_example_of_the_document_has_data(prometheus: Prometheus, query: str):
    prometheus.wait_for(query.replace("[1m]", f"[{RATE_INTERVAL}]"))


def test_what_has_no_answer_is_named(prometheus: Prometheus, tmp_path: Path):
    assert unanswered(prometheus, DASHBOARD, RATE_INTERVAL) == {}
    text = DASHBOARD.read_text(encoding="utf-8").replace("mixvisor_host_info", "mixvisor_absent")
    (tmp_path / "broken.json").write_text(text, encoding="utf-8")
    broken = unanswered(prometheus, tmp_path / "broken.json", RATE_INTERVAL)
    assert [title.split(maxsplit=1)[1] for title in broken] == ["Host A"]


def test_received_shares_are_those_of_the_snapshot(prometheus: Prometheus):
    received = prometheus.values(
        f"sum by (vm) (increase(mixvisor_vm_vcpu_run_seconds_total[{RATE_INTERVAL}])) / {SECONDS}",
        "vm")
    assert received == {**{(vm,): pytest.approx(0.99 * share, rel=1e-4)
                           for vm, share in SHARES.items()}, ("echo",): 0}
    ratio = prometheus.values(
        f"sum by (vm) (rate(mixvisor_vm_vcpu_run_seconds_total[{RATE_INTERVAL}])) / "
        f"sum by (vm) (rate(mixvisor_vm_entitled_cpu_seconds_total[{RATE_INTERVAL}])) > 0", "vm")
    assert set(ratio) == {(vm,) for vm in SHARES}
    assert list(ratio.values()) == pytest.approx([1.0] * 4, rel=1e-6)


def test_mode_switches_and_residency_are_those_of_the_snapshot(prometheus: Prometheus):
    switches = prometheus.values(
        f"increase(mixvisor_host_cpu_mode_switches_total[{RATE_INTERVAL}]) / {SECONDS}",
        "from_mode", "to_mode")
    nearly = pytest.approx(SWITCHES_PER_S, abs=0.5)      # whole switches in under three seconds
    assert switches == {("software", "hardware"): nearly, ("hardware", "software"): nearly}
    spent = prometheus.values(
        f"increase(mixvisor_host_cpu_mode_residency_seconds_total[{RATE_INTERVAL}]) / {SECONDS}",
        "mode")
    assert spent == {("hardware",): pytest.approx(0.99 * 0.75, rel=1e-4),
                     ("software",): pytest.approx(0.99 * 0.25, rel=1e-4),
                     ("other",): pytest.approx(0.01, rel=1e-4), ("idle",): 0}


def test_the_join_with_vm_info_brings_the_mode(prometheus: Prometheus):
    work = prometheus.values(
        f"sum by (vm) (rate(mixvisor_vm_progress_total[{RATE_INTERVAL}])) / "
        f"sum by (vm) (rate(mixvisor_vm_vcpu_run_seconds_total[{RATE_INTERVAL}])) "
        "* on (vm) group_left (mode) mixvisor_vm_info", "vm", "mode")
    assert work == {(vm, mode): pytest.approx(WORK_PER_CPU_S[mode], rel=0.02)
                    for vm, mode in MODES.items()}


def test_quantiles_fall_into_the_buckets_of_the_snapshot(prometheus: Prometheus):
    late = prometheus.value(
        "histogram_quantile(0.99, sum by (le) (rate("
        f"mixvisor_scheduler_wakeup_delay_seconds_bucket[{RATE_INTERVAL}])))")
    assert 10e-6 < late <= 20e-6


def test_the_dashboards_states_and_modes_are_those_of_the_snapshot(prometheus: Prometheus):
    def asked(title: str) -> dict[tuple[str, ...], float]:
        (expression,) = [e for key, e in EXPRESSIONS.items() if key.endswith(f" {title} A")]
        return prometheus.values(substituted(expression, rate_interval=RATE_INTERVAL), "vm")
    running, defined = 2, 0
    assert asked("State of each VM") == {**{(vm,): running for vm in SHARES}, ("echo",): defined}
    assert asked("Mode of each VM") == {
        ("alpha",): 1, ("bravo",): 1, ("carol",): 2, ("delta",): 2, ("echo",): 1}


def test_a_query_that_prometheus_refuses_is_an_error_with_its_words(prometheus: Prometheus):
    with pytest.raises(PrometheusFailed, match="parse error"):
        prometheus.query("sum(")


def test_a_condition_that_never_comes_true_ends_at_its_deadline(prometheus: Prometheus):
    with pytest.raises(PrometheusFailed, match=r"not within 0\.2 s: absent_metric accepted"):
        prometheus.wait_for("absent_metric", deadline_s=0.2)


# Last in this file: time stands still from here.
def test_every_sample_that_prometheus_holds_is_the_snapshots(
    prometheus: Prometheus, service: InventedService,
):
    snapshot = service.freeze()
    prometheus.wait_for(
        "mixvisor_snapshot_timestamp_seconds",
        lambda answer: bool(answer) and answer[0][1] == pytest.approx(snapshot.taken_unix_s,
                                                                      abs=1e-3))
    held = {tuple(sorted((key, value) for key, value in labels.items()
                         if key not in ("job", "instance"))): value
            for labels, value in prometheus.query('{__name__=~"mixvisor_.*",job="mixvisor"}')}
    text = render(SnapshotCollector(lambda: snapshot))[1].decode()
    compared = 0
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "mixvisor_collector_duration_seconds":
                continue  # a duration of that collection, not of the snapshot
            labels = dict(sample.labels, __name__=sample.name)
            key = tuple(sorted(labels.items()))
            assert held[key] == pytest.approx(sample.value), key
            compared += 1
    assert compared == len(held) - 1
