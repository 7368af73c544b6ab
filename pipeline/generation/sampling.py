"""How the next symbol is chosen from logits, for many rows at once.

In: logits float32 [R, V], and for sampling one uniform number per row. Out: one symbol per row. A row's
choice does not depend on the rows beside it. Called by `generation_batch.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from data_prep.common.errors import UserError

NUCLEUS_FIRST_LOOK = 256  # likeliest symbols among which top-p is sought before all of them are sorted


@dataclass(frozen=True)
class Sampling:
    """Greedy at temperature 0. Else one draw from the softmax of logits / temperature, cut in this order:

    top_k: the K largest stay.
    top_p: of the likeliest, as many stay as it takes to reach the mass P (always at least one).
    min_p: what has at least P times the probability of the likeliest stays.
    repetition_penalty: logits of tokens that the text (prompt included) holds already are divided by it where
        positive and multiplied where negative (Keskar et al. 2019); comes first, acts on greedy choice too.
        Sentence ends are no tokens of the text.
    Symbols of equal logits stay or go together.
    """

    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature {self.temperature}: must be 0 (greedy) or a positive number")
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
        """Logits with the repetition penalty; `seen_RV` bool: tokens that the row's text holds."""
        penalty = self.repetition_penalty
        lowered = torch.where(logits_RV > 0, logits_RV / penalty, logits_RV * penalty)
        return torch.where(seen_RV, lowered, logits_RV)

    def choose(self, logits_RV: Tensor, uniform_R: Tensor | None) -> Tensor:
        """int64 [R]. `logits_RV`: -inf where a symbol is forbidden, in every row something is not;
        `uniform_R`: float64 [R] in [0, 1), not read when greedy."""
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
        # Below the total whatever the rounding: what is drawn has a probability above 0.
        at = torch.minimum(uniform_R[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
        return torch.searchsorted(mass, at, right=True)[:, 0]

    def _nucleus(self, scaled: Tensor) -> Tensor:
        """[R, 1]: the least logit that top-p keeps. `scaled` [R, V] has a maximum of 0 in each row."""
        total = scaled.exp().sum(-1, keepdim=True, dtype=torch.float64)
        for look in (min(NUCLEUS_FIRST_LOOK, scaled.shape[-1]), scaled.shape[-1]):
            likeliest = scaled.topk(look).values
            probability = likeliest.exp() / total
            before = probability.cumsum(-1) - probability  # the mass in front of each
            if look == scaled.shape[-1] or (before[:, -1] >= self.top_p).all():
                break
        kept = (before < self.top_p).sum(-1, keepdim=True)
        return likeliest.gather(-1, kept - 1)
