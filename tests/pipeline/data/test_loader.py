"""The loader: every bin of a step once, for any number of ranks, and a position that resumes after it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from data_prep.common.errors import UserError
from data_prep.shards.reader import ShardSet
from pipeline.data.batch import build_batch
from pipeline.data.loader import Step, StepLoader, assign, bin_seed
from pipeline.data.plan import Bin, BinPlan, Place, Position
from pipeline.parallel.ranks import Ranks

BINS = 5  # of a step
EMPTY = np.zeros(0, dtype=np.int64)


@pytest.fixture(scope="module")
def shards(tiny_shards):
    return ShardSet.open(tiny_shards)


@pytest.fixture
def plan(shards):
    """Two sources whose epochs end within a dozen steps."""
    return BinPlan([shards, shards], 128, 8192, 1, weights=[2, 1])


def steps(plan: BinPlan, ranks: Ranks, count: int, position: Position | None = None) -> list[Step]:
    byte_lengths = plan.shard_sets[0].tokenizer().byte_lengths
    start = position or plan.start()
    with StepLoader(plan, "sllm", BINS, ranks, byte_lengths, start) as loader:
        return [loader.next_step() for _ in range(count)]


@pytest.mark.parametrize("world", [1, 2, 3, 5, 7])
def test_ranks_share_every_bin_of_a_step_in_batches_of_equal_number(world: int) -> None:
    bins = list(range(BINS))  # `assign` reads their number only
    shares = [assign(bins, Ranks(rank, world, 0)) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    # Micro-batch m of rank r is bin m · world + r.
    order = [share[m] for m in range(len(shares[0])) for share in shares]
    assert order[:BINS] == bins and set(order[BINS:]) <= {None}
    assert len(order) - BINS < world


@pytest.mark.parametrize("world", [1, 2, 3])
def test_steps_are_those_of_the_stream_on_any_number_of_ranks(plan: BinPlan, world: int) -> None:
    count = 4
    stream = list(itertools.islice(plan.bins(), count * BINS))
    of_ranks = [steps(plan, Ranks(rank, world, 0), count) for rank in range(world)]
    for number, of_step in enumerate(zip(*of_ranks, strict=True)):
        bins = stream[number * BINS : (number + 1) * BINS]
        batches = [build_batch(plan.spans(one)) for one in bins]
        text = [plan.shard_sets[0].tokenizer().decode_bytes(batch.tokens_T.numpy()) for batch in batches]
        assert sum(step.digest for step in of_step) == sum(batch.digest() for batch in batches)
        assert sum(step.text_bytes for step in of_step) == sum(map(len, text))
        for rank, step in enumerate(of_step):
            assert step.bins_all == bins
            assert step.tokens_all == sum(batch.tokens for batch in batches)
            assert step.targets_all == step.tokens_all + sum(batch.sentences for batch in batches)
            assert step.position == plan.start().after(stream[: (number + 1) * BINS])
            mine = assign(bins, Ranks(rank, world, 0))
            assert [batch.scored for batch in step.batches] == [one is not None for one in mine]
            assert step.seeds == [0 if one is None else bin_seed(plan.seed, one) for one in mine]


def test_a_loader_resumes_after_any_step(plan: BinPlan) -> None:
    whole = steps(plan, Ranks(0, 1, 0), 12)
    assert max(place.epoch for place in whole[-1].position.places) >= 1
    for at in (1, 2, 7):
        rest = steps(plan, Ranks(0, 1, 0), len(whole) - at, whole[at - 1].position)
        assert [one.digest for one in rest] == [one.digest for one in whole[at:]]
        assert [one.position for one in rest] == [one.position for one in whole[at:]]


def test_a_bin_s_seed_depends_on_its_whole_place_and_on_nothing_else() -> None:
    def seed(run: int = 1, source: int = 0, place: tuple[int, ...] = (0, 0, 0, 0)) -> int:
        return bin_seed(run, Bin(source, Place(*place), Place(*place), EMPTY, EMPTY))

    others = [seed(2), seed(source=1), *(seed(place=row) for row in np.eye(4, dtype=int).tolist())]
    assert len({seed(), *others}) == 7
    assert seed() == seed() and all(0 <= one < 1 << 63 for one in (seed(), *others))


def test_an_error_of_the_loader_s_thread_reaches_the_training(plan: BinPlan, monkeypatch) -> None:
    def fail(bin_: Bin) -> list:
        raise UserError("a shard is damaged")

    monkeypatch.setattr(plan, "spans", fail)
    with pytest.raises(UserError, match="a shard is damaged"):
        steps(plan, Ranks(0, 1, 0), 1)
