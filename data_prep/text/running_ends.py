"""Sentence ends decided while a text is read, token by token: no end depends on text behind the token that it
is before.

`cut_document` lets a rule look as far ahead as it wants. Here the segmenter reads the sentence so far and one
more token. An end that it finds in them is before that token, also where the mark is further back: white
space behind a line's end then belongs to the sentence that it ends.
"""

from __future__ import annotations

import numpy as np

from data_prep.text.marks import EAST_ASIAN, WORD_CHARACTER
from data_prep.text.sentences import SentenceSettings
from data_prep.text.tokenizer import Tokenizer


_LATIN, _CHINESE = ("Next", "next"), ("下一句",)


class RunningEnds:
    """The rule of one tokenizer and one kind of cut."""

    def __init__(self, tokenizer: Tokenizer, settings: SentenceSettings, language: str = ""):
        self._tokenizer, self._most = tokenizer, settings.max_tokens
        self._segmenter = settings.segmenter_for(language)

    def before(self, sentence: list[int], token: int) -> bool:
        """Whether the sentence so far, of one token or more, ends before `token`."""
        decode = self._tokenizer.decode_bytes
        return len(sentence) >= self._most or self._between(decode(sentence), decode([token]))

    def _between(self, so_far: bytes, more: bytes) -> bool:
        try:
            text = so_far.decode()
        except UnicodeDecodeError:  # inside a character
            return False
        following = _begun(more)
        if not following or (text[-1:].isalnum() and following[0].isalnum()):
            return False
        if WORD_CHARACTER.search(following):
            return self._ends(text, following)
        # White space and opening marks: an end must be one whatever word comes behind them.
        probes = _CHINESE if EAST_ASIAN.search(text) else _LATIN
        return all(self._ends(text, following + probe) for probe in probes)

    def _ends(self, text: str, following: str) -> bool:
        cuts = self._segmenter.cuts(text + following)[:-1]
        return bool(cuts) and cuts[0] <= len(text)

    def cut(self, tokens_T: np.ndarray) -> np.ndarray:
        """Lengths int64 [S] of the sentences of a text; the last one is as long as the text reaches."""
        pieces = [self._tokenizer.decode_bytes([token]) for token in tokens_T.tolist()]
        lengths, count, so_far = [], 0, b""
        for piece in pieces:
            if count and (count >= self._most or self._between(so_far, piece)):
                lengths.append(count)
                count, so_far = 0, b""
            count, so_far = count + 1, so_far + piece
        return np.asarray([*lengths, count] if count else [], dtype=np.int64)


def _begun(more: bytes) -> str:
    """The text of a token, "" when it only begins a character of which it is open whether it is a letter."""
    try:
        return more.decode()
    except UnicodeDecodeError:
        whole = more.decode(errors="ignore")
    for fill in (b"\x80", b"\xa0"):
        for size in (1, 2, 3):
            filled = (more + fill * size).decode(errors="ignore")
            if len(filled) > len(whole):
                return filled if filled[-1].isalnum() else whole
    return whole
