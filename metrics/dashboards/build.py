"""The Grafana dashboard "Mixvisor", written in Python; `mixvisor.json` beside it is what it makes.

    python -m mixvisor.metrics.dashboards.build            # rewrite mixvisor.json
    python -m mixvisor.metrics.dashboards.build --check    # exit 1 when it is out of date

Needs grafana-foundation-sdk (development only, pinned in pyproject.toml to the schema of Grafana
11.6); the JSON is committed, so nobody needs it to import the dashboard.

House rules, held by tests/metrics/test_dashboard.py: every expression selects by `$job` and
`$instance`, takes rates over `$__rate_interval`, uses only metrics that are exported, and has
data when a real Prometheus is asked. Every panel has a description and a unit. No repeated
panels, and `topk` where a line per VM is drawn: a host may have hundreds of VMs. Data source,
job and instance are variables, nothing is hard-coded.

Where it is poor.  Nobody has seen it rendered on the machine where it was made (no Grafana is to
be had there): expressions and structure are tested, looks are not.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, TypeVar

from grafana_foundation_sdk.builders import (
    common,
    dashboard,
    heatmap,
    prometheus,
    stat,
    statetimeline,
    table,
    timeseries,
)
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as common_model
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from ..snapshot import STATES

__all__ = ["JSON_PATH", "built_json"]

JSON_PATH: Final = Path(__file__).with_name("mixvisor.json")
DATASOURCE: Final = model.DataSourceRef(type_val="prometheus", uid="${datasource}")
LINES: Final = 20              # at most so many VMs in one graph

# Widths and heights in Grafana's grid of 24 columns.
FULL, HALF, SIXTH = 24, 12, 4
TALL, MEDIUM, FLAT = 10, 8, 4

GREEN, YELLOW, RED, BLUE, PURPLE, GREY = "green", "yellow", "red", "blue", "purple", "#808080"
STATE_COLOURS: Final = {"defined": GREY, "starting": YELLOW, "running": GREEN, "paused": BLUE,
                        "stopping": YELLOW, "stopped": GREY, "crashed": RED, "failed": RED}
MODE_CODES: Final = {"software": 1, "hardware": 2}
CPUS: Final = "suffix: CPU"    # a Grafana unit: the number, then this word

Query = tuple[str, str]        # expression, legend
Panel = (timeseries.Panel | stat.Panel | statetimeline.Panel | table.Panel | heatmap.Panel)
P = TypeVar("P", timeseries.Panel, stat.Panel, statetimeline.Panel, table.Panel, heatmap.Panel)


# --- expressions -----------------------------------------------------------------------------

def series(name: str, *matchers: str) -> str:
    """One family on the chosen services."""
    return "mixvisor_" + name + "{" + ",".join(
        ('job=~"$job"', 'instance=~"$instance"', *matchers)) + "}"


def of_vms(name: str, *matchers: str) -> str:
    """One family of the chosen VMs."""
    return series(name, 'vm=~"$vm"', *matchers)


def rate(selected: str) -> str:
    return f"rate({selected}[$__rate_interval])"


def by(labels: str, expression: str, function: str = "sum") -> str:
    return f"{function} by ({labels}) ({expression})"


def by_vm(expression: str) -> str:
    return by("instance, vm", expression)


def top(expression: str) -> str:
    return f"topk({LINES}, {expression})"


def quantile(q: float, name: str, labels: str = "") -> str:
    buckets = by(f"{labels}, le" if labels else "le", rate(series(name + "_bucket")))
    return f"histogram_quantile({q}, {buckets})"


RECEIVED: Final = by_vm(rate(of_vms("vm_vcpu_run_seconds_total")))
ENTITLED: Final = by_vm(rate(of_vms("vm_entitled_cpu_seconds_total")))
WAITED: Final = by_vm(rate(of_vms("vm_vcpu_runqueue_wait_seconds_total")))
# The state as its number in STATES: the state set has one series a state, a timeline wants one.
STATE_CODE: Final = by_vm(" or ".join(
    of_vms("vm_state", 'state="' + state + '"') + f" * {code}"
    for code, state in enumerate(STATES)))
MODE_CODE: Final = by("instance, vm", " or ".join(
    of_vms("vm_info", 'mode="' + mode + '"') + f" * {code}"
    for mode, code in MODE_CODES.items()), "max")
RUNNING_BY_MODE: Final = by(
    "mode", of_vms("vm_state", 'state="running"')
    + " * on (job, instance, vm) group_left (mode) " + of_vms("vm_info"))


# --- panels ----------------------------------------------------------------------------------

def dressed(panel: P, title: str, description: str, unit: str, width: int, height: int) -> P:
    return (panel.title(title).description(description).unit(unit).datasource(DATASOURCE)
            .span(width).height(height))


def asked(panel: P, queries: Sequence[Query], *, instant: bool = False,
          form: PromQueryFormat = PromQueryFormat.TIME_SERIES) -> P:
    for index, (expression, legend) in enumerate(queries):
        query = (prometheus.Dataquery().datasource(DATASOURCE).ref_id(chr(ord("A") + index))
                 .expr(expression).legend_format(legend).format(form))
        panel = panel.with_target(query.instant() if instant else query.range())
    return panel


def graph(title: str, description: str, unit: str, *queries: Query, width: int = HALF,
          stacked: bool = False, at_least: float | None = 0) -> timeseries.Panel:
    legend = (common.VizLegendOptions().display_mode(common_model.LegendDisplayMode.TABLE)
              .placement(common_model.LegendPlacement.BOTTOM).show_legend(True)
              .calcs(["mean", "max", "lastNotNull"]))
    tooltip = (common.VizTooltipOptions().mode(common_model.TooltipDisplayMode.MULTI)
               .sort(common_model.SortOrder.DESCENDING))
    panel = (timeseries.Panel().line_width(1).fill_opacity(50 if stacked else 8)
             .show_points(common_model.VisibilityMode.NEVER).legend(legend).tooltip(tooltip))
    if stacked:
        panel = panel.stacking(common.StackingConfig().mode(common_model.StackingMode.NORMAL))
    if at_least is not None:
        panel = panel.min(at_least)
    return asked(dressed(panel, title, description, unit, width, MEDIUM), queries)


def number(title: str, description: str, unit: str, *queries: Query, width: int = SIXTH,
           red_above: float | None = None, red_below: float | None = None,
           by_name: bool = False) -> stat.Panel:
    """One big value a query; `by_name` shows the legend instead of the number (for infos)."""
    if red_above is not None:
        steps = [model.Threshold(color=GREEN, value=None), model.Threshold(color=RED,
                                                                         value=red_above)]
    elif red_below is not None:
        steps = [model.Threshold(color=RED, value=None), model.Threshold(color=GREEN,
                                                                       value=red_below)]
    else:
        steps = [model.Threshold(color=BLUE, value=None)]
    panel = (stat.Panel().graph_mode(common_model.BigValueGraphMode.NONE)
             .text_mode(common_model.BigValueTextMode.NAME if by_name
                        else common_model.BigValueTextMode.AUTO)
             .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
             .thresholds(dashboard.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE)
                         .steps(steps)))
    return asked(dressed(panel, title, description, unit, width, FLAT), queries, instant=True)


def named(codes: Mapping[int, tuple[str, str]]) -> list[model.ValueMapping]:
    """Numbers shown as words in colours."""
    return [model.ValueMap(options={
        str(code): model.ValueMappingResult(text=word, color=colour, index=code)
        for code, (word, colour) in codes.items()})]


STATE_WORDS: Final = named(
    {code: (state, STATE_COLOURS[state]) for code, state in enumerate(STATES)})
MODE_WORDS: Final = named({1: ("software", BLUE), 2: ("hardware", PURPLE)})


def timeline(title: str, description: str, words: list[model.ValueMapping],
             *queries: Query) -> statetimeline.Panel:
    panel = (statetimeline.Panel().mappings(words).merge_values(True).row_height(0.9)
             .show_value(common_model.VisibilityMode.AUTO)
             .legend(common.VizLegendOptions().show_legend(True)
                     .display_mode(common_model.LegendDisplayMode.LIST)
                     .placement(common_model.LegendPlacement.BOTTOM).calcs([])))
    return asked(dressed(panel, title, description, "none", HALF, MEDIUM), queries)


def vm_table() -> table.Panel:
    columns = {
        "State": (STATE_CODE, "none"), "Weight": (by_vm(of_vms("vm_weight")), "none"),
        "Entitled": (by_vm(of_vms("vm_entitled_cpus")), CPUS), "Received": (RECEIVED, CPUS),
        "Work/s": (by_vm(rate(of_vms("vm_progress_total"))), "short"),
        "Exits/s": (by_vm(rate(of_vms("vm_exits_total"))), "short"),
        "Restarts": (by_vm(of_vms("vm_restarts_total")), "none"),
    }
    info = by("instance, vm, name, engine, mode, mode_reason, os", of_vms("vm_info"), "max")
    queries = [(info, ""), *((expression, "") for expression, _ in columns.values())]
    letters = [chr(ord("B") + index) for index in range(len(columns))]
    names = {"vm": "VM", "name": "Name", "engine": "Engine", "mode": "Mode", "os": "System",
             "mode_reason": "Why this mode", "instance": "Service"}
    order = ["vm", "name", "mode", "engine", "os", *(f"Value #{x}" for x in letters),
             "mode_reason", "instance"]
    panel = (table.Panel()
             .with_transformation(model.DataTransformerConfig(id_val="merge", options={}))
             .with_transformation(model.DataTransformerConfig(id_val="organize", options={
                 "excludeByName": {"Time": True, "Value #A": True},
                 "indexByName": {name: index for index, name in enumerate(order)},
                 "renameByName": names | {f"Value #{letter}": title
                                          for letter, title in zip(letters, columns, strict=True)},
             }))
             .override_by_name("State", [
                 model.DynamicConfigValue(id_val="mappings", value=STATE_WORDS),
                 model.DynamicConfigValue(id_val="custom.cellOptions",
                                          value={"type": "color-text"})]))
    for title, (_, unit) in columns.items():
        if unit != "none":
            panel = panel.override_by_name(title, [
                model.DynamicConfigValue(id_val="unit", value=unit),
                model.DynamicConfigValue(id_val="decimals", value=2)])
    return asked(
        dressed(panel, "VMs", "Every VM: its mode and why it runs in it, its state, what it is "
                "entitled to and what it receives in host CPUs, the units of work its guest "
                "counts and its exits per second.", "none", FULL, TALL),
        queries, instant=True, form=PromQueryFormat.TABLE)


def lateness_map() -> heatmap.Panel:
    panel = (heatmap.Panel().calculate(False).hide_legend()
             .color(heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME)
                    .scheme("Oranges").steps(32))
             .y_axis(heatmap.YAxisConfig().unit("s")))
    return asked(
        dressed(panel, "Lateness of dispatchers", "Wake-ups per second by how late they were: a "
                "band that climbs means that something holds the host CPUs.", "s", HALF, MEDIUM),
        [(by("le", rate(series("scheduler_wakeup_delay_seconds_bucket"))), "{{le}}")],
        form=PromQueryFormat.HEATMAP)


# --- rows ------------------------------------------------------------------------------------

def rows() -> dict[str, list[Panel]]:
    """The dashboard's rows with their panels, from top to bottom."""
    return {
        "Overview": overview(), "VMs and shares": shares(), "Modes": modes(), "Mixing": mixing(),
        "Scheduler": scheduler(), "Exits and devices": exits(), "Warnings and health": health(),
    }


def overview() -> list[Panel]:
    return [
        number("Running VMs", "VMs in the state running, by mode.", "none",
               (RUNNING_BY_MODE, "{{mode}}")),
        number("Crashed or failed", "VMs that ended with an error and are not running now.", "none",
               ("sum(" + of_vms("vm_state", 'state=~"crashed|failed"') + ")", "VMs"), red_above=1),
        number("Active warnings", "Warnings that hold now; the last row says which.", "none",
               (f"sum({series('warnings_active')})", "warnings"), red_above=1),
        number("Fairness", "Jain's index of received over entitled CPU time in the last window: 1 "
               "is perfectly fair. Empty while nothing competes.", "none",
               (f"min({series('scheduler_fairness_ratio')})", "fairness"), red_below=0.95),
        number("Dispatch", "How vCPU threads are dispatched: precise (real-time priorities), "
               "gentle (SCHED_OTHER and SCHED_IDLE), signal or plain.", "none",
               (by("policy, dispatch", series("scheduler_info"), "max"),
                "{{policy}}, {{dispatch}}"),
               by_name=True),
        number("Host", "The host's hardware virtualization: vt-x, amd-v, pvm or none.", "none",
               (by("instance, technology", series("host_info"), "max"), "{{technology}}"),
               by_name=True),
        vm_table(),
    ]


def shares() -> list[Panel]:
    return [
        graph("Received CPU", "Host CPUs that each VM's vCPUs really ran on.", CPUS,
              (top(RECEIVED), "{{vm}}"), stacked=True),
        graph("Entitled CPU", "Host CPUs that each VM may have by weight, cap, reservation and "
              "what the others want.", CPUS, (top(ENTITLED), "{{vm}}"), stacked=True),
        graph("Received of entitled", "Received over entitled CPU time: 100 % is exactly fair; "
              "under it the VM was kept short, or did not want all of it.", "percentunit",
              (top(f"{RECEIVED} / ({ENTITLED} > 0)"), "{{vm}}")),
        graph("Lag", "Entitled less received CPU time. Above zero the VM is owed time; it should "
              "stay within a few slices of zero.", "s",
              (top(by_vm(of_vms("scheduler_lag_seconds"))), "{{vm}}"), at_least=None),
        graph("Steal", "Part of the time wanted that was spent waiting for a host CPU.",
              "percentunit", (top(f"{WAITED} / ({WAITED} + {RECEIVED} > 0)"), "{{vm}}")),
        graph("Held back by caps", "Part of the time that vCPUs could have run but the cap of their VM was used up.",
              "percentunit", (top(by_vm(rate(of_vms("vm_vcpu_capped_seconds_total")))), "{{vm}}")),
        graph("Asleep", "Part of the time that guests slept and wanted no CPU.", "percentunit",
              (top(by_vm(rate(of_vms("vm_vcpu_halted_seconds_total")))), "{{vm}}")),
        graph("Work per CPU second", "Units of work that the guest counts, for each second of CPU "
              "it received: falls when the same CPU time is worth less.", "short",
              (top(f"{by_vm(rate(of_vms('vm_progress_total')))} / ({RECEIVED} > 0)"), "{{vm}}")),
        graph("Resident memory", "Host memory that the VM's process holds.", "bytes",
              (top(by_vm(of_vms("vm_memory_resident_bytes"))), "{{vm}}"), width=FULL),
    ]


def modes() -> list[Panel]:
    return [
        timeline("State of each VM", "What each VM was when.", STATE_WORDS,
                 (top(STATE_CODE), "{{vm}}")),
        timeline("Mode of each VM", "Software or hardware virtualization.", MODE_WORDS,
                 (top(MODE_CODE), "{{vm}}")),
        graph("What host CPUs spend their time on", "Host CPUs by mode of the VM on them; idle and "
              "other (dispatchers, the rest of the system) fill up to the number of CPUs.", CPUS,
              (by("mode", rate(series("host_cpu_mode_residency_seconds_total"))), "{{mode}}"),
              stacked=True),
        graph("Mode of each host CPU", "Part of the time that each host CPU ran VMs of one mode.",
              "percentunit",
              (by("instance, cpu, mode", rate(series("host_cpu_mode_residency_seconds_total",
                                                     'mode=~"software|hardware"'))),
               "CPU {{cpu}}, {{mode}}")),
        graph("Mode switches", "How often a host CPU goes from a VM of one mode to a VM of the "
              "other: where mixing costs.", "ops",
              (by("from_mode, to_mode", rate(series("host_cpu_mode_switches_total"))),
               "{{from_mode}} to {{to_mode}}")),
        graph("Mode switches by host CPU", "All switches of mode on each host CPU, beside all "
              "switches between VMs.", "ops",
              (by("instance, cpu", rate(series("host_cpu_mode_switches_total"))),
               "CPU {{cpu}}, of mode"),
              (by("instance, cpu", rate(series("host_cpu_vm_switches_total"))),
               "CPU {{cpu}}, of VM")),
        graph("Run length", "How long a host CPU stays in one mode before it switches.", "s",
              (quantile(0.5, "host_cpu_mode_run_length_seconds", "from_mode"),
               "{{from_mode}}, median"),
              (quantile(0.9, "host_cpu_mode_run_length_seconds", "from_mode"),
               "{{from_mode}}, 90 %")),
        graph("Runnable vCPUs", "vCPUs that could run now, by mode: more than there are host CPUs "
              "means that they compete.", "short",
              (by("mode", series("scheduler_runnable_vcpus")), "{{mode}}"), stacked=True),
        graph("Changes of mode", "Running guests that were moved to the other mode.", "ops",
              (top(by("vm, to", rate(of_vms("vm_mode_changes_total")))), "{{vm}}, to {{to}}")),
        graph("Stood still for changes of mode", "Part of the time that guests stood still while they were moved.",
              "percentunit", (top(by_vm(rate(of_vms("vm_mode_change_stop_seconds_total")))), "{{vm}}")),
        graph("How long a change of mode stops a guest", "Of all VMs, by the mode they went to.", "s",
              (quantile(0.5, "mode_change_stop_seconds", "to"), "to {{to}}, 50 %"),
              (quantile(0.99, "mode_change_stop_seconds", "to"), "to {{to}}, 99 %")),
    ]


def mixing() -> list[Panel]:
    def bounded(name: str, unit: str, *matchers: str, labels: str) -> list[Query]:
        """A figure and its interval. `unit` is the end of the family's name."""
        of = {"": "", "_lower_bound": ", at least", "_upper_bound": ", at most"}
        return [(by(labels, series(f"mixing_{name}{bound}{unit}", *matchers), "max"),
                 "{{victim_mode}}" + words) for bound, words in of.items()]

    return [
        graph("Cost of a crossing", "What one change of a host CPU between modes costs beyond a change of VM within "
              "a mode, with its 95 % interval; the mean over both directions. Empty while it is unknown.", "s",
              *bounded("switch_cost", "_seconds", 'victim_mode="both"', labels="instance, victim_mode"),
              at_least=None),
        graph("Cost of a crossing by victim", "The same for VMs of each mode that are switched to. The work of "
              "leaving a VM is charged to its successor, so the two may shift against each other.", "s",
              (by("instance, victim_mode", series("mixing_switch_cost_seconds"), "max"), "{{victim_mode}}"),
              at_least=None),
        graph("Lost to crossings", "Part of a mode's CPU time that crossings cost it on host CPUs where the modes "
              "take turns, with its 95 % interval.", "percentunit",
              *bounded("penalty", "_ratio", labels="instance, victim_mode"), at_least=None),
        graph("Lost to crossings by VM", "CPU time that each VM loses to crossings: an estimate, counted while a "
              "penalty is established.", "percentunit",
              (top(by_vm(rate(of_vms("mixing_lost_seconds_total")))), "{{vm}}")),
        graph("Both modes at once", "Part of the time in which VMs of both modes run within the same second: on one "
              "host CPU, one core, one socket, anywhere on the host.", "percentunit",
              (by("instance, scope", rate(series("mixing_overlap_seconds_total"))), "{{scope}}")),
        graph("What the looks say", "Looks at the online estimate, by what can be concluded from it.", "ops",
              (by("result", rate(series("mixing_penalty_measurements_total"))), "{{result}}")),
        number("Verdict", "What can be concluded about the cost of mixing, and from which measurement.", "none",
               (by("source, verdict", series("mixing_measurement_info"), "max"), "{{verdict}}, {{source}}"),
               by_name=True),
        number("Last conclusion", "Time since something could last be concluded about the cost of mixing.", "s",
               (f"time() - max({series('mixing_penalty_last_measurement_timestamp_seconds')})", "ago")),
    ]


def scheduler() -> list[Panel]:
    cpu = rate(series("scheduler_dispatcher_cpu_seconds_total"))
    slices = rate(series("host_cpu_slices_total"))
    return [
        lateness_map(),
        graph("Lateness and overrun", "How late dispatchers wake, and how much longer than decided "
              "slices last.", "s",
              (quantile(0.5, "scheduler_wakeup_delay_seconds"), "late, median"),
              (quantile(0.99, "scheduler_wakeup_delay_seconds"), "late, 99 %"),
              (quantile(0.99, "scheduler_slice_overrun_seconds"), "overrun, 99 %")),
        graph("Decision time", "CPU time of one decision with its system calls.", "s",
              (quantile(0.5, "scheduler_decision_duration_seconds", "policy"),
               "{{policy}}, median"),
              (quantile(0.99, "scheduler_decision_duration_seconds", "policy"),
               "{{policy}}, 99 %")),
        graph("Dispatcher CPU per slice", "What one slice costs the host: CPU time of the "
              "dispatcher process over slices given out.", "s",
              (f"{by('instance, cpu', cpu)} / ({by('instance, cpu', slices)} > 0)", "CPU {{cpu}}")),
        graph("Slices", "Time slices given out on each host CPU.", "ops",
              (by("instance, cpu", slices), "CPU {{cpu}}")),
        graph("Frozen and leaked", "Frozen: part of the time that dispatchers were over 10 ms late "
              "(the kernel's throttling shows here). Leaked: part of the time that VMs ran which "
              "were not the dispatched ones.", "percentunit",
              (by("instance, cpu", rate(series("scheduler_frozen_seconds_total"))),
               "CPU {{cpu}}, frozen"),
              (f"sum({rate(series('scheduler_leak_seconds_total'))})", "leaked")),
        graph("Fairness", "Jain's index of received over entitled in the last window.", "none",
              (by("instance", series("scheduler_fairness_ratio"), "min"), "{{instance}}")),
        graph("Migrations", "vCPUs moved to another host CPU.", "ops",
              (top(by_vm(rate(of_vms("vm_vcpu_migrations_total")))), "{{vm}}")),
    ]


def exits() -> list[Panel]:
    return [
        graph("Exits by reason", "How often guests are left for the host, by reason.", "ops",
              (by("reason", rate(of_vms("vm_exits_total"))), "{{reason}}"), stacked=True),
        graph("Exits by VM", "How often each guest is left for the host.", "ops",
              (top(by_vm(rate(of_vms("vm_exits_total")))), "{{vm}}")),
        graph("Time in exits", "Host time spent on exits, for each second.", "percentunit",
              (top(by_vm(rate(of_vms("vm_exit_handling_seconds_total")))), "{{vm}}")),
        graph("BIOS calls", "BIOS services that guests ask for.", "ops",
              (top(by_vm(rate(of_vms("vm_bios_calls_total")))), "{{vm}}")),
        graph("Serial port", "Bytes that guests write to their serial ports, and bytes thrown away "
              "because they write faster than they may.", "Bps",
              (top(by_vm(rate(of_vms("vm_serial_bytes_total")))), "{{vm}}"),
              (top(by_vm(rate(of_vms("vm_serial_dropped_bytes_total")))),
               "{{vm}}, dropped")),
        graph("Interrupts", "Interrupts of devices that guests take, and timer ticks given up because a VM was too "
              "far behind.", "ops",
              (top(by_vm(rate(of_vms("vm_interrupts_total")))), "{{vm}}"),
              (top(by_vm(rate(of_vms("vm_timer_ticks_lost_total")))), "{{vm}}, lost")),
        graph("Disks", "Bytes that guests read from and write to their disks.", "Bps",
              (top(by("vm, device", rate(of_vms("vm_block_read_bytes_total")))), "{{vm}} {{device}}, read"),
              (top(by("vm, device", rate(of_vms("vm_block_write_bytes_total")))), "{{vm}} {{device}}, written")),
        graph("Disk errors", "Reads and writes that the host could not do.", "ops",
              (top(by("vm, device", rate(of_vms("vm_block_errors_total")))), "{{vm}} {{device}}")),
    ]


def health() -> list[Panel]:
    return [
        graph("Warnings", "Warnings that hold, by code; mixed-modes says that software and "
              "hardware VMs run together.", "none",
              (by("code, severity", series("warnings_active")), "{{code}} ({{severity}})")),
        graph("Restarts", "Starts of VMs after their first one.", "ops",
              (top(by_vm(rate(of_vms("vm_restarts_total")))), "{{vm}}")),
        graph("Errors of the service", "Scheduler errors, and slice records lost because the "
              "supervisor read too late, per second.", "ops",
              (f"sum({rate(series('scheduler_errors_total'))}) or vector(0)", "errors"),
              (f"sum({rate(series('scheduler_lost_records_total'))})", "lost records")),
        graph("Scrapes", "How long the picture of a scrape took to make, and how old it is: the "
              "age grows when the service is stuck.", "s",
              (by("instance", series("collector_duration_seconds"), "max"),
               "{{instance}}, made in"),
              ("time() - " + by("instance", series("snapshot_timestamp_seconds"), "max"),
               "{{instance}}, age")),
        number("Collector", "1 when scrapes show a fresh picture, 0 when they repeat an old one.",
               "none", (f"min({series('collector_success')})", "success"), red_below=1),
        number("Service ready", "1 when the service has started everything its file says.", "none",
               (f"min({series('service_ready')})", "ready"), red_below=1),
        number("Guard", "What the guard process does; it gives threads back when the supervisor "
               "dies.", "none",
               (by("instance, state", series("scheduler_guard_state") + " == 1", "max"),
                "{{state}}"), by_name=True),
        number("Version", "Version of the running service.", "none",
               (by("instance, version", series("build_info"), "max"), "{{version}}"),
               by_name=True),
        number("Time slice", "Length of a time slice as configured.", "s",
               (f"max({series('scheduler_slice_seconds')})", "slice")),
        number("Up for", "Time since the service started.", "s",
               (f"time() - max({series('service_start_time_seconds')})", "up")),
    ]


# --- the whole -------------------------------------------------------------------------------

def variable(name: str, label: str, query: str) -> dashboard.QueryVariable:
    return (dashboard.QueryVariable(name).label(label).datasource(DATASOURCE).query(query)
            .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(model.VariableSort.ALPHABETICAL_ASC).multi(True).include_all(True)
            .all_value(".*").current(model.VariableOption(text="All", value="$__all")))


def built_json() -> str:
    """The dashboard as JSON, ready to import; the same text for the same source."""
    board = (
        dashboard.Dashboard("Mixvisor").uid("mixvisor").tags(["mixvisor", "virtualization"])
        .description("Software and hardware VMs side by side: modes, shares of the host CPUs, "
                     "switches between modes, scheduler, exits and warnings.")
        .editable().tooltip(model.DashboardCursorSync.CROSSHAIR).timezone("browser")
        .time("now-15m", "now").refresh("10s")
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source")
                       .type("prometheus"))
        .with_variable(variable("job", "Job", "label_values(mixvisor_build_info, job)"))
        .with_variable(variable("instance", "Service",
                                'label_values(mixvisor_build_info{job=~"$job"}, instance)'))
        .with_variable(variable("vm", "VM", 'label_values(mixvisor_vm_info{job=~"$job",'
                                'instance=~"$instance"}, vm)'))
    )
    number_of_panel = 0
    for title, panels in rows().items():
        number_of_panel += 1
        board = board.with_row(dashboard.Row(title).id(number_of_panel))
        for panel in panels:
            number_of_panel += 1
            board = board.with_panel(panel.id(number_of_panel))
    return json.dumps(board.build(), cls=JSONEncoder, indent=2, sort_keys=True) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the Grafana dashboard.")
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 if it differs")
    options = parser.parse_args()
    text = built_json()
    if not options.check:
        JSON_PATH.write_text(text, encoding="utf-8")
        return 0
    if not JSON_PATH.exists() or JSON_PATH.read_text(encoding="utf-8") != text:
        print(f"{JSON_PATH} is out of date: run python -m mixvisor.metrics.dashboards.build",
              file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
