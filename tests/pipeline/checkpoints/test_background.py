"""Checkpoints written while training continues: the same bytes as without, and never half of them."""

from __future__ import annotations

import dataclasses
import math
import re
import signal
from pathlib import Path

import pytest
from helpers import faulty_ranks, ranks
from helpers.runs import arguments, losses, records
from soak import soak

from pipeline.checkpoints import store
from pipeline.checkpoints.zero_shards import Parts
from pipeline.costs.zero import Strategy, Weights, states_memory

SLOW = 0.2  # seconds more for every file: several steps


def files(run: Path) -> dict[str, bytes]:
    return {
        path.relative_to(run).as_posix(): path.read_bytes() for path in run.glob("checkpoints/*/*states.pt")
    }


@pytest.mark.parametrize(("objective", "strategy"), [("sllm", "zero3"), ("vae", "zero2")])
def test_the_bytes_are_those_of_the_saved_step(
    objective: str, strategy: str, pool: ranks.RankPool, recipes: Path, tmp_path: Path
) -> None:
    """Steps that follow the save change every weight before it is written. The stop head of sllm has an odd
    number of weights, so that its parts under ZeRO-3 are padded."""
    options = ("--training.max_steps", 24, "--training.save_every", 12, "--training.eval_every", 100)
    options += ("--training.ema", 0.9, "--training.keep", 5)
    for name, background in (("beside", "true"), ("between", "false")):
        settings = arguments(recipes, objective, strategy, tmp_path / name, *options)
        settings += ["--checkpoints.background", background]
        assert pool.run(
            2, faulty_ranks.train_with_slow_writes, settings, SLOW if name == "beside" else 0
        ) == [0, 0]
    beside, between = files(tmp_path / "beside"), files(tmp_path / "between")
    assert len(beside) == 2 * len({Path(name).name for name in beside}) and beside == between
    assert losses(tmp_path / "beside") == losses(tmp_path / "between")

    parts = Parts(*store.find(tmp_path / "beside"))
    weights = sum(math.prod(shape) for shape in parts.weights.values())
    copy = states_memory(Weights(weights, weights), Strategy.read(strategy), 2, "fp32", ema=True)["copy"]
    names = ("zero_pp_rank_0_*states.pt", "mp_rank_00_model_states.pt")
    copied = [path.stat().st_size for name in names for path in parts.checkpoint.glob(name)]
    assert len(copied) == 2 and 0 <= sum(copied) - copy < 40_000, "what inspect says of rank 0's copy"

    for step in (12, 24):
        folders = (tmp_path / name / "checkpoints" / store.step_name(step) for name in ("beside", "between"))
        metas = [dataclasses.asdict(store.read_meta(folder)) for folder in folders]
        assert all(meta.pop("recipe") for meta in metas) and metas[0] == metas[1]

    saves, others = (records(tmp_path / name, "saves") for name in ("beside", "between"))
    assert [save["step"] for save in saves] == [save["step"] for save in others] == [12, 24]
    assert saves[0]["save_seconds"] < saves[0]["write_seconds"] / 2 and SLOW < saves[0]["write_seconds"]
    assert saves[1]["save_seconds"] > SLOW, "the end of a run waits for its last checkpoint"
    assert all(save["write_seconds"] == pytest.approx(save["save_seconds"], rel=0.01) for save in others)


def test_fresh_machines_resume_from_the_uploaded_copy(
    pool: ranks.RankPool, recipes: Path, tmp_path: Path
) -> None:
    options = ("--training.max_steps", 12, "--training.save_every", 4, "--training.eval_every", 6)
    whole = arguments(recipes, "lm", "zero3", tmp_path / "whole", *options)
    assert pool.run(2, ranks.train, whole) == [0, 0]
    bucket = tmp_path / "bucket"
    options += ("--checkpoints.upload", f"file://{bucket}/a run")

    first = arguments(recipes, "lm", "zero3", tmp_path / "first", *options)
    assert pool.run(2, ranks.train_with_signal, first, signal.SIGUSR1, 1, 6) == [75, 75]
    reached = len(losses(tmp_path / "first"))
    (there,) = bucket.iterdir()
    here = tmp_path / "first"
    assert {p.name for p in (there / "checkpoints").iterdir()} == {
        *(p.name for p in (here / "checkpoints").iterdir() if p.name != "best")
    }
    for path in sorted(here.glob("checkpoints/step-*/*")):
        assert (there / path.relative_to(here)).read_bytes() == path.read_bytes()

    # Another machine: the newest one that is whole there is copied, and the records with it.
    second = arguments(recipes, "lm", "zero3", tmp_path / "second", *options)
    newest = max(there.glob("checkpoints/step-*"))
    damaged = next(newest.glob("*optim_states.pt"))
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (status, said), other = pool.run(2, ranks.train_and_listen, second)
    assert (status, other[0]) == (0, 0)
    assert f"{newest.name} is not whole there (DamagedCheckpoint: " in said
    assert re.search(rf"; step-\d+ was copied from file://{bucket}/a run\n", said)
    assert [r["step"] for r in records(tmp_path / "second")] == list(range(1, 13))
    assert losses(tmp_path / "second") == losses(tmp_path / "whole")
    assert len(records(tmp_path / "second", "starts")) == 2 and reached < 12
    assert (there / "checkpoints/latest").read_text() == "step-00000012\n"
    assert {p.name for p in there.glob("checkpoints/step-*")} == {
        p.name for p in (tmp_path / "second").glob("checkpoints/step-*")
    }


def test_a_network_that_is_down_stops_no_training_but_a_start_from_nothing(
    pool: ranks.RankPool, recipes: Path, tmp_path: Path
) -> None:
    options = ("--training.max_steps", 6, "--training.save_every", 3, "--data.validation", "null")
    (tmp_path / "bucket").mkdir()
    settings = arguments(recipes, "lm", "zero1", tmp_path / "run", *options)
    settings += ["--checkpoints.upload", f"file://{tmp_path}/bucket"]
    [(status, said)] = pool.run(1, faulty_ranks.train_with_dead_network, settings, 3)
    assert status == 0
    assert f"step-00000003 is not uploaded to file://{tmp_path}/bucket (" in said
    assert f"\nnot uploaded to file://{tmp_path}/bucket: step-00000003, step-00000006\n" in said
    assert len(losses(tmp_path / "run")) == 6 and store.find(tmp_path / "run")[1].step == 6

    settings[settings.index("--output_dir") + 1] = str(tmp_path / "other")
    [(message, _)] = pool.run(1, faulty_ranks.train_with_dead_network, settings, 0)
    assert message.startswith(f"cannot reach file://{tmp_path}/bucket/checkpoints") and "\n" not in message
    assert not (tmp_path / "other").exists() or not list((tmp_path / "other").glob("*.jsonl"))


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("/data/copy", "checkpoints.upload must be a URL such as s3://bucket/run, not '/data/copy'"),
        ("nothing://bucket", "checkpoints.upload nothing://bucket: ValueError: Protocol not known: nothing"),
    ],
)
def test_a_url_that_is_none_is_refused(
    url: str, words: str, pool: ranks.RankPool, recipes: Path, tmp_path: Path
) -> None:
    settings = arguments(recipes, "lm", "zero1", tmp_path / "run", "--checkpoints.upload", url)
    [message] = pool.run(1, ranks.train, settings)
    assert words in message and "\n" not in message


def test_a_stop_waits_for_the_checkpoint_in_flight(
    pool: ranks.RankPool, recipes: Path, tmp_path: Path
) -> None:
    options = ("--training.max_steps", 40, "--training.save_every", 3, "--data.validation", "null")
    settings = arguments(recipes, "lm", "zero2", tmp_path, *options)
    statuses = pool.run(2, faulty_ranks.train_slowly_with_signal, settings, SLOW, signal.SIGUSR1, 1, 4)
    assert statuses == [75, 75]
    reached = len(losses(tmp_path))
    assert reached < 40 and store.find(tmp_path)[1].step == reached
    assert [save["step"] for save in records(tmp_path, "saves")][-1] == reached
    assert not list((tmp_path / "checkpoints").glob(f"{store.TMP}*"))


@pytest.mark.long
def test_kills_during_the_write_leave_the_checkpoint_before(
    pool: ranks.RankPool, tiny_shards: Path, tiny_valid_shards: Path, tmp_path: Path
) -> None:
    """`python tests/soak.py --kills 20 --slow 0.3` kills more often."""
    result = soak(pool, tiny_shards, tiny_valid_shards, tmp_path, 4, 1, "zero3", SLOW)
    assert result["passed"], result
