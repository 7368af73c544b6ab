"""A report as a list of blocks: one HTML page that needs no other file, Markdown, or text."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.common import charts
from data_prep.common.errors import UserError, counted

NOTHING = "–"  # in a table's cell
LONGEST_QUOTE = 600  # characters shown of one sentence

# Controls, direction marks, surrogates and non-characters; what has a common sign gets that.
_NAMED = (*range(0x20), *range(0x7F, 0xA0), *range(0xD800, 0xE000), 0xFFFE, 0xFFFF)
_NAMED += (0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_CONTROLS = {code: f"[U+{code:04X}]" for code in _NAMED} | {0x09: "⇥", 0x0A: "↵"}


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph, and a list where `points` has entries; a `note` is small and pale."""

    text: str
    points: tuple[str, ...] = ()
    note: bool = False


@dataclass(frozen=True)
class Table:
    """Cells are ready strings. left: the columns that are aligned to the left, or True for all."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    left: bool | Sequence[int] = (0,)

    def aligned_left(self, column: int) -> bool:
        return self.left if isinstance(self.left, bool) else column in self.left


@dataclass(frozen=True)
class Chart:
    """A plot, or one for each option of the page's `Choice`.

    Markdown shows the table instead, or nothing without one; the page offers it folded below.
    """

    caption: str
    plots: charts.Plot | Mapping[str, charts.Plot]
    table: Table | None = None
    note: str = ""

    def pictures(self) -> list[tuple[str, str]]:
        """(option, SVG) for the page."""
        plots = self.plots if isinstance(self.plots, Mapping) else {"": self.plots}
        return [
            (option, charts.svg([plot], self.caption, charts.PAGE_WIDTH, alone=False))
            for option, plot in plots.items()
        ]


@dataclass(frozen=True)
class Sample:
    """A generated text: the prompt, and the model's continuation."""

    label: str
    prompt: str
    continuation: str


@dataclass(frozen=True)
class Tiles:
    """The figures that matter, beside each other. tiles: (name, figure, what it is)."""

    tiles: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Quotes:
    """Sentences of the corpus, exactly as they are, each in its own writing direction."""

    label: str
    texts: Sequence[str]
    language: str


@dataclass(frozen=True)
class Choice:
    """A bar that stays in view: radio buttons that choose which plot of each `Chart` is shown, by the style
    sheet alone, and the key to the lines.

    options: (name, label); key: (name, colour of the palette).
    """

    label: str
    options: Sequence[tuple[str, str]]
    key: Sequence[tuple[str, str]] = field(default=())


Block = Heading | Text | Table | Chart | Sample | Tiles | Quotes | Choice


def visible(text: str) -> str:
    """Foreign text for a page: characters that HTML cannot hold or that turn the writing around are named."""
    return text.translate(_CONTROLS)


Filters = Mapping[str, Callable[..., Any]]


def from_template(
    path: Path, values: Mapping[str, Any], parts: Mapping[str, Sequence[Block]], filters: Filters
) -> list[Block]:
    """Blocks from a Jinja template of paragraphs: `## heading`, `- point`, `> note`, tables (the line before
    one is its caption), and `[[part]]` for the blocks `parts[part]`. `**bold**` and `code` are kept inside of
    paragraphs. The filter `cell` is for foreign text in a table."""
    blocks: list[Block] = []
    for paragraph in re.split(r"\n\s*\n", render(path, values, {"cell": _cell_text, **filters})):
        if not (paragraph := paragraph.strip()):
            continue
        if found := re.fullmatch(r"\[\[(\w+)\]\]", paragraph):
            blocks += parts[found[1]]
        elif found := re.match(r"(#{2,3}) ", paragraph):
            blocks.append(Heading(paragraph[found.end() :], len(found[1])))
        elif found := re.fullmatch(r"(?:([^|\n].*)\n)?((?:\|.*\n)+\|.*)", paragraph):
            header, marks, *rows = map(_cells, found[2].split("\n"))
            left = [n for n, mark in enumerate(marks) if not mark.endswith(":")]
            blocks.append(Table(header, rows, found[1] or "", left))
        else:
            text, *points = (" ".join(part.split()) for part in re.split(r"^- ", paragraph, flags=re.M))
            blocks.append(Text(text.removeprefix("> "), tuple(points), text.startswith("> ")))
    return blocks


def _cell_text(value: Any) -> str:
    return visible(str(value)).replace("|", r"\|")


def _cells(line: str) -> list[str]:
    """The cells of a line of a Markdown table. Spaces at the start of the first one indent it."""
    first, *others = (cell.replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1])
    return [first.rstrip().removeprefix(" "), *(cell.strip() for cell in others)]


def render(path: Path, values: Mapping[str, Any], filters: Filters) -> str:
    """A Jinja template of plain text, filled."""
    environment = _environment()
    environment.filters.update(filters)
    return environment.from_string(path.read_text(encoding="utf-8")).render(values).rstrip("\n")


def _environment(**options: Any) -> Any:
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, **options
    )
    environment.filters["counted"] = counted
    return environment


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """The page. Raises: UserError where matplotlib is missing and there are charts."""
    environment = _environment(autoescape=True)
    environment.filters |= {"inline": _inline, "visible": visible}
    return environment.get_template("page.html.jinja").render(
        title=title,
        groups=[
            (kind, list(found)) for kind, found in itertools.groupby(blocks, lambda one: type(one).__name__)
        ],
        dark=charts.dark_style(),
        palette=charts.PALETTE,
        longest=LONGEST_QUOTE,
    )


def _inline(text: str) -> Any:
    """Escaped text; `code` and **bold** are the only marks that our own texts use."""
    import markupsafe

    escaped = re.sub(r"`([^`]+)`", r"<code>\1</code>", str(markupsafe.escape(text)))
    return markupsafe.Markup(re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", escaped))


def to_markdown(title: str, blocks: Sequence[Block]) -> str:
    parts = [f"# {title}"]
    for block in blocks:
        if isinstance(block, Heading):
            parts.append(f"{'#' * block.level} {block.text}")
        elif isinstance(block, Text):
            points = "\n".join(f"- {point}" for point in block.points)
            parts.append("\n\n".join(filter(None, (block.text, points))))
        elif isinstance(block, Table):
            parts.append("\n".join([*([block.caption, ""] if block.caption else []), *markdown_table(block)]))
        elif isinstance(block, Chart) and block.table:
            table = "\n".join(markdown_table(block.table))
            parts.append(f"**{block.caption}** (drawn in report.html)\n\n{table}")
        elif isinstance(block, Tiles):
            parts.append("\n".join(markdown_table(Table(("", "", ""), block.tiles, left=(0, 2)))))
        elif isinstance(block, Sample):
            # The text may itself hold a fence: ours is longer than any run of backticks in it.
            body = f"{block.prompt}⟦{block.continuation}⟧"
            fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", body))])
            parts.append(f"*{block.label}* (the model's part is in ⟦ ⟧)\n\n{fence}text\n{body}\n{fence}")
    return "\n\n".join(parts) + "\n"


def markdown_table(table: Table) -> list[str]:
    """The table's lines. Raises: UserError for rows of another length than the header."""
    rows = [table.header, *table.rows]
    if len({len(row) for row in rows}) > 1:
        raise UserError("not all rows have as many cells as there are columns")
    marks = ["---" if table.aligned_left(n) else "---:" for n in range(len(table.header))]
    escaped = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    return [
        "|" + "|".join(f" {cell} " if cell else " " for cell in row) + "|"
        for row in (escaped[0], marks, *escaped[1:])
    ]


def to_plain(path: Path, values: Mapping[str, Any], filters: Filters) -> str:
    """A template of paragraphs and tables (`from_template`) as text for a terminal."""
    parts = []
    for block in from_template(path, values, {}, filters):
        if isinstance(block, Table):
            parts.append(to_text(block))
        elif isinstance(block, (Heading, Text)):
            parts.append(block.text)
    return "\n\n".join(parts)


Show = str | Callable[[Any], str]  # a format, or a function that returns the text


def columns(names: Sequence[str], ones: Sequence[Mapping[str, Any]], rows: Sequence[tuple]) -> Table:
    """A table with a column for each of `ones`, without the rows in which none has a figure.

    rows: (label, key or function of one, `Show`). A key of nested mappings is written `outer.inner`.
    """
    shown = [(row[0], *(_cell(one, *row[1:]) for one in ones)) for row in rows]
    return Table(("", *names), [row for row in shown if any(cell != NOTHING for cell in row[1:])])


def _cell(one: Mapping[str, Any], key: str | Callable[[Any], Any], show: Show = "") -> str:
    value: Any = one
    for part in key.split(".") if isinstance(key, str) else ():
        value = value.get(part) if isinstance(value, Mapping) else None
    if callable(key):
        value = key(one)
    if value is None:
        return NOTHING
    return show(value) if callable(show) else format(value, show)


def to_text(table: Table) -> str:
    """The table for a terminal."""
    rows = [table.header, *table.rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    forms = [f"{'<' if table.aligned_left(n) else '>'}{width}" for n, width in enumerate(widths)]
    return "\n".join("  ".join(map(format, row, forms)).rstrip() for row in rows)
