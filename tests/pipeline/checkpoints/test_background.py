"""Checkpoints written while training continues: the same bytes as without, and never half of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import ranks
from helpers.runs import arguments, losses, records

from pipeline.checkpoints import store

SLOW = 0.2  # seconds more for every file: several steps


def files(run: Path) -> dict[str, bytes]:
    return {
        path.relative_to(run).as_posix(): path.read_bytes() for path in run.glob("checkpoints/*/*states.pt")
    }


@pytest.mark.parametrize(("objective", "strategy"), [("lm", "zero3"), ("vae", "zero2")])
def test_the_bytes_are_those_of_the_saved_step(
    objective: str, strategy: str, pool: ranks.RankPool, recipes: Path, tmp_path: Path
) -> None:
    """Steps that follow the save change every weight before it is written. (Not sllm under ZeRO-3: its stop
    head has an odd number of weights, and DeepSpeed leaves the padding of a part as it finds the memory.)"""
    options = ("--training.max_steps", 24, "--training.save_every", 12, "--training.eval_every", 100)
    options += ("--training.ema", 0.9, "--training.keep", 5)
    for name, background in (("beside", "true"), ("between", "false")):
        settings = arguments(recipes, objective, strategy, tmp_path / name, *options)
        settings += ["--checkpoints.background", background]
        assert pool.run(2, ranks.train_with_slow_writes, settings, SLOW if name == "beside" else 0) == [0, 0]
    beside, between = files(tmp_path / "beside"), files(tmp_path / "between")
    assert len(beside) == 2 * len({Path(name).name for name in beside}) and beside == between
    assert losses(tmp_path / "beside") == losses(tmp_path / "between")

    saves, others = (records(tmp_path / name, "saves") for name in ("beside", "between"))
    assert [save["step"] for save in saves] == [save["step"] for save in others] == [12, 24]
    assert saves[0]["save_seconds"] < saves[0]["write_seconds"] / 2 and SLOW < saves[0]["write_seconds"]
    assert saves[1]["save_seconds"] > SLOW, "the end of a run waits for its last checkpoint"
    assert all(save["write_seconds"] == pytest.approx(save["save_seconds"], rel=0.01) for save in others)
