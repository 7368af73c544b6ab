"""Attention within segments of a packed row: no padding is projected, normalised or fed forward.

In: q, k, v of shape [T, H, d_head] (T real rows, back to back) and a `SegmentLayout` that says which rows
belong together (the tokens of a sentence, the positions of a document window). Out: [T, H, d_head]. Rows of
one segment never see another segment. Called by the sentence encoder and decoder (`layers.py`) and, through
the hook at the end of this file, by every Hugging Face decoder-only model (the SLLM's backbone and the
token-level baseline).

Two paths with the same result, tested against each other:
  bucketed  segments of similar length are gathered into [n, L] blocks; only the attention core sees the few
  padded slots masked    one [T, T] block mask: the plain definition, for tests and checks

Neither path holds parameters, so the number of calls of every *submodule* is fixed whatever the batch holds,
which ZeRO-3 demands.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

PATHS = ("bucketed", "masked")
_path = "bucketed"


@contextmanager
def attention_path(name: str):
    """Use one of `PATHS` inside the `with` block (tests, `sllm check`)."""
    global _path
    if name not in PATHS:
        raise ValueError(f"attention path {name!r} is not one of {PATHS}")
    before, _path = _path, name
    try:
        yield
    finally:
        _path = before


def _bucket_edges(longest: int) -> np.ndarray:
    # Steps of about 20 %: few blocks, and little padding even in the L² part.
    edges = [4]
    while edges[-1] < longest:
        edges.append(max(edges[-1] + 4, int(edges[-1] * 1.2)))
    return np.asarray(edges)


class SegmentLayout:
    """Lengths of consecutive segments of one packed row, with the gather plans that the paths need.

    Args:
        lengths: int [n], each >= 1; their sum is the number of rows T.
        device: where the index tensors live.
    """

    def __init__(self, lengths: np.ndarray, device: torch.device | str = "cpu"):
        self.lengths = np.asarray(lengths, dtype=np.int64)
        if self.lengths.size == 0 or self.lengths.min() < 1:
            raise ValueError("a segment layout needs at least one segment, each with at least one row")
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])
        self.rows = int(self.starts[-1])
        self.device = torch.device(device)

    @cached_property
    def segment_of_row(self) -> Tensor:
        """int64 [T]: the segment of every row."""
        return torch.from_numpy(np.repeat(np.arange(len(self.lengths)), self.lengths)).to(self.device)

    @cached_property
    def position_of_row(self) -> Tensor:
        """int64 [T]: 0, 1, 2 … within each segment."""
        positions = np.arange(self.rows) - np.repeat(self.starts[:-1], self.lengths)
        return torch.from_numpy(positions).to(self.device)

    @cached_property
    def first_rows(self) -> Tensor:
        """int64 [n]: each segment's first row."""
        return torch.from_numpy(self.starts[:-1]).to(self.device)

    @cached_property
    def last_rows(self) -> Tensor:
        """int64 [n]: each segment's last row."""
        return torch.from_numpy(self.starts[1:] - 1).to(self.device)

    @cached_property
    def _blocks(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Blocks of similar length, on the host: (row index int64 [n, L], slot is real bool [n, L])."""
        edges = _bucket_edges(int(self.lengths.max()))
        bucket_of = np.searchsorted(edges, self.lengths)
        blocks = []
        for bucket in np.unique(bucket_of):
            members = np.flatnonzero(bucket_of == bucket)
            lengths = self.lengths[members]
            slots = np.arange(lengths.max())
            # Padded slots repeat the segment's last row: a valid row, masked out as a key, dropped as a
            # query.
            index = self.starts[members][:, None] + np.minimum(slots, lengths[:, None] - 1)
            blocks.append((index, slots < lengths[:, None]))
        return blocks

    @cached_property
    def buckets(self) -> list[tuple[Tensor, Tensor | None]]:
        """The blocks on the device: (row index int64 [n, L], key mask bool [n, 1, 1, L] or None when nothing
        is padded)."""
        return [
            (
                torch.from_numpy(index).to(self.device),
                None if real.all() else torch.from_numpy(real)[:, None, None, :].to(self.device),
            )
            for index, real in self._blocks
        ]

    @cached_property
    def restore(self) -> Tensor:
        """int64 [T]: where each row's result lies in the concatenated block results."""
        where = np.empty(self.rows, dtype=np.int64)
        offset = 0
        for index, real in self._blocks:
            where[index[real]] = offset + np.flatnonzero(real)
            offset += index.size
        return torch.from_numpy(where).to(self.device)

    @property
    def slots(self) -> int:
        """Query slots that the bucketed path computes; `rows / slots` of them are real."""
        return sum(index.size for index, _ in self._blocks)

    @cached_property
    def block_mask(self) -> Tensor:
        """bool [T, T]: row i and row j lie in one segment."""
        return self.segment_of_row[:, None] == self.segment_of_row[None, :]


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SegmentLayout,
    causal: bool,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Scaled dot-product attention within the layout's segments.

    Args:
        q, k, v: [T, H, d_head], T = layout.rows.
        causal: rows see only rows of their segment up to themselves.
        scale: factor of q·k; None is 1/sqrt(d_head).
    Returns: [T, H, d_head].
    """
    if _path == "masked":
        mask = layout.block_mask
        if causal:
            mask = mask & torch.ones_like(mask).tril()
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            k.transpose(0, 1)[None],
            v.transpose(0, 1)[None],
            mask,
            dropout,
            scale=scale,
        )
        return out[0].transpose(0, 1)
    outs = []
    for index, mask in layout.buckets:
        blocks = (x[index].transpose(1, 2) for x in (q, k, v))  # [n, H, L, d_head]
        # Padding stands at the end, so a causal block needs no key mask: no real row reaches it.
        key_mask = None if causal else mask
        out = F.scaled_dot_product_attention(*blocks, key_mask, dropout, is_causal=causal, scale=scale)
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outs)[layout.restore]


# --- the hook for Hugging Face models -------------------------------------------------------------

HF_ATTENTION = "sllm_packed"


def _hf_attention(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, layout=None, **kwargs
):
    """Attention function with Hugging Face's signature: q, k, v [1, H, T, d_head] → ([1, T, H, d_head],
    None).

    Without a `layout` (cached generation, a model called by itself) it is Hugging Face's own SDPA.
    """
    if layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    rows = (x[0].transpose(0, 1) for x in (query, key, value))
    return packed_attention(*rows, layout, causal=True, scale=scaling, dropout=dropout)[None], None


AttentionInterface.register(HF_ATTENTION, _hf_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(HF_ATTENTION, sdpa_mask)
