"""The interface of a model for generation: reads whole sentences, gives logits of the next one's symbols."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch


class SentenceModel(Protocol):
    """A model that predicts a sentence at a time, with one cache row for each of R documents.

    `state` is the model's state of the documents, `decoder` that of the sentences being generated. Generation
    passes both back. It reads the state's `cache` and the decoder's `bytes` only.
    """

    # `vocab_size`, `max_sentence_tokens`, `sentence_settings`, `bos_token_id`, `eos_token_id`, `pad_token_id`
    # and, where a sentence's end is not predicted, `ends`: by `rule`, or with the `document`
    config: Any

    @property
    def device(self) -> torch.device: ...

    @property
    def max_sentences(self) -> int:
        """The longest document, in sentences."""

    def new_state(self, rows: int) -> Any:
        """R empty documents."""

    def new_decoder(self, state: Any) -> Any:
        """A decoder row for each document of `state`."""

    def read(self, state: Any, rows: np.ndarray, documents: list[list[list[int]]], ahead: int) -> None:
        """Start documents in `rows` (int64 [n]) with complete sentences; up to `ahead` more will follow."""

    def extend(self, state: Any, rows: np.ndarray, sentences: list[list[int]]) -> None:
        """Append one sentence to each document in `rows` (int64 [n], ascending): the one being generated."""

    def stop_log_odds(self, state: Any, rows: np.ndarray) -> torch.Tensor:
        """Log-odds that each document ends here, float32 [n] on the host."""

    def sentence_begin(self, state: Any, decoder: Any, rows: np.ndarray) -> None:
        """Start the next sentence of each document in `rows`."""

    def sentence_step(self, decoder: Any, rows: np.ndarray, symbols: list[int]) -> torch.Tensor:
        """Feed one symbol to each row; logits of the next symbols, float32 [n, V]."""

    def sentence_back(self, decoder: Any, row: int, symbols: int) -> None:
        """Forget the last symbols fed to a row."""


class Guide(Protocol):
    """A caller's say in the choices of a text, named by its request's number. With a guide the prompt's last
    tokens are not taken back if `keeps_prompt`."""

    keeps_prompt: bool

    def adjust(self, number: int, logits_V: torch.Tensor) -> torch.Tensor:
        """Logits for the next choice, before temperature and filters."""

    def ends(self, number: int) -> bool | None:
        """Whether the document ends after a sentence; None leaves it to the model."""

    def stops(self, number: int, token: int, data: bytes) -> bool:
        """Take the next token and the bytes that it adds to the text; True stops the text there."""
