"""SentenceVAE: sentence encoder + sentence decoder, trained to reconstruct (paper §3.1).

"VAE" is the paper's name; the model is deterministic unless `latent_noise` or `variational` is set. Both act
on the embedding between encoder and decoder, in training only: `encode` and `embed`, which the SLLM uses,
give the embedding itself (variational: the mean).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from data_prep.common.errors import UserError, counted
from pipeline.config.model_recipe import VaeRecipe, checked_vae
from pipeline.data.batch import Batch
from pipeline.data.segments import SegmentLayout
from pipeline.models.losses import LossSums
from pipeline.models.sentence_decoder import DecodedSentence, DecoderState, SentenceDecoder
from pipeline.models.sentence_encoder import SentenceEncoder
from pipeline.models.step import LayerStep
from pipeline.models.vocabulary_head import VocabularyHead

FIRST_ROW = np.zeros(1, dtype=np.int64)  # of a state of one sentence


# Keys that are sizes of a model, with their defaults.
SIZES = {key: field.default for key, field in VaeRecipe.model_fields.items()}
for key in ("path", "init_embeddings_from"):
    del SIZES[key]
SIZES |= {"vocab_size": 50272, "max_sentence_tokens": 64}


class SentenceVAEConfig(PreTrainedConfig):
    """Sizes of a SentenceVAE (SVAE-768/1024/2048 × H1/H2/H4 in the paper: `hidden_size`, `layers`).

    The keys, their types and defaults are those of `VaeRecipe`. What its descriptions leave out:

    condition_range: vectors have size 1, new token embeddings 0.02: from 0.02 on, vectors would dominate the
        tokens at first.
    latent_noise: prepares the decoder for the SLLM's backbone, which never predicts an embedding exactly.
        Channels of an embedding have about size 1.
    variational: the encoder also gives a log-variance; training decodes a sample, otherwise the mean is used.
        The objective adds `kl_weight` · KL from the standard normal (nats), where every channel of every
        sentence counts at least `free_bits` nats (Kingma et al. 2016, per sentence instead of per batch, so
        that packing changes nothing).

    Besides: focal_gamma, label_smoothing, z_loss: the training loss (vocabulary_head.py); all 0 is
    cross-entropy. bos/pad/eos_token_id: of the tokenizer (OPT's by default); eos is the sentence end here.
    sentence_settings: how the training text was cut (`segmenter`, `language`, `max_tokens`); window_tokens:
    longest window.
    """

    model_type = "sentence_vae"

    def __init__(
        self,
        *,
        focal_gamma: float = 0.0,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        sentence_settings: dict | None = None,
        window_tokens: int = 1024,
        **kwargs: Any,
    ):
        self.focal_gamma, self.label_smoothing, self.z_loss = focal_gamma, label_smoothing, z_loss
        self.sentence_settings = sentence_settings or {}
        self.window_tokens = window_tokens
        # Types, limits and what does not fit together: as in a recipe.
        sizes = checked_vae(SIZES | {key: kwargs.pop(key) for key in SIZES if key in kwargs})
        width, heads = sizes["hidden_size"], sizes["heads"]
        sizes["encoder_layers"] = sizes["encoder_layers"] or sizes["layers"]
        sizes["embedding_size"] = sizes["embedding_size"] or width
        sizes["ffn_size"] = sizes["ffn_size"] or 2 * width
        if width % heads:
            raise ValueError(f"hidden_size {width} is not a multiple of heads {heads}")
        if sizes["positions"] == "rotary" and width // heads % 2:
            raise UserError("model.vae.positions rotary turns pairs of channels: hidden_size / heads is odd")
        if sizes["tie_word_embeddings"] and sizes["embedding_size"] != width:
            raise ValueError("tie_word_embeddings needs embedding_size == hidden_size")
        for key, value in sizes.items():
            setattr(self, key, value)
        kwargs["tie_word_embeddings"] = sizes["tie_word_embeddings"]
        super().__init__(**{"bos_token_id": 2, "pad_token_id": 1, "eos_token_id": 2, **kwargs})

    @property
    def vector_size(self) -> int:
        """Width of a sentence embedding: `vectors` times hidden_size."""
        return self.vectors * self.hidden_size

    @property
    def position_kind(self) -> str:
        """Positions as `layers.TokenEmbedding` names them."""
        return "sinusoidal" if self.layout == "paper" else self.positions

    @property
    def slots(self) -> int:
        """Rows of the vector before every sentence in the decoder."""
        return self.prefix_slots if self.condition == "prefix" else 0


class SentenceVAE(PreTrainedModel):
    """Encoder, decoder and head. `forward` returns `LossSums` over T + S targets: every token, then the
    sentence's end, sentence by sentence."""

    config_class = SentenceVAEConfig
    base_model_prefix = "vae"
    _tied_weights_keys = {
        "decoder.embedding.token.weight": "encoder.embedding.token.weight",
        "head.weight": "encoder.embedding.token.weight",
    }

    def __init__(self, config: SentenceVAEConfig):
        super().__init__(config)
        self.encoder = SentenceEncoder(config)
        self.decoder = SentenceDecoder(config)
        self.head = VocabularyHead(config.hidden_size, config.vocab_size)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        deviation = getattr(module, "first_deviation", None)
        if isinstance(module, nn.Linear) and deviation is not None:
            module.weight.normal_(0.0, deviation)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.encoder.embedding.token

    @torch.no_grad()
    def init_embeddings_from(self, model: PreTrainedModel, name: str) -> None:
        """Copy a token model's embedding into encoder and decoder, and its head if the shapes fit.

        Args:
            model: a Hugging Face causal LM with this model's tokenizer and at least its vocabulary.
            name: its source, for messages.
        Raises: UserError when its embedding has another width or too few rows.
        """
        embedding = model.get_input_embeddings()
        assert isinstance(embedding, nn.Embedding)
        source = embedding.weight
        rows, width = self.encoder.embedding.token.weight.shape
        if source.shape[1] != width:
            raise UserError(
                f"model.vae.init_embeddings_from {name}: its embeddings are {source.shape[1]} wide, these "
                f"{width}: set model.vae.embedding_size {source.shape[1]}"
            )
        if len(source) < rows:
            raise UserError(
                f"model.vae.init_embeddings_from {name}: it has "
                f"{counted(len(source), 'entry', 'entries')}, this "
                f"vocabulary {rows:,}: name a model with the shards' tokenizer"
            )
        head = model.get_output_embeddings()
        # The head first: if it is tied, the embedding wins, as in the token model.
        if isinstance(head, nn.Linear) and head.weight.shape[1] == self.head.weight.shape[1]:
            self.head.weight.copy_(head.weight[:rows])
        self.encoder.embedding.token.weight.copy_(source[:rows])
        self.decoder.embedding.token.weight.copy_(source[:rows])

    def embed(
        self, tokens_T: Tensor, layout: SegmentLayout, steps: Sequence[LayerStep] | None = None
    ) -> Tensor:
        """int64 [T] in S segments → sentence embeddings [S, d], without noise. `steps`: as the encoder's."""
        return self.encoder(*self._encoder_rows(tokens_T, layout), steps=steps)

    def _encoder_rows(self, tokens_T: Tensor, layout: SegmentLayout) -> tuple[Tensor, SegmentLayout]:
        """The encoder's symbols and their layout: tokens, after a BOS each sentence with published inputs."""
        if not self.config.published_inputs:
            return tokens_T, layout
        rows_T = torch.arange(layout.rows, device=layout.device) + layout.segment_of_row + 1
        wide = layout.widened
        symbols = tokens_T.new_full((wide.rows,), self.config.bos_token_id)
        return symbols.index_copy_(0, rows_T, tokens_T), wide

    def encode(self, batch: Batch) -> Tensor:
        """Sentence embeddings [S, d] of a batch, without noise."""
        return self.embed(batch.tokens_T, batch.sentence_layout)

    def _latent(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """The decoder's vectors [S, d], and KL float32 [S, d] if variational."""
        config = self.config
        if not config.variational:
            vector_Sd = self.encode(batch)
            if self.training and config.latent_noise:
                vector_Sd = vector_Sd + config.latent_noise * torch.randn_like(vector_Sd)
            return vector_Sd, None
        rows = self._encoder_rows(batch.tokens_T, batch.sentence_layout)
        mean_Sd, log_variance_Sd = self.encoder(*rows, with_variance=True)
        mean, log_variance = mean_Sd.float(), log_variance_Sd.float()
        kl_Sd = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance)
        if self.training:
            sample = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
            return sample.to(mean_Sd.dtype), kl_Sd
        return mean_Sd, kl_Sd

    def decode_loss(
        self, batch: Batch, vector_Sd: Tensor, want_correct: bool = False, context: int = 0
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Score the batch's sentences given one vector [vector_size] and `context` earlier sentences each.

        Returns: (objective, nll float32 [T+S], is_end bool [T+S], correct bool [T+S] or None).
        """
        config, layout = self.config, batch.decoder_layout
        inputs, targets = batch.decoder_symbols(config.bos_token_id, config.eos_token_id)
        rows = batch.decoder_rows(inputs, config.bos_token_id, config.slots, context)
        hidden = self.decoder(rows, vector_Sd)
        objective, nll, correct = self.head(
            hidden, targets, config.focal_gamma, want_correct, config.label_smoothing, config.z_loss
        )
        return objective, nll, layout.is_last_row, correct

    def forward(self, batch: Batch, want_correct: bool = False) -> LossSums:
        """Reconstruction loss of every sentence of the batch from its own embedding."""
        vector_Sd, kl_Sd = self._latent(batch)
        objective, nll, is_end, correct = self.decode_loss(batch, vector_Sd, want_correct)
        if kl_Sd is None:
            return LossSums.collect(batch.scored, objective, nll, is_end, correct)
        objective = objective + self.config.kl_weight * kl_Sd.clamp_min(self.config.free_bits).sum()
        return LossSums.collect(batch.scored, objective, nll, is_end, correct, kl=kl_Sd.sum())

    def decode_begin(
        self, vector_1d: Tensor, contexts: list[list[DecodedSentence]] | None = None
    ) -> DecoderState:
        """Start a sentence from one vector [1, d] and, in `contexts`, earlier sentences: BOS is fed,
        `state.logits` predict the first token."""
        state = self.decoder.begin(vector_1d, contexts)
        self.decode_step(state, self.config.bos_token_id)
        return state

    def decode_step(self, state: DecoderState, symbol: int) -> None:
        """Feed one symbol; `state.logits` (float32 [V]) then predict the next one."""
        state.logits = self.head(self.decoder.step(state, FIRST_ROW, [symbol]))[0]


AutoConfig.register(SentenceVAEConfig.model_type, SentenceVAEConfig)
AutoModel.register(SentenceVAEConfig, SentenceVAE)
