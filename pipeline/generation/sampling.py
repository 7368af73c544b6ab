"""Choosing the next symbol from logits, for many rows at once; rows do not influence each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_prep.common.errors import UserError
from pipeline.generation.upload import upload

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
        """`penalise` for rows of these settings."""
        return penalise(logits_RV, seen_RV, [self])

    def choose(self, logits_RV: Tensor, uniform_R: Tensor | None) -> Tensor:
        """`choose` for rows of these settings."""
        return choose(logits_RV, uniform_R, [self])


class Plan(NamedTuple):
    """Which computations the settings of some rows need; the larger of two plans serves the rows of both.

    kept: the largest top-k, which is the vocabulary's size where a row has none. limited: whether a row has
    one."""

    greedy: bool = False
    drawn: bool = False
    kept: int = 1
    limited: bool = False
    top_p: bool = False
    min_p: bool = False
    penalty: bool = False

    @classmethod
    def of(cls, settings: Sequence[Sampling], size: int) -> Plan:
        kept = [min(one.top_k or size, size) for one in settings]
        return cls(
            any(one.greedy for one in settings),
            not all(one.greedy for one in settings),
            max(kept),
            min(kept) < size,
            any((one.top_p or 1) < 1 for one in settings),
            any(one.min_p for one in settings),
            any(one.repetition_penalty != 1 for one in settings),
        )

    def with_room(self, other: Plan, size: int) -> Plan:
        """A plan that serves the rows of both, and top-k up to the next power of two."""
        both = Plan._make(map(max, self, other))
        return both._replace(kept=min(size, 1 << (both.kept - 1).bit_length()))


def controls(settings: Sequence[Sampling], size: int) -> dict[str, list[float]]:
    """The numbers of each setting that `choose_by` reads; of a row at its place."""
    return {
        "greedy": [one.greedy for one in settings],
        "temperature": [one.temperature or 1.0 for one in settings],
        "last": [min(one.top_k or size, size) - 1 for one in settings],
        "top_p": [one.top_p or 1.0 for one in settings],
        "min_p": [math.log(one.min_p) if one.min_p else -math.inf for one in settings],
        "penalty": [one.repetition_penalty for one in settings],
    }


def _columns(device: torch.device, values: dict[str, list[float]]) -> dict[str, Any]:
    """One value for all rows, or a column float64 [R, 1] on the device; one upload for all columns."""
    varied = [name for name, of in values.items() if any(one != of[0] for one in of)]
    found: dict[str, Any] = {name: of[0] for name, of in values.items()}
    if varied:
        block = upload(np.asarray([values[name] for name in varied], dtype=np.float64), device)
        found |= zip(varied, block[:, :, None].unbind(), strict=True)
    return found


def _as(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) else value


def penalise(logits_RV: Tensor, seen_RV: Tensor, settings: Sequence[Sampling]) -> Tensor:
    """Logits with the repetition penalty; `seen_RV` bool: tokens in the row's text."""
    values = {"penalty": [one.repetition_penalty for one in settings]}
    return penalise_by(logits_RV, seen_RV, _columns(logits_RV.device, values)["penalty"])


def penalise_by(logits_RV: Tensor, seen_RV: Tensor, penalty: Any) -> Tensor:
    """The same by one penalty for all rows, or a column."""
    penalty = _as(penalty, logits_RV.dtype)
    lowered = torch.where(logits_RV > 0, logits_RV / penalty, logits_RV * penalty)
    return torch.where(seen_RV, lowered, logits_RV)


def choose(logits_RV: Tensor, uniform_R: Tensor | None, settings: Sequence[Sampling]) -> Tensor:
    """One symbol per row, int64 [R], all rows in one go; on a GPU the host does not wait.

    Args:
        logits_RV: -inf for forbidden symbols, finite for at least one per row.
        uniform_R: float64 [R] in [0, 1), unused by greedy rows.
        settings: of every row, or one for all.
    """
    if all(one.greedy for one in settings):
        return logits_RV.argmax(-1)
    assert uniform_R is not None
    size = logits_RV.shape[-1]
    values = controls(settings, size)
    del values["penalty"]
    return choose_by(logits_RV, uniform_R, _columns(logits_RV.device, values), Plan.of(settings, size))


def choose_by(logits_RV: Tensor, uniform_R: Tensor, columns: dict[str, Any], plan: Plan) -> Tensor:
    """`choose` by `controls`, each one value for all rows or a column float64 [R, 1]."""
    likeliest_R = logits_RV.argmax(-1) if plan.greedy else None
    if likeliest_R is not None and not plan.drawn:
        return likeliest_R
    dtype = logits_RV.dtype
    scaled = logits_RV - logits_RV.amax(-1, keepdim=True)
    scaled = scaled / _as(columns["temperature"], dtype)
    if plan.limited:
        largest, last = scaled.topk(plan.kept).values, columns["last"]
        least = largest.gather(-1, last.long()) if isinstance(last, Tensor) else largest[:, last : last + 1]
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    if plan.top_p:
        scaled = scaled.masked_fill(scaled < _nucleus(scaled, columns["top_p"]), -torch.inf)
    if plan.min_p:
        scaled = scaled.masked_fill(scaled < _as(columns["min_p"], dtype), -torch.inf)
    mass = scaled.exp().cumsum(-1, dtype=torch.float64)
    total = mass[:, -1:]
    # Below the total (by one bit) whatever the rounding, so that the drawn symbol has a probability above 0.
    at = torch.minimum(uniform_R[:, None] * total, total * (1 - 2**-53))
    drawn_R = torch.searchsorted(mass, at, right=True)[:, 0]
    return drawn_R if likeliest_R is None else torch.where(columns["greedy"][:, 0] > 0, likeliest_R, drawn_R)


def reads_freely(device: torch.device) -> bool:
    """Whether the host reads a tensor's values at once: on a GPU it waits until all work is done."""
    return device.type == "cpu"


def _nucleus(scaled: Tensor, top_p: Any) -> Tensor:
    """[R, 1]: the smallest logit that top-p keeps; -inf where it is 1. `scaled` [R, V] has a maximum of 0 in
    each row."""
    total = scaled.exp().sum(-1, keepdim=True, dtype=torch.float64)
    size, everything = scaled.shape[-1], top_p >= 1
    look = min(NUCLEUS_FIRST_LOOK, size) if reads_freely(scaled.device) else size
    while True:
        likeliest = scaled.topk(look).values
        probability = likeliest.exp() / total
        before = probability.cumsum(-1) - probability  # the mass in front of each
        if look == size or ((before[:, -1:] >= top_p) | everything).all():
            break
        look = size
    kept = (before < top_p).sum(-1, keepdim=True)
    least = likeliest.gather(-1, kept - 1)
    return least if everything is False else least.masked_fill(everything, -torch.inf)
