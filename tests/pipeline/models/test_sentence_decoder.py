"""The sentence decoder's cached steps: every text of a batch is what it is alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.models import IDS, VOCABULARY, small_sllm, small_vae

from pipeline.models.layers import TokenEmbedding, sinusoids

BOS = IDS["bos_token_id"]
CONTEXT = {"positions": "rotary", "context_sentences": 1, "layers": 2}
OPTIONS = {
    "vector only": {},
    "context": CONTEXT,
    "wide context": {**CONTEXT, "context_sentences": 2},
    "prefix": {"condition": "prefix", "prefix_slots": 2},
    "prefix, context": {**CONTEXT, "condition": "prefix", "prefix_slots": 2},
}


def earlier(rng: np.random.Generator, sentences: int, width: int) -> list:
    """Sentences before one, each with its vector."""
    return [
        (
            rng.integers(4, VOCABULARY, rng.integers(1, 9)).tolist(),
            torch.from_numpy(rng.normal(size=width)).float(),
        )
        for _ in range(sentences)
    ]


@torch.no_grad()
def written(decoder, vector_d, context, symbols) -> torch.Tensor:
    """Hidden states of one sentence by itself."""
    state = decoder.begin(vector_d[None], [context])
    return torch.cat([decoder.step(state, np.arange(1), torch.tensor([symbol])) for symbol in symbols])


@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_sentences_of_a_batch_are_sentences_alone(name: str) -> None:
    """Rows with none to many earlier sentences; some continue while others start a new one."""
    decoder, rng = small_vae(**OPTIONS[name]).decoder, np.random.default_rng(4)
    width, rows = 32, 5
    vectors = torch.from_numpy(rng.normal(size=(rows, width))).float()
    contexts = [earlier(rng, count, width) for count in (0, 3, 1, 6, 4)]
    symbols = [[BOS, *rng.integers(4, VOCABULARY, 6).tolist()] for _ in range(rows)]
    state = decoder.begin(vectors, contexts)
    fed = [0] * rows

    def feed(some: list[int]) -> None:
        given = torch.tensor([symbols[row][fed[row]] for row in some])
        found = decoder.step(state, np.asarray(some), given)
        for row, hidden in zip(some, found, strict=True):
            fed[row] += 1
            alone = written(decoder, vectors[row], contexts[row], symbols[row][: fed[row]])[-1]
            torch.testing.assert_close(hidden, alone, atol=1e-5, rtol=1e-4)

    for some in ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [1, 3], [0, 2, 4], [3]):
        feed(some)
    again = [1, 3, 4]
    for row, count in zip(again, (5, 0, 2), strict=True):
        contexts[row], vectors[row] = (
            earlier(rng, count, width),
            torch.from_numpy(rng.normal(size=width)).float(),
        )
        fed[row] = 0
    decoder.restart(state, np.asarray(again), vectors[again], [contexts[row] for row in again])
    for some in (again, [0, 1, 2, 3, 4], [1, 2], [0, 3, 4]):
        feed(some)


@pytest.mark.parametrize("options", [{}, CONTEXT])
@torch.no_grad()
def test_documents_of_a_batch_are_documents_alone(options: dict) -> None:
    """Some rows of a state start their next sentence: with their own vector, and their own earlier ones."""
    model, rng = small_sllm(**options), np.random.default_rng(5)
    documents = [[rng.integers(4, VOCABULARY, 5).tolist() for _ in range(n)] for n in (3, 1, 4, 2)]
    more = [rng.integers(4, VOCABULARY, 4).tolist() for _ in range(2)]
    state, rows = model.new_state(4), np.arange(4)
    model.read(state, rows, documents)
    decoder = model.new_decoder(state)
    model.extend(state, np.asarray([1, 3]), more)
    documents[1].append(more[0])
    documents[3].append(more[1])
    for some in ([1, 3], [2], [0, 1, 2, 3]):
        model.sentence_begin(state, decoder, np.asarray(some))
        logits = model.sentence_step(decoder, np.asarray(some), [BOS] * len(some))
        for row, found in zip(some, logits, strict=True):
            alone = model.begin()
            for sentence in documents[row]:
                model.append(alone, sentence)
            torch.testing.assert_close(found, model.decode_begin(alone).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["learned", "sinusoidal", "rotary"])
def test_what_an_embedding_adds_up(kind: str) -> None:
    """Sinusoidal positions stand beside embeddings times √width; rotary ones add nothing."""
    embedding = TokenEmbedding(VOCABULARY, 32, 32, 20, kind)
    tokens, positions = torch.tensor([5, 6, 5]), torch.tensor([0, 1, 19])
    plain = embedding.token.weight[tokens]
    expected = {
        "learned": lambda: plain + embedding.position.weight[positions],
        "sinusoidal": lambda: plain * 32**0.5 + sinusoids(20, 32)[positions],
        "rotary": lambda: plain,
    }[kind]()
    torch.testing.assert_close(embedding(tokens, positions), expected)
