"""One host of the lab while it runs: an emulator, its deadline, and what the host told.

A host has two serial lines, both written into files: the console, for people, and the results, one JSON
object a line (inside/checks.py). What a host said stands whatever happens to it afterwards: Bochs, for one, ends
with exit code 1 always.

Invariant.  The emulator dies with the runner, however that ends: by `close`, and by the parent-death
signal where nobody could call it any more. Everything that a host writes goes into one folder of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from .hosts import CHECKS, Host
from .image import Image, boot_disk, command_line
from .parts import Parts

__all__ = ["Emulator", "Outcome", "Report"]

MEMORY_MIB: Final = 1024
CONSOLE_LINES: Final = 12                      # of the end of the console, where a host fails
AFTER_S: Final = 60                            # to power off, once all is told


@dataclass(frozen=True)
class Outcome:
    """How a check ended. `ok` None: it was not run here, and `words` say why."""

    ok: bool | None
    words: str
    notes: str = ""


@dataclass
class Report:
    host: Host
    checks: Sequence[str] = tuple(CHECKS)      # that were to run
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    wall_s: float = 0.0
    cpu_s: float = 0.0
    trouble: str = ""                          # why it did not come to its end

    @property
    def good(self) -> bool:
        return not self.trouble and all(
            name in self.outcomes and self.outcomes[name].ok is not False for name in self.checks)


class Emulator:
    """Starts at once; `poll` until `report` is there. Use as a context manager."""

    def __init__(self, host: Host, image: Image, parts: Parts, checks: Sequence[str] = tuple(CHECKS)) -> None:
        self.host = host
        self._checks = tuple(checks)
        self.report: Report | None = None
        self.folder = Path(tempfile.mkdtemp(prefix=f"mixvisor-lab-{host.name}-"))
        self._began = time.monotonic()
        self._told: float | None = None
        self._process: subprocess.Popen[bytes] | None = None
        try:
            words = (self._qemu if host.emulator == "qemu" else self._bochs)(image, parts)
            with (self.folder / "output").open("wb") as output:
                self._process = subprocess.Popen(
                    ["setpriv", "--pdeathsig", "KILL", *words], cwd=self.folder, stdin=subprocess.DEVNULL,
                    stdout=output, stderr=output, start_new_session=True)
        except BaseException:
            self.close()
            raise

    def _qemu(self, image: Image, _parts: Parts) -> list[str]:
        return ["qemu-system-x86_64", "-machine", "q35,accel=tcg", "-cpu", self.host.cpu, "-m", str(MEMORY_MIB),
                "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
                # While it computes its clock counts instructions (2 ns each): a busy machine makes nothing late.
                "-icount", "shift=1",
                "-serial", "file:console", "-serial", "file:results",
                "-drive", f"file={image.disk},format=raw,if=virtio,readonly=on",
                "-kernel", str(image.kernel), "-initrd", str(image.initrd),
                "-append", command_line(self.host, self._checks)]

    def _bochs(self, image: Image, parts: Parts) -> list[str]:
        boot = boot_disk(image, parts, command_line(self.host, self._checks), self.folder)
        # A hard disk: Bochs takes sixteen times as long for each seek of a CD, and every byte of it one by one. By
        # another name, since it puts its lock beside the image, which other hosts read too.
        (self.folder / "disk").symlink_to(image.disk)
        (self.folder / "rc").write_text(f"""\
memory: guest={MEMORY_MIB}, host={MEMORY_MIB}
cpu: model={self.host.cpu}, count=1, ips=500000000, reset_on_triple_fault=1, ignore_bad_msrs=1
romimage: file={image.bios}
vgaromimage: file={image.vga_bios}
display_library: rfb, options="timeout=0"
pci: enabled=1, chipset=i440fx
ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
ata0-master: type=cdrom, path={boot}, status=inserted
ata1: enabled=1, ioaddr1=0x170, ioaddr2=0x370, irq=15
ata1-master: type=disk, mode=flat, path=disk, cylinders=0, heads=16, spt=63
boot: cdrom
com1: enabled=1, mode=file, dev=console
com2: enabled=1, mode=file, dev=results
clock: sync=none
log: log
panic: action=fatal
error: action=ignore
info: action=ignore
debug: action=ignore
""")
        (self.folder / "commands").write_text("c\n")      # it is a debugger: continue
        # Its display is VNC on all addresses: in a network of its own, where nobody is.
        alone = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--net"]
        return [*alone, "bochs-bin", "-q", "-f", "rc", "-rc", "commands"]

    def poll(self) -> Report | None:
        """The report, once the host has ended (or was ended)."""
        if self.report is not None or self._process is None:
            return self.report
        now = time.monotonic()
        pid, status, usage = os.wait4(self._process.pid, os.WNOHANG)
        if pid == 0:
            if self._told is None and b'"end"' in self._read("results"):
                self._told = now
            late = now - self._began > self.host.deadline_s
            if not late and (self._told is None or now - self._told < AFTER_S):
                return None
            self._kill()
            pid, status, usage = os.wait4(self._process.pid, 0)
            trouble = f"it was not done after {self.host.deadline_s} s" if self._told is None else ""
        else:
            trouble = "" if b'"end"' in self._read("results") else f"the emulator ended early (status {status})"
        self._process.returncode = status
        self.report = self._judge(trouble)
        self.report.wall_s = now - self._began
        self.report.cpu_s = usage.ru_utime + usage.ru_stime
        return self.report

    def _judge(self, trouble: str) -> Report:
        report, at = Report(self.host, self._checks), "it had not begun"
        for line in self._read("results").decode(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                said = json.loads(line)
                if "at" in said:
                    at = said["at"]
                elif "check" in said:
                    report.outcomes[said["check"]] = Outcome(said["ok"], said["words"], said.get("notes", ""))
                    at = f"after {said['check']}"
                elif "facts" in said:
                    report.facts = said["facts"]
        if trouble:
            console = self._read("console").decode(errors="replace").splitlines()[-CONSOLE_LINES:]
            output = self._read("output").decode(errors="replace").splitlines()[-3:]
            report.trouble = "\n".join([f"{trouble}; last seen: {at}. The end of its console:",
                                        *(f"    {line}" for line in [*console, *output])])
        return report

    def _read(self, name: str) -> bytes:
        try:
            return (self.folder / name).read_bytes()
        except FileNotFoundError:
            return b""

    def _kill(self) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def __enter__(self) -> Emulator:
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: BaseException | None,
                 _trace: TracebackType | None) -> None:
        self.close()

    def keep(self, folder: Path) -> None:
        """Copy what the host said and wrote to where it outlives this."""
        into = folder / self.host.name
        into.mkdir(parents=True, exist_ok=True)
        for name in ("console", "results", "output", "log"):
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, into / name)

    def close(self) -> None:
        """End the emulator if it runs, and remove what it wrote."""
        if self._process is not None and self._process.returncode is None:
            self._kill()
            self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
