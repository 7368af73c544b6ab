"""The table and the charts of `sllm compare`, made of its result alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from data_prep.common.charts import Line, Lines, colours, thinned
from data_prep.common.errors import counted
from data_prep.common.page import Block, Chart, Choice, Heading, Show, Table, Text, columns
from pipeline.common.text import duration, grouped, percent, with_interval

QUALITY = "Validation bits per byte; an SLLM's line starts after its SentenceVAE"
# By budget: what it is called, the unit of the chart's axis, and that unit's size.
BUDGETS = {
    "operations": ("operations", "multiply-adds (10¹²), forward and backward, padding included", 1e12),
    "seconds": ("time", "hours of training steps", 3600.0),
    "tokens": ("tokens", "million tokens", 1e6),
}
SHOWN: dict[str, Callable[[float], str]] = {
    "operations": lambda n: f"{n / 1e12:,.3f} · 10¹²",
    "seconds": duration,
    "tokens": lambda n: grouped(round(n)),
}


def table(result: dict[str, Any]) -> Table:
    """All figures, a column a run."""
    runs = result["runs"]

    def measured(figure: str) -> Callable[[dict[str, Any]], str]:
        return lambda one: with_interval(one["evaluated"] or {}, figure)

    def equal(budget: str) -> Callable[[dict[str, Any]], str | None]:
        def cell(one: dict[str, Any]) -> str | None:
            at = result["equal"][budget]["runs"][one["name"]]
            if at is None:
                return None
            share = "" if at["progress"] >= 1 else f" (at {at['progress']:.0%} of its run)"
            return f"{at['bits_per_byte']:.4f}{share}"

        return cell

    rows: list[tuple[str, str | Callable[[Any], Any], Show]] = [("objective", "objective", "")]
    for budget, (word, _, _) in BUDGETS.items():
        rows.append((f"{word} spent", f"spent.{budget}", SHOWN[budget]))
        rows.append(("  of it the SentenceVAE's", f"spent_on_vae.{budget}", SHOWN[budget]))
    for budget, at in result["equal"].items():
        label = f"bits per byte at equal {BUDGETS[budget][0]}: {SHOWN[budget](at['amount'])}"
        rows.append((label, equal(budget), ""))
    rows += [
        ("last validation bits per byte", lambda one: one["curve"][-1]["bits_per_byte"], ".4f"),
        ("whole text: bits per byte", measured("bits_per_byte"), ""),
        ("  weights of step", "evaluated.step", ","),
        ("  parameters", "evaluated.parameters", ","),
        ("  without sentence vectors", measured("bits_per_byte_without_vectors"), ""),
        ("  vector gain", measured("vector_gain"), ""),
        ("  gap recovered", "gap_recovered.share", percent),
        ("new tokens per second", "generation.tokens_per_second", ",.1f"),
        ("  seconds to the first sentence", "generation.first_sentence", ".3f"),
        ("  memory at the peak (GB)", "generation.peak_bytes", lambda n: f"{n / 1e9:.3f}"),
        ("  cached bytes per token", "generation.cached_bytes_per_token", ",.0f"),
        ("  held for one more token", "generation.held_bytes_per_token", ",.0f"),
    ]
    return columns(list(runs), [{"name": name, **one} for name, one in runs.items()], rows)


def compose(result: dict[str, Any]) -> Iterable[Block]:
    """The page's blocks in reading order."""
    if result["notes"]:
        yield Text("**Before these figures are believed**:", tuple(result["notes"]))
    yield table(result)
    yield Heading("Quality against what training has cost")
    options = [(budget, BUDGETS[budget][0]) for budget in result["equal"]]
    yield Choice("against", options, [(name, colour) for name, (colour, _) in _styles(result).items()])
    yield Chart(QUALITY, quality_plots(result))
    if speed := speed_plot(result):
        yield Heading("Quality against generation speed")
        yield Chart(*speed)


def _styles(result: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """By run, its colour and dash pattern."""
    found = colours([one["objective"] for one in result["runs"].values()])
    return dict(zip(result["runs"], found, strict=True))


def quality_plots(result: dict[str, Any]) -> dict[str, Lines]:
    """By budget, validation bits per byte over what was spent."""
    styles, plots = _styles(result), {}
    for budget, (_, unit, size) in BUDGETS.items():
        if budget in result["equal"]:
            lines = []
            for name, one in result["runs"].items():
                points = [(row[budget] / size, row["bits_per_byte"]) for row in one["curve"]]
                kind = "dots" if len(points) <= 200 else "line"
                lines.append(Line(name, thinned(points), styles[name][0], kind, styles[name][1]))
            plots[budget] = Lines(lines, unit, "bits per byte", x_from=0)
    return plots


def speed_plot(result: dict[str, Any]) -> tuple[str, Lines] | None:
    """Bits per byte over new tokens per second, with words that say what was measured; None without
    measured speeds."""
    runs, styles = result["runs"], _styles(result)
    measured = [name for name, one in runs.items() if one["generation"]]
    if not measured:
        return None
    whole = all(runs[name]["evaluated"] for name in measured)
    lines = []
    for name in measured:
        quality = runs[name]["evaluated"] if whole else runs[name]["curve"][-1]
        place = runs[name]["generation"]["tokens_per_second"], quality["bits_per_byte"]
        ends = quality.get("bits_per_byte_interval")
        lines.append(Line(name, [place], styles[name][0], "points", interval=[tuple(ends)] if ends else None))
    how = result["generation"]
    where = how["gpu"] or f"{how['cpu']}, {counted(how['threads'], 'thread')}"
    return (
        f"{'The whole text' if whole else 'The last validation'}; batch {how['batch']}, "
        f"{counted(how['context'], 'token')} of context, {how['dtype']}, {where}",
        Lines(lines, "new tokens per second", "bits per byte", x_from=0),
    )
