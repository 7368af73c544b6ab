"""A run's results as a page, and the tables that the docs show of it. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from data_prep.common.page import NOTHING, Block, Heading, Table, Text, to_html, to_markdown

Records = Sequence[Mapping[str, Any]]
TITLE = "GPU check"


def write(records: Records, output: Path) -> None:
    """The page beside a run's results, as HTML and Markdown."""
    for suffix, form in (("html", to_html), ("md", to_markdown)):
        (output / f"report.{suffix}").write_text(form(TITLE, blocks(records)), encoding="utf-8")


def blocks(records: Records) -> list[Block]:
    """The machine, how each check ended, and the figures of each."""
    found: list[Block] = [Text(f"{line}.") for line in machines(records)]
    found += [Heading("Checks"), summary(records)]
    for name in dict.fromkeys(record["check"] for record in records if "fact" in record):
        found.append(Heading(name))
        facts = [record["fact"] for record in records if record.get("check") == name and "fact" in record]
        found += _tables(facts)
    return found


def machines(records: Records) -> list[str]:
    """A line for each kind of start of the program."""
    lines = []
    for run in (record["run"] for record in records if "run" in record):
        packages = ", ".join(f"{name} {version}" for name, version in run["packages"].items() if version)
        date = datetime.fromisoformat(run["date"]).date()
        small = ", small sizes" if run["small"] else ""
        commit = (run["git_commit"] or "unknown")[:12]
        lines.append(
            f"{date}, {run['device']}{small}, {run['cpu']}, {run['cores']} cores, commit {commit}, "
            f"Python {run['python']}, {packages}"
        )
    return list(dict.fromkeys(lines))


def summary(records: Records) -> Table:
    """How each check ended, the last time that it ran."""
    ended = {record["check"]: record for record in records if "status" in record}
    rows = [
        (name, one["status"], f"{one['seconds']:.1f}", one.get("error", "")) for name, one in ended.items()
    ]
    return Table(("check", "result", "seconds", "last line"), rows, left=(0, 1, 3))


def _tables(facts: Iterable[Mapping[str, Any]]) -> list[Block]:
    """Facts with the same keys are the rows of one table; one alone is written as two columns."""
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for fact in facts:
        groups.setdefault(tuple(fact), []).append(fact)
    single = [
        (key, cell(fact[key]))
        for group in groups.values()
        if len(group) == 1
        for fact in group
        for key in fact
    ]
    found: list[Block] = [Table(("figure", "value"), single)] if single else []
    for keys, group in groups.items():
        if len(group) > 1:
            words = [n for n, key in enumerate(keys) if isinstance(group[0][key], str)]
            found.append(Table(keys, [[cell(fact[key]) for key in keys] for fact in group], left=words))
    return found


def cell(value: Any) -> str:
    """A figure as text: four digits, or more where the number is whole."""
    if value is None:
        return NOTHING
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
