"""Controls of `sllm evaluate` on models whose answer is known: shuffled vectors, a learned bias in place of
vectors, a token model that sees sentence ends, the n-gram beside it, the loss by context length."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.model_folders import (
    BACKBONE,
    SETTINGS,
    STACK,
    VAE,
    WINDOW_TOKENS,
    save,
    small_model,
    write_jsonl,
)
from helpers.models import random_batch, small_sllm
from torch import nn
from transformers import AutoModelForCausalLM

from data_prep.common.errors import UserError
from data_prep.shards.reader import ShardSet
from data_prep.text.tokenizer import load_tokenizer
from pipeline.data.batch import build_batch
from pipeline.data.plan import BinPlan, count
from pipeline.data.windows import Span
from pipeline.evaluation import ngram
from pipeline.evaluation.context_curve import curve_figures, curve_windows
from pipeline.evaluation.controls import SHIFTS, SHUFFLES
from pipeline.evaluation.evaluate import ALONE, evaluate, format_result, score
from pipeline.evaluation.scores import Window
from pipeline.evaluation.self_check import Checker
from pipeline.models.factory import build_model, load_model
from pipeline.models.flops import batch_cores, count_operations, counted_rows
from pipeline.models.inference import to_int8
from pipeline.models.losses import LossSums
from pipeline.models.token_lm import TokenLM

LN2 = math.log(2)


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    return load_tokenizer(tiny_tokenizer)


# --- shuffled vectors -----------------------------------------------------------------------------


class MadeUp(nn.Module):
    """An SLLM whose vectors are (token of the sentence before, place), and whose nats are known: 1 for every
    token that its vector names, 3 for others (`copy`); or 1 and the distance of the vector's place (`place`);
    0 for ends."""

    config = SimpleNamespace()

    def __init__(self, reads: str):
        super().__init__()
        self.reads, self.weight = reads, nn.Parameter(torch.zeros(1))

    def sentence_vectors(self, batch):
        first_S = batch.tokens_T[torch.from_numpy(batch.cu_sentences[:-1])]
        before_S = torch.where(torch.from_numpy(batch.place_S > 0), first_S.roll(1), -1)
        return torch.stack([before_S, torch.from_numpy(batch.place_S)], 1).double()

    def forward(self, batch, vectors_Sd=None):
        own = self.sentence_vectors(batch)
        vectors_Sd = own if vectors_Sd is None else vectors_Sd
        sentence_N = batch.decoder_layout.segment_of_row
        symbols_N, targets_N = batch.decoder_symbols(-2, -3)
        named_N, place_N = vectors_Sd[sentence_N].unbind(1)
        nats_N = torch.where(named_N == targets_N, 1.0, 3.0)
        if self.reads == "place":
            nats_N = 1.0 + (place_N - own[sentence_N, 1]).abs()
        is_end_N = targets_N == -3
        nats_N = nats_N.masked_fill(is_end_N, 0.0)
        stop_S = torch.zeros(batch.sentences)
        return LossSums.collect(True, nats_N.sum(), nats_N, is_end_N, None, stop_S)


def repeated(token: int, sentences: int, donor: Span | None = None, number: int = 0) -> Window:
    """A document of sentences of two equal tokens."""
    span = Span(np.full(2 * sentences, token), np.full(sentences, 2), True)
    return Window(span, number, donor=donor)


def scored(reads: str, windows: list[Window]) -> dict:
    one_byte = SimpleNamespace(byte_lengths=np.ones(100, dtype=np.int64))
    return score(MadeUp(reads), "sllm", one_byte, windows, batch_tokens=100).figures()


def test_a_model_that_copies_from_the_vector_loses_all_by_a_shuffle():
    long, short = repeated(7, 30).span, repeated(9, 4).span
    figures = scored("copy", [repeated(7, 30, short), repeated(9, 4, long, number=1)])
    # The first sentence of a document is never named: 3 nats a token; the others 1, and 3 from other vectors.
    assert figures["bits_per_byte"] == pytest.approx((2 * 2 * 3 + 2 * 32 * 1) / 68 / LN2)
    assert figures["vector_gain"] == pytest.approx(2 * 32 * 2 / 68 / LN2)
    assert figures["shuffle_gain"] == pytest.approx(2 / LN2)
    # Within a document every sentence names the same token, but the start's vector names none.
    for shift in SHIFTS:
        there = 2 * (30 - shift) + 2 * max(0, 4 - shift)
        from_start = 2 * (1 + (shift < 4))
        assert figures[f"shift_{shift}_gain"] == pytest.approx(2 * from_start / there / LN2), shift
    low, high = figures["shuffle_gain_interval"]
    assert low == pytest.approx(high) == pytest.approx(figures["shuffle_gain"])
    # A donor of four sentences has a partner for places 1 to 3 only, on both sides.
    halves = scored("copy", [repeated(7, 30, repeated(7, 4).span), repeated(9, 4, long, number=1)])
    assert halves["shuffle_gain"] == pytest.approx(3 * 2 / 6 / LN2)


def test_a_model_that_knows_places_only_loses_nothing_by_a_shuffle():
    spans = [repeated(token, sentences).span for token, sentences in ((7, 30), (9, 24))]
    figures = scored("place", [Window(spans[0], 0, donor=spans[1]), Window(spans[1], 1, donor=spans[0])])
    assert figures["shuffle_gain"] == 0
    assert figures["vector_gain"] == pytest.approx((sum(range(30)) + sum(range(24))) / 54 / LN2)
    for shift in SHIFTS:
        assert figures[f"shift_{shift}_gain"] == pytest.approx(shift / LN2)


def test_without_partners_there_is_no_shuffle_gain():
    figures = scored("copy", [repeated(7, 3)])
    assert figures["shuffle_gain"] is None and figures["shift_20_gain"] is None
    assert figures["shuffle_gain_interval"] is None and figures["vector_gain"] > 0


def test_an_sllm_that_cannot_tell_sentences_apart_has_a_vector_gain_but_no_shuffle_gain(
    tokenizer, tiny_valid_shards, tmp_path
):
    """Its embeddings are all zero, so its vectors tell places only."""
    model = small_model("sllm", tokenizer)
    with torch.no_grad():
        norm = model.vae.encoder.fusion_norm
        norm.weight.zero_(), norm.bias.zero_()
    folder = save(model, tmp_path / "places", tokenizer)
    result = evaluate(folder, data=tiny_valid_shards, max_documents=4)
    assert abs(result["vector_gain"]) > 1e-3 and abs(result["shift_2_gain"]) > 1e-4
    assert result["shuffle_gain"] == pytest.approx(0, abs=1e-6)
    other = evaluate(
        save(small_model("sllm", tokenizer), tmp_path / "all", tokenizer),
        data=tiny_valid_shards,
        max_documents=4,
    )
    assert abs(other["shuffle_gain"]) > 1e-4
    assert "lost with the vector of another document" in format_result(other)
    assert {f"{name}_gain" for name in SHUFFLES} <= other["by_language"]["en"].keys()


# --- a learned bias in place of vectors -----------------------------------------------------------


def test_a_learned_bias_has_the_parameters_and_operations_of_vectors_and_hears_none():
    settings = {"positions": "rotary", "context_sentences": 1}
    bias, vectors = (small_sllm(condition=c, **settings) for c in ("constant", "cross_attention"))
    batch, counts = random_batch(3, documents=6), []
    for model in (bias, vectors):
        with counted_rows(model) as rows, torch.no_grad():
            nll = model(batch).target_nll_N
            other = model(batch, vectors_Sd=torch.randn(batch.sentences, 32)).target_nll_N
        assert torch.equal(nll, other) == (model is bias)
        operations = count_operations(model, rows, batch_cores(model, batch)).by_part()
        counts.append((sum(p.numel() for p in model.parameters()), operations))
    assert counts[0] == counts[1]
    for finding in Checker(bias, documents=3).run():
        assert finding.passed, finding
    bias.train()(batch).objective.backward()
    assert bias.vae.decoder.layers[0].condition.linear.weight.grad.abs().max() > 0
    to_int8(bias.eval())
    with torch.no_grad():
        one, other = (bias(batch, vectors_Sd=torch.randn(batch.sentences, 32)) for _ in range(2))
    assert torch.equal(one.target_nll_N, other.target_nll_N)


# --- a token model that sees sentence ends --------------------------------------------------------


def model_with_ends(tokenizer) -> TokenLM:
    torch.manual_seed(0)
    backbone = {**BACKBONE, "max_position_embeddings": 2 * WINDOW_TOKENS + 1}
    model = build_model("lm", VAE, backbone, tokenizer, SETTINGS, WINDOW_TOKENS, sentence_ends=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.eval()


def test_a_model_with_sentence_ends_is_hugging_faces_on_the_same_symbols(
    tokenizer, tiny_valid_shards, tmp_path
):
    folder = save(model_with_ends(tokenizer), tmp_path / "ends", tokenizer)
    assert load_model(folder).sentence_ends
    documents = list(ShardSet.open(tiny_valid_shards).documents())[:3]
    result = evaluate(folder, data=tiny_valid_shards, max_documents=3)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    nats = ends = 0.0
    for document in documents:
        windows = [[]]
        for sentence in np.split(document.tokens.astype(int), np.cumsum(document.sentence_lengths)[:-1]):
            if sum(map(len, windows[-1])) + len(sentence) > WINDOW_TOKENS:
                windows.append([])
            windows[-1].append(sentence.tolist())
        for number, window in enumerate(windows, 1):
            symbols = [tokenizer.bos_id, *(t for s in window for t in (*s, tokenizer.eos_id))]
            symbols += [tokenizer.eos_id] * (number == len(windows))
            with torch.no_grad():
                log_p = plain(torch.tensor([symbols])).logits[0, :-1].double().log_softmax(-1)
            nll = -log_p.gather(1, torch.tensor(symbols)[1:, None])[:, 0]
            nats += nll.sum().item()
            ends += nll[torch.tensor(symbols)[1:] == tokenizer.eos_id].sum().item()
    assert result["nll_nats"] == pytest.approx(nats, rel=1e-6)
    assert result["end_nll_nats"] == pytest.approx(ends, rel=1e-6)
    assert result["tokens"] == sum(len(document.tokens) for document in documents)


def test_a_model_with_sentence_ends_is_causal_packed_and_cached(tokenizer):
    for finding in Checker(model_with_ends(tokenizer), documents=3).run():
        assert finding.passed and finding.compared, finding


def test_targets_and_operations_of_sentence_ends_are_counted(tokenizer, tiny_valid_shards):
    plan = BinPlan([ShardSet.open(tiny_valid_shards)], WINDOW_TOKENS, 512, seed=1)
    bin_, model = next(plan.bins()), model_with_ends(tokenizer)
    batch = build_batch(plan.spans(bin_))
    assert len(model(batch).target_nll_N) == count([bin_], "lm", sentence_ends=True)[1]
    with counted_rows(model) as rows:
        model(batch)
    operations = count_operations(model, rows, batch_cores(model, batch))
    lengths = np.diff((batch.cu_sentences + np.arange(batch.sentences + 1))[batch.cu_documents]) + 1
    assert operations.attention == {"backbone": 2 * 2 * 32 * int((lengths * (lengths + 1) // 2).sum())}
    with pytest.raises(UserError, match="need 401 positions, but the backbone has 300"):
        build_model("lm", VAE, BACKBONE, tokenizer, SETTINGS, WINDOW_TOKENS, sentence_ends=True)


# --- the n-gram -----------------------------------------------------------------------------------


def test_the_ngram_beside_a_model_is_that_of_its_own_command(
    tokenizer, tiny_shards, tiny_valid_shards, tmp_path
):
    folder = save(small_model("lm", tokenizer), tmp_path / "lm", tokenizer)
    result = evaluate(folder, data=tiny_valid_shards, ngram=tiny_shards)
    alone = ngram.run(str(tiny_shards), str(tiny_valid_shards), 5, WINDOW_TOKENS)
    assert result["ngram_bits_per_byte"] == pytest.approx(alone["bits_per_byte"], rel=1e-9)
    assert result["ngram_trained_tokens"] == alone["trained_tokens"]
    low, high = result["ngram_bits_per_byte_interval"]
    assert low < result["ngram_bits_per_byte"] < high and "Kneser–Ney" in format_result(result)
    other = small_model("lm", tokenizer)
    assert "ngram_bits_per_byte" not in evaluate(save(other, tmp_path / "b", tokenizer), tiny_valid_shards)


# --- the loss by context length -------------------------------------------------------------------


class Remembers(nn.Module):
    """A token model for which a token costs 0.5 nats if it is in its window already, else 4."""

    config = SimpleNamespace()

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, batch):
        nats, ends = [], []
        starts = batch.cu_sentences[batch.cu_documents]
        for first, end, last in zip(starts, starts[1:], batch.document_end_D, strict=False):
            seen: set[int] = set()
            for token in batch.tokens_T[first:end].tolist():
                nats.append(0.5 if token in seen else 4.0)
                seen.add(token)
            nats += [0.0] * int(last)
            ends += [False] * int(end - first) + [True] * int(last)
        nll_N = torch.tensor(nats)
        return LossSums.collect(True, nll_N.sum(), nll_N, torch.tensor(ends))


def test_the_curve_is_that_of_a_model_with_a_known_memory():
    """A text that repeats every 60 tokens: nothing is known from 16 or 32 tokens of context (at most 9 + 4
    more), all from 64."""
    rng, documents = np.random.default_rng(0), []
    for size in (400, 250, 90):
        lengths = rng.integers(1, 6, size)
        lengths = lengths[: np.searchsorted(np.cumsum(lengths), size) + 1]
        documents.append((np.arange(lengths.sum()) % 60, lengths, "", ""))
    contexts = [16, 32, 64, 128]
    one_byte = SimpleNamespace(byte_lengths=np.ones(60, dtype=np.int64))
    windows = list(curve_windows(documents, contexts, ALONE))
    figures = curve_figures(
        score(Remembers(), "lm", one_byte, windows, batch_tokens=500, controls=False), contexts
    )
    targets = sum(
        int(length)
        for _, lengths, *_ in documents
        for start, length in zip(np.cumsum(lengths) - lengths, lengths, strict=True)
        if start >= 128
    )
    assert figures["tokens"] == figures["bytes"] == targets and figures["documents"] == 2
    found = {context: one["bits_per_byte"] * LN2 for context, one in figures["contexts"].items()}
    assert found == pytest.approx({"16": 4.0, "32": 4.0, "64": 0.5, "128": 0.5})
    lost = figures["contexts"]["32"]
    assert lost["lost"] * LN2 == pytest.approx(3.5)
    assert lost["lost_interval"] == pytest.approx([3.5 / LN2] * 2)
    seen = [0] * 4
    for window in windows:
        first = int(window.span.sentence_lengths[: window.context].sum())
        seen[window.document % 4] += sum(range(first, len(window.span.tokens)))
    means = [one["mean_context"] for one in figures["contexts"].values()]
    assert means == pytest.approx([total / targets for total in seen])
    for window in windows:  # at least the context, whole sentences, and not much more
        context = contexts[window.document % 4]
        before = int(window.span.sentence_lengths[: window.context].sum())
        assert context <= before < context + 5
        assert len(window.span.tokens) - before <= max(context // 4, 5)


@pytest.mark.parametrize("kind", ["sllm", "lm"])
def test_the_curve_of_a_real_model_scores_the_same_targets_at_every_length(
    kind, tokenizer, tiny_corpus, tmp_path
):
    folder = save(small_model(kind, tokenizer), tmp_path / kind, tokenizer)
    lines = (tiny_corpus / "valid.jsonl").read_text("utf-8").splitlines()[:4]
    text = write_jsonl(tmp_path / "text.jsonl", [json.loads(line)["content"] for line in lines])
    result = evaluate(folder, text=text, context_curve=[4, 16])
    curve = result["context_curve"]
    assert list(curve["contexts"]) == ["4", "16"] and curve["contexts"]["16"]["lost"] == 0
    assert 0 < curve["tokens"] < result["tokens"]
    assert abs(curve["contexts"]["4"]["lost"]) > 1e-4
    assert "16 tokens" in format_result(result)
    # What else is measured does not change by it.
    assert evaluate(folder, text=text)["bits_per_byte"] == result["bits_per_byte"]


@pytest.mark.parametrize("kind", ["sllm", "lm", "stack by rule"])
def test_a_block_behind_every_context_is_scored_alone(kind, tokenizer, tiny_corpus, tmp_path):
    stack = {**STACK, "ends": "rule"} if kind == "stack by rule" else None
    model = small_model("sllm" if stack else kind, tokenizer, stack=stack)
    folder = save(model, tmp_path / "model", tokenizer)
    lines = (tiny_corpus / "valid.jsonl").read_text("utf-8").splitlines()[:4]
    texts = [json.loads(line)["content"] for line in lines]
    text = write_jsonl(tmp_path / "text.jsonl", [*texts, "Short."])
    result = evaluate(folder, text=text, context_curve=[4, 64], context_block=8)
    curve = result["context_curve"]
    assert result["documents"] == curve["documents"] == 4
    assert result["bits_per_byte"] == curve["contexts"]["64"]["bits_per_byte"]
    assert abs(curve["contexts"]["4"]["lost"]) > 1e-4
    assert "64 tokens" in format_result(result)
    assert result["data_fingerprint"] == evaluate(folder, text=text)["data_fingerprint"]
    two = evaluate(folder, text=text, context_curve=[4, 64], context_block=8, context_blocks=2)
    assert two["documents"] == 4 and two["tokens"] > 1.5 * result["tokens"]
    if kind != "lm":
        assert 8 * 4 <= curve["tokens"] < (8 + 64) * 4
        return
    assert curve["tokens"] == 8 * 4 and two["tokens"] == 16 * 4
    means = [curve["contexts"][context]["mean_context"] for context in ("4", "64")]
    assert means == [4 + 3.5, 64 + 3.5]
    nats, inner = 0.0, load_model(folder).model
    for content in texts:
        ids = [tokenizer.bos_id, *tokenizer.encode(content)[60:72].tolist()]
        with torch.no_grad():
            log_probabilities = inner(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        nats -= sum(log_probabilities[at, ids[at + 1]].item() for at in range(4, 12))
    assert curve["contexts"]["4"]["bits_per_byte"] == pytest.approx(nats / LN2 / curve["bytes"], abs=1e-5)
    transformers_folder = tmp_path / "plain"
    inner.save_pretrained(transformers_folder)
    tokenizer.save(transformers_folder / "tokenizer")
    for path in (folder, transformers_folder):
        _check_contexts_without_start_symbol(path, inner, tokenizer, texts, text)


def _check_contexts_without_start_symbol(folder, inner, tokenizer, texts, text):
    options = {"context_block": 8, "context_blocks": 2, "start_symbol": False}
    result = evaluate(folder, text=text, context_curve=[1, 4, 64], **options)
    curve = result["context_curve"]
    assert result["start_symbol"] is False and curve["tokens"] == 16 * len(texts)
    assert [one["mean_context"] for one in curve["contexts"].values()] == [1 + 3.5, 4 + 3.5, 64 + 3.5]
    for context in (1, 4, 64):
        nats = 0.0
        for content in texts:
            for end in (72, 80):
                ids = tokenizer.encode(content)[end - 8 - context : end].tolist()
                with torch.no_grad():
                    log_probabilities = inner(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
                nats -= sum(
                    log_probabilities[at, ids[at + 1]].item() for at in range(context - 1, context + 7)
                )
        got = curve["contexts"][str(context)]["bits_per_byte"]
        assert got == pytest.approx(nats / LN2 / curve["bytes"], abs=1e-5)


def test_contexts_that_do_not_fit_are_refused(tokenizer, tiny_valid_shards, tmp_path):
    folder = save(small_model("lm", tokenizer), tmp_path / "lm", tokenizer)
    with pytest.raises(UserError, match=r"--context-curve 128: needs windows of up to 256 tokens"):
        evaluate(folder, data=tiny_valid_shards, context_curve=[16, 128])
    vae = save(small_model("vae", tokenizer), tmp_path / "vae", tokenizer)
    with pytest.raises(UserError, match="has no context"):
        evaluate(vae, data=tiny_valid_shards, context_curve=[16])
    short = write_jsonl(tmp_path / "short.jsonl", ["A short one."])
    with pytest.raises(UserError, match="no document is long enough"):
        evaluate(folder, text=short, context_curve=[16], context_block=8)
    for options in ({}, {"context_curve": [16]}):
        with pytest.raises(UserError, match="--no-start-symbol is for token-level models"):
            evaluate(folder, text=short, start_symbol=False, **options)
    with pytest.raises(UserError, match="is for --context-curve"):
        evaluate(folder, text=short, context_block=8)
    result = evaluate(folder, text=short, context_curve=[16])
    assert result["context_curve"] is None and "no document is long enough" in format_result(result)
