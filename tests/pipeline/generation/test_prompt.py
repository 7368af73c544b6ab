"""A prompt is cut as training cuts a document, wherever it ends."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import tokenizer_folders

from data_prep.text.sentences import SentenceSettings, cut_document
from data_prep.text.tokenizer import load_tokenizer
from pipeline.generation.prompt import split_prompt

SETTINGS = {"segmenter": "sentence", "language": "en", "max_tokens": 8}


@pytest.mark.parametrize("make", [tokenizer_folders.byte_level, tokenizer_folders.sentence_piece])
def test_a_last_sentence_at_the_token_limit_is_complete(make, tmp_path) -> None:
    """Every prefix of a long sentence: training would cut it there, and a model has no room for more."""
    tokenizer, text, full = load_tokenizer(make(tmp_path)), "a name and the names of it " * 3, 0
    for end in range(1, len(text)):
        sentences, tail = split_prompt(text[:end], tokenizer, SETTINGS)
        assert all(1 <= len(sentence) <= 8 for sentence in sentences) and len(tail) < 8
        joined = np.concatenate([*sentences, tail]).astype(int)
        assert tokenizer.decode(joined) == text[:end]
        cut = SentenceSettings(**SETTINGS)
        _, lengths = cut_document(text[:end], tokenizer, cut.segmenter_for("en"), cut)
        assert [len(sentence) for sentence in (*sentences, tail) if sentence] == lengths.tolist()
        full += int(lengths[-1]) == 8
    assert full > 1, "no prefix ends at the limit"
