"""Ends while reading depend on nothing behind the next token, and are mostly the segmenter's."""

from __future__ import annotations

import numpy as np
import pytest

from data_prep.text.running_ends import RunningEnds
from data_prep.text.sentences import SentenceSettings, cut_document
from data_prep.text.tokenizer import load_tokenizer

TEXT = (
    'It is 3.14, e.g. a number. "Is it?" he said; Dr. Smith (of the U.S.) said so: see https://a.b/c.d.\n'
    "A list:\n- one, two\n- three\n\nThe end came... too late! 他走了，然后回来。再见！\n"
    "Last line without a stop"
)


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    return load_tokenizer(tiny_tokenizer)


def ends(rule: RunningEnds, tokens_T: np.ndarray) -> list[int]:
    return np.cumsum(rule.cut(tokens_T))[:-1].tolist()


@pytest.mark.parametrize("segmenter", ["clause", "sentence"])
@pytest.mark.parametrize("language", ["en", "auto", "zh"])
def test_no_end_depends_on_what_follows_the_next_token(segmenter, language, tokenizer):
    rule = RunningEnds(tokenizer, SentenceSettings(segmenter, language, 20))
    tokens_T = tokenizer.encode(TEXT)
    whole = ends(rule, tokens_T)
    assert len(whole) > 5 and np.diff([0, *whole, len(tokens_T)]).max() <= 20
    for n in range(1, len(tokens_T) + 1):
        assert ends(rule, tokens_T[:n]) == [end for end in whole if end < n]
    found, sentence = [], []
    for at, token in enumerate(tokens_T.tolist()):
        if sentence and rule.before(sentence, token):
            found.append(at)
            sentence = []
        sentence.append(token)
    assert found == whole


def test_most_ends_are_those_of_the_segmenter(tokenizer, tiny_corpus):
    settings = SentenceSettings("clause", "en", 64)
    rule, same = RunningEnds(tokenizer, settings), 0
    texts = (tiny_corpus / "valid.jsonl").read_text(encoding="utf-8")[:20_000].split("\\n")
    total = 0
    for text in texts:
        tokens_T, lengths_S = cut_document(text, tokenizer, settings.segmenter_for(), settings)
        given, found = set(np.cumsum(lengths_S).tolist()), {*ends(rule, tokens_T), len(tokens_T)}
        same, total = same + len(given & found), total + len(given | found)
    # One token of this small vocabulary is a letter or two to look ahead.
    assert total > 300 and same > 0.5 * total
    number = tokenizer.encode("It is 3.14 and more, e.g. a number of the U.S. army.")
    assert tokenizer.decode(number[: ends(rule, number)[0]]) == "It is 3.14 and more,"
