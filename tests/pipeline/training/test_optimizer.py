"""Parameter groups, and steps that are vetoed."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.models import small_lm, small_sllm, small_vae
from torch import nn

from pipeline.config.schema import OptimizerRecipe
from pipeline.training.engine import Engine
from pipeline.training.optimizer import AdamW, parameter_groups


@pytest.mark.parametrize("model", [small_vae, small_sllm, small_lm])
def test_embeddings_norms_and_biases_do_not_decay(model) -> None:
    model = model()
    groups = parameter_groups(model, OptimizerRecipe(weight_decay=0.1))
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert set(decay.values()) == {0.0, 0.1}
    assert set(decay) == {id(p) for p in model.parameters()}
    embeddings = [part for part in model.modules() if isinstance(part, nn.Embedding)]
    assert embeddings and all(decay[id(part.weight)] == 0 for part in embeddings)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            assert decay[id(parameter)] == 0, name
    matrices = [part.weight for part in model.modules() if isinstance(part, nn.Linear)]
    tied = {id(part.weight) for part in embeddings}
    assert all(decay[id(w)] == 0.1 for w in matrices if id(w) not in tied)


@pytest.mark.parametrize("on_device", ["fused", "capturable", None])
def test_the_step_counter_of_a_vetoed_step_is_where_torch_wants_it(on_device: str | None) -> None:
    weight = nn.Parameter(torch.ones(3, device="meta"))
    weight.grad = torch.ones_like(weight)
    optimizer = AdamW([weight], lr=0.1, ema=0.9)
    if on_device:
        optimizer.param_groups[0][on_device] = True  # torch builds no fused optimizer for meta tensors
    optimizer.veto = lambda: True
    optimizer.step()
    assert optimizer.state[weight]["step"].device.type == ("meta" if on_device else "cpu")
    assert set(optimizer.state[weight]) == {"step", "exp_avg", "exp_avg_sq", "ema"}


def test_a_step_counter_that_a_checkpoint_gave_back_on_the_cpu_is_moved() -> None:
    weight = nn.Parameter(torch.ones(3, device="meta"))
    optimizer = AdamW([weight], lr=0.1)
    optimizer.param_groups[0]["fused"] = True
    optimizer.state[weight]["step"] = torch.tensor(4.0)
    optimizer._place_counters()
    assert optimizer.state[weight]["step"].device.type == "meta"


class PlainEngine:
    """DeepSpeed's engine without ZeRO, as far as `Engine.update` uses it."""

    def __init__(self, weight: nn.Parameter, optimizer: AdamW):
        self.optimizer, self.module = optimizer, nn.ParameterList([weight])

    def step(self) -> None:
        self.optimizer.step()

    def get_global_grad_norm(self) -> None:
        return None


@pytest.mark.parametrize(
    ("gradient", "limit", "applied"),
    [
        (3.0, math.inf, True),
        (3.0, 4.0, True),
        (5.0, 4.0, False),
        (math.inf, math.inf, False),
        (math.nan, 4.0, False),
    ],
)
def test_a_step_above_the_norm_limit_changes_no_weight(gradient: float, limit: float, applied: bool) -> None:
    weight = nn.Parameter(torch.ones(1))
    optimizer = AdamW([{"params": [weight], "weight_decay": 0.0}], lr=0.1)
    engine = object.__new__(Engine)
    engine.config, engine.peak_lr, engine._lr_scales = {"zero_optimization": {"stage": 0}}, 0.1, [1.0]
    engine.by_muon, engine.scales_loss = 0, False
    engine._optimizer, engine.deepspeed = optimizer, PlainEngine(weight, optimizer)
    weight.grad = torch.full((1,), gradient)
    update = engine.update(1.0, None, limit)
    assert (update.skipped is None) == applied
    assert (weight.item() != 1.0) == applied
    assert bool(optimizer.state[weight]["step"]) == applied
