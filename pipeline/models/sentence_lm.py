"""What every model that predicts a sentence at a time has in common: stop decisions, one document at a time,
`generate` and `stream`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from data_prep.common.errors import UserError, counted
from data_prep.text.tokenizer import Tokenizer
from pipeline.generation.api import Generation, generate
from pipeline.generation.replay import Replay, bucket, static_shapes
from pipeline.generation.upload import upload
from pipeline.models.backbone import run_packed, vector_width
from pipeline.models.folders import load_model_tokenizer
from pipeline.models.kv_cache import CachedPrompt, CachedStep, KeyValueCache, StaticStep
from pipeline.models.step import BackboneStep

FIRST_ROW = np.zeros(1, dtype=np.int64)  # of a state of one document


def checked_lengths(sentences: list[list[int]], longest: int) -> list[int]:
    """Their lengths in tokens. Raises: ValueError for an empty or too long sentence."""
    lengths = [len(sentence) for sentence in sentences]
    for length in lengths:
        if not 1 <= length <= longest:
            raise ValueError(f"a sentence has 1 to {counted(longest, 'token')}, not {length}")
    return lengths


@dataclass(kw_only=True)
class ContextState:
    """R documents: the backbone's cache (one place per sentence and one for the start) and last outputs
    [R, d_backbone]. step: of the backbone; None runs Hugging Face's. replay: a step with static shapes."""

    cache: KeyValueCache
    hidden: Tensor
    step: BackboneStep | None
    replay: Replay | None = None


class SentenceLM(PreTrainedModel):
    """Base of `SLLM` and `StackLM`, which implement `generation.protocol.SentenceModel`.

    They have a `backbone`, a `stop_head` and, if its vectors have another width, `to_backbone`. Their states
    have the backbone's `cache` and its last outputs, `hidden` [R, d_backbone]."""

    base_model_prefix = "sllm"
    batch_invariant = False  # a text's numbers have the same bits in any batch: set by `lay_out`
    keeps_prefixes = False  # whether `read` takes a `PrefixCache`
    backbone: Any
    to_backbone: Any
    stop_head: Any
    get_input_embeddings: Callable[[], nn.Embedding]
    new_state: Callable[[int], Any]
    new_decoder: Callable[[Any], Any]
    read: Callable[..., None]
    extend: Callable[[Any, np.ndarray, list[list[int]]], None]
    sentence_begin: Callable[[Any, Any, np.ndarray], None]
    sentence_step: Callable[[Any, np.ndarray, list[int]], Tensor]
    sentence_back: Callable[[Any, int, int], None]

    @property
    def device(self) -> torch.device:
        """As Hugging Face's, whose search for a first parameter takes 20 µs of every symbol."""
        return self.get_input_embeddings().weight.device

    @property
    def _start_apart(self) -> bool:
        """No sentence sees the start position: only in the published model."""
        return False

    @property
    def max_sentences(self) -> int:
        """The longest context in sentences: the backbone's positions less the start position."""
        return getattr(self.config.backbone, "max_position_embeddings", 1 << 30) - 1

    def _into(self, x: Tensor) -> Tensor:
        return x if self.to_backbone is None else self.to_backbone(x)

    def _stop_logits(self, hidden_Rd: Tensor) -> Tensor:
        """float32 [R]: log-odds that the document ends after each row."""
        logits = self.stop_head(hidden_Rd).float()
        return logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]

    @torch.no_grad()
    def stop_log_odds(self, state: Any, rows: np.ndarray) -> Tensor:
        """float32 [n], host: log-odds that the documents in `rows` end here; without a stop head none does,
        its end is a symbol."""
        if self.stop_head is None:
            return torch.full((len(rows),), -torch.inf)
        return self._stop_logits(state.hidden[torch.from_numpy(rows).to(self.device)]).cpu()

    def _context(self, rows: int) -> dict[str, Any]:
        """The fields of a `ContextState` of R empty documents. The cache grows up to `max_sentences`."""
        known = BackboneStep.known(self.backbone)
        cache = KeyValueCache(rows, most=self.max_sentences + 1)
        cache.steady = self.batch_invariant
        return {
            "cache": cache,
            "hidden": torch.zeros(
                rows, vector_width(self.config.backbone), dtype=self.dtype, device=self.device
            ),
            "step": BackboneStep(self.backbone) if known else None,
        }

    def _run_backbone(
        self, state: ContextState, x: Tensor, layout: CachedPrompt | CachedStep | StaticStep
    ) -> Tensor:
        """Vectors [n, d_backbone] at the layout's places → outputs."""
        if state.step is None:
            return run_packed(self.backbone, layout, inputs_embeds=x)
        return state.step(x, layout, state.cache.places)

    def _append_vectors(self, state: ContextState, rows: np.ndarray, x_nd: Tensor) -> Tensor:
        """One more position of each of `rows` (int64 [n], ascending); returns the outputs [n, d_backbone],
        which `state.hidden` keeps.

        Raises: ValueError when a row has no position left."""
        cache, device = state.cache, self.device
        if (cache.lengths[rows] > self.max_sentences).any():
            raise ValueError(
                f"the context is full: the backbone takes {counted(self.max_sentences, 'sentence')}"
            )

        if not static_shapes(device):
            out = self._run_backbone(state, x_nd, CachedStep(cache, rows, device))
            if len(rows) == 1:
                return state.hidden.narrow(0, int(rows[0]), 1).copy_(out)
            state.hidden[upload(rows, device)] = out
            return out
        if state.replay is None:

            def run(given: Tensor, x: Tensor) -> Tensor:
                return self._run_backbone(state, x, StaticStep(cache, *given))

            state.replay = Replay(run, device)
        cache.reserve(int(cache.lengths[rows].max()) + 1)
        places = cache.lengths[: bucket(int(rows[-1]) + 1, cache.rows)]
        rows_n = upload(rows, device)
        x = x_nd.new_zeros(len(places), x_nd.shape[1]).index_copy_(0, rows_n, x_nd)
        inputs = np.stack([places, np.minimum(places, self.max_sentences)])
        out = state.replay(inputs, x, version=cache.places)[rows_n]
        cache.lengths[rows] += 1
        state.hidden.index_copy_(0, rows_n, out)
        return out

    def begin(self) -> Any:
        """Start one document: the start position is fed."""
        state = self.new_state(1)
        self.read(state, FIRST_ROW, [[]])
        return state

    def append(self, state: Any, tokens: list[int]) -> None:
        """`extend` for one document."""
        self.extend(state, FIRST_ROW, [tokens])

    def stop_probability(self, state: Any) -> float:
        """Probability that the one document ends here. Raises: ValueError before the first sentence."""
        if state.cache.lengths[0] < 2 - self._start_apart:
            raise ValueError("no sentence yet: the stop head speaks after a sentence")
        return torch.sigmoid(self.stop_log_odds(state, FIRST_ROW)).item()

    def generate(
        self,
        prompt: str = "",
        tokenizer: Tokenizer | None = None,
        max_sentences: int = 10,
        temperature: float = 0.0,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        return_tokens: bool = False,
        **settings,
    ) -> str | list[list[int]]:
        """Continue `prompt` by up to `max_sentences` sentences (paper §3.3); see `generation.api.generate`.

        Args:
            tokenizer: the model's; None loads it from the model's folder.
            temperature, top_p, top_k, seed: greedy at temperature 0, else sampling, repeatable by its seed.
            return_tokens: return token ids.
            settings: min_p, repetition_penalty, max_tokens, stop.
        Returns: the new text (without the prompt), or the new tokens of each sentence.
        Raises: UserError for invalid settings, a prompt that is too long, or a missing tokenizer.
        """
        run = self.stream(
            prompt, tokenizer, max_sentences, temperature, top_p=top_p, top_k=top_k, seed=seed, **settings
        )
        sentences = list(run)
        if return_tokens:
            return [list(sentence.tokens) for sentence in sentences]
        return "".join(sentence.text for sentence in sentences)

    def stream(
        self,
        prompt: str = "",
        tokenizer: Tokenizer | None = None,
        max_sentences: int = 10,
        temperature: float = 0.0,
        **settings,
    ) -> Generation:
        """As `generate`, streamed: iterate over the result for sentences, over its `pieces()` for tokens."""
        if tokenizer is None:
            if not self.name_or_path:
                raise UserError("generate: this model was not loaded from a folder: give its tokenizer")
            tokenizer = load_model_tokenizer(self.name_or_path)
        return generate(self, tokenizer, prompt, max_sentences, temperature, **settings)
