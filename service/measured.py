"""What mixing was measured to cost on this host: kept in the state directory, recalled at the next start.

A figure says something only of the host that it was measured on: another technology, CPU model or kernel, and it is
left alone. A file that cannot be read costs the figure, never the service.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import structlog

from ..metrics.mixing.result import RESULT_FILE, MeasuredHost, MixingResult, ResultError, read_result, write_result
from .backend import ServiceError, Unusable

__all__ = ["Measured"]

log = structlog.get_logger("mixvisor")


class Measured:
    """directory: of the state. act: told of a result that holds from now on."""

    def __init__(self, directory: Path, host: MeasuredHost, act: Callable[[MixingResult], None]) -> None:
        self.host = host
        self.result: MixingResult | None = None
        self._path = directory / RESULT_FILE
        self._act = act

    def recall(self) -> None:
        """What was measured before, if it still says something of this host."""
        try:
            result = read_result(self._path)
        except FileNotFoundError:
            return
        except ResultError as error:
            log.warning("the last measurement of mixing is of no use", code="mixing-lost", error=str(error))
            return
        if result.is_of(self.host):
            self._use(result)

    def keep(self, result: MixingResult) -> None:
        """A new measurement. Raises ServiceError, and the last one holds then."""
        if not result.is_of(self.host):
            raise Unusable("that was not measured on this host as it is now")
        try:
            write_result(result, self._path)
        except OSError as error:
            raise ServiceError(f"{self._path} cannot be written: {error.strerror}") from error
        self._use(result)
        log.info(f"measured what mixing costs: {result.headline}", code="mixing-measured", verdict=result.verdict)

    def _use(self, result: MixingResult) -> None:
        self.result = result
        self._act(result)
