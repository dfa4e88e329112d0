"""The bytes of `/metrics`: the text format or OpenMetrics, as the scraper asks.

Theory.  Prometheus says in its Accept header which formats it can read, and prometheus-client
chooses. The encoding of a `SnapshotCollector` is done here: prometheus-client escapes character
by character and makes an object of every sample, which cost 36 to 66 ms of CPU for a hundred VMs;
this goes from the rows of a snapshot straight to text in a third of that (benchmarks/scrape.py).
It may be that short because our families are plain: names are legal as they are, there are no
exemplars, timestamps or `_created` samples. A test compares
the two encoders byte for byte. Anything else (a registry with instruments in it, the escaping
schemes "dots" and "values") goes to prometheus-client.

Invariants.  A header that cannot be understood gets the plain text format that every scraper
reads, never an error. `render` keeps nothing and may be called from any thread.

Where it is poor.  It is plain computation, tens of milliseconds: an event loop must call it in a
worker thread, or it would hold up everything else for that long.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from prometheus_client.exposition import (
    CONTENT_TYPE_PLAIN_0_0_4,
    choose_encoder,
    generate_latest,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from .collector import Collected, SnapshotCollector
from .families import Family, Row
from .snapshot import Histogram

__all__ = ["CONTENT_TYPE_TEXT", "encode_openmetrics", "encode_text", "render"]

CONTENT_TYPE_TEXT: Final = CONTENT_TYPE_PLAIN_0_0_4
# Escaping schemes that leave our names as they are.
_NAMES_UNTOUCHED: Final = ("escaping=underscores", "escaping=allow-utf-8")


def render(source: Collector, accept_header: str | None = None) -> tuple[str, bytes]:
    """What to answer a scrape of *source* (a `SnapshotCollector` or a `CollectorRegistry`).

    Returns (content type, body). Without a header, or with one that asks for nothing known,
    the Prometheus text format 0.0.4.
    """
    try:
        encoder, content_type = choose_encoder(accept_header or "")
    except (TypeError, ValueError):  # prometheus-client compares "version=x" with numbers
        encoder, content_type = generate_latest, CONTENT_TYPE_TEXT
    plain_names = "escaping=" not in content_type or content_type.endswith(_NAMES_UNTOUCHED)
    if isinstance(source, SnapshotCollector) and plain_names:
        if content_type.startswith("application/openmetrics-text"):
            return content_type, encode_openmetrics(source.families())
        return content_type, encode_text(source.families())
    # prometheus-client annotates the argument as a registry; it only calls collect().
    return content_type, encoder(source)  # pyright: ignore[reportArgumentType]


def encode_text(collected: Iterable[Collected]) -> bytes:
    """The Prometheus text format, version 0.0.4, of plain families."""
    lines: list[str] = []
    known: dict[tuple[tuple[str, ...], tuple[str, ...]], str] = {}
    for family, rows in collected:
        kind = "gauge" if family.kind == "info" else family.kind
        text = family.help.replace("\\", r"\\").replace("\n", r"\n")
        lines.append(f"# HELP {family.name} {text}\n# TYPE {family.name} {kind}\n")
        _add_rows(lines, family, rows, known)
    return "".join(lines).encode("utf-8", "replace")


def encode_openmetrics(collected: Iterable[Collected]) -> bytes:
    """OpenMetrics, version 1.0.0, of plain families."""
    lines: list[str] = []
    known: dict[tuple[tuple[str, ...], tuple[str, ...]], str] = {}
    for family, rows in collected:
        name = family.name.removesuffix({"counter": "_total", "info": "_info"}.get(family.kind, ""))
        lines.append(f"# HELP {name} {_escape(family.help)}\n# TYPE {name} {family.kind}\n")
        _add_rows(lines, family, rows, known)
    lines.append("# EOF\n")
    return "".join(lines).encode("utf-8", "replace")


def _add_rows(
    lines: list[str], family: Family, rows: Iterable[Row],
    known: dict[tuple[tuple[str, ...], tuple[str, ...]], str],
) -> None:
    """The samples of a family. `known` remembers label texts: a VM's are the same in most families."""
    name, names = family.name, family.labels
    for values, value in rows:
        if isinstance(value, Histogram):
            _add_histogram(lines, family, values, value)
            continue
        labels = known.get((names, values))
        if labels is None:
            labels = known[names, values] = _labels(zip(names, values, strict=True))
        lines.append(f"{name}{labels} {floatToGoString(value)}\n")


def _add_histogram(lines: list[str], family: Family, values: tuple[str, ...], value: Histogram) -> None:
    total = 0
    pairs = tuple(zip(family.labels, values, strict=True))
    bounds = (*(bound_ns / 1e9 for bound_ns in value.bounds_ns), float("inf"))
    for bound, count in zip(bounds, value.counts, strict=True):
        total += count
        labels = _labels((*pairs, ("le", floatToGoString(bound))))
        lines.append(f"{family.name}_bucket{labels} {floatToGoString(total)}\n")
    labels = _labels(pairs)
    lines.append(f"{family.name}_count{labels} {floatToGoString(total)}\n"
                 f"{family.name}_sum{labels} {floatToGoString(value.sum_ns / 1e9)}\n")


def _labels(pairs: Iterable[tuple[str, str]]) -> str:
    text = ",".join([f'{key}="{_escape(value)}"' for key, value in sorted(pairs)])
    return f"{{{text}}}" if text else ""


def _escape(text: str) -> str:
    if "\\" in text or "\n" in text or '"' in text:
        return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
    return text
