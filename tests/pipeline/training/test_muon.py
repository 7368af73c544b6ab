"""Muon: its rule, which weights it takes, and that partitioned, resumed and vetoed runs stay the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import faulty_ranks, ranks, run_checks
from helpers.models import small_lm, small_sllm, small_stack, small_vae
from helpers.runs import arguments, losses, records
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from data_prep.common.errors import UserError
from pipeline.config.deepspeed_config import read_strategy, require_compatible
from pipeline.config.schema import OptimizerRecipe, load_recipe
from pipeline.training.muon import COEFFICIENTS, hidden_matrices, orthogonal, update_operations
from pipeline.training.optimizer import new_optimizer, parameter_groups

MUON = ("--optimizer.kind", "muon", "--training.ema", 0.5, "--schedule.kind", "constant")


@pytest.mark.parametrize("shape", [(24, 24), (40, 16), (16, 40)])
def test_singular_values_go_through_the_quintic_and_vectors_stay(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, *shape, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    a, b, c = COEFFICIENTS
    s = s / s.norm(dim=1, keepdim=True)
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    expected = u @ torch.diag_embed(s) @ vh
    assert torch.allclose(orthogonal(x).double(), expected, atol=1e-5)
    assert ((s > 0.5) & (s < 1.3)).all()


@pytest.mark.parametrize("shape", [(48, 48), (96, 32), (32, 96)])
def test_steps_are_those_of_torch(shape: tuple[int, int]) -> None:
    """torch's products are in bf16."""
    torch.manual_seed(0)
    ours, theirs = (nn.Linear(shape[1], shape[0]) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    before = ours.weight.detach().clone()
    recipe = OptimizerRecipe(kind="muon", lr=0.01, weight_decay=0.1)
    optimizer, _ = new_optimizer(ours, recipe)
    torchs = torch.optim.Muon([theirs.weight], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for parameter in ours.parameters():
            parameter.grad = torch.randn_like(parameter)
        theirs.weight.grad = ours.weight.grad.clone()
        optimizer.step()
        torchs.step()
    distance = (ours.weight - theirs.weight).norm() / (theirs.weight - before).norm()
    assert distance < 0.02
    assert (theirs.weight - before).norm() > 0.1


@pytest.mark.parametrize("model", [small_vae, small_sllm, small_lm, small_stack])
def test_muon_takes_the_hidden_matrices(model) -> None:
    model = model(memory=2) if model is small_stack else model()
    groups = parameter_groups(model, OptimizerRecipe(kind="muon"))
    muon = {id(p): group["muon"] for group in groups for p in group["params"]}
    assert set(muon) == {id(p) for p in model.parameters()}
    for name, parameter in model.named_parameters():
        outer = any(part in name for part in ("embed", "head", "start")) or parameter.ndim < 2
        stacked = 3 if name.endswith("qkv.weight") else 2 if name.endswith("key_value.weight") else 1
        assert muon[id(parameter)] == (0 if outer else stacked), name
    assert len(hidden_matrices(model)) == sum(count > 0 for count in muon.values()) > 3


def test_an_update_is_counted_as_torch_counts_it() -> None:
    model = small_stack(memory=2)
    model.upper[0].requires_grad_(False)
    optimizer, _ = new_optimizer(model, OptimizerRecipe(kind="muon"))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    assert update_operations(model) == counter.get_total_flops() / 2 > 0


def test_stacked_projections_move_as_matrices_of_their_own() -> None:
    model = small_stack()
    optimizer, _ = new_optimizer(model, OptimizerRecipe(kind="muon", lr=1.0, weight_decay=0.0))
    weight = model.lower[0].attention.qkv.weight
    before = weight.detach().clone()
    weight.grad = torch.cat([torch.randn(32, 32) * scale for scale in (1.0, 100.0, 0.01)])
    optimizer.step()
    sizes = [(after - was).norm() for after, was in zip(weight.chunk(3), before.chunk(3), strict=True)]
    assert max(sizes) < 1.2 * min(sizes)
    assert optimizer.orthogonalised == 1


@pytest.fixture(scope="module")
def plain(pool: ranks.RankPool, recipes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("muon") / "plain"
    assert pool.run(1, ranks.train, arguments(recipes, "stack", "zero1", run, *MUON)) == [0]
    learned = losses(run)
    assert learned[-1] < learned[0] - 0.2
    return run


@pytest.mark.parametrize(
    ("strategy", "world"), [("zero0", 2), ("zero1", 3), ("zero2", 2), ("zero3", 2), ("zero3-offload", 2)]
)
def test_every_strategy_trains_alike(strategy, world, pool, recipes, plain, tmp_path) -> None:
    answers = pool.run(world, ranks.train_and_listen, arguments(recipes, "stack", strategy, tmp_path, *MUON))
    assert [status for status, _ in answers] == [0] * world
    # Three token layers of four, memories of three for two, a way in, two backbone layers of six.
    assert "31 weights by Muon" in answers[0][1]
    assert losses(tmp_path) == pytest.approx(losses(plain), abs=1e-3)
    norms, theirs = ([r["grad_norm"] for r in records(run)] for run in (tmp_path, plain))
    assert norms == pytest.approx(theirs, rel=0.02)  # of the gradient, not of Muon's update


@pytest.mark.parametrize(
    ("strategies", "worlds"),
    [(["zero1"] * 2, [1, 1]), (["zero2"] * 3, [2, 1, 3]), (["zero3", "zero1", "zero3"], [2, 2, 1])],
)
def test_a_run_goes_on_as_another_number_of_ranks(strategies, worlds, pool, recipes, plain, tmp_path) -> None:
    for number, (strategy, world) in enumerate(zip(strategies, worlds, strict=True), start=1):
        steps = ("--training.max_steps", 6 * number // len(worlds))
        again = arguments(recipes, "stack", strategy, tmp_path, *MUON, *steps)
        assert pool.run(world, ranks.train, again) == [0] * world
    exact = set(worlds) == {1}
    assert losses(tmp_path) == (losses(plain) if exact else pytest.approx(losses(plain), abs=1e-3))
    [ours], [theirs] = (pool.run(1, run_checks.weights_and_moments, str(run)) for run in (tmp_path, plain))
    assert ours.keys() == theirs.keys()
    kinds = {name.split()[0] for name in ours}
    assert kinds == {"weight", "ema", "exp_avg", "exp_avg_sq", "momentum_buffer", "step"}
    for kind in kinds:
        one, other = (
            np.concatenate([found[name].ravel() for name in found if name.split()[0] == kind])
            for found in (ours, theirs)
        )
        assert np.linalg.norm(one - other) <= (0 if exact else 5e-3) * np.linalg.norm(other), kind


@pytest.mark.parametrize("strategy", ["zero1", "zero3"])
def test_a_vetoed_step_changes_no_weight_and_no_momentum(strategy, pool, recipes, tmp_path) -> None:
    settings = arguments(recipes, "stack", strategy, tmp_path, *MUON)
    for status, before_and_after in pool.run(2, ranks.train_with_bad_loss, settings, 1, 4, 6):
        assert status == 0
        changed = [before != after for before, after in before_and_after]
        assert changed == [True, True, False, True, True, True]


def test_another_kind_of_optimizer_is_refused_at_a_resume(pool, recipes, plain) -> None:
    settings = arguments(recipes, "stack", "zero1", plain, *MUON[2:], "--training.max_steps", 8)
    [said] = pool.run(1, ranks.train, settings)
    assert "optimizer.kind is 'muon' there and 'adamw' here" in said


def test_a_momentum_on_an_nvme_disk_is_refused(recipes) -> None:
    recipe = load_recipe(recipes / "stack.yaml", ["--optimizer.kind", "muon"])
    with pytest.raises(UserError, match="muon keeps its momentum where matrices can be put together"):
        require_compatible(read_strategy("zero3-nvme"), recipe)


def test_a_run_in_which_muon_misses_a_matrix_ends(pool, recipes, tmp_path) -> None:
    settings = arguments(recipes, "stack", "zero3", tmp_path, *MUON)
    said = pool.run(2, faulty_ranks.train_with_forgotten_matrices, settings)
    assert said == ["Muon would handle 28 of 31 weights", 2]
