"""Choosing the next symbol from logits, for many rows at once; rows do not influence each other."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from data_prep.common.errors import UserError

COLDEST = 1e-6  # a temperature below it is as good as greedy, and float32 would divide by 0
NUCLEUS_FIRST_LOOK = 256  # likeliest symbols that top-p looks at before it sorts all of them


@dataclass(frozen=True)
class Sampling:
    """Greedy at temperature 0, else one draw from the softmax of logits / temperature, filtered in this
    order:

    top_k: keep the K largest.
    top_p: keep the likeliest until they reach the mass P (at least one).
    min_p: keep symbols with at least P times the probability of the likeliest.
    repetition_penalty: applied first, also to greedy choice: logits of tokens that occur in the text (prompt
        included, sentence ends excluded) are divided by it if positive and multiplied if negative
        (Keskar et al. 2019).
    Symbols of equal logits are kept or dropped together.
    """

    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature {self.temperature}: must be 0 (greedy) or a positive number")
        if 0 < self.temperature < COLDEST:
            object.__setattr__(self, "temperature", COLDEST)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top-p {self.top_p}: must be above 0 and at most 1")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top-k {self.top_k}: must be at least 1")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise UserError(f"min-p {self.min_p}: must be from 0 to 1")
        if not 0 < self.repetition_penalty < math.inf:
            raise UserError(f"repetition penalty {self.repetition_penalty}: must be a positive number")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def penalise(self, logits_RV: Tensor, seen_RV: Tensor) -> Tensor:
        """Logits with the repetition penalty; `seen_RV` bool: tokens in the row's text."""
        penalty = self.repetition_penalty
        lowered = torch.where(logits_RV > 0, logits_RV / penalty, logits_RV * penalty)
        return torch.where(seen_RV, lowered, logits_RV)

    def choose(self, logits_RV: Tensor, uniform_R: Tensor | None) -> Tensor:
        """int64 [R]. `logits_RV`: -inf for forbidden symbols, finite for at least one per row; `uniform_R`:
        float64 [R] in [0, 1), unused when greedy."""
        if self.greedy:
            return logits_RV.argmax(-1)
        scaled = (logits_RV - logits_RV.amax(-1, keepdim=True)) / self.temperature
        if self.top_k is not None and self.top_k < scaled.shape[-1]:
            least = scaled.topk(self.top_k).values[:, -1:]
            scaled = scaled.masked_fill(scaled < least, -torch.inf)
        if self.top_p is not None and self.top_p < 1:
            scaled = scaled.masked_fill(scaled < self._nucleus(scaled), -torch.inf)
        if self.min_p:
            scaled = scaled.masked_fill(scaled < math.log(self.min_p), -torch.inf)
        mass = scaled.exp().cumsum(-1, dtype=torch.float64)
        total = mass[:, -1:]
        # Below the total whatever the rounding, so that the drawn symbol has a probability above 0.
        at = torch.minimum(uniform_R[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
        return torch.searchsorted(mass, at, right=True)[:, 0]

    def _nucleus(self, scaled: Tensor) -> Tensor:
        """[R, 1]: the smallest logit that top-p keeps. `scaled` [R, V] has a maximum of 0 in each row."""
        total = scaled.exp().sum(-1, keepdim=True, dtype=torch.float64)
        look = min(NUCLEUS_FIRST_LOOK, scaled.shape[-1])
        while True:
            likeliest = scaled.topk(look).values
            probability = likeliest.exp() / total
            before = probability.cumsum(-1) - probability  # the mass in front of each
            if look == scaled.shape[-1] or (before[:, -1] >= self.top_p).all():
                break
            look = scaled.shape[-1]
        kept = (before < self.top_p).sum(-1, keepdim=True)
        return likeliest.gather(-1, kept - 1)
