"""Keys of a US keyboard, as text names them and as terminals send them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixvisor.cli.keys import KEY_NAMES, TerminalKeys, UnknownKey, character, text_to_keys


@pytest.mark.parametrize(("text", "keys"), [
    ("ver\\n", [(0x2F, 0x76), (0x12, 0x65), (0x13, 0x72), (0x1C, 0x0D)]),
    ("aA1!", [(0x1E, 0x61), (0x1E, 0x41), (0x02, 0x31), (0x02, 0x21)]),
    ("A:\\\\>", [(0x1E, 0x41), (0x27, 0x3A), (0x2B, 0x5C), (0x34, 0x3E)]),
    ("{F1}{f10}{F12}", [(0x3B, 0), (0x44, 0), (0x86, 0)]),
    ("{ESC}{UP}{CTRL-C}{Ctrl+c}", [(1, 27), (0x48, 0), (0x2E, 3), (0x2E, 3)]),
    ("{ALT-X}{SHIFT-TAB}{CTRL-LEFT}", [(0x2D, 0), (0x0F, 0), (0x73, 0)]),
    ("\\{\\}", [(0x1A, 0x7B), (0x1B, 0x7D)]),
    ("ä", [(0, 0x84)]),
    ("", []),
])
def test_text_becomes_the_scan_codes_of_a_us_keyboard(text, keys):
    assert text_to_keys(text) == keys


@pytest.mark.parametrize(("text", "says"), [
    ("{F13}", r"\{F13\} is no key"), ("{}", "is no key"), ("\\q", r"\\q means nothing"),
    ("日", "code page 437"),
])
def test_what_is_no_key_is_named(text, says):
    with pytest.raises(UnknownKey, match=says):
        text_to_keys(text)


@pytest.mark.parametrize(("data", "name"), [
    (b"\x1b[A", "UP"), (b"\x1bOA", "UP"), (b"\x1b[D", "LEFT"), (b"\x1bOP", "F1"),
    (b"\x1b[11~", "F1"), (b"\x1b[[A", "F1"), (b"\x1b[[E", "F5"), (b"\x1b[15~", "F5"),
    (b"\x1b[24~", "F12"), (b"\x1b[3~", "DEL"), (b"\x1b[H", "HOME"), (b"\x1b[5~", "PGUP"),
    (b"\x1b[1;5D", "CTRL-LEFT"), (b"\x1b[1;3A", "ALT-UP"), (b"\x1b[1;2P", "SHIFT-F1"),
    (b"\x1b[15;5~", "CTRL-F5"), (b"\x1b[Z", "SHIFT-TAB"), (b"\x1bx", "ALT-X"),
    (b"\x7f", "BACKSPACE"), (b"\r", "ENTER"), (b"\t", "TAB"), (b"\x03", "CTRL-C"),
])
def test_a_terminals_sequence_is_the_key_it_stands_for(data, name):
    assert TerminalKeys().feed(data) == [KEY_NAMES[name]]


def test_a_lone_escape_waits_until_it_is_known_to_be_alone():
    terminal = TerminalKeys()
    assert terminal.feed(b"\x1b") == []
    assert terminal.pending
    assert terminal.flush() == [(1, 27)]
    assert not terminal.pending


@pytest.mark.parametrize("data", [b"\x1b[99~", b"\x1b[?25h", b"\x1b[<0;10;5M", b"\x1b[200~",
                                  b"\x1b[I", b"\x1bOz"])
def test_an_unknown_sequence_types_nothing(data):
    assert TerminalKeys().feed(data + b"a") == [(0x1E, 0x61)]


@given(st.lists(st.sampled_from(
    [b"\x1b[A", b"\x1b[15~", b"\x1bOP", b"\x1b[1;5C", b"a", b"Z", "é".encode(), b"\r", b"\x7f"])),
    st.data())
def test_how_the_bytes_are_cut_into_reads_makes_no_difference(parts, data):
    whole = b"".join(parts)
    expected = TerminalKeys().feed(whole)
    terminal, keys, place = TerminalKeys(), [], 0
    while place < len(whole):
        step = data.draw(st.integers(1, 4))
        keys += terminal.feed(whole[place:place + step])
        place += step
    assert keys == expected
    assert len(keys) == len(parts)


@given(st.binary(max_size=64))
def test_no_bytes_of_a_terminal_raise_and_all_codes_fit_a_byte(data):
    terminal = TerminalKeys()
    keys = terminal.feed(data) + terminal.flush()
    assert all(0 <= scan <= 255 and 0 <= code <= 255 for scan, code in keys)
    assert not terminal.pending


def test_every_printable_character_of_ascii_has_a_key_with_its_own_code():
    for code in range(0x20, 0x7F):
        key = character(chr(code))
        assert key is not None
        assert key[1] == code
        assert 0 < key[0] < 0x40


def test_no_two_names_share_a_key():
    seen = {}
    for name, key in KEY_NAMES.items():
        seen.setdefault(key, []).append(name)
    doubled = {tuple(names) for names in seen.values() if len(names) > 1}
    assert doubled == set(), doubled
