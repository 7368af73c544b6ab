"""Segments of a packed row, and the index plans of the attention paths."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

_PAIRS_OF_A_BLOCK = 2048  # query-key pairs that cost as much as a block's kernel calls, at width 128
_FLEX_BLOCK = 128
_SHORTEST_BAND = 16  # rows of a block under an attention window


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


class SegmentLayout:
    """Lengths of consecutive segments of one packed row, with the plans of the attention paths.

    Args:
        lengths: int [n], each >= 1; their sum is the number of rows T.
        device: of the index tensors.
    """

    def __init__(self, lengths: np.ndarray, device: torch.device | str = "cpu"):
        self.lengths = np.asarray(lengths, dtype=np.int64)
        if self.lengths.size == 0 or self.lengths.min() < 1:
            raise ValueError("a segment layout needs at least one segment, each with at least one row")
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])
        self.rows = int(self.starts[-1])
        self.longest = int(self.lengths.max())
        self.device = torch.device(device)
        self._flex_masks: dict[tuple[bool, int | None], Any] = {}
        self._bands: dict[int, BandPlan] = {}

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, non_blocking=True)

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
            slots = np.arange(lengths.max())
            shapes.append((len(members), len(slots)))
            sources.append(self.starts[members][:, None] + np.minimum(slots, lengths - 1))
            reals.append(slots < lengths)
        source, real = (np.concatenate([x.reshape(-1) for x in parts]) for parts in (sources, reals))
        restore = np.empty(self.rows, dtype=np.int64)
        restore[source[real]] = np.flatnonzero(real)
        masks = [None if x.all() else self._to_device(x[:, None, None, :]) for x in reals]
        return BlockPlan(
            shapes,
            self._to_device(source),
            self._to_device(restore),
            self._to_device(np.flatnonzero(~real)),
            masks,
        )

    def limits(self, window: int | None) -> bool:
        """Whether an attention window of so many rows, the row itself included, hides anything."""
        return window is not None and window < self.longest

    def _band_blocks(self, window: int) -> tuple[int, int, np.ndarray]:
        """Length of a block, blocks that it sees before itself, and blocks of every segment."""
        length = max(_SHORTEST_BAND, -(-window // 2))
        return length, -(-(window - 1) // length), -(-self.lengths // length)

    def bands(self, window: int) -> BandPlan:
        """The plan of the bucketed path for causal attention within `window` rows."""
        if window not in self._bands:
            self._bands[window] = self._make_bands(window)
        return self._bands[window]

    def _make_bands(self, window: int) -> BandPlan:
        length, back, blocks = self._band_blocks(window)
        number = np.arange(blocks.sum()) - np.repeat(np.cumsum(blocks) - blocks, blocks)  # in its segment
        starts = np.repeat(self.starts[:-1], blocks) + number * length
        ends = np.minimum(starts + length, np.repeat(self.starts[1:], blocks))
        source = np.minimum(starts[:, None] + np.arange(length), ends[:, None] - 1)
        real = np.arange(length) < (ends - starts)[:, None]
        plan = BlockPlan(
            [source.shape],
            self._to_device(source.reshape(-1)),
            self._to_device(np.flatnonzero(real)),
            self._to_device(np.flatnonzero(~real)),
            [None],
        )
        keys = np.arange(-back * length, length)
        distance = np.arange(length)[:, None] - keys
        # No real row sees a padded one, which comes after all of its segment.
        there = keys // length >= -number[:, None]
        mask = ((distance >= 0) & (distance < window)) & there[:, None]
        return BandPlan(plan, back, self._to_device(mask[:, None]))

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
        if window is not None and self.limits(window):
            length, back, blocks = self._band_blocks(window)
            shown = (back + 1) * length if path == "bucketed" else 0
            real = self.rows * shown or self.needed_pairs(True, window)
            computed = int(blocks.sum()) * length * shown or real
        else:
            real = computed = self.pairs
            if path == "bucketed":
                computed = sum(
                    len(members) * int(self.lengths[members].max()) ** 2 for members in self._buckets
                )
        return real, self.rows**2 if path == "masked" else computed

    # The masked and the flex path.

    @cached_property
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

        segment = self.segment_of_row

        def allowed(batch, head, query, key):
            seen = segment[query] == segment[key]
            seen = seen & (query >= key) if causal else seen
            return seen if window is None else seen & (query - key < window)

        # Rows of a segment are contiguous, so the tiles that a tile of queries needs are contiguous too.
        tiles = -(-self.rows // _FLEX_BLOCK)
        first_row = np.arange(tiles) * _FLEX_BLOCK
        last_row = np.minimum(first_row + _FLEX_BLOCK, self.rows) - 1
        first = self.starts[self._segment_of_row[first_row]]
        if window is not None:
            first = np.maximum(first, first_row - window + 1)
        first = first // _FLEX_BLOCK
        end = (self.starts[self._segment_of_row[last_row] + 1] - 1) // _FLEX_BLOCK + 1
        if causal:
            end = np.arange(tiles) + 1
        count = end - first
        indices = (first[:, None] + np.arange(tiles)) % tiles
        return BlockMask.from_kv_blocks(
            self._to_device(count.astype(np.int32))[None, None],
            self._to_device(indices.astype(np.int32))[None, None],
            BLOCK_SIZE=_FLEX_BLOCK,
            mask_mod=allowed,
            seq_lengths=(self.rows, self.rows),
        )
