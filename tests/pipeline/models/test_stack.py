"""Layout `stack`: the packed forward is the model written out, its caches roll, and `sllm check` catches a
broken mask of every path. (Backbone families: test_backbone.py; generation: test_writer.py.)"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.models import IDS, cached_scores, opt_config, random_batch, random_spans, small_stack
from transformers import AutoModel

import pipeline.models.layers
import pipeline.models.stack
from pipeline.data.batch import StackRows, build_batch, stack_rows
from pipeline.data.segments import Band
from pipeline.evaluation.self_check import Checker, check_model
from pipeline.models.attention import PATHS, attention_path, band_attention, packed_attention
from pipeline.models.kv_cache import RollingCache, attend_last
from pipeline.models.layers import rotate, rotation

WAYS = {
    "added": {"memory": 0},
    "memory": {"add_vector": False},
    "both": {},
    "none": {"memory": 0, "add_vector": False},
    "rule": {"ends": "rule"},
}


def by_hand(model, span) -> torch.Tensor:
    """float32 [T+S]: NLL of one window's symbols, row by row, with masks over the whole window."""
    config, bos, end = model.config, IDS["bos_token_id"], IDS["eos_token_id"]
    symbols, targets, border, rows = [bos], [], [0], [0]
    for number, sentence in enumerate(np.split(span.tokens, np.cumsum(span.sentence_lengths)[:-1])):
        symbols += [*sentence, *([] if config.by_rule else [bos])]
        targets += [*sentence, *([] if config.by_rule else [end])]
        border += [number] * len(sentence) + ([] if config.by_rule else [number + 1])
        rows.append(len(symbols) - 1)
    if config.by_rule and span.document_end:
        targets.append(end)
    at = torch.arange(len(symbols))
    seen = (at[:, None] >= at) & (at[:, None] - at < config.attention_window)
    turn = rotation(at, config.hidden_size // config.heads)

    def attend(q, k, v, mask):
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v).flatten(1)

    def through(layer, x):
        q, k, v = layer.attention.qkv(layer.attention_norm(x)).view(len(x), 3, config.heads, -1).unbind(1)
        q, k = (rotate(part[:, None], turn)[:, 0] for part in (q, k))
        x = x + layer.attention.out(attend(q, k, v, seen))
        return x + layer.ffn_out(F.gelu(layer.ffn_in(layer.ffn_norm(x))))

    x = model.embedding.token.weight[symbols]
    for layer in model.lower:
        x = through(layer, x)
    plain = AutoModel.from_config(config.backbone, attn_implementation="eager").eval()
    plain.load_state_dict(model.backbone.state_dict(), strict=False)
    inputs = model._into(model.vector_norm(x[rows]))
    outputs = plain(inputs_embeds=inputs[None]).last_hidden_state[0]
    border = torch.tensor(border)
    vectors = outputs if model.output_norm is None else model.output_norm(outputs)
    if config.add_vector:
        x = x + model.from_backbone(vectors[border])
    number = torch.arange(len(vectors))
    there = (number <= border[:, None]) & (number > border[:, None] - config.memory)
    for n, layer in enumerate(model.upper):
        if config.memory:
            part = model.memory[n]
            turns = (rotation(i, config.hidden_size // config.heads) for i in (border, number))
            q = part.query(part.norm(x)).view(len(x), 1, config.heads, -1)
            k, v = part.key_value(vectors).view(len(vectors), 2, config.heads, -1).split(1, 1)
            q, k = (rotate(part, turn)[:, 0] for part, turn in zip((q, k), turns, strict=True))
            x = x + part.out(attend(q, k, v[:, 0], there))
        x = through(layer, x)
    logits = model.head(model.final_norm(x[: len(targets)]))
    return F.cross_entropy(logits, torch.tensor(targets), reduction="none")


@torch.no_grad()
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("way", WAYS)
def test_the_packed_forward_is_the_model_written_out(way, path):
    for width in (32, 48):
        model = small_stack(backbone=opt_config(hidden_size=width), **WAYS[way])
        spans = random_spans(5, documents=3)
        with attention_path(path):
            packed = model(build_batch(spans)).target_nll_N
        alone = torch.cat([by_hand(model, span) for span in spans])
        torch.testing.assert_close(packed, alone, atol=2e-5, rtol=1e-5)


def test_rows_are_a_border_before_each_sentence_and_one_at_the_end():
    rows = stack_rows(np.asarray([2, 1, 3]), np.asarray([2, 0, 1]), torch.device("cpu"))
    #        B t t B t B | B | B t t t B
    assert rows.layout.lengths.tolist() == [6, 1, 5]
    assert rows.border_rows_B.tolist() == [0, 3, 5, 6, 7, 11]
    assert rows.token_rows_T.tolist() == [1, 2, 4, 8, 9, 10]
    assert rows.target_rows_N.tolist() == [0, 1, 2, 3, 4, 7, 8, 9, 10]
    assert rows.border_of_row_R.tolist() == [0, 0, 0, 1, 1, 2, 3, 4, 4, 4, 4, 5]
    memory = rows.memory(2)
    seen = [np.flatnonzero(row).tolist() for row in memory.whole_mask.numpy()]
    assert seen == [[0]] * 3 + [[0, 1]] * 2 + [[1, 2], [3]] + [[4]] * 4 + [[4, 5]]
    assert memory is rows.memory(2) and memory.needed == sum(map(len, seen))


def test_by_rule_a_sentences_last_token_is_its_border():
    rows = stack_rows(np.asarray([2, 1, 3]), np.asarray([2, 0, 1]), torch.device("cpu"), by_rule=True)
    #        B t t t | B | B t t t
    assert rows.layout.lengths.tolist() == [4, 1, 4]
    assert rows.border_rows_B.tolist() == [0, 2, 3, 4, 5, 8]
    assert rows.token_rows_T.tolist() == [1, 2, 3, 6, 7, 8]
    # The end counts from the next row on.
    assert rows.border_of_row_R.tolist() == [0, 0, 0, 1, 3, 4, 4, 4, 4]


def test_a_band_in_blocks_is_the_whole_mask():
    rng = np.random.default_rng(3)
    for rows in (1, 63, 64, 65, 300):
        last = np.sort(rng.integers(0, 40, rows))
        band = Band(np.maximum.accumulate(np.maximum(last - rng.integers(0, 9, rows), 0)), last)
        q, k, v = torch.randn(rows, 2, 8), *torch.randn(2, 45, 2, 8)
        found = []
        for path in PATHS:
            with attention_path(path):
                found.append(band_attention(q, k, v, band))
        for other in found[1:]:
            torch.testing.assert_close(other, found[0], atol=1e-6, rtol=1e-5)
        assert band.mask.numel() == band.computed_pairs(False)[1]


@torch.no_grad()
def test_the_backbone_enters_from_zero():
    torch.manual_seed(0)
    fresh = pipeline.models.stack.StackLM(small_stack().config).eval()
    batch = random_batch(2)
    before = fresh(batch).target_nll_N
    for parameter in fresh.backbone.parameters():
        parameter.add_(torch.randn_like(parameter))
    assert torch.equal(fresh(batch).target_nll_N, before)
    assert not torch.equal(
        small_stack()(batch).target_nll_N, small_stack(seed=0, memory=1)(batch).target_nll_N
    )


@torch.no_grad()
def test_replaced_vectors_reach_added_rows_and_memory():
    batch = random_batch(4)
    for way, settings in WAYS.items():
        model = small_stack(**settings)
        own = model(batch).target_nll_N
        vectors = model.sentence_vectors(batch)
        torch.testing.assert_close(model(batch, vectors_Sd=vectors).target_nll_N, own)
        other = model(batch, vectors_Sd=vectors.roll(1, 0)).target_nll_N
        assert bool((other - own).abs().max() > 1e-2) == (way != "none")
        starts = vectors[batch.cu_documents[:-1]]  # of each window
        torch.testing.assert_close(starts, starts[:1].expand_as(starts))  # depends on nothing


# --- caches ---------------------------------------------------------------------------------------


def test_a_rolling_cache_keeps_the_last_places():
    cache, rows = RollingCache(rows=2, keep=3), np.asarray([0, 1])
    written: list[list[float]] = [[], []]
    for step in range(20):
        at = rows if step % 3 else rows[:1]
        cache.roll(at)
        keys, values = cache.layer(0, torch.zeros(1, 1, 1))
        for row in at:
            keys[row, 0, cache.lengths[row]] = values[row, 0, cache.lengths[row]] = float(step)
            cache.lengths[row] += 1
            written[row].append(float(step))
        assert cache.positions.tolist() == [len(w) for w in written]
        for row in rows[: len([w for w in written if w])]:
            held = min(3, len(written[row]))
            end = cache.lengths[row]
            assert keys[row, 0, end - held : end, 0].tolist() == written[row][-held:]
    out = attend_last(
        torch.zeros(2, 1, 1, 1),
        cache.layer(0, torch.zeros(1, 1, 1)),
        torch.arange(2),
        torch.tensor(cache.lengths),
        3,
        None,
    )
    assert out.flatten().tolist() == pytest.approx([np.mean(w[-3:]) for w in written])


@torch.no_grad()
def test_positions_turn_by_the_table_as_without_it():
    model = small_stack()
    words = model.new_state(1).tokens
    for position in (0, 1, 1023, 1024, 1025, 2047, 2048):
        # Rows at different places, rows at one place, and one row: an index or a slice of the table.
        for positions in ([0, position], [position, position], [position]):
            by_table = words.turn_at(np.asarray(positions))
            for found, expected in zip(by_table, model._turn(torch.tensor(positions)), strict=True):
                every = expected[:, 0].expand(len(positions), -1, -1)
                torch.testing.assert_close(found.expand_as(every), every, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("ends", ["predicted", "rule"])
def test_tokens_are_taken_back_across_a_roll_and_sentences_read_in_any_way(ends):
    """A sentence that was fed otherwise, in part, or not at all is the one that `extend` names."""
    model, span = small_stack(ends=ends), random_spans(8, documents=1, most_sentences=40)[0]
    rng = np.random.default_rng(1)
    sentences = [rng.integers(4, 90, n).tolist() for n in rng.integers(1, 13, 30)]
    first = np.zeros(1, dtype=np.int64)
    state, expected = model.begin(), model.begin()
    for number, sentence in enumerate(sentences):
        if number % 3:
            words = model.decode_begin(state)
            for token in [*sentence[: number % 5], 5, 6, 7][:12]:
                model.decode_step(words, token)
            model.sentence_back(words, 0, number % 3)
        model.extend(state, first, [sentence])
        expected = model.new_state(1)
        model.read(expected, first, [sentences[: number + 1]])
        torch.testing.assert_close(state.hidden, expected.hidden, atol=1e-5, rtol=1e-5)
    if ends == "rule":
        for one in (state, expected):
            model.decode_begin(one)
            model.decode_step(one.tokens, 7)
    logits = [model.decode_begin(one).logits for one in (state, expected)]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)
    assert state.tokens.lower.dropped[0] > 0 and span.document_end
    if ends == "rule":
        return
    nll, stops = cached_scores(model, span)
    sums = model(build_batch([span]))
    torch.testing.assert_close(nll, sums.target_nll_N, atol=2e-5, rtol=1e-5)
    assert len(stops) == len(sums.stop_nll_S)
    with pytest.raises(ValueError, match="1 to 16 tokens"):
        model.extend(state, first, [[]])


def test_caches_hold_windows_and_one_entry_a_sentence():
    model, first = small_stack(), np.zeros(1, dtype=np.int64)
    sizes = []
    for sentences in (20, 60):
        state = model.new_state(1)
        model.read(state, first, [[[5] * 10] * sentences])
        sizes.append((state.tokens.bytes, state.cache.lengths[0]))
    assert sizes[0][0] == sizes[1][0] and [places for _, places in sizes] == [21, 61]


# --- broken masks ---------------------------------------------------------------------------------


def failed(model) -> set[str]:
    return {finding.check for finding in Checker(model, documents=3).run() if not finding.passed}


def test_sound_models_pass_and_their_caches_roll():
    for settings in WAYS.values():
        model = small_stack(**settings)
        assert check_model(model, documents=3)["passed"]
        span = Checker(model, documents=3).spans[0]
        assert len(span.tokens) + (not model.config.by_rule) * len(span.sentence_lengths) > 2 * (9 + 16)


def test_a_token_layer_without_its_causal_mask_fails(monkeypatch):
    monkeypatch.setattr(
        pipeline.models.layers,
        "packed_attention",
        lambda q, k, v, layout, causal, **settings: packed_attention(q, k, v, layout, False, dropout=0.0),
    )
    assert {"causal", "cached = uncached"} <= failed(small_stack())


def test_a_window_that_is_one_row_longer_in_caches_fails(monkeypatch):
    model = small_stack()
    new_state = model.new_state

    def longer(rows: int):
        state = new_state(rows)
        for step in state.tokens.upper_steps:
            step.window += 1
        return state

    monkeypatch.setattr(model, "new_state", longer)
    assert failed(model) == {"cached = uncached"}


def test_a_cache_that_forgets_the_window_fails(monkeypatch):
    monkeypatch.setattr(
        RollingCache, "roll", lambda cache, rows: cache.start(rows, np.zeros(1, dtype=np.int64))
    )
    assert failed(small_stack()) == {"cached = uncached"}


def test_rows_that_read_the_output_of_their_own_sentence_fail(monkeypatch):
    def ahead(rows: StackRows) -> torch.Tensor:
        last = torch.as_tensor(rows.border_of_row_R).max()
        return (torch.as_tensor(rows.border_of_row_R) + 1).clamp_max(last)

    monkeypatch.setattr(StackRows, "border_of_row", property(ahead))
    assert "causal" in failed(small_stack(memory=0))


@pytest.mark.parametrize("fault", ["ahead", "longer", "across windows"])
def test_a_memory_that_sees_too_much_fails(fault, monkeypatch):
    def memory(rows: StackRows, last: int) -> Band:
        border_R, first_R = rows.border_of_row_R, rows.first_border_R
        if fault == "ahead":
            border_R = np.minimum(border_R + 1, border_R.max())
        if fault == "across windows":
            first_R = np.zeros_like(first_R)
        last += fault == "longer"
        return Band(np.maximum(border_R - last + 1, first_R), border_R)

    monkeypatch.setattr(StackRows, "memory", memory)
    check = {"ahead": "causal", "longer": "cached = uncached", "across windows": "packed = single"}[fault]
    assert check in failed(small_stack(add_vector=False))


def test_a_memory_that_is_wrong_on_one_path_is_named(monkeypatch):
    right = Band.mask.func
    monkeypatch.setattr(Band, "mask", property(lambda band: torch.ones_like(right(band))))
    assert {"paths agree", "causal"} <= failed(small_stack())
