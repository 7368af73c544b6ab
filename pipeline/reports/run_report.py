"""`sllm report RUN_DIR…`: training runs side by side on one HTML page that needs no other file.

Every curve can be seen against steps, tokens, time and operations; restarts, skipped steps and saves are
marked. Runs need not be finished (docs/training.md has the files of a run). Nothing here imports torch.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.common.charts import Line, Lines, Mark, colours, running_mean, thinned
from data_prep.common.errors import UserError, counted
from data_prep.common.files import write_atomically
from data_prep.common.page import Block, Chart, Choice, Show, Table, Text, columns, from_template, to_html
from pipeline.common.text import NOTHING, duration, gigabytes, percent
from pipeline.training.run_files import Run, read_runs, training_text, validation_sample

MOST_SKIPS = 50  # of a run that are listed one by one
MOST_DOTS = 200
AXES = (
    ("steps", "steps", "steps"),
    ("tokens", "tokens", "million tokens"),
    ("time", "time", "hours of training, saving and evaluating"),
    ("operations", "operations", "multiply-adds (10¹²), forward and backward, padding included"),
)
Record = dict[str, Any]


class Curve(NamedTuple):
    """A chart of one figure.

    key: in the lines of metrics.jsonl; marked: with restarts, skips and saves; smooth: with its running mean
    drawn over it; start: where the y axis starts, else it fits the data.
    """

    title: str
    unit: str
    key: str
    factor: float = 1
    log: bool = False
    marked: bool = False
    smooth: bool = True
    start: float | None = None
    events: str = ""  # the attribute of a run with the lines, where not those of every step


CURVES = (
    Curve("Loss", "nats per target", "loss", marked=True),
    Curve("Bits per byte of the training text", "bits per byte", "bits_per_byte"),
    Curve("Validation bits per byte", "bits per byte", "bits_per_byte", smooth=False, events="evaluations"),
    Curve("Throughput", "tokens per second", "tokens_per_second", marked=True, start=0),
    Curve("Padding", "per cent of operations", "padding_share", 100, start=0),
    Curve("Waiting for data", "per cent of time", "waiting", 100, start=0),
    Curve("Slowest rank by the median one", "times its time", "slowest_ratio", start=1),
    Curve("Gradient norm before clipping", "norm", "grad_norm", log=True, marked=True),
    Curve("Learning rate", "learning rate", "lr", smooth=False, start=0),
    Curve("Peak memory so far (rank 0)", "GB", "memory_bytes", 1e-9, smooth=False, start=0),
    Curve("Model FLOPs utilisation", "per cent", "mfu", 100, start=0),
    Curve("KL divergence", "nats per sentence", "kl", start=0),
    Curve(
        "Seconds for which a save stops training",
        "seconds",
        "save_seconds",
        smooth=False,
        start=0,
        events="saves",
    ),
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
        "slow_ranks": sum("slow" in row for row in steps),
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
    """Write the page about these runs to `output`.

    Returns: {"output", "runs": their summaries, "not_comparable": reasons}.
    Raises: UserError for a folder that is no run directory, or an output whose folder is missing.
    """
    output = Path(output)
    if not output.absolute().parent.is_dir() or output.is_dir():
        raise UserError(f"--output {output}: must be a file in a folder that exists")
    runs = read_runs(folders)
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} training runs"
    write_atomically(output, to_html(title, compose(runs)).encode())
    return {
        "output": str(output),
        "runs": [summarise(run) for run in runs],
        "not_comparable": cautions(runs) if len(runs) > 1 else [],
    }


def compose(runs: Sequence[Run]) -> list[Block]:
    """The page's blocks in reading order."""
    parts = [
        {k: v for k, v in run.recipe.items() if k != "output_dir"}
        | {"deepspeed": run.deepspeed, "versions": run.provenance.get("packages", {})}
        for run in runs
    ]
    values = {
        "runs": runs,
        "cautions": cautions(runs) if len(runs) > 1 else [],
        "skips": [(run, step, why) for run in runs for step, why in run.skipped()[:MOST_SKIPS]],
        "slow": [(run, row["step"], row["slow"]) for run in runs for row in run.metrics if row.get("slow")],
        "most_skips": MOST_SKIPS,
        "differing": differences(parts),
    }
    made: dict[str, Sequence[Block]] = {"summary": [summary_table(runs)], "curves": list(curves(runs))}
    filters = {"f": format, "utc": lambda at: time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(at))}
    return from_template(Path(__file__).with_name("run_report.md.jinja"), values, made, filters)


def curves(runs: Sequence[Run]) -> Iterable[Block]:
    """All charts, and what chooses their axis."""
    axes = [axis for axis in AXES if any(run.positions[axis[0]][0] is not None for run in runs)]
    key = [(run.name, colour) for run, (colour, _) in zip(runs, colours(kinds(runs)), strict=True)]
    yield Choice("against", [axis[:2] for axis in axes], key)
    yield Text(
        "Pale: each step; strong: the running mean over 4 % of the run. Dashed lines are restarts, crosses "
        "at the top skipped steps, ticks on the axis saved checkpoints."
    )
    for curve in CURVES:
        plots = {axis: plot for axis, _, label in axes if (plot := curve_plot(runs, curve, axis, label))}
        if plots:
            yield Chart(curve.title, plots)


def kinds(runs: Sequence[Run]) -> list[str]:
    """What kind of model each run trains, for its colour."""
    return [str(run.recipe.get("objective")) for run in runs]


def summary_table(runs: Sequence[Run]) -> Table:
    """The figures of `summarise`, a column a run."""

    def arrows(values: list[Any]) -> str:
        return " → ".join(map(str, values)) or NOTHING

    shown: tuple[tuple[str, str, Show], ...] = (
        ("objective", "objective", str),
        ("finished", "finished", lambda done: "yes" if done else "not yet"),
        ("steps", "steps", ","),
        ("tokens", "tokens", ","),
        ("time of steps, saves and evaluations", "seconds", duration),
        ("time from the first start to the last step", "seconds_from_first_start", duration),
        ("operations (10¹² multiply-adds)", "operations", lambda n: f"{n / 1e12:,.3f}"),
        ("loss at the end (nats per target)", "loss_at_the_end", ".4f"),
        ("training bits per byte at the end", "bits_per_byte_at_the_end", ".4f"),
        ("best validation bits per byte", "best_validation_bits_per_byte", ".4f"),
        ("  at step", "best_step", ","),
        ("last validation bits per byte", "validation_bits_per_byte", ".4f"),
        ("tokens per second (median)", "tokens_per_second", ",.0f"),
        ("MFU (median)", "mfu", percent),
        ("padding", "padding_share", percent),
        ("waiting for data", "data_wait_share", percent),
        ("standing still to save", "save_share", percent),
        ("longest save", "save_seconds_longest", duration),
        ("slow ranks named", "slow_ranks", ","),
        ("peak memory of rank 0 (GB)", "memory_bytes", gigabytes),
        ("restarts", "restarts", ","),
        ("steps computed again after kills", "lost_steps", ","),
        ("skipped steps", "skipped_steps", ","),
        ("ranks", "worlds", arrows),
        ("ZeRO stage", "zero_stages", arrows),
    )
    return columns([run.name for run in runs], [summarise(run) for run in runs], shown)


def curve_plot(runs: Sequence[Run], curve: Curve, axis: str, x_label: str) -> Lines | None:
    """One figure of all runs over one axis; None where no run has it."""
    lines: list[Line] = []
    marks: list[Mark] = []
    for run, (colour, dash) in zip(runs, colours(kinds(runs)), strict=True):
        name = run.name if len(runs) > 1 else ""
        rows: list[Record] = getattr(run, curve.events) if curve.events else run.metrics
        places = [run.place(axis, row["step"]) for row in rows] if curve.events else run.positions[axis]
        measured = zip(places, (_value(row, curve) for row in rows), strict=True)
        points = [(x, y) for x, y in measured if x is not None and y is not None and math.isfinite(y)]
        if not points:
            continue
        if curve.smooth:
            lines.append(Line(name, thinned(points), colour, "faint"))
            means = running_mean([y for _, y in points])
            points = [(x, mean) for (x, _), mean in zip(points, means, strict=True)]
        kind = "dots" if curve.events and len(points) <= MOST_DOTS else "line"
        lines.append(Line(name, thinned(points), colour, kind, dash))
        marks += _marks(run, axis, colour) if curve.marked else ()
    if not any(y > 0 or not curve.log for line in lines for _, y in line.points):
        return None
    return Lines(
        lines, x_label, curve.unit, marks, log_y=curve.log, x_from=0, y_from=curve.start, legend=False
    )


def _value(row: Record, curve: Curve) -> float | None:
    if curve.key == "waiting":
        waited = row.get("data_wait_seconds")
        value = None if waited is None else waited / row["seconds"]
    else:
        value = row.get(curve.key)
    return None if value is None else value * curve.factor


def _marks(run: Run, axis: str, colour: str) -> Iterable[Mark]:
    found = [(start["step"], "restart", "restart after step") for start in run.starts[1:]]
    found += [(step, "skip", f"skipped: {why}; step") for step, why in run.skipped()]
    if len(run.saves) <= MOST_DOTS:
        found += [(save["step"], "save", "saved at step") for save in run.saves]
    for step, kind, words in found:
        if (x := run.place(axis, step)) is not None:
            yield Mark(x, kind, colour, f"{run.name}: {words} {step:,}")


def format_report(result: dict[str, Any]) -> str:
    """The result of `report` in a few lines."""
    lines = [f"wrote {result['output']}"]
    for one in result["runs"]:
        best = one["best_validation_bits_per_byte"]
        lines.append(
            f"{one['run']}: {counted(one['steps'], 'step')}, {counted(one['tokens'], 'token')}, "
            f"{duration(one['seconds'])}, "
            f"best validation bits/byte {NOTHING if best is None else format(best, '.4f')}, "
            f"{counted(one['restarts'], 'restart')}, {counted(one['skipped_steps'], 'skipped step')}"
        )
    lines += [f"not all figures can be compared: {reason}" for reason in result["not_comparable"]]
    return "\n".join(lines)
