"""KVM's refusals in plain words."""

from __future__ import annotations

import errno
import os

import pytest

from mixvisor.vm.engines.base import HostLimit
from mixvisor.vm.engines.kvm import engine
from mixvisor.vm.engines.kvm.errors import is_busy, refusal


def refused(number: int) -> OSError:
    return OSError(number, f"KVM_CREATE_VM: {os.strerror(number)}")


@pytest.mark.parametrize(("number", "words"), [
    (errno.EBUSY, "another hypervisor holds VT-x or AMD-V"), (errno.EIO, "refused to switch VT-x on"),
    (errno.EOPNOTSUPP, "firmware setup"), (errno.ENODEV, "modprobe"), (errno.EPERM, "AppArmor"),
    (errno.ENOMEM, "memory"), (errno.EMFILE, "nofile"), (errno.ENOTTY, "no KVM device"),
])
def test_each_refusal_is_told_with_its_call_and_its_meaning(number: int, words: str) -> None:
    text = refusal(refused(number))
    assert text.startswith("this host's KVM refused to make a VM: KVM_CREATE_VM: ")
    assert errno.errorcode[number] in text
    assert words in text


def test_an_unknown_refusal_is_told_as_the_system_words_it() -> None:
    assert refusal(refused(errno.EXDEV)).endswith("(EXDEV)")


@pytest.mark.parametrize(("number", "busy"), [(errno.EBUSY, True), (errno.EIO, True), (errno.ENOMEM, False)])
def test_only_what_says_that_somebody_else_holds_it_is_busy(number: int, busy: bool) -> None:
    assert is_busy(refused(number)) is busy


@pytest.mark.kvm
def test_the_engine_tells_a_busy_host_from_another_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    import mmap

    def busy(_self: object) -> None:
        raise refused(errno.EBUSY)

    monkeypatch.setattr(engine.Kvm, "create_vm", busy)
    memory = mmap.mmap(-1, 1 << 20)
    with pytest.raises(HostLimit, match="another hypervisor") as raised:
        engine.create(memory, None, memoryview(bytearray(9 * 8)).cast("Q"))  # type: ignore[arg-type]
    assert raised.value.busy
