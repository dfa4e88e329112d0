"""The values of single keys, the schema and the examples."""

from __future__ import annotations

import importlib.resources
from pathlib import Path
from typing import Any

import pytest
import tomli
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mixvisor.config.load import HostLimits, check, load
from mixvisor.config.model import (
    GUESTS,
    Config,
    GuestBoot,
    format_cpus,
    format_size,
    parse_cpus,
    parse_size,
)
from mixvisor.config.schema import json_schema
from mixvisor.vm import guests

EXAMPLES = sorted(
    entry.name for entry in importlib.resources.files("mixvisor.config.examples").iterdir()
    if entry.name.endswith(".toml") and not entry.name.startswith("simulate-"))     # those: test_scenario.py


@pytest.mark.parametrize(("text", "size"), [
    ("640K", 640 << 10), ("16M", 16 << 20), ("1g", 1 << 30), ("64KiB", 64 << 10), ("512", 512),
    ("2 MB", 2 << 20), (4096, 4096),
])
def test_a_size_is_read_as_people_write_it(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "1.5M", "-1", -1, True, 1.0, "16 X", None, "1_000"])
def test_what_is_no_size_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="a size such as"):
        parse_size(text)


@given(st.integers(0, 1 << 45))
def test_a_size_survives_being_written_and_read(size: int) -> None:
    assert parse_size(format_size(size)) == size


@given(st.sets(st.integers(0, 8191), min_size=1, max_size=40))
def test_a_cpu_list_survives_being_written_and_read(cpus: set[int]) -> None:
    assert parse_cpus(format_cpus(cpus)) == parse_cpus(list(cpus)) == tuple(sorted(cpus))


def test_a_configuration_never_changes() -> None:
    config = Config()
    with pytest.raises(ValidationError):
        config.scheduler.slice_us = 1  # type: ignore[misc]


def test_the_guests_of_the_file_are_the_guests_that_exist() -> None:
    assert set(GUESTS) == set(guests.BUILTIN)
    for name, info in GUESTS.items():
        guest = guests.BUILTIN[name]
        assert info.bits == guest.bits, name
        assert set(info.parameters) == set(guest.params), name
        assert info.progress == (guest.progress is not None), name
        assert info.memory_bytes({}) == guests.memory_needed(name, {}), name


def test_a_parameter_that_the_file_may_have_is_one_that_the_guest_takes() -> None:
    for values in ({"working_set": 4096}, {"working_set": 1 << 30}):
        boot = GuestBoot.model_validate({"guest": "randmem", **values})
        assert guests.pokes("randmem", boot.parameters)
        assert GUESTS["randmem"].memory_bytes(boot.parameters) == guests.memory_needed(
            "randmem", boot.parameters)
    for batch in (1, 1_000_000_000):
        boot = GuestBoot.model_validate({"guest": "portio", "batch": batch})
        assert guests.pokes("portio", boot.parameters)


# ---- examples --------------------------------------------------------------------------------

def test_the_examples_are_there() -> None:
    assert {"demo.toml", "first.toml", "ci-host.toml"} <= set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_can_be_used(tmp_path: Path, name: str) -> None:
    text = importlib.resources.files("mixvisor.config.examples").joinpath(name).read_text()
    (tmp_path / name).write_text(text)
    (tmp_path / "disk.img").write_bytes(bytes(512))
    assert check(tmp_path / name, HostLimits((0, 1, 2, 3), 8 << 30)) == []
    assert load(tmp_path / name).vms


def test_the_demo_has_two_vms_of_each_mode_with_the_weights_of_the_banner(tmp_path: Path) -> None:
    with importlib.resources.as_file(
            importlib.resources.files("mixvisor.config.examples") / "demo.toml") as path:
        vms = load(path).vms
    assert [vm.weight for vm in vms] == [100, 100, 200, 400]
    assert sorted(vm.mode for vm in vms) == ["hardware", "hardware", "software", "software"]


# ---- schema ----------------------------------------------------------------------------------

def objects(schema: dict[str, Any]) -> list[dict[str, Any]]:
    return [schema, *schema["$defs"].values()]


def test_every_key_of_the_schema_has_a_description() -> None:
    schema = json_schema()
    for table in objects(schema):
        for key, value in table["properties"].items():
            # A table's own description need not be said again where it is referred to.
            target = schema["$defs"].get(value.get("$ref", "").rsplit("/", 1)[-1], {})
            assert value.get("description") or target.get("description"), key


def test_the_schema_forbids_unknown_keys_and_has_the_file_s_names() -> None:
    schema = json_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert set(schema["properties"]) == {"host", "scheduler", "metrics", "vm"}
    assert all(table["additionalProperties"] is False for table in objects(schema))


def accepts(schema: dict[str, Any], root: dict[str, Any], value: object) -> bool:
    """As much of JSON Schema as pydantic writes; an unknown word fails the test."""
    import re
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}
    for word, rule in schema.items():
        match word:
            case "$ref":
                good = accepts(root["$defs"][rule.rsplit("/", 1)[1]], root, value)
            case "type":
                good = isinstance(value, kinds[rule]) and (
                    rule == "boolean" or not isinstance(value, bool))
            case "anyOf" | "oneOf":
                good = any(accepts(item, root, value) for item in rule)
            case "enum":
                good = value in rule
            case "const":
                good = value == rule
            case "minimum":
                good = isinstance(value, int) and value >= rule
            case "maximum":
                good = isinstance(value, int) and value <= rule
            case "pattern":
                good = isinstance(value, str) and re.search(rule, value) is not None
            case "minLength":
                good = isinstance(value, str) and len(value) >= rule
            case "maxLength":
                good = isinstance(value, str) and len(value) <= rule
            case "minItems":
                good = isinstance(value, list) and len(value) >= rule
            case "items":
                good = isinstance(value, list) and all(accepts(rule, root, v) for v in value)
            case "properties":
                good = isinstance(value, dict) and all(
                    accepts(rule[key], root, item) for key, item in value.items() if key in rule)
            case "required":
                good = isinstance(value, dict) and set(rule) <= set(value)
            case "additionalProperties":
                good = isinstance(value, dict) and set(value) <= set(schema["properties"])
            case "description" | "title" | "default" | "$defs" | "$id" | "$schema" | "uniqueItems":
                good = True
            case _:
                pytest.fail(f"the schema has a word that this test does not know: {word}")
        if not good:
            return False
    return True


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_follows_the_schema(name: str) -> None:
    text = importlib.resources.files("mixvisor.config.examples").joinpath(name).read_text()
    schema = json_schema()
    assert accepts(schema, schema, tomli.loads(text))


@pytest.mark.parametrize("line", [
    "weight = 0", 'memory = "16X"', 'cpus = "a"', 'mode = "hardwear"', "wieght = 1", "bits = 8",
    'name = "a b"', "autostart = 1",
])
def test_the_schema_refuses_what_the_models_refuse(line: str) -> None:
    head = '[[vm]]\nboot = { guest = "alu" }\n' + ("" if "name" in line else 'name = "a"\n')
    schema = json_schema()
    assert not accepts(schema, schema, tomli.loads(head + line))
    with pytest.raises(ValidationError):
        Config.model_validate(tomli.loads(head + line))
