"""SentenceVAE: sentence encoder + sentence decoder, trained to reconstruct (paper §3.1).

"VAE" is the paper's name; the model is deterministic unless `latent_noise` or `variational` is set. Both act
on the embedding between encoder and decoder, in training only: `encode` and `embed`, which the SLLM uses,
give the embedding itself (variational: the mean).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from data_prep.common.errors import UserError
from pipeline.config.model_recipe import VaeRecipe, checked_vae
from pipeline.data.batch import Batch
from pipeline.data.segments import SegmentLayout
from pipeline.models.losses import LossSums
from pipeline.models.sentence_decoder import DecodedSentence, DecoderState, SentenceDecoder
from pipeline.models.sentence_encoder import SentenceEncoder
from pipeline.models.vocabulary_head import VocabularyHead

FIRST_ROW = np.zeros(1, dtype=np.int64)  # of a state of one sentence


class SentenceVAEConfig(PreTrainedConfig):
    """Sizes of a SentenceVAE (SVAE-768/1024/2048 × H1/H2/H4 in the paper: `hidden_size`, `layers`).

    encoder_layers: of the encoder; None is `layers`, the decoder's, as in the paper.
    embedding_size: width of the token embeddings; None is hidden_size.
    ffn_size: None is 2 · hidden_size, the paper's choice.
    tie_word_embeddings: encoder embedding, decoder embedding and head share one matrix.
    layout: `lean` (pre-norm, learned positions, one matrix of cross-attention) or `paper` (the published
        layers, parameter for parameter: docs/sizes.md).
    positions: of encoder and decoder, `learned` or `rotary` (layout lean; the paper's are sinusoidal).
    max_sentence_tokens: longest sentence, without BOS and end symbol.
    fusion: from a sentence's tokens to its embedding: `sum` (the paper's), `mean`, `attention` or `last`
        (sentence_encoder.py).
    vectors: vectors of hidden_size per sentence; above 1 needs fusion `attention`.
    condition: how a vector enters the decoder: `cross_attention` (the paper's), `prefix` (rows before the
        sentence that attention can read), or `none` (a decoder without context, for comparison).
    condition_range: standard deviation of cross-attention's initial weights. Vectors have size 1, new token
        embeddings 0.02: from 0.02 on, vectors would dominate the tokens at first.
    prefix_slots: rows of a `prefix`.
    context_sentences: earlier sentences that an SLLM's decoder sees, token by token, besides the vector
        (needs rotary positions); 0 is the paper's. The SentenceVAE itself never sees any.
    dropout: in [0, 1); layers.py says where.
    latent_noise: standard deviation of Gaussian noise on the embedding (whose channels have about size 1) in
        training; 0 is none. It prepares the decoder for the SLLM's backbone, which never predicts an
        embedding exactly.
    variational: the encoder also gives a log-variance; training decodes a sample, otherwise the mean is used.
        The objective adds `kl_weight` · KL from the standard normal (nats), where every channel of every
        sentence counts at least `free_bits` nats (Kingma et al. 2016, per sentence instead of per batch, so
        that packing changes nothing).
    focal_gamma, label_smoothing, z_loss: the training loss (vocabulary_head.py); all 0 is cross-entropy.
    bos/pad/eos_token_id: of the tokenizer (OPT's by default); eos is the sentence end here.
    sentence_settings: how the training text was cut (`segmenter`, `language`, `max_tokens`); window_tokens:
        longest window.
    """

    model_type = "sentence_vae"

    def __init__(
        self,
        vocab_size: int = 50272,
        hidden_size: int = 768,
        layers: int = 1,
        encoder_layers: int | None = None,
        heads: int = 12,
        embedding_size: int | None = None,
        ffn_size: int | None = None,
        layout: str = "lean",
        positions: str = "learned",
        max_sentence_tokens: int = 64,
        fusion: str = "sum",
        vectors: int = 1,
        condition: str = "cross_attention",
        condition_range: float = 0.0,
        prefix_slots: int = 1,
        context_sentences: int = 0,
        dropout: float = 0.0,
        latent_noise: float = 0.0,
        variational: bool = False,
        kl_weight: float = 1.0,
        free_bits: float = 0.0,
        focal_gamma: float = 0.0,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        initializer_range: float = 0.02,
        tie_word_embeddings: bool = False,
        sentence_settings: dict | None = None,
        window_tokens: int = 1024,
        bos_token_id: int = 2,
        pad_token_id: int = 1,
        eos_token_id: int = 2,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.layers = layers
        self.encoder_layers = encoder_layers
        self.heads = heads
        self.embedding_size = embedding_size
        self.ffn_size = ffn_size
        self.layout = layout
        self.positions = positions
        self.max_sentence_tokens = max_sentence_tokens
        self.fusion = fusion
        self.vectors = vectors
        self.condition = condition
        self.condition_range = condition_range
        self.prefix_slots = prefix_slots
        self.context_sentences = context_sentences
        self.dropout = dropout
        self.latent_noise = latent_noise
        self.variational = variational
        self.kl_weight = kl_weight
        self.free_bits = free_bits
        self.focal_gamma = focal_gamma
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self.initializer_range = initializer_range
        self.sentence_settings = sentence_settings or {}
        self.window_tokens = window_tokens
        # Types, limits and what does not fit together: as in a recipe.
        given = {key: value for key, value in vars(self).items() if key in VaeRecipe.model_fields}
        for key, value in checked_vae({**given, "tie_word_embeddings": tie_word_embeddings}).items():
            setattr(self, key, value)
        self.encoder_layers = self.encoder_layers or self.layers
        self.embedding_size = self.embedding_size or self.hidden_size
        self.ffn_size = self.ffn_size or 2 * self.hidden_size
        if hidden_size % heads:
            raise ValueError(f"hidden_size {hidden_size} is not a multiple of heads {heads}")
        if positions == "rotary" and hidden_size // heads % 2:
            raise UserError("model.vae.positions rotary turns pairs of channels: hidden_size / heads is odd")
        if tie_word_embeddings and self.embedding_size != hidden_size:
            raise ValueError("tie_word_embeddings needs embedding_size == hidden_size")
        kwargs["tie_word_embeddings"] = tie_word_embeddings
        kwargs |= {"bos_token_id": bos_token_id, "pad_token_id": pad_token_id, "eos_token_id": eos_token_id}
        super().__init__(**kwargs)

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
                f"model.vae.init_embeddings_from {name}: it has {len(source)} entries, this vocabulary "
                f"{rows}: name a model with the shards' tokenizer"
            )
        head = model.get_output_embeddings()
        # The head first: if it is tied, the embedding wins, as in the token model.
        if isinstance(head, nn.Linear) and head.weight.shape[1] == self.head.weight.shape[1]:
            self.head.weight.copy_(head.weight[:rows])
        self.encoder.embedding.token.weight.copy_(source[:rows])
        self.decoder.embedding.token.weight.copy_(source[:rows])

    def embed(self, tokens_T: Tensor, layout: SegmentLayout) -> Tensor:
        """int64 [T] in S segments → sentence embeddings [S, d], without noise."""
        return self.encoder(tokens_T, layout)

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
        mean_Sd, log_variance_Sd = self.encoder(batch.tokens_T, batch.sentence_layout, with_variance=True)
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
        is_end = nll.new_zeros(layout.rows).bool()
        is_end[layout.last_rows] = True
        return objective, nll, is_end, correct

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
        symbol_1 = torch.tensor([symbol], device=self.device)
        state.logits = self.head(self.decoder.step(state, FIRST_ROW, symbol_1))[0]


AutoConfig.register(SentenceVAEConfig.model_type, SentenceVAEConfig)
AutoModel.register(SentenceVAEConfig, SentenceVAE)
