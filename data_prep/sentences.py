"""One document's text → its tokens and where its sentences end.

In: text, tokenizer, segmenter. Out: tokens uint32 [T] of the WHOLE text, and sentence lengths uint16 [S] that
sum to T. Called by the sharder for every document, and by whoever must cut raw text as training did
(evaluation, generation).

A text boundary rarely falls between two tokens that are whole characters; it moves forward to the next place
that does. So the token model and the sentence model read the very same tokens, and every sentence is valid
UTF-8.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np

from data_prep.errors import UserError
from data_prep.tokenizer import Tokenizer

LONGEST = 65535  # sentence lengths are stored as uint16
SHORTEST = 4  # one character may need four tokens, and is never cut


@dataclass(frozen=True)
class SentenceSettings:
    """How documents are cut: segmenter clause|sentence, language en|zh|auto, max_tokens per sentence."""

    segmenter: str
    language: str
    max_tokens: int
    min_tokens: int = 1

    def __post_init__(self) -> None:
        if not SHORTEST <= self.max_tokens <= LONGEST:
            raise UserError(f"--max-tokens must lie between {SHORTEST} and {LONGEST}, not {self.max_tokens}")

    def to_dict(self) -> dict:
        return asdict(self)


def cut_document(
    text: str, tokenizer: Tokenizer, segmenter: Callable[[str], list[str]], max_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokenize `text` once and cut it into sentences of at most `max_tokens` tokens.

    Returns (tokens uint32 [T], sentence_lengths uint16 [S]): every length >= 1, their sum T. Empty for "".
    Each cut lies at or after the segmenter's boundary, or splits a sentence that would be too long.
    Raises `LossyTokenization` when the tokens do not give the text back.
    """
    data = text.encode("utf-8")
    tokens = tokenizer.encode_exactly(text, data)
    places, ends = _character_boundaries(tokens, data, tokenizer)
    gaps = np.diff(places, prepend=0)
    if gaps.size and gaps.max() > max_tokens:
        tokens = _respell(tokens, places, gaps > max_tokens, tokenizer)
        places, ends = _character_boundaries(tokens, data, tokenizer)
    sizes = np.fromiter((len(s.encode("utf-8")) for s in segmenter(text)), dtype=np.int64)
    wanted = np.cumsum(sizes)
    if (wanted[-1] if sizes.size else 0) != len(data):
        raise AssertionError("the segmenter lost text: its sentences do not add up to the document")
    cuts = places[np.unique(np.searchsorted(ends, wanted))]
    cuts = _split_long(cuts, places, ends, data, max_tokens)
    return tokens, np.diff(cuts, prepend=0).astype(np.uint16)


def _character_boundaries(
    tokens: np.ndarray, data: bytes, tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray]:
    """Where a cut is possible: token counts int64 [P], ascending, and the byte offsets int64 [P] of each."""
    ends = np.cumsum(tokenizer.byte_lengths[tokens], dtype=np.int64)
    # A character starts at a byte that is not 10xxxxxx; the end of the text counts as a start.
    starts = np.append((np.frombuffer(data, dtype=np.uint8) & 0xC0) != 0x80, True)
    places = np.flatnonzero(starts[ends]) + 1
    return places, ends[places - 1]


def _respell(tokens: np.ndarray, places: np.ndarray, too_far: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Spell stretches that offer no cut for too long character by character.

    Byte-level merges can join the tail of one character to the head of the next, again and again.
    """
    parts, done = [], 0
    for index in np.flatnonzero(too_far):
        begin, end = (places[index - 1] if index else 0), places[index]
        parts.append(tokens[done:begin])
        parts += tokenizer.encode_batch(list(tokenizer.decode(tokens[begin:end])))
        done = end
    return np.concatenate([*parts, tokens[done:]])


def _split_long(
    cuts: np.ndarray, places: np.ndarray, ends: np.ndarray, data: bytes, max_tokens: int
) -> np.ndarray:
    """Add cuts to sentences above the limit, before white space if there is some past half of the limit."""
    lengths = np.diff(cuts, prepend=0)
    extra = []
    for index in np.flatnonzero(lengths > max_tokens):
        start, end = int(cuts[index] - lengths[index]), int(cuts[index])
        while end - start > max_tokens:
            low, high = np.searchsorted(places, [start + max_tokens // 2, start + max_tokens], side="right")
            chosen = places[high - 1]
            for place in range(high - 1, low - 1, -1):
                if data[ends[place]] in b" \n\t":
                    chosen = places[place]
                    break
            start = int(chosen)
            extra.append(start)
    return np.union1d(cuts, np.array(extra, dtype=cuts.dtype)) if extra else cuts
