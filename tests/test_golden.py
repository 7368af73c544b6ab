"""What commit d2dd794 computed and wrote, and what still reads it (records: tests/data/golden/record.py).

On one machine and one set of packages the figures agree to the last digit; the tolerances leave room for
another CPU.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from helpers import ranks
from helpers.data_prep_command import data_prep
from helpers.paths import REPOSITORY

from data_prep.shards.reader import ShardSet

GOLDEN = Path(__file__).parent / "data" / "golden"
ARTIFACTS = GOLDEN / "artifacts"
OBJECTIVES = ("vae", "sllm", "lm")
# Documents that version 3 of the segmenter cuts otherwise, and the sentences that they gain:
# "彼は「はい。」と言った。" and "Das gilt z. B. für Dr. Müller." are one sentence each.
RECUT = {"cases-zh-8": -1, "cases-other-0": -1}


def recorded(name: str) -> dict:
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def record() -> ModuleType:
    """The program that made the records: its recipes and digests are used here too."""
    spec = importlib.util.spec_from_file_location("golden_record", GOLDEN / "record.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the four shard sets, made again from the corpus."""
    folder = tmp_path_factory.mktemp("golden") / "shards"
    for segmenter in ("clause", "sentence"):
        for name in ("train", "valid"):
            made = ("--input", GOLDEN / "corpus" / f"{name}.jsonl.gz", "--tokenizer", GOLDEN / "tokenizer")
            sizes = ("--segmenter", segmenter, "--unit-mb", "1", "--shard-mb", "1")
            data_prep("shard", "--output", folder / f"{segmenter}-{name}", *made, *sizes)
    return folder


def test_shards_have_the_same_bytes(shards: Path, record: ModuleType) -> None:
    """The train shards' records are of the segmenter's version 3 (see RECUT), the others of that time."""
    for name, files in recorded("shards").items():
        # The manifest names its input by a path: it is compared without it.
        assert {k: v for k, v in record.digests(shards / name).items() if k != "manifest.json"} == {
            k: v for k, v in files.items() if k != "manifest.json"
        }


def test_shards_of_that_time_verify_and_equal_new_ones(shards: Path) -> None:
    """Shards of that time still open, and differ from new ones in the cuts of RECUT alone."""
    recut = {}
    for name in ("clause-train", "clause-valid"):
        data_prep("verify", ARTIFACTS / "shards" / name)
        old, new = (ShardSet.open(folder / name) for folder in (ARTIFACTS / "shards", shards))
        assert new.manifest["settings"] | {"segmenter_version": 2} == old.manifest["settings"]
        for then, now in zip(old.documents(), new.documents(), strict=True):
            assert (now.facts(), now.bytes, now.text_hash) == (then.facts(), then.bytes, then.text_hash)
            assert np.array_equal(now.tokens, then.tokens)
            if not np.array_equal(now.sentence_lengths, then.sentence_lengths):
                recut[now.id] = now.sentence_lengths.size - then.sentence_lengths.size
    assert recut == RECUT


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_thirty_steps(objective: str, record: ModuleType, pool: ranks.RankPool, tmp_path: Path) -> None:
    recipe = record.write_recipe(tmp_path, objective)
    arguments = command(record, recipe, tmp_path / "run", ARTIFACTS / "shards")
    assert pool.run(2, ranks.train, arguments) == [0, 0]
    assert_steps(tmp_path / "run", recorded("steps")[objective])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_checkpoint_of_that_time_resumes(
    objective: str, record: ModuleType, pool: ranks.RankPool, tmp_path: Path
) -> None:
    shutil.copytree(ARTIFACTS / "runs" / objective, tmp_path / "run")
    recipe = record.write_recipe(tmp_path, objective)
    arguments = command(record, recipe, tmp_path / "run", ARTIFACTS / "shards")
    assert pool.run(2, ranks.train, arguments) == [0, 0]
    starts = [json.loads(line) for line in (tmp_path / "run" / "starts.jsonl").read_text().splitlines()]
    assert [start["step"] for start in starts] == [0, record.CUT]
    assert_steps(tmp_path / "run", recorded("steps")[objective])


def command(record: ModuleType, recipe: Path, run: Path, shards: Path) -> list[str]:
    strategy = record.REPOSITORY / "ds_configs" / "zero3.json"
    data = ("--data.shards", shards / "clause-train", "--data.validation", shards / "clause-valid")
    given = ("--config", recipe, "--deepspeed_config", strategy, "--output_dir", run, *data)
    return [str(one) for one in given]


def assert_steps(run: Path, expected: list[dict]) -> None:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in found] == list(range(1, len(expected) + 1))
    for now, then in zip(found, expected, strict=True):
        assert now["bins_digest"] == then["bins_digest"]
        for key in ("loss", "grad_norm", "bits_per_byte"):
            assert now[key] == pytest.approx(then[key], rel=1e-4), f"{key} of step {now['step']}"


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_model_folders_of_that_time_evaluate(objective: str) -> None:
    from pipeline.evaluation.evaluate import evaluate

    found = evaluate(ARTIFACTS / "models" / objective, text=GOLDEN / "corpus" / "valid.jsonl.gz")
    for key, value in recorded("evaluations")[objective].items():
        assert found[key] == pytest.approx(value, rel=1e-6), key


def test_model_folder_of_that_time_writes_the_same_texts(record: ModuleType) -> None:
    from pipeline.cli import generate as generate_command

    for asked, expected in recorded("texts").items():
        how, prompt = asked.split(": ", 1)
        options = record.WRITING[how]
        settings = {options[at][2:]: float(options[at + 1]) for at in range(0, len(options), 2)}
        settings["seed"] = int(settings["seed"]) if "seed" in settings else None
        written = generate_command.generate_prompt(
            ARTIFACTS / "models" / "sllm",
            prompt,
            generate_command.settings(max_sentences=8, **settings),
            None,
        )
        assert {key: written[key] for key in expected} == expected


def test_recipes_resolve_to_the_same_values() -> None:
    from pipeline.config.schema import load_recipe

    folder = REPOSITORY / "pipeline" / "recipes"
    for name, expected in recorded("recipes").items():
        assert load_recipe(folder / f"{name}.yaml", ["--data.shards", "SHARDS"]).to_dict() == expected, name


def test_records_are_small() -> None:
    files = [path for path in GOLDEN.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(os.path.getsize(path) for path in files) <= 2_000_000
