"""Seconds of a training step under several DeepSpeed configs, on one machine.

Every start is `pipeline/train.py` in `--ranks` processes, for a few steps in a temporary folder. Starts
alternate (A B C A B C …), so that a slow moment of the machine affects all, and each is compared with the
first config of its own round. The figures are those of `metrics.jsonl`, without the first steps, which
allocate. `loss_difference` shows a config that changes the losses.

On one machine the ranks share its memory bus and communicate over loopback or NVLink: the cost of a config
over a network is not measured.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.common.environment import header, require_folder, write_result
from data_prep.common.errors import UserError, log, run_main
from data_prep.common.processes import start_logged
from data_prep.shards.reader import ShardSet
from pipeline.cli.options import VAE_RECIPE_HELP
from pipeline.config.library import find_deepspeed_config, find_recipe
from pipeline.config.schema import Recipe
from pipeline.costs.benchmark_training import PACKAGES
from pipeline.costs.sized_recipe import sized_recipe
from pipeline.parallel.ranks import free_port
from pipeline.training.run_log import METRICS, read_records
from tools.benchmarks.arguments import answer, positive

STRATEGIES = ("zero0", "zero1", "zero2", "zero3")
WARM_UP = 2  # steps of each start, not counted
LAST_LINES = 5  # shown of a failed rank's output


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure as the arguments say. Returns plain JSON.

    Raises:
        UserError: bad arguments, or a start fails.
    """
    require_folder(arguments.output)
    if arguments.steps <= WARM_UP:
        raise UserError(f"--steps must be more than {WARM_UP}: the first {WARM_UP} are not counted")
    files = [_files(strategy) for strategy in arguments.strategies]
    recipe = _recipe(arguments)
    shards = ShardSet.open(recipe.data.shards[0])
    found: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in arguments.strategies}
    for turn in range(arguments.rounds):
        for name, paths in zip(arguments.strategies, files, strict=True):
            with tempfile.TemporaryDirectory(prefix="strategies-") as folder:
                found[name].append(train(recipe, paths, arguments, Path(folder)))
            log(f"round {turn + 1} of {arguments.rounds}, {name}: {_median(found[name][-1]):.3f} s per step")
    result = {
        **header(PACKAGES),
        "recipe": find_recipe(arguments.recipe).stem,
        "objective": recipe.objective,
        "device": arguments.device,
        "ranks": arguments.ranks,
        "threads_per_rank": arguments.threads,
        "bins_per_step": recipe.data.bins_per_step,
        "bin_tokens": recipe.data.bin_tokens,
        "steps": arguments.steps,
        "rounds": arguments.rounds,
        "shards": shards.fingerprint,
        "strategies": figures(found),
    }
    write_result(result, arguments.output)
    return result


def figures(found: dict[str, list[list[dict[str, Any]]]]) -> dict[str, dict[str, Any]]:
    """Figures of each config. found: config → round → lines of metrics.jsonl.

    `ratio`: median over the rounds of step time relative to the first config in the same round.
    `loss_difference`: largest difference from the first config over all steps, nats per target.
    """
    first = next(iter(found.values()))
    result = {}
    for name, rounds in found.items():
        medians = [_median(rows) for rows in rounds]
        ratios = [ours / _median(theirs) for ours, theirs in zip(medians, first, strict=True)]
        pairs = zip(itertools.chain(*rounds), itertools.chain(*first), strict=True)
        result[name] = {
            "seconds": {"median": statistics.median(medians), "values": medians},
            "ratio": {"median": statistics.median(ratios), "values": ratios},
            "tokens_per_second": statistics.median(
                row["tokens_per_second"] for rows in rounds for row in rows[WARM_UP:]
            ),
            "memory_bytes": max(row["memory_bytes"] for rows in rounds for row in rows),
            "loss_difference": max(abs(ours["loss"] - theirs["loss"]) for ours, theirs in pairs),
        }
    return result


def _median(rows: list[dict[str, Any]]) -> float:
    return statistics.median(row["seconds"] for row in rows[WARM_UP:])


def _files(strategy: str) -> list[Path]:
    """The files of "zero3" or "zero2+fp16"; each is a name or a path."""
    names = strategy.split("+")
    paths = [find_deepspeed_config(name) for name in names]
    for path in paths:
        if not path.is_file():
            raise UserError(f"--strategies {strategy}: {path} does not exist")
    return paths


def _recipe(arguments: argparse.Namespace) -> Recipe:
    """The recipe with sizes instead of folders, one bin per rank, no evaluations and no logs."""
    recipe = sized_recipe(arguments.recipe, arguments.vae_recipe)
    if arguments.shards:
        recipe.data.shards = [arguments.shards]
    recipe.data.shards = [str(Path(folder).resolve()) for folder in recipe.data.shards]
    recipe.data.validation = None
    recipe.data.bins_per_step = arguments.bins or arguments.ranks
    if arguments.tokens:
        recipe.data.bin_tokens = arguments.tokens
        recipe.data.window_tokens = min(recipe.data.window_tokens, arguments.tokens)
    recipe.training.max_steps, recipe.training.max_tokens = arguments.steps, None
    recipe.training.save_every = arguments.steps
    recipe.log.tensorboard = recipe.log.wandb = False
    return recipe


def train(
    recipe: Recipe, strategy: Sequence[Path], arguments: argparse.Namespace, folder: Path
) -> list[dict[str, Any]]:
    """Start `pipeline/train.py` on every rank. Returns its lines of metrics.jsonl; UserError on failure."""
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    command = [sys.executable, "-m", "pipeline.train"]
    command += ["--config", str(folder / "recipe.yaml")]
    command += ["--deepspeed_config", *map(str, strategy), "--output_dir", str(folder / "run")]
    port, ranks = str(free_port()), []
    environment = os.environ | {
        "DS_ACCELERATOR": arguments.device,
        "OMP_NUM_THREADS": str(arguments.threads),
        "WORLD_SIZE": str(arguments.ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    try:
        for rank in range(arguments.ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(start_logged(command, folder / f"rank-{rank}.log", env=environment | own))
        statuses = [process.wait() for process in ranks]
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
                process.wait()
    for rank, status in enumerate(statuses):
        if status:
            output = (folder / f"rank-{rank}.log").read_text(errors="replace").strip().splitlines()
            raise UserError(
                f"{'+'.join(path.stem for path in strategy)}: rank {rank} ended with status {status}: "
                + " | ".join(output[-LAST_LINES:])
            )
    return read_records(folder / "run" / METRICS)


def format_benchmark(result: dict[str, Any]) -> str:
    """The result of `run` as text."""
    where = result["cpu"] if result["device"] == "cpu" else result["device"]
    lines = [
        f"{result['recipe']}, {result['ranks']} ranks with {result['threads_per_rank']} threads on {where}, "
        f"{result['bins_per_step']} bins of {result['bin_tokens']:,} tokens per step; medians of "
        f"{result['rounds']} rounds of {result['steps']} steps",
        "",
    ]
    names, first = result["strategies"], next(iter(result["strategies"]))
    width = max(len(name) for name in names) + 2

    def row(*cells: str) -> None:
        lines.append(f"{cells[0]:<{width}}" + "".join(f"{cell:>20}" for cell in cells[1:]))

    row("", "seconds per step", f"by {first}", "tokens per second", "GB, rank 0", "loss differs by")
    for name, one in names.items():
        cells = [
            f"{one['seconds']['median']:.3f}",
            f"{one['ratio']['median']:.3f}",
            f"{one['tokens_per_second']:,.0f}",
            f"{one['memory_bytes'] / 1e9:.2f}",
            f"{one['loss_difference']:.1e}",
        ]
        row(name, *cells)
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.benchmarks.strategies",
        description="Seconds of a training step under several DeepSpeed configs, alternating.",
        epilog="example:\n  python -m tools.benchmarks.strategies --recipe small-sllm --shards shards/train "
        "--strategies zero0 zero3",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--recipe",
        required=True,
        metavar="FILE",
        help="recipe file, or the name of one in the package",
    )
    parser.add_argument("--shards", metavar="DIR", help="shard folder (default: the recipe's data.shards)")
    parser.add_argument("--vae-recipe", metavar="FILE", help=VAE_RECIPE_HELP)
    parser.add_argument(
        "--strategies",
        nargs="+",
        default=STRATEGIES,
        metavar="NAME",
        help="files of ds_configs/, zero2+fp16 for two of them; the others are compared with the first one "
        "(default zero0 zero1 zero2 zero3)",
    )
    parser.add_argument("--ranks", type=positive, default=2, metavar="N", help="processes (default 2)")
    parser.add_argument(
        "--threads", type=positive, default=1, metavar="N", help="CPU threads of each (default 1)"
    )
    parser.add_argument("--steps", type=positive, default=12, metavar="N", help="of a start (default 12)")
    parser.add_argument("--rounds", type=positive, default=3, metavar="N", help="of starts (default 3)")
    parser.add_argument("--bins", type=positive, metavar="N", help="of a step (default: one a rank)")
    parser.add_argument(
        "--tokens", type=positive, metavar="N", help="of a bin (default: the recipe's data.bin_tokens)"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default cpu")
    parser.add_argument("--output", metavar="FILE", help="also write the figures to FILE as JSON")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    answer(arguments, run(arguments), format_benchmark)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_main("strategies", main))
