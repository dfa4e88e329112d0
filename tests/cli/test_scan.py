"""`mixvisor scan`: the report for people and for programs, and what it says of bad input."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from mixvisor.cli import main as cli

SECTOR = bytes.fromhex("fa 0f2200 1e cd13 ee f4 ebfd").ljust(510, b"\0") + b"\x55\xAA"


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(SECTOR)
    return path


def run(*arguments):
    return CliRunner().invoke(cli._mixvisor, ["scan", *map(str, arguments)])


def test_the_report_names_class_count_and_address(image):
    result = run(image, "--for", "vt-x")
    assert result.exit_code == 0
    assert "boot-sector, 512 bytes, entered at 0x7c00 (boot sector, 16 bits)" in result.output
    row = next(line for line in result.output.splitlines() if "int n" in line)
    assert row.split() == ["sensitive", "int", "n", "real", "mode", "1", "0x7c05"]
    assert "Recommended on vt-x: hardware" in result.output


def test_json_has_counts_addresses_and_the_recommendation(image):
    data = json.loads(run(image, "-o", "json", "--for", "pvm").output)
    assert data["schema"] == 1
    assert data["counts"] == {"privileged": 3, "sensitive": 2, "io": 1, "revealing": 0, "esoteric": 0, "64-bit": 0}
    assert data["findings"][0]["addresses"] == [0x7C00]
    assert data["recommended"]["mode"] == "software"
    assert data["software"] == {"trap": 0, "patch": 0, "translate": data["instructions"], "cannot": 0}


def test_flat_code_says_its_mode_and_place(image):
    data = json.loads(run(image, "--bits", "32", "--base", "0x100000", "--entry", "0x100004", "-o", "json").output)
    assert data["entries"] == [{"bits": 32, "address": 0x10_0004, "what": "entry"}]


@pytest.mark.parametrize(("arguments", "code", "says"), [
    (["nothing.img"], 1, "nothing.img cannot be read: No such file or directory"),
    (["{image}", "--base", "here"], 2, "'here' is no address"),
    (["{image}", "--format", "elf"], 1, "this is no little-endian ELF file"),
    (["{image}", "--bits", "32", "--entry", "1"], 1, "--entry 0x1 is not within the image"),
])
def test_bad_input_is_one_clear_error(image, arguments, code, says):
    result = run(*(argument.format(image=image) for argument in arguments))
    assert result.exit_code == code
    assert says in result.output
    assert "Traceback" not in result.output
