"""The soak: a small run, killed with -9 at random moments again and again, ends as if nothing had been.

    make soak                                   30 kills, docs/results/soak.json
    python tests/soak.py --kills 6 --seed 2     fewer, other moments
    python tests/soak.py --kills 20 --slow 0.3  all while a checkpoint is written beside the training

Two series, each against a run that nothing interrupts. In the first every start has two ranks: losses,
weights and Adam's moments must be equal bit for bit. In the second the ranks go 2 → 1 → 2 → 3 from start to
start: losses within 1e-4, weights within 1e-4 relative L2. After both, `sllm audit` must have nothing to say.
Ranks are forked from a preloaded server (`ranks.py`): real processes, real gloo, only the imports are done
once.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from helpers import faulty_ranks, ranks, run_checks, runs

SAVE_EVERY = 3
LONGEST_LIFE = 7  # steps between two kills, at the most
LIMIT_SECONDS = 300  # for whatever must happen by itself: far beyond what a loaded machine needs
LAUNCHER_SECONDS = 2  # after a rank's death, before the others are ended as a launcher would
KINDS = ("start", "step", "save")  # while starting, some steps later, in the middle of a save


def soak(
    pool: ranks.RankPool,
    shards: Path,
    validation: Path,
    folder: Path,
    kills: int,
    seed: int,
    strategy: str,
    slow: float = 0.0,
) -> dict[str, Any]:
    """Run both series with `kills` kills in all; figures, and `passed`. slow: seconds more for every file of
    a checkpoint; then all kills are at random moments of a save."""
    runs.write_recipes(folder, shards, validation)
    series = {"same": (kills - kills // 2, [2]), "elastic": (kills // 2, [2, 1, 2, 3])}
    result: dict[str, Any] = {"kills": kills, "seed": seed, "strategy": strategy}
    for name, (count, worlds) in series.items():
        result[name] = _series(pool, folder, folder / name, count, worlds, f"{seed} {name}", strategy, slow)
    same, elastic = result["same"], result["elastic"]
    result["passed"] = (
        same["bit_equal"]
        and elastic["loss_difference"] <= 1e-4
        and elastic["weights_relative_l2"] <= 1e-4
        and not same["audit"] + elastic["audit"]
        and same["killed"] + elastic["killed"] == kills
    )
    return result


def _series(
    pool: ranks.RankPool,
    recipes: Path,
    folder: Path,
    kills: int,
    worlds: list[int],
    seed: str,
    strategy: str,
    slow: float,
) -> dict[str, Any]:
    from pipeline.evaluation.audit import audit

    folder.mkdir()
    steps = (kills + 2) * LONGEST_LIFE  # one life more than needed: a kill may come late
    options = (
        "--training.max_steps",
        steps,
        "--training.save_every",
        SAVE_EVERY,
        "--training.eval_every",
        10,
    )
    # Dropout: random numbers must come back. eps: see test_elastic.py.
    options += ("--model.vae.dropout", 0.1, "--optimizer.eps", 1.0e-6, "--optimizer.lr", 1.0e-3)
    whole, cut = (runs.arguments(recipes, "sllm", strategy, folder / n, *options) for n in ("whole", "cut"))
    assert pool.run(2, ranks.train_into_log, whole, str(folder)) == [0, 0]

    rng = random.Random(seed)
    turns = itertools.cycle(worlds)
    table = []
    while len(table) < kills:
        kill = _kill_once(pool, next(turns), cut, folder, rng, slow)
        if kill is None:  # finished before its moment came
            break
        table.append(kill)
        print(json.dumps(kill), flush=True)
    world = next(turns)
    statuses = pool.run(world, ranks.train_into_log, cut, str(folder))
    assert statuses == [0] * world, f"the last start ended with {statuses}: see {folder}"

    losses, expected = (np.array(runs.losses(folder / name)) for name in ("cut", "whole"))
    [ours], [theirs] = (
        pool.run(1, run_checks.weights_and_moments, str(folder / name)) for name in ("cut", "whole")
    )
    weights = [name for name in theirs if name.startswith("weight ")]
    distance, norm = (
        sum(float((one**2).sum()) for one in values) ** 0.5
        for values in ([ours[n] - theirs[n] for n in weights], [theirs[n] for n in weights])
    )
    return {
        "killed": len(table),
        "steps": steps,
        "bit_equal": bool(
            np.array_equal(losses, expected)
            and ours.keys() == theirs.keys()
            and all(np.array_equal(ours[name], theirs[name]) for name in theirs)
        ),
        "loss_difference": float(np.abs(losses - expected).max()) if len(losses) == steps else float("inf"),
        "weights_relative_l2": distance / norm,
        "audit": audit(folder / "cut")["findings"],
        "kills": table,
    }


def _kill_once(
    pool: ranks.RankPool, world: int, settings: list[str], folder: Path, rng: random.Random, slow: float
) -> dict[str, Any] | None:
    """Start the run, kill one rank or all at a random moment, wait for the others to end."""
    kind, everyone = "save" if slow else rng.choice(KINDS), rng.random() < 0.5
    chosen, more, delay = rng.randrange(world), rng.randrange(1, LONGEST_LIFE), rng.random()
    run = folder / "cut"
    began = time.monotonic()
    before, starts = _saved_step(run), _starts(run)
    started = pool.start(world, faulty_ranks.train_into_log_slowly, settings, str(folder), slow)

    def reached() -> bool:
        if kind == "start" and time.monotonic() - began > 3 * delay:
            return True
        if _starts(run) == starts:  # what is in the folder is from the start before
            return False
        steps = _last_step(run) - before
        if kind == "save" and (slow or steps < LONGEST_LIFE - 1):
            return any((run / "checkpoints").glob(".tmp-*"))
        return steps >= more

    while not reached():
        if not all(process.is_alive() for process, _ in started):
            break
        if time.monotonic() - began > LIMIT_SECONDS:
            break
        time.sleep(0.001)
    time.sleep(delay * (3 * slow or 0.02))
    victims = [p for n, (p, _) in enumerate(started) if (everyone or n == chosen) and p.is_alive()]
    for process in victims:
        os.kill(process.pid, signal.SIGKILL)
    # Ranks that have met notice a death by themselves; before that they wait for the missing one, for long.
    met = _starts(run) > starts
    left_alone = pool.finish(started, LIMIT_SECONDS if met else LAUNCHER_SECONDS)
    if not victims:
        return None
    assert left_alone or not met, "a rank outlived the others"
    return {
        "world": world,
        "kind": kind,
        "killed": "all" if everyone else chosen,
        "after_seconds": round(time.monotonic() - began, 2),
        "from_step": before,
        "reached_step": max(before, _last_step(run)),
    }


def _last_step(run: Path) -> int:
    try:
        lines = (run / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
        return json.loads(lines[-1])["step"] if lines else 0
    except FileNotFoundError:
        return 0


def _starts(run: Path) -> int:
    path = run / "starts.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _saved_step(run: Path) -> int:
    return max((int(path.name[5:]) for path in (run / "checkpoints").glob("step-*")), default=0)


def _make_shards(folder: Path) -> tuple[Path, Path]:
    from data_prep import cli

    settings = ["--segmenter", "clause", "--lang", "en", "--workers", "1", "--tokenizer", str(folder / "tok")]
    corpus = folder / "corpus"
    commands = [
        ["demo-corpus", "--output", str(corpus)],
        ["tokenizer", "--input", str(corpus), "--output", str(folder / "tok"), "--vocab-size", "512"],
        ["shard", "--input", str(corpus), "--output", str(folder / "shards"), *settings],
    ]
    for command in commands:
        assert not cli.main(command), command
    return folder / "shards", folder / "shards"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--strategy", default="zero3", help="names of files of ds_configs/")
    parser.add_argument("--slow", type=float, default=0.0, help="seconds more for every file of a checkpoint")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    pool = ranks.RankPool()
    began = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="soak-") as name:
            folder = Path(name)
            shards, validation = _make_shards(folder)
            how = arguments.kills, arguments.seed, arguments.strategy, arguments.slow
            result = soak(pool, shards, validation, folder, *how)
    finally:
        pool.close()
    result["seconds"] = round(time.monotonic() - began, 1)
    for name in ("same", "elastic"):
        one = {key: value for key, value in result[name].items() if key != "kills"}
        print(f"{name}: {one}")
    print("passed" if result["passed"] else "FAILED", f"in {result['seconds']} s")
    if arguments.output:
        from data_prep.common.environment import header, write_result
        from pipeline.costs.benchmark import PACKAGES

        write_result({**header(PACKAGES), **result}, arguments.output)
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    sys.exit(main())
