"""The quick hosts of the lab, a test for each check; and that the lab leaves nothing running."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .__main__ import LOOK_S, boot
from .emulator import Emulator, Outcome, Report
from .hosts import CHECKS, HOSTS
from .image import build
from .inside.checks import SUITE, WITHOUT_HARDWARE
from .parts import ROOT, Missing, Parts, emulators_missing
from .report import table

QUICK = [host for host in HOSTS.values() if host.quick]


@pytest.fixture(scope="module")
def reports() -> dict[str, Report]:
    try:
        return {report.host.name: report for report in boot(QUICK)}
    except Missing as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="module")
def parts() -> Parts:
    reason = emulators_missing(["qemu"])
    if reason:
        pytest.skip(reason)
    try:
        return Parts()
    except Missing as missing:
        pytest.skip(str(missing))


@pytest.mark.lab
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("host", [host.name for host in QUICK])
def test_the_program_is_right_on_a_host_with(reports: dict[str, Report], host: str, check: str):
    report = reports[host]
    assert check in report.outcomes, report.trouble
    assert report.outcomes[check].ok is not False, report.outcomes[check].words


@pytest.mark.lab
def test_a_host_that_does_not_end_is_ended_at_its_deadline_and_says_how_far_it_came(parts: Parts):
    host = dataclasses.replace(HOSTS["none"], deadline_s=1)
    with Emulator(host, build(parts), parts) as emulator:
        while (report := emulator.poll()) is None:
            time.sleep(LOOK_S)
        assert report.trouble.startswith("it was not done after 1 s; last seen: it had not begun")
        assert not report.good
        assert "not run" in table([report])
        assert report.trouble in table([report])
    assert not emulator.folder.exists()


@pytest.mark.lab
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_emulator_outlives_the_lab(parts: Parts, number: signal.Signals):
    build(parts)
    with subprocess.Popen([sys.executable, "-m", "tests.lab", "none"], cwd=Path(__file__).resolve().parents[2],
                          stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as lab:
        try:
            emulators = _until(lambda: _children(lab.pid, "qemu"), "an emulator")
            lab.send_signal(number)
            lab.wait(30)
            _until(lambda: not any(_alive(pid) for pid in emulators), "the end of the emulator")
        finally:
            lab.kill()


def test_what_the_lab_does_not_import_has_no_test_that_needs_kvm():
    """Else such a test would be missing inside without a word."""
    modules = [f"{SUITE}/{name}.py" for name in WITHOUT_HARDWARE]
    collected = subprocess.run([sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider",
                                "-m", "kvm", *modules], cwd=ROOT, capture_output=True, text=True, timeout=120,
                               check=False)
    assert collected.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, collected.stdout + collected.stderr


def test_a_check_that_was_not_asked_for_is_not_missed():
    report = Report(HOSTS["amd-v"], ("modes",), {"modes": Outcome(True, "")})
    assert report.good
    assert table([report]).splitlines()[-1].split()[:6] == ["amd-v", "-", "ok", "-", "-", "-"]


def test_what_failed_is_told_in_its_own_words():
    report = Report(HOSTS["amd-v"], outcomes={name: Outcome(True, "") for name in CHECKS})
    assert report.good
    report.outcomes["modes"] = Outcome(False, "one\ntwo")
    assert not report.good
    assert table([report]).splitlines()[-3:] == ["  modes:", "    one", "    two"]
    del report.outcomes["modes"]
    assert not report.good


def _children(parent: int, begins: str) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (folder / "stat").read_text()
            name, rest = fields[fields.index("(") + 1:fields.rindex(")")], fields[fields.rindex(")") + 2:].split()
            if int(rest[1]) == parent and name.startswith(begins):
                found.append(int(folder.name))
    return found


def _alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def _until(condition, what: str):
    until = time.monotonic() + 120
    while time.monotonic() < until:
        if value := condition():
            return value
        time.sleep(0.05)
    pytest.fail(f"{what} did not come within 120 s")
