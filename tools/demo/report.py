"""The demo's report: report.md and report.html, made only of the files that the demo's steps wrote.

The words are in report.md.jinja; the tables, charts and samples that it names are made here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from data_prep.common import files
from data_prep.common.charts import Line, Lines, running_mean
from data_prep.common.errors import counted
from data_prep.common.page import (
    NOTHING,
    Block,
    Chart,
    Sample,
    Table,
    Tiles,
    from_template,
    to_html,
    to_markdown,
)
from pipeline.common.figures import exact_matches
from pipeline.common.text import grouped
from pipeline.reports.run_report import summarise
from pipeline.training.run_files import Run, read_runs

TITLE = "Demo report: from text to a measured sentence-level language model"
NAMES = {"vae": "SentenceVAE", "sllm": "SLLM", "lm": "token model"}
KINDS = tuple(NAMES)
SAMPLING = {"temperature": 0.8, "top-p": 0.9, "seed": 1}
MEASURED = {"result": "evaluate", "check": "check"}
TASKS = {  # name in lm-evaluation-harness: (title, what guessing reaches)
    "sllm_cloze": ("last word of a sentence", None),
    "sllm_next_sentence": ("next sentence, of four", 0.25),
    "sllm_sentence_order": ("order of two sentences", 0.5),
}
COMPARED = {"data_fingerprint": "text", "window_tokens": "longest window", "tokens": "number of tokens"}
GROUPS = ((1, 4), (5, 8), (9, 16), (17, 32), (33, 1 << 60))


Trained = dict[str, Any]  # the figures of one run, its files as `run`, its `result` and `check`


def trained(kind: str, run: Run, measured: Path) -> Trained:
    """One training run, and what was measured on its model."""
    figures, seconds = summarise(run), sum(run.values("seconds"))
    return {
        "kind": kind,
        "name": NAMES[kind],
        "run": run,
        "steps": len(run.metrics),
        "seconds": seconds,
        "tokens": figures["tokens"],
        "tokens_per_second": figures["tokens"] / seconds,
        "padding_share": figures["padding_share"],
        "waiting_share": figures["data_wait_share"],
        **{what: read_json(measured / f"{name}-{kind}.json") for what, name in MEASURED.items()},
    }


def build_report(folder: str | Path) -> tuple[Path, Path]:
    """Write both files into the demo's folder; their paths. Raises: UserError if a file is missing."""
    folder = Path(folder)
    measured, found = folder / "measured", read_runs([folder / "runs" / kind for kind in KINDS])
    runs = [trained(kind, run, measured) for kind, run in zip(KINDS, found, strict=True)]
    ours, theirs = (one["result"] for one in runs[1:])
    differing = [
        f"{name} ({str(ours[key])[:12]} for the SLLM, {str(theirs[key])[:12]} for the token model)"
        for key, name in COMPARED.items()
        if ours[key] != theirs[key]
    ]
    passed = sum(one["check"]["passed"] for one in runs)
    ngram = read_json(measured / "ngram.json")
    stats = {name: read_json(measured / f"stats-{name}.json") for name in ("train", "validation")}
    stamps = map(read_json, (folder / "stamps").glob("*.json"))
    values = {
        **{one["kind"]: one for one in runs},
        "runs": runs,
        "differing": differing,
        "passed": passed,
        "ngram": ngram,
        "tasks": tasks(measured),
        "stats": stats,
        "machine": read_json(folder / "machine.json"),
        "stamps": sorted(stamps, key=lambda stamp: stamp["order"]),
    }
    parts: dict[str, Sequence[Block]] = {
        "tiles": [tiles(runs, ngram, passed)],
        "training": list(training(runs)),
        "sentences": list(sentences(stats["train"]["histogram"], runs[0])),
        "samples": [sample(made) for _, made in files.read_json_lines(measured / "samples.jsonl")],
    }
    template = Path(__file__).with_name("report.md.jinja")
    blocks = from_template(template, values, parts, {"f": format, "percent": percent})
    paths = folder / "report.md", folder / "report.html"
    for path, text in zip(paths, (to_markdown(TITLE, blocks), to_html(TITLE, blocks)), strict=True):
        path.write_text(text, encoding="utf-8")
    return paths


def read_json(path: Path) -> Any:
    missing = "is missing: the demo step that writes it has not run; run `make demo`"
    return files.read_json(path, missing=missing)


def tiles(runs: Sequence[Trained], ngram: dict[str, Any], passed: int) -> Tiles:
    ours, theirs = runs[1:]
    bits = [(one["name"], f"{one['result']['bits_per_byte']:.3f}", "bits per byte") for one in (ours, theirs)]
    bits.append(("5-gram", f"{ngram['bits_per_byte']:.3f}", "bits per byte, by counting"))
    speed = ("SLLM", grouped(round(ours["tokens_per_second"])), "tokens per second in training")
    return Tiles([*bits, speed, ("checks", f"{passed} of {len(runs)}", "models pass `sllm check`")])


def tasks(measured: Path) -> list[tuple[str, str, float | None, list[tuple[float, float]]]]:
    """(task, title, chance, [(accuracy, standard error) of SLLM and token model])"""
    found = []
    for kind in KINDS[1:]:
        paths = sorted((measured / f"tasks-{kind}").rglob("results_*.json"))
        found.append(read_json(paths[-1] if paths else measured / f"tasks-{kind}")["results"])
    rows = []
    for task, (title, chance) in TASKS.items():
        scores = [(float(one[task]["acc,none"]), float(one[task]["acc_stderr,none"])) for one in found]
        rows.append((task, title, chance, scores))
    return rows


def training(runs: Sequence[Trained]) -> Iterable[Block]:
    lines, means = [], []
    for one in runs:
        rows = [row for row in one["run"].metrics if row["loss"] is not None]
        tokens, losses = [row["tokens"] / 1e6 for row in rows], [row["loss"] for row in rows]
        means.append(running_mean(losses))
        for values, kind in ((losses, "faint"), (means[-1], "line")):
            lines.append(Line(one["name"], list(zip(tokens, values, strict=True)), one["kind"], kind))
    cells = [
        (f"{part / 8:.0%}", *(f"{mean[round(part / 8 * (len(mean) - 1))]:.3f}" for mean in means))
        for part in range(9)
    ]
    header = ("share of the run", *(one["name"] for one in runs))
    yield Chart(
        "Training loss of the three runs: each step (pale) and its running mean",
        Lines(lines, "million tokens", "nats per target", x_from=0),
        Table(header, cells, "running mean, nats per target"),
    )
    lines, cells = [], []
    for one in runs:
        if one["kind"] != "vae" and (evaluations := one["run"].evaluations):
            seen = {row["step"]: row["tokens"] / 1e6 for row in one["run"].metrics}
            points = [(seen[row["step"]], row["bits_per_byte"]) for row in evaluations]
            lines.append(Line(one["name"], points, one["kind"], "dots"))
            cells += [(one["name"], f"{r['step']:,}", f"{r['bits_per_byte']:.3f}") for r in evaluations]
    if lines:
        yield Chart(
            "Validation along the way: bits per byte (a part of the validation shards)",
            Lines(lines, "million tokens", "bits per byte", x_from=0),
            Table(("run", "step", "bits per byte"), cells),
        )


def sentences(counts: Sequence[int], vae: Trained) -> Iterable[Block]:
    ranges = [(start, sum(counts[start : start + 8])) for start in range(1, len(counts), 8)]
    yield Chart(
        "Sentence lengths in the training shards",
        bars(enumerate(counts[1:], start=1), "other-1", "tokens", "sentences"),
        Table(("tokens", "sentences"), [(f"{start}–{start + 7}", grouped(n)) for start, n in ranges]),
    )
    exact = {int(length): row for length, row in vae["result"]["exact_match_by_length"].items()}
    groups = []
    for low, high in GROUPS:
        total, right = exact_matches(vae["result"]["exact_match_by_length"], low, high)
        if total:
            name = f"{low}–{high}" if high < 1 << 60 else f"{low} and more"
            groups.append((name, grouped(total), percent(right)))
    if exact:
        shares = [(length, 100 * one["exact_match"]) for length, one in sorted(exact.items())]
        yield Chart(
            "SentenceVAE: validation sentences rebuilt exactly, by length",
            bars(shares, "vae", "tokens in the sentence", "per cent"),
            Table(("tokens", "sentences", "rebuilt exactly"), groups),
        )


def bars(points: Iterable[tuple[float, float]], colour: str, x_label: str, y_label: str) -> Lines:
    return Lines([Line("", list(points), colour, "bars")], x_label, y_label, y_from=0)


def sample(made: dict[str, Any]) -> Sample:
    (text,) = made["samples"]
    how = ", ".join(f"{option} {value}" for option, value in SAMPLING.items())
    label = f"{how}; {counted(len(text['sentences']), 'sentence')}, stopped: {text['stopped']}"
    return Sample(label, made["prompt"], text["text"])


def percent(share: float | None) -> str:
    return NOTHING if share is None else f"{100 * share:.1f} %"
