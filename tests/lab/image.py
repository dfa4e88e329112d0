"""The disk that every host of the lab boots: Debian's Python, the wheels, the project's wheel, the checks.

Theory.  One ISO 9660 image is the root file system of all hosts, so that only what is used is read
(an initramfs of the same content costs an emulator ten seconds of copying and unpacking). The kernel
starts a small initramfs (busybox, the modules that reach the disk) that mounts it and goes there. QEMU
is given kernel and initramfs as files; for Bochs they lie on a second, small disk, started by isolinux.

    /usr/bin/python3.X, /usr/lib/python3.X          Debian's
    /usr/lib/python3/dist-packages                   wheels, the project's among them
    /usr/bin/mixvisor                                its console script
    /lab/tests, /lab/pyproject.toml, /lab/start     the suites, and what runs them

Everything is compiled for that Python beforehand, by itself.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .hosts import Host
from .parts import ROOT, Missing, Parts, digest, folder, run

__all__ = ["Image", "boot_disk", "build", "command_line"]

HERE: Final = Path(__file__).resolve().parent
PLACE: Final = "usr/lib/python3/dist-packages"
# By what a host needs them for; each with what it depends on.
MODULES: Final = {
    "qemu": ("virtio_pci", "virtio_blk", "isofs"),
    "bochs": ("pata_legacy", "sd_mod", "isofs"),
    "amd": ("kvm_amd",),
    "intel": ("kvm_intel",),
}
# By its ports: the PIIX3 of Bochs does not show on PCI reliably.
OPTIONS: Final = {"pata_legacy": " all=1"}
CYLINDER: Final = 16 * 63 * 512                # Bochs' hard disks consist of whole ones
# Big, and never imported here.
LEFT_OUT: Final = re.compile(
    r"/(?:unicorn|capstone)/(?:include/|lib/.*\.a$)|/(?:trio|anyio|click|rich)/_?tests?/|/__pycache__/"
    r"|/python3\.\d+/(?:test|idlelib|lib2to3|tkinter|turtledemo|ensurepip|distutils|pydoc_data|config-[^/]*)/")
# The suites that run inside.
SUITES: Final = ("tests/conftest.py", "tests/vm/engines/*.py", "tests/lab/__init__.py", "tests/lab/hosts.py",
                 "tests/lab/inside/*.py")
COMMAND_LINE: Final = "panic=-1 loglevel=5 printk.devkmsg=on nokaslr cryptomgr.notests console=ttyS0,115200"
# Instructions that Bochs need not interpret. What mitigations cost is a matter of clocks, and here are none.
SPARING: Final = "no_timer_check tsc=reliable mitigations=off nopti init_on_alloc=0 audit=0 lsm= rodata=off"


@dataclass(frozen=True)
class Image:
    kernel: Path
    initrd: Path
    disk: Path
    bios: Path
    vga_bios: Path


def command_line(host: Host, checks: Iterable[str]) -> str:
    disk = "vda" if host.emulator == "qemu" else "sda"
    sparing = f" {SPARING}" if host.emulator == "bochs" else ""
    return f"{COMMAND_LINE}{sparing} lab.host={host.name} lab.disk={disk} lab.modules={host.emulator}" \
        f" lab.checks={','.join(checks)}"


def build(parts: Parts) -> Image:
    """The image of the present tree, out of the cache where it has not changed."""
    kernel = next(iter(sorted(parts.debian.glob("boot/vmlinuz-*"))), None)
    if kernel is None:
        raise Missing("the kernel's package has no /boot/vmlinuz")
    suites = list(_suites())
    own = [part for name in sorted(HERE.rglob("*")) if name.is_file() and name.suffix != ".pyc"
           for part in (name.name, name.read_bytes())]
    base = folder("base", digest([parts.debian.name, parts.wheels.name, (HERE / "image.py").read_bytes()]),
                  lambda into: _base(into, parts))
    made = folder("image", digest([
        base.name, parts.project.name, *own,
        *(part for name in suites for part in (str(name), (ROOT / name).read_bytes()))]),
        lambda into: _image(into, parts, base, suites, kernel))
    firmware = parts.debian / "usr/share/seabios"
    return Image(kernel, made / "initrd", made / "disk.iso",
                 firmware / "bios-256k.bin", firmware / "vgabios-stdvga.bin")


def _suites() -> Iterator[Path]:
    for pattern in SUITES:
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file():
                yield path.relative_to(ROOT)


# ---- the root file system --------------------------------------------------------------------

def _copy(source: Path, into: Path) -> None:
    """A tree without what is left out; links stay links."""
    for path in sorted(source.rglob("*")):
        target = into / path.relative_to(source)
        name = "/" + str(target.relative_to(into.anchor))
        if LEFT_OUT.search(name + "/" if path.is_dir() and not path.is_symlink() else name):
            continue
        if path.is_symlink():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path.readlink())
        elif path.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            target.chmod(0o755 if path.stat().st_mode & 0o111 else 0o644)


def _base(into: Path, parts: Parts) -> None:
    """What does not change with the project: Python and the wheels that it needs."""
    debian = parts.debian
    for name in ("proc", "sys", "dev", "tmp", "run", "root", "etc", "bin", "lib64", "lib/modules"):
        (into / name).mkdir(parents=True, exist_ok=True)
    (into / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n")
    (into / "etc/group").write_text("root:x:0:\nkvm:x:106:\nnogroup:x:65534:\n")
    program = f"usr/bin/python{parts.python}"
    for name in ("bin/busybox", program):
        (into / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(debian / name, into / name)
    for name in (f"usr/lib/python{parts.python}", "usr/lib/python3"):
        if (debian / name).is_dir():
            _copy(debian / name, into / name)
    _copy(parts.wheels, into / PLACE)
    shutil.copy(debian / "lib64/ld-linux-x86-64.so.2", into / "lib64")
    (into / "lib/x86_64-linux-gnu").mkdir(parents=True)
    for library in _libraries(parts, [into / program, *into.rglob("*.so"), *into.rglob("*.so.*")]):
        shutil.copy(library, into / "lib/x86_64-linux-gnu" / library.name)
    for module in {name for names in MODULES.values() for name in load_order(debian, names)}:
        shutil.copy(_module(debian, module), into / "lib/modules" / f"{module}.ko")
    _compile(parts, into, ["usr/lib"])


def _libraries(parts: Parts, programs: Iterable[Path]) -> list[Path]:
    """The shared libraries of the packages that these need, by the packages' own loader."""
    loader = parts.program("")[:-1]
    found: set[Path] = set()
    for program in programs:
        try:
            listed = run([*loader, "--list", program], f"the libraries of {program.name}")
        except Missing:
            continue                       # no shared object (a linker script), or one that brings its own
        found |= {Path(path) for path in re.findall(r"=> (\S+)", listed) if path.startswith(str(parts.debian))}
    return sorted(found)


def _compile(parts: Parts, root: Path, names: Iterable[str]) -> None:
    """To bytecode that is not checked against its source, by the Python that will run it."""
    python = root / f"usr/bin/python{parts.python}"
    libraries = root / "lib/x86_64-linux-gnu"
    run([root / "lib64/ld-linux-x86-64.so.2", "--library-path", libraries, python, "-I", "-m", "compileall", "-q",
         "--invalidation-mode", "unchecked-hash", "-s", str(root), "-p", "/", *(root / name for name in names)],
        "compiling Python modules", env={"PYTHONHOME": str(root / "usr")})


def _image(into: Path, parts: Parts, base: Path, suites: Iterable[Path], kernel: Path) -> None:
    root = into / "root"
    shutil.copytree(base, root, symlinks=True)
    _copy(parts.project, root / PLACE)
    script = root / "usr/bin/mixvisor"
    script.write_text(f"#!/usr/bin/python{parts.python}\nfrom mixvisor.cli.main import main\nmain()\n")
    script.chmod(0o755)
    for name in suites:
        (root / "lab" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, root / "lab" / name)
    shutil.copyfile(ROOT / "pyproject.toml", root / "lab/pyproject.toml")
    start = root / "lab/start"
    start.write_text((HERE / "inside/start.sh").read_text().replace("@PYTHON@", f"python{parts.python}"))
    _compile(parts, root, [f"{PLACE}/mixvisor", "lab"])
    (into / "initrd").write_bytes(_initrd(parts.debian))
    run([*parts.program("usr/bin/genisoimage"), "-quiet", "-r", "-l", "-o", into / "disk.iso", root],
        "the disk image cannot be written")
    with (into / "disk.iso").open("r+b") as disk:
        disk.truncate(-(-disk.seek(0, os.SEEK_END) // CYLINDER) * CYLINDER)
    shutil.rmtree(root)


def boot_disk(image: Image, parts: Parts, words: str, into: Path) -> Path:
    """A second, small disk that starts kernel and initramfs with the host's command line, *words* (isolinux)."""
    tree = into / "boot"
    (tree / "isolinux").mkdir(parents=True)
    shutil.copyfile(image.kernel, tree / "vmlinuz")
    shutil.copyfile(image.initrd, tree / "initrd")
    for name in ("usr/lib/ISOLINUX/isolinux.bin", "usr/lib/syslinux/modules/bios/ldlinux.c32"):
        shutil.copyfile(parts.debian / name, tree / "isolinux" / Path(name).name)
    (tree / "isolinux/isolinux.cfg").write_text(
        f"default lab\nprompt 0\nlabel lab\nkernel /vmlinuz\nappend initrd=/initrd {words}\n")
    disk = into / "boot.iso"
    run([*parts.program("usr/bin/genisoimage"), "-quiet", "-r", "-b", "isolinux/isolinux.bin", "-c", "isolinux/catalog",
         "-no-emul-boot", "-boot-load-size", "4", "-boot-info-table", "-o", disk, tree],
        "the boot disk cannot be written")
    shutil.rmtree(tree)
    return disk


# ---- the initramfs ---------------------------------------------------------------------------

def _module(debian: Path, name: str) -> Path:
    pattern = re.sub("[-_]", "[-_]", name)
    found = sorted(debian.glob(f"lib/modules/*/kernel/**/{pattern}.ko"))
    if not found:
        raise Missing(f"Debian's kernel has no module {name} (or packs its modules in a way the lab does not know)")
    return found[0]


def load_order(debian: Path, names: Iterable[str]) -> list[str]:
    """The modules and what they depend on, each after what it needs."""
    order: list[str] = []

    def add(name: str) -> None:
        found = re.search(rb"\0depends=([^\0]*)\0", _module(debian, name).read_bytes())
        for other in (found[1].decode().split(",") if found and found[1] else ()):
            add(other.replace("-", "_"))
        if name not in order:
            order.append(name)

    for name in names:
        add(name)
    return order


def _initrd(debian: Path) -> bytes:
    files: dict[str, tuple[int, bytes]] = {
        "init": (0o755, (HERE / "inside/init.sh").read_bytes()),
        "bin/busybox": (0o755, (debian / "bin/busybox").read_bytes()),
    }
    for kind, names in MODULES.items():
        order = load_order(debian, names)
        files[f"modules/{kind}"] = (0o644, "".join(f"{name}{OPTIONS.get(name, '')}\n" for name in order).encode())
        if kind in ("qemu", "bochs"):
            for name in order:
                files[f"modules/{name}.ko"] = (0o644, _module(debian, name).read_bytes())
    return archive(files)


def archive(files: dict[str, tuple[int, bytes]]) -> bytes:
    """A cpio archive as the kernel unpacks it (newc), with the console's node."""
    parts: list[bytes] = []

    def entry(name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        path = name.encode() + b"\0"
        numbers = (len(parts) + 1, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(path), 0)
        header = b"070701" + b"".join(b"%08X" % number for number in numbers)
        parts.append(header + path + bytes(-(len(header) + len(path)) % 4) + data + bytes(-len(data) % 4))

    folders = sorted({str(parent) for name in files for parent in Path(name).parents if str(parent) != "."})
    for name in ("proc", "sys", "dev", "host", *folders):
        entry(name, stat.S_IFDIR | 0o755)
    entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    for name, (mode, data) in files.items():
        entry(name, stat.S_IFREG | mode, data)
    entry("TRAILER!!!", 0)
    return b"".join(parts)
