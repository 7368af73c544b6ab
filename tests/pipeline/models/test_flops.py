"""The training log's `padding_share`: counted as what runs, and small on real text."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.backbone_families import family_lm, family_sllm
from helpers.models import (
    opt_config,
    post_norm_opt_config,
    random_batch,
    small_lm,
    small_sllm,
    small_stack,
    small_vae,
)

from data_prep.shards.reader import ShardSet
from pipeline.data.batch import build_batch
from pipeline.data.plan import BinPlan
from pipeline.data.segments import SegmentLayout
from pipeline.data.windows import Span
from pipeline.models.attention import KERNELS, attention_path, choose_path
from pipeline.models.flops import (
    StepArithmetic,
    batch_cores,
    count_operations,
    counted_rows,
    row_cores,
    utilisation,
)
from pipeline.models.sentence_vae import SentenceVAE, SentenceVAEConfig
from pipeline.models.sllm import SLLM, SLLMConfig

MODELS = {
    "vae": small_vae,
    "vae-paper": lambda: small_vae(layout="paper"),
    "vae-shallow-encoder": lambda: small_vae(encoder_layers=1),
    "vae-narrow-embedding": lambda: small_vae(embedding_size=16),
    "vae-variational": lambda: small_vae(variational=True, fusion="attention"),
    "sllm": small_sllm,
    "sllm-paper": lambda: small_sllm(layout="paper"),
    "sllm-published": lambda: small_sllm(layout="paper", published_inputs=True),
    "sllm-adapters": lambda: small_sllm(backbone=post_norm_opt_config()),
    "sllm-variational": lambda: small_sllm(variational=True),
    "sllm-prefix": lambda: small_sllm(
        condition="prefix", prefix_slots=2, positions="rotary", context_sentences=2
    ),
    "vae-vectors": lambda: small_vae(fusion="attention", vectors=2, condition="prefix"),
    "sllm-qwen3": lambda: family_sllm("qwen3-narrow"),
    "stack": small_stack,
    "stack-rule": lambda: small_stack(ends="rule"),
    "stack-adapters": lambda: small_stack(backbone=post_norm_opt_config(), memory=0),
    "lm": small_lm,
    "lm-post-norm": lambda: small_lm(config=post_norm_opt_config()),
    "lm-llama": lambda: family_lm("llama"),
    "lm-window": lambda: family_lm("mistral"),
    "sllm-window": lambda: family_sllm("qwen3_window"),
}


def long_batch():
    """Documents whose sentences are too long to have a block for every length."""
    rng = np.random.default_rng(5)
    lengths = [rng.integers(1, 16, 9) for _ in range(7)]
    return build_batch([Span(rng.integers(4, 90, n.sum()), n, i % 2 == 0) for i, n in enumerate(lengths)])


@pytest.mark.parametrize("path", ["bucketed", "masked"])
@pytest.mark.parametrize("name", MODELS)
def test_the_rows_counted_are_the_rows_that_reach_each_layer(name, path):
    model, batch = MODELS[name]().train(), long_batch()
    with attention_path(path):
        padding, computed = StepArithmetic(model).count(batch)
        with counted_rows(model) as rows:
            model(batch)
        ran = count_operations(model, rows, batch_cores(model, batch))
    assert (padding, computed) == (ran.padding, ran.needed + ran.masked + ran.padding)
    assert padding > 0 or path == "bucketed"


def test_padding_is_what_the_formula_says():
    batch = build_batch([Span(np.full(9, 5), np.asarray([3, 6]), True)])
    model = small_vae(layers=1)
    with attention_path("masked"):  # every row with every row: 9² pairs and (9 + 2)²
        padding, computed = StepArithmetic(model).count(batch)
    each = 2 * 32
    assert padding == each * (81 - (9 + 36)) + each * (121 - (16 + 49))
    layer = 32 * 96 + 32 * 32 + 2 * 32 * 64
    linear = layer * 9 + layer * 11 + 32 * 32 * 2 + 32 * 97 * 11
    assert computed == linear + each * (81 + 121)


def test_a_window_costs_what_each_row_sees():
    """One window of 100 tokens and BOS; layers of full attention, of 3 rows, and of 3 in the second only."""
    batch = build_batch([Span(np.full(100, 5), np.asarray([10] * 10), False)])
    full, three = 101 * 102 // 2, 1 + 2 + 99 * 3
    for name, pairs in (("qwen3", 2 * full), ("qwen3_window", full + three)):
        operations = count_operations(family_lm(name), {}, batch_cores(family_lm(name), batch))
        assert operations.attention == {"backbone": 2 * 48 * pairs}, name
    model = family_lm("mistral", sliding_window=3)
    assert count_operations(model, {}, batch_cores(model, batch)).needed == 2 * 32 * 2 * three
    assert count_operations(model, {}, row_cores(model, 4, 101)).needed == 4 * 2 * 32 * 2 * three


def test_an_8k_bin_of_real_clauses_costs_a_125m_model_hardly_any_padding(tiny_shards):
    vae = SentenceVAEConfig(hidden_size=768, layers=1, heads=12)
    backbone = {"model_type": "opt", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
    with torch.device("meta"):
        sllm = SLLM(SLLMConfig(vae, {**backbone, "ffn_dim": 3072}))
        svae = SentenceVAE(vae)
    plan = BinPlan([ShardSet.open(tiny_shards)], 1024, 8192, seed=1)
    batch = build_batch(plan.spans(next(plan.bins())))
    assert batch.tokens > 8000 and np.diff(batch.cu_sentences).max() > 24
    for model in (sllm, svae):
        padding, computed = StepArithmetic(model).count(batch)
        assert 0 < padding < 0.001 * computed
        assert 40e6 * batch.tokens < computed < 80e6 * batch.tokens


def test_kernels_compute_no_padding(monkeypatch):
    monkeypatch.setattr("pipeline.models.flops.choose_path", lambda *a, **k: KERNELS[0])
    assert StepArithmetic(small_sllm()).count(random_batch(0))[0] == 0
    assert choose_path(SegmentLayout([3]), torch.float32, 8, True) == "bucketed"


@pytest.mark.parametrize("training", [True, False])
def test_the_path_counted_is_asked_for_with_the_dropout_that_runs(training, monkeypatch):
    """On a GPU a kernel without dropout of attention weights makes way for another path."""
    models = [
        small_vae(layout="paper", dropout=0.25),
        small_sllm(dropout=0.25, backbone=opt_config(attention_dropout=0.5)),
        small_lm(config=opt_config(attention_dropout=0.5)),
    ]
    for model in models:
        counted, ran = [], []
        for module, seen in (("flops", counted), ("attention", ran)):
            monkeypatch.setattr(
                f"pipeline.models.{module}.choose_path",
                lambda device, dtype, width, requires_grad, dropout=0.0, seen=seen: (
                    seen.append((width, dropout)),
                    "bucketed",
                )[1],
            )
        model.train(training)
        StepArithmetic(model).count(random_batch(0))
        model(random_batch(0))
        assert set(counted) == set(ran)
        assert any(dropout for _, dropout in ran) == training


def test_utilisation_is_known_where_the_peak_is(monkeypatch):
    assert utilisation(1e12, 1.0, torch.device("cpu")) is None
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert utilisation(989e12, 4.0, torch.device("cuda")) == pytest.approx(0.5)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA H100 PCIe")
    assert utilisation(756e12, 4.0, torch.device("cuda")) == pytest.approx(0.5)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "Unheard-of 1")
    assert utilisation(1e12, 1.0, torch.device("cuda")) is None
