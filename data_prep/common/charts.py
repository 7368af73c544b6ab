"""Charts as SVG, drawn by matplotlib (the extra `report`): one palette, light and dark.

A plot is a plain description: `Lines` or `BarsAcross`. `figure` draws plots below each other as one
matplotlib Figure; `svg` is its text. Equal plots give equal bytes.
"""

from __future__ import annotations

import html
import io
import itertools
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.common.extras import import_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# By name: the colour on a light and on a dark page. One hue for each kind of model, three shades each.
PALETTE = {
    "sllm": ("#1769b5", "#6cb2f5"),
    "sllm-2": ("#4a90d9", "#3f86d1"),
    "sllm-3": ("#0c3c6b", "#b5d8fb"),
    "lm": ("#c2500a", "#f5965a"),
    "lm-2": ("#dd7a3a", "#d4702b"),
    "lm-3": ("#7d3205", "#fbc8a3"),
    "vae": ("#24875a", "#5fcf9a"),
    "vae-2": ("#3da06f", "#37a673"),
    "vae-3": ("#0f5236", "#aee8cb"),
    "ngram": ("#6b6b6b", "#b0b0b0"),
    "ngram-2": ("#8f8f8f", "#8a8a8a"),
    "ngram-3": ("#3d3d3d", "#dadada"),
    # What is no model: languages, sub-corpora.
    "other-1": ("#8a3fb5", "#c893ea"),
    "other-2": ("#a07c00", "#dcbc4b"),
    "other-3": ("#b3274e", "#f07f9c"),
    "other-4": ("#1a8795", "#63c7d4"),
    "other-5": ("#7a5230", "#c9a27e"),
    "ink": ("#1d2026", "#e4e6ea"),
    "soft": ("#5f6672", "#a0a7b3"),
    "rule": ("#d9dce1", "#3a3f48"),
    "rest": ("#cfd3d9", "#434956"),
    "on": ("#fffffe", "#14161a"),  # words on a filled shape
}
DASHES = ("-", "--", "-.", ":")
WIDTH, PAGE_WIDTH = 720, 480  # points: of a file; on a page, where it is a column or a phone's width
STYLE = Path(__file__).with_name("report.mplstyle")


def colours(kinds: Sequence[str]) -> list[tuple[str, str]]:
    """(colour, dash pattern) of each model: its kind's hue; more of a kind differ in shade, then dashes."""
    found = []
    for n, kind in enumerate(kinds):
        before = list(kinds[:n]).count(kind)
        shade = f"-{before % 3 + 1}" if before % 3 else ""
        found.append((f"{kind if kind in PALETTE else 'ngram'}{shade}", DASHES[before // 3 % len(DASHES)]))
    return found


def dark_style() -> str:
    """CSS that exchanges the colours of SVGs and of `style="background: …"` on a dark page."""
    rules = [
        f'[style*="{what}: {light}"] {{ {what}: {dark} !important }}'
        for light, dark in PALETTE.values()
        for what in ("stroke", "fill", "background")
    ]
    return "@media (prefers-color-scheme: dark) {\n" + "\n".join(rules) + "\n}"


def running_mean(values: Sequence[float], share: float = 0.04) -> list[float]:
    """Mean of the last few values (a share of all, at least one)."""
    width = max(1, round(len(values) * share))
    sums = [0.0, *itertools.accumulate(values)]
    return [(sums[n] - sums[max(0, n - width)]) / min(n, width) for n in range(1, len(sums))]


def thinned(points: Sequence[tuple[float, float]], buckets: int = 240) -> list[tuple[float, float]]:
    """At most four points of each of `buckets` equal parts: its first, lowest, highest and last, in order.

    A line through them looks like a line through all points: no spike is lost.
    """
    if len(points) <= 4 * buckets:
        return list(points)
    kept = []
    for bucket in range(buckets):
        part = range(len(points) * bucket // buckets, len(points) * (bucket + 1) // buckets)
        lowest, highest = (pick(part, key=lambda n: points[n][1]) for pick in (min, max))
        kept += [points[n] for n in sorted({part[0], lowest, highest, part[-1]})]
    return kept


def short(value: float, _place: object = None) -> str:
    """A number for a tick: 80k, 1.5M."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= max(unit, 1e4):
            return f"{value / unit:.6g}{letter}"
    return f"{value:.6g}"


# Plots -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """One line.

    kind: "line", "faint" (thin, pale, without a name), "dots" (a line with dots), "points" (dots alone),
    "steps" (a filled histogram) or "bars" (beside those of other lines). interval: (low, high) of y at each
    point.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: str
    kind: str = "line"
    dash: str = "-"
    interval: Sequence[tuple[float, float]] | None = None


@dataclass(frozen=True)
class Mark:
    """Something that happened at `x`: a "restart", "skip" or "save", with a title under the pointer, or a
    "limit", with its title beside it."""

    x: float
    kind: str
    colour: str
    title: str


@dataclass(frozen=True)
class Lines:
    """Lines over common axes.

    x_from, y_from: where an axis starts, else it fits the data; x_ticks: (x, label); legend: whether names
    that do not fit at the lines' ends are listed above.
    """

    lines: Sequence[Line]
    x_label: str
    y_label: str
    marks: Sequence[Mark] = ()
    log_x: bool = False
    log_y: bool = False
    x_from: float | None = None
    y_from: float | None = None
    x_ticks: Sequence[tuple[float, str]] | None = None
    legend: bool = True

    def height(self, width: int) -> int:
        return 300 if width > PAGE_WIDTH else 260

    def draw(self, axes: Axes, width: int) -> list[tuple[Any, Line]]:
        """Draws all of it; returns (artist, line) for each line that has a name."""
        named: list[tuple[Any, Line]] = []
        bars = [one for one in self.lines if one.kind == "bars"]
        for one in self.lines:
            if one.kind == "bars":
                named += _draw_bars(axes, one, bars.index(one), len(bars))
                continue
            if self.log_y and not any(y > 0 for _, y in one.points):
                continue
            xs, ys = zip(*[(x, y) for x, y in one.points if y > 0 or not self.log_y], strict=True)
            hue, faint = PALETTE[one.colour][0], one.kind == "faint"
            style: dict[str, Any] = {"linewidth": 1 if faint else 2, "alpha": 0.3 if faint else 1}
            style["zorder"] = 2 if faint else 2.5
            style |= {"linestyle": "" if one.kind == "points" else one.dash, "color": hue, "clip_on": False}
            if one.kind in ("dots", "points"):
                style |= {"marker": "o", "markersize": 5 if one.kind == "dots" else 7}
            if one.kind == "steps":
                style |= {"drawstyle": "steps-mid", "linewidth": 1.5}
                axes.fill_between(xs, ys, step="mid", color=hue, alpha=0.14, linewidth=0, clip_on=False)
            if one.interval and one.kind == "line":
                low, high = zip(*one.interval, strict=True)
                axes.fill_between(xs, low, high, color=hue, alpha=0.15, linewidth=0, clip_on=False)
            elif one.interval:
                low, high = zip(*one.interval, strict=True)
                axes.vlines(xs, low, high, color=hue, linewidth=1.5, clip_on=False)
            [artist] = axes.plot(xs, ys, **style)
            if one.name and not faint:
                named.append((artist, one))
        self._axes(axes, width)
        for n, mark in enumerate(self.marks):
            _draw_mark(axes, mark, n)
        return named

    def _axes(self, axes: Axes, width: int) -> None:
        from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

        axes.margins(x=0.02, y=0.06)
        for axis, log, count in ((axes.xaxis, self.log_x, width // 80), (axes.yaxis, self.log_y, 6)):
            if log:
                getattr(axes, f"set_{axis.axis_name}scale")("log")
                low, high = sorted(axis.get_view_interval())
                axis.set_minor_locator(NullLocator())
                if high > 10 * low:
                    axis.set_major_locator(
                        LogLocator(subs=(1, 2, 5) if high < 2000 * low else (1,), numticks=9)
                    )
                else:
                    axis.set_major_locator(MaxNLocator(count))
            else:
                axis.set_major_locator(MaxNLocator(count, steps=[1, 2, 5, 10]))
            axis.set_major_formatter(FuncFormatter(short))
        if self.x_ticks is not None:
            axes.xaxis.set_major_locator(FixedLocator([place for place, _ in self.x_ticks]))
            axes.xaxis.set_ticklabels([label for _, label in self.x_ticks])
        if self.x_from is not None:
            axes.set_xlim(left=self.x_from)
        if self.y_from is not None:
            axes.set_ylim(bottom=self.y_from)


def _draw_bars(axes: Axes, line: Line, place: int, count: int) -> list[tuple[Any, Line]]:
    """The bars at evenly spaced points; `place` of `count` that stand beside each other. As `Lines.draw`."""
    xs, heights = zip(*line.points, strict=True)
    thick = 0.86 * min((b - a for a, b in itertools.pairwise(xs)), default=1.0) / count
    places = [x + (place - (count - 1) / 2) * thick for x in xs]
    bars = axes.bar(places, heights, thick, color=PALETTE[line.colour][0], clip_on=False)
    return [(bars, line)] if line.name else []


@dataclass(frozen=True)
class BarsAcross:
    """A bar a row from zero, its label above it and a text at its end.

    rows: (label, text, parts), with parts (value, colour) one after the other.
    """

    rows: Sequence[tuple[str, str, Sequence[tuple[float, str]]]]

    def height(self, width: int) -> int:
        return 42 * len(self.rows) + 10

    def draw(self, axes: Axes, width: int) -> list[tuple[Any, Line]]:
        """As `Lines.draw`; nothing has a name in a legend."""
        ink = PALETTE["ink"][0]
        for row, (label, text, parts) in enumerate(self.rows):
            start = 0.0
            for value, colour in parts:
                axes.barh(row, value, 0.42, start, color=PALETTE[colour][0], clip_on=False)
                start += value
            axes.annotate(label, (0, row - 0.24), (0, 3), textcoords="offset points", color=ink)
            axes.annotate(text, (start, row), (6, 0), textcoords="offset points", va="center", color=ink)
        axes.set_ylim(len(self.rows) - 0.6, -0.8)
        axes.set_xlim(left=0)
        axes.margins(x=0)
        axes.grid(False)
        axes.spines["bottom"].set_visible(False)
        axes.set_xticks([])
        axes.set_yticks([])
        return []


Plot = Lines | BarsAcross


def _draw_mark(axes: Axes, mark: Mark, number: int) -> None:
    style: dict[str, Any] = {"color": PALETTE[mark.colour][0], "clip_on": False, "gid": f"mark-{number}"}
    across = axes.get_xaxis_transform()
    if mark.kind in ("restart", "limit"):
        axes.axvline(mark.x, linestyle=(0, (4, 3)), linewidth=1, **style)
    if mark.kind == "limit":
        place, colour = (mark.x, 1.0), style["color"]
        axes.annotate(mark.title, place, (-4, -8), across, "offset points", ha="right", color=colour)
    if mark.kind == "skip":
        axes.plot([mark.x], [1], marker="x", transform=across, **style)
    if mark.kind == "save":
        axes.plot([mark.x], [0], marker="|", markersize=9, transform=across, **style)


# Figures ---------------------------------------------------------------------------------------------


def _figure_class() -> type[Figure]:
    return import_extra("matplotlib.figure", "report").Figure


def require() -> None:
    """Raises: UserError where matplotlib is missing; to be called before work whose result is to be drawn."""
    _figure_class()


def figure(plots: Sequence[Plot], width: int = WIDTH) -> Figure:
    """The plots below each other. Raises: UserError where matplotlib is missing."""
    figure_class = _figure_class()
    import matplotlib

    with matplotlib.rc_context(fname=STYLE):
        drawn = figure_class(figsize=(width / 72, sum(plot.height(width) for plot in plots) / 72), dpi=72)
        all_axes = [drawn.add_axes((0, 0, 1, 1), label=str(n)) for n in range(len(plots))]
        named = [plot.draw(axes, width) for axes, plot in zip(all_axes, plots, strict=True)]
        texts = [[line.name for _, line in found] for found in named]
        lines = all(isinstance(plot, Lines) and plot.lines[0].kind != "bars" for plot in plots)
        _lay_out(drawn, plots, width, texts if lines else [[]] * len(plots), 0)
        if any(named) and not (lines and _label_ends(all_axes, named, width)):
            listed = [
                found for found, plot in zip(named, plots, strict=True) if getattr(plot, "legend", True)
            ]
            unique = {line.name: artist for found in listed for artist, line in found}
            longest = _text_width(max(unique, key=len, default=""))
            columns = max(1, min(len(unique), int(width / (longest + 40))))
            above = 17 * -(-len(unique) // columns) + 6 if unique else 0
            _lay_out(drawn, plots, width, [[]] * len(plots), above)
            if unique:
                style: dict[str, Any] = {"bbox_to_anchor": (0, 1), "borderaxespad": 0.2, "borderpad": 0.1}
                artists, names = list(unique.values()), list(unique)
                drawn.legend(artists, names, loc="upper left", ncols=columns, **style)
        for axes, plot in zip(all_axes, plots, strict=True):
            if not isinstance(plot, BarsAcross):
                box, point = axes.get_position(), 1 / (72 * drawn.get_figheight())
                drawn.text(0, box.y1 + 11 * point, plot.y_label)
                drawn.text(box.x1, box.y0 - 33 * point, plot.x_label, ha="right")
    return drawn


def _lay_out(drawn: Figure, plots: Sequence[Plot], width: int, ends: Sequence[list[str]], above: int) -> None:
    """Place the axes. ends: the names at the ends of each plot's lines; above: points that a legend takes.

    Widths of texts are estimated: measuring them costs more than drawing all the rest.
    """
    height = drawn.get_figheight() * 72
    floor = height - above
    for axes, plot, names in zip(drawn.axes, plots, ends, strict=True):
        share = plot.height(width) * (height - above) / height
        low, high = sorted(axes.get_ylim())
        labels = [short(tick) for tick in axes.get_yticks() if low <= tick <= high]
        if isinstance(plot, BarsAcross):
            left, right, top, bottom = 0.0, 10 + max(_text_width(text) for _, text, _ in plot.rows), 4, 4
        else:
            left, top, bottom = 8 + max(map(_text_width, labels), default=0), 26, 36
            right = max([14, *(_text_width(name) + 12 for name in names)])
        size = (width - left - right) / width, (share - top - bottom) / height
        axes.set_position((left / width, (floor - share + bottom) / height, *size))
        floor -= share


def _text_width(text: str) -> float:
    """About the points that a text takes; Chinese takes twice as much."""
    return sum(7 if ord(letter) < 0x1100 else 12 for letter in text)


def _label_ends(all_axes: Sequence[Axes], named: Sequence[list[tuple[Any, Line]]], width: int) -> bool:
    """Write each line's name at its end; False, and nothing written, where a name would meet a line or would
    have to make way for another name."""
    labels = []
    for axes, found in zip(all_axes, named, strict=True):
        ends = [(*axes.transData.transform(line.points[-1]), line, artist) for artist, line in found]
        boxes: list[tuple[float, float, float]] = []  # left, right, middle
        for x, y, line, artist in sorted(ends, key=lambda end: end[1]):
            left, right = x + 7, x + 7 + _text_width(line.name)
            middle = max([y, *(other[2] + 13 for other in boxes if other[1] > left and other[0] < right)])
            boxes.append((left, right, middle))
            if middle - y > 13 or right - left > 0.35 * width or _meets(boxes[-1], axes, artist):
                return False
            labels.append((axes, line, middle - y))
    for axes, line, lift in labels:
        place, colour = (7, lift), PALETTE[line.colour][0]
        axes.annotate(
            line.name, line.points[-1], place, textcoords="offset points", va="center", color=colour
        )
    return True


def _meets(box: tuple[float, float, float], axes: Axes, own: Any) -> bool:
    """Whether a line other than its own passes through the box of a name (in points)."""
    import numpy as np

    left, right, middle = box
    for line in axes.get_lines():
        if line is own or line.get_gid():
            continue
        xs, ys = axes.transData.transform(np.column_stack(line.get_data())).T
        if left <= xs[-1] and right >= xs[0]:
            at = np.interp(np.linspace(max(left, xs[0]), min(right, xs[-1]), 24), xs, ys)
            if (abs(at - middle) < 8).any():
                return True
    return False


def svg(plots: Sequence[Plot], label: str, width: int = WIDTH, alone: bool = True) -> str:
    """The plots as SVG text, to stand `alone` in a file, or inside a page that has `dark_style`."""
    marks = [mark for plot in plots for mark in getattr(plot, "marks", ())] if len(plots) == 1 else []
    return figure_svg(figure(plots, width), label, alone, marks)


def figure_svg(drawn: Figure, label: str, alone: bool = True, marks: Sequence[Mark] = ()) -> str:
    """Any figure as SVG text, as `svg`; colours of `PALETTE` follow the page's theme."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    out = io.StringIO()
    with matplotlib.rc_context(fname=STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names in scripts that the measuring font does not have
        FigureCanvasSVG(drawn).print_svg(out, metadata={"Date": None})
    text = out.getvalue()
    text = re.sub(r"\s*<metadata>.*?</metadata>|<!--.*?-->\n?", "", text[text.index("<svg") :], flags=re.S)
    # Nothing is drawn outside of its axes. Without clip paths, pictures of one page share no ids that matter.
    text = re.sub(r' clip-path="[^"]*"|<defs>\s*<clipPath.*?</defs>', "", text, flags=re.S)
    text = re.sub(r' transform="rotate\(-0 [^"]*"', "", text)
    text = re.sub(r' (?:d|x|y|transform)="[^"]*"', _rounded, text)
    if marks:
        text = re.sub(r'<g id="mark-(\d+)">', lambda found: _titled(marks[int(found[1])]), text)
    text = re.sub(r'(<g) id="(?!mark)[^"]*"', r"\1", text)
    box = re.search(r'viewBox="[^"]*"', text)
    head = f'<svg {box[0] if box else ""} role="img" aria-label="{html.escape(label)}"'
    if alone:
        head += ' xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        # The background keeps the picture readable where the page around it has the other theme.
        style = "svg { background: #ffffff } text { font-family: system-ui, sans-serif !important }\n"
        style += dark_style() + "\n@media (prefers-color-scheme: dark) { svg { background: #14161a } }"
        head += f">\n<style>{style}</style"
    return re.sub(r"<svg[^>]*>", lambda _: f"{head}>", text, count=1)


def _rounded(found: re.Match[str]) -> str:
    number: Callable[[re.Match[str]], str] = lambda one: f"{round(float(one[0]), 1) + 0:g}"  # noqa: E731
    return re.sub(r"-?\d+\.\d+(?:e-?\d+)?", number, found[0])


def _titled(mark: Mark) -> str:
    return f'<g class="mark {mark.kind}"><title>{html.escape(mark.title)}</title>'
