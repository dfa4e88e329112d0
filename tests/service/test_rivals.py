"""Other hypervisors while the service runs: told, cleared, and hardware VMs held back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import trio

from mixvisor.service.backend import Conflict, ServiceError
from mixvisor.service.rivals import FRESH_SECONDS, Rivals
from mixvisor.service.warnings import Board
from mixvisor.vm.conflicts import Evidence, Holder
from mixvisor.vm.host import HostFacts

from .conftest import running, until, vm

QUIET = Evidence(technology="vt-x")
VIRTUALBOX = Evidence(technology="vt-x", holders=(Holder(7, "VBoxHeadless", frozenset({"/dev/vboxdrv"})),))
QEMU = Evidence(technology="vt-x", holders=(Holder(8, "qemu-system-x86", frozenset({"/dev/kvm"})),))


class Surroundings:
    """What is found, as the test says it."""

    def __init__(self, evidence: Evidence = QUIET) -> None:
        self.evidence = evidence
        self.looks = 0

    def __call__(self, *_arguments: Any, **_more: Any) -> Evidence:
        self.looks += 1
        return self.evidence


def up(board: Board) -> dict[str, str]:
    return {warning.code: warning.severity for warning in board.now()}


async def later() -> None:
    await trio.sleep(FRESH_SECONDS)


async def test_what_comes_is_told_and_what_goes_is_cleared(autojump_clock):
    board, found = Board(), Surroundings()
    rivals = Rivals(board, "vt-x", refuse=True, look=found)
    await rivals.look()
    assert up(board) == {}
    for evidence, codes in ((VIRTUALBOX, {"virtualbox-vms": "critical"}), (QEMU, {"kvm-shared": "info"}), (QUIET, {})):
        found.evidence = evidence
        await later()
        await rivals.look()
        assert up(board) == codes


async def test_a_danger_refuses_a_hardware_vm_and_says_who_and_what_to_do(autojump_clock):
    rivals = Rivals(Board(), "vt-x", refuse=True, look=Surroundings(VIRTUALBOX))
    with pytest.raises(Conflict, match=r"VBoxHeadless, pid 7.*Stop VirtualBox's VMs.*conflicts = \"warn\""):
        await rivals.admit("hard")


async def test_with_conflicts_warn_and_beside_others_on_kvm_it_starts(autojump_clock):
    await Rivals(Board(), "vt-x", refuse=False, look=Surroundings(VIRTUALBOX)).admit("hard")
    await Rivals(Board(), "vt-x", refuse=True, look=Surroundings(QEMU)).admit("hard")


async def test_a_hundred_vms_that_start_together_are_one_look(autojump_clock):
    found = Surroundings()
    rivals = Rivals(Board(), "vt-x", refuse=True, look=found)
    async with trio.open_nursery() as nursery:
        for number in range(100):
            nursery.start_soon(rivals.admit, f"v{number}")
    assert found.looks == 1
    await later()
    await rivals.admit("one")
    assert found.looks == 2


async def test_it_is_watched_again_and_again(monkeypatch):
    # No clock of the test's own: it would jump while the thread looks.
    monkeypatch.setattr("mixvisor.service.rivals.LOOK_SECONDS", 0.01)
    monkeypatch.setattr("mixvisor.service.rivals.FRESH_SECONDS", 0.0)
    board, found = Board(), Surroundings()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Rivals(board, "vt-x", refuse=True, look=found).watch)
        await until(lambda: found.looks >= 2)
        assert up(board) == {}
        found.evidence = VIRTUALBOX
        await until(lambda: up(board) == {"virtualbox-vms": "critical"})
        nursery.cancel_scope.cancel()


async def test_kvms_own_refusal_stands_until_a_hardware_vm_starts(autojump_clock):
    board = Board()
    rivals = Rivals(board, "vt-x", refuse=True, look=Surroundings())
    rivals.refused("hard", "Device or resource busy (EBUSY)")
    await later()
    await rivals.look()
    (warning,) = board.now()
    assert warning.code == "virtualization-held"
    assert "EBUSY" in warning.message
    assert warning.link == "docs/warnings.md#virtualization-held"
    rivals.works()
    assert up(board) == {}


@pytest.mark.kvm
async def test_the_service_starts_what_it_can_and_the_rest_when_the_danger_is_over(tmp_path, monkeypatch, nothing_left):
    found = Surroundings(VIRTUALBOX)
    monkeypatch.setattr("mixvisor.service.rivals.look_for_rivals", found)
    monkeypatch.setattr("mixvisor.service.rivals.FRESH_SECONDS", 0.0)
    facts = replace(HostFacts.read(), technology="vt-x")
    vms = [{"name": "s", "mode": "software", "boot": {"guest": "alu"}},
           {"name": "h", "mode": "hardware", "boot": {"guest": "alu"}}]
    async with running(tmp_path, vms, facts=facts) as service:
        assert (vm(service, "s").state, vm(service, "h").state) == ("running", "failed")
        assert "VBoxHeadless" in vm(service, "h").state_reason
        assert up(service.board)["virtualbox-vms"] == "critical"
        with pytest.raises(ServiceError, match="VirtualBox runs VMs"):
            await service.act("h", "start")
        found.evidence = QUIET
        await service.act("h", "start")
        assert vm(service, "h").state == "running"
        assert "virtualbox-vms" not in up(service.board)
        # On VT-x each place where the modes meet has its warning; both VMs are on one host CPU.
        service.mixed.update()
        await until(lambda: {"mixed-modes", "mixed-modes-cpu"} <= up(service.board).keys())
        # Found while it runs: told, and the VM is left alone.
        found.evidence = VIRTUALBOX
        await service._rivals.look()
        assert vm(service, "h").state == "running"
        await service.act("h", "stop")
        assert up(service.board) == {"virtualbox-vms": "critical"} | {
            code: severity for code, severity in up(service.board).items() if not code.startswith("mixed")}
