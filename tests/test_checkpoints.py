"""Checkpoints against damage: every changed byte is found, and a disk that is full costs nothing but time."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import ranks
from runs import arguments, losses
from soak import soak

from pipeline import checkpoints


@pytest.fixture(scope="module")
def run(pool: ranks.RankPool, recipes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two ranks with ZeRO-3: checkpoints of steps 4 and 6."""
    run = tmp_path_factory.mktemp("checkpoints") / "run"
    assert pool.run(2, ranks.train, arguments(recipes, "sllm", "zero3", run)) == [0, 0]
    return run


def test_every_changed_byte_is_found(run: Path) -> None:
    checkpoint = run / "checkpoints" / "step-00000006"
    meta = checkpoints.read_meta(checkpoint)
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    assert len(files) == 5  # two of each rank, and meta.json
    assert {path.relative_to(checkpoint).as_posix() for path in files} == {*meta.files, checkpoints.META}
    rng = random.Random(1)
    for number in range(200):
        path = files[number % len(files)]
        whole = path.read_bytes()
        place, bit = rng.randrange(len(whole)), 1 << rng.randrange(8)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
        found = checkpoints.newest_whole(run)
        if path.name == checkpoints.META:
            assert found[0].name == "step-00000004" and "step-00000006 is damaged: meta.json" in found[2]
        else:
            assert checkpoints.damaged_files(*found[:2]) == [path.name], (path.name, place, bit)
        path.write_bytes(whole)
    assert checkpoints.newest_whole(run) == (checkpoint, meta, "")
    assert not checkpoints.damaged_files(checkpoint, meta)


def test_a_changed_pointer_does_no_harm(run: Path) -> None:
    latest, best = (run / "checkpoints" / name for name in ("latest", "best"))
    whole = latest.read_bytes()
    expected = checkpoints.find(run, "best")
    best_before = best.read_bytes()
    for place in range(len(whole)):
        for bit in range(8):
            latest.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            found = checkpoints.newest_whole(run)
            # Another name of the same kind means going on from further back: nothing is lost but time.
            assert found[0].name in ("step-00000004", "step-00000006") and found[1].step in (4, 6)
    latest.unlink()
    assert checkpoints.newest_whole(run)[0].name == "step-00000006"
    latest.write_bytes(whole)
    best.write_text("step-00000099")
    assert checkpoints.find(run, "best") == expected
    best.write_bytes(best_before)


@pytest.mark.parametrize(("strategy", "rank"), [("zero3", 1), ("zero1", 0)])
def test_a_full_disk_leaves_the_last_checkpoint(
    strategy: str, rank: int, pool: ranks.RankPool, recipes: Path, tmp_path: Path
) -> None:
    settings = arguments(recipes, "sllm", strategy, tmp_path)
    assert pool.run(2, ranks.train, [*settings, "--training.max_steps", "4"]) == [0, 0]
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()}
    # One rank may write no file of more than so many bytes: for it the disk is full, halfway through a file.
    message, status = pool.run(2, ranks.train_with_file_limit, settings, rank, 100_000)
    assert status == 2 and "\n" not in message
    assert message.startswith(f"rank {rank} cannot write its part of a checkpoint: ")
    assert "File too large" in message and "start the same command again" in message
    assert before == {
        path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()
    }
    assert pool.run(2, ranks.train, settings) == [0, 0]
    assert len(losses(tmp_path)) == 6


def test_a_new_run_begins_from_the_weights_of_another(
    run: Path, pool: ranks.RankPool, recipes: Path, tmp_path: Path
) -> None:
    assert pool.run(1, ranks.export_error, str(run), str(tmp_path / "model"), "last") == [""]
    # Rates of zero: the first loss of each run is that of the weights it begins from.
    still = ("--optimizer.lr", 1e-12, "--training.max_steps", 1, "--init_from")
    first = {}
    for name, source, strategy, world in (
        ("run", run, "zero2", 1),
        ("folder", tmp_path / "model", "zero3", 2),
    ):
        settings = arguments(recipes, "sllm", strategy, tmp_path / name, *still, source)
        assert pool.run(world, ranks.train, settings) == [0] * world
        [first[name]] = losses(tmp_path / name)
    assert first["run"] == pytest.approx(first["folder"], abs=1e-5)
    assert first["run"] < losses(run)[0] - 0.2, "begins where nothing was learnt"

    # Going on, the checkpoint counts, and the source may be gone.
    again = arguments(recipes, "sllm", "zero2", tmp_path / "run", *still, tmp_path / "gone")
    assert pool.run(1, ranks.train, [*again, "--training.max_steps", "2"]) == [0]
    for source, model, message in (
        (tmp_path / "gone", (), "gone: does not exist"),
        (run, ("--model.vae.hidden_size", 64), "in this model"),
    ):
        settings = arguments(recipes, "sllm", "zero0", tmp_path / "new", *still, source, *model)
        [answer] = pool.run(1, ranks.train, settings)
        assert answer.startswith("init_from ") and message in answer and "\n" not in answer


def test_a_run_that_is_killed_again_and_again_ends_as_if_nothing_had_been(
    pool: ranks.RankPool, tiny_shards: Path, tiny_valid_shards: Path, tmp_path: Path
) -> None:
    result = soak(pool, tiny_shards, tiny_valid_shards, tmp_path, kills=4, seed=1, strategy="zero3")
    assert result["passed"], result
