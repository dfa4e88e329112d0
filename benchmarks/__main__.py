"""Run every benchmark in turn, each in a process of its own."""

import subprocess
import sys

from .common import machine

NAMES = ("policy", "simulate", "scan", "engines", "watch", "compute", "timer", "dispatch", "sharing", "start",
         "work", "online", "scrape", "mixing", "moves", "saves", "hundred")

print(machine())
failed = [name for name in NAMES
          if subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *sys.argv[1:]]).returncode]
sys.exit(f"failed: {', '.join(failed)}" if failed else 0)
