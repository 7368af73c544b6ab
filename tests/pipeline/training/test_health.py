"""The guard's decisions: figures that are not finite, spikes, and what a checkpoint must bring back."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ranks, run_checks
from helpers.runs import arguments

from data_prep.common.errors import UserError
from pipeline.config.schema import HealthRecipe, load_recipe
from pipeline.training.health import FEWEST, MEMORY, SLOW_STEPS, SPEED_STEPS, Guard, Speeds


def test_only_what_is_not_finite_is_bad_by_default() -> None:
    guard, recipe = Guard(), HealthRecipe()
    for _ in range(100):
        guard.record(5.0, 1.0, None, recipe)
    assert guard.bad_loss(1e9, recipe) is None
    assert guard.norm_limit(recipe) == math.inf
    assert guard.bad_loss(math.nan, recipe) == "the loss is nan"
    assert guard.bad_loss(math.inf, recipe) == "the loss is inf"
    assert guard == Guard()  # nothing to carry in checkpoints


def test_a_spike_is_judged_by_the_median_of_the_last_accepted_steps() -> None:
    guard, recipe = Guard(), HealthRecipe(loss_spike=2.0, norm_spike=4.0)
    for step in range(FEWEST):
        assert guard.bad_loss(1e9, recipe) is None and guard.norm_limit(recipe) == math.inf
        guard.record(3.0 if step else 1000.0, 0.5, None, recipe)
    assert guard.bad_loss(5.9, recipe) is None
    assert guard.bad_loss(6.1, recipe) == "the loss 6.1 is above 6, 2 times the median"
    assert guard.norm_limit(recipe) == 2.0
    for number in (1, 2):
        guard.record(100.0, 100.0, "a reason", recipe)
        assert (guard.skips, guard.in_row) == (number, number)
    assert guard.norm_limit(recipe) == 2.0  # a skipped step says nothing about what is usual
    assert Guard(**json.loads(json.dumps(dataclasses.asdict(guard)))) == guard
    for _ in range(MEMORY):
        guard.record(1.0, 1.0, None, recipe)
    assert (guard.skips, guard.in_row) == (2, 0)
    assert len(guard.losses) == len(guard.norms) == MEMORY and guard.norm_limit(recipe) == 4.0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_skips": 0}, "health.max_skips must be a whole number of at least 1, not 0"),
        ({"norm_spike": 1.0}, "health.norm_spike must be null or a number above 1, not 1"),
        ({"loss_spike": ".nan"}, "health.loss_spike must be null or a number above 1, not nan"),
        (
            {"hang_seconds": 0.0},
            r"health.hang_seconds must be null or a number above 0 and at most 1e\+07, not 0",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_recipe("demo-vae", [f"--health.{key}={value}" for key, value in settings.items()])


WAIT = SPEED_STEPS + SLOW_STEPS - 1  # steps until a slow rank is named


def note(speeds: Speeds, seconds: list[float], operations: list[float] | None = None) -> str | None:
    speeds.note(seconds, operations or [1.0] * len(seconds), [0.0] * len(seconds))
    return speeds.warning()


def test_only_a_rank_that_stays_slow_is_named() -> None:
    speeds = Speeds(["a", "b", "c"])
    for step in range(100):
        slow = step % 3  # another one each time: noise
        seconds = [2.0 if rank == slow else 1.0 for rank in range(3)]
        assert speeds.note(seconds, [1.0] * 3, [0.0] * 3) == (slow, 2.0)
        assert speeds.warning() is None
    assert speeds.note([1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0] * 3) is None  # ranks without bins
    said = [note(speeds, [1.0, 1.0, 1.5]) for _ in range(SPEED_STEPS + SLOW_STEPS)]
    [line] = [line for line in said if line]
    assert line.startswith("rank 2 (c) takes 1.5 times the median rank's time for the same work, over")


@pytest.mark.parametrize("slow", [0, 1])
def test_of_two_ranks_each_is_compared_with_the_other(slow: int) -> None:
    speeds = Speeds(["a", "b"])
    lines = [note(speeds, [1.3 if rank == slow else 1.0 for rank in range(2)]) for _ in range(WAIT)]
    assert lines[:-1] == [None] * (WAIT - 1)
    assert lines[-1] is not None and lines[-1].startswith(f"rank {slow} (")


def test_a_rank_with_more_bins_is_not_slow_and_one_with_fewer_neither() -> None:
    speeds = Speeds(["a", "b", "c"])
    for _ in range(3 * SPEED_STEPS):  # a tenth of a second for any number of bins
        assert note(speeds, [2.1, 2.1, 1.1], [2.0, 2.0, 1.0]) is None
    lines = [note(speeds, [2.1, 2.8, 1.1], [2.0, 2.0, 1.0]) for _ in range(2 * SPEED_STEPS)]
    assert any(line and line.startswith("rank 1 (b) takes 1.3 times") for line in lines)


def test_a_rank_that_waits_for_its_data_is_named_with_the_reason() -> None:
    speeds = Speeds(["a", "b"])
    lines = []
    for _ in range(WAIT):
        speeds.note([1.0, 1.5], [1.0, 1.0], [0.01, 0.5])
        lines += [speeds.warning()]
    assert "the same work, 33% of it waiting for data, over the last" in (lines[-1] or "")


def noisy(rng: random.Random, world: int, steps: int) -> Iterator[list[float]]:
    """Steps of equal ranks: 8 % noise, single steps of three times the length, and bursts of a neighbour that
    last for up to eleven steps."""
    burst = [0] * world
    for _ in range(steps):
        seconds = []
        for rank in range(world):
            burst[rank] = rng.randrange(1, 12) if rng.random() < 0.003 else max(0, burst[rank] - 1)
            single = 3 if rng.random() < 0.03 else 1
            seconds.append(rng.lognormvariate(0, 0.08) * single * (1.5 if burst[rank] else 1))
        yield seconds


@pytest.mark.parametrize("world", [2, 3, 8])
def test_no_rank_is_named_in_a_thousand_even_steps_and_a_slow_one_within_fifty(world: int) -> None:
    for seed in range(8):
        speeds, hosts = Speeds(["host"] * world), ["host"] * world
        assert not any(note(speeds, one) for one in noisy(random.Random(seed), world, 1000)), seed
        speeds = Speeds(hosts)
        slowed = ([one[0], 1.3 * one[1], *one[2:]] for one in noisy(random.Random(seed + 100), world, 50))
        first = next((line for seconds in slowed if (line := note(speeds, seconds))), "")
        assert first.startswith("rank 1 (host) takes 1."), seed


@pytest.mark.parametrize(("strategy", "world"), [("zero0", 1), ("zero2", 2), ("zero3", 2)])
def test_weights_that_are_not_finite_are_neither_saved_nor_exported(
    strategy: str, world: int, pool: ranks.RankPool, recipes: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = arguments(recipes, "lm", strategy, run, "--schedule.kind", "constant", "--schedule.warmup", 0)
    steps = [*settings, "--training.save_every", "1", "--training.max_steps"]
    assert pool.run(world, ranks.train, [*steps, "3"]) == [0] * world
    huge = [*steps, "4", "--optimizer.lr", "1e39"]  # of one step: above what fp32 holds
    answer, *others = pool.run(world, ranks.train, huge)
    assert others == [2] * (world - 1)
    good = "the last good checkpoint is step-00000003: start again with a lower --optimizer.lr"
    assert answer == f"step 4: the weights are not finite, nothing is saved; {good}"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        *("best", "latest", "step-00000002", "step-00000003")
    ]


def test_a_last_validation_that_is_not_finite_ends_the_run(
    pool: ranks.RankPool, recipes: Path, tmp_path: Path
) -> None:
    settings = arguments(recipes, "lm", "zero1", tmp_path, "--training.max_steps", 1)
    for rate, what in (("1e37", "validation loss is"), ("1e39", "weights are")):
        [answer] = pool.run(1, ranks.train, [*settings, "--optimizer.lr", rate])
        none = "there is no checkpoint: start again with a lower --optimizer.lr"
        assert answer == f"step 1: the {what} not finite, nothing is saved; {none}"
    assert not list((tmp_path / "checkpoints").glob("*"))


def test_an_older_checkpoint_with_weights_that_are_not_finite_is_not_exported(
    pool: ranks.RankPool, recipes: Path, tmp_path: Path
) -> None:
    settings = arguments(recipes, "lm", "zero1", tmp_path / "run", "--training.max_steps", 1)
    settings += ["--optimizer.lr", "1e39", "--data.validation", "null"]
    assert pool.run(1, ranks.train_without_a_look_at_weights, settings) == [0]
    [message] = pool.run(1, run_checks.export_error, str(tmp_path / "run"), str(tmp_path / "model"))
    assert "is not finite, the run has diverged: train again with a lower optimizer.lr" in message
    assert not list(tmp_path.glob("*model*"))
    init = arguments(recipes, "lm", "zero1", tmp_path / "new", "--init_from", tmp_path / "run")
    assert "is not finite, the run has diverged" in pool.run(1, ranks.train, init)[0]
