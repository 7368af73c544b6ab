"""`sllm benchmark counts`: kernels, host waits and uploads of a training step on one GPU do not grow."""

from __future__ import annotations

import pytest
import torch
from helpers import ranks

from pipeline.costs.counts import DeviceCounts, forward_backward
from pipeline.costs.sized_recipe import sized_recipe
from pipeline.models import attention

TOKENS = 16384


@pytest.mark.parametrize("recipe", ["sllm-125m-h1", "default-stack", "default-lm"])
def test_forward_and_backward_wait_for_nothing(recipe: str) -> None:
    upload, step = forward_backward(sized_recipe(recipe), TOKENS)
    assert (upload.uploads, upload.waits) == (1, 0)
    assert (step.uploads, step.waits) == (0, 0)
    # Without varlen attention (torch before 2.11) a block for every length takes its place.
    if recipe == "sllm-125m-h1" and attention._varlen_attn():
        assert step.kernels <= 1100


@pytest.mark.launch
def test_an_update_under_zero1_is_a_few_kernels_and_waits(pool: ranks.RankPool) -> None:
    [(gradients, kernels, waits)] = pool.run(1, ranks.count_update, "sllm-125m-h1", "zero1")
    assert kernels <= 100 and waits <= 4
    assert gradients <= 2.5 * 234  # of as many weights


def test_counts_are_those_of_the_operators() -> None:
    x = torch.ones(4, 8, device="meta", requires_grad=True)
    with DeviceCounts() as mode:
        (x.t().reshape(-1)[3:] * 2).sum().backward()  # a copy, a product, a sum; their gradients
        torch.ones(3).to("meta")
        torch.ones(3).add_(1)
    counted = mode.counted
    assert counted.operators["aten::mul"] == 2 and counted.operators["aten::clone"] == 1
    assert (counted.uploads, counted.waits) == (1, 1)
    with DeviceCounts(host=True) as mode:
        assert torch.ones(3).sum().item() == 3
    assert mode.counted.waits == 1 and mode.counted.kernels == 2  # ones and sum
