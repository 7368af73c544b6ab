"""Building and loading models: what does not fit together is refused, nothing is filled up silently."""

from __future__ import annotations

import shutil

import pytest
import torch
from helpers.models import opt_config, small_lm, small_sllm, small_vae
from transformers import OPTForCausalLM

from data_prep.common.errors import UserError
from data_prep.shards.reader import ShardSet
from pipeline.models.factory import build_model, load_model, save_model
from pipeline.models.folders import model_kind

VAE = {"hidden_size": 32, "layers": 1, "heads": 4}
BACKBONE = {
    "model_type": "opt",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "ffn_dim": 64,
    "max_position_embeddings": 300,
}


@pytest.fixture(scope="module")
def tokenizer(tiny_shards):
    return ShardSet.open(tiny_shards).tokenizer()


@pytest.fixture(scope="module")
def build(tokenizer):
    def build(objective="sllm", vae=VAE, backbone=BACKBONE, max_tokens=64, window_tokens=256):
        settings = {"segmenter": "clause", "language": "en", "max_tokens": max_tokens}
        return build_model(objective, vae, backbone, tokenizer, settings, window_tokens)

    return build


@pytest.mark.parametrize("objective", ["vae", "sllm", "lm"])
def test_new_models_have_the_usual_initial_scale(build, objective):
    model = build(objective)
    for name, p in model.named_parameters():
        if p.ndim == 2 and p.numel() > 2000:
            assert 0.015 < p.std().item() < 0.025, name


@pytest.mark.parametrize("objective", ["vae", "sllm", "lm"])
def test_folders_load_as_what_they_are(build, tokenizer, objective, tmp_path):
    save_model(build(objective), tmp_path, tokenizer)
    assert model_kind(load_model(tmp_path)) == objective


def test_parts_from_folders_keep_their_weights(build, tokenizer, tmp_path):
    vae, plain = build("vae"), OPTForCausalLM(opt_config(max_position_embeddings=300))
    save_model(vae, tmp_path / "vae", tokenizer)
    plain.save_pretrained(tmp_path / "opt")
    model = build(vae={"path": str(tmp_path / "vae")}, backbone={"path": str(tmp_path / "opt")})
    for key, p in vae.state_dict().items():
        assert torch.equal(model.vae.state_dict()[key], p), key
    taken = model.backbone.state_dict()
    for key, p in plain.model.state_dict().items():
        if "embed_tokens" not in key:
            assert torch.equal(taken[key], p), key
    assert not any("embed_tokens" in key for key in taken)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"window_tokens": 300}, "need 301 positions, but the backbone has 300"),
        ({"objective": "lm", "window_tokens": 300}, "need 301 positions"),
        ({"vae": {**VAE, "max_sentence_tokens": 16}}, "up to 64 tokens, but the model takes 16"),
        ({"vae": {**VAE, "vocab_size": 100}}, "vocab_size is 100"),
        ({"vae": {**VAE, "heads": 5}}, "not a multiple"),
        ({"vae": {**VAE, "heads": 0}}, "model.vae.heads must be a whole number of at least 1, not 0$"),
        ({"vae": {**VAE, "hidden_size": "wide"}}, "^model.vae.hidden_size must be .*, not 'wide'$"),
        ({"backbone": {**BACKBONE, "num_attention_heads": 5}}, "cannot be built"),
        ({"backbone": {**BACKBONE, "activation_function": "foo"}}, "cannot be built"),
        ({"backbone": {**BACKBONE, "model_type": "sllm"}}, "name a token-level model"),
        ({"backbone": {**BACKBONE, "model_type": "nonsense"}}, "nonsense"),
    ],
)
def test_settings_that_do_not_fit_are_refused(build, settings, says):
    with pytest.raises(UserError, match=says):
        build(**settings)


def test_folders_of_another_kind_are_refused(build, tokenizer, tmp_path):
    save_model(build("vae"), tmp_path / "vae", tokenizer)
    save_model(build("lm"), tmp_path / "lm", tokenizer)
    with pytest.raises(UserError, match="holds a sentence_vae, not a token-level"):
        build(backbone={"path": str(tmp_path / "vae")})
    with pytest.raises(UserError, match="holds a sentence_vae, not a token-level"):
        build("lm", backbone={"path": str(tmp_path / "vae")})
    with pytest.raises(UserError, match="holds a opt, not a sentence_vae"):
        build(vae={"path": str(tmp_path / "lm")})
    with pytest.raises(UserError, match="nothing does not exist"):
        build("lm", backbone={"path": str(tmp_path / "nothing")})


def test_weights_that_do_not_belong_to_the_config_are_refused(tmp_path):
    for name, model in {"vae": small_vae(), "sllm": small_sllm(), "lm": small_lm().model}.items():
        model.save_pretrained(tmp_path / name)
    shutil.copy(tmp_path / "vae" / "model.safetensors", tmp_path / "lm" / "model.safetensors")
    shutil.copy(tmp_path / "vae" / "model.safetensors", tmp_path / "sllm" / "model.safetensors")
    for name in ("lm", "sllm"):
        with pytest.raises(UserError, match="weights do not match its config"):
            load_model(tmp_path / name)


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_damaged_and_missing_weights_are_refused(size, tmp_path):
    small_sllm().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(tmp_path)


def test_pickled_weights_are_never_read(tmp_path):
    model = small_lm().model
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(tmp_path)


def test_scoring_without_gradients_costs_no_gradient_products(monkeypatch):
    model = small_vae()
    from helpers.models import random_batch

    calls = []
    real = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, **kwargs: (calls.append(1), real(*args, **kwargs))[1])
    with torch.no_grad():
        model(random_batch(1))
    assert not calls
    model(random_batch(1))
    assert calls


def test_shards_cut_in_another_way_are_refused_together(tiny_corpus, tiny_tokenizer, tiny_shards, tmp_path):
    from helpers.data_prep_command import data_prep

    from pipeline.training.run import open_shards

    other = ("--segmenter", "clause", "--lang", "en", "--max-tokens", "32", "--workers", "1")
    command = ("shard", "--input", tiny_corpus / "valid.jsonl", "--tokenizer", tiny_tokenizer)
    data_prep(*command, "--output", tmp_path / "other", *other)
    assert len(open_shards([str(tiny_shards), str(tiny_shards)])) == 2
    with pytest.raises(UserError, match="max_tokens 32, the training shards with 64"):
        open_shards([str(tiny_shards), str(tmp_path / "other")])
