"""Keys: from what a person types to what a PC keyboard's BIOS reports.

Theory.  INT 16h gives a guest pairs of (scan code, ASCII code): set 1 make codes of a US keyboard,
with the few substitutions that the BIOS makes for shifted, Ctrl and Alt keys (IBM PC/AT
technical reference, keyboard BIOS tables). A terminal sends bytes instead: UTF-8, control
characters and escape sequences (xterm's, which every terminal of today speaks). `text_to_keys`
reads the notation of `mixvisor keys` (`ver\\n`, `{F1}`, `{CTRL-C}`); `TerminalKeys` reads the
bytes of a raw terminal, across the boundaries of reads.

Invariants.  No input raises but a wrong `{NAME}`; a sequence that is not understood is dropped
whole and types nothing. A character that the US keyboard does not have is sent as Alt and its
code page 437 number give it: scan code 0.
Where it is poor: key releases and bare modifiers cannot be had from a terminal; a lone ESC is
told from a sequence by what follows within one read, or by `flush`.
"""

from __future__ import annotations

import re
from typing import Final

__all__ = ["KEY_NAMES", "Key", "TerminalKeys", "UnknownKey", "character", "text_to_keys"]

Key = tuple[int, int]      # (scan code, ASCII code)


class UnknownKey(ValueError):
    """A name in braces that is no key."""


_ROWS: Final = (           # first scan code, plain, shifted
    (0x02, "1234567890-=", "!@#$%^&*()_+"),
    (0x10, "qwertyuiop[]", "QWERTYUIOP{}"),
    (0x1E, "asdfghjkl;'`", "ASDFGHJKL:\"~"),
    (0x2B, "\\zxcvbnm,./", "|ZXCVBNM<>?"),
)
_CHARACTERS: Final[dict[str, Key]] = {" ": (0x39, 0x20)}
_LETTER_SCAN: Final[dict[str, int]] = {}
for _first, _plain, _shifted in _ROWS:
    for _offset, (_low, _high) in enumerate(zip(_plain, _shifted, strict=True)):
        _CHARACTERS[_low] = (_first + _offset, ord(_low))
        _CHARACTERS[_high] = (_first + _offset, ord(_high))
        if _low.isalpha():
            _LETTER_SCAN[_low] = _first + _offset

_ENTER: Final = (0x1C, 0x0D)
_ESCAPE: Final = (0x01, 0x1B)
_CONTROL: Final[dict[int, Key]] = {
    **{ord(letter) - 0x60: (scan, ord(letter) - 0x60) for letter, scan in _LETTER_SCAN.items()},
    0x00: (0x03, 0x00),        # Ctrl-2
    0x08: (0x0E, 0x08), 0x7F: (0x0E, 0x08), 0x09: (0x0F, 0x09), 0x0A: _ENTER, 0x0D: _ENTER,
    0x1B: _ESCAPE, 0x1C: (0x2B, 0x1C), 0x1D: (0x1B, 0x1D), 0x1E: (0x07, 0x1E), 0x1F: (0x0C, 0x1F),
}
_NAVIGATION: Final = {
    "UP": 0x48, "DOWN": 0x50, "LEFT": 0x4B, "RIGHT": 0x4D, "HOME": 0x47, "END": 0x4F,
    "PGUP": 0x49, "PGDN": 0x51, "INS": 0x52, "DEL": 0x53,
}
# Ctrl changes the scan codes of these; Alt gives 0x50 more (AT BIOS: grey keys).
_CTRL_NAVIGATION: Final = {
    "UP": 0x8D, "DOWN": 0x91, "LEFT": 0x73, "RIGHT": 0x74, "HOME": 0x77, "END": 0x75,
    "PGUP": 0x84, "PGDN": 0x76, "INS": 0x92, "DEL": 0x93,
}


def _function_keys() -> dict[str, Key]:
    names: dict[str, Key] = {}
    for number in range(1, 11):
        for prefix, first in (("", 0x3B), ("SHIFT-", 0x54), ("CTRL-", 0x5E), ("ALT-", 0x68)):
            names[f"{prefix}F{number}"] = (first + number - 1, 0)
    for number in (11, 12):
        for prefix, first in (("", 0x85), ("SHIFT-", 0x87), ("CTRL-", 0x89), ("ALT-", 0x8B)):
            names[f"{prefix}F{number}"] = (first + number - 11, 0)
    return names


KEY_NAMES: Final[dict[str, Key]] = {
    "ENTER": _ENTER, "ESC": _ESCAPE, "TAB": (0x0F, 0x09), "SPACE": (0x39, 0x20),
    "BACKSPACE": (0x0E, 0x08), "SHIFT-TAB": (0x0F, 0),
    **{name: (scan, 0) for name, scan in _NAVIGATION.items()},
    **{f"CTRL-{name}": (scan, 0) for name, scan in _CTRL_NAVIGATION.items()},
    **{f"ALT-{name}": (scan + 0x50, 0) for name, scan in _NAVIGATION.items()},
    **_function_keys(),
    **{f"CTRL-{letter.upper()}": (scan, ord(letter) - 0x60)
       for letter, scan in _LETTER_SCAN.items()},
    **{f"ALT-{letter.upper()}": (scan, 0) for letter, scan in _LETTER_SCAN.items()},
    **{f"ALT-{digit}": (0x78 + index, 0) for index, digit in enumerate("1234567890")},
}


def character(text: str) -> Key | None:
    """The key of one character, None where code page 437 does not have it."""
    if text in _CHARACTERS:
        return _CHARACTERS[text]
    if ord(text) in _CONTROL:
        return _CONTROL[ord(text)]
    code = text.encode("cp437", "ignore")
    return (0, code[0]) if len(code) == 1 and code[0] >= 0x80 else None


_TOKEN: Final = re.compile(r"\{([^{}]*)\}|\\(.)|(.)", re.DOTALL)
_ESCAPES: Final = {"n": "\r", "r": "\r", "t": "\t", "b": "\b", "e": "\x1b", "\\": "\\", "{": "{",
                   "}": "}"}


def text_to_keys(text: str) -> list[Key]:
    """Keys of `text`; escapes \\\\n \\\\t \\\\b \\\\e \\\\\\\\ \\\\{ and names like {F1}. Raises UnknownKey."""
    keys: list[Key] = []
    for match in _TOKEN.finditer(text):
        name, escape, plain = match.groups()
        if name is not None:
            key = KEY_NAMES.get(name.upper().replace("+", "-"))
            if key is None:
                raise UnknownKey(f"{{{name}}} is no key; there are {{ENTER}} {{ESC}} {{TAB}} {{UP}} "
                                 "{DOWN} {LEFT} {RIGHT} {HOME} {END} {PGUP} {PGDN} {INS} {DEL} "
                                 "{F1} to {F12}, also with CTRL-, ALT- or SHIFT-; a brace itself "
                                 "is \\{")
        elif escape is not None:
            if escape not in _ESCAPES:
                raise UnknownKey(f"\\{escape} means nothing; there are \\n \\t \\b \\e \\\\ \\{{")
            key = character(_ESCAPES[escape])
        else:
            key = character(plain)
            if key is None:
                raise UnknownKey(f"a PC keyboard has no {plain!r} (code page 437)")
        if key is not None:
            keys.append(key)
    return keys


_LETTER_FINAL: Final = {"A": "UP", "B": "DOWN", "C": "RIGHT", "D": "LEFT", "H": "HOME", "F": "END",
                        "P": "F1", "Q": "F2", "R": "F3", "S": "F4"}
_TILDE_NUMBER: Final = {
    1: "HOME", 2: "INS", 3: "DEL", 4: "END", 5: "PGUP", 6: "PGDN", 7: "HOME", 8: "END",
    11: "F1", 12: "F2", 13: "F3", 14: "F4", 15: "F5", 17: "F6", 18: "F7", 19: "F8", 20: "F9",
    21: "F10", 23: "F11", 24: "F12",
}
# Linux's console F1-F5, any CSI sequence (ECMA-48), SS3.
_SEQUENCE: Final = re.compile(
    rb"\x1b(?:\[\[([A-E])|\[([0-?]*)[ -/]*([@-Z\\-~])|O([A-Za-z]))")
_UNFINISHED: Final = re.compile(rb"\x1b(?:\[(?:\[|[0-?]*[ -/]*)|O)?")


class TerminalKeys:
    """Turns the bytes of a raw terminal into keys; keeps what is not complete yet."""

    def __init__(self) -> None:
        self._rest = b""

    @property
    def pending(self) -> bool:
        """An ESC or part of a sequence waits: call `flush` if nothing follows for a moment."""
        return bool(self._rest)

    def feed(self, data: bytes) -> list[Key]:
        data, self._rest = self._rest + data, b""
        keys: list[Key] = []
        while data:
            if data[0] == 0x1B:
                key, used = _escape(data)
            else:
                key, used = _utf8(data)
            if used == 0:
                self._rest = data
                break
            if key is not None:
                keys.append(key)
            data = data[used:]
        return keys

    def flush(self) -> list[Key]:
        """What waits is all there is: an ESC pressed by itself."""
        waiting, self._rest = self._rest, b""
        return [_ESCAPE] if waiting.startswith(b"\x1b") else []


def _escape(data: bytes) -> tuple[Key | None, int]:
    """The key at the start of `data` and its length; length 0: not complete."""
    if match := _SEQUENCE.match(data):
        linux, numbers, final, single = match.groups()
        if linux is not None:
            return KEY_NAMES[f"F{linux[0] - 0x40}"], match.end()
        if single is not None:
            return KEY_NAMES.get(_LETTER_FINAL.get(single.decode(), "")), match.end()
        return _named(numbers.decode(), final.decode()), match.end()
    if _UNFINISHED.fullmatch(data):
        return None, 0
    if data[1:2] == b"\x1b":
        return _ESCAPE, 1
    # ESC and a character: the terminal's way of saying Alt.
    letter = chr(data[1]).upper() if data[1] < 0x80 else ""
    alt = KEY_NAMES.get(f"ALT-{letter}")
    return (alt, 2) if alt is not None else (_ESCAPE, 1)


def _named(numbers: str, final: str) -> Key | None:
    """The key of a CSI sequence; a private one (a terminal's report) is no key."""
    if not re.fullmatch("[0-9;]*", numbers):
        return None
    values = [int(part) if part else 0 for part in numbers.split(";")]
    if final == "~":
        name = _TILDE_NUMBER.get(values[0], "")
    elif final == "Z":
        name = "SHIFT-TAB"
    else:
        name = _LETTER_FINAL.get(final, "")
    bits = values[1] - 1 if len(values) > 1 and values[1] > 0 else 0
    for bit, prefix in ((4, "CTRL-"), (2, "ALT-"), (1, "SHIFT-")):
        if bits & bit and f"{prefix}{name}" in KEY_NAMES:
            return KEY_NAMES[f"{prefix}{name}"]
    return KEY_NAMES.get(name)


def _utf8(data: bytes) -> tuple[Key | None, int]:
    first = data[0]
    length = 1 if first < 0xC0 else 2 if first < 0xE0 else 3 if first < 0xF0 else 4
    if len(data) < length and all(byte & 0xC0 == 0x80 for byte in data[1:]):
        return None, 0
    try:
        return character(data[:length].decode()), length
    except UnicodeDecodeError:
        return None, 1
