"""Where does context pay: the table and the chart of a sweep that measures the loss by context length."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from data_prep.common.charts import DASHES, Line, Lines
from data_prep.common.page import NOTHING, Table
from pipeline.common.text import with_interval

WORTH = 0.02  # bits per byte from which context pays
CAPTION = "Bits per byte lost with only so many tokens of context, against the longest one"
COLOURS = ("lm", "sllm", "vae", "other-1", "other-2", "other-3", "other-4", "other-5")

Row = dict[str, Any]


def beyond(row: Row) -> dict[int, dict[str, Any]]:
    """Context length → its figures (`bits_per_byte`, `lost`), of one row."""
    curve = row.get("context_curve")
    return {int(length): one for length, one in curve["contexts"].items()} if curve else {}


def table(rows: Iterable[Row]) -> Table | None:
    """A row a run: bits per byte at the longest context, and what is lost with less; a star where that is
    `WORTH` or more and its interval is above 0. None for rows without curves."""
    measured = [(row, beyond(row)) for row in rows if beyond(row)]
    if not measured:
        return None
    lengths = sorted({length for _, curve in measured for length in curve})
    shown = []
    for row, curve in measured:
        cells = [_star(curve[n]) if n in curve else NOTHING for n in lengths[:-1]]
        last = with_interval(curve[lengths[-1]], "bits_per_byte", 3) if lengths[-1] in curve else NOTHING
        operations = row.get("needed_operations")
        spent = NOTHING if operations is None else f"{operations / 1e12:.3g}"
        shown.append((row["name"], str(row["seed"]), f"{row['tokens'] / 1e6:.3g}", spent, *cells, last))
    header = ("run", "seed", "tokens (M)", "operations (10¹²)", *(f"lost at {n}" for n in lengths[:-1]))
    return Table((*header, f"bits/byte at {lengths[-1]}"), shown)


def _star(one: dict[str, Any]) -> str:
    low = (one.get("lost_interval") or [one["lost"]])[0]
    return with_interval(one, "lost", 3) + (" *" if one["lost"] >= WORTH and low > 0 else "")


def plots(rows: Sequence[Row]) -> list[Lines]:
    """A panel for every text and vocabulary, that is, for every value of the grid's axes but the last two,
    which are the lines: hue by the first of them, dashes by the other."""
    panels: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if beyond(row):
            panels.setdefault(tuple((row.get("cell") or {}).values())[:-2], []).append(row)
    found = []
    for labels, mine in panels.items():
        names = [tuple((row.get("cell") or {"run": row["name"]}).values())[-2:] for row in mine]
        hues, dashes = (list(dict.fromkeys(one[at] for one in names)) for at in (0, -1))
        lines, limit = [], [length for row in mine for length in beyond(row)]
        for row, name in zip(mine, names, strict=True):
            curve = sorted(beyond(row).items())
            colour = COLOURS[hues.index(name[0]) % len(COLOURS)]
            dash = DASHES[dashes.index(name[-1]) % len(DASHES)] if len(name) > 1 else DASHES[0]
            points = [(float(length), one["lost"]) for length, one in curve]
            lines.append(Line(" ".join(name), points, colour, dash=dash))
        lines.append(Line(f"{WORTH}", [(min(limit), WORTH), (max(limit), WORTH)], "soft", dash=":"))
        ticks = [(float(length), str(length)) for length in sorted(set(limit))]
        what = " · ".join(labels) or "all runs"
        found.append(
            Lines(lines, "tokens of context", f"bits per byte lost: {what}", log_x=True, x_ticks=ticks)
        )
    return found
