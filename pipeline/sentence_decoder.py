"""Sentence decoder: a causal transformer over one sentence's symbols, conditioned on one vector (paper §3.1).

Inputs are (bos, t1 … tn), outputs predict (t1 … tn, sentence end). Called by `sentence_vae.py` (the vector
is the sentence's own embedding) and `sllm.py` (the vector is the backbone's output for the sentence before).
How the vector comes in is the config's `condition`: into every layer, as cross-attention over one vector, or
as rows before the sentence; such a prefix may also hold the last tokens before it (`batches.DecoderRows`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.batches import DecoderRows
from pipeline.caches import CachedPrompt, CachedStep, KeyValueCache
from pipeline.layers import PostNormLayer, TokenEmbedding, TransformerLayer


@dataclass
class DecoderState:
    """R sentences being written, each at a place of its own.

    conditions: per layer [R, d], or None in layers that are not conditioned. cache: places of the prefix, BOS
    and symbols. bos_places: int64 [R], host: the place of BOS in the cache. logits: float32 [V], predict the
    next symbol of a single sentence; filled in by the model that owns the head.
    """

    conditions: list[Tensor | None]
    cache: KeyValueCache
    bos_places: np.ndarray
    logits: Tensor | None = None


class SentenceDecoder(nn.Module):
    """`config` is a `SentenceVAEConfig`."""

    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        paper = config.layout == "paper"
        layer = PostNormLayer if paper else TransformerLayer
        # One position more than the longest sentence: BOS stands before it.
        self.symbols = config.max_sentence_tokens + 1
        self.slot_count, self.context_tokens = config.slots, config.context_tokens
        self.bos_position = self.slot_count + self.context_tokens
        self.bos_id = config.bos_token_id
        self.embedding = TokenEmbedding(
            config.vocab_size,
            config.embedding_size,
            width,
            self.bos_position + self.symbols,
            config.position_kind,
        )
        self.heads = config.heads
        self.slots = nn.Linear(config.vector_size, self.slot_count * width) if self.slot_count else None
        conditioned = config.vector_size if config.condition == "cross_attention" else None
        self.layers = nn.ModuleList(
            layer(width, config.heads, config.ffn_size, config.dropout, conditioned)
            for _ in range(config.layers)
        )
        if conditioned and not paper:
            for layer in self.layers:
                layer.condition.first_deviation = config.condition_range
        # Post-norm layers end in a norm of their own.
        self.final_norm = None if paper else nn.LayerNorm(width)

    def _finish(self, x: Tensor) -> Tensor:
        return x if self.final_norm is None else self.final_norm(x)

    def _embed(self, symbols_R: Tensor, positions_R: Tensor, slot_rows: Tensor | None, vector_Sd: Tensor):
        """[R, d]: symbols, and vectors in the slots."""
        x = self.embedding(symbols_R, positions_R)
        if slot_rows is None:
            return x
        slots = self.slots(vector_Sd).view(-1, x.shape[1])
        return x.index_add(0, slot_rows, slots.to(x.dtype))

    def forward(self, rows: DecoderRows, vector_Sd: Tensor) -> Tensor:
        """Rows of S sentences, vectors [S, vector_size] → hidden states [T+S, d] for the head."""
        # Prefixes of fewer tokens than the config allows (a SentenceVAE's: none) keep BOS at its position.
        x = self._embed(rows.symbols_R, rows.positions_R, rows.slot_rows, vector_Sd)
        turn = self.embedding.turn(rows.positions_R, self.heads)
        for layer in self.layers:
            x = layer(x, rows.layout, causal=True, vector_Sd=vector_Sd, turn=turn)
        return self._finish(x if rows.own_rows is None else x[rows.own_rows])

    def begin(self, vector_Rd: Tensor, contexts: Sequence[Sequence[int]] | None = None) -> DecoderState:
        """Start R sentences, each conditioned on one vector [R, vector_size] and the tokens before it, of
        which the last `context_tokens` are read."""
        count, places = len(vector_Rd), self.embedding.positions
        conditions = [layer.condition_of(vector_Rd) for layer in self.layers]
        state = DecoderState(
            conditions, KeyValueCache(count, most=places, places=places), np.zeros(count, dtype=np.int64)
        )
        self._read_prefixes(state, np.arange(count), vector_Rd, contexts)
        return state

    def restart(
        self,
        state: DecoderState,
        rows: np.ndarray,
        vector_nd: Tensor,
        contexts: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """Start new sentences in some rows (int64 [n], ascending) of a state, as `begin`."""
        rows_n = torch.from_numpy(rows).to(vector_nd.device)
        for layer, conditions in zip(self.layers, state.conditions, strict=True):
            if conditions is not None:
                conditions[rows_n] = layer.condition_of(vector_nd)
        state.cache.lengths[rows] = 0
        state.bos_places[rows] = 0
        self._read_prefixes(state, rows, vector_nd, contexts)

    def _read_prefixes(
        self,
        state: DecoderState,
        rows: np.ndarray,
        vector_nd: Tensor,
        contexts: Sequence[Sequence[int]] | None,
    ) -> None:
        """Slots and context tokens of new sentences into the cache, in one packed pass."""
        keep = self.context_tokens
        contexts = [list(tokens)[-keep:] if keep else [] for tokens in contexts or [[]] * len(rows)]
        lengths = np.asarray([self.slot_count + len(tokens) for tokens in contexts], dtype=np.int64)
        if not lengths.any():
            return
        if not lengths.all():  # some sentences, the first of their documents, have no prefix
            some = np.flatnonzero(lengths)
            vector_nd = vector_nd[torch.from_numpy(some).to(vector_nd.device)]
            rows, lengths, contexts = rows[some], lengths[some], [contexts[n] for n in some]
        device = vector_nd.device
        layout = CachedPrompt(state.cache, rows, lengths, device, 0)
        state.bos_places[rows] = lengths
        slots = np.arange(self.slot_count)
        symbols = np.concatenate([[*([self.bos_id] * self.slot_count), *tokens] for tokens in contexts])
        positions = np.concatenate(
            [[*slots, *range(self.bos_position - len(tokens), self.bos_position)] for tokens in contexts]
        )
        slot_rows = (layout.starts[:-1, None] + slots).reshape(-1)
        positions_R = torch.from_numpy(positions.astype(np.int64)).to(device)
        turn = self.embedding.turn(positions_R, self.heads)
        x = self._embed(
            torch.from_numpy(symbols.astype(np.int64)).to(device),
            positions_R,
            torch.from_numpy(slot_rows).to(device) if self.slot_count else None,
            vector_nd,
        )
        row_of = torch.from_numpy(np.repeat(rows, lengths)).to(device)
        for number, (layer, conditions) in enumerate(zip(self.layers, state.conditions, strict=True)):
            x = layer.step(x, number, layout, None if conditions is None else conditions[row_of], turn)

    def step(self, state: DecoderState, rows: np.ndarray, symbols_n: Tensor) -> Tensor:
        """Feed one symbol (int64 [n]) to each of `rows` (int64 [n], ascending); returns the hidden states
        [n, d] that predict the next ones.

        Raises: ValueError when a sentence already has its most tokens.
        """
        symbol_places = state.cache.lengths[rows] - state.bos_places[rows]
        if (symbol_places >= self.symbols).any():
            raise ValueError("the sentence is full: no position is left for another symbol")
        step = CachedStep(state.cache, rows, symbols_n.device)
        all_rows = len(rows) == state.cache.rows
        rows_n = None if all_rows else torch.from_numpy(rows).to(symbols_n.device)
        positions_n = torch.from_numpy(symbol_places + self.bos_position).to(symbols_n.device)
        x, turn = self.embedding(symbols_n, positions_n), self.embedding.turn(positions_n, self.heads)
        for number, (layer, conditions) in enumerate(zip(self.layers, state.conditions, strict=True)):
            if conditions is not None and not all_rows:
                conditions = conditions[rows_n]
            x = layer.step(x, number, step, conditions, turn)
        return self._finish(x)
