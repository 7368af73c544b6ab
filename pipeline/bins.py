"""Which windows of which documents make bin *n*: planning, from the shards' index and sentence lengths alone.

In: shard sets (`data_prep.shards.ShardSet`). Out: a stream of `Bin`s, each a group of document windows that
fits one token budget; `batches.build_batch` turns a bin into tensors. Called by the trainer and by
`evaluation.py`.

The order of bins is a function of (seed, epoch) alone, never of world size, workers or nodes: step k of a
run with G bins a step consumes bins [k·G, (k+1)·G) of the stream, and a position `(epoch, number)` is all
that a resumed run needs.

Planning is hierarchical: shards are permuted, then worked on in windows of `shards_at_once` shards, so that
nobody ever holds the index of the whole corpus. Within them, document windows are permuted and packed
best-fit with a bounded look-ahead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from data_prep.errors import UserError

if TYPE_CHECKING:
    from data_prep.shards import ShardSet

LOOK_AHEAD = 64  # open bins that best-fit chooses among


@dataclass(frozen=True)
class Span:
    """A document window's content: what a batch is built from.

    tokens: uint16/uint32 [T]; sentence_lengths: [S], each >= 1, sum T; document_end: the window ends its
        document.
    """

    tokens: np.ndarray
    sentence_lengths: np.ndarray
    document_end: bool


@dataclass(frozen=True)
class Window:
    """A run of whole sentences of one document, at most `window_tokens` long, by reference into the
    shards."""

    shard_set: int
    shard: int
    document: int
    first_sentence: int
    sentences: int
    first_token: int
    tokens: int
    document_end: bool


@dataclass(frozen=True)
class Bin:
    """The windows of one rank's micro-batch. `epoch` and `number` give its place in the stream."""

    epoch: int
    number: int
    windows: tuple[Window, ...]

    @property
    def tokens(self) -> int:
        return sum(w.tokens for w in self.windows)

    @property
    def sentences(self) -> int:
        return sum(w.sentences for w in self.windows)

    @property
    def document_ends(self) -> int:
        return sum(w.document_end for w in self.windows)

    @property
    def next_position(self) -> tuple[int, int]:
        return self.epoch, self.number + 1

    def targets(self, objective: str) -> int:
        """Vocabulary targets of the bin: tokens + sentence ends (`vae`, `sllm`), tokens + document ends
        (`lm`)."""
        return self.tokens + (self.document_ends if objective == "lm" else self.sentences)


def cut_windows(sentence_lengths: np.ndarray, window_tokens: int) -> Iterator[tuple[int, int]]:
    """Cut a document into windows of whole sentences: yields [first, end) sentence ranges, greedily filled.

    Raises: UserError when a single sentence is longer than the window.
    """
    ends = np.cumsum(sentence_lengths, dtype=np.int64)
    first, done = 0, 0
    while first < len(ends):
        end = int(np.searchsorted(ends, done + window_tokens, side="right"))
        if end == first:
            raise UserError(
                f"a sentence of {int(sentence_lengths[first])} tokens does not fit a window of "
                f"{window_tokens}; raise window_tokens or shard with a smaller --max-tokens"
            )
        yield first, end
        first, done = end, int(ends[end - 1])


def document_spans(tokens: np.ndarray, sentence_lengths: np.ndarray, window_tokens: int) -> Iterator[Span]:
    """A whole document's windows with their content (evaluation, tests)."""
    token_ends = np.concatenate([[0], np.cumsum(sentence_lengths, dtype=np.int64)])
    for first, end in cut_windows(sentence_lengths, window_tokens):
        yield Span(
            tokens[token_ends[first] : token_ends[end]],
            sentence_lengths[first:end],
            end == len(sentence_lengths),
        )


class BinPlan:
    """The stream of bins over one or more shard sets.

    Args:
        shard_sets: opened shard sets, made with one tokenizer.
        window_tokens: longest window in tokens (short for `vae`, so that a bin mixes many documents).
        bin_tokens: token budget of a bin.
        seed: with the epoch, decides the order.
        shards_at_once: shards whose windows are mixed with each other.
    """

    def __init__(
        self,
        shard_sets: Sequence[ShardSet],
        window_tokens: int,
        bin_tokens: int,
        seed: int,
        shards_at_once: int = 16,
    ):
        if window_tokens > bin_tokens:
            raise UserError(f"window_tokens ({window_tokens}) is larger than bin_tokens ({bin_tokens})")
        self.shard_sets = list(shard_sets)
        self.window_tokens, self.bin_tokens = window_tokens, bin_tokens
        self.seed, self.shards_at_once = seed, shards_at_once

    def bins(self, epoch: int = 0, number: int = 0, epochs: int | None = None) -> Iterator[Bin]:
        """Bins from position (epoch, number) on: for ever, or for `epochs` epochs."""
        last = None if epochs is None else epoch + epochs
        while last is None or epoch < last:
            produced = False
            for bin_ in self._epoch(epoch):
                produced = True
                if bin_.number >= number:
                    yield bin_
            if not produced:
                raise UserError("the shard sets hold no documents")
            epoch, number = epoch + 1, 0

    def _epoch(self, epoch: int) -> Iterator[Bin]:
        shards = [(s, i) for s, shard_set in enumerate(self.shard_sets) for i in range(len(shard_set))]
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(shards))
        number = 0
        for at in range(0, len(order), self.shards_at_once):
            windows = [
                w for k in order[at : at + self.shards_at_once] for w in self._shard_windows(*shards[k])
            ]
            for members in self._pack([windows[k] for k in rng.permutation(len(windows))]):
                yield Bin(epoch, number, tuple(members))
                number += 1

    def _shard_windows(self, shard_set: int, shard: int) -> Iterator[Window]:
        data = self.shard_sets[shard_set].shard(shard)
        for document in range(len(data.index)):
            lengths = data.sentence_lengths(document)
            token_ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
            for first, end in cut_windows(lengths, self.window_tokens):
                start = int(token_ends[first])
                yield Window(
                    shard_set,
                    shard,
                    document,
                    first,
                    end - first,
                    start,
                    int(token_ends[end]) - start,
                    end == len(lengths),
                )

    def _pack(self, windows: Sequence[Window]) -> Iterator[list[Window]]:
        """Best fit into at most LOOK_AHEAD open bins; the fullest is closed when another must be opened."""
        room: list[int] = []
        members: list[list[Window]] = []
        for window in windows:
            fits = [(left, i) for i, left in enumerate(room) if left >= window.tokens]
            if fits:
                _, i = min(fits)
            else:
                if len(room) == LOOK_AHEAD:
                    fullest = min(range(len(room)), key=room.__getitem__)
                    room.pop(fullest)
                    yield members.pop(fullest)
                i = len(room)
                room.append(self.bin_tokens)
                members.append([])
            room[i] -= window.tokens
            members[i].append(window)
            if room[i] == 0:
                room.pop(i)
                yield members.pop(i)
        yield from members

    def spans(self, bin_: Bin) -> list[Span]:
        """The content of a bin's windows, read from the memory-mapped shards."""
        spans = []
        for w in bin_.windows:
            shard = self.shard_sets[w.shard_set].shard(w.shard)
            spans.append(
                Span(
                    shard.tokens(w.document)[w.first_token : w.first_token + w.tokens],
                    shard.sentence_lengths(w.document)[w.first_sentence : w.first_sentence + w.sentences],
                    w.document_end,
                )
            )
        return spans
