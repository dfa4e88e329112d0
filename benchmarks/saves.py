"""Save and restore of a 64 MiB guest, 48 of them full of random bytes: seconds, beside a plain copy of as many bytes.

Save: from the pause to the file's being whole and forced to the disk. Restore: from the request to the guest's running,
the worker's start included. The file is in the page cache then. The copy writes and forces a file of the same length.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import trio

from .common import busy_service, options, quantile, report, table

FULL = 48 << 20


def copy(path: Path, size: int) -> float:
    data = os.urandom(1 << 20) * (size >> 20)
    begun = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        file.write(data)
        os.fsync(file.fileno())
    return time.perf_counter() - begun


async def main() -> None:
    chosen = options(__doc__ or "", runs=7, cpu=str(max(os.sched_getaffinity(0))), folder="")
    vm = {"name": "one", "mode": "software", "memory": "64M", "boot": {"guest": "alu"}}
    saves, restores, copies, size = [], [], [], 0
    with TemporaryDirectory(dir=chosen.folder or None) as folder:
        file = Path(folder) / "one.mixvisor"
        async with busy_service([vm], cpus=chosen.cpu) as service:
            live = service.machine("one")._live_one
            assert live is not None
            os.pwrite(live.memory_fd, os.urandom(FULL), 8 << 20)       # where the guest does not look
            for _ in range(chosen.runs):
                answer = await service.save("one", file, leave_running=False)
                saves.append(answer["seconds"])
                size = answer["bytes"]
                copies.append(copy(Path(folder) / "copy", size))
                begun = time.perf_counter()
                await service.restore(file, None)
                restores.append(time.perf_counter() - begun)
    rows = [(what, quantile(seconds, .5), max(seconds)) for what, seconds in (
        ("save", saves), ("restore", restores), (f"plain copy of {size >> 20} MiB", copies))]
    table("A 64 MiB guest into a file and out of it, s", ("what", "median", "max"), rows)
    report("saves", {"saves_s": saves, "restores_s": restores, "copies_s": copies, "bytes": size}, chosen.json)


if __name__ == "__main__":
    trio.run(main)
