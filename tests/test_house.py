"""The house itself: layers, wheel and tree agree, nothing of one machine in it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tomli

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomli.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = PROJECT["tool"]["setuptools"]["package-dir"]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    into = tmp_path_factory.mktemp("wheel")
    # A copy: setuptools writes build/ and *.egg-info beside what it builds.
    tree = tmp_path_factory.mktemp("tree") / "src"
    subprocess.run(["git", "-C", str(ROOT), "rev-parse"], check=True)
    files = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard", "-z"],
                           check=True, capture_output=True).stdout.decode().split("\0")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(into), str(tree)],
                   check=True, timeout=300)
    return next(into.glob("*.whl"))


def test_the_wheel_holds_every_module_of_the_tree_and_nothing_else(wheel):
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}
    tree = set()
    for package, folder in FOLDERS.items():
        for module in (ROOT / folder).glob("*.py"):
            tree.add(f"{package.replace('.', '/')}/{module.name}")
    rooms = {folder.split("/")[0] for folder in FOLDERS.values()}
    unlisted = {str(path.parent.relative_to(ROOT)) for room in rooms for path in (ROOT / room).rglob("*.py")
                if "__pycache__" not in path.parts} - set(FOLDERS.values())
    assert not unlisted, "folders with modules that pyproject.toml does not list"
    assert packed == tree


def test_the_wheel_holds_its_data_files(wheel):
    packed = {Path(name).name for name in zipfile.ZipFile(wheel).namelist()}
    for folder, pattern in (("config/examples", "*.toml"), ("vm/guests", "*.bin"), ("vm/guests", "*.asm"),
                            ("metrics/dashboards", "*.json")):
        names = {path.name for path in (ROOT / folder).glob(pattern)}
        assert names, f"no {pattern} in {folder}"
        assert names <= packed


def test_an_installed_wheel_works_outside_the_checkout(wheel, tmp_path):
    site = tmp_path / "site"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site),
                    str(wheel)], check=True, timeout=300)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    answer = subprocess.run(
        [sys.executable, "-c",
         "import mixvisor.cli.main as m, mixvisor.vm.guests as g; print(m.__file__); print(len(g.image('hello')))"],
        cwd=tmp_path, env=environment, check=True, capture_output=True, text=True, timeout=60)
    file, length = answer.stdout.split()
    assert file.startswith(str(site))
    assert int(length) > 0


def test_imports_point_one_way_and_decisions_are_pure():
    answer = subprocess.run([str(Path(sys.executable).with_name("lint-imports")), "--no-cache"], cwd=ROOT,
                            capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stdout


def test_no_module_imports_by_a_bare_top_level_name():
    """A bare `sched` would be the standard library's."""
    rooms = {folder.split("/")[0] for folder in FOLDERS.values()}
    bad = []
    for room in rooms:
        for module in (ROOT / room).rglob("*.py"):
            for line in module.read_text().splitlines():
                words = line.split()
                if len(words) > 1 and words[0] in ("import", "from") and words[1].split(".")[0] in rooms:
                    bad.append(f"{module}: {line}")
    assert not bad


def test_the_generated_parts_of_the_documentation_are_fresh():
    answer = subprocess.run([sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0, f"{answer.stdout}run `make docs`"


def test_every_link_of_the_documentation_leads_somewhere():
    broken = []
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.name}: {target}")
    assert not broken
