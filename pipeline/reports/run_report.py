"""`sllm report RUN_DIR…`: training runs side by side, on one HTML page that needs nothing else.

In: run directories, finished or not: `recipe.yaml`, `ds_config.json`, `provenance.json` and the lines of
`metrics.jsonl`, `evaluations.jsonl`, `saves.jsonl` and `starts.jsonl` (docs/training.md). Out: the page, and
a summary of every run as plain JSON. Every curve can be seen against steps, tokens, time and operations;
restarts, skipped steps and saves are marked. A long run's curves are thinned, the same way every time, so
that no spike is lost. Nothing here imports torch.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.common.errors import UserError
from data_prep.common.files import write_atomically
from pipeline.common.text import NOTHING, duration, grouped, percent
from pipeline.reports.charts import COLOURS, Mark, Series, line_chart, running_mean, thinned
from pipeline.reports.page import Block, Chart, Choice, Heading, Table, Text, by, to_html
from pipeline.training.run_files import Run, read_runs, training_text, validation_sample

MOST_SKIPS = 50  # of a run that are listed one by one

AXES = (
    ("steps", "steps", "steps"),
    ("tokens", "tokens", "million tokens"),
    ("time", "time", "hours of training, saving and evaluating"),
    ("operations", "operations", "multiply-adds (10¹²), forward and backward, padding included"),
)


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _percent(share: float | None) -> float | None:
    return _times(share, 100)


def _waiting(row: dict[str, Any]) -> float | None:
    return _times(row.get("data_wait_seconds"), 1 / row["seconds"])


class Curve(NamedTuple):
    """A chart of one figure of every step. `marked`: with restarts, skips and saves; `smooth`: the figure
    scatters, so its running mean is drawn over it."""

    title: str
    unit: str
    value: Callable[[dict[str, Any]], float | None]  # of one line of metrics.jsonl
    log: bool = False
    marked: bool = False
    smooth: bool = True


CURVES = (
    Curve("Loss", "nats per target", lambda row: row.get("loss"), marked=True),
    Curve("Bits per byte of the training text", "bits per byte", lambda row: row.get("bits_per_byte")),
    Curve("Throughput", "tokens per second", lambda row: row.get("tokens_per_second"), marked=True),
    Curve("Padding", "per cent of operations", lambda row: _percent(row.get("padding_share"))),
    Curve("Waiting for data", "per cent of time", lambda row: _percent(_waiting(row))),
    Curve("Slowest rank by the median one", "times its time", lambda row: row.get("slowest_ratio")),
    Curve("Gradient norm before clipping", "norm", lambda row: row.get("grad_norm"), log=True, marked=True),
    Curve("Learning rate", "learning rate", lambda row: row.get("lr"), smooth=False),
    Curve(
        "Peak memory so far (rank 0)", "GB", lambda row: _times(row.get("memory_bytes"), 1e-9), smooth=False
    ),
    Curve("Model FLOPs utilisation", "per cent", lambda row: _percent(row.get("mfu"))),
    Curve("KL divergence", "nats per sentence", lambda row: row.get("kl")),
)


# Figures of a run ------------------------------------------------------------------------------------------


def summarise(run: Run) -> dict[str, Any]:
    """One run in plain numbers, in the units of metrics.jsonl; None where its files do not say.

    `seconds`: steps, saves and evaluations, without the time between starts.
    """
    steps, first = run.metrics, run.metrics[0]
    stepping = sum(row["seconds"] for row in steps)
    saving = sum(row["save_seconds"] for row in run.saves)
    seconds = stepping + saving + sum(row.get("seconds") or 0.0 for row in run.evaluations)
    measured = [row for row in run.evaluations if row.get("bits_per_byte") is not None]
    best = min(measured, key=lambda row: row["bits_per_byte"], default=None)
    operations, skipped = run.values("operations"), run.skipped()
    rates, mfu = run.values("tokens_per_second"), run.values("mfu")
    began = run.starts[0]["time"] if run.starts else first.get("time")
    ended = steps[-1].get("time")
    return {
        "run": str(run.folder),
        "objective": run.recipe.get("objective"),
        "finished": _finished(run),
        "steps": steps[-1]["step"],
        "tokens": steps[-1]["tokens"],
        "seconds": seconds,
        "seconds_from_first_start": ended - began if began and ended else None,
        "operations": sum(operations) if len(operations) == len(steps) else None,
        "loss_at_the_end": _last_mean(run.values("loss")),
        "bits_per_byte_at_the_end": _last_mean(run.values("bits_per_byte")),
        "validation_bits_per_byte": measured[-1]["bits_per_byte"] if measured else None,
        "best_validation_bits_per_byte": best and best["bits_per_byte"],
        "best_step": best and best["step"],
        "tokens_per_second": statistics.median(rates) if rates else None,
        "mfu": statistics.median(mfu) if mfu else None,
        "padding_share": _weighted(steps, "padding_share"),
        "data_wait_share": sum(run.values("data_wait_seconds")) / stepping,
        "save_share": saving / seconds if run.saves else None,
        "save_seconds_longest": max((row["save_seconds"] for row in run.saves), default=None),
        "saves": len(run.saves),
        "memory_bytes": max(run.values("memory_bytes"), default=None),
        "restarts": max(0, len(run.starts) - 1),
        "lost_steps": sum(start.get("lost_steps", 0) for start in run.starts),
        "skipped_steps": len(skipped),
        "worlds": [world for world, _ in itertools.groupby(start.get("world") for start in run.starts)],
        "zero_stages": [s for s, _ in itertools.groupby(start.get("zero_stage") for start in run.starts)],
    }


def _finished(run: Run) -> bool | None:
    training = run.recipe.get("training", {})
    ends = [(training.get("max_steps"), "step"), (training.get("max_tokens"), "tokens")]
    known = [run.metrics[-1][key] >= end for end, key in ends if end]
    return any(known) if known else None


def _last_mean(values: list[float]) -> float | None:
    return running_mean(values)[-1] if values else None


def _weighted(steps: list[dict[str, Any]], key: str) -> float | None:
    """A share per step, weighted by the step's seconds."""
    known = [row for row in steps if row.get(key) is not None]
    seconds = sum(row["seconds"] for row in known)
    return sum(row[key] * row["seconds"] for row in known) / seconds if seconds else None


def differences(parts: Sequence[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """(dotted key, each one's value as JSON) of what is not the same in all."""
    flat = [dict(_flatten(part)) for part in parts]
    keys = dict.fromkeys(key for one in flat for key in one)
    rows = [(key, [json.dumps(one[key]) if key in one else NOTHING for one in flat]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _flatten(values: dict[str, Any], where: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{where}{key}.")
        else:
            yield f"{where}{key}", value


def cautions(runs: Sequence[Run]) -> list[str]:
    """In words, what keeps these runs' figures from being compared."""
    found = []
    if len({run.recipe.get("objective") for run in runs}) > 1:
        found.append("they train on different objectives: a `vae` rebuilds, `sllm` and `lm` predict")
    samples = {json.dumps(validation_sample(run)) for run in runs if run.evaluations}
    if len(samples) > 1:
        found.append("they were validated on different samples (validation shards, windows, bins)")
    if len({training_text(run) for run in runs}) > 1:
        found.append("they were trained on different shards")
    return found


# The page --------------------------------------------------------------------------------------------------


def report(folders: Sequence[str | Path], output: str | Path) -> dict[str, Any]:
    """Write the page about these runs to `output`; returns {"output", "runs": their summaries,
    "not_comparable": reasons}.

    Raises: UserError for a folder that is no run directory, or an output whose folder is missing.
    """
    output = Path(output)
    if not output.absolute().parent.is_dir() or output.is_dir():
        raise UserError(f"--output {output}: must be a file in a folder that exists")
    runs = read_runs(folders)
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} training runs"
    write_atomically(output, to_html(title, list(compose(runs))).encode())
    return {
        "output": str(output),
        "runs": [summarise(run) for run in runs],
        "not_comparable": cautions(runs) if len(runs) > 1 else [],
    }


def compose(runs: Sequence[Run]) -> Iterable[Block]:
    """The page's blocks in reading order."""
    if len(runs) > 1 and (found := cautions(runs)):
        yield Text(f"**Not all figures can be compared**: {'; '.join(found)}.")
    yield summary_table(runs)
    yield Heading("Curves")
    axes = [axis for axis in AXES if any(run.positions[axis[0]][0] is not None for run in runs)]
    yield Choice("against", tuple(axis[:2] for axis in axes), tuple(run.name for run in runs))
    yield Text(
        "Pale: each step; strong: the running mean over 4 % of the run. Dashed lines are restarts, crosses "
        "at the top skipped steps, ticks on the axis saved checkpoints."
    )
    yield from curves(runs, [axis[::2] for axis in axes])
    yield Heading("Starts")
    yield starts_table(runs)
    if skips := [(run, step, why) for run in runs for step, why in run.skipped()[:MOST_SKIPS]]:
        yield Heading("Skipped steps")
        rows = [(run.name, grouped(step), why) for run, step, why in skips]
        yield Table(("run", "step", "why"), tuple(rows), f"the first {MOST_SKIPS} of each run", left=True)
    if len(runs) > 1:
        yield Heading("What differs")
        parts = [
            {k: v for k, v in run.recipe.items() if k != "output_dir"}
            | {"deepspeed": run.deepspeed, "versions": run.provenance.get("packages", {})}
            for run in runs
        ]
        rows = [(key, *values) for key, values in differences(parts)]
        yield Table(("key", *(run.name for run in runs)), tuple(rows) or (("nothing",),), left=True)


def summary_table(runs: Sequence[Run]) -> Table:
    """The figures of `summarise`, a column a run."""
    found = [summarise(run) for run in runs]

    def row(label: str, key: str, show: Callable[[Any], str]) -> tuple[str, ...]:
        return (label, *(NOTHING if one[key] is None else show(one[key]) for one in found))

    def number(digits: int) -> Callable[[float], str]:
        return lambda value: f"{value:.{digits}f}"

    def arrows(values: list[Any]) -> str:
        return " → ".join(map(str, values)) or NOTHING

    best = row("best validation bits per byte", "best_validation_bits_per_byte", number(4))
    at = [NOTHING if one["best_step"] is None else f"{one['best_step']:,}" for one in found]
    rows = (
        row("objective", "objective", str),
        row("finished", "finished", lambda done: "yes" if done else "not yet"),
        row("steps", "steps", grouped),
        row("tokens", "tokens", grouped),
        row("time of steps, saves and evaluations", "seconds", duration),
        row("time from the first start to the last step", "seconds_from_first_start", duration),
        row("operations (10¹² multiply-adds)", "operations", lambda n: f"{n / 1e12:,.3f}"),
        row("loss at the end (nats per target)", "loss_at_the_end", number(4)),
        row("training bits per byte at the end", "bits_per_byte_at_the_end", number(4)),
        best,
        ("  at step", *at),
        row("last validation bits per byte", "validation_bits_per_byte", number(4)),
        row("tokens per second (median)", "tokens_per_second", lambda n: grouped(round(n))),
        row("MFU (median)", "mfu", percent),
        row("padding", "padding_share", percent),
        row("waiting for data", "data_wait_share", percent),
        row("standing still to save", "save_share", percent),
        row("longest save", "save_seconds_longest", duration),
        row("peak memory of rank 0 (GB)", "memory_bytes", lambda n: f"{n / 1e9:.2f}"),
        row("restarts", "restarts", grouped),
        row("steps computed again after kills", "lost_steps", grouped),
        row("skipped steps", "skipped_steps", grouped),
        row("ranks", "worlds", arrows),
        row("ZeRO stage", "zero_stages", arrows),
    )
    shown = [cells for cells in rows if any(cell != NOTHING for cell in cells[1:])]
    return Table(("", *(run.name for run in runs)), tuple(shown))


def curves(runs: Sequence[Run], axes: Sequence[tuple[str, str]]) -> Iterable[Chart]:
    """One chart a figure, drawn once for each axis; those of which no run says anything are left out."""
    for curve in CURVES:
        drawn = _step_series(runs, curve)
        yield from _chart(curve.title, curve.unit, axes, drawn, curve.log, runs if curve.marked else ())
        if curve.title == "Bits per byte of the training text":
            measured = _event_series(runs, lambda run: run.evaluations, "bits_per_byte")
            yield from _chart("Validation bits per byte", curve.unit, axes, measured)
    saved = _event_series(runs, lambda run: run.saves, "save_seconds")
    yield from _chart("Seconds for which a save stops training", "seconds", axes, saved)


Drawn = Callable[[str], list[Series]]  # axis → what is drawn over it


def _chart(
    title: str,
    unit: str,
    axes: Sequence[tuple[str, str]],
    drawn: Drawn,
    log: bool = False,
    marked: Sequence[Run] = (),
) -> Iterable[Chart]:
    svgs = []
    for axis, label in axes:
        series = [one for one in drawn(axis) if any(not log or y > 0 for _, y in one.points)]
        if series:
            marks = [mark for number, run in enumerate(marked) for mark in _marks(run, axis, number)]
            svgs.append(by(axis, line_chart(series, label, unit, marks, log, legend=False)))
    if svgs:
        yield Chart(title, "\n".join(svgs))


def _step_series(runs: Sequence[Run], curve: Curve) -> Drawn:
    def drawn(axis: str) -> list[Series]:
        series = []
        for number, run in enumerate(runs):
            rows = zip(run.positions[axis], map(curve.value, run.metrics), strict=True)
            points = [(x, y) for x, y in rows if x is not None and y is not None and math.isfinite(y)]
            if points:
                places, values = zip(*points, strict=True)
                if curve.smooth:
                    series.append(Series(run.name, thinned(points), colour(number), faint=True))
                    points = list(zip(places, running_mean(values), strict=True))
                series.append(Series(run.name, thinned(points), colour(number)))
        return series

    return drawn


def _event_series(runs: Sequence[Run], events: Callable[[Run], list[dict[str, Any]]], key: str) -> Drawn:
    def drawn(axis: str) -> list[Series]:
        series = []
        for number, run in enumerate(runs):
            rows = [(run.place(axis, row["step"]), row.get(key)) for row in events(run)]
            points = [(x, y) for x, y in rows if x is not None and y is not None]
            if points:
                series.append(Series(run.name, thinned(points), colour(number), dots=len(points) <= 200))
        return series

    return drawn


def _marks(run: Run, axis: str, number: int) -> Iterable[Mark]:
    found = [(start["step"], "restart", "restart after step") for start in run.starts[1:]]
    found += [(step, "skip", f"skipped: {why}; step") for step, why in run.skipped()]
    if len(run.saves) <= 200:
        found += [(save["step"], "save", "saved at step") for save in run.saves]
    for step, kind, words in found:
        if (x := run.place(axis, step)) is not None:
            yield Mark(x, kind, colour(number), f"{run.name}: {words} {step:,}")


def starts_table(runs: Sequence[Run]) -> Table:
    """Every start of every run."""
    rows = [
        (
            run.name,
            time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(start["time"])),
            *(grouped(start.get(key, 0)) for key in ("step", "world", "hosts", "zero_stage", "lost_steps")),
        )
        for run in runs
        for start in run.starts
    ]
    header = ("run", "started (UTC)", "from step", "ranks", "machines", "ZeRO stage", "steps computed again")
    return Table(header, tuple(rows))


def colour(number: int) -> int:
    """The series of the page's style sheet in which run `number` (from 0) is drawn."""
    return number % COLOURS + 1


def format_report(result: dict[str, Any]) -> str:
    """The result of `report` in a few lines."""
    lines = [f"wrote {result['output']}"]
    for one in result["runs"]:
        best = one["best_validation_bits_per_byte"]
        lines.append(
            f"{one['run']}: {one['steps']:,} steps, {one['tokens']:,} tokens, {duration(one['seconds'])}, "
            f"best validation bits/byte {NOTHING if best is None else format(best, '.4f')}, "
            f"{one['restarts']} restarts, {one['skipped_steps']} skipped steps"
        )
    lines += [f"not all figures can be compared: {reason}" for reason in result["not_comparable"]]
    return "\n".join(lines)
