"""The JSON schema of a configuration file, for editors (draft 2020-12).

It is made from the models of config/model.py, so that it cannot disagree with them about keys,
words and ranges; sizes and CPU lists say both of their written forms. Editors with a TOML language
server take it from a first line `#:schema ./mixvisor.schema.json`.

Poor at: what several keys or the host say together (config/rules.py) is beyond a schema; `mixvisor
check` says that.
"""

from __future__ import annotations

from typing import Any, Final, cast

from pydantic.json_schema import GenerateJsonSchema

from .model import Config

__all__ = ["SCHEMA_ID", "json_schema"]

SCHEMA_ID: Final = "urn:mixvisor:configuration:1"


def json_schema() -> dict[str, Any]:
    """The schema as plain values; every property has a description."""
    schema = Config.model_json_schema(by_alias=True)
    schema["properties"].pop("path", None)          # where the file is, nothing written in it
    polished = cast("dict[str, Any]", _polish(schema))
    return {
        "$schema": GenerateJsonSchema.schema_dialect,
        "$id": SCHEMA_ID,
        **polished,
        "title": "Mixvisor configuration",
        "description": "The virtual machines of one host and how they share its CPUs.",
    }


def _polish(node: object, *, names: bool = False) -> object:
    """Without the titles that pydantic makes of key names, and without null: TOML has none.

    `names`: the keys of this node are names that the file may use, not words of JSON Schema.
    """
    if isinstance(node, list):
        return [_polish(item) for item in cast("list[object]", node)]
    if not isinstance(node, dict):
        return node
    table = {
        key: _polish(value, names=not names and key in ("properties", "$defs"))
        for key, value in cast("dict[str, object]", node).items()
        if names or not (key == "title" or (key == "default" and value is None))
    }
    choices = table.get("anyOf")
    if names or not isinstance(choices, list):
        return table
    kept = [item for item in cast("list[object]", choices) if item != {"type": "null"}]
    if len(kept) == 1 and isinstance(kept[0], dict):
        del table["anyOf"]
        return {**cast("dict[str, object]", kept[0]), **table}
    return {**table, "anyOf": kept}
