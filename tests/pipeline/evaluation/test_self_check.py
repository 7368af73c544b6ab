"""`sllm check` passes on sound models of every kind, and really fails on broken ones."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.model_folders import BACKBONE, save, small_model

import pipeline.models.attention
import pipeline.models.layers
from data_prep.common.errors import UserError
from data_prep.text.tokenizer import load_tokenizer
from pipeline.evaluation.self_check import Checker, check_folder, check_model, format_report
from pipeline.models.attention import PATHS, forced_path, packed_attention
from pipeline.models.kv_cache import CachedStep
from pipeline.models.losses import LossSums

KINDS = ("sllm", "vae", "lm")


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    return load_tokenizer(tiny_tokenizer)


@pytest.fixture(scope="module")
def models(tokenizer):
    return {kind: small_model(kind, tokenizer) for kind in KINDS}


def failed(report: dict) -> set[str]:
    return {f"{check['check']} {check['path']}" for check in report["checks"] if not check["passed"]}


@pytest.mark.parametrize("kind", KINDS)
def test_sound_models_pass(kind, models, tokenizer, tmp_path):
    report = check_folder(save(models[kind], tmp_path / kind, tokenizer))
    assert report["kind"] == kind and report["passed"], format_report(report)
    assert "all checks passed" in format_report(report)
    causal = [check for check in report["checks"] if check["check"] == "causal"]
    assert {check["path"] for check in causal} == set(PATHS)
    for check in report["checks"]:
        assert check["max_difference"] <= 1e-5 and check["compared"] > 50
    # The changes do change what comes after them: the check compares live scores, not constants.
    assert all(check["changed"] > 1e-2 for check in causal)


def test_kernels_that_run_here_are_checked_and_the_others_named(models, monkeypatch):
    checker = Checker(models["sllm"], documents=2)
    findings = checker.run_kernels()  # on CPUs flex alone
    assert {finding.path for finding in findings} == {"flex", "bucketed = flex"}
    assert all(finding.passed and finding.compared for finding in findings)
    assert set(checker.not_checked) == {"varlen", "flash_attn"}
    assert "CUDA devices only" in checker.not_checked["varlen"]

    def leaky(q, k, v, layout, causal, *args, **kwargs):
        return packed_attention(q, k, v, layout, causal and forced_path() != "flex", *args, **kwargs)

    monkeypatch.setattr(pipeline.models.attention, "packed_attention", leaky)
    assert not all(finding.passed for finding in checker.run_kernels())


@pytest.mark.parametrize("kind", KINDS)
def test_sound_models_pass_in_bf16(kind, tokenizer, tmp_path):
    folder = save(small_model(kind, tokenizer), tmp_path / kind, tokenizer)
    report = check_folder(folder, documents=2, device="cpu", dtype="bf16")
    assert report["passed"] and report["tolerance"] == 0.05, format_report(report)
    assert max(check["max_difference"] for check in report["checks"]) > 1e-5  # it did compute in bf16


def test_post_norm_backbone_passes(tokenizer, monkeypatch):
    monkeypatch.setitem(BACKBONE, "do_layer_norm_before", False)
    assert check_model(small_model("sllm", tokenizer))["passed"]


def leaky_attention(q, k, v, layout, causal, *args, **kwargs):
    """What the public reference does: the mask is forgotten."""
    return packed_attention(q, k, v, layout, False, *args, **kwargs)


def test_backbone_without_a_causal_mask_fails(models, monkeypatch):
    monkeypatch.setattr(pipeline.models.attention, "packed_attention", leaky_attention)
    for kind in ("sllm", "lm"):
        report = check_model(models[kind])
        assert {f"causal {path}" for path in PATHS} <= failed(report) and not report["passed"]
        assert "cached = uncached cached" in failed(report)
        assert "FAIL" in format_report({"model": kind, **report})


def test_decoder_without_a_causal_mask_fails(models, monkeypatch):
    monkeypatch.setattr(pipeline.models.layers, "packed_attention", leaky_attention)
    assert {f"causal {path}" for path in PATHS} <= failed(check_model(models["sllm"]))
    # A SentenceVAE's encoder sees the whole sentence anyway: there the leak shows in generation.
    assert failed(check_model(models["vae"])) == {"cached = uncached cached"}


def test_a_leak_on_one_path_only_is_named(models, monkeypatch):
    def leaky_when_masked(q, k, v, layout, causal, *args, **kwargs):
        return packed_attention(
            q, k, v, layout, causal and pipeline.models.attention._path != "masked", *args, **kwargs
        )

    monkeypatch.setattr(pipeline.models.attention, "packed_attention", leaky_when_masked)
    found = failed(check_model(models["sllm"]))
    assert (
        "causal masked" in found
        and "causal bucketed" not in found
        and "paths agree bucketed = tiles = masked" in found
    )


def test_attention_across_documents_fails(models, monkeypatch):
    monkeypatch.setattr(
        pipeline.models.attention.SegmentLayout,
        "block_mask",
        property(lambda layout: torch.ones(layout.rows, layout.rows, dtype=torch.bool)),
    )
    for kind in KINDS:
        found = failed(check_model(models[kind]))
        assert "packed = single masked" in found and "packed = single bucketed" not in found


def test_a_decoder_that_conditions_on_its_own_sentence_fails(models, monkeypatch):
    """The next sentence's own position instead of the one before it: the classical off-by-one leak."""

    def forward(self, batch, **kwargs):
        own_rows_S = batch.predicting_row_S + 1
        objective, *scores = self.vae.decode_loss(batch, self._out_of(self.contextualise(batch)[own_rows_S]))
        return LossSums.collect(batch.scored, objective, *scores, torch.zeros(batch.sentences))

    monkeypatch.setattr(type(models["sllm"]), "forward", forward)
    assert {f"causal {path}" for path in PATHS} <= failed(check_model(models["sllm"]))


def test_a_cache_that_forgets_fails(models, monkeypatch):
    attend = CachedStep.attend

    def forgetful(self, layer, q, k, v, *args):
        out = attend(self, layer, q, k, v, *args)
        for stored in self._cache.layer(layer, k):
            stored.zero_()
        return out

    monkeypatch.setattr(CachedStep, "attend", forgetful)
    assert failed(check_model(models["sllm"])) == {"cached = uncached cached"}


def test_scores_that_are_no_numbers_fail(tokenizer):
    model = small_model("lm", tokenizer)
    with torch.no_grad():
        model.model.get_output_embeddings().weight[0, 0] = math.nan
    report = check_model(model)
    assert not report["passed"] and all(math.isfinite(check["max_difference"]) for check in report["checks"])


def test_documents_depend_on_the_seed_only(models):
    first, again, other = (Checker(models["sllm"], seed=seed).spans for seed in (1, 1, 2))
    assert all((a.tokens == b.tokens).all() for a, b in zip(first, again, strict=True))
    assert any(
        len(a.tokens) != len(b.tokens) or (a.tokens != b.tokens).any()
        for a, b in zip(first, other, strict=True)
    )


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="config.json"):
        check_folder(tmp_path)
