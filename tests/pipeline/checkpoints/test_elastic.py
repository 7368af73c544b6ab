"""A run resumes on another number of ranks, or with another ZeRO stage, as if never interrupted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import ranks, run_checks
from helpers.runs import arguments, losses, records

# Dropout is on, so that its random numbers must be those of the bins, wherever these are computed.
# The schedule is constant, so that a longer run is the same one.
OPTIONS = ("--model.vae.dropout", 0.1, "--schedule.kind", "constant", "--schedule.warmup", 0)
OPTIONS += ("--optimizer.lr", 2.0e-3, "--training.eval_every", 100)
# The gradient of attention's key bias is rounding noise (softmax does not see it): with Adam's usual eps it
# would be blown up to full steps, other ones in every order of summation.
OPTIONS += ("--optimizer.eps", 1.0e-6)


@pytest.fixture(scope="module")
def uninterrupted(
    pool: ranks.RankPool, recipes: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[float], dict, Path]:
    """Losses and final weights of the run that nothing interrupts, and its directory."""
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert pool.run(
        1, ranks.train, arguments(recipes, "sllm", "zero1", run, *OPTIONS, "--training.max_steps", 12)
    ) == [0]
    [weights] = pool.run(1, run_checks.weights_and_moments, str(run))
    return losses(run), weights, run


@pytest.mark.parametrize(
    ("strategies", "worlds"),
    [
        (["zero0"] * 3, [1, 2, 3]),
        (["zero1"] * 3, [1, 2, 3]),  # three bins a step: two ranks share them unequally
        (["zero2"] * 3, [2, 1, 2]),
        (["zero3"] * 4, [1, 2, 3, 2]),
        (["zero3-offload"] * 2, [2, 1]),
        (["zero3", "zero1", "zero2", "zero3"], [2, 1, 2, 2]),
    ],
)
def test_a_run_goes_on_as_another_number_of_ranks(
    strategies: list[str],
    worlds: list[int],
    uninterrupted: tuple[list[float], dict, Path],
    pool: ranks.RankPool,
    recipes: Path,
    tmp_path: Path,
) -> None:
    # One run, its length raised at every start.
    expected, weights, _ = uninterrupted
    said = ""
    for number, (strategy, world) in enumerate(zip(strategies, worlds, strict=True), start=1):
        steps = 12 * number // len(worlds)
        again = arguments(recipes, "sllm", strategy, tmp_path, *OPTIONS, "--training.max_steps", steps)
        answers = pool.run(world, ranks.train_and_listen, again)
        assert [status for status, _ in answers] == [0] * world
        said += answers[0][1]
    assert [record["step"] for record in records(tmp_path)] == list(range(1, 13))
    assert losses(tmp_path) == pytest.approx(expected, abs=1e-4)
    assert said.count("its parts are regrouped for ") == len(worlds) - 1
    if strategies[-1] == "zero0":
        return
    [ours] = pool.run(1, run_checks.weights_and_moments, str(tmp_path))
    require_alike(ours, weights, ("weight", "exp_avg", "exp_avg_sq", "step"))


def require_alike(ours: dict, theirs: dict, kinds: tuple[str, ...]) -> None:
    """All of a kind within a relative distance of 1e-4."""
    assert ours.keys() == theirs.keys()
    assert {name.split()[0] for name in theirs} == set(kinds)
    for kind in kinds:
        names = [name for name in theirs if name.split()[0] == kind]
        ours_all, theirs_all = (
            np.concatenate([one[name].ravel() for name in names]) for one in (ours, theirs)
        )
        distance = np.linalg.norm(ours_all - theirs_all) / np.linalg.norm(theirs_all)
        assert distance < 1e-4, kind


def test_frozen_parts_and_the_average_go_on_as_another_number_of_ranks(
    uninterrupted: tuple[list[float], dict, Path], pool: ranks.RankPool, recipes: Path, tmp_path: Path
) -> None:
    # Every weight is partitioned, the frozen ones too: by default small ones stay whole, and all are small.
    zero3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    (tmp_path / "strategy.json").write_text(json.dumps(zero3))
    parts = {"vae.encoder": {"freeze": True}, "backbone.decoder.layers.0-0": {"freeze": True}}
    parts["vae.decoder"] = {"lr_scale": 0.5}
    options = (*OPTIONS, "--training.ema", 0.75, "--optimizer.parts", json.dumps(parts))
    # Frozen weights are not those that a model of this seed begins with: the checkpoint must bring them back.
    options += ("--init_from", uninterrupted[2])
    held = {}
    for name, worlds in (("whole", [1]), ("cut", [2, 1, 3])):
        run = tmp_path / name
        for number, world in enumerate(worlds, start=1):
            steps = 6 * number // len(worlds)
            settings = arguments(recipes, "sllm", "zero3", run, *options, "--training.max_steps", steps)
            settings[settings.index("--deepspeed_config") + 1] = str(tmp_path / "strategy.json")
            assert pool.run(world, ranks.train, settings) == [0] * world
        [held[name]] = pool.run(1, run_checks.weights_and_moments, str(run))
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), abs=1e-4)
    require_alike(held["cut"], held["whole"], ("weight", "exp_avg", "exp_avg_sq", "ema", "frozen", "step"))
    frozen = [name for name in held["whole"] if name.startswith("frozen ")]
    assert all((held["cut"][name] == held["whole"][name]).all() for name in frozen)
    # The average is no copy of the weights: to compare it says something.
    weights, average = (
        np.concatenate([held["whole"][f"{kind} {name.split()[1]}"].ravel() for name in moved])
        for moved in [[name for name in held["whole"] if name.startswith("ema ")]]
        for kind in ("weight", "ema")
    )
    assert np.linalg.norm(average - weights) / np.linalg.norm(weights) > 1e-3
