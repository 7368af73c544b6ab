"""What sentence vectors are worth: the loss when each sentence is decoded from another vector than its own.

    without      the vector of its window's start
    shuffle      the vector at the same place of a window of another document
    shift_K      the vector of the sentence K before it in its window

A model that knows places only loses nothing by `shuffle`. A later vector is never given to a sentence,
because it has read that sentence. Sentences without such a partner keep their own vector and are not counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.data.batch import Batch, build_batch
from pipeline.data.windows import Span

SHIFTS = (1, 2, 5, 20)
SHUFFLES = ("shuffle", *(f"shift_{shift}" for shift in SHIFTS))


def replacements(
    model: Any, batch: Batch, donors: Sequence[Span | None]
) -> Iterator[tuple[Tensor, np.ndarray]]:
    """Vectors [S, d] in place of the batch's own, and which sentences (bool [S]) got another one: for
    `without`, then for each of `SHUFFLES`.

    Args:
        model: has `sentence_vectors`.
        donors: a window of another document for each window of the batch, if there is one.
    """
    vectors, place_S, rows_S = model.sentence_vectors(batch), batch.place_S, np.arange(batch.sentences)
    yield _taken(vectors, rows_S - place_S), np.ones(batch.sentences, dtype=bool)
    counts_D = np.diff(batch.cu_documents)
    lengths_D = np.asarray([0 if donor is None else len(donor.sentence_lengths) for donor in donors])
    # The first place has the start's vector in every window.
    there_S = (place_S > 0) & (place_S < np.repeat(lengths_D, counts_D))
    shuffled = vectors
    if there_S.any():
        others = model.sentence_vectors(build_batch([d for d in donors if d is not None]).to(batch.device))
        source_S = np.repeat(np.cumsum(lengths_D) - lengths_D, counts_D) + place_S
        both = torch.cat([vectors, others])
        shuffled = _taken(both, np.where(there_S, batch.sentences + source_S, rows_S))
    yield shuffled, there_S
    for shift in SHIFTS:
        there_S = place_S >= shift
        yield _taken(vectors, np.where(there_S, rows_S - shift, rows_S)), there_S


def _taken(vectors: Tensor, rows_S: np.ndarray) -> Tensor:
    return vectors.index_select(0, torch.from_numpy(rows_S).to(vectors.device))
