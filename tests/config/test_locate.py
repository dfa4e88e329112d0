"""Where keys stand: over every way of writing TOML that could mislead a reader of lines."""

from __future__ import annotations

import tomli
from hypothesis import given
from hypothesis import strategies as st

from mixvisor.config.locate import locate


def ways(value: object, at: tuple[str | int, ...] = ()) -> set[tuple[str | int, ...]]:
    """Every path of a parsed document."""
    found: set[tuple[str | int, ...]] = {at} if at else set()
    if isinstance(value, dict):
        for key, item in value.items():
            found |= ways(item, (*at, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            found |= ways(item, (*at, index))
    return found


TRICKY = '''\
# a comment with a key = 1 and a [table]
title = "a # no comment" # a comment
"quoted key" = 1
'single.quoted' = 2
"esc\\u0041ped" = 3
text = """
[not-a-table]
weight = 3 \\" still """
raw = \'\'\'
[[vm]]
key = "x" \'\'\'
quotes = """two quotes: """""
empty = ""
array = [
  1, # one
  "]", [ 2, 3 ],
  { a = 1, "b c" = [4] },
]
date = 2024-01-01T00:00:00Z
[host] # trailing
cpus = "0-3"
[a.b.c]
d.e = 1
[[vm]]
name = "one"
boot = { disk = "x", nest = { y = 1 } }
[vm.extra]
k = 1
[[vm]]

name = "two"
boot.guest = "alu"
[[vm.disks]]
f = 1
[[vm.disks]]
f = 2
'''


def test_every_key_of_a_tricky_file_has_a_line() -> None:
    assert ways(tomli.loads(TRICKY)) == set(locate(TRICKY))


def test_the_lines_are_those_where_the_keys_stand() -> None:
    lines = locate(TRICKY)
    text = TRICKY.split("\n")
    for way, starts in {
        ("title",): "title", ("quoted key",): '"quoted key"', ("single.quoted",): "'single",
        ("escAped",): '"esc', ("text",): "text", ("raw",): "raw", ("quotes",): "quotes",
        ("array",): "array", ("array", 0): "  1,", ("array", 2, 1): '  "]"', ("date",): "date",
        ("array", 3, "b c", 0): "  { a", ("host",): "[host]", ("host", "cpus"): "cpus",
        ("a",): "[a.b.c]", ("a", "b", "c", "d", "e"): "d.e", ("vm",): "[[vm]]",
        ("vm", 0, "name"): 'name = "one"', ("vm", 0, "boot", "nest", "y"): "boot = {",
        ("vm", 0, "extra", "k"): "k = 1", ("vm", 1, "name"): 'name = "two"',
        ("vm", 1, "boot", "guest"): "boot.guest", ("vm", 1, "disks", 1, "f"): "f = 2",
    }.items():
        assert text[lines[way] - 1].startswith(starts), way


def test_a_key_after_a_multi_line_string_is_not_counted_inside_it() -> None:
    assert locate('a = """\n\n\n"""\nb = 1\n') == {("a",): 1, ("b",): 5}


def test_an_inline_table_over_several_lines_has_a_line_for_each_key() -> None:
    text = "boot = {\n  disk = 'x', # why\n  bits = 16,\n}\n"
    assert locate(text) == {("boot",): 1, ("boot", "disk"): 2, ("boot", "bits"): 3}


KEYS = st.sampled_from(["a", "b-c", '"d e"', "'f.g'", '"h\\"i"', '"#"'])
SCALARS = st.sampled_from([
    "1", "true", '"x"', "'y'", '"]"', '"}"', '"#"', "'''\n[z]\n'''", '"""\nq = 1\n"""', '"a\\"b"',
    "0x1F", "1e3", "2024-01-01",
])
VALUES = st.recursive(SCALARS, lambda inner: st.one_of(
    st.lists(inner, max_size=3).map(lambda items: "[" + ",\n".join(items) + "]"),
    st.dictionaries(KEYS, inner, max_size=3).map(
        lambda table: "{" + ", ".join(f"{k} = {v}" for k, v in table.items()) + "}"),
), max_leaves=6)


@given(st.lists(st.dictionaries(KEYS, VALUES, max_size=4), min_size=1, max_size=4))
def test_for_any_document_exactly_its_keys_are_found(tables: list[dict[str, str]]) -> None:
    text = "".join(
        "[[vm]] # next\n" + "".join(f"{key} = {value}\n" for key, value in table.items())
        for table in tables)
    assert set(locate(text)) == ways(tomli.loads(text))
