"""How the cost of mixing is shown: figures with their intervals, and words where there are none."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rich.console import Console

from mixvisor.cli.costs import mixing_line, mixing_view
from mixvisor.metrics.snapshot import MixingSnapshot

from ..metrics.snapshots import a_mixing, a_result, a_vm, snapshot_at


def shown(mixing):
    console = Console(width=110, no_color=True, force_terminal=False)
    with console.capture() as capture:
        console.print(mixing_view(snapshot_at(100.0, mixing=mixing), width=110))
    return capture.get()


def test_a_penalty_is_shown_with_its_intervals_its_null_and_what_to_do():
    text = shown(a_mixing(100.0))
    assert text.startswith("A crossing between modes costs 16.0 µs")
    for part in ("20.0 µs [19.0, 21.0]", "12.0 µs [11.0, 13.0]", "both, mean", "must include zero", "0.200 %",
                 "60 s, 10000 slices of 5 ms", "A caveat.", "100 s on one host CPU", "alpha 0.100 s",
                 "16.0 µs a crossing, as measured", "What to do: Use one mode."):
        assert part in text, part


def test_a_doubt_is_shown_beside_the_figure():
    mixing = replace(a_mixing(1.0), told=a_result(verdict="inconclusive", doubts=("the null is broken",)))
    text = shown(mixing)
    assert "Doubt: the null is broken." in text
    assert "What to do" not in text


@pytest.mark.parametrize(("mixing", "says"), [
    (MixingSnapshot(), "random_order = 0"), (MixingSnapshot(online=True), "the first look comes"),
])
def test_where_nothing_is_known_the_reason_stands_there(mixing, says):
    assert says in shown(mixing)


def test_both_measurements_are_shown_where_there_are_two():
    mixing = replace(a_mixing(1.0), told=a_result(source="on-demand", cpu=1),
                     latest=a_result(headline="Inconclusive so far."))
    text = shown(mixing)
    assert "by mixvisor measure" in text
    assert "host CPU 1" in text
    assert "Online, by now: Inconclusive so far." in text


def test_the_line_of_top_is_there_only_while_modes_mix():
    assert mixing_line(snapshot_at(1.0)) == (
        "cost of mixing: A crossing between modes costs 16.0 µs (15.0 µs to 17.0 µs) · "
        "lost 0.120 % of software, 0.200 % of hardware")
    assert mixing_line(snapshot_at(1.0, vms=(a_vm("alpha", 1.0),))) == ""
    assert mixing_line(snapshot_at(1.0, mixing=MixingSnapshot(online=True))) == "cost of mixing: not measured yet"
