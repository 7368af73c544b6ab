"""Layout `stack` from training to export: ZeRO-3, resumed, checked, evaluated, generated, described."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from helpers import ranks
from helpers.runs import arguments, losses, records

from pipeline.evaluation.audit import audit
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.self_check import check_folder
from pipeline.export.model_folder import export_run
from pipeline.models.inference import load_for_generation
from pipeline.models.stack import StackLM


@pytest.fixture(scope="module")
def plain(pool: ranks.RankPool, recipes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process without partitioning."""
    run = tmp_path_factory.mktemp("stack") / "plain"
    assert pool.run(1, ranks.train, arguments(recipes, "stack", "zero0", run)) == [0]
    learned = losses(run)
    assert learned[-1] < learned[0] - 0.2
    return run


@pytest.mark.parametrize("overrides", [(), ("--training.activation_checkpointing", "true")])
def test_two_ranks_under_zero3_train_alike(overrides, pool, recipes, plain, tmp_path) -> None:
    settings = arguments(recipes, "stack", "zero3", tmp_path, *overrides)
    assert pool.run(2, ranks.train, settings) == [0, 0]
    assert losses(tmp_path) == pytest.approx(losses(plain), abs=1e-4)
    for name in ("bits_per_byte", "operations", "padding_share", "tokens"):
        ours, theirs = ([r[name] for r in records(run)] for run in (tmp_path, plain))
        assert ours == pytest.approx(theirs, abs=1e-4), name


@pytest.mark.parametrize("ends", ["predicted", "rule"])
def test_the_export_passes_every_check_and_writes(ends, pool, recipes, tiny_valid_shards, tmp_path) -> None:
    run, folder = tmp_path / "run", tmp_path / "model"
    first = arguments(recipes, "stack", "zero3", run, "--training.max_steps", 4, "--model.ends", ends)
    assert pool.run(2, ranks.train, first) == [0, 0]
    again = arguments(recipes, "stack", "zero3", run, "--model.ends", ends)
    assert pool.run(1, ranks.train, again) == [0]  # resumed by one rank
    assert audit(run)["clean"]
    export_run(run, folder, "last")
    report = check_folder(folder, documents=3)
    assert report["kind"] == "sllm" and report["passed"], report
    result = evaluate(folder, tiny_valid_shards, max_documents=3)
    assert result["bits_per_byte"] > 0 and result["vector_gain"] is not None
    assert (result["stop_nll_nats"] == 0) == (ends == "rule")
    model, tokenizer = load_for_generation(folder)
    assert isinstance(model, StackLM)
    assert model.generate("The list is", tokenizer, max_sentences=3, temperature=1.0, seed=1)
    card = (folder / "README.md").read_text()
    assert "one stack" in card and "StackLM.from_pretrained" in card
    assert "| token layers attention_window | 12 |" in card
    assert json.loads((folder / "config.json").read_text())["model_type"] == "sllm_stack"


ROTARY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 512,
}


@pytest.mark.long
@pytest.mark.parametrize("memory", [0, 3])
@pytest.mark.parametrize(
    "family",
    # GPT-NeoX has as many heads of keys as of queries, and no key for them.
    [
        {"model_type": "llama", "num_key_value_heads": 2},
        {"model_type": "qwen2", "num_key_value_heads": 2},
        {"model_type": "gpt_neox"},
    ],
    ids=["llama", "qwen2", "gpt_neox"],
)
def test_every_family_passes_every_check_after_zero3(family, memory, pool, recipes, tmp_path) -> None:
    recipe = yaml.safe_load((recipes / "stack.yaml").read_text())
    recipe["model"] |= {"memory": memory, "backbone": family | ROTARY}
    recipe["training"] |= {"max_steps": 3}
    (tmp_path / "family.yaml").write_text(yaml.safe_dump(recipe))
    run, folder = tmp_path / "run", tmp_path / "model"
    assert pool.run(2, ranks.train, arguments(tmp_path, "family", "zero3", run)) == [0, 0]
    export_run(run, folder, "last")
    report = check_folder(folder, documents=3)
    assert report["passed"], report
