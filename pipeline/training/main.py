"""Train a SentenceVAE, an SLLM or a token-level baseline with DeepSpeed.

Start it by `deepspeed pipeline/train.py`, `srun python pipeline/train.py` or `python pipeline/train.py` (one
process). Exit status: 0 trained to the end, 2 bad input or a diverged run, 75 stopped by a signal after
saving (start it again to resume), 76 hung for `health.hang_seconds`, 130 Ctrl-C before the first step.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

from data_prep.common.errors import REQUEUE, UserError, run_main, say
from data_prep.shards.reader import ShardSet
from pipeline.checkpoints import store
from pipeline.config.deepspeed_config import read_strategy, require_compatible, zero_stage
from pipeline.config.keys import as_text
from pipeline.config.loading import environment_overrides
from pipeline.config.schema import KEYS, Recipe, load_recipe
from pipeline.parallel.agreement import AgreedError, agree
from pipeline.parallel.ranks import Ranks, find_ranks
from pipeline.parallel.signals import Stopped, StopSignals
from pipeline.training.changes import changed_keys

STOPPED_UPLOAD_SECONDS = 60.0  # after a signal: the time limit is two minutes away

EXAMPLE = """\
example:
  deepspeed --num_gpus 2 pipeline/train.py --config pipeline/recipes/demo-vae.yaml \\
      --deepspeed_config ds_configs/zero3.json --data.shards demo/shards/train --training.max_steps 100

Every key of the recipe can be given as --section.key VALUE. Start the same command again to resume.
Exit status: 0 done, 2 bad input, 75 stopped by USR1, TERM or Ctrl-C after saving (start again to resume),
76 hung for health.hang_seconds (what each rank did then: RUN/stacks/)."""


def console() -> int:
    """Entry point of `pipeline/train.py`; returns the exit status."""
    return run_main("train.py", main)


class Parser(argparse.ArgumentParser):
    """Reports a usage error as every other error is: in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """`train.py`, from its words. Raises: UserError for bad input."""
    with StopSignals() as stop:
        arguments, overrides = build_parser().parse_known_args(argv)
        return check_and_train(arguments.recipe, arguments.deepspeed_config, overrides, stop)


def start(recipe: str, deepspeed_config: Sequence[str], overrides: Sequence[str]) -> int:
    """`sllm train`: one rank of a run. Raises: UserError for bad input."""
    with StopSignals() as stop:
        return check_and_train(recipe, deepspeed_config, overrides, stop)


def build_parser() -> Parser:
    parser = Parser(
        prog="train.py",
        description="Train a SentenceVAE (vae), an SLLM (sllm) or a token-level baseline (lm).",
        epilog=f"{EXAMPLE}\n\nkeys of a recipe, with type and default:\n{as_text(KEYS)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--recipe",
        "--config",
        required=True,
        metavar="RECIPE",
        help="a YAML file, or the name of one of ours",
    )
    parser.add_argument(
        "--deepspeed-config",
        "--deepspeed_config",
        required=True,
        nargs="+",
        metavar="JSON",
        help="a file or a name of ds_configs/, and any that add to it (fp16, flops-profiler)",
    )
    parser.add_argument("--local_rank", help="set by the deepspeed launcher; the environment is what counts")
    return parser


def check_and_train(
    recipe_name: str, deepspeed_config: Sequence[str], overrides: Sequence[str], stop: StopSignals
) -> int:
    """Check everything that can be checked at once, then train; returns the exit status.

    Signals are caught before it and ignored after it. The first rank that ends with 2 makes `srun
    --kill-on-bad-exit` terminate the others: a rank that TERM killed would have a job requeued that can never
    succeed.
    """
    ranks = find_ranks()
    try:
        recipe = load_recipe(recipe_name, [*overrides, *environment_overrides()])
        strategy = read_strategy(*deepspeed_config)
        require_compatible(strategy, recipe)
    except UserError:
        if ranks.local == 0:  # all ranks read the same files: one line per machine is enough
            raise
        return 2
    try:
        return train(recipe, strategy, ranks, stop)
    except Stopped as stopped:
        stop.ignore()
        return stopped.report()
    except AgreedError:
        if ranks.rank == 0:
            raise
        return 2
    except UserError as error:  # may concern this rank alone (a disk of its machine): name the rank
        if ranks.world == 1:
            raise
        raise UserError(f"rank {ranks.rank}: {error}") from error


def train(recipe: Recipe, strategy: dict[str, Any], ranks: Ranks, stop: StopSignals) -> int:
    """Start or resume a run, and train to its end or to a signal. Called by every rank; returns the exit
    status."""
    found = store.newest_whole(recipe.output_dir)
    if found:
        latest, meta, damage = found
        if recipe.training.progress(meta.step, meta.tokens) >= 1:
            require_same(recipe, strategy, ranks, meta, latest)
            if ranks.rank == 0:
                if damage:
                    say(damage)
                ignored = ", ".join(changed_keys(meta, recipe))
                say(
                    f"{recipe.output_dir}: already finished, at {latest.name}; nothing to do"
                    + (f"; changed, without effect: {ignored}" if ignored else "")
                )
                if recipe.checkpoints.upload:
                    from pipeline.checkpoints.mirror import Mirror  # loads torch

                    mirror = Mirror(recipe.checkpoints.upload, Path(recipe.output_dir), say)
                    mirror.add_earlier(latest.name)
                    mirror.wait(None)
                    if line := mirror.missing():
                        say(line)
            return 0

    with ExitStack() as starting:
        starting.enter_context(stop.at_once())
        # torch and DeepSpeed: seconds, so only now
        from pipeline.training.run import TrainingRun

        training = TrainingRun(recipe, strategy, ranks, starting.close)
    with training as run:
        run.resume()
        run.start()
        if any(agree(None, stop.received is not None)):
            raise Stopped(stop.received or "a signal")
        while not run.finished:
            step = run.next_step()
            sums = run.compute(step, stop_wanted=stop.received is not None)
            run.update(step, sums)
            if run.evaluation_due:
                run.evaluate()
            if run.save_due or sums.stop:
                run.save(wait=run.finished or bool(sums.stop))
            if sums.stop and not run.finished:
                run.log.say(
                    f"stopped by a signal after step {run.state.step}, saved: start the same command again"
                )
                run.finish_uploads(STOPPED_UPLOAD_SECONDS)
                stop.ignore()
                return REQUEUE
        run.finish_uploads()
    return 0


def require_same(
    recipe: Recipe, strategy: dict[str, Any], ranks: Ranks, meta: store.Meta, checkpoint: Path
) -> None:
    """Refuse a finished run's checkpoint that is not of this recipe, strategy and number of ranks.

    Compares what is known without building the model; `TrainingRun.resume` compares the model itself.
    """
    ours = dataclasses.replace(
        meta,
        objective=recipe.objective,
        recipe=recipe.to_dict(),
        shards=[ShardSet.open(folder).fingerprint for folder in recipe.data.shards],
        world=ranks.world,
        zero_stage=zero_stage(strategy),
    )
    store.require_same_run(meta, checkpoint, ours)
    store.require_same_model_recipe(meta, checkpoint, ours.recipe)
