"""The choice of the next symbols: what a row may choose, the repetition penalty, a guide's say, sampling."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import torch

from data_prep.text.tokenizer import Tokenizer
from pipeline.generation.protocol import Guide, SentenceModel
from pipeline.generation.results import Limits
from pipeline.generation.row import Row
from pipeline.generation.sampling import Sampling


def ends_by_rule(config: Any) -> bool:
    """Whether no symbol ends a sentence of a model with this config: a rule does, or the document's end."""
    return getattr(config, "ends", None) in ("rule", "document")


class Choice:
    """Chooses for the texts in `rows`, the writer's own list.

    bias_V: float32 [V], added to all logits: -inf at symbols that are in no text."""

    def __init__(
        self,
        model: SentenceModel,
        tokenizer: Tokenizer,
        limits: Limits,
        rows: list[Row | None],
        guide: Guide | None,
    ) -> None:
        config = model.config
        self._rows, self._guide, self._exactly = rows, guide, limits.sentence_tokens
        self._end, self._by_rule = config.eos_token_id, ends_by_rule(config)
        # Control symbols have no bytes; embedding rows above the tokenizer's entries are untrained.
        forbidden_V = np.ones(config.vocab_size, dtype=bool)
        forbidden_V[: tokenizer.vocab_size] = tokenizer.byte_lengths == 0
        forbidden_V[[config.bos_token_id, config.pad_token_id]] = True
        forbidden_V[self._end] = False
        bias_V = torch.zeros(config.vocab_size, device=model.device)
        self.bias_V = bias_V.masked_fill(torch.from_numpy(forbidden_V).to(model.device), -torch.inf)
        self._endless_V = self.bias_V.clone()
        self._endless_V[self._end] = -torch.inf
        self._seen_RV: torch.Tensor | None = None  # made for the first row with a repetition penalty

    def forget(self, at: int) -> None:
        """A new text starts in a row: the repetition penalty knows none of its tokens."""
        if self._seen_RV is None:
            size = len(self._rows), len(self.bias_V)
            self._seen_RV = torch.zeros(size, dtype=torch.bool, device=self.bias_V.device)
        self._seen_RV[at] = False

    def note(self, at: int, tokens: list[int]) -> None:
        """The repetition penalty lowers these tokens in a row's later choices; after `forget`."""
        self._seen_RV[at, torch.tensor(tokens, dtype=torch.long)] = True

    def choose(
        self,
        at_n: np.ndarray,
        logits_nV: torch.Tensor,
        bias_V: torch.Tensor | None = None,
        rng: torch.Generator | None = None,
    ) -> tuple[list[int], list[float]]:
        """One symbol per row, and its log-probability without temperature. `bias_V`: added to the logits;
        `rng`: in place of the rows' own."""
        groups: dict[Sampling, list[int]] = defaultdict(list)
        for n, at in enumerate(at_n.tolist()):
            groups[self._rows[at].sampling].append(n)
        if len(groups) == 1:
            return self._choose_alike(at_n, logits_nV, next(iter(groups)), bias_V, rng)
        symbol_n, log_probability_n = [0] * len(at_n), [0.0] * len(at_n)
        for sampling, members in groups.items():
            chosen = self._choose_alike(at_n[members], logits_nV[members], sampling, bias_V, rng)
            for n, symbol, log_probability in zip(members, *chosen, strict=True):
                symbol_n[n], log_probability_n[n] = symbol, log_probability
        return symbol_n, log_probability_n

    def _choose_alike(
        self,
        at_n: np.ndarray,
        logits_nV: torch.Tensor,
        sampling: Sampling,
        bias_V: torch.Tensor | None,
        rng: torch.Generator | None,
    ) -> tuple[list[int], list[float]]:
        """`choose` for rows of one `sampling`."""
        rows, exactly = [self._rows[at] for at in at_n], self._exactly
        allowed_nV = logits_nV
        if sampling.repetition_penalty != 1:
            allowed_nV = sampling.penalise(logits_nV, self._seen_RV[torch.from_numpy(at_n)])
        if bias_V is not None:
            allowed_nV = allowed_nV + bias_V
        # An empty sentence does not exist in training.
        endless = [n for n, row in enumerate(rows) if not row.tokens or exactly is not None]
        allowed_nV = allowed_nV + (self._endless_V if len(endless) == len(rows) else self.bias_V)
        if 0 < len(endless) < len(rows):
            allowed_nV[endless, self._end] = -torch.inf
        if self._guide is not None:
            pairs = zip(rows, allowed_nV, strict=True)
            adjusted = [x if row.closing else self._guide.adjust(row.request.number, x) for row, x in pairs]
            allowed_nV = torch.stack(adjusted)
        uniform_n = None
        if not sampling.greedy:
            drawn = [
                0.0 if row.closing else torch.rand((), generator=rng or row.rng, dtype=torch.float64).item()
                for row in rows
            ]
            uniform_n = torch.tensor(drawn, dtype=torch.float64, device=logits_nV.device)
        symbol_n = sampling.choose(allowed_nV, uniform_n)
        for n, row in enumerate(rows):
            if row.closing or exactly is not None and len(row.tokens) == exactly and not self._by_rule:
                symbol_n[n] = self._end
        chosen_n = logits_nV.log_softmax(-1).gather(1, symbol_n[:, None])[:, 0]
        return symbol_n.tolist(), chosen_n.tolist()
