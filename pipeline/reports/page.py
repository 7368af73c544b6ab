"""A report as a list of blocks, written as Markdown or as one HTML page that needs no other file.

In: `Heading`, `Text`, `Table`, `Chart`, `Sample` in reading order. Out: two strings with the same figures,
because both come from the same blocks; a `Table` alone also as text for a terminal. `Choice` is for the page
alone. Called by `demo_report.py`, `run_report.py`, `comparison.py`, `sweep.py` and `scaling.py`;
`with_interval` also where a figure stands in a line of text.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.reports.charts import COLOURS


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph, or a list when `points` has entries."""

    text: str
    points: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """Cells are ready strings; columns after the first are right-aligned unless `left` says otherwise."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    left: bool = False


@dataclass(frozen=True)
class Chart:
    """An SVG for the page; Markdown shows the table instead, the page offers it folded below (None: the page
    alone shows it)."""

    caption: str
    svg: str
    table: Table | None = None


@dataclass(frozen=True)
class Sample:
    """A generated text: what was given, and what the model made of it."""

    label: str
    prompt: str
    continuation: str


@dataclass(frozen=True)
class Choice:
    """A bar that stays in view: radio buttons that choose which SVGs are shown, and the key to the lines.

    options: (name, label); what stands in `by(name, svg)` is shown while that one is chosen, by the style
    sheet alone. key: the names of series 1, 2, …
    """

    label: str
    options: tuple[tuple[str, str], ...]
    key: tuple[str, ...]


def by(name: str, svg: str) -> str:
    """An SVG that is shown only while the option `name` of a `Choice` is chosen."""
    return f'<div class="by by-{name}">{svg}</div>'


Block = Heading | Text | Table | Chart | Sample | Choice


def to_markdown(title: str, blocks: Sequence[Block]) -> str:
    parts = [f"# {title}"]
    for block in blocks:
        if isinstance(block, Heading):
            parts.append(f"## {block.text}")
        elif isinstance(block, Text):
            points = "\n".join(f"- {point}" for point in block.points)
            parts.append("\n\n".join(filter(None, (block.text, points))))
        elif isinstance(block, Table):
            parts.append(_markdown_table(block))
        elif isinstance(block, Chart) and block.table:
            parts.append(f"**{block.caption}** (drawn in report.html)\n\n{_markdown_table(block.table)}")
        elif isinstance(block, Sample):
            # The text may itself hold a fence: ours is longer than any run of backticks in it.
            body = f"{block.prompt}⟦{block.continuation}⟧"
            longest = max((len(run) for run in re.findall("`+", body)), default=0)
            fence = "`" * max(3, longest + 1)
            parts.append(f"*{block.label}* (the model's part stands in ⟦ ⟧)\n\n{fence}text\n{body}\n{fence}")
    return "\n\n".join(parts) + "\n"


def to_text(table: Table) -> str:
    """The table for a terminal: the first column to the left, the others to the right."""
    rows = [table.header, *table.rows]
    widths = [max(len(cells[column]) for cells in rows) for column in range(len(table.header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()
        for cells in rows
    )


def _markdown_table(table: Table) -> str:
    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    align = ["---"] + ["---" if table.left else "---:"] * (len(table.header) - 1)
    lines = [row(table.header), "| " + " | ".join(align) + " |", *map(row, table.rows)]
    caption = f"{table.caption}\n\n" if table.caption else ""
    return caption + "\n".join(lines)


STYLE = """
:root { color-scheme: light dark; --back: #fdfdfc; --ink: #1d2026; --soft: #666d78; --rule: #dfe1e5;
  --card: #f4f4f2; --c1: #2563c9; --c2: #c2571a; --c3: #24875a; --c4: #8a3fb5; --c5: #a88400; --c6: #b3274e;
  --c7: #1a8795; --c8: #6b6b6b; }
@media (prefers-color-scheme: dark) {
  :root { --back: #14161a; --ink: #e4e6ea; --soft: #99a1ad; --rule: #32363e;
  --card: #1d2026; --c1: #79a8f5; --c2: #f0996a; --c3: #69cc9c; --c4: #c893ea; --c5: #dcbc4b; --c6: #f07f9c;
  --c7: #63c7d4; --c8: #a9a9a9; } }
body { background: var(--back); color: var(--ink); margin: 0 auto; max-width: 50rem;
  padding: 2rem 1.25rem 4rem; font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--rule); }
code { font-size: .92em; background: var(--card); padding: .1em .3em; border-radius: 3px; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .93rem; width: 100%; }
th, td { padding: .32rem .7rem; border-bottom: 1px solid var(--rule); text-align: right;
  vertical-align: top; }
th:first-child, td:first-child, table.left th, table.left td { text-align: left; padding-left: 0; }
th { color: var(--soft); font-weight: 600; }
caption, figcaption, summary { color: var(--soft); font-size: .9rem; text-align: left;
  padding-bottom: .4rem; }
figure { margin: 1.4rem 0; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif; }
svg .grid { stroke: var(--rule); } svg .axis { stroke: var(--soft); }
svg .line { fill: none; stroke-width: 2; } svg .faint { stroke-width: 1; opacity: .25; }
COLOURS
svg .bar, svg .dot { stroke: none; }
svg .mark { fill: none; stroke-width: 1.5; } svg .restart { stroke-dasharray: 4 4; opacity: .7; }
svg .skip { stroke-width: 2; } svg .save { opacity: .6; }
.choice { position: sticky; top: 0; background: var(--back); border-bottom: 1px solid var(--rule);
  padding: .5rem 0; margin: 1rem 0; font-size: .9rem; z-index: 1; }
.choice fieldset { border: 0; margin: 0 0 .3rem; padding: 0; }
.choice legend { float: left; color: var(--soft); }
.choice label, .choice .key { margin-left: .9rem; white-space: nowrap; }
.choice .key:first-child { margin-left: 0; }
.choice input { margin: 0 .3rem 0 0; } svg.swatch { display: inline-block; width: 22px; height: 6px;
  margin: 0 .4rem .15rem 0; }
.sample { background: var(--card); border-radius: 6px; padding: .8rem 1rem; margin: 1rem 0; }
.sample p { margin: 0 0 .4rem; color: var(--soft); font-size: .9rem; }
.sample pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0;
  font: .9rem/1.5 ui-monospace, monospace; }
.sample .given { color: var(--soft); } .sample .made { color: var(--c1); }
"""

STYLE = STYLE.replace(
    "COLOURS",
    "\n".join(
        f"svg .series-{n} {{ stroke: var(--c{n}); }} "
        f"svg .bar.series-{n}, svg .dot.series-{n} {{ fill: var(--c{n}); stroke: none; }}"
        for n in range(1, COLOURS + 1)
    ),
)


def to_html(title: str, blocks: Sequence[Block]) -> str:
    body = "\n".join(_html_block(block) for block in blocks)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def _html_block(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h2>{html.escape(block.text)}</h2>"
    if isinstance(block, Text):
        points = "".join(f"<li>{_inline(point)}</li>" for point in block.points)
        paragraph = f"<p>{_inline(block.text)}</p>" if block.text else ""
        return paragraph + (f"<ul>{points}</ul>" if points else "")
    if isinstance(block, Table):
        return _html_table(block)
    if isinstance(block, Chart):
        caption = f"<figcaption>{html.escape(block.caption)}</figcaption>"
        table = ""
        if block.table:
            table = f"<details><summary>the figures as a table</summary>{_html_table(block.table)}</details>"
        return f"<figure>{caption}{block.svg}{table}</figure>"
    if isinstance(block, Choice):
        return _html_choice(block)
    given = f'<span class="given">{html.escape(block.prompt)}</span>'
    made = f'<span class="made">{html.escape(block.continuation)}</span>'
    return f'<div class="sample"><p>{html.escape(block.label)}</p><pre>{given}{made}</pre></div>'


def _html_choice(choice: Choice) -> str:
    buttons = "".join(
        f'<label><input type="radio" name="by" id="by-{name}"{" checked" if n == 0 else ""}>'
        f"{html.escape(label)}</label>"
        for n, (name, label) in enumerate(choice.options)
    )
    key = "".join(
        f'<span class="key"><svg class="swatch" viewBox="0 0 22 6">'
        f'<line class="line series-{n}" x1="0" x2="22" y1="3" y2="3"></line></svg>{html.escape(name)}</span>'
        for n, name in enumerate(choice.key, start=1)
    )
    rules = "".join(
        f"body:has(#by-{name}:checked) .by:not(.by-{name}) {{ display: none; }}\n"
        for name, _ in choice.options
    )
    shown = f"<fieldset><legend>{html.escape(choice.label)}</legend>{buttons}</fieldset>"
    return f'<div class="choice">{shown}<div>{key}</div></div>\n<style>{rules}</style>'


def _html_table(table: Table) -> str:
    caption = f"<caption>{html.escape(table.caption)}</caption>" if table.caption else ""
    head = "".join(f"<th>{_inline(cell)}</th>" for cell in table.header)
    rows = "".join(
        "<tr>" + "".join(f"<td>{_inline(cell)}</td>" for cell in row) + "</tr>" for row in table.rows
    )
    kind = ' class="left"' if table.left else ""
    return f'<div class="scroll"><table{kind}>{caption}<tr>{head}</tr>{rows}</table></div>'


def _inline(text: str) -> str:
    """Escaped text; `code` and **bold** are the only marks that our own texts use."""
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)
