"""Sentence encoder: the tokens of one sentence → one sentence embedding (paper §3.1).

Embedding + positions → L bidirectional layers within each sentence → *feature fusion*: sum over the
sentence's tokens, then LayerNorm. (A mean would be the same thing: LayerNorm does not see the scale.) Called
by `sentence_vae.py` and `sllm.py`.
"""

from __future__ import annotations

from torch import Tensor, nn

from pipeline.attention import SegmentLayout
from pipeline.layers import TokenEmbedding, TransformerLayer


class SentenceEncoder(nn.Module):
    """`config` is a `SentenceVAEConfig`."""

    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.embedding = TokenEmbedding(
            config.vocab_size, config.embedding_size, width, config.max_sentence_tokens
        )
        self.layers = nn.ModuleList(
            TransformerLayer(width, config.heads, config.ffn_size, config.dropout)
            for _ in range(config.layers)
        )
        self.fusion_norm = nn.LayerNorm(width)

    def forward(self, tokens_T: Tensor, layout: SegmentLayout) -> Tensor:
        """int64 [T] in S segments → sentence embeddings [S, d]."""
        x = self.embedding(tokens_T, layout.position_of_row)
        for layer in self.layers:
            x = layer(x, layout, causal=False)
        fused = x.new_zeros(len(layout.lengths), x.shape[1]).index_add(0, layout.segment_of_row, x)
        return self.fusion_norm(fused)
