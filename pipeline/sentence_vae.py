"""SentenceVAE: sentence encoder + sentence decoder, trained to reconstruct (paper §3.1; deterministic, "VAE"
as in the paper).

In: a `Batch`. Out: `LossSums` over its N = T + S targets (every token, then the sentence's end, sentence by
sentence). Hugging Face model: `save_pretrained` / `from_pretrained` in safetensors.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from pipeline.batches import Batch
from pipeline.head import VocabularyHead
from pipeline.losses import LossSums
from pipeline.sentence_decoder import DecoderState, SentenceDecoder
from pipeline.sentence_encoder import SentenceEncoder


class SentenceVAEConfig(PreTrainedConfig):
    """Sizes of a SentenceVAE (SVAE-768/1024/2048 × H1/H2/H4 in the paper: `hidden_size`, `layers`).

    embedding_size: width of the token embeddings; None is hidden_size.
    ffn_size: None is 2 · hidden_size, the paper's choice.
    tie_word_embeddings: encoder embedding, decoder embedding and head share one matrix.
    max_sentence_tokens: longest sentence, without BOS and end symbol.
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
        heads: int = 12,
        embedding_size: int | None = None,
        ffn_size: int | None = None,
        max_sentence_tokens: int = 64,
        dropout: float = 0.0,
        focal_gamma: float = 0.0,
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
        self.heads = heads
        self.embedding_size = embedding_size or hidden_size
        self.ffn_size = ffn_size or 2 * hidden_size
        self.max_sentence_tokens = max_sentence_tokens
        self.dropout = dropout
        self.focal_gamma = focal_gamma
        self.initializer_range = initializer_range
        self.sentence_settings = sentence_settings or {}
        self.window_tokens = window_tokens
        if hidden_size % heads:
            raise ValueError(f"hidden_size {hidden_size} is not a multiple of heads {heads}")
        if tie_word_embeddings and self.embedding_size != hidden_size:
            raise ValueError("tie_word_embeddings needs embedding_size == hidden_size")
        super().__init__(
            tie_word_embeddings=tie_word_embeddings,
            bos_token_id=bos_token_id,
            pad_token_id=pad_token_id,
            eos_token_id=eos_token_id,
            **kwargs,
        )


class SentenceVAE(PreTrainedModel):
    """Encoder, decoder and head; the SLLM holds one of these and puts a backbone between encoder and
    decoder."""

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

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.embedding.token

    def encode(self, batch: Batch) -> Tensor:
        """Sentence embeddings [S, d]."""
        return self.encoder(batch.tokens_T, batch.sentence_layout)

    def decode_loss(
        self, batch: Batch, vector_Sd: Tensor, want_correct: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Score the batch's sentences given one vector each.

        Returns: (objective, nll float32 [T+S], is_end bool [T+S], correct bool [T+S] or None).
        """
        inputs, targets = batch.decoder_symbols(self.config.bos_token_id, self.config.eos_token_id)
        layout = batch.decoder_layout
        hidden = self.decoder(inputs, layout, vector_Sd)
        objective, nll, correct = self.head(hidden, targets, self.config.focal_gamma, want_correct)
        is_end = nll.new_zeros(layout.rows).bool()
        is_end[layout.last_rows] = True
        return objective, nll, is_end, correct

    def forward(self, batch: Batch, want_correct: bool = False) -> LossSums:
        """Reconstruction loss of every sentence of the batch from its own embedding."""
        objective, nll, is_end, correct = self.decode_loss(batch, self.encode(batch), want_correct)
        return LossSums.collect(batch.scored, objective, nll, is_end, correct)

    def decode_begin(self, vector_1d: Tensor) -> DecoderState:
        """Begin to write a sentence from one vector [1, d]: BOS is fed, `state.logits` predict its first
        token."""
        state = self.decoder.begin(vector_1d)
        self.decode_step(state, self.config.bos_token_id)
        return state

    def decode_step(self, state: DecoderState, symbol: int) -> None:
        """Feed one symbol; `state.logits` (float32 [V]) then predict the next one."""
        state.logits = self.head(self.decoder.step(state, symbol))[0]


AutoConfig.register(SentenceVAEConfig.model_type, SentenceVAEConfig)
AutoModel.register(SentenceVAEConfig, SentenceVAE)
