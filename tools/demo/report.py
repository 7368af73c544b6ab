"""The demo's report: report.md and report.html, made only of the files that the demo's steps wrote.

The words are in report.md.jinja; the tables, charts and samples that it names are made here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.common import files
from data_prep.common.charts import Bars, Line, Lines, running_mean
from data_prep.common.page import (
    NOTHING,
    Block,
    Chart,
    Sample,
    Table,
    from_template,
    to_html,
    to_markdown,
)
from pipeline.common.text import grouped
from pipeline.training.run_files import read_runs

TITLE = "Demo report: from text to a measured sentence-level language model"
NAMES = {"vae": "SentenceVAE", "sllm": "SLLM", "lm": "token model"}
KINDS = tuple(NAMES)
COMPARED = {"data_fingerprint": "text", "window_tokens": "longest window", "tokens": "number of tokens"}
GROUPS = ((1, 4), (5, 8), (9, 16), (17, 32), (33, 1 << 60))


@dataclass(frozen=True)
class Trained:
    """One training run: its metrics per step, its evaluations along the way, its final figures and checks."""

    kind: str
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    result: dict[str, Any]
    check: dict[str, Any]

    @property
    def name(self) -> str:
        return NAMES[self.kind]

    @property
    def tokens(self) -> int:
        return self.metrics[-1]["tokens"]

    @property
    def seconds(self) -> float:
        return sum(row["seconds"] for row in self.metrics)

    def losses(self) -> list[tuple[float, float]]:
        """(million tokens, nats per target) of each step that has a finite loss."""
        return [(row["tokens"] / 1e6, row["loss"]) for row in self.metrics if row["loss"] is not None]


def build_report(folder: str | Path) -> tuple[Path, Path]:
    """Write both files into the demo's folder; their paths. Raises: UserError if a file is missing."""
    folder = Path(folder)
    measured, runs = folder / "measured", []
    for kind, run in zip(KINDS, read_runs([folder / "runs" / kind for kind in KINDS]), strict=True):
        result, check = (read_json(measured / f"{what}-{kind}.json") for what in ("evaluate", "check"))
        runs.append(Trained(kind, run.metrics, run.evaluations, result, check))
    _, sllm, lm = runs
    differing = [
        f"{name} ({str(sllm.result[key])[:12]} for the SLLM, {str(lm.result[key])[:12]} for the token model)"
        for key, name in COMPARED.items()
        if sllm.result[key] != lm.result[key]
    ]
    passed = sum(run.check["passed"] for run in runs)
    values = {run.kind: run for run in runs} | {"differing": differing, "passed": passed}
    parts: dict[str, Sequence[Block]] = {
        "results": [results_table(runs)],
        "training": list(training(runs)),
        "sentences": list(sentences(measured, runs[0])),
        "samples": [sample(read_json(path)) for path in sorted(measured.glob("sample-*.json"))],
        "provenance": list(provenance(folder, runs)),
    }
    template = Path(__file__).with_name("report.md.jinja")
    blocks = from_template(template, values, parts, {"grouped": grouped, "percent": percent})
    paths = folder / "report.md", folder / "report.html"
    for path, text in zip(paths, (to_markdown(TITLE, blocks), to_html(TITLE, blocks)), strict=True):
        path.write_text(text, encoding="utf-8")
    return paths


def read_json(path: Path) -> Any:
    missing = "is missing: the demo step that writes it has not run; run `make demo`"
    return files.read_json(path, missing=missing)


def results_table(runs: Sequence[Trained]) -> Table:
    def result(key: str, digits: int) -> list[str]:
        return [f"{run.result[key]:.{digits}f}" if key in run.result else NOTHING for run in runs]

    def share(key: str) -> list[str]:  # of the whole run: weighted by the seconds of each step
        return [percent(sum(row[key] * row["seconds"] for row in run.metrics) / run.seconds) for run in runs]

    waits = [sum(row["data_wait_seconds"] for row in run.metrics) / run.seconds for run in runs]
    rows = (
        ("measures", *("reconstruction" if run.kind == "vae" else "prediction" for run in runs)),
        ("bits per byte", *result("bits_per_byte", 3)),
        ("perplexity per token", *result("ppl", 2)),
        ("bits per byte without sentence vectors", *result("bits_per_byte_without_vectors", 3)),
        ("vector gain (bits per byte)", *result("vector_gain", 4)),
        ("sentences rebuilt exactly", *(percent(run.result.get("exact_match")) for run in runs)),
        ("validation tokens scored", *(grouped(run.result["tokens"]) for run in runs)),
        ("tokens trained", *(grouped(run.tokens) for run in runs)),
        ("steps", *(grouped(len(run.metrics)) for run in runs)),
        ("wall time of the steps (s)", *(f"{run.seconds:.0f}" for run in runs)),
        ("tokens per second", *(grouped(round(run.tokens / run.seconds)) for run in runs)),
        ("padding computed", *share("padding_share")),
        ("time waiting for data", *map(percent, waits)),
        ("checks", *("passed" if run.check["passed"] else "FAILED" for run in runs)),
    )
    return Table(("", *(run.name for run in runs)), rows)


def training(runs: Sequence[Trained]) -> Iterable[Block]:
    lines, means = [], []
    for run in runs:
        tokens, losses = zip(*run.losses(), strict=True)
        means.append(running_mean(losses))
        lines.append(Line(run.name, run.losses(), run.kind, "faint"))
        lines.append(Line(run.name, list(zip(tokens, means[-1], strict=True)), run.kind))
    rows = [
        (f"{part / 8:.0%}", *(f"{mean[round(part / 8 * (len(mean) - 1))]:.3f}" for mean in means))
        for part in range(9)
    ]
    header = ("share of the run", *(run.name for run in runs))
    yield Chart(
        "Training loss of the three runs: each step (pale) and its running mean",
        Lines(lines, "million tokens", "nats per target", x_from=0),
        Table(header, rows, "running mean, nats per target"),
    )
    predictors = [run for run in runs if run.kind != "vae" and run.evaluations]
    if predictors:
        lines = []
        for run in predictors:
            seen = {row["step"]: row["tokens"] / 1e6 for row in run.metrics}
            points = [(seen[row["step"]], row["bits_per_byte"]) for row in run.evaluations]
            lines.append(Line(run.name, points, run.kind, "dots"))
        rows = [
            (run.name, grouped(row["step"]), f"{row['bits_per_byte']:.3f}")
            for run in predictors
            for row in run.evaluations
        ]
        yield Chart(
            "Validation along the way: bits per byte (a part of the validation shards)",
            Lines(lines, "million tokens", "bits per byte", x_from=0),
            Table(("run", "step", "bits per byte"), rows),
        )


def sentences(measured: Path, vae: Trained) -> Iterable[Block]:
    rows = []
    for name in ("train", "validation"):
        stats = read_json(measured / f"stats-{name}.json")
        spread = stats["tokens_per_sentence"]
        counts = (grouped(stats[key]) for key in ("documents", "sentences", "tokens", "bytes"))
        rows.append((name, *counts, f"{spread['mean']:.1f}", f"{spread['median']:g}", f"{spread['p95']:g}"))
    heads = "shards, documents, sentences, tokens, bytes, tokens per sentence, median, 95 % at most"
    yield Table(heads.split(", "), rows)
    counts = read_json(measured / "stats-train.json")["histogram"]
    ranges = [(start, sum(counts[start : start + 8])) for start in range(1, len(counts), 8)]
    yield Chart(
        "Sentence lengths in the training shards",
        Bars(range(1, len(counts)), [("", "other-1", counts[1:])], "tokens", "sentences"),
        Table(("tokens", "sentences"), [(f"{start}–{start + 7}", grouped(n)) for start, n in ranges]),
    )
    exact = {int(length): row for length, row in vae.result["exact_match_by_length"].items()}
    groups = []
    for low, high in GROUPS:
        ones = [row for length, row in exact.items() if low <= length <= high]
        if total := sum(row["sentences"] for row in ones):
            right = sum(row["sentences"] * row["exact_match"] for row in ones) / total
            groups.append(
                (f"{low}–{high}" if high < 1 << 60 else f"{low} and more", grouped(total), percent(right))
            )
    if exact:
        lengths = sorted(exact)
        shares = [100 * exact[length]["exact_match"] for length in lengths]
        yield Chart(
            "SentenceVAE: validation sentences rebuilt exactly, by length",
            Bars(lengths, [("", "vae", shares)], "tokens in the sentence", "per cent"),
            Table(("tokens", "sentences", "rebuilt exactly"), groups),
        )


def sample(made: dict[str, Any]) -> Sample:
    how = f"temperature {made['temperature']:g}" if made["temperature"] else "greedy"
    how += f", top-p {made['top_p']:g}" if made.get("top_p") else ""
    how += f", seed {made['seed']}" if made["temperature"] else ""
    label = f"{how}; {len(made['sentences'])} sentences, stopped: {made['stopped']}"
    return Sample(label, made["prompt"], made["text"][len(made["prompt"]) :])


def provenance(folder: Path, runs: Sequence[Trained]) -> Iterable[Block]:
    machine = read_json(folder / "machine.json")
    yield Table(("machine and versions", ""), [(key, str(one)) for key, one in machine.items()], left=True)
    stamps = sorted(map(read_json, (folder / "stamps").glob("*.json")), key=lambda stamp: stamp["order"])
    rows = [(stamp["step"], f"{stamp['seconds']:.1f}", stamp["finished"]) for stamp in stamps]
    total = f"{sum(stamp['seconds'] for stamp in stamps):.1f}"
    yield Table(("step", "seconds", "finished"), (*rows, ("together", total, "")), "the demo's steps")
    checks = [
        (
            run.name,
            f"{one['check']} ({one['path']})",
            f"{'passed' if one['passed'] else 'FAILED'}: largest difference {one['max_difference']:.1e} in "
            f"{grouped(one['compared'])} scores",
        )
        for run in runs
        for one in run.check["checks"]
    ]
    yield Table(("run", "check", "outcome"), checks, "`sllm check`", left=True)


def percent(share: float | None) -> str:
    return NOTHING if share is None else f"{100 * share:.1f} %"
