"""Documents that share a span of words with test texts (13 words, as in GPT-3's appendix C).

Case, punctuation and white space make no difference; in scripts without spaces a character counts as a word.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from data_prep.corpus.words import words_of

SPAN = 13  # words
_MIX = np.random.Generator(np.random.PCG64(13)).integers(0, 1 << 63, SPAN, np.uint64) * 2 + 1


class TestSpans:
    """All spans of some test texts. `short`: texts with fewer words than a span, which cannot be found."""

    def __init__(self, texts: Iterable[str]):
        self.texts = self.short = 0
        self._codes: dict[str, int] = {}  # of the words that occur in test texts; 0 for any other word
        hashes = []
        for text in texts:
            codes = [self._codes.setdefault(word, len(self._codes) + 1) for word in words_of(text)]
            self.texts += 1
            self.short += len(codes) < SPAN
            hashes.append(_hashes(np.array(codes, np.uint64))[0])
        self._hashes = np.unique(np.concatenate([np.empty(0, np.uint64), *hashes]))

    def __len__(self) -> int:
        return self._hashes.size

    def found_in(self, text: str) -> str | None:
        """The words of the first span that the text shares with a test text, or None."""
        words = words_of(text)
        code = self._codes.get
        hashes, starts = _hashes(np.array([code(word, 0) for word in words], np.uint64))
        places = np.searchsorted(self._hashes, hashes)
        same = self._hashes.take(places, mode="clip") == hashes if len(self) else np.zeros(0, bool)
        return " ".join(words[starts[same][0] :][:SPAN]) if same.any() else None


def _hashes(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint64 hashes of the spans of known words, and where they start."""
    if len(codes) < SPAN:
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    spans = np.lib.stride_tricks.sliding_window_view(codes, SPAN)
    unknown = np.concatenate([[0], np.cumsum(codes == 0)])
    starts = np.flatnonzero(unknown[SPAN:] == unknown[:-SPAN])
    mixed = codes * _MIX[0]
    mixed ^= mixed >> np.uint64(29)  # a product alone would be linear in the codes
    return (np.lib.stride_tricks.sliding_window_view(mixed, SPAN)[starts] * _MIX).sum(axis=1, dtype=np.uint64), starts
