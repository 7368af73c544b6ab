"""Two checkouts of this project side by side, in turns: sharding, training and generation.

Each checkout has its own .venv, or a link to one. Each job runs in both by turns, so that a slow moment of
the machine affects both. The ratio is of medians.
"""

from __future__ import annotations

import json
import os
import resource
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.common.command_line import Many, Positive
from data_prep.common.environment import header, write_result
from data_prep.common.errors import log
from data_prep.common.measuring import alternate, spread
from data_prep.common.processes import run_command
from pipeline.training.run_log import METRICS, read_records
from tools.commands import Output, console

PACKAGES = ("torch", "transformers", "deepspeed", "numpy", "tokenizers")
MODEL = "--recipe default-sllm --vae-recipe default-vae --threads 1 --no-memory --json"
TRAIN = f"benchmark train {MODEL} --tokens 2048 --runs 9 --shards"
RUN = (
    "-m pipeline.train --config default-lm --deepspeed_config zero2 --data.validation null "
    "--log.tensorboard false --training.max_tokens null --training.save_every 1000000 --data.bins_per_step 4"
)
JOBS = ("shard", "train", "run", "generation")
GENERATION = f"benchmark generation {MODEL} --vocab-size 2048 --context 256 --sentences 20 --runs 15"


def run(checkout: Path, program: str, *words: str) -> tuple[str, float]:
    """Standard output and CPU seconds of one command of a checkout."""
    command = [str(checkout.resolve() / ".venv" / "bin" / program), *words]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    environment["PYTHONPATH"] = str(checkout.resolve())
    printed = run_command(command, f"{checkout}: {program} {words[0]}", cwd=checkout, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return printed, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def compare(
    old: Path,
    new: Path,
    /,
    *,
    input: Many,
    tokenizer: Path,
    shards: Path,
    runs: Positive = 5,
    steps: Positive = 40,
    jobs: Many = JOBS,
    output: Output = None,
) -> dict[str, Any]:
    """Speed of two checkouts of this project, in turns: values, medians and the ratio new/old of every job.

    Args:
        old: checkout with a .venv
        new: checkout with a .venv
        input: text to shard
        tokenizer: tokenizer folder
        shards: shards to train on, 2,048 entries or more
        runs: rounds
        steps: of a training run with its loader, log and checkpoint, of which the first ten do not count
        jobs: which of shard, train, run and generation
    """
    paths = [str(Path(path).resolve()) for path in input]

    def cpu_seconds_of_sharding(checkout: Path) -> float:
        with tempfile.TemporaryDirectory() as folder:
            words = ("--output", f"{folder}/shards", "--tokenizer", str(tokenizer.resolve()))
            return run(checkout, "data-prep", "shard", "--input", *paths, *words)[1]

    def training_speed(checkout: Path) -> float:
        result = json.loads(run(checkout, "sllm", *TRAIN.split(), str(shards.resolve()))[0])
        return result["model"]["tokens_per_second"]["median"]

    def generation_speed(checkout: Path) -> float:
        result = json.loads(run(checkout, "sllm", *GENERATION.split())[0])
        return result["points"][0]["model"]["tokens_per_second"]["median"]

    def seconds_of_a_step(checkout: Path) -> float:
        with tempfile.TemporaryDirectory() as folder:
            words = [*RUN.split(), "--data.shards", str(shards.resolve()), "--output_dir", f"{folder}/run"]
            run(checkout, "python", *words, "--training.max_steps", str(steps))
            rows = read_records(Path(folder) / "run" / METRICS)[10:]
        return spread([row["seconds"] for row in rows])["median"]

    measures = {
        "shard": ("shard, CPU seconds", cpu_seconds_of_sharding),
        "train": ("train, tokens/s", training_speed),
        "run": ("run, seconds of a step", seconds_of_a_step),
        "generation": ("generation, tokens/s", generation_speed),
    }
    checkouts, found = {"old": old, "new": new}, {}
    for name, job in (measures[one] for one in jobs):
        values = alternate(runs, {side: partial(job, folder) for side, folder in checkouts.items()})
        medians = {side: spread(of)["median"] for side, of in values.items()}
        found[name] = {"values": values, "medians": medians, "new_to_old": medians["new"] / medians["old"]}
        log(f"{name}: old {medians['old']:.4g}, new {medians['new']:.4g}")
    commits = {
        side: run_command(["git", "-C", str(folder), "rev-parse", "HEAD"], f"{folder}: git").strip()
        for side, folder in checkouts.items()
    }
    result = {"benchmark": "commits", **header(PACKAGES), "commits": commits, "jobs": found}
    write_result(result, output)
    return result


if __name__ == "__main__":
    words = "--input corpus/EN/part-000000.jsonl --tokenizer opt-tokenizer --shards shards/train"
    raise SystemExit(
        console("benchmarks.commits", compare, example=f"python -m tools.benchmarks.commits ../old . {words}")
    )
