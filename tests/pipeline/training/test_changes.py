"""A run that is started again with other keys uses them, says which they are, or refuses them."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from helpers import ranks
from helpers.runs import arguments, losses, records

from pipeline.config.schema import load_recipe
from pipeline.training.changes import changed_keys, changes, rate_jump

CONSTANT = ("--schedule.kind", "constant", "--schedule.warmup", 0, "--training.eval_every", 100)
OPTIMIZER = "--optimizer.weight_decay 20 --optimizer.betas 0.5 0.6 --optimizer.eps 1e-2 --optimizer.clip 0.01"
OTHER = tuple(OPTIMIZER.split())
SAID = "optimizer.betas [0.9, 0.95] -> [0.5, 0.6], optimizer.eps 1e-08 -> 0.01, "
SAID += "optimizer.weight_decay 0.01 -> 20.0, optimizer.clip 1.0 -> 0.01"


@pytest.fixture(scope="module")
def changed_losses(
    pool: ranks.RankPool, recipes: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[float]:
    """Losses of a run whose optimizer keys change after three of six steps, by torch's AdamW alone."""
    run = tmp_path_factory.mktemp("changed") / "run"
    for strategy, steps, other in (("zero1", 3, ()), ("zero2", 6, OTHER)):
        again = arguments(recipes, "lm", strategy, run, *CONSTANT, *other, "--training.max_steps", steps)
        assert pool.run(1, ranks.train, again) == [0]
    return losses(run)


@pytest.mark.parametrize(
    ("strategy", "world"), [("zero0", 2), ("zero1", 2), ("zero2", 1), ("zero3", 2), ("zero2-offload", 1)]
)
def test_changed_optimizer_keys_are_used_and_said(
    strategy: str,
    world: int,
    changed_losses: list[float],
    pool: ranks.RankPool,
    recipes: Path,
    tmp_path: Path,
) -> None:
    settings = arguments(recipes, "lm", strategy, tmp_path / "run", *CONSTANT)
    assert pool.run(world, ranks.train, [*settings, "--training.max_steps", "3"]) == [0] * world
    shutil.copytree(tmp_path / "run", tmp_path / "same")
    settings += ["--training.max_steps", "6"]
    answers = pool.run(world, ranks.train_and_listen, [*settings, *OTHER])
    assert [status for status, _ in answers] == [0] * world
    assert f"changed: {SAID}, training.max_steps 3 -> 6\n" in answers[0][1]
    assert losses(tmp_path / "run") == pytest.approx(changed_losses, abs=1e-4)
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["optimizer"]["clip"] == 0.01
    settings[settings.index("--output_dir") + 1] = str(tmp_path / "same")
    said = pool.run(world, ranks.train_and_listen, settings)[0][1]
    assert "changed: training.max_steps 3 -> 6\n" in said and "jumps" not in said
    assert abs(losses(tmp_path / "same")[-1] - changed_losses[-1]) > 0.01, "the keys make a difference"


def test_what_cannot_change_and_what_has_no_effect(
    pool: ranks.RankPool, recipes: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = arguments(recipes, "lm", "zero2", run, "--training.max_steps", 4)
    assert pool.run(1, ranks.train, settings) == [0]
    before = (run / "recipe.yaml").read_bytes()
    [(status, said)] = pool.run(1, ranks.train_and_listen, [*settings, *OTHER])
    assert status == 0 and said.endswith(f"nothing to do; changed, without effect: {SAID}\n")
    longer = [*settings, "--training.max_steps", "8"]
    for key, value in (("seed", "7"), ("optimizer.parts", "{model: {lr_scale: 2}}")):
        [answer] = pool.run(1, ranks.train, [*longer, f"--{key}", value])
        assert isinstance(answer, str) and key in answer and "use another --output_dir" in answer
    assert (run / "recipe.yaml").read_bytes() == before, "it claims nothing that was not used"
    zero1 = arguments(recipes, "lm", "zero1", run, "--training.max_steps", 8, "--optimizer.lr", 0.01)
    [(status, said)] = pool.run(1, ranks.train_and_listen, zero1)
    assert status == 0 and "DeepSpeed config: zero_optimization.stage 2 -> 1" in said
    rates = [record["lr"] for record in records(run)]
    assert f"the learning rate jumps at step 5: {rates[3]:.2e} -> {rates[4]:.2e}\n" in said


def test_a_moved_run_and_moved_shards(pool: ranks.RankPool, recipes: Path, tmp_path: Path) -> None:
    recipe = yaml.safe_load((recipes / "lm.yaml").read_text())
    shards = shutil.copytree(recipe["data"]["shards"][0], tmp_path / "shards")
    settings = arguments(recipes, "lm", "zero2", tmp_path / "run", "--data.shards", shards)
    assert pool.run(1, ranks.train, [*settings, "--training.max_steps", "3"]) == [0]
    (tmp_path / "run").rename(tmp_path / "moved")
    shards.rename(tmp_path / "elsewhere")
    settings[settings.index("--output_dir") + 1] = str(tmp_path / "moved")
    [answer] = pool.run(1, ranks.train, settings)
    assert isinstance(answer, str) and str(shards) in answer
    settings += ["--data.shards", str(tmp_path / "elsewhere")]
    (tmp_path / "moved/ds_config.json").write_text("{")  # it only tells
    [(status, said)] = pool.run(1, ranks.train_and_listen, settings)
    assert status == 0 and "resuming at step 3" in said
    assert "moved/ds_config.json cannot be read as JSON" in said and "changed in it is not known\n" in said
    assert len(losses(tmp_path / "moved")) == 6


def saved(recipe: Any, step: int) -> Any:
    return SimpleNamespace(recipe=recipe.to_dict(), step=step, tokens=0)


def test_changes() -> None:
    assert changes({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}) == ["a.c 2 -> 3", "d None -> 4"]
    was = load_recipe("demo-sllm", ["--output_dir", "here"])
    now = load_recipe("demo-sllm", ["--output_dir", "there", "--model.vae.path", "other"])
    [change] = changed_keys(saved(was, 1), now)
    assert change.startswith("model.vae.path ") and change.endswith(
        "(the weights stay those of the checkpoint)"
    )


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ("", ""),
        ("--log.console_every 3", ""),
        ("--training.max_steps 101", ""),
        ("--training.max_steps 200", "jumps at step 101: 1.00e-04 -> 5.57e-04"),
        ("--optimizer.lr 1e-4", "jumps at step 101: 1.00e-04 -> 1.00e-05"),
        ("--schedule.final 0.5", "jumps at step 101: 1.00e-04 -> 5.00e-04"),
    ],
)
def test_a_jump_of_the_rate(overrides: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("objective: lm\noutput_dir: x\ndata: {shards: a}\nmodel: {backbone: {hidden_size: 8}}\n")
    length = ["--training.max_steps", "100", "--optimizer.lr", "1e-3"]
    was, now = load_recipe(path, length), load_recipe(path, [*length, *overrides.split()])
    found = rate_jump(saved(was, 100), now)
    assert found.endswith(says) and bool(found) == bool(says)
    # Half of either run.
    was, now = (load_recipe(path, [*length, "--training.max_steps", steps]) for steps in ("4", "6"))
    assert rate_jump(saved(was, 2), now) == ""


def test_keys_that_a_resolved_recipe_leaves_out() -> None:
    """A checkpoint from before them resumes without a word; their changes are named with both values."""
    recipe = load_recipe("demo-sllm", ["--output_dir", "here"])
    assert "checkpoints" not in recipe.to_dict() and "layout" not in recipe.to_dict()["model"]
    assert changed_keys(saved(recipe, 1), recipe) == []
    other = load_recipe("demo-sllm", ["--output_dir", "here", "--checkpoints.background", "false"])
    assert changed_keys(saved(recipe, 1), other) == ["checkpoints.background True -> False"]
    assert changed_keys(saved(other, 1), recipe) == ["checkpoints.background False -> True"]
