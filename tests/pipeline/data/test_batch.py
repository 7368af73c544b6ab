"""What a batch tells the models to read and to predict, and its digest, which `sllm audit` compares."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from helpers.models import random_spans

from pipeline.data.batch import build_batch, empty_batch
from pipeline.data.windows import Span


def span(tokens: list[int], lengths: list[int], end: bool = True) -> Span:
    return Span(np.asarray(tokens), np.asarray(lengths), end)


def test_the_digest_covers_everything_that_a_model_reads() -> None:
    """What differs is a token, where sentences or windows end, or whether a document ends."""
    tokens = [5, 6, 7, 8]
    spans = [
        [span(tokens, [2, 2])],
        [span([5, 6, 7, 9], [2, 2])],
        [span([6, 5, 7, 8], [2, 2])],
        [span(tokens, [1, 3])],
        [span(tokens, [4])],
        [span(tokens, [2, 2], end=False)],
        [span([5, 6], [2]), span([7, 8], [2])],  # the same sentences in two windows
        [span([5, 6], [2], end=False), span([7, 8], [2])],
        [span([5, 6], [2]), span([7, 8], [2], end=False)],
        [span([5, 6], [2], end=False), span([7, 8], [2], end=False)],
        # The same number of windows and the same ends; only the border moves.
        [span(tokens[:1], [1]), span(tokens[1:], [1, 2])],
        [span(tokens[:2], [1, 1]), span(tokens[2:], [2])],
    ]
    digests = [build_batch(one).digest() for one in spans]
    assert len(set(digests)) == len(spans)
    assert build_batch(spans[0]).digest() == digests[0]


BOS, END = 1, 2


def looped(spans: list[Span], slots: int, context: int) -> dict[str, list]:
    """What a batch's index arrays mean, one row after another."""
    found: dict[str, list] = defaultdict(list)
    sentences = 0  # of the windows before
    for one in spans:
        start = len(found["backbone_source"])  # the window's first row in the backbone
        found["backbone_source"].append(0)
        parts = np.split(one.tokens, np.cumsum(one.sentence_lengths)[:-1])
        first_row = len(found["positions"])
        for number, part in enumerate(parts):
            found["backbone_source"].append(1 + sentences + number)
            found["predicting"].append(start + number)
            found["place"].append(number)
            found["stop"].append(float(one.document_end and number == len(parts) - 1))
            found["inputs"] += [BOS, *part]
            found["targets"] += [*part, END]
            rows = slots + 1 + len(part)
            at = len(found["symbols"])
            found["symbols"] += [BOS] * slots + [BOS, *part]
            found["own_rows"] += range(at + slots, at + rows)
            found["slot_rows"] += range(at, at + slots)
            found["positions"] += [r - (first_row if context else at) for r in range(at, at + rows)]
            seen = [len(other) + 1 + slots for other in parts[max(0, number - context) : number]]
            found["wide"] += range(at - sum(seen), at + rows)
            found["own_places"] += range(len(found["wide"]) - rows, len(found["wide"]))
            found["span_lengths"].append(sum(seen) + rows)
        found["lm_inputs"] += [BOS, *one.tokens]
        rows = len(found["lm_inputs"]) - len(one.tokens) - 1 + np.arange(len(one.tokens) + one.document_end)
        found["lm_rows"] += rows.tolist()
        found["lm_targets"] += [*one.tokens, *[END] * one.document_end]
        sentences += len(parts)
    return found


@pytest.mark.parametrize("slots", [0, 2])
@pytest.mark.parametrize("context", [0, 1, 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_indices_are_those_of_loops_over_windows_and_sentences(slots, context, seed) -> None:
    """Windows that end their document and others, some of one sentence, in one batch."""
    spans = [*random_spans(seed, documents=5), *random_spans(seed + 9, documents=3, most_sentences=1)]
    batch, expected = build_batch(spans), looped(spans, slots, context)
    inputs, targets = batch.decoder_symbols(BOS, END)
    rows = batch.decoder_rows(inputs, BOS, slots, context)
    lm_inputs, lm_rows, lm_targets = batch.token_model_symbols(BOS, END)
    found = {
        "backbone_source": batch.backbone_source,
        "predicting": batch.predicting_row_S,
        "place": batch.place_S,
        "stop": batch.stop_label_S,
        "inputs": inputs,
        "targets": targets,
        "symbols": rows.symbols_R,
        "positions": rows.positions_R,
        "lm_inputs": lm_inputs,
        "lm_rows": lm_rows,
        "lm_targets": lm_targets,
    }
    if slots:
        found |= {"own_rows": rows.own_rows, "slot_rows": rows.slot_rows}
    if context:
        spans_of = rows.spans
        found |= {
            "wide": spans_of.source,
            "own_places": spans_of.own,
            "span_lengths": spans_of.layout.lengths,
        }
        own = np.diff([0, *np.cumsum(rows.layout.lengths)])
        before = spans_of.layout.lengths - own
        assert spans_of.needed == sum(n * b + n * (n + 1) // 2 for n, b in zip(own, before, strict=True))
    for name, values in found.items():
        assert values.tolist() == expected[name], name


def test_sentence_ends_follow_every_sentence() -> None:
    spans = random_spans(4, documents=5)
    batch = build_batch(spans).with_sentence_ends(END)
    tokens = []
    for one in spans:
        for part in np.split(one.tokens, np.cumsum(one.sentence_lengths)[:-1]):
            tokens += [*part, END]
    assert batch.tokens_T.tolist() == tokens and batch.cu_sentences[-1] == len(tokens)
    assert np.diff(batch.cu_sentences).tolist() == [n + 1 for one in spans for n in one.sentence_lengths]
    assert np.array_equal(batch.cu_documents, build_batch(spans).cu_documents)


def test_apart_from_the_start_the_first_sentence_is_at_place_0() -> None:
    batch = build_batch([span([5, 6, 7], [1, 2]), span([8], [1])])
    assert batch.apart_layout.lengths.tolist() == [1, 2, 1, 1]
    assert batch.apart_layout.position_of_row.tolist() == [0, 0, 1, 0, 0]


def test_the_empty_batch_is_one_unscored_token() -> None:
    batch = empty_batch()
    assert not batch.scored and (batch.tokens, batch.sentences, batch.documents) == (1, 1, 1)
    assert build_batch([span([5], [1])]).scored
