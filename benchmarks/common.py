"""What the benchmarks share: a service of one's own, the machine's name, tables, medians."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import structlog
import trio

from mixvisor.config.model import Config
from mixvisor.service.app import Service

__all__ = ["busy_service", "machine", "options", "quantile", "report", "table"]


def machine() -> str:
    """The machine in one line, for a results file."""
    model = next((line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), platform.machine())
    kvm = "with /dev/kvm" if os.path.exists("/dev/kvm") else "no /dev/kvm"
    return (f"{model}, {os.cpu_count()} CPUs, Linux {platform.release()}, {kvm}, "
            f"Python {platform.python_version()}")


def options(description: str, **defaults: Any) -> argparse.Namespace:
    """--json FILE and one option for each keyword, typed by its default."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="write the raw figures here")
    for name, default in defaults.items():
        if default is False:
            parser.add_argument(f"--{name.replace('_', '-')}", action="store_true")
            continue
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default,
                            help=f"default {default}")
    return parser.parse_args()


def quantile(values: Sequence[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * q), len(ordered) - 1)]


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    cells = [[str(c) for c in head], *[[f"{c:.3g}" if isinstance(c, float) else str(c) for c in row] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    print(f"\n{title}")
    for number, row in enumerate(cells):
        print("  " + "  ".join(c.rjust(w) if i else c.ljust(w)
                               for i, (c, w) in enumerate(zip(row, widths, strict=True))).rstrip())
        if number == 0:
            print("  " + "  ".join("-" * w for w in widths))
    sys.stdout.flush()


def report(name: str, figures: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps({"benchmark": name, "machine": machine(), **figures}, indent=1) + "\n")


@contextlib.asynccontextmanager
async def busy_service(
    vms: Sequence[dict[str, Any]], *, cpus: str, dispatch: str = "auto", slice_us: int = 5000,
    listen: str = "none",
) -> AsyncIterator[Service]:
    """A whole service with these VMs, all started, in a state directory of its own."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    config = Config.model_validate({
        "host": {"cpus": cpus, "dispatch": dispatch}, "scheduler": {"slice_us": slice_us},
        "metrics": {"listen": listen}, "vm": list(vms)})
    with tempfile.TemporaryDirectory(prefix="mixvisor-bench-") as folder:
        service = Service(config, state_dir=Path(folder), socket=None)
        async with trio.open_nursery() as nursery:
            await nursery.start(service.run)
            try:
                yield service
            finally:
                service.request_shutdown()


def median(values: Sequence[float]) -> float:
    return statistics.median(values)
