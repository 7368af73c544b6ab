"""`data-prep stats --html`: the figures of `stats` as one HTML page that needs no other file.

In: the dictionary that `stats.stats` gives. Out: the page as text: style and pictures (SVG) inside, no
script, no link, light and dark, wide and narrow; equal figures give equal bytes. Called by
`data_prep/cli.py`.

Every text of the corpus (ids, names, sentences) passes `_text` or `_shown`, which escape it.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from data_prep.shards.stats import SIDE, percent

SERIES = 5  # languages drawn, one colour each; the page says when there are more
BAR_ROWS, TABLE_ROWS = 24, 200
LONGEST_SAMPLE = 600  # characters shown of one sentence
LENGTH_BINS = 64  # steps of the length histogram, at most
WIDTHS = (("wide", 720, 300), ("narrow", 360, 250))  # the style sheet shows the one that fits the screen
LEFT, RIGHT, TOP, BOTTOM = 44, 14, 40, 42

WAYS = (
    ("tensor_64x64", "64 × 64 tensors, one per document"),
    ("batch", "64 sentences in a row, filled up to the longest"),
    ("sorted_batch", "the same, sorted by length first"),
    ("packed", "bins packed with whole sentences"),
)

STYLE = """
:root { color-scheme: light dark; --back: #fcfcfb; --ink: #1c1f25; --soft: #5b626d; --rule: #dcdfe4;
  --card: #f2f2f0; --rest: #d3d6db;
  --c1: #0072b2; --c2: #c8500a; --c3: #00845f; --c4: #9c4a86; --c5: #7a6400; }
@media (prefers-color-scheme: dark) { :root { --back: #14161a; --ink: #e5e7eb; --soft: #a0a7b3;
  --rule: #31353d; --card: #1e2127; --rest: #3d424c;
  --c1: #5fb4ec; --c2: #f2965c; --c3: #4fc9a1; --c4: #dd9dca; --c5: #dcc257; } }
* { box-sizing: border-box; }
body { background: var(--back); color: var(--ink); margin: 0 auto; max-width: 52rem;
  padding: 2rem 1.2rem 4rem; font: 16px/1.55 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .8rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; padding-top: .9rem; border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 1.6rem 0 .5rem; }
p { margin: .6rem 0; } .lead { font-size: 1.06rem; }
.note { color: var(--soft); font-size: .9rem; } figcaption { font-weight: 600; }
figure { margin: 1.2rem 0; }
svg { width: 100%; height: auto; display: block; } svg.narrow { display: none; }
@media (max-width: 36rem) { svg.wide { display: none; } svg.narrow { display: block; } }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif; }
.grid { stroke: var(--rule); } .axis { stroke: var(--soft); }
.mark { stroke: var(--ink); stroke-dasharray: 4 3; } svg text.marked { fill: var(--ink); }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; } .area { stroke: none; opacity: .14; }
.line.s1 { stroke: var(--c1); } .line.s2 { stroke: var(--c2); } .line.s3 { stroke: var(--c3); }
.line.s4 { stroke: var(--c4); } .line.s5 { stroke: var(--c5); }
.fill.s1 { fill: var(--c1); } .fill.s2 { fill: var(--c2); } .fill.s3 { fill: var(--c3); }
.fill.s4 { fill: var(--c4); } .fill.s5 { fill: var(--c5); }
.s1.box { background: var(--c1); } .s2.box { background: var(--c2); } .s3.box { background: var(--c3); }
.s4.box { background: var(--c4); } .s5.box { background: var(--c5); } .s0.box { background: var(--rest); }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .9rem; margin: .4rem 0; }
.legend .box { display: inline-block; width: .8rem; height: .8rem; border-radius: 2px; margin-right: .4rem; }
.bars { display: grid; grid-template-columns: minmax(5rem, 38%) 1fr auto; gap: .4rem .8rem;
  align-items: center; font-size: .93rem; margin: 1rem 0; }
.bars .label { overflow-wrap: anywhere; line-height: 1.3; } .label.part { padding-left: 1rem; }
.box.part { opacity: .6; }
.bars .value { text-align: right; font-variant-numeric: tabular-nums; }
.track { display: flex; height: 1rem; } .track .box { height: 100%; min-width: 1px; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .86rem; width: 100%; }
th, td { padding: .3rem .5rem; border-bottom: 1px solid var(--rule); text-align: right; vertical-align: top; }
td { white-space: nowrap; } td.left { white-space: normal; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
th.left, td.left { text-align: left; } th:first-child, td:first-child { padding-left: 0; }
td.left { overflow-wrap: anywhere; min-width: 6rem; }
ul.samples { list-style: none; margin: .3rem 0 1rem; padding: 0; }
ul.samples li { margin: .3rem 0; }
.sentence { background: var(--card); border-radius: 4px; padding: .15rem .4rem; white-space: pre-wrap;
  overflow-wrap: anywhere; -webkit-box-decoration-break: clone; box-decoration-break: clone; }
code { font-size: .92em; background: var(--card); padding: .1em .3em; border-radius: 3px;
  overflow-wrap: anywhere; }
"""


def stats_page(result: dict) -> str:
    """The page for `result`, what `stats.stats` returned."""
    title = f"Shards: {_folder_name(result['folder'])}"
    body = "\n".join(_sections(result))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{_text(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def _sections(result: dict) -> Iterator[str]:
    yield from _summary(result)
    languages = sorted(result["languages"], key=lambda name: (-result["languages"][name]["tokens"], name))
    drawn = [(name, result["languages"][name]) for name in languages[:SERIES]]
    yield "<h2>How long sentences are</h2>"
    yield from _lengths(result, drawn, len(languages))
    yield "<h2>How long documents are</h2>"
    yield from _document_sizes(drawn)
    yield "<h2>Bytes per token</h2>"
    yield from _bytes_per_token(result, languages)
    yield "<h2>Padding</h2>"
    yield from _padding(result["padding"])
    yield "<h2>Sub-corpora</h2>"
    yield from _sub_corpora(result)
    yield "<h2>Copies</h2>"
    yield from _copies(result["duplicates"])
    yield "<h2>What was left out or mended</h2>"
    yield from _left_out(result)
    yield "<h2>Sentences to look at</h2>"
    yield from _samples(result, languages)
    yield "<h2>How the shards were made</h2>"
    yield from _settings(result)


# Sections ----------------------------------------------------------------------------------------------


def _summary(result: dict) -> Iterator[str]:
    lengths, padding = result["tokens_per_sentence"], result["padding"]
    limit = result["settings"]["max_tokens"]
    yield (
        f'<p class="lead"><b>{_count(result["documents"], "document")}</b> of '
        f"{_count(len(result['groups']), 'sub-corpus', 'sub-corpora')} "
        f"{_verb(result['documents'], 'holds')} {_count(result['sentences'], 'sentence')}, "
        f"<b>{_count(result['tokens'], 'token')}</b> and {_size(result['bytes'])} of text "
        f"({result['bytes_per_token']:.2f} bytes a token). "
        f"A sentence has <b>{lengths['mean']:.1f} tokens</b> on average "
        f"(median {lengths['median']}, 95 % at most {lengths['p95']}); "
        f"{percent(result['share_at_limit'])} are as long as the limit of {limit} allows.</p>"
    )
    tensor, packed = padding["tensor_64x64"], padding["packed"]
    rejected, copies = sum(result["rejected"].values()), result["duplicates"]
    left_out = f"{_count(rejected, 'record')} {_verb(rejected, 'was')} rejected" if rejected else ""
    repeated = (
        f"{_count(copies['documents'], 'document')} ({percent(copies['share'])}) only "
        f"{_verb(copies['documents'], 'repeats')} an earlier one"
        if copies["documents"]
        else "no document repeats another"
    )
    yield (
        f'<p class="lead">In the published 64 × 64 tensors <b>{percent(tensor["padding"])}</b> of what is '
        f"computed would be padding, and {percent(tensor['dropped'])} of the tokens would be dropped; "
        f"packed, <b>{percent(packed['padding'])}</b> is padding and nothing is dropped. "
        f"{left_out or 'No record was rejected'}, and {repeated}.</p>"
    )


def _lengths(result: dict, drawn: list[tuple[str, dict]], languages: int) -> Iterator[str]:
    limit = result["settings"]["max_tokens"]
    if languages > len(drawn):
        yield f'<p class="note">Drawn are the {len(drawn)} largest of {languages} languages.</p>'
    step = -(-limit // LENGTH_BINS)
    edges = [1 + step * n for n in range(-(-limit // step) + 1)]
    shares = []
    for _, group in drawn:
        counts = group["histogram"]
        sums = [sum(counts[a:b]) for a, b in zip(edges, edges[1:], strict=False)]
        shares.append([100 * n / group["sentences"] for n in sums])
    what = "% of the language’s sentences" + (f", per {step} tokens" if step > 1 else "")

    def histogram(frame: _Frame) -> Iterator[str]:
        yield from frame.axes(what, "tokens in the sentence")
        for number, values in enumerate(shares, start=1):
            yield from _steps(frame, number, edges, values)

    # A bar stands on [length - ½, length + ½], so that ticks lie in the middle of steps of one token.
    shift = 0.5 if step == 1 else 0
    edges = [edge - shift for edge in edges]
    high = max(max(values) for values in shares)
    yield _figure(
        drawn,
        histogram,
        (edges[0], edges[-1]),
        (0, high),
        "Sentences by length",
        f"The step at {limit} holds what was split because it was longer.",
    )

    def curve(frame: _Frame) -> Iterator[str]:
        yield from frame.axes("% of the language’s sentences", "at most so many tokens")
        for number, (_, group) in enumerate(drawn, start=1):
            points, done = [], 0
            for length, count in enumerate(group["histogram"]):
                done += count
                points.append((length, 100 * done / group["sentences"]))
            yield _line(frame, number, points)
        yield from frame.mark(limit, f"limit {limit}")

    split = ", ".join(f"{_text(name)} {percent(group['share_at_limit'])}" for name, group in drawn)
    single = ", ".join(f"{_text(name)} {percent(group['share_one_token'])}" for name, group in drawn)
    yield _figure(
        drawn,
        curve,
        (0, limit * 1.04),
        (0, 100),
        "Sentences up to a length",
        f"At the limit: {split}. Of a single token: {single}.",
    )


def _document_sizes(drawn: list[tuple[str, dict]]) -> Iterator[str]:
    last = max(len(group["document_histogram"]) for _, group in drawn)
    shares = [
        [100 * count / group["documents"] for _, _, count in group["document_histogram"]]
        for _, group in drawn
    ]

    def bars(frame: _Frame) -> Iterator[str]:
        labels = [(n, _short(2**n)) for n in range(0, last + 1, 1 if frame.width > 500 or last < 8 else 2)]
        yield from frame.axes("% of the language’s documents", "sentences in the document (doubling)", labels)
        for number, values in enumerate(shares, start=1):
            for n, value in enumerate(values):
                width = 0.86 / len(shares)
                x = n + 0.07 + width * (number - 1)
                yield frame.bar(number, x, x + width, value)
        if 2**last > SIDE:
            yield from frame.mark(math.log2(SIDE), str(SIDE))

    high = max(max(values) for values in shares)
    note = f"A published tensor ends after {SIDE} sentences." if 2**last > SIDE else ""
    yield _figure(drawn, bars, (0, last), (0, high), "Documents by number of sentences", note)
    rows = []
    for name, group in drawn:
        for key, what in (("sentences_per_document", "sentences"), ("tokens_per_document", "tokens")):
            spread = group[key]
            cells = [f"{spread['mean']:,.0f}"]
            cells += [f"{spread[part]:,}" for part in ("p5", "median", "p95", "p99", "max")]
            rows.append([_text(name), what, *cells])
    yield _table(["language", "a document’s", "mean", "p5", "median", "p95", "p99", "longest"], rows, left=2)


def _bytes_per_token(result: dict, languages: list[str]) -> Iterator[str]:
    rows: list[tuple[str, str, float]] = []
    for language in languages:
        parts = _largest([part for part in result["groups"] if part["language"] == language])
        name = language if len(parts) > 1 else f"{language}: {parts[0]['source']}"
        rows.append(("", name, result["languages"][language]["bytes_per_token"]))
        if len(parts) > 1:
            rows += ((" part", part["source"], part["bytes_per_token"]) for part in parts)
    high = max(value for _, _, value in rows)
    cells = []
    for kind, name, value in rows[:BAR_ROWS]:
        box = f'<span class="box s1{kind}" style="width:{100 * value / high:.2f}%"></span>'
        cells.append(
            f'<span class="label{kind}">{_text(name)}</span>'
            f'<span class="track">{box}</span><span class="value">{value:.2f}</span>'
        )
    yield '<p class="note">UTF-8 bytes that one token stands for: languages, and their sub-corpora.</p>'
    yield f'<div class="bars">{"".join(cells)}</div>'
    if len(rows) > BAR_ROWS:
        yield f'<p class="note">{len(rows) - BAR_ROWS} more rows stand in the table below.</p>'


def _padding(padding: dict) -> Iterator[str]:
    packed = padding["packed"]
    yield (
        '<div class="legend"><span><span class="box s1"></span>tokens</span>'
        '<span><span class="box s0"></span>padding</span></div>'
    )
    cells = []
    for key, name in WAYS:
        share = padding[key]["padding"]
        boxes = "".join(
            f'<span class="box {kind}" style="width:{100 * part:.2f}%"></span>'
            for kind, part in (("s1", 1 - share), ("s0", share))
        )
        cells.append(
            f'<span class="label">{name}</span><span class="track">{boxes}</span>'
            f'<span class="value">{percent(share)}</span>'
        )
    yield f'<div class="bars">{"".join(cells)}</div>'
    per_token = ", ".join(f"{padding[key]['cells_per_token']:.2f}" for key, _ in WAYS)
    yield (
        '<p class="note">Padding as a share of all that is computed; in the same order, '
        f"{per_token} places are computed for one token. The 64 × 64 tensors drop "
        f"{percent(padding['tensor_64x64']['dropped'])} of the tokens (sentences after a document’s 64th, "
        "tokens after a sentence’s 64th), the others none. Sorted: pools of "
        f"{padding['sorted_batch']['batches_sorted']} batches. Packed: windows of at most "
        f"{packed['window_tokens']:,} tokens in bins of {packed['bin_tokens']:,} by best fit, "
        f"{_count(packed['windows'], 'window')} in {_count(packed['bins'], 'bin')}. All in stored order.</p>"
    )


def _sub_corpora(result: dict) -> Iterator[str]:
    groups = _largest(result["groups"])
    amounts, shapes = [], []
    for group in [result, *groups[:TABLE_ROWS]]:
        name = _text(f"{group['language']}: {group['source']}" if "source" in group else "all")
        counts = (f"{group[key]:,}" for key in ("documents", "sentences", "tokens", "bytes"))
        amounts.append([name, *counts, f"{group['bytes_per_token']:.2f}"])
        lengths = group["tokens_per_sentence"]
        shapes.append(
            [
                name,
                f"{lengths['mean']:.1f}",
                str(lengths["median"]),
                str(lengths["p95"]),
                percent(group["share_at_limit"]),
                percent(group["share_one_token"]),
                percent(group["tensor_64x64"]["padding"]),
                percent(group["tensor_64x64"]["dropped"]),
            ]
        )
    yield _table(["sub-corpus", "documents", "sentences", "tokens", "bytes", "bytes per token"], amounts)
    yield (
        '<p class="note">Tokens in a sentence, shares of sentences at the limit and of one token, '
        "and what 64 × 64 tensors would pad and drop.</p>"
    )
    header = ["sub-corpus", "mean", "median", "p95", "at limit", "one token", "padding", "dropped"]
    yield _table(header, shapes)
    yield from _more(len(groups) - TABLE_ROWS)


def _copies(copies: dict) -> Iterator[str]:
    if not copies["documents"]:
        yield "<p>No two documents have the same text.</p>"
        return
    yield (
        f"<p>{_count(copies['documents'], 'document')} ({percent(copies['share'])}) with "
        f"{_count(copies['tokens'], 'token')} could go: their whole text stands in the set already, "
        f"as one of {_count(copies['texts'], 'text')} that stand there more than once. Most often:</p>"
    )
    rows = [
        [
            f"{one['documents']:,}",
            _text(one["source"]),
            _text(one["id"]),
            _shown(one["start"], one["language"]),
        ]
        for one in copies["most_copied"]
    ]
    yield _table(["times", "sub-corpus", "id of the first", "begins"], rows, left=4)


def _left_out(result: dict) -> Iterator[str]:
    documents = result["documents"]
    for what, none in (("rejected", "No record was rejected."), ("repaired", "No record was mended.")):
        counts = result[what]
        if not counts:
            yield f"<p>{none}</p>"
            continue
        total = documents + (sum(result["rejected"].values()) if what == "rejected" else 0)
        order = sorted(counts, key=lambda reason: (-counts[reason], reason))
        rows = [[_text(reason), f"{counts[reason]:,}", percent(counts[reason] / total)] for reason in order]
        share = "of all records" if what == "rejected" else "of the documents"
        yield _table([what, "records", share], rows, left=1)
    if files := result["rejected_files"]:
        yield "<h3>Files with the most rejected records</h3>"
        rows = []
        for one in files:
            reasons = ", ".join(f"{count:,} × {_text(reason)}" for reason, count in one["reasons"].items())
            rows.append([_text(one["file"]), f"{one['records']:,}", reasons])
        yield _table(["file", "records", "reasons"], rows, left=1, also_left=(2,))
    if result["damaged"]:
        yield "<h3>Input files that could not be read to their end</h3>"
        yield _table(
            ["file", "damage"],
            [[_text(one["file"]), _text(one["damage"])] for one in result["damaged"]],
            left=2,
        )
    if result["not_read"]:
        yield f"<h3>{_count(len(result['not_read']), 'file')} not read</h3>"
        named = ", ".join(f"<code>{_text(name)}</code>" for name in result["not_read"][:20])
        yield f"<p>{named}{', …' if len(result['not_read']) > 20 else ''}</p>"


def _samples(result: dict, languages: list[str]) -> Iterator[str]:
    limit = result["settings"]["max_tokens"]
    yield (
        '<p class="note">Picked by the hash of their document and place: the same texts give the same '
        "sentences. Each stands as it is stored, white space at its front included (↵ is a line break).</p>"
    )
    for language in languages[:SERIES]:
        yield f"<h3>{_text(language)}</h3>"
        for band in result["samples"][language]:
            first, last = band["from"], band["to"]
            span = f"{first}" if first == last else f"{first}–{last}"
            what = f"{span} tokens (the limit)" if last == limit else f"{span} tokens"
            items = "".join(f"<li>{_shown(one['text'], language)}</li>" for one in band["sentences"])
            yield f'<p class="note">{what}</p><ul class="samples">{items}</ul>'
    yield from _more(len(languages) - SERIES, "languages")


def _settings(result: dict) -> Iterator[str]:
    settings, tokenizer = result["settings"], result["tokenizer"]
    said = ", ".join(f"{_text(key)} <code>{_text(str(settings[key]))}</code>" for key in sorted(settings))
    yield (
        f"<p>{_count(result['shards'], 'shard')} of {_count(result['inputs'], 'input file')}. "
        f"Settings: {said}. Tokenizer: {_text(tokenizer['kind'])} with {tokenizer['vocab_size']:,} entries, "
        f"fingerprint <code>{_text(tokenizer['fingerprint'][:16])}</code>. Fingerprint of the set: "
        f"<code>{_text(result['fingerprint'][:16])}</code>.</p>"
    )


# Pictures ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Frame:
    """A picture's axes: places of values in pixels."""

    width: int
    height: int
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, value: float) -> float:
        low, high = self.x_range
        return LEFT + (value - low) / (high - low) * (self.width - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.height - BOTTOM - (value - low) / (high - low) * (self.height - TOP - BOTTOM)

    def axes(
        self, y_label: str, x_label: str, labels: list[tuple[float, str]] | None = None
    ) -> Iterator[str]:
        """Grid, tick labels, and the axes' names; `labels` instead of round numbers along x."""
        right, floor = self.width - RIGHT, self.height - BOTTOM
        yield f'<text x="0" y="12">{_text(y_label)}</text>'
        for value in _ticks(*self.y_range):
            y = self.y(value)
            yield f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            yield f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.6g}</text>'
        if labels is None:
            wanted = 8 if self.width > 500 else 5
            labels = [(value, f"{value:.6g}") for value in _ticks(*self.x_range, wanted)]
        for value, label in labels:
            yield f'<text x="{self.x(value):.1f}" y="{floor + 17}" text-anchor="middle">{label}</text>'
        yield f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{floor}" y2="{floor}"/>'
        yield f'<text x="{right}" y="{self.height - 6}" text-anchor="end">{_text(x_label)}</text>'

    def bar(self, number: int, x_low: float, x_high: float, value: float) -> str:
        left, top = self.x(x_low), self.y(value)
        return (
            f'<rect class="fill s{number}" x="{left:.1f}" y="{top:.1f}" width="{self.x(x_high) - left:.1f}" '
            f'height="{self.y(0) - top:.1f}"/>'
        )

    def mark(self, value: float, label: str) -> Iterator[str]:
        """A dashed line across, named at its top."""
        x = self.x(value)
        yield f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 6}" y2="{self.height - BOTTOM}"/>'
        side = "end" if x > self.width / 2 else "start"
        yield f'<text class="marked" x="{x:.1f}" y="{TOP - 11}" text-anchor="{side}">{_text(label)}</text>'


def _figure(
    drawn: list[tuple[str, dict]],
    draw: Callable[[_Frame], Iterator[str]],
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    title: str,
    note: str,
) -> str:
    """A picture in both widths with its title, the languages' colours and a note (ready HTML)."""
    legend = "".join(
        f'<span><span class="box s{number}"></span>{_text(name)}</span>'
        for number, (name, _) in enumerate(drawn, start=1)
    )
    pictures = []
    for kind, width, height in WIDTHS:
        frame = _Frame(width, height, x_range, (y_range[0], y_range[1] or 1))
        head = f'<svg class="{kind}" viewBox="0 0 {width} {height}" role="img" aria-label="{_text(title)}">'
        pictures.append("\n".join([head, *draw(frame), "</svg>"]))
    head = f'<figcaption>{_text(title)}</figcaption>\n<div class="legend">{legend}</div>'
    foot = f'<p class="note">{note}</p>' if note else ""
    return "\n".join(["<figure>", head, *pictures, foot, "</figure>"])


def _steps(frame: _Frame, number: int, edges: Sequence[float], values: Sequence[float]) -> Iterator[str]:
    """An outlined histogram."""
    corners = []
    for left, right, value in zip(edges, edges[1:], values, strict=False):
        corners += [(left, value), (right, value)]
    outline = [(edges[0], 0), *corners, (edges[-1], 0)]
    yield f'<polygon class="fill area s{number}" points="{_points(frame, outline)}"/>'
    yield f'<polyline class="line s{number}" points="{_points(frame, outline)}"/>'


def _line(frame: _Frame, number: int, points: Sequence[tuple[float, float]]) -> str:
    return f'<polyline class="line s{number}" points="{_points(frame, points)}"/>'


def _points(frame: _Frame, points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in points)


def _ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers in [low, high], at most about `wanted`."""
    step = 10 ** math.floor(math.log10((high - low) / wanted))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= wanted)
    return [n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


# Words -------------------------------------------------------------------------------------------------


def _table(header: list[str], rows: list[list[str]], left: int = 1, also_left: tuple[int, ...] = ()) -> str:
    """Cells are ready HTML; the first `left` columns and `also_left` are aligned left."""

    def line(tag: str, cells: list[str]) -> str:
        kinds = (' class="left"' if n < left or n in also_left else "" for n in range(len(cells)))
        return "".join(f"<{tag}{kind}>{cell}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))

    body = "\n".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    head = f"<thead><tr>{line('th', header)}</tr></thead>"
    return f'<div class="scroll"><table>{head}<tbody>\n{body}\n</tbody></table></div>'


def _more(count: int, what: str = "rows") -> Iterator[str]:
    if count > 0:
        yield f'<p class="note">{count:,} more {what} stand in the JSON.</p>'


def _largest(groups: list[dict]) -> list[dict]:
    return sorted(groups, key=lambda group: (-group["tokens"], group["language"], group["source"]))


def _text(text: str) -> str:
    """Foreign text as HTML. Characters that HTML cannot hold or that turn the writing around are named."""
    return html.escape(text.translate(_CONTROLS))


def _shown(text: str, language: str) -> str:
    """A stretch of the corpus, exactly; cut when very long. Its writing direction stays its own."""
    cut = len(text) - LONGEST_SAMPLE
    shown = _text(text[:LONGEST_SAMPLE])
    rest = f' <span class="note">… and {cut:,} characters</span>' if cut > 0 else ""
    return f'<bdi class="sentence" lang="{_text(language)}">{shown}</bdi>{rest}'


# Controls, direction marks, surrogates and non-characters; what has a common sign gets that.
_NAMED = (*range(0x20), *range(0x7F, 0xA0), *range(0xD800, 0xE000), 0xFFFE, 0xFFFF)
_NAMED += (0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_CONTROLS = {code: f"[U+{code:04X}]" for code in _NAMED} | {0x09: "⇥", 0x0A: "↵"}


def _folder_name(folder: str) -> str:
    return folder.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1] or folder


def _count(count: int, one: str, many: str | None = None) -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def _verb(count: int, one: str) -> str:
    many = {"was": "were", "holds": "hold", "repeats": "repeat"}
    return one if count == 1 else many[one]


def _size(size: int) -> str:
    """Three digits and a decimal unit."""
    unit = 0
    while unit < 4 and float(f"{size / 1000**unit:.3g}") >= 1000:  # 999.9 kB are 1 MB
        unit += 1
    return f"{float(f'{size / 1000**unit:.3g}'):g} {('bytes', 'kB', 'MB', 'GB', 'TB')[unit]}"


def _short(number: int) -> str:
    return f"{number // 1024}k" if number >= 1024 else str(number)
