"""The bytes of a scrape: which format, and that our encoder writes what prometheus-client does."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter
from prometheus_client import exposition as text_format
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from mixvisor.metrics.collector import SnapshotCollector
from mixvisor.metrics.exposition import CONTENT_TYPE_TEXT, render
from mixvisor.metrics.snapshot import DiskSnapshot, Snapshot

from .snapshots import a_vm, snapshot_at

# What Prometheus 2.42 sends.
PROMETHEUS = ("application/openmetrics-text;version=1.0.0,application/openmetrics-text;"
              "version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1")


def kept(snapshot: Snapshot) -> SnapshotCollector:
    """One collection, shown again and again: the collector's own duration stays the same too."""
    return SnapshotCollector(lambda: snapshot, clock=lambda: 0.0)


def test_a_browser_gets_the_text_format():
    for accept in (None, "", "text/html,*/*;q=0.8"):
        content_type, body = render(kept(snapshot_at(1.0)), accept)
        assert content_type == CONTENT_TYPE_TEXT
        assert body.startswith(b"# HELP mixvisor_build_info ")
        assert b"# EOF" not in body


def test_prometheus_gets_openmetrics_that_a_strict_parser_reads():
    content_type, body = render(kept(snapshot_at(1.0)), PROMETHEUS)
    assert content_type.startswith("application/openmetrics-text; version=1.0.0")
    families = {family.name: family for family in text_string_to_metric_families(body.decode())}
    assert families["mixvisor_vm"].type == "info"
    assert families["mixvisor_vm_exits"].type == "counter"
    assert families["mixvisor_scheduler_wakeup_delay_seconds"].type == "histogram"


@pytest.mark.parametrize("accept", [PROMETHEUS, None])
def test_no_series_says_when_a_counter_was_created(accept):
    assert b"_created" not in render(kept(snapshot_at(1.0)), accept)[1]


@pytest.mark.parametrize("accept", [
    "application/openmetrics-text;version=banana", "text/plain;version=", ";;;,,,=", "\x00" * 99,
    "application/openmetrics-text;version=1.0.0;escaping=banana"])
def test_a_header_that_cannot_be_understood_is_answered_all_the_same(accept):
    content_type, body = render(kept(snapshot_at(1.0)), accept)
    assert b"mixvisor_vm_info{" in body
    assert body.endswith(b"# EOF\n") == content_type.startswith("application/openmetrics-text")


@given(reason=st.text(), name=st.text(), lag_ns=st.integers(-10**18, 10**18),
       bytes_read=st.integers(0, 2**64))
def test_our_encoder_writes_what_prometheus_client_writes(reason, name, lag_ns, bytes_read):
    vm = replace(a_vm("alpha", 3.0), mode_reason=reason, name=name, lag_ns=lag_ns,
                 disks={"hda": DiskSnapshot(bytes_read)})
    collector = kept(snapshot_at(3.0, vms=(vm,)))
    assert render(collector)[1] == text_format.generate_latest(collector)
    assert render(collector, PROMETHEUS)[1] == openmetrics.generate_latest(collector)


def test_text_that_is_not_unicode_does_not_stop_a_scrape():
    vm = replace(a_vm("alpha", 3.0), os="\udc80")
    for accept in (None, PROMETHEUS):
        assert b'os="?"' in render(kept(snapshot_at(3.0, vms=(vm,))), accept)[1]


def test_names_escaped_as_the_scraper_asks_are_left_to_prometheus_client():
    content_type, body = render(
        kept(snapshot_at(1.0)), "application/openmetrics-text;version=1.0.0;escaping=dots")
    assert content_type.endswith("escaping=dots")
    assert b"mixvisor__vm__exits__total{" in body


def test_a_registry_with_other_instruments_is_rendered_whole():
    registry = CollectorRegistry()
    registry.register(kept(snapshot_at(1.0)))
    Counter("mixvisor_requests", "Requests.", registry=registry).inc()
    body = render(registry)[1]
    assert b"mixvisor_requests_total 1.0" in body
    assert b"mixvisor_vm_info{" in body
