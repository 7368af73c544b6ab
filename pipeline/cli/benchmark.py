"""`sllm benchmark …`: the arguments of each kind, and where it is measured."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path
from typing import Any

from pipeline.cli.options import INT8_HELP, VAE_RECIPE_HELP, answer, command, positive

# By kind: module, what measures, what shows the result. They import torch, so only the one asked for.
_WHERE = {
    "train": ("pipeline.costs.benchmark_training", "run", "format_benchmark"),
    "generation": ("pipeline.costs.benchmark_generation", "run", "format_benchmark"),
}


def _run(args: argparse.Namespace) -> int:
    name, measure, text = _WHERE[args.kind]
    module = import_module(name)
    result = getattr(module, measure)(args)
    if args.kind == "generation" and args.output:
        from pipeline.reports.charts import generation_chart

        Path(args.output).with_suffix(".svg").write_text(generation_chart(result), encoding="utf-8")
    answer(args, result, getattr(module, text))
    return 0


def add_benchmarks(commands: Any) -> None:
    """`benchmark` and its kinds, to the subcommands of `sllm`."""
    benchmark = commands.add_parser("benchmark", help="Measure speed and memory on this machine.")
    kinds = benchmark.add_subparsers(dest="kind", required=True, metavar="KIND")
    train = command(
        kinds,
        "train",
        _run,
        "Real tokens per second of forward and backward, padding and memory, beside another model.",
        "sllm benchmark train --recipe sllm-125m-h1 --against opt-125m --shards shards/train",
    )
    train.add_argument(
        "--recipe", required=True, metavar="FILE", help="recipe file, or the name of one that comes along"
    )
    train.add_argument(
        "--against",
        metavar="WHAT",
        help="opt-125m, opt-350m or opt-1.3b (Hugging Face's own, its own loss), a recipe, or a model folder",
    )
    train.add_argument("--shards", metavar="DIR", help="shard folder (default: the recipe's data.shards)")
    train.add_argument("--vae-recipe", metavar="FILE", help=VAE_RECIPE_HELP)
    train.add_argument(
        "--tokens", type=positive, default=8192, metavar="N", help="tokens of a step (default 8192)"
    )
    train.add_argument("--runs", type=positive, default=5, metavar="N", help="runs of each (default 5)")
    train.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: all cores)")
    train.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="default fp32")
    train.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default cpu")
    train.add_argument("--step", action="store_true", help="with the update of AdamW")
    train.add_argument("--no-memory", action="store_true", help="do not measure memory (a process per model)")
    train.add_argument("--memory-of", choices=["model", "against"], help=argparse.SUPPRESS)
    train.add_argument("--output", metavar="FILE", help="also write the figures to FILE, as JSON")
    train.add_argument("--json", action="store_true", help="print one JSON object")

    generation = command(
        kinds,
        "generation",
        _run,
        "New tokens per second, time to the first sentence and cached bytes, beside a token-level model.",
        "sllm benchmark generation --recipe sllm-125m-h1 --against opt-125m --batch 1 8 --context 256 1024",
    )
    generation.add_argument(
        "--recipe", required=True, metavar="FILE", help="recipe file, or the name of one that comes along"
    )
    generation.add_argument(
        "--against",
        metavar="WHAT",
        help="opt-125m, opt-350m or opt-1.3b, or a recipe of the objective lm (Hugging Face's generate)",
    )
    generation.add_argument("--vae-recipe", metavar="FILE", help=VAE_RECIPE_HELP)
    generation.add_argument(
        "--vocab-size",
        type=positive,
        metavar="N",
        help="entries of both models (default: what a recipe says, else OPT's 50,272)",
    )
    generation.add_argument(
        "--batch", type=positive, nargs="+", default=[1], metavar="N", help="texts at once (default 1)"
    )
    generation.add_argument(
        "--context",
        type=positive,
        nargs="+",
        default=[256],
        metavar="N",
        help="tokens of the prompts (default 256)",
    )
    generation.add_argument(
        "--sentence-tokens", type=positive, default=11, metavar="N", help="of every sentence (default 11)"
    )
    generation.add_argument(
        "--sentences", type=positive, default=5, metavar="N", help="new ones per text (default 5)"
    )
    generation.add_argument("--runs", type=positive, default=5, metavar="N", help="runs of each (default 5)")
    generation.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: all cores)")
    generation.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="default fp32")
    generation.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default cpu")
    generation.add_argument("--int8", action="store_true", help=f"{INT8_HELP}; the recipe's model only")
    generation.add_argument(
        "--columns", action="store_true", help="lay the other model's matrices out by columns too"
    )
    generation.add_argument(
        "--no-memory", action="store_true", help="do not measure memory (CPU: a process per model)"
    )
    generation.add_argument("--memory-of", choices=["model", "against"], help=argparse.SUPPRESS)
    generation.add_argument(
        "--output", metavar="FILE", help="write figures to FILE (JSON) and a chart (.svg)"
    )
    generation.add_argument("--json", action="store_true", help="print one JSON object")
