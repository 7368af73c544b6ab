"""The plan of a run: from the shards' index to a stream of `Bin`s, groups of document windows that each fit
one token budget.

The order of bins is a function of (seed, epoch, mixture weights) alone, never of world size, workers or
nodes: step k of a run with G bins a step consumes bins [k·G, (k+1)·G) of the stream.

Planning is hierarchical. An epoch permutes the shards and reads them in groups of `shards_at_once`, so no
process holds the index of the whole corpus. Within a group, document windows are permuted, and packed
best-fit with a bounded look-ahead, PART_WINDOWS at a time. Groups are permuted and parts packed
independently, so a `Place` (epoch, group, part, number in the part) finds a bin. Resuming late in an epoch
costs no more than starting: one group is read, one part packed. A document that fits one window needs its
index row only; sentence lengths are read for longer ones. A window is a row of 33 bytes.

Without weights all shard sets are one source. With weights each is a source with its own epochs, and bin *n*
of the stream comes from the source that lacks most of its share: |taken - weight · n| stays below the number
of sources.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from data_prep.common.errors import UserError
from pipeline.data.windows import WINDOW_DTYPE, Span, cut_documents

if TYPE_CHECKING:
    from data_prep.shards.reader import ShardSet


LOOK_AHEAD = 64  # open bins that best-fit chooses among
PART_WINDOWS = 1 << 15  # packed together; one bin of a part is badly filled


class Place(NamedTuple):
    """A bin's place in its source; places of one source compare in the order of its bins."""

    epoch: int
    group: int
    part: int
    number: int


class Bin:
    """The windows of one rank's micro-batch, as rows of its group's windows.

    source: number of the source. place, next: places of the bin and of the one after it.
    """

    def __init__(self, source: int, place: Place, next: Place, of: np.ndarray, rows: np.ndarray):
        self.source, self.place, self.next = source, place, next
        self.of, self.rows = of, rows  # WINDOW_DTYPE [group], int64 [D]

    @cached_property
    def windows(self) -> np.ndarray:
        """WINDOW_DTYPE [D]."""
        return self.of[self.rows]

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Bin)
            and (self.source, self.place) == (other.source, other.place)
            and np.array_equal(self.windows, other.windows)
        )

    __hash__ = None

    def __str__(self) -> str:
        epoch, group, part, number = self.place
        return f"bin {number} of part {part}, group {group}, epoch {epoch}, source {self.source}"

    @property
    def tokens(self) -> int:
        return int(self.of["tokens"][self.rows].sum(dtype=np.int64))

    @property
    def sentences(self) -> int:
        return int(self.of["sentences"][self.rows].sum(dtype=np.int64))

    @property
    def document_ends(self) -> int:
        return int(self.of["document_end"][self.rows].sum())

    def targets(self, objective: str, sentence_ends: bool = False) -> int:
        """Vocabulary targets of the bin: tokens + sentence ends (`vae`, `sllm`), tokens + document ends
        (`lm`), or with both kinds of ends (`lm` with `sentence_ends`)."""
        return count([self], objective, sentence_ends)[1]


def count(bins: Sequence[Bin], objective: str, sentence_ends: bool = False) -> tuple[int, int]:
    """Tokens and targets (`Bin.targets`) of many bins at once."""
    ends = ["document_end"] if objective == "lm" else ["sentences"]
    ends += ["sentences"] if sentence_ends else []
    tokens = targets = 0
    for of in {id(bin_.of): bin_.of for bin_ in bins}.values():
        windows = of[np.concatenate([bin_.rows for bin_ in bins if bin_.of is of])]
        tokens += int(windows["tokens"].sum(dtype=np.int64))
        targets += sum(int(windows[name].sum(dtype=np.int64)) for name in ends)
    return tokens, tokens + targets


@dataclass(frozen=True)
class Position:
    """A position in the stream, all that a resumed run needs: of every source, the bins taken and the place
    of the next one."""

    taken: tuple[int, ...]
    places: tuple[Place, ...]

    @property
    def epochs_started(self) -> int:
        """Epochs of the most advanced source."""
        return max(place.epoch + (place > (place.epoch, 0, 0, 0)) for place in self.places)

    def after(self, bins: Sequence[Bin]) -> Position:
        """The position after `bins`, the next ones of the stream."""
        taken, places = list(self.taken), list(self.places)
        for bin_ in bins:
            taken[bin_.source] += 1
            places[bin_.source] = bin_.next
        return Position(tuple(taken), tuple(places))

    def to_json(self) -> list[list[int]]:
        """By source: taken, epoch, group, part, number."""
        return [[taken, *place] for taken, place in zip(self.taken, self.places, strict=True)]

    @classmethod
    def from_json(cls, values: list[list[int]]) -> Position:
        return cls(tuple(value[0] for value in values), tuple(Place(*value[1:]) for value in values))


class Consumed:
    """The bins that a run has trained on: of every source, ranges [first place, place after the last).

    Adjacent ranges are joined, also across groups and epochs: a run that repeated and skipped nothing has one
    range per source. Overlapping ranges are not joined, so that a repeated bin shows.
    """

    def __init__(self, sources: int):
        self.ranges: list[list[tuple[Place, Place]]] = [[] for _ in range(sources)]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Consumed) and self.ranges == other.ranges

    __hash__ = None

    def add(self, bins: Iterable[Bin]) -> None:
        for bin_ in bins:
            ranges = self.ranges[bin_.source]
            if ranges and ranges[-1][1] == bin_.place:
                ranges[-1] = ranges[-1][0], bin_.next
            else:
                insort(ranges, (bin_.place, bin_.next))
                self.ranges[bin_.source] = _joined(ranges)

    def to_json(self) -> list[list[list[list[int]]]]:
        """By source, by range: places [epoch, group, part, number] of its first bin and after its last."""
        return [[[list(place) for place in pair] for pair in ranges] for ranges in self.ranges]

    @classmethod
    def from_json(cls, values: list[Any]) -> Consumed:
        consumed = cls(len(values))
        consumed.ranges = [[(Place(*first), Place(*end)) for first, end in ranges] for ranges in values]
        return consumed


def _joined(ranges: list[tuple[Place, Place]]) -> list[tuple[Place, Place]]:
    joined = ranges[:1]
    for first, end in ranges[1:]:
        if joined[-1][1] == first:
            joined[-1] = joined[-1][0], end
        else:
            joined.append((first, end))
    return joined


class BinPlan:
    """The stream of bins over one or more shard sets.

    Args:
        shard_sets: opened shard sets, made with one tokenizer.
        window_tokens: longest window in tokens (short for `vae`, so that a bin mixes many documents).
        bin_tokens: token budget of a bin.
        seed: decides the order, together with the epoch and the weights.
        weights: each shard set's share of the bins, in any unit; None: the sets are one pool.
        shards_at_once: shards whose windows are shuffled together.
    Raises: UserError when a source has no text, or a window does not fit a bin.
    """

    def __init__(
        self,
        shard_sets: Sequence[ShardSet],
        window_tokens: int,
        bin_tokens: int,
        seed: int,
        weights: Sequence[float] | None = None,
        shards_at_once: int = 16,
    ):
        if window_tokens > bin_tokens:
            raise UserError(f"window_tokens ({window_tokens}) is larger than bin_tokens ({bin_tokens})")
        self.shard_sets = list(shard_sets)
        self.window_tokens, self.bin_tokens = window_tokens, bin_tokens
        self.seed, self.shards_at_once = seed, shards_at_once
        self._shares = [1.0] if weights is None else [weight / sum(weights) for weight in weights]
        # (shard set, shard) of every source; shards without text would make groups without bins.
        by_set = [
            [(s, i) for i, entry in enumerate(shard_set.manifest["shards"]) if entry["tokens"]]
            for s, shard_set in enumerate(self.shard_sets)
        ]
        self._sources = [sum(by_set, [])] if weights is None else by_set
        for number, shards in enumerate(self._sources):
            if not shards:
                names = self.shard_sets if weights is None else [self.shard_sets[number]]
                raise UserError(f"no documents in {', '.join(str(one.folder) for one in names)}")

    @property
    def sources(self) -> int:
        return len(self._sources)

    def start(self) -> Position:
        """The position of the stream's first bin."""
        return Position((0,) * self.sources, (Place(0, 0, 0, 0),) * self.sources)

    def bins(self, position: Position | None = None) -> Iterator[Bin]:
        """An endless stream of bins from a position on."""
        position = position or self.start()
        streams = [self._source_bins(source, place) for source, place in enumerate(position.places)]
        taken = list(position.taken)
        number = sum(taken)
        while True:
            number += 1
            lacks = [share * number - n for share, n in zip(self._shares, taken, strict=True)]
            source = lacks.index(max(lacks))
            taken[source] += 1
            yield next(streams[source])

    def epoch(self, epoch: int = 0, source: int = 0) -> Iterator[Bin]:
        """The bins of one epoch of a source."""
        for group in range(self._groups(source)):
            yield from self._group_bins(source, epoch, group)

    def _groups(self, source: int) -> int:
        return -(-len(self._sources[source]) // self.shards_at_once)

    def _source_bins(self, source: int, place: Place) -> Iterator[Bin]:
        while True:
            for bin_ in self._group_bins(source, place.epoch, place.group, place.part):
                if bin_.place >= place:
                    yield bin_
            place = self._next_group(source, place.epoch, place.group)

    def _next_group(self, source: int, epoch: int, group: int) -> Place:
        following = (epoch, group + 1) if group + 1 < self._groups(source) else (epoch + 1, 0)
        return Place(*following, 0, 0)

    def _group_bins(self, source: int, epoch: int, group: int, first_part: int = 0) -> Iterator[Bin]:
        """A group's bins from a part on."""
        shards = self._sources[source]
        # The last number keeps the two permutations apart; a shorter seed would be padded with 0.
        shard_order = np.random.default_rng([self.seed, source, epoch, 0]).permutation(len(shards))
        at = group * self.shards_at_once
        windows = np.concatenate(
            [self._shard_windows(*shards[k]) for k in shard_order[at : at + self.shards_at_once]]
        )
        order = np.random.default_rng([self.seed, source, epoch, group + 1]).permutation(len(windows))
        for part in range(first_part, -(-len(order) // PART_WINDOWS)):
            rows = order[part * PART_WINDOWS : (part + 1) * PART_WINDOWS]
            place, last = Place(epoch, group, part, 0), None
            for members in pack(windows["tokens"][rows].tolist(), self.bin_tokens):
                if last is not None:
                    following = place._replace(number=place.number + 1)
                    yield Bin(source, place, following, windows, last)
                    place = following
                last = rows[members]
            if (part + 1) * PART_WINDOWS < len(order):
                following = Place(epoch, group, part + 1, 0)
            else:
                following = self._next_group(source, epoch, group)
            yield Bin(source, place, following, windows, last)

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
    """Best fit: which of `sizes` (by index, each at most `budget`) share a bin of `budget`.

    Each goes into the fullest of at most LOOK_AHEAD open bins with room for it; if there is none, the fullest
    is closed for a new one. A full bin is closed at once; the rest are closed at the end, oldest first.
    """
    rooms: list[tuple[int, int]] = []  # (room, number) of the open bins, sorted
    members: dict[int, list[int]] = {}
    bins = 0
    for n, size in enumerate(sizes):
        at = bisect_left(rooms, (size, 0))
        if at < len(rooms):
            room, number = rooms.pop(at)
            members[number].append(n)
        else:
            if len(rooms) == LOOK_AHEAD:
                yield members.pop(rooms.pop(0)[1])
            bins += 1
            room, number = budget, bins
            members[number] = [n]
        if room > size:
            insort(rooms, (room - size, number))
        else:
            yield members.pop(number)
    yield from members.values()
