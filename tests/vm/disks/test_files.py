from __future__ import annotations

import os
import shutil

import pytest

from mixvisor.vm.disks import files
from mixvisor.vm.disks.files import DiskError, anonymous_overlay, commit, discard, facts, open_image, open_overlay
from mixvisor.vm.disks.overlay import Overlay, State, read_header, write_header

from .conftest import SECTORS, numbered, sector


@pytest.fixture
def overlay(tmp_path, image):
    """An overlay with sectors 5, 6 and 300 changed."""
    path = tmp_path / "work.overlay"
    change(path, image, (5, 6, 300), 1)
    return path


def change(path, image, numbers, version):
    image_fd = open_image(image)
    fd = open_overlay(path, image, image_fd)
    disk = Overlay(fd, SECTORS)
    for number in numbers:
        disk.write(number, sector(number, version))
    os.close(fd)
    os.close(image_fd)


def opened(path, image, **options):
    image_fd = open_image(image)
    try:
        os.close(open_overlay(path, image, image_fd, **options))
    finally:
        os.close(image_fd)


def changed(versions):
    return [(number, versions.get(number, 0)) for number in range(SECTORS)]


def test_an_overlay_is_made_where_there_is_none_and_kept(overlay, image):
    assert changed({}) == numbered(image.read_bytes())
    change(overlay, image, (7,), 2)
    told = facts(overlay, verify=True)
    assert (told.changed_bytes, told.image_fits) == (4 * 512, "yes")
    assert told.overlay.image == str(image)


def test_an_image_that_one_writes_is_nobody_elses_and_one_that_is_read_is_everybodys(image, fds):
    fds += [open_image(image), open_image(image)]
    with pytest.raises(DiskError, match="used by another VM or program, and only one may write it"):
        open_image(image, write=True)
    while fds:
        os.close(fds.pop())
    fds.append(open_image(image, write=True))
    for write in (True, False):
        with pytest.raises(DiskError, match="by another VM or program"):
            open_image(image, write=write)


def test_an_overlay_belongs_to_one_at_a_time(overlay, image, fds):
    fds.append(open_image(image))
    fds.append(open_overlay(overlay, image, fds[0]))
    for use in (lambda: open_overlay(overlay, image, fds[0]), lambda: commit(overlay), lambda: discard(overlay)):
        with pytest.raises(DiskError, match="used by another"):
            use()


def test_a_copy_of_its_image_will_do_and_a_changed_or_other_image_will_not(overlay, image):
    copy = image.with_name("copy.img")
    shutil.copyfile(image, copy)
    opened(overlay, copy)                                  # another time, the same contents
    with copy.open("r+b") as file:
        file.write(b"x")
    with pytest.raises(DiskError, match="its image has been changed since, or is another one"):
        opened(overlay, copy)
    copy.write_bytes(image.read_bytes() + bytes(512))
    with pytest.raises(DiskError, match="made for a disk of 320 sectors"):
        opened(overlay, copy)
    with pytest.raises(DiskError, match="made for a disk of 320 sectors"):
        opened(overlay, copy, floppy=False)


@pytest.mark.parametrize(("damage", "says"), [
    (lambda raw: b"text\n" * 100, "not an overlay of mixvisor"),
    (lambda raw: raw[:200], "header is damaged"),
    (lambda raw: raw[:8192 + 300 * 512], "cut short: sector 300"),
    (lambda raw: raw[:4096 + 8] + b"\1" + raw[4096 + 9:], "table is damaged"),
])
def test_a_torn_or_foreign_overlay_is_refused_with_its_name_and_the_reason_and_left_as_it_is(
        overlay, image, damage, says):
    overlay.write_bytes(damage(overlay.read_bytes()))
    before = overlay.read_bytes()
    with pytest.raises(DiskError, match=says) as caught:
        opened(overlay, image)
    assert str(overlay) in str(caught.value)
    for use in (commit, discard):
        if use is commit or b"mixvisor overlay" not in before or len(before) < 4096:
            with pytest.raises(DiskError):
                use(overlay)
    assert not overlay.exists() or overlay.read_bytes() == before
    assert numbered(image.read_bytes()) == changed({})


def test_a_commit_puts_the_changes_into_the_image_and_empties_the_overlay(overlay, image):
    assert commit(overlay) == 3 * 512
    assert numbered(image.read_bytes()) == changed({5: 1, 6: 1, 300: 1})
    assert facts(overlay, verify=True).changed_bytes == 0
    assert overlay.stat().st_size == 4096
    change(overlay, image, (5,), 2)                        # and it can be used again
    assert commit(overlay) == 512
    assert numbered(image.read_bytes()) == changed({5: 2, 6: 1, 300: 1})


def test_a_commit_into_an_image_that_is_not_its_own_writes_nothing(overlay, image):
    other = image.with_name("other.img")
    other.write_bytes(bytes(SECTORS * 512))
    with pytest.raises(DiskError, match="nothing was written"):
        commit(overlay, other)
    assert other.read_bytes() == bytes(SECTORS * 512)


def test_a_commit_of_a_damaged_overlay_writes_nothing(overlay, image):
    with overlay.open("r+b") as file:
        file.seek(8192 + 300 * 512 + 5)
        file.write(b"?")
    with pytest.raises(DiskError, match="sector 300 is damaged"):
        commit(overlay)
    assert numbered(image.read_bytes()) == changed({})
    assert facts(overlay).overlay.state is State.READY


@pytest.mark.parametrize("writes", range(4))
def test_a_commit_that_is_killed_is_completed_by_the_next(overlay, image, monkeypatch, writes):
    class Killed(BaseException):
        pass

    left = [writes]

    def dies(fd, data, offset):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return os.pwrite(fd, data, offset)

    with monkeypatch.context() as patched:
        patched.setattr(files, "_write_all", dies)
        if writes < 2:                                     # two runs are written: the last dies behind them
            with pytest.raises(Killed):
                commit(overlay)
            with pytest.raises(DiskError, match="a commit of it was interrupted: `mixvisor disk commit"):
                opened(overlay, image)
            with pytest.raises(DiskError, match="complete it with `mixvisor disk commit"):
                discard(overlay)
            assert overlay.exists()
    commit(overlay)
    assert numbered(image.read_bytes()) == changed({5: 1, 6: 1, 300: 1})


def test_an_overlay_left_committing_can_be_discarded_by_force(overlay):
    with overlay.open("r+b") as file:
        write_header(file.fileno(), read_header(file.fileno()).committing())
    discard(overlay, force=True)
    assert not overlay.exists()


def test_discarding_removes_the_overlay_and_never_another_file(overlay, image):
    discard(overlay)
    assert not overlay.exists()
    with pytest.raises(DiskError, match="not an overlay"):
        discard(image)
    assert image.exists()


def test_an_overlay_without_a_name_is_gone_with_its_descriptor(image, fds, tmp_path, monkeypatch):
    folder = tmp_path / "anonymous"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    fds.append(open_image(image))
    fds.append(anonymous_overlay(image, fds[0]))
    Overlay(fds[1], SECTORS).write(0, sector(0, 1))
    assert list(folder.iterdir()) == []
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    with pytest.raises(DiskError, match=r"no overlay .* can be made in .*missing \(TMPDIR\)"):
        anonymous_overlay(image, fds[0])


@pytest.mark.parametrize("path", ["missing.img", ".", "fifo"])
def test_what_is_no_file_is_refused_in_words(tmp_path, path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(DiskError):
        open_image(tmp_path / path)
    with pytest.raises(DiskError):
        facts(tmp_path / path)


def test_an_image_is_described_by_its_size_and_geometry(image):
    told = facts(image)
    assert (told.size_bytes, told.geometry.cylinders, told.overlay) == (SECTORS * 512, 40, None)


def test_a_large_image_is_known_by_samples_with_its_ends_among_them(tmp_path, fds):
    path = tmp_path / "large.img"
    with path.open("wb") as file:
        file.truncate(256 << 20)
    fds.append(os.open(path, os.O_RDWR))
    before = files._digest(fds[0])
    for at in (0, (256 << 20) - 1):
        os.pwrite(fds[0], b"x", at)
        after = files._digest(fds[0])
        assert after != before
        before = after
