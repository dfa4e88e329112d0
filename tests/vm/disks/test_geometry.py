from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixvisor.vm.disks.geometry import FLOPPIES, geometry_of, is_floppy, sectors_of


@given(st.integers(1, 9 << 30))
def test_every_sector_of_an_image_lies_within_its_geometry(size_bytes):
    geometry = geometry_of(size_bytes)
    sectors = -(-size_bytes // 512)
    assert geometry.cylinders <= 1024
    assert geometry.total >= sectors or (geometry.cylinders, geometry.heads) == (1024, 255)
    assert bool(geometry.floppy_type) == is_floppy(size_bytes) == (size_bytes <= 2880 * 1024)
    assert sectors_of(size_bytes, geometry) >= sectors


@pytest.mark.parametrize(("kib", "heads", "sectors", "cylinders"), [
    (160, 1, 8, 40), (180, 1, 9, 40), (320, 2, 8, 40), (360, 2, 9, 40), (720, 2, 9, 80),
    (1200, 2, 15, 80), (1440, 2, 18, 80), (2880, 2, 36, 80),
])
def test_floppy_sizes_have_their_standard_geometry(kib, heads, sectors, cylinders):
    geometry = geometry_of(kib * 1024)
    assert (geometry.heads, geometry.sectors, geometry.cylinders) == (heads, sectors, cylinders)


@given(st.sampled_from(FLOPPIES), st.integers(0, 100), st.integers(0, 3), st.integers(0, 64))
def test_cylinder_head_sector_is_a_number_below_the_total_or_nothing(geometry, c, h, s):
    number = geometry.sector(c, h, s)
    exists = c < geometry.cylinders and h < geometry.heads and 1 <= s <= geometry.sectors
    assert (number is not None) == exists
    if number is not None:
        assert 0 <= number < geometry.total


def test_the_file_may_say_that_a_small_image_is_a_hard_disk_and_not_that_a_large_one_is_a_floppy():
    geometry = geometry_of(1 << 20, floppy=False)
    assert (geometry.floppy_type, geometry.heads, geometry.sectors, geometry.cylinders) == (0, 16, 63, 3)
    assert sectors_of(1 << 20, geometry) == 2048
    with pytest.raises(ValueError, match="more than a floppy holds"):
        geometry_of(4 << 20, floppy=True)


def chs(block, heads, track):
    cylinder, rest = divmod(block, heads * track)
    head, sector = divmod(rest, track)
    if cylinder > 1023:
        cylinder, head, sector = 1023, heads - 1, track - 1
    return bytes((head, (cylinder >> 2 & 0xC0) | sector + 1, cylinder & 0xFF))


def partitioned(heads, track, cylinders, *, kind=6):
    """A first sector with one partition from the second track to the end."""
    start, count = track, heads * track * cylinders - track
    entry = (b"\x80" + chs(start, heads, track) + bytes([kind]) + chs(start + count - 1, heads, track)
             + struct.pack("<II", start, count))
    return (bytes(446) + entry).ljust(510, b"\0") + b"\x55\xAA"


@pytest.mark.parametrize(("heads", "track", "cylinders"), [
    (4, 17, 615), (15, 17, 977), (16, 63, 200), (64, 32, 100), (255, 63, 20), (255, 63, 1500)])
def test_the_partition_table_tells_the_geometry_that_it_was_made_with(heads, track, cylinders):
    geometry = geometry_of(heads * track * cylinders * 512, partitioned(heads, track, cylinders))
    assert (geometry.heads, geometry.sectors, geometry.cylinders) == (heads, track, min(1024, cylinders))


def test_a_partition_table_that_contradicts_itself_or_the_size_is_not_believed():
    size = 4 * 17 * 615 * 512
    plain = geometry_of(size)
    good = partitioned(4, 17, 615)
    assert geometry_of(size, good) != plain
    assert geometry_of(size, good[:510] + b"\0\0") == plain           # no signature
    assert geometry_of(size // 2, good) == geometry_of(size // 2)     # a partition longer than the disk
    assert geometry_of(size, good[:454] + b"\x99" + good[455:]) == plain     # a start that is not its CHS


@given(st.binary(min_size=66, max_size=66), st.integers(3 << 20, 1 << 33))
def test_no_partition_table_makes_a_geometry_out_of_range(table, size_bytes):
    geometry = geometry_of(size_bytes, bytes(446) + table[:64] + b"\x55\xAA")
    assert 1 <= geometry.heads <= 255
    assert 1 <= geometry.sectors <= 63
    assert 1 <= geometry.cylinders <= 1024
