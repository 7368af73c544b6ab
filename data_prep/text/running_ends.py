"""Sentence ends decided while a text is read, token by token: no end depends on text behind the token that it
is before.

`cut_document` lets a rule look as far ahead as it wants. Here the segmenter reads the sentence so far and one
more token. What it does not know yet (which word comes behind white space or a quote) must not matter to an
end. An end that is certain only later is before the token that makes it certain, also where the mark is
further back.
"""

from __future__ import annotations

import numpy as np

from data_prep.text.marks import EAST_ASIAN, WORD_CHARACTER
from data_prep.text.sentences import SentenceSettings
from data_prep.text.tokenizer import Tokenizer

_CONTINUATION = bytes(range(0x80, 0xC0))  # bytes inside a character of UTF-8
_LONGEST_CHARACTER = 4  # bytes, so tokens as well

# What may come behind white space and opening marks.
_WORD, _EAST_ASIAN_WORD = "Next", "下一句"


class RunningEnds:
    """The rule of one tokenizer and one kind of cut."""

    def __init__(self, tokenizer: Tokenizer, settings: SentenceSettings, language: str = ""):
        self._tokenizer, self._most, self._least = tokenizer, settings.max_tokens, settings.min_tokens
        self._segmenter = settings.segmenter_for(language)

    def before(self, sentence: list[int], token: int) -> bool:
        """Whether the sentence so far, of one token or more, ends before `token`."""
        decode = self._tokenizer.decode_bytes
        short = decode(sentence[: self._least - 1])
        return self._between(len(sentence), short, decode(sentence), decode([token]))

    def cut(self, tokens_T: np.ndarray) -> np.ndarray:
        """Lengths int64 [S] of the sentences of a text; the last one is as long as the text reaches."""
        pieces = [self._tokenizer.decode_bytes([token]) for token in tokens_T.tolist()]
        lengths, count, short, so_far = [], 0, b"", b""
        for piece in pieces:
            if count and self._between(count, short, so_far, piece):
                lengths.append(count)
                count, short, so_far = 0, b"", b""
            count, so_far = count + 1, so_far + piece
            if count < self._least:
                short = so_far
        return np.asarray([*lengths, count] if count else [], dtype=np.int64)

    def _between(self, count: int, short: bytes, so_far: bytes, more: bytes) -> bool:
        """Whether a sentence of `count` tokens ends before one more; `short`: its text below `min_tokens`."""
        room = self._most - count
        if room <= 0 or count < self._least:
            return room <= 0
        try:
            # The limit may have cut inside a character.
            text = so_far.lstrip(_CONTINUATION).decode()
        except UnicodeDecodeError:  # inside a character
            return False
        following, whole = _read_on(text[-1:], more)
        if not whole and room < _LONGEST_CHARACTER:
            return True
        # No end is inside a word; in writing without spaces the last mark was decided on some characters ago.
        known = 4 if EAST_ASIAN.match(text[-1:]) else 1
        if not following or (following[0].isalnum() and text[-known:].isalnum()):
            return False
        lowest = len(short.lstrip(_CONTINUATION).decode(errors="ignore"))
        if not WORD_CHARACTER.search(following):
            following += _EAST_ASIAN_WORD if EAST_ASIAN.search(text) else _WORD
        cuts = self._segmenter.cuts(text + following)[:-1]
        return any(lowest < cut <= len(text) for cut in cuts)


def _read_on(before: str, more: bytes) -> tuple[str, bool]:
    """The text of a token, and whether its last character is whole.

    For a letter that is not whole another one with the same first bytes is given. Bytes that may begin a mark
    or white space are left out, but behind a space or colon an opening quote is
    the likely one.
    """
    try:
        return more.decode(), True
    except UnicodeDecodeError:
        text = more.decode(errors="ignore")
    opens = (before + text).endswith((" ", ":", "："))
    for fill in (b"\x80", b"\xa0"):
        for size in range(1, _LONGEST_CHARACTER):
            filled = (more + fill * size).decode(errors="ignore")
            if len(filled) > len(text):
                return filled if filled[-1].isalnum() else text + "“" * opens, False
    return text, False
