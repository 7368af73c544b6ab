"""Evaluation inside the training loop: a fixed sample of the validation shards, divided among the ranks.

It gives the curves and the best checkpoint; `pipeline.evaluation.evaluate` measures whole shard sets, with
the same definitions.
"""

from __future__ import annotations

import itertools
import time
from typing import Any

import numpy as np

from pipeline.data.loader import assign, build
from pipeline.data.plan import BinPlan
from pipeline.models.losses import bits_per_byte, perplexity
from pipeline.parallel.ranks import Ranks
from pipeline.parallel.reduction import sum_over_ranks
from pipeline.training.engine import NATS, Engine


class Validation:
    """The first `bins` bins of the plan's epoch 0. Give the plan a seed that all runs share."""

    def __init__(self, plan: BinPlan, bins: int, ranks: Ranks, byte_lengths: np.ndarray):
        chosen = list(itertools.islice(plan.epoch(), bins))
        self.tokens = sum(bin_.tokens for bin_ in chosen)
        self.sentences = sum(bin_.sentences for bin_ in chosen)
        self._ranks = ranks
        self._batches, self._text_bytes = build(plan, assign(chosen, ranks), byte_lengths)

    def run(self, engine: Engine) -> dict[str, Any]:
        """Sums over all ranks' bins: nats by kind, `bits_per_byte`, `ppl` (exp of nats per plain
        token); `kl` (nats per sentence) of a variational SentenceVAE."""
        began = time.perf_counter()
        nats_5 = engine.evaluate(self._batches)
        sums = sum_over_ranks(self._ranks, NATS, nats_5, {"text_bytes": self._text_bytes})
        parts = {name: sums[name] for name in ("token_nll", "end_nll", "stop_nll")}
        nats = sum(parts.values())
        figures = {
            "bits_per_byte": bits_per_byte(nats, sums["text_bytes"]),
            "ppl": perplexity(nats, self.tokens),
            "nll_nats": nats,
            **parts,
            "bytes": int(sums["text_bytes"]),
            "tokens": self.tokens,
            "seconds": time.perf_counter() - began,
        }
        if sums["kl"]:  # variational only
            figures["kl"] = sums["kl"] / self.sentences
        return figures
