"""Planning: every window exactly once an epoch, in an order that (seed, epoch) alone decide, within the
budget."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import numpy as np
import pytest

from data_prep.errors import UserError
from data_prep.shards import Shard, ShardSet
from pipeline.batches import build_batch
from pipeline.bins import LOOK_AHEAD, BinPlan, cut_documents, cut_windows, document_spans, pack


@pytest.fixture(scope="module")
def shards(tiny_shards):
    return ShardSet.open(tiny_shards)


def plan(shards, seed=1, window_tokens=128, bin_tokens=1024, **kwargs) -> BinPlan:
    return BinPlan([shards], window_tokens, bin_tokens, seed, **kwargs)


def test_windows_are_whole_sentences_and_lose_nothing():
    rng = np.random.default_rng(0)
    for _ in range(50):
        lengths = rng.integers(1, 33, rng.integers(1, 60))
        windows = list(cut_windows(lengths, 64))
        assert windows[0][0] == 0 and windows[-1][1] == len(lengths)
        assert all(a[1] == b[0] for a, b in zip(windows, windows[1:], strict=False))
        sizes = [int(lengths[first:end].sum()) for first, end in windows]
        assert max(sizes) <= 64
        for (_, end), size in zip(windows[:-1], sizes, strict=False):
            assert size + lengths[end] > 64, "a window was closed although the next sentence still fitted"


def test_documents_are_cut_together_as_they_are_one_by_one():
    rng = np.random.default_rng(1)
    sizes = rng.integers(1, 60, 40)
    lengths = rng.integers(1, 33, sizes.sum()).astype(np.uint16)
    document, first, end = cut_documents(lengths, sizes, 64)
    starts = np.cumsum(sizes) - sizes
    expected = [
        (d, start + a, start + b)
        for d, start in enumerate(starts)
        for a, b in cut_windows(lengths[start : start + sizes[d]], 64)
    ]
    assert list(zip(document, first, end, strict=True)) == expected


def best_fit(sizes, budget):
    """The bins of `pack`, found by looking at every open bin."""
    opened, closed = [], []
    for n, size in enumerate(sizes):
        room = [budget - sum(sizes[m] for m in members) for members in opened]
        fitting = [k for k, left in enumerate(room) if left >= size]
        if not fitting and len(opened) == LOOK_AHEAD:
            closed.append(opened.pop(room.index(min(room))))
        if fitting:
            opened[min(fitting, key=lambda k: room[k])].append(n)
        else:
            opened.append([n])
        closed += [members for members in opened if sum(sizes[m] for m in members) == budget]
        opened = [members for members in opened if sum(sizes[m] for m in members) < budget]
    return closed + opened


@pytest.mark.parametrize("most", [20, 60, 100])
def test_packing_is_best_fit_among_a_bounded_number_of_open_bins(most):
    sizes = np.random.default_rng(most).integers(1, most + 1, 700).tolist()
    assert list(pack(sizes, 100)) == best_fit(sizes, 100)


def test_documents_that_fit_a_window_need_the_index_only(shards, monkeypatch):
    read = []
    real = Shard.sentence_lengths_of
    monkeypatch.setattr(
        Shard, "sentence_lengths_of", lambda self, rows: read.append(rows.copy()) or real(self, rows)
    )
    monkeypatch.setattr(Shard, "sentence_lengths", lambda *_: pytest.fail("read one by one"))
    for _ in plan(shards, window_tokens=400).bins(epochs=1):
        pass
    tokens = shards.shard(0).index["tokens"]
    assert len(shards) == len(read) == 1 and 0 < len(read[0]) < len(tokens)
    assert np.array_equal(read[0], np.flatnonzero(tokens > 400))


def test_a_sentence_longer_than_the_window_is_refused():
    with pytest.raises(UserError, match="does not fit a window of 16"):
        list(cut_windows(np.array([4, 17]), 16))


def test_an_epoch_holds_every_token_exactly_once(shards):
    bins = list(plan(shards).bins(epochs=1))
    assert [b.number for b in bins] == list(range(len(bins)))
    assert all(b.tokens <= 1024 for b in bins)
    covered = Counter()
    for b in bins:
        for w in b.windows:
            sentences = range(w["first_sentence"], w["first_sentence"] + w["sentences"])
            covered.update((w["shard"], w["document"], s) for s in sentences)
    expected = Counter()
    for i in range(len(shards)):
        for n, row in enumerate(shards.shard(i).index):
            expected.update((i, n, s) for s in range(int(row["sentences"])))
    assert covered == expected
    totals = shards.manifest["totals"]
    assert sum(b.tokens for b in bins) == totals["tokens"]
    assert sum(b.sentences for b in bins) == totals["sentences"]
    assert sum(b.document_ends for b in bins) == totals["documents"]


def test_bins_are_well_filled(shards):
    bins = list(plan(shards).bins(epochs=1))
    # All but the bins that were still open at the epoch's end.
    filled = np.array(sorted((b.tokens for b in bins), reverse=True)[: len(bins) * 9 // 10])
    assert filled.mean() > 0.97 * 1024


def test_the_order_is_a_function_of_seed_and_epoch(shards):
    def first(seed, epoch):
        return [b.windows.tolist() for b in plan(shards, seed).bins(epoch=epoch, epochs=1)]

    assert first(1, 0) == first(1, 0)
    assert first(1, 0) != first(2, 0)
    assert first(1, 0) != first(1, 1)


def test_the_stream_goes_on_from_any_position(shards):
    whole = list(islice(plan(shards).bins(), 400))
    assert whole[-1].epoch >= 1, "the stream should have gone into another epoch"
    for at in (0, 1, 17, 399):
        again = plan(shards).bins(*((whole[at - 1].next_position) if at else (0, 0)))
        assert next(again) == whole[at]


def test_spans_are_the_documents_text(shards):
    p = plan(shards)
    tokenizer = shards.tokenizer()
    for b in islice(p.bins(), 5):
        for w, span in zip(b.windows, p.spans(b), strict=True):
            document = shards.shard(w["shard"]).document(w["document"])
            first, end = w["first_token"], w["first_token"] + w["tokens"]
            assert np.array_equal(span.tokens, document.tokens[first:end])
            first, end = w["first_sentence"], w["first_sentence"] + w["sentences"]
            assert np.array_equal(span.sentence_lengths, document.sentence_lengths[first:end])
            assert int(span.sentence_lengths.sum()) == len(span.tokens) == w["tokens"]
            assert span.document_end == (end == len(document.sentence_lengths))
            tokenizer.decode(span.tokens).encode("utf-8")  # whole characters
        batch = build_batch(p.spans(b))
        assert (batch.tokens, batch.sentences, batch.documents) == (b.tokens, b.sentences, len(b.windows))
        assert b.targets("sllm") == batch.tokens + batch.sentences
        assert b.targets("lm") == batch.tokens + int(batch.document_end_D.sum())


def test_document_spans_put_the_document_together_again(shards):
    document = max(islice(shards.documents(), 50), key=lambda d: len(d.tokens))
    spans = list(document_spans(document.tokens, document.sentence_lengths, 128))
    assert len(spans) > 1
    assert np.array_equal(np.concatenate([s.tokens for s in spans]), document.tokens)
    assert [s.document_end for s in spans] == [False] * (len(spans) - 1) + [True]


def test_impossible_settings_are_refused(shards):
    with pytest.raises(UserError, match="larger than"):
        plan(shards, window_tokens=2048)
