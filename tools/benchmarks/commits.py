"""Two checkouts of this project side by side, in turns: sharding, training and generation.

Each checkout has its own .venv. Every round runs each job in both checkouts, old first in even rounds and new
first in odd ones, so that a slow moment of the machine meets both. The ratio is of medians.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_prep.common.environment import header, write_result
from data_prep.common.errors import log, run_main
from data_prep.common.processes import run_command

PACKAGES = ("torch", "transformers", "deepspeed", "numpy", "tokenizers")
MODEL = ("--recipe", "default-sllm", "--vae-recipe", "default-vae", "--threads", "1", "--no-memory", "--json")
TRAIN = ("benchmark", "train", *MODEL, "--tokens", "2048", "--runs", "9")
GENERATION = (
    "benchmark",
    "generation",
    *MODEL,
    "--vocab-size",
    "2048",
    "--context",
    "256",
    "--sentences",
    "20",
    "--runs",
    "15",
)


def run(checkout: Path, program: str, *words: str) -> tuple[str, float]:
    """Standard output and CPU seconds of one command of a checkout."""
    command = [str(checkout.resolve() / ".venv" / "bin" / program), *words]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    printed = run_command(command, f"{checkout}: {program} {words[0]}", cwd=checkout, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return printed, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def cpu_seconds_of_sharding(checkout: Path, arguments: argparse.Namespace) -> float:
    with tempfile.TemporaryDirectory() as folder:
        words = (
            "--input",
            *arguments.input,
            "--output",
            f"{folder}/shards",
            "--tokenizer",
            arguments.tokenizer,
        )
        return run(checkout, "data-prep", "shard", *words)[1]


def training_speed(checkout: Path, arguments: argparse.Namespace) -> float:
    result = json.loads(run(checkout, "sllm", *TRAIN, "--shards", arguments.shards)[0])
    return result["model"]["tokens_per_second"]["median"]


def generation_speed(checkout: Path, arguments: argparse.Namespace) -> float:
    result = json.loads(run(checkout, "sllm", *GENERATION)[0])
    return result["points"][0]["model"]["tokens_per_second"]["median"]


JOBS: dict[str, Callable[[Path, argparse.Namespace], float]] = {
    "shard, CPU seconds": cpu_seconds_of_sharding,
    "train, tokens/s": training_speed,
    "generation, tokens/s": generation_speed,
}


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Values, medians and the ratio new/old of every job."""
    checkouts = {"old": Path(arguments.old), "new": Path(arguments.new)}
    values: dict[str, dict[str, list[float]]] = {job: {"old": [], "new": []} for job in JOBS}
    for number in range(arguments.runs):
        for job, measure in JOBS.items():
            for side in ("old", "new") if number % 2 == 0 else ("new", "old"):
                values[job][side].append(measure(checkouts[side], arguments))
                log(f"round {number + 1}, {job}, {side}: {values[job][side][-1]:.2f}")
    commits = {
        side: run_command(["git", "-C", str(folder), "rev-parse", "HEAD"], f"{folder}: git").strip()
        for side, folder in checkouts.items()
    }
    jobs = {}
    for job, sides in values.items():
        medians = {side: statistics.median(found) for side, found in sides.items()}
        jobs[job] = {"values": sides, "medians": medians, "new_to_old": medians["new"] / medians["old"]}
    return {"benchmark": "commits", **header(PACKAGES), "commits": commits, "jobs": jobs}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.benchmarks.commits",
        description="Speed of two checkouts of this project, in turns.",
        epilog="example: python -m tools.benchmarks.commits ../old . --input corpus/EN/part-000000.jsonl "
        "--tokenizer opt-tokenizer --shards shards/train --output docs/results/commits.json",
    )
    parser.add_argument("old", metavar="OLD", help="checkout with a .venv")
    parser.add_argument("new", metavar="NEW", help="checkout with a .venv")
    parser.add_argument("--input", required=True, nargs="+", metavar="PATH", help="text to shard")
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="tokenizer folder")
    parser.add_argument(
        "--shards", required=True, metavar="DIR", help="shards to train on, 2,048 entries or more"
    )
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="rounds (default 5)")
    parser.add_argument("--output", metavar="FILE", help="also write the figures to FILE, as JSON")
    arguments = parser.parse_args()
    for name in ("tokenizer", "shards"):
        setattr(arguments, name, str(Path(getattr(arguments, name)).resolve()))
    arguments.input = [str(Path(path).resolve()) for path in arguments.input]
    result = compare(arguments)
    write_result(result, arguments.output)
    for job, found in result["jobs"].items():
        old, new = found["medians"]["old"], found["medians"]["new"]
        print(f"{job}: old {old:.2f}, new {new:.2f}, new/old {found['new_to_old']:.3f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_main("commits", main))
