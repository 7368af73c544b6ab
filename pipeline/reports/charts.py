"""The chart of `sllm benchmark generation`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from data_prep.common.charts import Line, Lines, Plot, svg

SIDES = ("model", "against")
NAMES = {"context": "tokens of context", "batch": "texts at once"}
Points = Sequence[dict[str, Any]]


def generation_chart(result: dict[str, Any]) -> str:
    """One SVG file: speed and memory over the context at the smallest batch, and over the batch at the
    shortest context, where they were varied."""
    return svg(generation_plots(result), "New tokens per second and memory")


def generation_plots(result: dict[str, Any]) -> list[Plot]:
    found: list[Plot] = []
    for along, other in (("context", "batch"), ("batch", "context")):
        if len({point[along] for point in result["points"]}) > 1:
            fixed = min(point[other] for point in result["points"])
            points = [point for point in result["points"] if point[other] == fixed]
            found += _plots(result, points, along, f"{NAMES[along]} ({other} {fixed:,})")
    return found or _plots(result, result["points"], "context", NAMES["context"])


def _plots(result: dict[str, Any], points: Points, along: str, x_label: str) -> list[Plot]:
    speed, memory = [], []
    for side, colour in zip(SIDES, ("sllm", "lm"), strict=True):
        measured = [point for point in points if side in point]
        drawn = sorted((p for p in measured if "refused" not in p[side]), key=lambda p: p[along])
        if not drawn:
            continue
        name = result[side]["name"] + ("" if len(drawn) == len(measured) else " (no positions beyond)")
        rates = [point[side]["tokens_per_second"] for point in drawn]
        values = [(p[along], rate["median"]) for p, rate in zip(drawn, rates, strict=True)]
        spread = [
            (min(rate["values"]), max(rate["values"])) if "values" in rate else (rate["median"],) * 2
            for rate in rates
        ]
        speed.append(Line(name, values, colour, "dots", interval=spread))
        peaks = [(p[along], p[side]["memory"]["peak"] / 1e9) for p in drawn if "memory" in p[side]]
        memory += [Line(name, peaks, colour, "dots")] if peaks else []
    # The axis is logarithmic; a label that would meet its neighbour is left out.
    places = sorted({point[along] for point in points}, reverse=True)
    shown = places[:1]
    for place in places[1:]:
        if math.log(shown[-1] / place) >= 0.08 * math.log(places[0] / places[-1]):
            shown.append(place)
    ticks = [(place, f"{place:,}") for place in shown]
    panels = [(speed, "new tokens per second, median and range")] + (
        [(memory, "memory at the peak, GB")] if memory else []
    )
    return [Lines(lines, x_label, label, log_x=True, y_from=0, x_ticks=ticks) for lines, label in panels]
