"""The chart of `sllm benchmark generation`: speed and memory over context and batch, as one SVG file.

In: the benchmark's result as plain figures. Out: the file's text. Nothing here imports torch, so that the
docs' pictures are drawn anew in no time (`docs_tables.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from pipeline.reports.charts import Series, line_chart, picture

SIDES = ("model", "against")


def chart(result: dict[str, Any]) -> str:
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
