"""The tables as people see them: every figure is right, and nothing is cut that matters."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from mixvisor.cli.rates import cpu_rates, verdict, vm_rates
from mixvisor.cli.tables import closing_view, count, live_view, plain_line, ps_table, top_view

from ..fake_backend import FakeBackend, make_vm

SECOND = 1_000_000_000


@pytest.fixture
def pictures():
    """Two snapshots, ten seconds apart."""
    now = [0]
    backend = FakeBackend(now_ns=lambda: now[0])
    old = backend.snapshot()
    now[0] = 10 * SECOND
    return old, backend.snapshot()


def drawn(renderable, width):
    console = Console(width=width, force_terminal=False, color_system=None, highlight=False)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


LIVE_100 = """\
A title
precise dispatch · slices of 10 ms · 95 VM switches/s · 20 mode switches/s

VM       Mode      Why           Weight  Entitled  Received  Share of CPU      Progress/s  Exits/s
──────────────────────────────────────────────────────────────────────────────────────────────────
sw-one   software  explicit         100    12.5 %    12.5 %  ██│                   16.2 M       65
sw-two   software  avoid-mixing     100    12.5 %    12.5 %  ██│                   16.3 M       65
hw-two   hardware  explicit         200    25.0 %    25.0 %  ████│                  500 M       65
hw-four  hardware  64-bit           400    50.0 %    50.0 %  ████████│             1.00 G       65
dos      software  paused           100     0.0 %     0.0 %                             –        0

╭─ warning: mixed-modes ─────────────────────────────────────╮
│ Software and hardware VMs run together on this host (PVM). │
│ Give all VMs one mode where you can.                       │
╰────────────────────────────────────────────────────────────╯
a footer
"""

CLOSING_80 = """\
The whole run: 10.0 s, shares in percent of one host CPU

VM       Mode      Why           Weight  Entitled  Received    Error  Progress
──────────────────────────────────────────────────────────────────────────────
sw-one   software  explicit         100   12.50 %   12.45 %  -0.05 %     162 M
sw-two   software  avoid-mixing     100   12.50 %   12.55 %  +0.05 %     163 M
hw-two   hardware  explicit         200   25.00 %   24.98 %  -0.02 %    5.00 G
hw-four  hardware  64-bit           400   50.00 %   50.02 %  +0.02 %    10.0 G
dos      software  paused           100    0.00 %    0.00 %   0.00 %         –

sw-one, dos: software (explicit). The configuration asks for this mode.
sw-two: software (avoid-mixing). Either mode would do; this one avoids mixing.
hw-two: hardware (explicit). The configuration asks for this mode.
hw-four: hardware (64-bit). A 64-bit guest needs hardware virtualization.

╭─ warning: mixed-modes ─────────────────────────────────────╮
│ Software and hardware VMs run together on this host (PVM). │
│ Give all VMs one mode where you can.                       │
╰────────────────────────────────────────────────────────────╯
Verdict: Over 10.0 s every VM received its entitled share to within 0.05 % of
the CPU (weights 1:1:2:4).
"""


def _lines(text):
    return [line.rstrip() for line in text.splitlines()]


def test_the_live_table_looks_like_this_in_100_columns(pictures):
    old, new = pictures
    view = live_view(new, vm_rates(old, new), cpu_rates(old, new), width=100, title="A title",
                     footer="a footer")
    assert _lines(drawn(view, 100)) == _lines(LIVE_100)


def test_the_closing_table_looks_like_this_in_80_columns(pictures):
    # A whole run whose error is large enough to see.
    now = [0]
    backend = FakeBackend(now_ns=lambda: now[0], error=0.005)
    old = backend.snapshot()
    now[0] = 10 * SECOND
    new = backend.snapshot()
    rates = vm_rates(old, new)
    assert _lines(drawn(closing_view(new, rates, verdict(rates), width=80), 80)) == \
        _lines(CLOSING_80)


@pytest.mark.parametrize("width", [80, 100, 132])
def test_no_figure_is_ever_cut(pictures, width):
    old, new = pictures
    rates, cpus = vm_rates(old, new), cpu_rates(old, new)
    for view in (live_view(new, rates, cpus, width=width, title="t"),
                 closing_view(new, rates, verdict(rates), width=width),
                 top_view(new, rates, cpus, width=width),
                 ps_table(new.vms, width=width, now_unix_s=100.0)):
        text = drawn(view, width)
        assert "…" not in text
        assert max(map(len, text.splitlines())) <= width
        for vm in new.vms:
            assert vm.name in text


def test_a_long_name_is_shortened_and_the_figures_stay(pictures):
    old, new = pictures
    rates = [replace(rate, vm=replace(rate.vm, name="a-very-long-name-" * 3))
             for rate in vm_rates(old, new)]
    text = drawn(top_view(new, rates, cpu_rates(old, new), width=80), 80)
    assert "a-ve" in text
    assert "…" in text
    assert "50.0 %" in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_vm_that_is_not_well_says_so_in_every_table(pictures):
    old, new = pictures
    broken = replace(new.vms[0], state="crashed", state_reason="triple fault at `ud2`", pid=None)
    new = replace(new, vms=(broken, *new.vms[1:]))
    rates = vm_rates(old, new)
    assert "crashed" in drawn(top_view(new, rates, [], width=80), 80)
    listed = drawn(ps_table(new.vms, width=100, now_unix_s=1.0), 100)
    assert "sw-one: triple fault at `ud2`" in listed
    judged = verdict(rates)
    assert not judged.good
    assert judged.text.startswith("sw-one crashed (triple fault at `ud2`)")
    assert "sw-one crashed" in plain_line(rates, 1.0)


def test_a_narrow_ps_leaves_whole_columns_out_instead_of_cutting_them(pictures):
    _old, new = pictures
    narrow = drawn(ps_table(new.vms, width=60, now_unix_s=1.0), 60).splitlines()[0]
    assert narrow.split() == ["VM", "State", "Mode", "Why", "Weight", "Up"]
    assert "Memory" in drawn(ps_table(new.vms, width=80, now_unix_s=1.0), 80)


def test_names_of_people_are_not_taken_for_markup(pictures):
    _old, new = pictures
    odd = replace(new.vms[0], state_reason="port [red]0x3f8[/red] :boom:")
    assert "port [red]0x3f8[/red] :boom:" in drawn(ps_table((odd,), width=100), 100)


@pytest.mark.parametrize(("value", "text"), [
    (None, "–"), (0, "0"), (999, "999"), (1000, "1.00 k"), (12_345, "12.3 k"), (99_960, "100 k"),
    (999_400, "999 k"), (999_600, "1.00 M"), (1.3e9, "1.30 G"), (5e15, "5.00 P"),
])
def test_large_numbers_are_read_at_a_glance(value, text):
    assert count(value) == text


@given(st.floats(0, 9e17))
def test_a_number_never_takes_more_than_seven_characters(value):
    assert len(count(value)) <= 7


# What happened between two pictures.

def test_what_other_threads_of_a_vm_ran_is_in_its_run_time_already_and_not_added_again(pictures):
    old, new = pictures
    plain = vm_rates(old, new)[0]
    old = replace(old, vms=(replace(old.vms[0], emulator_ns=1 * SECOND),))
    new = replace(new, vms=(replace(new.vms[0], emulator_ns=2 * SECOND),))
    [rate] = vm_rates(old, new)
    assert rate.received == plain.received


def test_nobody_waits_more_than_always(pictures):
    """The kernel books a wait when it is over: two intervals' worth may come in one."""
    old, new = pictures
    [vcpu] = new.vms[0].vcpus
    new = replace(new, vms=(replace(new.vms[0], vcpus=(replace(vcpu, wait_ns=vcpu.wait_ns + 99 * SECOND),)),))
    [rate] = vm_rates(old, new)
    assert rate.wait == 1.0


def test_a_vm_that_was_not_there_before_has_no_rates(pictures):
    old, new = pictures
    old = replace(old, vms=old.vms[1:])
    rate = vm_rates(old, new)[0]
    assert (rate.entitled, rate.received, rate.error, rate.progress) == (None,) * 4
    assert "–" in drawn(top_view(new, [rate], [], width=80), 80)


def test_two_pictures_of_one_moment_have_no_rates(pictures):
    old, _new = pictures
    assert all(rate.received is None for rate in vm_rates(old, old))


def test_only_switches_between_the_two_modes_are_mode_switches(pictures):
    old, new = pictures
    more = dict(new.cpus[0].switches) | {("hardware", "hardware"): 999, ("idle", "software"): 999}
    new = replace(new, cpus=(replace(new.cpus[0], switches=more),))
    assert cpu_rates(old, new)[0].mode_switches == pytest.approx(20)


def _run(error, seconds=10.0, **more):
    zero = replace(FakeBackend().snapshot(), monotonic_ns=0, vms=tuple(
        make_vm(name, weight=weight) for name, weight in (("a", 100), ("b", 300))))
    vms = (make_vm("a", weight=100, share=0.25, seconds=seconds, error=error, **more),
           make_vm("b", weight=300, share=0.75, seconds=seconds, error=-0.9 * error))
    return verdict(vm_rates(zero, replace(zero, monotonic_ns=int(seconds * SECOND), vms=vms)))


@pytest.mark.parametrize(("error", "good", "says"), [
    (0.0, True, "to within 0.01 % of the CPU (weights 1:3)"),
    (0.02, True, "every VM received its entitled share to within 0.20 %"),
    (0.2, False, "a received 2.00 % of a CPU more than its entitled share"),
    (-0.2, False, "a received 2.00 % of a CPU less than its entitled share"),
])
def test_the_verdict_says_what_the_figures_say(error, good, says):
    judged = _run(error)
    assert judged.good is good
    assert says in judged.text


def test_a_short_run_is_not_judged():
    assert "too short to judge" in _run(0.2, seconds=1.0).text


def test_a_run_without_vms_is_not_praised():
    judged = verdict([])
    assert not judged.good
    assert "nothing to judge" in judged.text
