"""Transformer layers shared by the sentence encoder and the sentence decoder (pre-norm, GELU).

Two ways in: `forward` on packed rows [T, d] with a `SegmentLayout`, for training and evaluation; `step` on
one row with a cache of keys and values, for generation. Both use the same weights and give the same numbers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.attention import SegmentLayout, packed_attention


class SelfAttention(nn.Module):
    """Multi-head self-attention with one fused query/key/value projection."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def _project(self, x_Td: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.qkv(x_Td).view(len(x_Td), 3, self.heads, -1).unbind(1)

    def forward(self, x_Td: Tensor, layout: SegmentLayout, causal: bool) -> Tensor:
        """[T, d] → [T, d], within the layout's segments."""
        return self.out(packed_attention(*self._project(x_Td), layout, causal).flatten(1))

    def step(self, x_1d: Tensor, cache: dict[str, Tensor]) -> Tensor:
        """One more row [1, d] of one segment; `cache` holds and receives keys and values [t, H, d_head]."""
        q, k, v = self._project(x_1d)
        cache["k"] = k = torch.cat([cache["k"], k]) if "k" in cache else k
        cache["v"] = v = torch.cat([cache["v"], v]) if "v" in cache else v
        out = F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)))
        return self.out(out[0].transpose(0, 1).flatten(1))


class TransformerLayer(nn.Module):
    """x + attention(norm x); then, in the decoder, + condition(vector); then + ffn(norm x).

    `conditioned=True` adds the decoder's cross-attention. Over ONE vector the softmax is 1 whatever the
    query, so cross-attention is exactly an affine map of that vector: one Linear, computed once per
    sentence, without query, key or norm weights.
    """

    def __init__(self, width: int, heads: int, ffn: int, dropout: float, conditioned: bool = False):
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads)
        self.condition = nn.Linear(width, width) if conditioned else None
        self.ffn_norm = nn.LayerNorm(width)
        self.ffn_in = nn.Linear(width, ffn)
        self.ffn_out = nn.Linear(ffn, width)
        self.dropout = nn.Dropout(dropout)

    def _feed_forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.ffn_out(F.gelu(self.ffn_in(self.ffn_norm(x)))))

    def forward(
        self, x_Td: Tensor, layout: SegmentLayout, causal: bool, vector_Sd: Tensor | None = None
    ) -> Tensor:
        """[T, d] → [T, d]; `vector_Sd` has one row per segment of the layout when the layer is
        conditioned."""
        x = x_Td + self.dropout(self.attention(self.attention_norm(x_Td), layout, causal))
        if self.condition is not None:
            x = x + self.dropout(self.condition(vector_Sd)[layout.segment_of_row])
        return self._feed_forward(x)

    def step(self, x_1d: Tensor, cache: dict[str, Tensor], condition_1d: Tensor | None = None) -> Tensor:
        """One row with cached attention; `condition_1d` is `condition(vector)`, computed once per
        sentence."""
        x = x_1d + self.attention.step(self.attention_norm(x_1d), cache)
        if condition_1d is not None:
            x = x + condition_1d
        return self._feed_forward(x)


class TokenEmbedding(nn.Module):
    """Token + learned position embedding; `embedding_size` below the width adds a projection (OPT-350M's
    shape)."""

    def __init__(self, vocabulary: int, embedding_size: int, width: int, positions: int):
        super().__init__()
        self.token = nn.Embedding(vocabulary, embedding_size)
        self.project = nn.Linear(embedding_size, width, bias=False) if embedding_size != width else None
        self.position = nn.Embedding(positions, width)

    def forward(self, tokens_T: Tensor, positions_T: Tensor) -> Tensor:
        """int64 [T], int64 [T] → [T, d]."""
        x = self.token(tokens_T)
        if self.project is not None:
            x = self.project(x)
        return x + self.position(positions_T)
