"""How a snapshot travels: JSON out of the service, the same `Snapshot` in the command line.

Theory.  The dataclasses of metrics/snapshot.py are the schema; this module walks them instead
of repeating them. Two shapes need a word: a tuple is a JSON array, and a mapping whose keys are
pairs (mode switches) is an array of `[from, to, value]`, because JSON keys are strings.

Invariant: `snapshot_from_json(to_json(s)) == s`, also through real JSON text.
Where it is poor: a field that a newer service adds is ignored, one that it drops is an error.
`SCHEMA` is in every answer of the API and moves when a field changes its meaning or goes away.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Final, Literal, Union, get_args, get_origin, get_type_hints

from ..metrics.snapshot import Snapshot

__all__ = ["SCHEMA", "Misread", "snapshot_from_json", "to_json"]

SCHEMA: Final = 1


class Misread(ValueError):
    """The JSON is not a snapshot of this schema; the text names the field."""


def to_json(value: Any) -> Any:
    """Plain JSON values for a snapshot or any part of one."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        if any(isinstance(key, tuple) for key in value):
            return [[*key, to_json(item)] for key, item in value.items()]
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_json(item) for item in value]
    return value


def snapshot_from_json(data: Any) -> Snapshot:
    """The snapshot that `to_json` was given. Raises Misread."""
    return _read(Snapshot, data, "snapshot")


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _read(kind: Any, data: Any, where: str) -> Any:
    origin = get_origin(kind)
    if isinstance(kind, type) and is_dataclass(kind):
        if not isinstance(data, dict):
            raise Misread(f"{where}: expected an object, found {type(data).__name__}")
        hints = _hints(kind)
        missing = [field.name for field in fields(kind) if field.name not in data]
        if missing:
            raise Misread(f"{where}: no field {missing[0]!r}")
        return kind(**{name: _read(hints[name], data[name], f"{where}.{name}") for name in hints})
    if origin in (Union, types.UnionType):
        if data is None and type(None) in get_args(kind):
            return None
        [inner] = [part for part in get_args(kind) if part is not type(None)]
        return _read(inner, data, where)
    if origin is tuple:
        return tuple(_read(get_args(kind)[0], item, f"{where}[{index}]")
                     for index, item in enumerate(_array(data, where)))
    if origin is Literal:
        if data not in get_args(kind):
            raise Misread(f"{where}: {data!r} is none of {', '.join(map(str, get_args(kind)))}")
        return data
    if origin is not None and issubclass(origin, Mapping):
        return _mapping(get_args(kind), data, where)
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if not isinstance(data, kind) or (kind is int and isinstance(data, bool)):
        raise Misread(f"{where}: expected {kind.__name__}, found {type(data).__name__}")
    return data


def _mapping(arguments: tuple[Any, ...], data: Any, where: str) -> dict[Any, Any]:
    key_kind, value_kind = arguments
    if get_origin(key_kind) is tuple:
        width = len(get_args(key_kind))
        result: dict[Any, Any] = {}
        for index, row in enumerate(_array(data, where)):
            if not isinstance(row, list) or len(row) != width + 1:
                raise Misread(f"{where}[{index}]: expected an array of {width + 1}")
            result[tuple(row[:width])] = _read(value_kind, row[width], f"{where}[{index}]")
        return result
    if not isinstance(data, dict):
        raise Misread(f"{where}: expected an object, found {type(data).__name__}")
    return {key: _read(value_kind, item, f"{where}.{key}") for key, item in data.items()}


def _array(data: Any, where: str) -> list[Any]:
    if not isinstance(data, list):
        raise Misread(f"{where}: expected an array, found {type(data).__name__}")
    return data
