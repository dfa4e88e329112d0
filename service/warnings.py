"""Warnings: what an operator should know, raised and cleared while the service runs.

One `Board` holds the warnings that are true *now*, each under a stable code. Raising one that
is up already with the same text changes nothing; its coming and going is logged. The board is shown by the API,
the command line and as `mixvisor_warnings_active`.
"""

from __future__ import annotations

import time
from typing import Literal

import structlog

from ..metrics.snapshot import WarningSnapshot

__all__ = ["Board"]

log = structlog.get_logger("mixvisor")


class Board:
    def __init__(self) -> None:
        self._up: dict[str, WarningSnapshot] = {}

    def put(
        self, code: str, severity: Literal["info", "warning", "critical"], message: str, advice: str,
        vms: tuple[str, ...] = (),
    ) -> None:
        """The warning is true from now on (or still, perhaps with another text)."""
        old = self._up.get(code)
        new = WarningSnapshot(code=code, severity=severity, message=message, advice=advice,
                              since_unix_s=old.since_unix_s if old else time.time(), vms=vms)
        if old == new:
            return
        self._up[code] = new
        # Which VMs it is about changes with every start and stop: shown, not logged each time.
        if old is None or old.severity != severity:
            write = log.info if severity == "info" else log.warning
            write(message, code=code, advice=advice, vms=list(vms))

    def clear(self, code: str) -> None:
        if self._up.pop(code, None) is not None:
            log.info("no longer so", code=code)

    def now(self) -> tuple[WarningSnapshot, ...]:
        return tuple(self._up.values())
