"""`sllm audit`: clean for a run that is; a finding for whatever is lost, repeated, exchanged or edited."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from helpers import ranks
from helpers.paths import REPOSITORY

from data_prep.common.errors import UserError
from pipeline.cli import main as cli
from pipeline.evaluation.audit import audit


@pytest.fixture(scope="module")
def arguments(tiny_shards: Path, tiny_valid_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list:
    recipe = {
        "objective": "vae",
        "output_dir": "set by every run",
        "data": {
            "shards": [str(tiny_shards), str(tiny_valid_shards)],
            "weights": [2, 1],
            "window_tokens": 128,
            "bin_tokens": 256,
            "bins_per_step": 3,  # of two ranks, one has a bin less
        },
        "model": {"vae": {"hidden_size": 32, "layers": 1, "heads": 4}},
        "training": {"max_steps": 6, "save_every": 2, "keep": 3},
        "log": {"tensorboard": False},
    }
    path = tmp_path_factory.mktemp("recipe") / "vae.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return ["--config", str(path), "--deepspeed_config", str(REPOSITORY / "ds_configs" / "zero1.json")]


@pytest.fixture(scope="module")
def good_run(pool: ranks.RankPool, arguments: list, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps: four of two ranks, then two more of one."""
    run = tmp_path_factory.mktemp("good") / "run"
    for world, steps in ((2, "4"), (1, "6")):
        command = [*arguments, "--output_dir", str(run), "--training.max_steps", steps]
        assert pool.run(world, ranks.train, command) == [0] * world
    return run


@pytest.fixture
def run(good_run: Path, tmp_path: Path) -> Path:
    """A copy, to be spoilt."""
    return Path(shutil.copytree(good_run, tmp_path / "run"))


def test_a_good_run_is_clean(good_run: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["audit", str(good_run), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["clean"] and result["findings"] == []
    assert (result["steps"], result["bins"]) == (6, 18)
    assert [start["step"] for start in result["starts"]] == [0, 4]
    assert result["checkpoints"] == ["step-00000002", "step-00000004", "step-00000006"]
    assert cli.main(["audit", str(good_run)]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{good_run}: clean: 6 steps trained on 18 bins (")
    assert "1 restart, 1 of them with another number of ranks" in text
    assert "from step 5 on: 2 → 1 rank" in text


def test_what_is_in_the_metrics_is_counted_over_all_ranks(good_run: Path) -> None:
    records = [json.loads(line) for line in (good_run / "metrics.jsonl").read_text().splitlines()]
    assert [record["bins"] for record in records] == [3] * 6
    assert len({record["bins_digest"] for record in records}) == 6


def edit(change: Callable[[dict], dict]) -> Callable[[list[str]], list[str]]:
    """Change the record of step 3."""
    return lambda lines: [*lines[:2], json.dumps(change(json.loads(lines[2]))), *lines[3:]]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda lines: lines[:2] + lines[3:], "step 3 is missing in metrics.jsonl"),
        (lambda lines: lines[:1] + lines[4:], "steps 2 to 4 are missing in metrics.jsonl"),
        (lambda lines: lines[:3] + lines[2:], "step 3 is twice in metrics.jsonl (line 4)"),
        (lambda lines: lines[:2] + [lines[3], lines[2]] + lines[4:], "step 3 comes after step 4"),
        (lambda lines: lines[:2] + ["{"] + lines[3:], "line 3: not the record of a step"),
        (lambda lines: lines[:3], "step-00000004: metrics.jsonl ends before it"),
        (edit(lambda r: r | {"bins_digest": r["bins_digest"] ^ 1}), "step 3 computed other bins"),
        (edit(lambda r: r | {"bins": 2}), "step 3 computed other bins than planned: 2 with"),
        (edit(lambda r: {k: v for k, v in r.items() if k != "bins"}), "(no count or digest)"),
        (edit(lambda r: r | {"targets": r["targets"] + 1}), "step 3: targets is"),
        (edit(lambda r: r | {"tokens": r["tokens"] - 1}), "step 3: tokens is"),
    ],
)
def test_metrics_that_were_changed_are_found(run: Path, spoil: Callable, said: str) -> None:
    metrics = run / "metrics.jsonl"
    metrics.write_text("".join(line + "\n" for line in spoil(metrics.read_text().splitlines())))
    result = audit(run)
    assert not result["clean"]
    assert any(said in finding for finding in result["findings"]), result["findings"]


def test_half_a_line_that_a_kill_left_is_no_finding(run: Path) -> None:
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as out:
        out.write('{"step": 7, "ep')
    assert audit(run)["clean"]


def test_other_settings_than_the_runs_are_found(run: Path) -> None:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["data"]["weights"] = [1.0, 1.0]
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    findings = "\n".join(audit(run)["findings"])
    assert "data.weights is [2.0, 1.0] there and [1.0, 1.0] in recipe.yaml" in findings
    assert "step 1 " not in findings and "step 2 computed other bins" in findings
    assert "step-00000002: position is [[4, " in findings


def test_a_skipped_bin_is_found_and_named(
    pool: ranks.RankPool, arguments: list, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    command = [*arguments, "--output_dir", str(tmp_path / "run")]
    assert pool.run(2, ranks.train_with_wrong_bins, command, "skip") == [0, 0]
    assert cli.main(["audit", str(tmp_path / "run")]) == 1
    text = capsys.readouterr().out
    assert "NOT clean" in text and "step 1 " not in text and "step 3 computed other bins" in text
    # The sources of the stream's bins are 0 1 0, 0 1 0, 0 1 0.
    assert "step 2 computed other bins than planned: 3 with digest" in text
    assert (
        "bin 1 of part 0, group 0, epoch 0, source 1 is missing, "
        "bin 4 of part 0, group 0, epoch 0, source 0 was computed for it" in text
    )
    ranges = "[[[0, 0, 0, 0], [0, 0, 0, 9]]], [[[0, 0, 0, 0], [0, 0, 0, 1]], [[0, 0, 0, 2], [0, 0, 0, 4]]]"
    assert f"step-00000004: consumed is [{ranges}] there" in text


def test_a_rank_that_computes_anothers_bins_is_found(
    pool: ranks.RankPool, arguments: list, tmp_path: Path
) -> None:
    command = [*arguments, "--output_dir", str(tmp_path / "run"), "--training.max_steps", "2"]
    assert pool.run(2, ranks.train_with_wrong_bins, command, "twice") == [0, 0]
    findings = audit(tmp_path / "run")["findings"]
    assert [finding for finding in findings if "step 1 computed other bins than planned: 4 with" in finding]
    assert not [finding for finding in findings if "checkpoint" in finding]  # only the digests can tell


def test_shards_may_move_but_must_be_the_same(
    run: Path, tiny_shards: Path, tiny_valid_shards: Path, tmp_path: Path
) -> None:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["data"]["shards"] = [str(tmp_path / "gone"), str(tmp_path / "away")]
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(UserError, match="gone does not exist"):
        audit(run)
    assert audit(run, [str(tiny_shards), str(tiny_valid_shards)])["clean"]
    with pytest.raises(UserError, match="not the shards that checkpoint step-00000002 was trained on"):
        audit(run, [str(tiny_valid_shards), str(tiny_shards)])
    with pytest.raises(UserError, match="not a run directory"):
        audit(tmp_path)
