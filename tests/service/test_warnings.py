"""The board: what is up, since when, and where it is explained; and where modes meet, over time."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import trio

from mixvisor.config.model import Config
from mixvisor.service.mixed import KEEP_SECONDS, LOOK_SECONDS, MANY, PAUSE_SECONDS, POLICY_NAMES, Mixed
from mixvisor.service.warnings import KINDS, Board, link, sections, strict_exit
from mixvisor.vm.mixing import MeasuredCost
from mixvisor.vm.modes import ModeDecision, ModeHost, plan

ROOT = Path(__file__).resolve().parents[2]


def test_every_code_that_the_program_raises_has_its_section() -> None:
    raised: set[str] = set()
    for room in ("service", "sched"):
        for module in (ROOT / room).rglob("*.py"):
            text = module.read_text()
            raised |= set(re.findall(r'(?:board\.put|_?warn)\(\s*"([a-z-]+)"', text))
            raised |= set(re.findall(r'code = f"([a-z-]+):\{', text))
    for module in ("conflicts.py", "mixing.py", "host.py"):
        text = (ROOT / "vm" / module).read_text()
        raised |= set(re.findall(r'Conflict\(\s*"([a-z-]+)"', text))
        raised |= set(re.findall(r'MIXED_[A-Z_]+: Final = "([a-z-]+)"', text))
        raised |= set(re.findall(r'_rival\(evidence, "([a-z-]+)"', text))
    assert {"mixed-modes", "virtualbox-vms", "kvm-shared", "no-spare-cpu", "log-lost"} <= raised
    assert raised <= set(KINDS), "codes without a section in docs/warnings.md (KINDS of service/warnings.py)"


def test_each_warning_links_to_a_section_that_is_there() -> None:
    page = (ROOT / "docs/warnings.md").read_text()
    for code in KINDS:
        assert f"\n## {code}\n" in page
        assert link(code) == f"docs/warnings.md#{code}"
    assert link("log-lost:dos") == "docs/warnings.md#log-lost"
    assert sections() in page


def test_a_warning_keeps_its_time_while_its_text_changes_and_is_gone_once_cleared() -> None:
    board = Board()
    board.put("mixed-modes", "warning", "one", "do", ("a",), "light")
    (first,) = board.now()
    board.put("mixed-modes", "warning", "two", "do", ("a", "b"), "light")
    (second,) = board.now()
    assert (first.since_unix_s, second.message, second.vms) == (second.since_unix_s, "two", ("a", "b"))
    board.clear("mixed-modes")
    assert board.now() == ()


@pytest.mark.parametrize(("severities", "code"), [([], 0), (["info"], 0), (["info", "warning"], 8), (["critical"], 8)])
def test_strict_counts_warnings_and_not_notes(severities: list[str], code: int) -> None:
    assert strict_exit(severities) == code


# ---- where modes meet --------------------------------------------------------------------------

HOST = ModeHost("vt-x", True, cores=((0, 2), (1, 3)))


class Lab:
    """Two VMs on a host with two cores of two threads, placed where the test says."""

    def __init__(self) -> None:
        vms = [{"name": "s", "mode": "software", "boot": {"guest": "alu"}},
               {"name": "h", "mode": "hardware", "boot": {"guest": "alu"}}]
        answers = plan(Config.model_validate({"vm": vms}).vms, HOST)
        self.running = {name: answer for name, answer in answers.items() if isinstance(answer, ModeDecision)}
        self.cpus = {"s": 0, "h": 1}
        self.board = Board()
        self.mixed = Mixed(self.board, HOST, "fair", running=lambda: self.running,
                           placed=lambda name: (self.cpus[name],))

    @property
    def codes(self) -> set[str]:
        return {warning.code for warning in self.board.now()}


async def test_of_very_many_vms_steps_are_looked_at_together_and_soon(autojump_clock):
    lab = Lab()
    lab.mixed.changed(MANY)
    assert lab.codes
    lab.running.clear()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lab.mixed.watch)
        await trio.sleep(LOOK_SECONDS / 2)
        assert not lab.codes
        lab.running |= Lab().running
        for _ in range(3):
            lab.mixed.changed(MANY + 1)
        assert not lab.codes
        await trio.sleep(2 * PAUSE_SECONDS)
        assert lab.codes
        nursery.cancel_scope.cancel()


async def test_a_warning_of_a_place_comes_at_once_and_stays_a_while_after_they_parted(autojump_clock):
    lab = Lab()
    lab.mixed.update()
    assert lab.codes == {"mixed-modes"}
    lab.cpus["h"] = 0
    lab.mixed.update()
    assert lab.codes == {"mixed-modes", "mixed-modes-cpu"}
    lab.cpus["h"] = 1
    await trio.sleep(KEEP_SECONDS / 2)
    lab.mixed.update()
    assert "mixed-modes-cpu" in lab.codes
    await trio.sleep(KEEP_SECONDS / 2)
    lab.mixed.update()
    assert lab.codes == {"mixed-modes"}


async def test_all_of_them_go_with_the_vm_that_goes(autojump_clock):
    lab = Lab()
    lab.cpus["h"] = 2
    lab.mixed.update()
    assert lab.codes == {"mixed-modes", "mixed-modes-core"}
    del lab.running["h"]
    lab.mixed.update()
    assert lab.codes == set()


async def test_what_was_measured_is_said_from_then_on(autojump_clock):
    lab = Lab()
    lab.mixed.update()
    lab.mixed.measured(MeasuredCost(5e-6, 4e-6, 6e-6))
    (warning,) = lab.board.now()
    assert "a crossing costs 5.0 µs" in warning.message
    assert warning.weight == "light"
    lab.mixed.measured(None)
    assert "costs" not in lab.board.now()[0].message


def test_the_policies_that_are_recommended_are_those_of_the_configuration() -> None:
    assert "fair" in POLICY_NAMES
    for name in POLICY_NAMES:
        Config.model_validate({"scheduler": {"policy": name}})
