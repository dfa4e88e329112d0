"""What the lab's hosts are made of: Debian packages and wheels that fit their Python, kept between runs.

Theory.  A folder of the cache is named by what is in it: the names and hashes of the packages that apt
would fetch now, the wheels with their versions and the Python they are for, the files of the project.
What is there need not be made; what changed has another name. A folder is built beside its place and
renamed into it, so one that is there is whole. The newest of each kind are kept.

Packages are resolved against an empty system, fetched and unpacked: nothing is installed on this
machine, and no rights are needed. The wheels are those versions that this very environment has
installed, fetched for the Python of the packages.

Invariant.  Nothing is written outside the cache. Everything that can be missing (apt, packages, the
registry of wheels, an emulator) raises `Missing` with what to do.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Final

from packaging.requirements import Requirement

__all__ = ["Missing", "Parts", "cache", "digest", "emulators_missing", "folder"]

ROOT: Final = Path(__file__).resolve().parents[2]
KEPT: Final = 3                                # of a kind of folder
COMMAND_SECONDS: Final = 600
# The kernel, a shell and modprobe, the boot loader and its parts, the firmware, and what writes the disk.
PACKAGES: Final = ("linux-image-cloud-amd64", "busybox-static", "isolinux", "syslinux-common", "seabios", "genisoimage")
TOOLS: Final = {"qemu-system-x86_64": "qemu-system-x86", "bochs-bin": "bochs bochs-term"}
PLATFORMS: Final = ("linux_x86_64", "manylinux1_x86_64", "manylinux2010_x86_64", "manylinux2014_x86_64",
                    *(f"manylinux_2_{minor}_x86_64" for minor in range(5, 36)))
TEST_TOOLS: Final = ("pytest", "pytest-trio", "hypothesis")


class Missing(Exception):
    """A part that this machine has not, and what to do about it."""


def emulators_missing(names: Iterable[str]) -> str | None:
    """Why these emulators ("qemu", "bochs") cannot be started here; None where they can."""
    programs = {"qemu": "qemu-system-x86_64", "bochs": "bochs-bin"}
    absent = [TOOLS[programs[name]] for name in sorted(set(names)) if shutil.which(programs[name]) is None]
    return f"not installed: the Debian packages {' '.join(absent)}" if absent else None


def cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "mixvisor-lab"


def digest(parts: Iterable[str | bytes]) -> str:
    whole = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        whole.update(len(data).to_bytes(8, "little") + data)
    return whole.hexdigest()[:16]


def folder(kind: str, key: str, build: Callable[[Path], None]) -> Path:
    """The folder of the cache with this content, built now if it is not there."""
    base = cache()
    base.mkdir(parents=True, exist_ok=True)
    place = base / f"{kind}-{key}"
    with (base / f".{kind}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)           # two runs at once: the second finds it built
        if not place.is_dir():
            unfinished = base / f".{kind}-unfinished"
            _remove(unfinished)
            unfinished.mkdir()
            try:
                build(unfinished)
                unfinished.rename(place)
            finally:
                _remove(unfinished)
        os.utime(place)
        kept = sorted(base.glob(f"{kind}-*"), key=lambda path: path.stat().st_mtime, reverse=True)
        for old in kept[KEPT:]:
            _remove(old)
    return place


def _remove(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path)


def run(words: Sequence[str | os.PathLike[str]], what: str, remedy: str = "", **options: object) -> str:
    """The output of a command; `Missing` with its last words where it fails."""
    try:
        done = subprocess.run([os.fspath(word) for word in words], stdin=subprocess.DEVNULL, capture_output=True,
                              text=True, timeout=COMMAND_SECONDS, **options)      # type: ignore[call-overload]
    except FileNotFoundError as error:
        raise Missing(f"{what}: this machine has no {words[0]} {remedy}".rstrip()) from error
    except subprocess.TimeoutExpired as error:
        raise Missing(f"{what}: {words[0]} took longer than {COMMAND_SECONDS} s") from error
    if done.returncode != 0:
        said = " ".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-3:])
        raise Missing(f"{what}: {said or f'{words[0]} failed'} {remedy}".rstrip())
    return done.stdout


# ---- Debian packages -------------------------------------------------------------------------

def _apt(scratch: Path, packages: Sequence[str], *options: str) -> str:
    """apt-get install for a system that has nothing, which fetches or only tells, and installs nothing."""
    status, archives = scratch / "status", scratch / "archives"
    archives.joinpath("partial").mkdir(parents=True, exist_ok=True)
    status.touch()
    return run(["apt-get", "install", "-qq", "-y", "--no-install-recommends", *options,
                "-o", f"Dir::State::status={status}", "-o", f"Dir::Cache::archives={archives}",
                "-o", "Debug::NoLocking=1", "-o", "APT::Sandbox::User=root", *packages],
               "the packages of the lab cannot be had", "(the lab is made of Debian's packages; try apt-get update)")


def _python_packages() -> tuple[str, ...]:
    """Debian's present Python, as small as it comes."""
    shown = run(["apt-cache", "show", "--no-all-versions", "python3-minimal"], "which Python Debian has")
    found = re.search(r"^(?:Pre-)?Depends:.*\b(python3\.\d+-minimal)\b", shown, re.M)
    if not found:
        raise Missing("the package python3-minimal does not name a Python: the lab needs Debian's packages")
    return found[1], f"lib{found[1].removesuffix('-minimal')}-stdlib"


def _unpack_packages(packages: Sequence[str]) -> Callable[[Path], None]:
    def build(into: Path) -> None:
        scratch = into / "scratch"
        _apt(scratch, packages, "--download-only")
        for archive in sorted((scratch / "archives").glob("*.deb")):
            run(["dpkg-deb", "-x", archive, into], f"unpacking {archive.name}")
        shutil.rmtree(scratch)
    return build


# ---- wheels ----------------------------------------------------------------------------------

def pins(roots: Iterable[str], python: str) -> list[str]:
    """name==version of everything that `roots` need, as installed here, without the roots' extras."""
    found: dict[str, str] = {}
    wanted = [Requirement(root) for root in roots]
    while wanted:
        requirement = wanted.pop()
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name in found:
            continue
        try:
            installed = distribution(requirement.name)
        except PackageNotFoundError as error:
            raise Missing(f"the package {requirement.name} is not installed here (.ci/setup dev installs it)") \
                from error
        found[name] = installed.version
        for line in installed.requires or ():
            needed = Requirement(line)
            environment = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
            if needed.marker is None or needed.marker.evaluate(environment):
                wanted.append(needed)
    found.pop("mixvisor", None)
    return sorted(f"{name}=={version}" for name, version in found.items())


def _fetch_wheels(wanted: Sequence[str], python: str) -> Callable[[Path], None]:
    abi = "cp" + python.replace(".", "")
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]

    def build(into: Path) -> None:
        scratch = into / "scratch"
        run([sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
             "--only-binary=:all:", "--implementation", "cp", "--python-version", python, "--abi", abi, "--abi", "abi3",
             "--abi", "none", *platforms, "--dest", scratch, *wanted], f"the wheels for Python {python} cannot be had")
        for wheel in sorted(scratch.glob("*.whl")):
            unpack(wheel, into)
        shutil.rmtree(scratch)
    return build


def unpack(wheel: Path, into: Path) -> None:
    """Install a wheel: its modules; a program of it is made by whoever needs it."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(into)
    for data in into.glob("*.data"):
        for part in ("purelib", "platlib"):
            if (data / part).is_dir():
                shutil.copytree(data / part, into, dirs_exist_ok=True)
        shutil.rmtree(data)


def project_files() -> list[Path]:
    """Every file of the project, relative, without what git ignores."""
    listed = run(["git", "-C", ROOT, "ls-files", "-co", "--exclude-standard", "-z"], "the project's files")
    return sorted(Path(name) for name in filter(None, listed.split("\0")) if (ROOT / name).is_file())


def _build_wheel(files: Sequence[Path]) -> Callable[[Path], None]:
    def build(into: Path) -> None:
        # A copy: setuptools writes beside what it builds.
        tree, wheels = into / "tree", into / "wheels"
        for name in files:
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, tree / name)
        run([sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps", "-w", wheels,
             tree], "the project's wheel cannot be built")
        unpack(next(wheels.glob("*.whl")), into)
        shutil.rmtree(tree)
        shutil.rmtree(wheels)
    return build


# ---- all of them -----------------------------------------------------------------------------

class Parts:
    """The folders that an image is made of, fetched or built where they are not there yet."""

    def __init__(self) -> None:
        packages = (*PACKAGES, *_python_packages())
        with _scratch() as scratch:
            resolved = _apt(scratch, packages, "--print-uris")
        self.python = packages[-2].removeprefix("python").removesuffix("-minimal")
        # Names and hashes; not where from.
        fetched = sorted(" ".join(line.split()[1:]) for line in resolved.splitlines() if line.startswith("'"))
        self.debian = folder("debian", digest(fetched), _unpack_packages(packages))
        wanted = pins(("mixvisor", *TEST_TOOLS), self.python)
        self.wheels = folder("wheels", digest([self.python, *wanted]), _fetch_wheels(wanted, self.python))
        files = [name for name in project_files() if name.parts[0] not in ("tests", "docs", "benchmarks", ".ci")]
        self.project = folder("project", digest(
            [sys.version, *(part for name in files for part in (str(name), (ROOT / name).read_bytes()))]),
            _build_wheel(files))

    def program(self, path: str) -> list[str]:
        """The words that start a program of the packages on this machine: by their own loader and libraries."""
        libraries = ":".join(str(self.debian / part) for part in ("lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"))
        return [str(self.debian / "lib64/ld-linux-x86-64.so.2"), "--library-path", libraries, str(self.debian / path)]


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    import tempfile
    with tempfile.TemporaryDirectory(prefix="mixvisor-lab-") as name:
        yield Path(name)
