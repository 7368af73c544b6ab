"""One document's text as tokens and sentence lengths.

A text boundary that is not between two whole-character tokens moves forward to the next place that is. So the
token model and the sentence model read the same tokens, and every sentence is valid UTF-8. Three units are in
use: characters (segmenter), bytes (offsets into the text), tokens (sentence lengths). Positions are int32 to
save memory on documents of several MB; values that are looked up in them are int32 as well, because numpy
would convert the whole array otherwise.
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain

import numpy as np

from data_prep.common.errors import UserError
from data_prep.text.segmenter import LANGUAGES, Segmenter, get_segmenter
from data_prep.text.tokenizer import Tokenizer

LONGEST = 65535  # sentence lengths are stored as uint16
SHORTEST = 4  # one character may need four tokens and is never split
JUDGED_BY_LINE = ("en", "zh", "", "auto", "und")  # document languages that the `auto` segmenter handles

_BLOCK = 1 << 20  # elements, where a whole array in int64 would be large
# By Unicode's rules: between any two Chinese characters, not in a Latin word.
_CLUSTER, _WORD_END = r"\X", r"(?w)\b"
_BREAK_AHEAD = re.compile(r"[^\S\n\r\v\f\x1c-\x1e\x85\u2028\u2029]*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")


@dataclass(frozen=True)
class SentenceSettings:
    """How documents are cut.

    Args:
        segmenter: clause or sentence.
        language: a code, other or auto.
        max_tokens: longer sentences are split.
        min_tokens: shorter sentences are joined to a neighbour; 1 disables it.
    """

    segmenter: str
    language: str
    max_tokens: int
    min_tokens: int = 1

    def __post_init__(self) -> None:
        if not SHORTEST <= self.max_tokens <= LONGEST:
            raise UserError(f"--max-tokens must lie between {SHORTEST} and {LONGEST}, not {self.max_tokens}")
        if not 1 <= self.min_tokens <= self.max_tokens:
            raise UserError(
                f"--min-tokens must lie between 1 and --max-tokens ({self.max_tokens}), not {self.min_tokens}"
            )

    def segmenter_for(self, document_language: str = "") -> Segmenter:
        """The segmenter for a document of this language.

        A language in the settings takes precedence. Otherwise `auto` cuts English, Chinese and unlabelled
        documents, the language's own rules those that have some, and `other` the rest.
        """
        language = self.language
        if language == "auto" and document_language not in JUDGED_BY_LINE:
            language = document_language
        return get_segmenter(self.segmenter, language if language in LANGUAGES else "other")

    def to_dict(self) -> dict:
        return asdict(self)


def cut_document(
    text: str,
    tokenizer: Tokenizer,
    segmenter: Segmenter | Callable[[str], list[str]],
    settings: SentenceSettings | int,
) -> tuple[np.ndarray, np.ndarray]:
    """Tokenize `text` once and cut it into sentences of `min_tokens` to `max_tokens` tokens.

    Each cut is at or after the segmenter's boundary, or splits a sentence that is too long: after one of its
    clauses, else before white space, else between any two characters. An int as `settings` is the maximum.

    Returns:
        Tokens uint32 [T] and sentence lengths uint16 [S], each >= 1, with sum T. Empty for "".

    Raises:
        LossyTokenization: the tokens do not decode to the text.
    """
    max_tokens = settings if isinstance(settings, int) else settings.max_tokens
    min_tokens = 1 if isinstance(settings, int) else settings.min_tokens
    data = text.encode("utf-8")
    tokens = tokenizer.encode_exactly(text, data)
    if not data:
        return tokens, np.zeros(0, dtype=np.uint16)
    characters = _Characters(text, data)
    places, ends = characters.boundaries(tokens, tokenizer)
    if places.size < tokens.size and max(places[0], np.diff(places).max(initial=0)) > max_tokens:
        tokens = _respell(tokens, places, np.diff(places, prepend=0) > max_tokens, tokenizer)
        places, ends = characters.boundaries(tokens, tokenizer)
    del data
    characters.index()
    text_cuts = _text_cuts(text, segmenter)
    index = np.searchsorted(ends, characters.to_bytes(text_cuts))
    cuts = places[index[np.append(index[1:] != index[:-1], True)]]
    if np.diff(cuts, prepend=0).max() > max_tokens:
        cuts = _split_long(cuts, places, ends, text, characters, segmenter, max_tokens)
    if min_tokens > 1:
        line_ends = {
            int(places[at])
            for at, cut in zip(index, text_cuts.data, strict=True)
            if cut == len(text) or _BREAK_AHEAD.match(text, cut)
        }
        cuts = _join_short(cuts.data, line_ends, min_tokens, max_tokens)
    return tokens, np.diff(cuts, prepend=0).astype(np.uint16)


def _text_cuts(text: str, segmenter: Segmenter | Callable[[str], list[str]]) -> np.ndarray:
    """Ends of the sentences in characters, int32 [S], ascending."""
    if isinstance(segmenter, Segmenter):
        cuts = np.array(segmenter.cuts(text), dtype=np.int32)
    else:
        cuts = np.cumsum([len(sentence) for sentence in segmenter(text)], dtype=np.int32)
    if not cuts.size or cuts[-1] != len(text):
        raise AssertionError("the segmenter lost text: its sentences do not add up to the document")
    return cuts


def _places_of(flags: np.ndarray) -> np.ndarray:
    """Indices where bool [N] is true, int32, ascending."""
    blocks = range(0, flags.size, _BLOCK)
    return np.concatenate([np.flatnonzero(flags[at : at + _BLOCK]).astype(np.int32) + at for at in blocks])


class _Characters:
    """Where the characters of a text are in `data`, its UTF-8. Where few are longer than a byte, only the
    bytes inside a character are kept."""

    def __init__(self, text: str, data: bytes):
        self._starts = None  # bool [bytes + 1], later int32 [characters + 1]
        few = len(data) - len(text) <= len(text) // 8
        self._inside = np.zeros(0, np.int32)
        if len(data) > len(text):
            inside = np.frombuffer(data, dtype=np.uint8) & 0xC0 == 0x80  # 10xxxxxx
            if few:
                self._inside = _places_of(inside)
            else:
                self._starts = np.append(~inside, True)
        # Characters that start before each.
        self._before = self._inside - np.arange(self._inside.size, dtype=np.int32)

    def boundaries(self, tokens: np.ndarray, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
        """Where a cut is possible: token counts int32 [P], ascending, and the offset in bytes of each."""
        ends = np.cumsum(tokenizer.byte_lengths[tokens], dtype=np.int32)
        if self._starts is not None:
            whole = self._starts[ends]
            places = _places_of(whole)
            places += 1
            return places, ends[whole]
        places, at = np.arange(1, tokens.size + 1, dtype=np.int32), np.searchsorted(ends, self._inside)
        torn = at[ends[at] == self._inside]
        return (np.delete(places, torn), np.delete(ends, torn)) if torn.size else (places, ends)

    def index(self) -> None:
        """Prepare the conversions below; `boundaries` is not called afterwards."""
        if self._starts is not None:
            self._starts = _places_of(self._starts)

    def to_bytes(self, at: np.ndarray) -> np.ndarray:
        if self._starts is not None:
            return self._starts[at]
        return at + np.searchsorted(self._before, at, side="right").astype(np.int32)

    def to_characters(self, at: np.ndarray) -> np.ndarray:
        if self._starts is not None:
            return np.searchsorted(self._starts, at)
        return at - np.searchsorted(self._inside, at)


def _respell(tokens: np.ndarray, places: np.ndarray, too_far: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Encode stretches without a possible cut character by character.

    Byte-level merges can repeatedly join the end of one character to the start of the next.
    """
    parts, done = [], 0
    for index in np.flatnonzero(too_far):
        begin, end = (places[index - 1] if index else 0), places[index]
        parts.append(tokens[done:begin])
        parts += tokenizer.encode_batch(list(tokenizer.decode(tokens[begin:end])))
        done = end
    return np.concatenate([*parts, tokens[done:]])


def _split_long(
    cuts: np.ndarray,
    places: np.ndarray,
    ends: np.ndarray,
    text: str,
    characters: _Characters,
    segmenter: Segmenter | Callable[[str], list[str]],
    max_tokens: int,
) -> np.ndarray:
    """Add cuts to sentences above the limit: at the last clause end within it, else see `_last_place`.
    None in the first quarter of the limit, to avoid tiny sentences."""
    begins = np.append(0, cuts[:-1])
    long = cuts - begins > max_tokens
    begins, finals = begins[long], cuts[long]
    pauses = _clause_ends(begins, finals, places, ends, text, characters, segmenter)
    quarter = max_tokens // 4
    extra = []
    for start, end in zip(begins.tolist(), finals.tolist(), strict=True):
        while end - start > max_tokens:
            at = bisect_right(pauses, start + max_tokens) - 1
            if at >= 0 and pauses[at] > start + quarter:
                start = pauses[at]
            else:
                start = _last_place(start, max_tokens, places, ends, text, characters)
            extra.append(start)
    return np.sort(np.concatenate([cuts, np.array(extra, dtype=np.int32)]))


def _last_place(
    start: int, max_tokens: int, places: np.ndarray, ends: np.ndarray, text: str, characters: _Characters
) -> int:
    """Where a sentence from `start` is cut at the limit: the last place before white space, else at a word's
    end, else between grapheme clusters, else any. None but clusters in the first quarter of the limit."""
    low = start + max_tokens // 4
    bounds = np.array([start, low, start + max_tokens], dtype=np.int32)
    first, later, last = np.searchsorted(places, bounds, side="right").tolist()
    at = ends[max(0, first - 1) : last]
    at = characters.to_characters(at).tolist()
    begin = at.pop(0) if first else 0
    for index in range(last - 1, later - 1, -1):
        character = at[index - first]
        if text[character].isspace() and text[character - 1 : character + 1] != "\r\n":
            return int(places[index])
    import regex  # few texts need it

    window = text[begin : at[-1] + 32]  # a cluster or word may continue behind the last place
    clusters = {begin + match.start() for match in regex.finditer(_CLUSTER, window)}
    words = {begin + match.start() for match in regex.finditer(_WORD_END, window)}
    for allowed, lowest in ((clusters & words, later), (clusters, first)):
        for index in range(last - 1, lowest - 1, -1):
            if at[index - first] in allowed:
                return int(places[index])
    return int(places[last - 1])


def _clause_ends(
    begins: np.ndarray,
    finals: np.ndarray,
    places: np.ndarray,
    ends: np.ndarray,
    text: str,
    characters: _Characters,
    segmenter: Segmenter | Callable[[str], list[str]],
) -> Sequence[int]:
    """Places, ascending, where the clause segmenter would cut the sentences from `begins` to `finals`."""
    if not isinstance(segmenter, Segmenter) or segmenter.name == "clause":
        return []
    clauses = get_segmenter("clause", segmenter.language)
    # Places → bytes → characters; then back.
    last = [np.searchsorted(places, at, side="right") - 1 for at in (begins, finals)]
    bounds: list[np.ndarray] = [np.where(at < 0, 0, ends[at]).astype(np.int32) for at in last]
    bounds = [characters.to_characters(at) for at in bounds]
    inner: list[np.ndarray] = [np.zeros(0, np.int32)]
    for begin, end in zip(bounds[0].tolist(), bounds[1].tolist(), strict=True):
        inner.append(np.array(clauses.cuts(text[begin:end])[:-1], dtype=np.int32) + begin)
    return places[np.searchsorted(ends, characters.to_bytes(np.concatenate(inner)))].data


def _join_short(cuts: Sequence[int], line_ends: set[int], min_tokens: int, max_tokens: int) -> np.ndarray:
    """Join sentences below `min_tokens` to the next one on their line, at its end to the one before. A
    sentence alone on its line joins the next line, else the previous. None grows beyond `max_tokens`."""
    joined = array("i")
    start = 0
    for cut, following in zip(cuts, chain(cuts[1:], [None]), strict=True):
        if cut - start < min_tokens:
            alone = start == 0 or start in line_ends
            if following is not None and (alone or cut not in line_ends) and following - start <= max_tokens:
                continue
            before = joined[-2] if len(joined) > 1 else 0
            if joined and (not alone or cut in line_ends) and cut - before <= max_tokens:
                joined.pop()
        joined.append(cut)
        start = cut
    return np.array(joined)
