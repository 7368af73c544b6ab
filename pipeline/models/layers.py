"""Transformer layers shared by the sentence encoder and the sentence decoder.

`TransformerLayer` (pre-norm, GELU) is the default; `PostNormLayer` is that of the published model (config
`layout: paper`). Two ways in: `forward` on packed rows [T, d] with a `SegmentLayout`, for training and
evaluation; `step` on one new row of each of many sentences, with their keys and values in a cache
(`caches.py`), for generation. Both use the same weights and give the same numbers.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.data.batch import Reach
from pipeline.data.segments import SegmentLayout
from pipeline.models.attention import packed_attention
from pipeline.models.kv_cache import CachedContext, CachedStep

Rotation = tuple[Tensor, Tensor]  # cosines and signed sines, [T, 1, 1, d_head] each


def rotation(positions_T: Tensor, head_dim: int) -> Rotation:
    """Rotary positions (Su et al. 2021, arXiv 2104.09864, §3.4): how query and key of a row at position int64
    [T] turn, so that their product depends on two rows' distance alone; float32. Channels i and
    i + d_head/2 are a pair: `rotate` multiplies the pair's other channel by the sine, once with a minus."""
    rates = 10_000.0 ** (-torch.arange(0, head_dim, 2, device=positions_T.device) / head_dim)
    angles = positions_T[:, None, None, None].float() * rates
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


@lru_cache(maxsize=8)
def rotation_table(positions: int, head_dim: int, device: torch.device) -> Rotation:
    """`rotation` of all positions below `positions`, for generation, which wants few rows at a time."""
    with torch.inference_mode(False):  # it outlives the call that happens to make it
        return rotation(torch.arange(positions, device=device), head_dim)


def rotate(x: Tensor, turn: Rotation) -> Tensor:
    """[T, parts, H, d_head] → the same, turned by the rows' angles."""
    cos, sin = (part.to(x.dtype) for part in turn)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def attend_across(q: Tensor, k: Tensor, v: Tensor, reach: Reach, dropout: float = 0.0) -> Tensor:
    """[T, H, d_head] → the same: every sentence beside the rows that it sees (their queries go unused)."""
    wide = (x.index_select(0, reach.source) for x in (q, k, v))
    return packed_attention(*wide, reach.layout, causal=True, dropout=dropout).index_select(0, reach.own)


class SelfAttention(nn.Module):
    """Multi-head self-attention with one fused query/key/value projection."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def _project(self, x_Td: Tensor, turn: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.qkv(x_Td).view(len(x_Td), 3, self.heads, -1)
        if turn is None:
            return qkv.unbind(1)
        both, v = qkv.split([2, 1], 1)  # queries and keys turn alike
        q, k = rotate(both, turn).unbind(1)
        return q, k, v[:, 0]

    def forward(
        self,
        x_Td: Tensor,
        layout: SegmentLayout,
        causal: bool,
        dropout: float = 0.0,
        turn: Rotation | None = None,
        reach: Reach | None = None,
    ) -> Tensor:
        """[T, d] → [T, d], within the layout's segments, or as far as `reach`; `dropout` acts on the
        attention weights, `turn` on queries and keys."""
        q, k, v = self._project(x_Td, turn)
        if reach is not None:
            return self.out(attend_across(q, k, v, reach, dropout).flatten(1))
        return self.out(packed_attention(q, k, v, layout, causal, dropout=dropout).flatten(1))

    def step(
        self, x_Rd: Tensor, layer: int, step: CachedStep | CachedContext, turn: Rotation | None = None
    ) -> Tensor:
        """New rows of sentences, [R, d] → [R, d]; `step` keeps this layer's keys and values."""
        return self.out(step.attend(layer, *self._project(x_Rd, turn)).flatten(1))


class TransformerLayer(nn.Module):
    """x + attention(norm x); then, in the decoder, + condition(vector); then + ffn(norm x).

    `conditioned`, the width of a vector, adds the decoder's cross-attention. Over ONE vector the softmax is
    1 whatever the query, so cross-attention is exactly an affine map of that vector: one Linear, computed
    once per sentence, without query, key or norm weights. Dropout acts where OPT has it: on what each part
    adds.
    """

    def __init__(self, width: int, heads: int, ffn: int, dropout: float, conditioned: int | None = None):
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads)
        self.condition = nn.Linear(conditioned, width) if conditioned else None
        self.ffn_norm = nn.LayerNorm(width)
        self.ffn_in = nn.Linear(width, ffn)
        self.ffn_out = nn.Linear(ffn, width)
        self.dropout = nn.Dropout(dropout)

    def condition_of(self, vector_Sd: Tensor) -> Tensor | None:
        """What cross-attention adds to every row of a sentence, [S, d]; None in a layer without."""
        return None if self.condition is None else self.condition(vector_Sd)

    def _ffn(self, x: Tensor) -> Tensor:
        """What the feed-forward part adds."""
        return self.ffn_out(F.gelu(self.ffn_in(self.ffn_norm(x))))

    def forward(
        self,
        x_Td: Tensor,
        layout: SegmentLayout,
        causal: bool,
        vector_Sd: Tensor | None = None,
        turn: Rotation | None = None,
        reach: Reach | None = None,
    ) -> Tensor:
        """[T, d] → [T, d]; `vector_Sd` has one row per segment of the layout when the layer is
        conditioned."""
        attended = self.attention(self.attention_norm(x_Td), layout, causal, turn=turn, reach=reach)
        x = x_Td + self.dropout(attended)
        if self.condition is not None:
            x = x + self.dropout(self.condition(vector_Sd)[layout.segment_of_row])
        return x + self.dropout(self._ffn(x))

    def step(
        self,
        x_Rd: Tensor,
        layer: int,
        step: CachedStep | CachedContext,
        condition_Rd: Tensor | None,
        turn: Rotation | None = None,
    ) -> Tensor:
        """New rows of sentences with cached attention; `condition_Rd` is `condition(vector)` of each row's
        sentence, computed once per sentence (None in a layer that is not conditioned). For models in
        evaluation mode: dropout is left out."""
        x = x_Rd + self.attention.step(self.attention_norm(x_Rd), layer, step, turn)
        if condition_Rd is not None:
            x = x + condition_Rd
        return x + self._ffn(x)


class CrossAttention(nn.Module):
    """The published decoder's cross-attention, with all four of its matrices (arXiv 2408.00655, §3.1).

    There is one vector to attend to, so every query gives it the weight 1 and the query and key weights never
    get a gradient. The query is therefore read from the vector, not from the tokens: the same output and the
    same (zero) gradients at one row per sentence.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, vector_Sd: Tensor) -> Tensor:
        """[S, d] → [S, d]."""
        q, k, v = self.qkv(vector_Sd).view(len(vector_Sd), 3, self.heads, -1).unbind(1)
        weight = (q * k).sum(-1, keepdim=True).softmax(-1)  # over one key
        return self.out((weight * v).flatten(1))


class PostNormLayer(TransformerLayer):
    """The published layer (`torch.nn.TransformerEncoderLayer` and `…DecoderLayer` as they come): norm(x +
    attention(x)); in the decoder, norm(x + cross-attention(vector)); then norm(x + ffn(x)), ReLU.

    Dropout acts where those layers have it: on what each part adds, inside the feed-forward part, and on the
    weights of self-attention.
    """

    def __init__(self, width: int, heads: int, ffn: int, dropout: float, conditioned: int | None = None):
        super().__init__(width, heads, ffn, dropout)
        self.condition = CrossAttention(width, heads) if conditioned else None
        self.condition_norm = nn.LayerNorm(width) if conditioned else None

    def _ffn(self, x: Tensor) -> Tensor:
        return self.ffn_out(self.dropout(F.relu(self.ffn_in(x))))

    def forward(
        self,
        x_Td: Tensor,
        layout: SegmentLayout,
        causal: bool,
        vector_Sd: Tensor | None = None,
        turn: Rotation | None = None,
        reach: Reach | None = None,
    ) -> Tensor:
        """[T, d] → [T, d], as `TransformerLayer.forward`; the published layer knows no `turn` and no
        `reach`."""
        weight_dropout = self.dropout.p if self.training else 0.0
        x = self.attention_norm(x_Td + self.dropout(self.attention(x_Td, layout, causal, weight_dropout)))
        if self.condition is not None:
            x = self.condition_norm(x + self.dropout(self.condition(vector_Sd)[layout.segment_of_row]))
        return self.ffn_norm(x + self.dropout(self._ffn(x)))

    def step(
        self,
        x_Rd: Tensor,
        layer: int,
        step: CachedStep | CachedContext,
        condition_Rd: Tensor | None,
        turn: Rotation | None = None,
    ) -> Tensor:
        """New rows of sentences with cached attention, as `TransformerLayer.step`."""
        x = self.attention_norm(x_Rd + self.attention.step(x_Rd, layer, step))
        x = self.condition_norm(x + condition_Rd)
        return self.ffn_norm(x + self._ffn(x))


class TokenEmbedding(nn.Module):
    """Token + position embedding; `embedding_size` below the width adds a projection (OPT-350M's shape).

    kind: `learned`; `sinusoidal`, the fixed ones of Vaswani et al. 2017, §3.5, which hold no weights (beside
    those the token part is scaled by √width, §3.4, or waves of amplitude 1 would drown it); or `rotary`, for
    which nothing is added here (`rotation`).
    """

    def __init__(
        self, vocabulary: int, embedding_size: int, width: int, positions: int, kind: str = "learned"
    ):
        super().__init__()
        self.positions = positions
        self.width = width
        self.token = nn.Embedding(vocabulary, embedding_size)
        self.project = nn.Linear(embedding_size, width, bias=False) if embedding_size != width else None
        self.kind = kind
        self.position = nn.Embedding(positions, width) if kind == "learned" else None

    def forward(self, tokens_T: Tensor, positions_T: Tensor) -> Tensor:
        """int64 [T], int64 [T] below `positions` → [T, d]."""
        x = self.token(tokens_T)
        if self.project is not None:
            x = self.project(x)
        if self.position is not None:
            return x + self.position(positions_T)
        if self.kind == "rotary":
            return x
        waves = sinusoids(self.positions, self.width, x.device).to(x.dtype)
        return x * math.sqrt(self.width) + waves[positions_T]

    def turn(self, positions_T: Tensor, heads: int, below: int | None = None) -> Rotation | None:
        """What rotary positions do to the queries and keys of these rows; None for the other kinds. `below`,
        where it is known, is above all positions: then they are looked up (not in training, which would gain
        nothing, and may run on tensors without values: `inspection.py`)."""
        if self.kind != "rotary":
            return None
        if below is None or torch.is_grad_enabled():
            return rotation(positions_T, self.width // heads)
        cos, sin = rotation_table(below, self.width // heads, positions_T.device)
        return cos[positions_T], sin[positions_T]


def sinusoids(positions: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """float32 [positions, width]: sine and cosine in turn, wavelengths from 2π to 10000 · 2π."""
    rates = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(10_000.0) / width))
    angles = torch.arange(positions, device=device)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)[:, :width]
