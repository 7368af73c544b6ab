"""Compiled layers: every one of a deep model is compiled."""

from __future__ import annotations

import pytest
import torch

from pipeline.data.segments import SegmentLayout
from pipeline.models.layers import TransformerLayer
from pipeline.training import engine


def test_more_layers_than_torch_keeps_versions_of_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of a class share their code, and torch runs versions beyond its limit uncompiled."""
    limits = torch._dynamo.config
    monkeypatch.setattr(limits, "fail_on_recompile_limit_hit", True)
    monkeypatch.setattr(limits, "recompile_limit", 2)
    monkeypatch.setattr(engine, "COMPILE_BACKEND", "eager")
    layers = [TransformerLayer(8, 2, 16, 0.0) for _ in range(4)]
    engine.compile_layers(layers)
    for lengths in ([3, 4], [2, 5, 9]):
        layout = SegmentLayout(lengths)
        x = torch.randn(layout.rows, 8)
        for layer in layers:
            x = layer(x, layout, causal=True)
    assert torch.isfinite(x).all()
