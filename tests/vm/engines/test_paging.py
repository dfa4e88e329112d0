"""The page walk, against tables built here."""

from __future__ import annotations

import contextlib
import mmap
import random
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixvisor.vm.engines.entry import flat_state
from mixvisor.vm.engines.paging import PageFault, PagingMode, paging_mode, read_linear, translate

LONG = PagingMode(paging=True, pae=True, long=True, large=False, protect=True, root=0x1000)
PAE = PagingMode(paging=True, pae=True, long=False, large=False, protect=True, root=0x1000)
LEGACY = PagingMode(paging=True, pae=False, long=False, large=True, protect=True, root=0x1000)


def tables(words: dict[int, int], *, width: int = 8, size: int = 1 << 20) -> mmap.mmap:
    memory = mmap.mmap(-1, size)
    for address, value in words.items():
        struct.pack_into("<Q" if width == 8 else "<I", memory, address, value)
    return memory


def test_without_paging_linear_is_physical():
    mode = PagingMode(paging=False, pae=False, long=False, large=False, protect=False, root=0)
    assert translate(tables({}), mode, 0x1_2345_6789) == 0x2345_6789


def test_four_levels_lead_to_a_page_of_4_kib():
    memory = tables({0x1000: 0x2003, 0x2000: 0x3003, 0x3008: 0x4003, 0x4010: 0xABC003})
    assert translate(memory, LONG, 0x20_2345) == 0xAB_C345


def test_a_2_mib_and_a_1_gib_page_end_the_walk_early():
    memory = tables({0x1000: 0x2003, 0x2000: 0x3003, 0x3008: 0x80_0083, 0x2008: 0x4000_0083})
    assert translate(memory, LONG, 0x20_1234) == 0x80_1234
    assert translate(memory, LONG, 0x4012_3456) == 0x4012_3456


def test_pae_has_four_entries_at_the_top():
    memory = tables({0x1018: 0x2001, 0x2000: 0x80_0083})
    assert translate(memory, PAE, 0xC000_1234) == 0x80_1234


def test_two_levels_with_4_kib_and_4_mib_pages():
    memory = tables({0x1004: 0x2003, 0x2008: 0xABC003, 0x1008: 0xC0_0083}, width=4)
    assert translate(memory, LEGACY, 0x40_2345) == 0xAB_C345
    assert translate(memory, LEGACY, 0x80_1234) == 0xC0_1234


@pytest.mark.parametrize(("write", "user", "error"), [
    (True, False, 0b011), (False, True, 0b101), (True, True, 0b111)])
def test_a_read_only_supervisor_page_refuses_with_the_processors_error_code(write, user, error):
    memory = tables({0x1000: 0x2007, 0x2000: 0x3007, 0x3000: 0x4007, 0x4000: 0x5001})
    with pytest.raises(PageFault) as caught:
        translate(memory, LONG, 0x10, write=write, user=user)
    assert caught.value.error == error
    assert translate(memory, LONG, 0x10) == 0x5010


def test_what_is_not_present_is_a_page_fault_without_the_protection_bit():
    with pytest.raises(PageFault) as caught:
        translate(tables({}), LONG, 0x1234, write=True)
    assert (caught.value.linear, caught.value.error) == (0x1234, 2)


def test_reading_stops_where_the_mapping_stops():
    memory = tables({0x1000: 0x2003, 0x2000: 0x3003, 0x3000: 0x4003, 0x4000: 0x5003})
    memory[0x5FFE:0x6000] = b"ab"
    assert read_linear(memory, LONG, 0xFFE, 15) == b"ab"


@given(seed=st.integers(0, 2**32), linear=st.integers(0, 2**64 - 1),
       root=st.integers(0, 2**64 - 1), long=st.booleans(), pae=st.booleans())
def test_hostile_tables_give_an_address_or_a_page_fault(seed, linear, root, long, pae):
    memory = mmap.mmap(-1, 16384)
    memory[:] = random.Random(seed).randbytes(16384)
    mode = PagingMode(paging=True, pae=pae or long, long=long, large=True, protect=True,
                      root=root % 32768)
    with contextlib.suppress(PageFault):
        assert translate(memory, mode, linear) >= 0
    assert len(read_linear(memory, mode, linear, 15)) <= 15


@pytest.mark.parametrize("size", [1 << 20, 4 << 20, (1 << 30) + (6 << 20)])
def test_the_flat_tables_map_all_of_memory_to_itself_for_ring_3(size):
    memory = mmap.mmap(-1, size)
    mode = paging_mode(flat_state(memory, 64, 0x10000))
    for address in (0, 0x1234, size // 2, size - 1):
        assert translate(memory, mode, address, write=True, user=True) == address
