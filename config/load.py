"""From a file to a `Config`, or to all the errors it has.

Theory.  An operator mends a file faster when told everything at once. So the text is parsed
(tomli), each table is validated on its own (pydantic, config/model.py), what holds between tables
is judged over those that are sound (config/rules.py), and every fault becomes one `Problem` with
file, line, table, key, what was found and what is allowed. Only a file without a problem becomes a
`Config`; there is no half of one.

Invariants.  Nothing is changed on the host; boot images are looked at, not opened for writing.
Problems come in the order of the file. A fault is told once: a [[vm]] with faulty keys is judged
without them, and nothing is said that rests on one of them.

Poor at: TOML that does not parse has one problem, the first that tomli meets.
"""

from __future__ import annotations

import difflib
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import tomli
from pydantic import BaseModel, ValidationError

from .disks import disk_findings
from .locate import Place, locate
from .model import (
    BASE_CONTEXT,
    BOOT_ALLOWED,
    BOOT_KINDS,
    GUESTS,
    TAG_PREFIX,
    Config,
    DiskBoot,
    DiskConfig,
    FlatBoot,
    GuestBoot,
    HostConfig,
    MetricsConfig,
    MultibootBoot,
    RomBoot,
    SchedulerConfig,
    VmConfig,
)
from .rules import (
    Finding,
    HostLimits,
    ImageFacts,
    findings,
    host_findings,
    image_findings,
    module_findings,
)

__all__ = [
    "ConfigError", "HostLimits", "Problem", "TableChecker", "check", "judge", "load", "parse",
]

FILE_MAX_BYTES: Final = 4 << 20            # no configuration is so large; /dev/zero is
FOUND_MAX_CHARS: Final = 60
_SECTIONS: Final[Mapping[str, type[BaseModel]]] = {
    "host": HostConfig, "scheduler": SchedulerConfig, "metrics": MetricsConfig,
}
_BOOTS: Final[Mapping[str, type[BaseModel]]] = {
    "disk": DiskBoot, "flat": FlatBoot, "multiboot": MultibootBoot, "guest": GuestBoot, "rom": RomBoot,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One fault of a configuration file. `code` is stable; `str()` is one line for a person."""

    file: str
    line: int | None               # from 1; None where it cannot be had
    table: str                     # '[host]', '[[vm]] #2 "dos"', "" for the file itself
    key: str                       # "weight", "boot.disk", "" for the table itself
    code: str
    found: str
    allowed: str
    suggestion: str | None = None

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        parts = [place, *(part for part in (self.table, self.key) if part)]
        text = f"{': '.join(parts)}: found {self.found}, allowed: {self.allowed}"
        return f"{text} ({self.suggestion})" if self.suggestion else text


class ConfigError(Exception):
    """A configuration that cannot be used; `problems` has every fault of it, at least one."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


def load(path: Path | str, host: HostLimits | None = None) -> Config:
    """Read and check a configuration file. Raises ConfigError with every problem.

    With `host`, what the file asks for is also held against that host.
    """
    config, problems = _read(Path(path), host)
    if config is None or problems:
        raise ConfigError(problems)
    return config


def check(path: Path | str, host: HostLimits | None = None) -> list[Problem]:
    """Every problem that `load` would raise; none means that the file can be used."""
    return _read(Path(path), host)[1]


def _read(path: Path, host: HostLimits | None) -> tuple[Config | None, list[Problem]]:
    parsed = parse(path)
    return (None, [parsed]) if isinstance(parsed, Problem) else judge(path, parsed[0], host, parsed[1])


def parse(path: Path) -> tuple[dict[str, object], Mapping[Place, int]] | Problem:
    """The tables of a TOML file and the lines of their keys, or why there are none."""
    text, problem = _text(path)
    if problem is not None:
        return problem
    try:
        data: dict[str, object] = tomli.loads(text)
    except tomli.TOMLDecodeError as error:
        return _syntax(path, error.lineno, f"{error.msg}, column {error.colno}")
    except (RecursionError, ValueError) as error:
        # Nesting without end, or a number that int() refuses for its length.
        return _syntax(path, None, str(error) or "values nested too deeply")
    return data, locate(text)


def judge(path: Path, data: Mapping[str, object], host: HostLimits | None,
          lines: Mapping[Place, int] | None = None) -> tuple[Config | None, list[Problem]]:
    """The configuration that parsed TOML makes, or None with every problem of it.

    `path` names the file and its folder, where images are looked for; `lines` is `locate`'s answer.
    """
    return _Checker(path, lines or {}, data).run(host)


def _text(path: Path) -> tuple[str, Problem | None]:
    def fail(code: str, found: str, allowed: str, line: int | None = None) -> tuple[str, Problem]:
        return "", Problem(file=str(path), line=line, table="", key="", code=code, found=found,
                           allowed=allowed)

    try:
        with path.open("rb") as file:
            raw = file.read(FILE_MAX_BYTES + 1)
    except FileNotFoundError:
        return fail("file-missing", "no such file", "a TOML file")
    except IsADirectoryError:
        return fail("file-directory", "a directory", "a TOML file")
    except OSError as error:
        return fail("file-unreadable", f"a file that cannot be read ({error.strerror})",
                    "a TOML file that this user may read")
    if len(raw) > FILE_MAX_BYTES:
        return fail("file-too-large", f"more than {FILE_MAX_BYTES >> 20} MiB",
                    f"a TOML file of at most {FILE_MAX_BYTES >> 20} MiB")
    try:
        # Editors on Windows put a byte order mark first, which TOML does not know.
        return raw.decode("utf-8-sig").replace("\r\n", "\n"), None
    except UnicodeDecodeError as error:
        return fail("not-utf-8", f"byte {hex(raw[error.start])}, which is no UTF-8", "UTF-8 text",
                    raw.count(b"\n", 0, error.start) + 1)


def _syntax(path: Path, line: int | None, found: str) -> Problem:
    return Problem(file=str(path), line=line, table="", key="", code="syntax",
                   found=f"a syntax error: {found}", allowed="valid TOML")


class TableChecker:
    """The faults of one parsed file whose tables are [NAME] of `sections` and [[vm]]."""

    def __init__(self, path: Path, lines: Mapping[Place, int], data: Mapping[str, object],
                 sections: Mapping[str, type[BaseModel]]) -> None:
        self.path = path
        self.data = data
        self.lines = lines
        self.sections = sections
        self.problems: list[Problem] = []
        self.context = {BASE_CONTEXT: path.parent}

    def unknown_tables(self) -> None:
        known = (*self.sections, "vm")
        for key in self.data:
            if key not in known:
                tables = ", ".join(f"[{section}]" for section in self.sections)
                self.add(Finding((key,), "unknown-key", f"unknown table or key {_show(key)}",
                                 f"{tables} and [[vm]]", _near(key, known)))

    def names(self) -> dict[int, str]:
        """The names of all [[vm]] tables that have one, the faulty included."""
        tables = self.data.get("vm")
        found: dict[int, str] = {}
        for index, table in enumerate(cast("list[object]", tables)
                                      if isinstance(tables, list) else []):
            name = cast("dict[str, object]", table).get("name") if isinstance(table, dict) else None
            if isinstance(name, str):
                found[index] = name
        return found

    def validate(self, at: Place, model: type[BaseModel], table: object) -> BaseModel | None:
        """The table as its model, or None after its faults are noted."""
        if not isinstance(table, dict):
            self.add(Finding(at, "not-a-table", _show(table), "a table"))
            return None
        try:
            return model.model_validate(table, context=self.context)
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                self.add(_finding(at, model, cast("Mapping[str, Any]", detail)))
            return None

    def add(self, finding: Finding) -> None:
        length = 2 if finding.at[0] == "vm" else 1 if finding.at[0] in self.sections else 0
        self.problems.append(Problem(
            file=str(self.path), line=self.line(finding.at), table=self.table(finding.at),
            key=".".join(_key(part) for part in finding.at[length:]),
            code=finding.code, found=finding.found, allowed=finding.allowed,
            suggestion=finding.suggestion))

    def line(self, at: Place) -> int | None:
        """The line of the place, or of the nearest table around it that the file has."""
        for length in range(len(at), 0, -1):
            if at[:length] in self.lines:
                return self.lines[at[:length]]
        return None

    def table(self, at: Place) -> str:
        if at[0] != "vm":
            return f"[{at[0]}]" if at[0] in self.sections else ""
        if len(at) < 2:
            return "[[vm]]"
        index = cast("int", at[1])
        name = self.names().get(index)
        return f"[[vm]] #{index + 1}" + ("" if name is None else f" {_show(name)}")


class _Checker(TableChecker):
    """One pass over one parsed file."""

    def __init__(self, path: Path, lines: Mapping[Place, int],
                 data: Mapping[str, object]) -> None:
        super().__init__(path, lines, data, _SECTIONS)
        self.faulty: dict[int, frozenset[str]] = {}      # of a [[vm]]: keys that are wrong

    def run(self, host: HostLimits | None) -> tuple[Config | None, list[Problem]]:
        self.unknown_tables()
        sections = {key: self.validate((key,), model, self.data.get(key, {}))
                    for key, model in _SECTIONS.items()}
        vms = self.vms()
        section = sections["host"] or self.sound_part(
            ("host",), HostConfig, self.data.get("host"))
        host_config = section if isinstance(section, HostConfig) else None
        for finding in self.judged(host_config, vms, host):
            if not self.rests_on_a_fault(finding):
                self.add(finding)
        self.problems.sort(key=lambda problem: problem.line or 0)
        if self.problems:
            return None, self.problems
        config = Config.model_validate(
            {**sections, "vm": tuple(vms.values()), "path": self.path})
        return config, []

    def judged(self, host_config: HostConfig | None, vms: Mapping[int, VmConfig],
               host: HostLimits | None) -> Iterator[Finding]:
        yield from findings(host_config, vms, self.names())
        if host is not None:
            yield from host_findings(host_config, vms, host)
        yield from image_findings(vms, {
            index: look_at(vm.boot.image) for index, vm in vms.items()
            if vm.boot.image is not None})
        yield from disk_findings(vms, look_at)
        yield from module_findings({
            (index, number): (path, look_at(path)) for index, vm in vms.items() if isinstance(vm.boot, MultibootBoot)
            for number, path in enumerate(vm.boot.module_files)})

    def rests_on_a_fault(self, finding: Finding) -> bool:
        if finding.at[0] != "vm" or len(finding.at) < 3:
            return False
        faulty = self.faulty.get(cast("int", finding.at[1]), frozenset[str]())
        return not faulty.isdisjoint((str(finding.at[2]), *finding.rests_on))

    def vms(self) -> dict[int, VmConfig]:
        """The [[vm]] tables by index, without their faulty keys; absent if that leaves no VM."""
        tables = self.data.get("vm", [])
        if not isinstance(tables, list):
            found = "one [vm] table" if isinstance(tables, dict) else _show(tables)
            self.add(Finding(("vm",), "not-tables", found, "[[vm]] tables, one for each VM",
                             "write [[vm]]"))
            return {}
        sound: dict[int, VmConfig] = {}
        for index, table in enumerate(cast("list[object]", tables)):
            at = ("vm", index)
            vm = self.validate(at, VmConfig, table) or self.sound_part(at, VmConfig, table)
            if isinstance(vm, VmConfig):
                sound[index] = vm
        return sound

    def sound_part(self, at: Place, model: type[BaseModel], table: object) -> BaseModel | None:
        """What is left of a faulty table without its faulty keys, to judge the rest with."""
        if not isinstance(table, dict):
            return None
        keys = {problem.key.split(".")[0] for problem in self.problems
                if problem.table == self.table(at)}
        if at[0] == "vm":
            self.faulty[cast("int", at[1])] = frozenset(keys)
        elif "cpus" in keys:
            return None            # which CPUs VMs may use is then unknown
        if "cpus" in keys:
            keys.add("reservation")        # on which CPUs is unknown: it is in no sum
        rest = {key: value for key, value in cast("dict[str, object]", table).items()
                if key not in keys}
        try:
            return model.model_validate(
                {"name": "unnamed", **rest} if at[0] == "vm" else rest, context=self.context)
        except ValidationError:
            return None            # its boot is faulty; that is told already


def look_at(image: Path) -> ImageFacts:
    """What a boot image is; opened for reading only where it is a regular file."""
    try:
        status = image.stat()
        if stat.S_ISDIR(status.st_mode):
            return ImageFacts("directory")
        if not stat.S_ISREG(status.st_mode):
            return ImageFacts("special")           # opening a FIFO would wait for ever
        with image.open("rb"):
            return ImageFacts("file", status.st_size, writable=os.access(image, os.W_OK))
    except (FileNotFoundError, NotADirectoryError):
        return ImageFacts("missing")
    except OSError as error:
        return ImageFacts("unreadable", detail=error.strerror or str(error))


# ---- from pydantic's words to ours -----------------------------------------------------------

_TYPES: Final = {
    "int_type": "a whole number", "bool_type": "true or false", "string_type": "text in quotes",
    "model_type": "a table", "string_too_short": "at least one character",
    "string_too_long": "at most 63 characters",
}


def _finding(at: Place, model: type[BaseModel], detail: Mapping[str, Any]) -> Finding:
    """One pydantic error of the table at `at`."""
    parts: tuple[str | int, ...] = detail["loc"]
    for part in parts:
        if isinstance(part, str) and part.startswith(TAG_PREFIX):
            model = _BOOTS[part.removeprefix(TAG_PREFIX)]
    if len(parts) > 2 and parts[0] == "disks":
        model = DiskConfig
    way = tuple(part for part in parts
                if not (isinstance(part, str) and part.startswith(TAG_PREFIX)))
    place = (*at, *way)
    key = str(way[-1]) if way else ""
    kind: str = detail["type"]
    value: object = detail["input"]
    context: Mapping[str, Any] = detail.get("ctx", {})
    if kind == "extra_forbidden":
        keys = tuple(model.model_fields)
        return Finding(place, "unknown-key", f"unknown key {_show(key)}", ", ".join(keys),
                       _near(key, keys))
    if kind == "missing":
        field = model.model_fields.get(key)
        what = BOOT_ALLOWED if key == "boot" else (
            (field.description or "").rstrip(".") if field else "a value")
        return Finding(place, "missing-key", "nothing", what[:1].lower() + what[1:])
    if kind == "literal_error":
        words = tuple(re.findall(r"'([^']*)'", context["expected"]))
        return Finding(place, "not-allowed", _show(value), context["expected"].replace("'", '"'),
                       _near_value(key, value, words))
    if kind == "not_allowed":
        words = tuple(GUESTS) if key == "guest" else ()
        suggestion = _near(str(value), words) if words else None
        if key == "boot":
            suggestion = _near_boot(value)
        return Finding(place, "not-allowed", _show(value), context["allowed"], suggestion)
    # A type or length fault; pydantic's own sentence for one that has no words here.
    return Finding(place, "wrong-type" if kind.endswith("_type") else "not-allowed", _show(value),
                   _TYPES.get(kind, str(detail["msg"])))


_ARCH_WORDS: Final = {
    "x86_64": 'write arch = "x86" and bits = 64', "amd64": 'write arch = "x86" and bits = 64',
    "i386": 'write arch = "x86" and bits = 32', "i686": 'write arch = "x86" and bits = 32',
    "arm64": 'did you mean "aarch64"?',
}
_OTHER_WORDS: Final = {
    "hw": "hardware", "kvm": "hardware", "sw": "software", "emulation": "software",
    "tcg": "software", "unicorn": "software", "never": "no", "onfailure": "on-failure",
}


def _near_value(key: str, value: object, words: Sequence[str]) -> str | None:
    """A word that was probably meant: another name for it, or a near miss."""
    if not isinstance(value, str):
        return None
    if key == "arch" and value.lower() in _ARCH_WORDS:
        return _ARCH_WORDS[value.lower()]
    other = _OTHER_WORDS.get(value.lower())
    return f'did you mean "{other}"?' if other in words else _near(value, words)


def _near_boot(value: object) -> str | None:
    """A misspelt kind of boot among the keys of the inline table."""
    names = [str(name) for name in cast("dict[object, object]", value)] if isinstance(
        value, dict) else []
    return next((near for name in names if (near := _near(name, BOOT_KINDS))), None)


def _near(word: str, words: Sequence[str]) -> str | None:
    """`did you mean "weight"?` for a misspelt word, None where nothing is near."""
    close = difflib.get_close_matches(word.lower().replace("-", "_"),
                                      [w.replace("-", "_") for w in words], 1, 0.6)
    if not close:
        return None
    original = next(w for w in words if w.replace("-", "_") == close[0])
    return None if original == word else f'did you mean "{original}"?'


def _key(part: str | int) -> str:
    """A key as TOML would write it: quoted where it is not plain, so that it stays on its line."""
    return str(part) if re.fullmatch(r"[A-Za-z0-9_-]+", str(part)) else _show(part)


def _show(value: object) -> str:
    """A value as TOML would write it, cut to a readable length."""
    text: str
    if isinstance(value, bool):
        text = str(value).lower()
    elif isinstance(value, str):
        text = '"' + value.encode("unicode_escape").decode().replace('"', '\\"') + '"'
    elif isinstance(value, dict):
        pairs = cast("dict[object, object]", value).items()
        text = "{ " + ", ".join(f"{name} = {_show(item)}" for name, item in pairs) + " }"
        text = text if pairs else "{}"
    elif isinstance(value, list):
        text = "[" + ", ".join(_show(item) for item in cast("list[object]", value)) + "]"
    else:
        text = str(value)
    return text if len(text) <= FOUND_MAX_CHARS else text[:FOUND_MAX_CHARS - 3] + "..."
