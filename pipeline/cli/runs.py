"""`sllm audit`, `report`, `sweep`, `scaling fit` and `doctor`: training runs, and where they run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from cyclopts import App, Parameter

from data_prep.common.command_line import Many, Positive
from pipeline.cli.options import Json, Overrides, answer, app
from pipeline.cluster.options import Checks

ALL_CHECKS = Checks()

HELP = """Bits per byte as a power of size or cost (docs/evaluation.md).

example: sllm scaling fit sweeps/scaling/results.json --x parameters --output scaling.svg"""

scaling = App(name="scaling", group="Research", help=HELP)
app.command(scaling)


@app.command(group="Runs")
def audit(
    run_dir: str, /, *, data: Annotated[Many, Parameter(alias="--shards")] = (), json: Json = False
) -> int:
    """Prove that a training run skipped and repeated no bin, over all its restarts. Status 1 if it did.

    example:
      sllm audit runs/sllm-demo

    Args:
        run_dir: run directory of a training
        data: the recipe's shard folders, if they have moved
    """
    from pipeline.evaluation import audit as auditing

    result = auditing.audit(run_dir, list(data) or None)
    answer(result, json, auditing.format_audit)
    return 0 if result["clean"] else 1


@app.command(group="Runs")
def report(run_dirs: Sequence[str], /, *, output: str = "report.html", json: Json = False) -> None:
    """One HTML page about training runs, side by side: curves, restarts, skips, saves, and what differs.

    example:
      sllm report runs/first runs/second --output report.html

    Args:
        run_dirs: run directories of trainings
        output: page to write
    """
    from pipeline.reports import run_report

    answer(run_report.report(run_dirs, output), json, run_report.format_report)


@app.command(group="Research")
def sweep(
    file: str,
    /,
    *overrides: Overrides,
    output: str,
    workers: Positive = 1,
    result: str | None = None,
    only: Many = (),
    json: Json = False,
) -> int:
    """Train and evaluate a set of runs; one row each in one result file. The same command resumes it. Every
    recipe key may follow, as --KEY VALUE. Status 1 if a run failed (docs/evaluation.md).

    example:
      sllm sweep pipeline/recipes/sweeps/scaling.yaml --output sweeps/scaling --data.shards shards/train

    Args:
        file: sweep file, YAML
        output: folder of the sweep's runs and results
        workers: runs at once, each on its own core
        result: result file, JSON (default: results.json in the output folder)
        only: these runs, and those that they come after; NAME-sSEED is one seed of a run
    """
    from pipeline.research import sweep as sweeping

    found = sweeping.run(file, output, workers, result, only, overrides)
    answer(found, json, sweeping.format_sweep)
    return 1 if found["failed"] else 0


@scaling.command
def fit(
    inputs: Sequence[str],
    /,
    *,
    x: Literal["parameters", "body_parameters", "operations", "seconds"] = "parameters",
    output: str | None = None,
    json: Json = False,
) -> None:
    """Fit bits per byte = A · x^-alpha, and E + A · x^-alpha from four sizes on, per kind of model.

    example:
      sllm scaling fit sweeps/scaling/results.json --x parameters --output scaling.svg

    Args:
        inputs: result files of `sllm sweep`, or run directories
        x: what the power is of
        output: chart to write, SVG
    """
    from pipeline.research import scaling as laws

    answer(laws.fit(inputs, x, output), json, laws.format_fit)


@app.command(group="Runs")
def doctor(*, checks: Annotated[Checks, Parameter(name="*")] = ALL_CHECKS, json: Json = False) -> int:
    """Are these machines fit for a run? Versions, shards, disks, clocks, GPUs, network; names a bad one.

    example:
      srun --nodes=8 --ntasks-per-node=8 sllm doctor --data shards/train --output-dir runs/svae
    """
    from pipeline.cluster import doctor as diagnosis

    return diagnosis.run(checks, json)
