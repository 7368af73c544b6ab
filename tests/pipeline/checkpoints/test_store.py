"""Which checkpoint a run may resume from, whichever of its settings have changed; what a save accepts."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from helpers.runs import VAE

from data_prep.common.errors import UserError
from data_prep.common.files import json_bytes
from pipeline.checkpoints import loading, saving, store
from pipeline.checkpoints.store import Meta
from pipeline.config.schema import Recipe

# Keys that decide the weights, the order of bins or the optimizer's states.
FIXED = {"seed", "data.window_tokens", "data.bin_tokens", "data.bins_per_step", "data.weights"}
FIXED |= {"optimizer.parts", "training.ema"}


def meta(**settings: Any) -> Meta:
    recipe = {
        "objective": "vae",
        "output_dir": "run",
        "data": {"shards": ["a"]},
        "model": {"vae": VAE},
        "training": {"max_steps": 9},
    }
    values = {
        "objective": "vae",
        "step": 4,
        "position": [[4, 0, 0, 0, 4]],
        "consumed": [],
        "tokens": 100,
        "best": None,
        "world": 1,
        "zero_stage": 1,
        "shards": ["1" * 64],
        "validation": None,
        "tokenizer": "2" * 64,
        "model_config": {"hidden_size": 32, "layers": 1},
        "recipe": Recipe.model_validate(recipe).to_dict(),
    }
    return Meta(**values | settings)


def keys_of(values: dict[str, Any], where: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict) and value and f"{where}{key}" != "model":
            yield from keys_of(value, f"{where}{key}.")
        else:
            yield f"{where}{key}"


def test_what_decides_the_run_may_not_change_and_all_else_may() -> None:
    saved, here = meta(), Path("here")
    keys = list(keys_of(saved.recipe))
    assert FIXED <= set(keys) and len(keys) > 40
    for key in keys:
        ours = copy.deepcopy(saved)
        *sections, last = key.split(".")
        values = ours.recipe
        for section in sections:
            values = values[section]
        values[last] = "another"
        if key in FIXED:
            with pytest.raises(UserError, match=f"{key} is .* there and .* here"):
                store.require_same_run(saved, here, ours)
        else:
            store.require_same_run(saved, here, ours)
    for settings, name in (
        ({"objective": "lm"}, "objective"),
        ({"model_config": {"hidden_size": 32, "layers": 2}}, "model.layers"),
        ({"shards": ["3" * 64]}, "data.shards"),
        ({"shards": ["1" * 64, "3" * 64]}, "data.shards"),
    ):
        with pytest.raises(UserError, match=f"{name} is"):
            store.require_same_run(saved, here, meta(**settings))
    store.require_same_run(saved, here, meta(validation="4" * 64, world=3, zero_stage=3, tokens=7, step=9))
    for was, now in ((0, 1), (3, 0)):
        with pytest.raises(UserError, match="stage"):
            store.require_same_run(meta(zero_stage=was), here, meta(zero_stage=now))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Checkpoints 2, 4, 6 and 8 of files of several sizes; 6 is the latest, 4 the best."""
    for step in (2, 4, 6, 8):
        folder = store.checkpoints_folder(tmp_path) / store.step_name(step)
        folder.mkdir(parents=True)
        files = {}
        for number in range(5):
            data = bytes([step]) * (10 + number)
            (folder / f"part-{number}.pt").write_bytes(data)
            files[f"part-{number}.pt"] = [len(data), hashlib.sha256(data).hexdigest()]
        store.write_meta(folder, meta(step=step, files=files, best={"step": 4, "bits_per_byte": 2.0}))
    (store.checkpoints_folder(tmp_path) / "latest").write_text(store.step_name(6) + "\n")
    return tmp_path


def test_the_latest_and_the_best_are_the_named_ones(run: Path) -> None:
    """What is beyond `latest` was left by an earlier start."""
    assert [path.name for path in store.listed(run)[0]] == [store.step_name(step) for step in (6, 4, 2)]
    assert store.newest_whole(run)[1].step == store.find(run)[1].step == 6
    assert store.find(run, "best")[1].step == 4
    assert store.steps_of_whole(run) == [6, 4, 2]
    folder = store.checkpoints_folder(run)
    assert store.beyond(run, folder / store.step_name(6)) == {store.step_name(8)}
    store.prune(folder, store.step_name(6), store.step_name(2), 1)
    assert sorted(int(path.name[5:]) for path in folder.glob("step-*")) == [2, 6, 8]


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("number", range(5))
def test_every_file_is_read_before_it_is_used(run: Path, number: int, one_rank: None) -> None:
    """A changed byte leaves size and meta.json as they were."""
    part = store.checkpoints_folder(run) / store.step_name(6) / f"part-{number}.pt"
    part.write_bytes(b"\0" + part.read_bytes()[1:])
    _, found, damage = loading.agree_on_newest_whole(run)
    assert found.step == 4 and part.name in damage


def test_a_save_accepts_files_as_they_were_written_only(tmp_path: Path) -> None:
    here, other, copied = (tmp_path / name for name in ("here.pt", "other.pt", "script.py"))
    here.write_bytes(b"1234")
    other.write_bytes(b"12345")
    copied.write_bytes(b"by DeepSpeed")
    written = {str(here): [4, "a"], str(other): [5, "b"]}
    files = saving._files(tmp_path, written)
    digest = hashlib.sha256(b"by DeepSpeed").hexdigest()
    assert files == {"here.pt": [4, "a"], "other.pt": [5, "b"], "script.py": [12, digest]}
    for size in (4, 6):
        other.write_bytes(b"1" * size)
        with pytest.raises(OSError, match=f"has {size} bytes, 5 were written"):
            saving._files(tmp_path, written)
    other.unlink()
    with pytest.raises(OSError, match="written by another rank and is not there"):
        saving._files(tmp_path, written)


def test_a_resume_keeps_the_settings_of_this_start() -> None:
    """DeepSpeed's optimizers load the settings of the start that wrote a checkpoint with it."""
    groups = [
        {"params": [1], "lr": 0.1, "weight_decay": 0.5},
        {"params": [2], "lr": 0.1, "weight_decay": 0.0},
    ]
    optimizer = SimpleNamespace(param_groups=copy.deepcopy(groups), clip_grad=1.0)

    def load_checkpoint(*_: Any, **__: Any) -> tuple[str, None]:
        optimizer.param_groups = [{"params": ["loaded"], "lr": 9.0, "weight_decay": 9.0} for _ in groups]
        optimizer.clip_grad = 9.0
        return "there", None

    engine = SimpleNamespace(optimizer=optimizer, load_checkpoint=load_checkpoint)
    loading.restore(engine, Path("there"), meta(), world=1, zero_stage=1)
    assert optimizer.param_groups == [{**group, "params": ["loaded"]} for group in groups]
    assert optimizer.clip_grad == 1.0


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", "null", "{}", '{"format_version": "a"}'])
def test_a_description_that_is_none_is_damage(text: str, tmp_path: Path) -> None:
    (tmp_path / store.META).write_text(text)
    with pytest.raises(store.DamagedCheckpoint, match=f"is damaged: {store.META} does not parse"):
        store.read_meta(tmp_path)


def test_any_changed_value_of_a_description_is_damage(tmp_path: Path) -> None:
    store.write_meta(tmp_path, meta())
    written = json.loads((tmp_path / store.META).read_bytes())
    for tokens in range(10**6, 10**6 + 12):
        (tmp_path / store.META).write_bytes(json_bytes({**written, "tokens": tokens}))
        with pytest.raises(store.DamagedCheckpoint, match="not as it was written"):
            store.read_meta(tmp_path)
