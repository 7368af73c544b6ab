"""Sentence decoder: a causal transformer over one sentence's symbols, conditioned on one vector (paper §3.1).

Inputs are (bos, t1 … tn), outputs predict (t1 … tn, sentence end). Called by `sentence_vae.py` (the vector
is the sentence's own embedding) and `sllm.py` (the vector is the backbone's output for the sentence before).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.attention import SegmentLayout
from pipeline.caches import CachedStep, KeyValueCache
from pipeline.layers import PostNormLayer, TokenEmbedding, TransformerLayer


@dataclass
class DecoderState:
    """R sentences being written, each at a place of its own: per layer the conditions [R, d], and the cache.

    `logits` float32 [V] predict the next symbol of a single sentence; filled in by the model that owns the
    head.
    """

    conditions: list[Tensor]
    cache: KeyValueCache
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

    def begin(self, vector_Rd: Tensor) -> DecoderState:
        """Start R sentences, each conditioned on one vector [R, d]."""
        conditions = [layer.condition(vector_Rd) for layer in self.layers]
        positions = self.embedding.positions
        return DecoderState(conditions, KeyValueCache(len(vector_Rd), most=positions, places=positions))

    def restart(self, state: DecoderState, rows: np.ndarray, vector_nd: Tensor) -> None:
        """Start new sentences in some rows (int64 [n]) of a state, conditioned on [n, d]."""
        rows_n = torch.from_numpy(rows).to(vector_nd.device)
        for layer, conditions in zip(self.layers, state.conditions, strict=True):
            conditions[rows_n] = layer.condition(vector_nd)
        state.cache.lengths[rows] = 0

    def step(self, state: DecoderState, rows: np.ndarray, symbols_n: Tensor) -> Tensor:
        """Feed one symbol (int64 [n]) to each of `rows` (int64 [n], ascending); returns the hidden states
        [n, d] that predict the next ones.

        Raises: ValueError when a sentence already has its most tokens.
        """
        if (state.cache.lengths[rows] >= self.embedding.positions).any():
            raise ValueError("the sentence is full: no position is left for another symbol")
        step = CachedStep(state.cache, rows, symbols_n.device)
        all_rows = len(rows) == state.cache.rows
        rows_n = None if all_rows else torch.from_numpy(rows).to(symbols_n.device)
        x = self.embedding(symbols_n, step.position_of_row)
        for number, (layer, conditions) in enumerate(zip(self.layers, state.conditions, strict=True)):
            x = layer.step(x, number, step, conditions if all_rows else conditions[rows_n])
        return self._finish(x)
