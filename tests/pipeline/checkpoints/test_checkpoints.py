"""Checkpoints against damage: every changed byte is found, and a disk that is full costs nothing but time."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import yaml
from helpers import ranks, run_checks
from helpers.runs import arguments, losses, records
from soak import soak

from data_prep.common.files import write_atomically
from pipeline.checkpoints import store as checkpoints
from pipeline.training.run_log import read_records


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
    path, whole = checkpoint / checkpoints.META, (checkpoint / checkpoints.META).read_bytes()
    for other in (b"", b"[]", b"{}", b"\xff", b"[" * 5000, whole[:-2]):
        path.write_bytes(other)
        assert checkpoints.newest_whole(run)[0].name == "step-00000004"
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
            # Another name of the same kind means a resume from an earlier step: only time is lost.
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


def test_records_on_a_full_disk_end_all_ranks_with_one_line(
    run: Path, pool: ranks.RankPool, recipes: Path, tmp_path: Path
) -> None:
    settings = arguments(recipes, "sllm", "zero3", tmp_path / "run", "--training.save_every", 2)
    settings += ["--training.eval_every", "100", "--checkpoints.background", "false"]
    message, status = pool.run(2, ranks.train_with_full_log, settings, 2)
    assert status == 2 and "\n" not in message
    assert message.startswith("after step 3: ") and "metrics.jsonl: File too large" in message
    assert [r["step"] for r in read_records(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
    # While the disk is full the run does not start either; then it resumes as if nothing had happened.
    message, status = pool.run(2, ranks.train_with_file_limit, settings, 0, 100)
    assert status == 2 and "File too large" in message and "\n" not in message
    assert pool.run(2, ranks.train, settings) == [0, 0]
    assert losses(tmp_path / "run") == losses(run)


@pytest.mark.parametrize("limit", [0, 20, 2000])  # no file, recipe.yaml, the tokenizer
def test_a_run_that_starts_on_a_full_disk_is_one_line_and_leaves_nothing_half_written(
    limit: int, pool: ranks.RankPool, recipes: Path, tmp_path: Path
) -> None:
    settings = arguments(recipes, "lm", "zero1", tmp_path / "run", "--log.tensorboard", "true")
    [message] = pool.run(1, ranks.train_with_file_limit, settings, 0, limit)
    last = "tokenizer/tokenizer.model" if limit == 2000 else "recipe.yaml"
    assert message == f"{tmp_path / 'run' / last}: File too large"
    left = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert all(path.suffix in (".yaml", ".json") for path in left) and (limit == 2000 or not left)
    settings += ["--training.max_steps", "1"]
    assert pool.run(1, ranks.train, settings) == [0]


@pytest.mark.parametrize("limit", [0, 50_000])
def test_an_export_to_a_full_disk_is_one_line_and_leaves_nothing(
    limit: int, run: Path, pool: ranks.RankPool, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    assert pool.run(1, run_checks.export_error, str(run), str(model)) == [""]
    before = {path: path.read_bytes() for path in model.rglob("*") if path.is_file()}
    for output in (model, tmp_path / "new"):
        [message] = pool.run(1, run_checks.export_error, str(run), str(output), "best", limit)
        assert message.startswith(f"{output} cannot be written: ") and "File too large" in message
        assert "\n" not in message
    assert list(tmp_path.iterdir()) == [model], "the older export stays"
    assert before == {path: path.read_bytes() for path in model.rglob("*") if path.is_file()}


def test_ranks_that_share_no_disk_say_so(
    run: Path, pool: ranks.RankPool, recipes: Path, tmp_path: Path
) -> None:
    folders = [tmp_path / "machine-0", tmp_path / "machine-1"]
    for folder in folders:
        folder.mkdir()
    settings = arguments(recipes, "sllm", "zero3", Path("run"))
    message, status = pool.run(2, ranks.train_in_folders, settings, [str(folder) for folder in folders])
    assert status == 2 and "\n" not in message
    assert message.startswith(
        "rank 0 cannot write its part of a checkpoint: run/checkpoints/.tmp-step-00000004/"
    )
    assert "was written by another rank and is not there (put --output_dir on a shared disk)" in message
    assert checkpoints.newest_whole(folders[0] / "run") is None

    # Copies of one run, of which one lacks a file.
    for folder in folders:
        shutil.rmtree(folder / "run", ignore_errors=True)
        shutil.copytree(run, folder / "run")
    next((folders[1] / "run/checkpoints/step-00000006").glob("*rank_0*optim_states.pt")).unlink()
    settings += ["--training.max_steps", "7"]
    message, status = pool.run(2, ranks.train_in_folders, settings, [str(folder) for folder in folders])
    assert status == 2 and "\n" not in message
    assert message.startswith("rank 0 sees the checkpoint step-00000006 in run, rank 1 sees step-00000004: ")
    assert all(len(losses(folder / "run")) == 6 for folder in folders)

    # One of them has no checkpoint at all: whether to begin from other weights is not for each to decide.
    shutil.rmtree(folders[1] / "run" / "checkpoints")
    settings += ["--init_from", str(run), "--health.hang_seconds", "60"]
    message, status = pool.run(2, ranks.train_in_folders, settings, [str(folder) for folder in folders])
    assert status == 2 and "\n" not in message
    assert message.startswith("rank 0 sees the checkpoint step-00000006 in run, rank 1 sees None: ")


def test_a_resumed_run_skips_the_same_spikes_and_no_checkpoint_comes_before_its_records(
    pool: ranks.RankPool, recipes: Path, tmp_path: Path
) -> None:
    # So low a limit that about every second step is a spike, once there is a median: at so low a rate norms
    # vary by the batch alone, whatever the corpus.
    options = ("--optimizer.lr", 1e-6)
    options += ("--health.norm_spike", 1.02, "--health.max_skips", 100, "--model.vae.dropout", 0.1)
    options += ("--schedule.kind", "constant", "--schedule.warmup", 0, "--training.save_every", 5)
    options += ("--training.eval_every", 6, "--training.max_steps")
    for name, lengths in (("whole", [28]), ("cut", [19, 28])):
        for steps in lengths:
            settings = arguments(recipes, "vae", "zero2", tmp_path / name, *options, steps)
            (status, seen), (other, _) = pool.run(2, ranks.train_and_watch_the_disk, settings)
            assert (status, other) == (0, 0)
            require_records_first(seen, {"whole": 0, "cut": 0 if steps == 19 else 19}[name])
    whole, cut = (records(tmp_path / name) for name in ("whole", "cut"))
    skipped = [record["step"] for record in whole if "skipped" in record]
    assert min(skipped) <= 19 < max(skipped) <= 28 and len(skipped) < 18
    assert all("above" in record["skipped"] for record in whole if "skipped" in record)
    for name in ("step", "loss", "grad_norm", "skips", "skipped", "tokens", "bins_digest"):
        assert [record.get(name) for record in cut] == [record.get(name) for record in whole], name
    ours, theirs = (
        pool.run(1, run_checks.weights_and_moments, str(tmp_path / name))[0] for name in ("cut", "whole")
    )
    assert ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in theirs)


def require_records_first(seen: list[tuple[str, str, int]], started: int) -> None:
    """What one rank flushed and renamed: before a checkpoint gets its name, the record of its step, its own
    files and its meta.json are on the disk."""
    named = [(place, name) for place, (what, name, _) in enumerate(seen) if name.startswith("step-")]
    assert named
    before = 0
    for place, name in named:
        flushed = {one: lines for what, one, lines in seen[before:place] if what == "flush"}
        assert flushed["metrics.jsonl"] == int(name.removeprefix("step-")), name
        assert "evaluations.jsonl" in flushed and f".tmp-{name}" in flushed
        assert any(one.endswith("optim_states.pt") for one in flushed)
        assert any(one.startswith(checkpoints.META) for one in flushed)
        before = place
    assert [name for what, name, _ in seen if what == "rename"] == [name for _, name in named]


def test_what_is_unfinished_is_removed(tmp_path: Path) -> None:
    folder = checkpoints.checkpoints_folder(tmp_path)
    (folder / ".tmp-step-00000002").mkdir(parents=True)
    (folder / "step-00000001").mkdir()
    for place, name in ((tmp_path, "recipe.yaml"), (folder, "latest")):
        (place / name).touch()
        (place / f"{name}.node7-12.partial").touch()
    with pytest.raises(OSError):
        write_atomically(folder / "step-00000001", b"a folder is in the way")
    assert not list(folder.glob("step-00000001?*"))
    checkpoints.remove_unfinished(tmp_path)
    assert {path.name for path in tmp_path.rglob("*")} == {
        "checkpoints",
        "step-00000001",
        "recipe.yaml",
        "latest",
    }


def test_a_damaged_checkpoint_pushes_no_good_one_out(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    shutil.copytree(run / "checkpoints", folder)
    meta = checkpoints.read_meta(folder / "step-00000006")
    for step in (2, 8, 10, 12):
        shutil.copytree(folder / "step-00000006", folder / checkpoints.step_name(step))
        meta.step = step
        checkpoints.write_meta(folder / checkpoints.step_name(step), meta)

    def left() -> list[int]:
        return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))

    next((folder / "step-00000008").glob("*optim_states.pt")).unlink()
    assert checkpoints.beyond(tmp_path / "run", folder / "step-00000008") == {
        "step-00000010",
        "step-00000012",
    }
    # 8 lacks a file, 10 is one that was found to be spoilt at the start, 12 is beyond the newest.
    checkpoints.prune(folder, "step-00000008", None, 3)
    assert left() == [2, 4, 6, 10, 12]
    checkpoints.prune(folder, "step-00000010", "step-00000002", 2, {"step-00000010"})
    assert left() == [2, 4, 6, 12]
    (folder / "step-00000012" / checkpoints.META).write_text('{"format_version": 1}')  # another release's
    checkpoints.prune(folder, "step-00000012", None, 2)
    assert left() == [6, 12]


def test_a_new_run_begins_from_the_weights_of_another(
    run: Path, pool: ranks.RankPool, recipes: Path, tmp_path: Path
) -> None:
    assert pool.run(1, run_checks.export_error, str(run), str(tmp_path / "model"), "last") == [""]
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

    # On a resume the checkpoint counts, and the source may be gone.
    again = arguments(recipes, "sllm", "zero2", tmp_path / "run", *still, tmp_path / "gone")
    assert pool.run(1, ranks.train, [*again, "--training.max_steps", "2"]) == [0]
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["init_from"] == str(run)
    size = sum(size for size, _ in checkpoints.find(run)[1].files.values())
    for source, model, message, read in (
        (tmp_path / "gone", (), "gone: does not exist", 0),
        (run, ("--model.vae.hidden_size", 64), "in this model", size),
    ):
        settings = arguments(recipes, "sllm", "zero0", tmp_path / "new", *still, source, *model)
        first_rank, second_rank = pool.run(2, ranks.train_and_look, settings)
        assert second_rank == (2, False, 0)  # the first one says it for both, and it alone has read the bytes
        answer, in_group, bytes_read = first_rank
        assert answer.startswith("init_from ") and message in answer and "\n" not in answer
        assert not in_group and bytes_read == read


@pytest.mark.long
def test_a_run_that_is_killed_again_and_again_ends_as_if_nothing_had_been(
    pool: ranks.RankPool, tiny_shards: Path, tiny_valid_shards: Path, tmp_path: Path
) -> None:
    result = soak(pool, tiny_shards, tiny_valid_shards, tmp_path, kills=4, seed=1, strategy="zero3")
    assert result["passed"], result
