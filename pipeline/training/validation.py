"""Evaluation inside the training loop: a fixed sample of the validation shards, spread over the ranks.

In: validation shards and an `Engine`. Out: one record for `evaluations.jsonl`. `evaluation.py` measures a
finished model on whole shard sets, with the same definitions; this one is for curves and for choosing the
best checkpoint.
"""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING, Any

import deepspeed.comm as dist
import numpy as np
import torch

from pipeline.data.loader import assign, build
from pipeline.data.plan import BinPlan
from pipeline.models.losses import bits_per_byte, perplexity
from pipeline.parallel.ranks import Ranks

if TYPE_CHECKING:
    from pipeline.training.engine import Engine


class Validation:
    """The first `bins` bins of the plan's epoch 0; the plan's own seed must not be the run's, so that all
    runs share them."""

    def __init__(self, plan: BinPlan, bins: int, ranks: Ranks, byte_lengths: np.ndarray):
        chosen = list(itertools.islice(plan.epoch(), bins))
        self.tokens = sum(bin_.tokens for bin_ in chosen)
        self.sentences = sum(bin_.sentences for bin_ in chosen)
        self._batches, self._text_bytes = build(plan, assign(chosen, ranks), byte_lengths)

    def run(self, engine: Engine) -> dict[str, Any]:
        """Sums over all ranks' bins: nats by kind, `bits_per_byte`, `ppl` (exp of nats per plain
        token); `kl` (nats per sentence) of a variational SentenceVAE."""
        began = time.perf_counter()
        sums = torch.cat([engine.evaluate(self._batches), engine.device_tensor([self._text_bytes])])
        dist.all_reduce(sums)
        _, token_nll, end_nll, stop_nll, kl, text_bytes = sums.tolist()
        nats = token_nll + end_nll + stop_nll
        figures = {
            "bits_per_byte": bits_per_byte(nats, text_bytes),
            "ppl": perplexity(nats, self.tokens),
            "nll_nats": nats,
            "token_nll": token_nll,
            "end_nll": end_nll,
            "stop_nll": stop_nll,
            "bytes": int(text_bytes),
            "tokens": self.tokens,
            "seconds": time.perf_counter() - began,
        }
        if kl:  # a variational SentenceVAE's; 0 for all others
            figures["kl"] = kl / self.sentences
        return figures
