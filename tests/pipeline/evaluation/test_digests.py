"""The fingerprint of what was scored, and the bootstrap that its intervals come from."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import tokenizer_folders

from data_prep.text.tokenizer import load_tokenizer
from pipeline.evaluation.evaluate import ALONE, Source
from pipeline.evaluation.scores import interval


def test_the_fingerprint_covers_where_documents_end(tmp_path) -> None:
    tokenizer = load_tokenizer(tokenizer_folders.byte_level(tmp_path))

    def fingerprint(*texts: str) -> str:
        documents = [(t := tokenizer.encode(text), np.array([len(t)]), "", "") for text in texts]
        source = Source("", {}, iter((t, lengths, a, b) for t, lengths, a, b in documents))
        assert len(list(source.windows(tokenizer, 100, None, ALONE))) == len(texts)
        return source.digest.hexdigest()

    corpora = [("ab", "c"), ("a", "bc"), ("abc",), ("c", "ab"), ("ab", "d"), ("a", "b", "c")]
    assert len({fingerprint(*texts) for texts in corpora}) == len(corpora)
    assert fingerprint("ab", "c") == fingerprint("ab", "c")


@pytest.mark.parametrize("count", [4, 5])
def test_a_resample_has_as_many_documents_as_the_text(count: int) -> None:
    """One document of `count` is 1, the others 0: a resample's ratio is k / count, k binomial. Bounds from
    its distribution function; with a document fewer they would be multiples of 1 / (count - 1)."""
    values = np.zeros(count)
    values[0] = 1.0
    low, high = interval(values, np.ones(count))
    assert low == 0.0
    assert high == 3 / count  # P(k <= 2) < 0.975 <= P(k <= 3) for both
    # The mean of resamples is that of the text, and its spread that of `count` draws.
    spread = interval(np.arange(1000.0), np.ones(1000))
    width = 2 * 1.96 * np.arange(1000.0).std() / np.sqrt(1000)
    assert spread[1] - spread[0] == pytest.approx(width, rel=0.1)
