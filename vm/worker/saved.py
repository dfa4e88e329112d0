"""What of a device is its state: declared beside each one, taken as plain data, given back checked.

Theory.  A class with state names every one of its attributes, once: in `SAVED`, with the kind of value that it is, or
in `WIRING` (callbacks, the clock, what is made anew).  A test compares both with what the objects really have
(tests/vm/worker/test_saved.py), so an attribute that nobody thought of is a failing test and not a guest that goes on
a little wrong.  `capture` and `install` walk the declarations; no device has code of its own for this.

Times are kept as distances from the present moment, so timers go on where they were, whatever the clocks of the two
hosts say.  Guest time stands still in between; the date does not (devices/cmos.py).

What comes back is a file's and hostile: each kind checks type and bounds, lengths are limited, and `BadState` names the
place.  After it the machine is of no use; nothing outside of it was touched.

Units: nanoseconds.
"""

from __future__ import annotations

import base64
import binascii
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from ..engines.portable import BadState

__all__ = [
    "BYTE", "COUNT", "FLAG", "MOMENT", "SECOND", "BadState", "Each", "Field", "Kind", "Many", "Maybe", "Moments",
    "Number", "Part", "Raw", "Row", "Table", "capture", "install",
]


@dataclass(frozen=True, slots=True)
class Moments:
    """The present: monotonic nanoseconds and seconds of the date."""

    now_ns: int
    second: int


class Kind(Protocol):
    def take(self, value: Any, now: Moments) -> Any:
        """The value as JSON's types."""
        ...

    def give(self, data: Any, now: Moments, old: Any) -> Any:
        """What the attribute becomes, given what it is (objects and buffers are changed in place). Raises BadState."""
        ...


Field = Mapping[str, Kind]                     # an object's attributes and their kinds


@dataclass(frozen=True, slots=True)
class Number:
    """A whole number from `low` to `high`."""

    high: int
    low: int = 0

    def take(self, value: Any, now: Moments) -> Any:
        return value

    def give(self, data: Any, now: Moments, old: Any) -> Any:
        if type(data) is not int or not self.low <= data <= self.high:
            raise BadState(f"a number from {self.low} to {self.high} was expected")
        return data


class _Flag:
    def take(self, value: Any, now: Moments) -> Any:
        return bool(value)

    def give(self, data: Any, now: Moments, old: Any) -> Any:
        if type(data) is not bool:
            raise BadState("true or false was expected")
        return data


_FAR_NS: Final = 1 << 60                       # 36 years


class _Moment:
    """A point of monotonic time, kept as a distance from now."""

    _near = Number(_FAR_NS, -_FAR_NS)

    def take(self, value: Any, now: Moments) -> Any:
        return max(-_FAR_NS, min(_FAR_NS, value - now.now_ns))

    def give(self, data: Any, now: Moments, old: Any) -> Any:
        return now.now_ns + self._near.give(data, now, old)


class _Second:
    """A second of the date that has been seen: never in the future."""

    def take(self, value: Any, now: Moments) -> Any:
        return value

    def give(self, data: Any, now: Moments, old: Any) -> Any:
        return min(Number(1 << 40).give(data, now, old), now.second)


FLAG: Final[Kind] = _Flag()
BYTE: Final[Kind] = Number(0xFF)
COUNT: Final[Kind] = Number(1 << 62)
MOMENT: Final[Kind] = _Moment()
SECOND: Final[Kind] = _Second()


@dataclass(frozen=True, slots=True)
class Maybe:
    """None, or a value of a kind."""

    kind: Kind

    def take(self, value: Any, now: Moments) -> Any:
        return None if value is None else self.kind.take(value, now)

    def give(self, data: Any, now: Moments, old: Any) -> Any:
        return None if data is None else self.kind.give(data, now, old)


@dataclass(frozen=True, slots=True)
class Raw:
    """A bytearray of fixed length, filled in place."""

    length: int

    def take(self, value: Any, now: Moments) -> Any:
        return base64.b64encode(value).decode()

    def give(self, data: Any, now: Moments, old: Any) -> Any:
        try:
            raw = base64.b64decode(data, validate=True) if isinstance(data, str) else b""
        except (binascii.Error, ValueError):
            raw = b""
        if len(raw) != self.length:
            raise BadState(f"{self.length} bytes in base64 were expected")
        old[:] = raw
        return old


@dataclass(frozen=True, slots=True)
class Row:
    """A tuple with a kind for each place."""

    kinds: tuple[Kind, ...]

    def take(self, value: Any, now: Moments) -> Any:
        return [kind.take(item, now) for kind, item in zip(self.kinds, value, strict=True)]

    def give(self, data: Any, now: Moments, old: Any) -> Any:
        items = _list(data, len(self.kinds))
        if len(items) != len(self.kinds):
            raise BadState(f"a list of {len(self.kinds)} was expected")
        return tuple(kind.give(item, now, None) for kind, item in zip(self.kinds, items, strict=True))


@dataclass(frozen=True, slots=True)
class Many:
    """A list or deque of at most `limit` values of one kind."""

    kind: Kind
    limit: int

    def take(self, value: Any, now: Moments) -> Any:
        return [self.kind.take(item, now) for item in value]

    def give(self, data: Any, now: Moments, old: Any) -> Any:
        items = [self.kind.give(item, now, None) for item in _list(data, self.limit)]
        return deque(items, old.maxlen) if isinstance(old, deque) else items


@dataclass(frozen=True, slots=True)
class Table:
    """A dict of at most `limit` entries, in its order."""

    key: Kind
    value: Kind
    limit: int

    def take(self, value: Any, now: Moments) -> Any:
        return [[self.key.take(key, now), self.value.take(item, now)] for key, item in value.items()]

    def give(self, data: Any, now: Moments, old: Any) -> Any:
        entry = Row((self.key, self.value))
        return dict(entry.give(item, now, None) for item in _list(data, self.limit))


@dataclass(frozen=True, slots=True)
class Part:
    """An object with declarations of its own, or None where this machine has none; `make` builds a new one."""

    make: Any = None

    def take(self, value: Any, now: Moments) -> Any:
        return None if value is None else capture(value, now)

    def give(self, data: Any, now: Moments, old: Any) -> Any:
        thing = old if self.make is None else self.make()
        if (thing is None) != (data is None):
            raise BadState("this machine is of another kind")
        if thing is not None:
            install(thing, data, now)
        return thing


@dataclass(frozen=True, slots=True)
class Each:
    """A fixed list or tuple of such objects."""

    def take(self, value: Any, now: Moments) -> Any:
        return [capture(item, now) for item in value]

    def give(self, data: Any, now: Moments, old: Any) -> Any:
        items = _list(data, len(old))
        if len(items) != len(old):
            raise BadState(f"a list of {len(old)} was expected")
        for thing, item in zip(old, items, strict=True):
            install(thing, item, now)
        return old


def _list(data: Any, limit: int) -> Sequence[Any]:
    if not isinstance(data, list) or len(data) > limit:
        raise BadState(f"a list of at most {limit} was expected")
    return data


def capture(thing: Any, now: Moments) -> dict[str, Any]:
    """The declared state of an object, as JSON's types."""
    return {name.strip("_"): kind.take(getattr(thing, name), now) for name, kind in thing.SAVED.items()}


def install(thing: Any, data: Any, now: Moments) -> None:
    """Make an object what `capture` saw. Raises BadState with the place."""
    kinds: Field = thing.SAVED
    if not isinstance(data, dict) or data.keys() != {name.strip("_") for name in kinds}:
        raise BadState(f"{type(thing).__name__} has not the fields that it must have")
    for name, kind in kinds.items():
        try:
            setattr(thing, name, kind.give(data[name.strip("_")], now, getattr(thing, name)))
        except BadState as error:
            raise BadState(f"{type(thing).__name__}.{name.strip('_')}: {error}") from None
