"""Planning: every window exactly once an epoch, in an order that (seed, epoch) alone decide, within the
budget."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from helpers.data_prep_command import data_prep

from data_prep.common.errors import UserError
from data_prep.shards.reader import Shard, ShardSet
from pipeline.data.batch import build_batch
from pipeline.data.plan import LOOK_AHEAD, BinPlan, Consumed, Position, count, pack
from pipeline.data.windows import cut_documents, cut_windows, document_spans


@pytest.fixture(scope="module")
def shards(tiny_shards):
    return ShardSet.open(tiny_shards)


@pytest.fixture(scope="module")
def many_shards(tiny_corpus, tiny_tokenizer, tmp_path_factory):
    """The tiny corpus in seven shards or more."""
    folder = tmp_path_factory.mktemp("many") / "shards"
    settings = ("--segmenter", "clause", "--lang", "en", "--workers", "1", "--shard-documents", "24")
    data_prep(
        "shard",
        "--input",
        tiny_corpus / "train.jsonl",
        "--output",
        folder,
        "--tokenizer",
        tiny_tokenizer,
        *settings,
    )
    return ShardSet.open(folder)


@pytest.fixture
def small_parts(monkeypatch):
    """Parts so small that a tiny group has some."""
    monkeypatch.setattr("pipeline.data.plan.PART_WINDOWS", 50)
    return 50


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
    for _ in plan(shards, window_tokens=400).epoch():
        pass
    tokens = shards.shard(0).index["tokens"]
    assert len(shards) == len(read) == 1 and 0 < len(read[0]) < len(tokens)
    assert np.array_equal(read[0], np.flatnonzero(tokens > 400))


def test_no_documents_are_no_windows():
    nothing = np.empty(0, np.int64)
    assert [len(column) for column in cut_documents(nothing, nothing, 64)] == [0, 0, 0]


def test_a_sentence_longer_than_the_window_is_refused():
    with pytest.raises(UserError, match="does not fit a window of 16"):
        list(cut_windows(np.array([4, 17]), 16))


@pytest.mark.parametrize("shards_at_once", [2, 16])
def test_an_epoch_holds_every_token_exactly_once(many_shards, shards_at_once, small_parts):
    bins = list(plan(many_shards, shards_at_once=shards_at_once).epoch())
    groups = -(-len(many_shards) // shards_at_once)
    assert {b.place.group for b in bins} == set(range(groups)) and (groups > 2) == (shards_at_once == 2)
    for b, following in zip(bins, bins[1:], strict=False):
        assert b.next == following.place
    assert bins[0].place == (0, 0, 0, 0) and bins[-1].next == (1, 0, 0, 0)
    assert max(b.place.part for b in bins) > 1
    assert all(b.tokens <= 1024 for b in bins)
    covered = Counter()
    for b in bins:
        for w in b.windows:
            sentences = range(w["first_sentence"], w["first_sentence"] + w["sentences"])
            covered.update((w["shard"], w["document"], s) for s in sentences)
    expected = Counter()
    for i in range(len(many_shards)):
        for n, row in enumerate(many_shards.shard(i).index):
            expected.update((i, n, s) for s in range(int(row["sentences"])))
    assert covered == expected
    totals = many_shards.manifest["totals"]
    assert sum(b.tokens for b in bins) == totals["tokens"]
    assert sum(b.sentences for b in bins) == totals["sentences"]
    assert sum(b.document_ends for b in bins) == totals["documents"]
    assert count(bins, "sllm") == (totals["tokens"], totals["tokens"] + totals["sentences"])
    assert count(bins, "lm") == (totals["tokens"], totals["tokens"] + totals["documents"])


def test_bins_are_well_filled(shards):
    bins = list(plan(shards).epoch())
    # All but the bins that were still open at the epoch's end.
    filled = np.array(sorted((b.tokens for b in bins), reverse=True)[: len(bins) * 9 // 10])
    assert filled.mean() > 0.97 * 1024


def test_the_order_is_a_function_of_seed_epoch_and_source(shards):
    def first(seed, epoch, source=0):
        made = BinPlan([shards, shards], 128, 1024, seed, weights=[1, 1])
        return [
            b.windows[["shard", "document", "first_sentence"]].tolist() for b in made.epoch(epoch, source)
        ]

    assert first(1, 0) == first(1, 0)
    assert first(1, 0) != first(2, 0)
    assert first(1, 0) != first(1, 1)
    assert first(1, 0) != first(1, 0, source=1)


def test_other_shards_share_a_group_in_every_epoch(many_shards):
    made = plan(many_shards, shards_at_once=2)
    groups = []
    for epoch in range(3):
        together: dict[int, set] = {}
        for b in made.epoch(epoch):
            together.setdefault(b.place.group, set()).update(b.of["shard"].tolist())
        groups.append([sorted(one) for one in together.values()])
        assert sorted(sum(groups[-1], [])) == list(range(len(many_shards)))
    assert groups[0] != groups[1] != groups[2] != groups[0]


def test_a_document_as_long_as_a_window_is_one(shards):
    sizes = np.unique(shards.shard(0).index["tokens"])
    size = int(sizes[len(sizes) // 2])
    totals = shards.manifest["totals"]
    for window_tokens in (size - 1, size, size + 1):
        bins = list(plan(shards, window_tokens=window_tokens, bin_tokens=2 * size).epoch())
        assert sum(b.tokens for b in bins) == totals["tokens"]
        assert sum(b.document_ends for b in bins) == totals["documents"]
        whole = [w for b in bins for w in b.windows if w["tokens"] == size and w["document_end"]]
        assert bool(len([w for w in whole if w["first_sentence"] == 0])) == (window_tokens >= size)


def test_the_stream_goes_on_from_any_position(many_shards, small_parts):
    def made():
        return BinPlan([many_shards, many_shards], 128, 1024, 1, weights=[3, 1], shards_at_once=2)

    whole = list(islice(made().bins(), 900))
    assert max(b.place.epoch for b in whole) >= 1, "the stream should have gone into another epoch"
    assert len({(b.place.epoch, b.place.group) for b in whole}) > 3
    for at in (0, 1, 17, 400, 899):
        position = made().start().after(whole[:at])
        position = Position.from_json(json.loads(json.dumps(position.to_json())))
        assert sum(position.taken) == at
        assert next(made().bins(position)) == whole[at]


def test_going_on_late_in_an_epoch_reads_one_group_and_packs_one_part(many_shards, small_parts, monkeypatch):
    made = plan(many_shards, shards_at_once=2)
    late = list(made.epoch())[-3]
    assert late.place.group >= 2 and late.place.part >= 1
    packed = []
    monkeypatch.setattr(
        "pipeline.data.plan.pack", lambda sizes, budget: packed.append(len(sizes)) or pack(sizes, budget)
    )
    opened = set()
    real = ShardSet.shard
    monkeypatch.setattr(ShardSet, "shard", lambda self, i: opened.add(i) or real(self, i))
    assert next(made.bins(Position((0,), (late.place,)))) == late
    assert opened == set(late.of["shard"].tolist()) and len(opened) <= 2
    assert len(packed) == 1 and packed[0] <= small_parts


@pytest.mark.parametrize("weights", [[0.7, 0.3], [1, 1], [5, 2, 1, 1], [0.1, 0.2, 0.7], [1000, 1]])
def test_every_source_gets_its_share_at_every_moment(shards, weights):
    made = BinPlan([shards] * len(weights), 128, 1024, 1, weights=weights)
    taken = np.zeros(len(weights))
    for n, b in enumerate(islice(made.bins(), 600), 1):
        taken[b.source] += 1
        assert set(b.windows["shard_set"]) == {b.source}
        assert np.abs(taken - n * np.asarray(weights) / sum(weights)).max() < len(weights) - 0.99


def test_one_source_has_the_order_of_no_weights(shards):
    weighted = BinPlan([shards], 128, 1024, 1, weights=[0.3])
    assert list(islice(weighted.bins(), 50)) == list(islice(plan(shards).bins(), 50))


def test_consumed_bins_are_one_range_unless_one_is_skipped_or_repeated(many_shards, small_parts):
    made = BinPlan([many_shards, many_shards], 128, 1024, 1, weights=[3, 1], shards_at_once=2)
    bins = list(islice(made.bins(), 900))
    consumed = Consumed(2)
    for at in range(0, 900, 7):
        consumed.add(bins[at : at + 7])
    end = made.start().after(bins).places
    assert consumed.ranges == [[((0, 0, 0, 0), end[0])], [((0, 0, 0, 0), end[1])]]
    assert Consumed.from_json(json.loads(json.dumps(consumed.to_json()))) == consumed

    skipped = Consumed(2)
    skipped.add(bins[:300] + bins[301:])
    assert sorted(map(len, skipped.ranges)) == [1, 2]
    skipped.add([bins[300]])
    assert skipped == consumed
    skipped.add([bins[500]])
    assert sorted(map(len, skipped.ranges)) == [1, 2]


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
