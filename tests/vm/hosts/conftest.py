"""Hosts that are not at hand: `host("vt-x")` is a folder made from tests/vm/hosts/vt-x.tree.

A tree is a text. Its first line says what the host is; each part begins with a line `== `:

    == proc/cpuinfo                         the lines that follow are the file
    == register 0xC0000080                  ... are a number: /dev/cpu/0/msr has it there
    == process 2345 1 VBoxHeadless /dev/x   a process with pid, parent, name and open files (`hidden`:
                                            its files may not be looked at)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


def parts(text: str) -> Iterator[tuple[str, str]]:
    for part in text.split("\n== ")[1:]:
        head, _, body = part.partition("\n")
        yield head.strip(), body + ("\n" if body and not body.endswith("\n") else "")


def build(name: str, root: Path) -> Path:
    """Write the tree below `root`."""
    root.mkdir(parents=True, exist_ok=True)
    for head, body in parts((FOLDER / f"{name}.tree").read_text()):
        words = head.split()
        if words[0] == "register":
            path = root / "dev/cpu/0/msr"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("r+b" if path.exists() else "wb") as file:     # sparse: costs nothing
                file.seek(int(words[1], 16))
                file.write(int(body, 16).to_bytes(8, "little"))
        elif words[0] == "process":
            process(root, int(words[1]), int(words[2]), words[3], words[4:])
        else:
            path = root / head
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(body)
    return root


def process(root: Path, pid: int, parent: int, name: str, files: list[str]) -> None:
    folder = root / f"proc/{pid}"
    folder.mkdir(parents=True)
    (folder / "stat").write_text(f"{pid} ({name[:15]}) S {parent} {pid} {pid} 0 -1 4194304\n")
    if files != ["hidden"]:
        (folder / "fd").mkdir()
        for number, target in enumerate(files):
            (folder / f"fd/{number}").symlink_to(target)


@pytest.fixture
def host(tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: build(name, tmp_path / name)
