"""Seconds of a training step under several DeepSpeed configs, on one machine.

Every start is `pipeline/train.py` in `--ranks` processes, for a few steps in a temporary folder. Starts
alternate (A B C A B C …), so that a slow moment of the machine affects all, and each is compared with the
first config of its own round. The figures are those of `metrics.jsonl`, without the first steps, which
allocate. `loss_difference` shows a config that changes the losses.

On one machine the ranks share its memory bus and communicate over loopback or NVLink: the cost of a config
over a network is not measured.
"""

from __future__ import annotations

import itertools
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from data_prep.common.command_line import Many, Positive
from data_prep.common.environment import header, require_folder, write_result
from data_prep.common.errors import UserError, log
from data_prep.common.measuring import alternate, spread
from data_prep.common.processes import require_success, start_logged
from data_prep.shards.reader import ShardSet
from pipeline.cli.options import VAE_RECIPE_HELP
from pipeline.config.library import find_deepspeed_config, find_recipe
from pipeline.config.schema import Recipe
from pipeline.costs.benchmark import PACKAGES
from pipeline.costs.sized_recipe import sized_recipe
from pipeline.parallel.ranks import free_port
from pipeline.training.run_log import METRICS, read_records
from tools.commands import Output, console

STRATEGIES = ("zero0", "zero1", "zero2", "zero3")
WARM_UP = 2  # steps of each start, not counted


def run(
    *,
    recipe: str,
    shards: str | None = None,
    vae_recipe: Annotated[str | None, Parameter(help=VAE_RECIPE_HELP)] = None,
    strategies: Many = STRATEGIES,
    ranks: Positive = 2,
    threads: Positive = 1,
    steps: Positive = 12,
    rounds: Positive = 3,
    bins: Positive | None = None,
    tokens: Positive | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    output: Output = None,
) -> dict[str, Any]:
    """Seconds of a training step under several DeepSpeed configs, alternating.

    Args:
        recipe: recipe file, or the name of one in the package
        shards: shard folder (default: the recipe's data.shards)
        strategies: files of ds_configs/, zero2+fp16 for two of them; compared with the first one
        ranks: processes
        threads: CPU threads of each
        steps: steps of a start
        rounds: starts of each
        bins: bins of a step (default: one a rank)
        tokens: tokens of a bin (default: the recipe's data.bin_tokens)
    Raises: UserError for bad arguments, or a start that fails.
    """
    require_folder(output)
    if steps <= WARM_UP:
        raise UserError(f"--steps must be more than {WARM_UP}: the first {WARM_UP} are not counted")
    files = {strategy: _files(strategy) for strategy in strategies}
    sized = sized_recipe(recipe, vae_recipe)
    data, training = sized.data, sized.training
    # One bin per rank, no evaluations and no logs.
    data.shards = [str(Path(folder).resolve()) for folder in ([shards] if shards else data.shards)]
    data.validation, data.bins_per_step = None, bins or ranks
    if tokens:
        data.bin_tokens, data.window_tokens = tokens, min(data.window_tokens, tokens)
    training.max_steps, training.max_tokens, training.save_every = steps, None, steps
    sized.log.tensorboard = sized.log.wandb = False
    fingerprint = ShardSet.open(data.shards[0]).fingerprint
    found = alternate(
        rounds, {name: partial(train, sized, paths, ranks, threads, device) for name, paths in files.items()}
    )
    result = {
        **header(PACKAGES),
        "recipe": find_recipe(recipe).stem,
        "objective": sized.objective,
        "device": device,
        "ranks": ranks,
        "threads_per_rank": threads,
        "bins_per_step": data.bins_per_step,
        "bin_tokens": data.bin_tokens,
        "steps": steps,
        "rounds": rounds,
        "shards": fingerprint,
        "strategies": figures(found),
    }
    write_result(result, output)
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
            "seconds": spread(medians),
            "ratio": spread(ratios),
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


def train(
    recipe: Recipe, strategy: Sequence[Path], ranks: int, threads: int, device: str
) -> list[dict[str, Any]]:
    """Start `pipeline/train.py` on every rank. Returns its lines of metrics.jsonl; UserError on failure."""
    with tempfile.TemporaryDirectory(prefix="strategies-") as name:
        folder = Path(name)
        (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        command = [sys.executable, "-m", "pipeline.train", "--config", str(folder / "recipe.yaml")]
        command += ["--deepspeed_config", *map(str, strategy), "--output_dir", str(folder / "run")]
        environment = os.environ | {
            "DS_ACCELERATOR": device,
            "OMP_NUM_THREADS": str(threads),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
        run_ranks("+".join(path.stem for path in strategy), [command] * ranks, folder, environment)
        rows = read_records(folder / "run" / METRICS)
    log(f"{'+'.join(path.stem for path in strategy)}: {_median(rows):.3f} s per step")
    return rows


def run_ranks(what: str, commands: Sequence[list[str]], folder: Path, environment: dict[str, str]) -> None:
    """Run one command for each rank, and wait. Raises: UserError with the last line of one that fails."""
    logs = [folder / f"rank-{rank}.log" for rank in range(len(commands))]
    started: list[subprocess.Popen[str]] = []
    try:
        for rank, (command, file) in enumerate(zip(commands, logs, strict=True)):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(commands))}
            started.append(start_logged(command, file, env=environment | own))
        statuses = [process.wait() for process in started]
    finally:
        for process in started:
            process.kill()  # does nothing to one that has ended
            process.wait()
    for rank, (file, status) in enumerate(zip(logs, statuses, strict=True)):
        require_success(status, file.read_text(errors="replace"), f"{what}: rank {rank}")


if __name__ == "__main__":
    example = "python -m tools.benchmarks.strategies --recipe small-sllm --shards shards/train"
    raise SystemExit(console("benchmarks.strategies", run, example=f"{example} --strategies zero0 zero3"))
