"""Tables of the docs: one function for each kind of result, from result files to lines of Markdown.

Other tables are templates in `templates/`. FILE is a path below docs/results.

    typed FILE               rows as they were typed into a file
    sweep FILES [COLUMNS…]   runs of `sllm sweep`, a line a name, seeds averaged; (±x) is half of the range
                             of the seeds. COLUMNS are keys of the rows; by default those of `USUAL` that
                             are there
    robustness FILE          result of `sllm robustness`: a line for each variant of the text and model
    context FILE             the same file's loss by context length: where context pays, with its chart
    contest FILES            the same files' runs with a budget: the best of both sides, how many were tried,
                             paired differences on held-out text, fits, and the frontier as a picture;
                             a result of `sllm benchmark train --step` among them gives equal time
    exact-by-length FILE     the same file's SentenceVAEs: sentences rebuilt exactly, by length
    scaling FILE             result of `sllm scaling fit --json`, with its chart as a picture
    comparison FILE          result of `sllm compare --json`, with its charts as pictures
    by-language FILES        the same files' SLLMs and token-level models: bits per byte and vector gain of
                             each language
    segment-quality FILE     result of `tools.benchmarks.segment_quality`
    identify-quality FILE N  result of `tools.benchmarks.identify_quality`: its table N, from 0
    goodput FILE             result of `tools.benchmarks.goodput`, with its chart as a picture
    generation-chart FILE    the picture of a result of `sllm benchmark generation`
    gpu-check FILE           results.jsonl of `tools.gpu_check run`: how each check ended
    headline FOLDER          README's table and charts: quality and speed of the main comparison
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.common.charts import BarsAcross, Line, Lines, Plot, svg
from data_prep.common.errors import UserError
from data_prep.common.files import read_json
from data_prep.common.page import NOTHING, Table, markdown_table, render
from pipeline.common.figures import exact_matches
from pipeline.common.text import duration, with_interval
from pipeline.evaluation.controls import SHIFTS
from pipeline.reports.charts import generation_plots
from pipeline.research import compare_page, contest, context_table, scaling
from tools.benchmarks import goodput, identify_quality, segment_quality
from tools.gpu_check import page as gpu_page
from tools.gpu_check import runner as gpu_check

TEMPLATES = Path(__file__).parent / "templates"
ENGINES = {"hf": "Hugging Face", "ctranslate2": "CTranslate2"}  # of the README's table


@dataclass(frozen=True)
class Results:
    """The folder of result files, the page that is being filled, and the pictures drawn so far."""

    folder: Path
    page: Path
    pictures: dict[Path, str]

    def read(self, file: str) -> dict[str, Any]:
        """A result file. Raises: UserError for one that is not there or is no JSON object."""
        return read_json(self.folder / file, f"docs/results/{file}", "is not there")

    def draw(self, file: str, plots: Sequence[Plot], caption: str) -> list[str]:
        """Keep a picture, to be written as docs/results/`file`; the lines that show it on the page."""
        path = self.folder / file
        self.pictures[path] = svg(plots, caption)
        return ["", f"![{caption}]({os.path.relpath(path, self.page.parent)})"]


def share(value: float | None) -> str:
    """A share as a percentage with one decimal; nothing at all is 0 %."""
    return NOTHING if value is None else f"{100 * value:.1f} %" if value else "0 %"


# Any file of a kind ----------------------------------------------------------------------------------------


def typed(results: Results, file: str) -> list[str]:
    found = results.read(file)
    if "source" not in found:
        raise UserError(f"docs/results/{file} does not say where its rows come from (`source`)")
    return markdown_table(Table(found["columns"], found["rows"], left=found.get("left", (0,))))


@dataclass(frozen=True)
class Column:
    """A column of a sweep: its head, what it is divided by, its format, and whether seeds' spread matters."""

    head: str
    size: float = 1
    form: str = ".3f"
    spread: bool = True
    unit: str = ""

    def cell(self, values: Sequence[float]) -> str:
        """The mean of the seeds, and half of their range where there are several."""
        if not values:
            return NOTHING
        scaled = [value / self.size for value in values]
        text = f"{statistics.fmean(scaled):{self.form}}{self.unit}"
        half = (max(scaled) - min(scaled)) / 2
        return f"{text} (±{half:{self.form}})" if self.spread and len(values) > 1 else text


COLUMNS = {
    "objective": Column("objective"),
    "parameters": Column("parameters (M)", 1e6, ".2f", spread=False),
    "body_parameters": Column("without embeddings and head (M)", 1e6, ".2f", spread=False),
    "bits_per_byte": Column("bits per byte"),
    "vector_gain": Column("vector gain"),
    "shuffle_gain": Column("shuffle gain"),
    **{f"shift_{n}_gain": Column(f"shifted by {n}") for n in SHIFTS},
    "ngram_bits_per_byte": Column("Kneser–Ney", spread=False),
    "needed_operations": Column("needed multiply-adds (10¹²)", 1e12, ",.2f", spread=False),
    "needed_operations_with_vae": Column("with the SentenceVAE's (10¹²)", 1e12, ",.2f", spread=False),
    "ppl": Column("ppl", form=".1f"),
    "tokens": Column("tokens (M)", 1e6, ".2f", spread=False),
    "tokens_with_vae": Column("with the SentenceVAE's (M)", 1e6, ".2f", spread=False),
    "seconds": Column("seconds", form=",.0f"),
    "seconds_with_vae": Column("with the SentenceVAE's (s)", form=",.0f"),
    "operations": Column("multiply-adds (10¹²)", 1e12, ",.2f", spread=False),
    "operations_with_vae": Column("with the SentenceVAE's (10¹²)", 1e12, ",.2f", spread=False),
    "tokens_per_second": Column("tokens/s", form=",.0f"),
    "exact_match": Column("exact match", 0.01, ".1f", unit=" %"),
    "exact_match_to_8": Column("up to 8 tokens", 0.01, ".1f", unit=" %"),
    "window_tokens": Column("window", form=",.0f", spread=False),
}
USUAL = (
    *("bits_per_byte", "vector_gain", "tokens", "tokens_with_vae", "seconds", "seconds_with_vae"),
    *("exact_match", "exact_match_to_8"),
)


def _by_name(rows: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["name"], []).append(row)
    return found


def sweep(results: Results, *words: str) -> list[str]:
    found = [results.read(word) for word in words if word.endswith(".json")]
    rows = [row for one in found for row in one["rows"]]
    columns = [word for word in words if not word.endswith(".json")]
    if unknown := [key for key in columns if key not in COLUMNS]:
        raise UserError(f"no column {unknown[0]}; there are {', '.join(COLUMNS)}")
    if not rows:
        raise UserError("name a FILE.json that has rows")
    texts = {(row.get("evaluation") or {}).get("data_fingerprint") for row in rows}
    if len(texts - {None}) > 1:
        raise UserError("these runs were measured on different texts: they need a table each")
    windows = {row.get("window_tokens") for row in rows if row.get("objective") != "vae"}
    if len(windows - {None}) > 1 and "window_tokens" not in columns:
        raise UserError("these runs were measured with different windows: add the column window_tokens")

    def tells(key: str) -> bool:  # something that the column before it does not
        values = [row.get(key) for row in rows]
        plain = [row.get(key.removesuffix("_with_vae")) for row in rows]
        same = all(a is None or a == b for a, b in zip(values, plain, strict=True))
        return any(value is not None for value in values) and not (key.endswith("_with_vae") and same)

    keys = columns or [key for key in USUAL if tells(key)]
    rebuilt = "" if all(row.get("objective") == "vae" for row in rows) else " (rebuilding)"
    runs = _by_name(rows)
    seeds = any(len(of_name) > 1 for of_name in runs.values())
    shown = []
    for name, of_name in runs.items():
        cells = []
        for key in keys:
            values = [row[key] for row in of_name if row.get(key) is not None]
            if key == "objective":
                cells.append(", ".join(dict.fromkeys(values)))
                continue
            cells.append(COLUMNS[key].cell(values))
            if values and key in ("bits_per_byte", "ppl") and of_name[0].get("objective") == "vae":
                cells[-1] += rebuilt  # no prediction: not to be read beside the others
        shown.append([name, *([str(len(of_name))] if seeds else []), *cells])
    header = ["run", *(["seeds"] if seeds else []), *(COLUMNS[key].head for key in keys)]
    left = [n for n, head in enumerate(header) if n == 0 or head == "objective"]
    lines = markdown_table(Table(header, shown, left=left))
    if lost := [key for one in found for part in ("failed", "missing") for key in one.get(part) or ()]:
        lines += ["", f"Without a result: {', '.join(lost)}."]
    return lines


LENGTHS = ((1, 4), (5, 8), (9, 16), (17, 32), (33, 64))


def exact_by_length(results: Results, file: str) -> list[str]:
    groups = (*LENGTHS, (1, 10**9))
    rows = results.read(file)["rows"]
    rows = [row for row in rows if (row.get("evaluation") or {}).get("exact_match_by_length")]
    if not rows:
        raise UserError(f"docs/results/{file} has no run with exact_match_by_length: no SentenceVAE")
    column, shown, counts = COLUMNS["exact_match"], [], []
    for name, of_name in _by_name(rows).items():
        by_length = [row["evaluation"]["exact_match_by_length"] for row in of_name]
        found = [[exact_matches(one, *group) for group in groups] for one in by_length]
        counts.append([sentences for sentences, _ in found[0]])
        cells = [
            column.cell([value for _, value in one if value is not None]) for one in zip(*found, strict=True)
        ]
        shown.append([name, *cells])
    header = ["tokens", *(f"{low}–{high}" for low, high in LENGTHS), "all"]
    if all(count == counts[0] for count in counts):  # one text, cut in one way
        shown.insert(0, ["sentences", *(f"{count:,}" for count in counts[0])])
    return markdown_table(Table(header, shown))


def compared(results: Results, file: str) -> list[str]:
    found = results.read(file)
    shown, stem = compare_page.table(found), file.removesuffix(".json")
    lines = markdown_table(Table(shown.header, [[cell.strip() for cell in row] for row in shown.rows]))
    lines += ["", *(f"- {note}" for note in found["notes"])] if found["notes"] else []
    caption = "Validation bits per byte over what training has cost, the SentenceVAE's part included"
    lines += results.draw(f"{stem}-quality.svg", list(compare_page.quality_plots(found).values()), caption)
    if speed := compare_page.speed_plot(found):
        caption, plot = speed
        lines += results.draw(f"{stem}-speed.svg", [plot], f"Quality against generation speed. {caption}")
    return lines


def fitted(results: Results, file: str) -> list[str]:
    found = results.read(file)
    caption = f"Bits per byte over {scaling.X[found['x']]}: all runs, and the fits"
    lines = [*markdown_table(scaling.table(found)), "", f"- {found['note']}"]
    return lines + results.draw(f"{file.removesuffix('.json')}.svg", [scaling.plot(found)], caption)


def context(results: Results, file: str) -> list[str]:
    rows = results.read(file)["rows"]
    found = context_table.table(rows)
    if found is None:
        raise UserError(f"docs/results/{file} has no run with a context_curve")
    name, caption = f"{file.removesuffix('.json')}.svg", context_table.CAPTION
    return markdown_table(found) + results.draw(name, context_table.plots(rows), caption)


def contested(results: Results, *files: str) -> list[str]:
    found = [results.read(file) for file in files]
    rates = [
        {"sllm": one["model"]["multiply_adds_per_second"], "lm": one["against"]["multiply_adds_per_second"]}
        for one in found
        if "rows" not in one
    ]
    if len(rates) > 1:
        raise UserError(f"{len(rates)} of {', '.join(files)} are files of rates: name one")
    settled = contest.settle((row for one in found for row in one.get("rows", ())), *rates)
    name, caption = f"{files[0].removesuffix('.json')}-frontier.svg", "All tries of both sides"
    lines = [*markdown_table(contest.table(settled)), "", *(f"- {note}" for note in contest.notes(settled))]
    return lines + results.draw(name, contest.plots(settled), caption)


def segment_quality_table(results: Results, file: str) -> list[str]:
    return markdown_table(segment_quality.table(results.read(file)))


def identify_quality_table(results: Results, file: str, number: str) -> list[str]:
    return markdown_table(identify_quality.tables(results.read(file))[int(number)])


def goodput_table(results: Results, file: str) -> list[str]:
    found = results.read(file)
    caption = f"Goodput of {found['gpus']:,} GPUs in {found['days']} days, by the interval between saves"
    return markdown_table(goodput.table(found)) + results.draw(
        f"{file.removesuffix('.json')}.svg", goodput.plots(found), caption
    )


def generation_chart(results: Results, file: str) -> list[str]:
    found = results.read(file)
    caption = f"New tokens per second and memory: {found['model']['name']} beside {found['against']['name']}"
    return results.draw(f"{file.removesuffix('.json')}.svg", generation_plots(found), caption)[1:]


def gpu_check_table(results: Results, file: str) -> list[str]:
    records = gpu_check.read(results.folder / file)
    return [
        *(f"{line}." for line in gpu_page.machines(records)),
        "",
        *markdown_table(gpu_page.summary(records)),
    ]


def headline(results: Results, folder: str) -> list[str]:
    rows = [row for file in ("lm", "sllm") for row in results.read(f"{folder}/{file}.json")["rows"]]
    runs = {name: [row["bits_per_byte"] for row in found] for name, found in _by_name(rows).items()}
    ngram = results.read(f"{folder}/ngram-valid.json")["bits_per_byte"]
    by_engine = [results.read(f"{folder}/generation-{engine}.json") for engine in ENGINES]
    points = [
        [point | {"engine": ENGINES[found["engine"]]} for point in found["points"]] for found in by_engine
    ]
    # Beside the engine that runs the token model fastest.
    speed = [
        min(same, key=lambda one: one["ratios"]["tokens_per_second"]) for same in zip(*points, strict=True)
    ]
    bound = {row["layers"]: row for row in results.read(f"{folder}/bound.json")["rows"]}
    # Of the models compared: a token model of four layers, an SLLM of five, of which two are its backbone.
    full = bound[4]["against"]["full"]
    low, high = sorted(full[cost] / bound[5]["model"][cost] for cost in ("multiply_adds", "bytes"))

    chosen = [("token model, 4 layers", "lm", "token model"), ("SLLM", "sllm", "SLLM")]
    chosen.append(("SLLM, full sentences", "sllm-2", "SLLM, full sentences"))
    chosen.append(("SLLM, the paper's choices", "sllm-3", "SLLM as in the paper"))
    lines = [
        Line(
            "",
            [(n, statistics.fmean(runs[name]))],
            hue,
            "points",
            interval=[(min(runs[name]), max(runs[name]))],
        )
        for n, (name, hue, _) in enumerate(chosen)
    ]
    lines.append(Line("5-gram", [(-0.4, ngram), (len(chosen) - 0.6, ngram)], "ngram", dash="--"))
    ticks = [(n, label) for n, (_, _, label) in enumerate(chosen)]
    quality = Lines(lines, "", "bits per byte of unseen books (lower is better)", x_ticks=ticks, y_from=1.78)
    bars = []
    for point in speed:
        base = point["against"]["tokens_per_second"]["median"]
        # Rows of a batch share the weights that are read, so only operations count there.
        most = high if point["batch"] == 1 else low
        limits = [(base * low, "rest"), (base * (most - low), "rule")]
        beside = f"batch {point['batch']}"
        bars.append((f"token model by {point['engine']}, {beside}", f"{base:,.0f}", [(base, "lm")]))
        ours = point["model"]["tokens_per_second"]["median"]
        ratio = point["ratios"]["tokens_per_second"]
        bars.append((f"SLLM, {beside}", f"{ours:,.0f} ({ratio:.1f}×)", [(ours, "sllm")]))
        bars.append(
            (
                f"what arithmetic explains, {beside}",
                f"{low:.1f}×" if most == low else f"{low:.1f}–{most:.1f}×",
                limits,
            )
        )
    lines_out = markdown_table(
        Table(
            ["1M parameters, 8 minutes of one core each", "token model", "SLLM"],
            [
                [
                    "bits per byte, two seeds",
                    *(COLUMNS["bits_per_byte"].cell(runs[name]) for name, *_ in chosen[:2]),
                ],
                ["the same, Kneser–Ney 5-gram", f"{ngram:.3f}", ""],
                *(
                    [
                        f"new tokens a second, batch {point['batch']}; token model by {point['engine']}",
                        f"{point['against']['tokens_per_second']['median']:,.0f}",
                        f"{point['model']['tokens_per_second']['median']:,.0f}",
                    ]
                    for point in speed
                ),
                [
                    "cached bytes a token of context",
                    *(f"{speed[0][side]['cached_bytes_per_token']:,.0f}" for side in ("against", "model")),
                ],
            ],
        )
    )
    lines_out += results.draw(
        f"{folder}/headline-quality.svg", [quality], "Bits per byte, with the seeds' range"
    )
    return lines_out + results.draw(
        f"{folder}/headline-speed.svg",
        [BarsAcross(bars)],
        "New tokens per second on one core",
    )


def of_template(path: Path) -> Callable[..., list[str]]:
    """A table whose template reads the files."""

    def made(results: Results, *files: str) -> list[str]:
        values: dict[str, Any] = {
            "files": files,
            "read": results.read,
            "matches": exact_matches,
            "by_name": _by_name,
            "mean": lambda key, values: COLUMNS[key].cell(list(values)),
            "ln2": math.log(2),
            "exp": math.exp,
        }
        filters: dict[str, Callable[..., Any]] = {
            "f": format,
            "share": share,
            "duration": duration,
            "with_interval": with_interval,
        }
        return render(path, values, filters).replace("|  |", "| |").splitlines()

    return made


TABLES: dict[str, Callable[..., list[str]]] = {
    "typed": typed,
    "sweep": sweep,
    "exact-by-length": exact_by_length,
    "context": context,
    "contest": contested,
    "scaling": fitted,
    "comparison": compared,
    "segment-quality": segment_quality_table,
    "identify-quality": identify_quality_table,
    "goodput": goodput_table,
    "generation-chart": generation_chart,
    "gpu-check": gpu_check_table,
    "headline": headline,
    **{path.name.split(".")[0]: of_template(path) for path in sorted(TEMPLATES.glob("*.md.jinja"))},
}
