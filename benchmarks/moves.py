"""Change of mode: how long a guest stands still, and whether it notices.

FreeDOS in the middle of typing: each character of a command is typed in one mode and the next one in the other, again
and again; every command must be answered as if nothing had been. Beside it a built-in guest that counts in ring 3. The
stop is what the worker measures, from the request in its hands to the guest's being able to go on; the null is
a request that changes nothing, by the same way (its whole round trip).
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import trio

from mixvisor.cli.keys import text_to_keys
from mixvisor.service.app import Service

from .common import busy_service, options, quantile, report, table

IMAGE = "freedos-1.4M.img"
PATIENCE_S = 180.0


def image() -> Path | None:
    here = Path(os.environ.get("MIXVISOR_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "guests" / IMAGE
    return here if here.exists() else None


class Mover:
    def __init__(self, service: Service, name: str) -> None:
        self.service, self.name = service, name
        self.stops_ms: dict[str, list[float]] = {"hardware": [], "software": []}
        self.null_ms: list[float] = []

    async def move(self) -> None:
        now = self.service.machine(self.name).decision.mode
        to = "hardware" if now == "software" else "software"
        answer = await self.service.set_mode(self.name, to)
        assert answer["changed"], answer
        self.stops_ms[to].append(answer["stop_seconds"] * 1e3)
        begun = time.perf_counter()
        await self.service.set_mode(self.name, to)
        self.null_ms.append((time.perf_counter() - begun) * 1e3)

    @property
    def moves(self) -> int:
        return sum(map(len, self.stops_ms.values()))

    def rows(self) -> list[tuple[object, ...]]:
        both = [stop for stops in self.stops_ms.values() for stop in stops]
        return [(f"{self.name} to {to}" if to else self.name, len(stops), quantile(stops, .5), quantile(stops, .99),
                 max(stops)) for to, stops in (*self.stops_ms.items(), ("", both)) if stops]


async def screen(service: Service) -> list[str]:
    return [row.rstrip() for row in (await service.ask("dos", "screen"))["rows"]]


async def until_shown(service: Service, shown: Any, what: str) -> None:
    with trio.move_on_after(PATIENCE_S):
        while not shown(await screen(service)):  # noqa: ASYNC110
            await trio.sleep(0.02)
        return
    raise SystemExit(f"{what} never showed:\n" + "\n".join(await screen(service)))


async def freedos(moves: int, cpu: str, disk: Path) -> tuple[Mover, int]:
    vm = {"name": "dos", "mode": "software", "memory": "2M", "boot": {"disk": str(disk)}}
    commands = 0
    async with busy_service([vm], cpus=cpu) as service:
        mover = Mover(service, "dos")
        await until_shown(service, lambda rows: rows[0] == "A:\\>", "the prompt")
        while mover.moves < moves:
            word = f"{commands:04}abcdefghijklmnop"
            for key in text_to_keys(f"echo {word}\n"):
                assert (await service.ask("dos", "keys", scancodes=[list(key)]))["accepted"] == 1
                await mover.move()
            await until_shown(service, lambda rows, word=word: word in rows and rows[rows.index(word) - 1].endswith(
                f"echo {word}"), f"the answer to command {commands}")
            commands += 1
        return mover, commands


async def counting(moves: int, cpu: str) -> Mover:
    vm = {"name": "alu", "mode": "software", "memory": "4M", "boot": {"guest": "alu"}}
    async with busy_service([vm], cpus=cpu) as service:
        mover = Mover(service, "alu")
        while mover.moves < moves:
            before = service.machine("alu").snapshot().progress or 0
            await mover.move()
            while (service.machine("alu").snapshot().progress or 0) <= before:  # noqa: ASYNC110
                await trio.sleep(0.001)
        return mover


async def main() -> None:
    chosen = options(__doc__ or "", moves=1000, cpu=str(max(os.sched_getaffinity(0))))
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        raise SystemExit("/dev/kvm cannot be used: there is no other mode")
    disk, rows, figures = image(), [], {}
    if disk is None:
        print(f"FreeDOS: left out, no {IMAGE} among the boot disks")
    else:
        mover, commands = await freedos(chosen.moves, chosen.cpu, disk)
        print(f"FreeDOS: {commands} commands typed over {mover.moves} moves, every one answered as typed")
        rows += mover.rows()
        figures["freedos"] = {"stops_ms": mover.stops_ms, "null_ms": mover.null_ms, "commands": commands}
    mover = await counting(chosen.moves, chosen.cpu)
    rows += [*mover.rows(), ("a request that changes nothing, whole round trip", len(mover.null_ms),
                             quantile(mover.null_ms, .5), quantile(mover.null_ms, .99), max(mover.null_ms))]
    figures["alu"] = {"stops_ms": mover.stops_ms, "null_ms": mover.null_ms}
    table("Change of mode: the guest stands still, ms", ("guest", "moves", "p50", "p99", "max"), rows)
    report("moves", figures, chosen.json)


if __name__ == "__main__":
    trio.run(main)
