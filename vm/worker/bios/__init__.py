"""The small BIOS of a micro-VM that boots from a disk.

Theory.  The ROM (bios/rom.py) holds for each interrupt vector a stub of two instructions:
`out BIOS_PORT, al` and `iret`.  The port write leaves the guest, the service behind it is
Python (`Bios.call`) and works on the guest's registers and memory, and `iret` goes back.  The
vector is told by the instruction pointer, so no register is touched by the stub.  Guest and
engine need nothing beyond port output: the same BIOS serves every engine, and the sequence of
its calls (`trace`) shows whether two engines ran the same guest the same way.

Waiting.  A service that cannot finish (a key is awaited) sets `Bios.wait` and stops the
vCPU: `Cpu.run` returns with the `out` complete, the worker sleeps, and `Bios.finish_wait` completes
the registers before the guest goes on with `iret`.  So a waiting VM is between two
instructions: it can be paused, read, moved or stopped like any other.

Rooms: rom (bytes), registers (a call), video, keyboard, disk, system (services), core (dispatch).
"""

from .core import BIOS_PORT, Bios
from .registers import Wait

__all__ = ["BIOS_PORT", "Bios", "Wait"]
