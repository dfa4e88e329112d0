"""The alerting rules: promtool takes them, each fires for what it is for and for nothing that is as it should be."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mixvisor.metrics import dashboards
from mixvisor.metrics.families import FAMILIES, SELF_FAMILIES

from .dashboard import metric_names
from .prom import promtool

RULES = Path(dashboards.__file__).with_name("alerts.yml")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "alerts.md"
TEXT = RULES.read_text(encoding="utf-8")
EXPRESSIONS = dict(re.findall(r"- alert: (\w+)\n +expr: >-\n +(.+)\n", TEXT))
AT = '{job="mixvisor",instance="a",'
UP = 'up{job="mixvisor",instance="a"}'

# What makes each fire by four hours, and the same as it should be: series in promtool's notation, a sample a minute.
FIRES: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "MixvisorDown": ({UP: "0x240"}, {UP: "1x240"}),
    "MixvisorNotReady": ({f"mixvisor_service_ready{AT}}}": "0x240"}, {f"mixvisor_service_ready{AT}}}": "1x240"}),
    "MixvisorCollectorFailing": ({f"mixvisor_collector_success{AT}}}": "0x240"},
                                 {f"mixvisor_collector_success{AT}}}": "1x240"}),
    "MixvisorModesMix": (
        {f'mixvisor_warnings_active{AT}code="mixed-modes-cpu",severity="warning"}}': "1x240"},
        {f'mixvisor_warnings_active{AT}code="mixed-modes",severity="info"}}': "0x240"}),
    "MixvisorMixingPenaltyHigh": (
        {f'mixvisor_mixing_penalty_lower_bound_ratio{AT}victim_mode="software",scope="cpu"}}': "0.06x240"},
        {f'mixvisor_mixing_penalty_lower_bound_ratio{AT}victim_mode="software",scope="cpu"}}': "0.04x240"}),
    "MixvisorPenaltyStale": (
        {f"mixvisor_mixing_penalty_last_measurement_timestamp_seconds{AT}}}": "-90000x240",
         f'mixvisor_mixing_overlap_seconds_total{AT}scope="cpu"}}': "0+60x240"},
        {f"mixvisor_mixing_penalty_last_measurement_timestamp_seconds{AT}}}": "-90000x240",
         f'mixvisor_mixing_overlap_seconds_total{AT}scope="cpu"}}': "7x240"}),
    "MixvisorPenaltyInconclusive": (
        {f'mixvisor_mixing_measurement_info{AT}source="online",verdict="inconclusive"}}': "1x240",
         f'mixvisor_mixing_overlap_seconds_total{AT}scope="cpu"}}': "0+60x240"},
        {f'mixvisor_mixing_measurement_info{AT}source="online",verdict="none"}}': "1x240",
         f'mixvisor_mixing_overlap_seconds_total{AT}scope="cpu"}}': "0+60x240"}),
    "MixvisorModeSwitchStorm": (
        {f'mixvisor_host_cpu_mode_switches_total{AT}cpu="1",from_mode="{mode}",to_mode="x"}}': "0+33000x240"
         for mode in ("software", "hardware")},
        {f'mixvisor_host_cpu_mode_switches_total{AT}cpu="1",from_mode="software",to_mode="x"}}': "0+33000x240"}),
    "MixvisorCompetingHypervisor": (
        {f'mixvisor_warnings_active{AT}code="virtualbox-vms",severity="critical"}}': "1x240"},
        {f'mixvisor_warnings_active{AT}code="kvm-shared",severity="info"}}': "1x240"}),
    "MixvisorVMBehind": (
        {f'mixvisor_vm_vcpu_run_seconds_total{AT}vm="v",vcpu="0"}}': "0+15x240",
         f'mixvisor_vm_vcpu_runqueue_wait_seconds_total{AT}vm="v",vcpu="0"}}': "0+45x240",
         f'mixvisor_vm_entitled_cpu_seconds_total{AT}vm="v"}}': "0+30x240"},
        {f'mixvisor_vm_vcpu_run_seconds_total{AT}vm="v",vcpu="0"}}': "0+15x240",
         f'mixvisor_vm_vcpu_runqueue_wait_seconds_total{AT}vm="v",vcpu="0"}}': "0+1x240",
         f'mixvisor_vm_entitled_cpu_seconds_total{AT}vm="v"}}': "0+30x240"}),
    "MixvisorVMStarved": ({f'mixvisor_scheduler_lag_seconds{AT}vm="v"}}': "3x240"},
                          {f'mixvisor_scheduler_lag_seconds{AT}vm="v"}}': "1x240"}),
    "MixvisorSchedulerSlow": (
        {f'mixvisor_scheduler_decision_duration_seconds_bucket{AT}policy="fair",le="{le}"}}': step
         for le, step in (("0.001", "0+90x240"), ("0.01", "0+100x240"), ("+Inf", "0+100x240"))},
        {f'mixvisor_scheduler_decision_duration_seconds_bucket{AT}policy="fair",le="{le}"}}': step
         for le, step in (("0.0001", "0+999x240"), ("0.01", "0+1000x240"), ("+Inf", "0+1000x240"))}),
    "MixvisorSchedulerStalled": ({f'mixvisor_scheduler_frozen_seconds_total{AT}cpu="1"}}': "0+3x240"},
                                 {f'mixvisor_scheduler_frozen_seconds_total{AT}cpu="1"}}': "0+1x240"}),
    "MixvisorGuardFired": ({f'mixvisor_scheduler_guard_state{AT}state="fired"}}': "1x240"},
                           {f'mixvisor_scheduler_guard_state{AT}state="watching"}}': "1x240"}),
    "MixvisorSchedulerErrors": ({f'mixvisor_scheduler_errors_total{AT}stage="dispatch"}}': "0x235 1x5"},
                                {f'mixvisor_scheduler_errors_total{AT}stage="dispatch"}}': "1x240"}),
    "MixvisorExitStorm": (
        {f'mixvisor_vm_exits_total{AT}vm="v",reason="{reason}"}}': "0+7000000x240" for reason in ("io-out", "io-in")},
        {f'mixvisor_vm_exits_total{AT}vm="v",reason="io-out"}}': "0+7000000x240"}),
    "MixvisorVMCrashLooping": ({f'mixvisor_vm_restarts_total{AT}vm="v"}}': "0+1x240"},
                               {f'mixvisor_vm_restarts_total{AT}vm="v"}}': "0x235 1x5"}),
    "MixvisorVMCrashed": ({f'mixvisor_vm_state{AT}vm="v",state="crashed"}}': "1x240"},
                          {f'mixvisor_vm_state{AT}vm="v",state="stopped"}}': "1x240"}),
    "MixvisorDiskErrors": ({f'mixvisor_vm_block_errors_total{AT}vm="v",device="hda"}}': "0x235 1x5"},
                           {f'mixvisor_vm_block_errors_total{AT}vm="v",device="hda"}}': "1x240"}),
    "MixvisorSoftwareFallback": ({f'mixvisor_vm_info{AT}vm="v",mode="software",mode_rule="fallback"}}': "1x240"},
                                 {f'mixvisor_vm_info{AT}vm="v",mode="software",mode_rule="os"}}': "1x240"}),
}


def test_every_alert_is_tried_explained_and_asks_for_what_there_is():
    assert set(EXPRESSIONS) == set(FIRES)
    assert TEXT.count("- alert:") == len(FIRES)
    sections = re.findall(r"^## (\w+)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert sections == list(EXPRESSIONS)
    assert re.findall(r"runbook_url: docs/alerts\.md#(\w+)", TEXT) == [name.lower() for name in sections]
    exported = {family.name for family in (*FAMILIES, *SELF_FAMILIES)}
    for name, expression in EXPRESSIONS.items():
        assert {metric.removesuffix("_bucket") for metric in metric_names(expression)} <= exported, name


def test_every_page_that_an_alert_sends_to_has_the_section():
    for page, section in re.findall(r"\]\((\w+\.md)#([\w-]+)\)", PAGE.read_text(encoding="utf-8")):
        assert f"\n## {section}\n" in (PAGE.parent / page).read_text(encoding="utf-8"), (page, section)


@pytest.mark.prometheus
def test_promtool_accepts_the_rules():
    result = promtool("check", "rules", str(RULES))
    assert result.returncode == 0, (result.stdout + result.stderr).decode()


@pytest.mark.prometheus
@pytest.mark.parametrize("fires", [True, False])
def test_each_fires_for_what_it_is_for_and_not_for_less(tmp_path: Path, fires: bool):
    tests = [
        {"interval": "1m", "input_series": [{"series": name.replace(",}", "}"), "values": values}
                                            for name, values in series[0 if fires else 1].items()],
         "promql_expr_test": [{"expr": f'count(ALERTS{{alertname="{alert}",alertstate="firing"}}) or vector(0)',
                               "eval_time": "4h", "exp_samples": [{"labels": "{}", "value": int(fires)}]}]}
        for alert, series in FIRES.items()]
    file = tmp_path / "tests.yml"
    file.write_text(json.dumps({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": tests}))
    result = promtool("test", "rules", str(file))
    assert result.returncode == 0, (result.stdout + result.stderr).decode()[:4000]
