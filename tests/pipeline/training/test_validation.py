"""The sample of a validation: the same text and figures however many ranks share it."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import VOCABULARY, small_vae

from data_prep.shards.reader import ShardSet
from pipeline.data.batch import Batch, build_batch
from pipeline.data.plan import BinPlan
from pipeline.models.losses import bits_per_byte, perplexity
from pipeline.parallel.ranks import Ranks
from pipeline.training import validation
from pipeline.training.engine import NATS, _nats
from pipeline.training.validation import Validation

BINS = 5


@pytest.fixture(scope="module")
def plan(tiny_valid_shards) -> BinPlan:
    return BinPlan([ShardSet.open(tiny_valid_shards)], 128, 512, 0)


class PlainEngine:
    """The sums of `Engine.evaluate`, without DeepSpeed; 512 tokens are folded onto a small vocabulary."""

    def __init__(self) -> None:
        self.model = small_vae(variational=True, kl_weight=0.1, max_sentence_tokens=64)

    @torch.no_grad()
    def evaluate(self, batches: list[Batch]) -> torch.Tensor:
        sums = torch.zeros(5, dtype=torch.float64)
        for batch in batches:
            folded = Batch(
                batch.tokens_T % (VOCABULARY - 4) + 4,
                batch.cu_sentences,
                batch.cu_documents,
                batch.document_end_D,
                batch.scored,
            )
            sums += _nats(self.model(folded))
        return sums


@pytest.mark.parametrize("world", [1, 2, 3])
def test_figures_are_those_of_all_ranks_bins(plan: BinPlan, world: int, monkeypatch) -> None:
    """Every rank's sums are computed here, in place of the all-reduce."""
    engine, tokenizer = PlainEngine(), plan.shard_sets[0].tokenizer()
    ranks = [Validation(plan, BINS, Ranks(rank, world, 0), tokenizer.byte_lengths) for rank in range(world)]
    nats = [engine.evaluate(one._batches) for one in ranks]
    text = [one._text_bytes for one in ranks]

    def summed(of: Ranks, names: Any, sums: torch.Tensor, figures: dict[str, float]) -> dict[str, float]:
        assert figures == {"text_bytes": text[of.rank]} and tuple(names) == NATS
        torch.testing.assert_close(sums, nats[of.rank])
        return dict(zip(names, sum(nats).tolist(), strict=True)) | {"text_bytes": sum(text)}

    monkeypatch.setattr(validation, "sum_over_ranks", summed)
    bins = list(itertools.islice(plan.epoch(), BINS))
    batches = [build_batch(plan.spans(one)) for one in bins]
    expected = SimpleNamespace(**dict(zip(NATS, engine.evaluate(batches).tolist(), strict=True)))
    tokens = np.concatenate([batch.tokens_T.numpy() for batch in batches])
    total = expected.token_nll + expected.end_nll + expected.stop_nll
    for one in ranks:
        figures = one.run(engine)
        assert figures["tokens"] == len(tokens)
        assert figures["bytes"] == len(tokenizer.decode_bytes(tokens))
        assert figures["bits_per_byte"] == pytest.approx(bits_per_byte(total, figures["bytes"]), rel=1e-6)
        assert figures["ppl"] == pytest.approx(perplexity(total, len(tokens)), rel=1e-5)
        assert figures["nll_nats"] == pytest.approx(total, rel=1e-6)
        sentences = sum(batch.sentences for batch in batches)
        assert figures["kl"] == pytest.approx(expected.kl / sentences, rel=1e-6)
