"""The micro-VM engines by name, each behind the `Cpu` of `base`.

`ENGINES[name](memory, bus, exits, rom)` makes a vCPU or raises `HostLimit` (the host lacks
something) or `EngineError`, with a text that says what to do.  An engine's libraries are
imported only when it is asked for: a host without Unicorn still runs `kvm` guests.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from .base import Bus, Cpu, EngineError

__all__ = ["ENGINES", "create", "create_several"]


def _kvm(memory: mmap.mmap, bus: Bus, exits: memoryview, rom: mmap.mmap | None = None) -> Cpu:
    from .kvm.engine import create
    return create(memory, bus, exits, rom=rom)


def _software(memory: mmap.mmap, bus: Bus, exits: memoryview, rom: mmap.mmap | None = None) -> Cpu:
    try:
        from .software.engine import create
    except ImportError as error:
        raise EngineError(
            f"the software engine needs the Python package unicorn ({error}): pip install"
            " 'unicorn==2.1.4'"
        ) from error
    return create(memory, bus, exits, rom=rom)


ENGINES: Final[Mapping[str, Callable[..., Cpu]]] = {
    "kvm": _kvm,
    "software": _software,
}


def create_several(
    name: str, memory: mmap.mmap, buses: Sequence[Bus], exits: Sequence[memoryview], rom: mmap.mmap | None = None,
) -> Sequence[Cpu]:
    """The vCPUs of one VM, each with a bus and counters of its own. See `kvm.engine.create_several`."""
    if name != "kvm":
        raise EngineError(f"the {name} engine runs one vCPU, not {len(buses)}")
    from .kvm.engine import create_several
    return create_several(memory, buses, exits, rom=rom)


def create(name: str, memory: mmap.mmap, bus: Bus, exits: memoryview, rom: mmap.mmap | None = None) -> Cpu:
    """A vCPU of the engine *name*. See `base.Cpu` for the arguments."""
    if name not in ENGINES:
        raise EngineError(f"no engine {name!r}: there are {', '.join(ENGINES)}")
    return ENGINES[name](memory, bus, exits, rom)
