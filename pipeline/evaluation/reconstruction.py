"""Reconstruction by a SentenceVAE: batched greedy decoding, and edit distances from the original."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from data_prep.common.extras import import_extra
from pipeline.data.batch import Batch
from pipeline.models.sentence_vae import SentenceVAE

ROWS_AT_ONCE = 256  # sentences decoded together: bounds the cache and the logits


@torch.inference_mode()
def rebuild(model: SentenceVAE, batch: Batch, sentences: np.ndarray) -> list[np.ndarray]:
    """Greedy decoding of `sentences` (int64 [n], indices in the batch) from their embeddings.

    Returns: int64 tokens of each, without the end symbol; at most the model's longest sentence.
    """
    vector_Sd = model.encode(batch)
    return [
        written
        for at in range(0, len(sentences), ROWS_AT_ONCE)
        for written in _write(model, vector_Sd[torch.from_numpy(sentences[at : at + ROWS_AT_ONCE])])
    ]


def _write(model: SentenceVAE, vector_Rd: torch.Tensor) -> list[np.ndarray]:
    config, count = model.config, len(vector_Rd)
    longest = config.max_sentence_tokens
    written = np.full((count, longest + 1), config.eos_token_id, dtype=np.int64)
    state, rows = model.decoder.begin(vector_Rd), np.arange(count)
    symbols = torch.full((count,), config.bos_token_id, device=vector_Rd.device)
    for place in range(longest + 1):
        symbols = model.head(model.decoder.step(state, rows, symbols)).argmax(-1)
        written[rows, place] = symbols.cpu().numpy()
        unfinished = written[rows, place] != config.eos_token_id
        rows, symbols = rows[unfinished], symbols[torch.from_numpy(unfinished).to(symbols.device)]
        if not len(rows):
            break
    ends = np.where(written == config.eos_token_id, np.arange(longest + 1), longest).min(1)
    return [tokens[:end] for tokens, end in zip(written, ends, strict=True)]


def edit_distances(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> np.ndarray:
    """Levenshtein distances of pairs of token sequences (insert, delete, replace cost 1): int64 [n].

    Raises: UserError when rapidfuzz is not installed.
    """
    distance = import_extra("rapidfuzz.distance.Levenshtein", "eval").distance
    pairs = zip(first, second, strict=True)
    return np.array([distance(a.tolist(), b.tolist()) for a, b in pairs], dtype=np.int64)
