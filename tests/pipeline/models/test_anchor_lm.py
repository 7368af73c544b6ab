"""Layout `anchors`: what a row sees, its guarantees in every family, and generation with its cache."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.backbone_families import CONFIGS
from helpers.models import IDS, _wake, random_spans, small_lm
from transformers import AutoModelForCausalLM

from pipeline.data.anchor_rows import AnchorRows, random_lengths
from pipeline.data.batch import build_batch
from pipeline.evaluation.self_check import Checker
from pipeline.models.anchor_lm import AnchorCache, AnchorConfig, AnchorLM
from pipeline.models.attention import HF_ATTENTION, attention_path
from pipeline.models.factory import load_model
from pipeline.models.flops import StepArithmetic, batch_cores
from pipeline.models.token_lm import TokenLM

SETTINGS = {"segmenter": "clause", "language": "en", "max_tokens": 16}
FAMILIES = ["opt", "opt-post-norm", "llama", "qwen2", "mistral", "gpt_neox"]


def small_anchors(family: str = "llama", seed: int = 0, **changes) -> AnchorLM:
    torch.manual_seed(seed)
    sizes = {"attention_window": 5, "first_tokens": 2, "per_sentence": 2, **changes}
    config = AnchorConfig(CONFIGS[family](), sentence_settings=SETTINGS, **sizes, **IDS)
    return _wake(AnchorLM(config))


def without_anchors(model: TokenLM) -> AnchorLM:
    """Full attention, with the model's own weights."""
    sizes = {"attention_window": None, "per_sentence": 0}
    return AnchorLM(AnchorConfig(model.config, sentence_settings=SETTINGS, **sizes, **IDS), model.model)


def seen_by_definition(lengths: list[int], anchors: int, window: int, first: int) -> np.ndarray:
    """One window's rows, one pair at a time."""
    rows = [("token", 0)]  # BOS, at place 0
    for number, length in enumerate(lengths):
        rows += [("token", rows[-1][1] + 1 + n) for n in range(length)]
        if number + 1 < len(lengths):
            rows += [("anchor", rows[-1][1])] * anchors
    return np.asarray(
        [
            [
                k <= q and (kind == "anchor" or at < first or rows[q][1] - at < window)
                for k, (kind, at) in enumerate(rows)
            ]
            for q in range(len(rows))
        ]
    )


@pytest.mark.parametrize("anchors,window,first", [(1, 5, 2), (2, 3, 0), (0, 4, 1), (3, 100, 4)])
def test_a_row_sees_a_window_the_first_tokens_and_anchors(anchors, window, first):
    rng = np.random.default_rng(0)
    counts = np.asarray([7, 1, 40])
    lengths = rng.integers(1, 9, counts.sum())
    rows = AnchorRows(lengths, counts, anchors, window, first)
    parts = np.split(lengths, np.cumsum(counts)[:-1])
    expected = [seen_by_definition(part.tolist(), anchors, window, first) for part in parts]
    whole = torch.block_diag(*(torch.from_numpy(part) for part in expected)).bool()
    assert torch.equal(rows.mask, whole)
    assert rows.needed_pairs() == int(whole.sum())
    plan, keys, mask = rows.block_plan
    n, length = plan.shapes[0]
    found = torch.zeros_like(whole)
    queries = plan.source.view(n, length, 1).expand(mask[:, 0].shape)
    places = keys.view(n, 1, -1).expand(mask[:, 0].shape)
    found[queries[mask[:, 0]], places[mask[:, 0]]] = True
    assert torch.equal(found, whole)
    # Anchors take no position.
    assert rows.position_of_row[rows.token_rows].tolist() == [
        at for part in parts for at in range(part.sum() + 1)
    ]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("per_sentence", [0, 2])
def test_every_guarantee_holds_in_every_family(family, per_sentence):
    findings = Checker(small_anchors(family, per_sentence=per_sentence), documents=4, tolerance=2e-5).run()
    assert [f.check for f in findings][-1] == "cached = uncached"
    assert all(f.passed for f in findings), findings
    assert all(f.changed > 1e-3 for f in findings if f.check == "causal")


def test_paths_agree_in_values_and_gradients():
    model, batch = small_anchors().train(), build_batch(random_spans(4))
    results = []
    for path in ("bucketed", "masked"):
        model.zero_grad()
        with attention_path(path):
            losses = model(batch)
        losses.objective.backward()
        results.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert model.offset.weight.grad.abs().min() > 0
    with attention_path("flex"), torch.no_grad():
        flex = small_anchors()(batch).target_nll_N
    torch.testing.assert_close(flex, small_anchors()(batch).target_nll_N, atol=1e-5, rtol=1e-5)


def test_without_window_it_is_the_token_model():
    token_model, batch = small_lm(), build_batch(random_spans(4))
    anchors = without_anchors(token_model)
    expected = token_model(batch).target_nll_N
    torch.testing.assert_close(anchors(batch).target_nll_N, expected, atol=1e-5, rtol=1e-5)
    wide = small_anchors("opt", attention_window=1000, per_sentence=0)
    wide.tokens.model.load_state_dict(token_model.model.state_dict())
    torch.testing.assert_close(wide(batch).target_nll_N, expected, atol=1e-5, rtol=1e-5)


def test_anchors_carry_what_the_window_does_not_reach():
    span = random_spans(1)[0]
    other = replace(span, tokens=np.concatenate([span.tokens[:3][::-1], span.tokens[3:]]))
    assert len(span.tokens) > 20

    def change(**settings) -> float:
        model = small_anchors(first_tokens=0, **settings)
        one, two = (model(build_batch([s])).target_nll_N for s in (span, other))
        return float((one[-1] - two[-1]).abs())

    # Two layers of a window of 5 reach 8 tokens back.
    assert change(per_sentence=0) < 1e-6
    assert change(per_sentence=1) > 1e-5


def test_random_places_are_the_same_for_every_text():
    lengths = random_lengths(200, 5.0, 16)
    assert lengths.sum() == 200 and lengths.max() <= 16 and 3 < lengths.mean() < 7
    longer = random_lengths(300, 5.0, 16)
    assert (np.cumsum(longer)[: len(lengths) - 1] == np.cumsum(lengths)[:-1]).all()
    findings = Checker(small_anchors(places="random", mean_length=4.0), documents=4).run()
    assert {f.check for f in findings} == {"causal", "packed = single", "paths agree"}
    assert all(f.passed for f in findings), findings


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt"])
def test_a_saved_model_is_loaded_again(family, tmp_path):
    model, batch = small_anchors(family), build_batch(random_spans(3))
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert isinstance(loaded, AnchorLM)
    assert torch.equal(loaded(batch).target_nll_N, model(batch).target_nll_N)
    tied = loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert tied == model.config.backbone.tie_word_embeddings


def test_the_cache_holds_a_window_and_the_anchors():
    model = small_anchors()
    state = model.new_state(2)
    document = [[7, 8, 9, 10]] * 12
    model.read(state, np.arange(2), [document, document[:3]], ahead=0)
    cache = state.cache
    assert isinstance(cache, AnchorCache)
    assert cache.anchors.tolist() == [24, 6] and cache.lengths.tolist() == [49, 13]
    assert (
        cache.bytes == 2 * (2 + 5 + 24) * 2 * 2 * (2 * 8) * 4
    )  # rows · places · layers · (k, v) · width · fp32
    expected = model.new_state(2)
    model.read(expected, np.arange(2), [[], []])
    for number, sentence in enumerate(document):
        rows = np.arange(2) if number < 3 else np.arange(1)
        model.extend(expected, rows, [sentence] * len(rows))
    torch.testing.assert_close(state.last, expected.last, atol=1e-5, rtol=1e-5)
    for layer in range(2):
        for one, other in zip(cache._layers[layer], expected.cache._layers[layer], strict=True):
            torch.testing.assert_close(one[:, :, :7], other[:, :, :7], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(one[0, :, :31], other[0, :, :31], atol=1e-5, rtol=1e-5)


def test_operations_are_counted():
    model, batch = small_anchors(), build_batch(random_spans(4))
    (core,) = batch_cores(model, batch)
    assert core.needed == int(model.rows(batch).mask.sum()) < core.shown <= core.computed
    rows = model.rows(batch).rows
    layers = sum(w.numel() for n, w in model.named_parameters() if ".layers." in n and w.ndim == 2)
    head = model.get_output_embeddings().weight.numel()
    targets = batch.tokens + int(batch.document_end_D.sum())
    needed = layers * rows + head * targets + 2 * core.width * core.layers * core.needed
    assert StepArithmetic(model).needed(batch) == needed


def test_hugging_face_and_the_engine_write_the_same_text():
    torch.manual_seed(0)
    inner = AutoModelForCausalLM.from_config(CONFIGS["llama"](), attn_implementation=HF_ATTENTION)
    model = _wake(TokenLM(inner))
    ours = without_anchors(model)
    prompt = [IDS["bos_token_id"], 9, 8, 7, 11]
    state = ours.new_state(1)
    ours.read(state, np.zeros(1, dtype=np.int64), [[prompt[1:]]])
    ours.decode_begin(state)
    found = []
    for _ in range(20):
        found.append(int(state.logits.argmax()))
        ours.decode_step(state, found[-1])
    inputs = torch.tensor([prompt])
    out = inner.generate(inputs, do_sample=False, max_new_tokens=20, eos_token_id=None, pad_token_id=1)
    assert found == out[0, len(prompt) :].tolist()
