"""Traffic that `sllm inspect` predicts, against the bytes that real ranks give to torch's collectives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import ranks
from helpers.recipes import write_recipe

from data_prep.common.errors import UserError
from pipeline.costs.inspect import DryRun
from pipeline.costs.sized_recipe import sized_recipe
from pipeline.costs.zero import (
    Strategy,
    Traffic,
    Weights,
    exposed_seconds,
    gathered_weights,
    peak_memory,
    states_memory,
    traffic,
)
from tools.benchmarks.measured_steps import Job, measure

pytestmark = pytest.mark.launch

VOCABULARY = 3000
SIZES = {
    "vae": {"hidden_size": 192},
    "backbone": {"hidden_size": 384, "word_embed_proj_dim": 384, "num_attention_heads": 6, "ffn_dim": 1536},
}
# Weights of 100,000 elements and fewer are never split (half of these layers' are).
NEAR = {"stage3_max_reuse_distance": 1_500_000, "stage3_prefetch_bucket_size": 0}
SMALL = {"stage3_max_reuse_distance": 1_500_000, "stage3_prefetch_bucket_size": 300_000}
SMALL |= {"stage3_max_live_parameters": 2_000_000}
NOTHING = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
NOTHING |= {"stage3_param_persistence_threshold": 0}


def predicted(job: Job, world: int, folder: Path) -> Traffic:
    """What `sllm inspect` says of a job."""
    file = folder / "strategy.json"
    config = {"zero_optimization": {"stage": int(job.strategy[0][4])} | job.zero, **job.config}
    file.write_text(json.dumps(config))
    strategy = Strategy.read(str(file))
    run = DryRun(sized_recipe(job.recipe), job.vocab_size, job.dtype)
    model, _, step = run.step(job.tokens, job.checkpointing)
    weights = gathered_weights(model, step.calls, strategy, job.accumulation)
    return traffic(strategy, weights, world, job.accumulation, job.dtype)


CASES = [
    ("zero1", 4, {"accumulation": 2}),
    ("zero2", 2, {"accumulation": 2, "dtype": "bf16"}),
    ("zero3", 4, {"accumulation": 2}),
    ("zero3", 2, {"zero": NOTHING, "checkpointing": True}),
]
MORE = [
    ("zero0", 4, {}),
    ("zero0", 2, {"accumulation": 2, "dtype": "bf16"}),
    ("zero1", 2, {"accumulation": 3, "dtype": "bf16"}),
    ("zero1", 2, {"config": {"communication_data_type": "fp32"}, "dtype": "bf16"}),
    ("zero2", 4, {"accumulation": 2}),
    ("zero2-offload", 2, {"accumulation": 2}),
    ("zero3", 2, {"accumulation": 2, "dtype": "bf16"}),
    ("zero3", 2, {"zero": NEAR}),
    ("zero3", 2, {"zero": SMALL}),
    ("zero3", 2, {"zero": SMALL, "accumulation": 2}),
    ("zero3", 2, {"zero": NEAR, "checkpointing": True}),
    ("zero3", 2, {"zero": {"reduce_scatter": False}}),
]


@pytest.mark.parametrize("objective", ["sllm", "lm"])
@pytest.mark.parametrize(("strategy", "world", "settings"), MORE, ids=str)
@pytest.mark.long
def test_ranks_send_what_is_predicted_in_more_cases(strategy, world, settings, objective, pool, tmp_path):
    compare(strategy, world, settings, objective, pool, tmp_path)


@pytest.mark.parametrize(("strategy", "world", "settings"), CASES, ids=str)
def test_ranks_send_what_is_predicted(strategy, world, settings, pool, tmp_path):
    compare(strategy, world, settings, "sllm", pool, tmp_path)


def compare(
    strategy: str, world: int, settings: dict[str, Any], objective: str, pool: ranks.RankPool, folder: Path
) -> None:
    recipe = write_recipe(folder, objective, **SIZES)
    job = Job(str(recipe), [strategy], tokens=256, vocab_size=VOCABULARY, **settings)
    expected = predicted(job, world, folder)
    for steps in pool.run(world, measure, job):
        sent = steps[-1]["sent"]
        gathers = sent.get("all_gather_into_tensor", 0)
        assert gathers == pytest.approx(expected.weights, rel=0.001)
        assert sum(sent.values()) - gathers == pytest.approx(expected.gradients, rel=0.001)


def test_gradients_travel_during_the_backward_pass_but_for_the_last_bucket():
    sent, slow = Traffic(gradients=100.0, weights=30.0), 8e-9  # Gbit/s: one byte per second

    def exposed(compute: float, **settings: Any) -> float:
        weights = Weights(1000, 1000, 10, 290)
        return exposed_seconds(sent, Strategy("x", **settings), weights, compute, slow)

    assert exposed(1e9, stage=1) == exposed(1e9, stage=2) == pytest.approx(130)
    two = {"stage": 2, "overlap": True}
    assert exposed(1e9, **two) == pytest.approx(130)  # one bucket: nothing is early
    assert exposed(1e9, **two, bucket=400) == pytest.approx(20 + 30)  # 400, 400 and the last 200
    assert exposed(30, **two, bucket=400) == pytest.approx(20 + (80 - 20) + 30)
    three = {"stage": 3, "overlap": True, "bucket": 500, "prefetch": 30}
    assert exposed(1e9, **three) == pytest.approx(50 + 3)
    assert exposed(30, **three) == pytest.approx(50 + (50 - 20) + 3 + (27 - 10))


def test_strategies_are_read_from_their_files(tmp_path):
    assert Strategy.read("zero1") == Strategy("zero1", 1)
    assert Strategy.read("zero2").overlap and not Strategy.read("zero2").offload
    assert Strategy.read("zero3-offload").offload
    assert Strategy.read("zero2+fp16").stage == 2
    with pytest.raises(UserError, match=r"--strategy zero3-plusplus: ZeRO\+\+ has no estimate"):
        Strategy.read("zero3-plusplus")
    with pytest.raises(UserError, match="DeepSpeed config zero9 does not exist"):
        Strategy.read("zero9")


def test_frozen_weights_a_running_average_and_offloading_count():
    two, half = Strategy.read("zero2"), Weights(1000, 500)
    plain = states_memory(Weights(1000, 1000), two, 2, "bf16")
    frozen = states_memory(half, two, 2, "bf16")
    assert frozen["weights"] == plain["weights"] and frozen["optimizer"] == plain["optimizer"] / 2
    assert states_memory(half, two, 2, "bf16", ema=True)["optimizer"] == frozen["optimizer"] + 4 * 250
    assert traffic(two, half, 2, 1, "bf16").sent == 0.5 * 2 * (2 + 1) * 500
    offloaded = states_memory(half, Strategy.read("zero2-offload"), 2, "bf16")
    assert offloaded["host"] == frozen["optimizer"] + frozen["gradients"]
    assert offloaded["weights"] == frozen["weights"] and offloaded["optimizer"] == 0
    assert offloaded["copy"] == frozen["copy"] == frozen["optimizer"] + frozen["weights"]
    three, without = (states_memory(half, Strategy.read(f"zero{n}"), 2, "bf16") for n in (3, 0))
    assert three["copy"] == three["optimizer"] and without["copy"] == 2 * 1000 + 12 * 500
    held = frozen["weights"] + frozen["optimizer"] + frozen["buckets"]  # host memory is no GPU memory
    update = held + frozen["gradients"] + frozen["update"]
    assert peak_memory(frozen, lambda share: 0, 1000, 1) == update

    def alive(share: float) -> int:
        return round(max(9000, 8000 + 4000 * share))

    shares = frozen["gradients"] / 1000
    assert peak_memory(frozen, alive, 1000, 1) == held + alive(shares) > update
    assert peak_memory(frozen, alive, 1000, 2) == held + frozen["gradients"] + 9000


def test_a_recipe_that_recomputes_or_freezes_costs_accordingly(tmp_path):
    recipe = sized_recipe(write_recipe(tmp_path, "lm", **SIZES))
    _, _, plain = DryRun(recipe, VOCABULARY, "fp32").step(1024, False)
    _, _, again = DryRun(recipe, VOCABULARY, "fp32").step(1024, True)
    assert again.activations < plain.activations
    assert again.training == plain.training + plain.operations.by_part()["backbone"]
    recipe.optimizer.parts = {"model.model.decoder.layers": {"freeze": True}}
    model, _, step = DryRun(recipe, VOCABULARY, "fp32").step(1024, False)
    weights = gathered_weights(model, step.calls, Strategy.read("zero1"), 1)
    layers = sum(p.numel() for p in model.model.model.decoder.layers.parameters())
    assert weights.trained == weights.all - layers
