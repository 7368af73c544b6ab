"""The demo's report: report.md and report.html, made only of the files that the demo's steps wrote.

The words are in report.md.jinja; the tables, charts and samples that it names are made here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.common import files
from data_prep.common.charts import Line, Lines, running_mean
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
from pipeline.common.figures import exact_matches
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

    def figures(self) -> dict[str, Any]:
        """What the report's first table shows of the run."""
        padding = sum(row["padding_share"] * row["seconds"] for row in self.metrics) / self.seconds
        waiting = sum(row["data_wait_seconds"] for row in self.metrics) / self.seconds
        found = {"kind": self.kind, "name": self.name, "tokens": self.tokens, "seconds": self.seconds}
        found |= {"steps": len(self.metrics), "tokens_per_second": self.tokens / self.seconds}
        found |= {"padding_share": padding, "waiting_share": waiting}
        return found | {"result": self.result, "check": self.check}

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
    stats = {name: read_json(measured / f"stats-{name}.json") for name in ("train", "validation")}
    stamps = map(read_json, (folder / "stamps").glob("*.json"))
    values = {
        **{run.kind: run for run in runs},
        "runs": [run.figures() for run in runs],
        "differing": differing,
        "passed": passed,
        "stats": stats,
        "machine": read_json(folder / "machine.json"),
        "stamps": sorted(stamps, key=lambda stamp: stamp["order"]),
    }
    parts: dict[str, Sequence[Block]] = {
        "training": list(training(runs)),
        "sentences": list(sentences(stats["train"]["histogram"], runs[0])),
        "samples": [sample(read_json(path)) for path in sorted(measured.glob("sample-*.json"))],
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


def sentences(counts: Sequence[int], vae: Trained) -> Iterable[Block]:
    ranges = [(start, sum(counts[start : start + 8])) for start in range(1, len(counts), 8)]
    yield Chart(
        "Sentence lengths in the training shards",
        bars(enumerate(counts[1:], start=1), "other-1", "tokens", "sentences"),
        Table(("tokens", "sentences"), [(f"{start}–{start + 7}", grouped(n)) for start, n in ranges]),
    )
    exact = {int(length): row for length, row in vae.result["exact_match_by_length"].items()}
    groups = []
    for low, high in GROUPS:
        total, right = exact_matches(vae.result["exact_match_by_length"], low, high)
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
    how = f"temperature {made['temperature']:g}" if made["temperature"] else "greedy"
    how += f", top-p {made['top_p']:g}" if made.get("top_p") else ""
    how += f", seed {made['seed']}" if made["temperature"] else ""
    label = f"{how}; {len(made['sentences'])} sentences, stopped: {made['stopped']}"
    return Sample(label, made["prompt"], made["text"][len(made["prompt"]) :])


def percent(share: float | None) -> str:
    return NOTHING if share is None else f"{100 * share:.1f} %"
