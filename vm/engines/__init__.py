"""The micro-VM engines by name, each behind the `Cpu` of `base`.

`ENGINES[name](memory, bus, exits, rom, device)` makes a vCPU or raises `HostLimit` (the host lacks
something) or `EngineError`, with a text that says what to do.  An engine's libraries are
imported only when it is asked for: a host without Unicorn still runs `kvm` guests.
"""

from __future__ import annotations

import contextlib
import importlib
import mmap
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, cast

from . import cpuid
from .base import Bus, Cpu, EngineError
from .tsc import read_tsc

if TYPE_CHECKING:
    from .kvm.engine import KvmCpu

__all__ = ["ENGINES", "create", "create_several", "get_all", "prepare", "set_all"]


def _kvm(memory: mmap.mmap, bus: Bus, exits: memoryview, rom: mmap.mmap | None = None,
         device: int | None = None, *, checked: bool = True) -> Cpu:
    del checked                             # the processor does
    from .kvm.engine import create
    return create(memory, bus, exits, device, rom)


def _software(memory: mmap.mmap, bus: Bus, exits: memoryview, rom: mmap.mmap | None = None,
              device: int | None = None, *, checked: bool = True) -> Cpu:
    try:
        from .software.engine import create
    except ImportError as error:
        raise EngineError(
            f"the software engine needs the Python package unicorn ({error}): pip install"
            " 'unicorn==2.1.4'"
        ) from error
    return create(memory, bus, exits, rom=rom, checked=checked)


ENGINES: Final[Mapping[str, Callable[..., Cpu]]] = {
    "kvm": _kvm,
    "software": _software,
}


def prepare() -> None:
    """Import every engine and find out what each needs to know, once a process: afterwards `create` opens no file.

    An engine that cannot be had is told by `create`.
    """
    with contextlib.suppress(EngineError, ImportError):
        importlib.import_module(".kvm.engine", __name__)
        from .kvm.errors import what_kvm_is
        what_kvm_is()
    with contextlib.suppress(EngineError, ImportError):
        importlib.import_module(".software.engine", __name__)
        from .software.quirks import found_layout, installed_version
        from .software.stores import assembled
        installed_version()
        for name in ("blocks", "checks"):
            assembled(name)
        found_layout()
    cpuid.vendor()
    read_tsc()


def create_several(
    name: str, memory: mmap.mmap, buses: Sequence[Bus], exits: Sequence[memoryview], rom: mmap.mmap | None = None,
) -> Sequence[Cpu]:
    """The vCPUs of one VM, each with a bus and counters of its own. See `kvm.engine.create_several`."""
    if name != "kvm":
        raise EngineError(f"the {name} engine runs one vCPU, not {len(buses)}")
    from .kvm.engine import create_several
    return create_several(memory, buses, exits, rom=rom)


def get_all(first: Cpu, others: Sequence[Cpu]) -> dict[str, Any]:
    """The state of the vCPUs of `create_several` as plain data; none of them runs. Raises EngineError."""
    return cast("KvmCpu", first).get_all(cast("Sequence[KvmCpu]", others))


def set_all(first: Cpu, others: Sequence[Cpu], data: Any, technology: str) -> None:
    """Have new ones go on from what `get_all` gave. Raises BadState, EngineError."""
    cast("KvmCpu", first).set_all(cast("Sequence[KvmCpu]", others), data, technology)


def create(name: str, memory: mmap.mmap, bus: Bus, exits: memoryview, rom: mmap.mmap | None = None,
           device: int | None = None, *, checked: bool = True) -> Cpu:
    """A vCPU of the engine *name*. See `base.Cpu` for the arguments.

    *device*: /dev/kvm for the engine `kvm` where the caller may not open it; it is closed by this.
    *checked*: the software engine checks accesses as a processor does (checks.py).
    """
    if name not in ENGINES:
        raise EngineError(f"no engine {name!r}: there are {', '.join(ENGINES)}")
    return ENGINES[name](memory, bus, exits, rom, device, checked=checked)
