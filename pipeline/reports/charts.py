"""Charts as inline SVG, written by hand: no library, no links, colours from the page's style sheet.

In: plain numbers. Out: one `<svg>` string whose strokes and fills are CSS classes (`series-1` …), so that the
page shows it in a light or a dark theme. Called by `demo_report.py`, `run_report.py`, `comparison.py`,
`generation_chart.py` and `scaling.py`.
"""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 68, 16, 14, 44
COLOURS = 8  # series beyond that begin again
# For an SVG file of its own, which no page's style sheet reaches.
INKS = ("#0b6fb8", "#c6500a", "#24875a", "#8a3fb5", "#a88400", "#b3274e", "#1a8795", "#6b6b6b")
STYLE = (
    "<style>svg{background:#fff;font:12px sans-serif}.line{fill:none;stroke-width:2}.grid{stroke:#ddd}"
    ".axis{stroke:#333}"
    + "".join(f".series-{n}{{stroke:{ink}}}.dot.series-{n}{{fill:{ink}}}" for n, ink in enumerate(INKS, 1))
    + ".line.faint{stroke:none}</style>"
)


@dataclass(frozen=True)
class Series:
    """One line: points (x, y) in order of x; `number` picks the colour; `faint` draws it thin and pale; not
    `joined`: its dots alone."""

    name: str
    points: list[tuple[float, float]]
    number: int
    faint: bool = False
    dots: bool = False
    joined: bool = True


@dataclass(frozen=True)
class Mark:
    """Something that happened at `x` in series `number`: a `restart` (a line from top to bottom), a `skip` (a
    cross at the top) or a `save` (a tick on the axis). `title` is shown under the pointer."""

    x: float
    kind: str
    number: int
    title: str


def running_mean(values: Sequence[float], share: float = 0.04) -> list[float]:
    """Mean of the last few values (a share of all, at least one)."""
    width = max(1, round(len(values) * share))
    sums = [0.0, *itertools.accumulate(values)]
    return [(sums[n] - sums[max(0, n - width)]) / min(n, width) for n in range(1, len(sums))]


def thinned(points: Sequence[tuple[float, float]], buckets: int = 240) -> list[tuple[float, float]]:
    """At most four points of each of `buckets` equal parts: its first, lowest, highest and last, in order.

    What a line through all of them would show at that width: no spike is lost.
    """
    if len(points) <= 4 * buckets:
        return list(points)
    kept = []
    for bucket in range(buckets):
        part = range(len(points) * bucket // buckets, len(points) * (bucket + 1) // buckets)
        lowest, highest = (pick(part, key=lambda n: points[n][1]) for pick in (min, max))
        kept += [points[n] for n in sorted({part[0], lowest, highest, part[-1]})]
    return kept


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten in [low, high]; powers alone, every few of them, over a wide range."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 3 else (1,)
    every = max(1, (last - first) // 5)
    found = [f * 10.0**n for n in range(first, last + 1, every) for f in factors]
    return [value for value in found if low <= value <= high] or [low]


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers that lie in [low, high], about `wanted` of them."""
    span = high - low
    if not span > 0:
        return [low]
    step = 10 ** math.floor(math.log10(span / wanted))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= wanted)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_places(low: float, high: float) -> list[tuple[float, float]]:
    """(place, value) of the round numbers of an axis that shows 10^low to 10^high; in a range too narrow for
    steps of 1, 2 and 5, evenly spaced ones."""
    values = log_ticks(10**low, 10**high)
    if len(values) < 3:
        values = ticks(10**low, 10**high)
    return [(math.log10(value), value) for value in values]


def number(value: float) -> str:
    """A number without needless digits."""
    return f"{value:.6g}"


def tick_label(value: float) -> str:
    """As `number`, but short: 80k, 1.5M."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= max(unit, 1e4):
            return f"{value / unit:.6g}{letter}"
    return number(value)


def line_chart(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    marks: Sequence[Mark] = (),
    log: bool = False,
    legend: bool = True,
    x_ticks: Sequence[tuple[float, str]] | None = None,
    log_x: bool = False,
) -> str:
    """Lines over a common pair of axes; the y axis fits the data and need not start at zero. `log`: it is
    logarithmic, and points that are not above zero are left out. `x_ticks`: places on the x axis and what
    they are called, where round numbers are not wanted. `log_x`: the x axis is logarithmic; every x must be
    above zero."""
    if log_x:
        moved = [[(math.log10(x), y) for x, y in one.points] for one in series]
        series = [replace(one, points=points) for one, points in zip(series, moved, strict=True)]
    if log:
        above = [[(x, math.log10(y)) for x, y in one.points if y > 0] for one in series]
        series = [replace(one, points=points) for one, points in zip(series, above, strict=True)]
    points = [point for one in series for point in one.points]
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    y_low, y_high = min(y for _, y in points), max(y for _, y in points)
    margin = (y_high - y_low) * 0.05 or abs(y_high) * 0.05 or 0.5
    frame = _Frame(x_low, x_high if x_high > x_low else x_low + 1, y_low - margin, y_high + margin, log)
    if log_x:
        x_ticks = x_ticks or [(place, tick_label(value)) for place, value in _log_places(x_low, x_high)]
    parts = frame.axes(x_label, y_label, x_ticks)
    parts += [frame.mark(mark) for mark in marks if x_low <= mark.x <= x_high]
    for one in series:
        path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in one.points)
        kind = f"line series-{one.number}{' faint' if one.faint else ''}"
        if one.joined:
            parts.append(f'<polyline class="{kind}" points="{path}"/>')
        if one.dots:
            for x, y in one.points:
                title = f"<title>{html.escape(one.name)}: {number(10**y if log else y)}</title>"
                place = f'cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3"'
                parts.append(f'<circle class="dot series-{one.number}" {place}>{title}</circle>')
    if legend:
        parts += _legend([one for one in series if not one.faint])
    return _svg(parts, f"{y_label} over {x_label}")


def bar_chart(bars: Sequence[tuple[float, float]], x_label: str, y_label: str, series: int = 1) -> str:
    """One bar per (x, height); the x are evenly spaced numbers such as lengths. The y axis starts at zero."""
    xs = [x for x, _ in bars]
    step = min((b - a for a, b in zip(xs, xs[1:], strict=False)), default=1)
    high = max(height for _, height in bars) or 1
    frame = _Frame(min(xs) - step / 2, max(xs) + step / 2, 0, high * 1.05)
    parts = frame.axes(x_label, y_label)
    width = max(0.5, (frame.x(xs[0] + step) - frame.x(xs[0])) * 0.85)
    for x, height in bars:
        top = frame.y(height)
        box = f'x="{frame.x(x) - width / 2:.1f}" y="{top:.1f}" width="{width:.1f}"'
        box += f' height="{frame.y(0) - top:.1f}"'
        parts.append(
            f'<rect class="bar series-{series}" {box}><title>{number(x)}: {number(height)}</title></rect>'
        )
    return _svg(parts, f"{y_label} by {x_label}")


@dataclass(frozen=True)
class _Frame:
    x_low: float
    x_high: float
    y_low: float
    y_high: float
    log: bool = False  # y is the logarithm of what is shown

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (HEIGHT - TOP - BOTTOM)

    def axes(
        self, x_label: str, y_label: str, x_ticks: Sequence[tuple[float, str]] | None = None
    ) -> list[str]:
        floor = HEIGHT - BOTTOM
        parts = []
        values = [(value, value) for value in ticks(self.y_low, self.y_high)]
        if self.log:
            values = _log_places(self.y_low, self.y_high)
        for place, value in values:
            y = self.y(place)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick_label(value)}</text>')
        for value, label in x_ticks or [
            (value, tick_label(value)) for value in ticks(self.x_low, self.x_high, wanted=8)
        ]:
            x = self.x(value)
            anchor = "end" if x + 4 * len(label) > WIDTH else "middle"
            parts.append(f'<text x="{x:.1f}" y="{floor + 18}" text-anchor="{anchor}">{label}</text>')
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}"/>')
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(
            f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{html.escape(x_label)}</text>'
        )
        turn = f'transform="translate(14 {(TOP + floor) / 2}) rotate(-90)"'
        parts.append(f'<text {turn} text-anchor="middle">{html.escape(y_label)}</text>')
        return parts

    def mark(self, mark: Mark) -> str:
        x, title = self.x(mark.x), f"<title>{html.escape(mark.title)}</title>"
        floor = HEIGHT - BOTTOM
        path = {
            "restart": f"M{x:.1f} {TOP}V{floor}",
            "skip": f"M{x - 4:.1f} {TOP - 4}l8 8m0 -8l-8 8",
            "save": f"M{x:.1f} {floor - 5}v10",
        }[mark.kind]
        return f'<path class="mark {mark.kind} series-{mark.number}" d="{path}">{title}</path>'


def _legend(series: Sequence[Series]) -> list[str]:
    parts = []
    for row, one in enumerate(series):
        y = TOP + 10 + 18 * row
        x = WIDTH - RIGHT - 210
        parts.append(f'<line class="line series-{one.number}" x1="{x}" x2="{x + 22}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{x + 30}" y="{y + 4}">{html.escape(one.name)}</text>')
    return parts


def picture(panels: Sequence[str]) -> str:
    """Charts below each other as one SVG file that needs no page around it."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT * len(panels)}">{STYLE}'
    placed = [
        panel.replace("<svg ", f'<svg y="{HEIGHT * n}" width="{WIDTH}" height="{HEIGHT}" ', 1)
        for n, panel in enumerate(panels)
    ]
    return "\n".join([head, *placed, "</svg>"]) + "\n"


def _svg(parts: Sequence[str], label: str) -> str:
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(label, quote=True)}">'
    return "\n".join([head, *parts, "</svg>"])


SIDES = ("model", "against")


def generation_chart(result: dict[str, Any]) -> str:
    """Speed and memory over the context at the smallest batch, and over the batch at the shortest context,
    whatever was varied: one picture of its own, charts below each other."""
    panels, names = [], {"context": "tokens of context", "batch": "texts at once"}
    for along, other in (("context", "batch"), ("batch", "context")):
        if len({point[along] for point in result["points"]}) == 1:
            continue
        fixed = min(point[other] for point in result["points"])
        points = [point for point in result["points"] if point[other] == fixed]
        label = f"{names[along]} ({other} {fixed:,})"
        panels.append(_panel(result, points, along, label, "new tokens per second", _speed))
        if any("memory" in point["model"] for point in points):
            panels.append(_panel(result, points, along, label, "memory at the peak, GB", _peak))
    if not panels:  # a single point
        points = result["points"]
        panels.append(_panel(result, points, "context", names["context"], "new tokens per second", _speed))
    return picture(panels)


def _speed(figures: dict[str, Any]) -> float:
    return figures["tokens_per_second"]["median"]


def _peak(figures: dict[str, Any]) -> float | None:
    return figures["memory"]["peak"] / 1e9 if "memory" in figures else None


def _panel(
    result: dict[str, Any],
    points: list[dict[str, Any]],
    along: str,
    x_label: str,
    y_label: str,
    value: Callable[[dict[str, Any]], float | None],
) -> str:
    series = []
    for number, side in enumerate(SIDES, 1):
        found = [(math.log2(p[along]), p[side]) for p in points if side in p]
        values = [(x, None if "refused" in figures else value(figures)) for x, figures in found]
        drawn = [(x, y) for x, y in values if y is not None]
        if drawn:
            ends = "" if len(drawn) == len(found) else " (no positions beyond)"
            series.append(Series(f"{result[side]['name']}{ends}", sorted(drawn), number, dots=True))
    # Both lines are read against zero: a speed that falls with the context must look like it.
    places = sorted({point[along] for point in points})
    # The legend has room above the lines; no line at all where every point was refused.
    top = 1.3 * max((y for one in series for _, y in one.points), default=1.0)
    base = Series("", [(math.log2(places[0]), 0.0), (math.log2(places[-1]), top)], 1, faint=True)
    x_ticks: list[tuple[float, str]] = []
    for x in map(math.log2, reversed(places)):  # a number that would lie on its neighbour is left out
        if not x_ticks or x_ticks[-1][0] - x >= 0.08 * math.log2(places[-1] / places[0]):
            x_ticks.append((x, f"{round(2**x):,}"))
    return line_chart([*series, base], x_label, y_label, x_ticks=x_ticks)
