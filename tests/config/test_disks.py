from __future__ import annotations

import pytest

from mixvisor.config.disks import disk_findings
from mixvisor.config.load import check, load
from mixvisor.config.rules import ImageFacts


def problems(folder, text):
    file = folder / "lab.toml"
    file.write_text(text)
    return [(problem.key, problem.code) for problem in check(file)]


def vm(name, boot, rest=""):
    return f'[[vm]]\nname = "{name}"\nboot = {{ {boot} }}\n{rest}\n'


@pytest.fixture
def folder(tmp_path):
    for name, size in (("a.img", 1 << 20), ("b.img", 368_640), ("c.img", 8 << 20), ("d.img", 9 << 20)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
    return tmp_path


def test_a_boot_disk_is_read_only_unless_the_file_says_otherwise(folder):
    (folder / "lab.toml").write_text(
        vm("plain", 'disk = "a.img"')
        + vm("keeps", 'disk = "a.img", writable = "overlay", overlay = "work.overlay"',
             'disks = [{ disk = "c.img", writable = "overlay" }, { disk = "d.img", writable = "yes", type = "hard" }]'))
    plain, keeps = load(folder / "lab.toml").vms
    assert plain.boot.writable == "no"
    assert keeps.boot.overlay == folder / "work.overlay"
    assert [disk.disk.name for disk in keeps.drives] == ["a.img", "c.img", "d.img"]
    assert [disk.is_floppy(1 << 20) for disk in keeps.drives] == [True, True, False]


@pytest.mark.parametrize(("boot", "rest", "expected"), [
    ('disk = "a.img", writable = "maybe"', "", [("boot.writable", "not-allowed")]),
    ('disk = "a.img", overlay = "x"', "", [("boot", "not-allowed")]),
    ('disk = "a.img", writable = "yes", overlay = "x"', "", [("boot", "not-allowed")]),
    ('disk = "a.img", writable = "overlay", overlay = "nowhere/x"', "", [("boot.overlay", "overlay-folder-missing")]),
    ('disk = "a.img", writable = "overlay", overlay = "."', "", [("boot.overlay", "overlay-not-writable")]),
    ('disk = "c.img", type = "floppy"', "", [("boot.type", "floppy-too-large")]),
    ('disk = "a.img"', 'disks = [{ disk = "no.img" }]', [("disks.0.disk", "image-missing")]),
    ('disk = "a.img"', 'disks = [{ disk = "b.img", write = "yes" }]', [("disks.0.write", "unknown-key")]),
    ('disk = "a.img"', 'disks = [{ disk = "b.img" }, { disk = "b.img" }]', [("disks.1.disk", "too-many-drives")]),
    ('disk = "c.img"', 'disks = [{ disk = "d.img" }, { disk = "a.img", type = "hard" }]',
     [("disks.1.disk", "too-many-drives")]),
    ('flat = "a.img"', 'disks = [{ disk = "c.img" }]', [("disks", "disks-without-bios")]),
    ('disk = "a.img", writable = "yes"', 'disks = [{ disk = "a.img" }]', [("disks.0.disk", "file-shared")]),
])
def test_each_fault_of_a_disk_is_told_with_its_place(folder, boot, rest, expected):
    assert problems(folder, vm("dos", boot, rest + '\nmemory = "64M"')) == expected


def test_two_vms_may_read_one_image_and_never_write_what_the_other_uses(folder):
    overlay = 'disk = "a.img", writable = "overlay", overlay = '
    good = vm("one", 'disk = "a.img"') + vm("two", overlay + '"2.ovl"') + vm("three", overlay + '"3.ovl"')
    assert problems(folder, good) == []
    assert problems(folder, good + vm("four", 'disk = "a.img", writable = "yes"')) == [("boot.disk", "file-shared")]
    assert problems(folder, good + vm("four", overlay + '"2.ovl"')) == [("boot.overlay", "file-shared")]


def test_an_image_that_this_user_may_not_write_is_told(folder):
    (folder / "lab.toml").write_text(vm("dos", 'disk = "a.img", writable = "yes"'))
    vms = dict(enumerate(load(folder / "lab.toml").vms))
    found = list(disk_findings(vms, lambda _path: ImageFacts("file", 1 << 20, writable=False)))
    assert [(finding.at, finding.code) for finding in found] == [(("vm", 0, "boot", "writable"), "image-not-writable")]
