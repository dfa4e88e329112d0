"""`measure` as a person types it: what it refuses, and what it shows of slices that were kept."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
from dataclasses import replace

import numpy as np
import pytest

from mixvisor.cli.measure import Percent, Slices
from mixvisor.metrics.mixing.design import rounds
from mixvisor.metrics.mixing.slices import read, write

from ..metrics.mixing.synthetic import record
from .test_commands import REAL, path, run, service  # noqa: F401 - fixtures


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Slices with a planted cost of 20 µs."""
    plan = itertools.islice(rounds((500_000, 1_000_000), 1_000_000, np.random.default_rng(1)), 8)
    recording = record(1, [block for one in plan for block in one], cross_us=20.0)
    file = tmp_path_factory.mktemp("kept") / "kept.csv.gz"
    write(replace(recording, about={
        "reference_slice_ns": 1_000_000, "dispatch": "precise", "cpu": 1, "cpu_model": "Made up", "technology": "vt-x",
        "kernel": "6.1", "guests": "4 guests, randmem 64K", "seconds": 20.0, "measured_unix_s": 1.7e9}), file)
    return file


def test_kept_slices_are_told_in_words_and_in_figures(run, kept):  # noqa: F811
    shown = run("measure", "--from", str(kept))
    assert shown.exit_code == 0, shown.stderr
    for words in ("has a small price here", "paid by hardware VMs", "Null: A/A", "0.5 ms", "Made up, vt-x, Linux 6.1",
                  str(kept)):
        assert words in shown.stdout, words
    assert shown.stderr == ""


def test_kept_slices_are_analysed_for_programs_too_and_a_plot_is_drawn_where_asked(run, kept, tmp_path):  # noqa: F811
    result = run("measure", "--from", str(kept), "-o", "json", "--out", str(tmp_path / "again"))
    data = json.loads(result.stdout)
    assert data["verdict"]["kind"] == "penalty"
    assert data["cost_us"]["low"] < 20 < data["cost_us"]["high"]
    assert data["files"] == {"data": str(kept), "plot": str(tmp_path / "again.svg"), "result": None}
    assert (tmp_path / "again.svg").read_text().startswith("<svg")


@pytest.mark.parametrize(("arguments", "code", "says"), [
    (("--vms", "sw-one,sw-two,hw-two"), 2, "four VMs, two of each mode; found 3"),
    (("--vms", "sw-one,sw-two,hw-two,nobody"), 3, "there is no VM nobody; there are: sw-one"),
    (("--vms", "sw-one,sw-two,hw-two,dos"), 4, "dos do not run"),
    (("--vms", "sw-one,sw-two,hw-two,hw-four", "--guest", "alu"), 2, "--guest are about built-in guests"),
    (("--vms", "sw-one,sw-two,hw-two,hw-four"), 6, "may not be measured"),
    (("--from", "nowhere.csv.gz"), 1, "nowhere.csv.gz: cannot be read"),
    (("--from", "x", "--seconds", "9"), 2, "--seconds say nothing beside it"),
    (("--precision", "0"), 2, "not a percentage"),
    (("--precision", "20%"), 2, "up to 10"),
    (("--slices", "0.1"), 2, "from 0.25 to 20 ms"),
    (("--slices", "fast"), 2, "from 0.25 to 20 ms"),
    (("--working-set", "100K", "--placebo", "software"), 2, "a power of two"),
    (("--seconds", "1"), 2, "--seconds"),
    (("--out", "/nowhere/x"), 2, "nothing can be written in /nowhere"),
    (("--cpu", "4000"), 2, "host CPU 4000 cannot be used"),
])
def test_a_mistake_is_one_sentence_and_an_exit_code(run, service, arguments, code, says):  # noqa: F811
    result = run("measure", *arguments)
    assert result.exit_code == code
    assert says in result.stderr
    assert result.stdout == ""


def test_without_a_service_there_are_no_vms_of_it(run):  # noqa: F811
    result = run("measure", "--vms", "a,b,c,d")
    assert result.exit_code == 5


def test_a_host_cpu_that_a_service_uses_is_not_measured_beside_it(run, service):  # noqa: F811
    result = run("measure", "--cpu", "1", "--placebo", "software")
    assert result.exit_code == 4
    assert "A Mixvisor service runs sw-one" in result.stderr.replace("a Mixvisor", "A Mixvisor")


def test_per_cents_and_slice_lengths_are_read_as_people_write_them():
    assert Percent().convert("0.2%", None, None) == Percent().convert(" .2 % ", None, None) == pytest.approx(0.002)
    assert Slices().convert("2,0.5,2", None, None) == (500_000, 2_000_000)


@pytest.mark.rt
def test_four_software_vms_called_two_modes_cost_nothing_on_the_real_machine(tmp_path):
    """The null, end to end: interrupted as a person would, and zero is in the interval (at 99.99 %)."""
    command = [*REAL, "measure", "--placebo", "software", "--cpu", "1", "--guest", "alu", "--slices", "0.5",
               "--out", str(tmp_path / "null"), "-o", "json"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path), "MIXVISOR_SOCKET": str(tmp_path / "none")})
    try:
        assert process.stderr is not None
        seen = [process.stderr.readline()]
        assert seen[0].startswith("3 s,"), seen
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert "Interrupted after" in err
    data = json.loads(out)
    assert data["about"]["placebo"] == "software"
    assert data["about"]["dispatch"] == "precise"
    order = data["random_order"]
    assert order["slices"] > 300
    for name in ("cost_us", "null_us"):
        middle, half = order[name]["value"], (order[name]["high"] - order[name]["low"]) / 2
        assert abs(middle) <= 2.2 * half, (name, order[name])
    assert not (tmp_path / "mixvisor" / "mixing.json").exists()
    assert len(read(tmp_path / "null.csv.gz").slices) > 1000
