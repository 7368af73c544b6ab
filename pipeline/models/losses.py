"""`LossSums`, the result of every model's `forward`, and the figures made of such sums (docs/evaluation.md).

Sums in nats, never means, so that ranks and batches add up. `pipeline.training.engine` divides them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class LossSums:
    """Sums over one batch.

    objective: scalar with gradient, nats: the training loss over the vocabulary targets (CE, focal, label
        smoothing, z-loss), plus stop decisions (`sllm`), plus the weighted KL (variational `vae`). It is 0
        but connected to every parameter for an unscored batch.
    token_nll, end_nll, stop_nll: float32 scalars without gradient, always plain cross-entropy; ends are
        sentence ends (`vae`, `sllm`) or document ends (`lm`).
    kl: float32 scalar without gradient: divergence of the sentences' latent distributions from the standard
        normal, unweighted and without free bits (variational `vae`, else 0); not part of any nll.
    target_nll_N: float32, every vocabulary target in order; target_correct_N: bool, arg max == target, if
        asked for.
    is_end_N: bool, the target is an end symbol.
    stop_nll_S: float32 per sentence (`sllm`).
    """

    objective: Tensor
    token_nll: Tensor
    end_nll: Tensor
    stop_nll: Tensor
    kl: Tensor
    target_nll_N: Tensor
    is_end_N: Tensor
    target_correct_N: Tensor | None = None
    stop_nll_S: Tensor | None = None

    @classmethod
    def collect(
        cls,
        scored: bool,
        objective: Tensor,
        target_nll_N: Tensor,
        is_end_N: Tensor,
        target_correct_N: Tensor | None = None,
        stop_nll_S: Tensor | None = None,
        kl: Tensor | None = None,
    ) -> LossSums:
        """Sum up the per-target figures; an unscored batch counts as 0."""
        weight = 1.0 if scored else 0.0
        ends = torch.where(is_end_N, target_nll_N, 0.0).sum() * weight
        stop = objective.new_zeros(()) if stop_nll_S is None else stop_nll_S.detach().sum() * weight
        return cls(
            objective * weight,
            target_nll_N.sum() * weight - ends,
            ends,
            stop,
            objective.new_zeros(()) if kl is None else kl.detach() * weight,
            target_nll_N,
            is_end_N,
            target_correct_N,
            None if stop_nll_S is None else stop_nll_S.detach(),
        )


def bits_per_byte(nats: float, text_bytes: float) -> float:
    """Bits per byte from the nats of a text and its UTF-8 bytes."""
    return nats / math.log(2) / text_bytes


def perplexity(nats: float, tokens: float) -> float:
    """exp of the nats per plain token, capped so that JSON can hold it."""
    return math.exp(min(nats / tokens, 700.0))
