"""Sentence decoder: a causal transformer over one sentence's symbols, conditioned on one vector (paper §3.1).

Inputs are (bos, t1 … tn), outputs predict (t1 … tn, sentence end). The vector is the sentence's own embedding
(SentenceVAE) or the backbone's output for the sentence before (SLLM). It enters every layer by
cross-attention over one vector, or as rows before BOS (config `condition`). With `context_sentences` a row
also attends to the sentences before its own. Their rows are computed once, so deeper layers see further back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.data.batch import DecoderRows, context_spans
from pipeline.data.segments import SegmentLayout
from pipeline.generation.replay import Replay, bucket, static_shapes
from pipeline.generation.upload import upload
from pipeline.models.attention import packed_attention
from pipeline.models.kv_cache import CachedContext, CachedStep, KeyValueCache, StaticStep
from pipeline.models.layers import (
    LearnedBias,
    PostNormLayer,
    Rotation,
    TokenEmbedding,
    TransformerLayer,
    attend_across,
)
from pipeline.models.step import Apply, LayerStep, embedded, norm, token_layer, turns

DecodedSentence = tuple[list[int], Tensor]  # an earlier sentence: its tokens, its vector [vector_size]


@dataclass
class DecoderState:
    """R sentences being generated, each at its own place.

    conditions: per layer [R, d], or None in layers that are not conditioned. cache: places of the context
    sentences, slots, BOS and symbols. bos_places: int64 [R], host: the place of BOS in the cache. ahead:
    int64 [R], host: the position of a row's first place. steps, finish: of the layers and the final norm.
    static: whether steps are replayed, by `replay`. head: from hidden states to logits. turns: by position.
    logits: float32 [V], predict the next symbol of a single sentence; set by the model that owns the head.
    """

    conditions: list[Tensor | None]
    cache: KeyValueCache
    bos_places: np.ndarray
    ahead: np.ndarray
    steps: list[LayerStep]
    finish: Apply
    device: torch.device
    static: bool
    head: Apply = torch.Tensor.float
    turns: dict[int, Rotation | None] = field(default_factory=dict)
    replay: Replay | None = None
    logits: Tensor | None = None

    @property
    def bytes(self) -> int:
        """Bytes allocated."""
        return self.cache.bytes


class SentenceDecoder(nn.Module):
    """`config` is a `SentenceVAEConfig`."""

    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        paper = config.layout == "paper"
        layer = PostNormLayer if paper else TransformerLayer
        self.heads, self.bos_id = config.heads, config.bos_token_id
        # One position more than the longest sentence: BOS stands before it.
        self.symbols = config.max_sentence_tokens + 1
        self.slot_count, self.context = config.slots, config.context_sentences
        rows = self.slot_count + self.symbols
        self.places = (self.context + 1) * rows
        # Also counts the sentences that the context depends on, layer by layer.
        self.positions = (self.context * config.layers + 1) * rows
        self.embedding = TokenEmbedding(
            config.vocab_size, config.embedding_size, width, rows, config.position_kind
        )
        self.slots = nn.Linear(config.vector_size, self.slot_count * width) if self.slot_count else None
        conditioned = config.vector_size if config.condition in ("cross_attention", "constant") else None
        self.layers = nn.ModuleList(
            layer(width, config.heads, config.ffn_size, config.dropout, conditioned)
            for _ in range(config.layers)
        )
        if conditioned and not paper:
            for layer in self.layers:
                layer.condition.first_deviation = config.condition_range
                if config.condition == "constant":
                    layer.condition = LearnedBias(layer.condition)
        # Post-norm layers end in a norm.
        self.final_norm = None if paper else nn.LayerNorm(width)

    @property
    def remembers(self) -> int:
        """Earlier sentences that a new one depends on, through all layers."""
        return self.context * len(self.layers)

    def _finish(self, x: Tensor) -> Tensor:
        return x if self.final_norm is None else self.final_norm(x)

    def _embed(
        self, symbols_R: Tensor, positions_R: Tensor, slot_rows: Tensor | None, vector_Sd: Tensor
    ) -> Tensor:
        """[R, d]: embedded symbols, and vectors in the slots."""
        x = self.embedding(symbols_R, positions_R)
        if slot_rows is None:
            return x
        slots = self.slots(vector_Sd).view(-1, x.shape[1])
        return x.index_add(0, slot_rows, slots.to(x.dtype))

    def forward(self, rows: DecoderRows, vector_Sd: Tensor) -> Tensor:
        """Rows of S sentences, vectors [S, vector_size] → hidden states [T+S, d] for the head."""
        x = self._embed(rows.symbols_R, rows.positions_R, rows.slot_rows, vector_Sd)
        turn = self.embedding.turn(rows.positions_R, self.heads)
        for layer in self.layers:
            x = layer(x, rows.layout, causal=True, vector_Sd=vector_Sd, turn=turn, spans=rows.spans)
        return self._finish(x if rows.own_rows is None else x.index_select(0, rows.own_rows))

    def begin(
        self, vector_Rd: Tensor, contexts: Sequence[Sequence[DecodedSentence]] | None = None
    ) -> DecoderState:
        """Start R sentences, each conditioned on one vector [R, vector_size], after the sentences before it
        (the last `remembers` are enough; none without `context_sentences`)."""
        count = len(vector_Rd)
        state = DecoderState(
            [layer.condition_of(vector_Rd) for layer in self.layers],
            KeyValueCache(count, most=self.places, places=self.places),
            bos_places=np.zeros(count, dtype=np.int64),
            ahead=np.zeros(count, dtype=np.int64),
            steps=[token_layer(layer, number) for number, layer in enumerate(self.layers)],
            finish=norm(self.final_norm),
            device=vector_Rd.device,
            static=static_shapes(vector_Rd.device),
        )
        self._read(state, np.arange(count), vector_Rd, contexts)
        return state

    def restart(
        self,
        state: DecoderState,
        rows: np.ndarray,
        vector_nd: Tensor,
        contexts: Sequence[Sequence[DecodedSentence]] | None = None,
    ) -> None:
        """Start new sentences in some rows (int64 [n], ascending) of a state, as `begin`."""
        every = len(rows) == state.cache.rows
        rows_n = None if every else upload(rows, state.device)
        for layer, conditions in zip(self.layers, state.conditions, strict=True):
            if conditions is None:
                continue
            if rows_n is None:
                conditions.copy_(layer.condition_of(vector_nd))
            else:
                conditions[rows_n] = layer.condition_of(vector_nd)
        for places in (state.cache.lengths, state.bos_places, state.ahead):
            places[rows] = 0
        self._read(state, rows, vector_nd, contexts)

    def _read(
        self,
        state: DecoderState,
        rows: np.ndarray,
        vector_nd: Tensor,
        contexts: Sequence[Sequence[DecodedSentence]] | None,
    ) -> None:
        """Fill the cache with what precedes new sentences (context, slots), in one packed pass."""
        count, keep = self.slot_count, self.remembers
        pasts = [list(past)[-keep:] if keep else [] for past in contexts or [()] * len(rows)]
        if not count:
            some = [n for n, past in enumerate(pasts) if past]
            rows, pasts = rows[some], [pasts[n] for n in some]
            vector_nd = vector_nd[some]
        if not len(rows):
            return
        # Packed sentences: of every row its context, then the new sentence, which has slots only.
        symbols, vectors, first, ends, kept_from = [], [], [], [], []
        lengths: list[int] = []
        for past, vector_d in zip(pasts, vector_nd, strict=True):
            begin = len(lengths)
            for tokens, past_vector_d in past:
                symbols += [self.bos_id] * (count + 1) + list(tokens)
                lengths.append(count + 1 + len(tokens))
                vectors.append(past_vector_d)
            if count:
                symbols += [self.bos_id] * count
                lengths.append(count)
                vectors.append(vector_d)
            first += [max(begin, number - self.context) for number in range(begin, len(lengths))]
            ends.append(len(lengths))
            kept_from.append(max(begin, begin + len(past) - self.context))
        layout = SegmentLayout(np.asarray(lengths), vector_nd.device, state.cache.steady)
        starts = layout.starts
        ends_R = np.asarray([starts[end] for end in ends])
        begins_R = np.concatenate([[0], ends_R[:-1]])
        kept = np.stack([starts[kept_from], ends_R], axis=1)
        positions = np.arange(layout.rows) - np.repeat(begins_R, ends_R - begins_R)
        if self.context:
            spans = context_spans(layout.lengths, np.asarray(first), layout.device, state.cache.steady)
            attend: partial[Tensor] = partial(attend_across, spans=spans)
        else:
            attend = partial(packed_attention, layout=layout, causal=True)
        cached = CachedContext(state.cache, rows, kept, attend, layout.device)
        state.bos_places[rows] = kept[:, 1] - kept[:, 0]
        state.ahead[rows] = kept[:, 0] - begins_R
        vector_Sd, segment_of_row = torch.stack(vectors), layout.segment_of_row
        slot_rows = (starts[:-1, None] + np.arange(count)).reshape(-1)
        positions_R, symbols_R, slot_rows_n = (
            upload(np.asarray(x, dtype=np.int64), layout.device) for x in (positions, symbols, slot_rows)
        )
        turn = turns(self.embedding, self.heads, positions_R, self.positions)
        x = self._embed(symbols_R, positions_R, slot_rows_n if count else None, vector_Sd)
        for step, layer in zip(state.steps, self.layers, strict=True):
            condition = layer.condition_of(vector_Sd)
            given = None if condition is None else condition[segment_of_row]
            x = step(x, cached.attend, turn, given, layout.rows)

    def step(self, state: DecoderState, rows: np.ndarray, symbols: Sequence[int] | Tensor) -> Tensor:
        """Feed one symbol to each of `rows` (int64 [n], ascending) and return the hidden states [n, d] that
        predict the next symbols.

        Raises: ValueError when a sentence already has its most tokens.
        """
        places = self._next_places(state, rows)
        step = CachedStep(state.cache, rows, state.device)
        at = step.at
        if self.context:
            positions = places + state.ahead[rows]
            same = bool((positions == positions[0]).all())
            at = slice(positions[0], positions[0] + 1) if same else upload(positions, state.device)
        x = embedded(self.embedding, symbols, at)
        conditions = state.conditions
        if len(rows) == 1 < state.cache.rows:
            conditions = [None if one is None else one.narrow(0, int(rows[0]), 1) for one in conditions]
        elif len(rows) < state.cache.rows:
            rows_n = upload(rows, state.device)
            conditions = [None if one is None else one[rows_n] for one in conditions]
        return self._run(state, x, step, at, conditions)

    def _next_places(self, state: DecoderState, rows: np.ndarray) -> np.ndarray:
        places = state.cache.lengths[rows]
        if (places - state.bos_places[rows]).max() >= self.symbols:
            raise ValueError("the sentence is full: no position is left for another symbol")
        return places

    def _run(
        self,
        state: DecoderState,
        x: Tensor,
        step: CachedStep | StaticStep,
        at: slice | Tensor,
        conditions: list[Tensor | None],
    ) -> Tensor:
        if isinstance(at, Tensor):
            turn = turns(self.embedding, self.heads, at, self.positions)
        elif (turn := state.turns.get(at.start)) is None:
            turn = state.turns[at.start] = turns(self.embedding, self.heads, at, self.positions)
        real = len(x)
        for layer, condition in zip(state.steps, conditions, strict=True):
            x = layer(x, step.attend, turn, condition, real)
        return state.finish(x)[:real]

    def step_static(self, state: DecoderState, rows: np.ndarray, symbols: Sequence[int]) -> Tensor:
        """`step` and `head` for a device that replays graphs: logits of the first rows, at least up to the
        last of `rows`; those of other rows mean nothing."""
        self._next_places(state, rows)
        if state.replay is None:

            def run(inputs: Tensor) -> Tensor:
                symbols_n, places_n, positions_n = inputs
                count = len(symbols_n)
                conditions = [None if one is None else one[:count] for one in state.conditions]
                x = embedded(self.embedding, symbols_n, positions_n)
                step = StaticStep(state.cache, places_n, positions_n)
                return state.head(self._run(state, x, step, positions_n, conditions))

            state.replay = Replay(run, state.device)
        count = bucket(int(rows[-1]) + 1, state.cache.rows)
        inputs = np.zeros((3, count), dtype=np.int64)
        inputs[0, rows] = symbols
        inputs[1] = state.cache.lengths[:count]
        inputs[2] = np.minimum(inputs[1] + state.ahead[:count], self.positions - 1)
        state.cache.lengths[rows] += 1
        return state.replay(inputs)
