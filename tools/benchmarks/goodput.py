"""Simulates the goodput of a long run, the share of its time that its weights keep, by the interval of saves.

Machines fail independently at a constant rate; any failure stops the job. It restarts after `restart` seconds
(a failure meanwhile starts them again) and repeats what no complete save holds. A save stops training for
`stall` seconds; it is complete `write` seconds after it started, and the next one starts later than that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from cyclopts import Parameter

from data_prep.common.charts import Line, Lines, Mark, Plot
from data_prep.common.command_line import Natural, Positive
from data_prep.common.environment import header, write_result
from data_prep.common.page import Table
from pipeline.common.text import duration, percent
from tools.commands import Output, console

DAY = 86_400.0
# Failures that stopped a job, GPUs and days they were counted over.
RATES: dict[str, tuple[float, float, float, str]] = {
    "Llama 3": (
        419,
        16_384,
        54,
        "419 unexpected interruptions in 54 days on 16,384 H100 (arXiv 2407.21783, as reported by "
        "datacenterdynamics.com)",
    ),
    "OPT-175B": (
        2,
        1024,
        1,
        '"~2 machines go down every day", 1,024 A100 (facebookresearch/metaseq, '
        "projects/OPT/chronicles/final_update.md)",
    ),
}
# (stall, write) in seconds for 4 GB of state per GPU, the most that Llama 3 saved. Measured for 0.75 GB per
# rank (docs/results/training/saves.json): 1.80 s; in the background 0.33 s, and 18.3 s while training
# had the cores.
SAVES = {"synchronous": (9.6, 9.6), "background": (1.7, 98.0)}
MINUTES = (2, 5, 10, 15, 20, 30, 45, 60, 90, 120, 180, 240)
FINE = np.geomspace(0.5, 480, 240)  # minutes, for the best interval
HUES = {"Llama 3": "sllm", "OPT-175B": "lm"}


def goodput(
    gaps: np.ndarray, days: float, interval: float, stall: float, write: float, restart: float
) -> float:
    """The share of `days` that is kept.

    Args:
        gaps: seconds between failures, in all at least `days`
        interval: seconds of training between two saves; longer if a write takes longer
    """
    interval = max(interval, write - stall)
    period = interval + stall
    ends = np.minimum(gaps.cumsum(), days * DAY)
    up = np.maximum(np.diff(ends, prepend=0.0) - restart, 0.0)
    saves = np.floor(np.maximum(up - interval - write, -period) / period) + 1
    kept = saves * interval
    last = int(np.argmax(ends >= days * DAY))
    kept[last] = up[last] * interval / period  # the run's end saves
    return float(kept[: last + 1].sum()) / (days * DAY)


def young(stall: float, mean_gap: float) -> float:
    """Seconds between saves by Young (1974): √(2 · stall · mean time between failures)."""
    return math.sqrt(2 * stall * mean_gap)


def daly(stall: float, mean_gap: float) -> float:
    """The same by Daly (2006), a higher order."""
    share = math.sqrt(stall / (2 * mean_gap))
    return young(stall, mean_gap) * (1 + share / 3 + share**2 / 9) - stall if share < 1 else mean_gap


def simulate(
    *,
    gpus: Positive = 10_000,
    days: Positive = 30,
    restart: float = 600.0,
    minutes: Annotated[Sequence[float], Parameter(consume_multiple=1)] = MINUTES,
    runs: Positive = 200,
    seed: Natural = 1,
    output: Output = None,
) -> dict[str, Any]:
    """Goodput of a run by the interval of its saves, for failure rates of public reports.

    Args:
        gpus: GPUs of the job
        days: length of the run
        restart: seconds from a failure until training resumes: Slurm's 300 s until it notices a dead machine,
            and 300 s to start and to load
        minutes: training between two saves
        runs: simulated runs, averaged
        seed: of the failures
    """
    rows = []
    for source, (count, counted_gpus, counted_days, cited) in RATES.items():
        mean_gap = DAY / (count / counted_gpus / counted_days * gpus)
        rng = np.random.default_rng(seed)
        gaps = rng.exponential(mean_gap, (runs, math.ceil(3 * days * DAY / mean_gap) + 50))
        for how, (stall, write) in SAVES.items():
            costs = (stall, write, restart)

            def mean(interval: float, gaps: np.ndarray = gaps, costs: tuple = costs) -> float:
                return float(np.mean([goodput(one, days, interval, *costs) for one in gaps]))

            fine = [mean(60 * x) for x in FINE]
            rows.append(
                {
                    "source": source,
                    "cited": cited,
                    "save": how,
                    "stall_seconds": stall,
                    "write_seconds": write,
                    "failures_per_day": DAY / mean_gap,
                    "goodput": {str(m): mean(60 * m) for m in minutes},
                    "best_minutes": max(float(FINE[int(np.argmax(fine))]), (write - stall) / 60),
                    "best_goodput": max(fine),
                    "young_minutes": young(stall, mean_gap) / 60,
                    "young_goodput": mean(young(stall, mean_gap)),
                    "daly_minutes": daly(stall, mean_gap) / 60,
                }
            )
    result = {**header(("numpy",)), "gpus": gpus, "days": days, "restart_seconds": restart, "runs": runs}
    result |= {"seed": seed, "rows": rows}
    write_result(result, output)
    return result


def table(result: dict[str, Any]) -> Table:
    """A line for each interval and the best ones, a column for each failure rate and kind of save."""
    rows = result["rows"]
    head = ["training between saves", *(f"{row['source']}, {row['save']}" for row in rows)]
    lines = [
        [duration(60 * float(minutes)), *(percent(row["goodput"][minutes]) for row in rows)]
        for minutes in rows[0]["goodput"]
    ]
    lines.append(["failures a day", *(f"{row['failures_per_day']:.1f}" for row in rows)])
    lines.append(
        ["best", *(f"{row['best_minutes']:.1f} min: {percent(row['best_goodput'])}" for row in rows)]
    )
    lines.append(
        ["by Young", *(f"{row['young_minutes']:.1f} min: {percent(row['young_goodput'])}" for row in rows)]
    )
    lines.append(["by Daly", *(f"{row['daly_minutes']:.1f} min" for row in rows)])
    return Table(head, lines)


def plots(result: dict[str, Any]) -> list[Plot]:
    """Goodput over the interval; a mark at the best one."""
    lines, marks = [], []
    for row in result["rows"]:
        hue = HUES[row["source"]] + ("" if row["save"] == "background" else "-2")
        points = [(float(m), 100 * share) for m, share in row["goodput"].items()]
        dash = "-" if row["save"] == "background" else "--"
        lines.append(Line(f"{row['source']}, {row['save']}", points, hue, "line", dash))
        marks.append(Mark(row["best_minutes"], "save", hue, f"best: {row['best_minutes']:.1f} min"))
    return [Lines(lines, "minutes of training between saves", "goodput, %", marks, log_x=True)]


if __name__ == "__main__":
    raise SystemExit(console("benchmarks.goodput", simulate))
