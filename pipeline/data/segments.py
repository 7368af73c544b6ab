"""Segments of a packed row, and the index plans of the attention paths."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.data.upload import Made, kept, to_device

_PAIRS_OF_A_BLOCK = 2048  # query-key pairs that cost as much as a block's kernel calls, at width 128
_SHORTEST_BAND = 16  # rows of a block under an attention window
_BAND_BLOCK = 64  # queries of a block of a `Band`
TILE = 128  # rows of a tile of GPU kernels, and of a packed one
# On a CPU a query reads keys from one multiple of LANES to another. Its sums then have the same bits whatever
# masked keys follow: a vector's lanes keep their places, and a zero changes no sum.
LANES = 16


def up_to_lanes(rows: Any) -> Any:
    """The next multiple of LANES, of an int or an array."""
    return -(-rows // LANES) * LANES


def _bucket_edges(longest: int) -> np.ndarray:
    # One bucket per length up to 24 (95 % of clauses), so that most segments need no padding; then 10 %
    # steps.
    edges = list(range(1, 25))
    while edges[-1] < longest:
        edges.append(edges[-1] + max(2, edges[-1] // 10))
    return np.asarray(edges)


@dataclass(frozen=True)
class BlockPlan:
    """How the T rows of a layout fill blocks [n, L], one after another: `slots` = Σ n·L places.

    shapes: (n, L) of every block. source: int64 [slots], the row in each place; padded places repeat their
    segment's last row, which is masked as a key and dropped as a query. restore: int64 [T], the place of
    every row. padded: int64 [slots - T], the padded places. key_masks: per block, bool [n, 1, 1, L] for the
    real places, or None without padding.
    """

    shapes: list[tuple[int, int]]
    source: Tensor
    restore: Tensor
    padded: Tensor
    key_masks: list[Tensor | None]

    @property
    def slots(self) -> int:
        return len(self.source)


@dataclass(frozen=True)
class BandPlan:
    """How causal attention within `window` rows runs on blocks of equal length.

    plan: one block after the other, each a piece of a segment. A block's queries see its own keys and those
    of the `back` blocks before it. mask: bool [n, 1, L, (back + 1) · L], the keys that they may see.
    """

    plan: BlockPlan
    back: int
    mask: Tensor


class Band(Made):
    """Queries that each see a contiguous range of other rows' keys, in blocks of consecutive queries.

    A block's keys are gathered once, from its first query's first key to its last query's last one, so the
    cost is linear in the number of queries.

    Args:
        first, last: int64 [R], host: each query's range of keys, both ends included; neither ever decreases.
        device: of the index tensors.
    """

    def __init__(self, first: np.ndarray, last: np.ndarray, device: torch.device | str = "cpu"):
        self.rows, self._first, self._last = len(first), first, last
        self.needed = int((last - first + 1).sum())
        self.block = min(_BAND_BLOCK, self.rows)
        self.blocks = -(-self.rows // self.block)
        begin = np.arange(self.blocks) * self.block
        self._start = first[begin]
        end = np.minimum(begin + self.block, self.rows) - 1
        self.keys = int((last[end] - self._start).max()) + 1
        self.device = torch.device(device)

    def computed_pairs(self, masked: bool) -> tuple[int, int]:
        """Pairs computed for real queries, and with padding; `masked`: on the path of that name."""
        keys = int(self._last[-1]) + 1 if masked else self.keys
        return self.rows * keys, (self.rows if masked else self.blocks * self.block) * keys

    @cached_property
    def source(self) -> Tensor:
        """int64 [blocks · keys]: the key in each place; places behind the last key repeat it."""
        places = np.minimum(self._start[:, None] + np.arange(self.keys), self._last[-1])
        return to_device(places.reshape(-1), self.device)

    @cached_property
    def mask(self) -> Tensor:
        """bool [blocks, 1, block, keys]: which keys a query sees; queries behind the last one repeat it."""
        rows = np.minimum(np.arange(self.blocks * self.block), self.rows - 1).reshape(self.blocks, -1, 1)
        seen = self._seen(rows, (self._start[:, None] + np.arange(self.keys))[:, None])
        return to_device(seen[:, None], self.device)

    @property
    def whole_mask(self) -> Tensor:
        """bool [R, keys of all]: the plain definition, for tests and checks."""
        seen = self._seen(np.arange(self.rows)[:, None], np.arange(int(self._last[-1]) + 1))
        return torch.from_numpy(seen).to(self.device)

    def _seen(self, rows: np.ndarray, keys: np.ndarray) -> np.ndarray:
        return (keys >= self._first[rows]) & (keys <= self._last[rows])


class SegmentLayout(Made):
    """Lengths of consecutive segments of one packed row, with the plans of the attention paths.

    Args:
        lengths: int [n], each >= 1; their sum is the number of rows T.
        device: of the index tensors.
        steady: the bucketed path gives a segment a block of its own length, to the next multiple of 16, so
            that its bits do not depend on the other segments. Else lengths that cost least share blocks.
    """

    def __init__(self, lengths: np.ndarray, device: torch.device | str = "cpu", steady: bool = False):
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.steady = steady
        if self.lengths.size == 0 or self.lengths.min() < 1:
            raise ValueError("a segment layout needs at least one segment, each with at least one row")
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])
        self.rows = int(self.starts[-1])
        self.longest = int(self.lengths.max())
        self.device = torch.device(device)
        # Computed on the device.
        self._flex_masks: dict[tuple[bool, int | None], Any] = {}
        self._tile_masks: dict[tuple[bool, int | None], Tensor] = {}

    def _to_device(self, array: np.ndarray) -> Tensor:
        return to_device(array, self.device)

    @cached_property
    def _segment_of_row(self) -> np.ndarray:
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    @cached_property
    def segment_of_row(self) -> Tensor:
        """int64 [T]: the segment of every row."""
        return self._to_device(self._segment_of_row)

    @cached_property
    def position_of_row(self) -> Tensor:
        """int64 [T]: 0, 1, 2 … within each segment."""
        return self._to_device(np.arange(self.rows) - np.repeat(self.starts[:-1], self.lengths))

    @cached_property
    def first_rows(self) -> Tensor:
        """int64 [n]: each segment's first row."""
        return self._to_device(self.starts[:-1])

    @cached_property
    def last_rows(self) -> Tensor:
        """int64 [n]: each segment's last row."""
        return self._to_device(self.starts[1:] - 1)

    @cached_property
    def widened(self) -> SegmentLayout:
        """The layout with one more row in each segment."""
        return SegmentLayout(self.lengths + 1, self.device, self.steady)

    @cached_property
    def rows_with_next(self) -> Tensor:
        """int64 [T - n]: every row but the last ones of segments. By index, because a mask on a GPU would
        make the host wait for the device."""
        return self._to_device(np.delete(np.arange(self.rows), self.starts[1:] - 1))

    @property
    def is_last_row(self) -> Tensor:
        """bool [T]: the row is its segment's last one."""
        return torch.zeros(self.rows, dtype=torch.bool, device=self.device).index_fill_(
            0, self.last_rows, True
        )

    @cached_property
    def cu_rows(self) -> Tensor:
        """int32 [n+1]: segment i owns rows [cu_rows[i], cu_rows[i+1]), the format of varlen kernels."""
        return self._to_device(self.starts.astype(np.int32))

    # The bucketed path.

    @cached_property
    def _buckets(self) -> list[np.ndarray]:
        """Segments of similar length, shortest first: int64 [n] each, in the row's order.

        Each block has a fixed cost of kernel calls (forward and backward about 150 µs on a CPU core), so a
        few segments join the next longer bucket if their padding costs less than a block.
        """
        if self.steady:
            wide = up_to_lanes(self.lengths)
            order = np.argsort(wide, kind="stable")
            return np.split(order, np.flatnonzero(np.diff(wide[order])) + 1)
        edges = _bucket_edges(self.longest)
        edge_of = np.searchsorted(edges, self.lengths)
        used, counts = np.unique(edge_of, return_counts=True)
        bucket_of_edge = np.zeros(len(edges), dtype=np.int64)
        bucket, length, padded_pairs = 0, int(edges[used[-1]]), 0
        for edge, count in zip(used[::-1], counts[::-1], strict=True):
            padded_pairs += int(count) * (length**2 - int(edges[edge]) ** 2)
            if padded_pairs > _PAIRS_OF_A_BLOCK:
                bucket, length, padded_pairs = bucket - 1, int(edges[edge]), 0
            bucket_of_edge[edge] = bucket
        bucket_of = bucket_of_edge[edge_of]
        order = np.argsort(bucket_of, kind="stable")
        return np.split(order, np.flatnonzero(np.diff(bucket_of[order])) + 1)

    @cached_property
    def blocks(self) -> BlockPlan:
        """The plan of the bucketed path."""
        shapes, sources, reals = [], [], []
        for members in self._buckets:
            lengths = self.lengths[members][:, None]
            longest = int(lengths.max())
            slots = np.arange(up_to_lanes(longest) if self.steady else longest)
            shapes.append((len(members), len(slots)))
            sources.append(self.starts[members][:, None] + np.minimum(slots, lengths - 1))
            reals.append(slots < lengths)
        source, real = (np.concatenate([x.reshape(-1) for x in parts]) for parts in (sources, reals))
        restore = np.empty(self.rows, dtype=np.int64)
        restore[source[real]] = np.flatnonzero(real)
        whole = [not self.steady and x.all() for x in reals]
        masks = [
            None if full else self._to_device(x[:, None, None, :])
            for x, full in zip(reals, whole, strict=True)
        ]
        return BlockPlan(
            shapes,
            self._to_device(source),
            self._to_device(restore),
            self._to_device(np.flatnonzero(~real)),
            masks,
        )

    def limits(self, window: int | None) -> bool:
        """Whether an attention window of so many rows, the row itself included, hides anything; in a steady
        layout a window always counts."""
        return window is not None and (self.steady or window < self.longest)

    def _band_blocks(self, window: int) -> tuple[int, int, np.ndarray]:
        """Length of a block, blocks that it sees before itself, and blocks of every segment."""
        length = max(_SHORTEST_BAND, -(-window // 2))
        return length, -(-(window - 1) // length), -(-self.lengths // length)

    @kept
    def bands(self, window: int) -> BandPlan:
        """The plan of the bucketed path for causal attention within `window` rows."""
        length, back, blocks = self._band_blocks(window)
        number = np.arange(blocks.sum()) - np.repeat(np.cumsum(blocks) - blocks, blocks)  # in its segment
        starts = np.repeat(self.starts[:-1], blocks) + number * length
        ends = np.minimum(starts + length, np.repeat(self.starts[1:], blocks))
        source = np.minimum(starts[:, None] + np.arange(length), ends[:, None] - 1)
        real = np.arange(length) < (ends - starts)[:, None]
        plan = self._equal_blocks(source, real)
        keys = np.arange(-back * length, length)
        distance = np.arange(length)[:, None] - keys
        # No real row sees a padded one, which comes after all of its segment.
        there = keys // length >= -number[:, None]
        mask = ((distance >= 0) & (distance < window)) & there[:, None]
        return BandPlan(plan, back, self._to_device(mask[:, None]))

    def _equal_blocks(self, source: np.ndarray, real: np.ndarray) -> BlockPlan:
        """Blocks of one length, whose real places are the rows in order."""
        return BlockPlan(
            [source.shape],
            self._to_device(source.reshape(-1)),
            self._to_device(np.flatnonzero(real)),
            self._to_device(np.flatnonzero(~real)),
            [None],
        )

    # The path of packed tiles.

    @cached_property
    def _tiles(self) -> tuple[np.ndarray, np.ndarray]:
        """First row and end of every tile: as many whole segments as fit, none of them longer than one."""
        ends = [0]
        while ends[-1] < self.rows:
            fits = np.searchsorted(self.starts, ends[-1] + TILE, "right") - 1
            ends.append(int(self.starts[fits]))
        return np.asarray(ends[:-1]), np.asarray(ends[1:])

    @cached_property
    def tiles(self) -> BlockPlan:
        """Blocks [n, TILE] of whole segments."""
        first, end = self._tiles
        source = first[:, None] + np.arange(TILE)
        return self._equal_blocks(np.minimum(source, end[:, None] - 1), source < end[:, None])

    @kept
    def tile_ranges(self, causal: bool, window: int | None) -> tuple[Tensor, ...]:
        """First and last row that each query of `tiles` sees, int32 [n, TILE, 1], and the row of each key,
        int32 [n, 1, TILE], -1 in a padded place. A padded query sees what the row that it repeats does."""
        first, end = self._tiles
        rows = first[:, None] + np.arange(TILE)
        queries = np.minimum(rows, end[:, None] - 1)
        segment = self._segment_of_row[queries]
        seen_from, seen_to = self.starts[segment], queries if causal else self.starts[segment + 1] - 1
        if window is not None:
            seen_from = np.maximum(seen_from, queries - window + 1)
        keys = np.where(rows < end[:, None], rows, -1)
        parts = seen_from[:, :, None], seen_to[:, :, None], keys[:, None]
        return tuple(self._to_device(x.astype(np.int32)) for x in parts)

    def tile_mask(self, causal: bool, window: int | None) -> Tensor:
        """bool [n, 1, TILE, TILE]: which keys a query of `tiles` sees."""
        key = causal, window if self.limits(window) else None
        if key not in self._tile_masks:
            first, last, keys = self.tile_ranges(*key)
            self._tile_masks[key] = ((keys >= first) & (keys <= last))[:, None]
        return self._tile_masks[key]

    @property
    def fits_tiles(self) -> bool:
        """Whether every segment fits into a tile."""
        return self.longest <= TILE

    @property
    def suits_tiles(self) -> bool:
        """Whether packed tiles have less than half of the rows of a kernel that starts a tile for every
        segment."""
        return self.fits_tiles and 2 * len(self._tiles[0]) < len(self.lengths)

    # What attention costs, in pairs of a query and a key.

    def needed_pairs(self, causal: bool, window: int | None = None) -> int:
        """Pairs that attention needs: all within segments, or each row's past, up to `window` rows."""
        if not causal:
            return self.pairs
        seen = np.minimum(self.lengths, window or self.longest)
        return int((seen * (seen + 1) // 2 + (self.lengths - seen) * seen).sum())

    @property
    def pairs(self) -> int:
        """Pairs within segments, Σ length²; a causal path may skip half of them."""
        return int((self.lengths**2).sum())

    def computed_pairs(self, path: str, window: int | None = None) -> tuple[int, int]:
        """Pairs that a path computes for real rows, and with padding, but without that inside a GPU kernel's
        tiles."""
        if path == "tiles" and self.fits_tiles:
            return self.rows * TILE, len(self._tiles[0]) * TILE**2
        bucketed = path in ("bucketed", "tiles")
        if window is not None and self.limits(window):
            length, back, blocks = self._band_blocks(window)
            shown = (back + 1) * length if bucketed else 0
            real = self.rows * shown or self.needed_pairs(True, window)
            computed = int(blocks.sum()) * length * shown or real
        else:
            real = computed = self.pairs
            if bucketed:
                computed = sum(
                    len(members) * int(self.lengths[members].max()) ** 2 for members in self._buckets
                )
        return real, self.rows**2 if path == "masked" else computed

    # The masked and the flex path.

    @property
    def block_mask(self) -> Tensor:
        """bool [T, T]: row i and row j are in one segment."""
        return self.segment_of_row[:, None] == self.segment_of_row[None, :]

    def flex_mask(self, causal: bool, window: int | None = None) -> Any:
        """flex attention's `BlockMask` [1, 1, T, T]: the tiles with a pair of one segment, and the rule
        inside them."""
        key = causal, window if self.limits(window) else None
        if key not in self._flex_masks:
            self._flex_masks[key] = self._make_flex_mask(*key)
        return self._flex_masks[key]

    def _make_flex_mask(self, causal: bool, window: int | None) -> Any:
        from torch.nn.attention.flex_attention import BlockMask

        segment, (count, indices) = self.segment_of_row, self.flex_tiles(causal, window)

        def allowed(batch, head, query, key):
            seen = segment[query] == segment[key]
            seen = seen & (query >= key) if causal else seen
            return seen if window is None else seen & (query - key < window)

        return BlockMask.from_kv_blocks(
            count[None, None],
            indices[None, None],
            BLOCK_SIZE=TILE,
            mask_mod=allowed,
            seq_lengths=(self.rows, self.rows),
        )

    @kept
    def flex_tiles(self, causal: bool, window: int | None) -> tuple[Tensor, Tensor]:
        """How many tiles of keys each tile of queries needs, and which: int32 [n] and [n, n]."""
        # Rows of a segment are contiguous, so the tiles that a tile of queries needs are contiguous too.
        tiles = -(-self.rows // TILE)
        first_row = np.arange(tiles) * TILE
        last_row = np.minimum(first_row + TILE, self.rows) - 1
        first = self.starts[self._segment_of_row[first_row]]
        if window is not None:
            first = np.maximum(first, first_row - window + 1)
        first = first // TILE
        end = (self.starts[self._segment_of_row[last_row] + 1] - 1) // TILE + 1
        if causal:
            end = np.arange(tiles) + 1
        count = end - first
        indices = (first[:, None] + np.arange(tiles)) % tiles
        return self._to_device(count.astype(np.int32)), self._to_device(indices.astype(np.int32))
