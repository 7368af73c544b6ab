"""The demo's report: demo/report.md and demo/report.html, made only of the files that the demo's runs wrote.

In: the demo's folder after its other steps:

    machine.json                             the machine and the versions
    runs/{vae,sllm,lm}/metrics.jsonl         one object per training step
    runs/{vae,sllm,lm}/evaluations.jsonl     one object per evaluation in the loop
    measured/stats-train.json, stats-validation.json     `data-prep stats --json`
    measured/evaluate-KIND.json, check-KIND.json, sample-N.json     what `sllm … --json` printed
    stamps/*.json                            seconds per step

Out: the two reports. Every figure is read or computed here from those files; there is no other source. Called
by `pipeline/demo.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.common.files import read_json
from pipeline.common.text import NOTHING
from pipeline.reports.charts import Series, bar_chart, line_chart, running_mean
from pipeline.reports.page import Block, Chart, Heading, Sample, Table, Text, to_html, to_markdown
from pipeline.training.run_files import read_runs

TITLE = "Demo report: from text to a measured sentence-level language model"
KINDS = ("vae", "sllm", "lm")
NAMES = {"vae": "SentenceVAE", "sllm": "SLLM", "lm": "token model"}


@dataclass(frozen=True)
class Run:
    """One training run: its metrics per step, its evaluations along the way, its final figures and checks."""

    kind: str
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    result: dict[str, Any]
    check: dict[str, Any]

    @property
    def name(self) -> str:
        return NAMES[self.kind]

    def tokens_so_far(self) -> list[int]:
        """Real tokens trained on after each step."""
        return [row["tokens"] for row in self.metrics]

    def tokens(self) -> int:
        return self.metrics[-1]["tokens"]

    def losses(self) -> list[float]:
        """Nats per target of each step; a skipped step (no finite loss) repeats the one before it."""
        losses: list[float] = []
        for row in self.metrics:
            losses.append(row["loss"] if row["loss"] is not None else losses[-1] if losses else math.nan)
        return losses

    def seconds(self) -> float:
        return sum(row["seconds"] for row in self.metrics)

    def share(self, key: str) -> float:
        """A per-step share or time as part of the whole run: weighted by the seconds of its step."""
        return sum(row[key] * row["seconds"] for row in self.metrics) / self.seconds()


def build_report(folder: str | Path) -> tuple[Path, Path]:
    """Write report.md and report.html into the demo's folder; their paths. UserError if a file is missing."""
    folder = Path(folder)
    runs = [read_run(folder, kind) for kind in KINDS]
    blocks = list(compose(folder, runs))
    paths = folder / "report.md", folder / "report.html"
    for path, text in zip(paths, (to_markdown(TITLE, blocks), to_html(TITLE, blocks)), strict=True):
        path.write_text(text, encoding="utf-8")
    return paths


def read_output(path: Path) -> dict[str, Any]:
    """What a step of the demo has written. UserError when it has not."""
    return read_json(path, missing="is missing: the demo step that writes it has not run; run `make demo`")


def read_run(folder: Path, kind: str) -> Run:
    """Everything about one run. UserError when a file is missing or the run trained no step."""
    [run] = read_runs([folder / "runs" / kind])
    measured = folder / "measured"
    return Run(
        kind=kind,
        metrics=run.metrics,
        evaluations=run.evaluations,
        result=read_output(measured / f"evaluate-{kind}.json"),
        check=read_output(measured / f"check-{kind}.json"),
    )


def compose(folder: Path, runs: Sequence[Run]) -> Iterable[Block]:
    """The report's blocks in reading order."""
    vae, sllm, lm = runs
    parts = ("train", "validation")
    stats = {name: read_output(folder / "measured" / f"stats-{name}.json") for name in parts}
    yield from summary(vae, sllm, lm)
    yield Heading("Results")
    yield results_table(runs)
    yield Text(
        f"{scored(sllm, lm)} The SLLM also pays for sentence ends and for stop decisions. "
        "The SentenceVAE's column is another task: it rebuilds a sentence from that sentence's own vector. "
        "**Vector gain** is what the SLLM loses in bits per byte when every sentence vector is replaced by "
        "the start vector: what the backbone contributes at all."
    )
    yield Text(budgets(vae, sllm, lm))
    yield Heading("Training")
    yield from training(runs)
    yield Heading("Sentences")
    yield from sentences(stats, vae)
    yield Heading("What the SLLM writes")
    yield from samples([read_output(path) for path in sorted((folder / "measured").glob("sample-*.json"))])
    yield Heading("What such a small model can and cannot show")
    yield from limits(sllm, lm)
    yield Heading("How it was made")
    yield from provenance(folder, runs)


def summary(vae: Run, sllm: Run, lm: Run) -> Iterable[Block]:
    checks = [run for run in (vae, sllm, lm) if run.check["passed"]]
    gap = sllm.result["bits_per_byte"] - lm.result["bits_per_byte"]
    verdict = f"the SLLM needs {abs(gap):.3f} {'more' if gap > 0 else 'fewer'}"
    if differences(sllm, lm):
        verdict = "**these two must not be compared**, for they were not scored on the same (see below)"
    yield Text(
        "The whole line ran on this machine: text, shards, SentenceVAE, SLLM and a token-level baseline, "
        f"all trained by two processes under ZeRO-3. On {grouped(sllm.result['bytes'])} bytes of unseen "
        f"documents the SLLM needs **{sllm.result['bits_per_byte']:.3f}** bits per byte after "
        f"{grouped(sllm.tokens())} training tokens (and its SentenceVAE's {grouped(vae.tokens())}), "
        f"the token model **{lm.result['bits_per_byte']:.3f}** after {grouped(lm.tokens())}: {verdict}. "
        "The SentenceVAE rebuilds "
        f"{percent(vae.result['exact_match'])} of unseen sentences exactly. {len(checks)} of 3 models pass "
        "the checks on causality, caching and packing."
    )


def differences(sllm: Run, lm: Run) -> list[str]:
    """In words, what keeps the two figures from being compared; empty: same tokens, same windows."""
    names = {"data_fingerprint": "text", "window_tokens": "longest window", "tokens": "number of tokens"}
    return [
        f"{name} ({str(sllm.result[key])[:12]} for the SLLM, {str(lm.result[key])[:12]} for the token model)"
        for key, name in names.items()
        if sllm.result[key] != lm.result[key]
    ]


def scored(sllm: Run, lm: Run) -> str:
    """What bits per byte and ppl of the two predictors are over, as their results say."""
    if found := differences(sllm, lm):
        return f"**SLLM and token model were not scored on the same: {'; '.join(found)} differ.**"
    return (
        "Bits per byte and ppl of the SLLM and of the token model are over the same "
        f"{grouped(lm.result['tokens'])} tokens of the same windows (at most "
        f"{grouped(lm.result['window_tokens'])} tokens each) of the validation documents."
    )


def budgets(vae: Run, sllm: Run, lm: Run) -> str:
    """What each predictor was trained on: an SLLM starts from a SentenceVAE that has seen text too."""
    text = (
        f"The SLLM starts from this SentenceVAE, so its encoder and decoder had seen {grouped(vae.tokens())} "
        f"tokens before its own {grouped(sllm.tokens())}; the token model starts from nothing and sees "
        f"{grouped(lm.tokens())}."
    )
    if abs(sllm.tokens() - lm.tokens()) > 0.02 * lm.tokens():
        text += " **The two budgets differ, so the two figures must not be compared.**"
    return text


def results_table(runs: Sequence[Run]) -> Table:
    def row(label: str, *cells: str) -> tuple[str, ...]:
        return (label, *cells)

    def result(key: str, digits: int) -> list[str]:
        return [f"{run.result[key]:.{digits}f}" if key in run.result else NOTHING for run in runs]

    rows = [
        row("measures", *("reconstruction" if run.kind == "vae" else "prediction" for run in runs)),
        row("bits per byte", *result("bits_per_byte", 3)),
        row("perplexity per token", *result("ppl", 2)),
        row("bits per byte without sentence vectors", *result("bits_per_byte_without_vectors", 3)),
        row("vector gain (bits per byte)", *result("vector_gain", 4)),
        row("sentences rebuilt exactly", *(percent(run.result.get("exact_match")) for run in runs)),
        row("validation tokens scored", *(grouped(run.result["tokens"]) for run in runs)),
        row("tokens trained", *(grouped(run.tokens()) for run in runs)),
        row("steps", *(grouped(len(run.metrics)) for run in runs)),
        row("wall time of the steps (s)", *(f"{run.seconds():.0f}" for run in runs)),
        row("tokens per second", *(grouped(round(run.tokens() / run.seconds())) for run in runs)),
        row("padding computed", *(percent(run.share("padding_share")) for run in runs)),
        row("time waiting for data", *(percent(waiting(run)) for run in runs)),
        row("checks", *("passed" if run.check["passed"] else "FAILED" for run in runs)),
    ]
    return Table(("", *(run.name for run in runs)), tuple(rows))


def waiting(run: Run) -> float:
    return sum(row["data_wait_seconds"] for row in run.metrics) / run.seconds()


def training(runs: Sequence[Run]) -> Iterable[Block]:
    series = []
    for number, run in enumerate(runs, start=1):
        tokens = [total / 1e6 for total in run.tokens_so_far()]
        losses = run.losses()
        series.append(Series(run.name, list(zip(tokens, losses, strict=True)), number, faint=True))
        series.append(Series(run.name, list(zip(tokens, running_mean(losses), strict=True)), number))
    yield Chart(
        "Training loss of the three runs: each step (pale) and its running mean",
        line_chart(series, "million tokens", "nats per target"),
        quantile_table(runs),
    )
    predictors = [run for run in runs if run.kind != "vae" and run.evaluations]
    if predictors:
        lines = []
        for run in predictors:
            sums = run.tokens_so_far()
            points = [(sums[row["step"] - 1] / 1e6, row["bits_per_byte"]) for row in run.evaluations]
            lines.append(Series(run.name, points, KINDS.index(run.kind) + 1, dots=True))
        yield Chart(
            "Validation along the way: bits per byte (a part of the validation shards)",
            line_chart(lines, "million tokens", "bits per byte"),
            evaluations_table(predictors),
        )


def quantile_table(runs: Sequence[Run], parts: int = 8) -> Table:
    rows = []
    for part in range(parts + 1):
        cells = []
        for run in runs:
            at = round(part / parts * (len(run.metrics) - 1))
            cells.append(f"{running_mean(run.losses())[at]:.3f}")
        rows.append((f"{part / parts:.0%}", *cells))
    return Table(
        ("share of the run", *(run.name for run in runs)), tuple(rows), "running mean, nats per target"
    )


def evaluations_table(runs: Sequence[Run]) -> Table:
    rows = [
        (run.name, grouped(row["step"]), f"{row['bits_per_byte']:.3f}")
        for run in runs
        for row in run.evaluations
    ]
    return Table(("run", "step", "bits per byte"), tuple(rows))


def sentences(stats: dict[str, dict[str, Any]], vae: Run) -> Iterable[Block]:
    rows = [(name, *corpus_cells(one)) for name, one in stats.items()]
    header = (
        "shards",
        "documents",
        "sentences",
        "tokens",
        "bytes",
        "tokens per sentence",
        "median",
        "95 % at most",
    )
    yield Table(header, tuple(rows))
    histogram = [(length, n) for length, n in enumerate(stats["train"]["histogram"]) if length > 0]
    yield Chart(
        "Sentence lengths in the training shards",
        bar_chart(histogram, "tokens", "sentences"),
        Table(("tokens", "sentences"), tuple(ranges(histogram))),
    )
    exact = {int(length): row for length, row in vae.result["exact_match_by_length"].items()}
    bars = [(length, 100 * row["exact_match"]) for length, row in sorted(exact.items())]
    if bars:
        groups = []
        for low, high in ((1, 4), (5, 8), (9, 16), (17, 32), (33, math.inf)):
            rows = [row for length, row in exact.items() if low <= length <= high]
            total = sum(row["sentences"] for row in rows)
            if total:
                right = sum(row["sentences"] * row["exact_match"] for row in rows) / total
                name = f"{low}–{high}" if high < math.inf else f"{low} and more"
                groups.append((name, grouped(total), percent(right)))
        yield Chart(
            "SentenceVAE: validation sentences rebuilt exactly, by length",
            bar_chart(bars, "tokens in the sentence", "per cent", series=3),
            Table(("tokens", "sentences", "rebuilt exactly"), tuple(groups)),
        )


def corpus_cells(stats: dict[str, Any]) -> tuple[str, ...]:
    spread = stats["tokens_per_sentence"]
    counts = (grouped(stats[key]) for key in ("documents", "sentences", "tokens", "bytes"))
    return (*counts, f"{spread['mean']:.1f}", f"{spread['median']:g}", f"{spread['p95']:g}")


def ranges(histogram: Sequence[tuple[int, int]], width: int = 8) -> Iterable[tuple[str, str]]:
    counts: dict[int, int] = {}
    for length, n in histogram:
        counts[(length - 1) // width] = counts.get((length - 1) // width, 0) + n
    for slot in sorted(counts):
        yield f"{slot * width + 1}–{(slot + 1) * width}", grouped(counts[slot])


def samples(made: Sequence[dict[str, Any]]) -> Iterable[Block]:
    yield Text(
        "Nothing was picked: these are all the samples the demo draws, in its order, with fixed seeds."
    )
    for sample in made:
        how = f"temperature {sample['temperature']:g}" if sample["temperature"] else "greedy"
        if sample.get("top_p"):
            how += f", top-p {sample['top_p']:g}"
        if sample["temperature"]:
            how += f", seed {sample['seed']}"
        label = f"{how}; {len(sample['sentences'])} sentences, stopped: {sample['stopped']}"
        yield Sample(label, sample["prompt"], sample["text"][len(sample["prompt"]) :])


def limits(sllm: Run, lm: Run) -> Iterable[Block]:
    gain = sllm.result["vector_gain"]
    if gain < 0.01:
        used = "next to nothing: so far it predicts almost as well without knowing the sentences before"
    else:
        used = "something: the sentences before do help it"
    if sllm.check["passed"] and lm.check["passed"]:
        comparable = "and the checks below show that neither looks ahead"
    else:
        comparable = "but a check below FAILED, so they must not be trusted before that is understood"
    if differences(sllm, lm):
        same = "what each predictor scores by itself (they were NOT scored on the same)"
    else:
        same = "that the figures can be compared: SLLM and token model are scored on the same text"
    yield Text(
        "It can show:",
        (
            "that every real part works together: these are the programs, file formats, launcher, "
            "sharding strategy and measurements that a large run uses, only with small numbers in the "
            "recipes;",
            f"{same}, with everything counted, {comparable};",
            f"whether the backbone is used at all: a vector gain of {gain:.4f} bits per byte means that "
            f"here it contributes {used}.",
        ),
    )
    yield Text(
        "It cannot show:",
        (
            f"how good such models get: {sllm.seconds():.0f} seconds of training on "
            f"{grouped(sllm.tokens())} tokens teach spelling, common words and the look of the text, and "
            "the samples read accordingly;",
            "which design is better: one seed, one size, one small budget. A gap of a few hundredths of a "
            "bit per byte is not resolved here, and a deeper model may only be worse because it is "
            "trained too briefly;",
            "how it does on other text: training and validation documents are both Python's own "
            "documentation, more uniform and more repetitive than text from many sources;",
            "how fast it is on real hardware: with matrices this small, two processes on one machine "
            "spend much of their time on calls and on exchanging parameters, not on arithmetic.",
        ),
    )


def provenance(folder: Path, runs: Sequence[Run]) -> Iterable[Block]:
    machine = read_output(folder / "machine.json")
    yield Table(
        ("machine and versions", ""), tuple((key, str(value)) for key, value in machine.items()), left=True
    )
    stamps = [read_output(path) for path in (folder / "stamps").glob("*.json")]
    stamps.sort(key=lambda stamp: stamp["order"])
    total = sum(stamp["seconds"] for stamp in stamps)
    rows = [(stamp["step"], f"{stamp['seconds']:.1f}", stamp["finished"]) for stamp in stamps]
    yield Table(
        ("step", "seconds", "finished"), (*rows, ("together", f"{total:.1f}", "")), "the demo's steps"
    )
    yield Table(
        ("run", "check", "outcome"),
        tuple((run.name, name, outcome) for run in runs for name, outcome in check_rows(run.check)),
        "`sllm check`",
        left=True,
    )


def check_rows(report: dict[str, Any]) -> Iterable[tuple[str, str]]:
    for check in report["checks"]:
        outcome = "passed" if check["passed"] else "FAILED"
        difference = (
            f"largest difference {check['max_difference']:.1e} in {grouped(check['compared'])} scores"
        )
        yield f"{check['check']} ({check['path']})", f"{outcome}: {difference}"


def grouped(value: int) -> str:
    """1234567 → 1,234,567"""
    return f"{value:,}"


def percent(share: float | None) -> str:
    return NOTHING if share is None else f"{100 * share:.1f} %"
