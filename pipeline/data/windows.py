"""Documents cut into windows of whole sentences and a limited number of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from data_prep.common.errors import UserError, counted
from data_prep.text.running_ends import RunningEnds

# A window by reference into the shards: document `document` of shard `shard` of the plan's shard set
# `shard_set`; `document_end`: the window ends its document.
WINDOW_DTYPE = np.dtype(
    [
        ("shard_set", "<i4"),
        ("shard", "<i4"),
        ("document", "<i4"),
        ("first_sentence", "<i4"),
        ("sentences", "<i4"),
        ("tokens", "<i4"),
        ("first_token", "<i8"),
        ("document_end", "?"),
    ]
)


@dataclass(frozen=True)
class Span:
    """The content of a document window.

    tokens: uint16/uint32 [T]; sentence_lengths: [S], each >= 1, sum T; document_end: the window ends its
        document; before: the token before it, which token models read in the start symbol's place.
    """

    tokens: np.ndarray
    sentence_lengths: np.ndarray
    document_end: bool
    before: int | None = None

    def cut_again(self, rule: RunningEnds) -> Span:
        """The same text with sentence ends by a rule."""
        return replace(self, sentence_lengths=rule.cut(self.tokens))


def cut_documents(
    sentence_lengths: np.ndarray, document_sizes: np.ndarray, window_tokens: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut all documents into windows of whole sentences, filled greedily.

    Args:
        sentence_lengths: int [N], each >= 1: tokens of every sentence, documents back to back.
        document_sizes: int [D], each >= 1: sentences of every document; their sum is N.
    Returns: int64 [W] three times: each window's document, its first sentence and the one after its last,
        both counted over all N; by document, in reading order.
    Raises: UserError when a single sentence is longer than the window.
    """
    token_starts = np.concatenate([[0], np.cumsum(sentence_lengths, dtype=np.int64)])
    last = np.cumsum(document_sizes, dtype=np.int64)
    live, first = np.arange(len(last)), last - document_sizes
    found = []
    while len(live):  # the next window of every document that has one
        end = np.searchsorted(token_starts, token_starts[first] + window_tokens, side="right") - 1
        end = np.minimum(end, last[live])
        if (end == first).any():
            longest = int(sentence_lengths[first[end == first][0]])
            raise UserError(
                f"a sentence of {counted(longest, 'token')} does not fit a window of {window_tokens}; "
                "raise window_tokens or shard with a smaller --max-tokens"
            )
        found.append((live, first, end))
        more = end < last[live]
        live, first = live[more], end[more]
    if not found:
        return (np.empty(0, np.int64),) * 3
    document, first, end = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.argsort(document, kind="stable")
    return document[order], first[order], end[order]


def cut_windows(sentence_lengths: np.ndarray, window_tokens: int) -> Iterator[tuple[int, int]]:
    """One document's windows (`cut_documents`): yields [first, end) sentence ranges."""
    _, first, end = cut_documents(sentence_lengths, np.asarray([len(sentence_lengths)]), window_tokens)
    yield from zip(first.tolist(), end.tolist(), strict=True)


def document_spans(tokens: np.ndarray, sentence_lengths: np.ndarray, window_tokens: int) -> Iterator[Span]:
    """A whole document's windows with their content."""
    token_ends = np.concatenate([[0], np.cumsum(sentence_lengths, dtype=np.int64)])
    for first, end in cut_windows(sentence_lengths, window_tokens):
        yield Span(
            tokens[token_ends[first] : token_ends[end]],
            sentence_lengths[first:end],
            end == len(sentence_lengths),
        )
