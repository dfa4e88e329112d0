"""Where in a TOML text each key stands.

Theory.  tomli gives values without positions, and an error is worth twice as much with a line. So
a second, much simpler reader walks over the *same, already accepted* text and only notes where
keys, tables and array elements begin; it need not check anything, only tell strings, comments and
brackets apart so that it never takes the inside of one for a key.

Invariants.  `locate` is given a text that tomli has parsed; for every key of the parsed document
there is an entry whose path is the way to it: ("vm", 0, "boot", "disk") for the first [[vm]]'s
boot.disk, whether that was written as an inline table, a dotted key or a table [vm.boot]. Lines
count from 1. A path that the file makes more than once (a [table] and its implied parents)
has the line of its first mention.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

__all__ = ["Place", "locate"]

Place = tuple[str | int, ...]

_BARE: Final = re.compile(r"[A-Za-z0-9_-]+")
_BLANK: Final = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_SCALAR: Final = re.compile(r"[^,\]}#\n]*")
_STRINGS: Final = (       # longest opening first; a closing """ may be preceded by up to two "
    re.compile(r'"""(?:[^\\]|\\.)*?"{3,5}(?!")', re.DOTALL),
    re.compile(r"'''.*?'{3,5}(?!')", re.DOTALL),
    re.compile(r'"(?:[^"\\\n]|\\.)*"'),
    re.compile(r"'[^'\n]*'"),
)
_ESCAPE: Final = re.compile(
    r"\\(?:u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|x([0-9A-Fa-f]{2})|(.))", re.DOTALL)
_SHORT: Final = {"b": "\b", "t": "\t", "n": "\n", "f": "\f", "r": "\r", "e": "\x1b"}


def locate(text: str) -> Mapping[Place, int]:
    """Lines of every table, key and array element of `text`, which must be valid TOML."""
    return _Reader(text).read()


class _Reader:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.counted = (0, 1)                    # position, its line: lines are counted once
        self.lines: dict[Place, int] = {}
        self.elements: dict[Place, int] = {}     # arrays of tables: how many so far

    def read(self) -> Mapping[Place, int]:
        table: Place = ()
        while self.skip_blank():
            if self.take("[["):
                line = self.line()
                array = self.resolve(self.keys())
                self.take("]]")
                index = self.elements.get(array, 0)
                self.elements[array] = index + 1
                table = (*array, index)
                self.note(table, line)
            elif self.take("["):
                line = self.line()
                table = self.resolve(self.keys())
                self.take("]")
                self.note(table, line)
            else:
                self.pair(table)
        return self.lines

    def resolve(self, keys: Place) -> Place:
        """The way to a table's name: through an array of tables it leads to the last element."""
        way: Place = ()
        for key in keys[:-1]:
            way = (*way, key)
            if way in self.elements:
                way = (*way, self.elements[way] - 1)
        return (*way, keys[-1])

    def pair(self, table: Place) -> None:
        line = self.line()
        way = (*table, *self.keys())
        self.note(way, line, at_least=len(table) + 1)
        self.take("=")
        self.value(way)

    def value(self, way: Place) -> None:
        self.skip_blank()
        if self.take("["):
            index = 0
            while self.skip_blank() and not self.take("]"):
                self.note((*way, index), self.line())
                self.value((*way, index))
                self.skip_blank()
                self.take(",")
                index += 1
        elif self.take("{"):
            while self.skip_blank() and not self.take("}"):
                self.pair(way)
                self.skip_blank()
                self.take(",")
        elif not self.string():
            self.match(_SCALAR)

    def keys(self) -> Place:
        """A dotted key."""
        parts: list[str] = []
        while True:
            self.skip_blank()
            bare = self.match(_BARE)
            parts.append(bare if bare else _unquote(self.string()))
            self.skip_blank()
            if not self.take("."):
                return tuple(parts)

    def note(self, way: Place, line: int, at_least: int = 1) -> None:
        """Remember `way` and the parents it implies."""
        for length in range(at_least, len(way) + 1):
            self.lines.setdefault(way[:length], line)

    def string(self) -> str:
        for pattern in _STRINGS:
            found = self.match(pattern)
            if found:
                return found
        return ""

    def match(self, pattern: re.Pattern[str]) -> str:
        found = pattern.match(self.text, self.at)
        if not found:
            return ""
        self.at = found.end()
        return found[0]

    def take(self, token: str) -> bool:
        if not self.text.startswith(token, self.at):
            return False
        self.at += len(token)
        return True

    def skip_blank(self) -> bool:
        """Over spaces, line ends and comments; False at the end of the text."""
        self.match(_BLANK)
        return self.at < len(self.text)

    def line(self) -> int:
        position, line = self.counted
        line += self.text.count("\n", position, self.at)
        self.counted = (self.at, line)
        return line


def _unquote(key: str) -> str:
    if key.startswith("'"):
        return key[1:-1]

    def plain(match: re.Match[str]) -> str:
        code = match[1] or match[2] or match[3]
        return chr(int(code, 16)) if code else _SHORT.get(match[4], match[4])

    return _ESCAPE.sub(plain, key[1:-1])
