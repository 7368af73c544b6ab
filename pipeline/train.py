"""Train a SentenceVAE, an SLLM or a token-level baseline with DeepSpeed: the story of a run.

In: a recipe, a DeepSpeed config and overrides on the command line, or a run directory to go on from. Out: the
run directory (docs/architecture.md lists it). Start it by `deepspeed pipeline/train.py`, by `srun python
pipeline/train.py`, or plainly by `python pipeline/train.py` (one process). Exit status: 0 trained to the end,
2 bad input, 75 stopped by a signal after saving: start it again to go on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

if (
    __name__ == "__main__"
):  # a script's own folder is first on sys.path: put the repository's root there instead
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from data_prep.errors import UserError, run_main
from pipeline import checkpoints, launch
from pipeline.launch import Ranks, StopSignals
from pipeline.recipe import Recipe, load_recipe
from pipeline.strategy import read_strategy

EXAMPLE = """\
example:
  deepspeed --num_gpus 2 pipeline/train.py --config pipeline/recipes/demo-vae.yaml \\
      --deepspeed_config ds_configs/zero3.json --data.shards demo/shards/train --training.max_steps 100

Every key of the recipe can be given as --section.key VALUE. Start the same command again to resume.
Exit status: 0 done, 2 bad input, 75 stopped by USR1 or TERM after saving (start again to go on)."""


def main(argv: list[str] | None = None) -> int:
    """The command: check everything that can be checked at once, then train."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train a SentenceVAE (vae), an SLLM (sllm) or a token-level baseline (lm).",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="RECIPE", help="recipe, a YAML file")
    parser.add_argument("--deepspeed_config", required=True, metavar="JSON", help="a file from ds_configs/")
    parser.add_argument("--local_rank", help="set by the deepspeed launcher; the environment is what counts")
    arguments, overrides = parser.parse_known_args(argv)

    ranks = launch.find_ranks()
    try:
        recipe = load_recipe(arguments.config, overrides)
        strategy = read_strategy(arguments.deepspeed_config)
        return train(recipe, strategy, ranks, StopSignals())
    except UserError:
        if ranks.local == 0:  # one line for each machine is enough
            raise
        return 2


def train(recipe: Recipe, strategy: dict[str, Any], ranks: Ranks, stop: StopSignals) -> int:
    """Run one training, or go on with it, to its end or to a signal. Called by every rank; returns the exit
    status."""
    latest = checkpoints.find(recipe.output_dir)
    if latest and is_finished(recipe, checkpoints.read_meta(latest)):
        if ranks.rank == 0:
            print(f"{recipe.output_dir}: already finished, at {latest.name}; nothing to do")
        return 0

    from pipeline.training_run import TrainingRun  # torch and DeepSpeed: seconds, so only now

    with TrainingRun(recipe, strategy, ranks) as run:
        if latest:
            run.resume(latest)
        run.begin()
        while not run.finished:
            step = run.next_step()
            totals = run.compute(step, stop_wanted=stop.received is not None)
            run.update(step, totals)
            if run.evaluation_due:
                run.evaluate()
            if run.save_due or totals.stop:
                run.save()
            if totals.stop and not run.finished:
                run.log.say(
                    f"stopped by a signal after step {run.state.step}, saved: start the same command again"
                )
                return launch.REQUEUE
    return 0


def is_finished(recipe: Recipe, meta: checkpoints.Meta) -> bool:
    return meta.objective == recipe.objective and recipe.training.progress(meta.step, meta.tokens) >= 1


if __name__ == "__main__":
    sys.exit(run_main("train.py", main))
