"""The published system's leak, demonstrated: a backbone without a causal mask sees the sentence that it is to
predict (docs/reproduction.md). On tokens that nothing can predict, it seems to predict them.

`sllm check` refuses such a model: `test_self_check.py::test_backbone_without_a_causal_mask_fails` finds an
untrained one, and here it finds the one that the leak has trained.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from helpers.models import opt_config, small_sllm

import pipeline.models.attention
from pipeline.data.batch import Batch, build_batch
from pipeline.data.windows import Span
from pipeline.evaluation.self_check import check_model
from pipeline.models.attention import attention_path, packed_attention

SYMBOLS = 8  # equally likely, each drawn for itself: no model can be below ln 8 nats a token


def draw(rng: np.random.Generator, documents: int) -> Batch:
    """Documents of four sentences of two i.i.d. tokens."""
    return build_batch([Span(4 + rng.integers(0, SYMBOLS, 8), np.full(4, 2), True) for _ in range(documents)])


def backbone_sees_everything(q, k, v, layout, causal, *args, **kwargs):
    """The backbone's attention as the published code runs it: without a mask. The sentence decoder
    has its attention from `pipeline.models.layers` and stays causal."""
    return packed_attention(q, k, v, layout, False, *args, **kwargs)


def train(steps: int = 90) -> tuple[torch.nn.Module, float]:
    """A small SLLM, and its nats per token on documents that it has never seen."""
    rng = np.random.default_rng(0)
    model = small_sllm(
        vocab_size=4 + SYMBOLS, layers=1, condition_range=0.02, backbone=opt_config(num_hidden_layers=1)
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        batch = draw(rng, 64)
        optimizer.zero_grad()
        (model(batch).objective / batch.tokens).backward()
        optimizer.step()
    unseen = draw(rng, 256)
    with torch.no_grad():
        return model, (model.eval()(unseen).token_nll / unseen.tokens).item()


def test_only_a_backbone_that_sees_the_future_beats_the_entropy_floor(monkeypatch):
    floor = math.log(SYMBOLS)
    with attention_path("bucketed"):
        sound, causal = train()
        assert floor - 0.01 < causal < floor + 0.10, causal
        assert check_model(sound)["passed"]
        monkeypatch.setattr(pipeline.models.attention, "packed_attention", backbone_sees_everything)
        leaking, seen = train()
    assert seen < floor - 1.0, f"{seen:.2f}: it should read the sentence that it is asked to predict"
    report = check_model(leaking)
    assert not report["passed"]
    failed = {check["check"] for check in report["checks"] if not check["passed"]}
    assert "causal" in failed and "cached = uncached" in failed
