"""What every test may ask for, and the rule that CI accepts no skip it does not know."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

# In CI (MIXVISOR_NO_SKIPS=1) a test may be skipped only for one of these reasons.
ALLOWED_SKIPS: tuple[str, ...] = ()


def _kvm_reason() -> str | None:
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"/dev/kvm cannot be used: {error.strerror}"
    return None


def _rt_reason() -> str | None:
    if len(os.sched_getaffinity(0)) < 2:
        return "real-time tests need two CPUs, one is left to the rest of the system"
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except OSError as error:
        return f"real-time priorities are not permitted here: {error.strerror}"
    os.sched_setscheduler(0, policy, parameters)
    return None


def _prometheus_reason() -> str | None:
    missing = [name for name in ("prometheus", "promtool") if shutil.which(name) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


def _privileged_reason() -> str | None:
    return None if os.geteuid() == 0 else "needs root"


REASONS = {"kvm": _kvm_reason, "rt": _rt_reason, "prometheus": _prometheus_reason,
           "privileged": _privileged_reason}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    known: dict[str, str | None] = {}
    for item in items:
        for marker, reason in REASONS.items():
            if item.get_closest_marker(marker) is None:
                continue
            if marker not in known:
                known[marker] = reason()
            if known[marker]:
                item.add_marker(pytest.mark.skip(reason=known[marker]))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    outcome = yield
    report = outcome.get_result()
    if report.skipped and os.environ.get("MIXVISOR_NO_SKIPS") and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not any(allowed in reason for allowed in ALLOWED_SKIPS):
            report.outcome = "failed"
            report.longrepr = f"{item.nodeid}: a skip that should not be here: {reason}"


@pytest.fixture(scope="session")
def guests() -> Path:
    """The folder of real boot disks, beside the checkout or named by MIXVISOR_SHARED."""
    shared = os.environ.get("MIXVISOR_SHARED")
    base = Path(shared) if shared else Path(__file__).resolve().parents[2] / "shared"
    if not (base / "guests").is_dir():
        pytest.skip("no folder shared/guests with boot disks (set MIXVISOR_SHARED)")
    return base / "guests"
