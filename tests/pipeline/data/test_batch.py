"""The digest of a batch, by which `sllm audit` compares what runs have read."""

from __future__ import annotations

import numpy as np

from pipeline.data.batch import build_batch
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
