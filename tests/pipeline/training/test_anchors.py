"""Layout `anchors` from pretrained weights to export: ZeRO-3, frozen parts, exact resume, checks, use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from helpers import ranks
from helpers.model_folders import save, small_model
from helpers.runs import arguments, losses, records

from data_prep.text.tokenizer import load_tokenizer
from pipeline.evaluation.audit import audit
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.self_check import check_folder
from pipeline.export.model_folder import export_run
from pipeline.models.anchor_lm import AnchorLM
from pipeline.models.inference import load_for_generation


@pytest.fixture(scope="module")
def source(tiny_tokenizer, tmp_path_factory) -> str:
    """The folder of a token model that the runs start from."""
    tokenizer = load_tokenizer(tiny_tokenizer)
    return save(small_model("lm", tokenizer, noise=0.02), tmp_path_factory.mktemp("source") / "lm", tokenizer)


@pytest.fixture(scope="module")
def recipe(recipes: Path, source: str, tmp_path_factory) -> Path:
    """anchors.yaml, which starts from the source and freezes its first layer."""
    values = yaml.safe_load((recipes / "anchors.yaml").read_text())
    values["model"]["backbone"] = {"path": source}
    values["optimizer"]["parts"] = {
        "tokens.model.model.decoder.layers.0": {"freeze": True},
        "offset": {"lr_scale": 10.0},
    }
    values["schedule"] = {"kind": "constant"}  # a run of fewer steps has the same rates
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "anchors.yaml").write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="module")
def plain(pool: ranks.RankPool, recipe: Path, tmp_path_factory) -> Path:
    """The run of one process without partitioning."""
    run = tmp_path_factory.mktemp("anchors") / "plain"
    assert pool.run(1, ranks.train, arguments(recipe, "anchors", "zero0", run)) == [0]
    assert losses(run)[-1] < losses(run)[0] - 0.2
    return run


def test_two_ranks_under_zero3_train_alike_and_resume_exactly(pool, recipe, plain, tmp_path) -> None:
    first = arguments(recipe, "anchors", "zero3", tmp_path, "--training.max_steps", 4)
    assert pool.run(2, ranks.train, first) == [0, 0]
    assert pool.run(2, ranks.train, arguments(recipe, "anchors", "zero3", tmp_path)) == [0, 0]
    assert losses(tmp_path) == pytest.approx(losses(plain), abs=1e-4)
    for name in ("bits_per_byte", "operations", "tokens"):
        ours, theirs = ([r[name] for r in records(run)] for run in (tmp_path, plain))
        assert ours == pytest.approx(theirs, abs=1e-4), name
    assert audit(tmp_path)["clean"]


def test_a_resumed_run_is_the_same_run(pool, recipe, plain, tmp_path) -> None:
    first = arguments(recipe, "anchors", "zero0", tmp_path, "--training.max_steps", 4)
    assert pool.run(1, ranks.train, first) == [0]
    assert pool.run(1, ranks.train, arguments(recipe, "anchors", "zero0", tmp_path)) == [0]
    assert losses(tmp_path) == losses(plain)


def test_the_export_passes_every_check_and_writes(plain, source, tiny_valid_shards, tmp_path) -> None:
    folder = tmp_path / "model"
    export_run(plain, folder, "last")
    report = check_folder(folder, documents=3)
    assert report["kind"] == "lm" and report["passed"], report
    result = evaluate(folder, tiny_valid_shards, max_documents=3)
    assert result["bits_per_byte"] < evaluate(source, tiny_valid_shards, max_documents=3)["bits_per_byte"]
    model, tokenizer = load_for_generation(folder)
    assert isinstance(model, AnchorLM)
    assert model.generate("The list is", tokenizer, max_sentences=3, temperature=1.0, seed=1)
    before, _ = load_for_generation(source)
    for number in range(2):
        now, then = (lm.model.model.decoder.layers[number].fc1.weight for lm in (model.tokens, before.lm))
        assert torch.equal(now, then) == (number == 0)
    assert "AnchorLM.from_pretrained" in (folder / "README.md").read_text()
