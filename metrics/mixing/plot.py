"""Loss against switches a second, as an SVG that any browser shows and any editor opens.

What is drawn: each slice length's loss with its 95 % interval, the cost as a straight line through the origin with its
band, the randomised order's figure beside it, the A/A control in grey around zero. Loss in percent of guest work,
switches in a second of VM CPU time. Nothing is smoothed, nothing left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Final

from .interval import Estimate
from .report import Analysis, Verdict

__all__ = ["svg"]

WIDTH: Final = 760
HEIGHT: Final = 470
LEFT, RIGHT, TOP, BOTTOM = 70, 24, 78, 62
INK: Final = "#1f2430"
FAINT: Final = "#8a919e"
GRID: Final = "#e3e6eb"
BLOCKS: Final = "#b3246f"
ORDER: Final = "#0b7285"
BAND: Final = 0.15                 # opacity


class _Scale:
    """Data to pixels, with round ticks."""

    def __init__(self, low: float, high: float, start: float, end: float, about: int = 6) -> None:
        step = _round_step((high - low) / about)
        self.low, self.high, self.step = math.floor(low / step) * step, math.ceil(high / step) * step, step
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        return self._start + (value - self.low) / (self.high - self.low) * (self._end - self._start)

    def ticks(self) -> list[float]:
        count = round((self.high - self.low) / self.step)
        return [self.low + i * self.step for i in range(count + 1)]


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)


def svg(analysis: Analysis, verdict: Verdict, *, title: str) -> str:
    """The picture as text. *title* names the host. Raises ValueError where there is nothing to draw."""
    if analysis.cost is None:
        raise ValueError("there is no estimate to draw")
    points = analysis.blocks.points if analysis.blocks else ()
    reference = 1e9 / analysis.reference_ns
    farthest = max([p.switches_s for p in points] + [reference]) * 1.08
    cost = analysis.cost
    values = [0.0, *(cost.bounds()[side] / 1e9 * farthest for side in (0, 1))]
    for point in points:
        values += [*point.loss.bounds(), *point.control.bounds()]
    spread = max(max(values) - min(values), 0.001)
    x = _Scale(0, farthest, LEFT, WIDTH - RIGHT)
    y = _Scale(100 * (min(values) - 0.04 * spread), 100 * (max(values) + 0.04 * spread), HEIGHT - BOTTOM, TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="system-ui, sans-serif" font-size="13" role="img">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(LEFT, 24, title, size=15, weight=600),
        _text(LEFT, 44, verdict.headline, fill=FAINT),
        *_axes(x, y), *_line(x, y, cost, farthest),
    ]
    for point in points:
        parts.append(_interval(x(point.switches_s) + 6, y, point.control, FAINT, "A/A control"))
        parts.append(_interval(x(point.switches_s), y, point.loss, BLOCKS,
                               f"blocks, slices of {point.slice_ns / 1e6:g} ms, {point.replicates} replicates"))
    if analysis.order is not None:
        at = analysis.order.cost.scaled(1 / analysis.reference_ns)
        parts.append(_interval(x(reference) - 6, y, at, ORDER,
                               f"randomised order, {analysis.order.slices} slices", diamond=True))
    parts += _legend([*([(BLOCKS, "mixed against batched blocks")] if points else []),
                      *([(ORDER, "randomised order")] if analysis.order else []),
                      *([(FAINT, "A/A control")] if points else [])])
    return "\n".join([*parts, "</svg>", ""])


def _axes(x: _Scale, y: _Scale) -> list[str]:
    parts: list[str] = []
    floor = HEIGHT - BOTTOM
    digits = max(0, -math.floor(math.log10(y.step) + 1e-9))
    for tick in y.ticks():
        at = y(tick)
        zero = abs(tick) < y.step / 2
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}" '
                     f'stroke="{INK if zero else GRID}" stroke-width="{1.2 if zero else 1}"/>')
        parts.append(_text(LEFT - 8, at + 4, f"{tick + 0.0 if not zero else 0.0:.{digits}f}", anchor="end"))
    for tick in x.ticks():
        parts.append(_text(x(tick), HEIGHT - BOTTOM + 20, f"{tick:,.0f}".replace(",", " "), anchor="middle"))
        parts.append(f'<line x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{floor}" y2="{floor + 5}" stroke="{INK}"/>')
    parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}" stroke="{INK}"/>')
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 18,
                       "switches in a second of CPU time, every one a crossing", anchor="middle"))
    middle = (TOP + floor) / 2
    parts.append(f'<text x="18" y="{middle:.0f}" transform="rotate(-90 18 {middle:.0f})" text-anchor="middle" '
                 f'fill="{INK}">guest work lost to crossing, %</text>')
    return parts


def _line(x: _Scale, y: _Scale, cost: Estimate, farthest: float) -> list[str]:
    low, high = cost.bounds()
    end = x(farthest)

    def at(ns: float) -> float:
        return y(100 * ns / 1e9 * farthest)

    zero = f"{x(0):.1f},{y(0):.1f}"
    tip = at(cost.value)
    label = f"{cost.value / 1e3:.1f} ± {cost.half_width() / 1e3:.1f} µs a crossing"
    return [f'<polygon points="{zero} {end:.1f},{at(low):.1f} {end:.1f},{at(high):.1f}" fill="{ORDER}" '
            f'fill-opacity="{BAND}"/>',
            f'<line x1="{x(0):.1f}" y1="{y(0):.1f}" x2="{end:.1f}" y2="{tip:.1f}" stroke="{ORDER}" '
            'stroke-width="1.6"/>',
            _text(end - 4, tip + (18 if tip < TOP + 30 else -10), label, anchor="end", fill=ORDER, weight=600)]


def _interval(at: float, y: _Scale, estimate: Estimate, colour: str, title: str, *, diamond: bool = False) -> str:
    low, high = estimate.bounds()
    middle = y(100 * estimate.value)
    turned = f'transform="rotate(45 {at:.1f} {middle:.1f})"'
    mark = (f'<rect x="{at - 4:.1f}" y="{middle - 4:.1f}" width="8" height="8" {turned} fill="{colour}"/>' if diamond
            else f'<circle cx="{at:.1f}" cy="{middle:.1f}" r="4.5" fill="{colour}"/>')
    caps = "".join(f'<line x1="{at - 4:.1f}" x2="{at + 4:.1f}" y1="{end:.1f}" y2="{end:.1f}"/>'
                   for end in (y(100 * low), y(100 * high)))
    words = f"{title}: {100 * estimate.value:.3f} % ({100 * low:.3f} to {100 * high:.3f})"
    return (f'<g><title>{escape(words)}</title><g stroke="{colour}" stroke-width="1.5">'
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{y(100 * low):.1f}" y2="{y(100 * high):.1f}"/>{caps}</g>{mark}</g>')


def _legend(entries: Sequence[tuple[str, str]]) -> list[str]:
    parts: list[str] = []
    at = LEFT
    for colour, words in entries:
        parts.append(f'<circle cx="{at + 5}" cy="{TOP - 18}" r="4.5" fill="{colour}"/>')
        parts.append(_text(at + 15, TOP - 14, words))
        at += 30 + 7 * len(words)
    return parts


def _text(
    x: float, y: float, words: str, *, anchor: str = "start", size: int = 13, fill: str = INK, weight: int = 400,
) -> str:
    return (f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}" '
            f'fill="{fill}">{escape(words)}</text>')
