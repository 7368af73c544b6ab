"""Rows of layout `anchors`: a token model's rows, and anchor rows behind each sentence that has ended.

A row sees the rows of its window up to itself that are tokens of the last `attention_window`, one of the
first tokens, or anchors. An anchor stands at its sentence's last token: it has that token's position, and
sees what that token sees and the anchors before itself.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.data.segments import BlockPlan, SegmentLayout

_BLOCK = 64  # queries of a block


class AnchorRows(SegmentLayout):
    """The rows of D windows of `counts_D[d]` sentences (0 or more) with `lengths_S[s]` tokens each; host.

    complete: every sentence has ended; else the last one of a window has no anchors, which no row would see.
    """

    def __init__(
        self,
        lengths_S: np.ndarray,
        counts_D: np.ndarray,
        anchors: int,
        window: int | None,
        first: int,
        device: torch.device | str = "cpu",
        complete: bool = False,
    ):
        document_S = np.repeat(np.arange(len(counts_D)), counts_D)
        ended_S = np.ones(len(lengths_S), dtype=bool)
        if not complete:
            ended_S[np.cumsum(counts_D)[counts_D > 0] - 1] = False
        rows_S = lengths_S + anchors * ended_S
        lengths_D = 1 + np.bincount(document_S, rows_S, len(counts_D)).astype(np.int64)
        super().__init__(lengths_D, device)
        tokens_D = 1 + np.bincount(document_S, lengths_S, len(counts_D)).astype(np.int64)
        self.longest = int(tokens_D.max())  # in positions
        self.window = self.longest if window is None else window
        ends_S = np.cumsum(rows_S) + document_S + 1  # rows up to each sentence's end, anchors included
        anchor_R = np.zeros(self.rows, dtype=bool)
        for number in range(anchors):
            anchor_R[ends_S[ended_S] - 1 - number] = True
        token_R = np.cumsum(~anchor_R) - 1  # the token row that each row is, or stands at
        self._position = token_R - np.repeat(np.cumsum(tokens_D) - tokens_D, lengths_D)
        self._anchor = anchor_R
        self._always = anchor_R | (self._position < first)
        self._token = token_R
        self.per_sentence = anchors

    @cached_property
    def position_of_row(self) -> Tensor:
        """int64 [R]: tokens before each row in its window."""
        return self._to_device(self._position)

    @cached_property
    def token_of_row(self) -> Tensor:
        """int64 [R]: the row of the token model that each row is, or stands at."""
        return self._to_device(self._token)

    @cached_property
    def token_rows(self) -> Tensor:
        """int64 [T+D]: the rows of BOS and tokens."""
        return self._to_device(np.flatnonzero(~self._anchor))

    @cached_property
    def anchor_rows(self) -> Tensor:
        """int64 [A]: the rows of anchors."""
        return self._to_device(np.flatnonzero(self._anchor))

    @cached_property
    def anchor_numbers(self) -> Tensor:
        """int64 [A]: the number of each anchor in its sentence."""
        return self._to_device(np.arange(self._anchor.sum()) % max(1, self.per_sentence))

    def _seen(self, q: np.ndarray, k: np.ndarray) -> np.ndarray:
        near = self._position[q] - self._position[k] < self.window
        return (k <= q) & (near | self._always[k])

    @cached_property
    def mask(self) -> Tensor:
        """bool [R, R]: the plain definition, for tests and checks."""
        rows, segment = np.arange(self.rows), self._segment_of_row
        seen = self._seen(rows[:, None], rows[None]) & (segment[:, None] == segment[None])
        return self._to_device(seen)

    def flex_mask(self, causal: bool = True, window: int | None = None) -> Any:
        from torch.nn.attention.flex_attention import create_block_mask

        segment, position = self.segment_of_row, self.position_of_row
        kept = self._to_device(self._always)

        def allowed(batch, head, query, key):
            near = position[query] - position[key] < self.window
            return (segment[query] == segment[key]) & (key <= query) & (near | kept[key])

        return create_block_mask(allowed, None, None, self.rows, self.rows, device=str(self.device))

    @cached_property
    def _blocks(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """The first row of every block of queries and the one behind its last, and the rows of its keys."""
        borders, keys = [], []
        for start, end in zip(self.starts[:-1], self.starts[1:], strict=True):
            kept = start + np.flatnonzero(self._always[start:end])
            token_rows = start + np.flatnonzero(~self._anchor[start:end])
            for begin in range(int(start), int(end), _BLOCK):
                low = token_rows[max(0, self._position[begin] - self.window + 1)]
                stop = min(begin + _BLOCK, int(end))
                borders.append((begin, stop))
                keys.append(np.concatenate([kept[: np.searchsorted(kept, low)], np.arange(low, stop)]))
        return np.asarray(borders), keys

    @cached_property
    def block_plan(self) -> tuple[BlockPlan, Tensor, Tensor]:
        """Queries by blocks, the key in each place (int64 [n · keys]), and which keys a query sees (bool
        [n, 1, block, keys])."""
        borders, keys = self._blocks
        widest = max(map(len, keys))
        places = borders[:, :1] + np.arange(_BLOCK)
        real = places < borders[:, 1:]
        source = np.minimum(places, borders[:, 1:] - 1)
        key = np.stack([np.pad(rows, (0, widest - len(rows)), mode="edge") for rows in keys])
        there = np.arange(widest) < np.asarray([len(rows) for rows in keys])[:, None]
        seen = self._seen(source[:, :, None], key[:, None]) & there[:, None]
        plan = BlockPlan(
            [source.shape],
            self._to_device(source.reshape(-1)),
            self._to_device(np.flatnonzero(real)),
            self._to_device(np.flatnonzero(~real)),
            [None],
        )
        return plan, self._to_device(key.reshape(-1)), self._to_device(seen[:, None])

    # What attention costs, in pairs of a query and a key.

    def needed_pairs(self, causal: bool = True, window: int | None = None) -> int:
        """Pairs that attention needs."""
        total = 0
        for start, end in zip(self.starts[:-1], self.starts[1:], strict=True):
            position, kept = self._position[start:end], self._always[start:end]
            tokens = np.minimum(position + 1, self.window)
            # Kept rows before the window, and anchors inside of it.
            before = np.concatenate([[0], np.cumsum(kept & ~self._anchor[start:end])])
            first = np.minimum(before[-1], np.maximum(position + 1 - self.window, 0))
            total += int((tokens + first + np.cumsum(self._anchor[start:end])).sum())
        return total

    def computed_pairs(self, path: str, window: int | None = None) -> tuple[int, int]:
        """Pairs computed for real queries, and with padding."""
        if path != "bucketed":
            return (self.rows**2, self.rows**2) if path == "masked" else (self.needed_pairs(),) * 2
        _, keys = self._blocks
        widest = max(map(len, keys))
        return self.rows * widest, len(keys) * _BLOCK * widest


def random_lengths(tokens: int, mean: float, longest: int) -> np.ndarray:
    """Lengths int64 [S] of parts of a window of `tokens`: the same for every window, whatever its text."""
    drawn = np.random.default_rng(0).geometric(1 / mean, tokens).clip(max=longest)
    ends = np.cumsum(drawn)
    inner = ends[ends < tokens]
    return np.diff([0, *inner, tokens]).astype(np.int64)
