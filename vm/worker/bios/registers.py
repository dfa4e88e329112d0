"""One BIOS call: the guest's registers while a service looks at them.

16-bit halves are read and written in place; the upper parts of the 64-bit registers survive.  The
carry and zero flags that a service returns belong into the flags word that `int` pushed, since
`iret` restores flags from there: `carry` and `zero` stay None where a service leaves them alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from ...engines.base import RAX, RBP, RBX, RCX, RDI, RDX, RSI
from ..saved import FLAG, MOMENT, Field, Maybe

__all__ = ["Call", "Wait"]


@dataclass(slots=True)
class Wait:
    """Why a vCPU may sleep: until a key comes, a time (monotonic ns) is reached, or either.

    An interrupt always comes through. Then the wait goes on behind it, or, if it is a `nap`, is over.
    With `takes_key` the key that ended it is the call's answer.
    """

    SAVED: ClassVar[Field] = {"for_key": FLAG, "until_ns": Maybe(MOMENT), "takes_key": FLAG, "nap": FLAG}
    WIRING: ClassVar[frozenset[str]] = frozenset()

    for_key: bool = False
    until_ns: int | None = None
    takes_key: bool = False
    nap: bool = False


class Call:
    __slots__ = ("_segment_base", "carry", "changed", "gpr", "vector", "wait", "zero")

    def __init__(self, vector: int, gpr: list[int], segment_base: Callable[[str], int]) -> None:
        self.vector = vector
        self.gpr = gpr
        self._segment_base = segment_base
        self.carry: bool | None = None
        self.zero: bool | None = None
        self.changed = False                # a general register was written
        self.wait: Wait | None = None

    def address(self, segment: str, offset: int) -> int:
        """Linear address of segment:offset ('es', 'ss', ...)."""
        return self._segment_base(segment) + (offset & 0xFFFF)

    def word(self, index: int) -> int:
        return self.gpr[index] & 0xFFFF

    def set_word(self, index: int, value: int) -> None:
        self.gpr[index] = self.gpr[index] & ~0xFFFF | value & 0xFFFF
        self.changed = True

    def set_dword(self, index: int, value: int) -> None:
        self.gpr[index] = value & 0xFFFFFFFF
        self.changed = True

    def fail(self, status: int) -> None:
        """Carry set, AH = status: how most services report an error."""
        self.ah = status
        self.carry = True

    def succeed(self, status: int = 0) -> None:
        self.ah = status
        self.carry = False

    @property
    def ax(self) -> int:
        return self.gpr[RAX] & 0xFFFF

    @ax.setter
    def ax(self, value: int) -> None:
        self.set_word(RAX, value)

    @property
    def ah(self) -> int:
        return self.gpr[RAX] >> 8 & 0xFF

    @ah.setter
    def ah(self, value: int) -> None:
        self.set_word(RAX, self.gpr[RAX] & 0xFF | (value & 0xFF) << 8)

    @property
    def al(self) -> int:
        return self.gpr[RAX] & 0xFF

    @al.setter
    def al(self, value: int) -> None:
        self.set_word(RAX, self.gpr[RAX] & 0xFF00 | value & 0xFF)

    @property
    def bx(self) -> int:
        return self.gpr[RBX] & 0xFFFF

    @bx.setter
    def bx(self, value: int) -> None:
        self.set_word(RBX, value)

    @property
    def bh(self) -> int:
        return self.gpr[RBX] >> 8 & 0xFF

    @property
    def bl(self) -> int:
        return self.gpr[RBX] & 0xFF

    @property
    def cx(self) -> int:
        return self.gpr[RCX] & 0xFFFF

    @cx.setter
    def cx(self, value: int) -> None:
        self.set_word(RCX, value)

    @property
    def ch(self) -> int:
        return self.gpr[RCX] >> 8 & 0xFF

    @property
    def cl(self) -> int:
        return self.gpr[RCX] & 0xFF

    @property
    def dx(self) -> int:
        return self.gpr[RDX] & 0xFFFF

    @dx.setter
    def dx(self, value: int) -> None:
        self.set_word(RDX, value)

    @property
    def dh(self) -> int:
        return self.gpr[RDX] >> 8 & 0xFF

    @property
    def dl(self) -> int:
        return self.gpr[RDX] & 0xFF

    @property
    def si(self) -> int:
        return self.gpr[RSI] & 0xFFFF

    @property
    def di(self) -> int:
        return self.gpr[RDI] & 0xFFFF

    @property
    def bp(self) -> int:
        return self.gpr[RBP] & 0xFFFF
