"""Looking into a guest through the whole service: why it ended, its exits, a profile of it."""

from __future__ import annotations

import pytest
import trio

from mixvisor.service.backend import Conflict, NotFound, ServiceError
from mixvisor.service.client import Client

from .conftest import running, until, vm

pytestmark = pytest.mark.usefixtures("nothing_left")
# 32 bits: mov al, 1; out 80h, al; int3, with an empty IDT
DIES = bytes.fromhex("B001 E680 CC F4")


async def test_a_running_guest_is_looked_into_over_the_socket(tmp_path):
    async with running(tmp_path, [{"name": "io", "mode": "software", "boot": {"guest": "portio"}}]) as service:
        with Client(tmp_path / "run" / "control.sock") as client:
            def ask(method, *arguments):
                return trio.to_thread.run_sync(getattr(client, method), "io", *arguments)

            await until(lambda: vm(service, "io").exits["io_out"] > 1000)
            told = await ask("exits", 5)
            assert [(site["reason"], site["instruction"]) for site in told["sites"]] == [("io_out", "out dx, al")]
            assert told["total"] == told["sites"][0]["count"] >= 1000
            why = await ask("why")
            assert (why["state"], why["code"]) == ("running", None)
            assert why["report"]["mode"] == "64-bit long mode, ring 3"
            assert why["registers"]["rip"] == why["report"]["address"]
            await ask("profile", 500, 60.0)
            kicks = vm(service, "io").exits["kick"]
            await until(lambda: vm(service, "io").exits["kick"] > kicks + 20)
            profile = await ask("profile_end")
            assert profile["rings"][3] == profile["samples"] > 0
            assert profile["host_ns"] > 0
            assert profile["cpu_ns"] > 0
            with pytest.raises(ServiceError, match="no profile has been taken"):
                await ask("profile_end")


async def test_a_dead_guest_still_says_why(tmp_path):
    (tmp_path / "dies.bin").write_bytes(DIES)
    boot = {"flat": str(tmp_path / "dies.bin"), "bits": 32}
    async with running(tmp_path, [{"name": "dies", "mode": "software", "boot": boot, "autostart": False}]) as service:
        assert (await service.ask("dies", "why"))["state"] == "defined"
        await service.machine("dies").start()
        await until(lambda: vm(service, "dies").state == "crashed")
        why = await service.ask("dies", "why")
        assert (why["code"], why["instruction"]) == ("triple-fault", "int3")
        assert why["since_unix_s"] > 0
        assert why["report"]["exits"][0][2] == "out 0x80, al"
        assert [line[2] for line in why["report"]["code"]][:3] == ["mov al, 1", "out 0x80, al", "int3"]
        with pytest.raises(Conflict, match="crashed"):
            await service.ask("dies", "exits", limit=1)
        with pytest.raises(NotFound):
            await service.ask("nobody", "why")


async def test_a_guest_that_was_killed_has_a_reason_and_no_report(tmp_path):
    async with running(tmp_path, [{"name": "a", "mode": "software", "boot": {"guest": "alu"}}]) as service:
        await service.machine("a").kill()
        why = await service.ask("a", "why")
        assert (why["state"], why["reason"], why["report"]) == ("stopped", "killed", None)
