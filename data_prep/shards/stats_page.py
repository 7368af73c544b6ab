"""`data-prep stats --html`: the figures of `stats` as one HTML page; equal figures give equal bytes.

The words are in stats.md.jinja; the tables and charts that it names are made here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.common.charts import BarsAcross, Line, Lines, Mark
from data_prep.common.errors import counted
from data_prep.common.page import (
    Block,
    Chart,
    Filters,
    Heading,
    Quotes,
    from_template,
    to_html,
    visible,
)
from data_prep.shards.stats import SIDE, percent

DRAWN = 5  # languages, one colour each; the page says when there are more
BAR_ROWS, TABLE_ROWS = 24, 200
LENGTH_BINS = 64  # steps of the length histogram, at most
WAYS = {
    "tensor_64x64": "64 × 64 tensors, one per document",
    "batch": "64 sentences in a row, filled up to the longest",
    "sorted_batch": "the same, sorted by length first",
    "packed": "bins packed with whole sentences",
}
Group = dict[str, Any]


def stats_page(result: dict[str, Any]) -> str:
    """The page for `result`, what `stats.stats` returned."""
    folder = result["folder"].replace("\\", "/").rstrip("/").rsplit("/", 1)[-1] or result["folder"]
    languages = sorted(result["languages"], key=lambda name: (-result["languages"][name]["tokens"], name))
    drawn = languages[:DRAWN]
    bars = _bytes_per_token(result, languages)
    groups = sorted(result["groups"], key=lambda one: (-one["tokens"], one["language"], one["source"]))
    values = {
        "all": result,
        "languages": languages,
        "drawn": drawn,
        "ways": WAYS,
        "groups": [result, *groups[:TABLE_ROWS]],
        "name": lambda one: f"{one['language']}: {one['source']}" if "source" in one else "all",
        "hidden_bars": max(0, len(bars) - BAR_ROWS),
        "hidden_groups": len(groups) - TABLE_ROWS,
    }
    padding = [(name, result["padding"][key]["padding"]) for key, name in WAYS.items()]
    shares = [(name, percent(part), ((1 - part, "other-1"), (part, "rest"))) for name, part in padding]
    parts: dict[str, Sequence[Block]] = {
        "lengths": _lengths(result, drawn),
        "document_sizes": _document_sizes([(visible(name), result["languages"][name]) for name in drawn]),
        "bytes_per_token": [Chart("Bytes per token", BarsAcross(bars[:BAR_ROWS]))],
        "padding": [Chart("Tokens and padding", BarsAcross(shares))],
        "samples": [block for name in drawn for block in _samples(result, name)],
    }
    filters: Filters = {"f": format, "size": _size, "percent": percent, "visible": visible}
    blocks = from_template(Path(__file__).with_name("stats.md.jinja"), values, parts, filters)
    return to_html(f"Shards: {visible(folder)}", blocks)


def _lengths(result: dict[str, Any], drawn: Sequence[str]) -> list[Block]:
    limit = result["settings"]["max_tokens"]
    step = -(-limit // LENGTH_BINS)
    starts = range(1, limit + 1, step)
    histogram, up_to = [], []
    for n, name in enumerate(drawn, start=1):
        counts, share = result["languages"][name]["histogram"], 100 / result["languages"][name]["sentences"]
        binned = [(start + (step - 1) / 2, share * sum(counts[start : start + step])) for start in starts]
        histogram.append(Line(visible(name), binned, f"other-{n}", "steps"))
        sums = [(length, share * sum(counts[: length + 1])) for length in range(limit + 1)]
        up_to.append(Line(visible(name), sums, f"other-{n}"))
    unit = "% of the language’s sentences"
    per = f"{unit}, per {counted(step, 'token')}" if step > 1 else unit

    def each(key: str) -> str:
        return ", ".join(f"{visible(name)} {percent(result['languages'][name][key])}" for name in drawn)

    return [
        Chart(
            "Sentences by length",
            Lines(histogram, "tokens in the sentence", per, x_from=0, y_from=0),
            note=f"The step at {limit} holds what was split because it was longer.",
        ),
        Chart(
            "Sentences up to a length",
            Lines(
                up_to,
                "at most so many tokens",
                unit,
                (Mark(limit, "limit", "ink", f"limit {limit}"),),
                x_from=0,
                y_from=0,
            ),
            note=f"At the limit: {each('share_at_limit')}. Of a single token: {each('share_one_token')}.",
        ),
    ]


def _document_sizes(drawn: Sequence[tuple[str, Group]]) -> list[Block]:
    last = max(len(group["document_histogram"]) for _, group in drawn)
    series = []
    for n, (name, group) in enumerate(drawn, start=1):
        shares = [100 * count / group["documents"] for _, _, count in group["document_histogram"]]
        shares += [0.0] * (last - len(shares))
        points = [(place + 0.5, share) for place, share in enumerate(shares)]
        series.append(Line(name if len(drawn) > 1 else "", points, f"other-{n}", "bars"))
    every = 1 if last < 8 else 2
    ticks = [(n, f"{2**n // 1024}k" if n >= 10 else str(2**n)) for n in range(0, last + 1, every)]
    marks = [Mark(math.log2(SIDE), "limit", "ink", str(SIDE))] if 2**last > SIDE else []
    note = f"A published tensor ends after {SIDE} sentences." if marks else ""
    x_label, y_label = "sentences in the document (doubling)", "% of the language’s documents"
    bars = Lines(series, x_label, y_label, marks, y_from=0, x_ticks=ticks)
    return [Chart("Documents by number of sentences", bars, note=note)]


def _bytes_per_token(result: dict[str, Any], languages: Sequence[str]) -> list[tuple[str, str, Any]]:
    """Rows of `BarsAcross`: each language, and below it its sub-corpora where there are several."""
    rows = []
    for language in languages:
        parts = [part for part in result["groups"] if part["language"] == language]
        parts.sort(key=lambda part: (-part["tokens"], part["source"]))
        name = language if len(parts) > 1 else f"{language}: {parts[0]['source']}"
        found = [(name, result["languages"][language]["bytes_per_token"], "other-1")]
        if len(parts) > 1:
            found += [(part["source"], part["bytes_per_token"], "rest") for part in parts]
        rows += [(visible(label), f"{value:.2f}", [(value, colour)]) for label, value, colour in found]
    return rows


def _samples(result: dict[str, Any], language: str) -> list[Block]:
    blocks: list[Block] = [Heading(visible(language), 3)]
    for band in result["samples"][language]:
        first, last = band["from"], band["to"]
        span = counted(first, "token") if first == last else f"{first}–{counted(last, 'token')}"
        limit = " (the limit)" if last == result["settings"]["max_tokens"] else ""
        texts = [one["text"] for one in band["sentences"]]
        blocks.append(Quotes(f"{span}{limit}", texts, language))
    return blocks


def _size(size: int) -> str:
    """Three digits and a decimal unit."""
    unit = 0
    while unit < 4 and float(f"{size / 1000**unit:.3g}") >= 1000:  # 999.9 kB are 1 MB
        unit += 1
    return f"{float(f'{size / 1000**unit:.3g}'):g} {('bytes', 'kB', 'MB', 'GB', 'TB')[unit]}"
