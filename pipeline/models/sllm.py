"""The sentence-level LLM: sentence encoder → backbone → sentence decoder, plus the stop head (paper §3.2).

A document window of n sentences becomes n + 1 backbone positions: a learned start vector, then its sentence
embeddings. The output at position i conditions the decoding of sentence i + 1, so the first sentence is
predicted and scored too. From position 1 on the stop head predicts whether the document ends there. The model
is strictly causal: the backbone over sentences, the decoder over symbols, and the embedding of sentence i
enters only at position i.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig

from data_prep.common.errors import UserError
from pipeline.data.batch import Batch
from pipeline.data.segments import SegmentLayout
from pipeline.generation.prefixes import Entry, PrefixCache
from pipeline.generation.upload import upload
from pipeline.models.backbone import backbone_config, new_backbone, run_packed, vector_width
from pipeline.models.kv_cache import FIRST_PLACES, CachedPrompt
from pipeline.models.losses import LossSums
from pipeline.models.sentence_decoder import DecodedSentence, DecoderState
from pipeline.models.sentence_lm import ContextState, SentenceLM, checked_lengths
from pipeline.models.sentence_vae import SentenceVAE, SentenceVAEConfig
from pipeline.models.step import LayerStep, logits, token_layer


class SLLMConfig(PreTrainedConfig):
    """An SLLM is a SentenceVAE's config, a backbone's config (Hugging Face's, of one of `backbone.FAMILIES`)
    and the text settings. embedding_weight: of the second part of the training loss (`SLLM.forward`)."""

    model_type = "sllm"
    has_no_defaults_at_init = True

    def __init__(
        self,
        vae: dict | SentenceVAEConfig | None = None,
        backbone: dict | PreTrainedConfig | None = None,
        sentence_settings: dict | None = None,
        window_tokens: int = 1024,
        embedding_weight: float = 0.0,
        **kwargs,
    ):
        self.embedding_weight = embedding_weight
        self.vae = vae if isinstance(vae, SentenceVAEConfig) else SentenceVAEConfig(**(vae or {}))
        self.backbone = (
            backbone if isinstance(backbone, PreTrainedConfig) else backbone_config(backbone or {})
        )
        if self.vae.layout == "paper":
            self.backbone = _published_layout(self.backbone)
        self.sentence_settings = sentence_settings or {}
        self.window_tokens = window_tokens
        kwargs["tie_word_embeddings"] = self.vae.tie_word_embeddings
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs.setdefault(key, getattr(self.vae, key))
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        return self.vae.vocab_size

    @property
    def max_sentence_tokens(self) -> int:
        return self.vae.max_sentence_tokens

    def to_dict(self) -> dict:
        output = super().to_dict()
        for name in ("vae", "backbone"):
            output[name] = getattr(self, name).to_dict()
            output[name].pop("_name_or_path", None)  # the source folder is not part of the model
        return output


def _published_layout(config: PreTrainedConfig) -> PreTrainedConfig:
    """OPT as the published code runs it: position table and layers, no final norm, no projections."""
    if config.model_type != "opt":
        raise UserError(
            f"model.vae.layout paper is laid around an OPT backbone, not {config.model_type}: use lean"
        )
    config = copy.deepcopy(config)
    config.word_embed_proj_dim = config.hidden_size
    config._remove_final_layer_norm = True
    return config


@dataclass(kw_only=True)
class BackboneState(ContextState):
    """encoder: steps of its layers. recent: the last sentences that the decoder sees, each with the vector
    that predicted it."""

    encoder: list[LayerStep]
    recent: list[list[DecodedSentence]]


class SLLM(SentenceLM):
    """`vae` (encoder, decoder, head), `backbone`, `start` vector, `stop_head`, and adapters if widths differ.

    `forward` returns `LossSums` over T + S vocabulary targets and S stop decisions."""

    config_class = SLLMConfig
    keeps_prefixes = True

    def __init__(self, config: SLLMConfig):
        super().__init__(config)
        width, vector = config.vae.vector_size, vector_width(config.backbone)
        self.vae = SentenceVAE(config.vae)
        self.backbone = new_backbone(config.backbone)
        # OPT-350M takes and returns 512-wide vectors around its 1024-wide layers; SVAE-1024 needs a map each
        # way.
        self.to_backbone = nn.Linear(width, vector, bias=False) if width != vector else None
        self.from_backbone = nn.Linear(vector, width, bias=False) if width != vector else None
        self.start = nn.Embedding(1, width)
        # The published head has one logit to stop and one to continue: only their difference counts.
        self.stop_head = nn.Linear(vector, 2 if config.vae.layout == "paper" else 1)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.vae.get_input_embeddings()

    def _out_of(self, x: Tensor) -> Tensor:
        return x if self.from_backbone is None else self.from_backbone(x)

    @property
    def _start_apart(self) -> bool:
        """No sentence sees the start position: the published model has none."""
        return self.config.vae.published_inputs

    def contextualise(self, batch: Batch, embeddings_Sd: Tensor | None = None) -> Tensor:
        """Backbone outputs [S+D, d_backbone]: each window's start position, then its sentences; embeddings
        [S, d] are computed if not given."""
        if embeddings_Sd is None:
            embeddings_Sd = self.vae.encode(batch)
        start_1d = self.start(torch.zeros(1, dtype=torch.long, device=batch.device))
        x = torch.cat([start_1d, embeddings_Sd]).index_select(0, batch.backbone_source)
        layout = batch.apart_layout if self._start_apart else batch.backbone_layout
        return run_packed(self.backbone, layout, inputs_embeds=self._into(x))

    def sentence_vectors(self, batch: Batch) -> Tensor:
        """[S, d]: the vector that each sentence of the batch is decoded from. That of a window's first
        sentence depends on nothing."""
        return self._out_of(self.contextualise(batch).index_select(0, batch.predicting_row_S))

    def forward(self, batch: Batch, want_correct: bool = False, vectors_Sd: Tensor | None = None) -> LossSums:
        """Next-sentence loss.

        vectors_Sd: decode the sentences from these vectors in place of `sentence_vectors`, without stop
        decisions. The loss that others bring says what the vectors are worth (`evaluation.controls`).

        The embedding loss, `embedding_weight` · Σ 1 − cos(vector, embedding of the sentence it predicts),
        pulls each vector towards the one that a SentenceVAE's decoder would decode the sentence from.
        """
        context = self.config.vae.context_sentences
        if vectors_Sd is not None:
            objective, nll, is_end, correct = self.vae.decode_loss(batch, vectors_Sd, want_correct, context)
            return LossSums.collect(batch.scored, objective, nll, is_end, correct)
        embeddings_Sd = self.vae.encode(batch)
        hidden = self.contextualise(batch, embeddings_Sd)
        vectors_Sd = self._out_of(hidden.index_select(0, batch.predicting_row_S))
        objective, nll, is_end, correct = self.vae.decode_loss(batch, vectors_Sd, want_correct, context)
        if self.config.embedding_weight:
            # Detached: embeddings that move towards what is easy to predict would collapse.
            similar_S = F.cosine_similarity(vectors_Sd.float(), embeddings_Sd.detach().float())
            objective = objective + self.config.embedding_weight * (1 - similar_S).sum()
        stop_logits_S = self._stop_logits(hidden.index_select(0, batch.predicting_row_S + 1))
        stop_nll_S = F.binary_cross_entropy_with_logits(stop_logits_S, batch.stop_label_S, reduction="none")
        return LossSums.collect(batch.scored, objective + stop_nll_S.sum(), nll, is_end, correct, stop_nll_S)

    # Generation: one backbone position per sentence, one decoder position per symbol. First for many
    # documents at once (`generation.protocol`), one per row; then for a single document.

    def new_state(self, rows: int) -> BackboneState:
        """R empty documents: `read` starts them."""
        encoder = [token_layer(layer, number) for number, layer in enumerate(self.vae.encoder.layers)]
        return BackboneState(**self._context(rows), encoder=encoder, recent=[[] for _ in range(rows)])

    def _encode(self, state: BackboneState, sentences: list[list[int]]) -> Tensor:
        """Sentence embeddings [S, d], exactly as in training. Raises: ValueError for an empty or too long
        sentence."""
        lengths = checked_lengths(sentences, self.config.vae.max_sentence_tokens)
        tokens_T = upload(np.concatenate(sentences).astype(np.int64), self.device)
        layout = SegmentLayout(np.asarray(lengths), self.device, self.batch_invariant)
        return self.vae.embed(tokens_T, layout, state.encoder)

    @torch.no_grad()
    def read(
        self,
        state: BackboneState,
        rows: np.ndarray,
        documents: list[list[list[int]]],
        ahead: int = FIRST_PLACES,
        prefixes: PrefixCache | None = None,
    ) -> None:
        """Start documents in `rows` (int64 [n]) with zero or more sentences each: one packed pass, as in
        training. `ahead`: number of sentences that will follow, if known. prefixes: sentences that it holds
        are not read again; the others are added.

        Raises: ValueError when a document has more than `max_sentences` sentences, or one is too long.
        """
        if prefixes is not None and not self._start_apart:
            self._read_behind(state, rows, documents, ahead, prefixes)
            return
        counts = np.asarray([len(document) for document in documents])
        # Documents with a start position.
        starts = (counts == 0) | (not self._start_apart)
        out, _ = self._read_places(state, rows, documents, starts, ahead)
        if self._start_apart:
            state.cache.lengths[rows] = counts
        ends = np.cumsum(counts + starts)
        self._remember(state, rows, documents, out.tensor_split(ends[:-1].tolist()))

    def _read_places(
        self,
        state: BackboneState,
        rows: np.ndarray,
        documents: list[list[list[int]]],
        starts: np.ndarray,
        ahead: int,
        past: np.ndarray | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Backbone outputs [T, d_backbone] of each document's start position, where `starts` (bool [n]) is
        true, and sentences, behind `past` places (int64 [n]) that the rows hold; the layout's `targets`."""
        lengths = np.asarray([len(document) for document in documents]) + starts
        layout = CachedPrompt(state.cache, rows, lengths, self.device, min(ahead, FIRST_PLACES), past)
        x, is_start = self.start.weight, np.zeros(layout.rows, dtype=bool)
        is_start[layout.starts[:-1][starts]] = True
        if sentences := [sentence for document in documents for sentence in document]:
            x = torch.cat([x, self._encode(state, sentences)])
        source = np.where(is_start, 0, np.cumsum(~is_start))
        x = x.index_select(0, upload(source, self.device))
        out = self._run_backbone(state, self._into(x), layout)
        state.hidden[upload(rows, self.device)] = out[layout.last_rows]
        return out, layout.targets

    def _remember(
        self,
        state: BackboneState,
        rows: np.ndarray,
        documents: list[list[list[int]]],
        outs: Sequence[Tensor],
    ) -> None:
        """Keep the sentences that the decoder sees. outs: the outputs of every document's places."""
        if keep := self.vae.decoder.remembers:
            for row, document, out in zip(rows, documents, outs, strict=True):
                last = document[-keep:]
                first = len(document) - len(last)
                state.recent[row] = list(zip(last, self._out_of(out[first : len(document)]), strict=True))

    def _read_behind(
        self,
        state: BackboneState,
        rows: np.ndarray,
        documents: list[list[list[int]]],
        ahead: int,
        prefixes: PrefixCache,
    ) -> None:
        """`read` of what `prefixes` does not hold. Documents that repeat are read once."""
        keys = [PrefixCache.keys(document) for document in documents]
        new = list({one[-1]: n for n, one in reversed(list(enumerate(keys)))}.values())
        again = sorted(set(range(len(rows))) - set(new))
        for some in (sorted(new), again):
            if not some:
                continue
            at, wanted = rows[some], [keys[n] for n in some]
            known = [prefixes.find(one) for one in wanted]
            past, counts = (np.asarray([len(one) for one in of]) for of in (known, wanted))
            outs = self._restore(state, at, known)
            if (todo := np.flatnonzero(past < counts)).size:
                rest = [documents[some[n]][max(0, past[n] - 1) :] for n in todo]
                out, targets = self._read_places(state, at[todo], rest, past[todo] == 0, ahead, past[todo])
                # Kept in the host's memory, each by itself, so that any of them can go.
                taken = state.cache.taken(targets[1], targets[2]).cpu()
                entries = [(a.clone(), b.clone()) for a, b in zip(taken, out.cpu(), strict=True)]
                ends = np.cumsum(counts[todo] - past[todo])
                for n, end, new_out in zip(todo, ends, out.tensor_split(ends[:-1].tolist()), strict=True):
                    first = end - counts[n] + past[n]
                    prefixes.add(wanted[n][past[n] :], entries[first:end])
                    outs[n] = torch.cat([outs[n], new_out])
            self._remember(state, at, [documents[n] for n in some], outs)

    def _restore(self, state: BackboneState, rows: np.ndarray, known: list[list[Entry]]) -> list[Tensor]:
        """Put what is known of documents into `rows`; returns their outputs."""
        past = np.asarray([len(one) for one in known])
        nothing = state.hidden[:0]
        if not past.any():
            return [nothing] * len(rows)
        stored, out = (
            torch.stack(parts).to(self.device)
            for parts in zip(*(entry for one in known for entry in one), strict=True)
        )
        some, ends = past > 0, np.cumsum(past)
        state.cache.restore(rows[some], past[some], stored)
        state.cache.lengths[rows] = past
        state.hidden[upload(rows[some], self.device)] = out[upload(ends[some] - 1, self.device)]
        return list(out.tensor_split(ends[:-1].tolist()))

    @torch.no_grad()
    def extend(self, state: BackboneState, rows: np.ndarray, sentences: list[list[int]]) -> None:
        """Append one whole sentence to each of `rows` (int64 [n], ascending), encoded as in training.

        Raises: ValueError when a row has no position left, or a sentence is empty or too long.
        """
        x = self._into(self._encode(state, sentences))
        if keep := self.vae.decoder.remembers:
            vectors = self._out_of(state.hidden[upload(rows, self.device)])
            for row, sentence, vector_d in zip(rows, sentences, vectors, strict=True):
                state.recent[row] = [*state.recent[row], (list(sentence), vector_d)][-keep:]
        self._append_vectors(state, rows, x)

    @torch.no_grad()
    def new_decoder(self, state: BackboneState) -> DecoderState:
        """A decoder row per document of the state; `sentence_begin` starts their sentences."""
        decoder = self.vae.decoder.begin(self._out_of(state.hidden), state.recent)
        decoder.head, decoder.cache.steady = logits(self.vae.head), self.batch_invariant
        return decoder

    @torch.no_grad()
    def sentence_begin(self, state: BackboneState, decoder: DecoderState, rows: np.ndarray) -> None:
        """Start the next sentence of each of `rows`, conditioned on its document; nothing is fed yet."""
        hidden = state.hidden if len(rows) == len(state.hidden) else state.hidden[upload(rows, self.device)]
        self.vae.decoder.restart(decoder, rows, self._out_of(hidden), [state.recent[row] for row in rows])

    def sentence_step(self, decoder: DecoderState, rows: np.ndarray, symbols: list[int]) -> Tensor:
        """Feed one symbol to each of `rows` (BOS first); returns the next logits, float32 [n, V]."""
        if not decoder.static:
            return decoder.head(self.vae.decoder.step(decoder, rows, symbols))
        found = self.vae.decoder.step_static(decoder, rows, symbols)
        return found if len(rows) == len(found) else found[upload(rows, decoder.device)]

    def sentence_back(self, decoder: DecoderState, row: int, symbols: int) -> None:
        """Forget the last symbols fed to a row."""
        decoder.cache.lengths[row] -= symbols

    @torch.no_grad()
    def decode_begin(self, state: BackboneState) -> DecoderState:
        """Start the one document's next sentence; `.logits` float32 [V] predict its first token."""
        return self.vae.decode_begin(self._out_of(state.hidden), state.recent)

    @torch.no_grad()
    def decode_step(self, state: DecoderState, token: int) -> None:
        """Feed one token; `.logits` then predict the next symbol (the sentence end is
        `config.eos_token_id`)."""
        self.vae.decode_step(state, token)


AutoConfig.register(SLLMConfig.model_type, SLLMConfig)
AutoModel.register(SLLMConfig, SLLM)
