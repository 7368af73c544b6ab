"""`sllm sweep` and `sllm scaling fit`: many runs at once, and how their figures grow. The arguments,
and what each command calls."""

from __future__ import annotations

import argparse
from typing import Any

from pipeline.cli.options import answer, command, positive

X = ("parameters", "body_parameters", "operations", "seconds")


def _sweep(args: argparse.Namespace) -> int:
    from pipeline.research.sweep import format_sweep, run

    result = run(args.sweep, args.output, args.workers, args.result, args.only or (), args.overrides)
    answer(args, result, format_sweep)
    return 1 if result["failed"] else 0


def _scaling_fit(args: argparse.Namespace) -> int:
    from pipeline.research.scaling import fit, format_fit

    result = fit(args.inputs, args.x, args.output)
    answer(args, result, format_fit)
    return 0


def add_research(commands: Any) -> None:
    """These commands, to those of `sllm`."""
    sweep = command(
        commands,
        "sweep",
        _sweep,
        "Train and evaluate a set of runs; one row each in one result file. Goes on where it was stopped. "
        "Status 1 if a run failed (docs/evaluation.md).",
        "sllm sweep pipeline/recipes/sweeps/scaling.yaml --output sweeps/scaling --workers 2 "
        "--data.shards shards/train --data.validation shards/valid",
    )
    sweep.add_argument(
        "sweep", metavar="SWEEP.yaml", help="sweep file; every recipe key may follow, as --KEY VALUE"
    )
    sweep.add_argument(
        "--output", required=True, metavar="DIR", help="folder of the sweep's runs and results"
    )
    sweep.add_argument(
        "--workers",
        type=positive,
        default=1,
        metavar="N",
        help="runs at once (default 1), each on its own core",
    )
    sweep.add_argument("--result", metavar="FILE.json", help="result file (default DIR/results.json)")
    sweep.add_argument("--only", nargs="+", metavar="NAME", help="these runs, and those that they come after")
    sweep.add_argument("--json", action="store_true", help="print one JSON object")
    sweep.set_defaults(overrides=[])  # what is left of the command line goes here

    scaling = commands.add_parser(
        "scaling",
        help="Bits per byte as a power of size or cost (docs/evaluation.md).",
        epilog="example:\n  sllm scaling fit sweeps/scaling/results.json --output scaling.svg",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    fit = command(
        scaling.add_subparsers(dest="subcommand", required=True, metavar="COMMAND"),
        "fit",
        _scaling_fit,
        "Fit bits per byte = A · x^-alpha, and E + A · x^-alpha from four sizes on, per kind of model.",
        "sllm scaling fit sweeps/scaling/results.json --x parameters --output scaling.svg",
    )
    fit.add_argument(
        "inputs", metavar="FILE_OR_RUN", nargs="+", help="result files of `sllm sweep`, or run directories"
    )
    fit.add_argument("--x", choices=X, default=X[0], help=f"what the power is of (default {X[0]})")
    fit.add_argument("--output", metavar="FILE.svg", help="chart to write")
    fit.add_argument("--json", action="store_true", help="print one JSON object")
