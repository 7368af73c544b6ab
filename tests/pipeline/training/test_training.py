"""Training with real ranks: runs resume exactly, exports are what was trained, failures end in one line."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import faulty_ranks, ranks, run_checks
from helpers.paths import REPOSITORY
from helpers.runs import arguments, losses, records

from pipeline.checkpoints.store import read_meta, write_meta
from pipeline.reports.run_report import report
from pipeline.training.run_log import read_records, wandb_id


@pytest.mark.parametrize(("objective", "strategy", "world"), [("vae", "zero3", 2), ("sllm", "zero1", 2)])
def test_a_run_stopped_by_a_signal_goes_on_exactly(
    objective: str,
    strategy: str,
    world: int,
    pool: ranks.RankPool,
    recipes: Path,
    tiny_shards: Path,
    tiny_valid_shards: Path,
    tmp_path: Path,
) -> None:
    # Dropout is on, so that its random numbers must come back too; only the last rank gets the signal.
    dropout = "--model.vae.dropout", 0.1, "--training.max_steps", 40
    if objective == "sllm":  # a mixture, too
        dropout += "--data.shards", tiny_shards, tiny_valid_shards, "--data.weights", 2, 1
    whole = arguments(recipes, objective, strategy, tmp_path / "whole", *dropout)
    assert pool.run(world, ranks.train, whole) == [0] * world

    cut = arguments(recipes, objective, strategy, tmp_path / "cut", *dropout)
    number = signal.SIGUSR1 if world > 1 else signal.SIGINT
    statuses = pool.run(world, ranks.train_with_signal, cut, number, world - 1, 3)
    assert statuses == [75] * world
    reached = len(losses(tmp_path / "cut"))
    assert 3 <= reached < 40
    assert pool.run(world, ranks.train, cut) == [0] * world

    assert [r["step"] for r in records(tmp_path / "cut")] == list(range(1, 41))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    starts = records(tmp_path / "cut", "starts")
    assert [(start["step"], start["lost_steps"]) for start in starts] == [(0, 0), (reached, 0)]
    assert all(start["world"] == world and start["hosts"] == 1 for start in starts)
    saves = records(tmp_path / "cut", "saves")
    assert all(save["save_seconds"] > 0 for save in saves) and reached in [save["step"] for save in saves]
    ours, theirs = (
        [r["bits_per_byte"] for r in records(tmp_path / name, "evaluations")] for name in ("cut", "whole")
    )
    assert ours == theirs
    meta = json.loads((tmp_path / "cut/checkpoints/step-00000040/meta.json").read_text())
    assert [taken for taken, *_ in meta["position"]] == ([80, 40] if objective == "sllm" else [120])
    assert meta["consumed"] == [[[[0, 0, 0, 0], place]] for _, *place in meta["position"]]


def test_a_killed_run_goes_on_from_its_last_checkpoint(
    pool: ranks.RankPool, recipes: Path, tmp_path: Path
) -> None:
    longer = "--training.max_steps", 40, "--training.save_every", 5, "--training.eval_every", 40
    assert pool.run(1, ranks.train, arguments(recipes, "lm", "zero2", tmp_path / "whole", *longer)) == [0]
    cut = arguments(recipes, "lm", "zero2", tmp_path / "cut", *longer)
    with pytest.raises(RuntimeError, match="died with exit code -9"):
        pool.run(1, ranks.train_with_signal, cut, signal.SIGKILL, 0, 8)
    latest = (tmp_path / "cut" / "checkpoints" / "latest").read_text().strip()
    assert latest.startswith("step-") and latest != "step-00000040"
    unfinished = tmp_path / "cut" / "checkpoints" / ".tmp-step-00000010"
    unfinished.mkdir(exist_ok=True)
    computed = len(read_records(tmp_path / "cut" / "metrics.jsonl"))

    assert pool.run(1, ranks.train, cut) == [0]
    assert [r["step"] for r in records(tmp_path / "cut")] == list(range(1, 41))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert not unfinished.exists()
    first, second = records(tmp_path / "cut", "starts")
    assert second["step"] == int(latest.removeprefix("step-"))
    assert second["lost_steps"] == computed - second["step"]
    [told] = report([tmp_path / "cut"], tmp_path / "report.html")["runs"]
    assert (told["steps"], told["finished"], told["restarts"]) == (40, True, 1)
    assert told["lost_steps"] == second["lost_steps"] and 0 < told["save_share"] < 1


@pytest.mark.parametrize(
    ("objective", "strategy", "world"), [("vae", "zero0", 1), ("sllm", "zero3", 2), ("lm", "zero2", 2)]
)
def test_an_export_is_the_model_that_was_trained(
    objective: str, strategy: str, world: int, pool: ranks.RankPool, recipes: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    pool.run(world, ranks.train, arguments(recipes, objective, strategy, run))
    [(kind, measured)] = pool.run(1, run_checks.export_and_measure, str(run), str(tmp_path / "model"), "last")
    assert kind == {"vae": "SentenceVAE", "sllm": "SLLM", "lm": "TokenLM"}[objective]
    assert measured == pytest.approx(records(run, "evaluations")[-1]["bits_per_byte"], abs=1e-5)
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer", "training.json"} <= names


def test_an_export_replaces_nothing_but_an_export(
    pool: ranks.RankPool, reference: dict[str, Path], tmp_path: Path
) -> None:
    run = str(reference["vae"])
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for name in ("config.json", "training.json"):  # a model folder of somebody else
        (foreign / name).write_text("{}")
        [message] = pool.run(1, run_checks.export_error, run, str(foreign))
        assert "foreign exists and was not written by `sllm export`" in message and "\n" not in message
        assert (foreign / name).read_text() == "{}"
    (tmp_path / "file").write_text("text")
    assert "was not written by" in pool.run(1, run_checks.export_error, run, str(tmp_path / "file"))[0]

    model = tmp_path / "model"
    model.mkdir()  # an empty folder, then an older export
    for _ in range(2):
        assert pool.run(1, run_checks.export_error, run, str(model)) == [""]
        assert (model / "model.safetensors").is_file()
        assert not (model / "stale").exists()
        (model / "stale").touch()


def test_the_best_checkpoint_is_kept_and_exported(
    pool: ranks.RankPool, recipes: Path, tmp_path: Path
) -> None:
    # So high a rate that the run gets worse after its first evaluation.
    run = tmp_path / "run"
    options = (
        "--optimizer.lr",
        0.05,
        "--schedule.kind",
        "constant",
        "--schedule.warmup",
        1,
        "--training.keep",
        1,
    )
    options += ("--training.max_steps", 40, "--training.eval_every", 5, "--training.save_every", 5)
    assert pool.run(1, ranks.train, arguments(recipes, "vae", "zero1", run, *options)) == [0]
    evaluations = records(run, "evaluations")
    best = min(evaluations, key=lambda record: record["bits_per_byte"])
    kept = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    assert kept == sorted({f"step-{best['step']:08d}", "step-00000040"})
    [(_, measured)] = pool.run(1, run_checks.export_and_measure, str(run), str(tmp_path / "model"), "best")
    assert measured == pytest.approx(best["bits_per_byte"], abs=1e-5)


def test_an_evaluation_that_is_not_finite_is_never_the_best(
    pool: ranks.RankPool, recipes: Path, tmp_path: Path
) -> None:
    settings = arguments(recipes, "vae", "zero1", tmp_path, "--training.eval_every", 3)
    assert pool.run(1, ranks.train_with_unmeasured_weights, settings) == [0]
    assert [(r["bits_per_byte"] is None, r["best"]) for r in records(tmp_path, "evaluations")] == [
        (True, False),
        (False, True),
    ]
    assert (tmp_path / "checkpoints" / "best").read_text().strip() == "step-00000006"


def test_a_finished_run_is_left_alone(
    pool: ranks.RankPool, recipes: Path, reference: dict[str, Path]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in reference["vae"].rglob("*")}
    assert pool.run(1, ranks.train, arguments(recipes, "vae", "zero0", reference["vae"])) == [0]
    assert {path: path.stat().st_mtime_ns for path in reference["vae"].rglob("*")} == before


@pytest.mark.parametrize("max_steps", [6, 9])  # finished, and to be continued
@pytest.mark.parametrize(
    ("objective", "strategy", "world", "override", "message"),
    [
        ("sllm", "zero0", 1, (), "is of another model: objective is 'vae' there and 'sllm' here"),
        (
            "vae",
            "zero0",
            1,
            ("--model.vae.hidden_size", 64),
            r"is of another model: model\.(vae\.hidden|embedding)_size is 32 there and 64 here",
        ),
        (
            "vae",
            "zero0",
            1,
            ("--loss.kind", "focal"),
            r"another model: (model.focal_gamma is 0.0 there and 2|loss.focal_gamma is 0.0 there)",
        ),
        ("vae", "zero0", 1, ("--seed", 2), "is of another model: seed is 1 there and 2 here"),
        (
            "vae",
            "zero0",
            1,
            ("--data.bin_tokens", 512),
            "another model: data.bin_tokens is 256 there and 512",
        ),
        ("vae", "zero3", 1, (), "ZeRO stage 0 and this run has stage 3"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(
    max_steps: int,
    objective: str,
    strategy: str,
    world: int,
    override: tuple,
    message: str,
    pool: ranks.RankPool,
    recipes: Path,
    reference: dict[str, Path],
) -> None:
    options = "--training.max_steps", max_steps, *override
    answers = pool.run(
        world, ranks.train, arguments(recipes, objective, strategy, reference["vae"], *options)
    )
    for rank, answer in enumerate(answers):
        assert re.search(message, answer) and "\n" not in answer
        assert answer.startswith(f"rank {rank}: " if world > 1 else "checkpoint ")


def test_shards_count_by_content_not_by_place(
    pool: ranks.RankPool,
    recipes: Path,
    reference: dict[str, Path],
    tiny_shards: Path,
    tiny_valid_shards: Path,
    tmp_path: Path,
) -> None:
    run, moved = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(reference["vae"], run)
    shutil.copytree(tiny_shards, moved)
    here = arguments(recipes, "vae", "zero0", run, "--data.shards", moved)
    assert pool.run(1, ranks.train, here) == [0]  # finished, and the same set
    assert pool.run(1, ranks.train, [*here, "--training.max_steps", "7"]) == [0]  # resumes
    assert len(losses(run)) == 7

    shutil.rmtree(moved)
    shutil.copytree(tiny_valid_shards, moved)  # other shards where the first ones were
    for steps in ("7", "9"):
        [message] = pool.run(1, ranks.train, [*here, "--training.max_steps", steps])
        assert "is of another model: data.shards is ['" in message
    assert len(losses(run)) == 7


def test_best_is_forgotten_when_the_validation_shards_change(
    pool: ranks.RankPool, recipes: Path, reference: dict[str, Path], tiny_shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(reference["vae"], run)
    checkpoints = run / "checkpoints"
    meta = read_meta(checkpoints / "step-00000006")
    meta.best["bits_per_byte"] = 0.001  # nothing measured on the same sample could be better
    write_meta(checkpoints / "step-00000006", meta)
    longer = arguments(recipes, "vae", "zero0", run, "--training.eval_every", 100, "--training.max_steps")

    [(status, said)] = pool.run(1, ranks.train_and_listen, [*longer, "7"])
    assert status == 0 and "no longer counts as best" not in said
    assert (checkpoints / "best").read_text().strip() == "step-00000006"
    assert not records(run, "evaluations")[-1]["best"]

    [(status, said)] = pool.run(
        1, ranks.train_and_listen, [*longer, "8", "--data.validation", str(tiny_shards)]
    )
    assert status == 0 and "(step 6) no longer counts as best" in said
    assert (checkpoints / "best").read_text().strip() == "step-00000008"
    assert records(run, "evaluations")[-1]["best"]


def test_a_damaged_checkpoint_is_passed_over(
    pool: ranks.RankPool, recipes: Path, reference: dict[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(reference["vae"], run)
    checkpoints = run / "checkpoints"
    weights = checkpoints / "step-00000006" / "mp_rank_00_model_states.pt"
    whole = weights.read_bytes()
    os.truncate(weights, len(whole) // 2)
    again = arguments(recipes, "vae", "zero0", run)
    [(status, said)] = pool.run(1, ranks.train_and_listen, again)
    assert status == 0
    [line] = [line for line in said.splitlines() if " is damaged: " in line]
    assert "step-00000006 is damaged: mp_rank_00_model_states.pt has" in line
    assert line.endswith("using step-00000004 instead")
    assert "resuming at step 4" in said
    assert losses(run) == losses(reference["vae"])  # steps 5 and 6 again, and only once
    assert pool.run(1, ranks.train_and_listen, again) == [
        (0, f"{run}: already finished, at step-00000006; nothing to do\n")
    ]

    for step in ("step-00000004", "step-00000006"):
        (checkpoints / step / "meta.json").write_text("{")
    [message] = pool.run(1, ranks.train, again)
    assert message.startswith("no checkpoint of ") and "\n" not in message
    assert "step-00000004 is damaged" in message and "step-00000006 is damaged" in message


def test_a_checkpoint_spoilt_in_place_is_passed_over_by_all_ranks(
    pool: ranks.RankPool, recipes: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = arguments(recipes, "vae", "zero3", run)
    assert pool.run(2, ranks.train, settings) == [0, 0]
    expected = losses(run)
    weights = run / "checkpoints" / "step-00000006" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 4  # one bit, in one of Adam's moments: it would load, and train wrongly
    weights.write_bytes(content)
    [message] = pool.run(1, run_checks.export_error, str(run), str(tmp_path / "model"))
    assert "step-00000006 is damaged: zero_pp_rank_1_mp_rank_00_optim_states.pt is not" in message

    longer = [*settings, "--training.max_steps", "7"]
    (status, said), (other_status, other_said) = pool.run(2, ranks.train_and_listen, longer)
    assert (status, other_status, other_said) == (0, 0, "")
    [line] = [line for line in said.splitlines() if " is damaged: " in line]
    assert line.endswith("_optim_states.pt is not as it was written (sha256): using step-00000004 instead")
    assert "resuming at step 4" in said
    assert losses(run)[:4] == expected[:4] and len(losses(run)) == 7
    # Of the last two the spoilt one is none.
    kept = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    assert kept == ["step-00000004", "step-00000007"]


def test_exports_of_damaged_or_missing_runs_are_refused(
    pool: ranks.RankPool, reference: dict[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(reference["vae"], run)
    weights = run / "checkpoints" / "step-00000006" / "mp_rank_00_model_states.pt"
    os.truncate(weights, weights.stat().st_size // 2)
    message = "step-00000006 is damaged: mp_rank_00_model_states.pt has"
    assert message in pool.run(1, run_checks.export_error, str(run), str(tmp_path / "model"))[0]
    weights.unlink()
    assert "is missing" in pool.run(1, run_checks.export_error, str(run), str(tmp_path / "model"))[0]
    assert (
        "does not exist"
        in pool.run(1, run_checks.export_error, str(tmp_path / "no"), str(tmp_path / "model"))[0]
    )
    assert not (tmp_path / "model").exists()


def test_a_loss_that_is_not_finite_ends_the_run_after_the_limit(
    pool: ranks.RankPool, recipes: Path, tmp_path: Path
) -> None:
    broken = ("--optimizer.lr", 1e30, "--schedule.warmup", 0, "--training.save_every", 1)
    broken += ("--health.max_skips", 2, "--training.eval_every", 100)
    start = arguments(recipes, "vae", "zero3", tmp_path, *broken, "--training.max_steps", 3)
    assert pool.run(2, ranks.train, [*start, "--optimizer.lr", "1e-3"]) == [0, 0]
    answers = pool.run(2, ranks.train, arguments(recipes, "vae", "zero3", tmp_path, *broken))
    assert "2 steps in a row were skipped (health.max_skips); " in answers[0]
    assert answers[1] == 2  # one line for all ranks
    *good, first, second = records(tmp_path)
    assert good and not any("skipped" in record for record in good)
    assert all(r["skipped"] and r["skips"] == n for n, r in enumerate([first, second], 1))
    # The last checkpoint has the weights that gave no finite loss. The one before it is good.
    names = [f"step-{good[-1]['step'] - back:08d}" for back in (0, 1)]
    assert f"the last good checkpoint is {names[1]}: remove the later ones ({names[0]})" in answers[0]
    shutil.rmtree(tmp_path / "checkpoints" / names[0])
    calm = arguments(recipes, "vae", "zero3", tmp_path, *broken, "--optimizer.lr", 1e-3)
    assert pool.run(2, ranks.train, calm) == [0, 0], "the advice helps"
    count, broken_ones = pool.run(1, run_checks.tensors_in_checkpoints, str(tmp_path))[0]
    assert count > 10 and broken_ones == 0


@pytest.fixture(scope="session")
def without_third_step(pool: ranks.RankPool, recipes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The vae reference, but torch's own AdamW does nothing in step 3."""
    run = tmp_path_factory.mktemp("reference") / "skipped"
    assert pool.run(1, ranks.train_without_update, arguments(recipes, "vae", "zero0", run), 3) == [0]
    return run


@pytest.mark.parametrize("strategy", ["zero0", "zero1", "zero2", "zero3", "zero3-offload"])
def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_step_on_all(
    strategy: str, pool: ranks.RankPool, recipes: Path, without_third_step: Path, tmp_path: Path
) -> None:
    # Three bins on two ranks are two passes a step: rank 1 alone breaks, in step 3, with a finite loss.
    every_step = arguments(recipes, "vae", strategy, tmp_path, "--training.save_every", 1)
    for status, before_and_after in pool.run(2, ranks.train_with_bad_gradient, every_step, 1, 4, 6):
        assert status == 0
        changed = [before != after for before, after in before_and_after]
        assert changed == [True, True, False, True, True, True]  # bit for bit, moments and counters too
    assert [r["skips"] for r in records(tmp_path)] == [0, 0, 1, 1, 1, 1]
    assert ["skipped" in r for r in records(tmp_path)] == [False, False, True, False, False, False]
    assert losses(tmp_path) == pytest.approx(losses(without_third_step), abs=1e-4)
    [told] = report([tmp_path], tmp_path / "report.html")["runs"]
    assert told["skipped_steps"] == 1 and told["saves"] == 5 and told["save_share"] > 0
    page = (tmp_path / "report.html").read_text()  # ZeRO-3 calls such a norm infinite
    assert re.search("skipped: the gradient&#x27;s norm is (nan|inf); step 3", page)
    measured, expected = (records(run, "evaluations")[-1] for run in (tmp_path, without_third_step))
    assert measured["bits_per_byte"] == pytest.approx(expected["bits_per_byte"], abs=1e-4)


@pytest.mark.parametrize("strategy", ["zero0", "zero1", "zero2", "zero3", "zero3-offload"])
def test_a_step_that_we_veto_leaves_nothing_behind(
    strategy: str, pool: ranks.RankPool, recipes: Path, without_third_step: Path, tmp_path: Path
) -> None:
    """A loss that is not finite beside a good gradient: DeepSpeed sees nothing wrong."""
    settings = arguments(recipes, "vae", strategy, tmp_path)
    for status, before_and_after in pool.run(2, ranks.train_with_bad_loss, settings, 1, 4, 6):
        assert status == 0
        changed = [before != after for before, after in before_and_after]
        assert changed == [True, True, False, True, True, True]
    skipped = [record.get("skipped") for record in records(tmp_path)]
    assert skipped == [None, None, "the loss is nan", None, None, None]
    assert report([tmp_path], tmp_path / "report.html")["runs"][0]["skipped_steps"] == 1
    assert "skipped: the loss is nan; step 3" in (tmp_path / "report.html").read_text()
    ours, theirs = losses(tmp_path), losses(without_third_step)
    assert ours[2] is None
    assert ours[:2] + ours[3:] == pytest.approx(theirs[:2] + theirs[3:], abs=1e-4)


def test_ranks_that_differ_say_so_and_end(pool: ranks.RankPool, recipes: Path, tmp_path: Path) -> None:
    settings = arguments(recipes, "vae", "zero1", tmp_path)
    for fault, words in (
        ("version", r"rank 1 \(.+\) has torch 0\.1, rank 0 \(.+\) has \d"),
        ("recipe", r"rank 1 \(.+\) has recipe.optimizer.lr 0.125, rank 0 \(.+\) has 0.005"),
        ("code", r"rank 1 \(.+\) has code other, rank 0"),
    ):
        first, second = pool.run(2, ranks.train_with_difference, settings, fault)
        assert re.match(words, first) and "\n" not in first
        assert second == 2
    assert not (tmp_path / "checkpoints").exists()


def test_a_second_signal_ends_a_rank_that_a_collective_blocks(pool: ranks.RankPool, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="rank 0 died with exit code 75"):
        pool.run(2, ranks.signal_twice_in_a_collective, str(tmp_path))
    assert (tmp_path / "first").exists(), "the first signal was not survived"


def test_ranks_that_hang_leave_their_stacks(pool: ranks.RankPool, recipes: Path, tmp_path: Path) -> None:
    # Long enough for the first step on a loaded machine.
    settings = arguments(recipes, "vae", "zero2", tmp_path, "--health.hang_seconds", 10)
    with pytest.raises(RuntimeError, match="rank 0 died with exit code 76"):
        pool.run(2, ranks.train_and_hang, settings, 1)
    first, second = ((tmp_path / "stacks" / f"rank-{rank}.txt").read_text() for rank in (0, 1))
    assert "hang_here" in second and "hang_here" not in first
    assert "in update" in first or "in compute" in first


def test_a_rank_that_never_comes_is_not_waited_for_without_end(
    pool: ranks.RankPool, recipes: Path, tmp_path: Path
) -> None:
    settings = arguments(recipes, "vae", "zero2", tmp_path, "--health.hang_seconds", 3)
    with pytest.raises(RuntimeError, match="rank 0 died with exit code 76"):
        pool.run(2, ranks.train_unless, settings, 1)
    assert "in join" in (tmp_path / "stacks" / "rank-0.txt").read_text()


@pytest.mark.parametrize(("where", "strategy"), [("forward", "zero3"), ("data", "zero1")])
def test_a_rank_that_is_slowed_by_a_third_is_named(
    where: str, strategy: str, pool: ranks.RankPool, recipes: Path, tmp_path: Path
) -> None:
    settings = arguments(recipes, "lm", strategy, tmp_path, "--training.max_steps", 50)
    settings += ["--training.eval_every", "100", "--training.save_every", "100", "--data.bins_per_step", "2"]
    (status, said), other = pool.run(2, faulty_ranks.train_slowed, settings, 1, 0.3, where)
    assert (status, other[0]) == (0, 0)
    lines = [line for line in said.splitlines() if "times the median rank's time" in line]
    assert lines and all(line.startswith("rank 1 (") for line in lines)
    assert ("waiting for data" in lines[0]) == (where == "data")
    metrics = records(tmp_path)
    assert lines == [r["slow"] for r in metrics if "slow" in r]
    assert "slowest_rank" not in metrics[0]
    usual = [statistics.median(r[key] for r in metrics[5:]) for key in ("own_seconds", "slowest_seconds")]
    assert 0 < usual[0] < usual[1]
    assert all(r["slowest_seconds"] <= r["seconds"] * 2 for r in metrics[5:])
    # The other rank waits for it, in collectives.
    waiting = [r["communication_rank"] for r in metrics[5:]]
    assert waiting.count(0) > len(waiting) / 2
    assert all(r["communication_max_seconds"] >= r["communication_seconds"] > 0 for r in metrics[1:])
    assert all(r["data_wait_max_seconds"] >= r["data_wait_seconds"] >= 0 for r in metrics)


@pytest.mark.long
def test_no_rank_is_named_in_a_thousand_even_steps(
    pool: ranks.RankPool, recipes: Path, tmp_path: Path
) -> None:
    settings = arguments(recipes, "lm", "zero2", tmp_path, "--training.max_steps", 1000)
    settings += ["--data.bins_per_step", "2", "--training.save_every", "1000", "--data.validation", "null"]
    (status, said), other = pool.run(2, ranks.train_and_listen, settings)
    assert (status, other[0]) == (0, 0)
    assert "times the median rank's time" not in said
    assert len(records(tmp_path)) == 1000 and not any("slow" in one for one in records(tmp_path))


def test_a_rank_that_is_always_slow_is_named(pool: ranks.RankPool, recipes: Path, tmp_path: Path) -> None:
    settings = arguments(recipes, "vae", "zero3", tmp_path, "--training.max_steps", 36)
    settings += ["--training.eval_every", "100", "--training.save_every", "100"]
    (status, said), other = pool.run(2, ranks.train_with_a_slow_rank, settings, 1)
    assert (status, other[0]) == (0, 0)
    [line] = [line for line in said.splitlines() if "times the median rank's time" in line]
    assert line.startswith("rank 1 (")
    lines = records(tmp_path)
    assert "slowest_rank" not in lines[0]
    assert [r["slowest_rank"] for r in lines[2:]] == [1] * 34
    assert all(r["data_wait_max_seconds"] >= r["data_wait_seconds"] >= 0 for r in lines)


def test_two_runs_of_one_name_are_two_at_weights_and_biases(tmp_path: Path) -> None:
    runs = [tmp_path / parent / "try" for parent in "ab"]
    for run in runs:
        run.mkdir(parents=True)
    first, second = map(wandb_id, runs)
    assert first != second
    assert [wandb_id(run) for run in runs] == [first, second]  # a resumed run keeps its id


def test_the_deepspeed_launcher_trains(recipes: Path, reference: dict[str, Path], tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2"]
    command += ["--master_addr", "127.0.0.1", "--master_port", str(ranks.free_port()), "pipeline/train.py"]
    command += arguments(recipes, "sllm", "zero3", tmp_path, "--training.max_steps", "6")
    environment = dict(os.environ) | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(tmp_path) == pytest.approx(losses(reference["sllm"]), abs=1e-4)


def test_a_signal_after_the_save_does_not_hide_the_requeue_status() -> None:
    """`srun --kill-on-bad-exit` sends TERM to the slower ranks once the first has left with 75."""
    script = (
        "import os, signal, sys; from data_prep.common.errors import REQUEUE; "
        "from pipeline.parallel.signals import StopSignals; stop = StopSignals(); "
        "os.kill(os.getpid(), signal.SIGUSR1); assert stop.received == 'SIGUSR1'; stop.ignore(); "
        "[os.kill(os.getpid(), s) for s in (signal.SIGTERM, signal.SIGUSR1)]; "
        # What the interpreter does to handlers of its own before it ends; ignored signals stay ignored.
        "assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN; sys.exit(REQUEUE)"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY).returncode == 75


@pytest.mark.parametrize("local_rank", ["0", "1"])
def test_a_signal_does_not_hide_that_the_input_is_bad(local_rank: str) -> None:
    """A rank that TERM kills while it refuses its recipe, or on its way out, would have a job requeued for
    ever."""
    script = (
        "import os, signal, sys; from data_prep.common.errors import run_main; "
        "from pipeline.training import main as train; "
        "load = train.load_recipe; "
        "train.load_recipe = lambda *given: os.kill(os.getpid(), signal.SIGTERM) or load(*given); "
        "status = run_main('train.py', lambda: train.main(sys.argv[1:])); "
        "assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN; sys.exit(status)"
    )
    environment = os.environ | {"RANK": local_rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    command = [sys.executable, "-c", script, "--config", "absent.yaml", "--deepspeed_config", "absent.json"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert ("absent.yaml" in done.stderr) == (local_rank == "0") and "Traceback" not in done.stderr
