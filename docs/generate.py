"""Write the parts of the documentation that come from the code: `python docs/generate.py [--check]`.

A page holds a generated part between `<!-- generated: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mixvisor.config.model import format_size
from mixvisor.config.scenario import Scenario
from mixvisor.config.schema import json_schema
from mixvisor.service.warnings import sections
from mixvisor.vm.engines.kvm.exits import table
from mixvisor.vm.engines.software.quirks import listed
from mixvisor.vm.lifecycle import diagram
from mixvisor.vm.modes import rules_table

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("ARCHITECTURE.md", "docs/modes.md", "docs/configuration.md", "docs/simulator.md", "docs/warnings.md",
         "docs/engine-kvm.md", "docs/engine-software.md")
PART = re.compile(r"(<!-- generated: ([a-z-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def _allowed(key: dict[str, Any]) -> str:
    """The values of a key in words, from its schema."""
    types = {choice.get("type") for choice in key.get("anyOf", ())}
    if "array" in types:
        return "host CPUs"
    if key.get("type") == "array":
        return "a list"
    if {"string", "integer"} <= types:
        return "a size"
    if "const" in key:
        return f"`{key['const']}`"
    for choice in (key, *key.get("anyOf", ())):
        if "enum" in choice:
            return " ".join(f"`{value}`" for value in choice["enum"])
        if "minimum" in choice and choice.get("type") == "integer":
            return f"{choice['minimum']} to {choice['maximum']}" if "maximum" in choice else f"from {choice['minimum']}"
        if choice.get("type") in ("boolean", "number"):
            return "`true` `false`" if choice["type"] == "boolean" else "a number"
    if any("$ref" in choice for choice in (key, *key.get("anyOf", ()), *key.get("oneOf", ()))):
        return "a table"
    return "text"


def _rows(table: dict[str, Any]) -> list[str]:
    needed = table.get("required", ())
    rows = ["| key | values | default | meaning |", "|---|---|---|---|"]
    for name, key in table["properties"].items():
        default = key.get("default")
        if isinstance(default, int) and _allowed(key) == "a size":
            default = format_size(default)
        shown = "needed" if name in needed else "" if default is None else f"`{_toml(default)}`"
        meaning = key.get("description", "").replace("|", "\\|")
        rows.append(f"| `{name}` | {_allowed(key)} | {shown} | {meaning} |")
    return rows


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def configuration() -> str:
    """A table of keys for each table of the file."""
    schema = json_schema()
    definitions = schema["$defs"]
    titles = {"HostConfig": "[host]", "SchedulerConfig": "[scheduler]", "MetricsConfig": "[metrics]",
              "VmConfig": "[[vm]]", "DiskBoot": "boot = { disk = ... }",
              "DiskConfig": "disks = [{ disk = ... }]", "FlatBoot": "boot = { flat = ... }",
              "MultibootBoot": "boot = { multiboot = ... }", "ModuleConfig": "modules of boot = { multiboot = ... }",
              "GuestBoot": "boot = { guest = ... }", "RomBoot": "boot = { rom = ... }"}
    lines: list[str] = []
    for name, title in titles.items():
        lines += [f"## `{title}`", "", *_rows(definitions[name]), ""]
    return "\n".join(lines)


def scenario() -> str:
    """The same for a scenario of the simulator."""
    definitions = Scenario.model_json_schema(by_alias=True)["$defs"]
    titles = {"SimulationConfig": "[simulation]", "ScenarioHost": "[host]", "CostConfig": "[costs]",
              "ScenarioVm": "[[vm]]"}
    lines: list[str] = []
    for name, title in titles.items():
        lines += [f"### `{title}`", "", *_rows(definitions[name]), ""]
    return "\n".join(lines)


def quirks_table() -> str:
    """The defects of Unicorn that are worked around, from vm/engines/software/quirks.py."""
    rows = [f"| `{name}` | {text.replace('|', chr(92) + '|')} |" for name, text in listed()]
    return "\n".join(["| name | the defect, and what is done |", "|---|---|", *rows, ""])


PARTS = {
    "quirks": quirks_table,
    "life-cycle": lambda: f"```mermaid\n{diagram()}```\n",
    "mode-rules": rules_table,
    "configuration": configuration,
    "scenario": scenario,
    "warnings": sections,
    "kvm-exits": table,
}


def renew(text: str) -> str:
    return PART.sub(lambda match: f"{match[1]}{PARTS[match[2]]()}{match[4]}", text)


def main() -> int:
    stale = []
    for name in PAGES:
        page = ROOT / name
        old = page.read_text()
        new = renew(old)
        if old != new:
            stale.append(name)
            if "--check" not in sys.argv:
                page.write_text(new)
    if stale:
        print(("stale: " if "--check" in sys.argv else "written: ") + ", ".join(stale))
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
