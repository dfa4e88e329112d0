"""The ledger of exits: each is attributed to the instruction that caused it, in bounded memory."""

from __future__ import annotations

import mmap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixvisor.vm.code import decode, ledger
from mixvisor.vm.code.ledger import LAST, Ledger, cause, together
from mixvisor.vm.engines.base import RIP, CpuState, ExitKind
from mixvisor.vm.engines.entry import flat_state

AT = 0x10000


class Guest:
    """A vCPU that stands where one puts it, over code at `AT`."""

    def __init__(self, code: str, bits: int = 32) -> None:
        self.memory = mmap.mmap(-1, 1 << 20)
        data = bytes.fromhex(code)
        self.memory[AT:AT + len(data)] = data
        self.state = flat_state(self.memory, bits, AT)
        self.decoded = 0
        self.ledger = Ledger(self.memory, lambda: decode.linear_of(self.state), self.get_state)

    def get_state(self) -> CpuState:
        self.decoded += 1
        return self.state

    def leave(self, offset: int, kind: ExitKind, *, behind: bool = False) -> None:
        self.state.gpr[RIP] = AT + offset
        self.ledger.note(kind, behind=behind)

    def told(self) -> list[tuple[str, str, int, int]]:
        return [(row["reason"], row["mnemonic"], row["address"] - AT, row["count"])
                for row in (site.to_json() for site in together([self.ledger]))]


@pytest.mark.parametrize(("code", "kind", "offset", "behind", "expected"), [
    ("ee 90", ExitKind.IO_OUT, 0, False, (0, "out", "out dx, al")),
    ("90 ee 90", ExitKind.IO_OUT, 2, False, (1, "out", "out dx, al")),        # the engine stands behind it
    ("90 e4 60 90", ExitKind.IO_IN, 3, False, (1, "in", "in al, 0x60")),
    ("90 66 ef 90", ExitKind.IO_OUT, 3, False, (1, "out", "out dx, ax")),
    ("f3 6e 90", ExitKind.IO_OUT, 2, False, (0, "outsb", "rep outsb dx, byte ptr [esi]")),
    ("f3 6c 90", ExitKind.IO_IN, 0, False, (0, "insb", "rep insb byte ptr es:[edi], dx")),
    ("f4 f4", ExitKind.HALT, 1, True, (0, "hlt", "hlt")),                     # not the one it stands at
    ("cd 80 cd 81", ExitKind.INTERRUPT, 2, True, (0, "int", "int 0x80")),
    ("cc cc", ExitKind.INTERRUPT, 1, True, (0, "int3", "int3")),
    ("0f 0b 90", ExitKind.INTERRUPT, 0, False, (0, "ud2", "ud2")),            # a fault stands at its instruction
    ("a3 00 00 00 f0", ExitKind.MMIO_WRITE, 0, False, (0, "mov", "mov dword ptr [0xf0000000], eax")),
])
def test_an_exit_is_its_instructions(code, kind, offset, behind, expected):
    guest = Guest(code)
    guest.state.gpr[RIP] = AT + offset
    address, mnemonic, text = cause(guest.memory, guest.state, kind, behind=behind)
    assert (address - AT, mnemonic, text) == expected


def test_places_are_counted_apart_and_decoded_once():
    guest = Guest("ee ec f4")
    for _ in range(5):
        guest.leave(0, ExitKind.IO_OUT)
    guest.leave(1, ExitKind.IO_IN)
    guest.leave(3, ExitKind.HALT, behind=True)
    guest.leave(3, ExitKind.HALT, behind=True)
    assert guest.told() == [("io_out", "out", 0, 5), ("halt", "hlt", 2, 2), ("io_in", "in", 1, 1)]
    assert guest.decoded == 3


def test_the_newest_exits_are_kept_in_order():
    guest = Guest("ee ec")
    for _ in range(LAST):
        guest.leave(0, ExitKind.IO_OUT)
    guest.leave(1, ExitKind.IO_IN)
    last = guest.ledger.last()
    assert len(last) == LAST
    assert [site.mnemonic for site in last[-2:]] == ["out", "in"]


def test_a_guest_that_leaves_from_everywhere_takes_no_more_memory(monkeypatch):
    monkeypatch.setattr(ledger, "SITES_MAX", 8)
    guest = Guest("ee" * 64)
    for offset in range(64):
        guest.leave(offset, ExitKind.IO_OUT)
    assert sum(row[3] for row in guest.told()) == 64
    assert len(guest.told()) == 9
    assert guest.decoded == 8
    assert guest.told()[0][3] == 56
    assert together([guest.ledger])[0].text == "(beyond the first 8 places)"


@given(rip=st.integers(0, 2**64 - 1), kind=st.sampled_from(list(ExitKind)), behind=st.booleans(),
       bits=st.sampled_from((16, 32, 64)), code=st.binary(max_size=40))
def test_any_state_has_a_cause(rip, kind, behind, bits, code):
    guest = Guest(code.hex(), bits)
    guest.state.gpr[RIP] = rip
    address, _mnemonic, text = cause(guest.memory, guest.state, kind, behind=behind)
    assert text
    assert 0 <= address < 2**64
