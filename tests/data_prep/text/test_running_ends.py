"""Ends while reading need nothing behind the next token; where that is enough they are the segmenter's."""

from __future__ import annotations

from itertools import permutations

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


LATIN = (
    "{0} saw it, and then {1} went on; all was quiet. “Is it you?” said {0}. “I hope so.” Dr. {1} came\n"
    "to 3.14 of 2,000, e.g. the first.  It was late: {1} had gone — or so {0} said.\n\n"
    '"Yes," {0} answered. "It ended in July 1776, in the U.S. army." The list:\n- {1}, {2}\n- {0}'
)
CHINESE = (
    "{2}年，{3}走了，然后回来。{4}笑道：“你好！”{3}说：“再见，{4}。”\n"
    "书名叫《{4}》；价格是{2}.5元。真的吗？当然……是的！"
)


@pytest.mark.parametrize("segmenter", ["clause", "sentence"])
@pytest.mark.parametrize("text", [LATIN, CHINESE], ids=["latin", "chinese"])
def test_ends_are_those_of_the_segmenter(segmenter, text, tokenizer):
    """On books the agreement is above 99 % (docs/evaluation.md)."""
    settings = SentenceSettings(segmenter, "auto", 200)
    rule, words = RunningEnds(tokenizer, settings), ("Anna", "Brown", "Clara", "David", "Emma")
    given, found, at = set(), set(), 0
    for number, (one, two) in enumerate(permutations(words, 2)):
        names = "".join(chr(0x5F20 + 37 * number + n) for n in range(4))
        document = text.format(one, two, number + 1, names[:2], names[2:])
        tokens_T, lengths_S = cut_document(document, tokenizer, settings.segmenter_for(), settings)
        given |= {at + end for end in np.cumsum(lengths_S.astype(np.int64))[:-1].tolist()}
        found |= {at + end for end in ends(rule, tokens_T)}
        at += len(tokens_T)
    assert len(given) >= 100
    assert len(given & found) > 0.98 * max(len(given), len(found))


@pytest.mark.parametrize(
    "text",
    [
        "One is set.\n“Two is",
        "He left,\n“Two is",
        "It ends.  Two is",
        "Said Will. “Two is",
        "他道：“你们好",
        "走了。然后来",
    ],
)
def test_what_comes_behind_a_mark_need_not_be_known(text, tokenizer):
    """Line breaks, double spaces, quotes and characters of several tokens are behind the end."""
    rule = RunningEnds(tokenizer, SentenceSettings("clause", "auto", 64))
    tokens_T, lengths_S = cut_document(text, tokenizer, rule._segmenter, 64)
    assert ends(rule, tokens_T) == np.cumsum(lengths_S)[:-1].tolist()


def test_the_limit_cuts_no_character_and_short_sentences_go_on(tokenizer):
    text = "龘靐齉爩" * 10
    for limit in (8, 9, 10, 11):
        rule, tokens_T = (
            RunningEnds(tokenizer, SentenceSettings("clause", "auto", limit)),
            tokenizer.encode(text),
        )
        parts = np.split(tokens_T, ends(rule, tokens_T))
        assert "".join(tokenizer.decode_bytes(part).decode() for part in parts) == text
        assert max(map(len, parts)) <= limit
    rule = RunningEnds(tokenizer, SentenceSettings("clause", "en", 64, min_tokens=9))
    tokens_T = tokenizer.encode("No, yes, no, yes, and then a longer clause, and a last one")
    assert [len(part) >= 9 for part in np.split(tokens_T, ends(rule, tokens_T))[:-1]] == [True, True]


@pytest.mark.parametrize("least", range(1, 9))
def test_a_text_is_cut_where_writing_it_ends_sentences(least, tokenizer):
    rule = RunningEnds(tokenizer, SentenceSettings("clause", "en", 12, min_tokens=least))
    sentences: list[list[int]] = [[]]
    for token in tokenizer.encode(TEXT).tolist():
        if sentences[-1] and rule.before(sentences[-1], token):
            sentences.append([])
        sentences[-1].append(token)
    assert rule.cut(tokenizer.encode(TEXT)).tolist() == list(map(len, sentences))
