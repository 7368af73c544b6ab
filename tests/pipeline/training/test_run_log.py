"""The records of a run, and what must not end it: files that are not as we wrote them, Weights & Biases."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.paths import REPOSITORY

from data_prep.common.errors import UserError
from pipeline.config.schema import Recipe, load_recipe
from pipeline.training.records import StepRecord
from pipeline.training.run_log import EVALUATIONS, METRICS, SAVES, STARTS, RunLog, read_records

RECIPES = REPOSITORY / "pipeline" / "recipes"
EVALUATION = {"step": 1, "bits_per_byte": 2.0, "ppl": 9.0, "best": True}


def recipe(run: Path, wandb: bool = True) -> Recipe:
    settings = ["--output_dir", str(run), "--log.tensorboard", "false", "--log.wandb", str(wandb).lower()]
    return load_recipe(str(RECIPES / "demo-vae.yaml"), settings)


def broken(*_: object, **__: object) -> None:
    raise RuntimeError("no network\nsecond line")


def test_what_is_no_record_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\0\0\xff\xfe\n7\nnull\n["step"]\n{"loss": 1}\n{"step": 2}\n{"st')
    assert read_records(path) == [{"step": 1}, {"step": 2}]


def test_a_board_that_does_not_begin_is_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=broken))
    with pytest.raises(UserError, match=r"RuntimeError: no network\).*--log.wandb false") as refused:
        RunLog(tmp_path, recipe(tmp_path), 0, 0)
    assert "\n" not in str(refused.value)


def test_a_board_that_fails_later_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sent = []

    def log(curves: dict, step: int) -> None:
        sent.append(step)
        if step == 2:
            broken()

    board = SimpleNamespace(log=log, finish=broken)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: board))
    with RunLog(tmp_path, recipe(tmp_path), 0, 0) as run_log:
        for step in (1, 2, 3):
            run_log.evaluation(EVALUATION | {"step": step})
    said = "log.wandb: nothing is sent to Weights & Biases any more (RuntimeError: no network)"
    assert sent == [1, 2] and capsys.readouterr().out.count(said) == 1
    assert [json.loads(line)["step"] for line in open(tmp_path / "evaluations.jsonl")] == [1, 2, 3]

    with RunLog(tmp_path, recipe(tmp_path), 0, 3):
        pass
    assert capsys.readouterr().out == said + "\n"  # it fails when it ends


def test_a_step_s_record_has_its_optional_fields_only_where_they_are_known(tmp_path: Path) -> None:
    figures: dict = {field.name: 1 for field in dataclasses.fields(StepRecord)}
    figures |= {f.name: None for f in dataclasses.fields(StepRecord) if f.default is None}
    figures |= {"mfu": None, "loss": math.nan}
    with RunLog(tmp_path, recipe(tmp_path, wandb=False), 0, 0) as run_log:
        run_log.step(StepRecord(**figures))
        run_log.step(StepRecord(**figures | {"step": 2, "kl": 0.5, "skipped": "why"}))
    first, second = read_records(tmp_path / "metrics.jsonl")
    assert list(first) == [
        *("step", "epoch", "tokens", "loss", "bits_per_byte", "token_nll", "end_nll", "stop_nll"),
        *("targets", "bytes", "bins", "bins_digest", "tokens_per_second", "padding_share"),
        *("data_wait_seconds", "data_wait_max_seconds", "data_wait_rank", "grad_norm", "lr", "skips"),
        *("memory_bytes", "operations", "mfu", "seconds", "time"),
    ]
    assert first["mfu"] is None and first["loss"] is None
    assert list(second)[8] == "kl" and second["skipped"] == "why" and "slowest_rank" not in second


def test_the_docs_name_every_field_of_a_step() -> None:
    page = (REPOSITORY / "docs" / "training.md").read_text()
    assert [field.name for field in dataclasses.fields(StepRecord) if f"`{field.name}`" not in page] == []


def test_steps_and_evaluations_are_on_the_disk_before_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append(os.readlink(f"/proc/self/fd/{handle}")))
    with RunLog(tmp_path, recipe(tmp_path, wandb=False), 0, 0) as log:
        flushed.clear()
        log.flush_to_disk()
    assert sorted(Path(name).name for name in flushed[:2]) == [EVALUATIONS, METRICS]


@pytest.mark.parametrize("step", [0, 3, 5])
def test_a_resume_keeps_the_records_up_to_its_checkpoint(step: int, tmp_path: Path) -> None:
    """The later ones are written again, and counted as lost."""
    for name in (METRICS, EVALUATIONS, SAVES):
        (tmp_path / name).write_text("".join(f'{{"step": {n}}}\n' for n in range(1, 6)) + '{"ste')
    with RunLog(tmp_path, recipe(tmp_path, wandb=False), 0, step) as log:
        log.start({"step": step})
        log.save({"step": step + 1, "save_seconds": 0.5})
    for name in (METRICS, EVALUATIONS, SAVES):
        found = [record["step"] for record in read_records(tmp_path / name)]
        assert found == [*range(1, step + 1), *[step + 1] * (name == SAVES)]
    assert read_records(tmp_path / STARTS) == [{"step": step, "lost_steps": 5 - step}]
