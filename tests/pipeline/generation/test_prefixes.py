"""Prompts that repeat are not read twice: the same texts, one entry a sentence, and a bound."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.backbone_families import family_sllm
from helpers.model_folders import small_model
from helpers.models import small_sllm

from data_prep.text.tokenizer import Tokenizer, load_tokenizer
from pipeline.generation.api import generate_many
from pipeline.generation.prefixes import PrefixCache
from pipeline.generation.results import Limits
from pipeline.generation.sampling import Sampling

CONTEXT = {"positions": "rotary", "context_sentences": 2, "layers": 2}
PROMPTS = [
    "It is. It was set by hand. ",
    "It is. It was set by hand. The list",
    "It is. The",
    "",
    "It is. It was",
]


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: str) -> Tokenizer:
    return load_tokenizer(tiny_tokenizer)


def encoded_sentences(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sentences of every pass of the encoder from now on."""
    counts: list[int] = []
    encode = model._encode

    def counted(state: Any, sentences: list[list[int]]) -> torch.Tensor:
        counts.append(len(sentences))
        return encode(state, sentences)

    monkeypatch.setattr(model, "_encode", counted)
    return counts


@pytest.mark.parametrize("vae", [{}, CONTEXT], ids=["alone", "context"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_texts_are_the_same_with_and_without(vae: dict, temperature: float, tokenizer: Tokenizer) -> None:
    model = small_model("sllm", tokenizer, seed=5, max_tokens=12, vae=vae)
    settings = Sampling(temperature), Limits(3, max_tokens=20), 3
    kept = PrefixCache()
    runs = [
        [
            (text.text, text.stopped)
            for texts in generate_many(model, tokenizer, PROMPTS * 2, *settings, prefixes=prefixes)
            for text in texts
        ]
        for prefixes in (PrefixCache(0), kept, kept)
    ]
    assert runs[0] == runs[1] == runs[2] and len(set(runs[0])) > 3


def read(model: Any, documents: list, prefixes: PrefixCache | None) -> Any:
    rows = np.arange(len(documents))
    state = model.new_state(len(documents))
    more = {} if prefixes is None else {"prefixes": prefixes}
    model.read(state, rows, documents, **more)
    return state


@pytest.mark.parametrize("family", ["opt", "opt-post-norm", "llama-wide", "mistral", "qwen3", "gpt_neox"])
@torch.no_grad()
def test_what_follows_a_known_start_is_what_follows_a_new_one(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole and partial hits beside new documents, for every family and its attention windows."""
    model, rng = family_sllm(family), np.random.default_rng(3)
    first = [rng.integers(4, 90, n).tolist() for n in rng.integers(1, 9, 12)]
    other = [rng.integers(4, 90, n).tolist() for n in rng.integers(1, 9, 3)]
    prefixes = PrefixCache()
    read(model, [first[:7]], prefixes)
    assert len(prefixes) == 8  # one of them of the start
    counts = encoded_sentences(model, monkeypatch)
    documents = [first, other, first[:5], first, []]
    state = read(model, documents, prefixes)
    assert counts == [5 + 3] and len(prefixes) == 8 + 5 + 3
    expected = read(model, documents, None)
    for _ in range(2):
        torch.testing.assert_close(state.hidden, expected.hidden, atol=1e-5, rtol=1e-4)
        for one in (state, expected):
            model.extend(one, np.arange(5), [[5, 6]] * 5)
    assert state.cache.lengths.tolist() == expected.cache.lengths.tolist()


def test_the_oldest_entries_go_first_and_the_bound_holds() -> None:
    model, sentences = small_sllm(), [[n, n + 1] for n in range(4, 40)]
    prefixes = PrefixCache()
    read(model, [sentences[:1]], prefixes)
    bytes_of_one = prefixes.bytes / 2
    prefixes = PrefixCache(int(5 * bytes_of_one))
    for start in range(0, 36, 3):
        read(model, [sentences[start : start + 3]], prefixes)
        assert len(prefixes) <= 5 and prefixes.bytes == len(prefixes) * bytes_of_one
    keys = PrefixCache.keys(sentences[33:])
    assert len(prefixes.find(keys)) == 4
    assert not prefixes.find(PrefixCache.keys(sentences[:3]))[1:]
    # Equal sentences behind others are other entries.
    assert len(prefixes.find(PrefixCache.keys([*sentences[33:35], [1]]))) == 3
