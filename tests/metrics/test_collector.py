"""The collector over handmade snapshots: what is shown, what is not, and that it never raises."""

from __future__ import annotations

import math
import re
import threading
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from mixvisor.metrics.collector import SnapshotCollector, metrics_of
from mixvisor.metrics.exposition import render
from mixvisor.metrics.families import FAMILIES, SELF_FAMILIES, merged
from mixvisor.metrics.snapshot import LATENESS_BOUNDS_NS, STATES, Histogram, Snapshot
from mixvisor.vm.engines.base import EXIT_KINDS

from .prom import promtool
from .snapshots import SHARES, a_cpu, a_vm, snapshot_at

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples_of(collector: SnapshotCollector) -> Samples:
    """What a scraper reads: parsed from the text, not taken from the objects."""
    text = render(collector)[1].decode()
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found, f"{key} is exported twice"
            found[key] = sample.value
    return found


def at(samples: Samples, name: str, **labels: str) -> float:
    return samples["mixvisor_" + name, frozenset(labels.items())]


def fresh(snapshot: Snapshot) -> SnapshotCollector:
    return SnapshotCollector(lambda: snapshot, share_s=0)


def names(samples: Samples) -> set[str]:
    return {name for name, _ in samples}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_nanoseconds_become_seconds_and_counts_stay():
    samples = samples_of(fresh(snapshot_at(100.0)))
    run = at(samples, "vm_vcpu_run_seconds_total", vm="delta", vcpu="0")
    assert run == pytest.approx(SHARES["delta"] * 0.99 * 100)
    assert at(samples, "vm_bios_calls_total", vm="delta") == 1800
    assert at(samples, "scheduler_slice_seconds") == pytest.approx(0.005)
    assert at(samples, "scheduler_lag_seconds", vm="alpha") == pytest.approx(0.002)


def test_every_vm_is_in_exactly_one_state_out_of_all_states():
    samples = samples_of(fresh(snapshot_at(1.0)))
    for vm, state in {"alpha": "running", "echo": "defined"}.items():
        shown = {dict(labels)["state"]: value for (name, labels), value in samples.items()
                 if name == "mixvisor_vm_state" and ("vm", vm) in labels}
        assert shown == {each: float(each == state) for each in STATES}


def test_names_and_reasons_stand_on_vm_info_alone():
    families = {family.name: family for family in FAMILIES}
    about = {"name", "engine", "mode_rule", "mode_reason", "policy", "os", "bits"}
    assert about < set(families["mixvisor_vm_info"].labels)
    for family in FAMILIES:
        if "vm" in family.labels and family.name != "mixvisor_vm_info":
            assert not about & set(family.labels), family.name


def test_a_vm_that_is_gone_leaves_no_series():
    snapshots = iter([snapshot_at(1.0), snapshot_at(2.0, vms=(a_vm("alpha", 2.0),))])
    collector = SnapshotCollector(lambda: next(snapshots), share_s=0)
    assert any(("vm", "delta") in labels for _, labels in samples_of(collector))
    after = samples_of(collector)
    assert {dict(labels)["vm"] for _, labels in after if "vm" in dict(labels)} == {"alpha"}


def test_what_is_not_known_is_absent_and_never_zero():
    samples = samples_of(fresh(snapshot_at(1.0, vms=(a_vm("echo", 1.0, state="defined"),),
                                           fairness=None)))
    for name in ("vm_progress_total", "vm_start_time_seconds", "vm_vcpu_host_cpu", "vm_cap_cpus",
                 "scheduler_fairness_ratio"):
        assert "mixvisor_" + name not in names(samples)


def test_exits_and_mode_switches_exist_at_zero_before_the_first_one():
    cpu = replace(a_cpu(0.0), switches={}, residency_ns={}, run_length={}, runnable={})
    vm = replace(a_vm("alpha", 0.0), exits={})
    samples = samples_of(fresh(snapshot_at(0.0, vms=(vm,), cpus=(cpu,), warnings=())))
    for reason in EXIT_KINDS:
        assert at(samples, "vm_exits_total", vm="alpha", reason=reason) == 0
    for start, end in (("software", "hardware"), ("hardware", "software")):
        assert at(samples, "host_cpu_mode_switches_total", cpu="1", from_mode=start,
                  to_mode=end) == 0
    for mode in ("hardware", "software", "idle", "other"):
        assert at(samples, "host_cpu_mode_residency_seconds_total", cpu="1", mode=mode) == 0
    assert at(samples, "warnings_active", code="mixed-modes", severity="warning") == 0


def test_two_slices_of_one_mode_are_no_mode_switch():
    samples = samples_of(fresh(snapshot_at(10.0)))
    switches = {(dict(labels)["from_mode"], dict(labels)["to_mode"]): value
                for (name, labels), value in samples.items()
                if name == "mixvisor_host_cpu_mode_switches_total"}
    assert switches == {("software", "hardware"): 400, ("hardware", "software"): 400}


def test_histograms_are_cumulative_and_added_over_host_cpus():
    bounds = LATENESS_BOUNDS_NS
    one = Histogram(bounds, (1, 2, *([0] * (len(bounds) - 2)), 4), 5_000_000_000)
    cpus = tuple(replace(a_cpu(0.0, number), lateness=one) for number in (0, 1))
    samples = samples_of(fresh(snapshot_at(0.0, cpus=cpus)))

    def bucket(le: str) -> float:
        return at(samples, "scheduler_wakeup_delay_seconds_bucket", le=le)

    assert (bucket("1e-05"), bucket("2e-05"), bucket("0.1"), bucket("+Inf")) == (2, 6, 6, 14)
    assert at(samples, "scheduler_wakeup_delay_seconds_count") == 14
    assert at(samples, "scheduler_wakeup_delay_seconds_sum") == pytest.approx(10.0)


def test_histograms_of_different_bounds_are_refused():
    with pytest.raises(ValueError, match="cannot add"):
        merged([Histogram((1, 2), (0, 0, 0), 0)], (1, 3))


def test_a_host_without_cpus_and_vms_still_renders():
    samples = samples_of(fresh(snapshot_at(0.0, vms=(), cpus=(), warnings=(), fairness=None)))
    assert at(samples, "collector_success", collector="snapshot") == 1
    assert at(samples, "scheduler_wakeup_delay_seconds_count") == 0


def test_every_family_of_the_table_is_exported_with_its_labels():
    shown = {family.name: family for family in metrics_of(snapshot_at(10.0))}
    for family in FAMILIES:
        metric = shown[family.name.removesuffix("_total").removesuffix("_info")]
        assert metric.type == family.kind
        assert metric.samples, f"{family.name} has no sample in the test's snapshot"
        for sample in metric.samples:
            assert set(sample.labels) - {"le"} == set(family.labels), family.name


def test_every_family_says_what_it_means_with_its_unit():
    for family in (*FAMILIES, *SELF_FAMILIES):
        assert re.fullmatch(r"[A-Z0-9].{20,}\.", family.help), family.name
        if "_seconds" in family.name:
            assert "seconds" in family.help, family.name
        if family.name.endswith(("_cpus",)) and "runnable" not in family.name:
            assert "host CPU" in family.help, family.name
        assert ("_total" in family.name) == (family.kind == "counter"), family.name
        assert family.name.endswith("_info") == (family.kind == "info"), family.name


def test_no_family_is_named_twice():
    all_names = [family.name for family in (*FAMILIES, *SELF_FAMILIES)]
    assert len(all_names) == len(set(all_names))


def test_a_failing_source_shows_the_last_good_values_and_says_so():
    answers: list[Snapshot | Exception] = [
        snapshot_at(10.0), RuntimeError("supervisor is stuck"), RuntimeError("still"),
        snapshot_at(20.0), RuntimeError("again")]
    heard: list[str] = []

    def source() -> Snapshot:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    collector = SnapshotCollector(
        source, share_s=0, on_failure=lambda error: heard.append(str(error)))
    seen = []
    for _ in range(5):
        samples = samples_of(collector)
        seen.append((at(samples, "collector_success", collector="snapshot"),
                     at(samples, "vm_bios_calls_total", vm="alpha")))
    assert seen == [(1, 180), (0, 180), (0, 180), (1, 360), (0, 360)]
    assert heard == ["supervisor is stuck", "again"], "told once for each time it begins to fail"
    assert str(collector.failure) == "again"


def test_a_source_that_never_worked_yields_only_the_failure():
    def source() -> Snapshot:
        raise OSError("no service")
    samples = samples_of(SnapshotCollector(source, share_s=0))
    assert names(samples) == {family.name for family in SELF_FAMILIES}
    assert at(samples, "collector_success", collector="snapshot") == 0


def test_a_malformed_snapshot_never_shows_half_a_picture():
    good = snapshot_at(10.0)
    broken = replace(snapshot_at(20.0), cpus=(
        replace(a_cpu(20.0), lateness=Histogram((1,), (1, 1), 1)),))
    answers = [good, broken]
    collector = SnapshotCollector(lambda: answers.pop(0), share_s=0)
    before = samples_of(collector)
    after = samples_of(collector)
    own = {family.name for family in SELF_FAMILIES}
    assert ({key: value for key, value in before.items() if key[0] not in own}
            == {key: value for key, value in after.items() if key[0] not in own})
    assert at(after, "collector_success", collector="snapshot") == 0


def test_scrapes_within_a_tenth_of_a_second_share_one_collection():
    clock, taken = Clock(), []

    def source() -> Snapshot:
        taken.append(clock.now)
        return snapshot_at(clock.now)

    collector = SnapshotCollector(source, clock=clock)
    for now in (0.0, 0.05, 0.099, 0.1, 0.15, 5.0):
        clock.now = now
        samples_of(collector)
    assert taken == [0.0, 0.1, 5.0]


def test_scrapes_at_once_from_many_threads_share_one_collection():
    begun, go, taken = threading.Barrier(8), threading.Event(), []

    def source() -> Snapshot:
        taken.append(threading.get_ident())
        assert go.wait(10)
        return snapshot_at(1.0)

    collector = SnapshotCollector(source, clock=lambda: 0.0)
    bodies: list[bytes] = []

    def scrape() -> None:
        begun.wait(10)
        bodies.append(render(collector)[1])

    threads = [threading.Thread(target=scrape) for _ in range(8)]
    for thread in threads:
        thread.start()
    go.set()
    for thread in threads:
        thread.join(10)
    assert len(taken) == 1
    assert len(set(bodies)) == 1
    assert len(bodies) == 8


def test_collecting_is_measured():
    clock = Clock()

    def source() -> Snapshot:
        clock.now += 0.25
        return snapshot_at(1.0)

    samples = samples_of(SnapshotCollector(source, clock=clock))
    assert at(samples, "collector_duration_seconds", collector="snapshot") == 0.25


def test_it_registers_in_a_registry_of_its_own_without_being_asked_to_collect():
    def source() -> Snapshot:
        raise AssertionError("registering must not collect")
    collector = SnapshotCollector(source)
    registry = CollectorRegistry()
    registry.register(collector)
    assert collector.failure is None
    with pytest.raises(ValueError, match="Duplicated"):
        registry.register(SnapshotCollector(source))


def test_values_that_prometheus_must_not_see_are_not_there():
    for value in samples_of(fresh(snapshot_at(10.0))).values():
        assert not math.isnan(value)


@pytest.mark.prometheus
def test_promtool_finds_nothing_to_say_about_the_exposition():
    result = promtool("check", "metrics", stdin=render(fresh(snapshot_at(10.0)))[1])
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")
