"""What a worker tells of its guest's inside: exits by instruction, where it stands, a profile, its end."""

from __future__ import annotations

import json

import pytest

from mixvisor.service.reports import checked
from mixvisor.vm.worker.protocol import MAX_PACKET
from mixvisor.vm.worker.status import Phase

# again: in al, 60h; out 80h, al; jmp again
PORTS = bytes.fromhex("E460 E680 EBFA")
# again: inc ax; dec bx; jmp again
SPIN = bytes.fromhex("40 4B EBFC")
# mov al, 5; out 80h, al; cli; hlt
HALT = bytes.fromhex("B005 E680 FA F4")
# key: wait for a key by the BIOS, for ever
KEYS = bytes.fromhex("B400 CD16 EBFA")
# 64 bits: mov al, 1; out 80h, al; nop; int3, with an empty IDT
DIES = bytes.fromhex("B001 E680 90 CC 90 F4")


def ask(worker, op, **arguments):
    answer = worker.ask(op, **arguments)
    assert answer["ok"], answer
    return checked(op, {key: value for key, value in answer.items() if key not in ("id", "ok")})


def test_exits_are_told_by_reason_instruction_and_address(start, engine):
    worker = start(engine, PORTS)
    worker.until(lambda: worker.status.exits[0] > 50)
    answer = ask(worker, "exits", limit=10)
    sites = {(site["reason"], site["instruction"], site["address"], site["mode"]) for site in answer["sites"]}
    assert sites == {("io_in", "in al, 0x60", 0x10000, "real mode"), ("io_out", "out 0x80, al", 0x10002, "real mode")}
    assert answer["places"] == 2
    assert answer["total"] == sum(site["count"] for site in answer["sites"]) > 100
    assert len(ask(worker, "exits", limit=1)["sites"]) == 1


def test_where_a_guest_stands_is_told_with_the_code_around_it(start, engine):
    worker = start(engine, SPIN)
    worker.until_phase(Phase.RUNNING)
    answer = ask(worker, "where")
    assert answer["mode"] == "real mode"
    assert answer["address"] in (0x10000, 0x10001, 0x10002)
    assert answer["instruction"] in ("inc ax", "dec bx", "jmp 0")
    assert any(line[0] == answer["address"] for line in answer["code"])


def test_a_profile_finds_the_ring_and_the_hot_code(start, engine):
    worker = start(engine, SPIN)
    worker.until_phase(Phase.RUNNING)
    ask(worker, "profile", hz=500, duration_s=60)
    worker.until(lambda: worker.status.exits[5] >= 20)               # kicks: samples, and our own requests
    answer = ask(worker, "profile-end")
    assert answer["samples"] >= 5
    assert answer["rings"] == [answer["samples"], 0, 0, 0]
    assert answer["modes"] == {"real mode": answer["samples"]}
    assert answer["cpu_ns"] > 0
    assert {line[2] for line in answer["code"][0]["lines"]} >= {"jmp 0"}
    assert answer["granularity"] == ("block" if engine == "software" else "instruction")
    assert worker.ask("profile-end")["error"] == "ValueError: no profile has been taken"


def test_a_profile_of_ring_3_says_ring_3(start, engine):
    worker = start(engine, builtin="alu", bits=64, load=0x10000, entry=0x10000)
    worker.until(lambda: worker.memory[0x20000:0x20008] != bytes(8))
    ask(worker, "profile", hz=500, duration_s=60)
    worker.until(lambda: worker.status.exits[5] >= 20)
    answer = ask(worker, "profile-end")
    assert answer["rings"][3] == answer["samples"] > 0


def test_a_profile_that_nobody_ends_ends_by_itself(start, engine):
    worker = start(engine, SPIN)
    worker.until_phase(Phase.RUNNING)
    ask(worker, "profile", hz=1000, duration_s=0.05)
    worker.until(lambda: worker.ask("profile", hz=1000, duration_s=60)["ok"])


def test_a_guest_that_sleeps_has_no_samples_however_often_it_is_asked(start, engine):
    worker = start(engine, KEYS, boot="disk")
    worker.until_phase(Phase.SLEEPING)
    ask(worker, "profile", hz=1, duration_s=60)
    for _ in range(10):
        worker.press("a")
        ask(worker, "where")
    assert ask(worker, "profile-end")["samples"] <= 1
    assert ask(worker, "where")["mode"] == "real mode"


@pytest.mark.parametrize("arguments", [
    {"hz": 0, "duration_s": 1}, {"hz": 5000, "duration_s": 1}, {"hz": 100, "duration_s": 0},
    {"hz": 100, "duration_s": 1e9}, {"hz": "x", "duration_s": 1}, {"duration_s": 1},
    {"hz": 100, "duration_s": float("nan")},
])
def test_an_impossible_profile_is_refused(start, arguments):
    worker = start("software", SPIN)
    worker.event("started")
    assert not worker.ask("profile", **arguments)["ok"]


def test_one_profile_at_a_time(start):
    worker = start("software", SPIN)
    worker.until_phase(Phase.RUNNING)
    ask(worker, "profile", hz=100, duration_s=60)
    assert "already" in worker.ask("profile", hz=100, duration_s=60)["error"]


def test_a_death_is_told_with_mode_code_and_last_exits(start, engine):
    worker = start(engine, DIES, bits=64)
    ended = worker.event("ended")
    report = checked("where", ended["report"])
    assert ended["fate"] == "crashed"
    assert report["mode"] == "64-bit long mode, ring 0"
    assert report["instruction"] == ended["instruction"] == "int3"
    assert [line[2] for line in report["code"]][:4] == ["mov al, 1", "out 0x80, al", "nop", "int3"]
    assert report["exits"][0] == ["io_out", 0x10002, "out 0x80, al"]
    assert ended["registers"]["rip"] == report["address"] == 0x10005
    assert len(json.dumps(ended)) < MAX_PACKET


def test_a_final_halt_is_told_with_its_code(start, engine):
    worker = start(engine, HALT)
    ended = worker.event("ended")
    report = checked("where", ended["report"])
    assert (ended["code"], report["place"]) == ("halted", "1000:0006")
    assert [line[2] for line in report["code"]][:4] == ["mov al, 5", "out 0x80, al", "cli", "hlt"]
    assert report["exits"] == [["io_out", 0x10002, "out 0x80, al"], ["halt", 0x10005, "hlt"]]
