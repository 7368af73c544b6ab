"""Sentence encoder: the tokens of one sentence → one sentence embedding (paper §3.1).

Embedding + positions → L bidirectional layers within each sentence → *feature fusion* → LayerNorm. Config
`fusion`:
  sum        over the sentence's tokens (the paper's)
  mean       the same up to LayerNorm's epsilon, because LayerNorm is scale invariant
  attention  a mean with learned weights: one query per head, a softmax over the sentence's tokens
  last       the last token's row
With `vectors` above 1, attention pools so many vectors with separate queries, concatenated in one embedding
[vectors · d].
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.data.segments import SegmentLayout
from pipeline.models.attention import packed_attention
from pipeline.models.layers import PostNormLayer, TokenEmbedding, TransformerLayer
from pipeline.models.step import LayerStep, turns

# Initial log-variance: noise of e⁻² against embeddings of size 1. With a variance of 1 the decoder would
# learn to ignore its vector before the encoder has put anything into it.
START_LOG_VARIANCE = -4.0


class AttentionPooling(nn.Module):
    """A learned query per head, a softmax over each sentence's tokens, the weighted mean of its rows."""

    def __init__(self, width: int, heads: int, vectors: int = 1):
        super().__init__()
        self.heads, self.vectors = heads, vectors
        self.queries = nn.Linear(width, vectors * heads, bias=False)

    def forward(self, x_Td: Tensor, layout: SegmentLayout) -> Tensor:
        """[T, d] → [S, vectors · d]; every head weights its d/heads channels. Packed: real rows only."""
        segment_T, sentences = layout.segment_of_row, len(layout.lengths)
        # Scores read normalised rows: the residual stream of a pre-norm encoder has no fixed scale.
        scores_TH = self.queries(F.layer_norm(x_Td, x_Td.shape[-1:])).float()
        index_TH = segment_T[:, None].expand_as(scores_TH)
        # The largest score of a sentence cancels out of its softmax, so no gradient goes through it.
        top_SH = scores_TH.new_zeros(sentences, self.vectors * self.heads).scatter_reduce(
            0, index_TH, scores_TH.detach(), "amax", include_self=False
        )
        raised_TH = (scores_TH - top_SH.index_select(0, segment_T)).exp()
        total_SH = torch.zeros_like(top_SH).index_add(0, segment_T, raised_TH)
        weights_TH = (raised_TH / total_SH.index_select(0, segment_T)).to(x_Td.dtype)
        channels_THd = x_Td.view(len(x_Td), 1, self.heads, -1)
        weighted_Td = (channels_THd * weights_TH.view(-1, self.vectors, self.heads, 1)).flatten(1)
        return _sum_rows(weighted_Td, layout)


def _attend_both_ways(
    layout: SegmentLayout, layer: int, q: Tensor, k: Tensor, v: Tensor, *limits: None
) -> Tensor:
    """Attention of a `LayerStep` without a cache: `packed_attention` with less around it for one sentence."""
    if len(layout.lengths) > 1 or q.device.type != "cpu" or layout.steady:
        return packed_attention(q, k, v, layout, causal=False)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)


class SentenceEncoder(nn.Module):
    """`config` is a `SentenceVAEConfig`."""

    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        paper = config.layout == "paper"
        layer = PostNormLayer if paper else TransformerLayer
        self.fusion = config.fusion
        self.heads = config.heads
        positions = config.max_sentence_tokens + config.published_inputs  # BOS
        self.embedding = TokenEmbedding(
            config.vocab_size, config.embedding_size, width, positions, config.position_kind
        )
        self.layers = nn.ModuleList(
            layer(width, config.heads, config.ffn_size, config.dropout) for _ in range(config.encoder_layers)
        )
        pools = config.fusion == "attention"
        self.pooling = AttentionPooling(width, config.heads, config.vectors) if pools else None
        self.fusion_norm = nn.LayerNorm(config.vector_size)
        self.log_variance = nn.Linear(config.vector_size, config.vector_size) if config.variational else None

    def forward(
        self,
        tokens_T: Tensor,
        layout: SegmentLayout,
        with_variance: bool = False,
        steps: Sequence[LayerStep] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """int64 [T] in S segments → sentence embeddings [S, d] (variational: the means).

        with_variance: also give the log-variances [S, d] of a variational encoder. steps: of the layers, in
        generation.
        """
        x = self.embedding(tokens_T, layout.position_of_row)
        if steps is None:
            turn = self.embedding.turn(layout.position_of_row, self.heads)
            for layer in self.layers:
                x = layer(x, layout, causal=False, turn=turn)
        else:
            turn = turns(self.embedding, self.heads, layout.position_of_row, self.embedding.positions)
            attend = partial(_attend_both_ways, layout)
            for step in steps:
                x = step(x, attend, turn, None, layout.rows)
            x = x[: layout.rows]
        if self.pooling is not None:
            fused = self.pooling(x, layout)
        elif self.fusion == "last":
            fused = x.index_select(0, layout.last_rows)
        else:
            fused = _sum_rows(x, layout)
            if self.fusion == "mean":
                counts = (layout.last_rows - layout.first_rows + 1)[:, None]
                fused = fused / counts.to(x.dtype)
        embedding = self.fusion_norm(fused)
        if not with_variance:
            return embedding
        return embedding, self.log_variance(embedding) + START_LOG_VARIANCE


def _sum_rows(x_Td: Tensor, layout: SegmentLayout) -> Tensor:
    """[T, d] → [S, d]: the sum of each segment's rows, in float32 at least."""
    exact = torch.promote_types(x_Td.dtype, torch.float32)  # in bf16 each of up to 64 additions would round
    sums_Sd = x_Td.new_zeros(len(layout.lengths), x_Td.shape[1], dtype=exact)
    return sums_Sd.index_add(0, layout.segment_of_row, x_Td.to(exact)).to(x_Td.dtype)
