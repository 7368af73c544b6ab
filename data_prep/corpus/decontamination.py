"""Documents that share a span of words with test texts (13 words, as in GPT-3's appendix C).

Case, punctuation and white space make no difference; in scripts without spaces a character counts as a word.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.common.errors import UserError
from data_prep.corpus.documents import DocumentReader, RawDocument
from data_prep.corpus.finding import find_inputs
from data_prep.corpus.words import words_of

SPAN = 13  # words
# Odd multipliers, one for each word of a span.
_MIX = np.array([pow(0x9E3779B97F4A7C15, n, 1 << 64) for n in range(1, SPAN + 1)], np.uint64)


@dataclass(frozen=True)
class HeldOutTexts:
    """Test texts that must not be learned from: part of a shard set's settings.

    Args:
        files: files or folders of every kind that `--input` takes.
        texts, short: how many texts they hold, and how many of those have fewer words than a span.
        sha256: of the texts.
    """

    files: tuple[str, ...]
    texts: int
    short: int
    sha256: str

    @classmethod
    def read(cls, files: Iterable[str]) -> tuple[HeldOutTexts, HeldOutSpans]:
        """The texts and their spans. Raises `UserError` when no text has a span."""
        files = tuple(files)
        spans, digest = HeldOutSpans(), hashlib.sha256()
        for file in find_inputs(files):
            for item in DocumentReader(file):
                if not isinstance(item, RawDocument):
                    raise UserError(f"test texts {file.path}, line {item.line}: {item.reason}; mend the file")
                spans.add(item.content)
                digest.update(hashlib.sha256(item.content.encode("utf-8")).digest())
        if spans.texts == spans.short:
            raise UserError(
                f"test texts {', '.join(files)}: no text has the {SPAN} words that are looked for"
            )
        return cls(files, spans.texts, spans.short, digest.hexdigest()), spans

    def to_dict(self) -> dict:
        """For the manifest."""
        return {"texts": self.texts, "short": self.short, "sha256": self.sha256, "words": SPAN}


class HeldOutSpans:
    """All spans of some test texts. `short`: texts with fewer words than a span, which cannot be found."""

    def __init__(self, texts: Iterable[str] = ()):
        self.texts = self.short = 0
        self._codes: dict[str, int] = {}  # of the words that occur in test texts; 0 for any other word
        self._parts: list[np.ndarray] = []
        for text in texts:
            self.add(text)

    def add(self, text: str) -> None:
        codes = [self._codes.setdefault(word, len(self._codes) + 1) for word in words_of(text)]
        self.texts += 1
        self.short += len(codes) < SPAN
        self._parts.append(_hashes(np.array(codes, np.uint64))[0])

    @functools.cached_property
    def _hashes(self) -> np.ndarray:
        return np.unique(np.concatenate([np.empty(0, np.uint64), *self._parts]))

    def write(self, path: Path) -> None:
        words = np.frombuffer("\n".join(self._codes).encode("utf-8"), np.uint8)  # in the order of their codes
        np.savez(path, words=words, hashes=self._hashes)

    @classmethod
    @functools.lru_cache(maxsize=1)
    def load(cls, path: Path) -> HeldOutSpans:
        """What `write` wrote, read once in each process."""
        spans = cls()
        with np.load(path) as found:
            words = found["words"].tobytes().decode("utf-8").split("\n")
            spans._codes = {word: code for code, word in enumerate(words, 1)}
            spans._parts = [found["hashes"]]
        return spans

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
    unknown = np.concatenate([[0], np.cumsum(codes == 0)])
    starts = np.flatnonzero(unknown[SPAN:] == unknown[:-SPAN])
    mixed = codes * _MIX[0]
    mixed ^= mixed >> np.uint64(29)  # a product alone would be linear in the codes
    return (np.lib.stride_tricks.sliding_window_view(mixed, SPAN)[starts] * _MIX).sum(
        axis=1, dtype=np.uint64
    ), starts
