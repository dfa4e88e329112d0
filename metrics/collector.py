"""From a snapshot to prometheus-client's metric families, afresh at each scrape.

Theory.  Instruments with `.labels()` children keep the series of VMs that are long gone
(client_python #182, #1047), and collecting them reaches into live objects. Here nothing is
kept: each scrape asks its source for one immutable `Snapshot` and builds every family of
`metrics.families` from it. No `_created` series (they would double the number of series), no
global registry: a `SnapshotCollector` can be registered in a `CollectorRegistry` of its
owner's, or be rendered as it is.

Invariants.
- `collect` never raises. When the source or a family fails, the last good families are shown
  again with `mixvisor_collector_success 0`, and `on_failure` hears of it once, not every scrape.
- Scrapes at the same time share one collection: a collection is used again for `share_s`.
- It may be called from any thread, also from several.

Where it is poor.  A source that blocks, blocks the scrape: a thread cannot be abandoned safely.
So the source must return a picture that is already there (or quickly made) and ask no VM.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample
from prometheus_client.utils import floatToGoString

from .families import FAMILIES, SELF_FAMILIES, Family, Row
from .snapshot import Histogram, Snapshot

__all__ = ["SHARE_S", "Collected", "SnapshotCollector", "metric_of", "metrics_of"]

Collected = tuple[Family, list[Row]]

SHARE_S: Final = 0.1         # two scrapes within this time show one picture
COLLECTOR: Final = "snapshot"  # label value of the collector's own families
_SUFFIX: Final = {"counter": "_total", "info": "_info", "gauge": "", "histogram": ""}


def _histogram_samples(name: str, labels: dict[str, str], value: Histogram) -> Iterator[Sample]:
    total = 0
    bounds = (*(bound_ns / 1e9 for bound_ns in value.bounds_ns), float("inf"))
    for bound, count in zip(bounds, value.counts, strict=True):
        total += count
        yield Sample(name + "_bucket", {**labels, "le": floatToGoString(bound)}, total)
    yield Sample(name + "_count", labels, total)
    yield Sample(name + "_sum", labels, value.sum_ns / 1e9)


def metric_of(family: Family, rows: Iterable[Row]) -> Metric:
    """One family with its samples."""
    metric = Metric(family.name.removesuffix(_SUFFIX[family.kind]), family.help, family.kind)
    add, names = metric.samples.append, family.labels
    for values, value in rows:
        labels = dict(zip(names, values, strict=True))
        if isinstance(value, Histogram):
            metric.samples.extend(_histogram_samples(family.name, labels, value))
        else:
            add(Sample(family.name, labels, float(value)))
    return metric


def rows_of(family: Family, snapshot: Snapshot) -> list[Row]:
    """The rows of one family, checked. Raises what reading a malformed snapshot raises."""
    rows = list(family.rows(snapshot))
    width = len(family.labels)
    for values, value in rows:
        if len(values) != width:
            raise ValueError(f"{family.name}: {len(values)} label values for {width} labels")
        if isinstance(value, Histogram) and len(value.counts) != len(value.bounds_ns) + 1:
            raise ValueError(f"{family.name}: {len(value.counts)} counts for {len(value.bounds_ns)} bounds; "
                             "there must be one more")
    return rows


def metrics_of(snapshot: Snapshot) -> list[Metric]:
    """Every family of the table, made from *snapshot*."""
    return [metric_of(family, rows_of(family, snapshot)) for family in FAMILIES]


class SnapshotCollector(Collector):
    """A prometheus-client collector over a callable that gives the newest `Snapshot`.

    `on_failure` gets the exception when collecting begins to fail (and again only after a
    success in between), and must not raise. `clock` is monotonic, in seconds.
    """

    def __init__(
        self,
        source: Callable[[], Snapshot],
        *,
        share_s: float = SHARE_S,
        on_failure: Callable[[Exception], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._source = source
        self._share_s = share_s
        self._on_failure = on_failure
        self._clock = clock
        self._lock = threading.Lock()
        self._good: list[Collected] = []        # of the last success
        self._shown: list[Collected] = []       # of the last collection, with its own families
        self._shown_at: float | None = None
        self.failure: Exception | None = None   # why the last collection failed, else None

    def describe(self) -> Iterable[Metric]:
        """The families without samples, so that registering does not collect."""
        return [Metric(family.name.removesuffix(_SUFFIX[family.kind]), family.help, family.kind)
                for family in (*FAMILIES, *SELF_FAMILIES)]

    def collect(self) -> Iterable[Metric]:
        """For prometheus-client: the families as its own objects."""
        return [metric_of(family, rows) for family, rows in self.families()]

    def families(self) -> list[Collected]:
        """Every family with its rows: of the newest snapshot, or the last good one."""
        with self._lock:
            now = self._clock()
            if self._shown_at is not None and now - self._shown_at < self._share_s:
                return self._shown
            failure: Exception | None = None
            try:
                snapshot = self._source()
                self._good = [(family, rows_of(family, snapshot)) for family in FAMILIES]
            except Exception as error:  # whatever it is, the operator must see the rest
                failure = error
            end = self._clock()
            own: tuple[float, float] = (float(failure is None), end - now)
            self._shown = [*self._good, *((family, [((COLLECTOR,), value)])
                                          for family, value in zip(SELF_FAMILIES, own, strict=True))]
            self._shown_at = end
            began = failure is not None and self.failure is None
            self.failure = failure
            shown = self._shown
        if began and failure is not None and self._on_failure is not None:
            self._on_failure(failure)
        return shown
