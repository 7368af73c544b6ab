"""Sentence anchors: a token-level model whose cache holds a window of tokens, the first ones, and anchors.

Behind each sentence that has ended stand one or more anchors: rows of their own with the embedding of the
sentence's last token and a learned offset. They see what that token sees, so they can gather their sentence,
and every later row sees them (`AnchorRows`). All layers stay at token rate, and the weights are those of any
supported Hugging Face causal LM. Ends are by rule, so tokens and targets are those of the token model.

Without a window this is the token model itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from data_prep.common.errors import UserError, counted
from pipeline.config.model_recipe import AnchorsRecipe
from pipeline.data.anchor_rows import AnchorRows, random_lengths
from pipeline.data.batch import Batch
from pipeline.models.attention import HF_ATTENTION, _flex_attention, _IntoBlocks, _OutOfBlocks, forced_path
from pipeline.models.backbone import backbone_config, run_packed
from pipeline.models.kv_cache import FIRST_PLACES, CachedPrompt, CachedStep, KeyValueCache
from pipeline.models.losses import LossSums
from pipeline.models.sentence_lm import FIRST_ROW, SentenceLM, checked_lengths
from pipeline.models.token_lm import TokenLM

DEFAULTS = {key: field.default for key, field in AnchorsRecipe.model_fields.items()}


class AnchorConfig(PreTrainedConfig):
    """The keys of `AnchorsRecipe`, the token model's config (`backbone`), and the text settings."""

    model_type = "sllm_anchors"
    has_no_defaults_at_init = True
    ends = "rule"

    def __init__(
        self,
        backbone: dict | PreTrainedConfig | None = None,
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
        self.focal_gamma, self.label_smoothing, self.z_loss = focal_gamma, label_smoothing, z_loss
        self.sentence_settings = sentence_settings or {}
        self.window_tokens = window_tokens
        for key, default in DEFAULTS.items():
            setattr(self, key, kwargs.pop(key, default))
        self.vocab_size = self.backbone.vocab_size
        self.max_position_embeddings = getattr(self.backbone, "max_position_embeddings", 1 << 30)
        self.max_sentence_tokens = self.sentence_settings.get("max_tokens", 64)
        kwargs["tie_word_embeddings"] = self.backbone.tie_word_embeddings
        kwargs = {key: kwargs[key] for key in kwargs if key not in ("vocab_size", "max_position_embeddings")}
        kwargs.pop("max_sentence_tokens", None)
        super().__init__(**{"bos_token_id": 2, "pad_token_id": 1, "eos_token_id": 2, **kwargs})

    def to_dict(self) -> dict:
        output = super().to_dict()
        output["backbone"] = self.backbone.to_dict()
        output["backbone"].pop("_name_or_path", None)  # the source folder is not part of the model
        return output


class AnchorLayout(AnchorRows):
    """Rows whose attention is computed here, in place of Hugging Face's."""

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None = None,
        window: int | None = None,
    ) -> Tensor:
        """q [R, H, d_head], k and v [R, H_kv, d_head] → [R, H, d_head]. The layer's own window is not read:
        rows say what is seen."""
        path = forced_path()
        if path in ("masked", "flex"):
            q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
            if path == "masked":
                out = F.scaled_dot_product_attention(q, k, v, self.mask, scale=scale, enable_gqa=True)
            else:
                flex = _flex_attention(q.device.type == "cuda")
                out = flex(q, k, v, block_mask=self.flex_mask(), scale=scale, enable_gqa=True)
            return out[0].transpose(0, 1)
        plan, keys, mask = self.block_plan
        (n, length), groups = plan.shapes[0], q.shape[1] // k.shape[1]
        q = _IntoBlocks.apply(q, plan).view(n, length, k.shape[1], groups, -1)
        k, v = (x.index_select(0, keys).unflatten(0, (n, -1)).transpose(1, 2) for x in (k, v))
        # Query heads that share a key head become queries of that head, so keys are not repeated.
        q = q.permute(0, 2, 3, 1, 4).flatten(2, 3)
        mask = mask.repeat(1, 1, groups, 1) if groups > 1 else mask
        out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
        out = out.unflatten(2, (groups, length)).permute(0, 3, 1, 2, 4)  # [n, L, H_kv, groups, d_head]
        return _OutOfBlocks.apply(out.flatten(2, 3).flatten(0, 1), plan)


class AnchorCache(KeyValueCache):
    """Static places for the first tokens and the window, a ring, of every row; anchors behind them.

    lengths: int64 [rows], host, tokens that each row has had. anchors: int64 [rows], host."""

    def __init__(self, rows: int, first: int, window: int):
        super().__init__(rows, most=1 << 30, places=first + window)
        self.first, self.window, self.static = first, window, first + window
        self.anchors = np.zeros(rows, dtype=np.int64)

    def reserve(self, places: int, ahead: int | None = None) -> None:
        """Room for so many anchors a row, and `ahead` more; twice the room if None."""
        if self.static + places > self._places:
            more = max(FIRST_PLACES, places) if ahead is None else ahead
            before, self._places = self._places, self.static + places + more
            for layer, pair in self._layers.items():
                # Zeros: a weight of 0 does not remove what happens to be in memory.
                keys, values = (F.pad(x, (0, 0, 0, self._places - before)) for x in pair)
                self._layers[layer] = keys, values

    def layer(self, number: int, like: Tensor) -> tuple[Tensor, Tensor]:
        if number not in self._layers:
            shape = (self.rows, like.shape[1], self._places, like.shape[2])
            self._layers[number] = (like.new_zeros(shape), like.new_zeros(shape))
        return self._layers[number]

    def place(self, position: np.ndarray) -> np.ndarray:
        """The place of the tokens at these positions."""
        ring = self.first + (position - self.first) % self.window
        return np.where(position < self.first, position, ring)

    def there(self, rows: np.ndarray) -> np.ndarray:
        """bool [n, places up to the last anchor]: which places hold something."""
        tokens, anchors = self.lengths[rows][:, None], self.anchors[rows][:, None]
        place = np.arange(self.static + int(anchors.max()))
        return (place < np.minimum(tokens, self.static)) | (
            (place >= self.static) & (place < self.static + anchors)
        )


class AnchorPrompt(AnchorLayout):
    """Whole sentences of each of `rows`, packed; what later rows see is stored."""

    def __init__(
        self,
        cache: AnchorCache,
        rows: np.ndarray,
        lengths_S: np.ndarray,
        counts_D: np.ndarray,
        per_sentence: int,
        device: torch.device,
        ahead: int,
    ):
        super().__init__(lengths_S, counts_D, per_sentence, cache.window, cache.first, device, complete=True)
        self._cache = cache
        last = np.repeat(self._position[self.starts[1:] - 1], self.lengths)
        stored = self._anchor | (self._position < cache.first) | (last - self._position < cache.window)
        before = np.cumsum(self._anchor) - self._anchor
        number = before - np.repeat(before[self.starts[:-1]], self.lengths)
        place = np.where(self._anchor, cache.static + number, cache.place(self._position))
        self._stored = [
            self._to_device(x[stored]) for x in (np.repeat(rows, self.lengths), place, np.arange(self.rows))
        ]
        cache.anchors[rows] = counts_D * per_sentence
        cache.lengths[rows] = self._position[self.starts[1:] - 1] + 1
        cache.reserve(int(cache.anchors[rows].max()), ahead * per_sentence)

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None = None,
        window: int | None = None,
    ) -> Tensor:
        row, place, packed = self._stored
        for stored, new in zip(self._cache.layer(layer, k), (k, v), strict=True):
            stored[row, :, place] = new[packed]
        return super().attend(layer, q, k, v, scale)


class AnchorStep:
    """One more token, or one more anchor at the last token, in each of `rows` (int64 [n], ascending)."""

    def __init__(self, cache: AnchorCache, rows: np.ndarray, device: torch.device, anchor: bool):
        self._cache = cache
        if anchor:
            position, place = cache.lengths[rows] - 1, cache.static + cache.anchors[rows]
            cache.anchors[rows] += 1
            cache.reserve(int(cache.anchors[rows].max()))
        else:
            position = cache.lengths[rows].copy()
            place = cache.place(position)
            cache.lengths[rows] += 1
        self.longest = int(position.max()) + 1
        self.position_of_row, self._place, self._row = (
            torch.from_numpy(x).to(device) for x in (position, place, rows)
        )
        there = cache.there(rows)
        self._places, first, last = there.shape[1], int(rows[0]), int(rows[-1])
        # Adjacent rows are read in place.
        self._block = slice(first, last + 1) if last - first + 1 == len(rows) else self._row
        self._mask = None if there.all() else torch.from_numpy(there[:, None, None]).to(device)

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None = None,
        window: int | None = None,
    ) -> Tensor:
        """q [n, H, d_head], k and v [n, H_kv, d_head] → [n, H, d_head]."""
        stored = self._cache.layer(layer, k)
        for tensor, new in zip(stored, (k, v), strict=True):
            tensor[self._row, :, self._place] = new
        keys, values = (tensor[self._block, :, : self._places] for tensor in stored)
        shape = q.shape
        q = q.reshape(len(q), k.shape[1], -1, shape[-1])
        return F.scaled_dot_product_attention(q, keys, values, self._mask, scale=scale).reshape(shape)


@dataclass
class AnchorState:
    """R documents: their cache, and the last token's row after all layers, [R, d].

    fed: tokens of the sentence being generated; None: the row before it has not given its logits. logits:
    float32 [V], predict the next symbol of a single document."""

    cache: Any
    last: Tensor
    fed: list[list[int] | None] = field(default_factory=list)
    logits: Tensor | None = None
    bytes: int = 0  # the whole cache is counted as the context's


class AnchorLM(SentenceLM):
    """`forward` returns `LossSums` over T + E targets, as `TokenLM`'s."""

    config_class = AnchorConfig
    sentence_ends = False
    stop_head = None  # the document's end is a symbol

    def __init__(self, config: AnchorConfig, model: PreTrainedModel | None = None):
        """model: a token model whose weights it takes, in place of a new one."""
        super().__init__(config)
        if model is None:
            model = AutoModelForCausalLM.from_config(
                config.backbone, attn_implementation=HF_ATTENTION, dtype=torch.get_default_dtype()
            )
        model.get_input_embeddings().padding_idx = None
        loss = config.focal_gamma, config.label_smoothing, config.z_loss
        self.tokens = TokenLM(model, *loss)
        embedding: Any = model.get_input_embeddings()
        width = embedding.weight.shape[1]
        self.offset = nn.Embedding(config.per_sentence, width) if config.per_sentence else None
        self.post_init()

    def get_input_embeddings(self) -> Any:
        return self.tokens.model.get_input_embeddings()

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """The token model's tied weights, by their names here."""
        tied = self.tokens.model.get_expanded_tied_weights_keys(all_submodels=False)
        return {f"tokens.model.{name}": f"tokens.model.{source}" for name, source in tied.items()}

    def get_output_embeddings(self) -> nn.Module:
        return self.tokens.model.get_output_embeddings()

    def as_read(self, batch: Batch) -> Batch:
        """The batch as it is: anchors are rows, not tokens."""
        return batch

    def rows(self, batch: Batch) -> AnchorLayout:
        """The batch's rows. Random places have as many anchors as sentences of `mean_length` would."""
        config = self.config
        lengths_S, counts_D = np.diff(batch.cu_sentences), np.diff(batch.cu_documents)
        if config.places == "random":
            tokens_D = np.diff(batch.cu_sentences[batch.cu_documents])
            drawn = [random_lengths(n, config.mean_length, config.max_sentence_tokens) for n in tokens_D]
            lengths_S, counts_D = np.concatenate(drawn), np.asarray([len(part) for part in drawn])
        sizes = config.per_sentence, config.attention_window, config.first_tokens
        layout = AnchorLayout(lengths_S, counts_D, *sizes, batch.device)
        # torch.compile must not trace them.
        _ = layout.segment_of_row, layout.position_of_row
        return layout

    def _embedded(self, inputs: Tensor, layout: AnchorRows) -> Tensor:
        """Rows [R, d] from the token model's symbols [T+D]."""
        x = self.get_input_embeddings()(inputs).index_select(0, layout.token_of_row)
        if self.offset is None:
            return x
        return x.index_add(0, layout.anchor_rows, self.offset(layout.anchor_numbers).to(x.dtype))

    def forward(self, batch: Batch, want_correct: bool = False) -> LossSums:
        """Next-token loss over N = T + E targets (E ends of documents)."""
        config, layout = self.config, self.rows(batch)
        inputs, rows, targets = batch.token_model_symbols(config.bos_token_id, config.eos_token_id)
        x = run_packed(self.tokens.model.base_model, layout, inputs_embeds=self._embedded(inputs, layout))
        is_end = targets.new_zeros(batch.token_model_layout.rows).bool()
        is_end[batch.token_model_layout.last_rows] = True
        is_end = is_end[rows] & (targets == config.eos_token_id)
        objective, nll, correct = self.get_output_embeddings()(
            x[layout.token_rows[rows]],
            targets,
            config.focal_gamma,
            want_correct,
            config.label_smoothing,
            config.z_loss,
        )
        return LossSums.collect(batch.scored, objective, nll, is_end, correct)

    # Generation: a place per token of the window, of the first tokens, and per anchor.

    @property
    def max_sentences(self) -> int:
        """Tokens of a document after which it may not start another sentence: the writer compares them."""
        return max(0, self.config.max_position_embeddings - 1 - self.config.max_sentence_tokens)

    max_tokens = max_sentences

    def new_state(self, rows: int) -> AnchorState:
        """R empty documents: `read` starts them."""
        config = self.config
        cache = (
            KeyValueCache(rows, most=config.max_position_embeddings)
            if config.attention_window is None
            else AnchorCache(rows, config.first_tokens, config.attention_window)
        )
        head: Any = self.get_output_embeddings()
        width = head.in_features
        last = torch.zeros(rows, width, dtype=self.dtype, device=self.device)
        return AnchorState(cache, last, [None] * rows)

    def new_decoder(self, state: AnchorState) -> AnchorState:
        """The state itself; `sentence_step` feeds it."""
        return state

    def _run(self, layout: Any, x: Tensor) -> Tensor:
        return run_packed(self.tokens.model.base_model, layout, inputs_embeds=x)

    @torch.no_grad()
    def read(
        self,
        state: AnchorState,
        rows: np.ndarray,
        documents: list[list[list[int]]],
        ahead: int = FIRST_PLACES,
    ) -> None:
        """Start documents in `rows` (int64 [n]) with zero or more whole sentences each: one packed pass.

        Raises: ValueError when a sentence is empty or too long.
        """
        config = self.config
        checked_lengths([s for document in documents for s in document], config.max_sentence_tokens)
        lengths_S = np.asarray([len(s) for document in documents for s in document], dtype=np.int64)
        counts_D = np.asarray([len(document) for document in documents])
        symbols = [[config.bos_token_id, *(t for s in document for t in s)] for document in documents]
        inputs = torch.tensor([t for row in symbols for t in row], device=self.device)
        ahead = min(ahead, FIRST_PLACES)
        layout: CachedPrompt | AnchorPrompt
        if isinstance(state.cache, AnchorCache):
            cut = self._cut(lengths_S, counts_D)
            layout = AnchorPrompt(state.cache, rows, *cut, config.per_sentence, self.device, ahead)
            x, last = self._embedded(inputs, layout), layout.token_rows
            ends = np.cumsum([len(row) for row in symbols]) - 1
            last_rows = last[torch.from_numpy(ends).to(self.device)]
        else:
            lengths = np.asarray([len(row) for row in symbols])
            layout = CachedPrompt(state.cache, rows, lengths, self.device, ahead * config.max_sentence_tokens)
            x, last_rows = self.get_input_embeddings()(inputs), layout.last_rows
        state.last[torch.from_numpy(rows).to(self.device)] = self._run(layout, x)[last_rows]
        for row in rows:
            state.fed[row] = None

    def _cut(self, lengths_S: np.ndarray, counts_D: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self.config.places == "random":
            raise UserError("anchors at random places are a control, which does not generate")
        return lengths_S, counts_D

    @torch.no_grad()
    def extend(self, state: AnchorState, rows: np.ndarray, sentences: list[list[int]]) -> None:
        """End a sentence in each of `rows` (int64 [n], ascending): its anchors. Tokens that have not been fed
        are fed first.

        Raises: ValueError when a sentence is empty or too long, or another one was fed.
        """
        checked_lengths(sentences, self.config.max_sentence_tokens)
        missing: dict[int, list[int]] = {}
        for row, sentence in zip(rows.tolist(), sentences, strict=True):
            fed = state.fed[row] or []
            if list(sentence[: len(fed)]) != fed:
                raise ValueError("other tokens of this sentence have been fed")
            missing[row] = list(sentence[len(fed) :])
        while at := [row for row in missing if missing[row]]:
            for row in at:
                state.fed[row] = state.fed[row] or []
            self._feed(state, np.asarray(at), [missing[row].pop(0) for row in at])
        last = torch.tensor([sentence[-1] for sentence in sentences], device=self.device)
        if self.offset is not None:
            for number in range(self.config.per_sentence):
                step = AnchorStep(state.cache, rows, self.device, anchor=True)
                number_n = torch.full_like(last, number)
                self._run(step, self.get_input_embeddings()(last) + self.offset(number_n))
        for row in rows:
            state.fed[row] = []

    def _feed(self, state: AnchorState, rows: np.ndarray, symbols: list[int]) -> None:
        """One token of each of `rows`."""
        if isinstance(state.cache, AnchorCache):
            step: Any = AnchorStep(state.cache, rows, self.device, anchor=False)
        else:
            step = CachedStep(state.cache, rows, self.device)
        symbols_n = torch.tensor(symbols, device=self.device)
        x = self._run(step, self.get_input_embeddings()(symbols_n))
        state.last[torch.from_numpy(rows).to(self.device)] = x
        for row, symbol in zip(rows, symbols, strict=True):
            state.fed[row] = [*(state.fed[row] or []), symbol]

    def sentence_begin(self, state: AnchorState, decoder: AnchorState, rows: np.ndarray) -> None:
        """Nothing to do: the last token's row predicts the next sentence."""

    @torch.no_grad()
    def sentence_step(self, decoder: AnchorState, rows: np.ndarray, symbols: list[int]) -> Tensor:
        """Feed one symbol to each of `rows` (BOS first, which has been read); returns the next logits,
        float32 [n, V]."""
        inside = np.asarray([decoder.fed[row] is not None for row in rows])
        if inside.any():
            self._feed(decoder, rows[inside], [s for s, fed in zip(symbols, inside, strict=True) if fed])
        for row in rows[~inside]:
            decoder.fed[row] = []
        return self.get_output_embeddings()(decoder.last[torch.from_numpy(rows).to(self.device)]).float()

    def sentence_back(self, decoder: AnchorState, row: int, symbols: int) -> None:
        """With ends by rule the writer takes nothing back."""
        if symbols:
            raise ValueError(f"{counted(symbols, 'token')} cannot be taken back")

    def decode_begin(self, state: AnchorState) -> AnchorState:
        """Start the one document's next sentence; `.logits` float32 [V] predict its first token."""
        if state.fed[0] is None:
            self.decode_step(state, self.config.bos_token_id)
        return state

    def decode_step(self, state: AnchorState, token: int) -> None:
        """Feed one token; `.logits` then predict the next symbol."""
        state.logits = self.sentence_step(state, FIRST_ROW, [token])[0]


AutoConfig.register(AnchorConfig.model_type, AnchorConfig)
AutoModel.register(AnchorConfig, AnchorLM)
