"""What mixing costs on this machine, for several guests, and the nulls: `python -m benchmarks.mixing` (7 minutes).

Each row is a run of `mixvisor measure` with built-in guests, two of each mode on one host CPU: cost of a crossing with
its 95 % interval by random order, the same by blocks, both nulls, the agreement of the two estimators. The placebos run
all four VMs in one mode: there the right answer is zero. `--keep DIR` keeps every slice and plot there.
Needs the right to real-time priorities, and a quiet machine.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .common import options, report, table

RUNS = (
    ("64 KiB a VM", ()),
    ("registers alone", ("--guest", "alu")),
    ("256 KiB a VM", ("--working-set", "256K")),
    ("1 MiB a VM (caches)", ("--working-set", "1M")),
    ("placebo, software", ("--placebo", "software")),
    ("placebo, hardware", ("--placebo", "hardware")),
)
MIXVISOR = (sys.executable, "-P", "-c", "from mixvisor.cli.main import main; main()")
COMMAND = (*MIXVISOR, "measure", "--no-save", "-o", "json")


def run(arguments: tuple[str, ...], prefix: Path, seconds: float) -> dict[str, Any]:
    done = subprocess.run(
        [*COMMAND, "--seconds", str(seconds), "--out", str(prefix), *arguments], stdout=subprocess.PIPE, text=True,
        check=True, timeout=seconds + 60)
    return json.loads(done.stdout)


def cell(estimate: dict[str, float] | None) -> str:
    return "-" if estimate is None else f"{estimate['value']:+.1f} [{estimate['low']:.1f}, {estimate['high']:.1f}]"


def main() -> None:
    given = options(__doc__ or "", seconds=60.0, keep="")
    found: dict[str, Any] = {}
    rows: list[list[object]] = []
    with tempfile.TemporaryDirectory(prefix="mixvisor-bench-") as folder:
        keep = Path(given.keep or folder)
        keep.mkdir(parents=True, exist_ok=True)
        for name, arguments in RUNS:
            data = run(arguments, keep / "-".join(re.findall(r"[a-z0-9]+", name.lower())), given.seconds)
            found[name] = data
            order, blocks = data["random_order"] or {}, data["blocks"] or {}
            rows.append([name, cell(order.get("cost_us")), cell(blocks.get("cost_us")), cell(order.get("null_us")),
                         cell(blocks.get("control_us")), cell(data["agreement_us"]), data["verdict"]["kind"]])
            print(f"{name}: {cell(order.get('cost_us'))} µs a crossing", flush=True)
    table(f"Cost of a crossing, µs of CPU time with 95 % intervals; {given.seconds:g} s each",
          ["guests", "random order", "blocks", "null", "A/A", "agreement", "verdict"], rows)
    report("mixing", {"runs": found}, given.json)


if __name__ == "__main__":
    main()
