"""Sentence decoder: a causal transformer over one sentence's symbols, conditioned on one vector (paper §3.1).

Inputs are (bos, t1 … tn), outputs predict (t1 … tn, sentence end). Called by `sentence_vae.py` (the vector
is the sentence's own embedding) and `sllm.py` (the vector is the backbone's output for the sentence before).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pipeline.attention import SegmentLayout
from pipeline.layers import PostNormLayer, TokenEmbedding, TransformerLayer


@dataclass
class DecoderState:
    """One sentence being written: per-layer condition [1, d] and key/value cache, symbols fed, last hidden
    [1, d].

    `logits` float32 [V] predict the next symbol; filled in by the model that owns the head.
    """

    conditions: list[Tensor]
    caches: list[dict[str, Tensor]] = field(default_factory=list)
    fed: int = 0
    hidden: Tensor | None = None
    logits: Tensor | None = None


class SentenceDecoder(nn.Module):
    """`config` is a `SentenceVAEConfig`."""

    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        paper = config.layout == "paper"
        layer = PostNormLayer if paper else TransformerLayer
        # One position more than the longest sentence: BOS stands before it.
        self.embedding = TokenEmbedding(
            config.vocab_size, config.embedding_size, width, config.max_sentence_tokens + 1, sinusoidal=paper
        )
        self.layers = nn.ModuleList(
            layer(width, config.heads, config.ffn_size, config.dropout, conditioned=True)
            for _ in range(config.layers)
        )
        # Post-norm layers end in a norm of their own.
        self.final_norm = None if paper else nn.LayerNorm(width)

    def _finish(self, x: Tensor) -> Tensor:
        return x if self.final_norm is None else self.final_norm(x)

    def forward(self, symbols_N: Tensor, layout: SegmentLayout, vector_Sd: Tensor) -> Tensor:
        """int64 [T+S] (BOS before every sentence), vectors [S, d] → hidden states [T+S, d] for the head."""
        x = self.embedding(symbols_N, layout.position_of_row)
        for layer in self.layers:
            x = layer(x, layout, causal=True, vector_Sd=vector_Sd)
        return self._finish(x)

    def begin(self, vector_1d: Tensor) -> DecoderState:
        """Start a sentence conditioned on one vector [1, d]."""
        conditions = [layer.condition(vector_1d) for layer in self.layers]
        return DecoderState(conditions, [{} for _ in self.layers])

    def step(self, state: DecoderState, symbol: int) -> Tensor:
        """Feed one symbol; returns and stores the hidden state [1, d] that predicts the next one.

        Raises: ValueError when the sentence already has its most tokens.
        """
        if state.fed >= self.embedding.positions:
            raise ValueError("the sentence is full: no position is left for another symbol")
        device = state.conditions[0].device
        x = self.embedding(torch.tensor([symbol], device=device), torch.tensor([state.fed], device=device))
        for layer, cache, condition in zip(self.layers, state.caches, state.conditions, strict=True):
            x = layer.step(x, cache, condition)
        state.fed += 1
        state.hidden = self._finish(x)
        return state.hidden
