"""What a document may have at a prompt's end, found by encoding whole documents, and the choice among it."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Callable
from functools import cache
from itertools import product

import numpy as np
import torch
from torch import Tensor

from data_prep.text.tokenizer import Tokenizer
from pipeline.generation.prompt import split_prompt
from pipeline.generation.sampling import Sampling

Path = tuple[int, ...]


def may_follow(prompt: str, tokenizer: Tokenizer, tokens: list[int]) -> bool:
    """Whether a document that starts with the prompt has these tokens, or will when its last character is
    complete."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        text = decoder.decode(tokenizer.decode_bytes(tokens))
    except UnicodeDecodeError:
        return False
    if rest := decoder.getstate()[0]:
        ends = [bytes(x) for n in (1, 2, 3) for x in product((0x80, 0xBF), repeat=n)]
        return any(len((rest + end).decode(errors="ignore")) == 1 for end in ends)
    return tokenizer.encode(text).tolist() == tokens


def word_has_started(prompt: str, tokenizer: Tokenizer, tokens: list[int]) -> bool:
    """Whether a word starts behind the prompt in the text of the tokens: those at the prompt's end are then
    final. A character that is incomplete may still become white space."""
    text = codecs.getincrementaldecoder("utf-8")().decode(tokenizer.decode_bytes(tokens))
    return re.search(r"\s\S", text[len(prompt) - 1 :] if prompt else text) is not None


class NaiveEnd:
    """All tokens of a sentence that a document may have up to the first one that reaches beyond the prompt.

    `paths`: tokens that lie in the prompt → those that may follow, the sentence's end included; behind the
    whole prompt any, unless `checked`."""

    def __init__(
        self, prompt: str, tokenizer: Tokenizer, settings: dict, end_symbol: int, checked: bool = True
    ):
        self.prompt, self.tokenizer, self.end_symbol = prompt, tokenizer, end_symbol
        self.sentences, tail = split_prompt(prompt, tokenizer, settings)
        self.complete = [token for sentence in self.sentences for token in sentence]
        self.paths: dict[Path, list[int]] = {}
        data = {t: tokenizer.decode_bytes([t]) for t in np.flatnonzero(tokenizer.byte_lengths).tolist()}
        whole, own = prompt.encode(), tokenizer.encode(prompt).tolist()
        for end in range(len(tokenizer.decode_bytes(self.complete)), len(whole) + 1) if tail else []:
            rest = whole[end:]
            try:
                inside = tokenizer.encode(whole[:end].decode()).tolist()
            except UnicodeDecodeError:  # inside a character: where the prompt's tokens meet
                inside = next(
                    (own[:n] for n in range(len(own)) if tokenizer.decode_bytes(own[:n]) == whole[:end]), []
                )
                if not inside:
                    continue
            if inside[: len(self.complete)] != self.complete:
                continue
            if len(inside) - len(self.complete) >= settings["max_tokens"]:
                continue
            lasts = [t for t, x in data.items() if x.startswith(rest) and x != rest]
            if rest or checked:
                lasts = [t for t in lasts if may_follow(prompt, tokenizer, [*inside, t])]
            if not rest and len(inside) > len(self.complete):
                lasts.append(end_symbol)
            if lasts:
                self.paths[tuple(inside[len(self.complete) :])] = lasts
        self.certain: list[int] = []
        if self.paths:
            self.certain = os.path.commonprefix([list(path) for path in self.paths])

    def log_probabilities(self, logits_after: Callable[[list[int]], Tensor]) -> dict[Path, float]:
        """Of every choice, the tokens up to the first one beyond the prompt: not given the prompt."""
        found = {}
        for path, lasts in self.paths.items():
            before = sum(
                logits_after(list(path[:at])).double().log_softmax(-1)[token].item()
                for at, token in enumerate(path)
            )
            p_V = logits_after(list(path)).double().log_softmax(-1)
            found |= {(*path, last): before + p_V[last].item() for last in lasts}
        return found

    def choose(
        self,
        logits_after: Callable[[list[int]], Tensor],
        penalised: Callable[[Tensor], Tensor],
        sampling: Sampling,
        rng: torch.Generator,
        end_rng: torch.Generator,
    ) -> Path:
        """Token by token; each weighs what the model gives to all choices that begin with it. A token behind
        the whole prompt is checked when it is chosen, and chosen again if no document has it."""
        cached = cache(lambda *tokens: logits_after(list(tokens)))

        def after(tokens: list[int]) -> Tensor:
            return cached(*tokens)

        chosen = self._walk(after, penalised, sampling, rng, end_rng)
        while chosen[-1] != self.end_symbol and not may_follow(
            self.prompt, self.tokenizer, [*self.complete, *chosen]
        ):
            self.paths[chosen[:-1]].remove(chosen[-1])
            chosen = self._walk(after, penalised, sampling, rng, end_rng)
        return chosen

    def _walk(
        self,
        logits_after: Callable[[list[int]], Tensor],
        penalised: Callable[[Tensor], Tensor],
        sampling: Sampling,
        rng: torch.Generator,
        end_rng: torch.Generator,
    ) -> Path:
        choices = self.log_probabilities(logits_after)
        chosen: Path = ()
        while chosen not in choices:
            at = len(chosen)
            below: dict[int, list[float]] = {}
            for choice, value in choices.items():
                if choice[:at] == chosen:
                    below.setdefault(choice[at], []).append(value)
            logits_V = logits_after(list(chosen))
            own_V = logits_V.double().log_softmax(-1)
            mine = sum(
                logits_after(list(chosen[:number])).double().log_softmax(-1)[token].item()
                for number, token in enumerate(chosen)
            )
            allowed_V = torch.full_like(logits_V, -torch.inf)
            for token, values in below.items():
                mass = torch.tensor(values, dtype=torch.float64).logsumexp(0) - mine - own_V[token]
                allowed_V[token] = penalised(logits_V)[token] + mass
            if len(below) == 1:
                (symbol,) = below
            elif sampling.greedy:
                symbol = int(allowed_V.argmax())
            else:
                whole = self.tokenizer.decode([*self.complete, *chosen]) == self.prompt
                uniform = torch.rand((), generator=rng if whole else end_rng, dtype=torch.float64)[None]
                symbol = int(sampling.choose(allowed_V[None], uniform))
            chosen = (*chosen, symbol)
        return chosen
