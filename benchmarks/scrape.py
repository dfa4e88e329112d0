"""How long one scrape takes: building the families and encoding them, by number of VMs.

    python benchmarks/scrape.py [--runs 20] [--case VMSxVCPUS ...]

Prints a table. Every run collects afresh (nothing is shared between scrapes). The first column
of times is the encoding alone, the second the whole scrape; "ticker" is how late another
thread's 2 ms timer was at its 99th percentile while scrapes went on in a worker thread: what
the service's event loop would feel from the interpreter's lock.
"""

from __future__ import annotations

import argparse
import runpy
import statistics
import threading
import time
from pathlib import Path

from mixvisor.metrics.collector import SnapshotCollector
from mixvisor.metrics.exposition import render

SNAPSHOTS = Path(__file__).resolve().parents[1] / "tests" / "metrics" / "snapshots.py"
ACCEPT = {"text": "text/plain;version=0.0.4", "openmetrics": "application/openmetrics-text"}


def ticker_lateness_ms(scrape, runs: int) -> float:
    """p99 lateness of a 2 ms ticker in this thread, beside scrapes in another."""
    worker = threading.Thread(target=lambda: [scrape() for _ in range(runs)])
    late: list[float] = []
    worker.start()
    while worker.is_alive():
        due = time.perf_counter() + 0.002
        time.sleep(0.002)
        late.append((time.perf_counter() - due) * 1000)
    worker.join()
    return sorted(late)[int(len(late) * 0.99)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure one scrape.")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--case", action="append", metavar="VMSxVCPUS")
    options = parser.parse_args()
    many_vms = runpy.run_path(str(SNAPSHOTS))["many_vms"]
    print(f"{'VMs':>5} {'vCPUs':>5} {'format':<12} {'samples':>8} {'kB':>6} "
          f"{'encode ms':>10} {'scrape ms':>10} {'max ms':>8} {'ticker ms':>10}")
    for case in options.case or ["4x1", "100x1", "100x4"]:
        vms, vcpus = map(int, case.split("x"))
        snapshot = many_vms(vms, vcpus)
        collector = SnapshotCollector(lambda snapshot=snapshot: snapshot, share_s=0.0)
        shared = SnapshotCollector(lambda snapshot=snapshot: snapshot, share_s=1e9)
        samples = sum(len(metric.samples) for metric in collector.collect())
        for name, accept in ACCEPT.items():
            render(shared, accept)

            def timed(source, accept=accept) -> float:
                start = time.perf_counter()
                render(source, accept)
                return (time.perf_counter() - start) * 1000

            encode = [timed(shared) for _ in range(options.runs)]
            scrape = [timed(collector) for _ in range(options.runs)]
            late = ticker_lateness_ms(lambda a=accept, c=collector: render(c, a), options.runs)
            size = len(render(collector, accept)[1])
            print(f"{vms:>5} {vcpus:>5} {name:<12} {samples:>8} {size / 1000:>6.0f} "
                  f"{statistics.median(encode):>10.1f} {statistics.median(scrape):>10.1f} "
                  f"{max(scrape):>8.1f} {late:>10.1f}")


if __name__ == "__main__":
    main()
