"""A report as a list of blocks, written as Markdown or as one HTML page that needs no other file.

In: `Heading`, `Text`, `Table`, `Chart`, `Sample` in reading order. Out: two strings with the same figures,
because both come from the same blocks. Called by `demo_report.py`.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass


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
    """An SVG for the page; Markdown shows the table instead, the page offers it folded below."""

    caption: str
    svg: str
    table: Table


@dataclass(frozen=True)
class Sample:
    """A generated text: what was given, and what the model made of it."""

    label: str
    prompt: str
    continuation: str


Block = Heading | Text | Table | Chart | Sample


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
        elif isinstance(block, Chart):
            parts.append(f"**{block.caption}** (drawn in report.html)\n\n{_markdown_table(block.table)}")
        else:
            # The text may itself hold a fence: ours is longer than any run of backticks in it.
            body = f"{block.prompt}⟦{block.continuation}⟧"
            longest = max((len(run) for run in re.findall("`+", body)), default=0)
            fence = "`" * max(3, longest + 1)
            parts.append(f"*{block.label}* (the model's part stands in ⟦ ⟧)\n\n{fence}text\n{body}\n{fence}")
    return "\n\n".join(parts) + "\n"


def _markdown_table(table: Table) -> str:
    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    align = ["---"] + ["---" if table.left else "---:"] * (len(table.header) - 1)
    lines = [row(table.header), "| " + " | ".join(align) + " |", *map(row, table.rows)]
    caption = f"{table.caption}\n\n" if table.caption else ""
    return caption + "\n".join(lines)


STYLE = """
:root { color-scheme: light dark; --back: #fdfdfc; --ink: #1d2026; --soft: #666d78; --rule: #dfe1e5;
  --card: #f4f4f2; --c1: #2563c9; --c2: #c2571a; --c3: #24875a; }
@media (prefers-color-scheme: dark) {
  :root { --back: #14161a; --ink: #e4e6ea; --soft: #99a1ad; --rule: #32363e;
  --card: #1d2026; --c1: #79a8f5; --c2: #f0996a; --c3: #69cc9c; } }
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
svg .series-1 { stroke: var(--c1); } svg .series-2 { stroke: var(--c2); } svg .series-3 { stroke: var(--c3); }
svg .bar, svg .dot { stroke: none; }
svg .bar.series-1, svg .dot.series-1 { fill: var(--c1); }
svg .bar.series-2, svg .dot.series-2 { fill: var(--c2); }
svg .bar.series-3, svg .dot.series-3 { fill: var(--c3); }
.sample { background: var(--card); border-radius: 6px; padding: .8rem 1rem; margin: 1rem 0; }
.sample p { margin: 0 0 .4rem; color: var(--soft); font-size: .9rem; }
.sample pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0;
  font: .9rem/1.5 ui-monospace, monospace; }
.sample .given { color: var(--soft); } .sample .made { color: var(--c1); }
"""


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
        table = f"<details><summary>the figures as a table</summary>{_html_table(block.table)}</details>"
        return f"<figure>{caption}{block.svg}{table}</figure>"
    given = f'<span class="given">{html.escape(block.prompt)}</span>'
    made = f'<span class="made">{html.escape(block.continuation)}</span>'
    return f'<div class="sample"><p>{html.escape(block.label)}</p><pre>{given}{made}</pre></div>'


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
