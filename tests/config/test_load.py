"""A file is taken whole or refused with everything that is wrong with it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixvisor.config.load import ConfigError, HostLimits, Problem, check, judge, load
from mixvisor.config.model import GuestBoot, MultibootBoot, VmConfig

TWO_CPUS = HostLimits((0, 1), 1 << 30)


def written(folder: Path, text: str) -> Path:
    path = folder / "lab.toml"
    path.write_text(text)
    return path


def only(problems: list[Problem]) -> Problem:
    assert len(problems) == 1, [str(problem) for problem in problems]
    return problems[0]


def vm(extra: str, name: str = "a", boot: str = '{ guest = "alu" }') -> str:
    return f'[[vm]]\nname = "{name}"\nboot = {boot}\n{extra}\n'


def test_an_empty_file_is_a_configuration_of_defaults(tmp_path: Path) -> None:
    config = load(written(tmp_path, ""))
    assert config.vms == ()
    assert config.scheduler.slice_us == 5000
    assert config.metrics.address == ("127.0.0.1", 9736)
    assert config.path == tmp_path / "lab.toml"


def test_what_is_written_is_what_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "guest.bin").write_bytes(b"\xf4")
    config = load(written(tmp_path, '''
[host]
cpus = "0-1"
dispatch = "gentle"
[scheduler]
slice_us = 2000
[metrics]
listen = "[::1]:80"
[[vm]]
name = "flat.one"
boot = { flat = "guest.bin", bits = 32, load = 0x100000, entry = 0x100000 }
memory = "2M"
weight = 1
cpus = [1]
progress = 0x8000
[[vm]]
name = "walk"
boot = { guest = "randmem", working_set = "256K" }
'''), TWO_CPUS)
    flat, walk = config.vms
    assert flat.boot.image == tmp_path / "guest.bin"
    assert (flat.bits, flat.memory, flat.cpus, flat.progress) == (32, 2 << 20, (1,), 0x8000)
    assert isinstance(walk.boot, GuestBoot)
    assert walk.boot.parameters == {"working_set": 256 * 1024}
    assert (walk.bits, walk.progress, walk.console_kind) == (64, 0x20000, "none")
    assert config.host.cpus == (0, 1)
    assert config.metrics.address == ("::1", 80)


def test_all_errors_of_a_file_are_told_at_once_with_their_lines(tmp_path: Path) -> None:
    problems = check(written(tmp_path, '''\
[hots]
[scheduler]
slice_us = 7
[[vm]]
name = "dos"
wieght = 5
weight = 20000
boot = { guest = "alu" }
[[vm]]
name = "dos"
boot = { disk = "no.img" }
mode = "hardwear"
'''))
    assert [(p.line, p.table, p.key, p.code) for p in problems] == [
        (1, "", "hots", "unknown-key"),
        (3, "[scheduler]", "slice_us", "not-allowed"),
        (6, '[[vm]] #1 "dos"', "wieght", "unknown-key"),
        (7, '[[vm]] #1 "dos"', "weight", "not-allowed"),
        (10, '[[vm]] #2 "dos"', "name", "duplicate-name"),
        (11, '[[vm]] #2 "dos"', "boot.disk", "image-missing"),
        (12, '[[vm]] #2 "dos"', "mode", "not-allowed"),
    ]
    assert [p.suggestion for p in problems] == [
        'did you mean "host"?', None, 'did you mean "weight"?', None, None,
        None, 'did you mean "hardware"?']


@pytest.mark.parametrize("text", [
    vm('memory = "1X"\nprogress = 0x2000000'),               # outside the default memory
    vm("cap = -5\nreservation = 50"),
    vm("vcpus = 0\nreservation = 101"),
    vm('cpus = "x"\nreservation = 100') + vm("reservation = 100", "b")
    + vm("reservation = 100", "c"),
])
def test_nothing_is_told_that_rests_on_a_faulty_key(tmp_path: Path, text: str) -> None:
    # Three CPUs, two for VMs: room for two whole reservations and not for three.
    assert only(check(written(tmp_path, text), HostLimits((0, 1, 2), 1 << 30))).line == 4


def test_the_sound_keys_of_a_faulty_host_table_are_judged_too(tmp_path: Path) -> None:
    path = written(tmp_path, '[host]\ncpus = "7"\ndispatch = "precisely"\n')
    assert [(problem.line, problem.code) for problem in check(path, TWO_CPUS)] == [
        (2, "no-such-cpu"), (3, "not-allowed")]


def test_the_sound_keys_of_a_faulty_vm_are_judged_too(tmp_path: Path) -> None:
    problems = check(written(tmp_path, vm('weight = 0\nvcpus = 3\nmemory = "2G"')), TWO_CPUS)
    assert [problem.code for problem in problems] == [
        "not-allowed", "more-vcpus-than-cpus", "more-memory-than-host"]


def test_a_problem_reads_as_file_line_table_key_found_and_allowed(tmp_path: Path) -> None:
    path = written(tmp_path, vm("weight = 20000", "dos"))
    assert str(only(check(path))) == (
        f'{path}:4: [[vm]] #1 "dos": weight: found 20000, allowed: 1 to 10000')


def test_the_exception_carries_every_problem_and_prints_each(tmp_path: Path) -> None:
    path = written(tmp_path, vm("weight = 0\nvcpus = 0"))
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert [problem.key for problem in caught.value.problems] == ["weight", "vcpus"]
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(("line", "key", "found"), [
    ("weight = 0", "weight", "0"),
    ("weight = 10001", "weight", "10001"),
    ("weight = true", "weight", "true"),
    ('weight = "5"', "weight", '"5"'),
    ("autostart = 1", "autostart", "1"),
    ("vcpus = 0", "vcpus", "0"),
    ("cap = -1", "cap", "-1"),
    ('memory = "16X"', "memory", '"16X"'),
    ('memory = "3K"', "memory", '"3K"'),
    ("memory = 1048577", "memory", "1048577"),
    ('cpus = ""', "cpus", '""'),
    ('cpus = "3-1"', "cpus", '"3-1"'),
    ("cpus = []", "cpus", "[]"),
    ("cpus = [true]", "cpus", "[true]"),
    ('cpus = "0-99999"', "cpus", '"0-99999"'),
    ('restart = "sometimes"', "restart", '"sometimes"'),
    ("bits = 8", "bits", "8"),
    ('os = ""', "os", '""'),
    ("progress = 0x20004", "progress", "131076"),
    ("os = nan", "os", "nan"),
])
def test_a_value_that_is_not_allowed_is_found_at_its_line(
        tmp_path: Path, line: str, key: str, found: str) -> None:
    problem = only(check(written(tmp_path, vm(line))))
    assert (problem.line, problem.key, problem.found) == (4, key, found)
    assert problem.allowed


@pytest.mark.parametrize("name", ["", "a b", "-a", "a/b", "x" * 64, "..", "a\\n"])
def test_a_name_that_could_not_be_a_file_or_a_label_is_refused(tmp_path: Path, name: str) -> None:
    assert only(check(written(tmp_path, vm("", name)))).key == "name"


@pytest.mark.parametrize(("boot", "key"), [
    ("{}", "boot"),
    ('{ disk = "x", guest = "alu" }', "boot"),
    ('"alu"', "boot"),
    ('{ guest = "alx" }', "boot.guest"),
    ('{ guest = "alu", working_set = "256K" }', "boot.working_set"),
    ('{ guest = "randmem", working_set = "100K" }', "boot.working_set"),
    ('{ disk = "" }', "boot.disk"),
    ('{ disk = "x", bits = 16 }', "boot.bits"),
    ('{ flat = "x", bits = 8 }', "boot.bits"),
    ('{ rom = "x", post = 65536 }', "boot.post"),
    ('{ rom = "x", disk = "y" }', "boot"),
])
def test_each_fault_of_boot_is_one_problem(tmp_path: Path, boot: str, key: str) -> None:
    problem = only(check(written(tmp_path, vm("", boot=boot))))
    assert (problem.key, problem.line) == (key, 3)


def test_a_misspelt_kind_of_boot_is_recognised(tmp_path: Path) -> None:
    problem = only(check(written(tmp_path, vm("", boot='{ dsk = "x" }'))))
    assert problem.suggestion == 'did you mean "disk"?'


def test_control_characters_of_a_file_do_not_reach_the_terminal(tmp_path: Path) -> None:
    text = vm('"\\u001b[2J" = 1', "x\\n\\u001b[2J")
    for problem in check(written(tmp_path, text)):
        assert str(problem).isprintable()


def test_a_missing_key_is_told_at_its_table(tmp_path: Path) -> None:
    problem = only(check(written(tmp_path, '\n[[vm]]\nboot = { guest = "alu" }\n')))
    assert (problem.line, problem.code, problem.key) == (2, "missing-key", "name")


@pytest.mark.parametrize(("text", "code"), [
    ("[vm]\n", "not-tables"),
    ("vm = 3\n", "not-tables"),
    ("vm = [3]\n", "not-a-table"),
    ("host = 1\n", "not-a-table"),
    ("[[host]]\n", "not-a-table"),
])
def test_a_table_of_the_wrong_shape_is_told(tmp_path: Path, text: str, code: str) -> None:
    problem = only(check(written(tmp_path, text)))
    assert (problem.code, problem.line) == (code, 1)


# ---- the file itself -------------------------------------------------------------------------

def test_a_syntax_error_has_its_line(tmp_path: Path) -> None:
    problem = only(check(written(tmp_path, "[host]\n\ncpus = = 1\n")))
    assert (problem.code, problem.line) == ("syntax", 3)


@pytest.mark.parametrize("text", [
    "a = " + "[" * 5000, "a = " + "[" * 900 + "]" * 900, "a = " + "9" * 5000, "a = 1\na = 2"])
def test_a_malformed_file_is_a_problem_and_never_a_traceback(tmp_path: Path, text: str) -> None:
    assert only(check(written(tmp_path, text))).code in ("syntax", "unknown-key")


def test_a_file_that_is_not_utf_8_has_its_line(tmp_path: Path) -> None:
    path = tmp_path / "lab.toml"
    path.write_bytes(b"# one\n# two \xff\n")
    problem = only(check(path))
    assert (problem.code, problem.line) == ("not-utf-8", 2)


def test_line_ends_and_byte_order_mark_of_windows_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "lab.toml"
    path.write_bytes(b"\xef\xbb\xbf[host]\r\n\r\ndispatch = 1\r\n")
    assert only(check(path)).line == 3


def test_a_missing_file_a_directory_and_an_endless_one_are_told(tmp_path: Path) -> None:
    assert only(check(tmp_path / "none.toml")).code == "file-missing"
    assert only(check(tmp_path)).code == "file-directory"
    assert only(check("/dev/zero")).code == "file-too-large"


# ---- boot images -----------------------------------------------------------------------------

def test_each_fault_of_a_boot_image_is_its_own(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "short").write_bytes(b"x" * 511)
    (tmp_path / "good").write_bytes(b"x" * 512)
    (tmp_path / "big").write_bytes(b"x" * 0x10001)
    os.mkfifo(tmp_path / "fifo")
    text = "".join(
        vm("", f"d{index}", f'{{ disk = "{name}" }}') for index, name in
        enumerate(("missing", "empty", "folder", "short", "fifo", "good", "good/inside")))
    # 64K of memory above 0x0: an image of 64K + 1 fits nowhere, the same at half the size does.
    text += vm('memory = "128K"', "flat", '{ flat = "big", load = 0x10000 }')
    text += vm('memory = "192K"', "fits", '{ flat = "big", load = 0x10000 }')
    assert {problem.table.split('"')[1]: problem.code
            for problem in check(written(tmp_path, text))} == {
        "d0": "image-missing", "d1": "image-empty", "d2": "image-directory",
        "d3": "image-too-small", "d4": "image-special", "d6": "image-missing",
        "flat": "image-larger-than-memory",
    }


def test_a_kernel_has_its_modules_and_command_lines_with_the_names_first(tmp_path: Path) -> None:
    (tmp_path / "kernel.elf").write_bytes(b"x")
    (tmp_path / "env").touch()
    config = load(written(tmp_path, vm("", boot='{ multiboot = "kernel.elf", cmdline = "a b", modules = '
                                                '["env", { file = "env", cmdline = "x=1" }] }')))
    boot = config.vms[0].boot
    assert isinstance(boot, MultibootBoot)
    assert (config.vms[0].bits, config.vms[0].console_kind) == (32, "text")
    assert (boot.command_line, boot.module_lines) == ("kernel.elf a b", ["env", "env x=1"])
    assert boot.module_files == (tmp_path / "env", tmp_path / "env")


@pytest.mark.parametrize(("boot", "code", "key"), [
    ('{ multiboot = "none" }', "image-missing", "boot.multiboot"),
    ('{ multiboot = "k", modules = ["k", "none"] }', "image-missing", "boot.modules.1"),
    ('{ multiboot = "k", modules = [{ file = "k", x = 1 }] }', "unknown-key", "boot.modules.0.x"),
    ('{ multiboot = "k", modules = ["k", "k", "k", "k", "k", "k", "k", "k", "k"] }', "not-allowed", "boot.modules"),
    ('{ multiboot = "k", cmdline = "a\\nb" }', "not-allowed", "boot.cmdline"),
    ('{ multiboot = "k", flat = "k" }', "not-allowed", "boot"),
])
def test_each_fault_of_a_kernel_is_its_own(tmp_path: Path, boot: str, code: str, key: str) -> None:
    (tmp_path / "k").write_bytes(b"x")
    problem = only(check(written(tmp_path, vm("", boot=boot))))
    assert (problem.code, problem.key) == (code, key)


def test_an_image_that_may_not_be_read_is_told(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = tmp_path / "secret.img"
    image.write_bytes(b"x" * 512)
    path = written(tmp_path, vm("", boot='{ disk = "secret.img" }'))
    opened = Path.open

    def refuse(self: Path, *args: object, **kwargs: object) -> object:
        # Root may read every file: the system's answer to others is put in its place.
        if self == image:
            raise PermissionError(13, "Permission denied")
        return opened(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "open", refuse)
    problem = only(check(path))
    assert problem.code == "image-unreadable"
    assert "Permission denied" in problem.found


def test_an_image_exactly_as_large_as_the_room_above_its_address_is_accepted(
        tmp_path: Path) -> None:
    (tmp_path / "flat").write_bytes(b"x" * 0x10000)
    assert check(written(tmp_path, vm('memory = "128K"', boot='{ flat = "flat" }'))) == []


# ---- anything at all -------------------------------------------------------------------------

LEAVES = st.one_of(
    st.booleans(), st.integers(-5, 1 << 45), st.floats(allow_nan=True), st.dates(),
    st.text(max_size=8), st.sampled_from(["16M", "0-3", "alu", "randmem", "hardware", "none"]))
VALUES = st.recursive(LEAVES, lambda inner: st.one_of(
    st.lists(inner, max_size=3),
    st.dictionaries(st.sampled_from(
        ["disk", "flat", "guest", "working_set", "bits", "load", "x", ""]), inner, max_size=3)),
    max_leaves=5)
VM_KEYS = st.sampled_from([*VmConfig.model_fields, "wieght", ""])
DOCUMENTS = st.fixed_dictionaries({}, optional={
    "host": st.dictionaries(st.sampled_from(["cpus", "dispatch", "state_dir"]), VALUES),
    "metrics": st.dictionaries(st.sampled_from(["listen", "x"]), VALUES),
    "scheduler": VALUES, "vms": VALUES,
    "vm": st.one_of(VALUES, st.lists(st.dictionaries(VM_KEYS, VALUES), max_size=3)),
})


@given(DOCUMENTS)
@settings(max_examples=150, deadline=None)
def test_whatever_a_file_holds_it_is_loaded_or_refused_with_whole_sentences(
        document: dict[str, object]) -> None:
    config, problems = judge(Path("/nowhere/lab.toml"), document, TWO_CPUS)
    assert (config is None) == bool(problems)
    for problem in problems:
        assert problem.found
        assert problem.allowed
        assert str(problem).isprintable()
