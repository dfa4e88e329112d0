"""A scenario is judged like a configuration: whole, with every fault, its line and key."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixvisor.config import examples
from mixvisor.config.load import ConfigError
from mixvisor.config.scenario import load_scenario

EXAMPLES = sorted(Path(next(iter(examples.__path__))).glob("simulate-*.toml"))


def problems(folder: Path, text: str) -> list[str]:
    file = folder / "s.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_scenario(file)
    return [str(problem).replace(str(file), "s.toml") for problem in caught.value.problems]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_examples_are_scenarios(path: Path) -> None:
    assert load_scenario(path).vms


def test_there_are_examples() -> None:
    assert EXAMPLES


def test_a_scenario_of_one_vm_has_defaults(tmp_path: Path) -> None:
    file = tmp_path / "s.toml"
    file.write_text('[[vm]]\nname = "a"\n')
    scenario = load_scenario(file)
    assert (scenario.host.cpus, scenario.policies, scenario.costs.mixed_hardware_us) == (1, ("fair",), 16)
    assert scenario.scheduler.slice_us == 5000
    assert scenario.vms[0].names == ("a",)


def test_every_fault_is_told_with_its_line(tmp_path: Path) -> None:
    assert problems(tmp_path, '''
[simulation]
seconds = 0
policies = ["fair", "lottery"]
[hots]
[scheduler]
slice_us = 1
[costs]
switch_us = 3
[[vm]]
name = "a b"
[[vm]]
name = "b"
wieght = 3
cpus = "0-3"
[[vm]]
name = "c"
behaviour = "scripted"
[[vm]]
name = "c"
run_us = 5
cap = 10
reservation = 20
''') == [
        's.toml:3: [simulation]: seconds: found 0, allowed: 1 to 86400 seconds',
        's.toml:5: hots: found unknown table or key "hots", allowed: [simulation], [host], [scheduler], [costs] and '
        '[[vm]] (did you mean "host"?)',
        's.toml:7: [scheduler]: slice_us: found 1, allowed: 500 to 100000 microseconds',
        's.toml:9: [costs]: switch_us: found unknown key "switch_us", allowed: switch_software_us, switch_hardware_us, '
        'mixed_software_us, mixed_hardware_us, dispatcher_us, late_us (did you mean "switch_software_us"?)',
        's.toml:10: [[vm]] #1 "a b": found { name = "a b" }, allowed: a name of 1 to 63 letters, digits, \'_\', \'.\' '
        "or '-', the first a letter or digit",
        's.toml:14: [[vm]] #2 "b": wieght: found unknown key "wieght", allowed: name, count, mode, weight, cap, '
        'reservation, cpus, latency, behaviour, run_us, sleep_us, script (did you mean "weight"?)',
        's.toml:16: [[vm]] #3 "c": script: found no script, allowed: pairs [run_us, sleep_us] with behaviour = '
        '"scripted", and with no other',
        's.toml:20: [[vm]] #4 "c": name: found "c", which [[vm]] #3 makes already, allowed: a name of its own',
        's.toml:21: [[vm]] #4 "c": run_us: found run_us with behaviour = "busy", allowed: interactive, bursty or io '
        'with it',
        's.toml:23: [[vm]] #4 "c": reservation: found 20, allowed: at most the cap, 10 percent',
    ]


def test_cpus_that_the_host_has_not_and_names_that_count_makes(tmp_path: Path) -> None:
    assert problems(tmp_path, '''
[host]
cpus = 2
[[vm]]
name = "a-2"
cpus = "1-2"
[[vm]]
name = "a"
count = 3
''') == [
        's.toml:6: [[vm]] #1 "a-2": cpus: found CPU 2, allowed: CPUs of [host]: 0 to 1',
        's.toml:8: [[vm]] #2 "a": name: found "a-2", which [[vm]] #1 makes already, allowed: a name of its own',
    ]


def test_no_vm_and_no_file(tmp_path: Path) -> None:
    assert problems(tmp_path, "") == ["s.toml: [[vm]]: found no [[vm]] table, allowed: [[vm]] tables, at least one "
                                      "(write [[vm]])"]
    with pytest.raises(ConfigError, match="no such file"):
        load_scenario(tmp_path / "absent.toml")


@given(st.dictionaries(st.sampled_from(["simulation", "host", "costs", "vm", "x"]), st.one_of(
    st.integers(), st.text(max_size=5), st.lists(st.integers(), max_size=2)), max_size=3))
def test_tables_that_are_none_are_faults_and_no_crash(tmp_path_factory: pytest.TempPathFactory, data: dict) -> None:
    import json
    text = "\n".join(f"{key} = {json.dumps(value)}" for key, value in data.items())
    assert problems(tmp_path_factory.mktemp("s"), text.encode("utf-8", "replace").decode())
