"""Which windows of which documents make bin *n*: planning, from the shards' index.

In: shard sets (`data_prep.shards.ShardSet`). Out: a stream of `Bin`s, each a group of document windows that
fits one token budget; `batches.build_batch` turns a bin into tensors. Called by the trainer and by
`evaluation.py`.

The order of bins is a function of (seed, epoch) alone, never of world size, workers or nodes: step k of a
run with G bins a step consumes bins [k·G, (k+1)·G) of the stream, and a position `(epoch, number)` is all
that a resumed run needs.

Planning is hierarchical: shards are permuted, then worked on in windows of `shards_at_once` shards, so that
nobody ever holds the index of the whole corpus. Within them, document windows are permuted and packed
best-fit with a bounded look-ahead. A document that fits one window needs its index row only; sentence
lengths are read for longer ones. Windows are rows of one array, 33 bytes each.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from data_prep.errors import UserError

if TYPE_CHECKING:
    from data_prep.shards import ShardSet

LOOK_AHEAD = 64  # open bins that best-fit chooses among

# A run of whole sentences of one document, at most `window_tokens` long, by reference into the shards:
# document `document` of shard `shard` of the plan's shard set `shard_set`; `document_end`: the window ends
# its document.
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
    """A document window's content: what a batch is built from.

    tokens: uint16/uint32 [T]; sentence_lengths: [S], each >= 1, sum T; document_end: the window ends its
        document.
    """

    tokens: np.ndarray
    sentence_lengths: np.ndarray
    document_end: bool


@dataclass(frozen=True, eq=False)
class Bin:
    """The windows of one rank's micro-batch: `windows`, WINDOW_DTYPE [D]. `epoch` and `number` give its place
    in the stream."""

    epoch: int
    number: int
    windows: np.ndarray

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Bin)
            and (self.epoch, self.number) == (other.epoch, other.number)
            and np.array_equal(self.windows, other.windows)
        )

    @property
    def tokens(self) -> int:
        return int(self.windows["tokens"].sum(dtype=np.int64))

    @property
    def sentences(self) -> int:
        return int(self.windows["sentences"].sum(dtype=np.int64))

    @property
    def document_ends(self) -> int:
        return int(self.windows["document_end"].sum())

    @property
    def next_position(self) -> tuple[int, int]:
        return self.epoch, self.number + 1

    def targets(self, objective: str) -> int:
        """Vocabulary targets of the bin: tokens + sentence ends (`vae`, `sllm`), tokens + document ends
        (`lm`)."""
        return self.tokens + (self.document_ends if objective == "lm" else self.sentences)


def cut_documents(
    sentence_lengths: np.ndarray, document_sizes: np.ndarray, window_tokens: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut documents into windows of whole sentences, greedily filled; all documents at once.

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
                f"a sentence of {longest} tokens does not fit a window of {window_tokens}; "
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
        shard_order = rng.permutation(len(shards))
        number = 0
        for at in range(0, len(shard_order), self.shards_at_once):
            windows = np.concatenate(
                [self._shard_windows(*shards[k]) for k in shard_order[at : at + self.shards_at_once]]
            )
            order = rng.permutation(len(windows))
            for members in pack(windows["tokens"][order].tolist(), self.bin_tokens):
                yield Bin(epoch, number, windows[order[members]])
                number += 1

    def _shard_windows(self, shard_set: int, shard: int) -> np.ndarray:
        """WINDOW_DTYPE [W]: every window of a shard."""
        data = self.shard_sets[shard_set].shard(shard)
        tokens, sentences = (data.index[name].astype(np.int64) for name in ("tokens", "sentences"))
        whole = np.flatnonzero((tokens > 0) & (tokens <= self.window_tokens))
        longer = np.flatnonzero(tokens > self.window_tokens)
        lengths = data.sentence_lengths_of(longer)
        which, first, end = cut_documents(lengths, sentences[longer], self.window_tokens)
        token_starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        sentence_at = np.cumsum(sentences[longer]) - sentences[longer]  # of each longer document, in lengths

        windows = np.zeros(len(whole) + len(which), WINDOW_DTYPE)
        windows["shard_set"], windows["shard"] = shard_set, shard
        one, part = windows[: len(whole)], windows[len(whole) :]
        one["document"], one["sentences"], one["tokens"] = whole, sentences[whole], tokens[whole]
        one["document_end"] = True
        part["document"], part["sentences"] = longer[which], end - first
        part["first_sentence"] = first - sentence_at[which]
        part["tokens"] = token_starts[end] - token_starts[first]
        part["first_token"] = token_starts[first] - token_starts[sentence_at[which]]
        part["document_end"] = first + part["sentences"] == (sentence_at + sentences[longer])[which]
        return windows

    def spans(self, bin_: Bin) -> list[Span]:
        """The content of a bin's windows, read from the memory-mapped shards."""
        spans = []
        for window in bin_.windows.tolist():
            shard_set, shard, document, first_sentence, sentences, tokens, first_token, end = window
            data = self.shard_sets[shard_set].shard(shard)
            spans.append(
                Span(
                    data.tokens(document)[first_token : first_token + tokens],
                    data.sentence_lengths(document)[first_sentence : first_sentence + sentences],
                    end,
                )
            )
        return spans


def pack(sizes: Iterable[int], budget: int) -> Iterator[list[int]]:
    """Best fit: which of `sizes` (by their place, each at most `budget`) share a bin of `budget`.

    Each goes into the fullest of at most LOOK_AHEAD open bins that has room for it; when none has, the
    fullest is closed for a new one. A full bin is closed at once, those left at the end in the order in which
    they were opened.
    """
    rooms: list[int] = []  # of the open bins, sorted: room << 40 | the bin's number
    members: dict[int, list[int]] = {}
    bins = 0
    for n, size in enumerate(sizes):
        at = bisect_left(rooms, size << 40)
        if at < len(rooms):
            key = rooms.pop(at)
            room, which = key >> 40, key & ((1 << 40) - 1)
            members[which].append(n)
        else:
            if len(rooms) == LOOK_AHEAD:
                yield members.pop(rooms.pop(0) & ((1 << 40) - 1))
            bins += 1
            room, which = budget, bins
            members[which] = [n]
        if room > size:
            insort(rooms, (room - size) << 40 | which)
        else:
            yield members.pop(which)
    yield from members.values()
