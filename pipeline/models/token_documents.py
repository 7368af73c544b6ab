"""A token-level model as a `SentenceModel`: a document is one sentence, which ends with the document.

So the generation loop of sentence-level models, with its batching, limits and sampling, writes its texts too.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data_prep.common.errors import UserError
from data_prep.text.tokenizer import Tokenizer
from pipeline.models.backbone import run_packed
from pipeline.models.kv_cache import FIRST_PLACES, CachedPrompt, CachedStep, KeyValueCache
from pipeline.models.token_lm import TokenLM


@dataclass
class TokenCache:
    """R documents: keys and values, one place per token and one for the start. read: the last hidden states
    [R, d] of rows whose prompt's logits are still to be asked for (`fresh`, bool [R], host)."""

    cache: KeyValueCache
    read: Tensor
    fresh: np.ndarray


class TokenDocuments(nn.Module):
    """`lm` for `BatchWriter`. Its symbols are the tokens and the document's end."""

    max_sentences = 1 << 30

    def __init__(self, lm: TokenLM, tokenizer: Tokenizer) -> None:
        super().__init__()
        if lm.sentence_ends:
            raise UserError("a token-level model that reads sentence ends is a control, and writes no texts")
        self.lm, own = lm, lm.config
        self.positions = getattr(own, "max_position_embeddings", None) or 1 << 30
        # With a list of end symbols (chat models) or none, the tokenizer's own ends a plain text.
        ids = {
            f"{name}_token_id": value if isinstance(value := getattr(own, f"{name}_token_id", None), int) else
            getattr(tokenizer, f"{name}_id")
            for name in ("bos", "eos", "pad")
        }  # fmt: skip
        self.config = SimpleNamespace(
            vocab_size=lm.model.get_output_embeddings().out_features,
            max_sentence_tokens=self.positions,
            sentence_settings={"max_tokens": self.positions},
            ends="document",
            **ids,
        )

    @property
    def device(self) -> torch.device:
        return self.lm.device

    def new_state(self, rows: int) -> TokenCache:
        head = self.lm.model.get_output_embeddings()
        read = torch.zeros(rows, head.in_features, dtype=self.lm.model.dtype, device=self.device)
        return TokenCache(KeyValueCache(rows, most=self.positions), read, np.zeros(rows, dtype=bool))

    def new_decoder(self, state: TokenCache) -> TokenCache:
        return state

    @torch.no_grad()
    def read(self, state: TokenCache, rows: np.ndarray, documents: list[list[list[int]]], ahead: int) -> None:
        symbols = [[self.config.bos_token_id, *chain(*document)] for document in documents]
        lengths = np.asarray([len(one) for one in symbols])
        layout = CachedPrompt(state.cache, rows, lengths, self.device, min(ahead, FIRST_PLACES))
        hidden = self._run(layout, list(chain(*symbols)))
        state.read[torch.from_numpy(rows).to(self.device)] = hidden[layout.last_rows]

    def stop_log_odds(self, state: TokenCache, rows: np.ndarray) -> Tensor:
        return torch.full((len(rows),), -torch.inf)

    def sentence_begin(self, state: TokenCache, decoder: TokenCache, rows: np.ndarray) -> None:
        decoder.fresh[rows] = True

    @torch.no_grad()
    def sentence_step(self, decoder: TokenCache, rows: np.ndarray, symbols: list[int]) -> Tensor:
        """The first symbol of a row is its start, which `read` has fed."""
        fresh = decoder.fresh[rows]
        hidden = decoder.read[torch.from_numpy(rows).to(self.device)]
        if not fresh.all():
            step = CachedStep(decoder.cache, rows[~fresh], self.device)
            new = self._run(step, [s for s, first in zip(symbols, fresh, strict=True) if not first])
            hidden[torch.from_numpy(np.flatnonzero(~fresh)).to(self.device)] = new
        decoder.fresh[rows] = False
        return self.lm.model.get_output_embeddings()(hidden).float()

    def _run(self, layout: Any, symbols: list[int]) -> Tensor:
        ids = torch.tensor(symbols, device=self.device)
        return run_packed(self.lm.model.base_model, layout, input_ids=ids)
