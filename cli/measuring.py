"""A measurement from the borrower's side: the script goes to the service, slices come back, the interval closes.

Theory.  One loop calls the service some ten times a second: more of the script in, slices out (service/loans.py). The
estimates are made anew from all slices every second or two, in a thread, so that the script never runs dry and the
loan never looks deserted. It ends at the wanted precision, at the end of the time, when asked to (Ctrl-C), or
when the loan ends under it; whatever was measured by then is analysed and told.

The precision is wanted of the loss at the reference slice length; it counts only once the blocks, which the checks
need, have three replicates of every length. Stopping on a *width* does not favour any value of the estimate.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

if TYPE_CHECKING:
    from ..metrics.mixing.report import Analysis
    from ..metrics.mixing.session import Session
    from ..metrics.mixing.slices import Recording
    from ..service.client import Client

__all__ = ["Campaign", "Ended", "View", "l2_bytes"]

EXCHANGE_SECONDS: Final = 0.1
CHUNK: Final = 1500                   # entries in one request
ANALYSE_EVERY_SECONDS: Final = 1.5
ANALYSE_PART: Final = 4               # of the time at most 1/4 goes into estimates
REPLICATES: Final = 3                 # of every slice length, before precision ends it


class View(Protocol):
    """Who is told how far it is."""

    def show(self, elapsed_s: float, slices: int, analysis: Analysis | None) -> None: ...


@dataclass(frozen=True, slots=True)
class Ended:
    recording: Recording
    why: str                          # precision, time, interrupted, or what the service said
    seconds: float
    dispatch: str


class Campaign:
    """client: of the service. lent: its answer to `lend`. stop: set by whoever wants it to end."""

    def __init__(
        self, client: Client, lent: Mapping[str, Any], session: Session, *, lengths: int, seconds: float,
        precision: float | None, wanted: float, view: View, stop: threading.Event,
    ) -> None:
        self._client = client
        self._loan = str(lent["loan"])
        self._dispatch = str(lent["dispatch"])
        self._session = session
        self._lengths = lengths
        self._seconds = seconds
        self._precision = precision
        self._wanted = wanted
        self._view = view
        self._stop = stop
        self._slices = 0
        self._analysis: Analysis | None = None

    def run(self, about: Callable[[float, str], Mapping[str, Any]]) -> Ended:
        """Measure. *about*: what the recording says of itself, given seconds and why it ended. Raises ServiceError."""
        began = time.monotonic()
        with ThreadPoolExecutor(1) as pool:
            try:
                why = self._until_over(began, pool)
            except BaseException:
                self._stop.set()
                raise
            finally:
                elapsed = time.monotonic() - began
        recording = self._session.recording({**about(elapsed, why), "dispatch": self._dispatch})
        return Ended(recording, why, elapsed, self._dispatch)

    def _until_over(self, began: float, pool: ThreadPoolExecutor) -> str:
        from ..metrics.mixing.report import analyse

        pending: Future[tuple[Analysis, float]] | None = None
        due = ANALYSE_EVERY_SECONDS

        def estimate(recording: Recording) -> tuple[Analysis, float]:
            start = time.monotonic()
            return analyse(recording, self._wanted), time.monotonic() - start

        while True:
            ended = self._exchange()
            elapsed = time.monotonic() - began
            if pending is not None and pending.done():
                self._analysis, took = pending.result()
                pending, due = None, elapsed + max(ANALYSE_EVERY_SECONDS, ANALYSE_PART * took)
            if pending is None and elapsed >= due:
                pending = pool.submit(estimate, self._session.recording({}))
            self._view.show(elapsed, self._slices, self._analysis)
            why = ended or ("interrupted" if self._stop.is_set() else "time" if elapsed >= self._seconds
                            else "precision" if self._is_precise() else None)
            if why is not None:
                if ended is None:
                    self._take(self._client.give_back(self._loan))
                return why
            self._stop.wait(EXCHANGE_SECONDS)

    def _exchange(self) -> str | None:
        answer = self._client.exchange(self._loan, self._session.next_entries(CHUNK))
        self._session.sent(int(answer["written"]))
        self._take(answer)
        return answer["ended"]

    def _take(self, answer: Mapping[str, Any]) -> None:
        self._dispatch = str(answer["dispatch"])
        self._slices += len(answer["slices"])
        self._session.add(answer["slices"])

    def _is_precise(self) -> bool:
        analysis = self._analysis
        if self._precision is None or analysis is None or analysis.order is None or analysis.blocks is None:
            return False
        points = analysis.blocks.points
        return (analysis.precision is not None and analysis.precision <= self._precision
                and len(points) == self._lengths and all(p.replicates >= REPLICATES for p in points))


def l2_bytes(cpu: int, root: Path = Path("/sys")) -> int | None:
    """Size of a host CPU's level 2 cache, where the kernel tells."""
    for folder in sorted((root / f"devices/system/cpu/cpu{cpu}/cache").glob("index*")):
        try:
            level, size = ((folder / name).read_text().strip() for name in ("level", "size"))
        except OSError:
            continue
        if level == "2" and size.endswith("K") and size[:-1].isdigit():
            return int(size[:-1]) << 10
    return None


def load_average() -> list[float]:
    """So that a reader can tell a quiet host from a busy one."""
    return [round(value, 2) for value in os.getloadavg()]
