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
        self._flex_masks: dict[bool, Any] = {}

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

    # What attention costs, in pairs of a query and a key.

    @property
    def pairs(self) -> int:
        """Pairs within segments, Σ length²; a causal path may skip half of them."""
        return int((self.lengths**2).sum())

    def computed_pairs(self, path: str) -> int:
        """Pairs that a path computes, including padding but not the padding inside a GPU kernel's tiles."""
        if path == "bucketed":
            return sum(len(members) * int(self.lengths[members].max()) ** 2 for members in self._buckets)
        return self.rows**2 if path == "masked" else self.pairs

    # The masked and the flex path.

    @cached_property
    def block_mask(self) -> Tensor:
        """bool [T, T]: row i and row j are in one segment."""
        return self.segment_of_row[:, None] == self.segment_of_row[None, :]

    def flex_mask(self, causal: bool) -> Any:
        """flex attention's `BlockMask` [1, 1, T, T]: the tiles with a pair of one segment, and the rule
        inside them."""
        if causal not in self._flex_masks:
            self._flex_masks[causal] = self._make_flex_mask(causal)
        return self._flex_masks[causal]

    def _make_flex_mask(self, causal: bool) -> Any:
        from torch.nn.attention.flex_attention import BlockMask

        segment = self.segment_of_row

        def allowed(batch, head, query, key):
            same = segment[query] == segment[key]
            return same & (query >= key) if causal else same

        # Rows of a segment are contiguous, so the tiles that a tile of queries needs are contiguous too.
        tiles = -(-self.rows // _FLEX_BLOCK)
        first_row = np.arange(tiles) * _FLEX_BLOCK
        last_row = np.minimum(first_row + _FLEX_BLOCK, self.rows) - 1
        first = self.starts[self._segment_of_row[first_row]] // _FLEX_BLOCK
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
