"""One stack: token layers across sentence borders, and a backbone over the states at sentence ends.

    lower token layers → states at the borders → backbone → added to the next sentence's rows → upper layers

A *border* is a row before every sentence and at a window's end. It reads that a sentence has ended, so its
state after the lower layers is that sentence's vector; the window's first border gives the start vector. The
backbone's output at a border enters at the border's own row and those of the sentence behind it: added, and
attended to by the upper layers (`memory`), both from zero. Token layers are causal with an attention window.
There is no separate encoder, no autoencoder to train first, and nothing to encode again in generation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig

from pipeline.config.model_recipe import TokensRecipe, checked_tokens
from pipeline.data.batch import Batch, StackRows, stack_rows
from pipeline.data.segments import Band, SegmentLayout
from pipeline.generation.upload import upload
from pipeline.models.attention import packed_attention
from pipeline.models.backbone import backbone_config, new_backbone, run_packed, vector_width
from pipeline.models.kv_cache import (
    FIRST_PLACES,
    CachedContext,
    CachedPrompt,
    RollingCache,
)
from pipeline.models.layers import LinearFromZero, Rotation, SentenceMemory, TokenEmbedding, TransformerLayer
from pipeline.models.losses import LossSums
from pipeline.models.sentence_lm import FIRST_ROW, ContextState, SentenceLM, checked_lengths
from pipeline.models.stack_state import TokenState
from pipeline.models.vocabulary_head import VocabularyHead

SIZES = {key: field.default for key, field in TokensRecipe.model_fields.items()}
SIZES |= {"vocab_size": 50272, "max_sentence_tokens": 64}


class StackConfig(PreTrainedConfig):
    """Sizes of the token layers (the keys of `TokensRecipe`), a backbone's config, and the text settings.

    memory: backbone outputs that upper layers attend to; 0: none. add_vector: false leaves the memory as the
    only way from the backbone to the tokens, or none, as a control. ends: `predicted`, or by `rule`:
    sentences then end where `data_prep.text.running_ends` says, without borders of their own. focal_gamma,
    label_smoothing, z_loss: as in `SentenceVAEConfig`."""

    model_type = "sllm_stack"
    has_no_defaults_at_init = True

    def __init__(
        self,
        backbone: dict | PreTrainedConfig | None = None,
        memory: int = 0,
        add_vector: bool = True,
        ends: str = "predicted",
        focal_gamma: float = 0.0,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        sentence_settings: dict | None = None,
        window_tokens: int = 1024,
        **kwargs: Any,
    ):
        self.backbone = (
            backbone if isinstance(backbone, PreTrainedConfig) else backbone_config(backbone or {})
        )
        self.memory, self.add_vector, self.ends = memory, add_vector, ends
        self.focal_gamma, self.label_smoothing, self.z_loss = focal_gamma, label_smoothing, z_loss
        self.sentence_settings = sentence_settings or {}
        self.window_tokens = window_tokens
        sizes = checked_tokens(SIZES | {key: kwargs.pop(key) for key in SIZES if key in kwargs})
        sizes["ffn_size"] = sizes["ffn_size"] or 2 * sizes["hidden_size"]
        for key, value in sizes.items():
            setattr(self, key, value)
        kwargs["tie_word_embeddings"] = sizes["tie_word_embeddings"]
        super().__init__(**{"bos_token_id": 2, "pad_token_id": 1, "eos_token_id": 2, **kwargs})

    @property
    def by_rule(self) -> bool:
        return self.ends == "rule"

    def to_dict(self) -> dict:
        output = super().to_dict()
        output["backbone"] = self.backbone.to_dict()
        output["backbone"].pop("_name_or_path", None)  # the source folder is not part of the model
        return output


@dataclass(kw_only=True)
class StackState(ContextState):
    """tokens: the token layers' state."""

    tokens: TokenState


class StackLM(SentenceLM):
    """`forward` returns `LossSums` over T + S vocabulary targets and S stop decisions, as `SLLM`'s; with ends
    by rule over T + E targets, as `TokenLM`'s."""

    config_class = StackConfig
    lower: Any
    upper: Any
    _tied_weights_keys = {"head.weight": "embedding.token.weight"}

    def __init__(self, config: StackConfig):
        super().__init__(config)
        width, vector = config.hidden_size, vector_width(config.backbone)
        sizes = (width, config.heads, config.ffn_size, config.dropout)
        self.embedding = TokenEmbedding(config.vocab_size, width, width, 0, "rotary")
        self.lower, self.upper = (
            nn.ModuleList(TransformerLayer(*sizes, window=config.attention_window) for _ in range(layers))
            for layers in (config.lower_layers, config.upper_layers)
        )
        # A norm at the end of each level: what a part adds to the residual stream has no fixed scale.
        self.vector_norm = nn.LayerNorm(width)
        self.to_backbone = nn.Linear(width, vector, bias=False) if width != vector else None
        self.backbone = new_backbone(config.backbone)
        self.output_norm = nn.LayerNorm(vector) if config.add_vector or config.memory else None
        self.from_backbone = LinearFromZero(vector, width, bias=False) if config.add_vector else None
        memories = config.upper_layers if config.memory else 0
        self.memory: Any = nn.ModuleList(SentenceMemory(width, vector, config.heads) for _ in range(memories))
        self.final_norm = nn.LayerNorm(width)
        self.head = VocabularyHead(width, config.vocab_size)
        self.stop_head = None if config.by_rule else nn.Linear(vector, 1)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LinearFromZero):
            module.weight.zero_()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding.token

    def _turn(self, positions: Tensor) -> Rotation:
        """`TokenEmbedding.turn`; also of sentence numbers."""
        turn = self.embedding.turn(positions, self.config.heads)
        assert turn is not None
        return turn

    def _inputs(self, rows: StackRows, tokens_T: Tensor) -> Tensor:
        """int64 [R]: the symbol of every row; BOS is the border."""
        border = torch.full((rows.layout.rows,), self.config.bos_token_id, device=tokens_T.device)
        return border.index_copy_(0, rows.token_rows_T, tokens_T)

    def _contextualise(self, x_Rd: Tensor, rows: StackRows, layout: SegmentLayout) -> Tensor:
        """Backbone outputs [B, d_backbone] of every border, from the rows after the lower layers."""
        vectors_Bd = self.vector_norm(x_Rd.index_select(0, rows.border_rows_B))
        return run_packed(self.backbone, layout, inputs_embeds=self._into(vectors_Bd))

    def _lower(self, batch: Batch) -> tuple[Tensor, Rotation]:
        """The batch's rows [R, d] after the lower layers, and the turn of their positions."""
        rows = batch.stack_rows(self.config.by_rule)
        x = self.embedding(self._inputs(rows, batch.tokens_T), rows.layout.position_of_row)
        turn = self._turn(rows.layout.position_of_row)
        for layer in self.lower:
            x = layer(x, rows.layout, causal=True, turn=turn)
        return x, turn

    def _upper(
        self,
        x: Tensor,
        hidden_Bd: Tensor,
        rows: StackRows,
        layout: SegmentLayout,
        run: Callable[[int, Any, Tensor], Tensor],
    ) -> Tensor:
        """The rows [R, d] after the upper layers, which read the backbone's outputs.

        layout: the backbone's rows. run: runs one layer."""
        vectors_Bd, border_R = self._read_backbone(hidden_Bd), rows.border_of_row
        if self.from_backbone is not None:
            x = x + self.from_backbone(vectors_Bd).index_select(0, border_R)
        seen: tuple[Band | list[Band], Rotation, Rotation] | None = None
        if self.memory:
            number_B = layout.position_of_row
            bands = (rows.memories if rows.layout.steady else rows.memory)(self.config.memory)
            seen = bands, self._turn(number_B[border_R]), self._turn(number_B)
        for number, layer in enumerate(self.upper):
            if seen is not None:
                x = self.memory[number](x, vectors_Bd, *seen)
            x = run(number, layer, x)
        return x

    def _read_backbone(self, hidden_Bd: Tensor) -> Tensor:
        return hidden_Bd if self.output_norm is None else self.output_norm(hidden_Bd)

    def sentence_vectors(self, batch: Batch) -> Tensor:
        """[S, d_backbone]: the backbone's output before each sentence. That of a window's first sentence
        depends on nothing."""
        x, _ = self._lower(batch)
        rows = batch.stack_rows(self.config.by_rule)
        return self._contextualise(x, rows, batch.backbone_layout).index_select(0, batch.predicting_row_S)

    def forward(self, batch: Batch, want_correct: bool = False, vectors_Sd: Tensor | None = None) -> LossSums:
        """Next-sentence loss. vectors_Sd: as in `SLLM.forward`; the memory then holds these, too."""
        config, rows = self.config, batch.stack_rows(self.config.by_rule)
        x, turn = self._lower(batch)
        if vectors_Sd is None:
            hidden_Bd = self._contextualise(x, rows, batch.backbone_layout)
        else:
            # No row with a target reads the output at its window's last border.
            hidden_Bd = vectors_Sd.new_zeros(len(rows.border_rows_B), vectors_Sd.shape[1])
            hidden_Bd = hidden_Bd.index_copy(0, batch.predicting_row_S, vectors_Sd)
        x = self._upper(
            x,
            hidden_Bd,
            rows,
            batch.backbone_layout,
            lambda _, layer, x: layer(x, rows.layout, causal=True, turn=turn),
        )
        symbols, target_rows_N = (config.bos_token_id, config.eos_token_id), rows.target_rows_N
        if config.by_rule:
            _, target_rows_N, targets = batch.token_model_symbols(*symbols)
            is_end = rows.layout.is_last_row[target_rows_N] & (targets == config.eos_token_id)
        else:
            _, targets = batch.decoder_symbols(*symbols)
            is_end = batch.decoder_layout.is_last_row
        objective, nll, correct = self.head(
            self.final_norm(x.index_select(0, target_rows_N)),
            targets,
            config.focal_gamma,
            want_correct,
            config.label_smoothing,
            config.z_loss,
        )
        if vectors_Sd is not None or config.by_rule:
            return LossSums.collect(batch.scored, objective, nll, is_end, correct)
        stop_logits_S = self._stop_logits(hidden_Bd.index_select(0, batch.predicting_row_S + 1))
        stop_nll_S = F.binary_cross_entropy_with_logits(stop_logits_S, batch.stop_label_S, reduction="none")
        return LossSums.collect(batch.scored, objective + stop_nll_S.sum(), nll, is_end, correct, stop_nll_S)

    # Generation: one backbone position per sentence, one position of the token layers per symbol and border.

    def new_state(self, rows: int) -> StackState:
        """R empty documents: `read` starts them."""
        context = self._context(rows)
        return StackState(**context, tokens=TokenState(self, context["hidden"]))

    @torch.no_grad()
    def read(
        self,
        state: StackState,
        rows: np.ndarray,
        documents: list[list[list[int]]],
        ahead: int = FIRST_PLACES,
    ) -> None:
        """Start documents in `rows` (int64 [n]) with zero or more sentences each: one packed pass, as in
        training. `ahead`: number of sentences that will follow, if known.

        Raises: ValueError when a document has more than `max_sentences` sentences, or one is too long.
        """
        sentences = [sentence for document in documents for sentence in document]
        counts_D = np.asarray([len(document) for document in documents])
        lengths = np.asarray(checked_lengths(sentences, self.config.max_sentence_tokens), dtype=np.int64)
        packed = stack_rows(lengths, counts_D, self.device, self.config.by_rule, self.batch_invariant)
        layout, words = packed.layout, state.tokens
        tokens_T = torch.tensor([t for sentence in sentences for t in sentence], device=self.device)
        attend = partial(packed_attention, layout=layout, causal=True)

        def cached(cache: RollingCache) -> CachedContext:
            kept = np.stack(
                [np.maximum(layout.starts[:-1], layout.starts[1:] - cache.keep), layout.starts[1:]], 1
            )
            context = CachedContext(cache, rows, kept, attend, self.device)
            cache.start(rows, layout.lengths)
            return context

        x = self.embedding(self._inputs(packed, tokens_T.long()), layout.position_of_row)
        turn = words.turn(layout.position_of_row, layout.longest)
        lower = cached(words.lower)
        for layer in words.lower_steps:
            x = layer(x, lower.attend, turn)[: layout.rows]
        prompt = CachedPrompt(state.cache, rows, counts_D + 1, self.device, min(ahead, FIRST_PLACES))
        vectors_Bd = self.vector_norm(x[packed.border_rows_B])
        hidden_Bd = self._run_backbone(state, self._into(vectors_Bd), prompt)
        rows_n = torch.from_numpy(rows).to(self.device)
        last_n = layout.last_rows
        words.border[rows_n], state.hidden[rows_n] = x[last_n], hidden_Bd[prompt.last_rows]
        upper = cached(words.upper)
        if not self.config.by_rule:  # the last border goes through the upper layers with the first step
            words.upper.lengths[rows] -= 1
        for row in rows:
            words.fed[row] = None
        x = self._upper(
            x,
            hidden_Bd,
            packed,
            prompt,
            lambda number, _, x: words.upper_steps[number](x, upper.attend, turn)[: layout.rows],
        )
        words.last[rows_n] = x[last_n]
        vectors_Bd = self._read_backbone(hidden_Bd)
        words.vector[rows_n] = vectors_Bd[prompt.last_rows]
        ends = prompt.starts[1:]
        starts = np.maximum(prompt.starts[:-1], ends - words.memory.keep)
        words.memory.start(rows, prompt.lengths)
        for number, part in enumerate(self.memory):
            keys_values = part.keys_values(vectors_Bd, self._turn(prompt.position_of_row))
            words.memory.store(number, rows, starts, ends, *keys_values)

    @torch.no_grad()
    def extend(self, state: StackState, rows: np.ndarray, sentences: list[list[int]]) -> None:
        """End a sentence in each of `rows` (int64 [n], ascending): its border and one step of the backbone.
        Tokens that have not been fed are fed first.

        Raises: ValueError when a row has no position left, or a sentence is empty or too long.
        """
        checked_lengths(sentences, self.config.max_sentence_tokens)
        words, rows_n = state.tokens, upload(rows, self.device)
        words.feed(rows, sentences)
        x = words.end_sentences(rows)
        hidden = self._append_vectors(state, rows, self._into(self.vector_norm(x)))
        vector = words.vector[rows_n] = self._read_backbone(hidden)
        for row in rows:
            words.fed[row] = [] if self.config.by_rule else None
        if not self.memory:
            return
        turn = words.turn_at(words.memory.positions[rows])
        words.memory.roll(rows)
        places = upload(words.memory.lengths[rows], self.device)
        words.memory.lengths[rows] += 1
        for number, part in enumerate(self.memory):
            for stored, new in zip(
                words.memory.layer(number, x.view(len(x), part.heads, -1)),
                part.keys_values(vector, tuple(one[:, None] for one in turn)),
                strict=True,
            ):
                stored[rows_n, :, places] = new

    def new_decoder(self, state: StackState) -> TokenState:
        """The token layers' part of a state; `sentence_step` feeds it."""
        return state.tokens

    def sentence_begin(self, state: StackState, decoder: TokenState, rows: np.ndarray) -> None:
        """Nothing to do: `read` and `extend` have computed the border."""

    def sentence_step(self, decoder: TokenState, rows: np.ndarray, symbols: Sequence[int]) -> Tensor:
        """Feed one symbol to each of `rows` (BOS first); returns the next logits, float32 [n, V]."""
        return decoder.step(rows, symbols)

    @torch.no_grad()
    def sentence_back(self, decoder: TokenState, row: int, symbols: int) -> None:
        """Forget the last symbols fed to a row."""
        decoder.back(row, symbols)

    def decode_begin(self, state: StackState) -> TokenState:
        """Start the one document's next sentence; `.logits` float32 [V] predict its first token."""
        if state.tokens.fed[0] is None:
            self.decode_step(state.tokens, self.config.bos_token_id)
        return state.tokens

    @torch.no_grad()
    def decode_step(self, state: TokenState, token: int) -> None:
        """Feed one token; `.logits` then predict the next symbol (the sentence end is
        `config.eos_token_id`)."""
        state.logits = self.sentence_step(state, FIRST_ROW, [token])[0]


AutoConfig.register(StackConfig.model_type, StackConfig)
AutoModel.register(StackConfig, StackLM)
