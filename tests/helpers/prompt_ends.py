"""What a document may have at a prompt's end, found by encoding whole documents, and a slow choice among it."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from data_prep.text.tokenizer import Tokenizer
from pipeline.generation.prompt import split_prompt
from pipeline.generation.sampling import Sampling

Paths = dict[tuple[int, ...], list[int]]  # tokens of a sentence that lie in the prompt → the tokens that follow


def documents_of(prompt: str, tokenizer: Tokenizer, settings: dict) -> Paths:
    """Of every document that is a start of `prompt` and one token more: the tokens of the last sentence."""
    sentences, tail = split_prompt(prompt, tokenizer, settings)
    complete = [token for sentence in sentences for token in sentence]
    start = len(tokenizer.decode(complete))
    paths: Paths = {}
    for end in range(start, len(prompt) + 1):
        rest = prompt[end:].encode()
        for token in np.flatnonzero(tokenizer.byte_lengths).tolist():
            data = tokenizer.decode_bytes([token])
            if not data.startswith(rest) or data == rest:
                continue
            try:
                text = prompt[:end] + data.decode()
            except UnicodeDecodeError:
                continue
            tokens = tokenizer.encode(text).tolist()
            if tokens[: len(complete)] == complete and tokens[-1] == token and tokens[:-1] == tokens[:-1]:
                inside = tokens[len(complete) : -1]
                if tokenizer.decode(complete + inside) == prompt[:end]:
                    paths.setdefault(tuple(inside), []).append(token)
    return paths


class NaiveEnd:
    """The choice at the end of a prompt: all paths, each with the uncached logits behind it."""

    def __init__(self, prompt: str, tokenizer: Tokenizer, settings: dict, end_symbol: int):
        self.prompt, self.tokenizer, self.end_symbol = prompt, tokenizer, end_symbol
        self.sentences, self.tail = split_prompt(prompt, tokenizer, settings)
        self.complete = [token for sentence in self.sentences for token in sentence]
        self.paths = documents_of(prompt, tokenizer, settings)

    def probabilities(self, logits_after: Callable[[list[int]], Tensor]) -> dict[tuple[int, ...], float]:
        """Of every choice, given the prompt: the tokens of the sentence up to the first that is new."""
        found = {}
        for path, lasts in self.paths.items():
            before = 0.0
            for at, token in enumerate(path):
                before += logits_after(list(path[:at])).double().log_softmax(-1)[token].item()
            p_V = logits_after(list(path)).double().log_softmax(-1)
            full = self.tokenizer.decode(self.complete + list(path)) == self.prompt
            for last in [*lasts, *([self.end_symbol] if full and path else [])]:
                found[(*path, last)] = before + p_V[last].item()
        total = float(torch.tensor(list(found.values()), dtype=torch.float64).logsumexp(0))
        return {choice: float(np.exp(value - total)) for choice, value in found.items()}

    def greedy(self, probabilities: dict[tuple[int, ...], float]) -> tuple[int, ...]:
        """Token by token the one that most of the probability lies behind."""
        chosen: tuple[int, ...] = ()
        while True:
            weights: dict[int, float] = {}
            for choice, p in probabilities.items():
                if choice[: len(chosen)] == chosen and len(choice) > len(chosen):
                    symbol = choice[len(chosen)]
                    weights[symbol] = weights.get(symbol, 0.0) + p
            if not weights:
                return chosen
            chosen = (*chosen, max(weights, key=weights.__getitem__))


def same_tokens(prompt: str, tokenizer: Tokenizer, tokens: list[int]) -> bool:
    """Whether a document of these tokens' text has them up to the first word after the prompt, or up to the
    last character that is complete."""
    text = tokenizer.decode_bytes(tokens).decode(errors="ignore")
    found = tokenizer.encode(text).tolist()
    word = re.compile(r"\s\S").search(text, max(0, len(prompt) - 1))
    upto = len(text[: word.end()].encode()) if word else len(text.encode())
    cut = int(np.searchsorted(np.cumsum(tokenizer.byte_lengths[tokens]), upto)) + (word is not None)
    return found[:cut] == tokens[:cut]


__all__ = ["NaiveEnd", "Sampling", "documents_of", "same_tokens"]
