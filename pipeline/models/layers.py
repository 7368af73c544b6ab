"""Transformer layers of the sentence encoder and the sentence decoder.

`TransformerLayer` (pre-norm, GELU) is the default; `PostNormLayer` is the published model's (config
`layout: paper`). `forward` runs on packed rows [T, d] with a `SegmentLayout` (training, evaluation);
generation runs the same layers with cached keys and values by `step.py`.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from pipeline.data.batch import ContextSpans
from pipeline.data.segments import Band, SegmentLayout
from pipeline.models.attention import band_attention, bands_attention, packed_attention

Rotation = tuple[Tensor, Tensor]  # cosines and signed sines, [T, 1, 1, d_head] each


def rotation(positions_T: Tensor, head_dim: int) -> Rotation:
    """Rotary positions (Su et al. 2021, arXiv 2104.09864, §3.4) of rows at int64 [T], in float32.

    Channels i and i + d_head/2 are a pair: `rotate` multiplies the pair's other channel by the sine, once
    negated. The product of a query and a key then depends on their distance only."""
    rates = 10_000.0 ** (-torch.arange(0, head_dim, 2, device=positions_T.device) / head_dim)
    angles = positions_T[:, None, None, None].float() * rates
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x: Tensor, turn: Rotation) -> Tensor:
    """[T, parts, H, d_head] → the same, rotated by the rows' angles."""
    cos, sin = (part.to(x.dtype) for part in turn)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def attend_across(q: Tensor, k: Tensor, v: Tensor, spans: ContextSpans, dropout: float = 0.0) -> Tensor:
    """[T, H, d_head] → [T, H, d_head]: each sentence attends to its context and itself; queries of context
    rows are dropped."""
    wide = (x.index_select(0, spans.source) for x in (q, k, v))
    return packed_attention(*wide, spans.layout, causal=True, dropout=dropout).index_select(0, spans.own)


class Projections(nn.Linear):
    """`count` linear maps of one input, whose matrices lie on top of each other in the weight."""

    def __init__(self, width: int, out: int, count: int):
        super().__init__(width, count * out)
        self.count = count


class SelfAttention(nn.Module):
    """Multi-head self-attention with one fused query/key/value projection.

    window: rows that a causal row sees, itself included; None: all of its segment up to itself."""

    def __init__(self, width: int, heads: int, window: int | None = None):
        super().__init__()
        self.heads, self.window = heads, window
        self.qkv = Projections(width, width, 3)
        self.out = nn.Linear(width, width)

    def _project(self, x_Td: Tensor, turn: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.qkv(x_Td).view(len(x_Td), 3, self.heads, -1)
        if turn is None:
            return qkv.unbind(1)
        both, v = qkv.split([2, 1], 1)  # queries and keys rotate alike
        q, k = rotate(both, turn).unbind(1)
        return q, k, v.squeeze(1)

    def forward(
        self,
        x_Td: Tensor,
        layout: SegmentLayout,
        causal: bool,
        dropout: float = 0.0,
        turn: Rotation | None = None,
        spans: ContextSpans | None = None,
    ) -> Tensor:
        """[T, d] → [T, d], within the layout's segments, or across them by `spans`; `dropout` is of attention
        weights, `turn` rotates queries and keys."""
        q, k, v = self._project(x_Td, turn)
        if spans is not None:
            return self.out(attend_across(q, k, v, spans, dropout).flatten(1))
        attended = packed_attention(q, k, v, layout, causal, dropout=dropout, window=self.window)
        return self.out(attended.flatten(1))


class LearnedBias(nn.Module):
    """A control of `condition`: the same parameters, but the same output whatever the vector is."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear

    def forward(self, vector_Sd: Tensor) -> Tensor:
        return self.linear(torch.ones_like(vector_Sd))


class TransformerLayer(nn.Module):
    """x + attention(norm x); then, in the decoder, + condition(vector); then + ffn(norm x).

    `conditioned`, the width of a vector, adds the decoder's cross-attention. Over ONE vector the softmax is
    1 whatever the query, so cross-attention is exactly an affine map of that vector: one Linear, computed
    once per sentence, without query, key or norm weights. Dropout is where OPT has it: on the output of each
    part. `window`: of self-attention.
    """

    post_norm = False

    def __init__(
        self,
        width: int,
        heads: int,
        ffn: int,
        dropout: float,
        conditioned: int | None = None,
        window: int | None = None,
    ):
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads, window)
        self.condition: nn.Module | None = nn.Linear(conditioned, width) if conditioned else None
        self.condition_norm: nn.LayerNorm | None = None
        self.ffn_norm = nn.LayerNorm(width)
        self.ffn_in = nn.Linear(width, ffn)
        self.ffn_out = nn.Linear(ffn, width)
        self.dropout = nn.Dropout(dropout)

    def condition_of(self, vector_Sd: Tensor) -> Tensor | None:
        """What cross-attention adds to every row of a sentence, [S, d]; None in a layer without."""
        return None if self.condition is None else self.condition(vector_Sd)

    def _ffn(self, x: Tensor) -> Tensor:
        return self.ffn_out(F.gelu(self.ffn_in(x)))

    def _before(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        """What a part reads: `x`, normalised in a pre-norm layer."""
        return x if self.post_norm else norm(x)

    def _add(self, x: Tensor, added: Tensor, norm: nn.Module | None) -> Tensor:
        """`x` plus what a part adds, normalised in a post-norm layer."""
        x = x + (self.dropout(added) if self.training else added)
        return norm(x) if self.post_norm else x

    def _rest(self, x: Tensor, condition: Tensor | None) -> Tensor:
        """The parts after attention; `condition` has a row for each of `x`."""
        if condition is not None:
            x = self._add(x, condition, self.condition_norm)
        return self._add(x, self._ffn(self._before(x, self.ffn_norm)), self.ffn_norm)

    def forward(
        self,
        x_Td: Tensor,
        layout: SegmentLayout,
        causal: bool,
        vector_Sd: Tensor | None = None,
        turn: Rotation | None = None,
        spans: ContextSpans | None = None,
    ) -> Tensor:
        """[T, d] → [T, d]; `vector_Sd` has one row per segment of the layout if the layer is conditioned."""
        weight_dropout = self.dropout.p if self.post_norm and self.training else 0.0

        attended = self.attention(
            self._before(x_Td, self.attention_norm), layout, causal, weight_dropout, turn, spans
        )
        x = self._add(x_Td, attended, self.attention_norm)
        condition = (
            None
            if self.condition is None
            else self.condition(vector_Sd).index_select(0, layout.segment_of_row)
        )
        return self._rest(x, condition)


class CrossAttention(nn.Module):
    """The published decoder's cross-attention, with all four of its matrices (arXiv 2408.00655, §3.1).

    There is one vector to attend to, so its weight is 1 for every query, and the query and key weights never
    get a gradient. The query is therefore computed from the vector, not from the tokens: same output and same
    (zero) gradients, at one row per sentence.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = Projections(width, width, 3)
        self.out = nn.Linear(width, width)

    def forward(self, vector_Sd: Tensor) -> Tensor:
        """[S, d] → [S, d]."""
        q, k, v = self.qkv(vector_Sd).view(len(vector_Sd), 3, self.heads, -1).unbind(1)
        weight = (q * k).sum(-1, keepdim=True).softmax(-1)  # over one key
        return self.out((weight * v).flatten(1))


class PostNormLayer(TransformerLayer):
    """The published layer (torch's `TransformerEncoderLayer` and `TransformerDecoderLayer`): norm(x +
    attention(x)); in the decoder, norm(x + cross-attention(vector)); then norm(x + ffn(x)), ReLU.

    Dropout is where those layers have it: on the output of each part, inside the feed-forward part, and on
    the weights of self-attention. It has no rotary positions and no context.
    """

    post_norm = True

    def __init__(self, width: int, heads: int, ffn: int, dropout: float, conditioned: int | None = None):
        super().__init__(width, heads, ffn, dropout)
        self.condition = CrossAttention(width, heads) if conditioned else None
        self.condition_norm = nn.LayerNorm(width) if conditioned else None

    def _ffn(self, x: Tensor) -> Tensor:
        return self.ffn_out(self.dropout(F.relu(self.ffn_in(x))))


class LinearFromZero(nn.Linear):
    """A linear map whose weights a model's `_init_weights` sets to zero."""


class SentenceMemory(nn.Module):
    """x + attention to backbone outputs, which starts as x. Rotary positions count sentences."""

    def __init__(self, width: int, vector: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key_value = Projections(vector, width, 2)
        self.out = LinearFromZero(width, width)

    def keys_values(self, vectors_Bd: Tensor, turn: Rotation) -> tuple[Tensor, Tensor]:
        """Keys and values of outputs [B, d_backbone], [B, H, d_head] each."""
        k, v = self.key_value(vectors_Bd).view(len(vectors_Bd), 2, self.heads, -1).split(1, 1)
        return rotate(k, turn).squeeze(1), v.squeeze(1)

    def queries(self, x_Rd: Tensor, turn: Rotation) -> Tensor:
        """[R, H, d_head]."""
        return rotate(self.query(self.norm(x_Rd)).view(len(x_Rd), 1, self.heads, -1), turn).squeeze(1)

    def forward(
        self, x_Rd: Tensor, vectors_Bd: Tensor, band: Band | list[Band], turn_R: Rotation, turn_B: Rotation
    ) -> Tensor:
        """[R, d] → [R, d]; turns of the rows' and the outputs' sentence numbers."""
        k, v = self.keys_values(vectors_Bd, turn_B)
        attend = bands_attention if isinstance(band, list) else band_attention
        return x_Rd + self.out(attend(self.queries(x_Rd, turn_R), k, v, band).flatten(1))


class TokenEmbedding(nn.Module):
    """Token + position embedding; `embedding_size` below the width adds a projection (OPT-350M's shape).

    kind: `learned`; `sinusoidal`, fixed as in Vaswani et al. 2017, §3.5, with token embeddings scaled by
    √width (§3.4) against waves of amplitude 1; or `rotary`, where nothing is added here (`rotation`).
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

    def turn(self, positions_T: Tensor, heads: int) -> Rotation | None:
        """The rotation of these rows' queries and keys; None unless the kind is `rotary`."""
        return rotation(positions_T, self.width // heads) if self.kind == "rotary" else None


def sinusoids(positions: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """float32 [positions, width]: alternating sines and cosines, wavelengths from 2π to 10000 · 2π."""
    rates = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(10_000.0) / width))
    angles = torch.arange(positions, device=device)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)[:, :width]


def transformer_layers(model: nn.Module) -> list[nn.Module]:
    """All layers of a model's encoder, decoder and backbone."""
    backbone = getattr(model, "backbone", None) or getattr(model, "model", None)
    kinds = set(getattr(backbone, "_no_split_modules", None) or ())
    return [m for m in model.modules() if isinstance(m, TransformerLayer) or type(m).__name__ in kinds]


def checkpoint_layers(model: nn.Module, again: Callable[[], Any] = contextlib.nullcontext) -> None:
    """Activation checkpointing: keep only the input of each transformer layer for the backward pass, which
    recomputes the rest with the same dropout. again: makes the context of a recomputation."""
    contexts = lambda: (contextlib.nullcontext(), again())  # noqa: E731
    for layer in transformer_layers(model):
        layer.forward = functools.partial(
            torch.utils.checkpoint.checkpoint, layer.forward, use_reentrant=False, context_fn=contexts
        )
