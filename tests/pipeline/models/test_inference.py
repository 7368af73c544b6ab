"""Weights in 8 bits: near the fp32 model in every layer and score, for every family, and refused where they
do not work.
"""

from __future__ import annotations

import pytest
import torch
from helpers.backbone_families import family_sllm
from helpers.model_folders import save, small_model
from helpers.models import random_batch

from data_prep.common.errors import UserError
from data_prep.text.tokenizer import load_tokenizer
from pipeline.cli.generate import generate_prompt, settings
from pipeline.evaluation.evaluate import evaluate
from pipeline.models.inference import Int8Head, Int8Linear, to_int8


def test_a_layer_is_rounded_by_its_scales_only():
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(96, 40), torch.randn(5, 96)
    out, exact = Int8Linear(linear)(x), linear(x)
    # An error of half a step in each factor, at random: 1/127 of the weight's and 1/63 of the input's range.
    assert 1e-4 < (out - exact).abs().max() < 0.06
    assert Int8Linear(linear)(x[None])[0].equal(out)


@pytest.mark.parametrize("family", ["opt", "llama", "qwen3"])
@torch.no_grad()
def test_a_model_in_8_bits_scores_nearly_the_same(family):
    model, batch = family_sllm(family), random_batch(3)
    exact = model(batch, want_correct=True)
    assert to_int8(model) is model and isinstance(model.vae.head, Int8Head)
    assert not [n for n, m in model.named_modules() if type(m) is torch.nn.Linear and n != "stop_head"]
    rounded = model(batch, want_correct=True)
    targets = len(exact.target_nll_N)
    assert rounded.target_correct_N.shape == exact.target_correct_N.shape
    difference = abs(float(rounded.target_nll_N.sum() - exact.target_nll_N.sum())) / targets
    assert 0 < difference < 0.1


def test_generate_and_evaluate_in_8_bits(tiny_tokenizer, tiny_valid_shards, tmp_path):
    tokenizer = load_tokenizer(tiny_tokenizer)
    folder = save(small_model("sllm", tokenizer, seed=4), tmp_path / "sllm", tokenizer)
    result = generate_prompt(folder, "The list", settings(2, temperature=1.0, seed=1, int8=True))
    assert result["int8"] and result["text"].startswith("The list") and result["tokens"] > 0
    exact = evaluate(folder, data=tiny_valid_shards, max_documents=2)
    rounded = evaluate(folder, data=tiny_valid_shards, max_documents=2, int8=True)
    assert rounded["int8"] and not exact["int8"]
    assert 0 < abs(rounded["bits_per_byte"] / exact["bits_per_byte"] - 1) < 0.02


def test_other_number_formats_are_refused():
    with pytest.raises(UserError, match="int8 is for fp32 models on a CPU, not torch.bfloat16"):
        to_int8(family_sllm("opt").to(torch.bfloat16))
