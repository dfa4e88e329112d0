"""Runs inside a host of the lab: every check in turn, each told as a line of JSON on the second serial port.

Theory.  An emulated CPU is fifty times slower than a real one, and most of that would go into importing
the same modules for every command. So they are imported once here, and each command runs in a fork: the
function of the console script, its arguments, its output, its exit code.

Lines: {"at": what is being done now}, {"facts": ...}, {"check": name, "ok": true, false or null,
"words": why, "notes": for the table}, {"end": true}; each with "t", the host's uptime in its own seconds. A check that
raises has failed with its last words; the next ones run all the same.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import json
import mmap
import os
import re
import signal
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..hosts import CHECKS, HOSTS, Host

PORT: Final = 0x2F8                            # the second serial port
LINE_STATUS, TRANSMITTER_EMPTY = 5, 0x20
WORDS_MAX: Final = 6000                        # of a failure: the line is slow
SOFT: Final = """
[[vm]]
name = "soft"
mode = "software"
memory = "4M"
boot = { guest = "alu" }
"""
WIDE: Final = """
[[vm]]
name = "wide"
memory = "4M"
boot = { guest = "alu" }
"""
FLEXIBLE: Final = """
[[vm]]
name = "flexible"
boot = { guest = "hello" }
"""
HARD: Final = """
[[vm]]
name = "hard"
mode = "hardware"
memory = "4M"
boot = { guest = "alu" }
"""
FALLBACK: Final = """
[[vm]]
name = "fallback"
fallback = true
memory = "4M"
boot = { guest = "alu" }
"""


class Wrong(Exception):
    """What was found is not what must be."""


class Absorbing(types.ModuleType):
    """In place of hypothesis, which is half of what the suites import: properties do not run here (see `contract`)."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *_arguments: object, **_named: object) -> Any:
        return self

    @staticmethod
    def given(*_arguments: object, **_named: object) -> Callable[[Any], Any]:
        def mark(test: Any) -> Any:
            test.is_hypothesis_test = True
            return test
        return mark

    @staticmethod
    def settings(*_arguments: object, **_named: object) -> Callable[[Any], Any]:
        return lambda test: test


class NotHere(Exception):
    """The check has no meaning on this host."""


def expect(found: object, wanted: object, what: str) -> None:
    if found != wanted:
        raise Wrong(f"{what}: {found!r}, where {wanted!r} was to be")


# ---- telling -----------------------------------------------------------------------------------

class Line:
    """The port itself, byte by byte, and not its tty: with Bochs the kernel's driver waits for ever for an
    interrupt of an empty transmitter that was lost.
    """

    def __init__(self) -> None:
        if ctypes.CDLL(None, use_errno=True).iopl(3) != 0:
            raise OSError(ctypes.get_errno(), "iopl")
        # mov edx, edi; mov eax, esi; out dx, al; ret - and: mov edx, edi; xor eax, eax; in al, dx; ret
        self._code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        self._code[0:14] = bytes.fromhex("89fa 89f0 ee c3 9090 89fa 31c0 ec c3")
        at = ctypes.addressof(ctypes.c_char.from_buffer(self._code))
        self._out = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_int)(at)
        self._in = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(at + 8)
        # 115200 baud: the latch of the divisor open, 1, 8 bits without parity; no interrupts.
        for register, value in ((3, 0x83), (0, 1), (1, 0), (3, 0x03), (2, 0x01), (1, 0)):
            self._out(PORT + register, value)

    def tell(self, **said: object) -> None:
        for byte in json.dumps({**said, "t": round(time.monotonic(), 1)}).encode() + b"\n":
            while not self._in(PORT + LINE_STATUS) & TRANSMITTER_EMPTY:
                pass
            self._out(PORT, byte)


# ---- the program -------------------------------------------------------------------------------

@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        try:
            return json.loads(self.out)
        except ValueError:
            raise Wrong(f"exit code {self.code} and no JSON: {(self.err or self.out).strip()[-600:]}") from None


def begin(arguments: tuple[str, ...], out: int, err: int) -> int:
    """The command in a fork of this process; its process id."""
    from mixvisor.cli.main import main

    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        main(arguments)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def mixvisor(*arguments: str) -> Answer:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = begin(arguments, out.fileno(), err.fileno())
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        out.seek(0)
        err.seek(0)
        return Answer(code, out.read().decode(), err.read().decode())


@contextlib.contextmanager
def file(*parts: str) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lab.toml"
        path.write_text("".join(parts))
        yield str(path)


# ---- the checks ----------------------------------------------------------------------------------

def detection(host: Host, line: Line) -> str:
    answer = mixvisor("host", "-o", "json")
    expect(answer.code, 0, "exit code of `mixvisor host`")
    found = answer.json
    line.tell(facts=found["host"])
    wrong = []
    for path, wanted in host.facts.items():
        value: Any = found["host"]
        for key in path.split("."):
            value = value[key]
        if value != wanted:
            wrong.append(f"{path} is {value!r}, where {wanted!r} was to be")
    expect(found["warnings"], [], "warnings of `mixvisor host`")
    said = " ".join(found["explained"])
    for word in {"vt-x": ("VT-x", "usable"), "amd-v": ("AMD-V", "usable"),
                 "none": ("no hardware virtualization",)}[host.technology]:
        if word not in said:
            wrong.append(f"the words of `mixvisor host` do not say {word!r}: {said}")
    if wrong:
        raise Wrong("\n".join(wrong))
    virtualization = found["host"]["virtualization"]
    return "" if not host.hardware else " ".join(
        word for word, fact in (("EPT" if host.technology == "vt-x" else "NPT", "extended_paging"),
                                ("unrestricted", "unrestricted_guest")) if virtualization[fact])


def modes(host: Host, _line: Line) -> str:
    with file(SOFT, WIDE, FLEXIBLE, HARD, FALLBACK) as path:
        answer = mixvisor("modes", path, "-o", "json")
    vms = {vm["vm"]: vm for vm in answer.json["vms"]}
    found = {name: (vm["mode"], vm["rule"]) for name, vm in vms.items()}
    if host.hardware:
        expect(found, {
            "soft": ("software", "explicit"), "wide": ("hardware", "64-bit"), "flexible": ("hardware", "default"),
            "hard": ("hardware", "explicit"), "fallback": ("hardware", "64-bit")}, "modes and rules")
        expect(answer.code, 0, "exit code of `mixvisor modes`")
        with file(WIDE, FLEXIBLE) as path:
            vms = {vm["vm"]: vm for vm in mixvisor("modes", path, "-o", "json").json["vms"]}
        expect((vms["flexible"]["mode"], vms["flexible"]["rule"]), ("hardware", "avoid-mixing"), "beside a 64-bit VM")
        return ""
    expect(found, {
        "soft": ("software", "explicit"), "wide": (None, "no-kvm"), "flexible": ("software", "no-hardware"),
        "hard": (None, "no-kvm"), "fallback": ("software", "fallback")}, "modes and rules")
    expect(answer.code, 1, "exit code of `mixvisor modes` with a VM that cannot run")
    for name in ("wide", "hard"):
        for word in ("no hardware virtualization",):
            if word not in vms[name]["reason"]:
                raise Wrong(f"the reason for {name} does not say {word!r}: {vms[name]['reason']}")
        if not vms[name]["remedy"]:
            raise Wrong(f"{name} is refused without a remedy")
    return "refused with reason"


def _mixed_words(host: Host, warnings: dict[str, dict[str, Any]]) -> None:
    """The manual's rule, as it is on this host."""
    if host.technology == "vt-x":
        expect(sorted(warnings), ["mixed-modes", "mixed-modes-cpu"], "warnings")
        expect({warning["severity"] for warning in warnings.values()}, {"warning"}, "severity on VT-x")
        said = "on VT-x: a small performance penalty is in certain cases unavoidable"
        advice = "do not mix the modes"
    else:
        expect(sorted(warnings), ["mixed-modes"], "warnings")
        expect(warnings["mixed-modes"]["severity"], "info", "severity on AMD-V")
        said = "on AMD-V: the manual's warning about mixing does not apply here"
        advice = "Nothing needs to be done"
    if said not in warnings["mixed-modes"]["message"] or advice not in warnings["mixed-modes"]["advice"]:
        raise Wrong(f"the warning is worded otherwise: {warnings['mixed-modes']}")


def warnings(host: Host, _line: Line) -> str:
    with file(SOFT, HARD) as path:
        if not host.hardware:
            expect(mixvisor("modes", path, "-o", "json").json["warnings"], [], "warnings where nothing can mix")
            return ""
        answer = mixvisor("modes", path, "-o", "json", "--strict")
    _mixed_words(host, {warning["code"]: warning for warning in answer.json["warnings"]})
    expect(answer.code, 8 if host.technology == "vt-x" else 0, "exit code with --strict")
    return answer.json["warnings"][0]["severity"]


SUITE: Final = "tests/vm/engines"
# Random code by the hundred is for real processors: here it would take minutes.
FOR_REAL: Final = "not hostile and not random_boot and not random_code and not by_chance"
# Ring 3 writes to ports there (see MIXED), or a state with an interrupt shadow is entered, which TCG drops. QEMU
# itself aborts at a far return to ring 3 in the conformance programs, and in a change of task.
NOT_UNDER_TCG: Final = ("not after_a_move and not x87_stack and not rounding_as"
                        " and not test_conformance and not test_tasks")
# Modules without a test that needs /dev/kvm, and those that run on no host of the lab: not imported (test_lab.py
# looks whether that is still so).
WITHOUT_HARDWARE: Final = ("test_checks", "test_delivery", "test_kick", "test_kvm_abi", "test_kvm_exits",
                           "test_operands", "test_paging", "test_quirks")
LEFT_OUT: Final = {"qemu": WITHOUT_HARDWARE, "bochs": (*WITHOUT_HARDWARE, "test_smp")}
HARDWARE: Final = {
    "qemu": (SUITE, "-m", "kvm", "-k", f"{FOR_REAL} and {NOT_UNDER_TCG}"),
    # Bochs enters a guest whose interrupts are off with the host's interrupts masked: one that computes so
    # without ever leaving by itself is never left again. With several vCPUs there is always one that does.
    "bochs": (SUITE, "-m", "kvm and not spins", "-k", FOR_REAL),
}
WITHOUT_KVM: Final = (f"{SUITE}/test_contract.py", f"{SUITE}/test_kvm_api.py",
                      "-k", f"not fake and {FOR_REAL}")


def contract(host: Host, line: Line) -> str:
    """pytest over the suites of the engines: all that needs /dev/kvm, or where there is none, the rest."""
    hypothesis = Absorbing("hypothesis")
    sys.modules["hypothesis"] = sys.modules["hypothesis.strategies"] = hypothesis
    import pytest

    class Teller:
        def __init__(self) -> None:
            self.counts = {"passed": 0, "failed": 0, "skipped": 0}
            self.words: list[str] = []

        def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
            # Properties want hundreds of examples, and making one takes longer here than running it.
            made_up = [item for item in items if getattr(getattr(item, "obj", None), "is_hypothesis_test", False)]
            if made_up:
                items[:] = [item for item in items if item not in made_up]
                config.hook.pytest_deselected(items=made_up)

        def pytest_runtest_logstart(self, nodeid: str) -> None:
            line.tell(at=f"contract, {nodeid.removeprefix('tests/vm/engines/')}")

        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.failed or report.when == "call" or report.skipped:
                self.counts[report.outcome] += 1
            if report.failed:
                self.words.append(f"{report.nodeid}\n{report.longreprtext[-900:]}")
            elif report.skipped and isinstance(report.longrepr, tuple):
                self.words.append(f"{report.nodeid}: {report.longrepr[2]}")

        def pytest_collectreport(self, report: pytest.CollectReport) -> None:
            if report.failed:
                self.counts["failed"] += 1
                self.words.append(f"{report.nodeid}\n{report.longreprtext[-900:]}")

    teller, said = Teller(), io.StringIO()
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    with contextlib.redirect_stdout(said):
        # Where there is no KVM its tests must say so: they are all skipped, and software's show that it works.
        code = pytest.main(["-q", "--tb=short", "-p", "pytest_trio.plugin", "-p", "no:cacheprovider",
                            "-p", "no:faulthandler", "--assert=plain",
                            *(HARDWARE[host.emulator] if host.hardware else WITHOUT_KVM),
                            *(f"--deselect={SUITE}/{name}" for name in host.left_out),
                            *(f"--ignore={SUITE}/{name}.py" for name in LEFT_OUT[host.emulator] if host.hardware)],
                           plugins=[teller])
    counts = teller.counts
    notes = f"{counts['passed']} passed" + (f", {counts['skipped']} skipped" if counts["skipped"] else "")
    if counts["failed"] or code not in (0, 1):
        raise Wrong(f"{counts['failed']} failed, {notes}, exit code {int(code)}\n"
                    + "\n".join(teller.words[:8] or [said.getvalue()[-1500:]]))
    if not counts["passed"]:
        raise Wrong(f"no test ran: {said.getvalue()[-600:]}")
    if host.hardware:
        expect(counts["skipped"], 0, "skipped tests (" + "; ".join(teller.words[:4]) + ")")
    else:
        others = [words for words in teller.words if "/dev/kvm cannot be used" not in words]
        expect(others, [], "skips for another reason")
    return notes


HOST_TABLE: Final = """
[host]
cpus = "0"
dispatch = "gentle"
[metrics]
listen = "127.0.0.1:9736"
"""
RUN_S: Final = 240                             # of the host's own time, which is no time
LOOK_S: Final = 0.5                            # of the same; each look at the service costs an emulated host dear
# QEMU's TCG looks for an available TSS (type 9) where a processor in use has a busy one (11, as VMRUN loads it),
# so that every port instruction of ring 3 faults in its guests: there no guest uses ports. With Bochs, on the
# other hand, only guests will do that leave by themselves.
MIXED: Final = {
    "qemu": {"soft-1": ("software", "alu"), "hard-1": ("hardware", "alu"),
             "soft-2": ("software", "randmem"), "hard-2": ("hardware", "rings")},
    "bochs": {"soft-1": ("software", "alu"), "hard-1": ("hardware", "portio"),
              "soft-2": ("software", "portio"), "hard-2": ("hardware", "portio")},
}


def _vm(name: str, mode: str, guest: str, more: str = "") -> str:
    return (f'[[vm]]\nname = "{name}"\nmode = "{mode}"\nmemory = "4M"\n'
            f'boot = {{ guest = "{guest}"{", batch = 1000" if guest == "portio" else ""} }}\n{more}\n')


@contextlib.contextmanager
def service(line: Line, *text: str) -> Iterator[tuple[Any, int]]:
    """`mixvisor run` in a process of its own, a client that asks it, and its process id."""
    from mixvisor.service.backend import ServiceError
    from mixvisor.service.client import Client

    with file(*text) as path, tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as said:
        pid = begin(("run", "--state-dir", folder, path), said.fileno(), said.fileno())
        ended: int | None = None

        def words() -> str:
            said.seek(0)
            return said.read().decode(errors="replace")[-2500:]

        try:
            client = None
            for _ in _trying(line, "the service's socket"):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    ended = os.waitstatus_to_exitcode(status)
                    raise Wrong(f"`mixvisor run` ended with {ended}: {words()}")
                with contextlib.suppress(ServiceError):
                    client = Client(Path(folder) / "control.sock", timeout_seconds=RUN_S)
                    break
            try:
                yield client, pid
            except Exception as error:
                for _ in range(100):                       # it may be ending, and have more to say
                    done, status = os.waitpid(pid, os.WNOHANG)
                    if done:
                        ended = os.waitstatus_to_exitcode(status)
                        break
                    time.sleep(0.05)
                state = "runs on" if ended is None else f"ended with {ended}"
                raise Wrong(f"{error}; the service {state}:\n{words()}") from error
            os.kill(pid, signal.SIGINT)
            for _ in _trying(line, "the end of the service"):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    ended = os.waitstatus_to_exitcode(status)
                    break
            expect(ended, 0, f"exit code of `mixvisor run` after Ctrl-C ({words()})")
        finally:
            if ended is None:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def _trying(line: Line, what: str) -> Iterator[None]:
    line.tell(at=f"mixed-run, waiting for {what}")
    until = time.monotonic() + RUN_S
    while time.monotonic() < until:
        yield
        time.sleep(LOOK_S)
    raise Wrong(f"{what} did not come within {RUN_S} s of the host's time")


def _all_work(line: Line, client: Any, names: set[str]) -> Any:
    """Wait until every VM has been seen to go on from one picture to a later one; the last picture."""
    first, said = dict[str, int](), dict[str, int]()
    picture = client.snapshot()
    for _ in _trying(line, f"work of all of {', '.join(sorted(names))}"):
        picture = client.snapshot()
        for vm in picture.vms:
            if vm.state in ("crashed", "failed", "stopped"):
                why = client.why(vm.name)
                raise Wrong(f"{vm.name} ({vm.mode}) is {vm.state}: {vm.state_reason} {json.dumps(why)[:1200]}")
        at = {vm.name: vm.progress or 0 for vm in picture.vms if vm.name in names}
        if at != said:
            said = at
            line.tell(at="mixed-run, " + ", ".join(f"{vm.name} {vm.state} at {vm.progress}" for vm in picture.vms))
        for name, progress in at.items():
            if progress:
                first.setdefault(name, progress)
        if all(name in first and at[name] > first[name] for name in names):
            return picture
    raise AssertionError


def _processes() -> list[str]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            name = (folder / "comm").read_text().strip()
            alive = (folder / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
            if alive and name.startswith("mixvisor"):
                found.append(f"{folder.name} {name}")
    return found


def mixed_run(host: Host, line: Line) -> str:
    if host.hardware:
        vms = MIXED[host.emulator]
        files = [_vm(name, mode, guest) for name, (mode, guest) in vms.items()]
        with service(line, HOST_TABLE, *files) as (client, _pid):
            picture = _all_work(line, client, set(vms))
            expect({vm.name: vm.mode for vm in picture.vms}, {name: mode for name, (mode, _) in vms.items()}, "modes")
            for _ in _trying(line, "the warning of mixing"):
                said = {warning.code: {"severity": warning.severity, "message": warning.message,
                                       "advice": warning.advice}
                        for warning in client.snapshot().warnings if warning.code.startswith("mixed-modes")}
                if len(said) == (2 if host.technology == "vt-x" else 1):
                    break
            _mixed_words(host, said)
            line.tell(at="mixed-run, the warning is there")
            exits = sum(vm.exits["io_out"] for vm in picture.vms if vm.name == "hard-2")
            if vms["hard-2"][1] == "portio" and not exits:
                raise Wrong("the hardware VM that writes to a port reports no exits")
            client.act("hard-1", "stop")
            client.act("hard-2", "stop")
            for _ in _trying(line, "the end of the warning"):
                if not any(warning.code.startswith("mixed-modes") for warning in client.snapshot().warnings):
                    break
        expect(_processes(), [], "processes left behind")
        return "2 + 2"
    # No hardware: what asks for it is refused before anything starts, the rest runs in software.
    with file(HOST_TABLE, HARD, SOFT) as path, tempfile.TemporaryDirectory() as folder:
        line.tell(at="mixed-run, a file that asks for hardware")
        answer = mixvisor("run", "--state-dir", folder, path)
    said = re.sub(r"\s+", " ", answer.out + answer.err)
    if answer.code == 0 or "hard" not in said or "no hardware virtualization" not in said or "Traceback" in said:
        raise Wrong(f"`mixvisor run` with a hardware VM: exit code {answer.code}, said: {said[-1500:]}")
    expect(_processes(), [], "processes left behind")
    with service(line, HOST_TABLE, _vm("soft-1", "software", "alu"),
                 _vm("auto-1", "auto", "alu", "fallback = true")) as (client, _pid):
        picture = _all_work(line, client, {"soft-1", "auto-1"})
        expect({vm.name: (vm.mode, vm.mode_rule) for vm in picture.vms},
               {"soft-1": ("software", "explicit"), "auto-1": ("software", "fallback")}, "modes")
        expect([warning.code for warning in picture.warnings if warning.code.startswith("mixed")], [], "warnings")
    expect(_processes(), [], "processes left behind")
    line.tell(at="mixed-run, the demo")
    answer = mixvisor("demo", "--seconds", "2", "-o", "json", "--listen", "none")
    if answer.code != 0 or "All VMs of this demo are software" not in answer.err:
        raise Wrong(f"`mixvisor demo`: exit code {answer.code}, said: {(answer.err or answer.out)[-1500:]}")
    expect({vm["mode"] for vm in answer.json["vms"]}, {"software"}, "modes of the demo")
    return "software only"


FUNCTIONS: Final[dict[str, Callable[[Host, Line], str]]] = {
    "detection": detection, "modes": modes, "warnings": warnings, "contract": contract, "mixed-run": mixed_run,
}


def warm(line: Line) -> None:
    """What the commands import, once."""
    line.tell(at="importing")
    import mixvisor.cli.files
    import mixvisor.cli.host
    import mixvisor.cli.main
    import mixvisor.cli.modes
    import mixvisor.cli.serve
    import mixvisor.service.app
    import mixvisor.service.client
    import mixvisor.vm.host  # noqa: F401


def main() -> None:
    words = dict(word.partition("=")[::2] for word in Path("/proc/cmdline").read_text().split())
    host, line = HOSTS[words["lab.host"]], Line()
    only = [name for name in words.get("lab.checks", "").split(",") if name]
    try:
        gc.disable()                           # the sixteenth part of importing; machines that moved are garbage, too
        warm(line)
        gc.enable()
        for name in only or CHECKS:
            line.tell(at=name)
            began = time.monotonic()
            try:
                notes = FUNCTIONS[name](host, line)
            except NotHere as error:
                line.tell(check=name, ok=None, words=str(error))
            except Wrong as error:
                line.tell(check=name, ok=False, words=str(error)[:WORDS_MAX])
            except Exception:                  # whatever it is fails this check, and is told; the others go on
                line.tell(check=name, ok=False, words=traceback.format_exc()[-WORDS_MAX:])
            else:
                line.tell(check=name, ok=True, words="", notes=notes)
            print(f"checks: {name} done, {time.monotonic() - began:.1f} s of this host's time")
    except BaseException:
        line.tell(at=traceback.format_exc()[-WORDS_MAX:])
        raise
    line.tell(end=True)


if __name__ == "__main__":
    main()
