"""`python -m tests.lab [HOST ...]`: boot hosts, check the program inside them, print the table.

Exit code 0: everything is as it must be; 1: something is not; 2: wrong usage; 3: parts are missing here.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from .emulator import Emulator, Report
from .hosts import CHECKS, HOSTS, Host
from .image import build
from .parts import Missing, Parts, emulators_missing
from .report import document, table

__all__ = ["boot", "main"]

LOOK_S = 0.1


def boot(
    hosts: Sequence[Host], *, checks: Sequence[str] = tuple(CHECKS), jobs: int = 2,
    said: Callable[[str], None] = lambda _text: None, keep: Path | None = None,
) -> list[Report]:
    """Run hosts, at most `jobs` at once. Raises Missing where this machine cannot.

    keep: a folder for the consoles and raw results.
    """
    reason = emulators_missing(host.emulator for host in hosts)
    if reason:
        raise Missing(reason)
    said("lab: gathering the parts (kept between runs)")
    parts = Parts()
    image = build(parts)
    waiting, running, done = list(hosts), list[Emulator](), dict[str, Report]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                host = waiting.pop(0)
                said(f"lab: {host.name} boots ({host.title})")
                running.append(Emulator(host, image, parts, checks))
            time.sleep(LOOK_S)
            for emulator in list(running):
                report = emulator.poll()
                if report is not None:
                    if keep:
                        emulator.keep(keep)
                    emulator.close()
                    running.remove(emulator)
                    done[report.host.name] = report
                    said(f"lab: {report.host.name} {'is good' if report.good else 'FAILED'} ({report.wall_s:.0f} s)")
    finally:
        for emulator in running:
            if keep:
                emulator.keep(keep)
            emulator.close()
    return [done[host.name] for host in hosts]


def _ended(number: int, _frame: object) -> NoReturn:
    for other in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(other, signal.SIG_IGN)   # once is enough: the ending is not to be cut short
    sys.exit(128 + number)                     # through every `finally`


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.lab", description="Hosts: " + "; ".join(
        f"{host.name}: {host.title}" for host in HOSTS.values()) + ".")
    parser.add_argument("hosts", nargs="*", metavar="HOST", help="which hosts; default: all")
    parser.add_argument("--quick", action="store_true", help="only those that take seconds")
    parser.add_argument("--slow", action="store_true", help="only those that take a minute or more")
    parser.add_argument("--check", action="append", choices=tuple(CHECKS), metavar="CHECK",
                        help=f"only this one, of {', '.join(CHECKS)}; may be given several times")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="hosts at once (2)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep each host's console and raw results there")
    parser.add_argument("-o", "--output", choices=("table", "json"), default="table")
    chosen = parser.parse_args(arguments)
    unknown = [name for name in chosen.hosts if name not in HOSTS]
    if unknown:
        parser.error(f"there is no host {unknown[0]!r}; there are {', '.join(HOSTS)}")
    if chosen.jobs < 1:
        parser.error("--jobs must be 1 or more")
    hosts = [HOSTS[name] for name in dict.fromkeys(chosen.hosts)] or list(HOSTS.values())
    if chosen.quick or chosen.slow:
        hosts = [host for host in hosts if (chosen.quick and host.quick) or (chosen.slow and not host.quick)]
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _ended)
    try:
        checks = [name for name in CHECKS if not chosen.check or name in chosen.check]
        reports = boot(hosts, checks=checks, jobs=chosen.jobs, keep=chosen.keep,
                       said=lambda text: print(text, file=sys.stderr, flush=True))
    except Missing as missing:
        print(f"lab: {missing}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        return 130
    print(json.dumps(document(reports), indent=2) if chosen.output == "json" else table(reports))
    return 0 if all(report.good for report in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
